"""Are the intervals and tests of a comparison right where the truth is known?

    python benchmarks/inference.py --write        writes benchmarks/inference.md
    python benchmarks/inference.py --speed        measures seconds and memory instead

A comparison (`agl_bench.comparison.statistics`) takes sections as units: intra-batch all folds of a section together,
inter-batch the section that was left out. Here its public functions see invented results whose true difference is
known, simulation after simulation.

*Learned null*: ridge regressions on two blocks of features that are alike in distribution, scored by PCC as a selector
is, on spots drawn anew, over real k-fold splits that share training spots (intra), or with one section left out and a
random 4/5 of the others trained on (inter). `false` is the share of simulations with p ≤ .05 of the sign flip of
sections; `level` is what an exact test with so few outcomes can reach at .05; `coverage` is the share of intervals that
hold 0 and should be .95; `verdict` is the share in which sign flip and interval both see a difference, which is what a
verdict asks for. A rate in brackets lies outside the 95 % binomial region of its level. Where the signal of a block
differs from section to section, one block is truly better on the sections at hand, and the corrected t, which speaks of
those, is right to see it.

*Null*: the difference of a cell is the sum of a section effect, an effect of the seed that is common to all sections,
an effect of the fold, and noise, all normal with mean 0. "Folds" and "cells" are what would come of taking folds, or
folds × seeds, as independent. The folds of this model do not share training spots, for which the corrected t allows.

*Power*: share of simulations with p ≤ .05, and with p ≤ .01, which the first of five comparisons needs after Holm's
correction, for a true difference in units of the standard deviation of a section's difference.

*Six equal selectors*: all pairs by `pairs`, share of simulations in which any pair is called better or worse, and the
share of pairs called equivalent when the true difference is exactly the half-width of the region.

With `--speed`: seconds and memory of the tables of 10,000 cells of 15,000 genes.

In short: sections as units keep their level, where folds or cells as units raise several times as many false alarms.
An effect of the seed that is common to all sections raises those of the sign flip too; the interval allows for it, and
with it the verdict, unless the effect is as large as that of a section and there are many sections: then only more
seeds help, and `cautions` says so where it shows. Left-out sections share training data, so that intervals over four of
them are too narrow. The corrected t is right within sections and far on the safe side for left-out ones.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import measure
import numpy as np
import pandas as pd
from scipy import stats

from agl_bench.bench.cells import CellStore
from agl_bench.comparison import selection
from agl_bench.comparison import statistics as inference
from agl_bench.comparison.gather import Gathered

ALPHA = inference.ALPHA
SEEDS, FOLDS = 3, 5
# PCC; standard deviations of the order that differences between selectors have on small real sections
SECTION, FOLD, NOISE = 0.01, 0.02, 0.03
BASE = "base"
Rows = list[measure.Row]


def cells_of(pcc: np.ndarray, *, evaluation: str, overlap: float, datasets: Sequence[str] = ("d",)) -> pd.DataFrame:
    """A table of cells.

    Args:
        pcc: (datasets, selectors, units, folds, seeds); the first selector is `BASE`.
        evaluation: "intra" names folds "S0.0", "inter" (one fold) "S0".
        overlap: test spots / training spots.
        datasets: their names.
    """
    _, selectors, units, folds, seeds = pcc.shape
    names = [BASE, *(f"s{i:05}" for i in range(1, selectors))]
    labels = [f"S{u}.{f}" if evaluation == "intra" else f"S{u}" for u in range(units) for f in range(folds)]
    axes = [datasets, names, labels, range(seeds)]
    frame = pd.MultiIndex.from_product(axes, names=["dataset", "selector", "fold", "seed"]).to_frame(index=False)
    return frame.assign(
        pcc=pcc.ravel(), evaluation=evaluation, backbone="b", preset="p", tuning="", shuffled=False,
        test_spots=overlap, train_spots=1.0,
    )  # fmt: skip


def against_nothing(difference: np.ndarray, *, evaluation: str = "intra", overlap: float = 0.25) -> pd.DataFrame:
    """`pairs` of each simulation with a baseline of 0; (simulations, units, folds, seeds)."""
    pcc = np.concatenate([np.zeros((1, *difference.shape[1:])), difference])[None]
    cells = cells_of(pcc, evaluation=evaluation, overlap=overlap)
    return inference.pairs(cells, baseline=BASE, resamples=1_000)


def rates(found: pd.DataFrame) -> dict[str, float]:
    """Coverage of 0 and shares of false alarms."""
    outside = (found["low"] > 0) | (found["high"] < 0)
    flipped = found["p"] <= ALPHA
    return {
        "coverage": float(1 - outside.mean()),
        "sign flip": float(flipped.mean()),
        "verdict": float((flipped & outside).mean()),
        "corrected t": float((found["p_corrected"] <= ALPHA).mean()),
    }


def attainable(units: int) -> float:
    """The level of an exact two-sided sign flip at .05."""
    count = 2 ** (units - 1)
    return np.floor(ALPHA * count) / count if units <= inference.EXACT else ALPHA


def marked(rate: float, level: float, simulations: int) -> str:
    """The rate, in brackets outside the binomial region of the level."""
    low, high = stats.binom.ppf([0.025, 0.975], simulations, level) / simulations
    return f"{rate:.3f}" if low <= rate <= high else f"({rate:.3f})"


def null(simulations: int) -> Rows:
    """Rates where nothing differs."""
    rows = []
    for seed, units in product((0.0, 0.004, 0.008), (4, 8, 12, 20)):
        rng = np.random.default_rng([1, units, round(1e3 * seed)])
        made = (
            rng.normal(0, SECTION, (simulations, units, 1, 1))
            + rng.normal(0, seed, (simulations, 1, 1, SEEDS))
            + rng.normal(0, FOLD, (simulations, units, FOLDS, 1))
            + rng.normal(0, NOISE, (simulations, units, FOLDS, SEEDS))
        )
        found = rates(against_nothing(made))
        level = attainable(units)
        folds = inference.sign_flip(made.mean(3).reshape(simulations, -1), resamples=1_000, seed=0)[0]
        cells = stats.ttest_1samp(made.reshape(simulations, -1), 0, axis=1).pvalue
        rows.append(
            {
                "shared seed sd": seed,
                "units": units,
                "coverage": marked(found["coverage"], 0.95, simulations),
                "level": f"{level:.3f}",
                "false: sign flip": marked(found["sign flip"], level, simulations),
                "verdict": f"{found['verdict']:.3f}",
                "corrected t": f"{found['corrected t']:.3f}",
                "folds": f"{(folds <= ALPHA).mean():.3f}",
                "cells": f"{(cells <= ALPHA).mean():.3f}",
            }
        )
    return rows


def learned(simulations: int) -> Rows:
    """Rates where two learners are alike and splits are real."""
    rows = []
    for evaluation, units, section in (
        ("intra", 1, 0.0), ("intra", 4, 0.0), ("intra", 8, 0.0), ("intra", 8, 0.3),
        ("inter", 4, 0.3), ("inter", 8, 0.3), ("inter", 12, 0.3),
    ):  # fmt: skip
        rng = np.random.default_rng([2, units, round(10 * section), evaluation == "inter"])
        most = 50  # simulations in memory
        made = np.concatenate(
            [_learned(rng, min(most, simulations - i), evaluation, units, section) for i in range(0, simulations, most)]
        )
        overlap = 1 / (FOLDS - 1) if evaluation == "intra" else 1 / (0.8 * (units - 1))
        found = rates(against_nothing(made, evaluation=evaluation, overlap=overlap))
        level = attainable(units)
        rows.append(
            {
                "evaluation": evaluation,
                "units": units,
                "section sd of the signal": section,
                "coverage": "–" if units == 1 else marked(found["coverage"], 0.95, simulations),
                "level": f"{level:.3f}",
                "false: sign flip": marked(found["sign flip"], level, simulations),
                "verdict": f"{found['verdict']:.3f}",
                "corrected t": marked(found["corrected t"], ALPHA, simulations),
            }
        )
    return rows


def _learned(rng: np.random.Generator, simulations: int, evaluation: str, units: int, section: float) -> np.ndarray:
    """PCC of ridge on one block of features − that on another like it: (simulations, units, folds, seeds)."""
    spots, width, genes = 60, 6, 5
    x = rng.standard_normal((simulations, 2, units, spots, width))
    strength = np.exp(section * rng.standard_normal((simulations, 2, units)))  # how much each block counts on a section
    weight = rng.standard_normal((simulations, width, genes)) / np.sqrt(2 * width)  # the same of both: none is better
    y = np.einsum("rbusw,rbu,rwg->rusg", x, strength, weight) + rng.standard_normal((simulations, units, spots, genes))
    found = []
    for _ in range(SEEDS):
        if evaluation == "intra":  # the spots of each section dealt to folds anew
            order = rng.permuted(np.tile(np.arange(spots), (simulations, units, 1)), axis=2)[..., None]
            x_dealt = np.take_along_axis(x, order[:, None], 3).reshape(simulations, 2, units, FOLDS, -1, width)
            y_dealt = np.take_along_axis(y, order, 2).reshape(simulations, units, FOLDS, -1, genes)
            found.append(_ridge_pcc(x_dealt, y_dealt[:, None], np.ones((1, 1))))
        else:  # each section left out; of the others a random 4/5 trained on
            found.append(_ridge_pcc(x, y[:, None], rng.random((simulations, 1, units, spots)) < 0.8)[..., None])
    pcc = np.stack(found, -1)
    return pcc[:, 0] - pcc[:, 1]


def _ridge_pcc(x: np.ndarray, y: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean PCC over genes on each part of the spots, of a ridge regression on the other parts.

    Args:
        x: (..., parts, spots, width).
        y: (..., parts, spots, genes).
        used: (..., parts, spots), whether a spot is trained on where its part is not tested.
    """
    weighted = np.swapaxes(x * used[..., None], -1, -2)
    gram, moment = weighted @ x, weighted @ y
    gram, moment = (v.sum(-3, keepdims=True) - v for v in (gram, moment))
    predicted = x @ np.linalg.solve(gram + np.eye(x.shape[-1]), moment)
    a, b = (v - v.mean(-2, keepdims=True) for v in (predicted, y))
    return ((a * b).sum(-2) / np.sqrt((a**2).sum(-2) * (b**2).sum(-2))).mean(-1)


