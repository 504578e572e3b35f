"""Figures: right places for right numbers, one look per selector, and a sentence where there is nothing to draw."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from agl_bench.bench.cells import CellStore
from agl_bench.bench.table import BASELINE
from agl_bench.cli import main
from agl_bench.comparison import figures, statistics
from agl_bench.comparison.figures import choice, maps, reading, standing, style
from agl_bench.comparison.figures.style import NotDrawn
from agl_bench.comparison.gather import LINE, PLACE, UNIT, gather
from agl_bench.digests import read_signed, signed

SMALL = [
    "synthetic.sections=2", "synthetic.spots=40", "synthetic.markers=5", "synthetic.helpful_genes=25",
    "synthetic.harmful_genes=20", "synthetic.useless_genes=30", "synthetic.patch_px=16", "tiny.patch_px=16",
    "tiny.channels=8", "protocol.primary_genes=5", "protocol.min_genes_per_spot=5", "protocol.buffer_um=0",
    "protocol.epochs=3", "protocol.outer_every=1",
]  # fmt: skip
HERE = {"dataset": "made", "evaluation": "inter", "backbone": "b", "preset": "p", "tuning": ""}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning selectors, the baseline, and a sweep, on planted data."""
    work = tmp_path_factory.mktemp("work")
    grid = ["run", "--datasets", "synthetic", "--preset", "smoke", "--evaluation", "intra", "--tracking", "none"]
    grid += ["--fold", "S1.0,S1.1", "--device", "cpu", *(w for s in SMALL for w in ("--set", s)), "--work", str(work)]
    for words in (["pgl,dkgsb,amal"], ["hvg_k", "--set", "hvg_k.k=5"], ["hvg_k", "--set", "hvg_k.k=20"]):
        with pytest.raises(SystemExit) as end:
            main([*grid, "--selectors", *words])
        assert not end.value.code
    return work


@pytest.fixture(scope="module")
def drawn(work: Path) -> dict[str, figures.Drawn]:
    """Every figure of it, by kind."""
    found = figures.draw_all(gather(CellStore(work)), work / "figures", root=work)
    return {d.name.partition("-synthetic")[0].partition("-intra")[0]: d for d in found}


def pairs_of(*rows: tuple[str, float, float, float, str]) -> pd.DataFrame:
    names = ["a", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=names).assign(b=BASELINE, p_holm=0.2, units=6, **HERE)


def words(figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts]


# Look ----------------------------------------------------------------------------------------------------------------


def test_a_selector_keeps_its_colour_whatever_else_is_drawn() -> None:
    names = ["agl", "dkgsb", "stranger", "hvg_k"]
    for several in (names, names[:2], names[::-1], [*names, "another", "hvg_k(k=5)"]):
        found = style.styles(several)
        assert {n: s.colour for n, s in found.items()} == {n: figures.colour(n) for n in several}
    assert figures.colour("hvg_k(k=5)") == figures.colour("hvg_k")
    assert figures.colour(BASELINE) == style.BASELINE_COLOUR


def test_no_two_lines_of_a_figure_look_alike() -> None:
    many = [*(f"stranger{i}" for i in range(40)), *(f"hvg_k(k={i})" for i in range(8)), "agl", "dkgsb", BASELINE]
    found = style.styles(many)
    assert set(found) == set(many)
    assert len(set(found.values())) == len(many)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB: protanopia, deuteranopia, tritanopia.
