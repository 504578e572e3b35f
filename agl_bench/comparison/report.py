"""The report: one HTML file that opens from disk, tables and figures beside it.

A report is gathered first (`assemble`), as frames and sentences, and rendered afterwards (`render`), so that what is
said is decided here and how it looks in `page/`. The one home of jinja2.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from agl_bench import __version__
from agl_bench.bench.table import BASELINE
from agl_bench.bench.tuned import STUDIES, Entry, read_entries
from agl_bench.comparison import figures, selection, statistics, tables
from agl_bench.comparison.answer import answer
from agl_bench.comparison.figures import Drawn
from agl_bench.comparison.gather import PLACE, Gathered
from agl_bench.comparison.quality import Quality, controls, known_controls, methods, quality
from agl_bench.comparison.tables import Table
from agl_bench.data.spreadsheet import as_csv
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.protocol import NO_EFFECT
from agl_bench.registry.plugins import Plugins

ACROSS = [name for name in PLACE if name != "dataset"]
_PAGE = Path(__file__).parent / "page"
_MOST_OPEN = 6  # places whose details are unfolded from the beginning
_MANY, _PLACES_OF_MANY = 3_000, 3  # of more cells than this, so many places are drawn: a report takes a minute at most
_MOST_SVG = 150_000  # bytes of a drawing that is put into the page as such, else as PNG
_FIGURES = {  # where a figure stands, by the beginning of its name; others are at the end
    "results": "results",
    "forest": "statistics",
    "critical-difference": "across",
    "sweep": "selection",
    "weights": "selection",
    "choices": "maps",
    "predictions": "maps",
    "genes": "transfer",
    "cost": "cost",
    "trajectories": "curves",
}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its anchor.
        title: heading.
        note: what is to be known to read it.
        tables, figures: in order.
        sentences: of plain text, as a list.
        missing: why something is not there.
    """

    name: str
    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Drawn] = ()
    sentences: Sequence[str] = ()
    missing: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.figures or self.sentences or self.missing)


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes:
        answers: one sentence for each place.
        facts: what the header states.
        main: the tables of the first screen.
        sections: what follows.
        quality: what is missing or odd.
        baseline: what everything is compared with.
        tables: every table that is written as files.
    """

    answers: Sequence[str]
    facts: Mapping[str, Sequence[str]]
    main: Sequence[Table]
    sections: Sequence[Section]
    quality: Quality
    baseline: str
    tables: Sequence[Table] = field(repr=False, default=())


def write_report(
    gathered: Gathered,
    work: Path,
    out: Path,
    plugins: Plugins,
    *,
    baseline: str = BASELINE,
    root: Path | None = None,
) -> Report:
    """Write OUT/report.html, OUT/tables/ and OUT/figures/.

    Args:
        gathered: the cells of the work folder.
        work: the folder, where settings that were tuned are looked up.
        out: where to.
        plugins: who says which selectors and backbones are controls.
        baseline: selector that the others are compared with.
        root: folder of the datasets, for maps on the tissue.

    Raises:
        BadSpec: if no cell is finished.
        UnknownName: if no cell has the baseline.
        OSError: if it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = assemble(gathered, work, out / "figures", plugins, baseline=baseline, root=root)
    tables.write(report.tables, out / "tables")
    cells = as_csv(gathered.cells)  # thousands: for programs alone
    (out / "tables" / "cells.csv").write_text(cells, encoding="utf-8")
    (out / "report.html").write_text(render(report), encoding="utf-8")
    return report


