"""Finished cells outlive edits that change nothing, and are told where another version of the code has made them."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import agl_bench
from agl_bench.bench import prepare, spec, versions
from agl_bench.bench.cells import CellStore
from agl_bench.bench.merge import Outcome, merge, plan_merge
from agl_bench.cli import main
from agl_bench.registry.meaning import code_digest, file_meanings

FOLDS = "agl_bench/data/folds.py"


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Replace a text in a copy of agl-bench, whose code is the one that identities are made of."""
    copy = tmp_path / "copied" / "agl_bench"
    shutil.copytree(Path(agl_bench.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    caches = (spec.deciding_modules, spec._engine, prepare.code_digest)

    def look_again():
        for one in caches:
            one.cache_clear()

    def edit(file, old, new):
        path = copy.parent / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        look_again()

    monkeypatch.setattr(agl_bench, "__file__", str(copy / "__init__.py"))
    look_again()
    yield edit
    monkeypatch.undo()
    look_again()


@pytest.fixture
def agl(capsys, tmp_path, words):
    """Run a command on the small grid; returns what it says on both streams."""

    def agl(command, *more):
        capsys.readouterr()
        grid = () if command in ("status", "report") else ("--selectors", "pgl", *words)
        with pytest.raises(SystemExit) as caught:
            main([command, *grid, "--work", str(tmp_path / "work"), *more])
        said = capsys.readouterr()
        assert not caught.value.code, said.err
        return said.out, said.err

    return agl


def test_an_edit_of_prose_keeps_cells_and_another_is_told(edit, agl, tmp_path):
    agl("run")
    made = sorted(path.name for path in (tmp_path / "work" / "cells").iterdir())
    text = (tmp_path / "copied" / FOLDS).read_text(encoding="utf-8")
    docstring = text[: text.index('"""', 3) + 3]
    edit(FOLDS, docstring, '"""Folds, in other words."""  # and a comment')
    edit("agl_bench/training/trainer.py", "from agl_bench.", "# imports\nfrom agl_bench.")
    out, err = agl("run")
    assert "cells were finished before and kept" in out and err == ""
    assert sorted(path.name for path in (tmp_path / "work" / "cells").iterdir()) == made
    assert agl("status")[1] == ""

    edit(FOLDS, "Folds, in other words", "Folds")
    edit("agl_bench/maths/metrics.py", "\n\n\ndef ", "\n\n\nWIDTH = 3\n\n\ndef ")
    sentence = (
        f"agl-bench: {len(made)} finished cells were made by another version of the deciding code and are not reused: "
        "agl_bench/maths/metrics.py differs; they stay in the work folder, and `agl-bench report` shows them in lines "
        "of their own\n"
    )
    assert agl("status")[1] == sentence
    for command in (("run", "--dry-run"), ("plan",), ("run",)):
        assert agl(*command)[1].count(sentence) == 1
    assert agl("run")[1] == "", "all is finished by this version, too"
    found = json.loads(agl("status", "--json")[0])["other_versions"]
    assert [(one["cells"], one["files"]) for one in found] == [(len(made), ["agl_bench/maths/metrics.py"])]
    assert len(list((tmp_path / "work" / "code").iterdir())) == 2
    agl("report")
    page = (tmp_path / "work" / "report" / "report.html").read_text(encoding="utf-8")
    assert "#2" in page


@pytest.fixture
def older(make_result, tmp_path):
    """A work folder with a cell that is of an older version, and with its notes, by the name of the folder."""

    def older(name, version="0.0.1+0a", files=None):
        store, result = CellStore(tmp_path / name), make_result()
        store.write(replace(result, spec=replace(result.spec, version=version)))
        if files is not None:
            (store.work / "code").mkdir(exist_ok=True)
            (store.work / "code" / f"{version}.json").write_text(json.dumps(versions.signed(files)))
        return store

    return older


def test_without_notes_the_files_are_unknown(older, make_result):
    store = older("work")
    (found,) = versions.not_reused(store.work, [make_result().spec])
    assert (found.version, found.cells, found.files) == ("0.0.1+0a", 1, None)
    assert versions.told([found]) == (
        "1 finished cell was made by another version of the deciding code and is not reused, and which files "
        "differ is not recorded; it stays in the work folder, and `agl-bench report` shows it in a line of its own"
    )
    (store.work / "code").mkdir()
    for damage in ("", "{", '{"digest": "0a"}', "[]"):
        (store.work / "code" / "0.0.1+0a.json").write_text(damage)
        assert versions.not_reused(store.work, [make_result().spec]) == [found]


def test_only_cells_of_the_same_request_count(older, make_result):
    store, result = older("work"), make_result()
    assert versions.not_reused(store.work, [make_result(fold="D2").spec, make_result("agl").spec]) == []
    elsewhere = replace(result.spec, data="other", device="cuda")
    assert [v.cells for v in versions.not_reused(store.work, [elsewhere])] == [1]
    store.write(result)
    assert versions.not_reused(store.work, [result.spec]) == [], "it is finished by this version"


def test_files_that_came_and_went_differ(older, make_result):
    files = versions._files()
    gone = {name: digest for name, digest in files.items() if name != FOLDS} | {"agl_bench/old.py": "0a"}
    older("work", files=gone)
    store = older("work", version="0.0.2+0b", files=files | {FOLDS: "0a"})
    found = versions.others(store.work, [g["spec"] for g in store.glances()])
    assert {v.version: v.files for v in found} == {"0.0.1+0a": (FOLDS, "agl_bench/old.py"), "0.0.2+0b": (FOLDS,)}
    assert versions.told(found).startswith(
        "2 finished cells were made by 2 other versions of the deciding code and are not reused: "
        f"{FOLDS} and agl_bench/old.py differ; they stay"
    )


def test_many_files_are_counted():
    many = versions.Version("1+0a", 3, tuple(f"{n}.py" for n in range(7)))
    assert ": 0.py, 1.py, 2.py, 3.py and 3 more differ; " in versions.told([many])


def test_notes_are_written_once_and_merged(older, make_result, tmp_path):
    one, other = older("a", files={FOLDS: "0a"}), CellStore(tmp_path / "b")
    other.write(make_result(fold="D2"))
    (note,) = (other.work / "code").iterdir()
    before = note.stat().st_mtime_ns
    other.write(make_result(fold="D2", seed=1))
    assert note.stat().st_mtime_ns == before
    outcome = Outcome({}, [])
    list(merge(plan_merge([one.work, other.work], tmp_path / "work"), outcome))
    assert sorted(path.name for path in (tmp_path / "work" / "code").iterdir()) == sorted(["0.0.1+0a.json", note.name])
    (found,) = versions.not_reused(tmp_path / "work", [make_result().spec])
    assert FOLDS in found.files


def test_notes_that_cannot_be_written_harm_nothing(make_result, tmp_path):
    store = CellStore(tmp_path / "work")
    (store.work / "code").write_text("in the way")
    store.write(make_result())
    assert store.is_finished(make_result().spec.key)


def test_the_deciding_code_written_differently_is_the_same(tmp_path):
    """As Python itself would write it: without comments, with other quotes, brackets and lines."""
    modules, again = spec.deciding_modules(), {}
    for number, (name, path) in enumerate(modules.items()):
        again[name] = tmp_path / str(number) / path.name
        again[name].parent.mkdir()
        again[name].write_text(ast.unparse(ast.parse(path.read_bytes())), encoding="utf-8")
    assert code_digest(again, 8) == code_digest(modules, 8)
    assert file_meanings(again) == file_meanings(modules)
