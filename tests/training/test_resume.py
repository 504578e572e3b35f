"""A training that is cut off after any epoch and taken up in a new trainer ends as if nothing had been."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.interfaces.spots import Spots
from agl_bench.maths.hypergradient import Adam, Unrolled
from agl_bench.training.records import EpochRecord
from agl_bench.training.trainer import Trainer
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.amal_spot import AmalSpot
from agl_bench_plugins.selectors.auto_lambda import AutoLambda
from agl_bench_plugins.selectors.auxilearn import AuxiLearn
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.hvg_k import HvgK
from agl_bench_plugins.selectors.maxl_weights import MaxlWeights
from agl_bench_plugins.selectors.pgl import Pgl
from agl_bench_plugins.selectors.random_k import RandomK
from agl_bench_plugins.selectors.soft_topk import SoftTopk
from agl_bench_plugins.selectors.uncertainty import Uncertainty

SELECTORS: list[tuple[type[Selector], dict[str, Any]]] = [
    (Pgl, {}),
    (Agl, {}),
    (HvgK, {"k": 9}),
    (RandomK, {"k": 9}),
    (Dkgsb, {}),
    (Amal, {}),
    (Uncertainty, {}),
    (AuxiLearn, {}),
    (AmalSpot, {}),
    (MaxlWeights, {"learning_rate": 0.5}),
    (AutoLambda, {}),
    (SoftTopk, {}),
    (SoftTopk, {"learns": "k"}),
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "alternating": {"epochs": 5, "outer_start": 1, "outer_every": 2},
    "warm": {"epochs": 7, "patience": 2, "warm_start": "all"},
    "two_stage": {
        "epochs": 8, "patience": 1, "warm_start": "learners", "schedule": "two_stage", "round_patience": 1,
        "outer_patience": 1, "outer_passes": 2, "outer_restart": True,
    },
}  # fmt: skip


class Jittery(Backbone):
    """Normalisation with running statistics, and dropout."""

    width, patch_px, learning_rate = 5, 16, 1e-2

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.mix = nn.Linear(768, self.width)
        self.norm = nn.BatchNorm1d(self.width)
        self.drop = nn.Dropout(0.3)

    def forward(self, spots: Spots) -> Tensor:
        assert spots.patches is not None
        return torch.tanh(self.drop(self.norm(self.mix(spots.patches.flatten(1)))))


class Drawing(Selector):
    """Learns from validation with momentum in its own draws; what it has drawn matters later."""

    learning_rate, hypergradient = 0.1, Unrolled(2, Adam(carried=True), mode="auto")

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names)))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        noise = torch.rand(len(losses), generator=self.generator)
        return self.weighted_mean(losses, torch.sigmoid(self.logits) * noise)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


def outcome(trainer: Trainer) -> list[Tensor]:
    fit = trainer.fit
    assert fit.effective_weights.numel()
    return [
        *trainer.whole.state_dict().values(),
        *trainer.selector.state_dict().values(),
        fit.effective_weights,
        torch.tensor([fit.best_epoch, fit.validation_pcc, fit.epochs], dtype=torch.float64),
    ]


def without_time(records: list[EpochRecord]) -> list[EpochRecord]:
    return [replace(r, seconds=0.0) for r in records]


def check(make: Callable[[], Trainer]) -> tuple[int, Trainer]:
    """Cut off after each epoch; returns the number of epochs and the undisturbed trainer."""
    whole, states, records = make(), [], []
    for record in whole:
        records.append(record)
        states.append(through_a_file(whole.state()))
    expected = outcome(whole)
    for epoch, state in enumerate(states):
        torch.rand(epoch + 1)  # a new process has drawn other numbers before
        trainer = make()
        trainer.resume(state)
        rest = list(trainer)
        assert repr(without_time(rest)) == repr(without_time(records[epoch + 1 :]))  # NaN equals NaN
        for one, other in zip(outcome(trainer), expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), f"cut off after epoch {epoch}"
        assert trainer.fit.hypergradient == whole.fit.hypergradient
    return len(records), whole


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("selector", "settings"), SELECTORS, ids=lambda v: getattr(v, "__name__", ""))
def test_any_selector_in_any_schedule(
    make_toy: Callable[..., Any], selector: type[Selector], settings: dict[str, Any], schedule: str
) -> None:
    toy = make_toy(**SCHEDULES[schedule])
    count, trainer = check(lambda: toy.trainer(selector, Jittery, **settings))
    assert count > 1
    if trainer.course.learns:
        assert trainer.fit.hypergradient


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_selector_draws_goes_on(make_toy: Callable[..., Any], seed: int) -> None:
    toy = make_toy(epochs=4, augment=True)
    check(lambda: toy.trainer(Drawing, Jittery, seed=seed))


def test_what_did_not_fit_into_memory_stays_in_parts(make_toy: Callable[..., Any]) -> None:
    """Also on a device where it would fit: the parts are summed in the order of before, with the same dropout."""
    toy = make_toy(epochs=4, loss="squared_error", augment=True)

    class Dropping(Backbone):
        width, patch_px, learning_rate = 5, 16, 1e-2
        most = 4

        def __init__(self, example: Spots) -> None:
            super().__init__(example)
            self.mix = nn.Linear(768, self.width)

        def forward(self, spots: Spots) -> Tensor:
            assert spots.patches is not None
            if len(spots.position) > self.most:
                raise torch.OutOfMemoryError
            return nn.functional.dropout(torch.tanh(self.mix(2 * spots.patches.flatten(1) - 1)), 0.3, self.training)

    class Roomy(Dropping):
        most = 10_000

    made: list[Trainer] = []

    def make() -> Trainer:
        made.append(toy.trainer(Drawing, Dropping if not made else Roomy))
        return made[-1]

    toy.protocol = replace(toy.protocol, outer_batch_size=3)
    check(make)
    assert all(trainer.rooms == made[0].rooms for trainer in made)
    assert made[0].rooms["training"] <= 4 and made[0].rooms["evaluation"] <= 4


def test_a_stopped_iteration_goes_on_by_itself(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(epochs=4)
    whole, stopped = toy.trainer(Dkgsb), toy.trainer(Dkgsb)
    records = list(whole)
    first = next(iter(stopped))
    rest = list(stopped)
    assert without_time([first, *rest]) == without_time(records)
    for one, other in zip(outcome(stopped), outcome(whole), strict=True):
        assert torch.equal(one, other)


def test_the_state_holds_what_it_says(make_toy: Callable[..., Any]) -> None:
    """The schedule went through a warm start and rounds, and each stage left its mark."""
    toy = make_toy(**SCHEDULES["two_stage"])
    trainer = toy.trainer(Dkgsb, Jittery)
    stages = [(state["course"]["round"], state["signal"] is not None, state["engine"] is not None)
              for _ in trainer for state in [trainer.state()]]  # fmt: skip
    assert stages[0] == (0, False, False) and stages[-1][0] >= 1
    assert stages[-1][1:] == (True, True)
    plain = toy.trainer(Pgl, Jittery)
    assert {trainer.state()["narrow"] is None for trainer in [plain] for _ in plain} == {False}
