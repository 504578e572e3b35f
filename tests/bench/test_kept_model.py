"""What a cell keeps beside its tables: predictions of the test spots, and the model."""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.run import Finished
from agl_bench.cli import main
from agl_bench.errors import BadPlugin, BadSpec, NotKept, UnknownName
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.synthetic import Synthetic

STILL = """
    import torch
    from torch import nn
    from agl_bench import Backbone, hookimpl

    class Still(Backbone):
        '''A trained layer on some pixels of the patch; picking them is the frozen part.'''
        reference = "test"
        frozen, late_prefixes, patch_px, width, learning_rate = True, ("mix.",), 16, 6, 1e-2

        def __init__(self, example):
            super().__init__(example)
            self.mix = nn.Linear(110, 6)

        def encode(self, spots):
            return spots.patches.flatten(1)[:, :770:7]

        def forward(self, spots):
            assert spots.patches is None  # what is kept of the patches stands in for them
            return torch.tanh(self.mix(spots.embedding))

    @hookimpl
    def register_backbones():
        return {"still": Still}
"""


@pytest.fixture(scope="module")
def store(run, tmp_path_factory):
    """One cell with everything that can be kept."""
    work = tmp_path_factory.mktemp("kept") / "work"
    run(work, "agl", fold=["D1"], keep="model")
    return CellStore(work)


@pytest.fixture
def key(store):
    (key,) = [path.name for path in store.cells.iterdir()]
    return key


def patches_of(work_spec, spots, section="S1"):
    """RGB patches of test spots, as a stranger would cut them: uint8 (spots, px, px, 3)."""
    read = Synthetic(**work_spec.dataset.settings).read(Path(os.devnull), section)
    rows = read.counts.obs_names.get_indexer(spots)
    return read.patches.read(rows, 16, work_spec.protocol.patch_um).transpose(0, 2, 3, 1)


def same(one, other):
    """Results of cells, but for what they took."""
    assert one.scores == other.scores
    pd.testing.assert_frame_equal(one.genes, other.genes, check_exact=True)
    pd.testing.assert_frame_equal(one.outer, other.outer, check_exact=True)
    pd.testing.assert_frame_equal(
        one.epochs.drop(columns="seconds"), other.epochs.drop(columns="seconds"), check_exact=True
    )


def test_predictions_are_what_was_scored(store, key) -> None:
    table, result = store.predictions(key), store.read(key)
    primary = result.genes[result.genes["primary"]]
    names = primary["gene"].tolist()
    assert list(table) == [
        *("section", "spot", "x_px", "y_px"),
        *(f"{kind}:{name}" for kind in ("predicted", "measured") for name in names),
    ]
    assert len(table) == result.counts["test_spots"] and not table.duplicated(["section", "spot"]).any()
    assert set(table.dtypes[4:].astype(str)) == {"float32"}
    predicted, measured = (
        table[[f"{kind}:{n}" for n in names]].to_numpy(np.float64) for kind in ("predicted", "measured")
    )
    pcc = [np.corrcoef(p, m)[0, 1] for p, m in zip(predicted.T, measured.T, strict=True)]
    np.testing.assert_allclose(pcc, primary["pearson"], rtol=1e-5)
    fitted = predicted * primary["slope"].to_numpy() + primary["offset"].to_numpy()
    np.testing.assert_allclose(((fitted - measured) ** 2).mean(0), primary["mse"], rtol=1e-4)


def test_places_are_those_of_the_section(store, key) -> None:
    table, spec = store.predictions(key), store.read(key).spec
    (section,) = set(table["section"])
    counts = Synthetic(**spec.dataset.settings).read(Path(os.devnull), section).counts
    rows = counts.obs_names.get_indexer(table["spot"])
    assert (rows >= 0).all()
    np.testing.assert_array_equal(table[["x_px", "y_px"]], counts.obsm["spatial"][rows])