SEEN = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    white = np.array([0.9505, 1.0, 1.089])
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    f = np.where(xyz / white > 0.008856, np.cbrt(xyz / white), 7.787 * xyz / white + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("matrix", [np.eye(3), *map(np.array, SEEN)], ids=["all", "protan", "deutan", "tritan"])
def test_colours_are_told_apart_by_colour_blind_readers(matrix: np.ndarray) -> None:
    seen = {}
    for colour in (*style.PALETTE, style.BASELINE_COLOUR):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen[colour] = lab(matrix @ linear)
    assert min(np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(seen, 2)) > 10


def test_order_and_short_labels() -> None:
    assert style.in_order(["zzz", "hvg_k(k=100)", "agl", "hvg_k(k=20)", BASELINE]) == [
        BASELINE, "agl", "hvg_k(k=20)", "hvg_k(k=100)", "zzz"
    ]  # fmt: skip
    label = style.short("a_selector_with_a_very_long_name(k=500, temperature=0.01)")
    assert len(label) == 26 and label.startswith("a_selector") and label.endswith("=0.01)")


# Standing ------------------------------------------------------------------------------------------------------------


def test_the_forest_says_what_the_pairs_say() -> None:
    figure = standing.forest(
        pairs_of(("agl", 0.02, 0.01, 0.03, "better"), ("dkgsb", -0.004, -0.011, 0.002, "undecided")), "T"
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["dkgsb", "agl"]  # the best on top
    points = {tuple(line.get_xdata()) for line in axes.lines}
    assert {(0.01, 0.03), (0.02,), (-0.011, 0.002), (-0.004,)} <= points
    fill = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes.lines if len(line.get_xdata()) == 1}
    assert fill[0.02] == figures.colour("agl") and fill[-0.004] == "white"
    assert {"better", "undecided", "+0.020 [+0.010, +0.030]", "−0.004 [−0.011, +0.002]", ".200"} <= set(words(figure))


def test_a_forest_without_interval_or_baseline() -> None:
    figure = standing.forest(pairs_of(("agl", 0.02, np.nan, np.nan, "too few units")), "T")
    assert "+0.020 [–, –]" in words(figure)
    with pytest.raises(NotDrawn, match="shares finished folds and seeds with the baseline agl"):
        standing.forest(pairs_of(("dkgsb", 0.02, 0.01, 0.03, "better")), "T", baseline="agl")


def test_bars_of_critical_difference() -> None:
    ranks = pd.DataFrame({"selector": list("abcd"), "mean_rank": [1.2, 1.9, 3.0, 3.9], "low": 1.0, "high": 4.0})
    assert standing._cliques(ranks["mean_rank"].to_numpy(), 1.2) == [(0, 1), (1, 2), (2, 3)]
    assert standing._cliques(ranks["mean_rank"].to_numpy(), 1.85) == [(0, 2), (2, 3)]  # 1 to 2 is within the first
    assert standing._cliques(ranks["mean_rank"].to_numpy(), 0.5) == []
    figure = standing.critical_difference(ranks, "T", width=2.0)
    assert any("critical difference 2.00" in text for text in words(figure))
    with pytest.raises(NotDrawn, match="at least two datasets"):
        standing.critical_difference(ranks, "T", width=float("nan"))
    with pytest.raises(NotDrawn, match="at least two selectors"):
        standing.critical_difference(ranks[:1], "T", width=2.0)


def test_bars_leave_out_what_has_no_pcc() -> None:
    cells = pd.DataFrame(
        {
            "selector": ["agl", "agl", "dkgsb", "dkgsb", "hvg_k"],
            "dataset": "one",
            "pcc": [0.1, 0.3, 0.5, np.nan, np.nan],
        }
    )
    figure = standing.results(cells, "T")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["agl", "dkgsb"]
    assert words(figure) == ["0.200 ± 0.141", "0.500"]
    assert [t.get_weight() for t in figure.axes[0].texts] == ["normal", "bold"]
    with pytest.raises(NotDrawn, match="no finished cell has a PCC"):
        standing.results(cells[4:], "T")


def test_five_datasets_stand_in_two_rows() -> None:
    cells = pd.DataFrame([{"selector": s, "dataset": d, "pcc": 0.1} for s in ("agl", "dkgsb") for d in "vwxyz"])
    figure = standing.results(cells[:9], "T")  # one selector has not been run on the last
    assert [a.get_title(loc="left") for a in figure.axes if a.get_visible()] == list("vwxyz")
    assert [t.get_text() for t in figure.axes[4].texts] == ["0.100", "–"]


def test_differences_of_genes_are_between_equal_folds_and_seeds() -> None:
    genes = pd.DataFrame(
        [
            (BASELINE, "F", 0, "A", True, 0.1), (BASELINE, "G", 0, "A", True, 0.3), (BASELINE, "F", 0, "B", True, 0.2),
            ("agl", "F", 0, "A", True, 0.5), ("agl", "F", 0, "B", True, np.nan), ("agl", "G", 1, "A", True, 0.9),
            ("agl", "F", 0, "C", False, np.nan),
        ],
        columns=["selector", *UNIT, "gene", "primary", "pearson"],
    )  # fmt: skip
    found = reading.per_gene(genes).set_index(["selector", "gene"])
    assert found.loc[("agl", "A"), "pearson"] == pytest.approx(0.7)
    assert found.loc[("agl", "A"), "difference"] == pytest.approx(0.4)
    assert np.isnan(found.loc[("agl", "B"), "difference"])
    assert ("agl", "C") not in found.index


# Choice --------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_curve_and_a_choice_is_a_point() -> None:
    rows = [("hvg_k(k=10)", 10, 0.1), ("hvg_k(k=100)", 100, 0.3), ("hvg_k(k=100)", 100, 0.5), (BASELINE, 0, 0.1)]
    rows += [("dkgsb", 40, 0.2), ("dkgsb", 60, 0.4), ("lone(k=3)", 3, 0.1)]
    cells = pd.DataFrame(rows, columns=["selector", "selected", "pcc"])
    lines = reading.sweep_lines(cells, pairs_of(), baseline=BASELINE).set_index("selector")
    assert lines["swept"].to_dict() == {
        "hvg_k(k=10)": True, "hvg_k(k=100)": True, BASELINE: False, "dkgsb": False, "lone(k=3)": False
    }  # fmt: skip
    assert lines.at["hvg_k(k=100)", "value"] == pytest.approx(0.4)  # no pairs: the plain PCC
    assert lines.at["dkgsb", "selected"] == 50
    lines["learned"] = lines.index == "dkgsb"
    assert reading.few_of_sweeps(lines.reset_index()) == ["hvg_k(k=100)", BASELINE, "dkgsb", "lone(k=3)"]
    figure = choice.sweep(lines.reset_index(), "T", score="PCC")
    curve = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [10, 100]]
    assert len(curve) == 1 and list(curve[0].get_ydata()) == pytest.approx([0.1, 0.4])
    dotted = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == [50]

    paired = reading.sweep_lines(cells, pairs_of(("dkgsb", 0.2, 0.1, 0.3, "better"))).set_index("selector")
    assert paired.at["dkgsb", "value"] == 0.2 and paired.at[BASELINE, "value"] == 0
    with pytest.raises(NotDrawn, match="two or more values of its setting k"):
        choice.sweep(lines.loc[["dkgsb", "lone(k=3)"]].reset_index(), "T", score="PCC")


