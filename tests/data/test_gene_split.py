"""The gene axis of a fold: filter, scores, primary genes, ranks."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench.data import gene_split
from agl_bench.data.gene_split import SCORES, moments, score_genes, split_genes
from agl_bench.data.neighbours import neighbour_weights
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.errors import BadSpec
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import OF_COUNTS, Protocol, Variability

SPOTS, GENES = 60, 120
TRAIN = np.arange(0, 40)
SEURAT = Protocol(primary_score="seurat", ranking="seurat")
LOOSE = replace(SEURAT, primary_genes=5, primary_detection=0.0, min_spots_per_gene=0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Scanpy, called here by hand, sets the number of threads of the process, which decides the bits of later tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def table_of(counts: np.ndarray, names: list[str] | None = None) -> SpotTable:
    """Not scaled: expression is ln(1 + count)."""
    spots, genes = counts.shape
    return SpotTable(
        sections=(),
        matrices=(sparse.csr_matrix(counts.astype(np.float32)),),
        source_columns=np.arange(genes)[None],
        genes=tuple(names or [f"GENE{i:03d}" for i in range(genes)]),
        section=np.zeros(spots, dtype=np.int64),
        source_row=np.arange(spots),
        position=np.zeros((spots, 2), dtype=np.float32),
        total=counts.sum(1).astype(np.float64),
        scales=False,
        dropped_spots=0,
    )


def expression_of(table: SpotTable, rows: np.ndarray | None = None) -> sparse.csr_matrix:
    return table.rows(np.arange(len(table)) if rows is None else rows)


@pytest.fixture
def table() -> SpotTable:
    """Over-dispersed counts with means from rare to abundant, and genes that nobody has."""
    rng = np.random.default_rng(0)
    mean = np.exp(rng.uniform(-3, 3, GENES)) * rng.gamma(2, 0.5, (SPOTS, GENES))
    mean[:, ::25] = 0
    return table_of(rng.poisson(mean))


def seurat_of(expression: np.ndarray) -> np.ndarray:
    """The method in plain numpy: z-score of ln(variance / mean) in 20 equal bins of ln(1 + mean)."""
    counts = np.expm1(expression).astype(np.float64)
    mean, variance = counts.mean(0), counts.var(0, ddof=1)
    mean[mean == 0] = 1e-12
    with np.errstate(divide="ignore"):
        dispersion = np.where(variance > 0, np.log(variance / mean), np.nan)
    mean = np.log1p(mean)
    edges = np.linspace(mean.min(), mean.max(), 21)[1:-1]
    bins = np.searchsorted(edges, mean, side="left")
    score = np.full(len(mean), np.nan)
    for b in np.unique(bins):
        here = dispersion[bins == b]
        known = here[~np.isnan(here)]
        score[bins == b] = (
            (here - known.mean()) / known.std(ddof=1) if len(known) > 1 else np.where(here == here, 1, here)
        )
    return score


def same_order(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(*(np.argsort(values.round(6), kind="stable") for values in (one, other)))


def everywhere(name: str, table: SpotTable, rows: np.ndarray | None = None) -> np.ndarray:
    """The score of every gene, on all spots by default."""
    return score_genes(name, table, np.arange(len(table)) if rows is None else rows, np.arange(len(table.genes)))


@pytest.fixture
def measured() -> SpotTable:
    """Two sections with counts, on square grids; genes 0 to 19 follow the place, the others do not."""
    rng = np.random.default_rng(5)
    place = np.stack(np.meshgrid(np.arange(15.0), np.arange(12.0)), -1).reshape(-1, 2)
    sections = []
    for index, name in enumerate("AB"):
        order = rng.permutation(len(place))
        mean = np.exp(rng.uniform(-1.5, 2.5, GENES)) * rng.gamma(2, 0.5, (len(place), GENES)) * (index + 1)
        mean[:, :20] *= np.exp(2 * np.sin(place[order, :1] / 4 + np.arange(20)))
        counts = AnnData(sparse.csr_matrix(rng.poisson(mean).astype(np.float32)))
        counts.var_names = [f"GENE{i:03d}" for i in range(GENES)]
        counts.obsm["spatial"] = place[order] * 200
        sections.append(Section(name, counts, 1.0))
    return tabulate(sections, Protocol(min_genes_per_spot=1))


def test_seurat_is_that_of_scanpy_and_of_the_formula(table: SpotTable) -> None:
    before = expression_of(table).toarray()
    score = everywhere("seurat", table)
    np.testing.assert_array_equal(expression_of(table).toarray(), before)
    np.testing.assert_allclose(score, seurat_of(before), rtol=1e-9, atol=2e-9)
    adata = AnnData(expression_of(table).astype(np.float64))  # scanpy squares in the precision it is given
    found = scanpy.pp.highly_variable_genes(adata, flavor="seurat", n_bins=20, inplace=False)["dispersions_norm"]
    np.testing.assert_allclose(score, found, rtol=1e-6, atol=1e-6)
    same_order(score, found.to_numpy())
    assert score.dtype == np.float64
    np.testing.assert_array_equal(np.isnan(score), ~before.any(0))


def test_cell_ranger_is_that_of_scanpy(table: SpotTable) -> None:
    columns = np.flatnonzero(expression_of(table).toarray().any(0))  # scanpy refuses equal percentiles of absent genes
    score = score_genes("cell_ranger", table, TRAIN, columns)
    adata = AnnData(expression_of(table, TRAIN)[:, columns].astype(np.float64))
    found = scanpy.pp.highly_variable_genes(adata, flavor="cell_ranger", inplace=False)["dispersions_norm"].to_numpy()
    np.testing.assert_allclose(score, found, rtol=1e-9, atol=2e-9)
    same_order(score, found)
    assert np.isfinite(everywhere("cell_ranger", table)[columns]).all()  # and with them it goes on


def test_seurat_v3_is_that_of_scanpy_on_raw_counts(measured: SpotTable) -> None:
    rows = np.arange(0, len(measured), 2)
    columns = np.arange(0, GENES, 3)
    counts = np.concatenate([s.counts.X.toarray() for s in measured.sections])[rows][:, columns]
    found = scanpy.pp.highly_variable_genes(AnnData(counts), flavor="seurat_v3", n_top_genes=10, inplace=False)[
        "variances_norm"
    ]
    score = score_genes("seurat_v3", measured, rows, columns)
    np.testing.assert_allclose(score, found, rtol=1e-6)
    same_order(score, found.to_numpy())


def overdispersion_of(counts: np.ndarray) -> float:
    """Of the median gene among those detected in a quarter of the spots, by moments."""
    mean = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    frequent = (counts > 0).mean(0) >= 0.25
    found = ((counts - mean) ** 2 - mean)[:, frequent].sum(0) / (mean**2)[:, frequent].sum(0)
    return float(np.median(found))


def test_pearson_residuals_are_those_of_scanpy_within_sections(measured: SpotTable) -> None:
    expected, rows = np.zeros(GENES), np.arange(len(measured))
    for section in (0, 1):
        counts = measured.counts(rows[measured.section == section]).astype(np.float64)
        found = scanpy.experimental.pp.highly_variable_genes(
            AnnData(counts), theta=1 / overdispersion_of(counts.toarray()), n_top_genes=10, inplace=False
        )
        expected += (found["residual_variances"] / 2).to_numpy()
    np.testing.assert_allclose(everywhere("pearson_residuals", measured), expected, rtol=1e-5)


def test_a_gene_that_only_differs_between_sections_has_no_residual_variance_of_note(measured: SpotTable) -> None:
    before = everywhere("pearson_residuals", measured)
    counts = [matrix.toarray() for matrix in measured.matrices]
    counts[0][:, 50] = 0
    counts[0][:, 50] = np.random.default_rng(1).poisson(0.05, len(counts[0]))
    counts[1][:, 50] = np.random.default_rng(2).poisson(50 * measured.total[measured.section == 1] / 1000)
    after = everywhere("pearson_residuals", replace(measured, matrices=tuple(map(sparse.csr_matrix, counts))))
    assert after[50] < np.median(before) and everywhere("seurat_v3", measured).argmax() != 50


@pytest.mark.parametrize(("spots", "left"), [(1, 30), (3, 30), (6, 20)])
def test_thin_spots_carry_no_residual_variance(spots: int, left: int, measured: SpotTable) -> None:
    """Spots of some counts in genes of their own; the old score puts those genes first."""
    rng = np.random.default_rng(9)
    counts = measured.matrices[0].toarray()
    thin = rng.choice(len(counts), spots, replace=False)
    counts[thin] = 0
    counts[np.repeat(thin, left), rng.integers(60, GENES, spots * left)] = 1
    spoilt = table_of(counts)
    rows = np.setdiff1d(np.arange(len(counts)), thin)

    def first(name: str, rows: np.ndarray) -> set[int]:
        return set(np.argsort(-np.nan_to_num(everywhere(name, spoilt, rows), nan=-np.inf), kind="stable")[:20])

    everything = np.arange(len(counts))
    assert first("pearson_residuals", everything) == first("pearson_residuals", rows)
    np.testing.assert_array_equal(
        everywhere("pearson_residuals", spoilt), everywhere("pearson_residuals", spoilt, rows)
    )


def test_abundance_alone_gives_no_residual_variance() -> None:
    """Genes of one coefficient of variation: the abundant ones do not come first, as they do with a fixed θ of 100."""
    rng = np.random.default_rng(2)
    mean = np.exp(np.linspace(np.log(2), np.log(200), 200))
    table = table_of(rng.poisson(mean * rng.gamma(4, 1 / 4, (400, 200))))
    score = everywhere("pearson_residuals", table)
    assert abs(np.corrcoef(np.log(mean), score)[0, 1]) < 0.3
    assert score.mean() == pytest.approx(1, abs=0.1)


def test_genes_without_counts_have_no_residuals_and_one_spot_is_enough(table: SpotTable) -> None:
    score = everywhere("pearson_residuals", table)
    assert np.isnan(score[::25]).all() and (np.delete(score, np.arange(0, GENES, 25)) > 0).all()
    alone = everywhere("pearson_residuals", table, np.array([3]))
    assert (np.nan_to_num(alone) == 0).all()


@pytest.mark.parametrize("name", OF_COUNTS)
def test_values_that_are_no_counts_are_refused(name: str, measured: SpotTable) -> None:
    with pytest.raises(BadSpec, match=rf"score {name} needs raw counts, and the dataset has none; use seurat"):
        everywhere(name, replace(measured, has_counts=False))


def test_seurat_v3_says_where_it_cannot(measured: SpotTable) -> None:
    with pytest.raises(BadSpec, match=r"score seurat_v3 .* needs 20, there are [012] on 5 spots; use seurat or moran"):
        score_genes("seurat_v3", measured, np.arange(5), np.arange(2))
    equal = np.zeros(measured.matrices[0].shape, dtype=np.float32)
    equal[::2] = 1
    with pytest.raises(
        BadSpec, match=r"score seurat_v3 cannot be computed for 120 genes on 50 spots: the fit .* fails"
    ):
        score_genes(
            "seurat_v3", replace(measured, matrices=(sparse.csr_matrix(equal),)), np.arange(50), np.arange(GENES)
        )


def test_seurat_v3_leaves_the_threads_of_torch(measured: SpotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba starts its threads in scanpy's first call and sets those of every OpenMP library with them."""
    threads, original = torch.get_num_threads(), scanpy.pp.highly_variable_genes

    def meddling(*arguments: Any, **settings: Any) -> Any:
        torch.set_num_threads(threads + 1)
        return original(*arguments, **settings)

    monkeypatch.setattr(scanpy.pp, "highly_variable_genes", meddling)
    try:
        everywhere("seurat_v3", measured)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


