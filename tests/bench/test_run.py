"""Whole runs on generated sections: repeatable, restartable, and equal for all selectors."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.run import Bench, Failed, Finished
from agl_bench.bench.table import as_json
from agl_bench.cli import main
from agl_bench.data.folds import make_fold
from agl_bench.errors import BadSpec, UnknownName
from agl_bench_plugins.datasets.synthetic import Synthetic

SELECTORS = ("pgl", "agl", "random_k", "hvg_k", "dkgsb", "amal")
FEWER = ("random_k.k=20", "hvg_k.k=20")  # fewer than there are: which ones are chosen matters

HANGING = """
    import os, time
    from pathlib import Path
    from agl_bench import Selector, hookimpl

    class Hanging(Selector):
        '''Waits for ever in its first step if it is told to.'''
        reference = "test"

        def forward(self, losses, step):
            place = os.environ.get("AGL_TEST_HANG")
            if place:
                Path(place).touch()
                time.sleep(300)
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {"hanging": Hanging}
"""
RAISING = """
    import os, signal, time
    from agl_bench import Selector, hookimpl

    class Raising(Selector):
        '''Fails until it is mended, or presses Ctrl-C in the command, twice.'''
        reference = "test"

        def forward(self, losses, step):
            how = os.environ.get("AGL_TEST_BREAK")
            if step.epoch == 1 and how == "error":
                raise ValueError("on\\npurpose")
            while step.epoch == 1 and how:
                os.kill(int(how), signal.SIGINT)
                time.sleep(1)
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {"raising": Raising}
"""
HARMFUL = """
    import sys
    from agl_bench import Selector, hookimpl

    class Meddling(Selector):
        '''Changes what it is shown, then fails.'''
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            self.shown = view.expression

        def forward(self, losses, step):
            self.shown.zero_()
            raise ValueError("meddled")

    class Quitting(Selector):
        '''Ends the process.'''
        reference = "test"

        def forward(self, losses, step):
            sys.exit(0)

    @hookimpl
    def register_selectors():
        return {"meddling": Meddling, "quitting": Quitting}
"""
PROBE = """
    import torch
    from agl_bench import Selector, hookimpl

    SEEN = {}

    class Quiet(Selector):
        '''Notes what it is shown.'''
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            self.seen = SEEN[type(self).__name__] = {"view": view, "steps": []}
            self.disturb()

        def disturb(self):
            pass

        def forward(self, losses, step):
            self.disturb()
            kept = (step.epoch, step.row.clone(), step.target.clone(), step.prediction.detach().clone())
            self.seen["steps"].append(kept)
            return losses[self.is_primary].mean()

    class Noisy(Quiet):
        '''Also draws from every generator that it should not touch.'''

        def disturb(self):
            torch.rand(7)
            torch.rand(7, generator=self.seen["view"].generator)

    @hookimpl
    def register_selectors():
        return {"quiet": Quiet, "noisy": Noisy}
"""
FROZEN = """
    import torch
    from torch import nn
    from agl_bench import Backbone, hookimpl

    ENCODED = []

    class Still(Backbone):
        '''A trained layer on some pixels of the patch; picking them is the frozen part.'''
        reference = "test"
        frozen, late_prefixes, patch_px, width, learning_rate = True, ("mix.",), 16, 6, 1e-2

        def __init__(self, example):
            super().__init__(example)
            self.register_buffer("chosen", torch.arange(0, 768, 7))
            self.mix = nn.Linear(len(self.chosen), self.width)

        def encode(self, spots):
            ENCODED.append(len(spots.position))
            assert not self.training and not torch.is_grad_enabled()
            return self.pick(spots)

        def pick(self, spots):
            return spots.patches.flatten(1)[:, self.chosen]

        def forward(self, spots):
            hidden = self.pick(spots) if spots.embedding is None else spots.embedding
            assert (spots.patches is None) == self.frozen
            return torch.tanh(self.mix(hidden))

    @hookimpl
    def register_backbones():
        return {"still": Still}
