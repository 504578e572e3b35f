"""Selectors that learn: each against its source spelt out slowly, and its hypergradient against differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from agl_bench import SGD, BadSpec, FiniteDifference, GeneSplit, Implicit, OneStep, Selector, Step, TrainingView
from agl_bench.interfaces.tunable import resolve, tunables
from agl_bench.maths.losses import pearson_loss, squared_error
from agl_bench.testing import toy_genes, toy_step, toy_truth, toy_view
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal_spot import AmalSpot
from agl_bench_plugins.selectors.anti_oracle import AntiOracle
from agl_bench_plugins.selectors.auto_lambda import AutoLambda
from agl_bench_plugins.selectors.auxilearn import AuxiLearn
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.maxl_weights import MaxlWeights
from agl_bench_plugins.selectors.oracle import Oracle
from agl_bench_plugins.selectors.soft_topk import SoftTopk, soft_top_k
from agl_bench_plugins.selectors.uncertainty import Uncertainty

SPOTS, INPUTS, WIDTH, PRIMARY, AUXILIARY = 14, 4, 5, 3, 8
GENES = PRIMARY + AUXILIARY
RATE = 0.3
LEARNERS: dict[str, tuple[type[Selector], dict[str, Any]]] = {
    "maxl_weights": (MaxlWeights, {}),
    "maxl_weights, no revival": (MaxlWeights, {"revive": False}),
    "auto_lambda": (AutoLambda, {}),
    "soft_topk": (SoftTopk, {}),
    "soft_topk, k": (SoftTopk, {"learns": "k"}),
    "amal_spot": (AmalSpot, {}),
}
Parameters = dict[str, Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class World:
    """A smooth network, a batch for the inner and one for the outer loss, and a selector's view; all in float64."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] = pearson_loss) -> None:
        self.loss, self.genes = loss, toy_genes(PRIMARY, AUXILIARY)
        self.parameters = {"backbone.first": draw(4, WIDTH, INPUTS), "head.weight": draw(6, GENES, WIDTH)}
        self.inner, self.outer = ((draw(s, SPOTS, INPUTS), draw(s + 1, SPOTS, GENES)) for s in (0, 2))
        self.view = TrainingView(self.genes, draw(7, SPOTS, GENES), torch.Generator().manual_seed(0))

    def losses(self, at: Parameters, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Step]:
        features = torch.tanh(batch[0] @ at["backbone.first"].T)
        prediction = features @ at["head.weight"].T
        step = Step(features, prediction, batch[1], torch.arange(SPOTS), 0, head=at["head.weight"])
        return self.loss(prediction, batch[1]), step

    def leaves(self) -> Parameters:
        return {n: p.clone().requires_grad_() for n, p in self.parameters.items()}

    def total(self, selector: Selector, at: Parameters, own: Parameters | None = None) -> Tensor:
        result: Tensor = functional_call(selector, dict(own or {}), self.losses(at, self.inner))
        return result

    def outer_loss(self, at: Parameters) -> Tensor:
        return self.losses(at, self.outer)[0][self.genes.primary].mean()

    def hypergradient(self, selector: Selector, method: Any = None) -> Parameters:
        own = dict(selector.named_parameters())
        inner = lambda at, phi, _: self.total(selector, at, phi)  # noqa: E731
        found = (method or selector.hypergradient)(inner, self.outer_loss, self.parameters, own, RATE)[1]
        return dict(found)


@pytest.fixture
def world() -> World:
    return World()


def shaken(selector: Selector, by: float = 0.1) -> Selector:
    """Its parameters a little off where they began, so that nothing is equal by symmetry."""
    with torch.no_grad():
        for number, parameter in enumerate(selector.parameters()):
            parameter.add_(by * draw(50 + number, *parameter.shape))
    return selector