def test_settings_beside_k_are_curves_of_their_own() -> None:
    assert reading._without_k("hvg_k(k=10)") == ("hvg_k", True)
    assert reading._without_k("m(k=10, tau=0.1)") == ("m(tau=0.1)", True)
    assert reading._without_k("m(tau=0.1)") == ("m(tau=0.1)", False)
    assert reading._without_k("pgl") == ("pgl", False)


def test_the_course_of_k() -> None:
    cells = [
        pd.DataFrame(
            {"selected": k, "validation_pcc": [0.1, 0.2, 0.3][: len(k)], "best": [True] + [False] * (len(k) - 1)}
        )
        for k in ([10, 8, 6], [20, 30])
    ]
    assert list(choice._median([c["selected"].to_numpy(float) for c in cells])) == [15, 19, 18]  # 30 is kept
    figure = choice.trajectories({"dkgsb": cells, "agl": []}, "T")
    assert [a.get_title(loc="left") for a in figure.axes] == ["dkgsb, 2 cells", ""]
    with pytest.raises(NotDrawn, match="learns from outer steps"):
        choice.trajectories({"agl": []}, "T")


def test_weights_are_averaged_over_neighbouring_ranks() -> None:
    genes = pd.DataFrame({"selector": "agl", "key": "x", "rank": [-1, *range(300)], "weight": [1.0] + [1, 0] * 150})
    figure = choice.weight_by_rank(genes, "T")
    (line,) = [line for line in figure.axes[0].lines if line.get_color() == "black"]
    assert len(line.get_xdata()) == 150 and set(line.get_ydata()) == {0.5}
    with pytest.raises(NotDrawn, match="no auxiliary genes"):
        choice.weight_by_rank(genes[:1], "T")


