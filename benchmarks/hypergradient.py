"""Is the hypergradient of a cut-off signal or noise, and where does it lead?

    python benchmarks/hypergradient.py signal      estimators on the same batches: signal-to-noise and cost
    python benchmarks/hypergradient.py starts      where k ends from three starts, on planted regimes

`signal`: a model is trained for some epochs and then held fixed. Each estimator gets the same passes over the training
and held-out spots, in the same batches and augmentations, at five cut-offs; a pass gives one number, the mean of its
hypergradients. SNR is |mean| / standard deviation of that number over passes, its square corrected for what noise alone
would give, root mean square over the cut-offs: 0 = noise. Cost is that of a pass against plain training steps: `steps`
times the training pass of the same model.

`starts`: `synthetic` with different genes planted. k* is the prefix of the ranking with the highest utility: +1 for a
helpful gene, −1 for a harmful gene, −¼ for a useless gene.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import measure
import numpy as np
import torch

from agl_bench import SGD, Adam, Hypergradient, OneStep, Spots, Unrolled
from agl_bench.bench.planted import best_cutoff
from agl_bench.bench.run import Bench, Setting
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.data.store import Dense
from agl_bench.interfaces.tunable import Value
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import Trainer

CUTOFFS = (0.1, 0.3, 0.5, 0.7, 0.9)
FIRST = 1000  # epoch number of the first pass that is measured: batches that training has not seen


@dataclass(frozen=True)
class Estimator:
    """A hypergradient with the protocol's part in it."""

    method: Hypergradient
    settings: dict[str, Value] = field(default_factory=dict)
    double: bool = False


ALL: dict[str, Value] = {"outer_batches": 0}
LIVE: dict[str, Value] = {"detach_weight_sum": False}
PAPER: dict[str, Value] = {"outer_batches": 1, "detach_weight_sum": True, "outer_augment": True}
CARRIED = Adam(carried=True)
ESTIMATORS = {
    "paper: fresh Adam, H 2": Estimator(Unrolled(2, Adam(corrected=False)), PAPER),
    "released code: fresh Adam, H 12": Estimator(Unrolled(12, Adam(corrected=False)), PAPER),
    "the same in float64": Estimator(Unrolled(12, Adam(corrected=False)), PAPER, double=True),
    "fresh Adam, H 12, means of losses": Estimator(Unrolled(12, Adam(corrected=False)), PAPER | ALL),
    "SGD .5, H 3 (former default)": Estimator(Unrolled(3, SGD(0.5)), {"outer_batches": 1}),
    "SGD .5, H 3, late": Estimator(Unrolled(3, SGD(0.5), reach="late"), {"outer_batches": 1}),
    "carried Adam, H 3": Estimator(Unrolled(3, CARRIED), {"outer_batches": 1}),
    "carried Adam, H 3, late": Estimator(Unrolled(3, CARRIED, reach="late"), {"outer_batches": 1}),
    "… new batches": Estimator(Unrolled(3, CARRIED, reach="late", batches="new"), {"outer_batches": 1}),
    "… means of losses (clean)": Estimator(Unrolled(3, CARRIED, reach="late", batches="new"), ALL),
    "… Σw live": Estimator(Unrolled(3, CARRIED, reach="late", batches="new"), ALL | LIVE),
    "… in float64": Estimator(Unrolled(3, CARRIED, reach="late", batches="new"), ALL, double=True),
    "… H 1": Estimator(Unrolled(1, CARRIED, reach="late", batches="new"), ALL),
    "… H 6": Estimator(Unrolled(6, CARRIED, reach="late", batches="new"), ALL),
    "… whole network": Estimator(Unrolled(3, CARRIED, batches="new"), ALL),
    "one SGD step, late, means of losses": Estimator(OneStep(0.5, "late"), ALL),
    "SGD .5, H 3, late, new batches, means": Estimator(Unrolled(3, SGD(0.5), reach="late", batches="new"), ALL),
}


