"""From sections to one normalised table, against scanpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData
from scipy import sparse

from agl_bench.data.preprocess import SpotTable, deep_enough, panel, tabulate
from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

EVERY_SPOT = Protocol(min_genes_per_spot=0, spot_mads=0)


def section(name: str, genes: str, spots: int = 12, *, mean: float = 2.0, form: type = sparse.csr_matrix) -> Section:
    """Poisson counts; one gene for each letter."""
    rng = np.random.default_rng(sum(map(ord, name)))
    counts = AnnData(form(rng.poisson(mean, (spots, len(genes))).astype(np.float32)))
    counts.var_names = list(genes)
    counts.obs_names = [f"{name}{i}" for i in range(spots)]
    counts.obsm["spatial"] = rng.uniform(0, 100, (spots, 2))
    return Section(name, counts, um_per_px=0.5)


def dense(table: SpotTable) -> np.ndarray:
    return table.rows(np.arange(len(table))).toarray()


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("normalisation", ["normalize_total+log1p", "log1p"])
def test_normalisation_is_that_of_scanpy(normalisation: str, form: type) -> None:
    one = section("S", "ABCDEFGH", form=form)
    before = np.array(one.counts.to_df())
    table = tabulate([one], Protocol(min_genes_per_spot=1, normalisation=normalisation))
    expected = AnnData(before.copy())
    if normalisation != "log1p":
        scanpy.pp.normalize_total(expected, target_sum=1e4)
    scanpy.pp.log1p(expected)
    rows = table.rows(np.arange(len(table)))
    assert rows.dtype == np.float32 and sparse.issparse(rows)
    np.testing.assert_allclose(dense(table), expected.X, rtol=1e-6)
    np.testing.assert_array_equal(one.counts.to_df(), before)  # the section stays as measured


def test_each_spot_sums_to_ten_thousand() -> None:
    table = tabulate([section("S", "ABCDEFGH")], EVERY_SPOT)
    np.testing.assert_allclose(np.expm1(dense(table).astype(np.float64)).sum(1), 1e4, rtol=1e-5)


def test_a_spot_does_not_depend_on_other_spots() -> None:
    one = section("S", "ABCDEFGH")
    part = Section("S", one.counts[3:5].copy(), 0.5)
    np.testing.assert_array_equal(dense(tabulate([one], EVERY_SPOT))[3:5], dense(tabulate([part], EVERY_SPOT)))


def test_common_genes_in_the_order_of_the_first_section() -> None:
    one, two = section("one", "DXBAC"), section("two", "ABCDE", spots=5)
    table = tabulate([one, two], Protocol(min_genes_per_spot=0, spot_mads=0, normalisation="log1p"))
    assert table.genes == ("D", "B", "A", "C") and len(table) == 17
    expected = np.concatenate([np.log1p(s.counts.to_df()[list("DBAC")]) for s in (one, two)])
    np.testing.assert_allclose(dense(table), expected, rtol=1e-6)
    assert table.section.tolist() == [0] * 12 + [1] * 5
    assert table.source_row.tolist() == [*range(12), *range(5)]
    assert table.position.dtype == np.float32
    places = np.concatenate([s.counts.obsm["spatial"] for s in (one, two)])
    np.testing.assert_allclose(table.position, places * 0.5, rtol=1e-6)


def test_size_normalisation_counts_common_genes_only() -> None:
    one, two = section("one", "DXBAC"), section("two", "ABCDE")
    table = tabulate([one, two], EVERY_SPOT)
    np.testing.assert_allclose(np.expm1(dense(table).astype(np.float64)).sum(1), 1e4, rtol=1e-5)


def test_spots_with_few_genes_are_dropped_and_counted() -> None:
    one, two = section("one", "ABCDEF", mean=1), section("two", "FEDCBAZ", mean=1)
    two.dropped_spots = 3  # by the reader
    protocol = Protocol(min_genes_per_spot=4)
    table = tabulate([one, two], protocol)
    detected = [(s.counts.to_df()[list("ABCDEF")] > 0).sum(1).to_numpy() for s in (one, two)]  # Z is not common
    kept = [np.flatnonzero(d >= 4) for d in detected]
    assert all(0 < len(k) < 12 for k in kept)
    np.testing.assert_array_equal(table.source_row, np.concatenate(kept))
    assert table.dropped_spots == 24 - len(table) + 3
    assert len(table) == len(dense(table)) == len(table.position) == len(table.total)


def test_an_empty_spot_stays_zero() -> None:
    one = section("S", "ABC")
    one.counts.X[2] = 0
    table = tabulate([one], EVERY_SPOT)
    assert (dense(table)[2] == 0).all() and np.isfinite(dense(table)).all()


def test_no_common_gene() -> None:
    with pytest.raises(BadSpec, match="sections one, two, three have no gene in common"):
        tabulate([section("one", "ABC"), section("two", "BCD"), section("three", "XYZ")], EVERY_SPOT)


def test_a_section_without_a_usable_spot_is_named() -> None:
    with pytest.raises(
        BadSection, match=r"section 'two': no spot has 4 detected genes among the 6 of the panel.*; lower protocol\.min"
    ):
        tabulate([section("one", "ABCDEF", mean=9), section("two", "ABCDEF", mean=0)], Protocol(min_genes_per_spot=4))


# ---- the panel ------------------------------------------------------------------------------------------------------


def test_the_panel_is_that_of_the_sections_that_decide() -> None:
    sections = [section("test", "AXB"), section("one", "DXBAC"), section("two", "ABCDE")]
    protocol = Protocol(min_genes_per_spot=0, spot_mads=0, normalisation="log1p")
    table = tabulate(sections, protocol, ["one", "two"])
    assert table.genes == ("D", "B", "A", "C") == panel(sections, ["one", "two"])
    expected = np.zeros((12, 4), dtype=np.float32)
    expected[:, [1, 2]] = np.log1p(sections[0].counts.to_df()[["B", "A"]])
    np.testing.assert_array_equal(dense(table)[:12], expected)  # no X, and zeros for D and C
    assert table.source_columns.tolist() == [[-1, 2, 0, -1], [0, 2, 3, 4], [3, 1, 0, 2]]
    assert panel(sections) == ("A", "B") == tabulate(sections, protocol).genes


def test_training_spots_do_not_depend_on_the_genes_of_other_sections() -> None:
    one, two = section("one", "DXBAC"), section("two", "ABCDE")
    tables = [tabulate([one, section("test", g), two], EVERY_SPOT, ["one", "two"]) for g in ("ABCDE", "BZ", "EDCBAXYZ")]
    assert {t.genes for t in tables} == {("D", "B", "A", "C")}
    for table in tables:
        trained = np.flatnonzero(table.section != 1)
        np.testing.assert_array_equal(dense(table)[trained], dense(tables[0])[trained])


def test_a_section_with_too_little_of_the_panel_is_named() -> None:
    sections = [section("one", "ABCDEF", mean=9), section("test", "AXYZ", mean=9)]
    with pytest.raises(BadSection, match="section 'test': no spot has 4 detected genes among the 1 of the panel"):
        tabulate(sections, Protocol(min_genes_per_spot=4), ["one"])


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_asked_for() -> None:
    sections = [section("one", "DXBAC"), section("two", "ABCDE", spots=5)]
    table = tabulate(sections, EVERY_SPOT)
    rng = np.random.default_rng(0)
    for rows in (rng.permutation(17), rng.integers(0, 17, 40), np.array([16, 0]), np.array([3]), np.arange(0)):
        for columns in (None, np.array([2, 0]), np.array([1]), np.arange(0)):
            expected, counts = dense(table)[rows], table.counts(np.arange(17)).toarray()[rows]
            if columns is not None:
                expected, counts = expected[:, columns], counts[:, columns]
            np.testing.assert_array_equal(table.rows(rows, columns).toarray(), expected)
            np.testing.assert_array_equal(table.counts(rows, columns).toarray(), counts)
    np.testing.assert_array_equal(
        table.lengths(np.array([2, 16, 2])), [sections[i].counts.X[r].nnz for i, r in ((0, 2), (1, 4), (0, 2))]
    )
    np.testing.assert_array_equal(table.total, table.counts(np.arange(17)).toarray().sum(1))


def test_counts_stay_where_they_are(tmp_path: Path) -> None:
    """Nothing is copied of counts that are memory-mapped, and nothing is written to them."""
    one = section("one", "ABCDEFGH", spots=40)
    expected, arrays = dense(tabulate([one], EVERY_SPOT)), []
    for name in ("data", "indices", "indptr"):
        np.save(tmp_path / f"{name}.npy", getattr(one.counts.X, name))
        arrays.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    one.counts.X = sparse.csr_matrix(tuple(arrays), shape=one.counts.shape)
    table = tabulate([one], EVERY_SPOT)
    for name, array in zip(("data", "indices", "indptr"), arrays, strict=True):
        assert np.shares_memory(getattr(table.matrices[0], name), array)
    np.testing.assert_array_equal(dense(table), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float64])
def test_counts_of_any_type_are_the_same(dtype: type) -> None:
    one = section("one", "ABCDEFGH")
    expected = dense(tabulate([one], EVERY_SPOT))
    one.counts.X = one.counts.X.astype(dtype)
    found = tabulate([one], EVERY_SPOT)
    np.testing.assert_array_equal(dense(found), expected)
    assert found.rows(np.arange(3)).dtype == found.counts(np.arange(3)).dtype == np.float32


# ---- thin spots -----------------------------------------------------------------------------------------------------

DEEP = (90, 100, 104, 110, 118, 120, 125, 130, 140, 150, 160)  # detected genes of ordinary spots


def by_hand(detected: np.ndarray, mads: float) -> np.ndarray:
    depth = np.log(detected)
    spread = 1.4826022185056018 * np.median(abs(depth - np.median(depth)))
    return depth < np.median(depth) - mads * spread


@pytest.mark.parametrize("thin", [(7,), (6, 9, 30), (20, 20)])
@pytest.mark.parametrize("mads", [3, 5])
def test_a_spot_far_below_its_section_is_thin(thin: tuple[int, ...], mads: float) -> None:
    detected = np.array([*DEEP, *thin, *DEEP], dtype=np.float64)
    kept = deep_enough(detected, Protocol(min_genes_per_spot=5, spot_mads=mads))
    np.testing.assert_array_equal(kept, np.flatnonzero(~by_hand(detected, mads)))
    assert set(kept) == set(np.flatnonzero(detected >= 90))


def test_debris_under_the_floor_moves_no_median() -> None:
    detected = np.array([1] * 30 + list(DEEP) + [20], dtype=np.float64)
    kept = deep_enough(detected, Protocol(min_genes_per_spot=10))
    np.testing.assert_array_equal(kept, np.arange(30, 41))


@pytest.mark.parametrize("detected", [[10] * 9 + [9], [10] * 9 + [5], [100] * 3 + [99, 60, 50]])
def test_where_spots_are_alike_the_half_of_the_median_is_enough(detected: list[int]) -> None:
    assert len(deep_enough(np.array(detected, dtype=np.float64), Protocol(min_genes_per_spot=1))) == len(detected)
    assert len(deep_enough(np.array([*detected, 2], dtype=np.float64), Protocol(min_genes_per_spot=1))) == len(detected)


def test_deep_spots_are_never_left_out_and_zero_switches_it_off() -> None:
    detected = np.array([*DEEP, 100_000, 8], dtype=np.float64)
    np.testing.assert_array_equal(deep_enough(detected, Protocol(min_genes_per_spot=5)), np.arange(12))
    np.testing.assert_array_equal(deep_enough(detected, Protocol(min_genes_per_spot=5, spot_mads=0)), np.arange(13))


def test_each_section_has_a_threshold_of_its_own() -> None:
    """A section with few genes loses no spot to a section with many."""
    genes = [f"g{n}" for n in range(200)]
    rich, poor = (np.tile(np.arange(200) < 150, (8, 1)), np.tile(np.arange(200) < 20, (8, 1)))
    rich[0] = poor[0]
    sections = []
    for name, X in (("rich", rich), ("poor", poor)):
        table = AnnData(X.astype(np.float32), var=pd.DataFrame(index=genes))
        table.obsm["spatial"] = np.zeros((8, 2))
        sections.append(Section(name, table, 1.0))
    table = tabulate(sections, Protocol(min_genes_per_spot=1))
    assert table.section.tolist() == [0] * 7 + [1] * 8
    assert table.source_row.tolist() == [*range(1, 8), *range(8)]
    assert table.dropped_spots == 1


def test_only_numbers_of_detected_genes_decide() -> None:
    """Other genes and other counts in every spot change nothing, as long as as many are detected."""
    rng = np.random.default_rng(0)
    X = (rng.random((40, 300)) < rng.uniform(0.01, 0.9, (40, 1))).astype(np.float32)
    rows = []
    for counts in (X, rng.permuted(X, axis=1), X * rng.integers(1, 9, X.shape)):
        table = AnnData(counts.astype(np.float32), var=pd.DataFrame(index=[f"g{n}" for n in range(300)]))
        table.obsm["spatial"] = np.zeros((40, 2))
        rows.append(tabulate([Section("S", table, 1.0)], Protocol(min_genes_per_spot=1)).source_row.tolist())
    assert rows[0] == rows[1] == rows[2] and 20 < len(rows[0]) < 40
