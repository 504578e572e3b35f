"""Shows cells in MLflow: one run for each line of a table, and below it one for each fold and seed.

A sink, never the truth. The tracker may vanish at any time: from then on the recorder says so once and does nothing,
and `agl-bench sync` rebuilds everything from the cell store.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agl_bench.addresses import masked
from agl_bench.bench.mlflow_tracker import Tracker, client_of, first_line, lock, to_stderr

# The tracker sets what mlflow reads while it is imported.
# isort: split
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from agl_bench.bench.mlflow_models import Models, register
from agl_bench.bench.mlflow_views import VIEWS, describe, experiment_name, links
from agl_bench.bench.recorder import CellLog, Recorder, Standing
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.data.folds import EVALUATIONS
from agl_bench.digests import text_digest
from agl_bench.errors import AglBenchError, BadSpec, TrackerUnavailable
from agl_bench.training.records import EpochRecord

REPORT = ("report.html", "tables", "figures")  # what a report consists of
MODEL = "agl.model"  # tag of a run: the address of its model
FLUSH_SECONDS = 5.0  # a running cell's curves are at most this old
FLUSH_METRICS = 500  # MLflow takes 1000 in one request
NOTE = "mlflow.note.content"  # above the runs
DECIMALS = 4  # of the means of a line, for readers; cells have all digits
FLUSH_SETTINGS = 100  # MLflow takes 100 params, and 100 tags, in one request

T = TypeVar("T")


def _params(spec: RunSpec) -> dict[str, object]:
    """What all folds and seeds of a group share."""
    values: dict[str, object] = {
        "selector": spec.selector.name,
        "dataset": spec.dataset.label,
        "backbone": spec.backbone.name,
        "evaluation": spec.evaluation,
        "preset": spec.preset,
        "version": spec.version,
        "device": spec.device,
    }
    for kind in ("selector", "dataset", "backbone"):
        values |= {f"{kind}.{k}": v for k, v in getattr(spec, kind).settings.items()}
        values[f"{kind}.provider"] = getattr(spec, kind).provider
    if spec.tuning:
        values |= {f"tuning.{k}": v for k, v in vars(spec.tuning).items()}
    return values | {f"protocol.{k}": v for k, v in spec.protocol.settings().items()}


def _group_name(spec: RunSpec) -> str:
    tuning = f" · {spec.tuning.label}" if spec.tuning else ""
    return f"{spec.selector.name} · {spec.dataset.label} · {spec.backbone.name}{tuning}"


def _tags(spec: RunSpec, level: str) -> dict[str, str]:
    """What runs are found by."""
    tags = {
        "agl.level": level,
        "agl.group": spec.group,
        "agl.line": f"{_group_name(spec)} · {spec.preset}",  # the group for readers, e.g. to average curves over
        "agl.selector": spec.selector.name,
        "agl.dataset": spec.dataset.label,
        "agl.evaluation": spec.evaluation,
        "agl.backbone": spec.backbone.name,
        "agl.preset": spec.preset,
        "agl.tuning": spec.tuning.label if spec.tuning else "fixed settings",
        "agl.role": "control" if spec.protocol.patches == "shuffled" else "method",  # other controls: see `_annotate`
        "mlflow.source.name": f"agl-bench {spec.version}",
        "mlflow.source.type": "LOCAL",
    }
    if level == "cell":
        tags |= {"agl.key": spec.key, "agl.fold": spec.fold, "agl.seed": str(spec.seed)}
    return tags


def _epoch_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics of one row of `Result.epochs`."""
    metrics = {
        "train/loss": row["training_loss"],
        "outer/loss": row["outer_loss"],
        "outer/signal_to_noise": row["outer_signal_to_noise"],
        "validation/pcc": row["validation_pcc"],
        "validation/nan_genes": row["validation_nan_genes"],
        "selection/k": row["selected"],
        "selection/effective": row["effective"],
    }
    return metrics | {f"selection/{k}": v for k, v in row.items() if k.startswith("parameter.")}


