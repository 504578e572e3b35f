"""Gradients of an outer loss with respect to parameters that act only through the inner optimisation.

    θ_0 = θ,   θ_{h+1} = rule(θ_h, ∇_θ J(θ_h, φ)),   hypergradient = dE(θ_H)/dφ

Ignorant of genes, batches and models: θ and φ are named tensors, J and E functions of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
InnerLoss = Callable[[Tensors, Tensors], Tensor]
OuterLoss = Callable[[Tensors], Tensor]
Slots = tuple[Tensor, ...]

LARGE_MODEL = 4_000_000  # parameters; below, backpropagation is faster and its graphs take some hundred megabytes


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
        self, inner_loss: InnerLoss, outer_loss: OuterLoss, parameters: Tensors, hyper: Tensors, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """E(θ_H) and dE/dφ.

        Args:
            inner_loss: (θ, φ) -> J, a scalar on the graph of both.
            outer_loss: θ -> E, a scalar.
            parameters: θ, by name; not changed.
            hyper: φ, by name; not changed.
            rate: learning rate of the model, used where the rule names none of its own.

        Returns:
            E(θ_H), and a gradient for each tensor of φ, zeros where J does not depend on it; all detached.
        """


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Exact derivative through `steps` inner steps, with fresh optimiser state for each look-ahead.

    Two ways to the same number (Franceschi et al. 2017):

    - "reverse": backpropagation through all steps. Any number of hyper-parameters at about three times the price of the
      plain steps; memory grows by a backward graph with each step.
    - "forward": the tangent dθ/dφ is carried along. About three times the price of the plain steps *for each scalar* of
      φ; memory does not grow with the steps.

    "auto" carries the tangent where φ is a single scalar, there are several steps and the model is not small: there
    the graphs of ResNet-18 at 224 px would take tens of gigabytes. It depends on nothing else, so that results do not.
    """

    steps: int = 1
    rule: Rule = SGD()
    mode: Literal["auto", "forward", "reverse"] = "auto"

    def __call__(
        self, inner_loss: InnerLoss, outer_loss: OuterLoss, parameters: Tensors, hyper: Tensors, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Hypergradient.__call__`."""
        rate = rate if self.rule.learning_rate is None else self.rule.learning_rate
        single = sum(h.numel() for h in hyper.values()) == 1
        large = sum(p.numel() for p in parameters.values()) >= LARGE_MODEL
        forward = self.mode == "forward" or (self.mode == "auto" and single and large and self.steps > 1)
        return (self._forward if forward else self._reverse)(inner_loss, outer_loss, parameters, hyper, rate)

    def _reverse(
        self, inner_loss: InnerLoss, outer_loss: OuterLoss, parameters: Tensors, hyper: Tensors, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        phi = {name: h.detach().requires_grad_() for name, h in hyper.items()}
        theta: Tensors = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        slots = self._start(theta)
        for number in range(1, self.steps + 1):
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                inner_loss(theta, phi), list(theta.values()), create_graph=True, allow_unused=True
            )
            theta, slots = self._move(theta, dict(zip(theta, gradients, strict=True)), slots, number, rate)
        outer = outer_loss(theta)
        found = torch.autograd.grad(outer, list(phi.values()), allow_unused=True)
        return outer.detach(), {
            name: torch.zeros_like(h) if g is None else g for (name, h), g in zip(phi.items(), found, strict=True)
        }

    def _forward(
        self, inner_loss: InnerLoss, outer_loss: OuterLoss, parameters: Tensors, hyper: Tensors, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        phi = {name: h.detach() for name, h in hyper.items()}
        outer, found = torch.empty(()), {name: torch.zeros_like(h) for name, h in phi.items()}
        for name, h in phi.items():
            for entry in range(h.numel()):
                direction = {n: torch.zeros_like(t) for n, t in phi.items()}
                direction[name].view(-1)[entry] = 1
                outer, slope = self._along(direction, inner_loss, outer_loss, parameters, phi, rate)
                found[name].view(-1)[entry] = slope
        return outer, found

    def _along(
        self,
        direction: Tensors,
        inner_loss: InnerLoss,
        outer_loss: OuterLoss,
        parameters: Tensors,
        phi: Tensors,
        rate: float,
    ) -> tuple[Tensor, Tensor]:
        """E(θ_H) and its derivative along one direction of φ."""
        theta: Tensors = {name: p.detach() for name, p in parameters.items()}
        slots = self._start(theta)
        tangents = (_zeros(theta), {name: tuple(torch.zeros_like(s) for s in group) for name, group in slots.items()})
        for number in range(1, self.steps + 1):

            def step(
                at: Tensors, state: dict[str, Slots], hyper: Tensors, number: int = number
            ) -> tuple[Tensors, dict[str, Slots]]:
                gradients = torch.func.grad(inner_loss)(at, hyper)
                return self._move(at, gradients, state, number, rate)

            after: Any = torch.func.jvp(step, (theta, slots, phi), (*tangents, direction))
            (theta, slots), tangents = after
        result: Any = torch.func.jvp(outer_loss, (theta,), (tangents[0],))
        value, slope = result
        return value.detach(), slope.detach()

    def _start(self, theta: Tensors) -> dict[str, Slots]:
        return {name: self.rule.start(p) for name, p in theta.items()}

    def _move(
        self,
        theta: Tensors,
        gradients: Mapping[str, Tensor | None],
        slots: dict[str, Slots],
        number: int,
        rate: float,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        """One inner step; a parameter without a gradient stays where it is, as in torch.optim."""
        moved, state = {}, {}
        for name, p in theta.items():
            g = gradients[name]
            moved[name], state[name] = (
                (p, slots[name]) if g is None else self.rule.step(p, g, slots[name], number, rate)
            )
        return moved, state


def _zeros(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}
