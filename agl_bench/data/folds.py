"""Index sets of a fold: train, held out (outer loss), validation (early stopping, model choice), test.

Cut from the sections as the protocol says, or as the user's file says (`data.fold_files`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from agl_bench.data.fold_files import SETS, Listing, read_fold_file
from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.maths.seeds import seed_for
from agl_bench.protocol import Protocol

EVALUATIONS = ("intra", "inter")
FEWEST_SPOTS = 3  # below that a correlation over spots says nothing


@dataclass(frozen=True)
class Fold:
    """Rows of a `SpotTable`, sorted and pairwise disjoint. Where the protocol holds nothing out, `held_out` is empty
    and the outer loss uses the validation spots.

    Attributes:
        train: spots that the model is trained on.
        held_out: spots of the outer loss.
        validation: spots of early stopping and model choice.
        test: spots that are looked at once, after training.
        dropped: how many training, held-out or validation spots lie within the buffer of another set.
        unlisted: how many spots the user's file does not list.
    """

    train: np.ndarray
    held_out: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    dropped: int = 0
    unlisted: int = 0


@dataclass(frozen=True)
class FoldPlan:
    """One fold of an evaluation before any data is read.

    Attributes:
        label: "C2.0" (fold 0 within section C2) or "C2" (section or donor left out); the user's own from a file.
        sections: names of the sections that take part.
        test_sections: names of the sections whose spots are tested; all of them for intra-batch.
        part: which of the k parts, or of the folds of a file, is tested (intra-batch); −1 for inter-batch.
        tested_only: names of sections that a file tests beside such as it trains on and tests (intra-batch).
    """

    label: str
    sections: tuple[str, ...]
    test_sections: tuple[str, ...]
    part: int
    tested_only: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FoldPlan:
        """Inverse of `asdict`, after JSON, which has no tuples."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)

    @property
    def training_sections(self) -> tuple[str, ...]:
        """Names of the sections that have other than test spots."""
        unseen = self.tested_only if self.part >= 0 else self.test_sections
        return tuple(s for s in self.sections if s not in unseen)


def plan_folds(evaluation: str, donors: Mapping[str, str], protocol: Protocol, *, dataset: str) -> list[FoldPlan]:
    """The folds of an evaluation.

    Args:
        evaluation: "intra" (k parts of each section) or "inter" (leave one section or donor out).
        donors: section -> donor ("" = not known), in order.
        protocol: number of parts, what is left out, or the file of folds.
        dataset: for messages.

    Returns:
        The folds; none where the user's file has only such of another evaluation.

    Raises:
        BadSpec: if there are not two sections, or donors, to tell apart, or the file of folds is malformed.
    """
    names = tuple(donors)
    if protocol.fold_file:
        return _plan_listed(evaluation, names, Path(protocol.fold_file), dataset)
    if evaluation == "intra":
        return [FoldPlan(f"{n}.{i}", (n,), (n,), i) for n in names for i in range(protocol.folds)]
    units = set(donors.values()) - {""}
    by_donor = protocol.leave_out == "donor" or (
        protocol.leave_out == "auto" and len(units) > 1 and "" not in donors.values()
    )
    if by_donor and (len(units) < 2 or "" in donors.values()):
        raise BadSpec(
            f"protocol.leave_out = 'donor' needs two known donors, {dataset} has "
            f"{', '.join(sorted(units)) or 'none'}{_unknown(donors) if units else ''}; use leave_out = 'section'"
        )
    if not by_donor and len(names) < 2:
        raise BadSpec(
            f"inter-batch evaluation needs at least two sections and {dataset} has {len(names)}; use --evaluation intra"
        )
    left_out = dict.fromkeys(donors.values()) if by_donor else dict.fromkeys(names)
    return [
        FoldPlan(unit, names, tuple(n for n in names if (donors[n] if by_donor else n) == unit), -1)
        for unit in left_out
    ]


def partly_known(donors: Mapping[str, str]) -> str:
    """What it means that donors are known for some sections only; "" where all are, or none is.

    Args:
        donors: section -> donor ("" = not known).
    """
    if all(donors.values()) or not any(donors.values()):
        return ""
    return (
        f"donors are known for only some sections{_unknown(donors)}, so sections are left out one by one and a "
        f"section may be tested by a model trained on the same donor; state all donors"
    )


def _unknown(donors: Mapping[str, str]) -> str:
    """The first sections without a donor, in brackets; "" where there are none."""
    unknown = [name for name, donor in donors.items() if not donor]
    return f" (not for {', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''})" if unknown else ""


def _plan_listed(evaluation: str, sections: tuple[str, ...], path: Path, dataset: str) -> list[FoldPlan]:
    """The folds of the user's file that test spots beside training spots (intra) or of other sections (inter)."""
    plans: list[FoldPlan] = []
    for label, listing in read_fold_file(path).items():
        found = {name: listing.sections(name) for name in SETS}
        for section in sorted(set().union(*found.values())):
            if section not in sections:
                raise BadSpec(
                    f"protocol.fold_file = '{path}': section '{section}' of fold {label} is none of {dataset}, which "
                    f"has {', '.join(sections)}"
                )
        developed = found["train"] | found["validation"] | found["held_out"]
        within = bool(found["test"] & developed)
        if within == (evaluation == "intra"):
            every = set().union(*found.values())
            plans.append(
                FoldPlan(
                    label,
                    tuple(s for s in sections if s in every),
                    tuple(s for s in sections if s in found["test"]),
                    len(plans) if within else -1,
                    tuple(s for s in sections if s in found["test"] - developed) if within else (),
                )
            )
    return plans


