"""Models of cells in MLflow: logged with signature and example, loaded by `mlflow.pyfunc.load_model` anywhere.

A logged model is a file of tensors and plain values, and the file of the backbone where that is a single-file plug-in;
nothing is pickled. What loads it is this module of the installed agl-bench, which its requirements name.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The tracker sets what mlflow reads while it is imported.
import agl_bench.bench.mlflow_tracker  # noqa: F401

# isort: split
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model as ModelFile
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from agl_bench import __version__
from agl_bench.bench.cells import CellStore
from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.spec import RunSpec
from agl_bench.errors import BadSpec
from agl_bench.registry.plugins import Plugins
from agl_bench.training.model import Model

NAME = "model"  # of the artifact: runs:/<run>/model
_FILE, _PLUGINS = "model.pt", "plugins"  # within the data of a logged model


class Models:
    """Logs the models that cells have kept.

    Args:
        store: of the cells.
        plugins: who provides which backbone.
    """

    def __init__(self, store: CellStore, plugins: Plugins) -> None:
        self.store, self.plugins = store, plugins

    def log(self, client: MlflowClient, experiment: str, run: str, spec: RunSpec) -> str:
        """Log the model of a cell to its run; returns the id of the model.

        Raises:
            NotKept: if the cell has kept none.
            BadSpec, BadPlugin: if it cannot predict new spots.
        """
        kept = self.store.model(spec.key)
        with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
            place = Path(folder) / "model"
            tags = {f"agl.{n}": str(getattr(spec, n)) for n in ("key", "evaluation", "fold", "seed", "preset")}
            tags |= {f"agl.{n}": getattr(spec, n).label for n in ("dataset", "backbone", "selector")}
            made = _check(kept, self.plugins)
            logged = client.create_logged_model(
                experiment, name=NAME, source_run_id=run, tags=tags, model_type="gene expression from histology"
            )
            number = str(logged.model_id)
            try:
                _save(kept, made, self.plugins, place, ModelFile(run_id=run, model_id=number, model_uuid=number))
                client.log_model_artifacts(number, str(place))
            except BaseException:
                client.finalize_logged_model(number, LoggedModelStatus.FAILED)
                raise
            client.finalize_logged_model(number, LoggedModelStatus.READY)
        client.log_outputs(run, [LoggedModelOutput(number, step=0)])
        return number


def save_model(kept: KeptModel, plugins: Plugins, folder: Path) -> None:
    """Write a model as a folder in MLflow's format, without a tracker.

    Raises:
        BadSpec, BadPlugin: if it cannot predict new spots.
    """
    _save(kept, _check(kept, plugins), plugins, folder, ModelFile())


def register(client: MlflowClient, number: str, run: str, name: str, tags: dict[str, str]) -> int:
    """Make a logged model the next version of a registered one; returns the version, an older one if it has one.

    Raises:
        BadSpec: if MLflow refuses the name.
    """
    try:
        known = client.search_registered_models(f"name = '{name}'", max_results=1)
        if not known:
            client.create_registered_model(name, description="A model of agl-bench: patches in, primary genes out.")
        for older in client.search_model_versions(f"name = '{name}'"):
            if older.tags.get("agl.key") == tags["agl.key"]:
                return int(older.version)
        place = client.get_logged_model(number).artifact_location  # models:/… would be looked up elsewhere
        made = client.create_model_version(name, place, run_id=run, tags=tags, model_id=number)
    except MlflowException as error:
        raise BadSpec(f"--register {name!r}: {' '.join(str(error).split())}") from None
    return int(made.version)


def _check(kept: KeptModel, plugins: Plugins) -> Model:
    """The model, built; raises BadSpec if its backbone wants to know more of a spot than a stranger's spot has."""
    model, example = kept.build(plugins), kept.example
    if kept.sees != "position":
        nowhere = replace(
            example, position=torch.zeros_like(example.position), section=torch.zeros_like(example.section)
        )
        with torch.no_grad():
            if not model.backbone.frozen and not torch.equal(model(example)[1], model(nowhere)[1]):
                raise BadSpec(
                    f"backbone '{kept.spec['backbone']['name']}' looks at positions or sections beside "
                    f"{kept.sees}, which new spots do not have: its model is kept with the cell and not logged"
                )
    return model


def _save(kept: KeptModel, model: Model, plugins: Plugins, folder: Path, file: ModelFile) -> None:
    example = _example(kept)
    kept.predict(model, example)  # what cannot predict its own example is not shown
    signature = ModelSignature(
        inputs=Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))]),
        outputs=Schema([ColSpec(DataType.float, name) for name in kept.genes]),
        params=ParamSchema([ParamSpec("fitted", DataType.boolean, default=False)]),
    )
    backbone, requirements = kept.spec["backbone"], [f"agl-bench=={__version__}", f"torch=={version('torch')}"]
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as temporary:
        data = Path(temporary) / "agl-bench"
        (data / _PLUGINS).mkdir(parents=True)
        torch.save(kept.state(), data / _FILE)
        source = plugins.entry(backbone["name"], "backbone").source
        if backbone["provider"].endswith(".py") and source is not None:
            shutil.copy(source, data / _PLUGINS / source.name)
        elif not backbone["provider"].startswith("agl-bench "):
            requirements.append(backbone["provider"].replace(" ", "=="))
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(data),
            mlflow_model=file,
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            metadata={"agl_bench": {"spec": kept.spec, "sees": kept.sees}},
        )


def _example(kept: KeptModel) -> np.ndarray:
    """One training spot, as `KeptModel.predict` takes it."""
    seen = kept.example
    if seen.patches is not None:
        return np.ascontiguousarray((seen.patches[:1] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    found = seen.position if seen.embedding is None else seen.embedding
    example: np.ndarray = found[:1].float().numpy()
    return example


class _Predictor:
    """What `mlflow.pyfunc` calls."""

    def __init__(self, kept: KeptModel, model: Model) -> None:
        self.kept, self.model = kept, model

    def predict(self, seen: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Primary genes of new spots; `params={"fitted": True}` gives them in the units of the targets."""
        return self.kept.predict(self.model, np.asarray(seen), fitted=bool((params or {}).get("fitted", False)))


def _load_pyfunc(path: str) -> _Predictor:
    """MLflow's entry: a model from the folder that `_save` has filled."""
    folder = Path(path)
    kept = KeptModel.of_state(torch.load(folder / _FILE, map_location="cpu", weights_only=True))
    return _Predictor(kept, kept.build(Plugins.discover(sorted((folder / _PLUGINS).glob("*.py")))))
