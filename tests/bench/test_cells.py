"""The store: what is there is whole, whatever happened before."""

import json
import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore, Failure
from agl_bench.bench.leases import STALE, Owner
from agl_bench.errors import BadWorkFolder

DEAD = replace(Owner.this(), pid=99_999_999).name  # above any system's largest process id


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "work")


@pytest.fixture
def result(make_result):
    return make_result()


def hidden(store):
    return sorted(path.name for path in store.cells.glob(".*"))


def test_round_trip(store, result):
    assert store.read(result.spec.key) is None
    store.write(result)
    again = store.read(result.spec.key)
    pd.testing.assert_frame_equal(again.genes, result.genes)
    pd.testing.assert_frame_equal(again.epochs, result.epochs)
    for name in ("scores", "best_epoch", "counts", "cost", "provenance", "fold", "pcc"):
        assert getattr(again, name) == getattr(result, name)
    assert again.spec.as_json() == json.loads(json.dumps(result.spec.as_json()))
    assert hidden(store) == []


def test_write_twice_keeps_the_later(store, make_result):
    for pcc in (0.1, 0.2):
        store.write(make_result(pcc=pcc))
    assert [r.pcc for r in store] == [0.2]
    assert hidden(store) == []


def test_iteration_skips_what_is_no_cell(store, make_result):
    for fold in ("D1", "D2"):
        store.write(make_result(fold=fold))
    (store.cells / "notes.txt").write_text("mine")
    (store.cells / ".hidden").mkdir()
    assert [r.spec.key for r in store] == sorted(make_result(fold=f).spec.key for f in ("D1", "D2"))


def test_what_a_killed_process_left_is_swept(store, result):
    store.write(result)
    key = result.spec.key
    half = store.cells / f".new-other-{DEAD}"
    half.mkdir()
    (half / "genes.parquet").write_bytes(b"PAR1")
    (store.cells / f".old-{key}-{DEAD}").mkdir()
    store = CellStore(store.work)
    assert hidden(store) == []
    assert store.read(key) is not None


def test_killed_between_the_two_renames(store, result):
    store.write(result)
    key = result.spec.key
    (store.cells / key).rename(store.cells / f".old-{key}-{DEAD}")
    shutil.copytree(store.cells / f".old-{key}-{DEAD}", store.cells / f".new-{key}-{DEAD}")
    store = CellStore(store.work)
    assert hidden(store) == []
    assert store.read(key).pcc == result.pcc


def test_what_a_living_process_writes_stays(store):
    half = store.cells / f".new-other-{Owner.this().name}"
    half.mkdir()
    fold = store.folds / f"aa.csv.{Owner.this().name}"
    fold.touch()
    CellStore(store.work)
    assert half.is_dir() and fold.is_file()


def test_a_process_elsewhere_lives_until_its_files_are_old(store):
    """Its number means nothing here."""
    for number in ("1", "99999999"):
        half = store.cells / f".new-other-elsewhere~{number}~5~0a~0b"
        half.mkdir()
        CellStore(store.work)
        assert half.is_dir()
        before = half.stat().st_mtime - STALE - 5
        os.utime(half, (before, before))
        CellStore(store.work)
        assert not half.exists()


def test_a_number_used_again_is_not_the_process(store):
    later = replace(Owner.this(), started="1")
    (store.cells / f".new-other-{later.name}").mkdir()
    CellStore(store.work)
    assert hidden(store) == []


@pytest.mark.parametrize("name", ["genes.parquet", "epochs.parquet", "outer.parquet", "result.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "absent", "empty"])
def test_damage_counts_as_absent_and_is_set_aside(store, result, name, damage):
    store.write(result)
    path = store.cells / result.spec.key / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "changed":
        path.write_bytes(content.replace(b'"', b"'") if name == "result.json" else content[:-9] + b"x" + content[-8:])
    elif damage == "empty":
        path.write_bytes(b"")
    said = []
    store = CellStore(store.work, warn=said.append)
    assert store.read(result.spec.key) is None
    assert hidden(store) == [f".damaged-{result.spec.key}"]
    (sentence,) = said
    assert sentence.startswith(f"the result of cell {result.spec.key} is damaged (")
    assert f"set aside as {store.cells}" in sentence
    assert list(store) == []
    store.write(result)
    assert store.read(result.spec.key) is not None


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"format": 2}', '{"format": 2, "digests": [], "spec": 3}'])
def test_json_of_another_shape(store, result, content):
    store.write(result)
    (store.cells / result.spec.key / "result.json").write_text(content)
    assert store.read(result.spec.key) is None


def test_copy_under_another_key_is_not_that_cell(store, make_result):
    one, other = make_result(fold="D1").spec.key, make_result(fold="D2").spec.key
    store.write(make_result(fold="D1"))
    shutil.copytree(store.cells / one, store.cells / other)
    assert store.read(other) is None
    assert store.read(one) is not None


def test_success_removes_the_failure(store, result):
    details = store.write_failure(result.spec, "it broke", "Traceback: lines")
    assert details.read_text().startswith("it broke\n\nTraceback")
    assert json.loads((details.parent / "spec.json").read_text())["fold"] == "D1"
    assert store.failure(result.spec.key) == Failure("failed", "it broke", details)
    store.write_failure(result.spec, "again", "", "diverged")
    assert store.failure(result.spec.key) == Failure("diverged", "again", details)
    store.begun(result.spec.key).begin(result.spec)
    store.write(result)
    assert list(store.failed.iterdir()) == [] == list(store.partial.iterdir())
    assert store.failure(result.spec.key) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": "failed"', "3"])
def test_half_a_failure_is_none(store, result, content):
    details = store.write_failure(result.spec, "it broke", "")
    (details.parent / "failure.json").write_text(content)
    assert store.failure(result.spec.key) is None


def test_what_cannot_be_written_changes_nothing(store, result, monkeypatch):
    def full(self, path, index):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    store.write(result)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        store.write(result)
    assert hidden(store) == []
    assert store.read(result.spec.key) is not None


@pytest.mark.parametrize("place", ["work", "work/cells", "work/failed"])
def test_a_file_in_place_of_a_folder(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(BadWorkFolder, match=r"cannot write to the work folder .*work.*; choose another with --work"):
        CellStore(tmp_path / "work")


def test_a_place_where_nobody_can_write():
    from pathlib import Path

    with pytest.raises(BadWorkFolder, match="cannot write to the work folder /proc/agl"):
        CellStore(Path("/proc/agl"))


def test_a_folder_that_no_library_could_write_tables_to(tmp_path):
    with pytest.raises(BadWorkFolder, match=r"the work folder's name b'.*w\\xff' is not UTF-8; rename it"):
        CellStore(tmp_path / os.fsdecode(b"w\xff"))
