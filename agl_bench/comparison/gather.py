"""The cells of a work folder as one table, light enough for ten thousand of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from agl_bench.bench import fitness
from agl_bench.bench.cells import CellStore
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.digests import text_digest

PLACE = ["dataset", "evaluation", "backbone", "preset", "tuning"]  # what is compared with each other shares all of it
LINE = [*PLACE, "selector"]  # what a line of a table is about
UNIT = ["fold", "seed"]  # what selectors are paired by


@dataclass(frozen=True)
class Gathered:
    """What a work folder holds.

    Attributes:
        cells: one row per finished cell. key; dataset (label), evaluation, backbone, preset (with what differs from
            it), tuning ("" = fixed settings) and selector (with those settings in brackets that tell two lines of one
            selector apart); name (of the selector, plain); fold, seed; shuffled (a control: patches of wrong spots);
            pcc (mean over primary genes, then over test sections); every other test score; selected (auxiliary genes
            with more than half the weight of a primary one), auxiliary_genes, primary_genes, train_spots, test_spots;
            best_epoch, epochs; seconds, peak_memory_mb; data, device, version, commit, machine; cautions (on what the
            primary genes of the fold rest on).
        failed: one row per cell that failed: key, the same place and unit, status ("failed" or "diverged") and
            sentence.
        skipped: one row per cell that could not run: the same with reason in place of status and sentence.
        specs: key -> the spec as JSON.
        store: where the tables of single cells are read from.
    """

    cells: pd.DataFrame = field(repr=False)
    failed: pd.DataFrame = field(repr=False)
    skipped: pd.DataFrame = field(repr=False)
    specs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    store: CellStore = field(repr=False)

    def result(self, key: str) -> Result:
        """A finished cell with its tables.

        Raises:
            KeyError: if it has gone since, or is damaged.
        """
        found = self.store.read(key)
        if found is None:
            raise KeyError(key)
        return found


def gather(store: CellStore) -> Gathered:
    """Every cell of a work folder, in the order dataset, evaluation, backbone, preset, tuning, selector, fold, seed.

    Cells that were made under other conditions never share a line: the preset's label says what differs.
    """
    glances = list(store.glances())
    specs = {g["key"]: g["spec"] for g in glances}
    failed = []
    for key, spec, failure in store.failures():
        specs[key] = spec
        failed.append({"key": key, "status": failure.status, "sentence": failure.sentence})
    skips = fitness.noted(store.work, specs.values(), store.warn)
    specs |= {s.spec.key: s.spec.as_json() for s in skips}
    names = _labels(specs)
    rows = [{**_place(specs[g["key"]], names[g["key"]]), **_row(g)} for g in glances]
    lost = [_place(specs[f["key"]], names[f["key"]]) | f for f in failed]
    left = [_place(specs[k := s.spec.key], names[k]) | {"key": k, "reason": s.reason} for s in skips]
    order = [*LINE, *UNIT]
    cells = pd.DataFrame(rows, columns=None if rows else ["key", *order, "name", "shuffled", "pcc", "selected"])
    gone = pd.DataFrame(lost, columns=None if lost else ["key", *order, "name", "shuffled", "status", "sentence"])
    skipped = pd.DataFrame(left, columns=None if left else ["key", *order, "name", "shuffled", "reason"])
    cells, gone, skipped = (frame.sort_values(order, ignore_index=True) for frame in (cells, gone, skipped))
    return Gathered(cells, gone, skipped, specs, store)


def _place(spec: Mapping[str, Any], labels: tuple[str, str]) -> dict[str, Any]:
    selector, preset = labels
    tuning = RunSpec.from_json(spec).tuning if "tuning" in spec else None
    return {
        "dataset": spec["dataset"]["label"],
        "evaluation": spec["evaluation"],
        "backbone": spec["backbone"]["name"],
        "preset": preset,
        "tuning": tuning.label if tuning else "",
        "selector": selector,
        "name": spec["selector"]["name"],
        "fold": spec["fold"],
        "seed": spec["seed"],
        "shuffled": spec["protocol"].get("patches") == "shuffled",
    }


def _row(glance: Mapping[str, Any]) -> dict[str, Any]:
    spec, counts, provenance = glance["spec"], glance["counts"], glance["provenance"]
    return {
        "key": glance["key"],
        "pcc": glance["scores"]["pcc_gene_mean_section_mean"],
        **glance["scores"],
        "selected": glance["selected"],
        **{name: counts[name] for name in ("auxiliary_genes", "primary_genes", "train_spots", "test_spots")},
        "best_epoch": glance["best_epoch"],
        "epochs": glance["epochs"],
        **{name: glance["cost"][name] for name in ("seconds", "peak_memory_mb")},
        "data": spec["data"],
        "device": spec["device"],
        "version": spec["version"],
        "commit": provenance.get("commit", ""),
        "machine": provenance.get("machine", ""),
        "cautions": "; ".join(glance.get("fold", {}).get("cautions", ())),
    }


def _labels(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Labels of selector and preset for each cell: what tells two of one name apart stands in brackets.

    A selector is told apart by its settings, except those that were tuned, which may differ from fold to fold; where
    the same preset's name stands for different conditions, a number tells those apart.
    """
    settings: dict[str, dict[str, set[str]]] = {}
    for spec in specs.values():
        if "tuning" not in spec:
            seen = settings.setdefault(spec["selector"]["name"], {})
            for key, value in spec["selector"]["settings"].items():
                seen.setdefault(key, set()).add(json.dumps(value))
    selectors = tuple({f"{spec['selector']['name']}.": None for spec in specs.values()})
    conditions: dict[tuple[str, ...], dict[str, str]] = {}
    labels = {}
    for key, spec in specs.items():
        name, own = spec["selector"]["name"], spec["selector"]["settings"]
        differing = [] if "tuning" in spec else [k for k in own if len(settings[name][k]) > 1]
        selector = f"{name}({', '.join(f'{k}={_plain(own[k])}' for k in differing)})" if differing else name
        preset = _preset(spec["preset"], selectors)
        known = conditions.setdefault((preset, spec["dataset"]["label"], spec["backbone"]["name"]), {})
        made = known.setdefault(_conditions(spec), "" if not known else f" #{len(known) + 1}")
        labels[key] = (selector, preset + made)
    return labels


def _preset(label: str, selectors: tuple[str, ...]) -> str:
    """The label of a preset without what it says of settings of selectors, whose own labels say them."""
    name, _, changed = label.partition(" with ")
    kept = [item for item in re.split(r", (?=[\w.]+=)", changed) if item and not item.startswith(selectors)]
    return name + (f" with {', '.join(kept)}" if kept else "")


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _conditions(spec: Mapping[str, Any]) -> str:
    """Digest of what must be equal for results to be comparable."""
    searched = set(spec.get("tuning", {}).get("searched", ()))
    parts: dict[str, Any] = {name: spec[name] for name in ("data", "device", "version", "libraries")}
    parts["protocol"] = {
        k: v for k, v in spec["protocol"].items() if k != "patches" and f"protocol.{k}" not in searched
    }
    for kind in ("dataset", "backbone"):
        part = spec[kind]
        own = {k: v for k, v in part["settings"].items() if f"{part['name']}.{k}" not in searched}
        parts[kind] = (part["name"], part["source"], own)
    return text_digest(json.dumps(parts, sort_keys=True))