def make_fold(plan: FoldPlan, table: SpotTable, protocol: Protocol, seed: int) -> Fold:
    """Rows of the fold; depends on the seed and the section names, never on selector or backbone.

    Raises:
        BadSpec: if a set would be left with fewer than three spots, or the file of folds names an unknown spot.
    """
    if protocol.fold_file:
        return _listed_fold(plan, table, protocol)
    parts: dict[str, list[np.ndarray]] = {"train": [], "held_out": [], "validation": [], "test": []}
    for index, section in enumerate(table.sections):
        rows = np.flatnonzero(table.section == index)
        rng = np.random.default_rng(seed_for(seed, "folds", section.name))
        if plan.part >= 0:
            if len(rows) < protocol.folds * FEWEST_SPOTS:
                raise BadSpec(
                    f"protocol.folds = {protocol.folds} leaves fewer than {FEWEST_SPOTS} test spots in each fold of "
                    f"section '{section.name}', which has {len(rows)} spots; choose fewer folds"
                )
            groups = _partition(table.position[rows], [1.0] * protocol.folds, protocol.fold_shape, rng)
            parts["test"].append(rows[groups == plan.part])
            rows = rows[groups != plan.part]
            rng = np.random.default_rng(seed_for(seed, "folds", section.name, str(plan.part)))
        elif section.name in plan.test_sections:
            parts["test"].append(rows)
            continue
        shares = [
            1 - protocol.validation_share - protocol.held_out_share,
            protocol.validation_share,
            *([protocol.held_out_share] if protocol.held_out_share else []),
        ]
        groups = _partition(table.position[rows], shares, protocol.fold_shape, rng)
        for group, name in enumerate(("train", "validation", "held_out")[: len(shares)]):
            parts[name].append(rows[groups == group])
    sets = {
        name: np.sort(np.concatenate(rows)) if rows else np.empty(0, dtype=np.int64) for name, rows in parts.items()
    }
    before = sum(map(len, sets.values()))
    for name in ("validation", "held_out"):  # small sets: they give way to the test spots only
        sets[name] = sets[name][~_near(table, sets[name], sets["test"], protocol.buffer)]
    others = np.concatenate([sets["test"], sets["validation"], sets["held_out"]])
    sets["train"] = sets["train"][~_near(table, sets["train"], others, protocol.buffer)]
    for name, rows in sets.items():
        if name == "held_out" and protocol.held_out_share == 0:
            continue
        tested = [s.name in plan.test_sections for s in table.sections]
        for index, section in enumerate(table.sections):
            takes_part = plan.part >= 0 or tested[index] == (name == "test")
            count = int((table.section[rows] == index).sum())
            if takes_part and count < FEWEST_SPOTS:
                raise BadSpec(
                    f"fold {plan.label} has {count} {name.replace('_', '-')} spots of section '{section.name}' and "
                    f"needs at least {FEWEST_SPOTS}; use fewer folds, a smaller protocol.buffer_um or larger sections"
                )
    return _fold(sets, dropped=before - sum(map(len, sets.values())))


def _listed_fold(plan: FoldPlan, table: SpotTable, protocol: Protocol) -> Fold:
    """The fold as the user's file has it: neither shares nor buffer apply, and the seed does nothing."""
    listing: Listing = read_fold_file(Path(protocol.fold_file))[plan.label]
    where = f"protocol.fold_file = '{protocol.fold_file}', fold {plan.label}"
    group = np.full(len(table), -1)
    for index, section in enumerate(table.sections):
        spots, groups = listing.of(section.name)
        names = section.counts.obs_names
        unknown = np.flatnonzero(names.get_indexer(spots) < 0)
        if len(unknown):
            raise BadSpec(
                f"{where}: spot '{spots[unknown[0]]}' is none of section '{section.name}' ({len(unknown)} such spots); "
                f"its spots are named like '{names[0]}'"
            )
        rows = np.flatnonzero(table.section == index)
        place = pd.Index(spots).get_indexer(names[table.source_row[rows]])
        group[rows] = np.where(place >= 0, np.append(groups, -1)[place], -1)  # a listed spot may be filtered: no row
    sets = {name: np.flatnonzero(group == code) for code, name in enumerate(SETS)}
    if protocol.held_out_share > 0 and not len(sets["held_out"]):
        raise BadSpec(
            f"{where} has no held_out spots for the outer loss; list some, or say by protocol.held_out_share = 0 that "
            "it uses the validation spots"
        )
    for name, rows in sets.items():
        for index in np.unique(table.section[rows]):
            count = int((table.section[rows] == index).sum())
            if count < FEWEST_SPOTS:
                raise BadSpec(
                    f"{where} has {count} {name} spots of section '{table.sections[index].name}' and needs at least "
                    f"{FEWEST_SPOTS}, or none"
                )
        if not len(rows) and name != "held_out":
            raise BadSpec(f"{where}: none of its {name} spots is left after the filters; see min_genes_per_spot")
    return _fold(sets, unlisted=int((group < 0).sum()))