"""


def plugin(folder, name, source):
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    return path


def finished(events):
    return {(e.result.spec.selector.name, e.result.spec.fold): e.result for e in events if isinstance(e, Finished)}


def same(first, second):
    """Bit for bit, cost apart."""
    pd.testing.assert_frame_equal(first.genes, second.genes, check_exact=True)
    pd.testing.assert_frame_equal(
        first.epochs.drop(columns="seconds"), second.epochs.drop(columns="seconds"), check_exact=True
    )
    assert first.scores == second.scores
    assert (first.best_epoch, first.counts) == (second.best_epoch, second.counts)


def inodes(store):
    return {p.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in store.cells.glob("[!.]*/result.json")}


@pytest.fixture(scope="module")
def complete(tmp_path_factory, run):
    """Work folder of all selectors on one fold."""
    work = tmp_path_factory.mktemp("complete")
    run(work, *SELECTORS, fold=["D1"], more=FEWER)
    return work


def test_same_command_same_bits(complete, run, tmp_path):
    first = {r.spec.selector.name: r for r in CellStore(complete)}
    assert set(first) == set(SELECTORS)
    torch.rand(3)  # the state of the global generator does not matter
    second = {name: r for (name, _), r in finished(run(tmp_path, *SELECTORS, fold=["D1"], more=FEWER)).items()}
    for name in SELECTORS:
        same(first[name], second[name])
        assert first[name].spec == second[name].spec
    assert len({r.genes["weight"].to_numpy().tobytes() for r in first.values()}) == len(SELECTORS)


def test_a_cell_does_not_depend_on_its_neighbours(complete, run, tmp_path):
    (alone,) = finished(run(tmp_path, "amal", fold=["D1"], more=FEWER)).values()
    same({r.spec.selector.name: r for r in CellStore(complete)}["amal"], alone)


def test_result_is_complete(complete):
    for result in CellStore(complete):
        genes, counts = result.genes, result.counts
        assert genes["primary"].sum() == counts["primary_genes"] == 5
        assert (~genes["primary"]).sum() == counts["auxiliary_genes"]
        assert genes.loc[genes["primary"], "weight"].mean() == pytest.approx(1, abs=1e-4)
        assert genes.loc[~genes["primary"], ["pearson", "spearman", "mse"]].isna().all(axis=None)
        assert np.isfinite(result.pcc)
        assert result.epochs["epoch"].tolist() == [0, 1, 2]
        assert counts["train_spots"] + counts["held_out_spots"] + counts["validation_spots"] == 40
        assert counts["test_spots"] == 40


def test_a_result_says_how_the_selector_learnt(complete):
    """With nothing left open."""
    found = {r.spec.selector.name: r.provenance["hypergradient"] for r in CellStore(complete)}
    assert {n for n, how in found.items() if how} == {"dkgsb", "amal"}
    assert found["dkgsb"].startswith("Unrolled(steps=3, rule=Adam(") and "mode='forward'" in found["dkgsb"]
    assert found["amal"].startswith("OneStep(rate=0.5")


@pytest.mark.parametrize(("augment", "symmetries"), [("true", 8), ("false", 1)])
def test_a_frozen_backbone_encodes_each_spot_once_for_all_folds(tmp_path, grid, monkeypatch, augment, symmetries):
    """And the results are those of a backbone that does the same work in every step."""
    path = plugin(tmp_path, "frozen", FROZEN)
    results = []
    for frozen in (True, False):
        more = [*FEWER, f"protocol.augment={augment}", "protocol.min_genes_per_spot=0", "protocol.spot_mads=0"]
        cells, bench = grid("dkgsb", "hvg_k", files=[path], evaluation=["intra"], backbone=["still"], more=more)
        cls = bench.plugins.entry("still", "backbone").load()
        monkeypatch.setattr(cls, "frozen", frozen)
        module = sys.modules[cls.__module__]
        module.ENCODED.clear()
        sections = set()
        results.append([])
        for spec, plan in cells:
            sections.add(plan.sections)
            results[-1].append(list(bench.train(spec, plan))[-1])
            assert sum(module.ENCODED) == (len(sections) * 40 * symmetries if frozen else 0)
        assert len(cells) == 8 and len(sections) == 2  # 2 sections × 2 folds × 2 selectors
    for encoded, plain in zip(*results, strict=True):
        assert encoded.spec == plain.spec
        same(encoded, plain)
    assert len({r.pcc for r in results[0]}) == 8


def test_finished_cells_are_not_trained_again(complete, run, monkeypatch):
    def fail(*_):
        raise AssertionError("a finished cell was trained")

    monkeypatch.setattr(Bench, "train", fail)
    before = inodes(CellStore(complete))
    events = run(complete, *SELECTORS, fold=["D1"], more=FEWER)
    assert all(isinstance(e, Finished) and e.kept for e in events)
    assert inodes(CellStore(complete)) == before
    assert isinstance(run(complete, "pgl", fold=["D1"], again=True)[-1], Failed)


def test_a_raising_selector_costs_its_own_cells_only(tmp_path, words, monkeypatch, capsys):
    work, path = tmp_path / "work", plugin(tmp_path, "raising", RAISING)
    words = ["run", "--selectors", "pgl,raising,agl", "--plugin", str(path), "--work", str(work), *words]
    monkeypatch.setenv("AGL_TEST_BREAK", "error")
    assert status(words) == 1
    said = capsys.readouterr()
    failed = [line for line in said.err.splitlines() if "failed:" in line]
    assert len(failed) == 2
    assert "synthetic · inter · tiny · raising · fold D1 · seed 0: ValueError: on purpose" in failed[0]
    assert "Traceback" not in said.err + said.out
    store = CellStore(work)
    assert sorted(r.spec.selector.name for r in store) == ["agl", "agl", "pgl", "pgl"]
    records = [p / "error.txt" for p in store.failed.iterdir()]
    assert len(records) == 2
    assert all("Traceback" in p.read_text() for p in records)

    before = inodes(store)
    monkeypatch.delenv("AGL_TEST_BREAK")
    assert status(words) == 1  # a failure stays unless one asks
    said = capsys.readouterr()
    assert said.out.count("raising · fold D1 · seed 0: failed before and not tried again, ValueError: on purpose") == 1
    assert "4 cells were finished before and kept" in said.out
    assert said.err.splitlines()[-1] == "agl-bench: --retry-failed tries failed cells again"
    assert inodes(store) == before
    assert status([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("  failed  ") == 2 and "6 cells, 4 finished, 0 to run, 2 failed (--retry-failed); preset" in said
    assert status([*words, "--retry-failed"]) == 0
    assert "4 cells were finished before and kept" in capsys.readouterr().out
    assert before.items() < inodes(store).items()
    assert len(list(store)) == 6
    assert list(store.failed.iterdir()) == []


def test_a_harmful_selector_costs_its_own_cells_only(tmp_path, words, capsys):
    """Neither what it does to the data nor to the process reaches the selectors after it."""
    work, path = tmp_path / "work", plugin(tmp_path, "harmful", HARMFUL)
    assert status(["run", "--selectors", "agl", "--work", str(tmp_path / "alone"), *words]) == 0
    capsys.readouterr()
    words = ["run", "--selectors", "meddling,quitting,agl", "--plugin", str(path), "--work", str(work), *words]
    assert status(words) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if "failed:" in line]
    assert len(failed) == 4
    said = "has changed expression, which is read-only", "it called sys.exit(0)"
    assert all(any(sentence in line for sentence in said) for line in failed)
    expected = {r.spec.fold: r.genes for r in CellStore(tmp_path / "alone")}
    found = {r.spec.fold: r.genes for r in CellStore(work)}
    assert expected.keys() == found.keys()
    for fold, genes in expected.items():
        pd.testing.assert_frame_equal(genes, found[fold], check_exact=True)


def test_ctrl_c(tmp_path, words, monkeypatch, capsys):
    work, path = tmp_path / "work", plugin(tmp_path, "raising", RAISING)
    monkeypatch.setenv("AGL_TEST_BREAK", str(os.getpid()))
    words = ["run", "--selectors", "pgl,raising", "--plugin", str(path), "--work", str(work), *words]
    assert status(words) == 75
    err = capsys.readouterr().err
    assert err.strip() == "agl-bench: interrupted; finished work is kept, and the same command continues"
    store = CellStore(work)
    assert len(list(store)) == 1
    assert store.leases.running() == {}


def status(words):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main(words)
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value.code or 0


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM,)])
def test_ended_halfway_and_continued(signals, tmp_path, words, run):
    work, path, hangs = tmp_path / "work", plugin(tmp_path, "hanging", HANGING), tmp_path / "hangs"
    command = ["run", "--selectors", "pgl,hanging,agl", "--plugin", str(path), "--work", str(work), *words]
    process = subprocess.Popen(
        [sys.executable, "-c", "from agl_bench.cli import main; main()", *command],
        env=os.environ | {"AGL_TEST_HANG": str(hangs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(1200):
            if hangs.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert hangs.exists(), process.communicate()[1]
        for position, number in enumerate(signals):
            process.send_signal(number)
            if number == signal.SIGTERM and not position:  # the end of the epoch does not come
                said = "agl-bench: stopping at the end of this epoch, or in 10 s; a second signal ends at once\n"
                assert said in iter(process.stderr.readline, "")  # after what is said of loading
        err = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    if signals[0] == signal.SIGTERM:
        assert process.returncode == 75
        assert err.splitlines()[-1] == "agl-bench: interrupted; finished work is kept, and the same command continues"
        assert "Traceback" not in err
    store = CellStore(work)
    (done,) = store
    assert (done.spec.selector.name, done.spec.fold) == ("pgl", "D1")

    before = inodes(store)
    assert status(command) == 0
    assert before.items() < inodes(store).items()
    uninterrupted = finished(run(tmp_path / "other", "pgl,hanging,agl", files=[path]))
    continued = {(r.spec.selector.name, r.spec.fold): r for r in store}
    assert set(continued) == set(uninterrupted)
    for place, result in continued.items():
        same(result, uninterrupted[place])
    tables = [
        [(line["selector"], line["pcc_mean"], line["difference_to_baseline_mean"]) for line in as_json(r)["lines"]]
        for r in ([continued[place] for place in uninterrupted], list(uninterrupted.values()))
    ]
    assert tables[0] == tables[1]


def test_all_selectors_work_under_equal_conditions(tmp_path, grid, run):
    path = plugin(tmp_path, "probe", PROBE)
    cells, bench = grid("quiet,noisy", "dkgsb", files=[path], fold=["D1"])
    settings, models = [], []
    for spec, plan in cells:
        setting = bench.setting(spec, plan)
        settings.append(setting)
        models.append(bench.build(spec, setting)[0].state_dict())
    for setting in settings[1:]:
        for name in ("train", "held_out", "validation", "test"):
            assert np.array_equal(getattr(setting.fold, name), getattr(settings[0].fold, name))
        assert setting.genes.names == settings[0].genes.names
        assert torch.equal(setting.genes.rank, settings[0].genes.rank)
    for model in models[1:]:
        assert all(torch.equal(tensor, models[0][name]) for name, tensor in model.items())

    run(tmp_path / "work", "noisy,quiet", files=[path], fold=["D1"])
    (module,) = (m for n, m in sys.modules.items() if n.startswith("agl_bench_file_probe"))
    quiet, noisy = module.SEEN["Quiet"]["steps"], module.SEEN["Noisy"]["steps"]
    assert len(quiet) == len(noisy) >= 3
    for one, other in zip(quiet, noisy, strict=True):
        assert one[0] == other[0]
        for a, b in zip(one[1:], other[1:], strict=True):  # rows, targets, predictions
            assert torch.equal(a, b)


def test_the_number_of_threads_stays():
    """Scanpy's first numba kernel sets OpenMP's number of threads for the whole process, torch's included.

    It decides speed and bits, and does so once for each process, hence one of its own.
    """
    script = """
        import numpy as np, torch
        from scipy import sparse
        from anndata import AnnData
        from agl_bench import Protocol, Section
        from agl_bench.data.gene_split import score_genes
        from agl_bench.data.preprocess import tabulate
        counts = AnnData(sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (40, 60)).astype(np.float32)))
        counts.obsm["spatial"] = np.random.default_rng(1).random((40, 2))
        table = tabulate([Section("S", counts, 1.0)], Protocol(min_genes_per_spot=0, spot_mads=0))
        before = torch.get_num_threads()
        score_genes("seurat_v3", table, np.arange(40), np.arange(60))
        print(before, torch.get_num_threads())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1"]


