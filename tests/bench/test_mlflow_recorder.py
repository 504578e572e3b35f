"""What the tracker shows, that it can be rebuilt, and that it costs nothing but a line when it goes away."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from agl_bench.bench.mlflow_recorder import NOTE, MlflowRecorder
from agl_bench.bench.mlflow_ui import WATCHED, serve
from agl_bench.bench.mlflow_views import HEADLINE, VIEWS
from agl_bench.bench.recorder import Standing
from agl_bench.bench.result import Result, epoch_table, outer_table
from agl_bench.bench.spec import Part, RunSpec
from agl_bench.errors import TrackerUnavailable
from agl_bench.protocol import Protocol
from agl_bench.training.records import EpochRecord, OuterPass


def make_spec(selector: str = "cutting", fold: str = "C1.0", seed: int = 0, evaluation: str = "intra") -> RunSpec:
    return RunSpec(
        dataset=Part("toy", {}, "tests 1", "a"),
        backbone=Part("flat", {"width": 8}, "tests 1", "b"),
        selector=Part(selector, {"temperature": 0.5}, "tests 1", "c"),
        evaluation=evaluation,
        fold=fold,
        seed=seed,
        protocol=Protocol(),
        preset="clean",
        data="0123456789abcdef0123",
        device="cpu",
    )


def make_records(*, moving: bool = True) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=e,
            training_loss=1.0 - e / 10,
            validation_pcc=float("nan") if e == 0 else 0.1 * e,
            validation_nan_genes=0,
            selected=5 - e if moving else 5,
            effective=4.5,
            parameters={"cut[off]": 0.5 - e / 10},
            outer=() if e == 0 else (OuterPass(0.9, 0.1 * e),),
        )
        for e in range(4)
    ]


def make_result(spec: RunSpec, pcc: float = 0.3, *, moving: bool = True) -> Result:
    genes = pd.DataFrame(
        {"gene": ["A", "B"], "primary": [True, False], "weight": [1.0, 0.25], "pearson": [pcc, np.nan]}
    )
    return Result(
        spec=spec,
        scores={"pcc_gene_mean_section_mean": pcc, "pcc_nan_genes": 0.0, "mse_gene_mean": float("nan")},
        genes=genes,
        epochs=epoch_table(make_records(moving=moving)),
        outer=outer_table(make_records(moving=moving)),
        best_epoch=3,
        counts={"test_spots": 40, "auxiliary_genes": 5},
        cost={"seconds": 2.0},
        provenance={"commit": "abc123"},
    )


def run_cell(recorder: MlflowRecorder, result: Result) -> None:
    log = recorder.open(result.spec)
    for record in make_records(moving=result.epochs["selected"].nunique() > 1):
        log.epoch(record)
    log.close(result)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "a work folder"


def connect(work: Path, warnings: list[str] | None = None) -> MlflowRecorder:
    return MlflowRecorder.connect(
        work, f"sqlite:///{work / 'mlflow.db'}", warn=warnings.append if warnings is not None else None
    )


def runs(work: Path, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    ids = [e.experiment_id for e in client.search_experiments() if e.name.startswith("agl-bench/")]
    return list(client.search_runs(ids, run_view_type=view))


def by_level(work: Path) -> tuple[list[Run], list[Run]]:
    found = runs(work)
    return tuple([r for r in found if r.data.tags["agl.level"] == level] for level in ("group", "cell"))  # type: ignore[return-value]


def contents(work: Path) -> list[object]:
    """Everything shown but ids, times and the order in which it came."""
    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    found = []
    for run in runs(work):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        curves = {
            k: sorted({(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)})
            for k in run.data.metrics
            if tags["agl.level"] == "cell"
        }
        inputs = [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs]
        files = sorted(f.path for f in client.list_artifacts(run.info.run_id))
        found.append(
            (run.info.run_name, run.info.status, run.data.metrics, run.data.params, tags, curves, inputs, files)
        )
    return sorted(found, key=str)


def test_one_run_for_each_group_and_below_it_one_for_each_cell(work: Path) -> None:
    recorder = connect(work)
    for fold, pcc in (("C1.0", 0.2), ("C1.1", 0.4)):
        run_cell(recorder, make_result(make_spec(fold=fold), pcc))
    run_cell(recorder, make_result(make_spec("steady"), moving=False))
    recorder.finish()
    assert recorder.dead is None

    groups, cells = by_level(work)
    assert {r.info.run_name for r in groups} == {"cutting · toy · flat", "steady · toy · flat"}
    assert {r.info.status for r in groups + cells} == {"FINISHED"}
    line = next(r for r in groups if r.data.tags["agl.selector"] == "cutting")
    below = [r for r in cells if r.data.tags["mlflow.parentRunId"] == line.info.run_id]
    assert {r.info.run_name for r in below} == {"cutting · fold C1.0 · seed 0", "cutting · fold C1.1 · seed 0"}
    assert line.data.metrics[HEADLINE] == pytest.approx(0.3)
    assert line.data.metrics["test_sd/pcc_gene_mean_section_mean"] == round(0.02**0.5, 4)
    assert line.data.metrics["n_cells"] == 2
    assert line.data.metrics["best/k"] == 2
    assert "fold" not in line.data.params

    cell = next(r for r in below if r.data.tags["agl.fold"] == "C1.0")
    assert cell.data.tags["agl.key"] == make_spec(fold="C1.0").key
    expected = {
        "selector": "cutting",
        "selector.temperature": "0.5",
        "backbone.width": "8",
        "seed": "0",
        "fold": "C1.0",
    }
    expected |= {"protocol.epochs": "100", "preset": "clean", "commit": "abc123", "counts.test_spots": "40"}
    assert expected.items() <= cell.data.params.items()
    assert cell.data.metrics[HEADLINE] == 0.2
    assert "test/mse_gene_mean" not in cell.data.metrics, "a NaN spoils charts"
    (given,) = cell.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.tags[0].value) == ("toy", make_spec().data, "benchmark")

    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")

    def history(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client.get_metric_history(cell.info.run_id, name)]

    assert history("selection/k") == [(0, 5), (1, 4), (2, 3), (3, 2)]
    assert [s for s, _ in history("validation/pcc")] == [s for s, _ in history("outer/loss")] == [1, 2, 3]
    assert len(history("selection/parameter.cut_off_")) == 4
    files = {f.path for f in client.list_artifacts(cell.info.run_id)}
    assert files == {"genes.parquet", "epochs.parquet", "outer.parquet", "result.json", "k_trajectory.png"}
    steady = next(r for r in cells if r.data.tags["agl.selector"] == "steady")
    assert "k_trajectory.png" not in {f.path for f in client.list_artifacts(steady.info.run_id)}
    assert (work / "mlartifacts").is_dir()

    again = connect(work)
    assert not again.record(make_result(make_spec(fold="C1.0"), 0.2))
    again.finish()
    assert len(runs(work, ViewType.ALL)) == 5


def test_sync_rebuilds_what_was_shown(work: Path, tmp_path: Path) -> None:
    results = [make_result(make_spec(fold=f, evaluation=e), 0.2) for e in ("intra", "inter") for f in ("C1", "C2")]
    live, synced = connect(work / "live"), connect(work / "synced")
    for result in results:
        run_cell(live, result)
        assert synced.record(result)
        assert not synced.record(result)
    live.finish()
    synced.finish()
    assert contents(work / "live") == contents(work / "synced")
    assert len(runs(work / "synced")) == 6


def test_what_a_killed_or_failed_process_left_is_replaced(work: Path) -> None:
    spec, failed = make_spec(), make_spec(fold="C1.1")
    killed = connect(work)
    killed.open(spec).epoch(make_records()[0])
    killed.open(failed).fail("diverged at epoch 3")
    sentences = {r.data.tags.get("agl.error") for r in by_level(work)[1]}
    assert sentences == {None, "diverged at epoch 3"}

    recorder = connect(work)
    assert recorder.record(make_result(spec))
    run_cell(recorder, make_result(failed))
    recorder.finish()
    groups, cells = by_level(work)
    assert [r.info.status for r in groups + cells] == ["FINISHED"] * 3
    assert groups[0].data.metrics["n_cells"] == 2


def test_a_group_that_was_made_but_not_described_is_described_later(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = work / "whole"
    run_cell(connect(whole), make_result(make_spec()))
    killed = connect(work)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_: 1 / 0)
        killed.open(make_spec())
    assert killed.dead is not None
    ((group,), ()) = by_level(work)
    assert not group.data.params

    recorder = connect(work)
    assert recorder.record(make_result(make_spec()))
    (group,), (_,) = by_level(work)
    (expected,), _ = by_level(whole)
    assert (group.data.params, group.data.metrics) == (expected.data.params, expected.data.metrics)
    assert len(group.inputs.dataset_inputs) == 1


def test_again_replaces_a_finished_cell(work: Path) -> None:
    recorder = connect(work)
    run_cell(recorder, make_result(make_spec(), 0.2))
    run_cell(recorder, make_result(make_spec(), 0.1))
    (group,), (cell,) = by_level(work)
    assert cell.data.metrics[HEADLINE] == group.data.metrics[HEADLINE] == 0.1


def test_cells_of_another_process_count(work: Path) -> None:
    first, second = connect(work), connect(work)
    first.open(make_spec())  # both have read the experiment before the other adds to it
    run_cell(second, make_result(make_spec(fold="C1.1"), 0.4))
    run_cell(first, make_result(make_spec(), 0.2))
    first.finish()
    (group,), cells = by_level(work)
    assert len(cells) == 2
    assert group.data.metrics["n_cells"] == 2


def test_what_another_process_has_shown_since_is_not_shown_twice(work: Path) -> None:
    first, second = connect(work), connect(work)
    first.open(make_spec(fold="C1.2"))  # has read the experiment
    result = make_result(make_spec(), 0.4)
    run_cell(second, result)
    assert not first.record(result)
    assert len([r for r in by_level(work)[1] if r.data.tags["agl.fold"] == "C1.0"]) == 1


def test_a_tracker_that_dies_costs_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    recorder = connect(work, warnings)
    log = recorder.open(make_spec())

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("connection refused\nand many more words")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    for record in make_records():
        log.epoch(record)
    log.close(make_result(make_spec()))
    recorder.open(make_spec(fold="C1.1")).fail("whatever")
    assert recorder.record(make_result(make_spec())) is False
    recorder.finish()
    assert recorder.dead == "connection refused"
    (line,) = warnings
    assert line.startswith("tracking stopped: connection refused; results are safe in ")
    assert "agl-bench sync" in line and "\n" not in line


def test_a_server_that_dies_is_given_up_soon(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"experiment": {"experiment_id": "7", "name": "x", "lifecycle_stage": "active", "tags": []}}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    warnings: list[str] = []
    recorder = MlflowRecorder.connect(work, f"http://127.0.0.1:{server.server_port}", warn=warnings.append)
    assert recorder.links()["intra: leaderboard"].startswith(
        f"http://127.0.0.1:{server.server_port}/#/experiments/7/runs?"
    )
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    run_cell(recorder, make_result(make_spec()))
    assert time.monotonic() - began < 20
    assert len(warnings) == 1
    assert recorder.dead == f"http://127.0.0.1:{server.server_port} does not answer"


def test_no_server_no_wait(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    began = time.monotonic()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(TrackerUnavailable, match="no MLflow server answers") as caught:
        MlflowRecorder.connect(work)
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackerUnavailable, match="no MLflow server answers"):
        MlflowRecorder.connect(work, f"postgresql://user:secret@127.0.0.1:{port}/db")
    assert time.monotonic() - began < 10
    with pytest.raises(TrackerUnavailable, match="retired plain folders"):
        MlflowRecorder.connect(work, "file:///tmp/mlruns")


@pytest.mark.parametrize("address", ["http://host:port", "http://me:sec/ret@127.0.0.1:9", "https://h:50x/"])
def test_an_address_that_cannot_be_read(address: str, work: Path) -> None:
    with pytest.raises(TrackerUnavailable, match="port is not a number") as caught:
        MlflowRecorder.connect(work, address)
    assert "ret" not in str(caught.value)


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x?mode=ro"])
def test_a_database_without_a_file(address: str, work: Path) -> None:
    with pytest.raises(TrackerUnavailable, match="does not name a file"):
        MlflowRecorder.connect(work, address)


@pytest.mark.parametrize("name", ["w?x", "w%20x", os.fsdecode(b"w\xff")])
def test_a_folder_that_no_address_can_hold(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    if name == "w%20x" and sqlalchemy.make_url("sqlite:///%20").database == "%20":
        pytest.skip("this SQLAlchemy takes it as it is")
    with pytest.raises(TrackerUnavailable, match="--tracking none"):
        MlflowRecorder.connect(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_server_ends_with_who_started_it() -> None:
    start = """
