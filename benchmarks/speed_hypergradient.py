"""Time, memory and error of the ways to a hypergradient, against the plain training steps that they look ahead by.

    python benchmarks/speed_hypergradient.py                          # 64 px, 16 spots, 15,000 genes, 12 steps
    python benchmarks/speed_hypergradient.py --vary steps --error 3   # 1, 2, 4, 8, 12 steps; errors over 3 batch pairs
    python benchmarks/speed_hypergradient.py --px 64 224 --batch 8 64 --methods plain "forward late"

ResNet-18 without pretrained weights and one linear output for each gene; Pearson loss per gene; weighted mean whose
weights fall off at one cut-off; fresh Adam (3e-5) for all inner steps, on one batch; outer loss of 50 primary genes on
another batch. Normalisation layers use the batch's statistics. `ratio` is of medians, to as many plain steps as
`plain_steps` says; `peak_MiB` is of a process of its own, beyond model and data; `error` is the distance to the same
estimator in float64, relative to its length, a few training steps away from initialisation (median over batch pairs).

    plain              the training steps themselves, torch.optim.Adam(fused=True) as in the trainer
    plain, unfused     the same with fused=False
    forward            agl_bench.maths.hypergradient.Unrolled, its three modes
    reverse
    replay
    forward late       the look-ahead moves the last stage and the head, as that of the selector `dkgsb`; what comes
                       before is computed once
    forward late, SGD  likewise with plain SGD steps
    classical          reverse unrolling as everybody writes it: torch.func.grad over steps with torch.func.grad
    func jvp           the same steps under torch.func.jvp
    difference         two look-aheads without a graph, delta .01
    one step           one weight for each gene, against one plain step: OneStep
    implicit 0         likewise: Implicit without terms (T1–T2), and with five terms of the Neumann series
    implicit 5
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from agl_bench.interfaces.spots import Spots
from agl_bench.maths.hypergradient import SGD, Adam, FiniteDifference, Hypergradient, Implicit, OneStep, Unrolled
from agl_bench.maths.losses import pearson_loss
from agl_bench.training.model import Model
from agl_bench_plugins.backbones.resnet import ResNet18
from agl_bench_plugins.backbones.tiny import Tiny

RATE, TEMPERATURE, PRIMARY, FACTORS = 3e-5, 0.01, 50, 4
VARY = {"steps": {"steps": [1, 2, 4, 8, 12]}, "genes": {"genes": [1000, 5000, 15_000]}}
QUICK = {
    "backbone": "tiny",
    "px": [16],
    "batch": [4],
    "genes": [80],
    "steps": [2],
    "peaks": ["forward"],
    "error": 1,
}
BACKBONES = {"resnet18": partial(ResNet18, weights="none"), "tiny": Tiny}

warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own, in func.jvp


@dataclass
class Problem:
    """A network, an inner and an outer batch: everything that a look-ahead needs.

    Attributes:
        model: with the early and late parts of its backbone.
        batches: inner and outer one, each (what the backbone sees, expression (spots, genes)).
        rank: (genes,) 0 … 1, of primary genes −1.
    """

    model: Model
    batches: tuple[tuple[Spots, Tensor], tuple[Spots, Tensor]]
    rank: Tensor

    @classmethod
    def make(cls, backbone: str, px: int, batch: int, genes: int, device: torch.device, seed: int = 0) -> Problem:
        """Patches and expression that follow the same few factors, so that there is something to learn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loadings, colours = torch.randn(FACTORS, genes), torch.randn(FACTORS, 3)
            batches = []
            for _ in range(2):
                factors = torch.randn(batch, FACTORS)
                texture = torch.nn.functional.interpolate(torch.randn(batch, 3, 8, 8), (px, px), mode="bilinear")
                patches = torch.sigmoid((factors @ colours)[:, :, None, None] / 2 + texture)
                expression = torch.relu(factors @ loadings + 2 * torch.randn(batch, genes))
                zeros = torch.zeros(batch, 2), torch.zeros(batch, dtype=torch.int64)
                batches.append(_to((Spots(patches, *zeros), expression), device))
            torch.manual_seed(0)
            model = Model(BACKBONES[backbone](batches[0][0], patch_px=px), genes)
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        model = model.to(device, memory_format=layout).train()
        for layer in model.modules():
            if hasattr(layer, "track_running_stats"):
                layer.track_running_stats = False
        rank = torch.linspace(0, 1, genes - PRIMARY, device=device)
        return cls(model, (batches[0], batches[1]), torch.cat([-torch.ones(PRIMARY, device=device), rank]))

    def exact(self) -> Problem:
        """The same in float64."""
        inner, outer = (_to(batch, torch.float64) for batch in self.batches)
        return Problem(copy.deepcopy(self.model).double(), (inner, outer), self.rank.double())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """θ, all of it."""
        return dict(self.model.named_parameters())

    @property
    def cutoff(self) -> dict[str, Tensor]:
        """φ: one cut-off."""
        return {"cutoff": self.rank.new_tensor(0.5)}

    @property
    def logits(self) -> dict[str, Tensor]:
        """φ: one weight for each gene."""
        return {"logits": torch.zeros_like(self.rank)}

    def inner_loss(
        self, at: dict[str, Tensor], phi: dict[str, Tensor], number: int, hidden: Tensor | None = None
    ) -> Tensor:
        """Weighted mean of the losses of all genes on the inner batch."""
        spots, expression = self.batches[0]
        losses = pearson_loss(functional_call(self.model, at, (spots, hidden))[1], expression)
        height = phi["logits"] if "logits" in phi else phi["cutoff"] - self.rank
        weights = torch.sigmoid(height / TEMPERATURE).where(self.rank >= 0, 1.0)
        return (weights * losses).sum() / weights.sum()

    def outer_loss(self, at: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """Mean loss of the primary genes on the outer batch; the other outputs are not computed."""
        spots, expression = self.batches[1]
        primary = (self.rank < 0).nonzero().squeeze(1)
        prediction = functional_call(self.model, at, (spots, hidden, primary))[1]
        return pearson_loss(prediction, expression[:, primary]).mean()


def _to(batch: tuple[Spots, Tensor], place: torch.device | torch.dtype) -> tuple[Spots, Tensor]:
    spots, expression = batch
    section = spots.section.to(place) if isinstance(place, torch.device) else spots.section
    return Spots(spots.patches.to(place), spots.position.to(place), section), expression.to(place)


# Methods: (problem, steps) -> gradient for φ, None for plain steps ----------------------------------------------------


def plain(problem: Problem, steps: int, fused: bool = True) -> None:
    """Training steps, in place."""
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=RATE, fused=fused)
    for number in range(steps):
        optimizer.zero_grad(set_to_none=True)
        problem.inner_loss(problem.parameters, problem.cutoff, number).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def of_cutoff(problem: Problem, steps: int, make: Callable[[int], Hypergradient]) -> Tensor:
    """The engine, for the cut-off, through all parameters."""
    return make(steps)(problem.inner_loss, problem.outer_loss, problem.parameters, problem.cutoff, RATE)[1]["cutoff"]


