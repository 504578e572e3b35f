"""Symbols that stand for different genes in different sections."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from agl_bench import Section
from agl_bench.cli import main
from agl_bench.data.folds import partly_known
from agl_bench.data.gene_ids import ids_of, name_by_id, tell_apart
from agl_bench.data.preprocess import panel

E1, E2, E3, E4 = (f"ENSG{number:011d}" for number in range(1, 5))


def section(name: str, *genes: tuple[str, str], column: str = "gene_ids") -> Section:
    symbols, ids = zip(*genes, strict=True)
    var = pd.DataFrame({column: list(ids)}, index=list(symbols))
    return Section(name, anndata.AnnData(np.ones((2, len(genes)), dtype=np.int32), var=var), 1.0)


def test_sections_that_agree_stay_as_they_are() -> None:
    one = section("one", ("ABC", E1), ("ABC-1", E2), ("D", E3))
    other = section("other", ("D", f"{E3}.7"), ("ABC", E1), ("X", E4), ("ABC-1", ""))
    unknown = section("unknown", ("ABC", "ABC"), ("D", "D"))
    assert tell_apart([one, other, unknown]) == ""
    assert list(one.counts.var_names) == ["ABC", "ABC-1", "D"]
    assert panel([one, other, unknown]) == ("ABC", "D")


def test_repeated_symbols_in_another_order() -> None:
    one = section("one", ("ABC", E1), ("ABC-1", E2), ("D", E3))
    other = section("other", ("ABC", E2), ("ABC-1", E1), ("D", E3))
    said = tell_apart([one, other])
    assert said.startswith("2 gene symbols stand for different genes in different sections (e.g. 'ABC' is")
    assert f"{E1} in 'one' and {E2} in 'other'" in said and "2 genes are named by their Ensembl ids" in said
    assert list(one.counts.var_names) == [E1, E2, "D"] and list(other.counts.var_names) == [E2, E1, "D"]
    assert panel([one, other]) == (E1, E2, "D")
    assert tell_apart([one, other]) == ""  # they have been


def test_a_symbol_that_another_reference_gives_to_another_gene() -> None:
    one = section("one", ("ABC", E1), ("D", E3))
    other = section("other", ("ABC", E2), ("D", E3), column="Ensembl_ID")
    third = section("third", ("OLD", E2), ("D", E3))
    assert tell_apart([one, other, third]).startswith(
        "1 gene symbol stands for different genes in different sections ('ABC' is"
    )
    assert panel([one, other, third]) == ("D",)
    assert panel([other, third]) == (E2, "D")  # under two symbols, one gene
    name_by_id(third.counts, {E3})
    assert list(third.counts.var_names) == [E2, E3]


def test_what_is_no_id() -> None:
    assert ids_of(section("s", ("A", "A"), ("B", "B")).counts) is None
    assert ids_of(section("s", ("A", E1), column="chromosome").counts) is None
    assert list(ids_of(section("s", ("A", E1), ("B", E2), ("C", E1), ("D", "nan")).counts)) == ["", E2, "", ""]
    missing = section("s", ("A", E1), ("B", E2))
    missing.counts.var["gene_ids"] = pd.Categorical([E1, None])
    assert list(ids_of(missing.counts)) == [E1, ""]


def test_donors_of_some_sections() -> None:
    assert partly_known({"a": "P1", "b": "P2"}) == partly_known({"a": "", "b": ""}) == ""
    said = partly_known({"a": "P1", "b": "", "c": "", "d": "", "e": ""})
    assert said.startswith("donors are known for only some sections (not for b, c, d, …), so sections are left")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Two sections that give two symbols to each other's gene, and of which one says whom it is from."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.divmod(np.arange(36), 6), 1) * 100.0 + 60
    for name, ids in (("s0", [E1, E2]), ("s1", [E2, E1])):
        var = pd.DataFrame({"gene_ids": ids + [f"ENSG{90 + g:011d}" for g in range(10)]})
        var.index = ["ABC", "ABC-1", *(f"G{g}" for g in range(10))]
        counts = rng.poisson(5, (36, 12)).astype(np.int32)
        counts[:, ids.index(E2)] += 100  # the same gene has many counts in both
        table = anndata.AnnData(scipy.sparse.csr_matrix(counts), var=var, obsm={"spatial": xy}, uns={"um_per_px": 1.0})
        table.obs_names = [f"spot{spot}" for spot in range(36)]
        if name == "s0":
            table.uns["donor"] = "P1"
        (tmp_path / name).mkdir()
        table.write_h5ad(tmp_path / name / "counts.h5ad")
        pixels = rng.integers(60, 220, (720, 720, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "image.png")
    return tmp_path


def test_commands_say_it(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert not end.value.code
        return " ".join("".join(capsys.readouterr()).split())

    apart = (
        f"2 gene symbols stand for different genes in different sections (e.g. 'ABC' is {E1} in 's0' and {E2} in 's1')"
    )
    donors = "donors are known for only some sections (not for s1), so sections are left out one by one"
    said = run("validate", str(mine))
    assert apart in said and donors in said
    said = run("describe", f"folder:{mine}", "--work", str(tmp_path / "w"))
    assert apart in said and donors in said
    small = ("primary_genes=3", "min_genes_per_spot=3", "folds=2", "buffer_um=0")
    settings = [word for setting in small for word in ("--set", f"protocol.{setting}")]
    said = run("folds", f"folder:{mine}", "--preset", "smoke", *settings)
    assert said.count(apart) == 1 and said.count(donors) == 1
