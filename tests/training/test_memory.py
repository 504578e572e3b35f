"""Where memory does not suffice, parts of a batch train as the batch does, or a sentence names what fits.

No GPU is needed: the backbones here raise what torch raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agl_bench import Backbone, Selector, Spots, Step, TrainingView
from agl_bench.data.room import Room, forward
from agl_bench.errors import TooLittleMemory
from agl_bench.training.evaluate import BATCH, evaluate, predict
from agl_bench.training.trainer import Trainer
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.hvg_k import HvgK
from agl_bench_plugins.selectors.pgl import Pgl

PX = 16


class Plain(Backbone):
    """Has room for any number of spots."""

    width, patch_px, learning_rate = 6, PX, 1e-3

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.mix = nn.Linear(3 * PX * PX, self.width)

    def forward(self, spots: Spots) -> Tensor:
        assert spots.patches is not None
        return torch.tanh(self.mix(2 * spots.patches.flatten(1).to(self.mix.weight.dtype) - 1))


class Narrow(Plain):
    """Runs out of memory with more than `most` spots, with a graph or without."""

    most: ClassVar[float] = float("inf")

    def forward(self, spots: Spots) -> Tensor:
        if len(spots.position) > Narrow.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(spots)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, most: float) -> Tensor:
        ctx.most = most
        return features.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if len(gradient) > ctx.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient, None


class NarrowBackward(Plain):
    """Likewise on the way back, when the head already has its gradient."""

    def forward(self, spots: Spots) -> Tensor:
        features: Tensor = _Backward.apply(super().forward(spots), Narrow.most)
        return features


class Dropping(Narrow):
    """With dropout."""

    def forward(self, spots: Spots) -> Tensor:
        return nn.functional.dropout(super().forward(spots), 0.4, self.training)


class Normed(Narrow):
    """With batch normalisation."""

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.norm = nn.BatchNorm1d(self.width)

    def forward(self, spots: Spots) -> Tensor:
        features: Tensor = self.norm(super().forward(spots))
        return features


class Learning(Selector):
    """Not linear in the losses, draws numbers, and learns together with the model."""

    learns_from, learning_rate = "training", 0.05

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        noise = torch.rand(len(losses), generator=self.generator, dtype=losses.dtype)
        weights = torch.sigmoid(self.logits) * noise * step.prediction.detach().std(0).mean()
        return self.weighted_mean((1 + losses).log(), weights) + self.logits.square().mean()


class Looking(Selector):
    """Has a loss of the predictions themselves."""

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        return losses.mean() + step.prediction.square().mean().sqrt()


SELECTORS: list[tuple[type[Selector], dict[str, Any]]] = [
    (Pgl, {}),
    (Agl, {}),
    (HvgK, {"k": 9}),
    (Dkgsb, {}),
    (Amal, {}),
    (Learning, {}),
]


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Say how many spots fit."""
    return lambda spots: monkeypatch.setattr(Narrow, "most", spots)


def gradients(trainer: Trainer, spots: int) -> list[Tensor]:
    """Of one batch of 12 with `spots` at a time: gradients, loss, losses, weights, and what is drawn next."""
    trainer.model.train()
    torch.manual_seed(3)
    trainer.room.spots = spots
    batch = trainer.store.batch(torch.from_numpy(trainer.rows.train[:12]))
    found = list(trainer._gradients(batch, 0, weigh=True))
    named = [*trainer.model.named_parameters(), *trainer.selector.named_parameters()]
    found += [p.grad for _, p in named if p.grad is not None]
    return [*found, torch.rand(3, generator=trainer.selector.generator)]


