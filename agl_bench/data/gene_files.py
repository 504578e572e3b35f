"""Files of genes that a setting may name: a list of names, or a score or an order for a ranking."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agl_bench.errors import BadSpec

HEADERS = ("gene", "genes", "gene_name", "symbol")  # of the column of names; a file without one starts with a gene


def read_gene_names(path: Path, *, setting: str) -> list[str]:
    """The genes of a file: one a line, or one column of a CSV.

    The column is the one whose header is among `HEADERS`, else the first. Empty lines and lines that start with "#"
    are skipped.

    Args:
        path: UTF-8 text.
        setting: which setting names the file, for messages.

    Raises:
        BadSpec: if the file cannot be read, names no gene or names one twice.
    """
    header, lines = _lines(path, setting)
    column = next((i for i, name in enumerate(header) if name.lower() in HEADERS), 0)
    names = [(number, fields[column] if column < len(fields) else "") for number, fields in lines]
    return _unique(names, path, setting)


def read_gene_scores(path: Path, names: Sequence[str], *, setting: str) -> np.ndarray:
    """Scores of the genes, (names,) float64, higher is ranked first; NaN for those that the file does not list.

    Lines "gene,score", or names alone, the best one first. A header is recognised by `HEADERS`; the scores are then its
    column "score", if there is one, else the second. Genes that the file lists beside `names` do not matter: it may
    have been made for a larger panel.

    Args:
        path: CSV, or TSV if it is called so.
        names: the panel.
        setting: which setting names the file, for messages.

    Raises:
        BadSpec: as `read_gene_names`, if a line has no score or one that is not a finite number, or if the file lists
            no gene of the panel.
    """
    listed = _scores(path, setting)
    score = np.array([listed.get(name, math.nan) for name in names])
    if np.isnan(score).all():
        raise BadSpec(
            f"{setting} = '{path}' lists {len(listed)} genes, first {next(iter(listed))}, "
            f"and none of the panel, such as {names[0]}; use the panel's names"
        )
    return score


def _scores(path: Path, setting: str) -> dict[str, float]:
    header, lines = _lines(path, setting)
    lowered = [name.lower() for name in header]
    column = next((i for i, name in enumerate(lowered) if name in HEADERS), 0)
    names = _unique([(n, fields[column] if column < len(fields) else "") for n, fields in lines], path, setting)
    if all(len(fields) == 1 for _, fields in lines):
        return {name: float(len(names) - place) for place, name in enumerate(names)}
    scored = lowered.index("score") if "score" in lowered else 1 - min(column, 1)
    scores = {}
    for name, (number, fields) in zip(names, lines, strict=True):
        text = fields[scored] if scored < len(fields) else ""
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise BadSpec(
                f"{setting} = '{path}', line {number}: the score of {name} is '{text}' and must be a finite "
                "number; write lines 'gene,score', or names alone in their order"
            )
        scores[name] = score
    return scores


def read_lines(path: Path, setting: str) -> list[tuple[int, list[str]]]:
    """Numbered lines of a CSV, or of a TSV by its suffix, as stripped fields, without empty lines and comments.

    Raises:
        BadSpec: if the file cannot be read or is not CSV in UTF-8.
    """
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except OSError as error:
        raise BadSpec(f"{setting} = '{path}' cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadSpec(f"{setting} = '{path}' is not a CSV or text file in UTF-8: {error}") from None
    return [(number, fields) for number, fields in lines if any(fields) and not fields[0].startswith("#")]


def _lines(path: Path, setting: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header ([] where there is none) and the other lines."""
    lines = read_lines(path, setting)
    if lines and any(field.lower() in HEADERS for field in lines[0][1]):
        return lines[0][1], lines[1:]
    return [], lines


def _unique(names: list[tuple[int, str]], path: Path, setting: str) -> list[str]:
    if not names:
        raise BadSpec(f"{setting} = '{path}' names no gene; write one name a line")
    seen: set[str] = set()
    for number, name in names:
        if not name:
            raise BadSpec(f"{setting} = '{path}', line {number}: no gene is named there")
        if name in seen:
            raise BadSpec(f"{setting} = '{path}', line {number}: gene {name} is named a second time")
        seen.add(name)
    return [name for _, name in names]
