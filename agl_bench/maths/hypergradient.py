"""Gradients of an outer loss with respect to parameters that act only through the inner optimisation.

    θ_0 = θ,   θ_{h+1} = rule(θ_h, ∇_θ J_h(θ_h, φ)),   hypergradient = dE(θ_H)/dφ

Ignorant of genes, batches and models: θ and φ are named tensors, J and E functions of them.

J and E may come in parts, e.g. one for each batch: forward, replay and one-step engines then need the memory of one.

Costs are in units of one plain step (forward, backward, update) where φ enters at the top of J, as a loss weight does:
then ∂/∂φ costs next to nothing and each second-order pass costs two plain ones. Memory is in graphs of one step.

    engine              cost of H steps            memory              exact
    Unrolled, forward   3 H for each scalar of φ   two graphs          yes
    Unrolled, reverse   3 H                        two graphs × H ×    yes
                                                   parts
    Unrolled, replay    4 H                        two graphs + H      yes
                                                   states
    OneStep             3                          two graphs          yes, of one SGD step
    Implicit            1 + 2 terms                two graphs          in the limit of terms, at a minimum of J
    FiniteDifference    2 H for each scalar of φ   one graph           to δ², if rounding allows
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = Mapping[str, Tensor]
Sum = Tensor | Iterable[Tensor]  # a scalar, or scalars that add up to it, each alive only while it is looked at
InnerLoss = Callable[[Tensors, Tensors, int], Sum]  # θ, φ, step from 0 -> J
OuterLoss = Callable[[Tensors], Sum]
Slots = tuple[Tensor, ...]

BLOCK = 1 << 18  # elements updated at once: a dozen passes over them stay in the processor's cache


# Inner rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The state of an optimiser, handed over to a look-ahead as a constant.

    Attributes:
        slots: per parameter, in the order of the rule's own state.
        count: steps taken so far.
    """

    slots: Mapping[str, Slots]
    count: int


class Rule(ABC):
    """A differentiable optimiser step that follows its torch.optim namesake.

    Attributes:
        learning_rate: None = the model's own.
        carried: start from the moments of the training optimiser, taken as constants, instead of from zero.
    """

    learning_rate: float | None
    carried: bool = False

    @abstractmethod
    def start(self, parameter: Tensor) -> Slots:
        """Fresh per-parameter state."""

    @abstractmethod
    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """One update, out of place and differentiable; `number` counts from 1."""

    def push(self, point: Dual, gradient: Tensor, tangent: Tensor, number: int, rate: float) -> None:
        """One update of a parameter, its state and their tangents, in place.

        Args:
            point: what moves.
            gradient: g, like the parameter.
            tangent: ġ, like the parameter.
            number: counts from 1.
            rate: learning rate.
        """
        after: Any = torch.func.jvp(
            lambda p, g, s: self.step(p, g, s, number, rate),
            (point.value, gradient, point.slots),
            (point.tangent, tangent, point.slot_tangents),
        )
        (value, slots), (moved, slot_tangents) = after
        for old, new in zip(
            (point.value, point.tangent, *point.slots, *point.slot_tangents),
            (value, moved, *slots, *slot_tangents),
            strict=True,
        ):
            old.copy_(new)


@dataclass(frozen=True)
class Dual:
    """A parameter and its optimiser state, each with its derivative along one direction of φ; all laid out alike."""

    value: Tensor
    tangent: Tensor
    slots: Slots
    slot_tangents: Slots

    def blocks(self, *others: Tensor) -> list[tuple[Dual, list[Tensor]]]:
        """Flat views of at most `BLOCK` elements in the order of memory, with those of other tensors laid out alike."""

        def cut(tensor: Tensor) -> tuple[Tensor, ...]:
            return torch.split(tensor.as_strided((tensor.numel(),), (1,)), BLOCK)

        columns = [cut(t) for t in (self.value, self.tangent, *self.slots, *self.slot_tangents, *others)]
        n = len(self.slots)
        return [
            (Dual(row[0], row[1], tuple(row[2 : 2 + n]), tuple(row[2 + n : 2 + 2 * n])), list(row[2 + 2 * n :]))
            for row in zip(*columns, strict=True)
        ]


