"""The answer for each dataset and evaluation in plain words: which selector, by how much, how sure, at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from agl_bench.bench.table import FEW_SEEDS
from agl_bench.comparison.statistics import ALPHA, TOO_FEW
from agl_bench.comparison.tables import p_text, plain, spread_text


def answer(where: str, lines: pd.DataFrame, against: pd.DataFrame, pairs: pd.DataFrame, *, baseline: str) -> str:
    """What can be said of one place.

    Args:
        where: how the place is named, e.g. "On heart, inter-batch".
        lines: its methods, without bounds and controls, from `tables.standings`.
        against: `statistics.pairs` of these with the baseline.
        pairs: `statistics.pairs` of each with each.
        baseline: what they are compared with.
    """
    if lines.empty:
        return f"{where}, no selector has been run that is a method."
    if len(lines) == 1:
        line = lines.iloc[0]
        score = spread_text(line["pcc_mean"], line["pcc_sd"])
        return f"{where}, {line['selector']} alone has been run (PCC {score}): there is nothing to compare it with."
    ratio = dict(zip(lines["selector"], lines["seconds_ratio"], strict=True)) if "seconds_ratio" in lines else {}
    rows = sorted(against.to_dict("records"), key=lambda r: -r["difference"])
    if not rows:
        top = lines.loc[lines["pcc_mean"].idxmax()]
        return (
            f"{where}, nothing is said of differences, because {baseline} has no fold in common with another selector; "
            f"the highest mean PCC is {_of(top['selector'])}, {spread_text(top['pcc_mean'], top['pcc_sd'])}."
        )
    top = rows[0]
    sentences = []
    better, worse, equal = ([r for r in rows if r["verdict"] == v] for v in ("better", "worse", "equivalent"))
    if all(r["verdict"] == TOO_FEW for r in rows):
        sentences.append(
            f"{where}, these cells cannot decide which selector is better: {_too_few(rows)}. "
            f"{_highest(top, ratio, baseline, with_p=False)}."
        )
    elif better:
        first = better[0]
        text = f"{where}, {first['a']} is better than {baseline} by {_gain(first)}{_cost(first['a'], ratio, baseline)}"
        others = [f"{r['a']} ({plain(r['difference'], '+.3f')})" for r in better[1:]]
        if others:
            text += f"; so {'is' if len(others) == 1 else 'are'} {_list(others)}"
        sentences.append(f"{text}. {_above_the_rest(first['a'], pairs, baseline)}")
    else:
        nobody = f"{where}, no selector is better than {baseline} beyond doubt"
        sentences.append(f"{nobody}. {_highest(top, ratio, baseline, with_p=True)}.")
    if worse:
        said = [f"{r['a']} ({plain(r['difference'], '+.3f')})" for r in worse]
        sentences.append(f"Worse than {baseline}: {_list(said)}.")
    if equal:
        sentences.append(f"Equivalent to {baseline} for practical purposes: {_list([r['a'] for r in equal])}.")
    return " ".join(sentences)


def _too_few(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why nothing can be concluded."""
    top = max(rows, key=lambda r: r["units"])
    reasons = []
    if top["seeds"] < FEW_SEEDS:
        reasons.append(f"{_count(top['seeds'], 'seed')} cannot tell a selector from the luck of its start")
    least = min(1.0, top["least_p"] * len(rows))
    if least > ALPHA:
        unit = "section" if top["evaluation"] == "intra" else "fold"
        allow = "allows" if top["units"] == 1 else "allow"
        also = f" with {len(rows)} selectors compared" if len(rows) > 1 else ""
        reasons.append(f"{_count(top['units'], f'tested {unit}')} {allow} no p below {p_text(least)}{also}")
    return _list(reasons) or "too few folds and seeds are shared"


def _highest(row: Mapping[str, Any], ratio: Mapping[str, float], baseline: str, *, with_p: bool) -> str:
    """The selector that is ahead of all others, or behind the baseline by least."""
    who = _of(row["a"]) if row["difference"] >= 0 else f"the baseline's, followed by {_of(row['a'])}"
    apart = f"{plain(row['difference'], '+.3f')} against {baseline}"
    detail = [] if not math.isfinite(row["low"]) else [f"95 % interval {_range(row)}"]
    if with_p and math.isfinite(row["p_holm"]):
        detail.append(_p(row["p_holm"]))
    inside = f" ({', '.join(detail)})" if detail else ""
    return f"The highest mean is {who}: {apart}{inside}{_cost(row['a'], ratio, baseline)}"


def _gain(row: Mapping[str, Any]) -> str:
    return f"{plain(row['difference'])} PCC (95 % interval {_range(row)}, {_p(row['p_holm'])})"


def _range(row: Mapping[str, Any]) -> str:
    return f"{plain(row['low'], '+.3f')} to {plain(row['high'], '+.3f')}"


def _p(p: float) -> str:
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _cost(selector: str, ratio: Mapping[str, float], baseline: str) -> str:
    times = ratio.get(selector, math.nan)
    return f", at {plain(times, '.1f')} times the time of {baseline}" if math.isfinite(times) else ""


def _above_the_rest(first: str, pairs: pd.DataFrame, baseline: str) -> str:
    """Whether the best one is better than every other, not only than the baseline."""
    rest = pairs[(pairs["a"] == first) & (pairs["b"] != baseline)]
    if rest.empty:
        return "There is no third selector."
    beaten = list(rest.loc[rest["verdict"] == "better", "b"])
    open_ = list(rest.loc[rest["verdict"] != "better", "b"])
    if not open_:
        return f"It is better than every other selector too ({_list(beaten)})."
    return f"That it is better than {_list(open_, 'or')} is not certain."


def _of(name: str) -> str:
    return f"{name}'s"


def _list(words: Sequence[str], joint: str = "and") -> str:
    return " ".join(filter(None, [", ".join(words[:-1]), joint if len(words) > 1 else "", words[-1]]))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
