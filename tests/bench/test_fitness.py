"""What cannot run is skipped: with its reason wherever cells are shown, never as a failure, and looked at anew."""

import json
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from agl_bench import BadSection, Section
from agl_bench.bench.cells import CellStore
from agl_bench.bench.fitness import Skipped, check_built, note, noted, summed, unfit
from agl_bench.bench.merge import Outcome, merge, plan_merge
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import Bench, Failed, Finished, choose_device, fingerprints, run_cells
from agl_bench.bench.spec import Campaign
from agl_bench.bench.status import as_json, status_of
from agl_bench.cli import main
from agl_bench.comparison import report as report_page
from agl_bench.comparison.gather import gather
from agl_bench.comparison.quality import quality
from agl_bench.data.check import check_section
from agl_bench.errors import CannotRun
from agl_bench.maths.hypergradient import FiniteDifference
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import toy_spots, toy_view

NEEDY = """
    import torch
    from agl_bench import Backbone, Selector, hookimpl

    class Plain(Selector):
        '''Needs nothing.'''
        reference = "test"

        def forward(self, losses, step):
            return losses[self.is_primary].mean()

    class Gpu(Plain):
        '''Needs a GPU.'''
        needs_gpu = True

    class Twice(Plain):
        '''Differentiates twice.'''
        needs_second_order = True

    class Counting(Plain):
        '''Needs counts.'''
        needs_counts = True

    class Few(Plain):
        '''Takes few genes.'''
        max_genes = 12

    class Learner(Plain):
        '''Learns from validation.'''

        def __init__(self, view):
            super().__init__(view)
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, losses, step):
            return self.weighted_mean(losses, torch.sigmoid(self.weight).expand(len(losses)))

    class Flat(Backbone):
        '''Has no second derivatives.'''
        sees = "position"
        second_order = False

        def __init__(self, example):
            super().__init__(example)
            self.width = 2
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, spots):
            return self.layer(spots.position / 1000)

    class Card(Flat):
        '''Needs a GPU.'''
        needs_gpu, second_order = True, True

    @hookimpl
    def register_selectors():
        return {"plain": Plain, "gpu": Gpu, "twice": Twice, "counting": Counting, "few": Few, "learner": Learner}

    @hookimpl
    def register_backbones():
        return {"flat": Flat, "card": Card}
"""


@pytest.fixture(scope="module")
def needy(tmp_path_factory):
    path = tmp_path_factory.mktemp("needy") / "needy.py"
    path.write_text(textwrap.dedent(NEEDY))
    return path


def reasons(events):
    return [e.reason for e in events if isinstance(e, Skipped)]


