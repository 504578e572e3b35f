"""Tables of a report, for people (HTML, Markdown, LaTeX) and for programs (CSV, full precision)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from agl_bench.bench.table import BASELINE, BOUND, TRUTH
from agl_bench.comparison.gather import PLACE
from agl_bench.comparison.statistics import TOO_FEW
from agl_bench.data.spreadsheet import as_csv

SIGNIFICANT = ((0.001, "***"), (0.01, "**"), (0.05, "*"))  # p at most, mark
MARKS = "* p ≤ .05, ** p ≤ .01, *** p ≤ .001 after Holm"
NONE = "–"
_PRESET = 40  # characters of a preset in headings
GENES_SHOWN = 10  # most harmed and most helped of a selector; all are in the CSV file


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Attributes:
        text: what is shown.
        value: what the column is sorted by; None = last.
        best: shown in bold.
        mark: of significance, shown raised.
    """

    text: str
    value: float | str | None = None
    best: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading.
        hint: what it is, in a few words.
        numeric: aligned to the right.
    """

    name: str
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: of its files, without ending.
        title: heading.
        caption: what is to be known to read it.
        columns: left to right; the first names the line.
        rows: one entry per column.
        below: rows that are no methods (bounds and controls), shown below a line and sorted apart.
        frame: what the CSV file holds.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Entry]]
    frame: pd.DataFrame = field(repr=False)
    below: Sequence[Sequence[Entry]] = ()


# --- what is shown ---------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".3f", *, best: bool = False, mark: str = "") -> Entry:
    """An entry for a number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Entry(NONE)
    return Entry(plain(value, form), float(value), best, mark)


def plain(value: float, form: str = ".3f") -> str:
    """A number with a real minus sign; no minus before a zero."""
    text = f"{value:{form}}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", "−")


def probability(p: float) -> Entry:
    """An entry for a p value."""
    return Entry(p_text(p), p) if math.isfinite(p) else Entry(NONE)


def p_text(p: float) -> str:
    """`.042`, and `< .001` for a smaller one."""
    return "< .001" if p < 0.001 else "1" if round(p, 3) >= 1 else f"{p:.3f}".lstrip("0")


def _mark(row: Mapping[str, Any]) -> str:
    """Stars of a comparison, none where there are too few units to conclude anything."""
    if row["verdict"] == TOO_FEW:
        return ""
    return next((mark for limit, mark in SIGNIFICANT if row["p_holm"] <= limit), "")


def interval(low: float, high: float, form: str = "+.3f") -> Entry:
    """An entry for an interval, sorted by its lower end."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return Entry(NONE)
    return Entry(f"{plain(low, form)} to {plain(high, form)}", low)


def spread_text(mean: float, sd: float, form: str = ".3f") -> str:
    """`0.148 ± 0.030`, without a spread where there is none."""
    return plain(mean, form) + (f" ± {sd:.3f}" if math.isfinite(sd) else "")


def place_title(place: Mapping[str, str], *, dataset: bool = True) -> str:
    """A place for people: dataset, evaluation, backbone, preset and tuning."""
    words = [place["dataset"]] if dataset else []
    words += [f"{place['evaluation']}-batch", f"backbone {place['backbone']}", f"preset {place['preset']}"]
    return " · ".join([*words, place["tuning"] or "fixed settings"])


def short_presets(labels: Iterable[str]) -> dict[str, str]:
    """Label of a preset -> one that fits a heading; the same for two never. The report's header has the whole."""
    found: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        name, _, changed = label.partition(" with ")
        short = label if len(label) <= _PRESET else f"{name} with {_changes(changed)} settings changed"
        same = sum(s == short or s.startswith(f"{short} #") for s in found.values())
        found[label] = f"{short} #{same + 1}" if same else short
    return found


def _changes(changed: str) -> int:
    """Number of KEY=VALUE in a list of them, whose values may hold commas."""
    return sum("=" in item for item in changed.split(", "))