def test_moran_is_that_of_scanpy_within_sections(measured: SpotTable) -> None:
    expected = []
    for index in range(2):
        here = np.flatnonzero(measured.section == index)
        weights = neighbour_weights(measured.position[here])
        values = np.ascontiguousarray(expression_of(measured, here).toarray().T.astype(np.float64))
        expected.append(scanpy.metrics.morans_i(weights, values))
    score = everywhere("moran", measured)
    np.testing.assert_allclose(score, np.mean(expected, 0), rtol=0, atol=2e-9)
    assert score[:20].min() > 0.2 > score[20:].max()


def test_moran_is_the_double_sum(measured: SpotTable) -> None:
    rows = np.flatnonzero(measured.section == 1)[:70]
    distance = np.linalg.norm(measured.position[rows][:, None] - measured.position[rows][None], axis=2)
    nearest = np.median(np.sort(distance, 1)[:, 1])
    weights = ((distance > 0) & (distance <= 1.5 * nearest)).astype(float)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1)
    z = expression_of(measured, rows).toarray().astype(np.float64)
    z -= z.mean(0)
    expected = len(rows) / weights.sum() * np.einsum("ij,ig,jg->g", weights, z, z) / (z**2).sum(0)
    np.testing.assert_allclose(everywhere("moran", measured, rows), expected, rtol=0, atol=2e-9)


