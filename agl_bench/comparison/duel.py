"""Two selectors of one work folder, or the same selectors of two work folders, held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from agl_bench.comparison import statistics
from agl_bench.comparison.gather import PLACE
from agl_bench.errors import BadSpec, UnknownName

_SHARED = ["dataset", "evaluation", "backbone", "tuning", "selector"]  # what cells of two work folders are matched by


def two_selectors(cells: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """`statistics.pairs` of one selector against another, one row per place that has both.

    Args:
        cells: `Gathered.cells`.
        a, b: labels as in tables, e.g. NAME or NAME(k=20).

    Raises:
        UnknownName: for a label that no cell has.
        BadSpec: if they are the same, or if no fold and seed has both.
    """
    known = list(dict.fromkeys(cells["selector"]))
    for name in (a, b):
        if name not in known:
            raise UnknownName("selector in these cells", name, known)
    if a == b:
        raise BadSpec(f"{a} against itself is no comparison; name two selectors ({', '.join(sorted(known))})")
    found = statistics.pairs(cells[cells["selector"].isin((a, b))], baseline=b)
    if found.empty:
        raise BadSpec(f"{a} and {b} have no fold and seed of one dataset and evaluation in common")
    return found


def two_folders(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """`statistics.pairs` of each selector's cells of one folder against its cells of the other.

    The protocol may differ, since that may be the question: a preset is matched by its label, and where each folder has
    a single one of a line, that with this.

    Args:
        first, second: `Gathered.cells` of each.
        names: of the folders, for messages.

    Returns:
        The columns of `statistics.pairs`, with a and b "A" and "B" and before them the selector; preset is "A's → B's"
        where they differ.

    Raises:
        BadSpec: if they have no cell in common.
    """
    both = pd.concat([first.assign(side="A"), second.assign(side="B")], ignore_index=True)
    both = both[~both["shuffled"].astype(bool)]
    both = both.assign(preset=_matched_presets(both))
    found = []
    for selector, cells in both.groupby("selector", sort=True):
        pairs = statistics.pairs(cells.assign(selector=cells["side"]), baseline="B")
        pairs.insert(len(PLACE), "selector", selector)
        if len(pairs):
            found.append(pairs)
    if not found:
        raise BadSpec(
            f"{names[0]} and {names[1]} have no dataset, evaluation, backbone, selector, fold and seed in common"
        )
    return pd.concat(found, ignore_index=True).sort_values([*PLACE, "selector"], ignore_index=True)


def _matched_presets(both: pd.DataFrame) -> list[str]:
    """A label of the preset that cells of both folders share."""
    joint: dict[tuple[Any, ...], str] = {}
    for line, cells in both.groupby(_SHARED, sort=False):
        sides = {side: sorted(set(own["preset"])) for side, own in cells.groupby("side")}
        if len(sides) == 2 and all(len(own) == 1 for own in sides.values()) and sides["A"] != sides["B"]:
            joint[line] = f"{sides['A'][0]} → {sides['B'][0]}"
    rows = both[[*_SHARED, "preset"]].itertuples(index=False, name=None)
    return [joint.get(tuple(line), preset) for *line, preset in rows]


def as_json(pairs: pd.DataFrame) -> list[Mapping[str, Any]]:
    """For programs; None for what there is not."""
    rows: list[Mapping[str, Any]] = pairs.astype(object).where(pairs.notna(), None).to_dict("records")
    return rows
