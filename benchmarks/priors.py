"""Does it matter by which prior auxiliary genes are ranked?

    python benchmarks/priors.py --processes 2 --write         writes benchmarks/priors.md

`hvg_k` takes the first k auxiliary genes by each prior in turn; beside it stand `pgl` (none), `agl` (all), and the two
selectors made of priors, `coexpression` (all, each weighted by its correlation) and `spatial` (as many as have a
pattern). Real sections: preset `clean` with backbone `tiny`, every section left out once, PCC of the test section.
Planted data: the settings of planted.py, trained on two sections and tested on a third; PCC with the noise-free
expression, and of the chosen genes how many help (precision) and how many of those that help are chosen (recall).

Δ are paired differences; intervals are 95 % t-intervals over sections, of the mean of the seeds (real), or over seeds
(planted). They are of single comparisons: of twenty, one is expected to leave out 0 by chance. `shared` is the share of
the chosen genes that the protocol's ranking chooses too.

In short: on the real sections Moran's I, co-expression and `spatial` are ahead of 500 random genes by .012 to .016 (of
`spatial`, which takes 883, the number has its part), and no variability ranking is, the protocol's least of all; but
these are four sections of one donor that share training data, for which such intervals are too narrow (inference.md),
and with eleven comparisons of them to random genes none of the three passes Holm's correction. It is a hint to be
tested on more donors, no ranking of priors. The planted data warn against taking it for more: there, artefacts of the
picture have patterns too, and where genes follow them (`harmful`), pattern and abundance lead to the genes that harm,
while variability is right because it was planted so. In `misleading`, where variability says nothing, co-expression
alone finds helpful genes (precision .40 for .18 by chance), and no prior can be told from random genes by its PCC. Nor
can one in `helpful` and `null`, but for `detection` and the selector `coexpression`, which are worse than random genes
in `helpful`."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measure
import planted
import torch

from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, fingerprints
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins

PRIORS = ("protocol", "cell_ranger", "seurat_v3", "moran", "mean", "detection", "coexpression", "random")
NONE, DEFAULT, CHANCE = "pgl", "hvg_k, protocol", "hvg_k, random"
SCORE = "pcc_gene_mean_section_mean"
QUICK = ("synthetic.sections=2", "synthetic.spots=40", "synthetic.patch_px=16", "protocol.primary_genes=10")

Job = tuple[str, Path, str, int, int, tuple[str, ...]]  # dataset, data folder, regime, seed, k, settings


def lines_of(k: int, *others: str) -> dict[str, list[str]]:
    """Line of a table -> selector, then its settings."""
    hvg = {f"hvg_k, {prior}": ["hvg_k", f"hvg_k.k={k}", f"hvg_k.prior={prior}"] for prior in PRIORS}
    return {NONE: [NONE], "agl": ["agl"], **hvg, **{name: [name] for name in ("coexpression", "spatial", *others)}}


@functools.cache
def bench_of(root: Path) -> Bench:
    """One for each process, so that sections are prepared once."""
    return Bench(Plugins.discover(), root, torch.device("cpu"))


def real_seed(job: Job) -> list[measure.Row]:
    """Every line on every fold of real sections, with one seed."""
    dataset, root, _, seed, k, settings = job
    bench, rows = bench_of(root), []
    first: dict[str, torch.Tensor] = {}
    campaigns = {
        line: Campaign.of(
            bench.plugins,
            selectors=[selector],
            datasets=[dataset],
            evaluation=["inter"],
            seeds=[str(seed)],
            assignments=[*own, *settings],
        )
        for line, (selector, *own) in lines_of(k).items()
    }
    known = fingerprints(campaigns[NONE], bench.plugins, root)
    cells = {line: c.cells(bench.plugins, root, device="cpu", fingerprint=known) for line, c in campaigns.items()}
    for fold in range(len(cells[NONE])):
        for line, of_line in cells.items():
            spec, plan = of_line[fold]
            began = time.perf_counter()
            setting = bench.setting(spec, plan)
            built = time.perf_counter()
            selector = bench.build(spec, setting)[1]
            built = time.perf_counter() - built
            *_, result = bench.train(spec, plan, keep="nothing")
            assert isinstance(result, Result)
            used = torch.ones_like(selector.is_primary) if selector.used is None else selector.used
            chosen = used & ~selector.is_primary
            if line == DEFAULT:
                first[spec.fold] = chosen
            rows.append(
                {
                    "unit": spec.fold,
                    "seed": seed,
                    "line": line,
                    "score": float(result.scores[SCORE]),
                    "k": int(chosen.sum()),
                    "chosen": chosen,
                    "build": built,
                    "seconds": time.perf_counter() - began,
                }
            )
    for row in rows:
        both = row.pop("chosen") & first[row["unit"]]
        row["shared"] = int(both.sum()) / max(row["k"], 1)
    return rows


def planted_seed(job: Job) -> list[measure.Row]:
    """Every line on one generated dataset."""
    _, _, regime, seed, k, settings = job
    bench, rows = bench_of(planted.NOWHERE), []
    for line, (selector, *own) in lines_of(k, "oracle").items():
        campaign = Campaign.of(
            bench.plugins,
            selectors=[selector],
            datasets=["synthetic"],
            evaluation=["inter"],
            fold=[planted.TESTED[1]],
            seeds=[str(seed)],
            assignments=[*settings, f"synthetic.regime={regime}", f"synthetic.data_seed={seed}", *own],
        )
        ((spec, plan),) = campaign.cells(bench.plugins, planted.NOWHERE, device="cpu", fingerprint={})
        found = planted.trained(bench, spec, plan)
        rows.append({"regime": regime, "unit": seed, "seed": seed, "line": line, "score": found["truth"]} | found)
    return rows


def table(rows: Sequence[measure.Row], means: Mapping[str, str]) -> list[measure.Row]:
    """A row for each line: score, differences to none and to chance, and means of the columns with their format."""
    by_line: dict[str, dict[object, list[float]]] = {}
    for row in rows:
        by_line.setdefault(row["line"], {}).setdefault(row["unit"], []).append(row["score"])
    units = {line: {u: statistics.fmean(s) for u, s in of.items()} for line, of in by_line.items()}
    found = []
    for line, of in units.items():
        own: measure.Row = {"selector": line, "PCC": f"{statistics.fmean(of.values()):.3f}"}
        for other, title in ((NONE, "Δ pgl"), (CHANCE, "Δ random")):
            mean, half = planted.interval([of[u] - units[other][u] for u in of])
            own[title] = "–" if line == other else f"{mean:+.3f} ± {half:.3f}"
        for name, form in means.items():
            values = [row[name] for row in rows if row["line"] == line and name in row]
            own[name.removeprefix("selection_")] = f"{statistics.fmean(values):{form}}" if values else "–"
        found.append(own)
    return found


def document(real: Sequence[measure.Row], generated: Sequence[measure.Row], options: argparse.Namespace) -> str:
    """The findings as Markdown."""
    here = measure.machine(options.device)
    asked = f"--processes {options.processes} --seeds {options.seeds} --planted-seeds {options.planted_seeds} --write"
    parts = [
        "# Ranking priors",
        f"`python benchmarks/priors.py {asked}`",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        f"{here['processor']}, {here['cores']} cores, {options.processes} processes, {here['threads']} threads, "
        f"device {here['device']}, torch {here['torch']}, commit {here['commit'] or 'unknown'}: "
        f"{len(real) + len(generated)} cells, {options.took:.0f} s in all, {planted.cpu_seconds():.0f} s of CPU time.",
        f"## {options.real}, k = {options.k}: {len({row['unit'] for row in real})} sections, {options.seeds} seeds",
        "`build`: seconds of the selector's constructor, with the scores that it is the first of a fold to ask for; "
        "`seconds`: of a whole cell.",
        measure.table(table(real, {"k": ",.0f", "shared": ".0%", "build": ".2f", "seconds": ".1f"}), markdown=True),
    ]
    for regime in dict.fromkeys(row["regime"] for row in generated):
        of = [row for row in generated if row["regime"] == regime]
        parts += [f"## Planted, {regime}, k = {options.planted_k}: {options.planted_seeds} seeds"]
        columns = {"k": ".0f", "selection_precision": ".2f", "selection_recall": ".2f"}
        parts += [measure.table(table(of, columns), markdown=True)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--real", default="her2st", help="dataset of real sections")
    made.add_argument("--data", type=Path, default=Path(os.environ.get("AGL_BENCH_DATA", "data")))
    made.add_argument("--k", type=int, default=500)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--regimes", default=",".join(planted.REGIMES))
    made.add_argument("--planted-k", type=int, default=planted.HELPFUL)
    made.add_argument("--planted-seeds", type=int, default=5)
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--write", action="store_true", help="write benchmarks/priors.md")
    quick = {"real": "synthetic", "k": 20, "seeds": 1, "regimes": "misleading", "planted_seeds": 2, "write": False}
    options = measure.options(made, quick=quick)
    small = {"protocol.epochs": 2, "synthetic.spots": 60, "tiny.channels": 4} if options.quick else {}
    settings = tuple(f"{k}={v}" for k, v in (planted.SETTINGS | small).items())
    own = (*QUICK, *(f"{k}={v}" for k, v in small.items() if "spots" not in k)) if options.quick else ()
    torch.set_num_threads(1)
    real = [(options.real, options.data, "", s, options.k, own) for s in range(options.seeds)]
    generated = [
        ("synthetic", planted.NOWHERE, regime, s, options.planted_k, settings)
        for s in range(options.planted_seeds)
        for regime in options.regimes.split(",")
    ]
    began = time.perf_counter()
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), initializer=measure.start, initargs=("cpu", 1)
    ) as pool:
        of_real, of_planted = pool.map(real_seed, real), pool.map(planted_seed, generated)
        rows = [[row for found in part for row in found] for part in (of_real, of_planted)]
    options.took = time.perf_counter() - began
    text = document(*rows, options)
    measure.publish("priors", text, [*rows[0], *rows[1]], options)


if __name__ == "__main__":
    main()