def of_logits(problem: Problem, steps: int, make: Callable[[int], Hypergradient]) -> Tensor:
    """The engine, for one weight for each gene."""
    return make(steps)(problem.inner_loss, problem.outer_loss, problem.parameters, problem.logits, RATE)[1]["logits"]


def late(problem: Problem, steps: int, make: Callable[[int], Hypergradient]) -> Tensor:
    """The engine, for the cut-off, through the late part alone; the early part is computed once, as in the trainer."""
    with torch.no_grad():
        hidden = [problem.model.backbone.early(spots) for spots, _ in problem.batches]
    inner, outer = partial(problem.inner_loss, hidden=hidden[0]), partial(problem.outer_loss, hidden=hidden[1])
    return make(steps)(inner, outer, problem.model.late_parameters(), problem.cutoff, RATE)[1]["cutoff"]


def after(problem: Problem, steps: int, cutoff: Tensor) -> Tensor:
    """The outer loss after Adam steps, each a function of the last: what a transform of torch.func differentiates."""
    theta = {n: p.detach() for n, p in problem.parameters.items()}
    first = {n: torch.zeros_like(p) for n, p in theta.items()}
    second = dict(first)
    for number in range(1, steps + 1):
        gradient = torch.func.grad(problem.inner_loss)(theta, {"cutoff": cutoff}, number)
        size, rescale = RATE / (1 - 0.9**number), (1 - 0.999**number) ** 0.5
        for n, g in gradient.items():
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            moved = second[n] > 0  # the root has no finite derivative at zero
            root = torch.where(moved, second[n], 1).sqrt().where(moved, 0)
            theta[n] = theta[n] - size * first[n] / (root / rescale + 1e-8)
    return problem.outer_loss(theta)