def test_moran_where_it_is_not_defined(measured: SpotTable) -> None:
    """A gene that varies in one section only is scored there; one that varies nowhere has no score."""
    unscaled = replace(measured, scales=False)
    matrices = [matrix.toarray() for matrix in measured.matrices]
    for values in matrices:
        values[:, 0] = 1
    matrices[1][:, 1] = 2
    changed = replace(unscaled, matrices=tuple(map(sparse.csr_matrix, matrices)))
    score, alone = everywhere("moran", changed), everywhere("moran", unscaled, np.flatnonzero(measured.section == 0))
    assert np.isnan(score).tolist() == [True] + [False] * (GENES - 1)
    assert score[1] == alone[1]
    assert np.isnan(everywhere("moran", measured, np.array([0]))).all()  # no neighbour


def test_neighbours_of_grids() -> None:
    square = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2) * 200
    x, y = np.meshgrid(np.arange(6), np.arange(6))
    hexagons = np.stack([x * 100 + (y % 2) * 50, y * 100 * np.sqrt(0.75)], -1).reshape(-1, 2)
    for position, inner in ((square, 8), (hexagons, 6)):
        weights = neighbour_weights(position)
        assert np.diff(weights.indptr).max() == inner
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
        assert (weights.diagonal() == 0).all() and ((weights > 0) != (weights.T > 0)).nnz == 0
    assert neighbour_weights(np.array([[0.0, 0], [1, 0], [50, 0]])).sum(1).ravel().tolist() == [[1, 1, 0]]
    assert neighbour_weights(np.zeros((1, 2))).shape == (1, 1)


