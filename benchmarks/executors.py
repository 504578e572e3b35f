"""What an executor costs beyond the work itself, and what two workers gain.

    python benchmarks/executors.py                           # 1,000 cells of milliseconds: what is beyond the work
    python benchmarks/executors.py --words "--selectors pgl,dkgsb --datasets her2st"   # cells of real size: speed-up

Every campaign has a work folder of its own and runs as a user would have it, `agl-bench run` in a process of its own,
without MLflow unless --tracking is given. All executors run the same cells with one thread each.

    cells_s      sum of what the cells themselves report (`cost.seconds`: reading their data, training, testing)
    loop_s       wall clock from the first cell that begins to the last that is kept
    overhead_ms  (loop_s × workers − cells_s) / cells: everything else, for each cell: leases, writing and flushing its
                 folder, handing it out, reading it back and showing it, and workers that have nothing to do at the end.
                 It counts the time of a worker, so that two workers at a time do not hide it.
    start_s      wall clock of the command but for the loop: imports, folds, checks, start of the engine and of workers
    wall_s       of the command
    equal        that every result is that of `serial`, bit for bit

A line is `serial` once more with up to 200 cells, in CPU time of the process: what other programs on the machine do
not change, and waiting for the disk does not count.

    python benchmarks/executors.py --apart       # what a cell costs more in a process of its own (`bench.apart`)

runs the same cells of a plug-in of others twice, in one process and each in its own, in CPU time of all processes:
`cell_ms` a cell, `more_ms` the difference, and `equal`. With --words (any) they are cells of real size, of her2st.

Where other programs share the cores, all times but that grow; `idle_share` says how much of them was left over before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch

from agl_bench.bench.apart import Apart
from agl_bench.bench.cells import CellStore
from agl_bench.bench.checkpoints import Keeper
from agl_bench.bench.prepare import Preparation
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, Keep, Setting, choose_device, fingerprints, run_cells
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.data.folds import FoldPlan
from agl_bench.registry.plugins import Plugins
from agl_bench.training.records import EpochRecord

MICRO = {
    "synthetic.sections": 2, "synthetic.spots": 40, "synthetic.markers": 5, "synthetic.helpful_genes": 25,
    "synthetic.harmful_genes": 20, "synthetic.useless_genes": 30, "synthetic.patch_px": 16, "tiny.patch_px": 16,
    "tiny.channels": 8, "protocol.primary_genes": 5, "protocol.min_genes_per_spot": 5, "protocol.buffer_um": 0,
    "protocol.epochs": 1, "hvg_k.k": 20, "random_k.k": 20,
}  # fmt: skip
SELECTORS = "pgl,agl,hvg_k,random_k,dkgsb"  # times two folds


def campaign(executor: str, options: argparse.Namespace, words: list[str], scratch: Path) -> tuple[measure.Row, Path]:
    """Run a campaign; its row of the table, and its work folder."""
    work = scratch / executor
    command = [sys.executable, "-W", "ignore", "-m", "agl_bench", "run", *words, "--work", str(work)]
    command += ["--device", "cpu", "--tracking", options.tracking, "--executor", executor]
    command += ["--workers", str(options.workers)] if executor != "serial" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AGL_BENCH_CACHE": str(scratch / "cache")}
    idle = measure_idle()
    began = time.time()
    with (scratch / f"{executor}.log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    wall = time.time() - began
    results = list(CellStore(work))
    kept = [(work / "cells" / r.spec.key / "result.json").stat().st_mtime for r in results]
    seconds = [r.cost["seconds"] for r in results]
    # A cell's folder is written right after its last second; the first one began its seconds before that.
    loop = max(kept) - min(end - s for end, s in zip(kept, seconds, strict=True))
    number = 1 if executor == "serial" else options.workers
    return {
        "executor": executor, "workers": number, "cells": len(results), "cells_s": sum(seconds), "loop_s": loop,
        "overhead_ms": 1000 * (loop * number - sum(seconds)) / len(results), "start_s": wall - loop, "wall_s": wall,
        "idle_share": idle,
    }, work  # fmt: skip


def measure_idle(seconds: float = 5.0) -> float:
    """Share of the machine's cores that nobody uses."""

    def ticks() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    idle, total = ticks()
    time.sleep(seconds)
    after = ticks()
    return (after[0] - idle) / max(1, after[1] - total)


def outcome(work: Path) -> Iterator[str]:
    """Everything of each result but cost, machine and times, as text."""
    for result in CellStore(work):
        tables = [t.drop(columns="seconds", errors="ignore") for t in (result.genes, result.epochs, result.outer)]
        plain = [result.spec.key, result.scores, result.best_epoch, result.counts, result.fold]
        yield json.dumps([*plain, *(t.to_json(double_precision=15) for t in tables)])
        yield from (t.to_csv(float_format="%.17g") for t in tables)


class Clocked(Bench):
    """Adds up the CPU time of the cells themselves."""

    inside = 0.0

    def setting(self, spec: RunSpec, plan: FoldPlan) -> Setting:
        """As of `Bench`."""
        began = time.process_time()
        try:
            return super().setting(spec, plan)
        finally:
            self.inside += time.process_time() - began

    def train(
        self, spec: RunSpec, plan: FoldPlan, keeper: Keeper | None = None, *, keep: Keep = "predictions"
    ) -> Iterator[EpochRecord | Result | str]:
        """As of `Bench`."""
        self.setting(spec, plan)  # counted there
        steps = super().train(spec, plan, keeper, keep=keep)
        while True:
            began = time.process_time()
            item = next(steps, None)
            self.inside += time.process_time() - began
            if item is None:
                return
            yield item


