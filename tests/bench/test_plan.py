"""Estimates rest on past cells alone, say on which, and add up."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.plan import as_json, estimate, machine_of, makespan, past_cells, standing, training_spots
from agl_bench.bench.spec import Tuning
from agl_bench.bench.status import Place
from agl_bench.cli import main
from agl_bench.terminal import duration

HERE = {"machine": "this one", "device": "cpu", "threads": 1}
TUNING = Tuning(20, 20, "a study", 0.4, ("protocol.learning_rate",))


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "work")


@pytest.fixture
def past(store, make_result):
    """Invent a finished cell."""
    seeds = iter(range(100, 200))

    def past(selector="pgl", seconds=10.0, memory=500.0, spots=24, provenance=HERE, like=None, **changes):
        result = make_result(selector)
        spec = replace(like or result.spec, seed=next(seeds), **changes)
        cost = {"seconds": seconds, "peak_memory_mb": memory}
        store.write(replace(result, spec=spec, counts={"train_spots": spots}, cost=cost, provenance=provenance))
        return spec

    return past


@pytest.fixture
def guess(store, grid):
    """The estimate for cells of the small grid, the training spots being known."""

    def guess(*specs, spots=None, **options):
        def ask(asked):
            assert spots is not None, "nothing had to be scaled"
            return spots

        cells = list(standing(specs, store, {}))
        return estimate(cells, past_cells([store.work]), ask, machine=machine_of(HERE), **options)

    return guess


def specs(grid, *selectors, **options):
    return [spec for spec, _ in grid(",".join(selectors), **options)[0]]


def test_the_same_line_is_the_first_witness(grid, past, guess):
    for seconds, memory in ((10.0, 400.0), (20.0, 700.0), (60.0, 600.0)):
        past("pgl", seconds, memory)
    past("agl", 3.0)
    found = guess(*specs(grid, "pgl", "agl", seeds=["0,1"]))
    one, other = found.lines
    assert one.place == Place("synthetic", "inter", "tiny", "pgl")
    assert (one.left, one.count) == (4, {"todo": 4})
    low, high = np.quantile([10, 20, 60], (0.1, 0.9))
    assert (one.cost.seconds, one.cost.low, one.cost.high) == (20.0, low, high)
    assert (one.cost.peak_memory_mb, one.cost.basis, one.cost.is_scaled) == (700.0, "3 past cells", False)
    assert (one.total("seconds"), one.total("high")) == (80.0, 4 * high)
    assert (other.cost.seconds, other.cost.low, other.cost.basis) == (3.0, None, "1 past cell")
    assert (found.elapsed, found.low, found.high) == (92.0, 4 * low + 12, 4 * high + 12)
    assert (found.peak_memory_mb, found.unknown) == (700.0, 0)


def test_other_settings_are_scaled_by_spots_and_epochs(grid, past, guess):
    past("pgl", 10.0, 400.0, spots=24)
    past("pgl", 30.0, 500.0, spots=48)
    wanted = specs(grid, "pgl", more=["protocol.epochs=12"])  # the preset's are 3
    assert wanted[0].protocol.epochs == 12
    (line,) = guess(*wanted, spots=36.0).lines
    assert line.cost.seconds == (10.0 * 36 * 12 / (24 * 3) + 30.0 * 36 * 12 / (48 * 3)) / 2 == 75.0
    assert line.cost.peak_memory_mb == 500.0 and line.cost.is_scaled
    assert line.cost.basis == "2 past cells with other settings, scaled to 36 spots × 12 epochs"


def test_other_data_are_scaled_and_tell_nothing_of_memory(grid, past, guess, make_result):
    elsewhere = replace(make_result().spec.dataset, name="elsewhere", label="elsewhere")
    past("pgl", 7.0, spots=12, dataset=elsewhere)
    found = guess(*specs(grid, "pgl"), spots=24.0)
    (line,) = found.lines
    assert (line.cost.seconds, line.cost.peak_memory_mb) == (14.0, None)
    assert line.cost.basis == "1 past cell on elsewhere, scaled to 24 spots × 3 epochs"
    assert found.peak_memory_mb is None
    past("pgl", 9.0, spots=24, protocol=replace(make_result().spec.protocol, patience=7))
    (line,) = guess(*specs(grid, "pgl"), spots=24.0).lines
    assert (line.cost.seconds, line.cost.cells) == (9.0, 1), "other settings on the same data are nearer"


@pytest.mark.parametrize("what", ["selector", "backbone", "evaluation", "device"])
def test_what_is_not_alike_is_no_witness(grid, past, guess, make_result, what):
    spec = make_result().spec
    other = {
        "selector": make_result("agl").spec.selector,
        "backbone": replace(spec.backbone, settings=spec.backbone.settings | {"channels": 64}),
        "evaluation": "intra",
        "device": "cuda",
    }
    past(like=replace(spec, **{what: other[what]}))
    found = guess(*specs(grid, "pgl"))
    assert found.lines[0].cost is None and found.lines[0].total("seconds") is None
    assert (found.elapsed, found.unknown) == (0.0, 2)


def test_other_code_other_seeds_and_shuffled_patches_cost_the_same(grid, past, guess, make_result):
    past("pgl", 5.0, version="0.0.1+0a", libraries="torch 9")
    past("pgl", 7.0, protocol=replace(make_result().spec.protocol, patches="shuffled"))
    (line,) = guess(*specs(grid, "pgl")).lines
    assert (line.cost.seconds, line.cost.basis) == (6.0, "2 past cells")


def test_tuned_cells_are_lines_of_their_own_whatever_was_tuned(grid, past, guess, make_result):
    spec = make_result().spec
    tuned = replace(spec, tuning=TUNING, protocol=replace(spec.protocol, learning_rate=0.01))
    past("pgl", 4.0)
    past(like=tuned, seconds=8.0)
    fold = replace(tuned, protocol=replace(spec.protocol, learning_rate=0.02))  # as nested studies find it
    one, other = guess(spec, fold).lines
    assert (one.place.settings, one.cost.seconds) == ("fixed", 4.0)
    assert (other.place.settings, other.cost.seconds) == ("tuned (20 trials)", 8.0)


def test_this_machine_goes_first_and_others_are_named(grid, past, guess):
    there = HERE | {"machine": "an island"}
    past("pgl", 100.0, provenance=there)
    (line,) = guess(*specs(grid, "pgl")).lines
    assert (line.cost.seconds, line.cost.basis) == (100.0, "1 past cell, on another machine")
    past("pgl", 1.0)
    (line,) = guess(*specs(grid, "pgl")).lines
    assert (line.cost.seconds, line.cost.basis) == (1.0, "1 past cell")


def test_only_what_is_left_counts(grid, past, guess, store, make_result):
    past("pgl", 10.0)
    d1, d2 = specs(grid, "pgl")
    cost = {"seconds": 10.0, "peak_memory_mb": 1.0}
    store.write(replace(make_result(), spec=d1, cost=cost, counts={"train_spots": 24}, provenance=HERE))
    store.write_failure(d2, "no memory", "")
    assert [status for _, status in standing([d1, d2], store, {})] == ["done", "failed"]
    for options, left in (({}, 0), ({"retry_failed": True}, 1), ({"again": True}, 2)):
        (line,) = guess(d1, d2, **options).lines
        assert (line.left, line.count) == (left, {"done": 1, "failed": 1})
        assert guess(d1, d2, **options).elapsed == 10.0 * left
    assert [status for _, status in standing([d1, d2], None, {})] == ["todo", "todo"]


@pytest.mark.parametrize(
    ("seconds", "workers", "end"),
    [
        ([], 3, 0),
        ([5], 3, 5),
        ([2] * 7, 1, 14),
        ([2] * 7, 2, 8),
        ([2] * 7, 7, 2),
        ([1, 1, 1, 9], 2, 10),  # a long one that comes last
        ([9, 1, 1, 1], 2, 9),
    ],
)
def test_workers_share_the_work(seconds, workers, end):
    assert makespan([float(s) for s in seconds], workers) == end


def test_what_cannot_be_read_is_passed_over(past, store, make_result):
    past("pgl")
    store.write(replace(make_result(), cost={}))
    (store.cells / "notes.txt").write_text("mine")
    assert len(past_cells([store.work])) == 1
    before = sorted(store.work.rglob("*"))
    past_cells([store.work, store.work])
    assert sorted(store.work.rglob("*")) == before


def test_training_spots_are_those_of_the_folds(grid):
    cells, bench = grid("pgl", more=["synthetic.sections=3"])
    wanted = [spec for spec, _ in cells]
    counted = {spec.fold: len(bench.setting(spec, plan).fold.train) for spec, plan in cells}
    assert training_spots(wanted, bench) == pytest.approx(sum(counted.values()) / 3)
    assert training_spots(wanted[:1], bench) == counted[wanted[0].fold]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.34, "0.3 s"),
        (59.6, "60 s"),
        (119, "119 s"),
        (121, "2 min"),
        (7199, "2 h"),
        (7500, "2 h 5 min"),
        (172_800, "2 d"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_command(words, past, guess, store, grid, capsys, tmp_path):
    def plan(*more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["plan", *words, "--selectors", "pgl,agl", *more])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    for seconds in (10.0, 20.0, 30.0):
        past("pgl", seconds)
    empty = ("--work", str(tmp_path / "empty"))
    status, out, err = plan(*empty, "--from", str(store.work), "--workers", "2", "--checkpoint-every", "0")
    assert (status, err) == (0, "")
    assert "20.0 (12.0–28.0)" in out and "3 past cells, on another" in out and "unknown" in out
    assert "4 cells, 4 to do: at least 20 s (12 s to 28 s) with 2 workers that do not slow each other" in out
    assert "2 of unknown cost, not counted." in out
    assert not (tmp_path / "empty").exists()
    assert "4 of unknown cost: run one of each line first" in plan(*empty)[1]

    content = json.loads(plan("--work", str(store.work), "--json")[1])
    expected = as_json(guess(*specs(grid, "pgl", "agl")))
    for line in (*content["lines"], *expected["lines"]):
        del line["basis"]  # names the machine
    assert content == expected
    assert [(line["to_do"], line["seconds_total"]) for line in content["lines"]] == [(2, 40.0), (2, None)]
    assert content["seconds_elapsed"] == 40.0 and content["cells_of_unknown_cost"] == 2
    status, out, err = plan("--from", str(tmp_path / "nowhere"))
    assert (status, err.count("\n")) == (2, 1) and "nowhere is not a work folder" in err
