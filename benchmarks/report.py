"""The report of ten thousand cells: time and memory, with small gene tables and with 15,000 genes in each cell.

    python benchmarks/report.py
    python benchmarks/report.py --cells 2000 --genes 15000

A work folder is made up: 5 datasets, intra- and inter-batch, ten selectors, and as many seeds as the number of cells
takes. Scores, weights and courses are drawn at random. Each cell has a `result.json` of its own; gene tables are drawn
for each selector, dataset and fold once, and further seeds link to the same file, so that the folder fits on a disk:
they are read and decoded for every cell all the same. Then `agl-bench report` runs in a process of its own.

    write_s     to make up the folder: no part of a report
    gather_s    to read what `result.json` says of every cell
    report_s    all of it: gathering, statistics, selections, figures, tables and page
    cpu_s       processor time of that: less than report_s where others use the machine
    peak_MiB    most resident memory of the process; base_MiB of it before any cell is read
    page_MiB    of report.html
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch

from agl_bench.bench.finished import DIGEST, FORMAT, Files
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.digests import file_digest, signed
from agl_bench.registry.plugins import Plugins

DATASETS, FOLDS = 5, {"intra": [f"S{s}.{i}" for s in range(4) for i in range(4)], "inter": [f"S{s}" for s in range(4)]}
SELECTORS = (
    "pgl",
    "agl",
    "random_k",
    "hvg_k",
    "dkgsb",
    "amal",
    "hvg_k 100",
    "hvg_k 1000",
    "random_k 100",
    "dkgsb slow",
)
EPOCHS = 40
QUICK = {"cells": 400, "genes": [60], "primary": 5}


def gene_table(genes: int, primary: int, axis: int, rng: np.random.Generator) -> pd.DataFrame:
    """As `Result.genes`; genes and their ranks are those of the axis."""
    own = np.random.default_rng(axis)
    is_primary = np.zeros(genes, dtype=bool)
    is_primary[own.choice(genes, primary, replace=False)] = True
    rank = np.full(genes, -1)
    rank[~is_primary] = own.permutation(genes - primary)
    table = pd.DataFrame(
        {
            "gene": [f"GENE{i}" for i in range(genes)],
            "primary": is_primary,
            "rank": rank,
            "score": -rank.astype(float),
            "mean": own.random(genes).astype(np.float32),
            "detection": own.random(genes).astype(np.float32),
            "weight": np.where(is_primary, 1.0, rng.random(genes) * rng.random()),
        }
    )
    for name in ("pearson", "spearman", "mse", "moran_measured", "moran_predicted", "ssim", "pearson_pooled"):
        table[name] = np.where(is_primary, rng.normal(0.15, 0.2, genes), np.nan)
    return table


def write_tables(folder: Path, genes: int, primary: int, axis: int, rng: np.random.Generator) -> Files:
    """The tables of a cell, with size and digest."""
    folder.mkdir(parents=True)
    epochs = pd.DataFrame({"epoch": np.arange(EPOCHS), "training_loss": rng.random(EPOCHS)})
    epochs["validation_pcc"] = rng.random(EPOCHS)
    epochs["selected"] = rng.integers(0, genes - primary, EPOCHS)
    outer = epochs.rename(columns={"training_loss": "outer_loss"}).assign(turn=0, outer_signal_to_noise=1.0)
    tables = {"genes": gene_table(genes, primary, axis, rng), "epochs": epochs, "outer": outer}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    return {p.name: (p.stat().st_size, file_digest(p, DIGEST)) for p in sorted(folder.iterdir())}


def specs(cells: int) -> Iterator[tuple[RunSpec, int, float]]:
    """Spec, number of its gene tables, and the score that it is drawn around."""
    campaign = Campaign.of(Plugins.discover(), selectors=["pgl", "agl"], datasets=["synthetic"], evaluation=["inter"])
    part = {kind: campaign.part(Plugins.discover(), n, k) for kind, n, k in (
        ("dataset", "synthetic", "dataset"), ("backbone", "tiny", "backbone"), ("selector", "pgl", "selector")
    )}  # fmt: skip
    seeds = -(-cells // (DATASETS * sum(map(len, FOLDS.values())) * len(SELECTORS)))
    made, tables = 0, 0
    for dataset in range(DATASETS):
        for evaluation, folds in FOLDS.items():
            for fold in folds:
                for number, selector in enumerate(SELECTORS):
                    tables += 1
                    for seed in range(seeds):
                        if made == cells:
                            return
                        made += 1
                        settings = part["selector"].settings | {"line": selector}
                        spec = RunSpec(
                            replace(part["dataset"], label=f"tissue {dataset}"), part["backbone"],
                            replace(part["selector"], name=selector, label=selector, settings=settings),
                            evaluation, fold, seed, campaign.protocol, "clean", f"{dataset:020x}", "cpu",
                        )  # fmt: skip
                        yield spec, tables, 0.1 + 0.02 * dataset + 0.003 * number


def write_folder(work: Path, cells: int, genes: int, primary: int) -> None:
    """Make up a work folder."""
    rng = np.random.default_rng(0)
    for name in ("cells", "failed", "folds", "partial", "leases", "grids", "pool"):
        (work / name).mkdir(parents=True)
    known: dict[int, Files] = {}
    selected: dict[int, list[int]] = {}
    for spec, tables, level in specs(cells):
        pool = work / "pool" / str(tables)
        if tables not in known:
            axis = (tables - 1) // len(SELECTORS)  # selectors share the genes of a fold
            known[tables] = write_tables(pool, genes, primary, axis, rng)
            selected[tables] = pd.read_parquet(pool / "epochs.parquet")["selected"].tolist()
        folder = work / "cells" / spec.key
        folder.mkdir()
        for name in known[tables]:
            os.link(pool / name, folder / name)
        pcc = level + rng.normal(0, 0.02)
        content = {
            "format": FORMAT,
            "spec": spec.as_json(),
            "scores": {"pcc_gene_mean_section_mean": pcc, "pcc_gene_median_section_mean": pcc, "pcc_nan_genes": 0.0},
            "best_epoch": (best := int(rng.integers(EPOCHS - 1))),
            "selected": selected[tables][best],
            "epochs": len(selected[tables]),
            "counts": {
                "auxiliary_genes": genes - primary,
                "primary_genes": primary,
                "train_spots": 900,
                "test_spots": 300,
            },
            "cost": {"seconds": float(1 + rng.random()), "peak_memory_mb": 1000.0},
            "provenance": {"commit": "made up", "machine": "made up"},
            "fold": {},
            "files": known[tables],
        }
        content = signed(json.loads(json.dumps(content)))
        (folder / "result.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_report(work: str, *, device: torch.device) -> measure.Row:
    """One report, for a fresh process."""
    from agl_bench.bench.cells import CellStore
    from agl_bench.comparison.gather import gather
    from agl_bench.comparison.report import write_report as write

    peak = measure.Peak(device)
    out = Path(work) / "report"
    started, processor = measure.now(), time.process_time()
    gathered = gather(CellStore(Path(work)))
    read = measure.now()
    made = write(gathered, Path(work), out, Plugins.discover())
    ended = measure.now()
    return {
        "tables": len(made.tables),
        "gather_s": read - started,
        "report_s": ended - started,
        "cpu_s": time.process_time() - processor,
        "peak_MiB": peak.mib() + peak.before / measure.MIB,
        "base_MiB": peak.before / measure.MIB,
        "page_MiB": (out / "report.html").stat().st_size / measure.MIB,
    }


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each number of genes."""
    found = []
    for genes in options.genes:
        folder = Path(tempfile.mkdtemp(prefix="agl-bench-report-", dir=options.folder))
        try:
            started = time.perf_counter()
            write_folder(folder / "work", options.cells, genes, options.primary)
            written = time.perf_counter() - started
            row = measure.fresh("report:write_report", options.device, work=str(folder / "work"))
            found.append({"cells": options.cells, "genes": genes, "write_s": written, **row})
        finally:
            shutil.rmtree(folder)
    return found


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__, repeats=1)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, nargs="+", default=[200, 15_000], help="of each cell")
    parser.add_argument("--primary", type=int, default=50, help="genes that are scored")
    parser.add_argument("--folder", type=Path, help="where to write the cells; default: the system's temporary folder")
    options = measure.options(parser, quick=QUICK)
    measure.report("report", rows(options), options)


if __name__ == "__main__":
    main()
