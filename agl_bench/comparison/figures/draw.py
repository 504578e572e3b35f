"""All figures of a work folder, each as PNG and SVG with a caption that says what is seen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agl_bench.bench.spec import Part, RunSpec, make_dataset, naming_the_dataset
from agl_bench.bench.table import BASELINE
from agl_bench.comparison import selection, statistics
from agl_bench.comparison.figures import choice, maps, reading, standing
from agl_bench.comparison.figures.style import NotDrawn, look, where, write
from agl_bench.comparison.gather import LINE, PLACE, Gathered
from agl_bench.comparison.quality import known_controls, methods
from agl_bench.data.check import check_section
from agl_bench.errors import AglBenchError
from agl_bench.registry.plugins import Plugins

CELLS = 24  # of a selector in one place that are read for genes and courses
PLACES = 6  # that are drawn one by one: some seconds each
_ROWS = 2  # selectors beside the baseline in maps of predictions


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: of its files, unique within a folder.
        title: what it shows, and of what.
        caption: units, what an interval is, and how many cells, as sentences.
        png, svg: its files; None where it cannot be drawn.
        place: what it is about; without "dataset" where it spans datasets.
        why: a sentence, where it cannot be drawn.
    """

    name: str
    title: str
    caption: str
    png: Path | None
    svg: Path | None
    place: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def draw_all(
    gathered: Gathered,
    folder: Path,
    *,
    baseline: str = BASELINE,
    root: Path | None = None,
    pairs: pd.DataFrame | None = None,
    ranks: pd.DataFrame | None = None,
    places: int = PLACES,
) -> list[Drawn]:
    """Draw everything that the cells of a work folder can show.

    Controls (images of wrong spots, backbones that see no image) are no methods and not drawn.

    Args:
        gathered: the cells.
        folder: for the files; made if it is not there.
        baseline: what the others are compared with.
        root: folder of the datasets, for maps on the tissue; None = such maps say that there is no section.
        pairs: `statistics.pairs` against the baseline, where it is known already.
        ranks: `statistics.ranks`, likewise.
        places: at most so many places (dataset, evaluation, backbone, preset, tuning) are drawn, those with most cells.

    Returns:
        One entry per figure, also for those that cannot be drawn: first across datasets, then place by place.
    """
    plugins = Plugins.discover(strict=False)
    cells = methods(gathered.cells, known_controls(gathered.cells, plugins)[1])
    if cells.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if pairs is None:
        pairs = statistics.pairs(cells, baseline=baseline)
    if ranks is None:
        ranks = statistics.ranks(cells)
    sheet, tissues = _Sheet(folder), _Tissues(plugins, root)
    with look():
        for _, members in cells.groupby(statistics.ACROSS, sort=False):
            _draw_across(sheet, members, ranks)
        sizes = cells.groupby(PLACE, sort=False).size()
        drawn = set(sizes.sort_values(ascending=False, kind="stable").index[:places])
        for key, members in cells.groupby(PLACE, sort=False):
            if key in drawn:
                _Place(sheet, gathered, members, _rows_of(pairs, members), baseline, tissues).draw()
        if left := len(sizes) - len(drawn):
            sheet.absent(
                "further-places", "Further places", {},
                f"{left} of {len(sizes)} places are not drawn one by one, those with the fewest cells",
            )  # fmt: skip
    return sheet.drawn