def file_names(places: pd.DataFrame) -> list[str]:
    """A name for the files of each place: dataset, evaluation, and what else tells places apart."""
    telling = [c for c in places.columns if c in ("dataset", "evaluation") or places[c].nunique() > 1]
    names: list[str] = []
    for place in places[telling].itertuples(index=False):
        name = "-".join(_slug(word or "fixed") for word in place)
        same = sum(n == name or n.startswith(f"{name}--") for n in names)
        names.append(f"{name}--{same + 1}" if same else name)
    return names


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in text)
    return "-".join(filter(None, kept.split("-")))[:60] or "none"


# --- results ---------------------------------------------------------------------------------------------------------


def standings(cells: pd.DataFrame, against: pd.DataFrame, *, baseline: str = BASELINE) -> pd.DataFrame:
    """One row per line: means over its cells, and how it stands against the baseline.

    Args:
        cells: of methods and bounds, as `gather.Gathered.cells`.
        against: `statistics.pairs` with the baseline.
        baseline: label of the selector that the others are compared with.

    Returns:
        PLACE, selector, name, cells, folds, seeds, pcc_mean, pcc_sd (sample standard deviation over folds and seeds),
        same_units (whether all lines of the place have the same folds and seeds), difference, low, high, p_holm,
        verdict (of `against`), selected_mean, seconds_mean, seconds_ratio (to the baseline), peak_memory_mb (largest),
        on planted data regret_mean (of the bound to this line, over shared folds and seeds) and the mean of each score
        against the truth. In the order of places, baseline first, then by name.
    """
    rows = []
    truth = [c for c in cells.columns if c.startswith(TRUTH)]
    versus = {(*_key(r), r["a"]): r for r in against.to_dict("records")}
    for place, here in cells.groupby(PLACE, sort=False, dropna=False):
        units = {s: frozenset(zip(g["fold"], g["seed"], strict=True)) for s, g in here.groupby("selector")}
        base, bound = here[here["selector"] == baseline], here[here["name"] == BOUND]
        bounds = {(f, s): p for f, s, p in zip(bound["fold"], bound["seed"], bound["pcc"], strict=True)}
        for selector, line in here.groupby("selector"):
            stand = versus.get((*place, selector), {})
            regret = [
                bounds[f, s] - p
                for f, s, p in zip(line["fold"], line["seed"], line["pcc"], strict=True)
                if (f, s) in bounds
            ]
            own = base["seconds"].mean() if len(base) else math.nan
            rows.append(
                {
                    **dict(zip(PLACE, place, strict=True)),
                    "selector": selector,
                    "name": line["name"].iloc[0],
                    "cells": len(line),
                    "folds": line["fold"].nunique(),
                    "seeds": line["seed"].nunique(),
                    "pcc_mean": line["pcc"].mean(),
                    "pcc_sd": line["pcc"].std(),
                    "same_units": len(set(units.values())) == 1,
                    **{n: stand.get(n, math.nan) for n in ("difference", "low", "high", "p_holm")},
                    "verdict": stand.get("verdict", ""),
                    "selected_mean": line["selected"].mean(),
                    "seconds_mean": line["seconds"].mean(),
                    "seconds_ratio": line["seconds"].mean() / own if own else math.nan,
                    "peak_memory_mb": line["peak_memory_mb"].max(),
                    "regret_mean": sum(regret) / len(regret) if regret else math.nan,
                    **{name: line[name].mean() for name in truth},
                }
            )
    frame = pd.DataFrame(rows)
    frame = frame.assign(_first=frame["selector"].ne(baseline))
    frame = frame.sort_values([*PLACE, "_first", "selector"], ignore_index=True).drop(columns="_first")
    empty = [c for c in ("regret_mean", *truth) if frame[c].isna().all()]
    return frame.drop(columns=empty)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[c] for c in PLACE)