def power(simulations: int) -> Rows:
    """Shares found where something differs."""
    rows = []
    for units in (6, 8, 10, 12, 20):
        rng = np.random.default_rng([3, units])
        unit = rng.standard_normal((simulations, units))
        row: measure.Row = {"units": units, "least p": float(2.0 ** (1 - units))}
        for effect in (0.5, 0.8, 1.0, 1.5, 2.0):
            p, _ = inference.sign_flip(unit + effect, resamples=2_000, seed=0)
            row[f"d = {effect}"] = f"{(p <= ALPHA).mean():.2f}, {(p <= ALPHA / 5).mean():.2f}"
        rows.append(row)
    return rows


def six(simulations: int) -> Rows:
    """Verdicts on six selectors."""
    rows = []
    for units, seed in ((10, 0.0), (20, 0.0), (10, 0.004), (20, 0.004)):
        rng = np.random.default_rng([4, units, round(1e3 * seed)])
        made = (
            rng.normal(0, 0.005, (simulations, 6, units, 1, 1))
            + rng.normal(0, seed, (simulations, 6, 1, 1, SEEDS))
            + rng.normal(0, NOISE / np.sqrt(FOLDS), (simulations, 6, units, 1, SEEDS))
        )
        close = made[:, :2] / 4  # less noise, or nothing would ever be called equivalent
        close[:, 1] += inference.ROPE
        verdicts, at_edge = (
            inference.pairs(
                cells_of(
                    pcc, evaluation="inter", overlap=1 / (units - 1), datasets=[str(i) for i in range(simulations)]
                ),
                resamples=1_000,
            )
            for pcc in (made, close)
        )
        called = verdicts["verdict"].isin(["better", "worse"]).groupby(verdicts["dataset"]).any()
        rows.append(
            {
                "units": units,
                "shared seed sd": seed,
                "any pair called better or worse": marked(called.mean(), ALPHA, simulations),
                "called equivalent at the edge": f"{(at_edge['verdict'] == 'equivalent').mean():.3f}",
            }
        )
    return rows