def _outcome_metrics(result: Result) -> dict[str, float | None]:
    """Metrics of a finished cell."""
    tested = result.epochs[result.epochs["epoch"] == result.best_epoch]
    metrics: dict[str, float | None] = {f"test/{k}": v for k, v in result.scores.items()}
    metrics |= {f"cost/{k}": v for k, v in result.cost.items()}
    metrics["best/epoch"] = result.best_epoch
    if len(tested):
        row = tested.iloc[-1]
        metrics |= {"best/k": row["selected"], "best/validation_pcc": row["validation_pcc"]}
    return metrics


def _group_metrics(cells: list[dict[str, float]]) -> dict[str, float]:
    """Means over the finished cells of a group, and standard deviations of the test scores."""
    metrics = {"n_cells": float(len(cells))}
    for name in sorted({n for cell in cells for n in cell if n.startswith(("test/", "best/", "cost/"))}):
        values = [cell[name] for cell in cells if name in cell]
        metrics[name] = round(statistics.fmean(values), DECIMALS)
        if name.startswith("test/") and len(values) > 1:
            metrics[name.replace("test/", "test_sd/", 1)] = round(statistics.stdev(values), DECIMALS)
    return metrics


def _write_files(result: Result, folder: Path) -> None:
    """Everything that is too long for a metric."""
    result.genes.to_parquet(folder / "genes.parquet", index=False)
    result.epochs.to_parquet(folder / "epochs.parquet", index=False)
    result.outer.to_parquet(folder / "outer.parquet", index=False)
    content = {k: getattr(result, k) for k in ("scores", "best_epoch", "counts", "cost", "provenance", "fold")}
    text = json.dumps({"spec": result.spec.as_json(), **content}, indent=1)
    (folder / "result.json").write_text(text, encoding="utf-8")
    if result.epochs["selected"].nunique() > 1:
        k_trajectory(result).savefig(folder / "k_trajectory.png", dpi=120)


