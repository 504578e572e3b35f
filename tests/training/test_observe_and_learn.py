"""What a selector may do beside `forward`: look at training batches, and move its parameters by a rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from agl_bench.errors import BadPlugin, BadSpec
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.maths.hypergradient import OneStep

MakeToy = Callable[..., object]


class Watcher(Selector):
    """Counts the batches it has observed, and the genes' alignments with the primary ones."""

    reference = "test"
    seen: Tensor
    aligned: Tensor

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("aligned", torch.zeros(len(view.genes.names), dtype=view.dtype))

    def observe(self, losses: Tensor, step: Step) -> None:
        found = step.alignment(losses, losses[self.is_primary].mean(), "all")
        with torch.no_grad():
            self.seen += 1
            self.aligned.copy_(found)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        return self.weighted_mean(losses, torch.sigmoid(self.aligned))


class Setter(Selector):
    """Takes the hypergradient for its weights."""

    reference = "test"
    hypergradient = OneStep(0.5)

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.score = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))
        self.taken: list[Tensor] = []

    def learn(self, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.score.copy_(-gradients["score"])
        self.taken.append(self.score.clone())

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        return self.weighted_mean(losses, torch.sigmoid(self.score))


def test_observes_each_training_batch_once(make_toy: MakeToy) -> None:
    toy = make_toy(epochs=3)
    trainer = toy.trainer(Watcher)
    batches = sum(len(trainer._batches(toy.rows.train, "train", epoch, 12)) for epoch in range(3))
    list(trainer)
    # The best state comes back at the end, of an epoch that may not be the last.
    epochs = trainer.fit.best_epoch + 1
    assert trainer.selector.seen == batches // 3 * epochs
    assert trainer.selector.aligned.abs().sum() > 0


def test_does_not_observe_a_warm_start(make_toy: MakeToy) -> None:
    trainer = make_toy(epochs=2, warm_start="all", patience=100).trainer(Watcher)
    list(trainer)
    assert trainer.selector.seen == 0


def test_learns_by_its_own_rule(make_toy: MakeToy) -> None:
    trainer = make_toy(epochs=2).trainer(Setter)
    list(trainer)
    assert trainer.selector.taken
    assert all(t.abs().sum() > 0 for t in trainer.selector.taken)
    assert not trainer.outer_optimizer.state  # Adam has taken no step


def test_what_is_observed_survives_a_resume(make_toy: MakeToy) -> None:
    straight = make_toy(epochs=4).trainer(Watcher)
    list(straight)
    first = make_toy(epochs=4).trainer(Watcher)
    records = iter(first)
    next(records)
    second = make_toy(epochs=4).trainer(Watcher)
    second.resume(first.state())
    list(second)
    assert torch.equal(second.selector.aligned, straight.selector.aligned)
    assert torch.equal(second.whole.head.weight, straight.whole.head.weight)


def test_a_view_says_what_it_does_not_know(make_toy: MakeToy) -> None:
    toy = make_toy()
    view = TrainingView(toy.genes, torch.zeros(3, len(toy.genes.names)), torch.Generator())
    assert view.spot_count == 3
    for ask in (lambda: view.position, lambda: view.section, lambda: view.score_genes("mean")):
        with pytest.raises(BadSpec, match="knows no"):
            ask()
    with pytest.raises(BadPlugin, match="needs_counts = True"):
        _ = view.counts


class OneNumber(Selector):
    """One weight for all genes, made of several numbers whose gradients are one."""

    reference = "test"
    hypergradient = OneStep(0.5)

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.parts = nn.Parameter(torch.zeros(8, dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        return self.weighted_mean(losses, torch.sigmoid(self.parts.sum()).expand(len(losses)))


def test_a_gradient_that_is_one_number_seen_many_times(make_toy: MakeToy) -> None:
    """Autograd answers with an expanded tensor; training goes on, and adds nothing to it."""
    trainer = make_toy(epochs=3).trainer(OneNumber)
    assert len(list(trainer)) == 3
    parts = trainer.selector.parts.detach()
    assert bool((parts == parts[0]).all()) and float(parts[0]) != 0
