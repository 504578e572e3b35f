"""The Pearson loss against the plain formula: time, error of the gradient and memory.

    python benchmarks/speed_loss.py

Times are medians in ms, alternating; ratios are to `fused`; errors of the gradient are relative to its largest entry in
float64; MiB is what torch's allocator hands out at the most during a step, the gradient among it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import measure
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from agl_bench.maths.losses import EPSILON, pearson_loss

SPOTS, GENES = 128, (1_000, 5_000, 18_000)
Loss = Callable[[Tensor, Tensor], Tensor]


def naive(prediction: Tensor, target: Tensor) -> Tensor:
    """The plain formula in autograd's operations, with the root of the sum of squares."""
    p, y = prediction - prediction.mean(0), target - target.mean(0)
    norms = (p**2).sum(0).sqrt() * (y**2).sum(0).sqrt()
    return 1 - ((p * y).sum(0) / (norms + EPSILON)).nan_to_num(nan=-1)


def naive_norm(prediction: Tensor, target: Tensor) -> Tensor:
    """The plain formula with torch.norm, which is slow over the first dimension."""
    p, y = prediction - prediction.mean(0), target - target.mean(0)
    return 1 - ((p * y).sum(0) / (torch.norm(p, dim=0) * torch.norm(y, dim=0) + EPSILON)).nan_to_num(nan=-1)


LOSSES: dict[str, Loss] = {"fused": pearson_loss, "naive": naive, "naive_norm": naive_norm}


def step(loss: Loss, prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Forward and backward; the gradient, (spots, genes)."""
    (gradient,) = torch.autograd.grad((loss(prediction, target) * weights).sum(), prediction)
    return gradient


def peak_memory(loss: Loss, *inputs: Tensor) -> float:
    """MiB that torch's allocator hands out at the most during a step, the gradient among them."""
    step(loss, *inputs)
    if inputs[0].is_cuda:
        most = measure.Peak(inputs[0].device)
        step(loss, *inputs)
        return most.mib()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(loss, *inputs)
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
    return max(accumulate(sizes)) / 2**20


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each number of genes: milliseconds, ratios, errors and memory."""
    found = []
    for number in options.genes:
        generator = torch.Generator().manual_seed(number)
        prediction, target = torch.randn(2, options.spots, number, generator=generator).to(options.device)
        weights = torch.rand(number, generator=generator).to(options.device)
        leaf = prediction.clone().requires_grad_()
        forward = {f"forward_{name}": partial(loss, leaf, target) for name, loss in LOSSES.items()}
        both = {f"both_{name}": partial(step, loss, leaf, target, weights) for name, loss in LOSSES.items()}
        seconds = measure.alternate({**forward, **both}, options.repeats, warm_up=2)
        row: measure.Row = {"genes": number}
        for label in ("forward", "both"):
            for name in LOSSES:
                row[f"{label}_{name}"] = 1e3 * median(seconds[f"{label}_{name}"])
            for name in ("naive", "naive_norm"):
                row[f"{label}_ratio_{name}"] = row[f"{label}_{name}"] / row[f"{label}_fused"]
        reference = step(naive, prediction.double().requires_grad_(), target.double(), weights.double())
        for dtype in (torch.float32, torch.float64):
            for name in ("fused", "naive"):
                ours = step(LOSSES[name], prediction.to(dtype).requires_grad_(), target.to(dtype), weights.to(dtype))
                error = (ours.double() - reference).abs().max() / reference.abs().max()
                row[f"error_{name}_{str(dtype)[11:]}"] = float(error)
        for name in ("fused", "naive"):
            row[f"MiB_{name}"] = peak_memory(LOSSES[name], leaf, target, weights)
        found.append(row)
    return found


def main() -> None:
    """Print the table, a line for each quantity and a column for each number of genes."""
    parser = measure.parser(__doc__, repeats=15)
    parser.add_argument("--spots", type=int, default=SPOTS)
    parser.add_argument("--genes", type=int, nargs="+", default=list(GENES))
    options = measure.options(parser, quick={"spots": 8, "genes": [20, 40]})
    found = rows(options)
    turned = [{"quantity": k, **{f"{r['genes']:,} genes": r[k] for r in found}} for k in found[0] if k != "genes"]
    measure.report("speed_loss", turned, options, f"{options.spots} spots, float32")


if __name__ == "__main__":
    main()
