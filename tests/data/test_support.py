"""What primary genes rest on: many spots or a few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from agl_bench.data.gene_split import split_genes
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.support import FEW_SPOTS, Support, support_of
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

SPOTS, GENES, VARIABLE = 120, 200, 12
NAMES = [f"G{n:03d}" for n in range(GENES)]
PROTOCOL = Protocol(primary_genes=8, min_genes_per_spot=1, spot_mads=0)
OLD = replace(PROTOCOL, primary_score="seurat", ranking="seurat")
ROWS = np.arange(SPOTS)


def counts() -> np.ndarray:
    """Genes of about four counts a spot; the first twelve follow a gradient."""
    rng = np.random.default_rng(0)
    mean = np.full((SPOTS, GENES), 4.0)
    mean[:, :VARIABLE] *= np.exp(1.5 * np.sin(np.linspace(0, 9, SPOTS)))[:, None]
    return rng.poisson(mean).astype(np.float32)


def found(X: np.ndarray, protocol: Protocol, rows: np.ndarray = ROWS) -> Support:
    table = table_of(X, protocol)
    genes, _ = split_genes(table, rows, protocol)
    return support_of(table, rows, genes, protocol)


def table_of(X: np.ndarray, protocol: Protocol) -> SpotTable:
    data = AnnData(sparse.csr_matrix(X), var=pd.DataFrame(index=NAMES))
    data.obsm["spatial"] = np.stack([np.arange(len(X)) % 11, np.arange(len(X)) // 11], 1).astype(np.float64)
    return tabulate([Section("S", data, 1.0)], protocol)


@pytest.mark.parametrize("score", ["pearson_residuals", "seurat_v3", "moran"])
def test_genes_that_follow_the_tissue_need_no_caution(score: str) -> None:
    support = found(counts(), replace(PROTOCOL, primary_score=score, ranking=score))
    assert (support.genes, support.spots, support.few) == (8, SPOTS, FEW_SPOTS)
    assert support.sentences == [] and not support.rare and not support.carried


@pytest.mark.parametrize(("spots", "value"), [(2, 2000), (3, 40), (3, 300)])
def test_a_gene_that_a_few_spots_carry_is_named(spots: int, value: int) -> None:
    X = counts()
    X[np.arange(spots) * 31 + 5, 150] = value
    support = found(X, PROTOCOL)
    assert list(support.carried) == ["G150"] and support.carried["G150"] < 0.5
    (sentence,) = support.sentences
    assert sentence.startswith(
        f"1 of 8 primary genes owes more than half of its score to 3 of {SPOTS} spots (G150 keeps "
    )
    assert "primary_score" not in sentence  # is the cure already


@pytest.mark.parametrize("thin", [2, 4])
def test_genes_that_thin_spots_carry_are_named_with_the_old_score_and_absent_with_the_new(thin: int) -> None:
    X, rng = counts(), np.random.default_rng(1)
    for spot in range(thin):
        X[spot * 17] = 0
        X[spot * 17, rng.choice(np.arange(VARIABLE, GENES), 6, replace=False)] = 1
    old, new = found(X, OLD), found(X, PROTOCOL)
    assert len(old.carried) >= 3 and "use protocol.primary_score = pearson_residuals" in old.sentences[0]
    assert not new.carried


def test_a_gene_seen_in_few_spots_is_named_with_the_number() -> None:
    X = counts()
    X[:, 20:23] = 0
    X[:4, 20], X[:9, 21], X[:40, 22] = 9, 9, 9
    protocol = replace(PROTOCOL, primary_detection=0.0, primary_genes=15)
    support = found(X, protocol)
    assert {"G020", "G021"} <= set(support.rare) and "G022" not in support.rare
    assert support.rare["G020"] == 4 and next(iter(support.rare)) == "G020"
    assert any("only a few of the 120 spots" in s and "G020 in 4, G021 in 9" in s for s in support.sentences)


def test_genes_that_a_file_names_owe_nothing_to_a_score(tmp_path: Path) -> None:
    X = counts()
    X[:, 150], X[7, 150] = 0, 2000
    listed = tmp_path / "genes.txt"
    listed.write_text("G150\nG001\n")
    support = found(X, replace(PROTOCOL, primary_file=str(listed)))
    assert not support.carried and support.rare == {"G150": 1}
    (sentence,) = support.sentences
    assert sentence.startswith("1 of 2 primary genes is detected in only a few")


def test_only_spots_that_decide_are_looked_at() -> None:
    X = counts()
    X[[95, 100, 110], 150] = 300
    training = np.arange(90)
    assert found(X, PROTOCOL, training).sentences == []
    assert "G150" in found(X, replace(PROTOCOL, genes_from="all"), training).carried


def test_the_table_and_the_genes_stay_as_they_are() -> None:
    table = table_of(counts(), PROTOCOL)
    genes, _ = split_genes(table, ROWS, PROTOCOL)
    before = table.counts(ROWS).toarray()
    support_of(table, ROWS, genes, PROTOCOL)
    np.testing.assert_array_equal(table.counts(ROWS).toarray(), before)


def test_few_is_a_hundredth_of_many_spots_and_names_are_cut() -> None:
    X = np.tile(counts(), (5, 1))
    support = found(X, PROTOCOL, np.arange(600))
    assert support.few == 6
    many = replace(support, carried={f"A{n}": 0.1 for n in range(9)})
    assert "A4 keeps 10% …)" in many.sentences[0]