def _fold(sets: Mapping[str, np.ndarray], *, dropped: int = 0, unlisted: int = 0) -> Fold:
    return Fold(sets["train"], sets["held_out"], sets["validation"], sets["test"], dropped, unlisted)


def fold_table(label: str, fold: Fold, table: SpotTable) -> pd.DataFrame:
    """The fold as a file of folds has it: one row for each of its spots with section, spot, fold and set.

    Sorted by section and row, so that equal folds give equal tables. Given back as `protocol.fold_file`, it makes the
    same fold.
    """
    rows = np.concatenate([getattr(fold, name) for name in SETS])
    names = np.repeat(np.asarray(SETS), [len(getattr(fold, name)) for name in SETS])
    order = np.argsort(rows)
    rows, names = rows[order], names[order]
    spots = [s.counts.obs_names[table.source_row[rows[table.section[rows] == i]]] for i, s in enumerate(table.sections)]
    return pd.DataFrame(
        {
            "section": np.asarray([s.name for s in table.sections], dtype=object)[table.section[rows]],
            "spot": np.concatenate(spots),
            "fold": label,
            "set": names,
        }
    )


@dataclass(frozen=True)
class Separation:
    """How far the test spots of a fold lie from its training spots, on the sections that have both.

    Attributes:
        nearest_um: smallest distance from a test spot to a training spot, between centres; None where no section has
            both.
        median_um: median over test spots of the distance to the nearest training spot; None likewise.
        overlapping: how many test spots have a patch that shares tissue with the patch of a training spot.
    """

    nearest_um: float | None
    median_um: float | None
    overlapping: int


def separation(fold: Fold, table: SpotTable, patch_um: float) -> Separation:
    """Distances between test and training spots.

    Args:
        fold: rows of the table.
        table: positions and sections.
        patch_um: side of a patch; two patches overlap if their centres are closer along both axes.
    """
    distances, overlapping = [], 0
    for section in np.unique(table.section[fold.test]):
        test = table.position[fold.test[table.section[fold.test] == section]]
        train = table.position[fold.train[table.section[fold.train] == section]]
        if len(train):
            tree = cKDTree(train)
            distances.append(tree.query(test)[0])
            overlapping += int((tree.query(test, p=np.inf)[0] < patch_um).sum())
    if not distances:
        return Separation(None, None, 0)
    every = np.concatenate(distances)
    return Separation(float(every.min()), float(np.median(every)), overlapping)


def _partition(positions: np.ndarray, shares: Sequence[float], shape: str, rng: np.random.Generator) -> np.ndarray:
    """Group of each spot, (spots,) int; groups have sizes proportional to `shares`."""
    groups = np.empty(len(positions), dtype=np.int64)
    if shape == "random":
        edges = np.round(np.cumsum([0.0, *shares]) / sum(shares) * len(positions)).astype(int)
        order = rng.permutation(len(positions))
        for group, (start, end) in enumerate(pairwise(edges)):
            groups[order[start:end]] = group
        return groups
    angle = rng.uniform(0, math.tau)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    _bisect(positions.astype(np.float64) @ turn, np.arange(len(positions)), list(enumerate(shares)), groups)
    return groups


def _bisect(positions: np.ndarray, rows: np.ndarray, shares: list[tuple[int, float]], groups: np.ndarray) -> None:
    """Cut the spots `rows` across their longer side until each share has its compact block; fills `groups`."""
    if len(shares) == 1:
        groups[rows] = shares[0][0]
        return
    half = len(shares) // 2
    here = positions[rows]
    axis = int(np.argmax(np.ptp(here, axis=0))) if len(rows) else 0
    order = rows[np.argsort(here[:, axis], kind="stable")]
    cut = round(sum(s for _, s in shares[:half]) / sum(s for _, s in shares) * len(rows))
    _bisect(positions, order[:cut], shares[:half], groups)
    _bisect(positions, order[cut:], shares[half:], groups)


def _near(table: SpotTable, rows: np.ndarray, others: np.ndarray, distance_um: float) -> np.ndarray:
    """Which of `rows` lie closer than `distance_um`, along both axes, to one of `others` on the same section.

    As squares overlap: a buffer as wide as a patch leaves no two patches that share tissue, whatever the grid.

    Returns:
        (rows,) bool.
    """
    near = np.zeros(len(rows), dtype=bool)
    if distance_um == 0:
        return near
    for section in np.unique(table.section[rows]):
        here = np.flatnonzero(table.section[rows] == section)
        there = others[table.section[others] == section]
        if len(there):
            distance, _ = cKDTree(table.position[there]).query(table.position[rows[here]], p=np.inf)
            near[here] = distance < distance_um
    return near