def slope(selector: Selector, losses: Tensor | None = None) -> Tensor:
    """∂J/∂losses, (genes,), at losses in (0, 1)."""
    count = len(selector.genes.names)
    if losses is None:
        losses = torch.rand(count, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    losses = losses.detach().requires_grad_()
    _, step = toy_step(selector.genes)
    return torch.autograd.grad(selector(losses, step), losses)[0]


def view_of(genes: GeneSplit, seed: int = 0) -> TrainingView:
    expression = torch.zeros(SPOTS, len(genes.names), dtype=torch.float64)
    return TrainingView(genes, expression, torch.Generator().manual_seed(seed))


# --- hypergradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_hypergradients_are_those_of_differences(world: World, name: str) -> None:
    cls, settings = LEARNERS[name]
    selector = shaken(cls(world.view, **settings))
    method = selector.hypergradient
    assert isinstance(method, OneStep) and method.rate == 0.5 and method.reach == "late"
    exact = world.hypergradient(selector, replace(method, rate=RATE))
    reference = world.hypergradient(selector, FiniteDifference(1, SGD(RATE), delta=1e-5))
    for parameter, found in exact.items():
        assert found.abs().max() > 1e-6
        torch.testing.assert_close(found, reference[parameter], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [MaxlWeights, AutoLambda])
def test_the_virtual_step_may_go_at_the_models_rate(world: World, cls: type[Selector]) -> None:
    own, theirs = cls(world.view, inner_rate=RATE), cls(world.view, inner_rate="model")
    assert theirs.hypergradient == OneStep(None, "late")
    assert torch.equal(world.hypergradient(own)["weights"], world.hypergradient(theirs)["weights"])


# --- uncertainty -----------------------------------------------------------------------------------------------------


def test_uncertainty_is_kendalls_sum_over_the_number_of_genes(world: World) -> None:
    selector = shaken(Uncertainty(world.view), 0.5)
    losses, step = world.losses(world.leaves(), world.inner)
    kendall = authors = torch.zeros((), dtype=torch.float64)
    for loss, s in zip(losses, selector.log_variance.detach(), strict=True):
        kendall = kendall + loss / (2 * torch.exp(s)) + s / 2
        authors = authors + torch.exp(-s) * loss + s
    torch.testing.assert_close(selector(losses, step), kendall / GENES)
    torch.testing.assert_close(2 * selector(losses, step), authors / GENES)
    assert selector.learns_from == "training"


def test_uncertainty_is_least_where_weights_are_one_over_the_losses(world: World) -> None:
    selector, losses = Uncertainty(world.view), torch.linspace(0.2, 1.7, GENES, dtype=torch.float64)
    with torch.no_grad():
        selector.log_variance.copy_(losses.log())
    _, step = world.losses(world.leaves(), world.inner)
    (found,) = torch.autograd.grad(selector(losses, step), selector.log_variance)
    assert found.abs().max() < 1e-12
    torch.testing.assert_close(slope(selector, losses), 1 / (2 * losses * GENES))


# --- MAXL-style weights ----------------------------------------------------------------------------------------------


def test_maxl_weights_follow_a_virtual_step(world: World) -> None:
    selector = shaken(MaxlWeights(world.view, revive=False, inner_rate="model"), 0.7)
    raw = selector.weights.detach().clone().requires_grad_()
    assert (raw < 0).any()
    at = world.leaves()
    losses, _ = world.losses(at, world.inner)
    total, weight_sum = 0 * raw.sum(), 0 * raw.sum()
    for j in range(GENES):
        weight = torch.ones_like(raw[j]) if world.genes.primary[j] else torch.relu(raw[j])
        total, weight_sum = total + weight * losses[j], weight_sum + weight
    torch.testing.assert_close(world.total(selector, at), total / weight_sum)
    gradients = torch.autograd.grad(total / weight_sum, list(at.values()), create_graph=True)
    ahead = {n: p - RATE * g for (n, p), g in zip(at.items(), gradients, strict=True)}
    (expected,) = torch.autograd.grad(world.outer_loss(ahead), raw)
    torch.testing.assert_close(world.hypergradient(selector)["weights"], expected)


@pytest.mark.parametrize("revive", [True, False])
def test_a_gene_at_zero_comes_back_if_it_may(world: World, revive: bool) -> None:
    selector = MaxlWeights(world.view, revive=revive, learning_rate=0.5)
    optimizer = torch.optim.Adam(selector.parameters(), lr=selector.learning_rate)
    gene = int(world.genes.rank.argmax())
    for push in (1.0, 1.0, 1.0, 1.0):
        with torch.no_grad():
            selector.learn({"weights": torch.full((GENES,), push, dtype=torch.float64)}, optimizer)
    low = float(selector.weights.detach()[gene])
    assert slope(selector)[gene] == 0 and (low == 0 if revive else low < 0)
    assert (world.hypergradient(selector)["weights"][gene] != 0) == revive


# --- Auto-Lambda -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "close"), [(0.01, 1e-3), (1e-5, 1e-8)])
def test_auto_lambda_is_the_limit_of_its_finite_difference(world: World, epsilon: float, close: float) -> None:
    """−α (∂J(θ⁺) − ∂J(θ⁻)) / 2ε with ε = 0.01 / ‖v‖, as the authors code it; the smaller, the nearer."""
    selector = shaken(AutoLambda(world.view, start=1.0, inner_rate=RATE), 0.5)
    at, genes = world.leaves(), world.genes
    weights = torch.where(genes.primary, 1.0, selector.weights.detach())
    virtual_rate = RATE / GENES  # their J has no divisor
    losses, _ = world.losses(at, world.inner)
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    gradients = torch.autograd.grad(total, list(at.values()))
    ahead = {n: (p - virtual_rate * g).detach() for (n, p), g in zip(at.items(), gradients, strict=True)}
    ahead = {n: p.requires_grad_() for n, p in ahead.items()}
    v = torch.autograd.grad(world.outer_loss(ahead), list(ahead.values()))
    size = epsilon / torch.cat([g.flatten() for g in v]).norm()
    plus, minus = (
        world.losses({n: p + sign * size * g for (n, p), g in zip(at.items(), v, strict=True)}, world.inner)[0]
        for sign in (1, -1)
    )
    expected = torch.where(genes.primary, 0.0, -virtual_rate * (plus - minus) / (2 * size)).detach()
    found = world.hypergradient(selector)["weights"]
    assert (found - expected).norm() < close * expected.norm()
    torch.testing.assert_close(world.total(selector, at), total / GENES)


def test_auto_lambda_may_train_against_a_gene_and_never_divides_by_nothing(world: World) -> None:
    selector = AutoLambda(world.view)
    torch.testing.assert_close(slope(selector), torch.where(world.genes.primary, 1.0, 0.1).double() / GENES)
    with torch.no_grad():
        selector.weights.fill_(-PRIMARY / AUXILIARY)  # Σ w = 0
    found = slope(selector)
    assert found[world.genes.primary].min() == 1 / GENES and found[~world.genes.primary].max() < 0


# --- AuxiLearn -------------------------------------------------------------------------------------------------------


def weight_of(raw: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(raw.detach()))


@pytest.mark.parametrize("scaling", ["mean", "sum"])
@pytest.mark.parametrize("form", ["nonlinear", "linear"])
def test_auxilearn_is_a_monotone_network_beside_the_primary_loss(world: World, form: str, scaling: str) -> None:
    selector = shaken(AuxiLearn(world.view, form=form, scaling=scaling, hidden=4), 0.3)
    losses, step = world.losses(world.leaves(), world.inner)
    is_mean = scaling == "mean"
    expected = sum(losses[world.genes.primary]) / (GENES if is_mean else PRIMARY)
    output = weight_of(selector.output)
    if form == "linear":
        values = list(losses)
    else:
        values = []
        for row, bias in zip(weight_of(selector.input), selector.bias.detach(), strict=True):
            z = sum(w * loss for w, loss in zip(row, losses, strict=True)) / (GENES if is_mean else 1) + bias
            values.append(torch.log(1 + torch.exp(z)))
    net = sum(v * x for v, x in zip(output, values, strict=True)) / (len(values) if is_mean else 1)
    torch.testing.assert_close(selector(losses, step), expected + net)
    found = slope(selector)
    assert (found > 0).all()


def test_auxilearn_begins_as_its_source() -> None:
    """Weights U(0, 1), biases 0; the linear one's weights 1."""
    view = view_of(toy_genes(5, 2000))
    selector = AuxiLearn(view, hidden=64)
    assert not selector.bias.any()
    for weights in (weight_of(selector.input), weight_of(selector.output)):
        assert weights.min() > 0 and weights.max() < 1 and weights.mean() == pytest.approx(0.5, abs=0.15)
    torch.testing.assert_close(weight_of(AuxiLearn(view, form="linear").output), torch.ones(2005, dtype=torch.float64))


@pytest.mark.parametrize("form", ["nonlinear", "linear"])
@pytest.mark.parametrize("terms", [0, 1, 3])
def test_auxilearn_follows_the_implicit_gradient_of_its_source(world: World, form: str, terms: int) -> None:
    """v ← v − a H v, p ← p + v, as the authors code it; the a that they leave out in front is here."""
    scale = 0.05
    selector = shaken(AuxiLearn(world.view, form=form, terms=terms, scale=scale, hidden=3), 0.3)
    assert selector.hypergradient == Implicit(terms, scale=scale, reach="late")
    at, own = world.leaves(), {n: p.detach().clone().requires_grad_() for n, p in selector.named_parameters()}
    theta = list(at.values())
    p = v = torch.autograd.grad(world.outer_loss(at), theta)
    slopes = torch.autograd.grad(world.total(selector, at, own), theta, create_graph=True)
    for _ in range(terms):
        curved = torch.autograd.grad(slopes, theta, grad_outputs=v, retain_graph=True)
        v = tuple(a - scale * c for a, c in zip(v, curved, strict=True))
        p = tuple(a + b for a, b in zip(p, v, strict=True))
    expected = torch.autograd.grad(slopes, list(own.values()), grad_outputs=p)
    found = world.hypergradient(selector)
    for name, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(found[name], -scale * wanted)
        assert wanted.abs().max() > 0


def test_the_mixed_derivative_of_auxilearn_is_that_of_differences(world: World) -> None:
    """∂/∂φ ⟨∇_θ J, v⟩, the direction by `terms = 0`."""
    selector = shaken(AuxiLearn(world.view, terms=0, scale=1.0, hidden=3), 0.3)
    at = world.leaves()
    v = torch.autograd.grad(world.outer_loss(at), list(at.values()))
    found = world.hypergradient(selector)

    def aligned() -> Tensor:
        gradients = torch.autograd.grad(world.total(selector, at), list(at.values()))
        return sum((g * d).sum() for g, d in zip(gradients, v, strict=True))  # type: ignore[return-value]

    for name, parameter in selector.named_parameters():
        entry, of_entry, delta = parameter.data.view(-1), found[name].flatten(), 1e-5
        for i in range(0, len(entry), 5):
            before = entry[i].clone()
            entry[i] = before + delta
            above = aligned()
            entry[i] = before - delta
            below = aligned()
            entry[i] = before
            assert float(of_entry[i]) == pytest.approx(-float(above - below) / (2 * delta), rel=1e-5)


@pytest.mark.parametrize("form", ["nonlinear", "linear"])
def test_auxilearn_draws_by_the_names_of_the_genes(form: str) -> None:
    genes = toy_genes(PRIMARY, AUXILIARY)
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(3))
    moved = GeneSplit(tuple(genes.names[i] for i in order), genes.primary[order], genes.rank[order], genes.score[order])
    losses = draw(5, GENES).sigmoid()
    one, two = (AuxiLearn(view_of(g), form=form) for g in (genes, moved))
    torch.testing.assert_close(slope(one, losses)[order], slope(two, losses[order]), rtol=0, atol=1e-14)
    assert form == "linear" or not torch.equal(AuxiLearn(view_of(genes, seed=1)).input, one.input)