@pytest.mark.parametrize(("selector", "settings"), SELECTORS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("spots", [1, 5, 11])
def test_gradients_of_parts_add_up(
    make_toy: Callable, selector: type[Selector], settings: dict[str, Any], spots: int
) -> None:
    toy = make_toy(loss="squared_error")
    whole, parts = (gradients(toy.trainer(selector, Narrow, dtype=torch.float64, **settings), n) for n in (12, spots))
    assert len(whole) == len(parts) >= 8
    for one, other in zip(whole, parts, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12 * float(one.abs().max()))


def test_dropout_draws_the_same_twice(make_toy: Callable) -> None:
    toy = make_toy(loss="squared_error")
    trainer = toy.trainer(Agl, Dropping, dtype=torch.float64)
    found = gradients(trainer, 5)
    after = torch.rand(3)
    torch.manual_seed(3)
    batch = trainer.store.batch(torch.from_numpy(trainer.rows.train[:12]))
    seen = [trainer.model(part.spots) for part in batch.split(5)]  # the graph of all parts at once
    features, prediction = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    losses, step = trainer._losses(features, prediction, batch, 0)
    expected = torch.autograd.grad(trainer._combine(losses, step), list(trainer.model.parameters()))
    assert torch.equal(after, torch.rand(3))
    for one, other in zip(found[3:], expected, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", [Narrow, NarrowBackward])
@pytest.mark.parametrize("selector", [Agl, HvgK, Learning])
def test_a_training_that_runs_out_of_memory_ends_as_one_that_does_not(
    make_toy: Callable, most: Callable, backbone: type[Backbone], selector: type[Selector]
) -> None:
    toy = make_toy(loss="squared_error", warm_start="all", patience=2, epochs=7)
    settings = {"k": 9} if selector is HvgK else {}
    expected = toy.trainer(selector, backbone, dtype=torch.float64, **settings)
    records = list(expected)
    assert {r.round for r in records} == {0, 1} and expected.rooms == {}
    most(5)
    trainer = toy.trainer(selector, backbone, dtype=torch.float64, **settings)
    for one, other in zip(trainer, records, strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, rel=0, abs=1e-10)
        assert one.validation_pcc == pytest.approx(other.validation_pcc, rel=0, abs=1e-8)
    for name, tensor in expected.whole.state_dict().items():
        torch.testing.assert_close(trainer.whole.state_dict()[name], tensor, rtol=0, atol=1e-8)
    torch.testing.assert_close(trainer.fit.effective_weights, expected.fit.effective_weights)
    assert trainer.rooms["training"] == 5  # batches of at most 12 spots have 10 here
    assert trainer.rooms.get("evaluation", 5) <= 5 and ("evaluation" in trainer.rooms) == (backbone is Narrow)


def test_memory_that_is_short_for_a_while(make_toy: Callable, most: Callable) -> None:
    """In the middle of a pass, after steps of whole batches."""
    toy = make_toy(loss="squared_error", epochs=2)
    expected = toy.trainer(Learning, Narrow, dtype=torch.float64)
    records = list(expected)
    trainer = toy.trainer(Learning, Narrow, dtype=torch.float64)
    step, steps = trainer._at_once, []

    def short(batch: Any, epoch: int, *, weigh: bool) -> Any:
        steps.append(len(batch.row))
        found = step(batch, epoch, weigh=weigh)
        if len(steps) == 3:
            raise torch.OutOfMemoryError
        return found

    trainer._at_once = short  # type: ignore[method-assign]
    for one, other in zip(trainer, records, strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, rel=0, abs=1e-12)
    assert len(steps) == 3 and trainer.room.spots == (steps[-1] + 1) // 2
    for name, tensor in expected.whole.state_dict().items():
        torch.testing.assert_close(trainer.whole.state_dict()[name], tensor, rtol=0, atol=1e-12)


def sentence(trainer: Trainer) -> str:
    with pytest.raises(TooLittleMemory) as caught:
        list(trainer)
    return str(caught.value)


@pytest.mark.parametrize(("fit", "named"), [(5, 5), (9, 5), (4, 3), (2, 2)])
def test_a_correlation_names_the_batch_that_fits(make_toy: Callable, most: Callable, fit: int, named: int) -> None:
    toy = make_toy()
    most(fit)
    assert sentence(toy.trainer(Agl, Narrow)) == (
        "out of device memory with 10 spots in a batch, and the loss 'pearson' of a batch is no mean over its parts: "
        f"set protocol.batch_size={named}, which fits, for all that is compared, or use a smaller backbone "
        "or --precision bf16"
    )
    trainer = make_toy(batch_size=named).trainer(Agl, Narrow)
    assert len(list(trainer)) > 0 and "training" not in trainer.rooms, "what the sentence says helps"


def test_nothing_fits(make_toy: Callable, most: Callable) -> None:
    most(1)
    said = sentence(make_toy(precision="bf16").trainer(Agl, Narrow))
    assert said.endswith("over its parts: not even 2 fit, so use a smaller backbone")
    trainer = make_toy(loss="squared_error").trainer(Agl, Narrow)
    assert len(list(trainer)) > 0 and trainer.rooms == {"training": 1, "evaluation": 1}
    most(0)
    said = sentence(make_toy(loss="squared_error").trainer(Agl, Narrow))
    assert said.startswith("out of device memory with a single spot;")


@pytest.mark.parametrize(
    ("selector", "backbone", "why"),
    [(Agl, Normed, "batch normalisation looks at"), (Looking, Narrow, "Looking looks at the predictions of")],
)
def test_whoever_looks_at_a_whole_batch_is_named(
    make_toy: Callable, most: Callable, selector: type[Selector], backbone: type[Backbone], why: str
) -> None:
    most(5)
    said = sentence(make_toy(loss="squared_error").trainer(selector, backbone))
    assert f"and {why} a whole batch: set protocol.batch_size=5, which fits," in said


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "set protocol.outer_batch_size=3 for"),
        ({"inner_batch_size": 10}, "set protocol.outer_batch_size=3 and protocol.inner_batch_size=3 for"),
        ({"outer_batch_size": 2, "inner_batch_size": 10}, "set protocol.inner_batch_size=5 for"),
        ({"outer_batches": 2, "outer_batch_size": 8}, "set protocol.outer_batch_size=4 for"),
    ],
)
@pytest.mark.parametrize("selector", [Dkgsb, Amal])
def test_a_look_ahead_names_the_batch_that_fits(
    make_toy: Callable, most: Callable, selector: type[Selector], settings: dict[str, Any], remedy: str
) -> None:
    most(5)
    said = sentence(make_toy(loss="squared_error", **settings).trainer(selector, Narrow))
    assert said.startswith("out of device memory in a look-ahead with ") and remedy in said
    told = {key: int(value) for key, value in re.findall(r"protocol\.(\w+)=(\d+)", said)}
    trainer = make_toy(**{"loss": "squared_error", **settings, **told}).trainer(selector, Narrow)
    assert any(record.outer for record in trainer), "what the sentence says helps"