# Maps ----------------------------------------------------------------------------------------------------------------


def test_genes_apart_are_those_with_the_largest_difference_of_shares() -> None:
    taken = {"p": {"A": 1, "B": 1, "C": 0, "D": 1, "E": 0}, "q": {"A": 0, "B": 1, "C": 1, "D": 0, "E": 0}}
    rows = [
        (selector, f"{selector}{cell}", gene, rank, float(weight if cell or gene != "D" else 1 - weight))
        for selector, weights in taken.items()
        for cell in range(2)
        for rank, (gene, weight) in enumerate(weights.items())
    ]
    rows += [("p", "p0", "P", -1, 1.0)]
    found = maps.genes_apart(pd.DataFrame(rows, columns=["selector", "key", "gene", "rank", "weight"]), "p", "q")
    assert [(g.gene, g.takes, g.leaves, g.share, g.other_share) for g in found] == [
        ("A", "p", "q", 1.0, 0.0),
        ("C", "q", "p", 1.0, 0.0),
    ]


def test_predictions_are_standardised_within_folds() -> None:
    table = pd.DataFrame(
        {
            "section": "S", "fold": ["a", "a", "b", "b"], "x_px": [0, 1, 0, 1], "y_px": [0, 0, 1, 1],
            "measured:G": [1.0, 2, 3, 4], "predicted:G": [10.0, 20, 0.2, 0.1],
        }
    )  # fmt: skip
    assert list(maps._standardised(table, "predicted:G")) == pytest.approx([-1, 1, 1, -1])
    figure = maps.predictions({"agl": table}, ["G"], "T")
    shown = [axes.collections[0].get_array() for axes in figure.axes if axes.get_subplotspec() and axes.collections]
    assert list(shown[0]) == pytest.approx([-1, 1, -1, 1]) and list(shown[1]) == pytest.approx([-1, 1, 1, -1])
    assert figure.axes[1].get_title(loc="left") == "PCC 0.00"
    with pytest.raises(NotDrawn, match="no primary gene"):
        maps.predictions({"agl": table}, [], "T")


def test_the_best_the_middle_and_the_worst_gene() -> None:
    columns = {f"predicted:{g}": [0.0, 1.0] for g in "ABCDE"}
    table = pd.DataFrame(columns | {"predicted:F": [0.0, np.nan]})
    genes = pd.DataFrame({"gene": list("ABCDEF"), "pearson": [0.1, 0.5, 0.3, 0.2, 0.4, 0.9]})
    assert reading.shown_genes({"agl": table}, genes) == ["B", "C", "A"]
    assert reading.shown_genes({"agl": table[["predicted:F"]]}, genes) == ["F"]  # nothing is predicted everywhere
    assert reading.shown_genes({}, genes) == []


# All -----------------------------------------------------------------------------------------------------------------


def test_a_small_campaign_has_every_figure(drawn: dict[str, figures.Drawn]) -> None:
    absent = {kind: d.why for kind, d in drawn.items() if d.png is None}
    assert absent == {"critical-difference": "ranks need at least two datasets on which the same selectors were run"}
    for d in drawn.values():
        assert len(d.title) > 10 and (d.why or d.caption.endswith("."))
        if d.png and d.svg:
            assert d.svg.read_text(encoding="utf-8").rstrip().endswith("</svg>")
            with Image.open(d.png) as picture:
                assert picture.width > 400 and len(set(picture.convert("L").getdata())) > 10
    assert set(drawn["forest"].place) == set(PLACE)
    assert "dataset" not in drawn["results"].place