@dataclass(frozen=True)
class SGD(Rule):
    """θ − rate·g, with heavy-ball momentum and L2 decay as in torch.optim.SGD (no dampening)."""

    learning_rate: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0

    def start(self, parameter: Tensor) -> Slots:
        """Nothing without momentum, else one velocity."""
        return (torch.zeros_like(parameter),) if self.momentum else ()

    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """See `Rule.step`."""
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not self.momentum:
            return parameter - rate * gradient, ()
        velocity = self.momentum * slots[0] + gradient
        return parameter - rate * velocity, (velocity,)

    def push(self, point: Dual, gradient: Tensor, tangent: Tensor, number: int, rate: float) -> None:
        """See `Rule.push`."""
        if self.momentum or self.weight_decay:
            super().push(point, gradient, tangent, number, rate)
        else:
            point.value.sub_(gradient, alpha=rate)
            point.tangent.sub_(tangent, alpha=rate)


@dataclass(frozen=True)
class Adam(Rule):
    """Kingma and Ba 2015, as in torch.optim.Adam: epsilon outside the root, after bias correction.

    Where the second moment is exactly zero the root has no finite derivative; such entries (head rows under a fully
    underflowed mask, dead units) take the step ε-divided and a zero derivative through the root.

    Attributes:
        betas: decay of the two moments.
        epsilon: added to the root of the second moment.
        corrected: whether ε is added after the bias correction of the second moment (torch.optim) or before it
            (`higher` 0.2.1, the authors' inner optimiser), where it weighs up to 1/√(1 − β₂) = 32 times more.
        weight_decay: L2, added to the gradient; with `decoupled`, taken off the parameter as in torch.optim.AdamW.
        carried: see `Rule`.
    """

    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    corrected: bool = True
    weight_decay: float = 0.0
    decoupled: bool = False
    carried: bool = False

    def start(self, parameter: Tensor) -> Slots:
        """First and second moment."""
        return torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, parameter: Tensor, gradient: Tensor, slots: Slots, number: int, rate: float) -> tuple[Tensor, Slots]:
        """See `Rule.step`."""
        b1, b2 = self.betas
        if self.weight_decay and self.decoupled:
            parameter = parameter * (1 - rate * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        first = b1 * slots[0] + (1 - b1) * gradient
        second = b2 * slots[1] + (1 - b2) * gradient * gradient
        moved = second > 0
        root = torch.where(moved, torch.where(moved, second, 1).sqrt(), 0)
        size, epsilon = self._scale(number, rate)
        return parameter - size * first / (root + epsilon), (first, second)

    def push(self, point: Dual, gradient: Tensor, tangent: Tensor, number: int, rate: float) -> None:
        """See `Rule.push`; in place and block by block, for less than twice the price of the plain update."""
        if self.weight_decay:
            super().push(point, gradient, tangent, number, rate)
            return
        b1, b2 = self.betas
        size, epsilon = self._scale(number, rate)
        for block, (g, dg) in point.blocks(gradient, tangent):
            (first, second), (d_first, d_second) = block.slots, block.slot_tangents
            first.mul_(b1).add_(g, alpha=1 - b1)
            d_first.mul_(b1).add_(dg, alpha=1 - b1)
            second.mul_(b2).addcmul_(g, g, value=1 - b2)
            d_second.mul_(b2).addcmul_(g, dg, value=2 * (1 - b2))
            root = second.sqrt()
            below = root + epsilon
            block.value.addcdiv_(first, below, value=-size)
            # d(m/(r + ε)) = (ṁ − m·v̇ / (2 r (r + ε))) / (r + ε), without the second term where v = 0, as in `step`.
            still = second == 0
            root.mul_(below).mul_(2).masked_fill_(still, 1)
            slope = torch.addcdiv(d_first, (first * d_second).masked_fill_(still, 0), root, value=-1)
            block.tangent.addcdiv_(slope, below, value=-size)

    def _scale(self, number: int, rate: float) -> tuple[float, float]:
        """Step size and ε with both bias corrections folded in: step = size · m / (√v + ε)."""
        b1, b2 = self.betas
        root = (1 - b2**number) ** 0.5
        return rate * root / (1 - b1**number), self.epsilon * (root if self.corrected else 1)


@dataclass(frozen=True)
class AdamW(Adam):
    """Loshchilov and Hutter 2019, as in torch.optim.AdamW: Adam with decay taken off the parameter."""

    weight_decay: float = 1e-2
    decoupled: bool = True


# Hypergradients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What a hypergradient is asked for; see `Hypergradient.__call__`."""

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    parameters: Tensors
    hyper: Tensors
    rate: float
    moments: Moments | None

    def after(self, hyper: Tensors, rule: Rule, steps: int) -> dict[str, Tensor]:
        """θ after `steps` inner steps with these φ, without a graph; part after part of each J."""
        rate = _rate(rule, self.rate)
        theta = {n: p.detach() for n, p in self.parameters.items()}
        slots, count = _start(rule, theta, self.moments)
        for h in range(steps):
            gradients, _ = _gradients(self.inner_loss(at := _leaves(theta), hyper, h), at)
            theta, slots = _move(rule, theta, gradients, slots, count + h + 1, rate)
        return {n: p.detach() for n, p in theta.items()}

    def outer(self, parameters: Tensors) -> Tensor:
        """E, without a graph."""
        with torch.no_grad():
            return _total(self.outer_loss(parameters))


class Hypergradient(ABC):
    """How dE/dφ is obtained; a selector carries one as data.

    Attributes:
        steps: inner losses that it asks for, J_0 … J_{steps − 1}.
        reach: which parameters the look-ahead moves: all of the model's, or those of its late part (the last stage of
            the backbone and the head), where the backbone says what that is.
        batches: whether all inner losses are of one batch or each of its own.
    """

    steps: int = 1
    reach: Literal["all", "late"] = "all"
    batches: Literal["same", "new"] = "same"

    def __call__(
        self,
        inner_loss: InnerLoss,
        outer_loss: OuterLoss,
        parameters: Tensors,
        hyper: Tensors,
        rate: float,
        moments: Moments | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """E and dE/dφ.

        Args:
            inner_loss: (θ, φ, step) -> J, a scalar on the graph of both, or scalars that add up to it.
            outer_loss: θ -> E, likewise.
            parameters: θ, by name; not changed.
            hyper: φ, by name; not changed.
            rate: learning rate of the model, used where the rule names none of its own.
            moments: of the training optimiser, for rules that carry them on.

        Returns:
            E (after the look-ahead, where there is one), and a gradient for each tensor of φ, zeros where J does not
            depend on it; all detached.
        """
        return self.solve(Problem(inner_loss, outer_loss, parameters, hyper, rate, moments))

    @abstractmethod
    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """What `__call__` returns; the one method to write."""

    def settled(self, inner_loss: InnerLoss, parameters: Tensors, hyper: Tensors, memory: int) -> Hypergradient:
        """The same with nothing left open; asked once, before the first outer step.

        Args:
            inner_loss, parameters, hyper: as for the call.
            memory: bytes of the device, all of them: a machine does not change, so that results do not.
        """
        return self


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Exact derivative through `steps` inner steps.

    Three ways to the same number (Franceschi et al. 2017):

    - "forward" carries the tangent dθ/dφ along: at each step one Hessian-vector product, by a double backward pass, and
      the derivative of the update in place. Three times the price of the plain steps *for each scalar* of φ; memory
      does not grow with the steps.
    - "reverse" backpropagates through all steps. Any number of hyper-parameters at about three times the price of the
      plain steps; memory grows by the graph of a step and of its backward pass with each step.
    - "replay" keeps only parameters and optimiser state of each step and builds each step's graph anew on the way back:
      four times the price of the plain steps, any number of hyper-parameters, memory of one graph (activation
      checkpointing with one segment for each step).

    "auto" is settled before the first outer step: forward for a single scalar and several steps; else reverse if the
    graphs of all steps, extrapolated from one, take less than half of the device's memory; else replay. It looks at
    the memory that the device has, not at what is free, so that results do not depend on what else runs.
    """

    steps: int = 1
    rule: Rule = SGD()
    mode: Literal["auto", "forward", "reverse", "replay"] = "auto"
    reach: Literal["all", "late"] = "all"
    batches: Literal["same", "new"] = "same"

    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Hypergradient.solve`; "auto" that has not been settled takes forward or reverse by φ alone."""
        mode = self.mode
        if mode == "auto":
            mode = "forward" if self._is_single(problem.hyper) else "reverse"
        ways = {"forward": self._forward, "reverse": self._reverse, "replay": self._replay}
        return ways[mode](replace(problem, rate=_rate(self.rule, problem.rate)))

    def settled(self, inner_loss: InnerLoss, parameters: Tensors, hyper: Tensors, memory: int) -> Unrolled:
        """See `Hypergradient.settled`."""
        if self.mode != "auto":
            return self
        if self._is_single(hyper):
            return replace(self, mode="forward")
        needed = self.steps * graph_bytes(inner_loss, parameters, hyper)
        return replace(self, mode="reverse" if needed < memory / 2 else "replay")

    def _is_single(self, hyper: Tensors) -> bool:
        return self.steps > 1 and sum(h.numel() for h in hyper.values()) == 1

    def _reverse(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        theta, phi = _leaves(problem.parameters), _leaves(problem.hyper)
        slots, count = _start(self.rule, theta, problem.moments)
        for h in range(self.steps):
            gradients = _taped_gradients(problem.inner_loss(theta, phi, h), theta)
            theta, slots = _move(self.rule, theta, gradients, slots, count + h + 1, problem.rate)
        outer = _total(problem.outer_loss(theta))
        found = torch.autograd.grad(outer, list(phi.values()), allow_unused=True)
        return outer.detach(), _filled(phi, found)

    def _replay(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        phi = _leaves(problem.hyper)
        theta = {n: p.detach() for n, p in problem.parameters.items()}
        slots, count = _start(self.rule, theta, problem.moments)
        path = []
        for h in range(self.steps):
            gradients, _ = _gradients(problem.inner_loss(at := _leaves(theta), phi, h), at)
            path.append((theta, slots, gradients))
            theta, slots = _move(self.rule, theta, gradients, slots, count + h + 1, problem.rate)
        slopes, outer = _gradients(problem.outer_loss(at := _leaves(theta)), at)
        adjoint = _filled(theta, tuple(slopes.values()))
        slot_adjoint = {n: tuple(torch.zeros_like(s) for s in group) for n, group in slots.items()}
        found = {n: torch.zeros_like(h) for n, h in phi.items()}
        for h in reversed(range(self.steps)):
            theta, slots, gradients = path.pop()
            # Through the update, one parameter after the other …
            along = {}
            for n, g in gradients.items():
                if g is None:
                    continue
                starts = [t.detach().requires_grad_() for t in (theta[n], g, *slots[n])]
                moved, state = self.rule.step(starts[0], starts[1], tuple(starts[2:]), count + h + 1, problem.rate)
                pulled = torch.autograd.grad(
                    [moved, *state], starts, grad_outputs=[adjoint[n], *slot_adjoint[n]], allow_unused=True
                )
                adjoint[n], along[n], *rest = _filled_list(starts, pulled)
                slot_adjoint[n] = tuple(rest)
            # … then through the gradient, one part of the loss after the other.
            at = _leaves(theta)
            for part in _parts(problem.inner_loss(at, phi, h)):
                taped = _taped_gradients(part, at)
                back = _pulled(taped.values(), map(along.get, taped), [*at.values(), *phi.values()])
                for target, name, g in zip([adjoint] * len(at) + [found] * len(phi), (*at, *phi), back, strict=True):
                    if g is not None:
                        target[name] = target[name] + g
        return outer, found

    def _forward(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        outer, found = torch.empty(()), {n: torch.zeros_like(h) for n, h in problem.hyper.items()}
        for name, h in problem.hyper.items():
            for entry in range(h.numel()):
                direction = {n: torch.zeros_like(t) for n, t in problem.hyper.items()}
                direction[name].view(-1)[entry] = 1
                outer, slope = self._along(direction, problem)
                found[name].view(-1)[entry] = slope
        return outer, found

    def _along(self, direction: Tensors, problem: Problem) -> tuple[Tensor, Tensor]:
        """E(θ_H) and its derivative along one direction of φ."""
        start = {n: p.detach().clone() for n, p in problem.parameters.items()}
        slots, count = _start(self.rule, start, problem.moments)
        points = {
            n: Dual(
                p,
                torch.zeros_like(p),
                tuple(_laid_out_like(p, s) for s in slots[n]),
                tuple(torch.zeros_like(p) for _ in slots[n]),
            )
            for n, p in start.items()
        }
        for h in range(self.steps):
            gradients, tangents = _gradient_and_tangent(problem, points, direction, h)
            for n, point in points.items():
                g, dg = gradients[n], tangents[n]
                if g is not None:  # a parameter without a gradient stays where it is, as in torch.optim
                    dg = torch.zeros_like(point.value) if dg is None else _laid_out_like(point.value, dg)
                    self.rule.push(point, _laid_out_like(point.value, g), dg, count + h + 1, problem.rate)
        theta = _leaves({n: point.value for n, point in points.items()})
        slopes, outer = _gradients(problem.outer_loss(theta), theta)
        aligned = [(g * points[n].tangent).sum() for n, g in slopes.items() if g is not None]
        return outer, torch.stack(aligned).sum() if aligned else torch.zeros_like(outer)


@dataclass(frozen=True)
class OneStep(Hypergradient):
    """Exact derivative through one SGD step, for many hyper-parameters: −rate · ∂/∂φ ⟨∇_θ J(θ, φ), ∇E(θ₁)⟩.

    With one weight for each gene that is every gene's alignment ⟨∇L_j(θ), ∇E(θ₁)⟩ at once, never a
    loop over genes; the same number as `Unrolled(1)`. Two ways to the product with v = ∇E(θ₁):

    - "double backward" keeps the graph of ∇J until v is known: 2⅔ plain steps.
    - "jvp" differentiates J along v, forward, without any graph of the model: 3 plain steps, in the memory of one part
      of J.

    "auto" is double backward for a loss of one part and jvp for one of several.
    """

    rate: float | None = None
    reach: Literal["all", "late"] = "all"
    mode: Literal["auto", "double backward", "jvp"] = "auto"

    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Hypergradient.solve`."""
        rate = problem.rate if self.rate is None else self.rate
        theta, phi = _leaves(problem.parameters), _leaves(problem.hyper)
        inner = problem.inner_loss(theta, phi, 0)
        is_taped = self.mode == "double backward" or (self.mode == "auto" and isinstance(inner, Tensor))
        gradients = _taped_gradients(inner, theta) if is_taped else _gradients(inner, theta)[0]
        ahead = _leaves({n: p if (g := gradients[n]) is None else p - rate * g.detach() for n, p in theta.items()})
        v, outer = _gradients(problem.outer_loss(ahead), ahead)
        if is_taped:
            return outer, _mixed(gradients, v, phi, -rate)
        found = {n: torch.zeros_like(h) for n, h in phi.items()}
        with warnings.catch_warnings(), forward_ad.dual_level():
            # torch builds its forward formulas with what it is about to retire; no user's matter.
            warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
            dual: dict[str, Tensor] = {
                n: p.detach() if (d := v[n]) is None else forward_ad.make_dual(p.detach(), d)  # type: ignore[no-untyped-call]
                for n, p in theta.items()
            }
            for part in _parts(problem.inner_loss(dual, phi, 0)):
                slope = forward_ad.unpack_dual(part).tangent  # type: ignore[no-untyped-call]
                if slope is not None and slope.requires_grad:
                    pulled = torch.autograd.grad(slope, list(phi.values()), allow_unused=True)
                    for target, g in zip(found.values(), pulled, strict=True):
                        if g is not None:
                            target.sub_(g, alpha=rate)
        return outer, found


@dataclass(frozen=True)
class Implicit(Hypergradient):
    """Implicit function theorem at the present θ: −∂/∂φ ⟨∇_θ J(θ, φ), u⟩ with (∇²J + damping·I) u = ∇E(θ).

    Exact where θ minimises J; elsewhere it is the direction in which the minimum would move. No look-ahead: E is the
    outer loss at θ.

    - "neumann": u = scale · Σ_{i ≤ terms} (I − scale·A)^i v (Lorraine, Vicol, Duvenaud, AISTATS 2020). Converges where
      0 < scale·λ < 2 for every eigenvalue λ of A; with few terms it is far off in flat directions, so that `terms` is
      to be looked at, not trusted. `terms = 0` is T1–T2 (Luketina et al., ICML 2016).
    - "cg": conjugate gradients, at most `terms` steps; needs A positive definite, which `damping` helps, and stops
      where a direction of no or negative curvature appears.

    Cost: one graph of ∇J, kept, and one Hessian-vector product (two plain backward passes) for each term.
    """

    terms: int = 5
    solver: Literal["neumann", "cg"] = "neumann"
    scale: float | None = None  # of the Neumann series; None = the model's learning rate
    damping: float = 0.0
    reach: Literal["all", "late"] = "all"

    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Hypergradient.solve`."""
        theta, phi = _leaves(problem.parameters), _leaves(problem.hyper)
        slopes, outer = _gradients(problem.outer_loss(theta), theta)
        v = list(_filled(theta, tuple(slopes.values())).values())
        gradients = _taped_gradients(problem.inner_loss(theta, phi, 0), theta)

        def curved(direction: list[Tensor]) -> list[Tensor]:
            """(∇²J + damping·I) · direction."""
            at = list(theta.values())
            found = _filled_list(at, _pulled(gradients.values(), direction, at, retain_graph=True))
            return [f.add(d, alpha=self.damping) for f, d in zip(found, direction, strict=True)]

        scale = problem.rate if self.scale is None else self.scale
        u = _neumann(curved, v, self.terms, scale) if self.solver == "neumann" else _cg(curved, v, self.terms)
        return outer, _mixed(gradients, dict(zip(theta, u, strict=True)), phi, -1.0)


@dataclass(frozen=True)
class FiniteDifference(Hypergradient):
    """(E(θ_H(φ + δ)) − E(θ_H(φ − δ))) / 2δ for each scalar of φ: two look-aheads without a graph.

    A reference in float64, and a fallback where the model has no second derivative. In float32 rounding and the kinks
    of a ReLU network swamp it, so that it decides nothing there.
    """

    steps: int = 1
    rule: Rule = SGD()
    delta: float = 1e-6
    reach: Literal["all", "late"] = "all"
    batches: Literal["same", "new"] = "same"

    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Hypergradient.solve`; E is the mean of the last two look-aheads."""

        def after(phi: Tensors) -> Tensor:
            return problem.outer(problem.after(phi, self.rule, self.steps))

        outer, found = torch.empty(()), {n: torch.zeros_like(h) for n, h in problem.hyper.items()}
        for name, h in problem.hyper.items():
            for entry in range(h.numel()):
                shifted = {n: t.detach().clone() for n, t in problem.hyper.items()}
                spot = shifted[name].view(-1)
                old = spot[entry].clone()
                spot[entry] = old + self.delta
                above = after(shifted)
                spot[entry] = old - self.delta
                below = after(shifted)
                found[name].view(-1)[entry] = (above - below) / (2 * self.delta)
                outer = (above + below) / 2
        return outer, found


def graph_bytes(inner_loss: InnerLoss, parameters: Tensors, hyper: Tensors) -> int:
    """Bytes that one inner step and its backward pass save for a later backward pass, parameters apart.

    Its parts are looked at one after the other, so that asking takes the memory of one.
    """
    theta, phi = _leaves(parameters), _leaves(hyper)
    known = {t.untyped_storage().data_ptr() for t in (*theta.values(), *phi.values())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that held its own graph would keep it alive for ever

    total = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for part in _parts(inner_loss(theta, phi, 0)):
            saved.clear()
            kept = _taped_gradients(part, theta)
            total += sum(saved.values())
            del kept, part
    return total


# Parts ---------------------------------------------------------------------------------------------------------------


def _rate(rule: Rule, rate: float) -> float:
    return rate if rule.learning_rate is None else rule.learning_rate


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    return {n: t.detach().requires_grad_() for n, t in tensors.items()}


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of the parameter, itself if it has them."""
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter).copy_(tensor)


def _filled_list(tensors: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the tensors, zeros where there is none."""
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _filled(tensors: Tensors, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """`_filled_list`, by name."""
    return dict(zip(tensors, _filled_list(list(tensors.values()), found), strict=True))


def _parts(value: Sum) -> Iterable[Tensor]:
    return (value,) if isinstance(value, Tensor) else value


def _total(value: Sum) -> Tensor:
    return value if isinstance(value, Tensor) else torch.stack(list(value)).sum()


def _taped_gradients(value: Sum, theta: Tensors) -> dict[str, Tensor | None]:
    """∇_θ of a scalar, by name, on a graph of its own; None where it does not depend on a parameter."""
    found = torch.autograd.grad(_total(value), list(theta.values()), create_graph=True, allow_unused=True)
    return dict(zip(theta, found, strict=True))


def _gradients(value: Sum, theta: Tensors) -> tuple[dict[str, Tensor | None], Tensor]:
    """∇_θ of a scalar, by name, and the scalar, both detached; part after part."""
    found: dict[str, Tensor | None] = dict.fromkeys(theta)
    total: Tensor | None = None
    for part in _parts(value):
        _add(found, torch.autograd.grad(part, list(theta.values()), allow_unused=True))
        total = part.detach() if total is None else total + part.detach()
    assert total is not None, "a loss of no parts"
    return found, total


def _add(sums: dict[str, Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Add to each sum; one that has nothing yet takes the part itself."""
    for (name, old), new in zip(sums.items(), parts, strict=True):
        if new is not None:
            sums[name] = new.detach() if old is None else old + new.detach()


def _pulled(
    ends: Iterable[Tensor | None],
    along: Iterable[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    """∂/∂inputs Σ ⟨end, along⟩ over the ends that are on a graph; None where it does not depend on an input."""
    pairs = [(e, a) for e, a in zip(ends, along, strict=True) if e is not None and e.requires_grad and a is not None]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [e for e, _ in pairs],
        inputs,
        grad_outputs=[a for _, a in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
    )


def _gradient_and_tangent(
    problem: Problem, points: Mapping[str, Dual], direction: Tensors, number: int
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """g = ∇_θ J and ġ = ∂_φ∇_θ J · φ̇ + ∇²_θ J · θ̇, part after part.

    By one double backward pass: ġ = ∇_θ (⟨∇_θ J, θ̇⟩ + ⟨∂_φ J, φ̇⟩). Before the first step θ̇ is zero and only the second
    term is left, which is an ordinary backward pass with other loss weights.
    """
    theta, phi = _leaves({n: point.value for n, point in points.items()}), _leaves(problem.hyper)
    gradients: dict[str, Tensor | None] = dict.fromkeys(theta)
    tangents: dict[str, Tensor | None] = dict.fromkeys(theta)
    at, own = list(theta.values()), list(phi.values())
    turning = [direction[n] for n in phi]
    moving = [point.tangent for point in points.values()]
    for part in _parts(problem.inner_loss(theta, phi, number)):
        if number == 0:
            mixed = torch.autograd.grad(part, own, create_graph=True, allow_unused=True)
            found = torch.autograd.grad(part, at, retain_graph=True, allow_unused=True)
            pulled = _pulled(mixed, turning, at)
        else:
            every = torch.autograd.grad(part, [*at, *own], create_graph=True, allow_unused=True)
            found = every[: len(at)]
            pulled = _pulled(every, [*moving, *turning], at)
        _add(gradients, found)
        _add(tangents, pulled)
    return gradients, tangents


def _mixed(
    gradients: Mapping[str, Tensor | None], along: Mapping[str, Tensor | None], phi: Tensors, factor: float
) -> dict[str, Tensor]:
    """factor · ∂/∂φ ⟨∇_θ J, along⟩, zeros where J does not depend on φ."""
    scaled = (None if (a := along[n]) is None else factor * a for n in gradients)
    found = _pulled(gradients.values(), scaled, list(phi.values()))
    return {n: g.detach() for n, g in _filled(phi, found).items()}


def _start(rule: Rule, theta: Tensors, moments: Moments | None) -> tuple[dict[str, Slots], int]:
    """Optimiser state at the start of a look-ahead, to be written to, and how many steps it has seen."""
    if rule.carried and moments is not None:
        return {n: tuple(s.detach().clone() for s in moments.slots[n]) for n in theta}, moments.count
    return {n: rule.start(p) for n, p in theta.items()}, 0


def _move(
    rule: Rule,
    theta: Tensors,
    gradients: Mapping[str, Tensor | None],
    slots: Mapping[str, Slots],
    number: int,
    rate: float,
) -> tuple[dict[str, Tensor], dict[str, Slots]]:
    """One inner step; a parameter without a gradient stays where it is, as in torch.optim."""
    moved, state = {}, {}
    for name, p in theta.items():
        g = gradients[name]
        moved[name], state[name] = (p, slots[name]) if g is None else rule.step(p, g, slots[name], number, rate)
    return moved, state


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def _neumann(curved: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], terms: int, scale: float) -> list[Tensor]:
    """scale · Σ_{i ≤ terms} (I − scale·A)^i v."""
    term, total = v, [t.clone() for t in v]
    for _ in range(terms):
        term = [t.sub(c, alpha=scale) for t, c in zip(term, curved(term), strict=True)]
        total = [s.add_(t) for s, t in zip(total, term, strict=True)]
    return [s.mul_(scale) for s in total]


def _cg(curved: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], terms: int) -> list[Tensor]:
    """A⁻¹ v by conjugate gradients.

    Directions of no positive curvature are not followed: the factor is then zero, without a look at the host.
    """
    x = [torch.zeros_like(t) for t in v]
    residual, direction = [t.clone() for t in v], [t.clone() for t in v]
    size = _dot(residual, residual)
    going = torch.ones_like(size)
    for _ in range(terms):
        image = curved(direction)
        curvature = _dot(direction, image)
        going = going * (curvature > 0)
        step = going * torch.where(curvature > 0, size / curvature, 0)
        x = [a + step * d for a, d in zip(x, direction, strict=True)]
        residual = [r - step * i for r, i in zip(residual, image, strict=True)]
        new = _dot(residual, residual)
        direction = [r + torch.where(size > 0, new / size, 0) * d for r, d in zip(residual, direction, strict=True)]
        size = new
    return x