import subprocess, sys, time
watched = [sys.executable, "-c", sys.argv[1], "sleep", "600"]
print(subprocess.Popen(watched, stdin=subprocess.PIPE, start_new_session=True).pid, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", start, WATCHED], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the server goes on")


def test_views_and_links(work: Path) -> None:
    recorder = connect(work)
    tags = MlflowClient(f"sqlite:///{work / 'mlflow.db'}").get_experiment_by_name("agl-bench/intra").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert {f"mlflow.sharedViewState.{view}" for view in ("leaderboard", "controls", "curves")} <= set(tags)
    assert recorder.links() == {}, "nobody serves a database file"
    links = recorder.links("http://localhost:5000/")
    assert len(links) == 10
    assert all(link.startswith("http://localhost:5000/#/experiments/") for link in links.values())


def test_serve_says_what_is_missing(work: Path) -> None:
    with pytest.raises(TrackerUnavailable, match="run `agl-bench run` first"):
        serve(work, f"sqlite:///{work / 'mlflow.db'}", ready=print)
    connect(work)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackerUnavailable, match="is taken"):
            serve(work, f"sqlite:///{work / 'mlflow.db'}", port=taken.getsockname()[1], ready=print)
    with pytest.raises(TrackerUnavailable, match="holds no runs"):
        serve(work, f"sqlite:///{work / 'mlflow.db'}", port=0, ready=print)