def best_of(lines: pd.DataFrame, bounds: frozenset[str]) -> str | None:
    """The selector with the highest mean; None where means are over different folds or seeds, or there is one line."""
    methods = lines[~lines["name"].isin(bounds)]
    if len(methods) < 2 or not bool(lines["same_units"].all()):
        return None
    found: str = methods.loc[methods["pcc_mean"].idxmax(), "selector"]
    return found


def main_table(
    name: str,
    lines: pd.DataFrame,
    bounds: frozenset[str],
    controls: Mapping[str, Sequence[float]],
    *,
    baseline: str = BASELINE,
) -> Table:
    """The results of one place.

    Args:
        name: of its files.
        lines: of the place, from `standings`.
        bounds: selectors that are no methods.
        controls: PCC of each cell of what bounds the place from below.
        baseline: label of the selector that the others are compared with.
    """
    best = best_of(lines, bounds)
    known = (f"{TRUTH}precision", f"{TRUTH}recall", f"{TRUTH}k_minus_planted")
    planted = [c for c in known if c in lines and lines[c].notna().any()]  # other data may be planted, and these not
    has_regret = "regret_mean" in lines and lines["regret_mean"].notna().any()
    columns = [
        Column("selector", numeric=False),
        Column("PCC mean ± sd", "test PCC: mean over primary genes, then sections; sd over folds and seeds"),
        Column(f"Δ {baseline}", "mean paired difference of test PCC over units (tested sections or folds)"),
        Column("95 % interval", "hierarchical bootstrap over units, then seeds"),
        Column("p", f"sign-flip test, Holm over the comparisons with {baseline}"),
        Column("verdict", f"against {baseline}", numeric=False),
        Column("k", "auxiliary genes with more than half the weight of a primary gene, mean"),
        Column("s / cell", "seconds to train and test one cell, mean"),
        Column(f"× {baseline}", f"time, as a multiple of {baseline}'s"),
        Column("cells", "folds × seeds that are finished"),
    ]
    if has_regret:
        columns.append(Column("regret", f"PCC of {BOUND}, which knows what is planted, minus this one's"))
    columns += [
        Column(c.removeprefix(TRUTH).replace("k_minus_planted", "k − k*"), "against the truth") for c in planted
    ]
    rows: list[list[Entry]] = []
    below: list[list[Entry]] = []
    for row in lines.to_dict("records"):
        is_bound = row["name"] in bounds
        entries = [
            Entry(row["selector"] + (" (control)" if is_bound else ""), row["selector"]),
            Entry(spread_text(row["pcc_mean"], row["pcc_sd"]), row["pcc_mean"], row["selector"] == best),
            number(row.get("difference"), "+.3f", mark=_mark(row)),
            interval(row.get("low", math.nan), row.get("high", math.nan)),
            probability(row.get("p_holm", math.nan)),
            Entry(row["verdict"] or NONE, row["verdict"]),
            number(row["selected_mean"], ",.0f"),
            number(row["seconds_mean"], ",.1f"),
            number(row.get("seconds_ratio"), ".1f"),
            Entry(f"{row['cells']:,}", row["cells"]),
        ]
        if has_regret:
            entries.append(number(row["regret_mean"], "+.3f"))
        entries += [number(row[c], "+,.0f" if c.endswith("planted") else ".2f") for c in planted]
        (below if is_bound else rows).append(entries)
    for control, values in controls.items():
        pcc = pd.Series(list(values), dtype=float)
        cells = Entry(f"{len(pcc):,}", len(pcc))
        shown = Entry(spread_text(pcc.mean(), pcc.std()), pcc.mean())
        rest = [Entry(NONE)] * (len(columns) - 10)
        below.append([Entry(f"{control} (control)", control), shown, *[Entry(NONE)] * 7, cells, *rest])
    bold = "" if best else " Lines are over different folds or seeds: none is in bold." if len(lines) > 1 else ""
    caption = f"Best mean in bold; {MARKS}, against {baseline}.{bold}"
    return Table(f"results-{name}", place_title(lines.iloc[0]), caption, columns, rows, lines, below)


