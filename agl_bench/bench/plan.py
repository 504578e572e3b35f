"""What a grid is going to cost, judged by what past cells have cost.

Every number says what it rests on: past cells of the same line, or cells of the same selector, backbone and evaluation
under other settings or on other data, scaled; where there is neither, the cost is unknown, and no number is made up.
"""

from __future__ import annotations

import heapq
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agl_bench.bench.cells import CellStore
from agl_bench.bench.finished import Unreadable, folders, look
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.fitness import as_json as skips_as_json
from agl_bench.bench.fold_report import report_folds
from agl_bench.bench.run import Bench
from agl_bench.bench.spec import RunSpec
from agl_bench.bench.status import Place

SEVERAL = 3  # past cells from which a range can be told
RANGE = (0.1, 0.9)
FAILED = ("failed", "diverged")


@dataclass(frozen=True)
class Past:
    """A finished cell, as far as it tells what others will cost.

    Attributes:
        line: all that cells share which differ in fold and seed alone.
        kin: selector, and evaluation and backbone with its settings.
        data: the dataset with its settings; and its label, for people.
        work: training spots × the most epochs that there could have been.
        seconds, peak_memory_mb: what it cost.
        machine: where.
    """

    line: str
    kin: str
    data: str
    label: str
    work: float
    seconds: float
    peak_memory_mb: float
    machine: str


@dataclass(frozen=True)
class Cost:
    """What one cell is expected to cost.

    Attributes:
        seconds: median of the past cells.
        low, high: `RANGE` of them; None where they are fewer than `SEVERAL`.
        peak_memory_mb: the most of them; None where they were on other data.
        basis: what this rests on.
        cells: how many past cells.
        is_scaled: they were others than those of this line.
    """

    seconds: float
    low: float | None
    high: float | None
    peak_memory_mb: float | None
    basis: str
    cells: int
    is_scaled: bool


@dataclass(frozen=True)
class Line:
    """A line of the grid.

    Attributes:
        place: which one.
        count: its cells by status, see `standing`.
        left: cells that would run.
        cost: of one of them; None = unknown.
    """

    place: Place
    count: Counter[str]
    left: int
    cost: Cost | None

    def total(self, name: str) -> float | None:
        """Seconds of all cells that would run, by "seconds", "low" or "high" of one."""
        one = getattr(self.cost, name) if self.cost else None
        return None if one is None else one * self.left


@dataclass(frozen=True)
class Estimate:
    """The lines of a grid, and what they cost together.

    Attributes:
        lines: in the order of the grid.
        workers: that share the work.
        elapsed, low, high: seconds until the last cell of known cost ends, each cell taking the median, or the lower or
            upper end of its range (the median where there is none).
        peak_memory_mb: of one worker; None = unknown.
        unknown: cells that would run and whose cost nobody knows.
    """

    lines: Sequence[Line]
    workers: int
    elapsed: float
    low: float
    high: float
    peak_memory_mb: float | None
    unknown: int


def standing(
    specs: Iterable[RunSpec], store: CellStore | None, unfit: Mapping[str, str]
) -> Iterator[tuple[RunSpec, str]]:
    """Each cell of a grid and how it stands: "done", "failed", "diverged", "skipped" or "todo".

    Args:
        specs: of the cells.
        store: where finished and failed ones are; None = there are none.
        unfit: keys of cells that cannot run, from `known_unfit`.
    """
    for spec in specs:
        failure = store.failure(spec.key) if store else None
        left = failure.status if failure else "skipped" if spec.key in unfit else "todo"
        yield spec, "done" if store and store.is_finished(spec.key) else left


def past_cells(works: Iterable[Path]) -> list[Past]:
    """What the finished cells of some work folders tell."""
    found = []
    for folder in (folder for work in works for folder in folders(work / "cells")):
        try:
            content = look(folder)
            spec, counts, cost = content["spec"], content["counts"], content["cost"]
            found.append(
                Past(
                    **_identity(spec),
                    label=str(spec["dataset"]["label"]),
                    work=float(counts["train_spots"]) * spec["protocol"]["epochs"],
                    seconds=float(cost["seconds"]),
                    peak_memory_mb=float(cost["peak_memory_mb"]),
                    machine=machine_of(content["provenance"]),
                )
            )
        except (Unreadable, KeyError, TypeError):
            continue  # damaged, or of another version
    return found


def machine_of(provenance: Mapping[str, Any]) -> str:
    """What must be the same for times to be the same."""
    return json.dumps([provenance.get(name) for name in ("machine", "device", "threads")])


