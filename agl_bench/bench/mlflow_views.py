"""Ready views of the MLflow pages: what a reader sees first, and the links that open it."""

from __future__ import annotations

import json
from collections.abc import Mapping

HEADLINE = "test/pcc_gene_mean_section_mean"


def _view(level: str, widths: dict[str, int], charts: dict[str, str], **more: object) -> str:
    """A saved view of the runs page, opened by `viewStateShareKey`.

    Args:
        level: of the runs to show.
        widths: column -> pixels.
        charts: metric -> BAR or LINE, shown before those that MLflow adds by itself.
        more: further state of the page.
    """
    section = {"uuid": "agl", "name": "overview", "columns": 2, "cardHeight": 460}
    switches = {"deleted": False, "isGenerated": False}
    return json.dumps(
        {
            "searchFilter": f"tags.agl.level = '{level}'",
            "orderByKey": f"metrics.`{HEADLINE}`",
            "orderByAsc": False,
            "selectedColumns": list(widths),
            "columnOrder": list(widths),
            "columnWidths": widths,
            "runsHiddenMode": "SHOW_ALL",
            "compareRunSections": [section | switches | {"display": True, "isReordered": True}],
            "isAccordionReordered": True,  # ours first, not in alphabetical order
            "compareRunCharts": [_chart(metric, kind) | switches for metric, kind in charts.items()],
            **more,
        }
    )


def _chart(metric: str, kind: str) -> dict[str, object]:
    chart = {"type": kind, "uuid": metric, "metricSectionId": "agl", "metricKey": metric, "displayName": metric}
    line = {
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "useGlobalXaxisKey": True,
    }
    return chart | {"runsCountToCompare": 20} | (line if kind == "LINE" else {})


VIEWS = {
    "leaderboard": _view(
        "group",
        {
            "params.`preset`": 100,  # first: lines of different presets are not to be compared
            f"metrics.`{HEADLINE}`": 255,
            f"metrics.`{HEADLINE.replace('test/', 'test_sd/')}`": 275,
            "metrics.`n_cells`": 80,
            "metrics.`best/k`": 90,
            "metrics.`best/epoch`": 100,
            "metrics.`cost/seconds`": 110,
        },
        dict.fromkeys([HEADLINE, "best/k", "test/spearman_gene_mean_section_mean", "cost/seconds"], "BAR"),
    ),
    "curves": _view(
        "cell",
        {"params.`fold`": 90, "params.`seed`": 70, f"metrics.`{HEADLINE}`": 255, "metrics.`best/k`": 90},
        dict.fromkeys(["selection/k", "validation/pcc", "train/loss", "outer/loss"], "LINE"),
        groupBy={"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "agl.line"}]},
    ),
}
DESCRIPTION = (
    "Auxiliary-gene selection, {evaluation}-batch. Each run tagged `agl.level = group` is one line of the table "
    "(selector × dataset × backbone × settings) with the mean over its cells; below it, `agl.level = cell`, is one run "
    "for each fold and seed with its curves. `test/pcc_gene_mean_section_mean` is the headline score; `selection/k` "
    "counts the auxiliary genes that train along; `best/…` belongs to the epoch with the highest validation PCC, whose "
    "model is tested. `agl-bench ui` prints the links to the ready views."
)


def experiment_name(evaluation: str) -> str:
    """Name of the experiment that holds an evaluation."""
    return f"agl-bench/{evaluation}"


def links(base: str, experiments: Mapping[str, str]) -> dict[str, str]:
    """Ready views: what is shown -> address.

    Args:
        base: address of the server.
        experiments: evaluation -> id of its experiment.
    """
    page = "{base}/#/experiments/{id}/runs?workflowType=machine_learning&compareRunsMode={mode}{view}"
    found = {}
    for evaluation, number in experiments.items():
        for what, mode, view in (
            ("leaderboard", "TABLE", "leaderboard"),
            ("scores as charts", "CHART", "leaderboard"),
            ("curves, mean of each line", "CHART", "curves"),
            ("all folds and seeds", "TABLE", ""),
        ):
            share = f"&viewStateShareKey={view}" if view else ""
            found[f"{evaluation}: {what}"] = page.format(base=base.rstrip("/"), id=number, mode=mode, view=share)
    return found