def test_mean_and_detection(table: SpotTable) -> None:
    values = expression_of(table, TRAIN).toarray().astype(np.float64)
    np.testing.assert_allclose(everywhere("mean", table, TRAIN), values.mean(0), atol=1e-9)
    np.testing.assert_array_equal(everywhere("detection", table, TRAIN), (values > 0).mean(0).round(9))


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"seurat_v3"}))
def test_blocks_and_the_order_of_spots_do_not_matter(
    name: str, measured: SpotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = everywhere(name, measured)
    rows = np.random.default_rng(6).permutation(len(measured))
    np.testing.assert_allclose(everywhere(name, measured, rows), whole, rtol=0, atol=2e-9)
    monkeypatch.setattr(gene_split, "BLOCK", 7)
    monkeypatch.setattr(gene_split, "RESIDUALS", 7 * GENES)
    np.testing.assert_allclose(everywhere(name, measured), whole, rtol=0, atol=2e-9)


def test_moments_are_exact_for_genes_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gene_split, "BLOCK", 7)
    rng = np.random.default_rng(7)
    values = np.tile(rng.gamma(1, 3, 50).astype(np.float32), (60, 1))
    values[:, ::2] = rng.gamma(0.3, 3, (60, 25))
    table = table_of(values)
    mean, variance = moments(table, np.arange(60))
    values = expression_of(table).toarray()
    assert (variance[1::2] == 0).all()
    np.testing.assert_array_equal(mean[1::2], values[0, 1::2])
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance[::2], values[:, ::2].astype(np.float64).var(0, ddof=1), rtol=1e-12)