def speed(cells: int, genes: int) -> Rows:
    """Seconds of each table over so many cells, and the process's peak."""
    selectors, datasets = 10, 10
    units = cells // selectors // datasets
    rng = np.random.default_rng(5)
    folds = max(1, units // SEEDS // 4)
    made = rng.normal(0.2, 0.03, (datasets, selectors, 4, folds, SEEDS))
    frame = cells_of(made, evaluation="intra", overlap=0.25, datasets=[f"d{i}" for i in range(datasets)])
    frame["selected"], frame["seconds"], frame["peak_memory_mb"] = genes // 2, 1.0, 1.0
    frame["key"] = [f"{i:020x}" for i in range(len(frame))]
    rows: Rows = []

    def timed(what: str, function) -> None:  # type: ignore[no-untyped-def]
        peak = measure.Peak(measure.torch.device("cpu"))
        began = time.perf_counter()
        function()
        rows.append({"what": what, "cells": len(frame), "s": time.perf_counter() - began, "peak_MiB": peak.mib()})

    timed("pairs", lambda: inference.pairs(frame))
    timed("pairs with a baseline", lambda: inference.pairs(frame, baseline=BASE))
    timed("ranks", lambda: inference.ranks(frame))
    timed("improvement", lambda: inference.improvement(frame, baseline=BASE))
    timed("cautions", lambda: inference.cautions(frame))
    with tempfile.TemporaryDirectory() as folder:
        store = CellStore(Path(folder))
        _write_tables(store, frame, genes)
        gathered = Gathered(frame, frame.iloc[:0], {}, store)
        place = frame.iloc[0].to_dict()
        timed(f"selection.summary, {genes:,} genes", lambda: selection.summary(gathered))
        timed("selection.overlap of a place, after it", lambda: selection.overlap(gathered, place))
        timed(
            "selection.negative_transfer of a place, after it",
            lambda: selection.negative_transfer(gathered, place, baseline=BASE),
        )
    return rows


def _write_tables(store: CellStore, frame: pd.DataFrame, genes: int) -> None:
    """A gene table per cell. Those of the first dataset are written, the others are links to them."""
    names = np.array([f"GENE{i}" for i in range(genes + 50)])
    first: dict[tuple[str, str, int], Path] = {}
    for row in frame.itertuples():
        path = store.cells / row.key / "genes.parquet"
        path.parent.mkdir()
        unit = (row.selector, row.fold, row.seed)
        if unit in first:
            os.link(first[unit], path)
            continue
        rng = np.random.default_rng([6, int(row.fold.split(".")[0][1:]), int(row.fold.split(".")[1]), row.seed])
        primary = np.zeros(len(names), dtype=bool)
        primary[rng.choice(len(names), 50, replace=False)] = True
        rank = np.full(len(names), -1)
        rank[~primary] = rng.permutation(genes)
        weight = np.random.default_rng([7, len(first)]).random(len(names))
        pd.DataFrame(
            {
                "gene": names, "primary": primary, "rank": rank, "score": -rank.astype(float),
                "weight": np.where(primary, 1.0, weight).astype(np.float32),
                "pearson": np.where(primary, weight, np.nan),
            }
        ).to_parquet(path, index=False)  # fmt: skip
        first[unit] = path


def document(tables: dict[str, Rows], seconds: dict[str, float], options: argparse.Namespace) -> str:
    """The findings as Markdown."""
    here = measure.machine(options.device)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    parts = [
        "# What an interval and a p are worth",
        f"`python benchmarks/inference.py --simulations {options.simulations} --write`",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        f"{here['processor']}, {here['cores']} cores, {here['threads']} threads, device {here['device']}, torch "
        f"{here['torch']}, commit {here['commit'] or 'unknown'}; {options.simulations} simulations of each row, "
        f"{options.simulations // 16} of six selectors ({spent}). {SEEDS} seeds, {FOLDS} folds "
        f"of a section; standard deviation of a section {SECTION}, of a fold {FOLD}, of noise {NOISE}.",
    ]
    for title, rows in tables.items():
        parts += [f"## {title}", measure.table(rows, markdown=True)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--simulations", type=int, default=2_000)
    made.add_argument("--cells", type=int, default=10_000, help="for the speed")
    made.add_argument("--genes", type=int, default=15_000, help="for the speed")
    made.add_argument("--speed", action="store_true", help="measure seconds and memory")
    made.add_argument("--write", action="store_true", help="write benchmarks/inference.md")
    options = measure.options(made, quick={"simulations": 20, "cells": 1_200, "genes": 300, "write": False})
    steps = {
        "Learned null": lambda: learned(options.simulations),
        "Null": lambda: null(options.simulations),
        "Power": lambda: power(options.simulations),
        "Six equal selectors": lambda: six(options.simulations // 16),
    }
    if options.speed:
        measure.report("inference", speed(options.cells, options.genes), options)
        return
    tables, seconds = {}, {}
    for title, step in steps.items():
        began = time.perf_counter()
        tables[title] = step()
        seconds[title] = time.perf_counter() - began
    text = document(tables, seconds, options)
    if options.write:
        path = Path(__file__).with_suffix(".md")
        _, heading, kept = path.read_text(encoding="utf-8").partition("\n## Speed\n") if path.exists() else ("", "", "")
        path.write_text(text + heading + kept, encoding="utf-8")  # what --speed measured stays
    print(text)
    if options.save:
        rows = [{"table": title} | row for title, found in tables.items() for row in found]
        print(f"saved in {measure.save('inference_rates', rows, options.device)}")


if __name__ == "__main__":
    main()
