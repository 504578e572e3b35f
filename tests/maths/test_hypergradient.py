"""Inner rules against torch.optim, hypergradients against central differences and closed forms, all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from torch import Tensor

from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.maths.hypergradient import SGD, Adam, Parameters, Rule, Unrolled
from agl_bench.maths.losses import pearson_loss
from agl_bench.testing import toy_genes

SPOTS, INPUTS, WIDTH, PRIMARY, AUXILIARY = 16, 4, 5, 3, 8
GENES = PRIMARY + AUXILIARY
RATE = 0.3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class World:
    """A smooth MLP, a batch for the inner and one for the outer loss, and a selector's view in float64."""

    detach: bool = False

    def __post_init__(self) -> None:
        self.inner, self.outer = ((draw(s, SPOTS, INPUTS), draw(s + 1, SPOTS, GENES)) for s in (0, 2))
        self.parameters = {"first": draw(4, WIDTH, INPUTS), "bias": draw(5, WIDTH), "head": draw(6, GENES, WIDTH)}
        self.genes = toy_genes(PRIMARY, AUXILIARY)
        self.view = TrainingView(self.genes, draw(7, SPOTS, GENES), torch.Generator(), self.detach)

    def losses(self, at: Parameters, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Step]:
        features = torch.tanh(batch[0] @ at["first"].T + at["bias"])
        prediction = features @ at["head"].T
        return pearson_loss(prediction, batch[1]), Step(features, prediction, batch[1], torch.arange(SPOTS), 0)

    def inner_of(self, selector: Selector) -> Callable[[Parameters], Tensor]:
        return lambda at: selector(*self.losses(at, self.inner))

    def outer_loss(self, at: Parameters) -> Tensor:
        return self.losses(at, self.outer)[0][self.genes.primary].mean()


@pytest.mark.parametrize(
    ("rule", "theirs", "options"),
    [
        (SGD(), torch.optim.SGD, {}),
        (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
        (Adam(), torch.optim.Adam, {}),
        (Adam(betas=(0.5, 0.7), epsilon=1e-3), torch.optim.Adam, {"betas": (0.5, 0.7), "eps": 1e-3}),
    ],
    ids=["sgd", "momentum", "adam", "other adam"],
)
@pytest.mark.parametrize("own", [None, 0.05], ids=["model's rate", "own rate"])
def test_rules_follow_torch_optim(rule: Rule, theirs: type, options: dict, own: float | None) -> None:
    world = World()
    rule = type(rule)(**{**vars(rule), "learning_rate": own})

    def loss(at: Parameters) -> Tensor:
        return world.losses(at, world.inner)[0].sum()

    moved = Unrolled(12, rule).look_ahead(loss, world.parameters, 0.1)
    reference = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    optimizer = theirs(reference.values(), lr=0.1 if own is None else own, **options)
    for _ in range(12):
        optimizer.zero_grad()
        loss(reference).backward()
        optimizer.step()
    for name, parameter in reference.items():
        torch.testing.assert_close(moved[name], parameter, rtol=0, atol=1e-10)
        assert (parameter - world.parameters[name]).abs().max() > 1e-3


def central_differences(value: Callable[[], Tensor], parameter: Tensor, h: float = 1e-6) -> Tensor:
    """d value / d parameter, entry by entry, where `value` reads the parameter anew."""
    found = torch.empty_like(parameter)
    with torch.no_grad():
        flat, out = parameter.view(-1), found.view(-1)
        for i, old in enumerate(flat.tolist()):
            ends = []
            for sign in (1, -1):
                flat[i] = old + sign * h
                with torch.enable_grad():
                    ends.append(float(value().detach()))
            flat[i] = old
            out[i] = (ends[0] - ends[1]) / (2 * h)
    return found


def build(name: str, view: TrainingView) -> Selector:
    """A selector with no weight at its start value, where symmetry could hide an error."""
    if name == "amal":
        selector: Selector = Amal(view, temperature=0.7)
        with torch.no_grad():
            selector.logits.copy_(draw(9, GENES))
        return selector
    return Dkgsb(view, temperature=0.1, start=0.4, bounded=name == "dkgsb")


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), Adam(epsilon=1e-3)], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", ["dkgsb", "dkgsb free", "amal"])
def test_unrolled_is_the_derivative(name: str, rule: Rule, steps: int) -> None:
    world = World()
    selector = build(name, world.view)
    (own,) = selector.parameters()
    method = Unrolled(steps, rule)
    outer, (gradient,) = method(world.inner_of(selector), world.outer_loss, world.parameters, [own], RATE)

    def value() -> Tensor:
        return world.outer_loss(method.look_ahead(world.inner_of(selector), world.parameters, RATE))

    assert not outer.requires_grad
    torch.testing.assert_close(outer, value().detach(), rtol=0, atol=0)
    expected = central_differences(value, own)
    assert (gradient - expected).norm() / expected.norm() < 1e-6
    if name == "amal":  # weights of primary genes are fixed
        assert (gradient[world.genes.primary] == 0).all() and (gradient[~world.genes.primary] != 0).all()