def test_equal_cells_give_equal_files(work: Path, drawn: dict[str, figures.Drawn], tmp_path: Path) -> None:
    again = figures.draw_all(gather(CellStore(work)), tmp_path, root=work)
    for one in again:
        if one.png and one.svg:
            assert one.svg.read_bytes() == (work / "figures" / one.svg.name).read_bytes(), one.name
            assert one.png.read_bytes() == (work / "figures" / one.png.name).read_bytes(), one.name


def test_controls_are_no_methods(work: Path, tmp_path: Path) -> None:
    gathered = gather(CellStore(work))
    gathered.cells.loc[gathered.cells["selector"] == "amal", "shuffled"] = True
    gathered.cells.loc[gathered.cells["selector"] == "dkgsb", "backbone"] = "position"
    found = {d.name.partition("-")[0]: d for d in figures.draw_all(gathered, tmp_path)}
    assert {d.place["backbone"] for d in found.values()} == {"tiny"}
    assert "learns from outer steps" in found["trajectories"].why
    gathered.cells["shuffled"] = True
    assert figures.draw_all(gathered, tmp_path) == []


def test_what_is_absent_says_why(work: Path, tmp_path: Path) -> None:
    lone = gather(CellStore(work))
    keep = lone.cells["selector"] == "dkgsb"
    lone.cells.drop(lone.cells.index[~keep], inplace=True)
    for key in lone.cells["key"]:
        folder = tmp_path / "cells" / key
        folder.mkdir(parents=True)
        for file in (work / "cells" / key).iterdir():
            if file.name != "predictions.parquet":
                (folder / file.name).write_bytes(file.read_bytes())
        content = read_signed(folder / "result.json")
        del content["files"]["predictions.parquet"]
        (folder / "result.json").write_text(json.dumps(signed(content)), encoding="utf-8")
    again = gather(CellStore(tmp_path))
    why = {d.name.partition("-")[0]: d.why for d in figures.draw_all(again, tmp_path / "figures") if d.png is None}
    assert "no selector shares finished folds" in why["forest"]
    assert "setting k" in why["sweep"]
    assert "two are needed" in why["choices"]
    assert "rerun" in why["predictions"] and "--keep predictions" in why["predictions"]


def test_more_places_than_are_drawn(work: Path, tmp_path: Path) -> None:
    gathered = gather(CellStore(work))
    other = gathered.cells[gathered.cells["selector"] == "dkgsb"].assign(dataset="other")
    several = figures.draw_all(
        dataclasses.replace(gathered, cells=pd.concat([gathered.cells, other])),
        tmp_path,
        places=1,
    )
    assert {d.place.get("dataset") for d in several} == {"synthetic", None}
    assert several[-1].why.startswith("1 of 2 places are not drawn")


def test_units_that_are_drawn_are_shared_and_spread(work: Path) -> None:
    cells = pd.DataFrame(
        [{"selector": s, "fold": f, "seed": seed} for s in ("a", "b") for f in "uvwxyz" for seed in (0, 1)]
    )
    few = reading.sampled(cells[1:], 4)
    assert len(few) == 8 and few.groupby(UNIT)["selector"].nunique().eq(2).all()
    assert {"z"} <= set(few["fold"]) and ("u", 0) not in set(zip(few["fold"], few["seed"], strict=True))
    assert len(reading.sampled(cells, 100)) == len(cells)


def test_given_statistics_are_used(work: Path, tmp_path: Path) -> None:
    gathered = gather(CellStore(work))
    pairs = statistics.pairs(gathered.cells, baseline="dkgsb")
    found = figures.draw_all(gathered, tmp_path, baseline="dkgsb", pairs=pairs)
    forest = next(d for d in found if d.name.startswith("forest"))
    assert forest.png is not None and forest.title.startswith("Difference to dkgsb")
    assert set(LINE) - set(forest.place) == {"selector"}