class Recording:
    """Stands in for the outer optimiser: keeps gradients, moves nothing."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self.seen: list[float] = []

    def step(self) -> None:
        """Take down the gradient."""
        assert self.parameter.grad is not None
        self.seen.append(float(self.parameter.grad))


class Cell:
    """One fold with its data; makes trainers that differ in selector settings and protocol."""

    def __init__(self, device: torch.device, data: Path, dataset: str, fold: str, backbone: str, *sets: str) -> None:
        plugins = Plugins.discover()
        campaign = Campaign.of(
            plugins,
            selectors=["dkgsb"],
            datasets=[dataset],
            evaluation=["inter"],
            backbone=[backbone],
            fold=[fold],
            assignments=sets,
        )
        ((self.spec, self.plan),) = campaign.cells(plugins, data, device=device.type, fingerprint={})
        self.bench = Bench(plugins, data, device)
        self.setting: Setting = self.bench.setting(self.spec, self.plan)

    def trainer(self, protocol: dict[str, Value], **selector: Value) -> Trainer:
        """A fresh trainer; its model always starts from the same weights."""
        spec: RunSpec = replace(
            self.spec,
            selector=replace(self.spec.selector, settings=self.spec.selector.settings | selector),
            protocol=replace(self.spec.protocol, **protocol),  # type: ignore[arg-type]
        )
        model, chosen = self.bench.build(spec, self.setting)
        s = self.setting
        return Trainer(model, chosen, s.development, s.rows, s.genes, spec.protocol, seed=spec.seed)


def signal(options: argparse.Namespace) -> list[measure.Row]:
    """The table of estimators, for each dataset and training state."""
    rows = []
    for dataset, fold in (d.split(":") for d in options.datasets.split(",")):
        cell = Cell(options.device, options.data, dataset, fold, options.backbone)
        for epochs in options.epochs:
            rows += _signal(cell, dataset, epochs, options)
    return rows


def _signal(cell: Cell, dataset: str, epochs: int, options: argparse.Namespace) -> list[measure.Row]:
    never: dict[str, Value] = {"epochs": epochs, "patience": epochs, "outer_start": epochs}
    trained = cell.trainer(never)
    list(trained)
    wanted = [n for n in ESTIMATORS if not options.only or any(o in n for o in options.only.split(","))]
    rows = []
    for name in wanted:
        estimator = ESTIMATORS[name]
        numbers = np.zeros((len(CUTOFFS), options.passes))
        ratios = []
        for i, start in enumerate(CUTOFFS):
            trainer = cell.trainer(estimator.settings, start=start)
            _take_over(trainer, trained, estimator.double)
            trainer.selector.hypergradient = estimator.method
            plain = cell.trainer({})
            _take_over(plain, trained, double=False)
            recording = Recording(trainer.selector.cutoff)
            trainer.outer_optimizer = recording  # type: ignore[assignment]
            for turn in range(options.passes):
                recording.seen.clear()
                began = measure.now()
                trainer._outer_pass(FIRST + turn)
                looked = measure.now() - began
                numbers[i, turn] = np.mean(recording.seen)
                began = measure.now()
                plain._train_pass(FIRST + turn)
                ratios.append(looked / (measure.now() - began) / estimator.method.steps)
        mean, sd = numbers.mean(1), numbers.std(1, ddof=1)
        squared = np.maximum((mean / sd) ** 2 - 1 / options.passes, 0)
        rows.append(
            {"dataset": f"{dataset}, {epochs} epochs", "estimator": name, "SNR": float(np.sqrt(squared.mean()))}
            | {"cost / plain steps": statistics.median(ratios)}
            | {f"at {c:g}": f"{m / s:+.2f}" for c, m, s in zip(CUTOFFS, mean, sd, strict=True)}
        )
        print(rows[-1], flush=True)
    return rows


def _doubled(look: Callable[..., Spots], *given: object) -> Spots:
    """What a store shows, in float64."""
    spots = look(*given)
    patches, embedding = (None if t is None else t.double() for t in (spots.patches, spots.embedding))
    return replace(spots, patches=patches, embedding=embedding)


def _take_over(trainer: Trainer, trained: Trainer, double: bool) -> None:
    """The weights and the optimiser's state of a trained trainer, in float64 if asked for."""
    trainer.model.load_state_dict(trained.model.state_dict())
    if double:
        trainer.model.double()
        trainer.selector.double()
        trainer.store, trainer.scored = copy.copy(trainer.store), copy.copy(trainer.scored)
        for store in (trainer.store, trainer.scored):
            store.matrix = Dense(store.expression_of().double())
            store._look = functools.partial(_doubled, store._look)  # type: ignore[method-assign]
    trainer.model.train()
    trainer._steps = trained._steps
    for new, old in zip(trainer.model.parameters(), trained.model.parameters(), strict=True):
        state = trained.optimizer.state[old]
        trainer.optimizer.state[new] = {k: v.clone().to(new.dtype) for k, v in state.items()}