def test_primary_genes_have_the_highest_scores_and_ranks_follow(table: SpotTable) -> None:
    genes, columns = split_genes(table, TRAIN, LOOSE)
    score = genes.score.numpy()
    np.testing.assert_array_equal(columns, np.arange(GENES))
    np.testing.assert_array_equal(score, everywhere("seurat", table, TRAIN))
    assert genes.primary_count == 5 and genes.auxiliary_count == GENES - 5
    rank = genes.rank.numpy()
    assert (rank[genes.primary] == -1).all()
    auxiliary = np.flatnonzero(rank >= 0)
    assert sorted(rank[auxiliary]) == list(range(GENES - 5))
    by_rank = score[auxiliary[np.argsort(rank[auxiliary])]]
    scored = by_rank[~np.isnan(by_rank)]
    assert (np.diff(scored) <= 0).all() and np.isnan(by_rank[len(scored) :]).all()  # NaN last
    assert genes.unscored == np.isnan(by_rank).sum() > 0
    assert score[genes.primary].min() >= scored.max()
    assert (genes.rank.dtype, genes.primary.dtype) == (torch.int64, torch.bool)


def test_relative_rank(table: SpotTable) -> None:
    genes, _ = split_genes(table, TRAIN, LOOSE)
    rho = genes.relative_rank(torch.float64)
    assert (rho[genes.primary] == 0).all()
    torch.testing.assert_close(rho[~genes.primary].sort().values, torch.linspace(0, 1, GENES - 5, dtype=torch.float64))


def test_ties_are_broken_by_name(table: SpotTable) -> None:
    """Equal genes have equal scores, and genes that nobody has have none."""
    counts = np.tile(table.matrices[0].toarray(), 2)
    names = [f"{word}{i:03d}" for word in "ba" for i in np.random.default_rng(1).permutation(GENES)]
    genes, _ = split_genes(table_of(counts, names), TRAIN, LOOSE)
    score = dict(zip(genes.names, genes.score.nan_to_num(nan=-np.inf).tolist(), strict=True))
    expected = sorted(names, key=lambda n: (-score[n], n))
    assert len(set(score.values())) <= GENES
    assert {n for n, p in zip(names, genes.primary, strict=True) if p} == set(expected[:5])
    auxiliary = sorted((r, n) for n, r in zip(names, genes.rank.tolist(), strict=True) if r >= 0)
    assert [n for _, n in auxiliary] == expected[5:]


def test_genes_that_do_not_differ_have_no_score() -> None:
    """Each bin then has a standard deviation of zero."""
    expression = np.zeros((SPOTS, 3), dtype=np.float32)
    expression[::2] = 1
    genes, _ = split_genes(table_of(expression, list("cab")), TRAIN, replace(LOOSE, primary_genes=1))
    assert genes.score.isnan().all() and genes.unscored == 2
    assert genes.primary.tolist() == [False, True, False] and genes.rank.tolist() == [1, -1, 0]  # by name


@pytest.mark.parametrize("varies", [0, 1, 2])
def test_genes_that_nobody_has_have_no_score(varies: int) -> None:
    expression = np.zeros((SPOTS, 6), dtype=np.float32)
    expression[::2, :varies] = np.arange(1, varies + 1)
    genes, _ = split_genes(table_of(expression), TRAIN, replace(LOOSE, primary_genes=2))
    assert genes.score.isnan().tolist() == [False] * varies + [True] * (6 - varies)
    assert genes.primary.tolist() == [True, True, False, False, False, False]
    assert genes.rank.tolist() == [-1, -1, 0, 1, 2, 3] and genes.unscored == 4  # ties by name


def test_gene_order_does_not_matter(table: SpotTable) -> None:
    order = np.random.default_rng(2).permutation(GENES)
    names = np.asarray(table.genes)[order].tolist()
    moved = replace(table, source_columns=table.source_columns[:, order], genes=tuple(names))

    def by_name(genes: GeneSplit) -> dict[str, int]:
        return dict(zip(genes.names, genes.rank.tolist(), strict=True))

    assert by_name(split_genes(table, TRAIN, LOOSE)[0]) == by_name(split_genes(moved, TRAIN, LOOSE)[0])


@pytest.mark.parametrize("fewest", [1, 2, 20])
def test_genes_seen_in_few_spots_are_left_out(table: SpotTable, fewest: int) -> None:
    genes, columns = split_genes(table, TRAIN, replace(LOOSE, min_spots_per_gene=fewest))
    detected = (expression_of(table, TRAIN).toarray() > 0).sum(0)
    np.testing.assert_array_equal(columns, np.flatnonzero(detected >= fewest))
    assert genes.names == tuple(np.asarray(table.genes)[columns]) and 5 < len(columns) < GENES
    assert genes.unscored == 0


