"""The report of a small campaign: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.parse
from dataclasses import replace
from pathlib import Path

import html5lib
import pandas as pd
import pytest
from mlflow import MlflowClient

from agl_bench.bench.cells import CellStore
from agl_bench.bench.mlflow_studies import keep_files
from agl_bench.bench.tuned import Entry, write_entry
from agl_bench.cli import main
from agl_bench.comparison.duel import two_folders
from agl_bench.comparison.gather import gather
from agl_bench.comparison.quality import _unshuffled
from agl_bench.comparison.report import Report, assemble, render
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.registry.plugins import Plugins

SMALL = {
    "synthetic.sections": 3, "synthetic.spots": 40, "synthetic.markers": 5, "synthetic.helpful_genes": 25,
    "synthetic.harmful_genes": 20, "synthetic.useless_genes": 30, "synthetic.patch_px": 16, "tiny.patch_px": 16,
    "tiny.channels": 8, "protocol.primary_genes": 5, "protocol.min_genes_per_spot": 5, "protocol.buffer_um": 0,
}  # fmt: skip
GRID = [
    "run", "--datasets", "synthetic", "--preset", "smoke", "--evaluation", "inter", "--tracking", "none",
    "--device", "cpu", *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")),
]  # fmt: skip
TAG = "<script>alert('x')</script>"


def status(*words: str | Path) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    words = ["--selectors", "pgl,agl,dkgsb,oracle", "--seeds", "0,1,2", "--controls", "--work", work]
    assert status(*GRID, *words) == 0
    return work


@pytest.fixture(scope="module")
def report(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(gather(CellStore(work)), work, tmp_path_factory.mktemp("figures"), Plugins.discover())


@pytest.fixture(scope="module")
def written(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    assert status("report", "--work", work, "--out", out) == 0
    return out


def parsed(text: str) -> html5lib.treebuilders.etree:
    """The page, if it is valid HTML."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(text)