def k_trajectory(result: Result) -> Figure:
    """How the number of selected auxiliary genes and the validation PCC moved while a cell was trained."""
    blue, vermilion, grey = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito: told apart by colour-blind readers too
    spec, epochs = result.spec, result.epochs
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    total = result.counts.get("auxiliary_genes")
    of = f" of {total:,}" if total else ""
    for axes, column, colour, label in (
        (upper, "selected", blue, f"auxiliary genes selected{of}"),
        (lower, "validation_pcc", vermilion, "validation PCC"),
    ):
        axes.plot(epochs["epoch"], epochs[column], color=colour, linewidth=2)
        axes.axvline(result.best_epoch, color=grey, linewidth=1, linestyle="--")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for _, row in epochs[epochs["epoch"] == result.best_epoch].iterrows():
            axes.plot(row["epoch"], row[column], "o", color=colour, markersize=8, markeredgecolor="white")
            value = f"k = {row[column]:,.0f} at epoch {row['epoch']:.0f}, whose model is tested"
            right = row["epoch"] > epochs["epoch"].max() / 2
            axes.annotate(
                value if axes is upper else f"{row[column]:.3f}",
                (row["epoch"], 0.95),  # above the curve, which the margins keep below
                xycoords=axes.get_xaxis_transform(),
                xytext=(-6 if right else 6, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
            )
    upper.margins(y=0.18)
    lower.margins(y=0.25)
    lower.set_xlabel("epoch")
    upper.set_title(
        f"{spec.selector.name} on {spec.dataset.label}, {spec.evaluation}-batch, fold {spec.fold}, seed {spec.seed}, "
        f"{spec.backbone.name}",
        loc="left",
        fontsize=11,
    )
    return figure


@dataclass
class _Shown:
    """A run that the tracker has."""

    run_id: str
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    is_described: bool = True  # has its params

    @property
    def is_finished(self) -> bool:
        return self.status == "FINISHED"


@dataclass
class _Index:
    """What an experiment holds, read page by page once instead of asked for cell by cell."""

    cells: dict[str, list[_Shown]] = field(default_factory=dict)  # by RunSpec.key, newest first
    groups: dict[str, _Shown] = field(default_factory=dict)  # by RunSpec.group
    members: dict[str, set[str]] = field(default_factory=dict)  # group -> keys

    def add(self, key: str, group: str, shown: _Shown) -> None:
        """A cell, newer than those before."""
        self.cells.setdefault(key, []).insert(0, shown)
        self.members.setdefault(group, set()).add(key)

    def finished(self, group: str) -> list[dict[str, float]]:
        """Metrics of the finished cells of a group, each cell once."""
        shown = (
            next((s for s in self.cells.get(key, []) if s.is_finished), None)
            for key in sorted(self.members.get(group, ()))
        )
        return [s.metrics for s in shown if s]


class MlflowRecorder(Recorder):
    """Shows cells in MLflow.

    Attributes:
        dead: why nothing is shown any more; None while all is well.
        uri: where it is shown.
    """

    def __init__(
        self,
        tracker: Tracker,
        client: MlflowClient,
        experiments: dict[str, str],
        work: Path,
        warn: Callable[[str], None],
        models: Models | None,
    ) -> None:
        """Use `connect`."""
        self.dead: str | None = None
        self.uri = tracker.name
        self._tracker, self._client, self._experiments = tracker, client, experiments
        self._work, self._warn, self._models = work, warn, models
        self._indices: dict[str, _Index] = {}
        self._touched: dict[str, RunSpec] = {}  # groups of this session, each with one of its specs
        self._moment = 0

    @classmethod
    def connect(
        cls,
        work: Path,
        uri: str | None = None,
        *,
        warn: Callable[[str], None] | None = None,
        models: Models | None = None,
    ) -> MlflowRecorder:
        """Reach the tracker; create its database and experiments where they do not exist.

        Args:
            work: work folder.
            uri: address; None = MLFLOW_TRACKING_URI, or else a database in the work folder.
            warn: says one line to the user; None = on stderr.
            models: logs the models of cells that are shown; None = none are logged.

        Raises:
            TrackerUnavailable: within seconds, if it cannot be used.
        """
        tracker = Tracker.of(work, uri)
        tracker.probe()
        try:
            client = client_of(tracker, warn)
            with lock(tracker):
                experiments = {e: _make_experiment(client, tracker, e) for e in EVALUATIONS}
        except TrackerUnavailable:
            raise
        except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
            raise TrackerUnavailable(f"cannot track to {tracker.name}: {first_line(error)}") from error
        return cls(tracker, client, experiments, work.absolute(), warn or to_stderr, models)

    def open(self, spec: RunSpec) -> CellLog:
        """A run for the cell, in place of any earlier one of the same key."""
        return _Log(self, spec, self.guarded(lambda: self._start(spec), None))

    def record(self, result: Result, *, anew: bool = False) -> bool:
        """Show a finished cell unless it is shown as finished; one that a killed process left is replaced.

        Args:
            result: of the cell.
            anew: it was computed just now, and takes the place of what is shown.
        """
        return self.guarded(lambda: self._record(result, anew), False)

    def record_model(self, spec: RunSpec) -> str | None:
        """Log the model of a cell that is shown, unless it is there; its address, None if there is none to log."""
        return self.guarded(lambda: self._record_model(spec), None)

    def register_model(self, spec: RunSpec, name: str) -> int:
        """Register the logged model of a cell; returns the version.

        Raises:
            BadSpec: if the cell has no model there, or MLflow refuses the name.
        """
        run_id, address = self._model_of(spec)
        if not address:
            raise BadSpec(f"cell {spec.key} has no model in MLflow to register")
        return register(self._client, address.removeprefix("models:/"), run_id, name, _tags(spec, "cell"))

    def finish(self) -> None:
        """Bring the means of every touched group up to date, other processes' cells included, and close them."""
        self.guarded(self._finish, None)

    def annotate(self, standings: Mapping[str, Standing]) -> None:
        """Show at the run of each line how it stands; lines that the tracker does not have are passed over."""
        self.guarded(lambda: self._annotate(standings), None)

    def links(self, base: str | None = None) -> dict[str, str]:
        """Ready views: what is shown -> address; none if the tracker is a database that nobody serves.

        Args:
            base: address of the server; None = the tracker itself.
        """
        base = base or (self._tracker.page if self._tracker.is_server else None)
        return links(base, self._experiments) if base else {}

    def guarded(self, action: Callable[[], T], otherwise: T) -> T:
        """Do something with the tracker; if that fails, stop tracking for good and say so once."""
        if self.dead is not None:
            return otherwise
        try:
            return action()
        except Exception as error:  # noqa: BLE001  (whatever a tracker raises, it may not cost a result)
            silent = any(words in str(error) for words in ("Max retries exceeded", "timed out", "Connection aborted"))
            self.dead = f"{self.uri} does not answer" if silent else first_line(error)
            self._warn(
                f"tracking stopped: {self.dead}; results are safe in {self._work / 'cells'}; run `agl-bench sync` when "
                "the server is back"
            )
            return otherwise

    # What follows talks to MLflow and may raise.

    def show_report(self, folder: Path) -> dict[str, str]:
        """See `log_report`."""
        found = {}
        tags = {"agl.level": "report", "agl.work": text_digest(str(self._work))}
        same = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        for evaluation, experiment in self._experiments.items():
            if not self._client.search_runs([experiment], "tags.agl.level = 'cell'", max_results=1):
                continue
            before = self._client.search_runs([experiment], same)
            run_id = str(self._client.create_run(experiment, tags=tags, run_name="report").info.run_id)
            for part in REPORT:  # whatever else lies in the folder stays out
                if (folder / part).is_dir():
                    self._client.log_artifacts(run_id, str(folder / part), part)
                elif (folder / part).is_file():
                    self._client.log_artifact(run_id, str(folder / part))
            self._client.set_terminated(run_id, "FINISHED")
            for run in before:
                self._client.delete_run(run.info.run_id)
            found[evaluation] = run_id
        return found

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float | None] | list[Metric] | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log in as few requests as MLflow allows."""
        if not isinstance(metrics, list):
            metrics = self.metrics(metrics or {}, 0)
        param_list = [Param(_name_of(k), _text(v)) for k, v in (params or {}).items() if _text(v)]
        tag_list = [RunTag(k, masked(v)) for k, v in (tags or {}).items()]
        while metrics or param_list or tag_list:
            self._client.log_batch(
                run_id, metrics[:FLUSH_METRICS], param_list[:FLUSH_SETTINGS], tag_list[:FLUSH_SETTINGS]
            )
            metrics, param_list, tag_list = (
                metrics[FLUSH_METRICS:],
                param_list[FLUSH_SETTINGS:],
                tag_list[FLUSH_SETTINGS:],
            )

    def metrics(self, values: Mapping[str, float | None], step: int) -> list[Metric]:
        """As MLflow wants them; without those that have no value, since a NaN spoils sorting and charts."""
        # At equal times and steps MLflow would show the larger value, not the later one.
        self._moment = moment = max(_now(), self._moment + 1)
        return [
            Metric(_name_of(name), float(value), moment, step)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]

    def conclude(self, spec: RunSpec, run_id: str, result: Result) -> None:
        """Log what is known at the end of a cell and bring its group up to date."""
        outcome = self.metrics(_outcome_metrics(result), 0)
        commit = str(result.provenance.get("commit") or "")
        params = {"commit": commit} | {f"counts.{k}": v for k, v in result.counts.items()}
        params |= {f"fold.{k}": v for k, v in result.fold.items() if v is not None}
        self.log(run_id, outcome, params, {"mlflow.source.git.commit": commit} if commit else {})
        with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
            _write_files(result, Path(folder))
            self._client.log_artifacts(run_id, folder)
        self._client.set_terminated(run_id, "FINISHED")
        index = self._index(spec.evaluation)
        for shown in index.cells[spec.key]:
            if shown.run_id == run_id:
                shown.status, shown.metrics = "FINISHED", {m.key: m.value for m in outcome}
        self._update_group(spec)
        if self._models is not None:
            self._log_model(spec, run_id)

    def abandon(self, spec: RunSpec, run_id: str, sentence: str) -> None:
        """A cell failed."""
        self.log(run_id, tags={"agl.error": sentence[:5000]})
        self._client.set_terminated(run_id, "FAILED")
        for shown in self._index(spec.evaluation).cells[spec.key]:
            if shown.run_id == run_id:
                shown.status = "FAILED"

    def _start(self, spec: RunSpec, seconds: float = 0) -> str:
        index = self._index(spec.evaluation)
        for shown in index.cells.pop(spec.key, []):
            self._client.delete_run(shown.run_id)
        group = self._open_group(spec)
        run = self._client.create_run(
            self._experiments[spec.evaluation],
            start_time=_now() - int(1000 * seconds),
            tags=_tags(spec, "cell") | {"mlflow.parentRunId": group.run_id},
            run_name=f"{spec.selector.name} · fold {spec.fold} · seed {spec.seed}",  # legends show nothing else
        )
        index.add(spec.key, spec.group, _Shown(run.info.run_id, "RUNNING"))
        self.log(run.info.run_id, params=_params(spec) | {"fold": spec.fold, "seed": spec.seed})
        self._log_dataset(run.info.run_id, spec)
        return str(run.info.run_id)

    def _record(self, result: Result, anew: bool) -> bool:
        spec = result.spec
        self._touched[spec.group] = spec
        is_shown = any(s.is_finished for s in self._index(spec.evaluation).cells.get(spec.key, []))
        if not anew and (is_shown or self._is_finished_elsewhere(spec)):
            return False
        run_id = self._start(spec, result.cost.get("seconds", 0))
        rows = result.epochs.to_dict("records")
        self.log(run_id, [m for row in rows for m in self.metrics(_epoch_metrics(row), int(row["epoch"]))])
        self.conclude(spec, run_id, result)
        return True

    def _record_model(self, spec: RunSpec) -> str | None:
        run_id, address = self._model_of(spec)
        return address or (self._log_model(spec, run_id) if run_id else None)

    def _log_model(self, spec: RunSpec, run_id: str) -> str | None:
        """What is wrong with one model is said and costs no other."""
        assert self._models is not None, "connected without models"
        try:
            number = self._models.log(self._client, self._experiments[spec.evaluation], run_id, spec)
        except AglBenchError as error:
            self._warn(f"no model of cell {spec.key} in MLflow: {error}")
            return None
        address = f"models:/{number}"
        self.log(run_id, tags={MODEL: address})
        return address

    def _model_of(self, spec: RunSpec) -> tuple[str, str]:
        """The run that shows a cell as finished, and the address of its model; "" for what is not there."""
        shown = next((s for s in self._index(spec.evaluation).cells.get(spec.key, []) if s.is_finished), None)
        if shown is None:
            return "", ""
        return shown.run_id, str(self._client.get_run(shown.run_id).data.tags.get(MODEL, ""))

    def _is_finished_elsewhere(self, spec: RunSpec) -> bool:
        """Whether another process has shown the cell since the index was read."""
        found = self._client.search_runs(
            [self._experiments[spec.evaluation]],
            f"tags.agl.level = 'cell' and tags.agl.key = '{spec.key}' and attributes.status = 'FINISHED'",
            max_results=1,
        )
        return bool(found)

    def _finish(self) -> None:
        self._indices.clear()  # other processes may have finished cells of the same groups
        for spec in self._touched.values():
            group = self._index(spec.evaluation).groups.get(spec.group)
            if group is None:
                continue  # every cell of it was recorded as finished, and somebody has deleted the group
            self._update_group(spec)
            if not group.is_finished:
                self._client.set_terminated(group.run_id, "FINISHED")
                group.status = "FINISHED"

    def _index(self, evaluation: str) -> _Index:
        """What the experiment holds; read at the first need."""
        if evaluation not in self._indices:
            index, token = _Index(), None
            while True:
                page = self._client.search_runs(
                    [self._experiments[evaluation]],
                    max_results=1000,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
                for run in page:
                    _enter(index, run)
                token = page.token
                if not token:
                    break
            self._indices[evaluation] = index
        return self._indices[evaluation]

    def _open_group(self, spec: RunSpec) -> _Shown:
        self._touched[spec.group] = spec
        groups = self._index(spec.evaluation).groups
        if spec.group not in groups or not groups[spec.group].is_described:
            with lock(self._tracker):
                groups[spec.group] = self._find_group(spec) or self._make_group(spec)
                self._describe_group(spec, groups[spec.group])
        group = groups[spec.group]
        if group.status != "RUNNING":
            self._client.update_run(group.run_id, status="RUNNING")
            group.status = "RUNNING"
        return group

    def _find_group(self, spec: RunSpec) -> _Shown | None:
        """A group that another process has made in the meantime."""
        found = self._client.search_runs(
            [self._experiments[spec.evaluation]],
            f"tags.agl.level = 'group' and tags.agl.group = '{spec.group}'",
            max_results=1,
        )
        return _shown(found[0]) if found else None

    def _make_group(self, spec: RunSpec) -> _Shown:
        run = self._client.create_run(
            self._experiments[spec.evaluation],
            tags=_tags(spec, "group"),
            run_name=_group_name(spec),
        )
        return _Shown(run.info.run_id, "RUNNING", is_described=False)

    def _describe_group(self, spec: RunSpec, group: _Shown) -> None:
        """Log what all cells share, unless it is there: a process or server may be killed after it made the run."""
        if not group.is_described:
            self._log_dataset(group.run_id, spec)
            self.log(group.run_id, params=_params(spec))  # last: a run that has them has everything
            group.is_described = True

    def _update_group(self, spec: RunSpec) -> None:
        index = self._index(spec.evaluation)
        group, metrics = index.groups.get(spec.group), _group_metrics(index.finished(spec.group))
        if group is not None and metrics != group.metrics:
            self.log(group.run_id, metrics)
            group.metrics = metrics

    def _annotate(self, standings: Mapping[str, Standing]) -> None:
        for key, standing in standings.items():
            group = self._index(standing.evaluation).groups.get(key)
            if group is not None:
                metrics = {
                    "difference_to_baseline": standing.difference,
                    "difference_to_baseline_low": standing.low,
                    "difference_to_baseline_high": standing.high,
                }
                mark = "★ " if standing.is_best else ""
                tags = {
                    "mlflow.runName": f"{mark}{standing.name}{' (control)' if standing.is_control else ''}",
                    "agl.role": "control" if standing.is_control else "method",
                    "agl.standing": standing.text,
                    "agl.difference": standing.difference_text or "–",
                    "agl.verdict": standing.verdict or "–",
                    "agl.baseline": standing.baseline,
                    "mlflow.runColor": standing.colour,
                }
                self.log(group.run_id, {k: round(v, DECIMALS) for k, v in metrics.items()}, tags=tags)
        for evaluation in {s.evaluation for s in standings.values()}:
            here = {s.place: s for s in standings.values() if s.evaluation == evaluation and s.is_best}
            note = describe(evaluation, [here[place] for place in sorted(here)])
            self._client.set_experiment_tag(self._experiments[evaluation], NOTE, note)

    def _log_dataset(self, run_id: str, spec: RunSpec) -> None:
        part = spec.dataset
        dataset = Dataset(
            name=part.name,
            digest=(spec.data or "unknown")[:36],
            source_type="agl-bench",
            source=masked(json.dumps({"provider": part.provider, "settings": part.settings})),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "benchmark")])])


class _Log(CellLog):
    """The run of one cell; curves go out in batches."""

    def __init__(self, recorder: MlflowRecorder, spec: RunSpec, run_id: str | None) -> None:
        self._recorder, self._spec, self._run_id = recorder, spec, run_id
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()

    def epoch(self, record: EpochRecord) -> None:
        """Keep, and log if enough has come together."""
        self._waiting += self._recorder.metrics(_epoch_metrics(record.row()), record.epoch)
        if len(self._waiting) >= FLUSH_METRICS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._recorder.guarded(self._flush, None)

    def close(self, result: Result) -> None:
        """Log the rest."""
        run_id = self._run_id
        if run_id is not None:
            self._recorder.guarded(self._flush, None)
            self._recorder.guarded(lambda: self._recorder.conclude(self._spec, run_id, result), None)

    def fail(self, sentence: str) -> None:
        """Log what there is and why it ends."""
        run_id = self._run_id
        if run_id is not None:
            self._recorder.guarded(self._flush, None)
            self._recorder.guarded(lambda: self._recorder.abandon(self._spec, run_id, sentence), None)

    def _flush(self) -> None:
        if self._run_id is not None:
            self._recorder.log(self._run_id, self._waiting)
        self._waiting, self._flushed = [], time.monotonic()


def log_report(work: Path, uri: str | None, folder: Path) -> dict[str, str]:
    """Show a report with its figures and tables in MLflow, in place of an earlier one of the same work folder.

    It becomes the artifacts of one run, tagged `agl.level = report`, in each experiment that has cells.

    Args:
        work: work folder.
        uri: address of the tracker; None as in `MlflowRecorder.connect`.
        folder: of the report; what `REPORT` names is shown.

    Returns:
        evaluation -> id of the run.

    Raises:
        BadSpec: if the folder is not there or empty, or nothing is in MLflow that it could be a report of.
        TrackerUnavailable: if the tracker cannot be used.
    """
    if not any((folder / part).exists() for part in REPORT):
        raise BadSpec(f"{folder} is not the folder of a report, so there is nothing to show in MLflow")
    recorder = MlflowRecorder.connect(work, uri)
    try:
        found = recorder.show_report(folder)
    except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
        raise TrackerUnavailable(f"the report cannot be shown in {recorder.uri}: {first_line(error)}") from error
    if not found:
        raise BadSpec(f"{recorder.uri} shows no cells to report on; `agl-bench sync --work {work}` brings them there")
    return found


def _enter(index: _Index, run: Run) -> None:
    tags, shown = run.data.tags, _shown(run)
    if tags.get("agl.level") == "group":
        index.groups.setdefault(tags["agl.group"], shown)
    elif tags.get("agl.level") == "cell":
        index.add(tags["agl.key"], tags["agl.group"], shown)


def _shown(run: Run) -> _Shown:
    return _Shown(run.info.run_id, run.info.status, dict(run.data.metrics), is_described=bool(run.data.params))


def _make_experiment(client: MlflowClient, tracker: Tracker, evaluation: str) -> str:
    """Id of the experiment; its tags are brought up to date."""
    name = experiment_name(evaluation)
    tags = {
        "mlflow.experimentKind": "custom_model_development",  # yet only workflowType in a link decides how it opens
        NOTE: describe(evaluation),
        **{f"mlflow.sharedViewState.{view}": state for view, state in VIEWS.items()},
    }
    found = client.get_experiment_by_name(name)
    if found is None:
        place = (tracker.artifacts / evaluation).as_uri() if tracker.artifacts else None
        return str(client.create_experiment(name, artifact_location=place, tags=tags))
    if found.lifecycle_stage != "active":
        raise TrackerUnavailable(
            f"experiment '{name}' of {tracker.name} has been deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    for key, value in tags.items():
        known = found.tags.get(key, "")
        if known != value and not (key == NOTE and known.endswith(value)):  # the answers stand before it
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _name_of(text: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _text(value: object) -> str:
    """A setting as text; long ones are cut here, since MLflow would cut them without a word."""
    text = masked(", ".join(map(str, value)) if isinstance(value, tuple | list) else value)
    return text if len(text) <= 500 else text[:499] + "…"


def _now() -> int:
    return int(time.time() * 1000)
