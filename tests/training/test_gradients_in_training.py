"""Selectors that look at gradients, in the trainer: they are those of the model, and a resume changes nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agl_bench.errors import NoGradients
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.interfaces.spots import Spots
from agl_bench.maths.hypergradient import OneStep
from agl_bench.training.trainer import Trainer
from agl_bench_plugins.selectors.forkmerge import ForkMerge
from agl_bench_plugins.selectors.gradient_cosine import GradientCosine
from agl_bench_plugins.selectors.gradnorm import GradNorm
from agl_bench_plugins.selectors.ol_aux import OlAux
from agl_bench_plugins.selectors.pcgrad import PcGrad
from agl_bench_plugins.selectors.slgrad import SlGrad

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
ZOO: list[tuple[type[Selector], dict[str, Any]]] = [
    (GradientCosine, {}),
    (GradientCosine, {"weight": "sign_late"}),
    (OlAux, {"horizon": 3, "beta": 0.1}),
    (OlAux, {"measure": "dot_all", "beta": 10.0}),
    (SlGrad, {}),
    (GradNorm, {"blocks": 4}),
    (PcGrad, {"blocks": 4}),
    (ForkMerge, {"blocks": 2, "steps": 2}),
]


class Split(Backbone):
    """Two layers, the second of which is the late part."""

    width, patch_px, learning_rate, splits, late_prefixes = 5, 16, 1e-3, True, ("second.",)
    centre: Tensor

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        assert example.patches is not None
        self.register_buffer("centre", example.patches.flatten(1).mean(0))
        self.first, self.second = nn.Linear(768, 7), nn.Linear(7, self.width)

    def early(self, spots: Spots) -> Tensor:
        assert spots.patches is not None
        # What all spots share is taken off: where predictions vary little about a large mean, float32 has few digits of
        # their gradients, however these are found.
        return nn.functional.silu(self.first(10 * (spots.patches.flatten(1).to(self.centre.dtype) - self.centre)))

    def late(self, hidden: Tensor) -> Tensor:
        return nn.functional.silu(self.second(hidden))


class Normalised(Split):
    """With batch normalisation, in a late part that is not told apart."""

    splits, late_prefixes = False, ()

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, spots: Spots) -> Tensor:
        return self.late(self.norm(self.early(spots)))


class Watched(OlAux):
    """Its weights are the agreement of each batch alone, which is compared."""

    trainer: Trainer
    errors: list[float]

    def observe(self, losses: Tensor, step: Step) -> None:
        within = {"dot_late": "late", "dot_all": "all"}.get(self.measure, "features")
        expected, most = agreement(self.trainer, losses, step, within, cosine=self.measure == "cosine")
        self.weights.zero_()
        super().observe(losses, step)
        self.errors.append(float((self.weights - expected).abs().max() / most))


class Narrow(Watched):
    """Looks at some of the genes only."""

    def __init__(self, view: TrainingView, **settings: Any) -> None:
        super().__init__(view, **settings)
        self.used = (view.genes.rank < 9) | view.genes.primary


class WatchedCosine(GradientCosine):
    """Its weights in each batch are compared."""

    trainer: Trainer
    errors: list[float]

    def observe(self, losses: Tensor, step: Step) -> None:
        (slope,) = torch.autograd.grad(self(losses, step), losses, retain_graph=True)
        expected, _ = agreement(self.trainer, losses, step, "features", cosine=True)
        expected = torch.where(self.is_primary, 1, expected.clamp(min=0))
        self.errors.append(float((slope / slope[self.is_primary].mean() - expected).abs().max()))


def parameters_of(trainer: Trainer, within: str) -> list[Tensor]:
    """Of the model itself, without the head."""
    backbone = trainer.model.backbone
    is_late = within == "late" and backbone.splits
    return [p for n, p in backbone.named_parameters() if not is_late or n.startswith(backbone.late_prefixes)]


def agreement(trainer: Trainer, losses: Tensor, step: Step, within: str, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Of each gene, by a backward pass for each; and the most that it could be, of any."""
    at = [step.features] if within == "features" else parameters_of(trainer, within)
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
        parts = zip(at, found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts]))
    grads = torch.stack(rows)
    primary = grads[trainer.primary].mean(0)
    dots = grads @ primary
    sizes = grads.norm(dim=1) * primary.norm()
    return (torch.where(sizes > 0, dots / sizes, 0), torch.tensor(1)) if cosine else (dots, sizes.max())


def largest_error(toy: Any, cls: Any, backbone: type[Backbone], dtype: torch.dtype, **settings: Any) -> float:
    """Over all steps that are observed."""
    trainer = toy.trainer(cls, backbone, dtype=dtype, **settings)
    trainer.selector.trainer, trainer.selector.errors = trainer, []
    list(trainer)
    assert len(trainer.selector.errors) > 1
    return max(trainer.selector.errors)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("loss", ["pearson", "squared_error"])
