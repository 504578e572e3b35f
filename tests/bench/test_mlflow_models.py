"""Models in MLflow: a stranger's process loads them and gets what the trainer got."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from agl_bench.bench.cells import CellStore
from agl_bench.bench.mlflow_models import Models, save_model
from agl_bench.bench.mlflow_recorder import MODEL, MlflowRecorder, log_report
from agl_bench.bench.run import Finished, run_cells
from agl_bench.cli import main
from agl_bench.errors import BadSpec
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.synthetic import Synthetic

BACKBONES = """
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
            return torch.tanh(self.mix(spots.embedding))

    class Roaming(Backbone):
        '''Looks at the place beside the patch.'''
        reference = "test"
        patch_px, width, learning_rate = 16, 6, 1e-2

        def __init__(self, example):
            super().__init__(example)
            self.mix = nn.Linear(5, 6)

        def forward(self, spots):
            return torch.tanh(self.mix(torch.cat([spots.patches.mean((2, 3)), spots.position / 1e3], 1)))

    @hookimpl
    def register_backbones():
        return {"still": Still, "roaming": Roaming}
"""
LOAD = """
    import json, sys
    import mlflow
    import numpy as np

    address, model, patches = sys.argv[1:]
    mlflow.set_tracking_uri(address)
    loaded, seen = mlflow.pyfunc.load_model(model), np.load(patches)
    made = loaded.predict(seen)
    assert str(loaded.metadata.signature.inputs.inputs[0].shape) == str((-1, *seen.shape[1:]))
    assert loaded.input_example.shape == (1, *seen.shape[1:]) and loaded.input_example.dtype == seen.dtype
    assert made.columns.tolist() == loaded.metadata.signature.outputs.input_names()
    fitted = loaded.predict(seen, params={"fitted": True})
    print(json.dumps([made.to_dict("list"), fitted.to_dict("list")]))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "mine.py"
    path.write_text(textwrap.dedent(BACKBONES))
    return path


@pytest.fixture(scope="module")
def made(grid, file, tmp_path_factory):
    """Cells of all kinds of backbones, run with their models shown; the work folder and what was warned of."""
    work = tmp_path_factory.mktemp("models") / "work"
    cells, bench = grid("pgl", files=[file], fold=["D1"], backbone=["tiny", "still", "roaming", "position"])
    store, said = CellStore(work), []
    models = Models(store, bench.plugins)
    recorder = MlflowRecorder.connect(work, address_of(work), warn=said.append, models=models)
    events = list(run_cells(cells, bench, store, recorder, keep="model"))
    results = {e.result.spec.backbone.name: e.result for e in events if isinstance(e, Finished)}
    assert set(results) == {"tiny", "still", "roaming", "position"} and recorder.dead is None
    return work, results, said


def address_of(work):
    return f"sqlite:///{work / 'mlflow.db'}"


def runs_of(work, level="cell"):
    client = MlflowClient(address_of(work))
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, f"tags.agl.level = '{level}'")


def model_of(work, backbone):
    (run,) = [r for r in runs_of(work) if r.data.tags["agl.backbone"] == backbone]
    return run.data.tags.get(MODEL)


def seen_by(spec, table):
    """Of the test spots, as a stranger would have it."""
    read = Synthetic(**spec.dataset.settings).read(Path(os.devnull), table["section"].iloc[0])
    rows = read.counts.obs_names.get_indexer(table["spot"])
    if spec.backbone.name == "position":
        return (read.counts.obsm["spatial"][rows] * read.um_per_px).astype(np.float32)
    return read.patches.read(rows, 16, spec.protocol.patch_um).transpose(0, 2, 3, 1)


def load_elsewhere(tmp_path, address, model, seen):
    """Predictions of a fresh process that has only the address: as they are, and fitted."""
    np.save(tmp_path / "seen.npy", seen)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LOAD), address, model, str(tmp_path / "seen.npy")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backbone", ["tiny", "still", "position"])
def test_a_fresh_process_predicts_what_the_trainer_did(made, tmp_path, backbone) -> None:
    work, results, _ = made
    result, store = results[backbone], CellStore(work)
    table = store.predictions(result.spec.key)
    seen = seen_by(result.spec, table)
    plain, fitted = load_elsewhere(tmp_path, address_of(work), model_of(work, backbone), seen)
    primary = result.genes.query("primary").set_index("gene")
    assert list(plain) == list(fitted) == primary.index.tolist()
    for gene, row in primary.iterrows():
        kept = table[f"predicted:{gene}"].to_numpy()
        np.testing.assert_allclose(plain[gene], kept, rtol=0, atol=1e-6)
        np.testing.assert_allclose(fitted[gene], kept * row["slope"] + row["offset"], rtol=1e-5, atol=1e-5)


def test_a_backbone_that_wants_more_than_a_patch_is_named(made) -> None:
    work, results, said = made
    (sentence,) = said
    assert (
        f"no model of cell {results['roaming'].spec.key} in MLflow: backbone 'roaming' looks at positions" in sentence
    )
    assert model_of(work, "roaming") is None