def test_the_page_is_valid_and_loads_nothing(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = parsed(text)
    for element in page.iter():
        assert element.tag not in ("link", "iframe", "object", "embed", "base")
        for attribute in ("src", "srcset", "data", "poster", "action"):
            address = element.get(attribute)
            assert address is None or address.startswith("data:image/"), (element.tag, address[:60])
        if element.tag == "a":
            address = urllib.parse.urlparse(element.get("href"))
            assert not address.scheme
            assert address.fragment or (written / address.path).is_file(), element.get("href")
    style = "".join(element.text or "" for element in page.iter("style"))
    assert "url(" not in style and "@import" not in style
    scripts = "".join(element.text or "" for element in page.iter("script"))
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|https?://", scripts)


def test_links_within_the_page_lead_somewhere(written: Path) -> None:
    page = parsed((written / "report.html").read_text(encoding="utf-8"))
    names = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(set(names)) == len(names)
    for link in page.iter("a"):
        if link.get("href").startswith("#"):
            assert link.get("href")[1:] in names
    for element in page.iter():
        if labelled := element.get("aria-labelledby"):
            assert labelled in names
    assert all(image.get("alt") is not None for image in page.iter("img"))


def test_every_table_has_its_three_files(written: Path, report: Report) -> None:
    names = [table.name for table in report.tables]
    assert len(set(names)) == len(names)
    expected = {f"{name}.{ending}" for name in names for ending in ("csv", "md", "tex")} | {"cells.csv"}
    assert {path.name for path in (written / "tables").iterdir()} == expected
    cells = pd.read_csv(written / "tables" / "cells.csv")
    assert len(cells) == 36 + 9 + 9  # with those of shuffled patches and of the backbone without image
    assert any((written / "figures").glob("*.png")) and any((written / "figures").glob("*.svg"))


def test_the_first_screen_answers(report: Report, work: Path) -> None:
    (answer,) = report.answers
    assert answer.startswith(
        "On synthetic, inter-batch, these cells cannot decide which selector is better: 3 tested folds"
    )
    (table,) = report.main
    cells = gather(CellStore(work)).cells
    own = cells[~cells["shuffled"] & (cells["backbone"] == "tiny")]
    for row in table.rows:
        mean = own.loc[own["selector"] == row[0].text, "pcc"].mean()
        assert row[1].value == pytest.approx(mean, abs=1e-12)
    assert [row[0].text for row in table.rows] == ["pgl", "agl", "dkgsb"]
    assert [row[0].text for row in table.below] == [
        "oracle (control)", "shuffled patches (control)", "position (backbone) (control)",
    ]  # fmt: skip
    assert {"regret", "precision", "recall", "k − k*"} <= {c.name for c in table.columns}


def test_the_header_says_what_it_is_made_of(report: Report, work: Path) -> None:
    spec = next(iter(gather(CellStore(work)).specs.values()))
    facts = {name: "; ".join(words) for name, words in report.facts.items()}
    assert facts["seeds"] == "0; 1; 2"
    assert spec["data"] in facts["datasets"] and spec["version"] in facts["made by"]
    assert spec["libraries"] == facts["libraries"]
    assert "primary_genes=5" in facts["preset in full"] and "cpu" in facts["machine"]
    text = render(report)
    assert all(word in text for word in (spec["data"], spec["version"], "fixed settings"))


def test_what_plugins_say_is_no_html(report: Report) -> None:
    quality = replace(report.quality, outside=[TAG])
    evil = replace(report, answers=[TAG], facts=report.facts | {"datasets": [TAG]}, quality=quality)
    evil.sections[0].tables[0].rows[0][0] = replace(evil.sections[0].tables[0].rows[0][0], text=TAG, value=TAG)
    text = render(evil)
    parsed(text)
    assert TAG not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 5


def test_the_same_cells_give_the_same_page(work: Path, written: Path, tmp_path: Path) -> None:
    assert status("report", "--work", work, "--out", tmp_path) == 0
    for path in sorted(p for p in written.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes(), path


def test_missing_and_failed_cells_are_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    store = CellStore(copy)
    cells = gather(store).cells
    cells = cells[~cells["shuffled"] & (cells["backbone"] == "tiny")]
    gone, broken = (cells[(cells["selector"] == s) & (cells["seed"] == 1)].iloc[0] for s in ("agl", "dkgsb"))
    spec = gather(store).result(broken["key"]).spec
    for row in (gone, broken):
        shutil.rmtree(copy / "cells" / row["key"])
    store.write_failure(spec, f"the loss is not finite {TAG}", "trace", "diverged")

    assert status("report", "--work", copy, "--out", tmp_path / "one") == 1
    said = capsys.readouterr().err
    assert "52 cells are finished; not: 1 diverged, 1 that other lines have not run." in said
    text = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    parsed(text)
    assert "Not complete." in text and f"{gone['fold']} seed 1" in text
    assert "the loss is not finite &lt;script&gt;" in text and TAG not in text
    gaps = pd.read_csv(tmp_path / "one" / "tables" / "quality-gaps.csv").set_index("selector")
    assert gaps.loc["agl", ["finished", "missing", "diverged"]].tolist() == [8, 1, 0]
    assert gaps.loc["dkgsb", ["finished", "missing", "diverged"]].tolist() == [8, 0, 1]

    assert status("report", "--work", copy, "--out", tmp_path / "two", "--partial") == 0


def test_results_below_their_controls_are_named(work: Path, tmp_path: Path) -> None:
    gathered = gather(CellStore(work))
    below = gathered.cells["name"].eq("agl")
    cells = gathered.cells.assign(pcc=gathered.cells["pcc"].where(~below, -0.9))
    made = assemble(replace(gathered, cells=cells), work, tmp_path, Plugins.discover())
    assert any("agl" in s and "below the control shuffled patches" in s for s in made.quality.outside)


def test_tuned_settings_are_shown(work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    entry = Entry(
        study="s", dataset="synthetic", evaluation="inter", backbone="tiny", fold="", trials=20, points=20, pruned=3,
        folds=("D1",), seeds=(0,), sampler="tpe", pruner="none", validation_pcc=0.5, conditions="",
        settings={"dkgsb.temperature": 0.02},
    )  # fmt: skip
    write_entry(copy / "tuned", "dkgsb", entry)
    trials = [
        {"trial": i, "state": "complete", "value": v, "seconds": 1.0, "dkgsb.temperature": v}
        for i, v in ((0, 0.1), (1, 0.2))
    ]
    folder = keep_files(copy / "tuned", "dkgsb", entry, {"dkgsb.temperature": 1.0}, trials)
    assert len(pd.read_csv(folder / "trials.csv")) == 2
    made = assemble(gather(CellStore(copy)), copy, tmp_path / "figures", Plugins.discover())
    (tuning,) = [s for s in made.sections if s.name == "tuning"]
    texts = [entry.text for table in tuning.tables for row in table.rows for entry in row]
    assert {"20", "3", "dkgsb.temperature", "0.02"} <= set(texts)
    kinds = ["history", "importances"]  # one setting has no coordinates to be parallel
    assert [drawn.name for drawn in tuning.figures] == [f"tuning-{kind}-dkgsb-synthetic-inter-tiny" for kind in kinds]
    assert "Score of every trial" in render(made)


def test_another_baseline(work: Path, tmp_path: Path) -> None:
    gathered = gather(CellStore(work))
    made = assemble(gathered, work, tmp_path, Plugins.discover(), baseline="agl")
    (table,) = made.main
    assert [row[0].text for row in table.rows] == ["agl", "dkgsb", "pgl"]
    assert table.columns[2].name == "Δ agl" and table.rows[0][2].text == "–" != table.rows[2][2].text
    with pytest.raises(UnknownName, match="selector in these cells 'agk'"):
        assemble(gathered, work, tmp_path, Plugins.discover(), baseline="agk")


def test_the_report_of_a_tracked_folder_is_in_mlflow(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracked = tmp_path / "work"
    shutil.copytree(work, tracked)
    assert status("sync", "--work", tracked) == 0
    assert status("report", "--work", tracked, "--out", tmp_path / "out") == 0
    assert "The report is in MLflow too" in capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{tracked / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.`agl.level` = 'report'")
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"figures", "tables", "report.html"}
    assert status("report", "--work", tracked, "--out", tmp_path / "out", "--tracking", "none") == 0
    assert "MLflow" not in capsys.readouterr().out
    assert status("report", "--work", tracked, "--out", tmp_path / "out", "--tracking", "http://127.0.0.1:9") == 0
    assert "no MLflow server answers" in capsys.readouterr().err  # the report is written all the same
    assert status("report", "--work", tracked, "--out", tmp_path / "out", "--tracking", "nonsense://x") == 2
    assert "nonsense" in capsys.readouterr().err


def test_nothing_to_report_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("report", "--work", tmp_path) == 2
    CellStore(tmp_path)
    assert status("report", "--work", tmp_path) == 2
    assert "holds no finished cell to report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        ("clean with patches=shuffled", "clean"),
        ("clean with epochs=5, patches=shuffled #2", "clean with epochs=5 #2"),
        ("clean with patches=shuffled, epochs=5", "clean with epochs=5"),
        ("clean", "clean"),
    ],
)
def test_controls_belong_to_their_preset(label: str, plain: str) -> None:
    assert _unshuffled(label) == plain


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium here")
def test_the_page_works_in_a_browser(written: Path, tmp_path: Path) -> None:
    """Sorting, themes and folds: a script that clicks is put at the end of the page, and what is there then is read."""
    text = (written / "report.html").read_text(encoding="utf-8")
    probe = """<script>
    const table = document.querySelector("#answer table");
    const order = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.value));
    const click = (column) => table.tHead.rows[0].cells[column].querySelector("button").click();
    const found = {};
    click(1); found.down = order(); found.sort = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
    click(1); found.up = order();
    found.theme = document.documentElement.dataset.theme;
    found.paper = getComputedStyle(document.body).backgroundColor;
    found.closed = document.querySelectorAll("main details:not([open])").length;
    document.querySelector("button.zoom").click();
    found.large = document.getElementById("large").open;
    document.body.dataset.found = JSON.stringify(found);
    </script>"""
    page = tmp_path / "probe.html"
    page.write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            str(browser()), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom", f"{page.as_uri()}#theme=dark&unfold",
        ],
        capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}, check=True,
    )  # fmt: skip
    (body,) = parsed(done.stdout).iter("body")
    found = json.loads(body.get("data-found"))
    assert found["down"] == sorted(found["down"], reverse=True) == found["up"][::-1]
    assert found["sort"] == "descending"
    assert found["theme"] == "dark" and found["paper"] == "rgb(20, 24, 29)"
    assert found["closed"] == 0 and found["large"]


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_two_selectors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("compare", "agl", "pgl", "--work", work, "--json") == 0
    rows = {row["backbone"]: row for row in json.loads(capsys.readouterr().out)}
    cells = gather(CellStore(work)).cells
    own = cells[~cells["shuffled"] & (cells["backbone"] == "tiny")].set_index(["selector", "fold", "seed"])["pcc"]
    assert rows["tiny"]["difference"] == pytest.approx((own["agl"] - own["pgl"]).mean())
    assert (rows["tiny"]["units"], rows["tiny"]["seeds"], rows["tiny"]["verdict"]) == (3, 3, "too few units")

    assert status("compare", "agl", "pgl", "--work", work) == 0
    text = capsys.readouterr().out
    assert "agl − pgl" in text and "Too few units (units: 3, seeds: 3)" in text


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [("agl", "agl", "against itself"), ("agk", "pgl", "Did you mean 'agl'?"), ("agl", "agl2", "unknown selector")],
)
def test_compare_says_what_is_wrong(
    work: Path, capsys: pytest.CaptureFixture[str], a: str, b: str, sentence: str
) -> None:
    assert status("compare", a, b, "--work", work) == 2
    assert sentence in capsys.readouterr().err


def test_compare_two_folders(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    longer = ["--set", "protocol.epochs=1", "--selectors", "pgl,agl", "--seeds", "0,1,2", "--work", other]
    assert status(*GRID, *longer) == 0
    capsys.readouterr()
    assert status("compare", work, other, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["selector"] for row in rows] == ["agl", "pgl"]
    first, second = (gather(CellStore(folder)).cells for folder in (work, other))
    for row in rows:
        assert " → " in row["preset"] and "epochs=1" in row["preset"]
        means = [
            own.loc[~own["shuffled"] & (own["backbone"] == "tiny") & (own["selector"] == row["selector"]), "pcc"].mean()
            for own in (first, second)
        ]
        assert row["difference"] == pytest.approx(means[0] - means[1])


def test_folders_without_common_cells(work: Path) -> None:
    cells = gather(CellStore(work)).cells
    with pytest.raises(BadSpec, match="A and B have no dataset, evaluation"):
        two_folders(cells, cells.assign(dataset="another"), ("A", "B"))