def test_sums_over_many_genes_leave_nothing_of_the_nonlinear_network() -> None:
    """Why means are the default: its softplus has the slope 1 everywhere, and the primary term is lost beside it."""
    genes = toy_genes(50, 5000)
    selector = AuxiLearn(view_of(genes), scaling="sum")
    by_sum, by_mean, primary = slope(selector), slope(AuxiLearn(view_of(genes))), genes.primary
    assert by_sum[primary].mean() / by_sum[~primary].mean() == pytest.approx(1, abs=0.03)
    assert by_mean[primary].mean() / by_mean[~primary].mean() > 3
    straight = weight_of(selector.output) @ weight_of(selector.input)
    torch.testing.assert_close(by_sum[~primary], straight[~primary], rtol=1e-9, atol=0)


def test_auxilearn_moves_by_adam_at_any_number_of_genes(world: World) -> None:
    """Gradients far below Adam's ε."""
    selector = AuxiLearn(world.view, learning_rate=0.1)
    optimizer = torch.optim.Adam(selector.parameters(), lr=selector.learning_rate)
    before = selector.output.detach().clone()
    gradients = {n: torch.full_like(p, 1e-7) for n, p in selector.named_parameters()}
    with torch.no_grad():
        selector.learn(gradients, optimizer)
    step = 0.1 * 1e-7 * GENES / (1e-7 * GENES + 1e-8)
    torch.testing.assert_close(before - selector.output.detach(), torch.full_like(before, step))


