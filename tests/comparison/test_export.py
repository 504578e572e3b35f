"""A section with what the selectors made of it, as scanpy reads and draws it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scanpy as sc

from agl_bench.bench.cells import CellStore
from agl_bench.bench.prepare import Preparation
from agl_bench.cli import main
from agl_bench.comparison.export import export_section, write_h5ad
from agl_bench.comparison.gather import gather
from agl_bench.digests import read_signed, signed
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.synthetic import Synthetic

matplotlib.use("agg")
GRID = (
    *("--datasets", "synthetic", "--preset", "smoke", "--device", "cpu", "--tracking", "none"),
    *("--set", "synthetic.sections=2", "--set", "synthetic.spots=40", "--set", "synthetic.markers=5"),
    *("--set", "synthetic.helpful_genes=25", "--set", "synthetic.harmful_genes=20", "--set", "synthetic.patch_px=16"),
    *("--set", "synthetic.useless_genes=30", "--set", "tiny.patch_px=16", "--set", "tiny.channels=8"),
    *("--set", "protocol.primary_genes=5", "--set", "protocol.min_genes_per_spot=5", "--set", "protocol.buffer_um=0"),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two selectors, both evaluations, two seeds."""
    work = tmp_path_factory.mktemp("export") / "work"
    words = [*GRID, "--selectors", "agl,hvg_k", "--set", "hvg_k.k=20", "--seeds", "0,1", "--work", str(work)]
    with pytest.raises(SystemExit) as caught:
        main(["run", *words])
    assert not caught.value.code
    return work


@pytest.fixture
def make(work, tmp_path):
    """Export a section; returns the AnnData and what was warned of."""
    said: list[str] = []

    def make(section="S1", *, store=None, seeds=(), **place):
        gathered = gather(store or CellStore(work))
        prepared = Preparation(Path(os.devnull), tmp_path / "cache")
        place = {"dataset": "synthetic", "evaluation": "intra"} | place
        plugins = Plugins.discover(strict=True)
        data = export_section(gathered, plugins, prepared, place=place, section=section, seeds=seeds, warn=said.append)
        return data, said

    return make


def cells_of(work, selector, fold, evaluation="intra"):
    return [
        r
        for r in CellStore(work)
        if (r.spec.selector.name, r.spec.evaluation) == (selector, evaluation) and r.spec.fold in fold
    ]


def test_counts_and_places_are_as_read(make) -> None:
    data, said = make()
    read = Synthetic(
        sections=2, spots=40, markers=5, helpful_genes=25, harmful_genes=20, useless_genes=30, patch_px=16
    ).read(Path(os.devnull), "S1")
    assert said == []
    assert data.var_names.equals(read.counts.var_names) and data.obs_names.equals(read.counts.obs_names)
    assert (data.X != read.counts.X).sum() == 0
    np.testing.assert_array_equal(data.obsm["spatial"], read.counts.obsm["spatial"])


def test_weights_are_means_over_folds_and_seeds(make, work) -> None:
    data, _ = make()
    for selector in ("agl", "hvg_k"):
        tables = [r.genes.set_index("gene") for r in cells_of(work, selector, ("S1.0", "S1.1"))]
        assert len(tables) == 4
        for gene in data.var_names:
            there = [t.loc[gene] for t in tables if gene in t.index]
            weight = data.var.loc[gene, f"agl_weight_{selector}"]
            if not there:
                assert np.isnan(weight)
                continue
            assert weight == pytest.approx(np.mean([t["weight"] for t in there]), rel=1e-6)
            free = [t["weight"] > 0.6 for t in there if not t["primary"]]
            assert data.var.loc[gene, f"agl_selected_{selector}"] == (2 * sum(free) > len(free))
            assert not any(t["primary"] for t in there) or data.var.loc[gene, "agl_primary"]
    assert 0 < data.var["agl_selected_hvg_k"].sum() < data.var["agl_selected_agl"].sum()


def test_predictions_are_those_of_the_test_spots(make, work) -> None:
    data, _ = make(seeds=[1])
    store = CellStore(work)
    expected = np.full(data.shape, np.nan)
    for result in cells_of(work, "agl", ("S1.0", "S1.1")):
        if result.spec.seed == 1:
            kept, primary = store.predictions(result.spec.key), result.genes.query("primary").set_index("gene")
            for gene, row in primary.iterrows():
                values = kept[f"predicted:{gene}"] * row["slope"] + row["offset"]
                expected[data.obs_names.get_indexer(kept["spot"]), data.var_names.get_loc(gene)] = values
    layer = data.layers["agl_predicted_agl"]
    assert layer.dtype == np.float32
    np.testing.assert_allclose(layer, expected, rtol=1e-5, atol=1e-6)
    tested = np.isfinite(layer).any(axis=1)
    assert tested.all()  # every spot is tested once
    assert np.isfinite(layer).any(axis=0).sum() == data.var["agl_primary"].sum()
    both, one = make()[0].layers["agl_predicted_agl"], make(seeds=[0])[0].layers["agl_predicted_agl"]
    twice = np.isfinite(one) & np.isfinite(layer)
    np.testing.assert_allclose(both[twice], (one[twice] + layer[twice]) / 2, rtol=1e-4, atol=1e-5)