def test_a_rare_gene_is_never_primary(table: SpotTable) -> None:
    detected = (expression_of(table, TRAIN).toarray() > 0).mean(0)
    loose, _ = split_genes(table, TRAIN, replace(LOOSE, primary_genes=20))
    strict, _ = split_genes(table, TRAIN, replace(LOOSE, primary_genes=20, primary_detection=0.5))
    assert detected[loose.primary].min() < 0.5 <= detected[strict.primary].min()
    eligible = np.flatnonzero(detected >= 0.5)
    best = eligible[np.argsort(-strict.score.numpy()[eligible])][:20]
    np.testing.assert_array_equal(np.flatnonzero(strict.primary), np.sort(best))
    torch.testing.assert_close(strict.score, loose.score, equal_nan=True)


def test_detection_exactly_at_the_limit_counts() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(5, (40, 6)) + 1.0
    counts[10:, 0] = 0  # seen in 10 of 40
    counts[9:, 1] = 0  # seen in 9 of 40
    protocol = replace(SEURAT, primary_genes=5, primary_detection=0.25)
    genes, _ = split_genes(table_of(counts), np.arange(40), protocol)
    assert genes.primary.tolist() == [True, False, True, True, True, True]


def test_only_training_spots_decide(table: SpotTable) -> None:
    changed = table.matrices[0].toarray()
    changed[40:] = np.random.default_rng(4).permutation(changed[40:].ravel()).reshape(-1, GENES) * 3
    other = replace(table, matrices=(sparse.csr_matrix(changed),))
    clean, paper = replace(LOOSE, genes_from="training"), replace(LOOSE, genes_from="all")
    before, after = (split_genes(t, TRAIN, clean) for t in (table, other))
    assert torch.equal(before[0].rank, after[0].rank) and torch.equal(before[0].primary, after[0].primary)
    torch.testing.assert_close(before[0].score, after[0].score, rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(before[1], after[1])
    before, after = (split_genes(t, TRAIN, paper) for t in (table, other))
    assert not torch.equal(before[0].rank, after[0].rank)
    torch.testing.assert_close(
        before[0].score, torch.from_numpy(everywhere("seurat", table)), rtol=0, atol=0, equal_nan=True
    )


def test_every_gene_primary(table: SpotTable) -> None:
    genes, _ = split_genes(table, TRAIN, replace(LOOSE, primary_genes=GENES))
    assert genes.auxiliary_count == 0 and genes.primary.all() and genes.unscored == 0


def test_too_many_primary_genes(table: SpotTable) -> None:
    with pytest.raises(BadSpec, match=r"protocol\.primary_genes = 121 is more than the 120 genes .* 0% of 40 spots"):
        split_genes(table, TRAIN, replace(LOOSE, primary_genes=121))
    eligible = ((expression_of(table, TRAIN).toarray() > 0).mean(0) >= 0.9).sum()
    with pytest.raises(BadSpec, match=rf"primary_genes = {eligible + 1} is more than the {eligible} genes .* 90%"):
        split_genes(table, TRAIN, replace(LOOSE, primary_genes=int(eligible) + 1, primary_detection=0.9))


@pytest.mark.parametrize("score", ["pearson_residuals", "seurat", "cell_ranger", "seurat_v3", "moran"])
def test_each_score_chooses_the_primary_genes(score: str, measured: SpotTable) -> None:
    rows = np.arange(0, len(measured), 2)
    protocol = replace(LOOSE, primary_score=score, ranking="mean", primary_genes=10)
    genes, _ = split_genes(measured, rows, protocol)
    best = np.argsort(-everywhere(score, measured, rows))[:10]
    np.testing.assert_array_equal(np.flatnonzero(genes.primary), np.sort(best))
    np.testing.assert_array_equal(genes.score, everywhere("mean", measured, rows))


@pytest.mark.parametrize("ranking", sorted(SCORES))
def test_each_score_ranks(ranking: str, measured: SpotTable) -> None:
    rows = np.arange(0, len(measured), 2)
    genes, _ = split_genes(measured, rows, replace(LOOSE, ranking=ranking))
    plain, _ = split_genes(measured, rows, LOOSE)
    assert torch.equal(genes.primary, plain.primary)
    score = everywhere(ranking, measured, rows)
    expected = sorted(np.flatnonzero(~genes.primary), key=lambda g: (-score[g], genes.names[g]))
    assert genes.rank[expected].tolist() == list(range(GENES - 5))


@pytest.mark.parametrize("score", sorted(SCORES))
def test_test_spots_decide_nothing(score: str, measured: SpotTable) -> None:
    """Whatever is measured at spots outside training, NaN included, no score and no split changes a bit."""
    rows = np.arange(0, len(measured), 2)
    other = np.setdiff1d(np.arange(len(measured)), rows)
    primary = score if score in typing.get_args(Variability) else "seurat"
    protocol = replace(LOOSE, primary_score=primary, ranking=score)
    before, columns = split_genes(measured, rows, protocol)
    sections = []
    for index, section in enumerate(measured.sections):
        counts = section.counts.copy()
        raw = counts.X.toarray()
        raw[measured.source_row[other[measured.section[other] == index]]] = np.nan
        counts.X = sparse.csr_matrix(raw)
        sections.append(replace(section, counts=counts))
    changed = replace(measured, sections=tuple(sections), matrices=tuple(s.counts.X for s in sections))
    after, columns_after = split_genes(changed, rows, protocol)
    np.testing.assert_array_equal(columns, columns_after)
    assert torch.equal(before.primary, after.primary) and torch.equal(before.rank, after.rank)
    torch.testing.assert_close(before.score, after.score, rtol=0, atol=0, equal_nan=True)


def test_genes_without_a_score_first_as_the_authors_code_has_it(table: SpotTable) -> None:
    last, _ = split_genes(table, TRAIN, LOOSE)
    first, _ = split_genes(table, TRAIN, replace(LOOSE, nan_scores="first"))
    assert torch.equal(first.primary, last.primary) and first.unscored == last.unscored > 0
    auxiliary = ~first.primary
    score, unscored = first.score[auxiliary], first.score[auxiliary].isnan()
    authors = torch.sort(score, descending=True, stable=True).indices  # NaN is the largest value there
    assert first.rank[auxiliary][authors].tolist() == list(range(int(auxiliary.sum())))
    assert sorted(first.rank[auxiliary][unscored].tolist()) == list(range(first.unscored))
    scored = last.rank[auxiliary][~unscored]
    assert torch.equal(first.rank[auxiliary][~unscored], scored + first.unscored)


def test_ties_are_counted(table: SpotTable, measured: SpotTable) -> None:
    """Genes without a score are counted apart."""
    twice = table_of(np.tile(table.counts(np.arange(SPOTS)).toarray(), 2))
    for ranking in ("mean", "seurat"):
        genes, _ = split_genes(twice, TRAIN, replace(LOOSE, ranking=ranking))
        auxiliary = genes.score[~genes.primary]
        scored = auxiliary[~auxiliary.isnan()].tolist()
        assert genes.tied == sum(scored.count(s) > 1 for s in scored) > GENES
    assert split_genes(measured, np.arange(len(measured)), replace(LOOSE, ranking="moran"))[0].tied == 0


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "genes.csv"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    "text",
    [
        "GENE003\nGENE001\nGENE025\n",
        "# mine\n\nGENE003\r\nGENE001\r\n  GENE025  ",
        "gene\nGENE003\nGENE001\nGENE025\n",
        "place,Symbol\n1,GENE003\n2,GENE001\n3,GENE025\n",
        "GENE003,first\nGENE001,second\nGENE025,third\n",
        "\ufeffGENE003\nGENE001\nGENE025\n",
    ],
)
def test_primary_genes_from_a_file(text: str, table: SpotTable, write: Callable[[str], str]) -> None:
    """Nobody has GENE025: it stays in all the same."""
    protocol = Protocol(primary_file=write(text), min_spots_per_gene=1)
    genes, columns = split_genes(table, TRAIN, protocol)
    assert {n for n, p in zip(genes.names, genes.primary, strict=True) if p} == {"GENE001", "GENE003", "GENE025"}
    assert 0 not in columns and 25 in columns
    assert genes.auxiliary_count == len(columns) - 3 and genes.unscored == 0
    assert sorted(genes.rank[~genes.primary].tolist()) == list(range(genes.auxiliary_count))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("GENE009\nGENE001\nGENE007\n", ["GENE009", "GENE001", "GENE007"]),
        ("GENE009,0.5\nGENE001,7\nGENE007,-1e3\n", ["GENE001", "GENE009", "GENE007"]),
        ("gene,score\nGENE009,1\nGENE001,1\nABSENT,3\n", ["GENE001", "GENE009"]),
        ("score,note,gene\n1,x,GENE009\n2,y,GENE001\n", ["GENE001", "GENE009"]),
        ("score,gene\n1,GENE009\n2,GENE001\n", ["GENE001", "GENE009"]),
    ],
)
@pytest.mark.parametrize("nan_scores", ["last", "first"])
def test_ranking_from_a_file(
    text: str, names: list[str], nan_scores: str, table: SpotTable, write: Callable[[str], str]
) -> None:
    """Genes that it does not list come last, by name."""
    protocol = replace(LOOSE, ranking_file=write(text), nan_scores=nan_scores)  # type: ignore[arg-type]
    genes, _ = split_genes(table, TRAIN, protocol)
    plain, _ = split_genes(table, TRAIN, LOOSE)
    assert torch.equal(genes.primary, plain.primary)
    auxiliary = sorted((r, n) for n, r in zip(genes.names, genes.rank.tolist(), strict=True) if r >= 0)
    ranked = [n for n in names if not genes.primary[genes.names.index(n)]]
    others = sorted(n for _, n in auxiliary if n not in ranked)
    assert [n for _, n in auxiliary] == ranked + others
    assert genes.unscored == len(others)