# --- SOFT top-k ------------------------------------------------------------------------------------------------------


def sinkhorn(scores: Tensor, k: float, epsilon: float, rounds: int = 5000) -> Tensor:
    """n Γ_1 of the plan Γ between n scores and the anchors 0 and 1."""
    count = len(scores)
    cost = torch.stack([scores.square(), (scores - 1).square()], 1)
    kernel = torch.exp(-cost / epsilon)
    target = torch.tensor([1 - k / count, k / count], dtype=torch.float64)
    v = torch.ones(2, dtype=torch.float64)
    for _ in range(rounds):
        u = (1 / count) / (kernel @ v)
        v = target / (kernel.T @ u)
    return count * (u[:, None] * kernel * v)[:, 1]


def softly(scores: Tensor, k: float, epsilon: float) -> Tensor:
    share = torch.tensor(k / len(scores), dtype=torch.float64)
    return soft_top_k(scores, torch.ones(len(scores), dtype=torch.bool), share, epsilon)


@pytest.mark.parametrize(("k", "epsilon"), [(1, 0.1), (3.5, 0.1), (7, 0.3), (11, 1.0)])
def test_soft_top_k_is_the_transport_plan(k: float, epsilon: float) -> None:
    scores = draw(1, 12)
    torch.testing.assert_close(softly(scores, k, epsilon), sinkhorn(scores, k, epsilon), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-3, 0.02, 1.0])
