"""What bounds a table from below: position without image, image without position.

A result is worth its place in a table if it lies above what a spot's place predicts and what the images of wrong spots
predict. The nearest training spots are part of every intra-batch result (`evaluate.PositionControl`); the other two are
cells of their own, with the baseline selector, on the same folds and seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agl_bench.bench.result import Result
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.bench.table import BASELINE, Summary, spread, summarise, unit, without_nan
from agl_bench.data.folds import FoldPlan
from agl_bench.errors import AglBenchError
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.selector import Selector
from agl_bench.registry.plugins import Plugins

NEAREST = "position (k-NN)"
SHUFFLED = "shuffled patches"
NEAREST_SCORE = "control_position_knn_pcc_gene_mean_section_mean"


@dataclass(frozen=True)
class Control:
    """One control of one dataset under one evaluation with one backbone.

    Attributes:
        name: `NEAREST`, `SHUFFLED`, or "NAME (backbone)" of a backbone that is a control.
        pcc: test PCC of each (fold, seed).
    """

    dataset: str
    evaluation: str
    backbone: str
    name: str
    pcc: dict[tuple[str, int], float]


def control_selectors(plugins: Plugins, names: Sequence[str]) -> frozenset[str]:
    """Those of the selectors that are no methods but bounds for methods."""
    classes = {name: plugins.entry(name, "selector").load() for name in names}
    return frozenset(n for n, cls in classes.items() if getattr(cls, "is_control", Selector.is_control))


def control_backbones(plugins: Plugins, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Those of the backbones, by default of all that are installed, that are no image models but bounds for them."""
    found = []
    for name in plugins.names("backbone") if names is None else names:
        try:
            cls = plugins.entry(name, "backbone").load()
        except AglBenchError:
            if names is not None:
                raise
            continue  # a broken plug-in that nobody asked for says what is wrong where its name is used
        if getattr(cls, "is_control", Backbone.is_control):
            found.append(name)
    return tuple(found)


def control_cells(
    campaign: Campaign, plugins: Plugins, root: Path, *, device: str, fingerprint: dict[str, str]
) -> list[tuple[RunSpec, FoldPlan]]:
    """The control cells of a campaign, on its folds and seeds, with the baseline selector.

    Cells that the campaign has itself are among them; a finished cell is not run twice.
    """
    control = control_backbones(plugins)
    own = tuple(b for b in campaign.backbones if b not in control_backbones(plugins, campaign.backbones))
    wanted = [replace(campaign, selectors=(BASELINE,), backbones=control)] if control else []
    if own and campaign.protocol.patches == "own":
        protocol = replace(campaign.protocol, patches="shuffled")
        label = campaign.preset + (", " if " with " in campaign.preset else " with ") + "patches=shuffled"
        wanted.append(replace(campaign, selectors=(BASELINE,), backbones=own, protocol=protocol, preset=label))
    return [cell for c in wanted for cell in c.cells(plugins, root, device=device, fingerprint=fingerprint)]


def controls_of(results: Sequence[Result], others: Sequence[Result]) -> list[Control]:
    """The controls of each table.

    Args:
        results: of the campaign.
        others: of its control cells.
    """
    found: dict[tuple[str, str, str, str], Control] = {}

    def add(dataset: str, evaluation: str, backbone: str, name: str, result: Result, pcc: float) -> None:
        key = dataset, evaluation, backbone, name
        if not math.isfinite(pcc):
            return  # no gene has a PCC there
        found.setdefault(key, Control(*key, {})).pcc[unit(result)] = pcc

    protocols = {}  # by table
    for result in results:
        place = result.spec.dataset.label, result.spec.evaluation, result.spec.backbone.name
        protocols[place] = result.spec.protocol
        if NEAREST_SCORE in result.scores:
            add(*place, NEAREST, result, result.scores[NEAREST_SCORE])
    for place, protocol in protocols.items():
        for other in others:
            if (other.spec.dataset.label, other.spec.evaluation) != place[:2]:
                continue
            same_backbone = other.spec.backbone.name == place[2]
            if other.spec.protocol != protocol:
                if same_backbone:
                    add(*place, SHUFFLED, other, other.pcc)
            elif not same_backbone:
                add(*place, f"{other.spec.backbone.name} (backbone)", other, other.pcc)
    return list(found.values())


def notes_on(results: Sequence[Result], controls: Sequence[Control], bounds: frozenset[str]) -> list[str]:
    """`notes_about` the results of a campaign."""
    return notes_about(summarise(results), controls, bounds)


def notes_about(lines: Sequence[Summary], controls: Sequence[Control], bounds: frozenset[str]) -> list[str]:
    """One sentence for each result that lies outside its controls.

    Args:
        lines: of tables.
        controls: from `controls_of`.
        bounds: selectors that are controls themselves, of which nothing is expected.
    """
    notes = []
    for control in controls:
        place = control.dataset, control.evaluation, control.backbone
        where = f"{control.dataset}, {control.evaluation}-batch, backbone {control.backbone}"
        values = list(control.pcc.values())
        mean, sd = statistics.fmean(values), spread(values)
        if control.name == SHUFFLED and sd is not None and mean > 2 * sd / len(values) ** 0.5:
            notes.append(
                f"{where}: images of wrong spots still reach a PCC of {mean:.3f} (more than two standard errors above "
                "0): something other than the tissue at the spot predicts expression"
            )
        below = []
        for line in lines:
            if (line.dataset, line.evaluation, line.backbone) != place or line.selector in bounds:
                continue
            shared = [pcc - control.pcc[u] for pcc, u in zip(line.pcc, line.units, strict=True) if u in control.pcc]
            if shared and statistics.fmean(shared) < 0:
                below.append(line.selector)
        if below:
            notes.append(f"{where}: {', '.join(below)} below the control {control.name} (PCC {mean:.3f})")
    return notes


def controls_as_json(controls: Sequence[Control], notes: Sequence[str], bounds: frozenset[str]) -> dict[str, Any]:
    """What the table says of controls, with the value of every fold, for programs."""
    content = {
        "control_selectors": sorted(bounds),
        "controls": [
            {
                "dataset": c.dataset,
                "evaluation": c.evaluation,
                "backbone": c.backbone,
                "control": c.name,
                "pcc_mean": statistics.fmean(c.pcc.values()),
                "pcc_sd": spread(list(c.pcc.values())),
                "cells": [{"fold": fold, "seed": seed, "pcc": pcc} for (fold, seed), pcc in c.pcc.items()],
            }
            for c in controls
        ],
        "notes": list(notes),
    }
    plain: dict[str, Any] = without_nan(content)
    return plain
