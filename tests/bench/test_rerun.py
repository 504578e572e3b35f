"""A cell made twice: the same, or with every difference named; the kept result stays."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.prepare import Preparation
from agl_bench.bench.rerun import compare, prepare_repetition, repeat
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.cli import main
from agl_bench.digests import read_signed, signed
from agl_bench.errors import BadSpec
from agl_bench.registry.plugins import Plugins

MINE = """
    from agl_bench import Selector, hookimpl

    class Mine(Selector):
        '''Mine alone.'''
        reference = "test"

        def forward(self, losses, step):
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {"mine": Mine}
"""


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    work = tmp_path_factory.mktemp("rerun") / "work"
    run(work, "dkgsb", fold=["D1"], keep="nothing")
    return work


@pytest.fixture
def work(made, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def key(work):
    (path,) = (work / "cells").iterdir()
    return path.name


@pytest.fixture
def agl(capsys, monkeypatch, tmp_path):
    """Run `agl-bench rerun`; returns its status, what it said and its complaint."""
    monkeypatch.setenv("AGL_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def agl(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["rerun", *map(str, words)])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    return agl


def change(work, key, edit):
    """Edit what a cell says of itself."""
    path = work / "cells" / key / "result.json"
    content = read_signed(path)
    edit(content)
    path.write_text(json.dumps(signed(content)))


def test_the_same_cell_is_the_same(agl, work, key) -> None:
    before = (work / "cells" / key / "result.json").read_bytes()
    status, out, err = agl(key[:6], "--work", work)
    assert (status, err) == (0, "")
    assert "the conditions are the same" in out and "The result is the same bit for bit." in out
    assert (work / "cells" / key / "result.json").read_bytes() == before
    assert CellStore(work).kept(key) == frozenset()


def test_what_is_kept_is_added_to_a_cell_that_is_the_same(agl, work, key) -> None:
    before = CellStore(work).read(key)
    for keep, kept in (("model", {"predictions", "model"}), ("predictions", {"predictions", "model"})):
        status, out, _ = agl(key, "--work", work, "--keep", keep)
        assert status == 0 and "The kept cell has its predictions" in out
        store = CellStore(work)
        assert store.kept(key) == kept
        after = store.read(key)
        assert (after.scores, after.cost, after.provenance) == (before.scores, before.cost, before.provenance)
    assert len(store.predictions(key)) == before.counts["test_spots"] and store.model(key).genes


def test_a_result_of_an_older_version_gets_the_columns_that_it_lacks(agl, work, key) -> None:
    store = CellStore(work)
    result = store.read(key)
    store.write(replace(result, genes=result.genes.drop(columns=["slope", "offset"])))
    assert agl(key, "--work", work, "--keep", "predictions")[0] == 0
    pd.testing.assert_frame_equal(CellStore(work).read(key).genes, result.genes, check_exact=True)


def test_every_difference_is_named(agl, work, key, tmp_path) -> None:
    store = CellStore(work)
    result = store.read(key)
    genes, epochs = result.genes.copy(), result.epochs.copy()
    gene = str(genes["gene"][3])
    genes.loc[3, "weight"] += 0.25
    genes.loc[4, "weight"] += 0.125
    epochs.loc[1, "training_loss"] += 1.0
    provenance = result.provenance | {"python": "2.7.18"}
    scores = result.scores | {"pcc_gene_mean_section_mean": 0.5}
    changed = replace(result, genes=genes, epochs=epochs, scores=scores, provenance=provenance)
    store.write(changed)
    status, out, _ = agl(key, "--work", work, "--keep", "model", "--json", tmp_path / "found.json")
    assert status == 1
    for words in ("other conditions: python 2.7.18, now 3", "training parts at epoch 1: training_loss (epochs)", gene):
        assert words in out
    assert "The result is NOT the same." in out and "Nothing was added" in out
    assert store.kept(key) == frozenset() and store.read(key).scores == scores
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["identical"] is False and found["cell"] == key
    assert [d["name"] for d in found["scores"]] == ["pcc_gene_mean_section_mean"]
    (weight,) = found["genes"]
    assert (weight["name"], weight["gene"], weight["genes"]) == ("weight", gene, 2)
    assert weight["before"] - weight["after"] == pytest.approx(0.25)
    status, out, _ = agl(key, "--work", work, "--replace")
    assert status == 1 and "It is in place of the kept one now." in out
    assert store.read(key).scores == result.scores
    assert agl(key, "--work", work)[0] == 0


def test_results_of_other_genes_or_lengths(make_result) -> None:
    one = make_result()
    assert compare(one, one).is_identical
    other = replace(one, genes=one.genes.assign(gene=["A", "C"]))
    assert compare(one, other).tables == ("the genes are others: 1 are gone, 1 are new, 2 in all",)
    other = replace(one, genes=one.genes.assign(primary=[True, True]), best_epoch=0, epochs=one.epochs[:1])
    assert compare(one, other).tables == (
        "1 genes are primary in one result and not in the other",
        "there were 2 rows of epochs and are 1",
        "the best epoch was 1 and is 0",
    )
    nan = replace(one, genes=one.genes.assign(weight=[np.nan, 0.5]), scores={"other": float("nan")})
    assert compare(nan, nan).is_identical
    found = compare(one, nan)
    assert [(d.name, d.gene) for d in found.genes] == [("weight", "A")]
    assert {d.name for d in found.scores} == {"other", "pcc_gene_mean_section_mean"}


def test_another_version_is_said_and_does_not_replace(agl, work, key) -> None:
    def older(content):
        content["spec"]["version"] = "0.0.1+abc"
        content["spec"]["libraries"] = content["spec"]["libraries"].replace("numpy ", "numpy 0.")

    change(work, key, older)
    status, _, err = agl(key, "--work", work, "--keep", "model")
    assert status == 2 and f"--keep: cell {key} is of 0.0.1+abc, which counted other things into its key" in err
    content = json.loads((work / "cells" / key / "result.json").read_text())
    old = RunSpec.from_json(content["spec"]).key
    (work / "cells" / key).rename(work / "cells" / old)
    key = old
    status, out, err = agl(key, "--work", work, "--keep", "predictions")
    assert (status, err) == (0, "")
    assert CellStore(work).kept(key) == {"predictions"} and CellStore(work).read(key).spec.version == "0.0.1+abc"
    assert "other conditions: agl-bench 0.0.1+abc, now" in out
    assert f"other conditions: numpy 0.{np.__version__}, now {np.__version__}" in out
    status, out, err = agl(key, "--work", work, "--replace")
    assert status == 2 and out == ""
    assert f"--replace: made here and now, cell {key} is another one" in err and "0.0.1+abc" in err


def test_what_is_gone_is_one_sentence(agl, work, key, monkeypatch) -> None:
    for kind, words in (("selector", "needs selector 'gone'"), ("dataset", "needs dataset 'gone'")):
        name = json.loads((work / "cells" / key / "result.json").read_text())["spec"][kind]["name"]
        change(work, key, lambda c, kind=kind: c["spec"][kind].update(name="gone"))
        status, out, err = agl(key, "--work", work)
        assert status == 2 and out == "" and err.count("\n") == 1 and words in err
        change(work, key, lambda c, kind=kind, name=name: c["spec"][kind].update(name=name))
    change(work, key, lambda c: c["spec"].update(data="0123"))
    status, _, err = agl(key, "--work", work)
    assert status == 2 and err.count("\n") == 1 and f"cell {key} was made from other data" in err
    assert agl("zz", "--work", work)[2].startswith("agl-bench: unknown cell 'zz'.")
    assert "is not a work folder" in agl("zz", "--work", work / "nowhere")[2]
    (work / "cells" / key / "genes.parquet").write_bytes(b"")
    status, _, err = agl(key, "--work", work)
    assert status == 2 and err.count("\n") == 1 and "cannot be read" in err


def test_a_plug_in_in_a_file_is_asked_for(run, agl, tmp_path) -> None:
    import textwrap

    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(MINE))
    run(tmp_path / "work", "mine", fold=["D1"], files=[file])
    (path,) = (tmp_path / "work/cells").iterdir()
    status, _, err = agl(path.name, "--work", tmp_path / "work")
    assert status == 2 and "name its file with --plugin mine.py" in err
    assert agl(path.name, "--work", tmp_path / "work", "--plugin", file)[0] == 0
    file.write_text(textwrap.dedent(MINE).replace(".mean()", ".mean() * 1.0"))
    status, out, _ = agl(path.name, "--work", tmp_path / "work", "--plugin", file)
    assert status == 0 and "the code or a file of selector 'mine' has changed (mine.py, now mine.py)" in out


def test_it_runs_on_as_many_threads_as_before(work, key, tmp_path) -> None:
    change(work, key, lambda c: c["provenance"].update(threads=3))
    threads = torch.get_num_threads()
    plugins, prepared = Plugins.discover(strict=True), Preparation(Path(os.devnull), tmp_path / "cache")
    repetition = prepare_repetition(CellStore(work), key, plugins, prepared)
    *records, result = repeat(repetition, plugins, prepared, keep="nothing")
    assert isinstance(result, Result) and records and result.predictions is None
    assert result.provenance["threads"] == 3
    assert torch.get_num_threads() == threads


def test_a_cell_that_is_being_made_is_not_written(work, key, tmp_path) -> None:
    from agl_bench.bench.rerun import replace_result

    store = CellStore(work)
    plugins, prepared = Plugins.discover(strict=True), Preparation(Path(os.devnull), tmp_path / "cache")
    repetition = prepare_repetition(store, key, plugins, prepared)
    with store.leases.take(key), pytest.raises(BadSpec, match=f"another process works on cell {key}"):
        replace_result(store, repetition, repetition.before)