@pytest.mark.parametrize(
    "scores",
    [
        torch.linspace(0, 1, 400, dtype=torch.float64),
        torch.cat([torch.zeros(150), torch.ones(250)]).double(),
        torch.zeros(400, dtype=torch.float64),
        10 * draw(2, 400),
    ],
    ids=["ranks", "two heaps", "equal", "wide"],
)
def test_soft_top_k_sums_to_k(scores: Tensor, epsilon: float) -> None:
    for k in (0, 1, 17.3, 250, 399, 400):
        mask = softly(scores, k, epsilon)
        assert float(mask.sum()) == pytest.approx(k, abs=1e-6)
        assert (mask >= 0).all() and (mask <= 1).all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("tau", [0.001, 0.01, 0.1])
def test_soft_top_k_is_the_sigmoid_mask_of_dkgsb(t: float, tau: float) -> None:
    """On scores 1 − ρ with ε = 2 τ, its k the sum of that mask."""
    genes = toy_genes(PRIMARY, 200)
    losses = draw(3, len(genes.names)).sigmoid()
    dkgsb = Dkgsb(view_of(genes), start=t, temperature=tau, bounded=False)
    rho = genes.relative_rank(torch.float64)
    sigmoid = torch.sigmoid((t - rho) / tau)[~genes.primary]
    mask = soft_top_k(1 - rho, ~genes.primary, sigmoid.sum() / 200, 2 * tau)
    torch.testing.assert_close(mask[~genes.primary], sigmoid, rtol=0, atol=1e-7)
    share = float(sigmoid.sum() / 200)
    for learns in ("scores", "k"):
        selector = SoftTopk(view_of(genes), learns=learns, share=share, epsilon=2 * tau)
        torch.testing.assert_close(slope(selector, losses), slope(dkgsb, losses), rtol=0, atol=1e-7)


def test_the_derivative_of_soft_top_k_is_that_of_differences() -> None:
    scores, takes_part = draw(4, 9).requires_grad_(), torch.arange(9) != 4
    share = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, q: soft_top_k(s, takes_part, q, 0.3)[takes_part], (scores, share))
    (of_sum,) = torch.autograd.grad(soft_top_k(scores, takes_part, share, 0.3)[takes_part].sum(), scores)
    assert of_sum.abs().max() < 1e-15  # the sum stays