def assemble(
    gathered: Gathered,
    work: Path,
    drawings: Path,
    plugins: Plugins,
    *,
    baseline: str = BASELINE,
    root: Path | None = None,
) -> Report:
    """Everything a report says; figures are drawn into a folder. See `write_report`."""
    bounds, backbones = known_controls(gathered.cells, plugins)
    below = controls(gathered.cells, backbones)
    presets = tables.short_presets(gathered.cells["preset"])
    gathered = _renamed(gathered, presets)
    below = {(*place[:3], presets[place[3]], place[4]): found for place, found in below.items()}
    own = replace(gathered, cells=methods(gathered.cells, backbones).reset_index(drop=True))
    cells = own.cells
    if cells.empty:
        raise BadSpec(f"{work} holds no finished cell to report; `agl-bench run` makes some")
    if baseline != BASELINE and baseline not in set(cells["selector"]):
        raise UnknownName("selector in these cells", baseline, sorted(set(cells["selector"])))
    pairs = statistics.pairs(cells)
    against = statistics.pairs(cells, baseline=baseline)
    ranks = statistics.ranks(cells[~cells["name"].isin(bounds)])
    found = quality(gathered, work, below, bounds, statistics.cautions(cells))
    lines = tables.standings(cells, against, baseline=baseline)
    places = lines[PLACE].drop_duplicates(ignore_index=True)
    named = dict(zip(places.itertuples(index=False, name=None), tables.file_names(places), strict=True))
    by_place = _Places(lines, against, pairs, named, bounds, baseline)
    standing = [
        tables.main_table(
            named[place], by_place.lines(place), bounds, {c.name: list(c.pcc.values()) for c in below.get(place, [])},
            baseline=baseline,
        )
        for place in named
    ]  # fmt: skip
    places = {"places": _PLACES_OF_MANY} if len(cells) > _MANY else {}
    drawn = figures.draw_all(own, drawings, baseline=baseline, root=root, pairs=against, ranks=ranks, **places)
    across = _across(cells, lines, ranks, bounds, baseline)
    parts = [
        Section(
            "results", "Results", _RESULTS, [tables.by_fold(named[k], g) for k, g in _grouped(cells) if k in named]
        ),
        Section("statistics", "Every pair of selectors", _PAIRS, by_place.pair_tables()),
        *([Section("across", "Across datasets", _ACROSS, across)] if cells["dataset"].nunique() > 1 else []),
        Section("selection", "Which genes are selected", _SELECTION, _selection(own, named)),
        Section("transfer", "Negative transfer, gene by gene", _TRANSFER, _transfer(own, named, baseline)),
        Section("cost", "Score against cost", _COST, _costs(cells, named)),
        Section("curves", "How the selection moves in training"),
        Section("maps", "Maps on the tissue"),
    ]
    parts = [_with_figures(part, drawn) for part in parts]
    parts.append(_quality_section(found))
    parts.append(Section("tuning", "Tuning", _TUNING, _tuning(work, gathered.store.warn), _tuning_figures(work)))
    rest = [d for d in drawn if _home(d) == "further"]
    parts.append(_split("further", "Further figures", "", [], rest))
    parts.append(Section("provenance", "Where it is from", _PROVENANCE, _provenance(gathered)))
    parts = [part for part in parts if not part.is_empty]
    everything = [*standing, *(t for part in parts for t in part.tables)]
    return Report(
        by_place.answers(), _facts(gathered, cells, list(presets)), standing, parts, found, baseline, everything
    )


def _renamed(gathered: Gathered, presets: Mapping[str, str]) -> Gathered:
    """With short labels of presets."""
    cells, failed, skipped = (
        frame.assign(preset=[presets.get(p, p) for p in frame["preset"]])
        for frame in (gathered.cells, gathered.failed, gathered.skipped)
    )
    return replace(gathered, cells=cells, failed=failed, skipped=skipped)