def test_a_stored_fold_given_back_gives_the_same_result(tmp_path, run):
    """Also where the buffer has taken spots away: the file lists what is left."""
    options = {"evaluation": ["intra"], "fold": ["S1.0"], "more": ["protocol.folds=2", "protocol.buffer_um=112"]}
    options["more"] += ["synthetic.spots=150"]
    (first,) = (e.result for e in run(tmp_path, "hvg_k", **options) if isinstance(e, Finished))
    stored = tmp_path / "folds" / f"{first.fold['digest']}.csv"
    assert first.counts["buffer_spots"] > 0 and first.fold["nearest_um"] >= 112
    options["more"] = [f"protocol.fold_file={stored}", "synthetic.spots=150"]
    (second,) = (e.result for e in run(tmp_path, "hvg_k", **options) if isinstance(e, Finished))
    assert second.spec.key != first.spec.key
    assert second.counts == first.counts | {"buffer_spots": 0, "unlisted_spots": first.counts["buffer_spots"]}
    assert (second.scores, second.fold) == (first.scores, first.fold)
    pd.testing.assert_frame_equal(second.genes, first.genes, check_exact=True)
    assert [path.name for path in (tmp_path / "folds").iterdir()] == [stored.name]


def test_files_of_genes_decide(tmp_path, run, grid):
    cells, bench = grid("hvg_k", fold=["D1"])
    names = sorted(bench.setting(*cells[0]).genes.names)
    (tmp_path / "primary.txt").write_text("\n".join(names[:7]))
    (tmp_path / "ranks.csv").write_text("\n".join(f"{name},{len(name)}" for name in names[5:20]))
    more = [f"protocol.primary_file={tmp_path / 'primary.txt'}", f"protocol.ranking_file={tmp_path / 'ranks.csv'}"]
    (result,) = (e.result for e in run(tmp_path, "hvg_k", fold=["D1"], more=more) if isinstance(e, Finished))
    assert sorted(result.genes.query("primary")["gene"]) == names[:7]
    assert result.counts["primary_genes"] == 7
    assert result.counts["unscored_genes"] == result.counts["auxiliary_genes"] - 13
    assert 2 <= result.counts["tied_genes"] <= 13
    assert set(result.genes.query("0 <= rank < 13")["gene"]) == set(names[7:20])


