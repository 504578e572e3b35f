"""How far the cells of a work folder are, while they run or afterwards; only looks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agl_bench.bench import fitness, versions
from agl_bench.bench.checkpoints import Partial, read_spec
from agl_bench.bench.finished import Unreadable, folders, look
from agl_bench.bench.leases import Leases, Owner, is_stale
from agl_bench.bench.spec import Tuning
from agl_bench.digests import Damaged, read_object

STATUSES = ("done", "running", "interrupted", "failed", "diverged", "skipped", "to do")


@dataclass(frozen=True)
class Place:
    """A line of the grid.

    Attributes:
        dataset: label.
        evaluation, backbone, selector: names.
        tuning: the budget that settings were tuned with; "" = fixed settings.
        shuffled: a control, with patches of wrong spots.
    """

    dataset: str
    evaluation: str
    backbone: str
    selector: str
    tuning: str = ""
    shuffled: bool = False

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Place:
        """Of a spec as JSON."""
        return cls(
            dataset=str(spec["dataset"]["label"]),
            evaluation=str(spec["evaluation"]),
            backbone=str(spec["backbone"]["name"]),
            selector=str(spec["selector"]["name"]),
            tuning=Tuning(**spec["tuning"]).label if "tuning" in spec else "",
            shuffled=spec["protocol"].get("patches") == "shuffled",
        )

    @property
    def settings(self) -> str:
        """For people: what tells lines of one selector apart."""
        return "control: shuffled patches" if self.shuffled else self.tuning or "fixed"

    @property
    def title(self) -> str:
        """For lines about single cells."""
        names = (self.dataset, self.evaluation, self.backbone, self.selector)
        return " · ".join((*names, *([self.settings] if self.settings != "fixed" else [])))


@dataclass(frozen=True)
class Running:
    """A cell that a process works on.

    Attributes:
        key: of the cell.
        place: in the grid; None before it has begun.
        fold: its fold.
        seed: its seed.
        owner: who works on it.
        progress: last epoch that was noted and how many there are at most; None before the first.
    """

    key: str
    place: Place | None
    fold: str
    seed: int | None
    owner: Owner
    progress: tuple[int, int] | None


@dataclass(frozen=True)
class Status:
    """What a work folder holds.

    Attributes:
        counts: cells of each status in each line of the grid.
        running: cells at work.
        skipped: cells that could not run when somebody last tried.
        damaged: keys of finished cells that are no longer whole.
        unknown: folders of cells begun or failed that do not say which cell that is: damaged, or of another version.
        others: versions of the deciding code, other than the one here, that have made finished cells.
    """

    counts: dict[Place, Counter[str]]
    running: list[Running]
    skipped: list[fitness.Skipped]
    damaged: list[str]
    unknown: list[str]
    others: list[versions.Version]


def status_of(work: Path) -> Status:
    """Look at a work folder. What is left to do is known of runs that are alive."""
    leases = Leases(work / "leases")
    held = leases.running()
    found: dict[str, tuple[str, Place]] = {}
    specs: dict[str, Mapping[str, Any]] = {}
    for status, key, place in _planned(work, held):
        found[key] = (status, place)
    damaged, unknown = [], []
    for kind in ("partial", "failed", "cells"):
        for folder in folders(work / kind):
            key, spec = folder.name, read_spec(folder) if kind != "cells" else None
            if kind == "cells":
                try:
                    spec = look(folder)["spec"]
                except Unreadable as error:
                    damaged += [key] * error.is_damaged
            if spec is None:
                if kind != "cells" and os.path.lexists(folder / "spec.json"):  # else it is being written
                    unknown.append(f"{kind}/{key}")
                continue
            status = {"partial": "interrupted", "cells": "done"}.get(kind) or _failure(folder)
            found[key] = (status, Place.of(spec))
            specs[key] = spec
    counts: dict[Place, Counter[str]] = {}
    for key, (status, place) in found.items():
        counts.setdefault(place, Counter())["running" if key in held else status] += 1
    skipped = fitness.noted(work, specs.values())
    for skip in skipped:
        counts.setdefault(Place.of(skip.spec.as_json()), Counter())["skipped"] += 1
    running = [
        Running(
            key,
            found[key][1] if key in found else None,
            str(specs.get(key, {}).get("fold", "")),
            specs.get(key, {}).get("seed"),
            owner,
            Partial(work / "partial" / key).progress(),
        )
        for key, owner in held.items()
    ]
    ordered = sorted(counts, key=lambda p: (p.dataset, p.evaluation, p.backbone, p.shuffled, p.tuning, p.selector))
    lines = {place: counts[place] for place in ordered}
    done = (specs[key] for key, (status, _) in found.items() if status == "done")
    return Status(lines, running, skipped, damaged, unknown, versions.others(work, done))


def as_json(status: Status) -> dict[str, Any]:
    """For programs."""
    return {
        "lines": [
            {**vars(place), **{name: count[name] for name in STATUSES}} for place, count in status.counts.items()
        ],
        "running": [
            {
                "key": r.key,
                **(vars(r.place) if r.place else {}),
                "fold": r.fold,
                "seed": r.seed,
                "host": r.owner.host,
                "pid": r.owner.pid,
                "epoch": r.progress and r.progress[0],
                "epochs": r.progress and r.progress[1],
            }
            for r in status.running
        ],
        "skipped": fitness.as_json(status.skipped),
        "damaged": status.damaged,
        "unknown": status.unknown,
        "other_versions": versions.as_json(status.others),
    }


def _planned(work: Path, held: Mapping[str, Owner]) -> Iterator[tuple[str, str, Place]]:
    """The cells of runs that are alive: those that hold a cell, and those of this machine."""
    alive = {(o.place, o.pid, o.started) for o in held.values()}
    for path in sorted((work / "grids").glob("*.json")):
        owner = Owner.parse(path.stem)
        if owner is None or ((owner.place, owner.pid, owner.started) not in alive and is_stale(path, owner)):
            continue
        for key, names in _read(path).items():
            if isinstance(names, list) and [type(n) for n in names] == [str] * 5 + [bool]:
                yield "to do", key, Place(*names)


def _failure(folder: Path) -> str:
    return "diverged" if _read(folder / "failure.json").get("status") == "diverged" else "failed"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is none, or is gone."""
    try:
        return read_object(path)
    except (OSError, Damaged):
        return {}
