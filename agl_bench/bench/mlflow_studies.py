"""Shows studies of tuning in MLflow: one run for each, with its history, importances and parallel coordinates.

A sink like the recorder of cells: a tracker that is away costs a line and no study.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_bench.bench.mlflow_tracker import Tracker, client_of, first_line, lock

# The tracker sets what mlflow reads while it is imported.
# isort: split
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from agl_bench.bench.tuned import STUDIES, Entry
from agl_bench.data.spreadsheet import as_csv
from agl_bench.digests import text_digest
from agl_bench.errors import TrackerUnavailable

EXPERIMENT = "agl-bench/tuning"
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito
_NO_SETTING = ("trial", "state", "value", "seconds")

History = Sequence[dict[str, Any]]  # `tune.StudyDone.history`


def show_study(
    work: Path, uri: str | None, selector: str, entry: Entry, importances: dict[str, float], history: History
) -> None:
    """Put a finished study in MLflow, in place of an earlier state of it.

    Raises:
        TrackerUnavailable: if the tracker cannot be used.
    """
    tracker = Tracker.of(work, uri)
    tracker.probe()
    try:
        client = client_of(tracker)
        with lock(tracker):
            found = client.get_experiment_by_name(EXPERIMENT)
            place = (tracker.artifacts / "tuning").as_uri() if tracker.artifacts else None
            experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=place)
        for run_id in _shown(client, experiment, entry.study):
            client.delete_run(run_id)
        tags = {
            "agl.level": "study", "agl.study": entry.study, "agl.selector": selector, "agl.dataset": entry.dataset,
            "agl.evaluation": entry.evaluation, "agl.backbone": entry.backbone, "agl.fold": entry.fold,
        }  # fmt: skip
        name = f"{selector} · {entry.dataset} · {entry.evaluation} · {entry.backbone}"
        run = client.create_run(experiment, tags=tags, run_name=name + (f" · fold {entry.fold}" if entry.fold else ""))
        run_id, now = run.info.run_id, run.info.start_time
        about = {"trials": entry.trials, "points": entry.points, "pruned": entry.pruned, "sampler": entry.sampler}
        about |= {"pruner": entry.pruner, "folds": ", ".join(entry.folds), "seeds": ", ".join(map(str, entry.seeds))}
        params = [
            Param(k, str(v)[:500]) for k, v in (about | {f"best.{k}": v for k, v in entry.settings.items()}).items()
        ]
        metrics = [Metric("best/validation_pcc", entry.validation_pcc, now, 0)]
        metrics += [Metric(f"importance/{k}", v, now, 0) for k, v in importances.items()]
        scored = [(step, row["value"]) for step, row in enumerate(history) if row["value"] is not None]
        metrics += [Metric("trial/validation_pcc", value, now + step, step) for step, value in scored]
        for start in range(0, max(len(metrics), len(params)), 100):
            client.log_batch(run_id, metrics[start : start + 100], params[start : start + 100], [])
        with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
            write_files(Path(folder), name, entry, importances, history)
            client.log_artifacts(run_id, folder)
        client.set_terminated(run_id, "FINISHED")
    except TrackerUnavailable:
        raise
    except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
        raise TrackerUnavailable(f"the study is not in MLflow ({tracker.name}): {first_line(error)}") from error


def _shown(client: MlflowClient, experiment: str, study: str) -> list[str]:
    """Runs that show a study. Names are compared here: MLflow's filters have no way to write both kinds of quotes."""
    found, token = list[str](), None
    while True:
        page = client.search_runs([experiment], "tags.agl.level = 'study'", page_token=token)
        found += [run.info.run_id for run in page if run.data.tags.get("agl.study") == study]
        token = page.token
        if not token:
            return found


def keep_files(out: Path, selector: str, entry: Entry, importances: dict[str, float], history: History) -> Path:
    """The files of a study in a folder of its own beside the tuned settings, where a report finds them.

    Raises:
        OSError: if they cannot be written.
    """
    words = [selector, entry.dataset, entry.evaluation, entry.backbone, entry.fold]
    whole = " ".join(filter(None, words))
    folder = out / STUDIES / re.sub(r"[^A-Za-z0-9_.]+", "-", whole).strip("-.")
    if re.search(r"[^A-Za-z0-9_.:/ -]", whole):  # two names may differ in nothing else
        folder = folder.with_name(f"{folder.name}-{text_digest(whole, 4)}")
    folder.mkdir(parents=True, exist_ok=True)
    name = " · ".join(words[:4]) + (f" · fold {entry.fold}" if entry.fold else "")
    write_files(folder, name, entry, importances, history)
    return folder