@pytest.mark.parametrize(
    ("setting", "text", "sentence"),
    [
        ("primary_file", "", "names no gene; write one name a line"),
        ("primary_file", "gene\n", "names no gene"),
        ("primary_file", "GENE001\nFOO\nBAR\n", "the panel of 120 genes lacks 2 of its 3 genes, first FOO;"),
        ("primary_file", "GENE001\nGENE002\nGENE001\n", "line 3: gene GENE001 is named a second time"),
        ("primary_file", "n,gene\n1,GENE001\n2,\n", "line 3: no gene is named there"),
        ("primary_file", 'GENE001\n"GENE002\n', "is not a CSV or text file in UTF-8"),
        ("ranking_file", "", "names no gene"),
        ("ranking_file", "GENE001,1\nGENE002\n", "line 2: the score of GENE002 is '' and must be a finite number"),
        ("ranking_file", "GENE001,high\n", "line 1: the score of GENE001 is 'high' and must be a finite number"),
        ("ranking_file", "GENE001,nan\n", "line 1: the score of GENE001 is 'nan'"),
        ("ranking_file", "GENE001,1\nGENE001,2\n", "line 2: gene GENE001 is named a second time"),
        ("ranking_file", "FOO\nBAR\n", "lists 2 genes, first FOO, and none of the panel, such as GENE000"),
    ],
)
def test_files_that_are_wrong(
    setting: str, text: str, sentence: str, table: SpotTable, write: Callable[[str], str]
) -> None:
    path = write(text)
    with pytest.raises(BadSpec, match=rf"^protocol\.{setting} = '.*genes\.csv'") as caught:
        split_genes(table, TRAIN, replace(LOOSE, **{setting: path}))  # type: ignore[arg-type]
    assert sentence in str(caught.value)


@pytest.mark.parametrize("setting", ["primary_file", "ranking_file"])
def test_files_that_cannot_be_read(setting: str, table: SpotTable, tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=rf"protocol\.{setting} = '.*' cannot be read: Is a directory"):
        split_genes(table, TRAIN, replace(LOOSE, **{setting: str(tmp_path)}))  # type: ignore[arg-type]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadSpec, match=r"is not a CSV or text file in UTF-8"):
        split_genes(table, TRAIN, replace(LOOSE, **{setting: str(tmp_path / "binary")}))  # type: ignore[arg-type]
