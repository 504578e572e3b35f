"""The selectors that learn, in training: they move, in whatever parts a look-ahead comes, and begin where they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from agl_bench.interfaces.selector import Selector
from agl_bench.maths.hypergradient import OneStep
from agl_bench.training.trainer import Trainer
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal_spot import AmalSpot
from agl_bench_plugins.selectors.auto_lambda import AutoLambda
from agl_bench_plugins.selectors.auxilearn import AuxiLearn
from agl_bench_plugins.selectors.maxl_weights import MaxlWeights
from agl_bench_plugins.selectors.soft_topk import SoftTopk
from agl_bench_plugins.selectors.uncertainty import Uncertainty

LEARNERS: list[tuple[type[Selector], dict[str, Any]]] = [
    (Uncertainty, {}),
    (AuxiLearn, {}),
    (AuxiLearn, {"form": "linear"}),
    (AmalSpot, {}),
    (MaxlWeights, {}),
    (AutoLambda, {}),
    (SoftTopk, {}),
    (SoftTopk, {"learns": "k"}),
]


def name_of(value: Any) -> str:
    return str(getattr(value, "__name__", "-".join(map(str, value.values())) if isinstance(value, dict) else value))


def seen_in_learning(trainer: Trainer, epochs: int = 1) -> list[dict[str, Tensor]]:
    """The hypergradients of every outer step."""
    seen: list[dict[str, Tensor]] = []
    plain = trainer.selector.learn

    def learn(gradients: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        seen.append({n: g.clone() for n, g in gradients.items()})
        plain(gradients, optimizer)

    trainer.selector.learn = learn  # type: ignore[method-assign]
    list(islice(trainer, epochs))
    return seen


@pytest.mark.parametrize(("cls", "settings"), LEARNERS, ids=name_of)
@pytest.mark.parametrize("loss", ["pearson", "squared_error"])
def test_every_parameter_moves(
    make_toy: Callable[..., Any], cls: type[Selector], settings: dict[str, Any], loss: str
) -> None:
    toy = make_toy(epochs=2, loss=loss, augment=True)
    trainer = toy.trainer(cls, **settings)
    before = {n: p.detach().clone() for n, p in trainer.selector.named_parameters()}
    records = list(trainer)
    assert len(records) == 2 and (trainer.fit.effective_weights[toy.genes.primary] > 0).all()
    for name, parameter in trainer.own.items():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name])
    assert bool(records[-1].outer) == (cls.learns_from == "validation")


@pytest.mark.parametrize("cls", list(dict.fromkeys(cls for cls, _ in LEARNERS)))
def test_without_auxiliary_genes_there_is_nothing_to_weigh(make_toy: Callable[..., Any], cls: type[Selector]) -> None:
    trainer = make_toy(epochs=2, only_primary=True).trainer(cls)
    assert all(torch.isfinite(torch.tensor(r.validation_pcc)) for r in trainer)


@pytest.mark.parametrize(("cls", "settings"), LEARNERS, ids=name_of)
def test_an_inner_loss_of_several_batches_is_the_mean_of_theirs(
    make_toy: Callable[..., Any], cls: type[Selector], settings: dict[str, Any]
) -> None:
    """In one look-ahead, where some engines take part after part: as double backward over all at once."""
    if cls.learns_from == "training":
        return
    toy = make_toy(outer_batches=3, augment=False)
    found = []
    for mode in ("auto", "double backward"):
        trainer = toy.trainer(cls, dtype=torch.float64, **settings)
        if isinstance(method := trainer.selector.hypergradient, OneStep) and method.mode == "auto":
            trainer.selector.hypergradient = replace(method, mode=mode)
        found.append(seen_in_learning(trainer)[0])
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-12)


def test_amal_by_spots_is_agl_until_its_weights_move(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(outer_start=1, epochs=3)
    spots, agl = toy.trainer(AmalSpot), toy.trainer(Agl)
    for epoch, (one, other) in enumerate(zip(spots, agl, strict=True)):
        same = all(torch.equal(a, b) for a, b in zip(spots.model.parameters(), agl.model.parameters(), strict=True))
        assert same == (epoch == 0) == (one.training_loss == other.training_loss)
    assert torch.allclose(spots.fit.effective_weights, agl.fit.effective_weights)


def test_a_look_ahead_moves_the_spots_of_its_batches_and_no_others(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(batch_size=6, epochs=1)
    trainer = toy.trainer(AmalSpot, outer_rate=1e5)
    gradients = [g["weights"] for g in seen_in_learning(trainer)]
    touched = torch.stack([g != 0 for g in gradients])
    assert len(gradients) > 3 and (touched.sum(1) <= 6).all() and (touched.sum(0) <= 1).all()
    assert touched.any(0).sum() > 0.9 * len(toy.rows.train)  # a pass takes every training spot once
    weights = trainer.selector.weights.detach()
    assert weights.min() >= 0 and weights.max() <= 2 and (weights != 1).any()


def test_rectified_weights_stay_at_zero_or_above(make_toy: Callable[..., Any]) -> None:
    trainer = make_toy(epochs=4).trainer(MaxlWeights, learning_rate=0.5)
    list(trainer)
    weights = trainer.selector.weights.detach()
    assert weights.min() == 0 and weights.max() > 1
