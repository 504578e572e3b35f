"""The formula of each selector. The rules of the door are checked by the contract kit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agl_bench import SGD, Adam, BadSpec, GeneSplit, OneStep, Selector, TrainingView, Unrolled
from agl_bench.interfaces.tunable import resolve, tunables
from agl_bench.testing import toy_genes, toy_step
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.hvg_k import HvgK
from agl_bench_plugins.selectors.pgl import Pgl
from agl_bench_plugins.selectors.random_k import RandomK

ALL = {"pgl": Pgl, "agl": Agl, "random_k": RandomK, "hvg_k": HvgK, "dkgsb": Dkgsb, "amal": Amal}
PRIMARY, AUXILIARY = 4, 20


def view_of(genes: GeneSplit, seed: int = 0, *, detach: bool = False, noise: float = 0) -> TrainingView:
    expression = torch.full((3, len(genes.names)), float(noise), dtype=torch.float64)
    return TrainingView(genes, expression, torch.Generator().manual_seed(seed), detach)


@pytest.fixture
def genes() -> GeneSplit:
    return toy_genes(PRIMARY, AUXILIARY)


def draw(genes: GeneSplit, seed: int = 0) -> Tensor:
    count = len(genes.names)
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def value(selector: Selector, losses: Tensor) -> Tensor:
    _, step = toy_step(selector.genes)
    result: Tensor = selector(losses, step)
    return result


def weights(selector: Selector) -> Tensor:
    """Slopes relative to those of primary genes, (genes,)."""
    (slope,) = torch.autograd.grad(value(selector, losses := draw(selector.genes)), losses)
    return slope / slope[selector.genes.primary].mean()


def weighted(losses: Tensor, w: Tensor) -> Tensor:
    return (w * losses).sum() / w.sum()


def test_pgl_is_the_mean_of_the_primary_losses(genes: GeneSplit) -> None:
    losses = draw(genes)
    torch.testing.assert_close(value(Pgl(view_of(genes)), losses), losses[genes.primary].sum() / PRIMARY)
    assert (weights(Pgl(view_of(genes)))[~genes.primary] == 0).all()


def test_agl_is_the_mean_of_all_losses(genes: GeneSplit) -> None:
    losses = draw(genes)
    torch.testing.assert_close(value(Agl(view_of(genes)), losses), losses.sum() / (PRIMARY + AUXILIARY))


@pytest.mark.parametrize("k", [1, 7, AUXILIARY, AUXILIARY + 1, 50_000])
def test_hvg_k_is_a_prefix_of_the_ranking(genes: GeneSplit, k: int) -> None:
    selector, losses = HvgK(view_of(genes), k=k), draw(genes)
    kept = genes.primary | (genes.rank < k)
    assert int(kept.sum()) == PRIMARY + min(k, AUXILIARY)
    torch.testing.assert_close(value(selector, losses), losses[kept].mean())


@pytest.mark.parametrize("k", [1, 7, AUXILIARY, AUXILIARY + 1, 50_000])
def test_random_k_draws_k_auxiliary_genes(genes: GeneSplit, k: int) -> None:
    selector, losses = RandomK(view_of(genes), k=k), draw(genes)
    drawn = weights(selector)[~genes.primary]
    assert set(drawn.round(decimals=12).tolist()) <= {0.0, 1.0} and int(drawn.round().sum()) == min(k, AUXILIARY)
    torch.testing.assert_close(value(selector, losses), losses[genes.primary | selector.mask.bool()].mean())


def test_random_k_depends_on_the_generator_alone(genes: GeneSplit) -> None:
    masks = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        masks.append(RandomK(view_of(genes, seed, noise=noise), k=7).mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_random_k_draws_every_gene_equally_often() -> None:
    genes, generator = toy_genes(2, 6), torch.Generator().manual_seed(0)
    expression = torch.zeros(3, len(genes.names), dtype=torch.float64)
    counts = sum(RandomK(TrainingView(genes, expression, generator), k=2).mask for _ in range(600))
    assert isinstance(counts, Tensor) and (counts[genes.primary] == 0).all()
    assert counts[~genes.primary].min() > 150 and counts[~genes.primary].max() < 250  # 200 each, sd 12


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(("start", "tau"), [(0.5, 0.01), (0.3, 0.1), (0.99, 0.001)])
def test_dkgsb_is_a_soft_step_at_its_cutoff(genes: GeneSplit, start: float, tau: float, bounded: bool) -> None:
    """σ((t − ρ)/τ) = softmax([t, ρ]/τ)₀, ρ = rank / (auxiliary − 1)."""
    selector, losses = Dkgsb(view_of(genes), start=start, temperature=tau, bounded=bounded), draw(genes)
    rho = genes.rank.double() / (AUXILIARY - 1)
    softmax = torch.softmax(torch.stack([torch.full_like(rho, start), rho]) / tau, 0)[0]
    w = torch.where(genes.primary, 1.0, softmax)
    torch.testing.assert_close(value(selector, losses), weighted(losses, w), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(selector), w, rtol=1e-5, atol=1e-9)
    k = int((weights(selector)[~genes.primary] > 0.5).sum())
    assert k == int((rho[~genes.primary] < start).sum())  # the read-out: genes before the cut-off
    nearest = int(genes.rank[~genes.primary][(rho[~genes.primary] - start).abs().argmin()])
    assert k in (nearest, nearest + 1)  # as coded by the authors, who count from 0


def test_the_slope_of_a_bounded_cutoff_is_one_at_the_start(genes: GeneSplit) -> None:
    found = []
    for bounded in (True, False):
        selector = Dkgsb(view_of(genes), temperature=0.1, bounded=bounded)
        found.append(torch.autograd.grad(value(selector, draw(genes)), selector.cutoff)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert found[0] != 0


def test_a_bounded_cutoff_cannot_leave_the_ranking(genes: GeneSplit) -> None:
    selector = Dkgsb(view_of(genes), temperature=0.01)
    for far, kept in ((-9.0, PRIMARY), (10.0, PRIMARY + AUXILIARY)):
        with torch.no_grad():
            selector.cutoff.fill_(far)
        assert weights(selector).sum() == pytest.approx(kept, abs=0.51)  # the gene at the end has weight ½


def test_amal_has_a_weight_for_each_gene(genes: GeneSplit) -> None:
    selector, losses = Amal(view_of(genes), temperature=0.2), draw(genes)
    torch.testing.assert_close(weights(selector)[~genes.primary], torch.full((AUXILIARY,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        selector.logits.copy_(draw(genes, 1) - 0.5)
    w = torch.where(genes.primary, 1.0, 1 / (1 + (-selector.logits.detach() / 0.2).exp()))
    torch.testing.assert_close(value(selector, losses), weighted(losses, w))
    (slope,) = torch.autograd.grad(value(selector, losses), selector.logits)
    assert (slope[genes.primary] == 0).all() and (slope[~genes.primary] != 0).all()


def test_amal_may_divide_by_the_number_of_genes(genes: GeneSplit) -> None:
    """As the authors of AGL code it; the weights relative to each other are the same."""
    selector, losses = Amal(view_of(genes), temperature=0.2, divisor="genes"), draw(genes)
    with torch.no_grad():
        selector.logits.copy_(draw(genes, 1) - 0.5)
    w = torch.where(genes.primary, 1.0, torch.sigmoid(selector.logits.detach() / 0.2))
    torch.testing.assert_close(value(selector, losses), (w * losses).sum() / (PRIMARY + AUXILIARY))
    torch.testing.assert_close(weights(selector), w)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("cls", [Dkgsb, Amal])
def test_the_protocol_decides_whether_the_weight_sum_is_differentiated(
    genes: GeneSplit, cls: type[Selector], detach: bool
) -> None:
    selector, losses = cls(view_of(genes, detach=detach), temperature=0.1), draw(genes).detach()
    (own,) = selector.parameters()
    (slope,) = torch.autograd.grad(value(selector, losses), own)
    own_copy = own.detach().clone().requires_grad_()
    t = torch.sigmoid(4 * (own_copy - 0.5))
    w = torch.sigmoid(own_copy / 0.1) if cls is Amal else torch.sigmoid((t - genes.relative_rank(torch.float64)) / 0.1)
    w = torch.where(genes.primary, 1.0, w)
    total = (w * losses).sum() / (w.sum().detach() if detach else w.sum())
    torch.testing.assert_close(slope, torch.autograd.grad(total, own_copy)[0])


def test_look_aheads_are_as_documented(genes: GeneSplit) -> None:
    view = view_of(genes)
    assert Dkgsb(view).hypergradient == Unrolled(3, Adam(carried=True), reach="late", batches="new")
    assert Dkgsb(view, inner="sgd", steps=2).hypergradient == Unrolled(2, SGD(0.5), reach="late", batches="new")
    theirs = Dkgsb(view, inner="adam_higher", carried=False, steps=2, reach="all", batches="same")
    assert theirs.hypergradient == Unrolled(2, Adam(corrected=False))
    assert Amal(view, inner_rate=0.1).hypergradient == OneStep(0.1, "late")
    assert Amal(view, reach="all").hypergradient == OneStep(0.5, "all")
    assert Dkgsb(view, learning_rate=0.02).learning_rate == Amal(view, learning_rate=0.02).learning_rate == 0.02


@pytest.mark.parametrize("auxiliary", [0, 1, AUXILIARY])
@pytest.mark.parametrize("name", ALL)
def test_genes_that_are_not_used_have_no_weight(name: str, auxiliary: int) -> None:
    """And whatever their losses are, the result is the same."""
    genes = toy_genes(PRIMARY, auxiliary)
    selector = ALL[name](view_of(genes), **({"k": 7} if name.endswith("_k") else {}))
    if selector.used is None:
        assert name in ("agl", "dkgsb", "amal")
        return
    losses = draw(genes)
    assert torch.equal(selector.used, (weights(selector) != 0))
    assert torch.equal(value(selector, losses), value(selector, torch.where(selector.used, losses, 0)))


def test_no_selector_makes_a_dense_copy_of_the_expression(genes: GeneSplit) -> None:
    def expression() -> Tensor:
        raise AssertionError("asked for the expression")

    for cls in ALL.values():
        assert cls(TrainingView(genes, expression, torch.Generator())).genes is genes


def test_a_view_makes_its_expression_once_and_when_it_is_asked(genes: GeneSplit) -> None:
    made: list[Tensor] = []

    def expression() -> Tensor:
        made.append(torch.rand(3, len(genes.names)))
        return made[-1]

    view = TrainingView(genes, expression, torch.Generator())
    assert view.dtype == torch.float32 and not made
    assert view.expression is view.expression is made[0] and len(made) == 1
    assert view_of(genes).dtype == torch.float64 and not view_of(genes).expression.any()


@pytest.mark.parametrize("auxiliary", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_without_auxiliary_genes_all_are_pgl(name: str, auxiliary: int) -> None:
    genes = toy_genes(PRIMARY, auxiliary)
    selector, losses = ALL[name](view_of(genes)), draw(genes)
    if auxiliary == 0:
        torch.testing.assert_close(value(selector, losses), losses.mean())
    expected = {"pgl": 0.0, "amal": 0.5}.get(name, 1.0)
    assert (weights(selector)[~genes.primary] - expected).abs().sum() < 1e-9
    own = list(selector.parameters())
    gradients = torch.autograd.grad(value(selector, losses), own) if own else []
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ALL)
def test_gene_order_does_not_matter(name: str, genes: GeneSplit) -> None:
    order = torch.randperm(len(genes.names), generator=torch.Generator().manual_seed(3))
    names = tuple(genes.names[i] for i in order)
    moved = GeneSplit(names, genes.primary[order], genes.rank[order], genes.score[order])
    settings = {"k": 7} if name.endswith("_k") else {}
    one, two = (ALL[name](view_of(g), **settings) for g in (genes, moved))
    torch.testing.assert_close(weights(one)[order], weights(two), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "setting", "bad"),
    [
        ("hvg_k", "k", 0),
        ("random_k", "k", 2.5),
        ("dkgsb", "start", 1.0),
        ("dkgsb", "inner", "lbfgs"),
        ("amal", "reach", "early"),
        ("dkgsb", "steps", 0),
        ("dkgsb", "batches", "old"),
    ],
)
def test_settings_outside_their_range(name: str, setting: str, bad: object) -> None:
    with pytest.raises(BadSpec, match=rf"{name}\.{setting} = "):
        resolve(name, tunables(ALL[name]), {setting: bad})
