"""Folds: sizes, disjointness, compactness, buffers, seeds."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.spatial import cKDTree

from agl_bench.data.folds import Fold, FoldPlan, Separation, fold_table, make_fold, plan_folds, separation
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
        sections=tuple(
            Section(
                name, AnnData(obs=pd.DataFrame(index=[f"{name}{i}" for i in range(n)])), 1.0, donor=DONORS.get(name, "")
            )
            for name, n in sizes.items()
        ),
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


def test_a_buffer_as_wide_as_a_patch_leaves_no_overlap_on_a_square_grid() -> None:
    table = table_of({"A": 400})
    places = 100.0 * np.stack(np.divmod(np.arange(400), 20), axis=1)  # the diagonal, 141 µm, is longer than a patch
    table = replace(table, position=places.astype(np.float32))
    for part in range(4):
        fold = make_fold(intra(part), table, Protocol(folds=4, buffer_um=112), seed=0)
        assert separation(fold, table, 112.0).overlapping == 0
        for name in ("held_out", "validation"):
            apart = cKDTree(table.position[fold.train]).query(table.position[getattr(fold, name)], p=np.inf)[0]
            assert apart.min() >= 112


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


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [intra(1), inter("B")], ids=lambda p: p.label)
@pytest.mark.parametrize("shape", ["blocks", "random"])
def test_distances_between_train_and_test(plan: FoldPlan, shape: str) -> None:
    table = table_of(dict.fromkeys(plan.sections, 300))
    fold = make_fold(plan, table, replace(NO_BUFFER, fold_shape=shape), seed=0)
    found = separation(fold, table, 112.0)
    if plan.part < 0:
        assert found == Separation(None, None, 0)
        return
    apart = table.position[fold.test].astype(np.float64)[:, None] - table.position[fold.train].astype(np.float64)
    distance = np.linalg.norm(apart, axis=2).min(1)
    assert found.nearest_um == pytest.approx(distance.min(), rel=1e-12)
    assert found.median_um == pytest.approx(np.median(distance), rel=1e-12)
    assert found.overlapping == (np.abs(apart).max(2) < 112).any(1).sum() > 0


def test_the_buffer_shows_in_the_distances() -> None:
    table = table_of({"A": 900})
    found = separation(make_fold(intra(1), table, Protocol(), seed=0), table, 112.0)
    assert found.nearest_um is not None and found.nearest_um >= 112 and found.overlapping == 0


def test_patches_overlap_across_corners_too() -> None:
    """At 150 µm along the diagonal two patches of 112 µm share a corner, at 112 µm along an axis only an edge."""
    table = table_of({"A": 2})
    fold = Fold(*(np.array(rows, dtype=np.int64) for rows in ([0], [], [], [1])))
    for offset, shared in (([106, 106], 1), ([112, 0], 0)):
        moved = replace(table, position=np.array([[0, 0], offset], dtype=np.float32))
        assert separation(fold, moved, 112.0).overlapping == shared


# --- folds from a file ------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[pd.DataFrame | str], Protocol]:
    """A protocol with the lines as its file of folds."""

    def write(lines: pd.DataFrame | str, **settings: object) -> Protocol:
        path = tmp_path / f"folds{len(list(tmp_path.iterdir()))}.csv"
        path.write_text(lines if isinstance(lines, str) else lines.to_csv(index=False), encoding="utf-8")
        return Protocol(fold_file=str(path), **settings)  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize("evaluation", ["intra", "inter"])
@pytest.mark.parametrize("settings", [{}, {"fold_shape": "random", "buffer_um": 0.0, "held_out_share": 0.0}])
def test_a_stored_fold_given_back_is_the_same_fold(
    evaluation: str, settings: dict[str, object], write: Callable[..., Protocol]
) -> None:
    sizes = {"A": 300, "B": 260, "C": 280}
    protocol = Protocol(folds=3, **settings)  # type: ignore[arg-type]
    planned = plan_folds(evaluation, DONORS, protocol, dataset="toy")
    tables = [table_of({n: sizes[n] for n in p.sections}) for p in planned]
    folds = [make_fold(p, t, protocol, 4) for p, t in zip(planned, tables, strict=True)]
    stored = pd.concat([fold_table(p.label, f, t) for p, f, t in zip(planned, folds, tables, strict=True)])
    shuffled = stored.sample(frac=1, random_state=0).sort_values("fold", kind="stable")
    mine = write(shuffled, held_out_share=protocol.held_out_share)
    again = plan_folds(evaluation, DONORS, mine, dataset="toy")
    assert [replace(p, part=0) for p in again] == [replace(p, part=0) for p in planned]
    assert all((p.part < 0) == (evaluation == "inter") for p in again)
    for plan, fold, table in zip(again, folds, tables, strict=True):
        back = make_fold(plan, table, mine, seed=99)
        assert same(replace(back, unlisted=0), replace(fold, dropped=0))
        assert back.unlisted == fold.dropped == (len(table) - sum(len(getattr(fold, n)) for n in SETS))
        pd.testing.assert_frame_equal(fold_table(plan.label, back, table), fold_table(plan.label, fold, table))
    other = "inter" if evaluation == "intra" else "intra"
    assert plan_folds(other, DONORS, mine, dataset="toy") == []


def test_the_table_of_a_fold() -> None:
    table = table_of({"A": 4, "B": 3})
    fold = Fold(*(np.array(rows, dtype=np.int64) for rows in ([0, 3], [4], [2], [1, 6])))
    assert fold_table("x", fold, table).to_csv(index=False) == (
        "section,spot,fold,set\nA,A0,x,train\nA,A1,x,test\nA,A2,x,validation\nA,A3,x,train\n"
        "B,B0,x,held_out\nB,B2,x,test\n"
    )


def lines_of(fold: str = "mine", **sets: str) -> str:
    """Lines of a file: set -> names of its spots, whose first letter is the section."""
    return "".join(f"{s[0]},{s},{fold},{name}\n" for name, spots in sets.items() for s in spots.split())


def test_a_section_that_a_file_only_tests_decides_no_panel(write: Callable[..., Protocol]) -> None:
    lines = lines_of(train="A0 A1 A2", validation="C0 C1 C2", test="A3 A4 A5 B0 B1 B2")
    (plan,) = plan_folds("intra", DONORS, write("section,spot,fold,set\n" + lines), dataset="toy")
    assert (plan.sections, plan.test_sections) == (("A", "B", "C"), ("A", "B"))
    assert plan.training_sections == ("A", "C")
    assert inter("B").training_sections == ("A", "C") and intra(0).training_sections == ("A",)


HEADER = "section,spot,fold,set\n"
GOOD = {"train": "A0 A1 A2", "validation": "A3 A4 A5", "held_out": "A6 A7 A8", "test": "A9 A10 A11"}


def test_folds_of_the_users_own(write: Callable[..., Protocol]) -> None:
    """Names, columns and lines in any order, two evaluations in one file, spots that no fold wants, filtered spots."""
    within = lines_of("within", **GOOD)
    across = lines_of("across", **GOOD | {"test": "B0 B1 B2 B3"})
    text = "note,set,fold,spot,section\n" + "".join(
        f"n,{s},{f},{p},{c}\n" for c, p, f, s in (line.split(",") for line in (within + across).splitlines())
    )
    protocol = write(text.replace("n,test,across", "\n  n , test,across"))
    (plan,) = plan_folds("intra", {"A": "", "B": ""}, protocol, dataset="toy")
    assert (plan.label, plan.sections, plan.test_sections) == ("within", ("A",), ("A",))
    table = table_of({"A": 20})
    fold = make_fold(plan, table, protocol, seed=0)
    assert [getattr(fold, n).tolist() for n in SETS] == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]]
    assert (fold.dropped, fold.unlisted) == (0, 8)
    (plan,) = plan_folds("inter", {"A": "", "B": ""}, protocol, dataset="toy")
    assert (plan.label, plan.sections, plan.test_sections, plan.part) == ("across", ("A", "B"), ("B",), -1)
    both = table_of({"A": 20, "B": 9})
    kept = np.array([*range(20), *range(21, 29)])  # B0 has too few genes
    filtered = replace(
        both, section=both.section[kept], source_row=both.source_row[kept], position=both.position[kept],
        total=both.total[kept],
    )  # fmt: skip
    fold = make_fold(plan, filtered, protocol, seed=0)
    assert fold_table("x", fold, filtered).query("set == 'test'")["spot"].tolist() == ["B1", "B2", "B3"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a CSV in UTF-8: No columns to parse from file"),
        ("section,spot,fold\nA,A1,x\n", "has no column 'set'; its columns have to be section, spot, fold, set"),
        ("A,A1,x,train\n", "has no column 'section'"),
        (HEADER, "lists no spot"),
        (HEADER + "\n , , , \n", "lists no spot"),
        (HEADER + "A,A1,x,train,more\n", "is not a CSV in UTF-8"),
        (HEADER + 'A,"A1,x,train\n', "is not a CSV in UTF-8"),
        (HEADER + "A,A1,x\n", "line 2: the field 'set' is empty"),
        (HEADER + "\nA,,x,test\n", "line 3: the field 'spot' is empty"),
        (HEADER + ",A1,x,test\n", "line 2: the field 'section' is empty"),
        (HEADER + "A,A1,,test\n", "line 2: the field 'fold' is empty"),
        (
            HEADER + "A,A1,x,tset\n",
            "line 2: set 'tset' is unknown; it has to be one of train, validation, held_out, test",
        ),
        (
            HEADER + lines_of(**GOOD) + "A,A1,mine,test\n",
            "line 14: spot 'A1' of section 'A' stands in fold mine a second",
        ),
        (
            HEADER + lines_of(**GOOD | {"test": ""}),
            "fold mine has no test spots; every fold needs train, validation and",
        ),
        (HEADER + lines_of(**GOOD | {"train": ""}), "fold mine has no train spots"),
        (HEADER + lines_of(**GOOD | {"validation": ""}), "fold mine has no validation spots"),
        (HEADER + lines_of(**GOOD | {"test": "Z1 Z2 Z3"}), "section 'Z' of fold mine is none of toy, which has A, B"),
    ],
)
def test_malformed_files_of_folds(text: str, sentence: str, write: Callable[..., Protocol]) -> None:
    with pytest.raises(BadSpec, match=r"^protocol\.fold_file = '.*folds0\.csv'") as caught:
        plan_folds("intra", {"A": "", "B": ""}, write(text), dataset="toy")
    assert sentence in str(caught.value) and "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (
            {"train": "A0 A1 A2 A77 A78"},
            "spot 'A77' is none of section 'A' (2 such spots); its spots are named like 'A0'",
        ),
        ({"test": "A9 A10"}, "has 2 test spots of section 'A' and needs at least 3, or none"),
        ({"held_out": "A6"}, "has 1 held_out spots of section 'A'"),
        (
            {"held_out": ""},
            "has no held_out spots for the outer loss; list some, or say by protocol.held_out_share = 0",
        ),
    ],
)
def test_folds_of_a_file_that_cannot_be_made(
    sets: dict[str, str], sentence: str, write: Callable[..., Protocol]
) -> None:
    protocol = write(HEADER + lines_of(**GOOD | sets))
    (plan,) = plan_folds("intra", {"A": ""}, protocol, dataset="toy")
    with pytest.raises(BadSpec, match=r"^protocol\.fold_file = '.*folds0\.csv', fold mine") as caught:
        make_fold(plan, table_of({"A": 20}), protocol, seed=0)
    assert sentence in str(caught.value)


def test_the_outer_loss_shares_the_validation_spots_only_if_the_protocol_says_so(
    write: Callable[..., Protocol],
) -> None:
    protocol = write(HEADER + lines_of(**GOOD | {"held_out": ""}), held_out_share=0.0)
    (plan,) = plan_folds("intra", {"A": ""}, protocol, dataset="toy")
    assert len(make_fold(plan, table_of({"A": 20}), protocol, seed=0).held_out) == 0


def test_a_file_of_folds_that_is_not_there(tmp_path: Path) -> None:
    protocol = Protocol(fold_file=str(tmp_path / "absent.csv"))
    with pytest.raises(BadSpec, match=r"protocol\.fold_file = '.*absent\.csv' cannot be read: No such file"):
        plan_folds("intra", {"A": ""}, protocol, dataset="toy")


def test_a_changed_file_is_read_again(write: Callable[..., Protocol]) -> None:
    protocol = write(HEADER + lines_of("one", **GOOD))
    assert [p.label for p in plan_folds("intra", {"A": ""}, protocol, dataset="toy")] == ["one"]
    path = Path(protocol.fold_file)
    path.write_text(HEADER + lines_of("two", **GOOD))
    os.utime(path, ns=(1, 1))
    assert [p.label for p in plan_folds("intra", {"A": ""}, protocol, dataset="toy")] == ["two"]