def make_standing(name: str, *, rank: int | None = 1, is_control: bool = False, **more: object) -> Standing:
    content = {
        "evaluation": "intra", "name": f"{name} · toy · flat", "colour": "#0072B2", "place": "toy · flat · clean",
        "is_control": is_control, "rank": rank, "of": 0 if is_control else 12, "pcc": 0.25, "baseline": "nothing",
        "difference": 0.03124, "low": -0.01, "high": 0.07, "verdict": "undecided against nothing",
    }  # fmt: skip
    return Standing(**content | more)  # type: ignore[arg-type]


def test_how_lines_stand(work: Path) -> None:
    recorder = connect(work)
    specs = {name: make_spec(name) for name in ("cutting", "steady", "bound")}
    for spec in specs.values():
        run_cell(recorder, make_result(spec))
    recorder.finish()
    standings = {
        specs["cutting"].group: make_standing("cutting(k=2)"),
        specs["steady"].group: make_standing("steady", rank=2, difference=np.nan, low=np.nan, high=np.nan, verdict=""),
        specs["bound"].group: make_standing("bound", rank=None, is_control=True),
        "a line that the tracker does not have": make_standing("other", rank=3),
    }
    for _ in range(2):
        recorder.annotate(standings)
    assert recorder.dead is None
    groups, cells = by_level(work)
    found = {r.data.tags["agl.selector"]: r for r in groups}
    assert found["cutting"].info.run_name == "★ cutting(k=2) · toy · flat"
    assert found["cutting"].data.tags["agl.standing"] == "toy · flat · clean: 01 of 12, highest mean"
    assert found["cutting"].data.tags["agl.difference"] == "+0.031 [-0.010, +0.070]"
    assert found["cutting"].data.tags["agl.verdict"] == "undecided against nothing"
    assert found["cutting"].data.metrics["difference_to_baseline"] == 0.0312
    assert found["cutting"].data.metrics["difference_to_baseline_high"] == 0.07
    assert found["cutting"].data.tags["mlflow.runColor"] == "#0072B2"
    assert found["steady"].info.run_name == "steady · toy · flat"
    assert not any(name.startswith("difference") for name in found["steady"].data.metrics)
    assert found["bound"].info.run_name == "bound · toy · flat (control)"
    assert {name: r.data.tags["agl.role"] for name, r in found.items()} == {
        "cutting": "method", "steady": "method", "bound": "control",
    }  # fmt: skip
    assert all("agl.standing" not in r.data.tags for r in cells)

    note = MlflowClient(f"sqlite:///{work / 'mlflow.db'}").get_experiment_by_name("agl-bench/intra").tags[NOTE]
    assert note.startswith("Highest mean test PCC: toy · flat · clean **cutting(k=2)** 0.250\n")
    connect(work)
    again = MlflowClient(f"sqlite:///{work / 'mlflow.db'}").get_experiment_by_name("agl-bench/intra").tags[NOTE]
    assert again == note, "the answer is no longer there once another command has looked"


def test_the_leaderboard_shows_methods_in_their_order() -> None:
    view = json.loads(VIEWS["leaderboard"])
    assert "tags.agl.role = 'method'" in view["searchFilter"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("tags.`agl.standing`", True)
    texts = [make_standing("a", rank=rank).text for rank in range(1, 13)]
    assert sorted(texts) == texts
    assert make_standing("a", rank=None).text.endswith("not ranked, other folds or seeds")


def test_long_settings_are_cut_in_sight(work: Path) -> None:
    recorder = connect(work)
    spec = dataclasses.replace(make_spec(), backbone=Part("flat", {"layers": ("conv",) * 300}, "tests 1", "b"))
    recorder.open(spec)
    assert recorder.dead is None
    assert by_level(work)[1][0].data.params["backbone.layers"].endswith("…")
