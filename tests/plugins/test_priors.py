"""Rankings that selectors share, and the selectors made of correlation and of patterns on the tissue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData
from scipy import sparse, stats
from torch import Tensor

from agl_bench import BadSpec, GeneSplit, Selector, TrainingView
from agl_bench.bench.spec import one_part
from agl_bench.data.gene_split import score_genes, split_genes
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import toy_step
from agl_bench_plugins.selectors import priors, spatial
from agl_bench_plugins.selectors.coexpression import Coexpression
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.hvg_k import HvgK
from agl_bench_plugins.selectors.priors import Prior, correlation, ranked
from agl_bench_plugins.selectors.spatial import Spatial, spatial_z

GENES, PRIMARY, CONSTANT = 90, 6, 3
LOOSE = Protocol(primary_genes=PRIMARY, primary_detection=0.0, min_spots_per_gene=0, min_genes_per_spot=1)
PRIORS = get_args(Prior)
NAMED = PRIORS[1:7]


class Tissue:
    """Two sections of spots on grids; gene 0 to 19 follow the place, the last `CONSTANT` ones are found nowhere.

    The sections differ in depth, and the training spots are three of four.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        sections = []
        names = [f"GENE{i:03d}" for i in rng.permutation(GENES)]  # names do not follow the columns
        for index, (name, rows) in enumerate((("A", 12), ("B", 9))):
            place = np.stack(np.meshgrid(np.arange(13.0), np.arange(rows)), -1).reshape(-1, 2)
            mean = np.exp(rng.uniform(-1.5, 2.5, GENES)) * rng.gamma(2, 0.5, (len(place), GENES)) * (1 + 2 * index)
            mean[:, :20] *= np.exp(2 * np.sin(place[:, :1] / 4 + np.arange(20)))
            mean[:, -CONSTANT:] = 0
            counts = AnnData(sparse.csr_matrix(rng.poisson(mean).astype(np.float32)))
            counts.var_names = names
            counts.obsm["spatial"] = place * 200
            sections.append(Section(name, counts, 1.0))
        self.table: SpotTable = tabulate(sections, LOOSE)
        self.rows = np.flatnonzero(rng.random(len(self.table)) < 0.75)
        self.genes, columns = split_genes(self.table, self.rows, LOOSE)
        assert (columns == np.arange(GENES)).all()
        self.expression = self.table.rows(self.rows).toarray().astype(np.float64)
        self.section, self.position = self.table.section[self.rows], self.table.position[self.rows]

    def view(self, seed: int = 0, *, order: np.ndarray | None = None, genes: GeneSplit | None = None) -> TrainingView:
        """As in a run, in another order of the genes if one is given."""
        order = np.arange(GENES) if order is None else order
        at, genes = torch.from_numpy(order), genes or self.genes
        return TrainingView(
            GeneSplit(tuple(genes.names[i] for i in order), genes.primary[at], genes.rank[at], genes.score[at]),
            torch.from_numpy(self.table.rows(self.rows, order).toarray()),
            torch.Generator().manual_seed(seed),
            position=torch.from_numpy(self.position),
            section=torch.from_numpy(self.section),
            scores=lambda name: torch.from_numpy(score_genes(name, self.table, self.rows, order)),
        )


@pytest.fixture(scope="module")
def tissue() -> Iterator[Tissue]:
    """Scanpy sets the number of threads of the process, which decides the bits of later tests."""
    threads = torch.get_num_threads()
    yield Tissue()
    torch.set_num_threads(threads)


def literal_rank(genes: GeneSplit, score: np.ndarray) -> list[int]:
    """Sorted by hand: −1 for primary genes, the others by falling score and name, those without a score last."""
    keyed = [
        (math.isnan(s), 0.0 if math.isnan(s) else -round(float(s), 9), name)
        for s, name in zip(score, genes.names, strict=True)
    ]
    auxiliary = sorted((i for i in range(len(keyed)) if not genes.primary[i]), key=keyed.__getitem__)
    return [auxiliary.index(i) if i in auxiliary else -1 for i in range(len(keyed))]


def dispersions(tissue: Tissue, flavor: str, there: np.ndarray) -> np.ndarray:
    """Scanpy's own."""
    values = tissue.table.counts(tissue.rows) if flavor == "seurat_v3" else sparse.csr_matrix(tissue.expression)
    found = scanpy.pp.highly_variable_genes(AnnData(values[:, there]), flavor=flavor, n_top_genes=10, inplace=False)
    score: np.ndarray = found["variances_norm" if flavor == "seurat_v3" else "dispersions_norm"].to_numpy()
    return score