def test_what_is_logged_can_be_read_as_a_list(made, file) -> None:
    """Requirements name agl-bench, the file of a plug-in travels along, tags say what it is."""
    work, results, _ = made
    client = MlflowClient(address_of(work))
    for backbone, plugins in (("tiny", []), ("still", ["mine.py"])):
        number = model_of(work, backbone).removeprefix("models:/")
        logged = client.get_logged_model(number)
        assert logged.status == "READY" and logged.tags["agl.key"] == results[backbone].spec.key
        (place,) = work.rglob(f"{number}/artifacts")
        assert "agl-bench==" in (place / "requirements.txt").read_text()
        assert sorted(p.name for p in place.rglob("*.py")) == plugins
        assert not list(place.rglob("*.pkl"))


def words(work, file):
    return ["--work", str(work), "--tracking", address_of(work), "--plugin", str(file)]


def test_sync_brings_models_and_registers_one(made, file, tmp_path, capsys) -> None:
    work, results, _ = made
    store, other = CellStore(work), tmp_path / "other"
    for result in results.values():
        key = result.spec.key
        CellStore(other).write(replace(store.read(key), predictions=store.predictions(key), model=store.model(key)))

    def sync(*more):
        with pytest.raises(SystemExit) as caught:
            main(["sync", *words(other, file), *more])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    assert sync()[1] == "4 cells added to MLflow, 0 were there already.\n"
    assert [MODEL in r.data.tags for r in runs_of(other)] == [False] * 4
    key = results["tiny"].spec.key
    for _ in range(2):  # the second time nothing is new
        status, out, err = sync("--register", "best", "--cell", key[:8])
        assert (status, err) == (0, "") and "models:/best/1" in out and "1 model of a cell is in MLflow" in out
    before = model_of(other, "tiny")
    status, out, err = sync("--models")
    assert status == 0 and "3 models of cells are in MLflow." in out and "'roaming' looks at positions" in err
    assert model_of(other, "tiny") == before
    table = store.predictions(key)
    plain, _ = load_elsewhere(tmp_path, address_of(other), "models:/best/1", seen_by(results["tiny"].spec, table))
    gene = next(iter(plain))
    np.testing.assert_allclose(plain[gene], table[f"predicted:{gene}"], rtol=0, atol=1e-6)
    status, _, err = sync("--register", "best")
    assert status == 2 and "--register NAME and --cell KEY go together" in err
    status, _, err = sync("--register", "a/b", "--cell", key)
    assert status == 2 and err.count("\n") == 1 and "--register 'a/b'" in err


def test_a_cell_without_a_model_is_not_registered(made, tmp_path, capsys) -> None:
    result = made[1]["tiny"]
    CellStore(tmp_path).write(result)
    with pytest.raises(SystemExit) as caught:
        main(["sync", "--work", str(tmp_path), "--register", "best", "--cell", result.spec.key])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and f"agl-bench rerun {result.spec.key} --keep model" in err
    with pytest.raises(SystemExit) as caught:
        main(["sync", "--work", str(tmp_path), "--models"])
    assert not caught.value.code
    assert "0 models of cells are in MLflow; keep them by run --keep model." in capsys.readouterr().out


def test_a_model_is_written_without_a_tracker(made, tmp_path, file) -> None:
    import mlflow

    work, results, _ = made
    store, spec = CellStore(work), results["tiny"].spec
    save_model(store.model(spec.key), Plugins.discover([file], strict=True), tmp_path / "alone")
    table = store.predictions(spec.key)
    made_here = mlflow.pyfunc.load_model(str(tmp_path / "alone")).predict(seen_by(spec, table))
    np.testing.assert_allclose(made_here, table[[f"predicted:{g}" for g in made_here]], rtol=0, atol=1e-6)


def test_a_report_is_shown_in_every_experiment_that_has_cells(made, tmp_path) -> None:
    work, _, _ = made
    folder = tmp_path / "report"
    with pytest.raises(BadSpec, match="is not the folder of a report"):
        log_report(work, address_of(work), folder)
    (folder / "figures").mkdir(parents=True)
    (folder / "report.html").write_text("<p>first</p>")
    (folder / "figures/one.png").write_bytes(b"PNG")
    (folder / "counts.h5ad").write_bytes(b"what else lies there")
    before = log_report(work, address_of(work), folder)
    (folder / "report.html").write_text("<p>second</p>")
    found = log_report(work, address_of(work), folder)
    assert set(found) == set(before) == {"inter"} and found != before
    (run,) = runs_of(work, "report")
    assert run.info.run_id == found["inter"] and run.info.status == "FINISHED"
    client = MlflowClient(address_of(work))
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"figures", "report.html"}
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == "<p>second</p>"
    with pytest.raises(BadSpec, match="shows no cells to report on; `agl-bench sync"):
        log_report(tmp_path / "empty", address_of(tmp_path / "empty"), folder)