def test_keeping_changes_neither_key_nor_result(store, key, run, tmp_path) -> None:
    for keep, names in (("nothing", set()), ("predictions", {"predictions"})):
        (event,) = [e for e in run(tmp_path / keep, "agl", fold=["D1"], keep=keep) if isinstance(e, Finished)]
        assert event.result.spec.key == key
        other = CellStore(tmp_path / keep)
        assert other.kept(key) == names
        same(other.read(key), store.read(key))
    assert store.kept(key) == {"predictions", "model"}
    pd.testing.assert_frame_equal(other.predictions(key), store.predictions(key), check_exact=True)


def test_tables_are_read_without_what_is_kept(store, key) -> None:
    result = store.read(key)
    assert result.predictions is None and result.model is None
    assert store.predictions(key, ["section"]).columns.tolist() == ["section"]


def test_the_kept_model_predicts_what_was_scored(store, key) -> None:
    table, spec = store.predictions(key), store.read(key).spec
    kept = store.model(key)
    patches = patches_of(spec, table["spot"], table["section"].iloc[0])
    model = kept.build(Plugins.discover(strict=True))
    predicted = kept.predict(model, patches)
    assert predicted.columns.tolist() == [n.removeprefix("predicted:") for n in table if n.startswith("predicted:")]
    expected = table[[f"predicted:{n}" for n in predicted]].to_numpy()
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-6)
    primary = store.read(key).genes.query("primary")
    fitted = kept.predict(model, patches, fitted=True)
    np.testing.assert_allclose(
        fitted, expected * primary["slope"].to_numpy() + primary["offset"].to_numpy(), rtol=1e-5, atol=1e-5
    )
    assert kept.predict(model, patches[:0]).shape == (0, 5)


def test_a_frozen_encoder_is_kept_too(run, tmp_path) -> None:
    file = tmp_path / "still.py"
    file.write_text(textwrap.dedent(STILL))
    run(tmp_path / "work", "pgl", fold=["D1"], keep="model", files=[file], backbone=["still"])
    store = CellStore(tmp_path / "work")
    (key,) = [path.name for path in store.cells.iterdir()]
    table, kept = store.predictions(key), store.model(key)
    model = kept.build(Plugins.discover([file], strict=True))
    predicted = kept.predict(model, patches_of(store.read(key).spec, table["spot"], table["section"].iloc[0]))
    np.testing.assert_allclose(predicted, table[[f"predicted:{n}" for n in predicted]], rtol=0, atol=1e-6)
    with pytest.raises(BadSpec, match=r"the model needs backbone 'still' of still.py: unknown backbone 'still'"):
        kept.build(Plugins.discover(strict=True))


def test_a_model_of_embeddings_takes_embeddings(run, tmp_path, monkeypatch) -> None:
    read = Synthetic.read

    def with_embedding(self, root, name):
        section = read(self, root, name)
        section.embedding = np.log1p(section.counts.X[:, :40].toarray()).astype(np.float32)
        return section

    monkeypatch.setattr(Synthetic, "read", with_embedding)
    run(tmp_path, "pgl", fold=["D1"], keep="model", backbone=["embedding"])
    store = CellStore(tmp_path)
    (key,) = [path.name for path in store.cells.iterdir()]
    table, kept = store.predictions(key), store.model(key)
    section = Synthetic(**store.read(key).spec.dataset.settings).read(Path(os.devnull), table["section"].iloc[0])
    seen = section.embedding[section.counts.obs_names.get_indexer(table["spot"])]
    predicted = kept.predict(kept.build(Plugins.discover(strict=True)), seen)
    np.testing.assert_allclose(predicted, table[[f"predicted:{n}" for n in predicted]], rtol=0, atol=1e-6)
    with pytest.raises(BadSpec, match=r"takes embeddings as float32 of shape \(spots, 40\), got uint8"):
        kept.check(np.zeros((2, 16, 16, 3), np.uint8))