class _Sheet:
    """Writes figures one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn: list[Drawn] = []

    def add(self, kind: str, title: str, place: dict[str, Any], caption: str, make: Callable[[str], Figure]) -> None:
        """Draw a figure and write its files; `make` gets the title."""
        title = f"{title} · {where(place)}"
        try:
            figure = make(title)
        except NotDrawn as why:
            self.absent(kind, title, place, str(why))
            return
        name = self._name(kind, place)
        png, svg = self.folder / f"{name}.png", self.folder / f"{name}.svg"
        write(figure, png, svg)
        self.drawn.append(Drawn(name, title, caption, png, svg, place))

    def absent(self, kind: str, title: str, place: dict[str, Any], why: str) -> None:
        """Say why there is no figure."""
        self.drawn.append(Drawn(self._name(kind, place), title, "", None, None, place, why))

    def _name(self, kind: str, place: Mapping[str, Any]) -> str:
        words = [kind, *(str(v) for v in place.values() if v)]
        name = re.sub(r"[^a-z0-9_.]+", "-", "-".join(words).lower()).strip("-.")[:90]
        taken = {d.name for d in self.drawn}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _draw_across(sheet: _Sheet, cells: pd.DataFrame, ranks: pd.DataFrame) -> None:
    """The table as bars, and ranks over datasets."""
    place = cells.iloc[0][statistics.ACROSS].to_dict()
    lost = int(cells["pcc"].isna().sum())
    sheet.add(
        "results", "Test PCC", place,
        "Test PCC (Pearson, mean over primary genes, then over test sections), mean and sample standard deviation over "
        f"folds and seeds; the best of a dataset is bold, which says nothing of how sure it is. {_count(cells)}"
        + (f" {lost} cells without a PCC are left out." if lost else ""),
        lambda title: standing.results(cells, title),
    )  # fmt: skip
    own = ranks[(ranks[statistics.ACROSS] == pd.Series(place)).all(axis=1)]
    test = ranks.attrs["tests"].get(tuple(place.values()), {})
    sheet.add(
        "critical-difference", "Ranks over datasets", place,
        "Mean rank of each selector over datasets with its 95 % bootstrap interval; a black bar joins selectors whose "
        "ranks differ by less than Nemenyi's critical difference at .05. Only selectors that were run on all of the "
        f"datasets have a rank. Friedman test over {test.get('blocks', 0):.0f} datasets: "
        f"p = {test.get('p', math.nan):.3g}.",
        lambda title: standing.critical_difference(own, title, width=test.get("critical_difference", math.nan)),
    )  # fmt: skip


class _Tissues:
    """Sections that maps are drawn on, each read once: the whole slide is seen, not what is prepared of it."""

    def __init__(self, plugins: Plugins, root: Path | None) -> None:
        self.plugins, self.root = plugins, root
        self._found: dict[str, tuple[maps.Ground | None, str]] = {}

    def of(self, part: Part) -> tuple[maps.Ground | None, str]:
        """The first section of a dataset; or None and a sentence that says why."""
        key = json.dumps([part.name, part.settings])
        if key not in self._found:
            self._found[key] = self._read(part)
        return self._found[key]

    def _read(self, part: Part) -> tuple[maps.Ground | None, str]:
        if self.root is None:
            return None, "the folder of the datasets is not known, so no section can be read"
        try:
            dataset = make_dataset(self.plugins, part)
            with naming_the_dataset(part):
                found = dataset.read(self.root, next(iter(dataset.sections(self.root))))
            check_section(found, has_counts=dataset.has_counts)
            return maps.Ground.of(found), ""
        except AglBenchError as error:
            return None, str(error)


class _Place:
    """The figures of one place; tables of its cells are read once for all of them."""

    def __init__(
        self,
        sheet: _Sheet,
        gathered: Gathered,
        cells: pd.DataFrame,
        pairs: pd.DataFrame,
        baseline: str,
        tissues: _Tissues,
    ) -> None:
        self.baseline = baseline
        self.sheet, self.gathered, self.cells, self.pairs, self.tissues = sheet, gathered, cells, pairs, tissues
        self.place: dict[str, Any] = cells.iloc[0][PLACE].to_dict()
        self.lines = reading.sweep_lines(cells, pairs, baseline=baseline)
        self.few = cells[cells["selector"].isin(reading.few_of_sweeps(self.lines))]
        self.shown = reading.sampled(self.few, CELLS)
        self.genes = reading.genes_of(gathered, self.shown)
        self.per_gene = reading.per_gene(self.genes, baseline=baseline)
        self.courses = reading.courses_of(gathered, self.shown)

    def draw(self) -> None:
        """All of them."""
        self._standing()
        self._choice()
        self._choices()
        self._predictions()

    def _add(self, kind: str, title: str, caption: str, make: Callable[[str], Figure]) -> None:
        self.sheet.add(kind, title, self.place, caption, make)

    def _standing(self) -> None:
        cells, pairs = self.cells, self.pairs
        units = int(pairs["units"].max()) if len(pairs) else 0
        self._add(
            "forest", f"Difference to {self.baseline}",
            f"Mean difference of test PCC to {self.baseline} on the same folds and seeds; lines are 95 % intervals "
            f"of a hierarchical bootstrap over units (n = {units} tested sections or donors) and seeds within them."
            f" The band, ±{statistics.ROPE:g} PCC, counts as no difference. Filled markers are better or worse by a "
            "sign-flip test of units, whose p is Holm-corrected over the pairs of the place.",
            lambda title: standing.forest(pairs, title, baseline=self.baseline, rope=statistics.ROPE),
        )  # fmt: skip
        number = self.per_gene["gene"].nunique()
        self._add(
            "genes", "PCC of single primary genes",
            f"Each dot is a primary gene ({number} in all: folds differ in theirs), mean over the cells where it is "
            "primary; the box holds the quartiles, the line the 5th to the 95th percentile. Genes are not independent "
            f"of each other: this is a description, no test.{self._sample()}",
            lambda title: standing.gene_distributions(self.per_gene, title, baseline=self.baseline),
        )  # fmt: skip
        on_cpu = set(cells["device"]) == {"cpu"}
        self._add(
            "cost", "Score against cost",
            f"Mean test PCC against the mean seconds of a cell and the largest peak memory of one.{self._all()} "
            f"Machine: {', '.join(sorted(set(cells['machine']))) or 'not known'}."
            + (" On a CPU the peak is of the whole process so far, so later cells show the largest." if on_cpu else ""),
            lambda title: standing.cost(
                selection.costs(self.few), title, memory="process so far" if on_cpu else "device"
            ),
        )  # fmt: skip

    def _choice(self) -> None:
        lines = self.lines.assign(learned=self.lines["selector"].isin(self.courses))
        paired = self.baseline in set(self.cells["selector"])
        score = f"difference of test PCC to {self.baseline}" if paired else "test PCC"
        interval = "95 % bootstrap interval" if paired else "one standard deviation"
        self._add(
            "sweep", "PCC against the number of auxiliary genes",
            f"Curves: selectors run with several fixed k, {score}, mean and {interval}. Points: the other selectors at "
            "the number that they selected (more than half the weight of a primary gene), with one standard deviation "
            f"over folds and seeds across and the {interval} upwards; dotted lines mark learned choices. "
            f"{_count(self.cells)}",
            lambda title: choice.sweep(lines, title, score=score),
        )  # fmt: skip
        self._add(
            "trajectories", "k and validation PCC over outer iterations",
            "Thin lines are cells, the black line their median, where cells that have ended keep their last value; "
            "dots are the pass whose model was tested. Validation PCC is the mean over primary genes on the validation "
            f"spots.{self._sample()}",
            lambda title: choice.trajectories(self.courses, title),
        )  # fmt: skip
        self._add(
            "weights", "Weight against rank",
            "Effective weight of auxiliary genes, 1 = that of a primary gene; above the dotted line a gene counts as "
            "selected. Black: mean over cells; thin lines: single cells, averaged over neighbouring ranks; band: 10th "
            f"to 90th percentile over genes and cells.{self._sample()}",
            lambda title: choice.weight_by_rank(self.genes, title),
        )  # fmt: skip

    def _choices(self) -> None:
        ground, why = self.tissues.of(RunSpec.from_json(self.gathered.specs[self.cells["key"].iloc[0]]).dataset)
        means = self.cells[self.cells["selector"].isin(self.courses)].groupby("selector")["pcc"].mean()
        best = list(means.sort_values(ascending=False, kind="stable").index[:2])

        def make(title: str) -> Figure:
            if len(best) < 2:
                raise NotDrawn(f"only {' and '.join(best) or 'no selector'} learned its choice here: two are needed")
            if ground is None:
                raise NotDrawn(why)
            return maps.choices(ground, maps.genes_apart(self.genes, *best), title)

        name = ground.section.name if ground else ""
        self._add(
            "choices", f"What {' and '.join(best) or 'learning selectors'} choose apart",
            "Auxiliary genes that one selector takes and the other does not, those with the largest difference between "
            "the shares of cells (folds × seeds) that take them, not chosen by their maps. Colours: ln(1 + counts) of "
            f"section {name}, up to the gene's 99th percentile.{self._sample()}",
            make,
        )  # fmt: skip

    def _tables(self) -> dict[str, pd.DataFrame]:
        """Predictions of the baseline and of the selectors with the best mean PCC, learning ones first."""
        means = self.few.groupby("selector")["pcc"].mean().sort_values(ascending=False, kind="stable")
        others = sorted((str(s) for s in means.index if s != self.baseline), key=lambda s: s not in self.courses)
        wanted = [*([self.baseline] if self.baseline in means.index else []), *others[:_ROWS]]
        return reading.predictions_of(self.gathered, self.cells, wanted)

    def _predictions(self) -> None:
        tables = self._tables()
        genes = reading.shown_genes(tables, self.per_gene)
        first = next(iter(tables.values()), pd.DataFrame({"section": [], "fold": []}))
        name = str(first["section"].iloc[0]) if len(first) else ""

        def make(title: str) -> Figure:
            if not tables:
                raise NotDrawn("these cells keep no predictions: `agl-bench rerun KEY --keep predictions` adds them")
            return maps.predictions(tables, genes, title)

        self._add(
            "predictions", "Predicted against measured",
            f"The {len(first):,} test spots of section {name} ({_number(first['fold'].nunique())} of one seed): the "
            "best, the middle and the worst by mean PCC of the genes that are primary at most of them. Every map is "
            "standardised within a fold, since the correlation loss leaves scale and offset free; PCC is over spots "
            "with a colour. White: the gene is not primary in the fold of these spots.",
            make,
        )  # fmt: skip

    def _sample(self) -> str:
        """What of the cells is drawn."""
        of, drawn = len(self.few), len(self.shown)
        return self._all() if drawn == of else f" {drawn:,} of {of:,} cells, evenly over folds and seeds.{self._left()}"

    def _all(self) -> str:
        """How many cells there are of what is drawn."""
        return f" {_count(self.few)}{self._left()}"

    def _left(self) -> str:
        """What of sweeps is left out."""
        return " Of each sweep over k the middle one." if len(self.few) < len(self.cells) else ""


def _count(cells: pd.DataFrame) -> str:
    each = cells.groupby(LINE).size()
    number = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
    return f"n = {number} cells (folds × seeds) of each selector."


def _number(folds: int) -> str:
    return f"{folds} fold" + ("s" if folds != 1 else "")


def _rows_of(frame: pd.DataFrame, members: pd.DataFrame) -> pd.DataFrame:
    """Rows of a frame at the place of some cells."""
    same = np.ones(len(frame), dtype=bool)
    for name in PLACE:
        same &= (frame[name] == members[name].iloc[0]).to_numpy()
    return frame[same]
