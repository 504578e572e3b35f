"""Index sets of a fold: train, held out (outer loss), validation (early stopping, model choice), test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.spatial import cKDTree

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
    """

    train: np.ndarray
    held_out: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    dropped: int = 0


@dataclass(frozen=True)
class FoldPlan:
    """One fold of an evaluation before any data is read.

    Attributes:
        label: "C2.0" (fold 0 within section C2) or "C2" (section or donor left out).
        sections: names of the sections that take part.
        test_sections: names of the sections whose spots are tested; all of them for intra-batch.
        part: which of the k parts is tested (intra-batch), −1 for inter-batch.
    """

    label: str
    sections: tuple[str, ...]
    test_sections: tuple[str, ...]
    part: int

    @property
    def training_sections(self) -> tuple[str, ...]:
        """Names of the sections that have training spots."""
        return tuple(s for s in self.sections if self.part >= 0 or s not in self.test_sections)


def plan_folds(evaluation: str, donors: Mapping[str, str], protocol: Protocol, *, dataset: str) -> list[FoldPlan]:
    """The folds of an evaluation.

    Args:
        evaluation: "intra" (k parts of each section) or "inter" (leave one section or donor out).
        donors: section -> donor ("" = not known), in order.
        protocol: number of parts, what is left out.
        dataset: for messages.

    Raises:
        BadSpec: if there are not two sections, or donors, to tell apart.
    """
    names = tuple(donors)
    if evaluation == "intra":
        return [FoldPlan(f"{n}.{i}", (n,), (n,), i) for n in names for i in range(protocol.folds)]
    units = set(donors.values()) - {""}
    by_donor = protocol.leave_out == "donor" or (
        protocol.leave_out == "auto" and len(units) > 1 and "" not in donors.values()
    )
    if by_donor and (len(units) < 2 or "" in donors.values()):
        raise BadSpec(
            f"protocol.leave_out = 'donor' needs two known donors, {dataset} has "
            f"{', '.join(sorted(units)) or 'none'}; use leave_out = 'section'"
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


def make_fold(plan: FoldPlan, table: SpotTable, protocol: Protocol, seed: int) -> Fold:
    """Rows of the fold; depends on the seed and the section names, never on selector or backbone.

    Raises:
        BadSpec: if a set would be left with fewer than three spots.
    """
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
        sets[name] = sets[name][~_near(table, sets[name], sets["test"], protocol.buffer_um)]
    others = np.concatenate([sets["test"], sets["validation"], sets["held_out"]])
    sets["train"] = sets["train"][~_near(table, sets["train"], others, protocol.buffer_um)]
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
    return Fold(**sets, dropped=before - sum(map(len, sets.values())))


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
    """Which of `rows` lie closer than `distance_um` to one of `others` on the same section, (rows,) bool."""
    near = np.zeros(len(rows), dtype=bool)
    if distance_um == 0:
        return near
    for section in np.unique(table.section[rows]):
        here = np.flatnonzero(table.section[rows] == section)
        there = others[table.section[others] == section]
        if len(there):
            distance, _ = cKDTree(table.position[there]).query(table.position[rows[here]])
            near[here] = distance < distance_um
    return near
