"""What each leak is worth: test PCC under `clean` with one switch turned to what `paper` does, against `clean`.

    python benchmarks/leaks.py --work FOLDER --processes 2

Every variant is an ordinary `agl-bench run` over the same sections, selectors and seeds; finished cells are kept in
FOLDER, so that a second call costs nothing. A unit is a (section, seed), its value the mean over its folds. Differences
to `clean` are paired by unit; intervals are 95 % percentiles of a bootstrap that draws sections, then seeds within
them. Sections are few and of one donor where nothing else is said: the intervals speak of these sections.

`shared validation` takes the outer loss from the validation spots, which are then as many as both sets before, so that
the number of training spots stays; a selector that learns nothing shows what the other split is worth by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import numpy as np

SCORE = "pcc_gene_mean_section_mean"
DRAWS = 10_000
RANKING = ["protocol.genes_from=all"]
RANDOM = ["protocol.fold_shape=random", "protocol.buffer_um=0"]
SHARED = ["protocol.held_out_share=0", "protocol.validation_share=0.35"]
VARIANTS = {
    "clean": [],
    "ranking on all spots": RANKING,
    "random folds": RANDOM,
    "shared validation": SHARED,
    "all three": [*RANKING, *RANDOM, *SHARED],
}
QUICK = ["synthetic.spots=40", "synthetic.patch_px=16", "tiny.patch_px=16", "protocol.primary_genes=10"]


def run(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """The lines of a variant's table, from the command as a user gives it."""
    target = folder / f"{name.replace(' ', '_')}.json"
    words = [
        *("run", "--selectors", options.selectors, "--datasets", options.datasets, "--backbone", options.backbone),
        *("--evaluation", options.evaluation, "--seeds", options.seeds, "--preset", options.preset),
        *("--work", str(folder / "work"), "--json", str(target), "--tracking", "none", "--device", options.device.type),
        *(word for setting in (*options.set, *VARIANTS[name]) for word in ("--set", setting)),
    ]
    done = subprocess.run([sys.executable, "-m", "agl_bench", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variant '{name}' failed: {done.stderr.strip()}")
    lines: list[dict[str, object]] = json.loads(target.read_text(encoding="utf-8"))["lines"]
    return lines


def units(line: dict[str, object]) -> dict[tuple[str, int], float]:
    """(section, seed) -> mean over its folds. The fold C2.0 is of section C2; across sections C2 is the one tested."""
    values: dict[tuple[str, int], list[float]] = {}
    for cell in line["cells"]:  # type: ignore[attr-defined]
        values.setdefault((cell["fold"].rpartition(".")[0] or cell["fold"], cell["seed"]), []).append(
            cell["scores"][SCORE]
        )
    return {unit: float(np.mean(found)) for unit, found in values.items()}


def interval(values: dict[tuple[str, int], float]) -> tuple[float, float]:
    """95 % of the means of draws of sections, then of seeds within each."""
    sections = sorted({section for section, _ in values})
    by_section = [np.array([v for (s, _), v in values.items() if s == section]) for section in sections]
    rng = np.random.default_rng(0)
    means = np.zeros(DRAWS)
    for _ in sections:
        chosen = rng.integers(len(sections), size=DRAWS)
        for index, own in enumerate(by_section):
            here = np.flatnonzero(chosen == index)
            means[here] += own[rng.integers(len(own), size=(len(here), len(own)))].mean(1) / len(sections)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each evaluation, selector and variant."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.processes) as pool:
            found = dict(zip(VARIANTS, pool.map(lambda name: run(name, options, folder), VARIANTS), strict=True))
    table = []
    for base in found["clean"]:
        place = [base[key] for key in ("evaluation", "selector")]
        clean = units(base)
        for name, lines in found.items():
            line = next(other for other in lines if [other[key] for key in ("evaluation", "selector")] == place)
            here = units(line)
            difference = {unit: here[unit] - clean[unit] for unit in clean}
            low, high = interval(difference)
            table.append(
                {
                    "evaluation": place[0],
                    "selector": place[1],
                    "variant": name,
                    "units": len(here),
                    "pcc": f"{np.mean(list(here.values())):.3f}",
                    "difference": "" if name == "clean" else f"{np.mean(list(difference.values())):+.3f}",
                    "interval": "" if name == "clean" else f"{low:+.3f} to {high:+.3f}",
                }
            )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, run, report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--selectors", default="pgl,hvg_k,dkgsb")
    parser.add_argument("--datasets", default="her2st")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--evaluation", default="intra,inter")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--preset", default="clean")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="for every variant")
    parser.add_argument("--work", type=Path, help="folder of finished cells; default: a temporary one")
    parser.add_argument("--processes", type=int, default=1, help="variants at a time")
    quick = {"selectors": "pgl,hvg_k", "datasets": "synthetic", "evaluation": "inter", "seeds": "0", "preset": "smoke"}
    options = measure.options(parser, quick=quick | {"set": QUICK})
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads or max(1, (os.cpu_count() or 1) // options.processes)))
    measure.report("leaks", rows(options), options)


if __name__ == "__main__":
    main()