def test_a_selector_sees_training_spots_only(tmp_path, grid):
    path = plugin(tmp_path, "probe", PROBE)
    cells, bench = grid("quiet", files=[path], fold=["D1"])
    setting = bench.setting(*cells[0])
    _, selector = bench.build(cells[0][0], setting)
    assert selector.seen["view"].expression.shape[0] == len(setting.fold.train)


@pytest.mark.parametrize(("evaluation", "fold"), [("inter", "D2"), ("intra", "S1.1")])
@pytest.mark.parametrize("selector", ["hvg_k", "dkgsb"])
def test_test_spots_decide_nothing_before_the_test(evaluation, fold, selector, grid, monkeypatch):
    options = {
        "evaluation": [evaluation],
        "fold": [fold],
        "more": [*FEWER, "protocol.min_genes_per_spot=0", "protocol.spot_mads=0"],
    }
    cells, bench = grid(selector, **options)
    ((spec, plan),) = cells
    test = bench.setting(spec, plan).fold.test
    rows = bench._table[1].source_row[test]
    before = list(bench.train(spec, plan))[-1]
    read = Synthetic.read

    def permuted(self, root, name):
        section = read(self, root, name)
        if name in plan.test_sections:
            order = np.random.default_rng(0).permutation(len(rows))
            counts = section.counts.X.tolil()
            counts[rows] = section.counts.X[rows[order]]
            section.counts.X = counts.tocsr()
        return section

    monkeypatch.setattr(Synthetic, "read", permuted)
    cells, bench = grid(selector, **options)
    after = list(bench.train(*cells[0]))[-1]
    assert before.scores != after.scores
    columns = ["gene", "primary", "rank", "score", "weight"]
    pd.testing.assert_frame_equal(before.genes[columns], after.genes[columns], check_exact=True)
    pd.testing.assert_frame_equal(
        before.epochs.drop(columns="seconds"), after.epochs.drop(columns="seconds"), check_exact=True
    )


