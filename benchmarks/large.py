"""Twenty sections of 5,000 spots × 18,000 genes: prepared, and trained for one epoch, within a stated budget.

    python benchmarks/large.py                                   # budget 2G: expression and patches stay on disk
    python benchmarks/large.py --memory 5G 500M --selectors hvg_k
    python benchmarks/large.py --scale 0.1                       # a tenth of the spots of each section

Made-up tissue is written section by section as memory-mapped arrays: counts as CSR, patches as uint8. The panel has
smooth programmes over a hexagonal grid, which raise their genes and colour the patches. Then each selector runs one
inter-batch fold (the first section is tested) in a process of its own, as `agl-bench run` would, with AGL_BENCH_MEMORY
set to the budget.

    write_s       to make up and write the data: no part of a run
    prepare_s     to open, check and prepare all sections, and to make table, fold, genes and stores
    epoch_s       one pass over the training spots and the validation
    total_s       all of that, and the test
    anon_MiB      most anonymous memory of the process (RssAnon, sampled): what it holds; base_MiB of it before any data
    file_MiB      most file-backed memory (RssFile): pages of the arrays that the kernel may drop at any time
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import measure
import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench import Dataset, Section, hookimpl
from agl_bench.bench.run import Bench
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins

PX, UM, PITCH_UM = 32, 112.0, 100.0
PROGRAMMES = 4
QUICK = {"sections": 2, "spots": 300, "genes": 150, "memory": ["10K"], "primary": 5, "selectors": ["hvg_k"]}
ARRAYS = ("data", "indices", "indptr", "patches", "position")


def write_section(folder: Path, number: int, spots: int, genes: int) -> int:
    """Make up a section and write its arrays; returns how many counts are not zero, about a quarter of all."""
    of_gene, rng = np.random.default_rng(0), np.random.default_rng(1 + number)
    # What genes have in common in all sections: abundance, and how they follow the programmes.
    level = of_gene.normal(-1.6, 1.3, genes).astype(np.float32)
    follows = (of_gene.normal(0, 0.5, (PROGRAMMES, genes)) * (of_gene.random(genes) < 0.2)).astype(np.float32)
    width = max(int(np.sqrt(spots)), 1)
    row, column = np.divmod(np.arange(spots), width)
    position = PITCH_UM * np.stack([column + 0.5 * (row % 2), row * np.sqrt(0.75)], 1)
    waves = rng.normal(0, 1 / (8 * PITCH_UM), (2, PROGRAMMES))
    programme = np.sin(position @ waves + rng.uniform(0, 2 * np.pi, PROGRAMMES)).astype(np.float32)
    level = level + rng.normal(0, 0.2, genes).astype(np.float32)  # what a batch does to each gene
    data, indices, lengths = [], [], []
    for start in range(0, spots, 500):
        here = programme[start : start + 500]
        mean = np.exp(level + here @ follows)
        drawn = rng.random(mean.shape, dtype=np.float32)
        seen = drawn > np.exp(-mean)
        # At least one where something is seen, and more where the mean is high.
        data.append(1 + np.floor(mean[seen] * rng.standard_exponential(int(seen.sum()), dtype=np.float32)))
        indices.append(np.nonzero(seen)[1].astype(np.int32))
        lengths.append(seen.sum(1))
    colour = np.array([[40, -30, 20, 0], [-20, 35, 0, 25], [0, 20, -35, -30]], dtype=np.float32)
    base = np.float32([190, 130, 180]) + programme @ colour.T
    noise = rng.normal(0, 12, (spots, 3, PX, PX)).astype(np.float32)
    patches = np.clip(base[:, :, None, None] + noise, 0, 255).astype(np.uint8)
    pointers = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    folder.mkdir()
    arrays = (np.concatenate(data).astype(np.float32), np.concatenate(indices), pointers, patches, position)
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    return int(pointers[-1])


class OnDisk:
    """Patches (spots, 3, PX, PX) of a memory-mapped array."""

    def __init__(self, patches: np.ndarray) -> None:
        self.patches = patches

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """Patches of the spots `rows`; there is one size alone."""
        assert side_px == PX and side_um == UM
        return self.patches[rows]

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """None: there is no image."""
        return np.empty(0, dtype=np.int64)


class Large(Dataset):
    """Sections of this benchmark, under the data folder."""

    citation = "made up"

    def sections(self, root: Path) -> dict[str, str]:
        """All folders, in order."""
        return {path.name: "" for path in sorted(root.iterdir()) if path.is_dir()}

    def read(self, root: Path, name: str) -> Section:
        """Over memory-mapped arrays: nothing is read yet."""
        data, indices, pointers, patches, position = (
            np.load(root / name / f"{array}.npy", mmap_mode="r") for array in ARRAYS
        )
        genes = int((root / "genes").read_text(encoding="utf-8"))
        counts = AnnData(sparse.csr_matrix((data, indices, pointers), shape=(len(position), genes)))
        counts.var_names = [f"G{i:05d}" for i in range(genes)]
        counts.obsm["spatial"] = np.array(position)
        return Section(name, counts, 1.0, patches=OnDisk(patches))


@hookimpl
def register_datasets() -> dict[str, type[Dataset]]:
    """This file is a plug-in too."""
    return {"large": Large}


class Watch:
    """Most anonymous and file-backed memory of the process, sampled by a thread ten times a second."""

    def __init__(self) -> None:
        self.most = self.base = self.now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            self.most = {name: max(value, self.most[name]) for name, value in self.now().items()}

    @staticmethod
    def now() -> dict[str, float]:
        """MiB at the moment, NaN where the kernel does not say."""
        text = measure.STATUS.read_text(encoding="utf-8") if measure.STATUS.exists() else ""
        found = {name: re.search(rf"Rss{name}:\s+(\d+) kB", text) for name in ("Anon", "File")}
        return {name: int(match[1]) / 1024 if match else float("nan") for name, match in found.items()}

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()


def run(folder: str, selector: str, primary: int, *, device: torch.device) -> measure.Row:
    """One cell for one epoch, for a fresh process."""
    root, watch = Path(folder), Watch()
    plugins = Plugins.discover([Path(__file__)])
    given = {
        "protocol.epochs": 1,
        "protocol.primary_genes": primary,
        "protocol.leave_out": "section",
        "tiny.patch_px": PX,
    }
    first = sorted(path.name for path in root.iterdir() if path.is_dir())[0]
    campaign = Campaign.of(
        plugins,
        preset="clean",
        assignments=[f"{name}={value}" for name, value in given.items()],
        selectors=[selector],
        datasets=["large"],
        backbone=["tiny"],
        evaluation=["inter"],
        fold=[first],
    )
    ((spec, plan),) = campaign.cells(plugins, root, device=device.type, fingerprint={})
    bench = Bench(plugins, root, device)
    started = measure.now()
    store = bench.setting(spec, plan).development
    made = measure.now()
    record, result = bench.train(spec, plan)
    ended = measure.now()
    watch.end()
    return {
        "store": type(store.matrix).__name__,
        "prepare_s": made - started,
        "epoch_s": record.seconds,
        "total_s": ended - started,
        "anon_MiB": watch.most["Anon"],
        "base_MiB": watch.base["Anon"],
        "file_MiB": watch.most["File"],
        "train_spots": result.counts["train_spots"],
        "genes": result.counts["primary_genes"] + result.counts["auxiliary_genes"],
        "pcc": result.scores["pcc_gene_mean_section_mean"],
    }


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each budget and selector."""
    folder = Path(tempfile.mkdtemp(prefix="agl-bench-large-", dir=options.folder))
    spots = max(round(options.spots * options.scale), 1)
    try:
        (folder / "genes").write_text(str(options.genes), encoding="utf-8")
        started = time.perf_counter()
        nonzero = sum(write_section(folder / f"S{i:02d}", i, spots, options.genes) for i in range(options.sections))
        written = time.perf_counter() - started
        print(f"{options.sections} sections x {spots:,} spots x {options.genes:,} genes,", end=" ")
        print(f"{nonzero / (options.sections * spots * options.genes):.0%} not zero, written in {written:.0f} s")
        found = []
        for memory in options.memory:
            os.environ["AGL_BENCH_MEMORY"] = memory
            for selector in options.selectors:
                arguments = {"folder": str(folder), "selector": selector, "primary": options.primary}
                row = measure.fresh("large:run", options.device, **arguments)
                found.append({"budget": memory, "selector": selector, **row})
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__, repeats=1)
    parser.add_argument("--sections", type=int, default=20)
    parser.add_argument("--spots", type=int, default=5000, help="of each section")
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--primary", type=int, default=50, help="genes that are scored")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the spots")
    parser.add_argument("--memory", nargs="+", default=["2G"], help="budgets, as AGL_BENCH_MEMORY")
    parser.add_argument("--selectors", nargs="+", default=["hvg_k", "agl"])
    parser.add_argument("--folder", type=Path, help="where to write the data; default: the system's temporary folder")
    options = measure.options(parser, quick=QUICK)
    measure.report("large", rows(options), options)


if __name__ == "__main__":
    main()
