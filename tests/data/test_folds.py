"""Folds: sizes, disjointness, compactness, buffers, seeds."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial import cKDTree

from agl_bench.data.folds import Fold, FoldPlan, make_fold, plan_folds
from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench_plugins.datasets.synthetic import hexagonal_grid

NO_BUFFER = Protocol(buffer_um=0)
SETS = ("train", "held_out", "validation", "test")
DONORS = {"A": "d1", "B": "d2", "C": "d1"}


def table_of(sizes: dict[str, int]) -> SpotTable:
    """Hexagonal grids of 100 µm pitch; the sections lie on top of each other."""
    return SpotTable(
        sections=tuple(Section(name, None, 1.0, donor=DONORS.get(name, "")) for name in sizes),  # type: ignore[arg-type]
        matrices=tuple(sparse.csr_matrix((size, 1), dtype=np.float32) for size in sizes.values()),
        source_columns=np.zeros((len(sizes), 1), dtype=np.int64),
        genes=("G",),
        section=np.repeat(np.arange(len(sizes)), list(sizes.values())),
        source_row=np.concatenate([np.arange(n) for n in sizes.values()]),
        position=np.concatenate([hexagonal_grid(n) for n in sizes.values()]).astype(np.float32),
        total=np.zeros(sum(sizes.values())),
        scales=False,
        dropped_spots=0,
    )


def intra(part: int, name: str = "A") -> FoldPlan:
    return FoldPlan(f"{name}.{part}", (name,), (name,), part)


def inter(test: Iterable[str], sections: str = "ABC") -> FoldPlan:
    return FoldPlan("".join(test), tuple(sections), tuple(test), -1)


def same(one: Fold, two: Fold) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(Fold))


@pytest.mark.parametrize("shape", ["blocks", "random"])
@pytest.mark.parametrize("held_out", [0.15, 0.0])
@pytest.mark.parametrize("buffer_um", [0.0, 112.0])
@pytest.mark.parametrize("plan", [intra(0), intra(4), inter("B"), inter("AC")], ids=lambda p: p.label)
def test_sets_are_disjoint_sorted_and_complete(plan: FoldPlan, shape: str, held_out: float, buffer_um: float) -> None:
    protocol = Protocol(fold_shape=shape, held_out_share=held_out, buffer_um=buffer_um)
    if shape == "random" and buffer_um:
        protocol = replace(protocol, buffer_um=50.0)  # a random fold is all border
    table = table_of({n: 400 + 50 * i for i, n in enumerate(plan.sections)})
    fold = make_fold(plan, table, protocol, seed=0)
    parts = [getattr(fold, name) for name in SETS]
    assert all((np.diff(p) > 0).all() and p.dtype == np.int64 for p in parts)
    assert not any(set(a) & set(b) for a, b in combinations(parts, 2))
    assert sum(map(len, parts)) + fold.dropped == len(table)
    assert (fold.dropped > 0) == (buffer_um > 0 and shape == "blocks")
    assert (len(fold.held_out) == 0) == (held_out == 0)


@pytest.mark.parametrize("shape", ["blocks", "random"])
@pytest.mark.parametrize("spots", [200, 203])
def test_sizes_follow_the_shares(shape: str, spots: int) -> None:
    protocol = replace(NO_BUFFER, fold_shape=shape, validation_share=0.2, held_out_share=0.15)
    fold = make_fold(intra(2), table_of({"A": spots}), protocol, seed=1)
    left = spots - len(fold.test)
    assert abs(len(fold.test) - spots / 5) <= 1
    assert abs(len(fold.validation) - 0.2 * left) <= 1
    assert abs(len(fold.held_out) - 0.15 * left) <= 1
    assert abs(len(fold.train) - 0.65 * left) <= 2


@pytest.mark.parametrize("shape", ["blocks", "random"])
@pytest.mark.parametrize("folds", [2, 3, 5, 7])
def test_test_parts_partition_the_section(shape: str, folds: int) -> None:
    """The buffer takes nothing away from test spots."""
    protocol = Protocol(folds=folds, fold_shape=shape, buffer_um=112 if shape == "blocks" else 0)
    table = table_of({"A": 331})
    tested = [make_fold(intra(part), table, protocol, seed=3).test for part in range(folds)]
    np.testing.assert_array_equal(np.sort(np.concatenate(tested)), np.arange(331))
    assert max(map(len, tested)) - min(map(len, tested)) <= 2


def border(table: SpotTable, rows: np.ndarray) -> float:
    """Share of `rows` whose six nearest spots are not all in `rows`."""
    _, near = cKDTree(table.position).query(table.position[rows], k=7)
    return float((~np.isin(near, rows)).any(1).mean())


def test_blocks_are_compact() -> None:
    table = table_of({"A": 900})
    for part in range(5):
        blocks, random = (
            make_fold(intra(part), table, replace(NO_BUFFER, fold_shape=shape), seed=0)
            for shape in ("blocks", "random")
        )
        for name in SETS:
            rows, scattered = getattr(blocks, name), getattr(random, name)
            outside = np.setdiff1d(np.arange(900), rows)
            distance, _ = cKDTree(table.position[outside]).query(table.position[rows])
            assert distance.mean() > 150, name  # the pitch is 100 µm
            assert border(table, rows) < 0.65 and border(table, scattered) > 0.9, name


def test_folds_depend_on_the_seed_and_the_section_alone() -> None:
    table = table_of({"A": 300})
    one, again, other = (make_fold(intra(1), table, NO_BUFFER, seed) for seed in (5, 5, 6))
    assert same(one, again) and not same(one, other)
    assert list(inspect.signature(make_fold).parameters) == ["plan", "table", "protocol", "seed"]
    assert list(inspect.signature(plan_folds).parameters) == ["evaluation", "donors", "protocol", "dataset"]
    elsewhere = make_fold(intra(1, "B"), table_of({"B": 300}), NO_BUFFER, 5)
    assert not same(one, elsewhere)


def test_parts_of_a_training_section_do_not_depend_on_other_sections() -> None:
    two, three = table_of({"A": 200, "B": 150}), table_of({"A": 200, "B": 150, "C": 100})
    fewer = make_fold(inter("B", "AB"), two, NO_BUFFER, 0)
    more = make_fold(inter("B"), three, NO_BUFFER, 0)
    np.testing.assert_array_equal(fewer.train, more.train[more.train < 200])
    np.testing.assert_array_equal(fewer.validation, more.validation[more.validation < 200])


@pytest.mark.parametrize("plan", [intra(0), intra(3), inter("B")], ids=lambda p: p.label)
@pytest.mark.parametrize("buffer_um", [100.0, 112.0, 250.0])
def test_the_buffer_keeps_sets_apart(plan: FoldPlan, buffer_um: float) -> None:
    table = table_of(dict.fromkeys(plan.sections, 900))
    protocol = Protocol(buffer_um=buffer_um, folds=4)
    fold = make_fold(plan, table, protocol, seed=2)
    plain = make_fold(plan, table, replace(protocol, buffer_um=0), seed=2)
    np.testing.assert_array_equal(fold.test, plain.test)
    for one, two in combinations(SETS, 2):
        if {one, two} == {"validation", "held_out"}:
            continue  # neither is trained on or tested: they may touch
        for section in range(len(plan.sections)):
            a, b = (table.position[r[table.section[r] == section]] for r in (getattr(fold, one), getattr(fold, two)))
            if len(a) and len(b):
                assert cKDTree(a).query(b)[0].min() >= buffer_um, (one, two)
    taken = [set(getattr(plain, n)) - set(getattr(fold, n)) for n in SETS]
    assert sum(map(len, taken)) == fold.dropped > 0 and plain.dropped == 0
    assert all(set(getattr(fold, n)) <= set(getattr(plain, n)) for n in SETS)


def test_the_buffer_does_not_reach_across_sections() -> None:
    """Sections lie on top of each other in coordinates, and are nevertheless different tissue."""
    protocol = Protocol(buffer_um=5000, validation_share=0.2, held_out_share=0.0)
    table = table_of({"A": 100, "B": 100})
    plain = make_fold(inter("A", "AB"), table, replace(protocol, buffer_um=0), seed=0)
    with pytest.raises(BadSpec, match="0 train spots"):  # validation and training spots share section B
        make_fold(inter("A", "AB"), table, protocol, seed=0)
    near = make_fold(inter("A", "AB"), table, replace(protocol, buffer_um=112), seed=0)
    np.testing.assert_array_equal(near.validation, plain.validation)  # test spots of A lie at the same places


def test_inter_tests_whole_sections_and_trains_on_the_others() -> None:
    table = table_of({"A": 120, "B": 150, "C": 90})
    fold = make_fold(inter("AC"), table, NO_BUFFER, seed=0)
    np.testing.assert_array_equal(fold.test, np.flatnonzero(table.section != 1))
    fold = make_fold(inter("B"), table, NO_BUFFER, seed=0)
    np.testing.assert_array_equal(fold.test, np.flatnonzero(table.section == 1))
    for name in ("train", "held_out", "validation"):
        assert set(table.section[getattr(fold, name)]) == {0, 2}, name


def plans(evaluation: str, donors: dict[str, str], **settings: object) -> list[tuple[str, str, int]]:
    found = plan_folds(evaluation, donors, Protocol(**settings), dataset="toy")  # type: ignore[arg-type]
    return [(p.label, "".join(p.test_sections), p.part) for p in found]


def test_plans_within_sections() -> None:
    assert plans("intra", {"A": "", "B": "d"}, folds=2) == [
        ("A.0", "A", 0),
        ("A.1", "A", 1),
        ("B.0", "B", 0),
        ("B.1", "B", 1),
    ]
    assert all(p.sections == p.test_sections for p in plan_folds("intra", DONORS, Protocol(), dataset="toy"))


def test_plans_across_sections_and_donors() -> None:
    by_donor = [("d1", "AC", -1), ("d2", "B", -1)]
    by_section = [("A", "A", -1), ("B", "B", -1), ("C", "C", -1)]
    assert plans("inter", DONORS) == plans("inter", DONORS, leave_out="donor") == by_donor
    assert plans("inter", DONORS, leave_out="section") == by_section
    assert plans("inter", dict.fromkeys("ABC", "")) == by_section
    assert plans("inter", dict.fromkeys("ABC", "d")) == by_section
    assert plans("inter", {**DONORS, "C": ""}) == by_section  # C may be of any donor
    assert all(p.sections == tuple("ABC") for p in plan_folds("inter", DONORS, Protocol(), dataset="toy"))


@pytest.mark.parametrize(
    ("donors", "settings", "sentence"),
    [
        ({"A": ""}, {}, "at least two sections and toy has 1; use --evaluation intra"),
        ({"A": "d"}, {"leave_out": "section"}, "at least two sections and toy has 1"),
        ({"A": "d", "B": "d"}, {"leave_out": "donor"}, "needs two known donors, toy has d; use leave_out = 'section'"),
        ({"A": "", "B": ""}, {"leave_out": "donor"}, "needs two known donors, toy has none"),
        ({"A": "d", "B": "e", "C": ""}, {"leave_out": "donor"}, "needs two known donors"),
    ],
)
def test_nothing_to_leave_out(donors: dict[str, str], settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadSpec, match=sentence):
        plans("inter", donors, **settings)


def test_too_many_folds() -> None:
    with pytest.raises(
        BadSpec, match=r"protocol\.folds = 20 leaves fewer than 3 test spots .* section 'A', .* 59 spots"
    ):
        make_fold(intra(0), table_of({"A": 59}), replace(NO_BUFFER, folds=20), seed=0)
    assert len(make_fold(intra(0), table_of({"A": 60}), replace(NO_BUFFER, folds=20), seed=0).test) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"buffer_um": 2000}, r"fold A\.0 has 0 train spots"),
        ({"buffer_um": 0, "validation_share": 0.01}, r"fold A\.0 has 1 validation spots"),
        ({"buffer_um": 0, "held_out_share": 0.01}, r"fold A\.0 has 1 held-out spots"),
    ],
)
def test_too_few_spots_left(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(BadSpec, match=sentence):
        make_fold(intra(0), table_of({"A": 100}), Protocol(**settings), seed=0)  # type: ignore[arg-type]