def test_what_wrong_spots_have_predicts_nothing(grid, monkeypatch):
    """On random folds, where a spot's own features predict; expression, folds and genes are the same."""
    read = Synthetic.read

    def with_embedding(self, root, name):
        section = read(self, root, name)
        section.embedding = np.log1p(section.counts.X[:, :40].toarray())  # as telling as can be
        return section

    monkeypatch.setattr(Synthetic, "read", with_embedding)
    more = ["protocol.fold_shape=random", "protocol.epochs=20", "protocol.patience=20", "synthetic.spots=200"]
    found = {}
    for patches in ("own", "shuffled"):
        more_here = [*more, f"protocol.patches={patches}", "embedding.learning_rate=0.01"]
        cells, bench = grid("pgl", evaluation=["intra"], backbone=["embedding"], seeds=["0", "1"], more=more_here)
        found[patches] = [list(bench.train(*cell))[-1] for cell in cells]
        assert ("shuffled patches" in cells[0][0].title) == (patches == "shuffled")
    own, shuffled = (np.array([r.pcc for r in results]) for results in found.values())
    assert own.mean() > 0.2 and abs(shuffled.mean()) < 0.05, (own, shuffled)
    for a, b in zip(*found.values(), strict=True):
        assert a.spec.key != b.spec.key and a.counts == b.counts
        assert a.genes["gene"].tolist() == b.genes["gene"].tolist()
        name = "control_position_knn_pcc_gene_mean_section_mean"
        assert a.scores[name] == b.scores[name]  # knows no patch
    assert len({r.pcc for r in found["shuffled"]}) == len(found["shuffled"])


