"""What the paper prints against what comes out: the right cells, the right numbers, and nothing invented."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from agl_bench.bench.cells import CellStore
from agl_bench.cli import main
from agl_bench.comparison.gather import gather
from agl_bench.comparison.reproduce import (
    Grid,
    compare,
    ends,
    load_target,
    make_grid,
    only_one_takes,
    taken_genes,
    target_names,
    trajectories,
)
from agl_bench.errors import BadSpec, MissingData, UnknownName
from agl_bench.registry.plugins import Plugins
from agl_bench.terminal import show_target
from agl_bench.training.trainer import HALF

SETTINGS = (
    *("synthetic.sections=2", "synthetic.spots=30", "synthetic.markers=4", "synthetic.helpful_genes=16"),
    *("synthetic.harmful_genes=10", "synthetic.useless_genes=10", "synthetic.patch_px=16", "tiny.patch_px=16"),
    *("protocol.min_genes_per_spot=5", "protocol.buffer_um=0"),
)
PRIMARY = "protocol.primary_genes=4"
AVERAGES = {  # as the paper prints them
    "table1": {
        "PGL": 0.407, "AGL + ALL": 0.418, "AGL + Uncertainty": 0.419, "AGL + AuxLearn": 0.412, "AGL + AMAL": 0.411,
        "AGL + DkGSB": 0.426,
    },
    "table2": {"PGL": 0.516, "AGL + ALL": 0.538, "AGL + DkGSB": 0.545},
}  # fmt: skip


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover(strict=True)


def small_grid(plugins: Plugins, name: str, *more: str, seeds: tuple[str, ...] = ("0", "1")) -> Grid:
    target = load_target(name, on="synthetic", evaluations=("inter",))
    return make_grid(
        target, plugins, Path(os.devnull), device="cpu", preset="smoke", seeds=seeds, assignments=[*SETTINGS, *more]
    )


def run(name: str, work: Path, *more: str) -> int:
    """Run a target on planted data, in smoke size, through the command line."""
    words = ["reproduce", name, "--on", "synthetic", "--evaluation", "inter", "--preset", "smoke", "--device", "cpu"]
    words += ["--tracking", "none", "--work", str(work), *more, *(w for s in SETTINGS for w in ("--set", s))]
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    assert run("table1", work, "--seeds", "0,1", "--set", PRIMARY) == 0
    return work


# --- the files -------------------------------------------------------------------------------------------------------


def test_every_file_can_be_read(plugins: Plugins) -> None:
    assert target_names() == ["fig1b", "fig3", "fig4", "fig5", "table1", "table2"]
    names = set(plugins.names("dataset"))
    for name in target_names():
        target = load_target(name)
        assert not target.is_elsewhere and target.shows in ("scores", "trajectories", "genes")
        assert {c.dataset for c in target.columns} <= names
        columns = {c.name for c in target.columns}
        assert all(set(printed) <= columns for r in target.rows for printed in (r.pcc, r.sd, r.selected))
        assert not target.absent(plugins)


@pytest.mark.parametrize("name", AVERAGES)
def test_the_numbers_average_to_what_the_paper_prints(name: str) -> None:
    found = {row.name: np.mean(list(row.pcc.values())) for row in load_target(name).rows}
    assert set(found) == set(AVERAGES[name])
    for method, average in AVERAGES[name].items():
        assert abs(found[method] - average) <= 0.00051, method


def test_what_stands_twice_in_the_paper_is_equal() -> None:
    of_table1 = {row.selector: (row.pcc["BOWEL A"], row.sd["BOWEL A"]) for row in load_target("table1").rows}
    place = "BOWEL A, 50 primary genes"
    of_table2 = {row.selector: (row.pcc[place], row.sd[place]) for row in load_target("table2").rows}
    of_figure = {row.selector: (row.pcc["BOWEL A"], row.sd["BOWEL A"]) for row in load_target("fig1b").rows}
    assert of_table2 == of_figure == {s: of_table1[s] for s in of_table2}


# --- the grid --------------------------------------------------------------------------------------------------------


def test_other_data_have_neither_the_papers_numbers_nor_its_conditions(plugins: Plugins) -> None:
    target = load_target("table1", on="synthetic")
    assert target.is_elsewhere and not target.says and not target.backbone
    assert [(c.dataset, c.evaluation) for c in target.columns] == [("synthetic", "intra"), ("synthetic", "inter")]
    assert not any(r.pcc or r.sd or r.selected or r.preset or r.genes for r in target.rows)
    lines = compare(small_grid(plugins, "table1", PRIMARY), gather(CellStore(Path(os.devnull).parent / "none")))
    assert lines[["paper", "difference", "paper_gain"]].isna().all(axis=None)


def test_a_dataset_of_the_paper_keeps_its_column_and_numbers() -> None:
    target = load_target("table1", on="ovary")
    assert not target.is_elsewhere and [c.name for c in target.columns] == ["OVARY"]
    assert target.rows[-1].pcc["OVARY"] == 0.458
    assert load_target("table1", on="ovary", evaluations=("inter",)).is_elsewhere  # the paper has it intra-batch


def test_a_sweep_is_a_row_for_each_value_and_other_data_have_their_own(plugins: Plugins) -> None:
    paper = [r.settings for r in load_target("fig3").rows if r.selector == "hvg_k"]
    assert {("hvg_k.k=5000",), ("hvg_k.k=10000",), ("hvg_k.k=15000",)} < set(paper)
    here = [r.settings for r in load_target("fig3", on="synthetic:null").rows if r.selector == "hvg_k"]
    assert ("hvg_k.k=100",) in here and ("hvg_k.k=15000",) not in here
    grid = small_grid(plugins, "fig3", PRIMARY, seeds=("0",))
    for column in grid.target.columns:
        for row in grid.target.rows:
            keys = grid.keys(column, row)
            assert len(keys) == 2  # folds
            settings = [s.selector.settings for s, _ in grid.cells if s.key in keys]
            assert all(
                f"{row.selector}.k={s.get('k')}" == (row.settings or (f"{row.selector}.k=None",))[0] for s in settings
            )


def test_cells_on_the_same_data_are_neighbours(plugins: Plugins) -> None:
    grid = small_grid(plugins, "table2", seeds=("0", "1"))
    data = [(s.protocol, s.evaluation, s.fold, s.seed) for s, _ in grid.cells]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(data))
    assert runs == len(set(data)) < len(data)
    assert len({s.key for s, _ in grid.cells}) == len(grid.cells) == len(grid.lines)


def test_columns_differ_by_their_settings(plugins: Plugins) -> None:
    grid = small_grid(plugins, "table2", seeds=("0",))
    for spec, _ in grid.cells:
        column, _ = grid.lines[spec.key]
        assert column.settings == (f"protocol.primary_genes={spec.protocol.primary_genes}",)


def test_schedules_are_lines_of_their_own() -> None:
    target = load_target("fig4")
    assert {(r.preset, r.settings[0]) for r in target.rows} == {
        (preset, f"dkgsb.start={start}") for preset in ("paper_v1", "paper_v3") for start in (0.1, 0.5, 0.9)
    }
    elsewhere = load_target("fig4", on="synthetic")
    assert len(elsewhere.rows) == 3  # one protocol there


def test_what_cannot_be_asked_for(plugins: Plugins) -> None:
    with pytest.raises(UnknownName, match="table1"):
        load_target("table3")
    with pytest.raises(BadSpec, match="fig3 has no inter-batch column, only intra"):
        load_target("fig3", evaluations=("inter",))
    with pytest.raises(BadSpec, match=r"primary_genes is what the lines of table2 differ by"):
        small_grid(plugins, "table2", PRIMARY)
    with pytest.raises(UnknownName, match="fold 'S9'"):
        make_grid(load_target("fig5", on="synthetic"), plugins, Path(os.devnull), device="cpu", folds=("S9",))


def test_absent_data_say_how_to_get_them(plugins: Plugins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingData, match="agl-bench fetch bowel_a"):
        make_grid(load_target("fig1b"), plugins, tmp_path, device="cpu")
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "fig1b", "--data", str(tmp_path), "--work", str(tmp_path / "work")])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.count("\n") == 1 and "agl-bench fetch bowel_a" in said.err
    assert not (tmp_path / "work").exists()


# --- what comes out --------------------------------------------------------------------------------------------------


def test_table1_on_planted_data(
    work: Path, plugins: Plugins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--seeds", "0,1", "--set", PRIMARY)
    assert run("table1", work, *more, "--dry-run") == 0
    assert "24 cells, 24 finished, 0 to run" in capsys.readouterr().out
    assert run("table1", work, *more, "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "24 cells were finished before and kept" in said
    assert "The paper has no numbers for these data" in said and "is installed" not in said
    written = pd.read_csv(tmp_path / "table1.csv")
    assert list(written["method"]) == list(AVERAGES["table1"])
    cells = gather(CellStore(work)).cells
    for line in written.itertuples():
        own = cells[cells["name"] == line.selector]
        assert line.cells == line.expected == len(own) == 4
        assert line.pcc == pytest.approx(own["pcc"].mean())
        assert line.pcc_low < line.pcc < line.pcc_high
        assert line.selected == own["selected"].mean()
    gain = written.set_index("selector")["pcc"] - written["pcc"].iloc[0]
    assert written.set_index("selector")["gain"].iloc[1:].to_numpy() == pytest.approx(gain.iloc[1:].to_numpy())


def test_the_difference_is_ours_minus_the_papers_with_the_width_of_ours(work: Path, plugins: Plugins) -> None:
    grid = small_grid(plugins, "table1", PRIMARY)
    (column,) = grid.target.columns
    rows = {row: replace(row, pcc={column.name: 0.5 if row.selector == "pgl" else 0.6}) for row in grid.target.rows}
    printed = replace(grid, target=replace(grid.target, rows=tuple(rows.values())))
    printed = replace(printed, lines={key: (c, rows[row]) for key, (c, row) in grid.lines.items()})
    found = compare(printed, gather(CellStore(work)))
    assert set(found["method"]) == {row.name for row in grid.target.rows}  # a printed one stands alone
    ours = found[found["cells"] > 0]
    for name, ours_name in (("difference", "pcc"), ("difference_low", "pcc_low"), ("difference_high", "pcc_high")):
        assert ours[name].to_numpy() == pytest.approx((ours[ours_name] - ours["paper"]).to_numpy())
    assert ours["paper_gain"].iloc[1:].to_numpy() == pytest.approx(0.1)
    assert found[found["cells"] == 0]["pcc"].isna().all()


def test_a_method_that_nobody_provides_stands_alone(work: Path, plugins: Plugins) -> None:
    target = load_target("table1", on="synthetic", evaluations=("inter",))
    unknown = replace(target.rows[2], selector="nobodys", pcc={"synthetic, inter": 0.6})
    target = replace(target, rows=(*target.rows[:2], unknown, *target.rows[3:]))
    assert target.absent(plugins) == [unknown]
    conditions = {"device": "cpu", "preset": "smoke", "seeds": ("0", "1"), "assignments": [*SETTINGS, PRIMARY]}
    grid = make_grid(target, plugins, Path(os.devnull), **conditions)
    assert len(grid.cells) == 20 and unknown not in {row for _, row in grid.lines.values()}
    show_target(grid, plugins, console := Console(record=True, width=200))
    assert "AGL + Uncertainty: selector 'nobodys' is not installed, so this row is left out." in console.export_text()
    line = compare(grid, gather(CellStore(work))).set_index("method").loc["AGL + Uncertainty"]
    assert line["paper"] == 0.6 and line["cells"] == line["expected"] == 0 and np.isnan(line["pcc"])


def test_missing_cells_are_counted(work: Path, plugins: Plugins) -> None:
    found = compare(small_grid(plugins, "table1", PRIMARY, seeds=("0", "1", "2")), gather(CellStore(work)))
    assert set(found["cells"]) == {4} and set(found["expected"]) == {6}


def test_trajectories_of_figure_4(tmp_path: Path, plugins: Plugins, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fig4", tmp_path, "--seeds", "0", "--set", PRIMARY, "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "over outer iterations" in said
    (figure,) = (tmp_path / "out/figures").glob("trajectories-*.png")
    assert f"wrote {figure}" in said
    gathered = gather(CellStore(tmp_path))
    table = trajectories(small_grid(plugins, "fig4", PRIMARY, seeds=("0",)), gathered)
    for key in gathered.cells["key"]:
        result = gathered.result(key)
        start = result.spec.selector.settings["start"]
        method = {0.5: "half of the genes", 0.1: "a tenth", 0.9: "nine tenths"}[start]
        own = table[(table["method"] == f"DkGSB from {method}") & (table["fold"] == result.spec.fold)]
        assert list(own["selected"]) == list(result.outer["selected"])
        assert list(own["iteration"]) == [1, 2]
    summary = ends(table).set_index("method")
    assert list(summary["first"]) != list(summary["last"])
    assert summary.loc["DkGSB from a tenth", "first"] < summary.loc["DkGSB from nine tenths", "first"]


def test_genes_of_figure_5(work: Path, plugins: Plugins, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fig5", work, "--seeds", "0,1", "--set", PRIMARY) == 0
    assert "genes that one takes" in capsys.readouterr().out
    gathered = gather(CellStore(work))
    genes = taken_genes(small_grid(plugins, "fig5", PRIMARY), gathered)
    names = {"AGL + DkGSB": "dkgsb", "AGL + AMAL": "amal"}
    for (method, gene), line in genes.set_index(["method", "gene"]).iterrows():
        weights = [
            frame["weight"].iloc[0]
            for key in gathered.cells[gathered.cells["name"] == names[method]]["key"]
            for frame in [gathered.result(key).genes.set_index("gene").query("not primary").filter([gene], axis=0)]
            if len(frame)
        ]
        assert line["cells"] == len(weights)
        assert line["taken"] == np.mean([w > HALF for w in weights])
    one = only_one_takes(genes)
    assert (one["taken"] > one["others"]).all() and set(one["method"]) <= set(names)
