"""What MLflow shows of a study."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from agl_bench.bench.mlflow_studies import EXPERIMENT, history_figure, keep_files, parallel_figure, show_study
from agl_bench.bench.tuned import Entry
from agl_bench.errors import TrackerUnavailable

SETTINGS = {"cutting.rate": 0.01, "cutting.kind": "soft"}
ENTRY = Entry(
    "toy · inter · flat · cutting · 0a", "toy", "inter", "flat", "", 4, 4, 1, ("D1", "D2"), (0,), "tpe", "median", 0.4,
    "0b", SETTINGS,
)  # fmt: skip
HISTORY = [
    {"trial": n, "state": state, "value": value, "cutting.rate": rate, "cutting.kind": kind, "seconds": 1.0}
    for n, (state, value, rate, kind) in enumerate(
        [("complete", 0.1, 1e-4, "hard"), ("complete", 0.4, 1e-2, "soft"), ("pruned", None, 1.0, "soft"),
         ("complete", 0.2, 1e-3, "soft")]
    )
]  # fmt: skip
IMPORTANCES = {"cutting.rate": 0.7, "cutting.kind": 0.3}


def test_a_study_is_one_run_with_its_figures(tmp_path: Path) -> None:
    for _ in range(2):  # the second time in place of the first
        show_study(tmp_path, None, "cutting", ENTRY, IMPORTANCES, HISTORY)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "cutting · toy · inter · flat"
    assert run.data.metrics["best/validation_pcc"] == 0.4
    assert run.data.metrics["importance/cutting.rate"] == 0.7
    assert run.data.params["trials"] == "4" and run.data.params["best.cutting.kind"] == "soft"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "trial/validation_pcc")] == [
        (0, 0.1), (1, 0.4), (3, 0.2)
    ]  # fmt: skip
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    with (folder / "trials.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["state"] for r in rows] == ["complete", "complete", "pruned", "complete"]
    assert rows[2]["value"] == "" and rows[1]["cutting.rate"] == "0.01"
    for name in ("history", "importances", "parallel_coordinates"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 500


@pytest.mark.parametrize("place", ["folder:it's", 'folder:"a" b', """folder:'"`%_*\\ \u00e9\u4e2d; --"""])
def test_a_study_is_found_whatever_quotes_its_name_holds(tmp_path: Path, place: str) -> None:
    entry = replace(ENTRY, study=f"{place} · inter · flat · cutting · 0a", dataset=place)
    other = replace(entry, study=f"{place} · intra · flat · cutting · 0a")
    for one in (entry, other, entry):
        show_study(tmp_path, None, "cutting", one, IMPORTANCES, HISTORY)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(run.data.tags["agl.study"] for run in runs) == sorted([entry.study, other.study])


def test_files_of_two_studies_are_never_one_folder(tmp_path: Path) -> None:
    names = ["folder:\u00e9", "folder:\u00e8", "folder:'", 'folder:"', "folder:x"]
    folders = [
        keep_files(tmp_path, "cutting", replace(ENTRY, dataset=name), {}, HISTORY).name for name in [*names, names[0]]
    ]
    assert len(set(folders)) == 5 and folders[0] == folders[5] and folders[4] == "cutting-folder-x-inter-flat"


def test_figures_show_every_trial() -> None:
    (axes,) = history_figure("", HISTORY).axes
    trials, best, ended = axes.lines
    assert trials.get_xydata().tolist() == [[1, 0.1], [2, 0.4], [4, 0.2]]
    assert best.get_ydata().tolist() == [0.1, 0.4, 0.4]
    assert ended.get_xdata().tolist() == [3]
    lines = [line.get_ydata().tolist() for line in parallel_figure("", HISTORY).axes[0].lines]
    assert lines == [[0, 0], [pytest.approx(0.5), 1], [1, 1]]  # the rate on a logarithmic scale; the best on top


def test_a_tracker_that_is_away(tmp_path: Path) -> None:
    with pytest.raises(TrackerUnavailable, match="no MLflow server answers"):
        show_study(tmp_path, "http://127.0.0.1:9", "cutting", ENTRY, {}, HISTORY)