def classical(problem: Problem, steps: int) -> Tensor:
    """Reverse unrolling."""
    return torch.func.grad(partial(after, problem, steps))(problem.cutoff["cutoff"])


def func_jvp(problem: Problem, steps: int) -> Tensor:
    """Forward mode."""
    cutoff = problem.cutoff["cutoff"]
    return torch.func.jvp(partial(after, problem, steps), (cutoff,), (torch.ones_like(cutoff),))[1]


METHODS: dict[str, Callable[[Problem, int], Tensor | None]] = {
    "plain": plain,
    "plain, unfused": partial(plain, fused=False),
    "forward": partial(of_cutoff, make=lambda steps: Unrolled(steps, Adam(), "forward")),
    "reverse": partial(of_cutoff, make=lambda steps: Unrolled(steps, Adam(), "reverse")),
    "replay": partial(of_cutoff, make=lambda steps: Unrolled(steps, Adam(), "replay")),
    "forward late": partial(late, make=lambda steps: Unrolled(steps, Adam(), "forward")),
    "forward late, SGD": partial(late, make=lambda steps: Unrolled(steps, SGD(0.5), "forward")),
    "classical": classical,
    "func jvp": func_jvp,
    "difference": partial(of_cutoff, make=lambda steps: FiniteDifference(steps, Adam(), delta=1e-2)),
    "one step": partial(of_logits, make=lambda steps: OneStep()),
    "implicit 0": partial(of_logits, make=lambda steps: Implicit(0)),
    "implicit 5": partial(of_logits, make=lambda steps: Implicit(5)),
}
FIRST_ORDER = ("plain", "plain, unfused")
OF_ONE_STEP = ("one step", "implicit 0", "implicit 5")  # without a look-ahead of several steps
UNROLLED = {"reverse": 0.67, "classical": 1.15}  # GiB for each step, of ResNet-18 with 15,000 genes
EXACT = dict.fromkeys(("reverse", "replay", "classical", "func jvp", "difference"), "forward")  # whose float64 to meet


# Measurements --------------------------------------------------------------------------------------------------------


def peak(method: str, steps: int, **size: Any) -> measure.Row:
    """Peak memory of one run, beyond model and data; for a fresh process."""
    problem = Problem.make(**size)
    if method == "func jvp":
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))  # loads what the first use of it loads
    most = measure.Peak(size["device"])
    METHODS[method](problem, steps)
    return {"peak_MiB": most.mib()}


def errors(methods: list[str], steps: int, pairs: int, warm: int, **size: Any) -> dict[str, float]:
    """Median over batch pairs of the distance to float64, relative to the gradient's length."""
    found: dict[str, list[float]] = {m: [] for m in methods if m not in FIRST_ORDER}
    for seed in range(pairs):
        problem = Problem.make(**size, seed=seed)
        optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-4)
        for number in range(warm):
            optimizer.zero_grad(set_to_none=True)
            problem.inner_loss(problem.parameters, problem.cutoff, number).backward()
            optimizer.step()
        exact, references = problem.exact(), {}
        for method, values in found.items():
            name = EXACT.get(method, method)
            if name not in references:
                references[name] = METHODS[name](exact, steps)
            gradient = METHODS[method](problem, steps).double()
            values.append(float((gradient - references[name]).norm() / references[name].norm()))
    return {method: statistics.median(values) for method, values in found.items()}


