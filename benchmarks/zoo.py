"""Every selector that comes with agl-bench: what an epoch costs, how it does where the answer is known, and where not.

    python benchmarks/zoo.py --processes 2 --write            writes benchmarks/zoo.md

Cost: seconds of an epoch (outer pass where one is due, a pass over the training spots, validation) on planted tissue
with 15,000 genes and `tiny`, in units of `agl`, medians of epochs in turn, as benchmarks/speed_epoch.py measures them.

Planted: PCC with the noise-free expression, difference to `pgl` with its 95 % t-interval over seeds, in the regimes of
`synthetic` as benchmarks/planted.py trains them. Selectors with a setting k take 80 genes, which in `harmful` and
`misleading` is about the number that help: more than a user knows.

Real: test PCC on her2st across sections (preset clean, `tiny`), difference to `pgl`, mean ± standard deviation over
folds and seeds; four sections of one donor, so that nothing can be concluded from it but that everything runs. `genes`:
auxiliary genes with more than half the weight of a primary one there.

But for k, all at the default settings of each selector: tuning it would do more for some than for others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measure
import planted
import speed_epoch
import torch

from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, fingerprints
from agl_bench.bench.spec import Campaign
from agl_bench.interfaces.tunable import tunables
from agl_bench.registry.plugins import Plugins

OURS = "agl-bench "  # how the provider of what comes with agl-bench begins
BASE = "pgl"
QUICK = {
    "genes": 120,
    "spots": 60,
    "set": ["protocol.batch_size=16", "synthetic.patch_px=32"],
    "seeds": 2,
    "regimes": "harmful",
    "selectors": ["agl", "hvg_k", "oracle"],
    "real": "",
    "write": False,
}


def selectors(plugins: Plugins) -> list[str]:
    """All that come with agl-bench, `pgl` first."""
    return [e.name for e in plugins.entries() if e.kind == "selector" and e.provider.startswith(OURS)]


def is_control(name: str, plugins: Plugins) -> bool:
    """Whether a selector needs to know the truth."""
    return bool(plugins.entry(name, "selector").load().is_control)  # type: ignore[attr-defined]


Job = tuple[str, int, tuple[str, ...], dict[str, object]]


def on_planted(job: Job) -> list[measure.Row]:
    """Every selector on one generated dataset."""
    regime, seed, names, settings = job
    plugins = Plugins.discover()
    bench = Bench(plugins, planted.NOWHERE, torch.device("cpu"))
    rows = []
    for name in names:
        has_k = "k" in tunables(plugins.entry(name, "selector").load())
        own = {f"{name}.k": planted.HELPFUL} if has_k else {}
        given = settings | {"synthetic.regime": regime, "synthetic.data_seed": seed} | own
        campaign = Campaign.of(
            plugins,
            selectors=[name],
            datasets=["synthetic"],
            evaluation=["inter"],
            fold=[planted.TESTED[1]],
            seeds=[str(seed)],
            assignments=[f"{k}={v}" for k, v in given.items()],
        )
        ((spec, plan),) = campaign.cells(plugins, planted.NOWHERE, device="cpu", fingerprint={})
        rows.append({"regime": regime, "seed": seed, "line": name} | planted.trained(bench, spec, plan))
    return rows


def on_sections(job: tuple[str, int, tuple[str, ...], Path]) -> list[measure.Row]:
    """Some selectors on the folds of a real dataset, with one seed."""
    dataset, seed, names, root = job
    plugins = Plugins.discover()
    campaign = Campaign.of(plugins, selectors=list(names), datasets=[dataset], evaluation=["inter"], seeds=[str(seed)])
    known = fingerprints(campaign, plugins, root, None)
    rows = []
    bench = Bench(plugins, root, torch.device("cpu"))
    for spec, plan in campaign.cells(plugins, root, device="cpu", fingerprint=known):
        *_, result = bench.train(spec, plan, keep="nothing")
        assert isinstance(result, Result)
        auxiliary = result.genes[~result.genes["primary"]]
        rows.append(
            {
                "line": spec.selector.name,
                "seed": seed,
                "fold": spec.fold,
                "pcc": result.scores["pcc_gene_mean_section_mean"],
                "k": int((auxiliary["weight"] > 0.5).sum()),
                "seconds": result.cost["seconds"],
            }
        )
    return rows


def table(
    names: Sequence[str], cost: Sequence[measure.Row], truth: Sequence[measure.Row], real: Sequence[measure.Row]
) -> list[measure.Row]:
    """One row for each selector."""
    ratio = {row["selector"]: row["ratio"] for row in cost}
    regimes = {name: planted.Regime(name, truth) for name in dict.fromkeys(row["regime"] for row in truth)}
    base = {(row["seed"], row["fold"]): row["pcc"] for row in real if row["line"] == BASE}
    found = []
    for name in names:
        row: measure.Row = {"selector": name, "epoch / agl": f"{ratio[name]:.2f}"}
        for regime, seen in regimes.items():
            mean, half = seen.difference(name, BASE)
            row[f"{regime} Δ pgl"] = "–" if name == BASE else f"{mean:+.3f} ± {half:.3f}"
        here = [r for r in real if r["line"] == name]
        if here and name == BASE:
            row["her2st"] = f"PCC {statistics.fmean(base.values()):.3f}"
        elif here:
            apart = [r["pcc"] - base[r["seed"], r["fold"]] for r in here]
            spread = f" ± {statistics.stdev(apart):.3f}" if len(apart) > 1 else ""
            row["her2st"] = f"{statistics.fmean(apart):+.3f}{spread}"
        if here:
            row["genes"] = f"{statistics.fmean(r['k'] for r in here):,.0f}"
        found.append(row)
    return found


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__, repeats=5)
    made.add_argument("--selectors", nargs="+", help="[default: all that come with agl-bench]")
    made.add_argument("--genes", type=int, default=15_000, help="of the tissue that costs are measured on")
    made.add_argument("--spots", type=int, default=300, help="likewise, of each of its three sections")
    made.add_argument("--set", nargs="+", default=[], metavar="NAME.KEY=VALUE", help="likewise, as of agl-bench run")
    made.add_argument("--seeds", type=int, default=5, help="of planted tissue")
    made.add_argument("--regimes", default=",".join(planted.REGIMES))
    made.add_argument("--real", default="her2st", help="a dataset; empty = none")
    made.add_argument("--real-seeds", type=int, default=1)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("AGL_BENCH_DATA", "data")))
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--write", action="store_true", help="write benchmarks/zoo.md")
    options = measure.options(made, quick=QUICK)
    plugins = Plugins.discover()
    names = list(dict.fromkeys([BASE, *(options.selectors or selectors(plugins))]))
    began = time.perf_counter()
    vars(options).update({"preset": "clean", "backbone": "tiny", "evaluation": "inter", "reference": None})
    timed = argparse.Namespace(**(vars(options) | {"selectors": names}))
    cost = speed_epoch.of_dataset("synthetic", plugins, timed)

    small = {"protocol.epochs": 2, "synthetic.spots": 60, "tiny.channels": 4} if options.quick else {}
    settings = planted.SETTINGS | small
    torch.set_num_threads(1)
    methods = tuple(name for name in names if not is_control(name, plugins))
    seeds = range(options.seeds)
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), initializer=measure.start, initargs=("cpu", 1)
    ) as pool:
        jobs = [(r, s, tuple(names), settings) for s in seeds for r in options.regimes.split(",")]
        truth = [row for found in pool.map(on_planted, jobs) for row in found]
        shares = [methods[i :: options.processes] for i in range(options.processes)]
        places = [
            (options.real, seed, share, options.data)
            for seed in range(options.real_seeds)
            for share in shares
            if options.real and share
        ]
        real = [row for found in pool.map(on_sections, places) for row in found]

    here = measure.machine(options.device)
    given = "" if options.real_seeds == 1 else f" --real-seeds {options.real_seeds}"
    text = "\n\n".join(
        [
            "# The zoo",
            f"`python benchmarks/zoo.py --processes {options.processes}{given} --write`",
            (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
            f"{here['processor']}, {here['cores']} cores, {here['threads']} threads, device {here['device']}, torch "
            f"{here['torch']}, commit {here['commit'] or 'unknown'}: {options.repeats} epochs for each cost, "
            f"{options.seeds} seeds of planted tissue, {options.real_seeds} of {options.real or 'nothing'}; "
            f"{time.perf_counter() - began:.0f} s in all.",
            measure.table(table(names, cost, truth, real), markdown=True),
        ]
    )
    measure.publish("zoo", text, [*cost, *truth, *real], options)


if __name__ == "__main__":
    main()
