"""Ready views of the MLflow pages: what a reader sees first, and the links that open it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from agl_bench.bench.recorder import Standing

HEADLINE = "test/pcc_gene_mean_section_mean"


def _view(
    level: str,
    widths: dict[str, int],
    charts: dict[str, str],
    *,
    role: str = "",
    order: str = f"metrics.`{HEADLINE}`",
    **more: object,
) -> str:
    """A saved view of the runs page, opened by `viewStateShareKey`.

    Args:
        level: of the runs to show.
        widths: column -> pixels.
        charts: metric -> BAR or LINE, shown before those that MLflow adds by itself.
        role: method or control; "" = both.
        order: what runs are sorted by; scores fall, texts rise.
        more: further state of the page.
    """
    section = {"uuid": "agl", "name": "overview", "columns": 2, "cardHeight": 460}
    switches = {"deleted": False, "isGenerated": False}
    return json.dumps(
        {
            "searchFilter": f"tags.agl.level = '{level}'" + (f" and tags.agl.role = '{role}'" if role else ""),
            "orderByKey": order,
            "orderByAsc": order.startswith("tags."),
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
            "tags.`agl.standing`": 245,  # first: it says what may be compared, and sorts by it
            f"metrics.`{HEADLINE}`": 212,
            "tags.`agl.difference`": 155,
            "tags.`agl.verdict`": 200,
            f"metrics.`{HEADLINE.replace('test/', 'test_sd/')}`": 240,
            "metrics.`n_cells`": 80,
            "metrics.`best/k`": 90,
            "metrics.`cost/seconds`": 110,
        },
        dict.fromkeys([HEADLINE, "difference_to_baseline", "best/k", "cost/seconds"], "BAR"),
        role="method",
        order="tags.`agl.standing`",
    ),
    "controls": _view(
        "group",
        {"tags.`agl.standing`": 380, f"metrics.`{HEADLINE}`": 255, "metrics.`n_cells`": 80},
        dict.fromkeys([HEADLINE], "BAR"),
        role="control",
    ),
    "curves": _view(
        "cell",
        {"params.`fold`": 90, "params.`seed`": 70, f"metrics.`{HEADLINE}`": 255, "metrics.`best/k`": 90},
        dict.fromkeys(["selection/k", "validation/pcc", "train/loss", "outer/loss"], "LINE"),
        groupBy={"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "agl.line"}]},
    ),
}
DESCRIPTION = (
    "Auxiliary-gene selection, {evaluation}-batch. ★ marks the line with the highest mean test PCC among those that it "
    "may be compared with; `agl.standing` is the rank among them, and `agl.verdict` says whether the difference to the "
    "baseline (`agl.difference`, with its 95 % interval) can be told from chance. A run with `agl.level = group` is "
    "one line of the table (selector × dataset × backbone × settings) with means over its cells; below it, "
    "`agl.level = cell`, is one run for each fold and seed with its curves. `agl.role = control` is no method but a "
    "bound for methods. `test/pcc_gene_mean_section_mean` is the headline score; `best/k` counts the auxiliary genes "
    "that train along, `best/…` belonging to the epoch with the highest validation PCC, whose model is tested. "
    "`agl-bench ui` prints the links to the ready views."
)


def describe(evaluation: str, best: Sequence[Standing] = ()) -> str:
    """What stands above the runs of an experiment: the answer first, then what is what.

    Args:
        evaluation: of the experiment.
        best: the standings that are best, one for each place.
    """
    answers, details = [], []
    for standing in best:
        selector = standing.name.partition(" · ")[0]
        answers.append(f"{standing.place} **{selector}** {standing.pcc:.3f}")  # all that shows while this is folded
        if standing.verdict:
            difference = f"difference to {standing.baseline} {standing.difference_text}: {standing.verdict}"
            details.append(f"- {standing.place}: {selector}, {difference}")
    head = f"Highest mean test PCC: {'; '.join(answers)}\n\n" if answers else ""
    head += "\n".join(details) + "\n\n" if details else ""
    return head + DESCRIPTION.format(evaluation=evaluation)


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
            ("controls, which bound the scores", "TABLE", "controls"),
            ("curves, mean of each line", "CHART", "curves"),
            ("all folds and seeds", "TABLE", ""),
        ):
            share = f"&viewStateShareKey={view}" if view else ""
            found[f"{evaluation}: {what}"] = page.format(base=base.rstrip("/"), id=number, mode=mode, view=share)
    return found
