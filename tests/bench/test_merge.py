"""Stores of several machines become one: nothing lost, nothing doubled, and no contradiction passes unseen."""

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from agl_bench.bench import cells, checkpoints
from agl_bench.bench.cells import CellStore
from agl_bench.bench.merge import Outcome, merge, plan_merge
from agl_bench.bench.tuned import Entry, read_entries, write_entry
from agl_bench.cli import main
from agl_bench.digests import read_signed, signed, text_digest
from agl_bench.errors import BadSpec, BadWorkFolder

ENTRY = Entry(
    study="a study", dataset="synthetic", evaluation="inter", backbone="tiny", fold="", trials=20, points=20, pruned=0,
    folds=("D1",), seeds=(0,), sampler="tpe", pruner="none", validation_pcc=0.5, conditions="0a",
    settings={"protocol.learning_rate": 0.001},
)  # fmt: skip


@pytest.fixture
def stores(tmp_path):
    return CellStore(tmp_path / "a"), CellStore(tmp_path / "b")


@pytest.fixture
def join(tmp_path):
    """Merge stores into `work`; returns how much was copied from each, and what was said."""

    def join(*stores, into=None, prefer=()):
        plan = plan_merge([s.work for s in stores], into or tmp_path / "work", [s.work for s in prefer])
        assert not plan.conflicts, list(map(str, plan.conflicts))
        outcome = Outcome({}, [])
        assert list(merge(plan, outcome)) == list(range(1, plan.steps + 1))
        assert [p.name for p in (plan.work / "leases").iterdir()] == []
        return {
            work.name: {k: n for k, n in count.items() if n and k != "cells"} for work, count in outcome.counts.items()
        }, outcome.notes

    return join


@pytest.fixture
def command(capsys):
    """Run a command in this process; its status, output and errors."""
    handler = signal.getsignal(signal.SIGTERM)

    def command(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(w) for w in words])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    yield command
    signal.signal(signal.SIGTERM, handler)