def overview(name: str, lines: pd.DataFrame, bounds: frozenset[str], *, baseline: str = BASELINE) -> Table:
    """Selectors × datasets, as in a paper.

    Args:
        name: of its files.
        lines: of all places that differ in their dataset alone, from `standings`.
        bounds: selectors that are no methods.
        baseline: label of the selector that marks are about.
    """
    datasets = list(dict.fromkeys(lines["dataset"]))
    best = {d: best_of(lines[lines["dataset"] == d], bounds) for d in datasets}
    columns = [Column("selector", numeric=False), *(Column(d, "test PCC, mean ± sd") for d in datasets)]
    rows: list[list[Entry]] = []
    below: list[list[Entry]] = []
    by_line = {(r["selector"], r["dataset"]): r for r in lines.to_dict("records")}
    for selector in dict.fromkeys(lines["selector"]):
        entries, is_bound = [], False
        for dataset in datasets:
            row = by_line.get((selector, dataset))
            if row is None:
                entries.append(Entry(NONE))
                continue
            is_bound = row["name"] in bounds
            shown = spread_text(row["pcc_mean"], row["pcc_sd"])
            entries.append(Entry(shown, row["pcc_mean"], best[dataset] == selector, _mark(row)))
        first = Entry(selector + (" (control)" if is_bound else ""), selector)
        (below if is_bound else rows).append([first, *entries])
    title = f"All datasets · {place_title(lines.iloc[0], dataset=False)}"
    caption = f"Test PCC, mean ± sd over folds and seeds. Best in bold; {MARKS}, against {baseline} either way."
    return Table(f"overview-{name}", title, caption, columns, rows, lines, below)


def by_fold(name: str, cells: pd.DataFrame) -> Table:
    """Every fold of one place: PCC of each selector, mean over seeds."""
    wide = cells.pivot_table(index="fold", columns="selector", values="pcc", aggfunc="mean", sort=True)
    columns = [Column("fold", numeric=False), *(Column(s) for s in wide.columns)]
    rows = []
    for fold, values in zip(wide.index, wide.to_numpy(), strict=True):
        top = max((v for v in values if math.isfinite(v)), default=math.nan)
        rows.append([Entry(fold, fold), *(number(v, best=v == top) for v in values)])
    caption = "Test PCC of each fold, mean over seeds; the highest of each fold in bold."
    title = f"Every fold · {place_title(cells.iloc[0])}"
    return Table(f"folds-{name}", title, caption, columns, rows, wide.reset_index())


# --- statistics ------------------------------------------------------------------------------------------------------


def pairwise(name: str, pairs: pd.DataFrame) -> Table:
    """Every pair of selectors of one place, each once: as a − b, in the direction where the difference is not below 0.

    Args:
        name: of its files.
        pairs: of the place, from `statistics.pairs`; the files have both directions.
    """
    columns = [
        Column("a − b", numeric=False),
        Column("difference", "PCC(a) − PCC(b) on shared folds and seeds, mean over units"),
        Column("95 % interval", "hierarchical bootstrap"),
        Column("p", "sign-flip test, exact up to 13 units, not corrected"),
        Column("p Holm", "corrected for all pairs of this table"),
        Column("p NB", "corrected resampled t test of Nadeau and Bengio, for folds that share training spots"),
        Column("effect", "mean difference over its standard deviation over units"),
        Column("P(a > b)", "probability that a is better by more than the region of equivalence"),
        Column("P(a ≈ b)", "probability that they are within the region of equivalence"),
        Column("units", "tested sections (intra-batch) or folds (inter-batch)"),
        Column("verdict", numeric=False),
    ]
    shown, seen = [], set()
    for row in pairs.to_dict("records"):
        pair = frozenset((row["a"], row["b"]))
        if pair in seen or row["difference"] < 0:
            continue
        seen.add(pair)
        shown.append(
            [
                Entry(f"{row['a']} − {row['b']}", row["a"]),
                number(row["difference"], "+.3f", mark=_mark(row)),
                interval(row["low"], row["high"]),
                probability(row["p"]),
                probability(row["p_holm"]),
                probability(row["p_corrected"]),
                number(row["effect"], ".2f"),
                number(row["superiority"], ".2f"),
                number(row["equivalence"], ".2f"),
                Entry(f"{row['units']:,}", row["units"]),
                Entry(row["verdict"], row["verdict"]),
            ]
        )
    caption = f"{MARKS} over the {len(shown)} pairs of this table."
    return Table(f"pairs-{name}", place_title(pairs.iloc[0]), caption, columns, shown, pairs)