@pytest.mark.parametrize("backbone", [Split, Normalised])
@pytest.mark.parametrize("cls", [Watched, Narrow])
@pytest.mark.parametrize("measure", ["cosine", "dot", "dot_late", "dot_all"])
def test_ol_aux_sees_the_gradients_of_the_model(
    make_toy: Callable[..., Any], measure: str, cls: Any, backbone: Any, loss: str, dtype: torch.dtype
) -> None:
    """To the accuracy that is promised, of the largest product of norms.

    The narrow one after a warm start with all genes.
    """
    warm = {"warm_start": "all", "patience": 1, "epochs": 20} if cls is Narrow else {"epochs": 2}
    toy = make_toy(loss=loss, **warm)
    assert largest_error(toy, cls, backbone, dtype, measure=measure, horizon=1, beta=1.0) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("loss", ["pearson", "squared_error"])
@pytest.mark.parametrize("backbone", [Split, Normalised])
def test_gradient_cosine_sees_the_gradients_of_the_model(
    make_toy: Callable[..., Any], backbone: Any, loss: str, dtype: torch.dtype
) -> None:
    assert largest_error(make_toy(epochs=2, loss=loss), WatchedCosine, backbone, dtype) < CLOSE[dtype]


class Ahead(Selector):
    """Looks at gradients in a look-ahead."""

    reference = "test"

    def __init__(self, view: TrainingView, *, reach: Any = "all", mode: Any = "double backward") -> None:
        super().__init__(view)
        self.hypergradient = OneStep(0.1, reach, mode)
        self.bias = nn.Parameter(torch.zeros((), dtype=view.dtype))
        self.errors: list[float] = []

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        aligned = step.alignment(losses, losses[self.is_primary].mean(), "all")
        if torch.is_grad_enabled():
            rows = [torch.autograd.grad(loss, step.shared, retain_graph=True) for loss in losses]
            grads = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            expected = grads @ grads[self.is_primary].mean(0)
            self.errors.append(float((aligned - expected).abs().max() / expected.abs().max()))
            self.sizes = {sum(p.numel() for p in step.shared), sum(p.numel() for p in step.late)}
        return self.weighted_mean(losses, torch.sigmoid(aligned + self.bias))


@pytest.mark.parametrize("reach", ["late", "all"])
def test_a_look_ahead_has_the_gradients_of_what_it_moves(make_toy: Callable[..., Any], reach: str) -> None:
    trainer = make_toy(epochs=1, outer_batches=2).trainer(Ahead, Split, dtype=torch.float64, reach=reach)
    trainer._outer_pass(0)
    assert trainer.selector.errors and max(trainer.selector.errors) < 1e-10
    whole, late = (sum(p.numel() for p in parameters_of(trainer, within)) for within in ("all", "late"))
    assert trainer.selector.sizes == ({late} if reach == "late" else {whole, late})


def test_a_look_ahead_that_differentiates_forward_says_that_it_has_none(make_toy: Callable[..., Any]) -> None:
    trainer = make_toy(epochs=1).trainer(Ahead, Split, mode="jvp")
    with pytest.raises(NoGradients, match="double backward"):
        trainer._outer_pass(0)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.parametrize(
    "schedule", [{"epochs": 5}, {"epochs": 20, "warm_start": "all", "patience": 2}], ids=["plain", "warm"]
)
@pytest.mark.parametrize(("cls", "settings"), ZOO, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_training_that_is_cut_off_ends_as_if_it_had_not_been(
    make_toy: Callable[..., Any], cls: type[Selector], settings: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """Bit for bit; and the weights are those of a method, not of plain averaging."""
    toy = make_toy(**schedule)
    whole, states, effective = toy.trainer(cls, Normalised, **settings), [], []
    for record in whole:
        states.append(through_a_file(whole.state()))
        effective.append(record.effective)
    expected = [*whole.whole.state_dict().values(), *whole.selector.state_dict().values(), whole.fit.effective_weights]
    for cut in (0, len(states) // 2):
        torch.rand(cut + 1)  # a new process has drawn other numbers before
        trainer = toy.trainer(cls, Normalised, **settings)
        trainer.resume(states[cut])
        list(trainer)
        found = [*trainer.whole.state_dict().values(), *trainer.selector.state_dict().values()]
        for one, other in zip([*found, trainer.fit.effective_weights], expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), f"cut off after epoch {cut}"
    assert whole.fit.effective_weights.isfinite().all()
    plain = toy.genes.auxiliary_count
    assert any(abs(e - plain) > 1e-3 * plain for e in effective)


@pytest.mark.parametrize("auxiliary", ["none", "some"])
@pytest.mark.parametrize(("cls", "settings"), ZOO, ids=lambda v: getattr(v, "__name__", str(v)))
def test_trains_on_either_loss_and_without_auxiliary_genes(
    make_toy: Callable[..., Any], cls: type[Selector], settings: dict[str, Any], auxiliary: str
) -> None:
    toy = make_toy(epochs=2, loss="squared_error", only_primary=auxiliary == "none")
    records = list(toy.trainer(cls, Split, **settings))
    assert len(records) == 2 and all(torch.tensor(r.training_loss).isfinite() for r in records)


def test_what_is_differentiated_twice_is_not_compiled(
    make_toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: ("compiled", model))
    toy = make_toy(compile=True)
    assert toy.trainer(GradientCosine, Split).trained[0] == "compiled"
    twice = toy.trainer(GradientCosine, Split, weight="sign_all")
    assert twice.trained is twice.model