def flops(problem: Problem) -> int:
    """Floating-point operations of the matrix products and convolutions of one plain step."""
    with FlopCounterMode(display=False) as counter:
        problem.inner_loss(problem.parameters, problem.cutoff, 0).backward()
    problem.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def unrolled_gib(method: str, px: int, batch: int, genes: int, steps: int) -> float:
    """About what unrolling takes: as much for each step, most of it copies of the parameters."""
    parameters = (11.2e6 + 513 * genes) / 18.9e6
    return steps * (UNROLLED[method] * parameters + 0.05 * batch / 16 * (px / 64) ** 2)


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each size and method."""
    chosen = options.methods or list(METHODS)
    found = []
    for px, batch, genes in itertools.product(options.px, options.batch, options.genes):
        size = {"backbone": options.backbone, "px": px, "batch": batch, "genes": genes}
        for steps in options.steps:
            found += _group([m for m in chosen if m not in OF_ONE_STEP], size, steps, options)
        if any(m in OF_ONE_STEP for m in chosen):
            found += _group(["plain", *(m for m in chosen if m in OF_ONE_STEP)], size, 1, options)
    return found


def _group(methods: list[str], size: dict[str, Any], steps: int, options: argparse.Namespace) -> list[measure.Row]:
    """Methods that share their plain steps."""
    device = options.device
    needed = {m: unrolled_gib(m, size["px"], size["batch"], size["genes"], steps) for m in UNROLLED}
    run = [m for m in methods if needed.get(m, 0) <= options.limit_gib]
    problem = Problem.make(**size, device=device)
    seconds = measure.alternate({m: partial(METHODS[m], problem, steps) for m in run}, options.repeats)
    tera = steps * flops(problem) / 1e12 if device.type == "cuda" else None
    del problem
    peaks = {
        m: measure.fresh("speed_hypergradient:peak", device, method=m, steps=steps, **size).get("peak_MiB")
        for m in run
        if m in (options.peaks or METHODS)
    }
    error = errors(run, steps, options.error, options.warm, **size, device=device) if options.error else {}
    found = []
    for method in methods:
        row: measure.Row = {**size, "plain_steps": steps, "method": method}
        if method in run:
            row |= measure.spread(seconds[method])
            row["ratio"] = row["seconds"] / statistics.median(seconds["plain"]) if "plain" in run else None
            row["peak_MiB"] = peaks.get(method)
            row["peak_ratio"] = peaks[method] / peaks["plain"] if peaks.get(method) and peaks.get("plain") else None
            row["error"] = error.get(method)
            row["TFLOP/s"] = tera / row["seconds"] if tera is not None and method in FIRST_ORDER else None
        else:
            print(f"{method}, {steps} steps: left out, would need about {needed[method]:.0f} GiB", file=sys.stderr)
        found.append(row)
    return [{k: v for k, v in row.items() if any(r.get(k) is not None for r in found)} for row in found]


def _default_limit() -> float:
    """16 GiB, less where the machine has less to spare."""
    return min(16, 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__)
    parser.add_argument("--px", type=int, nargs="+", default=[64])
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="spots in a batch")
    parser.add_argument("--genes", type=int, nargs="+", default=[15_000])
    parser.add_argument("--steps", type=int, nargs="+", default=[12], help="inner steps")
    parser.add_argument("--vary", choices=VARY, help="a grid of steps or of genes, in place of --steps or --genes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all of the above")
    parser.add_argument("--peaks", nargs="+", choices=METHODS, metavar="METHOD", help="whose memory; default: all")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet18")
    parser.add_argument("--error", type=int, nargs="?", const=1, default=0, metavar="PAIRS", help="of how many batches")
    parser.add_argument("--warm", type=int, default=10, help="training steps before errors are measured")
    parser.add_argument("--limit-gib", type=float, default=_default_limit(), help="above it unrolling is left out")
    options = measure.options(parser, quick=QUICK)
    vars(options).update(VARY.get(options.vary, {}) if not options.quick else {})
    measure.report("speed_hypergradient", rows(options), options)


if __name__ == "__main__":
    main()