def test_a_changed_backbone_is_named(store, key) -> None:
    kept = store.model(key)
    other = replace(kept, weights={n: t for n, t in kept.weights.items() if n != "backbone.mix.bias"})
    with pytest.raises(BadPlugin, match=r"is not what the model was trained with .*backbone.mix.bias"):
        other.build(Plugins.discover(strict=True))


@pytest.mark.parametrize("seen", [np.zeros((2, 3, 16, 16), np.uint8), np.zeros((2, 16, 16, 3), np.float32)])
def test_what_the_model_does_not_take(store, key, seen) -> None:
    kept = store.model(key)
    with pytest.raises(BadSpec, match=r"takes RGB patches as uint8 of shape \(spots, 16, 16, 3\), got"):
        kept.check(seen)


def test_state_round_trip_is_plain(store, key) -> None:
    """Nothing in the file is code."""
    state = torch.load(store.cells / key / "model.pt", weights_only=True)
    kept = KeptModel.of_state(state)
    again = kept.state()
    assert again["genes"] == state["genes"] and again["spec"] == state["spec"]
    assert torch.equal(again["example"]["patches"], state["example"]["patches"])
    assert all(torch.equal(again["weights"][n], t) for n, t in state["weights"].items())
    assert state["weights"]["head.weight"].shape[0] == len(state["genes"]) == 5
    with pytest.raises(BadSpec, match="of format 99"):
        KeptModel.of_state(state | {"format": 99})


def test_a_cell_that_kept_nothing_names_the_way_out(store, make_result, tmp_path) -> None:
    other, result = CellStore(tmp_path), make_result()
    other.write(result)
    key = result.spec.key
    for what, read in (("predictions", other.predictions), ("model", other.model)):
        with pytest.raises(NotKept, match=f"cell {key} did not keep its {what}; `agl-bench rerun {key} --keep {what}"):
            read(key)
    with pytest.raises(NotKept, match="there is no finished cell 0123"):
        other.predictions("0123")
    (other.cells / key / "result.json").write_text("[]")
    with pytest.raises(NotKept, match=rf"cell {key} is damaged \(result.json does not hold a JSON object\)"):
        other.predictions(key)


def test_a_run_that_finds_finished_cells_says_what_they_lack(words, tmp_path, capsys) -> None:
    grid = ["run", *words, "--selectors", "agl", "--fold", "D1", "--work", str(tmp_path)]
    said = []
    for keep in ("nothing", "nothing", "predictions"):
        with pytest.raises(SystemExit) as caught:
            main([*grid, "--keep", keep])
        assert not caught.value.code
        said.append(capsys.readouterr().err)
    lacking = "agl-bench: 1 of 1 finished cells were made before and have kept no predictions; `agl-bench rerun "
    assert said[:2] == ["", ""] and said[2].startswith(lacking)


@pytest.mark.parametrize("damage", ["changed", "truncated", "absent"])
@pytest.mark.parametrize("what", ["predictions", "model"])
def test_damage_of_what_is_kept_costs_no_result(store, key, tmp_path, what, damage) -> None:
    other = CellStore(tmp_path / "work")
    other.write(replace(store.read(key), predictions=store.predictions(key), model=store.model(key)))
    path = other.cells / key / {"predictions": "predictions.parquet", "model": "model.pt"}[what]
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if damage == "truncated" else content[:-9] + b"x" + content[-8:])
    word = "is missing" if damage == "absent" else "is damaged"
    with pytest.raises(NotKept, match=f"{word}.*agl-bench rerun {key} --keep {what}"):
        getattr(other, what)(key)
    same(other.read(key), store.read(key))


def test_cells_are_found_by_the_beginning_of_their_key(store, key, make_result, tmp_path) -> None:
    assert store.find(key[:4]) == store.find(key) == key
    with pytest.raises(UnknownName, match="unknown cell 'zz'"):
        store.find("zz")
    other = CellStore(tmp_path)
    for name in ("abc", "abd"):
        (other.cells / name).mkdir()
    with pytest.raises(BadSpec, match="cell 'ab' is not one: 2 keys begin so"):
        other.find("ab")