class _Places:
    """What is known of each place."""

    def __init__(
        self,
        lines: pd.DataFrame,
        against: pd.DataFrame,
        pairs: pd.DataFrame,
        named: Mapping[tuple[str, ...], str],
        bounds: frozenset[str],
        baseline: str,
    ) -> None:
        self.named, self.bounds, self.baseline = named, bounds, baseline
        self._frames = [dict(_grouped(frame)) for frame in (lines, against, pairs)]
        self._empty = [frame.iloc[:0] for frame in (lines, against, pairs)]

    def lines(self, place: tuple[str, ...]) -> pd.DataFrame:
        """Of `tables.standings`."""
        found: pd.DataFrame = self._frames[0][place]
        return found

    def pair_tables(self) -> list[Table]:
        """Every pair of each place."""
        return [tables.pairwise(name, self._frames[2][p]) for p, name in self.named.items() if p in self._frames[2]]

    def answers(self) -> list[str]:
        """A sentence for each place, which is named by what tells it apart."""
        frame = pd.DataFrame(list(self.named), columns=PLACE)
        telling = [c for c in ("backbone", "preset", "tuning") if frame[c].nunique() > 1]
        sentences = []
        for place in self.named:
            said = dict(zip(PLACE, place, strict=True))
            more = [said[c] or "fixed settings" for c in telling]
            where = f"On {said['dataset']}, {said['evaluation']}-batch" + (f" ({', '.join(more)})" if more else "")
            lines, against, pairs = (
                frames.get(place, empty) for frames, empty in zip(self._frames, self._empty, strict=True)
            )
            own = lines[~lines["name"].isin(self.bounds)]
            against = against[against["a"].isin(own["selector"])]
            pairs = pairs[pairs["a"].isin(own["selector"]) & pairs["b"].isin(own["selector"])]
            sentences.append(answer(where, own, against, pairs, baseline=self.baseline))
        return sentences


def _grouped(frame: pd.DataFrame) -> Iterable[tuple[tuple[str, ...], pd.DataFrame]]:
    return [(tuple(key), group) for key, group in frame.groupby(PLACE, sort=False)]


def _across(
    cells: pd.DataFrame, lines: pd.DataFrame, ranks: pd.DataFrame, bounds: frozenset[str], baseline: str
) -> list[Table]:
    """Selectors × datasets, ranks and improvement, where there is more than one dataset."""
    found = []
    improvement = statistics.improvement(cells[~cells["name"].isin(bounds)], baseline=baseline)
    places = lines[ACROSS].drop_duplicates(ignore_index=True)
    for place, name in zip(places.itertuples(index=False, name=None), tables.file_names(places), strict=True):
        here, ranked, gained = (_at(frame, place) for frame in (lines, ranks, improvement))
        if here["dataset"].nunique() < 2:
            continue
        found.append(tables.overview(name, here, bounds, baseline=baseline))
        if len(ranked):
            found.append(
                tables.rank_table(
                    name, ranked, gained, dict(zip(ACROSS, place, strict=True)), ranks.attrs["tests"][place]
                )
            )
    return found


def _at(frame: pd.DataFrame, place: tuple[str, ...]) -> pd.DataFrame:
    for column, value in zip(ACROSS, place, strict=True):
        frame = frame[frame[column] == value]
    return frame


def _selection(gathered: Gathered, named: Mapping[tuple[str, ...], str]) -> list[Table]:
    summaries = dict(_grouped(selection.summary(gathered)))
    found = []
    for place, name in named.items():
        if place not in summaries:
            continue
        found.append(tables.choice(name, summaries[place]))
        if len(summaries[place]) > 1:
            said = dict(zip(PLACE, place, strict=True))
            found.append(tables.overlap_table(name, said, selection.overlap(gathered, said)))
    return found


def _transfer(gathered: Gathered, named: Mapping[tuple[str, ...], str], baseline: str) -> list[Table]:
    found = []
    for place, name in named.items():
        said = dict(zip(PLACE, place, strict=True))
        genes = selection.negative_transfer(gathered, said, baseline=baseline)
        if len(genes):
            found.append(tables.transfer_table(name, said, genes, baseline=baseline))
    return found


def _costs(cells: pd.DataFrame, named: Mapping[tuple[str, ...], str]) -> list[Table]:
    costs = dict(_grouped(selection.costs(cells)))
    return [tables.cost_table(name, costs[place]) for place, name in named.items() if place in costs]


