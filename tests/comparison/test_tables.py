"""Tables: what they say, what is bold, and that their files can be read by others."""

from __future__ import annotations

import io
import math

import pandas as pd
import pytest

from agl_bench.bench.table import BASELINE, BOUND
from agl_bench.comparison import tables
from agl_bench.comparison.answer import answer
from agl_bench.comparison.gather import PLACE
from agl_bench.comparison.tables import Column, Entry, Table

HEART = {"dataset": "heart", "evaluation": "inter", "backbone": "net", "preset": "clean", "tuning": ""}


def cells(**scores: list[float]) -> pd.DataFrame:
    """Invented cells of one place: selector -> PCC on folds A, B, … with seed 0."""
    rows = [
        HEART
        | {
            "selector": name, "name": name, "fold": "ABCDEFG"[i], "seed": 0, "pcc": pcc, "selected": 10 * i,
            "seconds": 2.0 if name == BASELINE else 5.0, "peak_memory_mb": 100.0 + i, "shuffled": False,
        }
        for name, values in scores.items()
        for i, pcc in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def pair(a: str, b: str = BASELINE, **values: object) -> dict[str, object]:
    """A row of `statistics.pairs`."""
    default = {
        "units": 8, "folds": 8, "seeds": 3, "difference": 0.02, "low": 0.01, "high": 0.03, "p": 0.0078,
        "p_corrected": 0.02, "p_holm": 0.0078, "least_p": 0.0078, "effect": 1.5, "superiority": 0.9,
        "equivalence": 0.1, "inferiority": 0.0, "verdict": "better",
    }  # fmt: skip
    return HEART | {"a": a, "b": b} | default | values


def pairs(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(list(rows) or [pair("x")]).iloc[: len(rows)]


def test_standings_are_means_over_cells() -> None:
    found = tables.standings(
        cells(pgl=[0.1, 0.2], zeta=[0.2, 0.4], oracle=[0.5, 0.5]), pairs(pair("zeta", difference=0.15))
    ).set_index("selector")
    assert list(found.index) == [BASELINE, "oracle", "zeta"]  # the baseline first
    zeta = found.loc["zeta"]
    assert zeta["pcc_mean"] == pytest.approx(0.3)
    assert zeta["pcc_sd"] == pytest.approx(math.sqrt(0.02))
    assert zeta["seconds_ratio"] == 2.5
    assert zeta["regret_mean"] == pytest.approx(0.2)
    assert (zeta["cells"], zeta["folds"], zeta["seeds"], zeta["selected_mean"]) == (2, 2, 1, 5)
    assert (zeta["difference"], zeta["verdict"], zeta["peak_memory_mb"]) == (0.15, "better", 101.0)
    assert math.isnan(found.loc[BASELINE, "difference"])
    assert found["same_units"].all()


def test_best_is_bold_where_means_are_of_the_same_folds() -> None:
    made = cells(pgl=[0.1, 0.2], zeta=[0.2, 0.4], oracle=[0.5, 0.5])
    against = pairs(pair("zeta"))
    table = tables.main_table("heart", tables.standings(made, against), frozenset({BOUND}), {"shuffled": [0.0, 0.02]})
    bold = [row[0].text for row in table.rows if row[1].best]
    assert bold == ["zeta"]  # not the bound, which knows the truth
    assert [row[0].text for row in table.below] == ["oracle (control)", "shuffled (control)"]
    assert all(len(row) == len(table.columns) for row in (*table.rows, *table.below))

    lacking = tables.standings(made.drop(index=1), against)
    table = tables.main_table("heart", lacking, frozenset({BOUND}), {})
    assert not any(row[1].best for row in table.rows)
    assert "none is in bold" in table.caption


@pytest.mark.parametrize(
    ("p", "verdict", "mark"),
    [(0.0009, "better", "***"), (0.01, "worse", "**"), (0.05, "better", "*"), (0.051, "undecided", ""),
     (0.0009, "too few units", "")],
)  # fmt: skip
def test_stars_say_what_was_decided(p: float, verdict: str, mark: str) -> None:
    lines = tables.standings(cells(pgl=[0.1], zeta=[0.2]), pairs(pair("zeta", p_holm=p, verdict=verdict)))
    table = tables.main_table("heart", lines, frozenset(), {})
    assert [row[2].mark for row in table.rows] == ["", mark]


def test_every_pair_is_shown_once_with_the_better_one_first() -> None:
    frame = pairs(pair("x", "y"), pair("y", "x", difference=-0.02), pair("y", "z", difference=-0.1), pair("z", "y"))
    table = tables.pairwise("heart", frame)
    assert [row[0].text for row in table.rows] == ["x − y", "z − y"]
    assert len(table.frame) == 4


def test_equal_selectors_are_shown_too() -> None:
    same = [pair("x", "y", difference=0.0, p=1.0, p_holm=1.0), pair("y", "x", difference=-0.0, p=1.0, p_holm=1.0)]
    assert len(tables.pairwise("heart", pairs(*same)).rows) == 1


def test_datasets_stand_side_by_side() -> None:
    both = pd.concat([cells(pgl=[0.1], zeta=[0.2]), cells(pgl=[0.3], beta=[0.1]).assign(dataset="bowel")])
    lines = tables.standings(both, pairs(pair("zeta")))
    table = tables.overview("inter", lines, frozenset())
    assert [c.name for c in table.columns] == ["selector", "bowel", "heart"]
    found = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert found == {"pgl": ["0.300", "0.100"], "beta": ["0.100", "–"], "zeta": ["–", "0.200"]}


def test_harmed_genes_are_those_below_zero() -> None:
    genes = pd.DataFrame(
        {
            "selector": "zeta", "gene": ["UP", "EVEN", "DOWN"], "difference": [0.1, 0.0, -0.2],
            "low": [0.05, -0.1, -0.3], "high": [0.2, 0.1, -0.1],
        }
    )  # fmt: skip
    ((_, mean, harmed, helped, total, worst, best),) = tables.transfer_table("heart", HEART, genes).rows
    assert (mean.text, harmed.text, helped.text, total.text) == ("−0.033", "1", "1", "3")
    assert (worst.text, best.text) == ("DOWN −0.20", "UP +0.10")


def test_numbers_are_for_people() -> None:
    assert tables.plain(-0.0123) == "−0.012"
    assert tables.plain(-0.0001) == "0.000"
    assert [tables.p_text(p) for p in (0.0004, 0.0421, 0.9999, 1.0)] == ["< .001", ".042", "1", "1"]
    assert tables.number(math.nan) == Entry("–")
    assert tables.interval(math.nan, 1.0) == Entry("–")
    assert tables.spread_text(0.5, math.nan) == "0.500"


def test_files_and_headings_of_two_places_differ() -> None:
    places = pd.DataFrame(
        [HEART, HEART | {"preset": "paper"}, HEART | {"preset": "päper"}, HEART | {"tuning": "tuned"}]
    )
    names = tables.file_names(places[PLACE])
    assert len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._") for name in names)

    long = [f"clean with {', '.join(f'setting_{i}={v}' for i in range(9))}" for v in (1, 2)]
    short = tables.short_presets([*long, "clean"])
    assert short == {
        long[0]: "clean with 9 settings changed",
        long[1]: "clean with 9 settings changed #2",
        "clean": "clean",
    }


NASTY = Table(
    "nasty", "50 % of <b>A_B</b>", "α | β & {γ}", [Column("a|b", numeric=False), Column("Δ #")],
    [[Entry("[x]*\\y"), Entry("−0.100 ± 0.2", -0.1, best=True, mark="**")]],
    pd.DataFrame({"a|b": ["[x],y"], "d": [1 / 3]}),
    [[Entry("control"), Entry("–")]],
)  # fmt: skip


def test_markdown_keeps_its_columns() -> None:
    text = tables.as_markdown(NASTY)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)
    assert "\\<b\\>" in text
    assert "**−0.100 ± 0.2**\\*\\*" in text


def test_latex_holds_no_sign_that_it_would_obey() -> None:
    text = tables.as_latex(NASTY)
    assert "50 \\% of $<$b$>$A\\_B$<$/b$>$" in text
    assert "{[}x{]}{*}\\textbackslash{}y & \\textbf{$-$0.100 $\\pm$ 0.2}$^{**}$ \\\\" in text
    assert (
        text.index("\\toprule") < text.index("\\midrule") < text.index("control & -- \\\\") < text.index("\\bottomrule")
    )
    assert text.count("{") == text.count("}")


def test_csv_is_as_precise_as_the_numbers(tmp_path) -> None:
    written = tables.write([NASTY], tmp_path)
    assert {p.name for p in written} == {"nasty.csv", "nasty.md", "nasty.tex"}
    back = pd.read_csv(io.StringIO((tmp_path / "nasty.csv").read_text(encoding="utf-8")))
    pd.testing.assert_frame_equal(back, NASTY.frame, check_exact=True)


# --- the answer ------------------------------------------------------------------------------------------------------


def say(*against: dict[str, object], more: tuple[dict[str, object], ...] = (), **scores: list[float]) -> str:
    frame = pairs(*against)
    lines = tables.standings(cells(**(scores or {"pgl": [0.1], "x": [0.12], "y": [0.13]})), frame)
    return answer("On heart, inter-batch", lines, frame, pairs(*against, *more), baseline=BASELINE)


def test_a_better_selector_is_named_with_its_gain_and_its_cost() -> None:
    text = say(pair("x", difference=0.03), pair("y", verdict="undecided"), more=(pair("x", "y", verdict="undecided"),))
    assert text == (
        "On heart, inter-batch, x is better than pgl by 0.030 PCC (95 % interval +0.010 to +0.030, p = .008), at 2.5 "
        "times the time of pgl. That it is better than y is not certain."
    )
    assert "better than every other selector too (y)" in say(pair("x"), pair("y"), more=(pair("x", "y"),))
    assert "; so is y (+0.010)" in say(pair("x"), pair("y", difference=0.01))


def test_doubt_is_said() -> None:
    doubt = {"verdict": "undecided", "p_holm": 0.31}
    text = say(pair("x", **doubt), pair("y", verdict="worse", difference=-0.04))
    assert "no selector is better than pgl beyond doubt. The highest mean is x's: +0.020 against pgl" in text
    assert "p = .310" in text
    assert text.endswith("Worse than pgl: y (−0.040).")
    assert "is the baseline's, followed by x's: −0.010" in say(pair("x", difference=-0.01, **doubt))
    assert "Equivalent to pgl for practical purposes: x and y." in say(
        pair("x", verdict="equivalent"), pair("y", verdict="equivalent")
    )


def test_too_few_units_rank_nothing() -> None:
    few = {"verdict": "too few units", "units": 4, "least_p": 0.125}
    text = say(pair("x", **few), pair("y", **few))
    assert (
        "cannot decide which selector is better: 4 tested folds allow no p below .250 with 2 selectors compared."
        in text
    )
    text = say(pair("x", verdict="too few units", seeds=1))
    assert "1 seed cannot tell a selector from the luck of its start" in text


def test_nothing_to_compare_is_said() -> None:
    assert "pgl alone has been run (PCC 0.100)" in say(pgl=[0.1])
    assert "pgl has no fold in common with another selector" in say(x=[0.1], y=[0.2])
