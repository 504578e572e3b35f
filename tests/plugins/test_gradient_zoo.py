"""Each selector that looks at gradients against a slow, literal implementation of its source."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from agl_bench import SGD, Adam, GeneSplit, OneStep, Selector, Step, TrainingView
from agl_bench.maths.losses import LOSSES, pearson_loss
from agl_bench.testing import check_selector, toy_genes
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.blocks import BlockSelector
from agl_bench_plugins.selectors.forkmerge import Fork, ForkMerge
from agl_bench_plugins.selectors.gradient_cosine import GradientCosine
from agl_bench_plugins.selectors.gradnorm import GradNorm
from agl_bench_plugins.selectors.ol_aux import OlAux
from agl_bench_plugins.selectors.pcgrad import PcGrad
from agl_bench_plugins.selectors.slgrad import SlGrad

ALL: list[type[Selector]] = [GradientCosine, OlAux, SlGrad, GradNorm, PcGrad, ForkMerge]
ON_BLOCKS: list[type[BlockSelector]] = [GradNorm, PcGrad, ForkMerge]
VARIANTS: list[tuple[type[Selector], dict[str, Any]]] = [
    *((GradientCosine, {"weight": w}) for w in ("sign", "sign_late", "sign_all")),
    *((OlAux, {"measure": m, "horizon": 1}) for m in ("dot", "dot_late", "dot_all")),
    (OlAux, {"negative": "kept"}),
    (SlGrad, {"reach": "all", "fading": 0}),
    (PcGrad, {"variant": "primary", "blocks": 3}),
    (PcGrad, {"blocks": 256}),
    (GradNorm, {"blocks": 1, "alpha": 0}),
    (ForkMerge, {"branches": "blocks", "steps": 1, "reach": "all", "blocks": 32}),
]
PRIMARY, AUXILIARY, SPOTS, INPUTS, WIDTH = 4, 15, 9, 5, 3
DOUBLE = {"rtol": 1e-9, "atol": 1e-12}
Within = Literal["features", "late", "all"]


def view_of(genes: GeneSplit, seed: int = 0) -> TrainingView:
    expression = torch.zeros(3, len(genes.names), dtype=torch.float64)
    return TrainingView(genes, expression, torch.Generator().manual_seed(seed))


@pytest.fixture
def genes() -> GeneSplit:
    return toy_genes(PRIMARY, AUXILIARY)


class Toy(nn.Module):
    """Three layers of which the last is the head, and data for it."""

    def __init__(self, genes: int, seed: int = 0, loss: str = "pearson") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        sizes = ((6, INPUTS), (WIDTH, 6), (genes, WIDTH))
        self.early, self.late, self.head = (
            nn.Parameter(torch.randn(*size, generator=draw, dtype=torch.float64)) for size in sizes
        )
        self.spots = torch.randn(SPOTS, INPUTS, generator=draw, dtype=torch.float64)
        self.target = torch.rand(SPOTS, genes, generator=draw, dtype=torch.float64)
        self.loss = LOSSES[loss]

    def forward(self) -> tuple[Tensor, Step]:
        features = torch.tanh(torch.tanh(self.spots @ self.early.T) @ self.late.T)
        prediction = features @ self.head.T
        shared, late = (self.early, self.late), (self.late,)
        step = Step(features, prediction, self.target, torch.arange(SPOTS), 0, self.head, shared, late)
        return self.loss(prediction, self.target), step


def gradients_of(values: Tensor, step: Step, within: str = "features") -> Tensor:
    """The gradient of each value, (values, entries), by a backward pass for each."""
    at = {"features": (step.features,), "late": step.late, "all": step.shared}[within]
    rows = [torch.autograd.grad(value, at, retain_graph=True) for value in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def weights_of(selector: Selector, losses: Tensor, step: Step) -> Tensor:
    """Slopes relative to those of primary genes, (genes,)."""
    (slope,) = torch.autograd.grad(selector(losses, step), losses, retain_graph=True)
    return slope / slope[selector.genes.primary].mean()


def mean_of(losses: Tensor, weights: Tensor) -> Tensor:
    return (weights * losses).sum() / weights.sum()


# Every one of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "settings"), VARIANTS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_settings_keep_the_rules_of_the_door(cls: type[Selector], settings: dict[str, Any]) -> None:
    """At their defaults all that comes with agl-bench is checked elsewhere."""
    assert [v for v in check_selector(cls, settings) if v.problem] == []


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("auxiliary", [0, 1, 2, AUXILIARY])
@pytest.mark.parametrize("cls", ALL)
def test_few_and_constant_genes_leave_everything_finite(cls: type[Selector], auxiliary: int, loss: str) -> None:
    genes = toy_genes(PRIMARY, auxiliary)
    selector, toy = cls(view_of(genes)), Toy(PRIMARY + auxiliary, loss=loss)
    toy.target[:, int(genes.rank.argmax())] = 0.5  # the last auxiliary gene, or a primary one where there is none
    with torch.no_grad():
        toy.head[int((genes.rank == 0).int().argmax())] = 0
    for _ in range(7):
        losses, step = toy()
        selector.observe(losses, step)
        total = selector(losses, step)
    assert total.isfinite() and weights_of(selector, losses, step).isfinite().all()
    own = [p for p in selector.parameters() if p.requires_grad and selector.learns_from == "training"]
    assert all(g.isfinite().all() for g in (torch.autograd.grad(total, own) if own else []))


@pytest.mark.parametrize("cls", ALL)
def test_nothing_but_the_own_generator_is_drawn_from(cls: type[Selector], genes: GeneSplit) -> None:
    before, losses, step = torch.get_rng_state(), *Toy(PRIMARY + AUXILIARY)()
    first, second = (cls(view_of(genes, seed=3)) for _ in range(2))
    for selector in (first, second):
        selector.observe(losses, step)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(losses, step), second(losses, step))


@pytest.mark.parametrize("cls", ALL)
def test_what_is_observed_is_part_of_the_state(cls: type[Selector], genes: GeneSplit) -> None:
    """A selector that takes the state up goes on alike, and warm starts leave nothing behind."""
    steps = [Toy(PRIMARY + AUXILIARY, seed)() for seed in range(9)]
    one, other = cls(view_of(genes)), cls(view_of(genes))
    for losses, step in steps[:4]:
        one.observe(losses, step)
    other.load_state_dict(one.state_dict())
    other.generator.set_state(one.generator.get_state())
    for losses, step in steps[4:]:
        for selector in (one, other):
            selector.observe(losses, step)
        assert torch.equal(one(losses, step), other(losses, step))


@pytest.mark.parametrize("cls", ON_BLOCKS)
def test_block_methods_say_so(cls: type[BlockSelector]) -> None:
    assert "on gene blocks" in cls.reference and (cls.__doc__ or "").startswith("Gene blocks, not genes")


# Gradient cosine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_cosine_weighs_by_the_positive_cosine(genes: GeneSplit, seed: int, loss: str) -> None:
    losses, step = Toy(PRIMARY + AUXILIARY, seed, loss)()
    rows = gradients_of(losses, step)
    primary = gradients_of(losses[genes.primary].mean()[None], step)
    w = torch.where(genes.primary, 1, nn.functional.cosine_similarity(rows, primary).clamp(min=0))
    selector = GradientCosine(view_of(genes))
    torch.testing.assert_close(weights_of(selector, losses, step), w, **DOUBLE)
    torch.testing.assert_close(selector(losses, step), mean_of(losses, w), **DOUBLE)
    assert w[~genes.primary].unique().numel() > 3


@pytest.mark.parametrize(("weight", "within"), [("sign", "features"), ("sign_late", "late"), ("sign_all", "all")])
@pytest.mark.parametrize("seed", range(3))
def test_unweighted_gradient_cosine_takes_what_agrees(genes: GeneSplit, seed: int, weight: str, within: str) -> None:
    losses, step = Toy(PRIMARY + AUXILIARY, seed)()
    rows = gradients_of(losses, step, within)
    agrees = rows @ gradients_of(losses[genes.primary].mean()[None], step, within)[0] > 0
    selector = GradientCosine(view_of(genes), weight=weight)  # type: ignore[arg-type]
    torch.testing.assert_close(weights_of(selector, losses, step), (agrees | genes.primary).double(), **DOUBLE)
    assert selector.needs_second_order == (within != "features")


@pytest.mark.parametrize("weight", ["cosine", "sign", "sign_late", "sign_all"])
def test_a_gene_against_all_primary_ones_has_no_weight(weight: Any) -> None:
    """All auxiliary genes want the opposite of the only primary gene, with the same row of the head."""
    genes = toy_genes(1, 3)
    toy = Toy(4)
    with torch.no_grad():
        toy.head.copy_(toy.head[:1].expand(4, -1))
        toy.target.copy_(torch.where(genes.primary, toy.target[:, :1], -toy.target[:, :1]))
    losses, step = toy()
    selector = GradientCosine(view_of(genes), weight=weight)
    assert torch.equal(weights_of(selector, losses, step), genes.primary.double())


# OL-AUX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["rest", "kept"])
@pytest.mark.parametrize(
    ("measure", "within"), [("cosine", "features"), ("dot", "features"), ("dot_late", "late"), ("dot_all", "all")]
)
@pytest.mark.parametrize("horizon", [1, 3])
def test_ol_aux_is_the_running_sum_of_its_source(
    genes: GeneSplit, horizon: int, measure: Any, within: str, negative: Any
) -> None:
    beta = 5.0
    selector = OlAux(view_of(genes), horizon=horizon, beta=beta, measure=measure, negative=negative)
    # As the code of ForkMerge has it: add up, and from time to time move the weights, before they are used.
    weights, pending = torch.ones(PRIMARY + AUXILIARY, dtype=torch.float64), 0.0
    for count in range(8):
        losses, step = Toy(PRIMARY + AUXILIARY, count)()
        rows = gradients_of(losses, step, within)
        primary = rows[genes.primary].mean(0)
        agreement = rows @ primary
        if measure == "cosine":
            agreement = agreement / rows.norm(dim=1) / primary.norm()
        pending = pending + beta * agreement
        if (count + 1) % horizon == 0:
            weights, pending = weights + pending, 0.0
        selector.observe(losses, step)
        w = torch.where(genes.primary, 1, weights)
        w = w if negative == "kept" else w.clamp(min=0)
        torch.testing.assert_close(selector(losses, step), (w * losses).sum() / w.abs().sum(), **DOUBLE)
        torch.testing.assert_close(weights_of(selector, losses, step), w, **DOUBLE)
    if measure == "cosine":
        assert (weights[~genes.primary] < 0).any() and (weights[~genes.primary] > 1).any()


def test_a_gene_of_ol_aux_that_rests_comes_back_when_it_has_earned_it(genes: GeneSplit) -> None:
    """The sum runs on below zero, as in the source; a sum that was cut off at zero would be back at once."""
    selector, (losses, step) = OlAux(view_of(genes), horizon=1), Toy(PRIMARY + AUXILIARY)()
    selector.weights.fill_(-1.0)
    selector.observe(losses, step)
    assert torch.equal(weights_of(selector, losses, step), genes.primary.double())
    assert (selector.weights != -1).all()


# SLGrad --------------------------------------------------------------------------------------------------------------


def slgrad_after_one_look_ahead(genes: GeneSplit, fading: float, seed: int = 1) -> tuple[SlGrad, Tensor, Tensor]:
    """A selector that has learnt once; the alignments, gene by gene; and the weights before."""
    rate = 0.1
    selector = SlGrad(view_of(genes), inner_rate=rate, fading=fading)
    assert selector.hypergradient == OneStep(rate, "late")
    with torch.no_grad():
        selector.weights.copy_(torch.rand(len(selector.weights), generator=torch.Generator().manual_seed(5)))
        selector.weights[genes.primary] = 1
    before = selector.weights.detach().clone()
    inner, outer = Toy(PRIMARY + AUXILIARY, seed), Toy(PRIMARY + AUXILIARY, seed + 100)
    theta = {n: p.detach() for n, p in inner.named_parameters()}
    _, found = selector.hypergradient(
        lambda at, phi, _: functional_call(selector, dict(phi), functional_call(inner, dict(at), ())),
        lambda at: functional_call(outer, dict(at), ())[0][genes.primary].mean(),
        theta,
        {"weights": selector.weights},
        rate=1.0,
    )
    with torch.no_grad():
        selector.learn(found, torch.optim.SGD(selector.parameters(), lr=1e9))

    losses, _ = inner()
    at = list(inner.parameters())
    rows = [torch.autograd.grad(loss, at, retain_graph=True) for loss in losses]
    moved = torch.autograd.grad(mean_of(losses, before), at)
    ahead = {n: p - rate * g for (n, p), g in zip(theta.items(), moved, strict=True)}
    ahead = {n: p.requires_grad_() for n, p in ahead.items()}
    pull = torch.autograd.grad(functional_call(outer, ahead, ())[0][genes.primary].mean(), list(ahead.values()))
    aligned = torch.stack([torch.stack([(g * v).sum() for g, v in zip(r, pull, strict=True)]).sum() for r in rows])
    return selector, aligned, before


@pytest.mark.parametrize("seed", range(4))
def test_slgrad_is_the_formula_of_its_source(genes: GeneSplit, seed: int) -> None:
    """max(0, a_j) / Σ max(0, a_i), in units of the mean of the primary genes, or of all genes if that is more."""
    selector, aligned, _ = slgrad_after_one_look_ahead(genes, 0, seed)
    formula = aligned.clamp(min=0) / aligned.clamp(min=0).sum()
    auxiliary = ~genes.primary
    ratio = formula[auxiliary] / max(formula[genes.primary].mean(), formula.mean())
    torch.testing.assert_close(selector.weights.detach()[auxiliary], ratio, **DOUBLE)
    assert (ratio == 0).any() and (ratio > 0).any()
    losses, step = Toy(PRIMARY + AUXILIARY, 3)()
    torch.testing.assert_close(selector(losses, step), mean_of(losses, selector.weights), **DOUBLE)


def test_slgrad_fades_into_a_running_mean(genes: GeneSplit) -> None:
    sharp = slgrad_after_one_look_ahead(genes, fading=0)[0].weights
    selector, _, before = slgrad_after_one_look_ahead(genes, fading=0.75)
    torch.testing.assert_close(selector.weights, 0.75 * before + 0.25 * sharp, **DOUBLE)
    assert (selector.weights[genes.primary] == 1).all()


def test_slgrad_where_nothing_or_no_primary_gene_agrees(genes: GeneSplit) -> None:
    selector = SlGrad(view_of(genes), fading=0)
    optimizer = torch.optim.SGD(selector.parameters(), lr=1.0)
    with torch.no_grad():
        selector.learn({"weights": torch.ones_like(selector.weights)}, optimizer)
        assert torch.equal(selector.weights, genes.primary.double())
        against = torch.where(genes.primary, 1.0, -2.0).double()  # a positive gradient is a negative alignment
        selector.learn({"weights": against}, optimizer)
    # Then the mean over all genes, 2 · auxiliary / all, is the unit.
    expected = torch.full_like(selector.weights, (PRIMARY + AUXILIARY) / AUXILIARY)
    torch.testing.assert_close(selector.weights.detach(), torch.where(genes.primary, 1, expected), **DOUBLE)


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4, 7, AUXILIARY, AUXILIARY + 1, 256])
@pytest.mark.parametrize("auxiliary", [0, 1, AUXILIARY])
def test_blocks_are_equal_consecutive_pieces_of_the_ranking(auxiliary: int, blocks: int) -> None:
    genes = toy_genes(PRIMARY, auxiliary)
    selector = BlockSelector(view_of(genes), blocks)
    pieces = torch.arange(auxiliary).tensor_split(min(blocks, auxiliary)) if auxiliary else ()
    sizes = sorted(len(piece) for piece in pieces)
    assert not sizes or sizes[-1] - sizes[0] <= 1
    by_rank = selector.task[genes.rank.argsort()][PRIMARY:]
    assert (selector.task[genes.primary] == 0).all()
    assert torch.equal(by_rank.sort().values, by_rank)
    counts = by_rank.bincount(minlength=1)[1:].tolist()
    assert sorted(counts) == sizes and len(selector.members) == 1 + len(sizes)
    losses = torch.rand(len(genes.names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [losses[selector.task == t].sum() for t in range(1 + len(sizes))]
    torch.testing.assert_close(selector.sums(losses), torch.stack(expected), **DOUBLE)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("blocks", [1, 4, 256])
def test_gradients_of_blocks_are_those_of_a_backward_pass_for_each(genes: GeneSplit, blocks: int, loss: str) -> None:
    selector, (losses, step) = BlockSelector(view_of(genes), blocks), Toy(PRIMARY + AUXILIARY, loss=loss)()
    torch.testing.assert_close(
        selector.gradients(losses, step), gradients_of(selector.sums(losses), step), rtol=1e-9, atol=1e-12
    )


# GradNorm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_is_the_loss_of_its_source(genes: GeneSplit, alpha: float) -> None:
    tasks = 5
    selector = GradNorm(view_of(genes), blocks=tasks - 1, alpha=alpha)
    assert selector.learns_from == "training"
    with torch.no_grad():
        selector.logits.copy_(torch.randn(tasks, generator=torch.Generator().manual_seed(1)))
    first_losses, first_step = Toy(PRIMARY + AUXILIARY, 0)()
    selector.observe(first_losses, first_step)
    losses, step = Toy(PRIMARY + AUXILIARY, 1)()
    selector.observe(losses, step)  # the first one stays

    logits = selector.logits.detach().clone().requires_grad_()
    w = tasks * torch.softmax(logits, 0)
    blocks = selector.sums(losses)
    norms = torch.stack(
        [
            torch.autograd.grad(w[i] * blocks[i], step.features, create_graph=True, retain_graph=True)[0].norm()
            for i in range(tasks)
        ]
    )
    progress = (blocks / selector.sums(first_losses)).detach()
    target = (norms.mean() * (progress / progress.mean()) ** alpha).detach()
    expected = (norms - target).abs().sum()
    torch.testing.assert_close(selector.imbalance(losses, step), expected, **DOUBLE)
    total = selector(losses, step)
    found = torch.autograd.grad(total, selector.logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits, retain_graph=True)[0], **DOUBLE)
    # The model sees the weighted losses alone.
    per_gene = w.detach()[selector.task]
    torch.testing.assert_close(total, mean_of(losses, per_gene), **DOUBLE)
    at_head = torch.autograd.grad(total, step.head, retain_graph=True)[0]
    torch.testing.assert_close(at_head, torch.autograd.grad(mean_of(losses, per_gene), step.head)[0], **DOUBLE)


def test_gradnorm_evens_out_the_sizes_of_gradients(genes: GeneSplit) -> None:
    """With α = 0 all tasks come to gradients of one size, whatever they begin with."""
    selector, (losses, step) = GradNorm(view_of(genes), blocks=3, alpha=0), Toy(PRIMARY + AUXILIARY)()
    optimizer = torch.optim.Adam(selector.parameters())

    def sizes() -> Tensor:
        w = len(selector.logits) * torch.softmax(selector.logits.detach(), 0)
        return w * selector.gradients(losses, step).norm(dim=1)

    spread = sizes().std() / sizes().mean()
    for rate in (0.05, 0.005):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(300):
            selector.logits.grad = torch.autograd.grad(selector(losses, step), selector.logits, retain_graph=True)[0]
            optimizer.step()
    assert spread > 0.2 and sizes().std() / sizes().mean() < 0.05


# PCGrad --------------------------------------------------------------------------------------------------------------


def pcgrad_as_published(grads: Tensor, orders: list[list[int]]) -> Tensor:
    """Algorithm 1 of Yu et al., on the gradients themselves."""
    projected = grads.clone()
    for i in range(len(grads)):
        for j in orders[i]:
            if j == i:
                continue
            product = torch.dot(projected[i], grads[j])
            if product < 0:
                projected[i] -= product / grads[j].norm() ** 2 * grads[j]
    return projected.sum(0)


@pytest.mark.parametrize("blocks", [1, 4, 9, 256])
@pytest.mark.parametrize("seed", range(3))
def test_pcgrad_is_the_loop_of_its_source(genes: GeneSplit, seed: int, blocks: int) -> None:
    selector = PcGrad(view_of(genes, seed), blocks=blocks)
    losses, step = Toy(PRIMARY + AUXILIARY, seed)()
    selector.observe(losses, step)
    orders = selector.order.tolist()
    grads = gradients_of(selector.sums(losses), step)
    expected = pcgrad_as_published(grads, orders)
    assert blocks == 1 or not torch.allclose(expected, grads.sum(0))
    c = selector.coefficients(grads @ grads.T)
    torch.testing.assert_close(c @ grads, expected, **DOUBLE)
    assert (c >= 1).all()
    (found,) = torch.autograd.grad(selector(losses, step), step.features)
    torch.testing.assert_close(found.flatten() * c[selector.task].sum(), expected, **DOUBLE)


@pytest.mark.parametrize("seed", range(3))
def test_primary_pcgrad_projects_off_the_primary_genes_alone(genes: GeneSplit, seed: int) -> None:
    selector = PcGrad(view_of(genes), blocks=6, variant="primary")
    losses, step = Toy(PRIMARY + AUXILIARY, seed)()
    grads = gradients_of(selector.sums(losses), step)
    projected = grads.clone()
    for i in range(1, len(grads)):
        product = torch.dot(grads[i], grads[0])
        if product < 0:
            projected[i] -= product / grads[0].norm() ** 2 * grads[0]
    before = selector.order.clone()
    selector.observe(losses, step)
    assert torch.equal(selector.order, before)
    w = weights_of(selector, losses, step)
    (found,) = torch.autograd.grad(selector(losses, step), step.features)
    length = selector.coefficients(grads @ grads.T)[selector.task].sum()
    torch.testing.assert_close(found.flatten() * length, projected.sum(0), **DOUBLE)
    assert (w[~genes.primary] <= 1).all()


@pytest.mark.parametrize("variant", ["full", "primary"])
def test_pcgrad_without_conflict_is_agl(genes: GeneSplit, variant: Any) -> None:
    """All genes want the same."""
    toy = Toy(PRIMARY + AUXILIARY)
    with torch.no_grad():
        toy.head.copy_(toy.head[:1].expand_as(toy.head))
        toy.target.copy_(toy.target[:, :1].expand_as(toy.target))
    losses, step = toy()
    selector = PcGrad(view_of(genes), variant=variant)
    selector.observe(losses, step)
    torch.testing.assert_close(selector(losses, step), Agl(view_of(genes))(losses, step), **DOUBLE)
    assert torch.equal(weights_of(selector, losses, step), torch.ones_like(losses))


@pytest.mark.parametrize("variant", ["full", "primary"])
def test_pcgrad_of_opposite_and_of_no_gradients(variant: Any) -> None:
    """Of two opposite gradients nothing is left; a task without one disturbs nobody."""
    selector = PcGrad(view_of(toy_genes(PRIMARY, 2)), blocks=2, variant=variant)
    grads = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    c = selector.coefficients(grads @ grads.T)
    assert torch.equal(c, torch.tensor([4.0, 4 / 3 if variant == "full" else 1.0, 1.0], dtype=torch.float64))
    assert (c @ grads).abs().max() < 1e-15 if variant == "full" else torch.equal(c @ grads, grads[0])
    assert torch.equal(selector.coefficients(torch.zeros(3, 3).double()), torch.ones(3).double())


def test_pcgrad_meets_the_others_in_every_order_equally_often() -> None:
    genes = toy_genes(PRIMARY, 2)
    selector, (losses, step) = PcGrad(view_of(genes)), Toy(PRIMARY + 2)()
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(600):
        selector.observe(losses, step)
        for row in selector.order.tolist():
            assert sorted(row) == [0, 1, 2]
            seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert len(seen) == 6 and min(seen.values()) > 230 and max(seen.values()) < 370  # 300 each, sd 16


# ForkMerge -----------------------------------------------------------------------------------------------------------


def merged(thetas: dict[int, dict[str, Tensor]], shares: Mapping[int, float]) -> dict[str, Tensor]:
    total = sum(shares.values())
    return {n: sum(shares[b] / total * thetas[b][n] for b in thetas) for n in thetas[0]}  # type: ignore[misc]


def greedy_as_published(thetas: dict[int, dict[str, Tensor]], error: Callable[[Mapping[str, Tensor]], float]) -> list:
    """The search of ForkMerge's code, with an error for a score."""
    ranked = sorted(thetas, key=lambda b: error(thetas[b]))
    shares = dict.fromkeys(thetas, 0.0)
    shares[ranked[0]] = 1.0
    least = float("inf")
    for i, branch in enumerate(ranked[1:]):
        best, bound = 0.0, sum(shares.values()) / (i + 1)
        for a in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
            shares[branch] = a * bound
            found = error(merged(thetas, shares))
            if found < least:
                least, best = found, a * bound
        shares[branch] = best
    return [shares[b] for b in thetas]