@pytest.mark.parametrize("learns", ["scores", "k"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("auxiliary", [0, 1, 2, 40])
def test_soft_top_k_with_few_genes_and_with_none_or_all_taken(learns: str, share: float, auxiliary: int) -> None:
    genes = toy_genes(PRIMARY, auxiliary)
    selector = SoftTopk(view_of(genes), learns=learns, share=share, epsilon=1e-3)
    found = slope(selector)
    taken = (found / found[genes.primary].mean())[~genes.primary].sum()
    begun = min(max(share, 0.01), 0.99) if learns == "k" else share
    assert float(taken) == pytest.approx(begun * auxiliary, abs=1e-6)
    _, step = toy_step(genes)
    losses = draw(3, len(genes.names)).sigmoid()
    gradients = torch.autograd.grad(selector(losses, step), list(selector.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_scores_of_soft_top_k_compete(world: World) -> None:
    """What one gene gains the others lose: Σ of the slopes is 0."""
    selector = shaken(SoftTopk(world.view))
    found = world.hypergradient(selector)["scores"]
    assert found.abs().max() > 1e-6 and abs(float(found.sum())) < 1e-12
    assert (found[world.genes.primary] == 0).all()


# --- AMAL by spots ---------------------------------------------------------------------------------------------------


def gradients_of(world: World, selector: Selector) -> list[Tensor]:
    at = world.leaves()
    return list(torch.autograd.grad(world.total(selector, at), list(at.values())))


def spot_weights() -> Tensor:
    return 2 * draw(9, SPOTS).sigmoid()


def amal_spot(world: World, **settings: Any) -> AmalSpot:
    selector = AmalSpot(world.view, **settings)
    with torch.no_grad():
        selector.weights.copy_(spot_weights())
    return selector


def test_amal_by_spots_begins_as_agl(world: World) -> None:
    spots, agl = AmalSpot(world.view), Agl(world.view)
    at = world.leaves()
    assert torch.equal(world.total(spots, at), world.total(agl, at))
    for one, other in zip(gradients_of(world, spots), gradients_of(world, agl), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", [pearson_loss, squared_error])
def test_a_spot_scales_what_it_sends_through_the_auxiliary_genes(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    world = World(loss)
    at, weights = world.leaves(), spot_weights()
    losses, step = world.losses(at, world.inner)
    theta = list(at.values())
    expected = list(torch.autograd.grad(losses[world.genes.primary].sum() / GENES, theta, retain_graph=True))
    through = torch.autograd.grad(losses[~world.genes.primary].sum(), step.prediction, retain_graph=True)[0]
    through = weights[:, None] * through
    if loss is pearson_loss:  # what goes along level and scale of the predictions of a gene is taken out
        for j in range(GENES):
            unseen = torch.stack([torch.ones(SPOTS, dtype=through.dtype), step.prediction[:, j].detach()], 1)
            through[:, j] -= unseen @ torch.linalg.lstsq(unseen, through[:, j : j + 1]).solution[:, 0]
    for i in range(SPOTS):
        for j in range(GENES):
            sent = torch.autograd.grad(step.prediction[i, j], theta, retain_graph=True)
            expected = [e + through[i, j] * s / GENES for e, s in zip(expected, sent, strict=True)]
    selector = amal_spot(world)
    assert float(world.total(selector, at).detach()) == pytest.approx(float(losses.detach().mean()), rel=1e-14)
    for one, other in zip(gradients_of(world, selector), expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        torch.autograd.grad(selector(losses, step), losses)[0], torch.full_like(losses, 1 / GENES)
    )


def test_for_a_mean_over_spots_it_is_the_published_amal() -> None:
    """Σ_i (primary loss + w_i · auxiliary loss) of the spots, and its step."""
    world = World(squared_error)
    at, weights, primary = world.leaves(), spot_weights().requires_grad_(), world.genes.primary
    _, step = world.losses(at, world.inner)
    each = (step.prediction - step.target).square() / SPOTS
    published = (each[:, primary].sum() + (weights[:, None] * each[:, ~primary]).sum()) / GENES
    theta = list(at.values())
    gradients = torch.autograd.grad(published, theta, create_graph=True)
    for one, other in zip(gradients_of(world, amal_spot(world)), gradients, strict=True):
        torch.testing.assert_close(one, other)
    ahead = {n: p - RATE * g for (n, p), g in zip(at.items(), gradients, strict=True)}
    (expected,) = torch.autograd.grad(world.outer_loss(ahead), weights)
    torch.testing.assert_close(world.hypergradient(amal_spot(world, inner_rate=RATE))["weights"], expected)


def test_spots_move_by_the_published_rule_and_only_those_of_the_batch(world: World) -> None:
    selector = amal_spot(world, outer_rate=10.0)
    before = selector.weights.detach().clone()
    gradient = torch.zeros(SPOTS, dtype=torch.float64)
    gradient[:4] = torch.tensor([1e-3, -1e-3, 5.0, -5.0], dtype=torch.float64)
    optimizer = torch.optim.Adam(selector.parameters(), lr=1.0)
    for _ in range(2):
        with torch.no_grad():
            selector.learn({"weights": gradient}, optimizer)
    after = selector.weights.detach()
    assert torch.equal(after[4:], before[4:]) and after[2] == 0 and after[3] == 2
    torch.testing.assert_close(after[:2], before[:2] - 20 * gradient[:2])


def test_a_correlation_stays_blind_to_level_and_scale() -> None:
    """Whatever the weights are: else predictions drift along both without end."""
    world = World(pearson_loss)
    losses, step = world.losses(world.leaves(), world.inner)
    selector = amal_spot(world)
    (slopes,) = torch.autograd.grad(selector(losses, step), step.prediction, retain_graph=True)
    level, scale = slopes.sum(0), (slopes * step.prediction).sum(0)
    torch.testing.assert_close(torch.stack([level, scale]), torch.zeros(2, GENES, dtype=slopes.dtype))
    assert not torch.allclose(slopes, step.slopes(losses) / GENES)


def test_weights_of_spots_are_found_by_their_rows() -> None:
    world = World(squared_error)
    selector = amal_spot(world)
    losses, step = world.losses(world.leaves(), world.inner)
    rows = torch.randperm(SPOTS, generator=torch.Generator().manual_seed(0))
    total = selector(losses, replace(step, row=rows))
    (found,) = torch.autograd.grad(total, selector.weights)
    through = step.slopes(losses) * ~world.genes.primary
    expected = torch.zeros(SPOTS, dtype=torch.float64).index_copy(0, rows, (through * step.prediction).sum(1) / GENES)
    torch.testing.assert_close(found, expected.detach())


# --- the anti-oracle -------------------------------------------------------------------------------------------------


def test_the_anti_oracle_is_the_mean_of_primary_and_harmful_losses() -> None:
    genes = toy_genes(4, 20)
    selector, oracle = AntiOracle(toy_view(genes, planted=True)), Oracle(toy_view(genes, planted=True))
    losses, step = toy_step(genes)
    harmful = toy_truth(genes) < 0
    assert int(harmful.sum()) == 10 and AntiOracle.is_control
    torch.testing.assert_close(selector(losses, step), losses[genes.primary | harmful].mean())
    assert torch.equal(selector.used, genes.primary | harmful)
    assert torch.equal(selector.used & oracle.used, genes.primary) and (selector.used | oracle.used).all()
    with pytest.raises(BadSpec, match=r"must know which genes harm.*--datasets synthetic"):
        AntiOracle(toy_view(genes))


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls", "setting", "bad"),
    [
        ("uncertainty", Uncertainty, "learning_rate", 0),
        ("maxl_weights", MaxlWeights, "inner_rate", "theirs"),
        ("auto_lambda", AutoLambda, "start", 3),
        ("auxilearn", AuxiLearn, "hidden", 0),
        ("auxilearn", AuxiLearn, "scaling", "none"),
        ("soft_topk", SoftTopk, "share", 1.5),
        ("soft_topk", SoftTopk, "learns", "t"),
        ("amal_spot", AmalSpot, "start", 2.5),
    ],
)
def test_settings_outside_their_range(name: str, cls: type[Selector], setting: str, bad: object) -> None:
    with pytest.raises(BadSpec, match=rf"{name}\.{setting} = "):
        resolve(name, tunables(cls), {setting: bad})


def test_no_learner_makes_a_dense_copy_of_the_expression() -> None:
    def expression() -> Tensor:
        raise AssertionError("asked for the expression")

    genes = toy_genes(PRIMARY, AUXILIARY)
    for cls in (Uncertainty, MaxlWeights, AutoLambda, AuxiLearn, SoftTopk, AmalSpot):
        view = TrainingView(genes, expression, torch.Generator(), position=torch.zeros(SPOTS, 2))
        assert cls(view).genes is genes
