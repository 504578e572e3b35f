"""Targets: Pearson residuals against scanpy and the formula, standard scores of sections, and whose spots decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench.data import targets as module
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import SpotStore
from agl_bench.data.targets import THETA, fit_targets
from agl_bench.interfaces.spots import Section
from agl_bench.maths.metrics import pearson
from agl_bench.protocol import Protocol

GENES = [f"g{i:02d}" for i in range(24)]
TRAIN = np.arange(0, 45)  # all of section a, half of section b, nothing of section c


def section(name: str, spots: int, genes: list[str] = GENES) -> Section:
    """Over-dispersed counts that depend on the name; g00 varies nowhere in the training spots."""
    rng = np.random.default_rng(ord(name))
    mean = np.exp(rng.uniform(-2, 2, len(genes))) * rng.gamma(1, 1, (spots, len(genes)))
    counts = rng.poisson(mean).astype(np.float32)
    counts[:, genes.index("g00")] = 0
    made = AnnData(sparse.csr_matrix(counts), obsm={"spatial": rng.uniform(0, 99, (spots, 2))})
    made.var_names = genes
    return Section(name, made, 1.0)


@pytest.fixture(scope="module")
def table() -> SpotTable:
    """Section c lacks the last four genes; the panel has them all the same."""
    sections = [section("a", 30), section("b", 30), section("c", 20, GENES[:20])]
    return tabulate(sections, Protocol(min_genes_per_spot=0, spot_mads=0), ["a", "b"])


def targets_of(table: SpotTable, columns: np.ndarray | None = None, train: np.ndarray = TRAIN, **settings: Any) -> Any:
    """Targets of all spots, (spots, columns) float32, as a store gives them."""
    columns = np.arange(len(table.genes)) if columns is None else columns
    rule = fit_targets(table, train, columns, Protocol(**settings))
    every, cpu = np.arange(len(table)), torch.device("cpu")
    store = SpotStore(table, every, columns, sees="position", patch_px=1, patch_um=1, device=cpu, targets=rule)
    return store.expression_of().numpy()


def counts_of(table: SpotTable) -> np.ndarray:
    return table.counts(np.arange(len(table))).toarray().astype(np.float64)


def residuals(counts: np.ndarray, deciding: np.ndarray) -> np.ndarray:
    """The formula in float64."""
    mu = counts.sum(1, keepdims=True) * (counts[deciding].sum(0) / counts[deciding].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = np.nan_to_num((counts - mu) / np.sqrt(mu + mu**2 / THETA), nan=0)
    return np.clip(raw, -np.sqrt(len(deciding)), np.sqrt(len(deciding)))


def test_residuals_are_those_of_scanpy_where_all_spots_decide() -> None:
    table = tabulate([section("a", 40), section("b", 30)], Protocol(min_genes_per_spot=0, spot_mads=0))
    found = targets_of(table, normalisation="pearson_residuals", genes_from="all")
    # scanpy divides 0 by 0 for a gene that nobody has
    expected = AnnData(counts_of(table)[:, 1:])
    scanpy.experimental.pp.normalize_pearson_residuals(expected)
    np.testing.assert_allclose(found[:, 1:], expected.X, rtol=1e-4, atol=1e-5)
    assert (found[:, 0] == 0).all()


def test_residuals_of_training_spots_are_those_of_the_formula(
    table: SpotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = targets_of(table, normalisation="pearson_residuals")
    expected = residuals(counts_of(table), TRAIN)
    expected[60:, 20:] = 0  # section c lacks these genes: constant, whatever the totals are
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    some = np.array([7, 3, 21])
    np.testing.assert_array_equal(targets_of(table, some, normalisation="pearson_residuals"), found[:, some])
    monkeypatch.setattr(module, "_BLOCK", 7)
    np.testing.assert_array_equal(targets_of(table, normalisation="pearson_residuals"), found)


def test_residuals_are_clipped_at_the_root_of_the_number_of_deciding_spots() -> None:
    one = section("a", 40)
    one.counts.X[3, 5] = 5000
    table = tabulate([one], Protocol(min_genes_per_spot=0, spot_mads=0))
    few = targets_of(table, train=np.arange(10, 19), normalisation="pearson_residuals")
    every = targets_of(table, train=np.arange(10, 19), normalisation="pearson_residuals", genes_from="all")
    assert few.max() == 3 and every.max() == np.float32(np.sqrt(40))


def test_a_count_of_a_gene_that_nobody_else_has_is_the_largest_residual() -> None:
    one = section("a", 40)
    one.counts.X[30, 0] = 2
    table = tabulate([one], Protocol(min_genes_per_spot=0, spot_mads=0))
    found = targets_of(table, train=np.arange(9), normalisation="pearson_residuals")
    assert found[30, 0] == 3 and (np.delete(found[:, 0], 30) == 0).all()


@pytest.mark.parametrize("normalisation", ["normalize_total+log1p", "log1p", "pearson_residuals"])
def test_standard_scores_are_those_of_the_training_spots_of_each_section(table: SpotTable, normalisation: Any) -> None:
    plain = targets_of(table, normalisation=normalisation).astype(np.float64)
    scores = targets_of(table, normalisation=normalisation, standardise="section")
    for here, train in ((slice(0, 30), slice(0, 30)), (slice(30, 60), slice(30, 45))):
        mean, deviation = plain[train].mean(0), plain[train].std(0)
        np.testing.assert_allclose(
            scores[here], (plain[here] - mean) / np.where(deviation > 1e-12, deviation, 1), rtol=1e-4, atol=2e-5
        )
    # No training spots: in the units of the others, by 30 and 15 spots.
    mean = (plain[:30].mean(0) * 30 + plain[30:45].mean(0) * 15) / 45
    variance = (plain[:30].var(0) * 30 + plain[30:45].var(0) * 15) / 45
    deviation = np.where(variance > 1e-24, np.sqrt(variance), 1)
    np.testing.assert_allclose(scores[60:], (plain[60:] - mean) / deviation, rtol=1e-4, atol=2e-5)
    assert (scores[:, 0] == 0).all()


def test_standard_scores_leave_correlations_within_a_section(table: SpotTable) -> None:
    plain, scores = (torch.from_numpy(targets_of(table, standardise=s)) for s in ("none", "section"))
    prediction = torch.from_numpy(np.random.default_rng(0).standard_normal(plain.shape))
    for here in (slice(0, 30), slice(30, 60), slice(60, 80)):
        one, two = pearson(prediction[here], plain[here]), pearson(prediction[here], scores[here])
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6, equal_nan=True)
    assert not np.allclose(plain[:60], scores[:60])


@pytest.mark.parametrize("settings", [{"normalisation": "pearson_residuals"}, {"standardise": "section"}], ids=str)
def test_only_training_spots_decide(table: SpotTable, settings: dict[str, Any]) -> None:
    """Counts of other spots change no target of a training spot, unless all spots shall decide."""
    changed = [m.copy() for m in table.matrices]
    for matrix, rows in ((changed[1], slice(15, 30)), (changed[2], slice(0, 20))):
        matrix[rows] = matrix[rows].toarray()[::-1] * 3
    total = np.concatenate([np.asarray(m.sum(1), dtype=np.float64).ravel() for m in changed])
    other = SpotTable(**{**vars(table), "matrices": tuple(changed), "total": total})
    before, after = (targets_of(t, **settings)[TRAIN] for t in (table, other))
    np.testing.assert_array_equal(before, after)
    if "normalisation" in settings:
        before, after = (targets_of(t, **settings, genes_from="all")[TRAIN] for t in (table, other))
        assert not np.allclose(before, after)


def test_a_gene_that_a_section_lacks_does_not_vary_there(table: SpotTable) -> None:
    for settings in ({}, {"normalisation": "pearson_residuals"}, {"standardise": "section"}):
        found = targets_of(table, **settings)
        assert (found[60:, 20:] == found[60, 20:]).all() and found[60:, 1:20].std(0).min() > 0