@pytest.mark.parametrize("branches", ["prefixes", "blocks"])
@pytest.mark.parametrize("rule", [SGD(0.5), SGD(20.0), Adam(0.1)], ids=["slow", "fast", "adam"])
@pytest.mark.parametrize("seed", range(4))
def test_forkmerge_is_the_search_of_its_source(genes: GeneSplit, seed: int, rule: Any, branches: Any) -> None:
    """Branches trained one by one with torch's own optimiser, and merged as the source merges them."""
    steps, blocks = 4, 3
    selector = ForkMerge(view_of(genes), blocks=blocks, branches=branches, steps=steps, fading=0.25)
    assert selector.hypergradient == Fork(Adam(carried=True), steps)
    start, outer = Toy(PRIMARY + AUXILIARY, seed), Toy(PRIMARY + AUXILIARY, seed + 100)
    batches = [Toy(PRIMARY + AUXILIARY, seed + 10 + h) for h in range(steps)]

    def error(at: Mapping[str, Tensor]) -> Tensor:
        return functional_call(outer, dict(at), ())[0][genes.primary].mean()

    thetas = {}
    for b in range(blocks + 1):
        kept = genes.primary.clone()
        for block in range(1, blocks + 1):
            if block <= b if branches == "prefixes" else block == b:
                kept |= selector.task == block
        own = {n: p.detach().clone().requires_grad_() for n, p in start.named_parameters()}
        torch_rule = torch.optim.Adam if isinstance(rule, Adam) else torch.optim.SGD
        optimizer = torch_rule(own.values(), lr=rule.learning_rate)
        for batch in batches:
            optimizer.zero_grad()
            functional_call(batch, own, ())[0][kept].mean().backward()
            optimizer.step()
        thetas[b] = {n: p.detach() for n, p in own.items()}
    expected = greedy_as_published(thetas, lambda at: float(error(at)))

    # In parts, as of several batches.
    def inner(at: Mapping[str, Tensor], phi: Mapping[str, Tensor], number: int) -> Any:
        for share in (0.25, 0.75):
            yield share * functional_call(selector, dict(phi), functional_call(batches[number], dict(at), ()))

    theta = {n: p.detach() for n, p in start.named_parameters()}
    least, found = Fork(rule, steps)(inner, error, theta, {"mixing": selector.mixing}, rate=1.0)
    torch.testing.assert_close(found["mixing"], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(least, error(merged(thetas, dict(enumerate(expected)))), rtol=1e-6, atol=1e-9)
    before = [float(error(theta)) for theta in thetas.values()]
    assert float(least) <= min(before) + 1e-12
    with torch.no_grad():
        selector.learn(found, torch.optim.SGD(selector.parameters(), lr=1e9))
    mean = 0.25 / (blocks + 1) + 0.75 * found["mixing"] / found["mixing"].sum()
    torch.testing.assert_close(selector.mixing.detach(), mean, **DOUBLE)
    if rule == SGD(20.0) and branches == "prefixes" and seed in (1, 2, 3):
        assert int((found["mixing"] > 0).sum()) > 1  # there is something to compare


@pytest.mark.parametrize("branches", ["prefixes", "blocks"])
def test_training_on_the_mixture_is_merged_training_to_first_order(genes: GeneSplit, branches: Any) -> None:
    """Exactly so for one SGD step."""
    selector, toy, rate = ForkMerge(view_of(genes), blocks=3, branches=branches), Toy(PRIMARY + AUXILIARY), 0.4
    shares = torch.tensor([1.0, 0.0, 0.6, 0.32], dtype=torch.float64)
    theta = {n: p.detach() for n, p in toy.named_parameters()}

    def after(mixing: Tensor) -> dict[str, Tensor]:
        at = {n: p.clone().requires_grad_() for n, p in theta.items()}
        total = functional_call(selector, {"mixing": mixing}, functional_call(toy, at, ()))
        slopes = torch.autograd.grad(total, list(at.values()))
        return {n: p.detach() - rate * g for (n, p), g in zip(at.items(), slopes, strict=True)}

    alone = {b: after(row) for b, row in enumerate(torch.eye(4, dtype=torch.float64))}
    mixed, expected = after(shares), merged(alone, dict(enumerate(shares.tolist())))
    for name, value in mixed.items():
        torch.testing.assert_close(value, expected[name], **DOUBLE)
    with torch.no_grad():
        selector.mixing.copy_(torch.tensor([0.0, 0, 0, 1]))
    losses, step = toy()
    whole = losses.mean() if branches == "prefixes" else losses[genes.primary | (selector.task == 3)].mean()
    torch.testing.assert_close(selector(losses, step), whole, **DOUBLE)


# Accuracy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_cosines_of_many_genes_are_those_of_a_backward_pass_for_each(dtype: torch.dtype, close: float) -> None:
    """At the accuracy that is promised, for a few of 2,000 genes of all sizes."""
    genes = toy_genes(50, 2000)
    view = TrainingView(genes, torch.zeros(1, 2050, dtype=dtype), torch.Generator())
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(64, 32, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    scale = torch.logspace(-3, 3, 2050, dtype=torch.float64)[:, None]
    head = (scale * torch.randn(2050, 32, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randn(64, 2050, generator=draw, dtype=torch.float64).to(dtype)
    prediction = features @ head.T
    losses = pearson_loss(prediction, target)
    step = Step(features, prediction, target, torch.arange(64), 0, head)
    selector = OlAux(view, horizon=1, beta=1.0)
    selector.observe(losses, step)
    few = random.Random(0).sample(range(2050), 40)
    rows = gradients_of(losses[few], step)
    primary = gradients_of(losses[genes.primary].mean()[None], step)
    expected = nn.functional.cosine_similarity(rows, primary)
    assert float((selector.weights[few] - 1 - expected).abs().max()) < close
    assert float(expected.abs().max()) > 0.03