def test_predictions_and_scores_are_the_same(make_toy: Callable, most: Callable) -> None:
    toy = make_toy()
    model, rows = toy.model(Narrow).double(), torch.from_numpy(toy.rows.train)
    columns = torch.arange(4)
    expected = predict(model, toy.development, rows, columns)
    scores = evaluate(model, toy.test, toy.development, rows, toy.genes.primary)
    most(7)
    room = Room(BATCH)
    found = predict(model, toy.development, rows, columns, room)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert room.spots <= 7 and room.is_halved and model.training
    again = evaluate(model, toy.test, toy.development, rows, toy.genes.primary, None, room)
    for name, value in scores.summary().items():
        assert again.summary()[name] == pytest.approx(value, rel=0, abs=1e-9, nan_ok=True)


def test_no_row_is_lost_or_seen_twice() -> None:
    """Memory that is short at times, with any length and any size."""
    rng = np.random.default_rng(0)
    for length in range(1, 40):
        room, left = Room(int(rng.integers(1, 12))), [3]

        def results(batches: list[np.ndarray], room: Room = room, left: list[int] = left) -> Any:
            for batch in batches:
                if len(batch) > 1 and left[0] and rng.random() < 0.4:
                    left[0] -= 1
                    raise torch.OutOfMemoryError
                assert len(batch) <= room.spots
                yield batch

        assert np.concatenate(forward(np.arange(length), room, results)).tolist() == list(range(length))
        assert room.is_halved == (left[0] < 3)


def test_a_fault_that_is_not_of_memory_goes_through() -> None:
    def results(batches: list[np.ndarray]) -> Any:
        yield from batches[:1]
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        forward(np.arange(9), Room(3), results)


def test_parts_of_a_batch(make_toy: Callable) -> None:
    toy = make_toy()
    batch = toy.development.batch(torch.arange(11))
    parts = batch.split(4)
    assert [len(p.row) for p in parts] == [4, 4, 3]
    for name in ("patches", "position", "section"):
        assert torch.equal(torch.cat([getattr(p.spots, name) for p in parts]), getattr(batch.spots, name))
    assert torch.equal(torch.cat([p.expression for p in parts]), batch.expression)
    bare = replace(batch, spots=replace(batch.spots, patches=None, embedding=torch.eye(11)))
    assert [p.spots.patches for p in bare.split(6)] == [None, None]
    assert torch.equal(torch.cat([p.spots.embedding for p in bare.split(6)]), torch.eye(11))