def write_files(folder: Path, name: str, entry: Entry, importances: dict[str, float], history: History) -> None:
    """trials.csv, history.png, and where there is something to draw importances.png and parallel_coordinates.png."""
    trials = as_csv(pd.DataFrame(list(history), dtype=object))
    (folder / "trials.csv").write_text(trials, encoding="utf-8")
    title = f"{name}, {entry.trials} trials"
    history_figure(title, history).savefig(folder / "history.png", dpi=120)
    if importances:
        importance_figure(title, importances).savefig(folder / "importances.png", dpi=120)
    if len(entry.settings) > 1 and any(row["value"] is not None for row in history):
        parallel_figure(title, history).savefig(folder / "parallel_coordinates.png", dpi=120)


def history_figure(title: str, history: History) -> Figure:
    """Score of every trial and the best so far; trials without a score as ticks at the bottom."""
    figure, axes = _figure(title)
    scored = [(n, row["value"]) for n, row in enumerate(history, start=1) if row["value"] is not None]
    best, line = -math.inf, []
    for number, value in scored:
        best = max(best, value)
        line.append((number, best))
    axes.plot(*zip(*scored, strict=True), "o", color=BLUE, label="trial")
    axes.plot(*zip(*line, strict=True), color=VERMILION, drawstyle="steps-post", label="best so far")
    ended = [n for n, row in enumerate(history, start=1) if row["value"] is None]
    if ended:
        axes.plot(ended, [0.02] * len(ended), "|", color=GREY, transform=axes.get_xaxis_transform(), label="pruned")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation PCC, mean over fits")
    axes.legend(frameon=False)
    return figure


def importance_figure(title: str, importances: dict[str, float]) -> Figure:
    """Share of each setting in the spread of the score."""
    figure, axes = _figure(title)
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh(names, [importances[n] for n in names], color=BLUE)
    axes.set_xlabel("importance (PED-ANOVA), sum 1")
    return figure


def parallel_figure(title: str, history: History) -> Figure:
    """One line for each scored trial over the searched settings, coloured by its score."""
    figure, axes = _figure(title)
    rows = sorted((row for row in history if row["value"] is not None), key=lambda row: row["value"])
    names = [key for key in rows[0] if key not in _NO_SETTING]
    columns = [_places([row[name] for row in rows]) for name in names]
    low, high = rows[0]["value"], rows[-1]["value"]
    for number, row in enumerate(rows):
        share = (row["value"] - low) / (high - low) if high > low else 1.0
        axes.plot(range(len(names)), [c[number] for c in columns], color=colormaps["viridis"](share), alpha=0.8)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set_yticks([])
    for index, name in enumerate(names):
        values = [row[name] for row in rows]
        ends = [min(values), max(values)] if _is_numeric(values) else sorted({str(v) for v in values})
        ends = [ends[0], ends[-1]]
        for end, (place, side) in zip(ends, ((-0.06, "top"), (1.06, "bottom")), strict=False):
            text = f"{end:.3g}" if isinstance(end, float) else str(end)
            axes.text(index, place, text, ha="center", va=side, fontsize=8, color=GREY)
    axes.set_ylim(-0.15, 1.15)
    figure.colorbar(_scale(low, high), ax=axes, label="validation PCC")
    return figure


def _scale(low: float, high: float) -> Any:
    return ScalarMappable(Normalize(low, high if high > low else low + 1e-9), colormaps["viridis"])


def _is_numeric(values: Sequence[object]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _places(values: Sequence[Any]) -> list[float]:
    """Values as places between 0 and 1; on a logarithmic scale where they span more than a factor of 20."""
    if not _is_numeric(values):
        known = sorted({str(v) for v in values})
        return [known.index(str(v)) / max(1, len(known) - 1) for v in values]
    low, high = min(values), max(values)
    if low > 0 and high / low > 20:
        values, low, high = [math.log(v) for v in values], math.log(low), math.log(high)
    return [(v - low) / (high - low) if high > low else 0.5 for v in values]


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