def in_cpu_time(options: argparse.Namespace) -> measure.Row:
    """Overhead of `serial` in CPU time of this process, which other programs on the machine do not change."""
    plugins, nowhere = Plugins.discover(), Path(os.devnull)
    campaign = Campaign.of(
        plugins, selectors=SELECTORS.split(","), datasets=["synthetic"], evaluation=["inter"], preset="smoke",
        seeds=[str(seed) for seed in range(max(1, min(options.cells, 200) // 10))],
        assignments=[f"{k}={v}" for k, v in MICRO.items()],
    )  # fmt: skip
    cells = campaign.cells(plugins, nowhere, device="cpu", fingerprint=fingerprints(campaign, plugins, nowhere))
    bench = Clocked(plugins, nowhere, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as work:
        store = CellStore(Path(work))
        list(run_cells(cells[:1], bench, store, NoRecorder()))  # the first one imports and prepares
        bench.inside, began = 0.0, time.process_time()
        list(run_cells(cells[1:], bench, store, NoRecorder()))
        total = time.process_time() - began
    number = len(cells) - 1
    return {
        "executor": "serial, CPU time", "workers": 1, "cells": number, "cells_s": bench.inside, "loop_s": total,
        "overhead_ms": 1000 * (total - bench.inside) / number,
    }  # fmt: skip


STRANGER = """
from agl_bench import Selector, hookimpl

class Stranger(Selector):
    '''Trains primary genes, as pgl does.'''
    reference = "benchmark"

    def forward(self, losses, step):
        return losses[self.is_primary].mean()

@hookimpl
def register_selectors():
    return {"stranger": Stranger}
"""


def apart_rows(options: argparse.Namespace, nursery: int, apart: Apart) -> list[measure.Row]:
    """Cells of a plug-in of others in this process, and each in its own; CPU time of all processes.

    Args:
        options: of the command line.
        nursery: number of the process that `apart` has made.
        apart: made before this process has computed anything.
    """
    found: list[measure.Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "stranger.py")
        file.write_text(STRANGER, encoding="utf-8")
        plugins, root = Plugins.discover([file]), Path(os.environ.get("AGL_BENCH_DATA", os.devnull))
        small: dict[str, Any] = {
            "datasets": ["synthetic"], "evaluation": ["inter"], "preset": "smoke",
            "seeds": [str(seed) for seed in range(max(1, min(options.cells, 200) // 2))],
            "assignments": [f"{k}={v}" for k, v in MICRO.items() if k.partition("_")[0] not in ("hvg", "random")],
        }  # fmt: skip
        large = {"datasets": ["her2st"], "evaluation": ["intra"], "fold": ["C2.0", "C3.0"], "seeds": ["0", "1"]}
        campaign = Campaign.of(plugins, selectors=["stranger"], **(large if options.words else small))
        cells = campaign.cells(plugins, root, device="cpu", fingerprint=fingerprints(campaign, plugins, root))
        bench = Bench(plugins, root, torch.device("cpu"), Preparation(root, Path(scratch, "cache")))
        outcomes = []
        for name, where in (("one process", None), ("each its own", apart)):
            store = CellStore(Path(scratch, name))
            list(run_cells(cells[:1], bench, store, NoRecorder(), apart=where))  # imports and prepares
            began, wall = time.process_time() + cpu_of(nursery), time.perf_counter()
            list(run_cells(cells[1:], bench, store, NoRecorder(), apart=where))
            total = time.process_time() + cpu_of(nursery) - began
            number = len(cells) - 1
            outcomes.append(list(outcome(store.work)))
            row = {"executor": name, "cells": number, "cell_ms": 1000 * total / number}
            found.append(row | {"cell_wall_ms": 1000 * (time.perf_counter() - wall) / number})
            print(measure.table(found[-1:]), file=sys.stderr, flush=True)
        found[1] |= {
            "more_ms": found[1]["cell_ms"] - found[0]["cell_ms"],
            "equal": str(outcomes[0] == outcomes[1] and len(outcomes[0]) > 0),
        }
    return found


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """The same cells with every executor."""
    words = options.words.split()
    if not words:
        seeds = ",".join(map(str, range(max(1, options.cells // 10))))
        words = ["--selectors", SELECTORS, "--datasets", "synthetic", "--preset", "smoke", "--evaluation", "inter"]
        words += ["--seeds", seeds, *itertools.chain(*(("--set", f"{k}={v}") for k, v in MICRO.items()))]
    found: list[measure.Row] = []
    expected: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for executor in options.executors.split(","):
            row, work = campaign(executor, options, words, Path(scratch))
            mine = list(outcome(work))
            expected = expected or mine
            first = found[0] if found else row
            found.append(row | {"speed_up": first["loop_s"] / row["loop_s"], "equal": str(mine == expected)})
            print(measure.table(found[-1:]), file=sys.stderr, flush=True)
    return found if options.words else [*found, in_cpu_time(options)]


def main() -> None:
    """Measure what is asked for."""
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--executors", default="serial,local,ray", help="the first one is what others are compared with"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cells", type=int, default=1000, help="that take milliseconds, in steps of ten")
    parser.add_argument("--words", default="", help="options of `agl-bench run` for other cells, of real size")
    parser.add_argument("--tracking", default="none", help="none, or e.g. sqlite:///PATH/mlflow.db")
    parser.add_argument("--apart", action="store_true", help="what a process of its own costs a cell")
    if "--apart" in sys.argv:  # before anything is computed
        apart = Apart(fork=True)
        (nursery,) = map(int, Path("/proc/self/task", str(os.getpid()), "children").read_text().split())
        options = measure.options(parser, quick={"cells": 4})
        measure.report("executors_apart", apart_rows(options, nursery, apart), options)
        return
    options = measure.options(parser, quick={"cells": 10, "executors": "serial,local"})
    measure.report("executors", rows(options), options)


if __name__ == "__main__":
    main()