def _with_figures(part: Section, drawn: Sequence[Drawn]) -> Section:
    own = [d for d in drawn if _home(d) == part.name]
    return _split(part.name, part.title, part.note, part.tables, own)


def _split(name: str, title: str, note: str, own: Sequence[Table], drawn: Sequence[Drawn]) -> Section:
    """A section with its figures, and why some of them are not there."""
    there = [d for d in drawn if d.png is not None or d.svg is not None]
    absent = [f"{d.title}: {d.why}" for d in drawn if d.png is None and d.svg is None]
    return Section(name, title, note, own, there, missing=list(dict.fromkeys(absent)))


def _home(drawn: Drawn) -> str:
    return next((home for kind, home in _FIGURES.items() if drawn.name.startswith(kind)), "further")


def _quality_section(found: Quality) -> Section:
    sentences = [*([found.sentence] if found.sentence else []), *found.outside, *found.cautions]
    own = []
    if len(found.gaps):
        own.append(
            tables.listing(
                "quality-gaps",
                "Lines that lack cells",
                "Cells that other lines of the same place have, that failed, or that cannot run.",
                found.gaps,
            )
        )
    if len(found.failed):
        own.append(
            tables.listing(
                "quality-failed", "Cells that failed", "`agl-bench run … --retry-failed` runs them anew.", found.failed
            )
        )
    if len(found.skipped):
        own.append(
            tables.listing(
                "quality-skipped", "Cells that cannot run", "Every `agl-bench run` looks anew.", found.skipped
            )
        )
    if len(found.nan_genes):
        own.append(
            tables.listing(
                "quality-nan-genes", "Primary genes without a PCC",
                "A gene that is constant in measurement or prediction has no PCC and is left out of means; most: in "
                "one cell. Every cell also has a score that counts them as 0.",
                found.nan_genes,
            )
        )  # fmt: skip
    if not (sentences or own):
        sentences = ["Nothing is missing, no cell failed, and no result lies outside its controls."]
    return Section("quality", "What is missing or odd", "", own, (), sentences)


def _tuning(work: Path, warn: Callable[[str], None]) -> list[Table]:
    """Settings that `tune` has written, one table for all and one for the budgets; `warn` hears what is damaged."""
    entries: list[tuple[str, Entry]] = []
    for path in sorted((work / "tuned").glob("*.toml")):
        try:
            entries += [(path.stem, entry) for entry in read_entries(path)]
        except BadSpec as error:
            warn(f"tuned settings are left out: {error}")
    if not entries:
        return []
    budget = pd.DataFrame(
        {
            "selector": selector, "dataset": e.dataset, "evaluation": e.evaluation, "backbone": e.backbone,
            "fold": e.fold or "all", "trials": e.trials, "finished": e.points, "pruned": e.pruned,
            "folds": len(e.folds), "seeds": len(e.seeds), "sampler": e.sampler, "pruner": e.pruner,
            "validation_pcc": e.validation_pcc,
        }
        for selector, e in entries
    )  # fmt: skip
    settings = pd.DataFrame(
        {
            "selector": selector, "dataset": e.dataset, "evaluation": e.evaluation, "backbone": e.backbone,
            "fold": e.fold or "all", "setting": name, "best": str(value),
        }
        for selector, e in entries
        for name, value in e.settings.items()
    )  # fmt: skip
    found = [
        tables.listing(
            "tuning-budget", "Studies", "The budget is the same for every selector of a table; a trial trains each "
            "fold with each seed once, and its score is the mean of their best validation PCC.", budget,
        )
    ]  # fmt: skip
    if len(settings):
        found.append(tables.listing("tuning-settings", "Best settings", "On validation spots alone.", settings))
    return found