def literal_weights(position: np.ndarray) -> np.ndarray:
    """1 / number of the spots within one and a half pitches, (spots, spots)."""
    distance = np.linalg.norm(position[:, None] - position[None], axis=2) + np.diag(np.full(len(position), np.inf))
    near = distance <= 1.5 * np.median(distance.min(1))
    return near / np.maximum(near.sum(1, keepdims=True), 1)


def literal_autocorrelation(tissue: Tissue, gene: int) -> list[tuple[float, float, np.ndarray]]:
    """Moran's I and Geary's C of a gene in each section by double sums, and the weights."""
    found = []
    for index in np.unique(tissue.section):
        here = tissue.section == index
        w, x = literal_weights(tissue.position[here].astype(np.float64)), tissue.expression[here, gene]
        z, n = x - x.mean(), len(x)
        pairs = [(i, j) for i in range(n) for j in np.flatnonzero(w[i])]
        moran = n / w.sum() * sum(w[i, j] * z[i] * z[j] for i, j in pairs) / (z**2).sum()
        geary = (n - 1) / (2 * w.sum()) * sum(w[i, j] * (z[i] - z[j]) ** 2 for i, j in pairs) / (z**2).sum()
        found.append((moran, geary, w))
    return found


def literal_score(tissue: Tissue, prior: str) -> np.ndarray:
    if prior == "mean":
        return tissue.expression.mean(0)
    if prior == "detection":
        return (tissue.expression > 0).mean(0)
    if prior == "moran":
        with np.errstate(invalid="ignore"):
            return np.array(
                [np.mean([m for m, _, _ in literal_autocorrelation(tissue, gene)]) for gene in range(GENES)]
            )
    return np.abs(literal_correlation(tissue)).max(0)


def literal_correlation(tissue: Tissue) -> np.ndarray:
    centred = tissue.expression.copy()
    for index in np.unique(tissue.section):
        centred[tissue.section == index] -= centred[tissue.section == index].mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(centred.T)
    found[:, ~tissue.expression.any(0)] = np.nan
    return found[tissue.genes.primary.numpy()]


@pytest.mark.parametrize("prior", ["seurat", "cell_ranger", "seurat_v3"])
def test_variability_is_that_of_scanpy(tissue: Tissue, prior: Any) -> None:
    there = np.flatnonzero(tissue.expression.any(0))  # scanpy refuses absent genes for one of the flavours
    view = tissue.view(order=there)
    score = dispersions(tissue, prior, there)
    found = ranked(view, prior).numpy()
    auxiliary = np.flatnonzero(found >= 0)
    assert found[view.genes.primary.numpy()].tolist() == [-1] * PRIMARY
    assert (np.diff(score[auxiliary][np.argsort(found[auxiliary])]) <= 2e-6).all() and len(np.unique(score)) > 60


@pytest.mark.parametrize("prior", ["moran", "mean", "detection", "coexpression"])
def test_each_prior_is_its_literal_ranking(tissue: Tissue, prior: Prior) -> None:
    rank = ranked(tissue.view(), prior)
    assert rank.dtype == torch.int64
    assert rank.tolist() == literal_rank(tissue.genes, literal_score(tissue, prior))


@pytest.mark.parametrize("prior", NAMED)
def test_a_prior_is_the_ranking_of_a_protocol_with_that_name(tissue: Tissue, prior: Any) -> None:
    genes, _ = split_genes(tissue.table, tissue.rows, replace(LOOSE, ranking=prior))
    assert torch.equal(ranked(tissue.view(genes=genes), prior), genes.rank)


def test_the_default_is_the_protocols_ranking_bit_for_bit(tissue: Tissue) -> None:
    view = tissue.view()
    assert ranked(view, "protocol") is view.genes.rank
    assert torch.equal(HvgK(view, k=7).mask, (view.genes.rank < 7).float())
    assert torch.equal(Dkgsb(view).rho, view.genes.relative_rank(torch.float32))
    bare = TrainingView(view.genes, view.expression, view.generator)  # it asks for nothing else
    assert HvgK(bare, k=7).used.sum() == 7 + PRIMARY


