"""The leak audit: nothing leaks that the protocol does not declare, and what leaks on purpose is caught."""

import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from agl_bench.bench import audit as module
from agl_bench.bench.audit import (
    CHOICE,
    FILTER,
    FINAL,
    FOLDS,
    MODEL,
    PRIMARY,
    RANKS,
    REACH,
    SCORES,
    SEEN,
    SELECTOR,
    TRAINING,
    TRAINING_EXPRESSION,
    _dealt_anew,
    audit,
    short,
)
from agl_bench.cli import main
from agl_bench.protocol import Protocol, load_preset
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.synthetic import Synthetic

SELECTORS = Plugins.discover(strict=True).names("selector")
BOTH = {"test": "same", "validation": "same"}
PEEKING = """
    import gc
    import torch
    from agl_bench import Selector, hookimpl
    from agl_bench_plugins.datasets.synthetic import Synthetic

    READ = []

    class Leaky(Synthetic):
        '''Keeps what it has read for whoever asks.'''

        def read(self, root, name):
            READ.append(super().read(root, name))
            return READ[-1]

    class Plain(Selector):
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            self.peek(view)

        def peek(self, view):
            pass

        def forward(self, losses, step):
            return losses[self.is_primary].mean()

    class Reading(Plain):
        '''Looks at all spots through the dataset and builds on it.'''

        def peek(self, view):
            self.register_buffer("known", torch.tensor(sum(float(s.counts.X.sum()) for s in READ)))

    class Late(Plain):
        '''Looks only while it is trained.'''

        def forward(self, losses, step):
            return super().forward(losses, step) * (1 + sum(float(s.counts.X.max()) for s in READ) / 1e3)

    class Holding(Plain):
        '''Finds the test spots in the process and keeps them.'''

        def peek(self, view):
            self.kept = [o for o in gc.get_objects() if type(o).__name__ == "SpotStore"]

    class Failing(Plain):
        '''Cannot be built.'''

        def peek(self, view):
            raise ValueError("on purpose")

    @hookimpl
    def register_selectors():
        return {"reading": Reading, "late": Late, "holding": Holding, "failing": Failing}

    @hookimpl
    def register_datasets():
        return {"leaky": Leaky}
"""


@pytest.fixture
def peeking(tmp_path):
    path = tmp_path / "peeking.py"
    path.write_text(textwrap.dedent(PEEKING))
    return path


@pytest.fixture
def verdicts(grid):
    """Audit one fold of small sections; selector -> stage -> verdict."""

    def verdicts(*selectors, epochs=3, more=(), **options):
        options = {"fold": ["S1.0"], "evaluation": ["intra"]} | options
        cells, bench = grid(*selectors, more=more, **options)
        cells = [(replace(s, protocol=short(s.protocol, epochs)), plan) for s, plan in cells]
        found = {}
        for finding in audit(cells, bench.plugins, Path(os.devnull), bench.device):
            found.setdefault(finding.selector, {})[finding.stage] = finding
        return found

    return verdicts


def clean(stages):
    """Those of a leak-free selector."""
    meant = {CHOICE: "validation", SCORES: "test"}
    for stage, finding in stages.items():
        for spots, verdict in finding.verdict.items():
            if meant.get(stage) == spots:
                assert verdict == "meant", (stage, spots)
            elif spots == "validation" and stage in (FINAL, SCORES):
                assert verdict in ("same", "meant"), (stage, spots)
            else:
                assert verdict == "same", (stage, spots)
        assert not finding.is_bad and finding.reasons == ()


@pytest.mark.parametrize(("evaluation", "fold"), [("intra", "S1.0"), ("inter", "D1")])
def test_nothing_leaks_in_clean(verdicts, evaluation, fold):
    found = verdicts(*SELECTORS, preset="clean", evaluation=[evaluation], fold=[fold], more=["protocol.folds=2"])
    assert list(found) == ["", *SELECTORS]
    assert list(found[""]) == [FOLDS, FILTER, PRIMARY, RANKS, SEEN, TRAINING_EXPRESSION]
    for selector, stages in found.items():
        assert selector == "" or set(stages) == {MODEL, SELECTOR, REACH, TRAINING, CHOICE, FINAL, SCORES}
        clean(stages)


