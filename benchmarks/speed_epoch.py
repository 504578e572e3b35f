"""Epochs of every selector against those of `agl`, and against another implementation.

    python benchmarks/speed_epoch.py                                     # planted tissue, 15,000 genes, tiny
    python benchmarks/speed_epoch.py --datasets her2st --backbone resnet18 --set resnet18.weights=none
    python benchmarks/speed_epoch.py --datasets her2st --reference other.py --reference-python PYTHON

Trainers are made as a run of cells makes them (registry, preset, first fold), all on the same data. Epochs 0 and 1 are
not counted; then the selectors take turns, an epoch each. An epoch is an outer pass where the selector learns, a pass
over the training spots, and validation. Columns:

    seconds, min, max   an epoch: median, least, most
    ratio               of medians, to `agl`
    train_s, outer_s    the two passes of an epoch (medians)
    outer_share         of the epoch
    look_ahead_ratio    an outer pass takes every training batch into each of its inner steps once: its time against
                        as many plain steps of `agl`
    host_syncs          of an epoch, on CUDA: how often the host waited for the device

Selectors: pgl, agl, random_k and hvg_k with k = 500, hvg_k with k = 1000, dkgsb as the preset in use has it, dkgsb with
the settings of the preset `paper` and its outer steps (the rest of the protocol is the same for all), amal.

With --reference PATH the data of the cell are written to a folder, and `python PATH FOLDER` must print a line of JSON,
{"seconds_per_epoch": float}, for training that reads them, with as many steps of the same sizes; that becomes a row.
The folder holds

    cell.npz        patches (spots, 3, px, px) uint8; position (spots, 2) float32 µm; section (spots,) int64;
                    data float32, indices int32, indptr int64, shape: expression (spots, genes), normalised, as CSR;
                    train, held_out, validation, test: rows of the spots, int64 (held_out may be validation);
                    genes (genes,) names; primary (genes,) bool; rank (genes,) int64, 0 = most variable auxiliary gene,
                    −1 = primary gene
    settings.json   protocol: every setting of the protocol; learning_rate: of the model; batches: training batches of
                    an epoch, with an outer step for each outer_batches of them; outer_steps: inner steps of a
                    look-ahead, by selector; dataset, backbone, fold, device, threads
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from scipy import sparse

from agl_bench.bench.run import Bench, Setting
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.data.folds import FoldPlan
from agl_bench.data.store import SpotStore
from agl_bench.protocol import load_preset
from agl_bench.registry.plugins import Plugins
from agl_bench.training.records import EpochRecord, OuterPass
from agl_bench.training.trainer import Trainer

PAPER = "dkgsb, preset paper"
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "agl": ("agl", {}),
    "pgl": ("pgl", {}),
    "random_k 500": ("random_k", {"k": 500}),
    "hvg_k 500": ("hvg_k", {"k": 500}),
    "hvg_k 1000": ("hvg_k", {"k": 1000}),
    "dkgsb": ("dkgsb", {}),
    PAPER: ("dkgsb", load_preset("paper").plugins["dkgsb"]),
    "amal": ("amal", {}),
}
OUTER = {k: v for k, v in load_preset("paper").protocol.items() if k.startswith("outer_")}
SHARES = (
    ("markers", 0.03),
    ("helpful_genes", 0.12),
    ("harmful_genes", 0.35),
    ("useless_genes", 0.5),
)  # of the genes
QUICK = {"genes": 120, "spots": 60, "set": ["protocol.batch_size=16", "synthetic.patch_px=32"]}


class Clocked(Trainer):
    """A trainer that keeps the seconds of its passes."""

    train_seconds: float = 0.0
    outer_seconds: float = 0.0

    def _train_pass(self, epoch: int, purpose: str = "train") -> tuple[float, torch.Tensor]:
        started = measure.now()
        found = super()._train_pass(epoch, purpose)
        self.train_seconds = measure.now() - started
        return found

    def _outer_pass(self, epoch: int, turn: int = 0) -> OuterPass:
        started = measure.now()
        found = super()._outer_pass(epoch, turn)
        self.outer_seconds = measure.now() - started
        return found


def cell(label: str, dataset: str, plugins: Plugins, options: argparse.Namespace) -> tuple[RunSpec, FoldPlan]:
    """The first cell of a campaign with one selector: a label of `SETTINGS`, or any name at its defaults."""
    selector, settings = SETTINGS.get(label, (label, {}))
    given = [f"{selector}.{k}={v}" for k, v in settings.items()]
    if dataset == "synthetic":
        planted = {name: round(share * options.genes) for name, share in SHARES} | {"spots": options.spots}
        given += [f"synthetic.{k}={v}" for k, v in planted.items()]
    given += ["protocol.epochs=1000000", "protocol.patience=1000000"]  # it is stopped from outside
    campaign = Campaign.of(
        plugins,
        preset=options.preset,
        assignments=[*given, *options.set],
        selectors=[selector],
        datasets=[dataset],
        backbone=[options.backbone],
        evaluation=[options.evaluation],
    )
    return campaign.cells(plugins, options.data, device=options.device.type, fingerprint={})[0]


def host_syncs(epochs: Iterator[EpochRecord]) -> int:
    """How often the host waits for the device in the next epoch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(epochs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each dataset and selector."""
    plugins = Plugins.discover()
    return [row for dataset in options.datasets for row in of_dataset(dataset, plugins, options)]


def of_dataset(dataset: str, plugins: Plugins, options: argparse.Namespace) -> list[measure.Row]:
    """Every selector on one dataset, in turn."""
    bench = Bench(plugins, options.data, options.device)
    trainers: dict[str, Clocked] = {}
    for label in dict.fromkeys(["agl", *(options.selectors or SETTINGS)]):
        spec, plan = cell(label, dataset, plugins, options)
        setting = bench.setting(spec, plan)
        model, selector = bench.build(spec, setting)
        protocol = replace(spec.protocol, **OUTER) if label == PAPER else spec.protocol
        trainers[label] = Clocked(
            model, selector, setting.development, setting.rows, setting.genes, protocol, seed=spec.seed
        )
    epochs = {label: iter(trainer) for label, trainer in trainers.items()}
    found: dict[str, list[tuple[float, float, float]]] = {label: [] for label in trainers}
    for number in range(options.repeats + 2):
        for label, trainer in trainers.items():
            record = next(epochs[label])
            if number >= 2:
                found[label].append((record.seconds, trainer.train_seconds, trainer.outer_seconds))
    syncs = {label: host_syncs(e) for label, e in epochs.items()} if options.device.type == "cuda" else {}
    base, plain, _ = (statistics.median(column) for column in zip(*found["agl"], strict=True))
    size = {
        "dataset": dataset,
        "backbone": options.backbone,
        "spots": len(setting.rows.train),
        "genes": len(setting.genes.names),
    }
    table = []
    for label, measured in found.items():
        whole, train, outer = zip(*measured, strict=True)
        row: measure.Row = {**size, "selector": label, **measure.spread(whole)}
        row |= {"ratio": row["seconds"] / base, "train_s": statistics.median(train)}
        learns = statistics.median(outer) > 0
        steps = trainers[label].selector.hypergradient.steps
        row["outer_s"] = statistics.median(outer) if learns else None
        row["outer_share"] = statistics.median(o / w for o, w in zip(outer, whole, strict=True)) if learns else None
        row["look_ahead_ratio"] = row["outer_s"] / (steps * plain) if learns else None
        row |= {"host_syncs": syncs[label]} if syncs else {}
        table.append(row)
    if options.reference:
        seconds = _reference(options, spec, setting, trainers)
        table.append({**size, "selector": options.reference.name, "seconds": seconds, "ratio": seconds / base})
    return table


# Another implementation ----------------------------------------------------------------------------------------------


def _reference(options: argparse.Namespace, spec: RunSpec, setting: Setting, trainers: dict[str, Clocked]) -> float:
    """Seconds for an epoch, as the other implementation says."""
    trainer = trainers["agl"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(setting, folder / "cell.npz")
        settings = {
            "protocol": spec.protocol.settings(),
            "learning_rate": trainer.rate,
            "batches": len(trainer._batches(setting.rows.train, "train", 0, spec.protocol.batch_size)),
            "outer_steps": {n: t.selector.hypergradient.steps for n, t in trainers.items() if t.outer_optimizer},
            "dataset": spec.dataset.name,
            "backbone": spec.backbone.name,
            "fold": spec.fold,
            "device": options.device.type,
            "threads": torch.get_num_threads(),
        }
        (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        command = [options.reference_python, str(options.reference), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{options.reference} ended with {done.returncode}:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds_per_epoch"])


def export(setting: Setting, path: Path) -> None:
    """The data of a cell as the docstring of this file describes them."""
    stores = setting.development, setting.test
    if any(store.patches is None for store in stores):
        raise SystemExit("--reference needs a backbone that sees patches")
    expression = sparse.vstack([sparse.csr_matrix(store.expression_of().cpu().numpy()) for store in stores]).tocsr()
    sizes = [len(store) for store in stores]
    content: dict[str, Any] = {
        "patches": np.concatenate([_pixels(store) for store in stores]),
        "position": np.concatenate([store.position.cpu().numpy() for store in stores]),
        "section": np.concatenate([store.section_on_host for store in stores]),
        "data": expression.data,
        "indices": expression.indices.astype(np.int32),
        "indptr": expression.indptr.astype(np.int64),
        "shape": np.array(expression.shape),
        "train": setting.rows.train,
        "held_out": setting.rows.held_out,
        "validation": setting.rows.validation,
        "test": np.arange(sizes[0], sum(sizes)),
        "genes": np.array(setting.genes.names),
        "primary": setting.genes.primary.numpy(),
        "rank": setting.genes.rank.numpy(),
    }
    np.savez(path, **content)


def _pixels(store: SpotStore) -> np.ndarray:
    """Patches of a store as they are stored, (spots, 3, px, px) uint8."""
    every = np.arange(len(store))
    patches = store.patches if isinstance(store.patches, torch.Tensor) else store.patches.read(every)
    return patches.cpu().numpy()


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__)
    parser.add_argument("--datasets", nargs="+", default=["synthetic"])
    parser.add_argument(
        "--selectors", nargs="+", metavar="SELECTOR", help=f"any, or of: {', '.join(SETTINGS)}  [default: all of these]"
    )
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--evaluation", default="inter", choices=("intra", "inter"))
    parser.add_argument("--preset", default="clean", help="of the protocol")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME.KEY=VALUE", help="as of agl-bench run")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("AGL_BENCH_DATA", "data")),
        help="folder; default: AGL_BENCH_DATA",
    )
    parser.add_argument("--genes", type=int, default=15_000, help="of `synthetic`")
    parser.add_argument("--spots", type=int, default=300, help="of each of the three sections of `synthetic`")
    parser.add_argument("--reference", type=Path, help="script of another implementation")
    parser.add_argument("--reference-python", default=sys.executable, help="that runs it")
    options = measure.options(parser, quick=QUICK)
    measure.report("speed_epoch", rows(options), options)


if __name__ == "__main__":
    main()