def test_inter_takes_the_fold_that_leaves_the_section_out(make) -> None:
    data, _ = make("S2", evaluation="inter")
    known = data.uns["agl_bench"]
    fold = {f for s in known["selectors"].values() for f in s["cells"]["fold"]}
    assert fold == {"D2"} and known["place"]["evaluation"] == "inter"


def test_scanpy_reads_and_draws_it(work, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("AGL_BENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "s1.h5ad"
    with pytest.raises(SystemExit) as caught:
        main(["export", str(file), "--dataset", "synthetic", "--section", "S1", "--work", str(work)])
    said = capsys.readouterr()
    assert not caught.value.code and said.err == ""
    assert "40 spots" in said.out and "agl (4 cells), hvg_k (4 cells)" in said.out
    assert [p.name for p in tmp_path.glob("*s1*")] == ["s1.h5ad"]
    data = sc.read_h5ad(file)
    known = data.uns["agl_bench"]
    assert known["section"] == "S1" and set(known["selectors"]) == {"agl", "hvg_k"}
    assert json.loads(known["selectors"]["hvg_k"]["spec"])["selector"]["settings"]["k"] == 20
    assert known["selectors"]["agl"]["cells"]["pcc"].mean() == pytest.approx(known["selectors"]["agl"]["pcc"])
    gene = data.var_names[np.isfinite(data.layers["agl_predicted_agl"]).sum(0).argmax()]
    axes = sc.pl.embedding(data, "spatial", color=gene, layer="agl_predicted_agl", show=False)
    assert len(axes.collections[0].get_offsets()) > 0
    matplotlib.pyplot.close(axes.figure)


def test_cells_without_predictions_give_weights_and_say_so(make, work, tmp_path) -> None:
    other = CellStore(tmp_path / "other")
    store = CellStore(work)
    for result in store:
        bare = result.spec.selector.name == "agl" and result.spec.seed == 1
        other.write(replace(result, predictions=None if bare else store.predictions(result.spec.key)))
    data, said = make(store=other)
    assert list(data.layers) == ["agl_predicted_hvg_k"] and "agl_weight_agl" in data.var
    (sentence,) = said
    assert sentence.startswith("agl: no predictions, since 2 of 4 cells have kept none; `agl-bench rerun ")


def test_what_cannot_be_exported(make, work, tmp_path) -> None:
    for words, match in (
        ({"dataset": "nothing"}, "unknown dataset 'nothing'"),
        ({"backbone": "nothing"}, "unknown backbone 'nothing'"),
        ({"preset": "clean"}, "unknown preset 'clean'"),
        ({"section": "S9"}, "unknown section of 'synthetic' 'S9'"),
        ({"seeds": [7]}, "unknown seed '7'"),
    ):
        with pytest.raises(UnknownName, match=match):
            make(**words)
    with pytest.raises(BadSpec, match="has no finished cell to export"):
        make(store=CellStore(tmp_path / "empty"))
    few = CellStore(tmp_path / "few")
    few.write(cells_of(work, "agl", ("S2.0",))[0])
    with pytest.raises(BadSpec, match=r"no finished cell tests section 'S1' .*S1.0, S1.1; run them first"):
        make(store=few)
    (cell,) = few.cells.iterdir()
    content = read_signed(cell / "result.json")
    content["spec"]["data"] = "0123"
    (cell / "result.json").write_text(json.dumps(signed(content)))
    with pytest.raises(BadSpec, match="the files of dataset 'synthetic' have changed"):
        make(store=few)


def test_two_presets_are_not_mixed(make, work, tmp_path) -> None:
    both = CellStore(tmp_path / "both")
    result = cells_of(work, "agl", ("S1.0",))[0]
    both.write(result)
    longer = replace(result.spec.protocol, epochs=result.spec.protocol.epochs + 1)
    both.write(replace(result, spec=replace(result.spec, protocol=longer, preset="smoke with protocol.epochs=9")))
    with pytest.raises(BadSpec, match=r"several presets, choose by --preset: .*smoke with protocol.epochs=9"):
        make(store=both)
    data, _ = make(store=both, preset="smoke with protocol.epochs=9")
    assert data.uns["agl_bench"]["place"]["preset"] == "smoke with protocol.epochs=9"


def test_a_file_is_whole_or_not_there(make, tmp_path, monkeypatch) -> None:
    data, _ = make()

    def full(self, _):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_h5ad(data, tmp_path / "one.h5ad")
    assert list(tmp_path.glob("*h5ad*")) == []


def test_words_that_a_stranger_gets_wrong(work, capsys) -> None:
    for words, match in (
        (["out.txt", "--section", "S1"], "out.txt does not end in .h5ad"),
        (["nowhere/out.h5ad", "--section", "S1"], "nowhere/out.h5ad cannot be written"),
        (["out.h5ad", "--section", "S9"], "unknown section of 'synthetic' 'S9'. Did you mean 'S"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["export", *words, "--dataset", "synthetic", "--work", str(work)])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.count("\n") == 1 and match in err
