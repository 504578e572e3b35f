"""The user's folds: a CSV with one line for each spot of each fold, and columns section, spot, fold, set."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from agl_bench.data.spreadsheet import unquoted
from agl_bench.errors import BadSpec

COLUMNS = ("section", "spot", "fold", "set")
SETS = ("train", "validation", "held_out", "test")


@dataclass(frozen=True)
class Listing:
    """The lines of one fold.

    Attributes:
        section, spot: (lines,) names.
        group: (lines,) index into `SETS`.
    """

    section: np.ndarray
    spot: np.ndarray
    group: np.ndarray

    def sections(self, name: str) -> set[str]:
        """Sections that have spots in a set."""
        return set(self.section[self.group == SETS.index(name)].tolist())

    def of(self, section: str) -> tuple[np.ndarray, np.ndarray]:
        """Spots of a section and their groups, (spots,) each."""
        here = self.section == section
        return self.spot[here], self.group[here]


def read_fold_file(path: Path) -> dict[str, Listing]:
    """The folds of a file, by label, in the order of their first lines.

    Raises:
        BadSpec: if it cannot be read, a column is missing, a field is empty, a set is unknown, a spot stands twice in a
            fold, or a fold has no training, validation or test spots.
    """
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise BadSpec(f"protocol.fold_file = '{path}' cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=1)  # asked for once for each fold
def _read(path: Path, changed: int) -> dict[str, Listing]:
    where = f"protocol.fold_file = '{path}'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # lines with more fields than the header
            lines = pd.read_csv(
                path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, skip_blank_lines=False
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BadSpec(f"{where} is not a CSV in UTF-8: {error}") from None
    for name in COLUMNS:
        if name not in lines.columns:
            raise BadSpec(f"{where} has no column '{name}'; its columns have to be {', '.join(COLUMNS)}")
    lines = lines[list(COLUMNS)].apply(lambda column: unquoted(column.str.strip()))
    lines = lines[(lines != "").any(axis=1)]
    if not len(lines):
        raise BadSpec(f"{where} lists no spot")
    for bad, problem in (
        *((lines[name] == "", f"the field '{name}' is empty") for name in COLUMNS),
        (~lines["set"].isin(SETS), f"set '{{set}}' is unknown; it has to be one of {', '.join(SETS)}"),
        (
            lines.duplicated(["fold", "section", "spot"]),
            "spot '{spot}' of section '{section}' stands in fold {fold} a second time",
        ),
    ):
        if bad.any():
            first = bad.idxmax()  # the header is line 1
            raise BadSpec(f"{where}, line {first + 2}: {problem.format(**lines.loc[first])}")
    group = pd.Categorical(lines["set"], categories=SETS).codes.astype(np.int64)
    folds = {}
    for label, rows in lines.groupby("fold", sort=False).indices.items():
        here = lines.iloc[rows]
        folds[str(label)] = Listing(here["section"].to_numpy(object), here["spot"].to_numpy(object), group[rows])
        for name in ("test", "train", "validation"):
            if not folds[str(label)].sections(name):
                raise BadSpec(f"{where}: fold {label} has no {name} spots; every fold needs train, validation and test")
    return folds
