"""How each line of the table stands, for whoever shows results: rank, difference to the baseline, verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from agl_bench.bench.recorder import Standing
from agl_bench.bench.spec import RunSpec
from agl_bench.bench.table import BASELINE, FEW_SEEDS
from agl_bench.comparison.figures import colour
from agl_bench.comparison.gather import LINE, PLACE, Gathered
from agl_bench.comparison.quality import known_controls
from agl_bench.comparison.statistics import TOO_FEW, pairs
from agl_bench.registry.plugins import Plugins

_WORDS = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equivalent": "equivalent to {}",
    "undecided": "undecided against {}",
    TOO_FEW: "too few units to tell from {}",
}


def standings(gathered: Gathered, plugins: Plugins) -> dict[str, Standing]:
    """The standing of every line, by `RunSpec.group`.

    Ranks are among the methods of a place; images of wrong spots, and backbones and selectors that are controls, have
    none. An interval stands where there are three seeds.
    """
    cells = gathered.cells
    if cells.empty:
        return {}
    is_control = _is_control(cells, plugins)
    methods = cells[~is_control]
    differences = {tuple(row[name] for name in LINE): row for row in _to_baseline(methods).to_dict("records")}
    ranks = _ranks(methods)
    found: dict[str, Standing] = {}
    groups = _groups(gathered)
    for line, members in cells.assign(is_control=is_control).groupby(LINE, sort=False):
        row = differences.get(line, {})
        certain = row.get("seeds", 0) >= FEW_SEEDS
        standing = Standing(
            evaluation=members["evaluation"].iloc[0],
            name=_name(members.iloc[0]),
            colour=colour(members["name"].iloc[0]),
            place=_place(members.iloc[0]),
            is_control=bool(members["is_control"].iloc[0]),
            rank=ranks.get(line, (None, 0))[0],
            of=ranks.get(line, (None, 0))[1],
            pcc=float(members["pcc"].mean()),
            baseline=BASELINE,
            difference=row.get("difference", np.nan),
            low=row["low"] if certain else np.nan,
            high=row["high"] if certain else np.nan,
            verdict=_WORDS[row["verdict"]].format(BASELINE) if row else "",
        )
        found |= dict.fromkeys((groups[key] for key in members["key"]), standing)
    return found


def _is_control(cells: pd.DataFrame, plugins: Plugins) -> pd.Series:
    """Of each cell; a plug-in that is not installed any more is no known control."""
    selectors, backbones = known_controls(cells, plugins)
    return cells["shuffled"] | cells["backbone"].isin(backbones) | cells["name"].isin(selectors)


def _to_baseline(methods: pd.DataFrame) -> pd.DataFrame:
    found = pairs(methods, baseline=BASELINE)
    return found.rename(columns={"a": "selector"})


def _ranks(methods: pd.DataFrame) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Line -> its rank by mean PCC and the number of lines; only where all lines have the same folds and seeds."""
    ranks: dict[tuple[Any, ...], tuple[int, int]] = {}
    for _, here in methods.groupby(PLACE, sort=False):
        lines = here.groupby(LINE, sort=False)
        units = {frozenset(zip(m["fold"], m["seed"], strict=True)) for _, m in lines}
        if len(units) > 1:
            continue  # means over different folds have no order
        means = lines["pcc"].mean().rank(ascending=False, method="min").astype(int)
        ranks |= {line: (rank, len(means)) for line, rank in means.items()}
    return ranks


def _name(cell: pd.Series) -> str:
    return " · ".join(filter(None, (cell["selector"], cell["dataset"], cell["backbone"], cell["tuning"])))


def _place(cell: pd.Series) -> str:
    return " · ".join(filter(None, (cell["dataset"], cell["backbone"], cell["preset"], cell["tuning"])))


def _groups(gathered: Gathered) -> dict[str, str]:
    """Key of each finished cell -> its `RunSpec.group`; what cells of a group share is digested once."""
    known: dict[str, str] = {}
    groups = {}
    for key in gathered.cells["key"]:
        spec: Mapping[str, Any] = gathered.specs[key]
        shared = json.dumps({k: v for k, v in spec.items() if k not in ("fold", "seed", "preset")}, sort_keys=True)
        if shared not in known:
            known[shared] = RunSpec.from_json(spec).group
        groups[key] = known[shared]
    return groups