CASES = {  # selector, backbone, settings -> words of the reason; "" = runs
    "plain": ("plain", "tiny", [], ""),
    "selector on the CPU": ("gpu", "tiny", [], "selector 'gpu' needs a CUDA device, and this run is on the cpu"),
    "backbone on the CPU": ("plain", "card", [], "backbone 'card' needs a CUDA device, and this run is on the cpu"),
    "second order": ("twice", "tiny", [], ""),
    "no second order": ("twice", "flat", [], "needs second derivatives, and backbone 'flat' has none"),
    "compiled": ("twice", "tiny", ["protocol.compile=true"], "differentiates twice, which a compiled model cannot"),
    "too many genes": ("few", "tiny", [], "selector 'few' takes 12 genes at most, and there are 80"),
    "learner": ("learner", "flat", [], "selector 'learner' needs second derivatives, and backbone 'flat' has none"),
    "counts": ("counting", "flat", [], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_each_need(case, run, needy, tmp_path):
    selector, backbone, more, reason = CASES[case]
    events = run(tmp_path, selector, files=[needy], backbone=[backbone], more=more, fold=["D1"])
    assert not any(isinstance(e, Failed) for e in events)
    if reason:
        assert [reason in r for r in reasons(events)] == [True]
        assert not any(isinstance(e, Finished) for e in events)
    else:
        assert sum(isinstance(e, Finished) for e in events) == 1
        assert reasons(events) == []


def test_a_gpu_is_enough(grid, needy):
    cells, bench = grid("gpu", files=[needy], backbone=["card"])
    spec = cells[0][0]
    assert unfit(spec, bench.plugins)
    assert unfit(replace(spec, device="cuda"), bench.plugins) == ""


def test_only_a_look_ahead_needs_second_derivatives(grid, needy):
    """A learner without parameters, one that learns from training, and finite differences do without."""
    plugins = Plugins.discover([needy])
    learner = plugins.entry("learner").load()
    spec = grid("learner", files=[needy], backbone=["flat"])[0][0][0]
    backbone = plugins.entry("flat").load()(toy_spots(4))

    def fits(selector):
        try:
            check_built(spec, selector, backbone)
        except CannotRun:
            return False
        return True

    assert not fits(learner(toy_view()))
    assert fits(plugins.entry("plain").load()(toy_view()))
    together, differences = learner(toy_view()), learner(toy_view())
    together.learns_from = "training"
    differences.hypergradient = FiniteDifference()
    assert fits(together) and fits(differences)


@pytest.mark.parametrize("name", ["gradient_cosine", "ol_aux"])
def test_an_instance_may_need_second_derivatives(name, run, needy, tmp_path):
    """Where a setting decides, the class cannot say."""
    setting = {"gradient_cosine": "gradient_cosine.weight=sign_all", "ol_aux": "ol_aux.measure=dot_late"}[name]
    events = run(tmp_path / "flat", name, files=[needy], backbone=["flat"], more=[setting], fold=["D1"])
    assert ["has none (second_order = False)" in r for r in reasons(events)] == [True]
    events = run(tmp_path / "tiny", name, more=[setting, "protocol.compile=true"], fold=["D1"])
    assert ["a compiled model cannot" in r for r in reasons(events)] == [True]
    events = run(tmp_path / "first", name, files=[needy], backbone=["flat"], fold=["D1"])
    assert sum(isinstance(e, Finished) for e in events) == 1


def test_skips_stick_to_nothing(grid, needy, tmp_path):
    """Noted where it was skipped, gone once anybody runs it, on whatever device, here or in a merged store."""
    cells, bench = grid("gpu", "plain", files=[needy])
    store = CellStore(tmp_path / "work")
    events = list(run_cells(cells, bench, store, NoRecorder()))
    assert len(reasons(events)) == 2
    found = status_of(store.work)
    assert sum(found.counts.values(), Counter()) == {"done": 2, "skipped": 2}
    assert {s["selector"] for s in as_json(found)["skipped"]} == {"gpu"}
    assert "needs a CUDA device" in as_json(found)["skipped"][0]["reason"]
    assert gather(store).skipped["selector"].tolist() == ["gpu", "gpu"]
    # Another machine has a GPU: its cells have other keys.
    done = next(e.result for e in events if isinstance(e, Finished))
    spec = next(spec for spec, _ in cells if spec.selector.name == "gpu" and spec.fold == done.spec.fold)
    other = CellStore(tmp_path / "other")
    other.write(replace(done, spec=replace(spec, device="cuda")))
    joined = tmp_path / "joined"
    list(merge(plan_merge([store.work, other.work], joined), Outcome({}, [])))
    assert sum(status_of(joined).counts.values(), Counter()) == {"done": 3, "skipped": 1}
    assert len(gather(CellStore(joined)).skipped) == 1
    # The next run decides anew.
    stale = Skipped(cells[1][0], "no longer so")
    note(store.work, stale)
    events = list(run_cells(cells, bench, store, NoRecorder()))
    assert "no longer so" not in [s.reason for s in noted(store.work, ())]
    assert len(reasons(events)) == 2


def test_what_was_noted_by_another_version_is_left_out(grid, needy, tmp_path):
    cells, _ = grid("gpu", files=[needy])
    note(tmp_path, Skipped(cells[0][0], "why"))
    (path,) = (tmp_path / "skipped").iterdir()
    content = json.loads(path.read_text())
    del content["spec"]["protocol"]["epochs"]
    content["spec"]["protocol"]["unheard_of"] = 1
    path.with_name("other.json").write_text(json.dumps(content))
    path.with_name("half.json").write_text("{")
    assert [s.reason for s in noted(tmp_path, ())] == ["why"]


def test_sentences_are_counted(grid, needy):
    cells, _ = grid("gpu", "few", files=[needy])
    skips = [Skipped(spec, f"of {spec.selector.name}") for spec, _ in cells]
    assert summed(skips) == [
        "synthetic · inter · tiny · gpu: 2 cells skipped: of gpu",
        "synthetic · inter · tiny · few: 2 cells skipped: of few",
    ]
    assert summed(skips[:1])[0].endswith("gpu: 1 cell skipped: of gpu")


def test_the_commands_say_it(words, needy, tmp_path, capsys):
    """run, plan, --dry-run, status and report; skips alone end with status 0."""
    work, table = str(tmp_path / "work"), tmp_path / "table.json"
    grid = ["--plugin", str(needy), "--selectors", "pgl,gpu,few", *words, "--work", work]

    def said(*words, status=0):
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        assert (ended.value.code or 0) == status
        return capsys.readouterr().out

    dry = said("run", *grid, "--dry-run")
    assert dry.count("  skipped  ") == 2 and "gpu' needs a CUDA device" in dry and "4 to run, 2 skipped" in dry
    shown = said("run", *grid, "--json", str(table))
    assert shown.count("SKIPPED, selector 'gpu' needs a CUDA device") == 2
    assert "gpu" in shown and "skipped¹" in shown and "skipped²" in shown
    assert "¹ 2 cells skipped: selector 'gpu' needs a CUDA device, and this run is on the cpu." in shown
    assert [s["selector"] for s in json.loads(table.read_text())["skipped"]] == ["gpu", "few", "gpu", "few"]
    planned = json.loads(said("plan", *grid, "--json"))
    assert [line["skipped"] for line in planned["lines"]] == [0, 2, 2]
    assert {s["selector"] for s in planned["skipped"]} == {"gpu", "few"}  # the latter is known by now
    status = said("status", "--work", work)
    assert "few: 2 cells skipped: selector 'few' takes 12 genes at most" in status


def test_the_report_says_it(run, needy, tmp_path):
    run(tmp_path, "pgl", "gpu", "few", files=[needy])
    found = quality(gather(CellStore(tmp_path)), tmp_path, {}, frozenset(), [])
    assert found.is_whole  # no failure
    assert found.sentence == "2 cells are finished; not: 4 skipped, since they cannot run."
    assert found.gaps.set_index("selector")["skipped"].to_dict() == {"few": 2, "gpu": 2}
    assert found.gaps["missing"].tolist() == [0, 0]
    assert found.skipped["cells"].tolist() == [2, 2]
    section = report_page._quality_section(found)
    assert [table.title for table in section.tables] == ["Lines that lack cells", "Cells that cannot run"]
    assert any("takes 12 genes at most" in entry.text for row in section.tables[1].rows for entry in row)


def test_tune_says_it(words, needy, tmp_path, capsys):
    grid = ["--plugin", str(needy), "--selectors", "gpu,few", *words, "--work", str(tmp_path), "--trials", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["tune", *grid, "--fold", "D1", "--tune", "protocol.learning_rate"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "SKIPPED, selector 'gpu' needs a CUDA device" in out
    assert "SKIPPED, selector 'few' takes 12 genes at most" in out


@pytest.fixture
def normalised(tmp_path):
    """Two sections of ln(1 + counts), as some publishers give them: (36 spots, 40 genes)."""
    generator = np.random.default_rng(0)
    for name in ("A", "B"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        side = np.arange(6) * 40.0 + 20
        where = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
        counts = generator.poisson(np.exp(generator.normal(0, 1, (36, 40))))
        genes = pd.DataFrame(index=[f"G{i}" for i in range(40)])
        data = anndata.AnnData(np.log1p(counts).astype(np.float32), var=genes)
        data.obsm["spatial"], data.uns["um_per_px"] = where, 1.0
        data.write_h5ad(folder / "counts.h5ad")
        pixels = generator.integers(0, 255, (260, 260, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "image.png")
    return tmp_path / "data"


def test_normalised_values_are_taken_as_they_are(normalised, needy, tmp_path, capsys):
    given = ["--datasets", "folder", "--set", f"folder.path={normalised}", "--set", "tiny.patch_px=16"]
    given += [w for s in ("primary_genes=5", "buffer_um=0", "patch_um=40") for w in ("--set", f"protocol.{s}")]
    given += ["--plugin", str(needy), "--selectors", "pgl,counting", "--preset", "smoke", "--evaluation", "inter"]
    given += ["--tracking", "none", "--device", "cpu", "--work", str(tmp_path / "work")]
    given += ["--set", "protocol.min_genes_per_spot=5"]
    free, plain = ["--set", "folder.has_counts=false"], ["--set", "protocol.normalisation=none"]
    of_values = [w for s in ("primary_score", "ranking") for w in ("--set", f"protocol.{s}=seurat")]

    def said(*words, status):
        with pytest.raises(SystemExit) as ended:
            main(["run", *given, *words])
        assert (ended.value.code or 0) == status
        found = capsys.readouterr()
        return found.out + found.err

    assert "give raw counts, not normalised ones; a dataset that has no others says" in said(status=2)
    refused = said(*free, status=2)
    assert "dataset 'folder' has normalised values and no raw counts" in refused
    assert " ".join(plain + of_values) in " ".join(refused.split())  # the whole cure at once
    assert "protocol.normalisation = none is for values that are normalised already" in said(*plain, status=2)
    scored = ["--set", "protocol.ranking=seurat_v3"]
    refused = " ".join(said(*free, *plain, *of_values, *scored, status=2).split())
    assert (
        "protocol.ranking = seurat_v3 needs counts; use the values as they are with --set protocol.ranking=" in refused
    )
    plain += of_values
    shown = said(*free, *plain, status=0)
    assert "2 cells skipped: selector 'counting' needs raw counts, and dataset 'folder' has none." in shown
    # What is trained on is what the file holds, bit for bit.
    plugins = Plugins.discover([needy])
    settings = [w for w in [*given, *free, *plain] if "=" in w]
    campaign = Campaign.of(
        plugins, selectors=["pgl"], datasets=["folder"], evaluation=["inter"], preset="smoke", assignments=settings
    )
    root = Path("/nowhere")
    known = fingerprints(campaign, plugins, root, None)
    (spec, plan), *_ = campaign.cells(plugins, root, device="cpu", fingerprint=known)
    bench = Bench(plugins, root, choose_device("cpu"))
    setting = bench.setting(spec, plan)
    stored = anndata.read_h5ad(normalised / plan.training_sections[0] / "counts.h5ad")[:, list(setting.genes.names)].X
    rows = setting.fold.train[: len(setting.rows.train)]
    seen = setting.development.leading_expression(len(rows))
    assert torch.equal(seen, torch.from_numpy(np.asarray(stored)[rows % 36]))


@pytest.mark.parametrize(("value", "word"), [(-1.0, "is -1"), (np.nan, "is nan"), (np.inf, "is inf")])
def test_values_without_counts_are_checked(value, word):
    x = np.linspace(0.1, 5, 12, dtype=np.float32).reshape(3, 4)
    counts = anndata.AnnData(x, obsm={"spatial": np.arange(6, dtype=np.float64).reshape(3, 2)})
    check_section(Section("S", counts, 0.5), has_counts=False)
    counts.X[1, 2] = value
    with pytest.raises(BadSection, match=f"the value of spot '1', gene '2' {word}; without raw counts"):
        check_section(Section("S", counts, 0.5), has_counts=False)