def test_shuffled_patches_are_those_of_other_spots_of_the_section(grid):
    def patches(how, seed, backbone="tiny"):
        more = [f"protocol.patches={how}"]
        (cell, *_), bench = grid("pgl", evaluation=["intra"], backbone=[backbone], seeds=[seed], more=more)
        setting = bench.setting(*cell)
        rows = np.concatenate([getattr(setting.fold, n) for n in ("train", "held_out", "validation", "test")])
        return torch.cat([setting.development.patches, setting.test.patches])[np.argsort(rows)].flatten(1)

    own, shuffled, other = patches("own", "0"), patches("shuffled", "0"), patches("shuffled", "1")
    order = [int((own == patch).all(1).nonzero()) for patch in shuffled]
    assert sorted(order) == list(range(len(own))) != order
    assert not torch.equal(shuffled, other)


def without(genes_of, *, but=()):
    """`Synthetic.read` whose section `genes_of` has only the genes `but`, in another order, and one of its own."""
    read = Synthetic.read

    def reading(self, root, name):
        section = read(self, root, name)
        if name == genes_of:
            names = section.counts.var_names
            kept = [*(n for n in names if n in but), next(n for n in names if n not in but)][::-1]
            section.counts = section.counts[:, kept].copy()
            section.counts.var_names = ["its own", *kept[1:]]
        return section

    return reading


def test_a_fold_does_not_depend_on_the_genes_of_the_test_section(grid, monkeypatch):
    options = {"fold": ["D2"], "more": ["protocol.min_genes_per_spot=0", "protocol.spot_mads=0"]}
    cells, bench = grid("agl", **options)
    spec, plan = cells[0]
    before, whole = bench.setting(spec, plan), list(bench.train(spec, plan))
    assert plan.test_sections == ("S2",) and plan.training_sections == ("S1",)
    primary = [n for n, p in zip(before.genes.names, before.genes.primary, strict=True) if p]
    lost = primary[:2]
    but = [n for i, n in enumerate(before.genes.names) if n not in lost and (n in primary or i % 2)]
    monkeypatch.setattr(Synthetic, "read", without("S2", but=but))
    cells, bench = grid("agl", **options)
    after, part = bench.setting(*cells[0]), list(bench.train(*cells[0]))
    assert before.genes.names == after.genes.names and torch.equal(before.genes.rank, after.genes.rank)
    assert torch.equal(before.development.expression_of(), after.development.expression_of())
    lacks = torch.tensor([n not in but for n in after.genes.names])
    assert (after.test.expression_of()[:, lacks] == 0).all() and before.test.expression_of()[:, lacks].any()
    pd.testing.assert_frame_equal(
        whole[-1].epochs.drop(columns="seconds"), part[-1].epochs.drop(columns="seconds"), check_exact=True
    )
    scores = part[-1].genes.set_index("gene").filter(like="pearson").loc[primary]
    assert scores.isna().any(axis=1).to_numpy().tolist() == [n in lost for n in primary]