@pytest.mark.parametrize("prior", PRIORS)
def test_hvg_k_and_dkgsb_follow_the_prior(tissue: Tissue, prior: Prior) -> None:
    rank = ranked(tissue.view(), prior)
    assert sorted(rank.tolist()) == [-1] * PRIMARY + list(range(GENES - PRIMARY))
    assert torch.equal(HvgK(tissue.view(), k=11, prior=prior).used, rank < 11)
    rho = Dkgsb(tissue.view(), prior=prior).rho
    torch.testing.assert_close(rho, rank.clamp(min=0).float() / (GENES - PRIMARY - 1), rtol=0, atol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_ranks_follow_the_genes_and_not_their_columns(tissue: Tissue, prior: Prior) -> None:
    order = np.random.default_rng(1).permutation(GENES)
    assert torch.equal(ranked(tissue.view(), prior)[torch.from_numpy(order)], ranked(tissue.view(order=order), prior))


def test_random_is_another_draw_for_another_seed_and_fair(tissue: Tissue) -> None:
    one, same, other = (ranked(tissue.view(seed), "random") for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    view, total = tissue.view(), torch.zeros(GENES)
    for _ in range(400):
        total += ranked(view, "random")  # the generator goes on
    mean, spread = (GENES - PRIMARY - 1) / 2, (GENES - PRIMARY) / math.sqrt(12 * 400)
    assert ((total / 400 - mean)[~view.genes.primary].abs() < 5 * spread).all()


def test_a_random_prior_comes_back_with_the_state(tissue: Tissue) -> None:
    for cls in (HvgK, Dkgsb):
        first, second = cls(tissue.view(1), prior="random"), cls(tissue.view(2), prior="random")
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    one, other = (HvgK(tissue.view(seed), k=5, prior="random") for seed in (1, 9))
    assert not torch.equal(one.used, other.used)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.used, other.used)


# Correlation


def test_correlation_is_within_sections_and_exact(tissue: Tissue, monkeypatch: pytest.MonkeyPatch) -> None:
    view, expected = tissue.view(), literal_correlation(tissue)
    whole = correlation(view)
    assert whole.dtype == torch.float64
    np.testing.assert_allclose(whole.numpy(), expected, rtol=0, atol=1e-12)
    assert np.isnan(whole[:, -CONSTANT:].numpy()).all() and not np.isnan(whole[:, :-CONSTANT].numpy()).any()
    monkeypatch.setattr(priors, "VALUES", 7 * GENES)  # seven spots at once
    torch.testing.assert_close(correlation(view), whole, rtol=0, atol=1e-13, equal_nan=True)


def view_of(expression: Tensor, section: list[int], primary: list[bool]) -> TrainingView:
    """A view of genes a, b, c, … in line; every spot beside the next."""
    names = tuple("abcdefghijkl"[: len(primary)])
    rank = torch.full((len(names),), -1)
    rank[~torch.tensor(primary)] = torch.arange(len(names) - sum(primary))
    genes = GeneSplit(names, torch.tensor(primary), rank, torch.zeros(len(names), dtype=torch.float64))
    return TrainingView(
        genes,
        expression,
        torch.Generator(),
        position=torch.stack([100.0 * torch.arange(len(expression)), torch.zeros(len(expression))], 1),
        section=torch.tensor(section),
        scores=lambda _: (expression > 0).double().mean(0),
    )


def test_a_difference_between_sections_is_no_correlation() -> None:
    x = torch.tensor([[1.0, 5, 1], [2, 5, 2], [1, 5, 0], [8, 9, 1], [9, 9, 2], [8, 9, 0]])
    found = correlation(view_of(x, [0, 0, 0, 1, 1, 1], [True, False, False]))
    assert found[0, 0] == pytest.approx(1) and found[0, 1].isnan() and found[0, 2] == pytest.approx(math.sqrt(3) / 2)
    assert ranked(view_of(x, [0] * 6, [True, False, False]), "coexpression").tolist() == [-1, 0, 1]  # in one section


def test_primary_genes_that_do_not_vary_say_nothing() -> None:
    x = torch.tensor([[1.0, 0.1, 3, 2], [2, 0.1, 1, 4], [3, 0.1, 2, 6]])
    one = view_of(x, [0, 0, 0], [True, True, False, False])
    assert ranked(one, "coexpression").tolist() == [-1, -1, 1, 0]
    assert Coexpression(one, power=1.0).weights.tolist() == [pytest.approx(1), 0, pytest.approx(0.5), pytest.approx(1)]
    none = view_of(x, [0, 0, 0], [False, True, False, False])
    assert ranked(none, "coexpression").tolist() == [0, -1, 1, 2]  # nothing is known: names
    assert not Coexpression(none).weights.any() and Coexpression(none).used.tolist() == [False, True, False, False]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("sign", ["either", "positive"])
def test_coexpression_weighs_by_a_power_of_the_correlation(
    tissue: Tissue, power: float, reduce: Any, sign: Any
) -> None:
    view = tissue.view()
    selector = Coexpression(view, power=power, reduce=reduce, sign=sign)
    r = np.nan_to_num(literal_correlation(tissue))
    strength = (np.abs(r) if sign == "either" else np.maximum(r, 0)) ** power
    w = strength.max(0) if reduce == "max" else strength.mean(0)
    np.testing.assert_allclose(selector.weights.numpy(), w, rtol=0, atol=1e-7)
    losses, step = toy_step(view.genes)
    w[tissue.genes.primary.numpy()] = 1
    assert selector(losses, step).item() == pytest.approx((w * losses.detach().numpy()).sum() / w.sum(), rel=1e-5)
    assert torch.equal(selector.used, torch.from_numpy(w > 0)) and selector.used.sum() <= GENES - CONSTANT


# Patterns on the tissue


def literal_z(tissue: Tissue, gene: int, statistic: str) -> float:
    """Each section's deviation from its moments, weighted by what its standard deviation allows."""
    parts, information = [], []
    for moran, geary, w in literal_autocorrelation(tissue, gene):
        n, s0 = len(w), w.sum()
        s1 = 0.5 * sum((w[i, j] + w[j, i]) ** 2 for i in range(n) for j in range(n))
        s2 = sum((w[i].sum() + w[:, i].sum()) ** 2 for i in range(n))
        if statistic == "moran":
            e = -1 / (n - 1)
            sd = math.sqrt((n**2 * s1 - n * s2 + 3 * s0**2) / ((n**2 - 1) * s0**2) - e**2)
            z = (moran - e) / sd
        else:
            sd = math.sqrt(((2 * s1 + s2) * (n - 1) - 4 * s0**2) / (2 * (n + 1) * s0**2))
            z = (1 - geary) / sd
        parts.append(z / sd)
        information.append(1 / sd)
    return sum(parts) / math.sqrt(sum(i**2 for i in information))


@pytest.mark.parametrize("statistic", ["moran", "geary"])
def test_z_is_that_of_double_sums(tissue: Tissue, statistic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "GENES", 40)
    found = spatial_z(tissue.view(), statistic)
    for gene in (0, 1, 19, 20, 45, 86):
        assert found[gene].item() == pytest.approx(literal_z(tissue, gene, statistic), abs=2e-9)
    assert found[-CONSTANT:].isnan().all() and not found[:-CONSTANT].isnan().any()
    assert found[:20].mean() > 5 > found[20:-CONSTANT].max()


def test_z_is_that_of_esda() -> None:
    """esda 2.9.0: `Moran(x, w).z_norm` and `-Geary(x, w).z_norm` with the same weights; scanpy's I and C agree."""
    place = np.delete(np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2), [0, 7, 20], 0)
    x = (7 * np.arange(27) ** 2 + 3 * np.arange(27)) % 11 + 2 * place[:, 0]
    view = view_of(torch.from_numpy(np.stack([x, x], 1)), [0] * 27, [True, False])
    view._position = torch.from_numpy(place)
    assert spatial_z(view, "moran")[1].item() == pytest.approx(3.0816729134738616, abs=1e-9)
    assert spatial_z(view, "geary")[1].item() == pytest.approx(2.616533285137662, abs=1e-9)
    w = sparse.csr_matrix(literal_weights(place))
    assert scanpy.metrics.morans_i(w, x) == pytest.approx(0.29981440781440777)
    assert scanpy.metrics.gearys_c(w, x) == pytest.approx(0.7026701940035271)


def adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg by hand: the smallest rate at which a hypothesis is rejected."""
    order = np.argsort(p)
    found = np.empty(len(p))
    for place, i in enumerate(order):
        found[i] = min(p[j] * len(p) / (rank + 1) for rank, j in enumerate(order) if rank >= place)
    return found


@pytest.mark.parametrize("statistic", ["moran", "geary"])
@pytest.mark.parametrize("fdr", [1e-6, 0.01, 0.2])
def test_the_false_discovery_rate_decides_how_many(tissue: Tissue, statistic: Any, fdr: float) -> None:
    view = tissue.view()
    selector = Spatial(view, statistic=statistic, fdr=fdr, detection=0.6)
    z = spatial_z(view, statistic).numpy()
    tested = ((tissue.expression > 0).mean(0) >= 0.6) & ~np.isnan(z) & ~tissue.genes.primary.numpy()
    assert tested.sum() < GENES - PRIMARY - CONSTANT
    expected = tissue.genes.primary.numpy().copy()
    expected[tested] = adjusted(stats.norm.sf(z[tested])) <= fdr
    assert selector.used.tolist() == expected.tolist() and selector.used[:20].sum() >= 10


def test_or_a_fixed_number(tissue: Tissue) -> None:
    view = tissue.view()
    z = spatial_z(view, "moran").numpy()
    z[(tissue.expression > 0).mean(0) < 0.1] = np.nan
    rank = np.array(literal_rank(tissue.genes, z))
    assert Spatial(view, choose="k", k=9).used.tolist() == (rank < 9).tolist()
    every = Spatial(view, choose="k", k=50_000, detection=0.0).used
    assert every.tolist() == [i < GENES - CONSTANT for i in range(GENES)]  # what does not vary has no pattern
    losses, step = toy_step(view.genes)
    nine = Spatial(view, choose="k", k=9)
    torch.testing.assert_close(nine(losses, step), losses[nine.used].mean())


def patternless(rate: float) -> TrainingView:
    """Independent counts of a first, primary gene and 3000 others on 400 spots."""
    rng, count = np.random.default_rng(0), 3001
    x = torch.from_numpy(np.log1p(rng.poisson(rate, (400, count))))
    place = np.stack(np.meshgrid(np.arange(20.0), np.arange(20)), -1).reshape(-1, 2)
    genes = GeneSplit(
        tuple(map(str, range(count))), torch.arange(count) < 1, torch.arange(count) - 1, torch.zeros(count)
    )
    return TrainingView(
        genes,
        x,
        torch.Generator(),
        position=torch.from_numpy(place),
        section=torch.zeros(400, dtype=torch.int64),
        scores=lambda _: (x > 0).double().mean(0),
    )


@pytest.mark.parametrize("statistic", ["moran", "geary"])
@pytest.mark.parametrize("rate", [0.15, 0.5, 5.0])
def test_without_a_pattern_p_is_uniform_and_nothing_is_found(rate: float, statistic: Any) -> None:
    view = patternless(rate)
    p = stats.norm.sf(spatial_z(view, statistic).numpy())
    assert 0.04 < (p < 0.05).mean() < 0.07 and 0.45 < (p < 0.5).mean() < 0.55
    assert Spatial(view, statistic=statistic).used.sum() - 1 <= 2  # of 3000


def test_rare_genes_mislead_and_are_not_tested() -> None:
    view = patternless(0.02)
    assert Spatial(view, detection=0.0).used.sum() - 1 > 10
    assert Spatial(view).used.sum() - 1 == 0


@pytest.mark.parametrize(
    ("count", "section"), [(1, [0]), (3, [0, 0, 0]), (4, [0, 1, 2, 3]), (4, [0, 0, 1, 1])], ids=str
)
def test_without_neighbours_no_gene_has_a_pattern(count: int, section: list[int]) -> None:
    view = view_of(torch.rand(count, 4), section, [True, False, False, False])
    for statistic in ("moran", "geary"):
        assert spatial_z(view, statistic).isnan().all()  # type: ignore[arg-type]
    for choose in ("fdr", "k"):
        assert Spatial(view, choose=choose).used.tolist() == [True, False, False, False]  # type: ignore[arg-type]


# The rules of the door, on tissue


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(Coexpression, {}), (Spatial, {}), (Spatial, {"choose": "k", "k": 9, "statistic": "geary"})],
    ids=lambda x: str(x) if isinstance(x, dict) else x.__name__,
)
def test_order_state_and_few_genes(tissue: Tissue, cls: type[Selector], settings: dict[str, Any]) -> None:
    view, order = tissue.view(), np.random.default_rng(2).permutation(GENES)
    before = view.expression.clone()
    one, two = cls(view, **settings), cls(tissue.view(order=order), **settings)
    assert torch.equal(view.expression, before) and one.reference and not list(one.parameters())
    losses, step = toy_step(view.genes)
    (slope,) = torch.autograd.grad(one(losses, step), losses)
    (moved,) = torch.autograd.grad(two(turned := losses[torch.from_numpy(order)], step), turned)
    torch.testing.assert_close(slope[torch.from_numpy(order)], moved)
    assert (slope[view.genes.primary] > 0).all() and (slope[~one.used] == 0).all()
    other = cls(view_of(torch.zeros(3, 12), [0, 0, 0], [True] * 12), **settings)
    assert other.used.all()  # no auxiliary gene
    assert all(b.numel() <= GENES for b in one.buffers())  # nothing of the spots is kept
    assert "weights" in one.state_dict() or "mask" in one.state_dict()


# Files


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "prior.csv") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def auxiliary_of(genes: GeneSplit) -> list[str]:
    return [name for name, primary in zip(genes.names, genes.primary, strict=True) if not primary]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "{2},0.1\n{0},7\n{1},-1e-3\n"),
        ("a.tsv", "symbol\tother\tscore\n{1}\t9\t-2\n{0}\t8\t3\n{2}\t7\t-1.5\n"),
        ("a.txt", "# the best first\n{0}\n{2}\n\n{1}\n"),
        ("a.csv", "gene,score\nUNKNOWN,99\n{0},4\n{2},3\n{1},2\n"),
    ],
)
def test_a_file_ranks_what_it_lists_first(tissue: Tissue, write: Callable[..., str], name: str, text: str) -> None:
    names = auxiliary_of(tissue.genes)
    file = write(text.format(*names[40:43]), name)
    rank = ranked(tissue.view(), "mean", file)  # the file overrides
    order = sorted((int(r), n) for r, n in zip(rank, tissue.genes.names, strict=True) if r >= 0)
    listed = [names[40], names[42], names[41]]
    assert [n for _, n in order] == [*listed, *sorted(set(names) - set(listed))]
    assert torch.equal(HvgK(tissue.view(), k=3, prior_file=file).used, rank < 3)
    third = Dkgsb(tissue.view(), prior_file=file).rho[tissue.genes.names.index(names[41])]
    assert third.item() * (GENES - PRIMARY - 1) == pytest.approx(2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no gene"),
        ("FOO,1\nBAR,2\n", "lists 2 genes, first FOO, and none of the panel, such as GENE"),
        ("{0},high\n", "line 1: the score of GENE... is 'high' and must be a finite number"),
        ("{0},1\n{0},2\n", "line 2: gene GENE... is named a second time"),
        ("{p},1\n", "lists primary genes alone; list auxiliary ones"),
    ],
)
def test_bad_files(tissue: Tissue, write: Callable[..., str], text: str, sentence: str) -> None:
    primary = next(n for n, p in zip(tissue.genes.names, tissue.genes.primary, strict=True) if p)
    file = write(text.format(auxiliary_of(tissue.genes)[0], p=primary))
    with pytest.raises(BadSpec, match=rf"^prior_file = '.*prior\.csv'.*{sentence}"):
        HvgK(tissue.view(), prior_file=file)


def test_a_file_that_is_not_there(tissue: Tissue, tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"^prior_file = '.*none\.csv' cannot be read: No such file"):
        Dkgsb(tissue.view(), prior_file=str(tmp_path / "none.csv"))


@pytest.mark.parametrize("name", ["hvg_k", "dkgsb"])
def test_the_content_of_a_file_is_part_of_the_selector(
    write: Callable[..., str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins, file = Plugins.discover(strict=True), write("A,1\n")

    def source() -> str:
        return one_part(plugins, name, "selector", [f"{name}.prior_file={file}"]).source

    first = source()
    assert first == source()
    write("A,2\n")
    assert source() != first
    write("A,1\n")
    assert source() == first != one_part(plugins, name, "selector", []).source
    # A choice is a word, even where a file is called so.
    monkeypatch.chdir(tmp_path)
    plain = one_part(plugins, name, "selector", [f"{name}.prior=moran"]).source
    write("A\n", "moran")
    assert one_part(plugins, name, "selector", [f"{name}.prior=moran"]).source == plain