def rank_table(
    name: str, ranks: pd.DataFrame, gained: pd.DataFrame, place: Mapping[str, str], test: Mapping[str, float]
) -> Table:
    """Mean ranks over datasets, and the gain over the baseline.

    Args:
        name: of its files.
        ranks: `statistics.ranks` of one evaluation, backbone, preset and tuning.
        gained: `statistics.improvement` of the same.
        place: what they share.
        test: of `ranks.attrs["tests"]`.
    """
    columns = [
        Column("selector", numeric=False),
        Column("mean rank", "over datasets, 1 = best"),
        Column("95 % interval", "bootstrap over datasets, units and seeds"),
        Column("datasets"),
        Column("improvement, %", "PCC relative to the baseline's, mean over datasets"),
        Column("95 % interval", "bootstrap over datasets, units and seeds"),
    ]
    top = ranks["mean_rank"].min()
    percent = gained[["improvement", "low", "high"]].mul(100).set_index(gained["selector"])
    rows = []
    for r in ranks.sort_values(["mean_rank", "selector"]).to_dict("records"):
        gain = percent.loc[r["selector"]] if r["selector"] in percent.index else dict.fromkeys(percent, math.nan)
        rows.append(
            [
                Entry(r["selector"], r["selector"]),
                number(r["mean_rank"], ".2f", best=r["mean_rank"] == top),
                interval(r["low"], r["high"], ".2f"),
                Entry(f"{r['datasets']:,}", r["datasets"]),
                number(gain["improvement"], "+.1f"),
                interval(gain["low"], gain["high"], "+.1f"),
            ]
        )
    if math.isfinite(test["p"]):
        p = p_text(test["p"])
        caption = (
            f"Friedman test over {test['blocks']:.0f} datasets: p {p if p.startswith('<') else f'= {p}'}; ranks that "
            f"differ by less than {test['critical_difference']:.2f} (Nemenyi, .05) are not told apart."
        )
    else:
        caption = "Too few datasets or selectors for a Friedman test."
    title = f"Ranks · {place_title(place, dataset=False)}"
    shared = [c for c in ("evaluation", "backbone", "preset", "tuning", "selector") if c in gained]
    whole = ranks.merge(gained.drop(columns="datasets"), on=shared, how="left", suffixes=("", "_of_improvement"))
    return Table(f"ranks-{name}", title, caption, columns, rows, whole)


# --- selection and cost ----------------------------------------------------------------------------------------------

_CHOICE = {  # columns of `selection.summary` with heading, form and hint
    "selected_mean": ("k", ",.0f", "auxiliary genes with more than half the weight of a primary gene, mean"),
    "selected_sd": ("sd of k", ",.0f", "over folds and seeds"),
    "effective": ("effective", ",.0f", "sum of the weights of auxiliary genes, each at most 1"),
    "jaccard": ("Jaccard", ".2f", "genes shared by two cells over genes of either, mean over pairs of cells"),
    "kuncheva": ("Kuncheva", ".2f", "the same corrected for chance: 0 = as random, 1 = always the same"),
    "prefix_overlap": ("in top of ranking", ".2f", "share of the selected among as many first genes of the ranking"),
    "rank_correlation": ("weight ~ score", ".2f", "rank correlation of weight and score of the ranking"),
    "mean_correlation": ("~ mean", ".2f", "rank correlation of weight and mean expression over training spots"),
    "detection_correlation": ("~ detection", ".2f", "rank correlation of weight and share of training spots with any"),
}


