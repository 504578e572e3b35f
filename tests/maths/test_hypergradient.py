"""Inner rules against torch.optim, hypergradients against central differences and closed forms, all in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.maths import hypergradient
from agl_bench.maths.hypergradient import (
    SGD,
    Adam,
    AdamW,
    Dual,
    FiniteDifference,
    Hypergradient,
    Implicit,
    InnerLoss,
    Moments,
    OneStep,
    Rule,
    Tensors,
    Unrolled,
    graph_bytes,
)
from agl_bench.maths.losses import pearson_loss
from agl_bench.testing import toy_genes
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.dkgsb import Dkgsb

SPOTS, INPUTS, WIDTH, PRIMARY, AUXILIARY = 16, 4, 5, 3, 8
GENES = PRIMARY + AUXILIARY
RATE = 0.3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class World:
    """A smooth MLP, a batch for the inner and one for the outer loss, and a selector's view in float64."""

    detach: bool = False
    spots: int = SPOTS

    def __post_init__(self) -> None:
        self.inner, self.outer = self.batch(0), self.batch(2)
        self.parameters = {"first": draw(4, WIDTH, INPUTS), "bias": draw(5, WIDTH), "head": draw(6, GENES, WIDTH)}
        self.genes = toy_genes(PRIMARY, AUXILIARY)
        self.view = TrainingView(self.genes, draw(7, SPOTS, GENES), torch.Generator(), self.detach)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        return draw(seed, self.spots, INPUTS), draw(seed + 1, self.spots, GENES)

    def losses(self, at: Tensors, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Step]:
        features = torch.tanh(batch[0] @ at["first"].T + at["bias"])
        prediction = features @ at["head"].T
        return pearson_loss(prediction, batch[1]), Step(features, prediction, batch[1], torch.arange(len(batch[1])), 0)

    def inner_of(self, selector: Selector) -> InnerLoss:
        return lambda at, own, _: functional_call(selector, dict(own), self.losses(at, self.inner))

    def new_inner_of(self, selector: Selector) -> InnerLoss:
        """Each step has a batch of its own."""
        batches = [self.batch(seed) for seed in range(20, 60, 2)]
        return lambda at, own, number: functional_call(selector, dict(own), self.losses(at, batches[number]))

    def outer_loss(self, at: Tensors) -> Tensor:
        return self.losses(at, self.outer)[0][self.genes.primary].mean()

    def loss_sum(self, at: Tensors) -> Tensor:
        return self.losses(at, self.inner)[0].sum()


def own_of(selector: Selector) -> dict[str, Tensor]:
    return dict(selector.named_parameters())


def look_ahead(
    method: Unrolled,
    inner: InnerLoss,
    parameters: Tensors,
    own: Tensors,
    rate: float,
    moments: Moments | None = None,
) -> dict[str, Tensor]:
    """θ_H, seen through the outer loss."""
    seen: dict[str, Tensor] = {}

    def outer(at: Tensors) -> Tensor:
        seen.update({n: p.detach() for n, p in at.items()})
        return sum(p.sum() for p in at.values())  # type: ignore[return-value]

    method(inner, outer, parameters, own or {"idle": torch.zeros((), requires_grad=True)}, rate, moments)
    return seen