def _tuning_figures(work: Path) -> list[Drawn]:
    """What `tune` has drawn of each study: history, importances, parallel coordinates."""
    captions = {
        "history": "Score of every trial and the best so far; trials without a score as ticks at the bottom.",
        "importances": "Share of each setting in the spread of the score (PED-ANOVA).",
        "parallel_coordinates": "One line for each scored trial over the searched settings, coloured by its score.",
    }
    found = []
    for folder in sorted((work / "tuned" / STUDIES).glob("*/")):
        for kind, caption in captions.items():
            png = folder / f"{kind}.png"
            if png.is_file():
                title = f"Tuning, {kind.replace('_', ' ')} · {folder.name}"
                found.append(Drawn(f"tuning-{kind}-{folder.name}", title, caption, png, None))
    return found


def _facts(gathered: Gathered, cells: pd.DataFrame, presets: Sequence[str]) -> dict[str, Sequence[str]]:
    """What the header states: name -> words."""
    specs = [gathered.specs[key] for key in gathered.cells["key"]]

    def distinct(values: Iterable[Any]) -> list[str]:
        return [str(v) for v in dict.fromkeys(values) if v not in ("", None)]

    fixed = ["fixed settings"] if (cells["tuning"] == "").any() else []
    return {
        "preset": distinct(cells["preset"]),
        "preset in full": presets,
        "datasets": distinct(f"{s['dataset']['label']} ({s['data'] or 'no fingerprint'})" for s in specs),
        "evaluations": distinct(cells["evaluation"]),
        "backbones": distinct(cells["backbone"]),
        "selectors": distinct(cells["selector"]),
        "seeds": [str(s) for s in sorted(set(cells["seed"]))],
        "tuning budget": [*fixed, *distinct(cells["tuning"])],
        "cells": [f"{len(gathered.cells):,} finished"],
        "made by": distinct(f"agl-bench {s['version']}" for s in specs),
        "libraries": distinct(s["libraries"] for s in specs),
        "commit": distinct(gathered.cells["commit"]),
        "machine": distinct(
            f"{m or 'not known'}, {d}" for m, d in zip(gathered.cells["machine"], gathered.cells["device"], strict=True)
        ),
    }


def _provenance(gathered: Gathered) -> list[Table]:
    """The settings of everything that took part, without repetition."""
    presets: dict[str, dict[str, set[str]]] = {}
    parts: dict[tuple[str, str, str, str], dict[str, set[str]]] = {}
    rows = gathered.cells[["key", "preset", "tuning"]].itertuples(index=False)
    for key, preset, tuning in rows:
        spec = gathered.specs[key]
        column = preset + (f", {tuning}" if tuning else "")
        for name, value in {**NO_EFFECT, **spec["protocol"]}.items():
            presets.setdefault(name, {}).setdefault(column, set()).add(_word(value))
        for kind in ("dataset", "backbone", "selector"):
            part = spec[kind]
            for name, value in (part["settings"] or {"": ""}).items():
                place = (kind, part["label"], part["provider"], name)
                parts.setdefault(place, {}).setdefault("value", set()).add(_word(value))
    columns = list(dict.fromkeys(c for found in presets.values() for c in found))
    protocol = pd.DataFrame(
        {"setting": name, **{c: _words(found.get(c, ())) for c in columns}} for name, found in presets.items()
    )
    settings = pd.DataFrame(
        {
            "kind": kind, "name": label, "setting": name or "none", "value": _words(found["value"]),
            "provided_by": provider,
        }
        for (kind, label, provider, name), found in parts.items()
    ).sort_values(["kind", "name"], kind="stable")  # fmt: skip
    return [
        tables.listing("protocol", "Protocol", "Conditions that are equal for every selector.", protocol),
        tables.listing("settings", "Settings", "Of each part; several values where lines or folds differ.", settings),
    ]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _words(values: Iterable[str]) -> str:
    """Up to eight different values."""
    known = sorted(values)
    return " | ".join(known[:8]) + (f" | … {len(known)} in all" if len(known) > 8 else "")


# --- the page --------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The page: all that it shows is inside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["embedded"] = _embedded
    page = environment.get_template("report.html.jinja")
    return page.render(report=report, version=__version__, most_open=_MOST_OPEN, methods=METHODS)


