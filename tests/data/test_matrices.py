"""Counts in every type and layout that AnnData may hold: the right numbers come out, or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from agl_bench import BadSection, Section
from agl_bench.bench.describe import umi_of
from agl_bench.data.check import check_section, problems
from agl_bench.data.fingerprint import section_fingerprint
from agl_bench.data.prepared import SectionCache
from agl_bench.data.preprocess import canonical
from agl_bench.digests import FileDigests

COUNTS = np.array([[0, 3, 100], [7, 0, 0], [1, 1, 2], [0, 90, 5]], dtype=np.int64)
POSITIONS = np.array([[0.0, 0], [100, 0], [0, 100], [100, 100]])


def section(X: Any) -> Section:
    table = anndata.AnnData(np.zeros(COUNTS.shape, dtype=np.int32), obsm={"spatial": POSITIONS})
    table.X = X
    return Section("S1", table, 1.0)


def dense(kind: str) -> Any:
    return COUNTS.astype(kind)


def unsorted(X: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    for start, end in zip(X.indptr, X.indptr[1:], strict=False):
        X.data[start:end], X.indices[start:end] = X.data[start:end][::-1].copy(), X.indices[start:end][::-1].copy()
    X.has_sorted_indices = X.has_canonical_format = False
    return X


def in_parts(kind: str) -> scipy.sparse.csr_matrix:
    X = scipy.sparse.csr_matrix(COUNTS)
    data = np.stack([X.data - X.data // 2, X.data // 2], 1).ravel().astype(kind)
    return scipy.sparse.csr_matrix((data, np.repeat(X.indices, 2), X.indptr * 2), shape=X.shape)


def with_zeros() -> scipy.sparse.csr_matrix:
    X = scipy.sparse.csr_matrix(COUNTS + 1)
    X.data -= 1
    return X


def big_endian(layout: Any) -> Any:
    X = layout(COUNTS.astype(np.int32))
    X.data = X.data.astype(">i4")
    return X


LAYOUTS = {
    **{f"dense {kind}": dense(kind) for kind in ("int8", "uint8", "uint64", "float16", "float64", "longdouble", ">i4")},
    "fortran": np.asfortranarray(COUNTS),
    "csr": scipy.sparse.csr_matrix(COUNTS),
    "csr_array": scipy.sparse.csr_array(COUNTS),
    "csc": scipy.sparse.csc_matrix(COUNTS.astype(np.uint16)),
    "big-endian csr": big_endian(scipy.sparse.csr_matrix),
    "big-endian csc": big_endian(scipy.sparse.csc_matrix),
    "unsorted": unsorted(scipy.sparse.csr_matrix(COUNTS)),
    "explicit zeros": with_zeros(),
    **{f"in parts {kind}": in_parts(kind) for kind in ("int8", "uint8", "uint16", "int64", "float32")},
    "a view": anndata.AnnData(np.repeat(COUNTS, 2, axis=0))[::2].X,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_counts_of_every_layout(layout: str, tmp_path: Path) -> None:
    held = section(LAYOUTS[layout])
    check_section(held)
    np.testing.assert_array_equal(canonical(held.counts.X).toarray(), COUNTS)
    np.testing.assert_array_equal(umi_of(held), COUNTS.sum(axis=1))
    assert section_fingerprint(held) == section_fingerprint(section(COUNTS))
    cache = SectionCache(tmp_path, FileDigests(tmp_path / "files.json"), print)
    np.testing.assert_array_equal(cache.section("key", lambda: held).counts.X.toarray(), COUNTS)


def test_parts_whose_sum_leaves_their_type() -> None:
    X = scipy.sparse.csr_matrix((np.full(3, 200, dtype=np.uint8), [1, 1, 1], [0, 3]), shape=(1, 2))
    assert canonical(X).toarray().tolist() == [[0, 600]]
    twice = scipy.sparse.csr_matrix((np.ones(2, dtype=bool), [1, 1], [0, 2]), shape=(1, 2))
    assert canonical(twice).toarray().tolist() == [[0, 2]]
    assert X.nnz == 3  # the section stays as measured


def counted(value: float, kind: Any, most: int = 100) -> np.ndarray:
    X = np.minimum(COUNTS, most).astype(kind)
    X[1, 2] = value
    return X


@pytest.mark.parametrize(
    ("X", "has_counts", "message"),
    [
        (counted(2**53 + 2, np.int64), True, "gene '2' is 9007199254740994; no spot holds that many"),
        (counted(2**63, np.uint64), True, "no spot holds that many"),
        (counted(1e20, np.float32), True, "no spot holds that many"),
        (counted(3000, np.float16), True, "is 3000; float16 holds whole numbers only up to 2,048; write the counts as"),
        (counted(np.inf, np.float16), True, "is inf; raw counts are finite"),
        (COUNTS * 25.0, False, "is 75; the logarithm of a scaled count is at most 32: .* give ln"),
        (COUNTS, False, "is 100; the logarithm of a scaled count is at most 32"),
        (counted(1e300, np.float64, 9), False, "is 1e.300; the logarithm"),
        (np.log1p(COUNTS) - 1, False, "values have to be finite and ≥ 0"),
        (counted(np.inf, np.float32, 9), False, "values have to be finite and ≥ 0"),
    ],
)
def test_values_that_are_none(X: np.ndarray, has_counts: bool, message: str) -> None:
    with pytest.raises(BadSection, match=message):
        check_section(section(X), has_counts=has_counts)


def test_large_counts_and_logarithms_that_are_sound() -> None:
    for value in (2**24 + 1, 2**31 + 1):
        check_section(section(counted(value, np.int64)))
        assert canonical(counted(value, np.int64)).max() == value
    check_section(section(np.log2(COUNTS * 1e6 + 1)), has_counts=False)


def test_a_sparse_matrix_that_points_beyond_its_genes() -> None:
    X = scipy.sparse.csr_matrix(COUNTS)
    X.indices[2] = 1_000_000
    with pytest.raises(BadSection, match=r"counts\.X is not a valid sparse matrix .* write the file again"):
        check_section(section(X))


@pytest.mark.parametrize("names", [["a", "", "c"], ["a", None, "c"], ["a", np.nan, "c"]])
def test_genes_without_a_name(names: list[Any]) -> None:
    held = section(COUNTS)
    held.counts.var.index = names
    assert next(problems(held)).startswith("gene number 2 has no name (1 genes); give each")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["x", "y"], ""),
        (["y", "x"], "is a table whose columns are not x, y"),
        (["a", "b"], "none of which name pixel positions"),
    ],
)
def test_positions_as_a_table_that_a_reader_gives(columns: list[str], message: str) -> None:
    held = section(COUNTS)
    held.counts.obsm["spatial"] = pd.DataFrame(POSITIONS, columns=columns, index=held.counts.obs_names)
    found = list(problems(held))
    assert [message in found[0]] == [True] if message else not found
