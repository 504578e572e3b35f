"""Inner rules against torch.optim, hypergradients against central differences and closed forms, all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.maths.hypergradient import SGD, Adam, InnerLoss, Rule, Tensors, Unrolled
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

    def __post_init__(self) -> None:
        self.inner, self.outer = ((draw(s, SPOTS, INPUTS), draw(s + 1, SPOTS, GENES)) for s in (0, 2))
        self.parameters = {"first": draw(4, WIDTH, INPUTS), "bias": draw(5, WIDTH), "head": draw(6, GENES, WIDTH)}
        self.genes = toy_genes(PRIMARY, AUXILIARY)
        self.view = TrainingView(self.genes, draw(7, SPOTS, GENES), torch.Generator(), self.detach)

    def losses(self, at: Tensors, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Step]:
        features = torch.tanh(batch[0] @ at["first"].T + at["bias"])
        prediction = features @ at["head"].T
        return pearson_loss(prediction, batch[1]), Step(features, prediction, batch[1], torch.arange(SPOTS), 0)

    def inner_of(self, selector: Selector) -> InnerLoss:
        return lambda at, own: functional_call(selector, dict(own), self.losses(at, self.inner))

    def outer_loss(self, at: Tensors) -> Tensor:
        return self.losses(at, self.outer)[0][self.genes.primary].mean()

    def loss_sum(self, at: Tensors) -> Tensor:
        return self.losses(at, self.inner)[0].sum()


def own_of(selector: Selector) -> dict[str, Tensor]:
    return dict(selector.named_parameters())


def look_ahead(method: Unrolled, inner: InnerLoss, parameters: Tensors, own: Tensors, rate: float) -> dict[str, Tensor]:
    """θ_H, seen through the outer loss."""
    seen: dict[str, Tensor] = {}

    def outer(at: Tensors) -> Tensor:
        seen.update({n: p.detach() for n, p in at.items()})
        return sum(p.sum() for p in at.values())  # type: ignore[return-value]

    method(inner, outer, parameters, own or {"idle": torch.zeros((), requires_grad=True)}, rate)
    return seen


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
    moved = look_ahead(Unrolled(12, rule), lambda at, _: world.loss_sum(at), world.parameters, {}, 0.1)
    reference = {n: p.clone().requires_grad_() for n, p in world.parameters.items()}
    optimizer = theirs(reference.values(), lr=0.1 if own is None else own, **options)
    for _ in range(12):
        optimizer.zero_grad()
        world.loss_sum(reference).backward()
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


MODES = ["reverse", "forward"]
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

    def inner(at: Tensors, own: Tensors) -> Tensor:
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

    def inner(at: Tensors, own: Tensors) -> Tensor:
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
    moved = look_ahead(Unrolled(2, rule, mode), lambda at, _: world.loss_sum(at), given, {}, RATE)
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


def test_only_one_scalar_and_a_large_model_go_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for way in MODES:
        monkeypatch.setattr(Unrolled, f"_{way}", lambda self, *_, way=way: taken.append(way))
    world = World()
    for steps, limit, own in ((3, 1, 1), (1, 1, 1), (3, 10**9, 1), (3, 1, 2)):
        monkeypatch.setattr("agl_bench.maths.hypergradient.LARGE_MODEL", limit)
        Unrolled(steps)(world.loss_sum, world.outer_loss, world.parameters, {"own": torch.zeros(own)}, RATE)
    assert taken == ["forward", "reverse", "reverse", "reverse"]