def _embedded(drawn: Drawn) -> str:
    """A figure as a data address, sharp at any size unless that takes too much; an image in a page runs no script."""
    if drawn.svg is not None and (drawn.png is None or drawn.svg.stat().st_size <= _MOST_SVG):
        kind, content = "svg+xml", drawn.svg.read_bytes()
    else:
        assert drawn.png is not None
        kind, content = "png", drawn.png.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


_RESULTS = (
    "Intra-batch: test spots are of sections that were trained on. Inter-batch: of sections that were not. The two "
    "have tables of their own, and so have tuned and fixed settings."
)
_PAIRS = (
    "Each pair once, the one with the higher mean first; pairs on the same folds and seeds. The files hold both "
    "directions and every column."
)
_ACROSS = "Ranks need the same selectors on all datasets."
_SELECTION = (
    "A gene is selected if it weighs more than half as much as a primary gene. Stability is over pairs of cells: it "
    "holds what folds and seeds change."
)
_TRANSFER = "Which primary genes are predicted worse with auxiliary genes than without."
_COST = "Score against what it takes to train."
_TUNING = "What `agl-bench tune` found, on validation spots alone."
_PROVENANCE = "What every cell was made of. The whole spec of each is in the work folder, cells/KEY/result.json."

METHODS = (
    (
        "PCC",
        "Pearson's correlation of predicted and measured expression over the test spots of a section, for each primary "
        "gene; mean over primary genes, then over test sections. A gene without a PCC (constant) is left out.",
    ),
    ("sd", "Sample standard deviation over the cells of a line, that is over folds and seeds. Not a standard error."),
    (
        "unit",
        "What is tested as a whole: a section (intra-batch), or what was left out (inter-batch). Genes and spots are "
        "not independent, folds of a section share its tissue, seeds share folds. A unit's value is the mean over its "
        "seeds of the mean over its folds.",
    ),
    ("difference", "PCC(a) − PCC(b) on the folds and seeds that both have; mean over units."),
    (
        "95 % interval",
        "Hierarchical bootstrap: units are drawn, then seeds within each; percentiles, widened for few units.",
    ),
    ("p", "Two-sided sign-flip test over units: exact up to 13 units, 10,000 random flips above."),
    (
        "Holm",
        "Step-down correction. In the main tables over the comparisons with the baseline, in the tables of pairs over "
        "all pairs of one place: the second asks more questions, and its p are larger.",
    ),
    (
        "p NB",
        "Corrected resampled t test (Nadeau and Bengio 2003): its variance allows for folds that share training spots.",
    ),
    ("effect", "Mean difference over its standard deviation over units, with Hedges' correction."),
    (
        "P(a > b), P(a ≈ b)",
        "Posterior probability of a correlated Bayesian t test (Benavoli et al. 2017) that a is better by more than "
        "0.005 PCC, and that they are within 0.005 of each other.",
    ),
    (
        "verdict",
        "“too few units” where fewer than three seeds or too few units make every test void; “equivalent” if the "
        "interval lies within ± 0.005 PCC; “better” or “worse” if p after Holm is at most .05; else “undecided”.",
    ),
    ("ranks", "Mean rank over datasets; Friedman test, and Nemenyi's critical difference at .05."),
    ("k", "Auxiliary genes with more than half the weight of a primary gene, at the tested epoch."),
    (
        "effective",
        "Sum of the weights of auxiliary genes, each at most 1: k for a selection of whole genes.",
    ),
    ("Jaccard", "Genes in both over genes in either of two selections."),
    ("Kuncheva", "Agreement of two selections corrected for chance: 0 as random genes, 1 the same genes."),
    ("regret", "On planted data: PCC of the bound, which knows what is planted, minus that of the selector."),
    (
        "seconds, memory",
        "Wall-clock time to train and test one cell, and its peak memory: of the process on a CPU, of the device on a "
        "GPU.",
    ),
)
