"""The comparison at the end of a run: selectors × datasets, mean ± sd over folds and seeds, difference to PGL."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agl_bench.bench.result import Result

BASELINE = "pgl"
BOUND = "oracle"  # of planted data
TRUTH = "selection_"  # scores that compare a selection with what is planted begin so
FEW_SEEDS = 3


@dataclass(frozen=True)
class Summary:
    """One selector on one dataset under one evaluation with one backbone.

    Attributes:
        pcc: test PCC of each unit, in order.
        units: (fold, seed) of each.
        difference: PCC minus the baseline's, on the units that the baseline has too.
        selected: auxiliary genes selected, of each unit.
        seconds: of each unit.
        regret: the bound's PCC minus this one's, on the units that the bound has too.
        tuning: the budget that its settings were tuned with, "" if they are fixed.
        against_truth: on planted data, mean of each score of the selection over the units where it is defined.
    """

    dataset: str
    evaluation: str
    backbone: str
    selector: str
    tuning: str
    preset: str
    pcc: list[float]
    units: list[tuple[str, int]]
    difference: list[float]
    selected: list[int]
    seconds: list[float]
    regret: list[float]
    against_truth: dict[str, float]


def summarise(results: Iterable[Result]) -> list[Summary]:
    """Group results by dataset, evaluation, backbone, selector and tuning, in the order of their first appearance.

    Differences are between selectors that are tuned alike, never between a tuned and a fixed one.
    """
    groups: dict[tuple[str, str, str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault(_place(result), []).append(result)
    summaries = []
    for key, members in groups.items():
        baseline, bound = ({unit(r): r.pcc for r in groups.get((*key[:3], n, key[4]), [])} for n in (BASELINE, BOUND))
        summaries.append(
            Summary(
                *key,
                preset=members[0].spec.preset,
                pcc=[r.pcc for r in members],
                units=[unit(r) for r in members],
                difference=[r.pcc - baseline[unit(r)] for r in members if unit(r) in baseline],
                selected=[int(r.epochs["selected"].iloc[r.best_epoch]) for r in members],
                seconds=[r.cost["seconds"] for r in members],
                regret=[bound[unit(r)] - r.pcc for r in members if unit(r) in bound],
                against_truth=_against_truth(members),
            )
        )
    return summaries


def _against_truth(members: Sequence[Result]) -> dict[str, float]:
    """See `Summary.against_truth`; empty where nothing is planted."""
    names = dict.fromkeys(name for r in members for name in r.scores if name.startswith(TRUTH))
    return {name: statistics.fmean(r.scores[name] for r in members if name in r.scores) for name in names}


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """What the table shows, with the value of every fold, for programs."""
    by_key = {(*_place(r), *unit(r)): r for r in results}
    lines = []
    for s in summarise(results):
        place = (s.dataset, s.evaluation, s.backbone, s.selector, s.tuning)
        members = [by_key[(*place, *unit)] for unit in s.units]
        lines.append(
            {
                **dict(zip(("dataset", "evaluation", "backbone", "selector"), place[:4], strict=True)),
                "tuning": _shared(_tuning_json(r) for r in members),
                "preset": s.preset,
                "pcc_mean": statistics.fmean(s.pcc),
                "pcc_sd": spread(s.pcc),
                "difference_to_baseline_mean": statistics.fmean(s.difference) if s.difference else None,
                "difference_to_baseline_sd": spread(s.difference),
                "baseline": BASELINE,
                "selected_mean": statistics.fmean(s.selected),
                "seconds_total": sum(s.seconds),
                **_planted_json(s),
                "cells": [
                    {
                        "key": r.spec.key,
                        "fold": r.spec.fold,
                        "seed": r.spec.seed,
                        "tuning": _tuning_json(r),
                        "scores": r.scores,
                        "selected": k,
                        "best_epoch": r.best_epoch,
                        "counts": r.counts,
                        "fold_record": r.fold,
                        "cost": r.cost,
                    }
                    for r, k in zip(members, s.selected, strict=True)
                ],
            }
        )
    content = {
        "format": 1,
        "score": "pcc_gene_mean_section_mean",
        "sd": "sample standard deviation over folds and seeds",
        "provenance": results[0].provenance if results else {},
        "protocol": results[0].spec.protocol.settings() if results else {},
        "lines": lines,
    }
    plain: dict[str, Any] = without_nan(content)
    return plain


def _shared(tunings: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the cells of a line share of their tuning: with a study for each fold, the budget and not the settings."""
    first, *others = tunings
    return first and {k: v for k, v in first.items() if all(other and other[k] == v for other in others)}


def _tuning_json(result: Result) -> dict[str, Any] | None:
    """How the settings of a cell were tuned, and what they are; None if they are fixed."""
    spec = result.spec
    if spec.tuning is None:
        return None
    parts = {spec.selector.name: spec.selector.settings, spec.backbone.name: spec.backbone.settings}
    values = parts | {"protocol": spec.protocol.settings()}
    chosen = {name: values[name.partition(".")[0]][name.partition(".")[2]] for name in spec.tuning.searched}
    return vars(spec.tuning) | {"label": spec.tuning.label, "settings": chosen}


def _planted_json(summary: Summary) -> dict[str, Any]:
    """What a line of planted data says besides."""
    found: dict[str, Any] = {f"{name}_mean": value for name, value in summary.against_truth.items()}
    if summary.regret:
        found |= {"regret_mean": statistics.fmean(summary.regret), "regret_sd": spread(summary.regret), "bound": BOUND}
    return found


def without_nan(value: Any) -> Any:
    """JSON has no NaN: None in its place, at any depth."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation, None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def unit(result: Result) -> tuple[str, int]:
    """Fold and seed: what results of different selectors are paired by."""
    return result.spec.fold, result.spec.seed


def _place(result: Result) -> tuple[str, str, str, str, str]:
    spec = result.spec
    tuning = spec.tuning.label if spec.tuning else ""
    return spec.dataset.label, spec.evaluation, spec.backbone.name, spec.selector.name, tuning
