"""Gradients of an outer loss with respect to parameters that act only through the inner optimisation.

    θ_0 = θ;  θ_{h+1} = rule(θ_h, ∇_θ J(θ_h, φ));  hypergradient = d E(θ_H) / dφ

Ignorant of genes, batches and models: `inner_loss` maps named tensors θ to a scalar J on the graph of φ, `outer_loss`
maps them to a scalar E.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
ScalarOf = Callable[[Parameters], Tensor]
Slots = tuple[Tensor, ...]


class Rule(ABC):
    """A differentiable optimiser step that follows its torch.optim namesake."""

    learning_rate: float | None  # None = the model's own

    @abstractmethod
    def start(self, parameter: Tensor) -> Slots:
        """Fresh per-parameter state."""

    @abstractmethod
    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """One update, out of place; `number` counts from 1."""


@dataclass(frozen=True)
class SGD(Rule):
    """θ − rate·g, with heavy-ball momentum as in torch.optim.SGD (no dampening)."""

    learning_rate: float | None = None
    momentum: float = 0.0

    def start(self, parameter: Tensor) -> Slots:
        """Nothing without momentum, else one velocity."""
        return (torch.zeros_like(parameter),) if self.momentum else ()

    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """See `Rule.step`."""
        if not self.momentum:
            return parameter - rate * gradient, ()
        velocity = self.momentum * slots[0] + gradient
        return parameter - rate * velocity, (velocity,)


@dataclass(frozen=True)
class Adam(Rule):
    """Kingma and Ba 2015, as in torch.optim.Adam: epsilon outside the root, after bias correction.

    Where the second moment is exactly zero the root has no finite derivative; such entries (head rows under a fully
    underflowed mask, dead units) take the step ε-divided and a zero derivative through the root.
    """

    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def start(self, parameter: Tensor) -> Slots:
        """First and second moment."""
        return torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """See `Rule.step`."""
        b1, b2 = self.betas
        first = b1 * slots[0] + (1 - b1) * gradient
        second = b2 * slots[1] + (1 - b2) * gradient * gradient
        moved = second > 0
        root = torch.where(moved, torch.where(moved, second, 1).sqrt(), 0) / (1 - b2**number) ** 0.5
        return parameter - rate / (1 - b1**number) * first / (root + self.epsilon), (first, second)


class Hypergradient(ABC):
    """How dE/dφ is obtained; a selector carries one as data."""

    @abstractmethod
    def __call__(
        self, inner_loss: ScalarOf, outer_loss: ScalarOf, parameters: Parameters, hyper: Sequence[Tensor], rate: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """E(θ_H) and dE/dφ.

        Args:
            inner_loss: θ -> J(θ, φ), a scalar on the graph of both.
            outer_loss: θ -> E(θ), a scalar.
            parameters: θ, by name; not changed.
            hyper: φ, leaf tensors that require gradients.
            rate: learning rate of the model, used where the rule names none of its own.

        Returns:
            E(θ_H), detached, and one gradient for each tensor of `hyper`, zeros where J does not depend on it.
        """


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Exact derivative through `steps` inner steps by reverse-mode differentiation (Franceschi et al. 2017).

    Fresh optimiser state for each look-ahead. Memory grows by one backward graph for each step; time is about three
    times that of the plain steps.
    """

    steps: int = 1
    rule: Rule = SGD()

    def __call__(
        self, inner_loss: ScalarOf, outer_loss: ScalarOf, parameters: Parameters, hyper: Sequence[Tensor], rate: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Hypergradient.__call__`."""
        outer = outer_loss(self.look_ahead(inner_loss, parameters, rate))
        gradients = torch.autograd.grad(outer, list(hyper), allow_unused=True)
        return outer.detach(), tuple(
            torch.zeros_like(h) if g is None else g for h, g in zip(hyper, gradients, strict=True)
        )

    def look_ahead(self, inner_loss: ScalarOf, parameters: Parameters, rate: float) -> dict[str, Tensor]:
        """θ_H on the graph of φ; the given parameters stay as they are."""
        rate = rate if self.rule.learning_rate is None else self.rule.learning_rate
        current = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        slots = {name: self.rule.start(p) for name, p in current.items()}
        for number in range(1, self.steps + 1):
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                inner_loss(current), list(current.values()), create_graph=True, allow_unused=True
            )
            moved: dict[str, Tensor] = {}
            for (name, p), g in zip(current.items(), gradients, strict=True):
                if g is None:  # a parameter that the loss does not reach stays where it is, as in torch.optim
                    moved[name] = p
                else:
                    moved[name], slots[name] = self.rule.step(p, g, slots[name], number, rate)
            current = moved
        return current
