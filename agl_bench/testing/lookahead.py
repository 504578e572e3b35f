"""A look-ahead of a small model, as the trainer makes it, and what its derivative is by finite differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from agl_bench.interfaces.selector import Selector, Step
from agl_bench.maths.hypergradient import SGD, FiniteDifference, Hypergradient, Implicit, InnerLoss, Moments
from agl_bench.testing.toy import INPUTS, SPOTS, WIDTH
from agl_bench.testing.verdicts import Skip

Tensors = Mapping[str, Tensor]
RATE = 1e-2  # of the model
RELATIVE, ABSOLUTE = 1e-3, 1e-8  # what finite differences in float64 may be off
NEWTON = 50  # steps in which a minimum is to be found


class LookAhead:
    """Inner and outer loss of a model of two layers; the head is linear and what is before it is shared by all genes.

    Attributes:
        selector: whose parameters act on the inner loss.
        start: the model's parameters.
        moments: of a training optimiser.
    """

    def __init__(self, selector: Selector, dtype: torch.dtype, device: str) -> None:
        self.selector, self.genes = selector, selector.genes
        generator = torch.Generator().manual_seed(9)
        count = len(self.genes.names)
        used = selector.used
        self.columns = None if used is None or bool(used.all()) else used.to(device).nonzero().squeeze(1)
        seen = torch.rand(SPOTS, INPUTS, generator=generator, dtype=torch.float64)
        target = torch.rand(SPOTS, count, generator=generator, dtype=torch.float64)
        shared = torch.randn(WIDTH, INPUTS, generator=generator, dtype=torch.float64)
        head = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        self.seen, self.target, shared, head = (t.to(device, dtype) for t in (seen, target, shared, head))
        if self.columns is not None:
            self.target, head = self.target[:, self.columns], head[self.columns]
        self.start = {"shared": shared, "head": head}
        self.moments = Moments({n: (0.1 * torch.ones_like(t),) * 2 for n, t in self.start.items()}, 10)
        self.is_primary = self.genes.primary.to(device)

    def losses(self, at: Tensors) -> tuple[Tensor, Step]:
        """Losses (genes,) of all spots, and the step."""
        features = torch.tanh(self.seen @ at["shared"].T)
        return self._losses(features, at["head"], (at["shared"],))

    def _losses(self, features: Tensor, head: Tensor, shared: tuple[Tensor, ...]) -> tuple[Tensor, Step]:
        prediction = features @ head.T
        losses = (prediction - self.target).square().mean(0)
        if self.columns is not None:
            every = torch.zeros(len(self.genes.names), dtype=losses.dtype, device=losses.device)
            losses = every.index_copy(0, self.columns, losses)
        row = torch.arange(len(features), device=features.device)
        return losses, Step(features, prediction, self.target, row, 0, head, shared, shared, self.columns)

    def inner(self, at: Tensors, own: Tensors, _: int) -> Iterator[Tensor]:
        """In parts, as of two batches."""
        for _ in range(2):
            yield functional_call(self.selector, dict(own), self.losses(at)) / 2

    def outer(self, at: Tensors) -> Tensor:
        """The mean of the primary losses."""
        return self.losses(at)[0][self.is_primary].mean()

    def hypergradients(self, engine: Hypergradient, own: Tensors) -> dict[str, Tensor]:
        """What the trainer would hand to `learn`."""
        _, gradients = engine(self.inner, self.outer, self.start, own, RATE, self.moments)
        return gradients

    def check_against_differences(self, engine: Hypergradient, own: Tensors) -> None:
        """Raises `AssertionError` unless the engine's derivative is that of its own steps."""
        rule = getattr(engine, "rule", None) or SGD(getattr(engine, "rate", None))
        gradients = self.hypergradients(engine, own)
        for direction in directions(gradients):

            def along(at: Tensors, length: Tensors, number: int, direction: Tensors = direction) -> Iterator[Tensor]:
                return self.inner(at, moved(own, direction, length["length"]), number)

            differences = FiniteDifference(engine.steps, rule)
            zero = {"length": torch.zeros((), dtype=torch.float64, device=self.seen.device)}
            _, found = differences(along, self.outer, self.start, zero, RATE, self.moments)
            compare(gradients, direction, float(found["length"]), f"{type(engine).__name__}'s gradient")

    def check_implicit(self, engine: Implicit, own: Tensors) -> None:
        """Raises `AssertionError` unless the engine, given terms enough, tells how the minimum moves, where J is
        quadratic in each loss; and unless, as it is, it points to the same side.

        Raises:
            Skip: if the inner loss has no minimum here.
        """
        quadratic = _Quadratic(self)
        own = {n: p.detach() for n, p in own.items()}
        at = quadratic.minimum(own)
        thorough = replace(engine, solver="cg", terms=4 * WIDTH, damping=0.0)
        inner: InnerLoss = quadratic.inner
        _, exact = thorough(inner, quadratic.outer, {"scale": at}, own, RATE)
        for direction in directions(exact):
            delta, ends = 1e-5, []
            for sign in (1, -1):
                shifted = moved(own, direction, torch.tensor(sign * delta, dtype=torch.float64))
                ends.append(float(quadratic.outer({"scale": quadratic.minimum(shifted, at)})))
            compare(exact, direction, (ends[0] - ends[1]) / (2 * delta), "Implicit's gradient, with terms enough,")
        _, given = engine(inner, quadratic.outer, {"scale": at}, own, RATE)
        inward = sum(float((given[n] * exact[n]).sum()) for n in exact)
        assert inward > 0, f"{engine} points away from where the outer loss falls; raise `terms`, or lower `scale`"