def test_adam_with_its_own_epsilon_is_the_derivative() -> None:
    """Close to sign descent: the derivative is small, and sharp where a gradient changes its sign."""
    world = World()
    selector = build("dkgsb", world.view)
    (own,) = selector.parameters()
    method = Unrolled(3, Adam())
    _, (gradient,) = method(world.inner_of(selector), world.outer_loss, world.parameters, [own], 0.05)
    expected = central_differences(
        lambda: world.outer_loss(method.look_ahead(world.inner_of(selector), world.parameters, 0.05)), own, 1e-7
    )
    assert (gradient - expected).abs() / expected.abs() < 1e-5


def test_one_step_of_a_weighted_sum_is_the_gradient_alignment() -> None:
    """dE/dw_j = −rate · ⟨∇L_j(θ), ∇E(θ₊)⟩."""
    world = World()
    weights = draw(8, GENES).exp().requires_grad_()

    def inner(at: Parameters) -> Tensor:
        return (weights * world.losses(at, world.inner)[0]).sum()

    _, (gradient,) = Unrolled(1, SGD())(inner, world.outer_loss, world.parameters, [weights], RATE)
    start = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    ahead = {n: p.detach().requires_grad_() for n, p in Unrolled(1).look_ahead(inner, start, RATE).items()}
    outer = torch.autograd.grad(world.outer_loss(ahead), list(ahead.values()))
    losses = world.losses(start, world.inner)[0]
    expected = [
        -RATE * sum((a * b).sum() for a, b in zip(torch.autograd.grad(loss, list(start.values()), retain_graph=True), outer, strict=True))
        for loss in losses
    ]
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [SGD(), Adam(epsilon=1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_a_detached_weight_sum_is_a_constant(name: str, rule: Rule) -> None:
    """The derivative is that of the surrogate Σwl / c with c fixed at Σw, and differs from the true one."""
    live, detached = World(), World(detach=True)
    method = Unrolled(3, rule)
    found = {}
    for world in (live, detached):
        selector = build(name, world.view)
        (own,) = selector.parameters()
        outer, (found[world.detach],) = method(
            world.inner_of(selector), world.outer_loss, world.parameters, [own], RATE
        )
        found[world.detach, "outer"] = outer
    assert found[False, "outer"] == found[True, "outer"]

    class Surrogate(type(selector)):
        def weighted_mean(self, losses: Tensor, weights: Tensor) -> Tensor:
            weights = torch.where(self.is_primary, torch.ones_like(weights), weights)
            self.constant = getattr(self, "constant", float(weights.detach().sum()))  # of the first call
            return (weights * losses).sum() / self.constant

    selector.__class__ = Surrogate

    def value() -> Tensor:
        return live.outer_loss(method.look_ahead(live.inner_of(selector), live.parameters, RATE))

    value()
    expected = central_differences(value, own)
    assert (found[True] - expected).norm() / expected.norm() < 1e-6
    assert (found[False] - expected).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_parameter_that_is_not_reached_gets_zeros(steps: int) -> None:
    world = World()
    reached, idle = draw(8, GENES).requires_grad_(), draw(9, 2, 3).requires_grad_()

    def inner(at: Parameters) -> Tensor:
        return (reached.exp() * world.losses(at, world.inner)[0]).sum()

    outer, (first, second) = Unrolled(steps)(inner, world.outer_loss, world.parameters, [reached, idle], RATE)
    assert second.shape == idle.shape and (second == 0).all()
    assert bool((first != 0).all()) == (steps > 0)
    assert outer.isfinite()


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_the_given_parameters_stay_as_they_are(rule: Rule) -> None:
    world = World()
    selector = build("dkgsb", world.view)
    (own,) = selector.parameters()
    given = {n: torch.nn.Parameter(p.clone()) for n, p in world.parameters.items()}
    before = own.detach().clone()
    Unrolled(3, rule)(world.inner_of(selector), world.outer_loss, given, [own], RATE)
    assert all(torch.equal(p, world.parameters[n]) and p.grad is None and p.is_leaf for n, p in given.items())
    assert torch.equal(own, before) and own.grad is None


def test_a_parameter_that_the_loss_does_not_reach_stays_where_it_is() -> None:
    world = World()
    given = world.parameters | {"idle": draw(9, 2)}
    moved = Unrolled(2, Adam()).look_ahead(lambda at: world.losses(at, world.inner)[0].sum(), given, RATE)
    assert torch.equal(moved["idle"], given["idle"]) and not torch.equal(moved["head"], given["head"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [SGD(), Adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("temperature", [1e-3, 5e-3, 1e-2])
def test_fully_underflowed_weights_are_finite(rule: Rule, dtype: torch.dtype, temperature: float) -> None:
    """Head rows of such genes have gradients of exactly zero, or so small that their squares vanish."""
    world = World()
    view = TrainingView(world.genes, world.view.expression.to(dtype), torch.Generator())
    selector = Dkgsb(view, temperature=temperature)
    world.parameters = {n: p.to(dtype) for n, p in world.parameters.items()}
    world.inner, world.outer = (tuple(t.to(dtype) for t in batch) for batch in (world.inner, world.outer))
    outer, (gradient,) = Unrolled(3, rule)(
        world.inner_of(selector), world.outer_loss, world.parameters, list(selector.parameters()), 0.05
    )
    assert outer.isfinite() and gradient.isfinite()