def estimate(
    cells: Sequence[tuple[RunSpec, str]],
    past: Sequence[Past],
    spots: Callable[[Sequence[RunSpec]], float],
    *,
    machine: str,
    workers: int = 1,
    again: bool = False,
    retry_failed: bool = False,
) -> Estimate:
    """What is left of a grid, and what it will cost.

    Args:
        cells: from `standing`.
        past: from `past_cells`.
        spots: training spots of cells of one line, asked only where costs have to be scaled.
        machine: from `machine_of`, of the machine that would run them; its own past cells go before others'.
        workers: cells at a time. That they do not slow each other is taken for granted.
        again, retry_failed: as for `run`.
    """
    groups: dict[Place, list[tuple[RunSpec, str]]] = {}
    for spec, status in cells:
        groups.setdefault(Place.of(spec.as_json()), []).append((spec, status))
    runs = {"todo", *(FAILED if retry_failed else ()), *(("done", *FAILED) if again else ())}
    lines, costs = [], {}
    for place, members in groups.items():
        left = [spec for spec, status in members if status in runs]
        costs[place] = cost = _cost(left, past, spots, machine) if left else None
        lines.append(Line(place, Counter(status for _, status in members), len(left), cost))
    known = [cost for line in lines for cost in [line.cost] * line.left if cost]

    def elapsed(name: str) -> float:
        return makespan([v if (v := getattr(cost, name)) is not None else cost.seconds for cost in known], workers)

    memory = [cost.peak_memory_mb for cost in known if cost.peak_memory_mb is not None]
    return Estimate(
        lines=lines,
        workers=workers,
        elapsed=elapsed("seconds"),
        low=elapsed("low"),
        high=elapsed("high"),
        peak_memory_mb=max(memory, default=None),
        unknown=sum(line.left for line in lines if line.cost is None),
    )


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last worker ends, each taking the next piece of work as soon as it is free."""
    free = [0.0] * workers
    for piece in seconds:
        heapq.heapreplace(free, free[0] + piece)
    return max(free)


def training_spots(specs: Sequence[RunSpec], bench: Bench) -> float:
    """Mean over the folds of some cells of one line; makes the folds, and trains nothing."""
    first, folds = specs[0], {spec.fold for spec in specs}
    reports = report_folds(
        bench.sections(first.dataset), first.protocol, dataset=first.dataset.label, evaluations=(first.evaluation,),
        seeds=(first.seed,),
    )  # fmt: skip
    return statistics.fmean(r.counts["train_spots"] for r in reports if r.label in folds)


def as_json(found: Estimate, skips: Iterable[Skipped] = ()) -> dict[str, Any]:
    """For programs."""
    return {
        "lines": [
            {
                **vars(line.place),
                "cells": line.count.total(),
                **{name: line.count[name] for name in ("done", *FAILED, "skipped")},
                "to_do": line.left,
                "seconds_per_cell": line.cost and line.cost.seconds,
                "seconds_per_cell_range": line.cost and [line.cost.low, line.cost.high],
                "seconds_total": line.total("seconds"),
                "peak_memory_mb": line.cost and line.cost.peak_memory_mb,
                "past_cells": line.cost.cells if line.cost else 0,
                "scaled": bool(line.cost and line.cost.is_scaled),
                "basis": line.cost.basis if line.cost else "unknown",
            }
            for line in found.lines
        ],
        "range": list(RANGE),
        "workers": found.workers,
        "seconds_elapsed": found.elapsed,
        "seconds_elapsed_range": [found.low, found.high],
        "peak_memory_mb_per_worker": found.peak_memory_mb,
        "to_do": sum(line.left for line in found.lines),
        "cells_of_unknown_cost": found.unknown,
        "skipped": skips_as_json(skips),
    }


def _cost(
    specs: Sequence[RunSpec], past: Sequence[Past], spots: Callable[[Sequence[RunSpec]], float], machine: str
) -> Cost | None:
    identities = [_identity(spec.as_json()) for spec in specs]
    line, kin, data = (identities[0][name] for name in ("line", "kin", "data"))
    same = [p for p in past if p.line == line]
    alike = [p for p in past if p.kin == kin]
    here = [p for p in alike if p.data == data]
    used = same or here or alike
    if not used:
        return None
    of_this_machine = [p for p in used if p.machine == machine]
    elsewhere = "" if of_this_machine else ", on another machine"
    used = of_this_machine or used
    basis = f"{len(used)} past cell{'s' if len(used) > 1 else ''}"
    seconds = [p.seconds for p in used]
    if not same:
        size, epochs = spots(specs), specs[0].protocol.epochs
        seconds = [p.seconds * size * epochs / p.work for p in used]
        of = "with other settings" if here else f"on {', '.join(dict.fromkeys(p.label for p in used))}"
        basis += f" {of}, scaled to {size:,.0f} spots × {epochs} epochs"
    low, high = np.quantile(seconds, RANGE).tolist() if len(seconds) >= SEVERAL else (None, None)
    return Cost(
        seconds=statistics.median(seconds),
        low=low,
        high=high,
        peak_memory_mb=max(p.peak_memory_mb for p in used) if same or here else None,
        basis=basis + elsewhere,
        cells=len(used),
        is_scaled=not same,
    )


def _identity(spec: Mapping[str, Any]) -> dict[str, str]:
    """`line`, `kin` and `data` of `Past`, from a spec as JSON; without what was tuned, perhaps for each fold anew."""
    tuning = spec.get("tuning", {})
    searched = set(tuning.get("searched", ()))

    def part(kind: str) -> list[Any]:
        name, settings = spec[kind]["name"], spec[kind]["settings"]
        return [name, {k: v for k, v in settings.items() if f"{name}.{k}" not in searched}]

    protocol = {
        k: v for k, v in spec["protocol"].items() if k != "patches" and f"protocol.{k}" not in searched
    }  # patches of wrong spots take as long
    kin = [spec["selector"]["name"], spec["evaluation"], spec["device"], part("backbone")]
    line = [kin, part("dataset"), part("selector"), protocol, tuning.get("trials")]
    return {
        name: json.dumps(content, sort_keys=True)
        for name, content in (("line", line), ("kin", kin), ("data", part("dataset")))
    }