def test_a_test_section_without_any_primary_gene_is_named(grid, monkeypatch):
    options = {"fold": ["D2"], "more": ["protocol.min_genes_per_spot=0", "protocol.spot_mads=0"]}
    cells, bench = grid("agl", **options)
    genes = bench.setting(*cells[0]).genes
    but = [n for n, p in zip(genes.names, genes.primary, strict=True) if not p]
    monkeypatch.setattr(Synthetic, "read", without("S2", but=but))
    cells, bench = grid("agl", **options)
    with pytest.raises(BadSpec, match="section 'S2', tested in fold D2, has none of the 5 primary genes; check that"):
        bench.setting(*cells[0])
    cells, bench = grid("agl", fold=["D2"], more=[*options["more"], "protocol.genes_from=all"])
    assert set(bench.setting(*cells[0]).genes.names) <= set(but)  # common to all sections


def test_memory_of_a_fold_is_released_before_the_next(grid, monkeypatch):
    seen, alive = [], []

    def started(*arguments):
        alive.append(sum(store() is not None for store in seen))
        return make_fold(*arguments)

    monkeypatch.setattr("agl_bench.bench.run.make_fold", started)
    cells, bench = grid("pgl", "agl")
    for cell in cells:
        for _ in bench.train(*cell):
            pass
        setting = bench.setting(*cell)
        seen += [weakref.ref(setting.development), weakref.ref(setting.test)]
        del setting
    assert len(alive) >= 2 and not any(alive)


@pytest.mark.parametrize("settings", [(), ("protocol.normalisation=pearson_residuals", "protocol.standardise=section")])
def test_a_small_budget_changes_no_result(settings, grid, monkeypatch):
    found, forms = [], []
    for memory in ("1G", "100K", "0"):
        monkeypatch.setenv("AGL_BENCH_MEMORY", memory)
        cells, bench = grid("hvg_k", "dkgsb", fold=["D2"], more=settings)
        for cell in cells:
            *_, result = bench.train(*cell)
            found.append((result.scores, result.genes, result.epochs.drop(columns="seconds")))
        forms.append(type(bench.setting(*cells[0]).development.matrix).__name__)
    assert forms[0] == "Dense" and forms[-1] == "Mapped"
    for i, (scores, genes, epochs) in enumerate(found[2:]):
        assert scores == found[i % 2][0]
        pd.testing.assert_frame_equal(genes, found[i % 2][1], check_exact=True)
        pd.testing.assert_frame_equal(epochs, found[i % 2][2], check_exact=True)


def test_a_budget_that_is_none_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AGL_BENCH_MEMORY", "plenty")
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--selectors", "pgl", *words, "--work", str(tmp_path)])
    assert "AGL_BENCH_MEMORY = 'plenty' is not an amount of memory" in capsys.readouterr().err


CURIOUS = """
    from agl_bench import Selector, hookimpl

    class Curious(Selector):
        '''Keeps what it was shown.'''
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            self.view = view

        def forward(self, losses, step):
            assert int(step.row.max()) < self.view.spot_count
            return losses.mean()

    @hookimpl
    def register_selectors():
        return {"curious": Curious}
"""


def test_a_view_shows_tissue_counts_and_scores_of_the_training_spots(grid, tmp_path):
    plugin = tmp_path / "curious.py"
    plugin.write_text(textwrap.dedent(CURIOUS))
    cells, bench = grid("curious", files=[plugin])
    setting = bench.setting(*cells[0])
    view = bench.trainer(*cells[0], setting).selector.view
    count = len(setting.rows.train)
    assert view.spot_count == count == len(view.position) == len(view.section) == len(view.counts)
    assert torch.equal(view.position, setting.development.position[:count])
    assert torch.equal(view.counts > 0, view.expression > 0) and torch.equal(view.counts, view.counts.round())
    assert torch.allclose(view.score_genes("mean"), view.expression.double().mean(0), atol=1e-6)
    view.score_genes("mean").zero_()
    assert view.score_genes("mean").any()  # others are not harmed
    with pytest.raises(UnknownName, match="Did you mean 'moran'"):
        view.score_genes("morans")
    assert list(bench.train(*cells[0]))