def choice(name: str, summary: pd.DataFrame) -> Table:
    """Which genes the selectors of one place take, and how steadily.

    Args:
        name: of its files.
        summary: of the place, from `selection.summary`.
    """
    known = {c: how for c, how in _CHOICE.items() if c in summary and summary[c].notna().any()}
    further = [c for c in summary if c.startswith(TRUTH) and summary[c].notna().any()]
    columns = [Column("selector", numeric=False)]
    columns += [Column(heading, hint) for heading, _, hint in known.values()]
    columns += [Column(c.removeprefix(TRUTH).replace("_", " "), "against the planted truth") for c in further]
    rows = [
        [
            Entry(r["selector"], r["selector"]),
            *(number(r[c], form) for c, (_, form, _) in known.items()),
            *(number(r[c], "+,.0f" if "minus" in c else ".2f") for c in further),
        ]
        for r in summary.to_dict("records")
    ]
    caption = "Means over folds and seeds; a dash where nothing is selected or nothing is left to choose."
    return Table(f"selection-{name}", place_title(summary.iloc[0]), caption, columns, rows, summary)


def overlap_table(name: str, place: Mapping[str, str], overlap: pd.DataFrame) -> Table:
    """Jaccard index of the genes of two selectors, from `selection.overlap`."""
    columns = [Column("", numeric=False), *(Column(str(s)) for s in overlap.columns)]
    rows = [
        [Entry(str(s), str(s)), *(number(v, ".2f") for v in values)]
        for s, values in zip(overlap.index, overlap.to_numpy(float), strict=True)
    ]
    caption = "Jaccard index of selected genes, mean over folds and seeds: 1 = the same genes, 0 = none in common."
    return Table(f"overlap-{name}", f"Overlap · {place_title(place)}", caption, columns, rows, overlap.reset_index())


def transfer_table(name: str, place: Mapping[str, str], transfer: pd.DataFrame, *, baseline: str = BASELINE) -> Table:
    """Primary genes that a selector harms or helps, from `selection.negative_transfer`."""
    columns = [
        Column("selector", numeric=False),
        Column("mean Δ", f"PCC minus {baseline}'s, mean over primary genes"),
        Column("harmed", "genes whose 95 % interval lies below 0"),
        Column("helped", "genes whose 95 % interval lies above 0"),
        Column("genes"),
        Column("most harmed", numeric=False),
        Column("most helped", numeric=False),
    ]
    rows = []
    for selector, genes in transfer.groupby("selector", sort=False):
        harmed, helped = genes[genes["high"] < 0], genes[genes["low"] > 0]
        rows.append(
            [
                Entry(str(selector), str(selector)),
                number(genes["difference"].mean(), "+.3f"),
                Entry(f"{len(harmed):,}", len(harmed)),
                Entry(f"{len(helped):,}", len(helped)),
                Entry(f"{len(genes):,}", len(genes)),
                Entry(_genes(harmed.nsmallest(GENES_SHOWN, "difference")), len(harmed)),
                Entry(_genes(helped.nlargest(GENES_SHOWN, "difference")), len(helped)),
            ]
        )
    caption = (
        f"PCC of each primary gene against {baseline}, with 95 % intervals that are not corrected for the number of "
        "genes: at least one gene in twenty is outside by chance. Every gene is in the CSV file."
    )
    title = f"Negative transfer · {place_title(place)}"
    return Table(f"transfer-{name}", title, caption, columns, rows, transfer)


