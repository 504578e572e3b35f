"""What is missing, failed or odd in a work folder, said plainly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from agl_bench.bench.controls import (
    NEAREST,
    NEAREST_SCORE,
    SHUFFLED,
    Control,
    control_backbones,
    control_selectors,
    notes_about,
)
from agl_bench.bench.status import status_of
from agl_bench.bench.table import BASELINE, Summary
from agl_bench.comparison.gather import LINE, PLACE, UNIT, Gathered
from agl_bench.protocol import Preset
from agl_bench.registry.plugins import Plugins

_NAMED = 12  # missing cells of a line that are named; the CSV file has all
_VERSION = re.compile(r"(.*?)(?: v(\d+))?(?: with .*| #\d+)?$", re.DOTALL)  # name and version of a preset's label
_SHARE_LAST = 0.2  # of cells whose best epoch was the last that was allowed, from which it is worth a sentence


@dataclass(frozen=True)
class Quality:
    """What a reader must know before believing a report.

    Attributes:
        counts: cells by status, as `agl-bench status` has them.
        gaps: one row per line that lacks cells which other lines of its place have or that failed: LINE, finished,
            failed, diverged, skipped, missing, which.
        failed: one row per failed cell: LINE, UNIT, status, sentence, key.
        skipped: one row per line and reason for which cells of it could not run: LINE, cells, reason.
        nan_genes: one row per line where a primary gene had no PCC in some cell: LINE, cells, most (genes in one cell).
        outside: a sentence for each result that lies outside its controls.
        cautions: further sentences.
    """

    counts: Counter[str]
    gaps: pd.DataFrame = field(repr=False)
    failed: pd.DataFrame = field(repr=False)
    skipped: pd.DataFrame = field(repr=False)
    nan_genes: pd.DataFrame = field(repr=False)
    outside: Sequence[str] = ()
    cautions: Sequence[str] = ()

    @property
    def open(self) -> int:
        """Cells that are still to come."""
        return sum(self.counts[status] for status in ("running", "interrupted", "to do"))

    @property
    def lacking(self) -> int:
        """Cells that other lines have and that are neither finished nor failed."""
        return int(self.gaps["missing"].sum()) if len(self.gaps) else 0

    @property
    def is_whole(self) -> bool:
        """Whether every cell of the grid is finished that can run."""
        return not (self.open or self.lacking or len(self.failed))

    @property
    def sentence(self) -> str:
        """What is not there; empty if all is."""
        parts = [f"{self.counts[s]:,} {s}" for s in ("running", "to do", "interrupted") if self.counts[s]]
        parts += [f"{n:,} {s}" for s in ("failed", "diverged") if (n := int((self.failed["status"] == s).sum()))]
        if len(self.skipped):
            parts.append(f"{int(self.skipped['cells'].sum()):,} skipped, since they cannot run")
        lacking = self.lacking - self.open
        if lacking > 0:
            parts.append(f"{lacking:,} that other lines have not run")
        return f"{self.counts['done']:,} cells are finished; not: {', '.join(parts)}." if parts else ""


def known_controls(cells: pd.DataFrame, plugins: Plugins) -> tuple[frozenset[str], frozenset[str]]:
    """Selectors and backbones of the cells that are no methods, as far as they are installed here."""
    found = []
    for kind, column in (("selector", "name"), ("backbone", "backbone")):
        registered = plugins.names(kind)
        found.append([n for n in cells[column].unique() if n in registered])
    return control_selectors(plugins, found[0]), frozenset(control_backbones(plugins, found[1]))


def methods(cells: pd.DataFrame, backbones: frozenset[str]) -> pd.DataFrame:
    """Cells with images of the right spots and a backbone that is no control; among them bounds of planted data."""
    return cells[~cells["shuffled"].astype(bool) & ~cells["backbone"].isin(backbones)]


def controls(cells: pd.DataFrame, backbones: frozenset[str]) -> dict[tuple[str, ...], list[Control]]:
    """What bounds each place from below: place -> controls, of fixed settings.

    Args:
        cells: all of a work folder.
        backbones: those that are controls.
    """
    found: dict[tuple[str, ...], list[Control]] = {}
    own = methods(cells, backbones)
    baseline = cells[(cells["name"] == BASELINE) & (cells["tuning"] == "")]
    wrong = baseline[baseline["shuffled"].astype(bool)]
    wrong = wrong.assign(preset=[_unshuffled(p) for p in wrong["preset"]])
    for key, here in own[own["tuning"] == ""].groupby(PLACE, sort=False):
        place = dict(zip(PLACE, key, strict=True))
        if NEAREST_SCORE in here:
            _add(found, key, NEAREST, here.drop_duplicates(UNIT), NEAREST_SCORE)
        _add(found, key, SHUFFLED, _at(wrong, place), "pcc")
        for backbone in sorted(backbones):
            rows = _at(baseline[~baseline["shuffled"].astype(bool)], place | {"backbone": backbone})
            _add(found, key, f"{backbone} (backbone)", rows, "pcc")
    return found


def _add(
    found: dict[tuple[str, ...], list[Control]], place: tuple[str, ...], name: str, rows: pd.DataFrame, column: str
) -> None:
    values = zip(rows["fold"], rows["seed"], rows[column], strict=True)
    pcc = {(fold, int(seed)): float(value) for fold, seed, value in values if math.isfinite(value)}
    if pcc:
        found.setdefault(place, []).append(Control(place[0], place[1], place[2], name, pcc))


def _at(rows: pd.DataFrame, place: Mapping[str, str]) -> pd.DataFrame:
    for column, value in place.items():
        rows = rows[rows[column] == value]
    return rows


def _unshuffled(preset: str) -> str:
    """The label of the preset whose control this is."""
    for said, instead in (
        (", patches=shuffled", ""),
        (" with patches=shuffled, ", " with "),
        (" with patches=shuffled", ""),
    ):
        preset = preset.replace(said, instead)
    return preset


def quality(
    gathered: Gathered,
    work: Path,
    found: Mapping[tuple[str, ...], Sequence[Control]],
    bounds: frozenset[str],
    cautions: Sequence[str],
) -> Quality:
    """Look at everything.

    Args:
        gathered: the cells.
        work: their folder.
        found: from `controls`.
        bounds: selectors that are no methods.
        cautions: from `statistics.cautions`.
    """
    cells, failed, skipped = gathered.cells, gathered.failed, gathered.skipped
    return Quality(
        counts=sum(status_of(work).counts.values(), Counter[str]()),
        gaps=_gaps(cells, failed, skipped),
        failed=failed[[*LINE, *UNIT, "status", "sentence", "key"]],
        skipped=skipped.groupby([*LINE, "reason"], sort=False)
        .size()
        .reset_index(name="cells")[[*LINE, "cells", "reason"]],
        nan_genes=_nan_genes(cells),
        outside=_outside(cells, found, bounds),
        cautions=[
            *cautions,
            *versions_of_presets(cells["preset"]),
            *about_primary_genes(cells),
            *_at_their_end(gathered),
            *_machines(cells),
        ],
    )


def _gaps(cells: pd.DataFrame, failed: pd.DataFrame, skipped: pd.DataFrame) -> pd.DataFrame:
    """See `Quality.gaps`."""
    rows = []
    all_three = pd.concat(
        [
            cells[[*LINE, *UNIT]].assign(status="done"),
            failed[[*LINE, *UNIT, "status"]],
            skipped[[*LINE, *UNIT]].assign(status="skipped"),
        ]
    )
    for place, here in all_three.groupby(PLACE, sort=False):
        units = sorted(set(zip(here["fold"], here["seed"], strict=True)))
        for selector, line in here.groupby("selector"):
            status = dict(zip(zip(line["fold"], line["seed"], strict=True), line["status"], strict=True))
            count = Counter(status.values())
            if count["done"] == len(units):
                continue
            absent = [f"{fold} seed {seed}" for fold, seed in units if (fold, seed) not in status]
            rows.append(
                {
                    **dict(zip(PLACE, place, strict=True)),
                    "selector": selector,
                    "finished": count["done"],
                    "failed": count["failed"],
                    **{status: count[status] for status in ("diverged", "skipped")},
                    "missing": len(absent),
                    "which": ", ".join(absent[:_NAMED]) + (" …" if len(absent) > _NAMED else ""),
                }
            )
    return pd.DataFrame(rows, columns=[*LINE, "finished", "failed", "diverged", "skipped", "missing", "which"])


def _nan_genes(cells: pd.DataFrame) -> pd.DataFrame:
    """See `Quality.nan_genes`."""
    columns = [*LINE, "cells", "most"]
    if "pcc_nan_genes" not in cells:
        return pd.DataFrame(columns=columns)
    some = cells[cells["pcc_nan_genes"] > 0]
    found = some.groupby(LINE, sort=False)["pcc_nan_genes"].agg(cells="size", most="max").reset_index()
    return found.astype({"most": int})[columns]


def _outside(
    cells: pd.DataFrame, found: Mapping[tuple[str, ...], Sequence[Control]], bounds: frozenset[str]
) -> list[str]:
    """See `Quality.outside`."""
    sentences = []
    for place, here in found.items():
        members = _at(cells[~cells["shuffled"].astype(bool)], dict(zip(PLACE, place, strict=True)))
        lines = [
            Summary(
                dataset=place[0],
                evaluation=place[1],
                backbone=place[2],
                selector=str(line["name"].iloc[0]) if line["name"].iloc[0] in bounds else str(selector),
                tuning="",
                preset=place[3],
                pcc=list(line["pcc"]),
                units=list(zip(line["fold"], line["seed"], strict=True)),
                difference=[],
                selected=[],
                seconds=[],
                regret=[],
                against_truth={},
            )
            for selector, line in members.groupby("selector")
        ]
        sentences += notes_about(lines, here, bounds)
    return list(dict.fromkeys(sentences))


def _at_their_end(gathered: Gathered) -> list[str]:
    """Lines many of whose cells were best in the last epoch that they were allowed."""
    cells = gathered.cells
    if cells.empty:
        return []
    most = pd.Series([gathered.specs[key]["protocol"]["epochs"] for key in cells["key"]], index=cells.index)
    last = (cells["epochs"] >= most) & (cells["best_epoch"] >= most - 1)
    found = []
    for line, own in last.groupby([cells[c] for c in LINE], sort=False):
        if own.mean() >= _SHARE_LAST:
            dataset, evaluation, backbone, preset, _, selector = line
            found.append(
                f"{dataset}, {evaluation}-batch, backbone {backbone}, {preset}: {own.sum():,} of {len(own):,} cells of "
                f"{selector} were best in the last epoch that they were allowed: they may not have converged"
            )
    return found


def about_primary_genes(cells: pd.DataFrame) -> list[str]:
    """A sentence for each dataset, evaluation and preset with folds whose primary genes rest on few spots."""
    if "cautions" not in cells:
        return []
    found = []
    for (dataset, evaluation, preset), own in cells.groupby(["dataset", "evaluation", "preset"], sort=False):
        folds = own.drop_duplicates(UNIT)
        some = folds[folds["cautions"] != ""]
        if len(some):
            first = some.iloc[0]
            found.append(
                f"{dataset}, {evaluation}-batch, {preset}: in {len(some):,} of {len(folds):,} folds and seeds primary "
                f"genes rest on few spots; in {first['fold']}, seed {first['seed']}, {first['cautions']}"
            )
    return found


def versions_of_presets(labels: Iterable[str]) -> list[str]:
    """A sentence for each preset of which there are several versions among labels, such as "clean" and "clean v2"."""
    found: dict[str, set[int]] = {}
    for label in labels:
        name, version = _VERSION.match(label).groups()  # type: ignore[union-attr]  # matches everything
        found.setdefault(name, set()).add(int(version or 1))
    return [
        f"The cells were run under {len(versions)} versions of preset {name}: "
        f"{', '.join(Preset(name, {}, {}, version).label for version in sorted(versions))}; these choose spots or "
        "genes by different rules (see the protocol table) and never share a row"
        for name, versions in found.items()
        if len(versions) > 1
    ]


def _machines(cells: pd.DataFrame) -> list[str]:
    """Whether times and scores come from one place."""
    found = []
    for column, what, why in (
        ("machine", "machines", "their times do not compare"),
        ("device", "devices", "sums of floating-point numbers differ between them"),
        ("version", "versions of the code that decides results", "cells of different ones never share a line"),
    ):
        names = sorted(n for n in cells[column].unique() if n) if column in cells else []
        if len(names) > 1:
            found.append(f"The cells were made on {len(names)} {what} ({'; '.join(names)}): {why}")
    return found
