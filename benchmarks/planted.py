"""Does a run find what is planted, and who finds it?

    python benchmarks/planted.py --processes 2 --write        writes benchmarks/planted.md

`synthetic` in its four regimes, each with several seeds that change tissue, genes, weights and batches. Everything is
trained on two sections and tested on a third: a sweep of fixed prefixes of the variability ranking (k = 0 is `pgl`,
k = all is `agl`), the oracle, k random genes, and the selectors that learn. Scores are PCCs of the prediction with the
noise-free expression (truth) and with the measured one (test), mean over primary genes. Intervals are 95 % t-intervals
over seeds, of differences within a seed.

A claim of the design is `met` if the interval of the difference lies on its side of 0, `open` if it holds 0, and
`NOT MET` if it lies on the other side; "≤" is met unless the interval lies above 0. The optimum of the sweep is met if
its best k is the point nearest to the planted k* or one beside it, and open if it is farther away, but no better than
that point by more than the interval.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measure
import numpy as np
import torch
from scipy import stats

from agl_bench.bench.planted import best_cutoff, selection_scores
from agl_bench.bench.run import Bench
from agl_bench.bench.spec import Campaign, RunSpec, make_dataset
from agl_bench.data.folds import FoldPlan
from agl_bench.maths import metrics
from agl_bench.registry.plugins import Plugins
from agl_bench.training.evaluate import predict
from agl_bench.training.trainer import Trainer

NOWHERE = Path("/does/not/exist")  # generated data reads no file
TESTED = ("S1", "D1")  # section, and the donor that is its fold
REGIMES = ("helpful", "harmful", "null", "misleading")
HELPFUL = 80
SETTINGS = {
    "synthetic.sections": 3,
    "synthetic.spots": 300,
    "synthetic.patch_px": 16,
    "synthetic.markers": 20,
    "synthetic.helpful_genes": HELPFUL,
    "synthetic.harmful_genes": 300,
    "synthetic.useless_genes": 60,
    "protocol.primary_genes": 20,
    "protocol.buffer_um": 0,
    "protocol.epochs": 40,
    "protocol.learning_rate": 0.015,
    "protocol.outer_every": 4,  # few passes for the outer loss, but several steps in each
    "protocol.outer_batches": 2,
    "tiny.patch_px": 16,
    "tiny.channels": 16,
    "tiny.width": 4,  # narrow: with a wide representation harmful genes cost little
}
SWEEP = (20, 40, 80, 160, 320)  # beside 0 and all
NONE, ALL = "pgl, k = 0", "agl, k = all"
LEARNT = ("dkgsb", "amal")

Job = tuple[str, int, tuple[int, ...], dict[str, object]]


def lines_of(ks: Sequence[int]) -> dict[str, tuple[str, dict[str, object]]]:
    """Line of the table -> selector and settings."""
    sweep = {f"hvg_k, k = {k}": ("hvg_k", {"k": k}) for k in ks}
    others = {"oracle": ("oracle", {}), f"random_k, k = {HELPFUL}": ("random_k", {"k": HELPFUL})}
    return {NONE: ("pgl", {}), **sweep, ALL: ("agl", {}), **others, **{name: (name, {}) for name in LEARNT}}  # type: ignore[dict-item]


def seed_of_a_regime(job: Job) -> list[measure.Row]:
    """Every line on one fold of one generated dataset."""
    regime, seed, ks, settings = job
    planted = {"synthetic.regime": regime, "synthetic.data_seed": seed}
    plugins = Plugins.discover()
    bench = Bench(plugins, NOWHERE, torch.device("cpu"))
    rows = []
    for line, (selector, chosen) in lines_of(ks).items():
        own = {f"{selector}.{k}": v for k, v in chosen.items()}
        campaign = Campaign.of(
            plugins,
            selectors=[selector],
            datasets=["synthetic"],
            evaluation=["inter"],
            fold=[TESTED[1]],
            seeds=[str(seed)],
            assignments=[f"{k}={v}" for k, v in (settings | planted | own).items()],
        )
        ((spec, plan),) = campaign.cells(plugins, NOWHERE, device="cpu", fingerprint={})
        genes = bench.setting(spec, plan).genes
        if selector == "hvg_k" and int(str(chosen["k"])) >= genes.auxiliary_count:
            continue  # that is all of them
        rows.append({"regime": regime, "seed": seed, "line": line} | trained(bench, spec, plan))
    return rows


def trained(bench: Bench, spec: RunSpec, plan: FoldPlan) -> measure.Row:
    """Train one cell and compare it with the measured and with the noise-free expression."""
    began = time.perf_counter()
    setting = bench.setting(spec, plan)
    model, selector = bench.build(spec, setting)
    trainer = Trainer(model, selector, setting.development, setting.rows, setting.genes, spec.protocol, seed=spec.seed)
    records = list(trainer)
    columns = setting.genes.primary.nonzero().squeeze(1)
    prediction = predict(model, setting.test, torch.arange(len(setting.test)), columns)
    dataset = make_dataset(bench.plugins, spec.dataset)
    position = {name: column for column, name in enumerate(dataset.truth(NOWHERE) or {})}
    noise_free = dataset.log_mean(NOWHERE, TESTED[0])  # type: ignore[attr-defined]
    assert len(noise_free) == len(setting.test), "the fold is the whole section, in order"
    truth = torch.from_numpy(noise_free[:, [position[setting.genes.names[c]] for c in columns.tolist()]])
    utility = bench.truth(spec.dataset, setting.genes)
    assert utility is not None
    return {
        "truth": float(metrics.pearson(prediction, truth).nanmean()),
        "test": float(metrics.pearson(prediction, setting.test.expression_of(columns=columns)).nanmean()),
        "k": records[trainer.fit.best_epoch].selected,
        "planted": best_cutoff(setting.genes, utility),
        **selection_scores(setting.genes, utility, trainer.fit.effective_weights),
        "seconds": time.perf_counter() - began,
    }


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % t-interval; infinite for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


class Regime:
    """What was found on one regime."""

    def __init__(self, name: str, rows: Sequence[measure.Row]) -> None:
        self.name = name
        self.rows = [row for row in rows if row["regime"] == name]
        self.lines = list(dict.fromkeys(row["line"] for row in self.rows))
        self.planted = [row["planted"] for row in self._of(NONE)]

    def _of(self, line: str) -> list[measure.Row]:
        return sorted((row for row in self.rows if row["line"] == line), key=lambda row: row["seed"])

    def difference(self, line: str, other: str) -> tuple[float, float]:
        """Truth PCC of `line` minus that of `other`: mean and half of the interval."""
        pairs = zip(self._of(line), self._of(other), strict=True)
        return interval([one["truth"] - two["truth"] for one, two in pairs])

    def table(self) -> list[measure.Row]:
        """One row for each line."""
        found = []
        for line in self.lines:
            rows = self._of(line)
            mean, half = self.difference(line, NONE)
            regret = self.difference("oracle", line)[0]
            row: measure.Row = {"selector": line}
            row |= {name: f"{statistics.fmean(r[name] for r in rows):.3f}" for name in ("truth", "test")}
            row["Δ pgl (truth)"] = "–" if line == NONE else f"{mean:+.3f} ± {half:.3f}"
            row["regret"] = f"{regret:+.3f}"
            row["k"] = f"{statistics.fmean(r['k'] for r in rows):.0f}"
            for name, form in (("k_minus_planted", "+.0f"), ("precision", ".2f"), ("recall", ".2f")):
                values = [r[f"selection_{name}"] for r in rows if f"selection_{name}" in r]
                row[name.replace("k_minus_planted", "k − k*")] = f"{statistics.fmean(values):{form}}" if values else "–"
            found.append(row | {"seconds": f"{statistics.fmean(r['seconds'] for r in rows):.1f}"})
        return found

    def claims(self) -> list[measure.Row]:
        """What the design promises, and whether it is so."""
        found = [self._optimum()]
        if self.name == "helpful":
            found += [self._above(ALL, NONE), self._above("oracle", NONE), self._not_above(ALL, "oracle")]
        elif self.name == "null":
            found += [self._not_above(line, NONE) for line in self.lines if line not in (NONE, "oracle")]
        elif self.name == "harmful":
            found += [self._above(NONE, ALL), self._above("oracle", NONE)]
        else:
            found += [self._above("oracle", NONE)]
            found += [self._not_above(line, NONE) for line in self.lines if line.startswith("hvg_k")]
        return found

    def _optimum(self) -> measure.Row:
        sweep = [line for line in self.lines if line in (NONE, ALL) or line.startswith("hvg_k")]
        ks = [round(statistics.fmean(row["k"] for row in self._of(line))) for line in sweep]
        best = int(np.argmax([statistics.fmean(row["truth"] for row in self._of(line)) for line in sweep]))
        middle = statistics.median(self.planted)
        nearest = int(np.argmin([abs(math.log1p(k) - math.log1p(middle)) for k in ks]))
        mean, half = self.difference(sweep[best], sweep[nearest])
        verdict = "met" if abs(best - nearest) <= 1 else "open" if mean <= half else "NOT MET"
        return {
            "regime": self.name,
            "claim": f"best k of the sweep is at k* = {middle:g} ({min(self.planted)} to {max(self.planted)})",
            "found": f"k = {ks[best]}, {mean:+.3f} ± {half:.3f} to k = {ks[nearest]}",
            "verdict": verdict,
        }

    def _above(self, line: str, other: str) -> measure.Row:
        mean, half = self.difference(line, other)
        verdict = "met" if mean > half else "NOT MET" if mean < -half else "open"
        return self._row(f"{line} > {other}", mean, half, verdict)

    def _not_above(self, line: str, other: str) -> measure.Row:
        mean, half = self.difference(line, other)
        return self._row(f"{line} ≤ {other}", mean, half, "met" if mean <= half else "NOT MET")

    def _row(self, claim: str, mean: float, half: float, verdict: str) -> measure.Row:
        found = {"found": f"{mean:+.3f} ± {half:.3f}", "verdict": verdict}
        return {"regime": self.name, "claim": claim} | found


def document(rows: Sequence[measure.Row], seconds: float, options: argparse.Namespace) -> str:
    """The findings as Markdown."""
    here = measure.machine(options.device)
    regimes = [Regime(name, rows) for name in dict.fromkeys(row["regime"] for row in rows)]
    claims = [claim for regime in regimes for claim in regime.claims()]
    count = {word: sum(claim["verdict"] == word for claim in claims) for word in ("met", "open", "NOT MET")}
    parts = [
        "# Planted truth",
        f"`python benchmarks/planted.py --processes {options.processes} --seeds {options.seeds} --write`",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        f"{here['processor']}, {here['cores']} cores, {options.processes} processes, {here['threads']} threads, "
        f"device {here['device']}, torch {here['torch']}, commit {here['commit'] or 'unknown'}: {len(rows)} cells, "
        f"{options.seeds} seeds, {seconds:.0f} s in all, {cpu_seconds():.0f} s of CPU time. Settings: "
        + ", ".join(f"{k}={v}" for k, v in options.settings.items())
        + ".",
        "## Claims of the design",
        f"{count['met']} met, {count['open']} open, {count['NOT MET']} not met.",
        measure.table(claims, markdown=True),
    ]
    for regime in regimes:
        parts += [f"## Regime {regime.name}: k* {', '.join(map(str, regime.planted))}"]
        parts += [measure.table(regime.table(), markdown=True)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--seeds", type=int, default=7)
    made.add_argument("--regimes", default=",".join(REGIMES))
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--write", action="store_true", help="write benchmarks/planted.md")
    quick = {"regimes": "null,harmful", "seeds": 2, "write": False}
    options = measure.options(made, quick=quick)
    small = {"protocol.epochs": 2, "synthetic.spots": 60, "tiny.channels": 4} if options.quick else {}
    options.settings = SETTINGS | small
    ks = SWEEP[2:3] if options.quick else SWEEP
    torch.set_num_threads(1)
    jobs = [(r, s, ks, options.settings) for s in range(options.seeds) for r in options.regimes.split(",")]
    began = time.perf_counter()
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), initializer=measure.start, initargs=("cpu", 1)
    ) as pool:
        rows = [row for found in pool.map(seed_of_a_regime, jobs) for row in found]
    text = document(rows, time.perf_counter() - began, options)
    measure.publish("planted", text, rows, options)


if __name__ == "__main__":
    main()