def torch_steps(world: World, optimizer: torch.optim.Optimizer, reference: Tensors, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        world.loss_sum(reference).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


MODES = ["reverse", "forward", "replay"]


# ---- Inner rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "theirs", "options"),
    [
        (SGD(), torch.optim.SGD, {}),
        (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
        (Adam(), torch.optim.Adam, {}),
        (Adam(betas=(0.5, 0.7), epsilon=1e-3), torch.optim.Adam, {"betas": (0.5, 0.7), "eps": 1e-3}),
        (SGD(weight_decay=0.2), torch.optim.SGD, {"weight_decay": 0.2}),
        (SGD(momentum=0.9, weight_decay=0.2), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.2}),
        (Adam(weight_decay=0.2), torch.optim.Adam, {"weight_decay": 0.2}),
        (AdamW(), torch.optim.AdamW, {}),
        (AdamW(weight_decay=0.3), torch.optim.AdamW, {"weight_decay": 0.3}),
    ],
    ids=["sgd", "momentum", "adam", "other adam", "sgd decay", "momentum decay", "adam decay", "adamw", "other adamw"],
)
@pytest.mark.parametrize(
    ("own", "mode"),
    [(None, "reverse"), (None, "forward"), (None, "replay"), (0.05, "reverse"), (0.05, "forward")],
)
def test_rules_follow_torch_optim(rule: Any, theirs: type, options: dict, own: float | None, mode: Any) -> None:
    world = World()
    rule = replace(rule, learning_rate=own)
    moved = look_ahead(Unrolled(12, rule, mode), lambda at, *_: world.loss_sum(at), world.parameters, {}, 0.1)
    reference = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    torch_steps(world, theirs(reference.values(), lr=0.1 if own is None else own, **options), reference, 12)
    for name, parameter in reference.items():
        torch.testing.assert_close(moved[name], parameter, rtol=0, atol=1e-10)
        assert (parameter - world.parameters[name]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_uncorrected_adam_is_that_of_higher(epsilon: float, mode: Any) -> None:
    """DifferentiableAdam of `higher` 0.2.1, as it stands there."""
    world, (b1, b2), lr = World(), (0.9, 0.999), 0.1
    theta = {n: p.clone() for n, p in world.parameters.items()}
    exp_avg, exp_avg_sq = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    for t in range(1, 13):
        at = {n: p.requires_grad_() for n, p in theta.items()}
        slopes = torch.autograd.grad(world.loss_sum(at), list(at.values()))
        for (n, p), grad in zip(at.items(), slopes, strict=True):
            exp_avg[n] = exp_avg[n] * b1 + (1 - b1) * grad
            exp_avg_sq[n] = exp_avg_sq[n] * b2 + (1 - b2) * grad * grad
            denom = exp_avg_sq[n].sqrt() + epsilon
            step_size = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
            theta[n] = (p - step_size * exp_avg[n] / denom).detach()
    arguments = (lambda at, *_: world.loss_sum(at), world.parameters, {}, lr)
    moved = look_ahead(Unrolled(12, Adam(epsilon=epsilon, corrected=False), mode), *arguments)
    other = look_ahead(Unrolled(12, Adam(epsilon=epsilon), mode), *arguments)
    for n, p in theta.items():
        torch.testing.assert_close(moved[n], p, rtol=0, atol=1e-12)
        assert (other[n] - p).abs().max() > 1e-3 * epsilon


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rule", "theirs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_a_look_ahead_carries_an_optimiser_on(rule: Any, theirs: type, mode: Any) -> None:
    world = World()
    reference = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    optimizer = theirs(reference.values(), lr=0.1)
    torch_steps(world, optimizer, reference, 5)
    start = {n: p.detach().clone() for n, p in reference.items()}
    slots = {n: tuple(optimizer.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")) for n, p in reference.items()}
    kept = {n: tuple(s.clone() for s in group) for n, group in slots.items()}
    torch_steps(world, optimizer, reference, 3)

    def ahead(rule: Rule, moments: Moments | None) -> dict[str, Tensor]:
        return look_ahead(Unrolled(3, rule, mode), lambda at, *_: world.loss_sum(at), start, {}, 0.1, moments)

    carried = ahead(rule(carried=True), Moments(slots, 5))
    fresh = ahead(rule(), Moments(slots, 5))
    for n, p in reference.items():
        torch.testing.assert_close(carried[n], p, rtol=0, atol=1e-12)
        assert (fresh[n] - p).abs().max() > 1e-3
        torch.testing.assert_close(ahead(rule(carried=True), None)[n], fresh[n], rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(slots[n], kept[n], strict=True))  # not written to


PUSHED = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "sgd decay": SGD(weight_decay=0.1),
    "adam": Adam(),
    "adam of higher": Adam(epsilon=1e-2, corrected=False),
    "adam decay": Adam(weight_decay=0.1),
    "adamw": AdamW(),
}


@pytest.mark.parametrize("block", [7, 24, 1 << 18])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("rule", PUSHED.values(), ids=PUSHED)
def test_push_is_the_derivative_of_step(
    rule: Rule, layout: torch.memory_format, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and block by block, whatever the strides; also where second moment and gradient are zero."""
    monkeypatch.setattr(hypergradient, "BLOCK", block)

    def tensor(seed: int) -> Tensor:
        return draw(seed, 3, 4, 2, 5).to(memory_format=layout)

    def dual() -> Dual:
        count = len(rule.start(tensor(0)))
        slots, tangents = ([tensor(s + i) for i in range(count)] for s in (10, 20))
        if count == 2:
            slots[1].square_()
            for t in (slots[1], tangents[1]):
                t[0, 1] = 0
        return Dual(tensor(1), tensor(2), tuple(slots), tuple(tangents))

    gradient, tangent = tensor(3), tensor(4)
    gradient[0, 1] = 0
    found, expected = dual(), dual()
    rule.push(found, gradient, tangent, 3, 0.1)
    Rule.push(rule, expected, gradient, tangent, 3, 0.1)
    pairs = [(found.value, expected.value), (found.tangent, expected.tangent)]
    pairs += zip((*found.slots, *found.slot_tangents), (*expected.slots, *expected.slot_tangents), strict=True)
    for one, two in pairs:
        assert one.stride() == tensor(1).stride() and one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found.value, tensor(1)) and not torch.equal(found.tangent, tensor(2))


@pytest.mark.parametrize("rule", [SGD(), Adam(epsilon=1e-3)], ids=["sgd", "adam"])
def test_the_layout_of_a_parameter_changes_nothing(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come in other strides than the parameters."""
    monkeypatch.setattr(hypergradient, "BLOCK", 7)
    images, own = draw(1, 6, 3, 5, 5), {"w": torch.tensor(0.3, dtype=torch.float64)}

    def loss(at: Tensors, factor: Tensor | float) -> Tensor:
        return (factor * torch.nn.functional.conv2d(images, at["kernel"]).tanh()).square().mean()

    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = {"kernel": draw(2, 4, 3, 2, 2).to(memory_format=layout)}
        method = Unrolled(3, rule, "forward")
        found.append(method(lambda at, own, _: loss(at, own["w"]), lambda at: loss(at, 1.0), given, own, RATE))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)


# ---- Unrolled -------------------------------------------------------------------------------------------------------


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


RULES = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam(epsilon=1e-3)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["dkgsb", "dkgsb free", "amal"])
def test_unrolled_is_the_derivative(name: str, rule: Rule, steps: int, mode: str) -> None:
    world = World()
    selector = build(name, world.view)
    ((key, own),) = own_of(selector).items()
    method = Unrolled(steps, rule, mode)
    arguments = (world.inner_of(selector), world.outer_loss, world.parameters)
    outer, gradients = method(*arguments, {key: own}, RATE)
    plain = Unrolled(steps, rule, "reverse")
    expected = central_differences(lambda: plain(*arguments, {key: own}, RATE)[0], own)
    assert list(gradients) == [key] and not outer.requires_grad and not gradients[key].requires_grad
    torch.testing.assert_close(outer, plain(*arguments, {key: own}, RATE)[0], rtol=0, atol=1e-14)
    assert (gradients[key] - expected).norm() / expected.norm() < 1e-6
    if name == "amal":  # weights of primary genes are fixed
        assert (gradients[key][world.genes.primary] == 0).all() and (gradients[key][~world.genes.primary] != 0).all()


@pytest.mark.parametrize("name", ["dkgsb", "amal"])
@pytest.mark.parametrize("rule", [*RULES.values(), Adam()], ids=[*RULES, "own adam"])
def test_forward_is_reverse(name: str, rule: Rule) -> None:
    world = World()
    selector = build(name, world.view)
    arguments = (world.inner_of(selector), world.outer_loss, world.parameters, own_of(selector), RATE)
    (one, forward), (two, reverse) = (Unrolled(4, rule, mode)(*arguments) for mode in ("forward", "reverse"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14)
    for key, gradient in reverse.items():
        torch.testing.assert_close(forward[key], gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_adam_with_its_own_epsilon_is_the_derivative(mode: str) -> None:
    """Close to sign descent: the derivative is small, and sharp where a gradient changes its sign."""
    world = World()
    selector = build("dkgsb", world.view)
    own = own_of(selector)
    arguments = (world.inner_of(selector), world.outer_loss, world.parameters, own, 0.05)
    gradient = Unrolled(3, Adam(), mode)(*arguments)[1]["cutoff"]
    expected = central_differences(lambda: Unrolled(3, Adam())(*arguments)[0], own["cutoff"], 1e-7)
    assert (gradient - expected).abs() / expected.abs() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_one_step_of_a_weighted_sum_is_the_gradient_alignment(mode: str) -> None:
    """dE/dw_j = −rate · ⟨∇L_j(θ), ∇E(θ₊)⟩."""
    world = World()
    own = {"weights": draw(8, GENES).exp()}

    def inner(at: Tensors, own: Tensors, number: int) -> Tensor:
        return (own["weights"] * world.losses(at, world.inner)[0]).sum()

    gradient = Unrolled(1, SGD(), mode)(inner, world.outer_loss, world.parameters, own, RATE)[1]["weights"]
    start = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    losses = world.losses(start, world.inner)[0]
    slopes = [torch.autograd.grad(loss, list(start.values()), retain_graph=True) for loss in losses]
    total = torch.autograd.grad((own["weights"] * losses).sum(), list(start.values()))
    ahead = {n: (p - RATE * g).detach().requires_grad_() for (n, p), g in zip(start.items(), total, strict=True)}
    outer = torch.autograd.grad(world.outer_loss(ahead), list(ahead.values()))
    expected = [-RATE * sum((a * b).sum() for a, b in zip(slope, outer, strict=True)) for slope in slopes]
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [SGD(), Adam(epsilon=1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_a_detached_weight_sum_is_a_constant(name: str, rule: Rule) -> None:
    """The derivative is that of the surrogate Σwl / c with c fixed at Σw, and differs from the true one."""
    found = {}
    for detach in (False, True):
        world = World(detach)
        selector = build(name, world.view)
        ((key, own),) = own_of(selector).items()
        arguments = (world.inner_of(selector), world.outer_loss, world.parameters, {key: own}, RATE)
        outer, gradients = Unrolled(3, rule)(*arguments)
        found[detach] = (outer, gradients[key])
    assert found[False][0] == found[True][0]

    class Surrogate(type(selector)):  # type: ignore[misc]
        def weighted_mean(self, losses: Tensor, weights: Tensor) -> Tensor:
            weights = torch.where(self.is_primary, torch.ones_like(weights), weights)
            self.constant = getattr(self, "constant", float(weights.detach().sum()))  # of the first call
            return (weights * losses).sum() / self.constant

    selector.__class__ = Surrogate
    Unrolled(3, rule)(*arguments)
    expected = central_differences(lambda: Unrolled(3, rule)(*arguments)[0], own)
    assert (found[True][1] - expected).norm() / expected.norm() < 1e-6
    assert (found[False][1] - expected).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_parameter_that_is_not_reached_gets_zeros(steps: int, mode: str) -> None:
    world = World()
    own = {"reached": draw(8, GENES), "idle": draw(9, 2, 3)}

    def inner(at: Tensors, own: Tensors, number: int) -> Tensor:
        return (own["reached"].exp() * world.losses(at, world.inner)[0]).sum()

    outer, gradients = Unrolled(steps, SGD(), mode)(inner, world.outer_loss, world.parameters, own, RATE)
    assert gradients["idle"].shape == (2, 3) and (gradients["idle"] == 0).all()
    assert gradients["reached"].bool().all() == (steps > 0)
    assert outer.isfinite()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_the_given_tensors_stay_as_they_are(rule: Rule, mode: str) -> None:
    world = World()
    selector = build("dkgsb", world.view)
    own = own_of(selector)
    before = {n: p.detach().clone() for n, p in own.items()}
    given = {n: torch.nn.Parameter(p.clone()) for n, p in world.parameters.items()}
    Unrolled(3, rule, mode)(world.inner_of(selector), world.outer_loss, given, own, RATE)
    for tensors, old in ((given, world.parameters), (own, before)):
        assert all(torch.equal(p, old[n]) and p.grad is None and p.is_leaf for n, p in tensors.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), Adam()], ids=["sgd", "momentum", "adam"])
def test_a_parameter_that_the_loss_does_not_reach_stays_where_it_is(rule: Rule, mode: str) -> None:
    world = World()
    given = world.parameters | {"idle": draw(9, 2)}
    moved = look_ahead(Unrolled(2, rule, mode), lambda at, *_: world.loss_sum(at), given, {}, RATE)
    torch.testing.assert_close(moved["idle"], given["idle"], rtol=0, atol=0)
    assert not torch.equal(moved["head"], given["head"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [SGD(), Adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("temperature", [1e-3, 5e-3, 1e-2])
def test_fully_underflowed_weights_are_finite(rule: Rule, dtype: torch.dtype, temperature: float, mode: str) -> None:
    """Head rows of such genes have gradients of exactly zero, or so small that their squares vanish."""
    world = World()
    view = TrainingView(world.genes, world.view.expression.to(dtype), torch.Generator())
    selector = Dkgsb(view, temperature=temperature)
    world.parameters = {n: p.to(dtype) for n, p in world.parameters.items()}
    world.inner, world.outer = (tuple(t.to(dtype) for t in batch) for batch in (world.inner, world.outer))
    outer, gradients = Unrolled(3, rule, mode)(
        world.inner_of(selector), world.outer_loss, world.parameters, own_of(selector), 0.05
    )
    assert outer.isfinite() and gradients["cutoff"].isfinite()


# ---- More rules, other batches --------------------------------------------------------------------------------------

MORE_RULES = {
    "sgd": SGD(),
    "momentum decay": SGD(momentum=0.9, weight_decay=0.1),
    "adam": Adam(epsilon=1e-3),
    "adam decay": Adam(epsilon=1e-3, weight_decay=0.1),
    "adam of higher": Adam(epsilon=1e-3, corrected=False),
    "carried adam": Adam(epsilon=1e-3, carried=True),
    "adamw": AdamW(epsilon=1e-3),
    "carried adamw": AdamW(epsilon=1e-3, carried=True),
}


def carried(world: World) -> Moments:
    """Moments of an optimiser that is under way."""
    return Moments(
        {n: (0.01 * draw(11, *p.shape), (0.01 * draw(12, *p.shape)) ** 2) for n, p in world.parameters.items()}, 5
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", MORE_RULES.values(), ids=MORE_RULES)
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_all_ways_are_the_derivative_with_a_batch_for_each_step(name: str, rule: Rule, mode: Any) -> None:
    world = World()
    selector = build(name, world.view)
    ((key, own),) = own_of(selector).items()
    arguments = (world.new_inner_of(selector), world.outer_loss, world.parameters, {key: own}, RATE, carried(world))
    outer, gradients = Unrolled(3, rule, mode, batches="new")(*arguments)
    plain = Unrolled(3, rule, "reverse", batches="new")
    expected = central_differences(lambda: plain(*arguments)[0], own)
    torch.testing.assert_close(outer, plain(*arguments)[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients[key], plain(*arguments)[1][key], rtol=1e-9, atol=1e-14)
    assert (gradients[key] - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("method", [*(Unrolled(4, SGD(), m) for m in MODES), FiniteDifference(4)], ids=str)
def test_inner_losses_are_numbered_from_zero(method: Hypergradient) -> None:
    world, seen = World(), set()

    def inner(at: Tensors, own: Tensors, number: int) -> Tensor:
        seen.add(number)
        return own["weight"] * world.loss_sum(at)

    method(inner, world.outer_loss, world.parameters, {"weight": draw(8)}, RATE)
    assert seen == {0, 1, 2, 3}


# ---- The other engines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dkgsb", "amal"])
@pytest.mark.parametrize("own_rate", [None, 0.07])
def test_one_step_is_unrolled_once(name: str, own_rate: float | None) -> None:
    world = World()
    selector = build(name, world.view)
    arguments = (world.inner_of(selector), world.outer_loss, world.parameters, own_of(selector), RATE)
    one, two = OneStep(own_rate)(*arguments), Unrolled(1, SGD(own_rate))(*arguments)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14)
    assert all(g.norm() > 1e-6 and not g.requires_grad for g in one[1].values())


class Quadratic:
    """J = ½ θᵀAθ − θᵀBφ with θ in two pieces, E = ½ ‖θ − c‖²; so dE/dφ at the minimum is Bᵀ A⁻¹ (θ − c)."""

    def __init__(self, eigenvalues: list[float]) -> None:
        n = len(eigenvalues)
        turn = torch.linalg.qr(draw(1, n, n)).Q
        self.a, self.b, self.c = (
            turn @ torch.diag(torch.tensor(eigenvalues).double()) @ turn.T,
            draw(2, n, 3),
            draw(3, n),
        )
        self.hyper = {"phi": draw(4, 3)}
        self.theta = draw(5, n)
        self.parameters = {"first": self.theta[:4].reshape(2, 2), "second": self.theta[4:]}
        self.v = self.theta - self.c

    def inner(self, at: Tensors, own: Tensors, number: int) -> Tensor:
        theta = torch.cat([p.reshape(-1) for p in at.values()])
        return theta @ self.a @ theta / 2 - theta @ self.b @ own["phi"]

    def outer(self, at: Tensors) -> Tensor:
        return (torch.cat([p.reshape(-1) for p in at.values()]) - self.c).square().sum() / 2

    def found(self, method: Hypergradient, rate: float = 0.5) -> Tensor:
        outer, gradients = method(self.inner, self.outer, self.parameters, self.hyper, rate)
        torch.testing.assert_close(outer, self.v.square().sum() / 2)  # at the present θ
        return gradients["phi"]

    def solved(self, damping: float = 0.0) -> Tensor:
        """Bᵀ (A + damping·I)⁻¹ v."""
        return self.b.T @ torch.linalg.solve(self.a + damping * torch.eye(len(self.a)).double(), self.v)


CURVED = [0.5, 0.8, 1.0, 1.3, 1.7, 2.0]


def test_the_implicit_gradient_is_that_of_the_minimum() -> None:
    world = Quadratic(CURVED)

    def at_minimum() -> Tensor:
        return (torch.linalg.solve(world.a, world.b @ world.hyper["phi"]) - world.c).square().sum() / 2

    expected = central_differences(at_minimum, world.hyper["phi"])
    world.theta = torch.linalg.solve(world.a, world.b @ world.hyper["phi"])
    world.parameters, world.v = {"first": world.theta[:4], "second": world.theta[4:]}, world.theta - world.c
    torch.testing.assert_close(world.found(Implicit(6, "cg")), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_conjugate_gradients_are_exact_after_as_many_terms_as_dimensions(damping: float) -> None:
    world = Quadratic(CURVED)
    for terms in (6, 7, 20):  # and stay there
        found = world.found(Implicit(terms, "cg", damping=damping))
        torch.testing.assert_close(found, world.solved(damping), rtol=0, atol=1e-10)
    assert (world.found(Implicit(3, "cg", damping=damping)) - world.solved(damping)).norm() > 1e-4


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_the_neumann_series_converges_to_the_inverse(damping: float) -> None:
    world = Quadratic(CURVED)
    torch.testing.assert_close(world.found(Implicit(300, damping=damping)), world.solved(damping), rtol=0, atol=1e-10)
    assert (world.found(Implicit(5, damping=damping)) - world.solved(damping)).norm() > 1e-3


@pytest.mark.parametrize("terms", [0, 1, 3])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_a_short_neumann_series_is_cut_off(terms: int, scale: float | None) -> None:
    """No term at all is T1–T2: scale · ⟨∂_φ ∇_θ J, ∇E⟩."""
    world = Quadratic(CURVED)
    eta = 0.5 if scale is None else scale  # the model's rate
    shrink = torch.eye(6).double() - eta * world.a
    u = eta * sum(torch.linalg.matrix_power(shrink, i) @ world.v for i in range(terms + 1))
    torch.testing.assert_close(world.found(Implicit(terms, scale=scale)), world.b.T @ u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eigenvalues", [[-0.2, 0.8, 1.0, 1.3, 1.7, 2.0], [-1.0] * 6, [0.0] * 6])
def test_conjugate_gradients_stop_where_the_curvature_is_not_positive(eigenvalues: list[float]) -> None:
    world = Quadratic(eigenvalues)
    u, residual = torch.zeros(6).double(), world.v
    direction, followed = residual, 0
    while followed < 20 and direction @ world.a @ direction > 0:
        step = (residual @ residual) / (direction @ world.a @ direction)
        u, after = u + step * direction, residual - step * world.a @ direction
        direction, residual = after + (after @ after) / (residual @ residual) * direction, after
        followed += 1
    assert followed < 6 and (followed > 0) == (max(eigenvalues) > 0)
    for terms in (followed, 6, 20):
        torch.testing.assert_close(world.found(Implicit(terms, "cg")), world.b.T @ u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["neumann", "cg"])
def test_the_implicit_gradient_of_an_inner_loss_without_curvature(solver: Any) -> None:
    """And of one that does not see φ: zeros."""
    world = Quadratic(CURVED)
    idle = {"idle": draw(8, 2)}
    for inner in (lambda at, *_: sum(p.sum() for p in at.values()), lambda at, *_: world.inner(at, world.hyper, 0)):
        _, gradients = Implicit(3, solver)(inner, world.outer, world.parameters, idle, 0.5)
        assert (gradients["idle"] == 0).all()


@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), Adam(epsilon=1e-3, carried=True)], ids=str)
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_finite_differences_are_close(name: str, rule: Rule) -> None:
    world = World()
    selector = build(name, world.view)
    ((key, own),) = own_of(selector).items()
    arguments = (world.new_inner_of(selector), world.outer_loss, world.parameters, {key: own}, RATE, carried(world))
    outer, gradients = FiniteDifference(3, rule)(*arguments)
    plain = Unrolled(3, rule, "reverse")
    exact, exact_gradients = plain(*arguments)
    expected = central_differences(lambda: plain(*arguments)[0], own)
    torch.testing.assert_close(outer, exact, rtol=0, atol=1e-9)
    assert (gradients[key] - expected).norm() / expected.norm() < 1e-8
    assert (gradients[key] - exact_gradients[key]).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("method", [OneStep(), Implicit(2), Implicit(2, "cg"), FiniteDifference(2)], ids=str)
def test_the_other_engines_leave_what_is_given_as_it_is(method: Hypergradient) -> None:
    world = World()
    selector = build("dkgsb", world.view)
    own = own_of(selector) | {"idle": torch.nn.Parameter(draw(9, 2))}
    before = {n: p.detach().clone() for n, p in own.items()}
    given = {n: torch.nn.Parameter(p.clone()) for n, p in world.parameters.items()}

    def inner(at: Tensors, own: Tensors, number: int) -> Tensor:
        return functional_call(selector, {"cutoff": own["cutoff"]}, world.losses(at, world.inner))

    outer, gradients = method(inner, world.outer_loss, given, own, RATE)
    assert not outer.requires_grad and not any(g.requires_grad for g in gradients.values())
    assert (gradients["idle"] == 0).all() and gradients["cutoff"] != 0
    for tensors, old in ((given, world.parameters), (own, before)):
        assert all(torch.equal(p, old[n]) and p.grad is None and p.is_leaf for n, p in tensors.items())


# ---- Nothing left open ----------------------------------------------------------------------------------------------


def test_one_scalar_goes_forward() -> None:
    world = World()
    selector = build("dkgsb", world.view)
    arguments = (world.inner_of(selector), world.parameters, own_of(selector))
    for memory in (0, 2**60):
        assert Unrolled(3, SGD(0.5)).settled(*arguments, memory) == Unrolled(3, SGD(0.5), "forward")


def test_memory_decides_between_reverse_and_replay() -> None:
    """The graphs of all steps must take less than half of it."""
    world = World()
    selector = build("amal", world.view)
    arguments = (world.inner_of(selector), world.parameters, own_of(selector))
    needed = graph_bytes(*arguments)
    assert needed > 0
    for steps in (1, 2, 5):
        limit = 2 * steps * needed
        assert Unrolled(steps).settled(*arguments, limit + 2) == Unrolled(steps, mode="reverse")
        assert Unrolled(steps).settled(*arguments, limit) == Unrolled(steps, mode="replay")


@pytest.mark.parametrize("rule", [SGD(0.3), Adam(epsilon=1e-3), Adam(epsilon=1e-3, carried=True)], ids=repr)
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_losses_in_parts_are_losses(name: str, rule: Rule) -> None:
    """Each part is alive only while it is looked at, and the parts add up."""
    world = World()
    selector = build(name, world.view)
    own = own_of(selector)
    whole_inner, whole_outer = world.inner_of(selector), world.outer_loss

    def inner(at: Tensors, own: Tensors, number: int) -> Iterator[Tensor]:
        for share in (0.2, 0.3, 0.5):
            yield share * whole_inner(at, own, number) * (1 + number)

    def outer(at: Tensors) -> Iterator[Tensor]:
        return (share * whole_outer(at) for share in (0.6, 0.4))

    moments = Moments({n: (draw(8, *p.shape), draw(9, *p.shape).square()) for n, p in world.parameters.items()}, 5)
    engines: list[Hypergradient] = [
        *(Unrolled(3, rule, mode) for mode in MODES),  # type: ignore[arg-type]
        *(OneStep(0.3, mode=mode) for mode in ("auto", "jvp", "double backward")),  # type: ignore[arg-type]
        Implicit(3), Implicit(4, "cg", damping=2.0), FiniteDifference(2, rule),
    ]  # fmt: skip
    for engine in engines:
        rest = (world.parameters, own, RATE, moments)
        value, found = engine(inner, outer, *rest)
        expected, whole = engine(lambda at, o, h: whole_inner(at, o, h) * (1 + h), whole_outer, *rest)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        tolerance = 1e-6 if isinstance(engine, FiniteDifference) else 1e-10
        for key, gradient in whole.items():
            assert not found[key].requires_grad
            torch.testing.assert_close(found[key], gradient, rtol=tolerance, atol=tolerance)
    value = graph_bytes(inner, world.parameters, own)
    assert value > graph_bytes(whole_inner, world.parameters, own)


@pytest.mark.parametrize("method", [*(Unrolled(3, SGD(), m) for m in MODES), OneStep(), Implicit(), FiniteDifference()])
@pytest.mark.parametrize("memory", [0, 2**60])
def test_what_is_settled_stays(method: Hypergradient, memory: int) -> None:
    def inner(*_: object) -> Tensor:
        raise AssertionError("nothing is to be measured")

    assert method.settled(inner, {}, {}, memory) is method


@pytest.mark.parametrize("mode", MODES)
def test_settling_changes_no_result(mode: Any) -> None:
    world = World()
    selector = build("dkgsb" if mode == "forward" else "amal", world.view)
    arguments = (world.inner_of(selector), world.parameters, own_of(selector))
    settled = Unrolled(3).settled(*arguments, 0 if mode == "replay" else 2**60)
    assert settled.mode == mode
    call = (arguments[0], world.outer_loss, *arguments[1:], RATE)
    torch.testing.assert_close(settled(*call), Unrolled(3)(*call), rtol=1e-10, atol=1e-14)


def test_graph_bytes_grow_with_the_batch() -> None:
    sizes = []
    for spots in (50, 100, 200):
        world = World(spots=spots)
        selector = build("amal", world.view)
        sizes.append(graph_bytes(world.inner_of(selector), world.parameters, own_of(selector)))
    assert sizes[0] > 50 * (INPUTS + WIDTH + GENES) * 8  # at least inputs, features and predictions
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0


def test_parameters_are_no_part_of_a_graph() -> None:
    wide = {"head": torch.zeros(1000)}
    assert graph_bytes(lambda at, own, _: (at["head"] * own["w"]).sum(), wide, {"w": torch.ones(())}) < 100


@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_measuring_a_graph_keeps_nothing(name: str) -> None:
    world = World()
    selector, met = build(name, world.view), []

    def inner(at: Tensors, own: Tensors, number: int) -> Tensor:
        losses, step = world.losses(at, world.inner)
        met.extend(weakref.ref(t) for t in (*at.values(), step.features, step.prediction, losses))
        return functional_call(selector, dict(own), (losses, step))

    graph_bytes(inner, world.parameters, own_of(selector))
    assert met and all(r() is None for r in met)


# ---- Degenerate data ------------------------------------------------------------------------------------------------


def degenerate(dtype: torch.dtype) -> World:
    """A primary and an auxiliary gene do not vary, others are zero throughout, and one is predicted to be constant."""
    world = World()
    primary, auxiliary = (m.nonzero().squeeze(1) for m in (world.genes.primary, ~world.genes.primary))
    for _, target in (world.inner, world.outer):
        target[:, [primary[0], auxiliary[0]]] = 0.7
        target[:, [primary[1], auxiliary[1]]] = 0
    world.parameters["head"][auxiliary[2]] = 0
    world.parameters = {n: p.to(dtype) for n, p in world.parameters.items()}
    world.inner, world.outer = (tuple(t.to(dtype) for t in batch) for batch in (world.inner, world.outer))
    return world


ENGINES: list[Hypergradient] = [
    *(Unrolled(3, rule, mode) for mode in MODES for rule in (SGD(), SGD(momentum=0.9), Adam(), AdamW())),
    *(Unrolled(3, rule, mode) for mode in MODES for rule in (Adam(corrected=False), Adam(carried=True))),
    *(OneStep(), Implicit(3), Implicit(3, "cg"), FiniteDifference(2), FiniteDifference(2, Adam())),
]


@pytest.mark.parametrize("method", ENGINES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dkgsb", "amal"])
def test_degenerate_genes_and_underflowed_weights_are_finite(
    name: str, dtype: torch.dtype, method: Hypergradient
) -> None:
    world = degenerate(dtype)
    view = TrainingView(world.genes, world.view.expression.to(dtype), torch.Generator())
    selector = Dkgsb(view, temperature=1e-3) if name == "dkgsb" else Amal(view, temperature=1e-3)
    if name == "amal":
        with torch.no_grad():  # exp(±300): half of them underflow, the others saturate
            selector.logits.copy_(0.3 * draw(9, GENES).sign())
    own, inner = own_of(selector), world.inner_of(selector)
    at = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    slope = torch.autograd.grad(inner(at, own, 0), at["head"])[0]
    assert 4 < (slope == 0).all(1).sum() < GENES  # rows without any gradient, so without a second moment
    zeros = Moments({n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in world.parameters.items()}, 0)
    outer, gradients = method(inner, world.outer_loss, world.parameters, own, 0.05, zeros)
    assert outer.isfinite() and all(g.isfinite().all() and g.dtype == dtype for g in gradients.values())


@pytest.mark.parametrize("rule", [Adam(), AdamW(), Adam(corrected=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pushing_a_zero_second_moment_is_finite(rule: Rule, dtype: torch.dtype) -> None:
    """Also where a gradient is so small that its square vanishes but its tangent is not."""
    gradient = torch.tensor([0.0, 0.0, 1e-23, 1e-30, 1e-200, 1.0]).to(dtype)
    tangent = torch.tensor([0.0, 1.0, 1.0, -1.0, 1.0, 1.0]).to(dtype)
    point = Dual(torch.zeros_like(gradient), torch.zeros_like(gradient), rule.start(gradient), rule.start(gradient))
    for number in (1, 2, 3):
        rule.push(point, gradient, tangent, number, 0.1)
    for t in (point.value, point.tangent, *point.slots, *point.slot_tangents):
        assert t.isfinite().all()
    assert point.value[0] == point.tangent[0] == 0


# ---- Memory ---------------------------------------------------------------------------------------------------------


class Held:
    """A tensor that autograd keeps for a backward pass, and how many bytes are kept at once."""

    now = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # itself it would keep its own graph alive
        Held.now += tensor.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self) -> None:
        Held.now -= self.tensor.nbytes


def held(method: Unrolled, name: str) -> tuple[int, int]:
    """The most bytes that graphs held at once, and how many sets of parameters were alive at the end."""
    world = World()
    selector = build(name, world.view)
    inner, met = world.inner_of(selector), []
    alive = 0

    def watched(at: Tensors, own: Tensors, number: int) -> Tensor:
        met.extend(weakref.ref(p) for p in at.values())
        return inner(at, own, number)

    def outer(at: Tensors) -> Tensor:
        nonlocal alive
        alive = max(alive, sum(r() is not None for r in met) // len(at))
        return world.outer_loss(at)

    Held.now = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.tensor):
        method(watched, outer, world.parameters, own_of(selector), RATE)
    assert Held.now == 0  # everything is let go
    return Held.peak, alive


@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), Adam(), AdamW()], ids=str)
def test_forward_takes_no_more_memory_for_more_steps(rule: Rule) -> None:
    short, long = (held(Unrolled(steps, rule, "forward"), "dkgsb") for steps in (3, 12))
    assert short == long and long[1] <= 1


@pytest.mark.parametrize("rule", [SGD(), Adam()], ids=str)
def test_replay_takes_no_more_graphs_for_more_steps_and_reverse_does(rule: Rule) -> None:
    replay = [held(Unrolled(steps, rule, "replay"), "amal")[0] for steps in (3, 12)]
    reverse = [held(Unrolled(steps, rule, "reverse"), "amal")[0] for steps in (3, 12)]
    assert replay[0] == replay[1] < reverse[0] < reverse[1] / 3