@pytest.mark.parametrize(("evaluation", "fold", "spots"), [("intra", "S1.0", 40), ("inter", "S1", 80)])
def test_paper_leaks_what_it_declares(verdicts, evaluation, fold, spots):
    more = ["protocol.folds=2", f"protocol.min_spots_per_gene={spots * 3 // 4}"]  # some genes pass by a hair
    found = verdicts(*SELECTORS, preset="paper", evaluation=[evaluation], fold=[fold], more=more)
    shared = found.pop("")
    for stage in (FILTER, PRIMARY, RANKS):
        assert shared[stage].verdict == {"test": "declared", "validation": "declared"}
        assert "genes_from = all" in shared[stage].reasons[0]
    for stage in (FOLDS, SEEN, TRAINING_EXPRESSION):
        assert shared[stage].verdict == BOTH
    learning = {name for name, stages in found.items() if stages[TRAINING].verdict["validation"] == "declared"}
    assert {"dkgsb", "amal"} <= learning and not {"pgl", "agl", "hvg_k", "random_k"} & learning
    for name, stages in found.items():
        if name in learning:
            assert "held_out_share = 0" in stages[TRAINING].reasons[0]
            assert stages.pop(TRAINING).verdict["test"] == "same"
        clean(stages)


def test_training_on_held_out_spots_is_what_hides_validation(verdicts):
    """In `clean` the same selector learns from spots apart; with none held out it is declared."""
    assert verdicts("dkgsb", more=["protocol.held_out_share=0.2"])["dkgsb"][TRAINING].verdict == BOTH
    found = verdicts("dkgsb", more=["protocol.held_out_share=0"])["dkgsb"][TRAINING]
    assert found.verdict == {"test": "same", "validation": "declared"}


def leaky(peeking, **more):
    settings = (
        "sections=2",
        "spots=40",
        "markers=6",
        "helpful_genes=24",
        "harmful_genes=20",
        "useless_genes=30",
        "patch_px=16",
    )
    return {"files": [peeking], "datasets": ["leaky"], "more": [f"leaky.{s}" for s in settings], **more}


def test_a_selector_that_looks_at_all_spots_is_caught(verdicts, peeking):
    found = verdicts("reading,pgl", **leaky(peeking))
    clean(found["pgl"])
    clean(found[""])
    assert found["reading"][SELECTOR].verdict == {"test": "LEAK", "validation": "LEAK"}
    assert found["reading"][SELECTOR].is_bad and found["reading"][MODEL].verdict == BOTH


def test_a_selector_that_looks_late_is_caught(verdicts, peeking):
    found = verdicts("late", **leaky(peeking))["late"]
    assert found[SELECTOR].verdict == BOTH
    assert found[TRAINING].verdict == {"test": "LEAK", "validation": "LEAK"}


def test_a_selector_that_holds_the_test_spots_is_caught(verdicts, peeking):
    found = verdicts("holding", **leaky(peeking), evaluation=["intra"], fold=["S1.0"])["holding"]
    assert found[REACH].verdict == {"test": "LEAK", "validation": "same"}
    assert found[REACH].reasons == ("the trainer of holding can reach a SpotStore with the test spots",)


def test_a_dataset_whose_patches_show_expression_is_caught(verdicts, monkeypatch):
    read = Synthetic.read

    class Painted:
        """The first pixel of a patch is the count of the first gene."""

        def __init__(self, section):
            self.section, self.source = section, section.patches

        def read(self, rows, side_px, side_um):
            patches = self.source.read(rows, side_px, side_um).copy()
            patches[:, 0, 0, 0] = sparse.csr_matrix(self.section.counts.X)[rows].sum(1).ravel() % 256
            return patches

        def outside(self, positions):
            return self.source.outside(positions)

    def painted(self, root, name):
        section = read(self, root, name)
        section.patches = Painted(section)
        return section

    monkeypatch.setattr(Synthetic, "read", painted)
    assert verdicts("pgl")[""][SEEN].verdict == {"test": "LEAK", "validation": "LEAK"}


def test_genes_of_all_spots_are_a_leak_unless_declared(verdicts, monkeypatch):
    more = ["protocol.genes_from=all"]
    assert verdicts("pgl", more=more)[""][RANKS].verdict == {"test": "declared", "validation": "declared"}
    monkeypatch.setattr(module, "DECLARED", ())
    found = verdicts("pgl", more=more)[""][RANKS]
    assert found.verdict == {"test": "LEAK", "validation": "LEAK"} and found.is_bad