class _Quadratic:
    """A model whose every loss is quadratic in its few parameters: features are scaled inputs, the head stays."""

    def __init__(self, problem: LookAhead) -> None:
        self.problem = problem
        spots, width = problem.seen.shape[0], WIDTH
        generator = torch.Generator().manual_seed(10)
        basis, _ = torch.linalg.qr(torch.randn(spots, width, generator=generator, dtype=torch.float64))
        self.basis = (basis * spots**0.5).to(problem.seen)  # orthonormal over the spots
        signs = torch.randint(0, 2, (problem.target.shape[1], width), generator=generator).to(problem.seen)
        self.head = 2 * signs - 1  # so that every loss curves alike in every direction
        self.start = torch.zeros(width, dtype=torch.float64, device=problem.seen.device)

    def losses(self, at: Tensors) -> tuple[Tensor, Step]:
        return self.problem._losses(self.basis * at["scale"], self.head, (at["scale"],))

    def inner(self, at: Tensors, own: Tensors, _: int) -> Tensor:
        value: Tensor = functional_call(self.problem.selector, dict(own), self.losses(at))
        return value

    def outer(self, at: Tensors) -> Tensor:
        return self.losses(at)[0][self.problem.is_primary].mean()

    def minimum(self, own: Tensors, start: Tensor | None = None) -> Tensor:
        """Of the inner loss, by Newton's method."""
        at = self.start if start is None else start

        def value(scale: Tensor) -> Tensor:
            return self.inner({"scale": scale}, own, 0)

        for _ in range(NEWTON):
            slope = torch.autograd.functional.jacobian(value, at)  # type: ignore[no-untyped-call]
            curved = torch.autograd.functional.hessian(value, at)  # type: ignore[no-untyped-call]
            if not bool((torch.linalg.eigvalsh(curved) > 0).all()):
                break
            if float(slope.norm()) < 1e-12:
                return at
            at = at - torch.linalg.solve(curved, slope)
        if float(slope.norm()) < 1e-9:
            return at
        raise Skip("its inner loss has no minimum that Newton's method finds on the toy problem")


def directions(gradients: Tensors) -> list[dict[str, Tensor]]:
    """Where to compare: along the gradient, of length 1, and along a random sign for each scalar."""
    length = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(12)
    signs = {
        n: (2.0 * torch.randint(0, 2, g.shape, generator=generator) - 1).to(g) / max(g.numel(), 1) ** 0.5
        for n, g in gradients.items()
    }
    return [{n: g / length for n, g in gradients.items()}, signs]


def moved(own: Tensors, direction: Tensors, length: Tensor) -> dict[str, Tensor]:
    """Parameters further along a direction."""
    return {n: p.detach() + length * direction[n] for n, p in own.items()}


def compare(gradients: Tensors, direction: Tensors, measured: float, what: str) -> None:
    """Raises `AssertionError` unless ⟨gradient, direction⟩ is what finite differences have measured."""
    claimed = sum(float((gradients[n] * direction[n]).sum()) for n in gradients)
    assert abs(claimed - measured) <= RELATIVE * abs(measured) + ABSOLUTE, (
        f"{what} says {claimed:.6g} where finite differences say {measured:.6g}: an engine is wrong, or something is "
        "detached on the way from a parameter to the result of `forward`"
    )