def _genes(rows: pd.DataFrame) -> str:
    found = zip(rows["gene"], rows["difference"], strict=True)
    return ", ".join(f"{gene} {plain(value, '+.2f')}" for gene, value in found) or NONE


def cost_table(name: str, costs: pd.DataFrame) -> Table:
    """What a score costs, for one place, from `selection.costs`."""
    columns = [
        Column("selector", numeric=False),
        Column("PCC"),
        Column("s / cell", "seconds to train and test one cell, mean"),
        Column("PCC / hour", "test PCC over hours of one cell"),
        Column("peak memory, MB"),
    ]
    rows = [
        [
            Entry(r["selector"], r["selector"]),
            number(r["pcc"]),
            number(r["seconds"], ",.1f"),
            number(r["pcc_per_hour"], ",.1f"),
            number(r["peak_memory_mb"], ",.0f"),
        ]
        for r in costs.to_dict("records")
    ]
    caption = "Times compare where nothing else ran on the machine; memory is that of the whole process."
    return Table(f"cost-{name}", place_title(costs.iloc[0]), caption, columns, rows, costs)


def listing(name: str, title: str, caption: str, frame: pd.DataFrame, hints: Mapping[str, str] | None = None) -> Table:
    """A frame as it is."""
    numeric = {c: pd.api.types.is_numeric_dtype(frame[c]) for c in frame}
    columns = [Column(str(c).replace("_", " "), (hints or {}).get(c, ""), numeric[c]) for c in frame]
    rows = [[_plain_entry(value) for value in row] for row in frame.itertuples(index=False)]
    return Table(name, title, caption, columns, rows, frame)


def _plain_entry(value: Any) -> Entry:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Entry(str(value) if value not in ("", None) else NONE, str(value))
    return number(value, ".4g" if isinstance(value, float) else ",d")


# --- files -----------------------------------------------------------------------------------------------------------


def write(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Each table as CSV, Markdown and LaTeX.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for ending, text in (
            ("csv", as_csv(table.frame)),
            ("md", as_markdown(table)),
            ("tex", as_latex(table)),
        ):
            path = folder / f"{table.name}.{ending}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def as_markdown(table: Table) -> str:
    """GitHub's table, with its title above and its caption below."""

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |"

    head = [line(_md(c.name) for c in table.columns)]
    head.append(line("---:" if c.numeric else "---" for c in table.columns))
    body = [line(_md_entry(e) for e in row) for row in (*table.rows, *table.below)]
    return "\n".join([f"**{_md(table.title)}**", "", *head, *body, "", _md(table.caption), ""])


def _md(text: str) -> str:
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _md_entry(entry: Entry) -> str:
    text = _md(entry.text)
    return (f"**{text}**" if entry.best else text) + "".join(f"\\{sign}" for sign in entry.mark)


# Brackets and stars would be options of the end of the line before.
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}", "−": "$-$",
    "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≈": r"$\approx$", "≤": r"$\leq$",
    "µ": r"$\mu$", "·": r"$\cdot$", "→": r"$\rightarrow$", "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip


def as_latex(table: Table) -> str:
    """A `table` for the package booktabs; what else is not ASCII needs a LaTeX that reads UTF-8, as all of today do."""
    columns = "".join("r" if c.numeric else "l" for c in table.columns)

    def line(texts: Iterable[str]) -> str:
        return f"{' & '.join(texts)} \\\\"

    body = [line(_tex_entry(e) for e in row) for row in table.rows]
    if table.below:
        body += ["\\midrule", *(line(_tex_entry(e) for e in row) for row in table.below)]
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_tex(table.title)}. {_tex(table.caption)}}}",
            f"\\label{{tab:{table.name}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            line(_tex(c.name) for c in table.columns),
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _tex_entry(entry: Entry) -> str:
    text = f"\\textbf{{{_tex(entry.text)}}}" if entry.best else _tex(entry.text)
    return text + (f"$^{{{entry.mark}}}$" if entry.mark else "")