def test_an_audit_that_changes_nothing_is_blind(verdicts, monkeypatch):
    monkeypatch.setattr(module, "_garbage", lambda *_: {})
    found = verdicts("pgl")["pgl"]
    assert found[SCORES].verdict["test"] == "BLIND" and found[CHOICE].verdict["validation"] == "BLIND"
    assert found[SCORES].is_bad and found[CHOICE].is_bad


def test_sections_are_put_back(grid):
    cells, bench = grid("pgl", evaluation=["intra"], fold=["S1.0"])
    sections = Synthetic(sections=2, spots=40, patch_px=16).load(Path())
    before = [s.counts.X for s in sections]
    variant = module._Variant(bench, sections, {"S1": before[0] * 2})
    with pytest.raises(RuntimeError), variant._in_place():
        assert sections[0].counts.X.sum() == 2 * before[0].sum() and sections[1].counts.X.sum() == before[1].sum()
        raise RuntimeError
    for section, counts in zip(sections, before, strict=True):
        assert (counts != section.counts.X).nnz == 0
    assert len(cells) == 1


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_garbage_keeps_what_filters_look_at(kind):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (30, 40)).astype(np.float32)
    rows, columns = np.array([3, 20, 7]), rng.permutation(40)[:25]
    changed = _dealt_anew(kind(counts), rows, columns, np.random.default_rng(1))
    assert type(changed) is type(kind(counts))
    dense = changed if isinstance(changed, np.ndarray) else changed.toarray()
    assert dense.dtype == np.float32
    other = np.ones((30, 40), dtype=bool)
    other[np.ix_(rows, columns)] = False
    assert (dense[other] == counts[other]).all()
    before, after = counts[np.ix_(rows, columns)], dense[np.ix_(rows, columns)]
    assert ((before > 0).sum(1) == (after > 0).sum(1)).all()
    assert (before != after).any(1).all() and (after == after.round()).all()
    for b, a in zip(before, after, strict=True):
        factor = a.sum() / b.sum()
        assert factor in range(1, module.MOST + 1)
        assert sorted(b[b > 0] * factor) == sorted(a[a > 0])


def test_short_protocols_have_outer_steps():
    for preset in ("clean", "paper"):
        protocol = short(Protocol.of(load_preset(preset).protocol | {"outer_start": 50, "patience": 1}), 2)
        assert (protocol.epochs, protocol.outer_start) == (2, 1) and protocol.patience >= 2


def said(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    out = capsys.readouterr()
    return caught.value.code or 0, out.out, out.err


def test_command(tmp_path, small, peeking, capsys):
    settings = [w for s in small for w in ("--set", s)]
    grid = ["audit", "--datasets", "synthetic", "--preset", "smoke", "--device", "cpu", *settings]
    path = tmp_path / "audit.json"
    status, out, err = said([*grid, "--selectors", "pgl,dkgsb", "--json", str(path)], capsys)
    assert (status, err) == (0, "")
    assert "synthetic · intra-batch · fold S1.0" in out and "synthetic · inter-batch · fold D1" in out
    assert "fold S1.1" not in out and "LEAK" not in out
    assert out.strip().endswith("Nothing leaks that the protocol does not declare.")
    content = json.loads(path.read_text())
    assert content["leaks"] == 0 and content["protocol"]["epochs"] == 3
    assert len(content["findings"]) == 2 * (6 + 2 * 7)

    words = leaky(peeking)["more"]
    words = [*grid, "--datasets", "leaky", "--plugin", str(peeking), *(w for s in words for w in ("--set", s))]
    status, out, _ = said([*words, "--selectors", "reading", "--fold", "S1.1"], capsys)
    assert status == 1
    assert "CHANGED: LEAK" in out and "leaky, intra-batch, fold S1.1: reading: selector before training" in out
    status, out, err = said([*words, "--selectors", "failing", "--fold", "S1.1"], capsys)
    assert status == 2 and err.strip() == "agl-bench: selector 'failing': ValueError: on purpose"
    assert said([*grid, "--selectors", "pgl", "--epochs", "1"], capsys)[0] == 2
    status, out, err = said([*grid, "--selectors", "pgk"], capsys)
    assert status == 2 and "Did you mean 'pgl'?" in err
