"""The gene axis of a fold: filter, scores, primary genes, ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench.data.gene_split import split_genes, variability
from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.protocol import Protocol

SPOTS, GENES = 60, 120
TRAIN = np.arange(0, 40)
LOOSE = Protocol(primary_genes=5, primary_detection=0.0, min_spots_per_gene=0)


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


def scores_of(expression: np.ndarray) -> np.ndarray:
    """The method in plain numpy: z-score of ln(variance / mean) in 20 equal bins of ln(1 + mean)."""
    counts = np.expm1(expression.astype(np.float64))
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


def test_variability_is_that_of_scanpy_and_of_the_formula(table: SpotTable) -> None:
    expression = expression_of(table)
    before = expression.toarray()
    score = variability(expression)
    np.testing.assert_array_equal(expression.toarray(), before)
    adata = AnnData(expression)
    scanpy.pp.highly_variable_genes(adata, flavor="seurat", n_bins=20, n_top_genes=50)
    np.testing.assert_allclose(score, adata.var["dispersions_norm"], rtol=1e-6)  # there stored as float32
    np.testing.assert_allclose(score, scores_of(before), rtol=1e-4, atol=1e-4)
    assert score.dtype == np.float64
    np.testing.assert_array_equal(np.isnan(score), ~before.any(0))


def test_variability_leaves_the_threads_of_torch(table: SpotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba starts its threads in scanpy's first call and sets those of every OpenMP library with them."""
    threads, original = torch.get_num_threads(), scanpy.pp.highly_variable_genes

    def meddling(*arguments: Any, **settings: Any) -> Any:
        torch.set_num_threads(threads + 1)
        return original(*arguments, **settings)

    monkeypatch.setattr(scanpy.pp, "highly_variable_genes", meddling)
    try:
        variability(expression_of(table))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


def test_primary_genes_have_the_highest_scores_and_ranks_follow(table: SpotTable) -> None:
    genes, columns = split_genes(table, TRAIN, LOOSE)
    score = genes.score.numpy()
    np.testing.assert_array_equal(columns, np.arange(GENES))
    np.testing.assert_array_equal(score, variability(expression_of(table, TRAIN)))
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
    protocol = Protocol(primary_genes=5, primary_detection=0.25)
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
        before[0].score, torch.from_numpy(variability(expression_of(table))), rtol=0, atol=0, equal_nan=True
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