REGIMES = {
    "harm": (),
    "harm, other genes": ("synthetic.data_seed=1",),
    "help": ("synthetic.regime=helpful",),
    "null": ("synthetic.regime=null",),
}
WAYS: dict[str, tuple[dict[str, Value], dict[str, Value]]] = {
    "clean": ({}, {}),
    "clean, Σw live": (LIVE, {}),
    "clean, whole network": ({}, {"reach": "all"}),
    "paper: fresh Adam, H 2": (
        PAPER,
        {
            "inner": "adam_higher", "carried": False, "reach": "all", "batches": "same", "steps": 2,
            "bounded": False, "learning_rate": 3e-3,
        },
    ),
}  # fmt: skip


def starts(options: argparse.Namespace) -> list[measure.Row]:
    """Where k ends, for each regime and way."""
    rows = []
    for regime in options.regimes.split(",") if options.regimes else REGIMES:
        for fold in options.folds.split(","):
            cell = Cell(options.device, options.data, "synthetic", fold, options.backbone, *REGIMES[regime])
            truth = cell.bench.truth(cell.spec.dataset, cell.setting.genes)
            assert truth is not None
            best = best_cutoff(cell.setting.genes, truth)
            genes = cell.setting.genes.auxiliary_count
            for way in options.ways.split(";") if options.ways else WAYS:
                protocol, selector = WAYS[way]
                length: dict[str, Value] = {"epochs": options.length, "patience": options.length}
                ends, seconds = [], 0.0
                for start in (0.1, 0.5, 0.9):
                    trainer = cell.trainer(protocol | length, start=start, **selector)
                    began = time.perf_counter()
                    last = list(trainer)[-1]
                    seconds += time.perf_counter() - began
                    ends.append(last.selected)
                rows.append(
                    {"regime": regime, "fold": fold, "way": way, "k*": best}
                    | {f"from {s:g}": k for s, k in zip((0.1, 0.5, 0.9), ends, strict=True)}
                    | {
                        "spread .1–.5 %": 100 * abs(ends[0] - ends[1]) / genes,
                        "spread of all %": 100 * (max(ends) - min(ends)) / genes,
                        "seconds": seconds,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("what", choices=("signal", "starts"))
    made.add_argument("--data", type=Path, default=Path(os.environ.get("AGL_BENCH_DATA", "data")), help="of datasets")
    made.add_argument("--backbone", default="tiny")
    made.add_argument("--datasets", default="synthetic:D1,her2st:C2", help="signal: DATASET:FOLD,…")
    made.add_argument("--epochs", type=int, nargs="+", default=[10], help="signal: of training beforehand")
    made.add_argument("--passes", type=int, default=12, help="signal: for each cut-off")
    made.add_argument("--only", default="", help="signal: estimators whose name contains one of these, separated by ,")
    made.add_argument("--folds", default="D1,D2", help="starts")
    made.add_argument("--regimes", default="", help="starts: separated by ,")
    made.add_argument("--ways", default="", help="starts: separated by ;")
    made.add_argument("--length", type=int, default=40, help="starts: epochs")
    quick = {"datasets": "synthetic:D1", "epochs": [2], "passes": 2, "only": "one SGD", "folds": "D1",
             "regimes": "harm", "ways": "clean", "length": 2}  # fmt: skip
    options = measure.options(made, quick=quick)
    found = signal(options) if options.what == "signal" else starts(options)
    measure.report(f"hypergradient {options.what}", found, options)


if __name__ == "__main__":
    main()