def content(work, *folders):
    """Name and content of every file of a store."""
    return {
        str(p.relative_to(work)): p.read_bytes()
        for folder in folders or ("cells", "failed", "folds", "partial", "tuned")
        for p in (work / folder).rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_cells_are_copied_whole_and_sources_stay(stores, make_result, join, tmp_path):
    one, other = stores
    for store, fold, seconds in ((one, "D1", 1.0), (one, "D2", 1.0), (other, "D2", 2.0), (other, "D1", 3.0)):
        store.write(make_result(fold=fold, seconds=seconds))
    other.write(make_result("agl"))
    before = content(one.work), content(other.work)
    assert join(one, other) == ({"a": {"copied": 2}, "b": {"copied": 1}}, [])
    assert (content(one.work), content(other.work)) == before
    work = tmp_path / "work"
    assert content(work, "cells") == content(other.work, "cells") | content(one.work, "cells")
    assert join(one, other) == ({"work": {}, "a": {}, "b": {}}, [])
    assert {r.spec.selector.name for r in CellStore(work)} == {"pgl", "agl"}


def test_into_one_of_them(stores, make_result, join):
    one, other = stores
    one.write(make_result(fold="D1"))
    other.write(make_result(fold="D2"))
    assert join(one, other, into=one.work)[0] == {"a": {}, "b": {"copied": 1}}
    assert len(list(one)) == 2 and len(list(other)) == 1


def test_times_and_machines_may_differ_and_nothing_else(stores, make_result, tmp_path):
    one, other = stores
    first = make_result()
    one.write(first)
    epochs = first.epochs.assign(seconds=[1.0, 2.0])

    def conflicts(**changes):
        other.write(replace(first, **changes))
        return [str(c) for c in plan_merge([one.work, other.work], tmp_path / "work").conflicts]

    assert conflicts(cost={"seconds": 9.0}, provenance={"machine": "another"}, epochs=epochs) == []
    nan = {"other": float("nan")}
    one.write(replace(first, scores=first.scores | nan))
    assert conflicts(scores=first.scores | nan) == []
    one.write(first)
    for name, changed in (
        ("scores", first.scores | {"other": 1.0 + 1e-15}),
        ("best_epoch", 0),
        ("genes", first.genes.assign(weight=[1.0, 0.5 + 1e-15])),
        ("epochs", first.epochs.assign(selected=[3, 5])),
        ("outer", pd.DataFrame({"epoch": [1]})),
    ):
        (said,) = conflicts(**{name: changed}, provenance={"machine": "an island", "commit": "c0ffee"})
        assert said.startswith(f"{first.spec.title} (other {name}): PCC 0.5 in {one.work} (unknown machine")
        assert said.endswith(f"PCC 0.5 in {other.work} (an island, commit c0ffee)")
    assert not (tmp_path / "work").exists()


def test_a_contradiction_is_refused_before_anything_is_copied(stores, make_result, command, tmp_path):
    one, other = stores
    for store, pcc in ((one, 0.25), (other, 0.5)):
        store.write(make_result(fold="D1", pcc=pcc))
        write_entry(store.work / "tuned", "pgl", replace(ENTRY, validation_pcc=pcc))
    one.write(make_result(fold="D2"))
    work = tmp_path / "work"
    status, out, err = command("merge", one.work, other.work, "--work", work)
    assert (status, out) == (2, "") and not work.exists()
    cell, tuned, end = err.splitlines()
    assert cell.startswith("agl-bench: conflict: synthetic · inter · tiny · pgl · fold D1 · seed 0 (other scores): ")
    assert f"PCC 0.25 in {one.work} (" in cell and f"PCC 0.5 in {other.work} (" in cell
    assert "tuned settings of pgl on synthetic, inter-batch, backbone tiny: validation PCC 0.25 of 20 trials" in tuned
    assert "in the 2 points above, and nothing was copied" in end and f"--prefer {one.work}" in end

    status, out, err = command("merge", one.work, other.work, "--work", work, "--prefer", other.work)
    assert (status, err) == (0, "")
    assert "2 finished cells copied" in out and f"agl-bench sync --work {work}" in out
    assert sorted(r.pcc for r in CellStore(work)) == [0.5, 0.5]
    assert [e.validation_pcc for e in read_entries(work / "tuned/pgl.toml")] == [0.5]
    status, out, err = command("merge", one.work, other.work, "--work", work, "--prefer", other.work)
    assert "0 finished cells copied" in out, "what is preferred is there already"
    status, out, err = command("merge", one.work, other.work, "--work", work, "--prefer", one.work)
    assert (status, err) == (0, "") and "1 of its own cells were replaced" in out
    assert sorted(r.pcc for r in CellStore(work)) == [0.25, 0.5]


def test_the_first_preferred_that_has_a_cell_decides(stores, make_result, join, tmp_path):
    third = CellStore(tmp_path / "c")
    for store, pcc in zip((*stores, third), (0.1, 0.2, 0.3), strict=True):
        store.write(make_result(fold="D1", pcc=pcc))
    for store, pcc in zip(stores, (0.4, 0.5), strict=True):
        store.write(make_result(fold="D2", pcc=pcc))
    plan = plan_merge([s.work for s in (*stores, third)], tmp_path / "work", [third.work])
    assert len(plan.conflicts) == 1, "the preferred store has nothing to say of one of them"
    join(*stores, third, prefer=[third, stores[1]])
    assert {r.spec.fold: r.pcc for r in CellStore(tmp_path / "work")} == {"D1": 0.3, "D2": 0.5}


def test_failures_only_where_nobody_has_finished(stores, make_result, join, tmp_path):
    one, other = stores
    finished, failed, known = (make_result(s) for s in ("pgl", "agl", "hvg_k"))
    one.write_failure(finished.spec, "no memory", "lines")
    one.write_failure(failed.spec, "no finite loss", "lines", "diverged")
    other.write(finished)
    work = CellStore(tmp_path / "work")
    work.write_failure(known.spec, "as before", "")
    one.write_failure(known.spec, "otherwise", "")
    (one.failed / "half").mkdir()
    assert join(one, other)[0] == {"work": {}, "a": {"failures": 1}, "b": {"copied": 1}}
    assert work.failure(finished.spec.key) is None
    assert work.failure(failed.spec.key).status == "diverged"
    assert work.failure(failed.spec.key).details.read_text() == "no finite loss\n\nlines"
    assert work.failure(known.spec.key).sentence == "as before"
    assert len(list(work.failures())) == 2


def test_a_result_takes_the_place_of_failure_and_checkpoint(stores, make_result, join):
    one, other = stores
    result = make_result()
    one.begun(result.spec.key).begin(result.spec)
    one.begun(result.spec.key).write({}, 3)
    one.write_failure(result.spec, "no memory", "")
    other.write(result)
    join(one, other, into=one.work)
    assert list(one.partial.iterdir()) == list(one.failed.iterdir()) == []
    assert one.read(result.spec.key).pcc == result.pcc


def test_the_further_checkpoint_wins(stores, make_result, join, tmp_path):
    one, other = stores
    spec, later = make_result().spec, make_result("agl").spec
    for store, key, epoch in ((one, spec, 3), (other, spec, 12), (one, later, 7), (other, later, 2)):
        partial = store.begun(key.key)
        partial.begin(key)
        partial.write({"epoch": epoch}, epoch)
        partial.note(epoch, 20)
    work = CellStore(tmp_path / "work")
    assert join(one, other)[0] == {"work": {}, "a": {"checkpoints": 1}, "b": {"checkpoints": 1}}
    for key, epoch in ((spec.key, 12), (later.key, 7)):
        assert work.begun(key).read() == ({"epoch": epoch}, "")
        assert work.begun(key).progress() == (epoch, 20)
        assert json.loads((work.partial / key / "spec.json").read_text())["fold"] == "D1"
    work.begun(spec.key).write({"epoch": 15}, 15)
    assert join(one, other)[0] == {"work": {}, "a": {}, "b": {}}
    (path,) = (other.partial / spec.key).glob("*.pt")
    path.rename(path.with_name("0000099-" + path.name.partition("-")[2].replace("a", "b")))
    join(one, other)
    assert work.begun(spec.key).read() == ({"epoch": 15}, ""), "a damaged checkpoint is none"


def test_folds_and_tuned_settings(stores, make_result, join, tmp_path):
    one, other = stores
    for store, folds in ((one, ("fold,1\n", "fold,2\n")), (other, ("fold,2\n", "fold,3\n"))):
        for table in folds:
            store.keep_fold(table)
    (other.folds / f"{text_digest('fold,4')}.csv").write_text("fold,5")
    elsewhere = replace(ENTRY, dataset="other")
    write_entry(one.work / "tuned", "pgl", ENTRY)
    write_entry(other.work / "tuned", "pgl", ENTRY)
    write_entry(other.work / "tuned", "pgl", elsewhere)
    write_entry(other.work / "tuned", "agl", ENTRY)
    (other.work / "tune").mkdir()
    copied, notes = join(one, other)
    assert copied == {"a": {"tuned": 1}, "b": {"tuned": 2}}
    assert [n.partition(": ")[2] for n in notes] == [
        "its studies stay where they are (tune/), of them only the tuned settings are merged",
        f"the fold {text_digest('fold,4')}.csv is damaged and left out",
    ]
    work = tmp_path / "work"
    assert {p.read_text() for p in (work / "folds").iterdir()} == {"fold,1\n", "fold,2\n", "fold,3\n"}
    assert {e.dataset: e for e in read_entries(work / "tuned/pgl.toml")} == {"synthetic": ENTRY, "other": elsewhere}
    assert read_entries(work / "tuned/agl.toml") == [ENTRY]
    (one.work / "tuned/pgl.toml").write_text("format = 7")
    with pytest.raises(BadSpec, match=r"tuned/pgl\.toml is not a file of tuned settings"):
        plan_merge([one.work, other.work], work)


def test_running_damaged_and_foreign_cells_are_left_out_and_named(stores, make_result, join, tmp_path):
    one, other = stores
    specs = {}
    for name in ("pgl", "agl", "hvg_k", "random_k"):
        one.write(make_result(name))
        specs[name] = make_result(name).spec.key
    genes = one.cells / specs["agl"] / "genes.parquet"
    genes.write_bytes(genes.read_bytes()[:-1])
    path = one.cells / specs["hvg_k"] / "result.json"
    path.write_text(json.dumps(signed(read_signed(path) | {"format": 1})))
    other.write(make_result("dkgsb"))
    before = content(one.work)
    with one.leases.take(specs["pgl"]):
        copied, notes = join(one, other)
    assert copied == {"a": {"copied": 1, "left out": 3}, "b": {"copied": 1}}
    running, damaged, foreign = notes
    assert running.startswith(f"{one.work}: 1 cell is running (process {os.getpid()} on ")
    assert damaged == f"{one.work}: 1 cell is damaged and left out"
    assert foreign == f"{one.work}: 1 cell is of another version of agl-bench and left out"
    assert content(one.work) == before
    copied, _ = join(one, other)
    assert copied == {"work": {}, "a": {"copied": 1, "left out": 2}, "b": {}}


def test_a_damaged_cell_is_healed_from_another_store(stores, make_result, join):
    one, other = stores
    for store in stores:
        store.write(make_result())
    (one.cells / make_result().spec.key / "epochs.parquet").unlink()
    assert join(one, other, into=one.work)[0]["b"] == {"copied": 1}
    assert one.read(make_result().spec.key) is not None


def test_what_others_work_on_in_the_target_is_left_to_them(stores, make_result, join, tmp_path):
    one, other = stores
    work = CellStore(tmp_path / "work")
    for fold in ("D1", "D2"):
        one.write(make_result(fold=fold))
    lease = work.leases.take(make_result(fold="D1").spec.key)
    outcome = Outcome({}, [])
    list(merge(plan_merge([one.work, other.work], work.work), outcome))
    lease.release()
    assert outcome.counts[one.work] == Counter(cells=2, copied=1) + Counter({"left out": 1})
    assert any("other processes work on 1 of these cells" in note for note in outcome.notes)
    assert join(one, other)[0]["a"] == {"copied": 1}


def test_versions_are_told(stores, make_result, join):
    one, other = stores
    result = make_result()
    one.write(result)
    other.write(replace(result, spec=replace(result.spec, version="0.0.1+0a")))
    copied, (note,) = join(one, other)
    assert copied == {"a": {"copied": 1}, "b": {"copied": 1}}
    assert note.startswith("cells of 2 versions of agl-bench (") and "0.0.1+0a: 1" in note


def test_nothing_to_join(stores, tmp_path):
    one, other = stores
    with pytest.raises(BadSpec, match="nowhere is not a work folder"):
        plan_merge([one.work, tmp_path / "nowhere"], tmp_path / "work")
    for work in (one.work, one.work / ".." / "a"):
        with pytest.raises(BadSpec, match="cannot be merged with itself"):
            plan_merge([one.work], work)
    with pytest.raises(BadSpec, match=r"--prefer .*work is none of the stores"):
        plan_merge([one.work, other.work], tmp_path / "target", [tmp_path / "work"])


def test_a_full_disk_is_one_sentence_and_the_same_command_continues(stores, make_result, join, tmp_path, monkeypatch):
    one, other = stores
    for fold in ("D1", "D2"):
        one.write(make_result(fold=fold))
    whole, made = cells.shutil.copyfile, []

    def copyfile(source, target, **options):
        made.append(target)
        if len(made) > 6:  # in the middle of the second cell
            raise OSError(28, "No space left on device", str(target))
        return whole(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cells.shutil, "copyfile", copyfile)
        with pytest.raises(BadWorkFolder, match=r"stopped: .*: No space left on device; .* same command continues"):
            list(merge(plan_merge([one.work, other.work], tmp_path / "work"), Outcome({}, [])))
    assert len(list(CellStore(tmp_path / "work"))) == 1
    assert join(one, other)[0]["a"] == {"copied": 1}


def test_killed_at_any_time_and_continued(stores, make_result, tmp_path, monkeypatch):
    """Before each write to the disk once: what is there is whole, and in the end everything is there."""
    one, other = stores
    for fold in ("D1", "D2"):
        one.write(make_result(fold=fold))
    other.write(make_result("agl"))
    other.keep_fold("fold,1\n")
    other.write_failure(make_result("hvg_k").spec, "no memory", "")
    one.begun(make_result("amal").spec.key).begin(make_result("amal").spec)
    one.begun(make_result("amal").spec.key).write({"epoch": 4}, 4)
    write_entry(other.work / "tuned", "pgl", ENTRY)

    def join(work, kill=None):
        plan, count = plan_merge([one.work, other.work], work), 0

        def flush(path):
            nonlocal count
            count += 1
            if count == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            for module in (cells, checkpoints):
                patch.setattr(module, "flush", flush)
            list(merge(plan, Outcome({}, [])))
        return count

    whole, work = tmp_path / "whole", tmp_path / "work"
    writes = join(whole)
    assert writes > 15
    for kill in range(1, writes + 1):
        shutil.rmtree(work, ignore_errors=True)
        child = os.fork()
        if child == 0:
            try:
                join(work, kill)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = {r.spec.key for r in CellStore(work)}
        assert left <= {r.spec.key for r in CellStore(whole)}
        join(work)
        assert content(work) == content(whole)
        assert list((work / "leases").iterdir()) == [] == list((work / "cells").glob(".*"))


@pytest.fixture
def plain(tmp_path):
    """A table without what only one run can have: times and memory."""

    def plain(file):
        table = json.loads((tmp_path / file).read_text())
        del table["provenance"]
        for line in table["lines"]:
            del line["seconds_total"]
            for cell in line["cells"]:
                del cell["cost"]
        return table

    return plain


def test_two_stores_merged_show_the_table_of_one(words, tmp_path, monkeypatch, command, plain):
    """A campaign on two machines, one of them stopped early, some cells on both, against one that nobody disturbed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGL_BENCH_CACHE", str(tmp_path / "cache"))
    run, seeds = ("run", *words), ("--seeds", "0,1")
    both = ("--selectors", "pgl,dkgsb")
    assert command(*run, *both, *seeds, "--work", "whole", "--json", "whole.json")[0] == 0
    assert command(*run, *both, "--work", "a")[0] == 0
    assert command(*run, "--selectors", "dkgsb", "--seeds", "1", "--fold", "D1", "--work", "b")[0] == 0
    assert command(*run, "--selectors", "pgl", *seeds, "--work", "b")[0] == 0
    status, out, err = command("merge", "a", "b", "--work", "merged")
    assert (status, err) == (0, "") and "7 finished cells copied" in out
    status, out, err = command(*run, *both, *seeds, "--work", "merged", "--json", "merged.json")
    assert (status, err) == (0, "") and "7 cells were finished before and kept" in out
    assert plain("merged.json") == plain("whole.json")

    def shown(work):
        out = command(*run, *both, *seeds, "--work", work)[1]
        return out.partition("8 cells were finished before and kept")[2].partition("Results:")[0]

    assert shown("merged") == shown("whole") and "Δ pgl" in shown("merged")
