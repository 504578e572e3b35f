"""Selections against the truth of planted data, and that the truth reaches nobody who must not know it."""

import textwrap

import pytest
import torch

from agl_bench.bench.planted import best_cutoff, selection_scores, utilities
from agl_bench.bench.run import Finished
from agl_bench.bench.table import as_json, summarise
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.testing import toy_genes

SPY = """
    import torch
    from agl_bench import Selector, hookimpl

    SEEN = {}

    class Plain(Selector):
        '''Notes what it is told of the truth.'''
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            SEEN[type(self).__name__] = view.truth

        def forward(self, losses, step):
            return losses[self.is_primary].mean()

    class Control(Plain):
        '''The same, as a control.'''
        is_control = True

    @hookimpl
    def register_selectors():
        return {"plain": Plain, "control": Control}
"""


def genes_of(utility):
    """Auxiliary genes with these utilities in the order of their ranks, a primary gene before them."""
    count = len(utility)
    names = tuple(f"G{i}" for i in range(count + 1))
    rank = torch.arange(-1, count)
    return GeneSplit(names, rank < 0, rank, -rank.double()), torch.tensor([0.0, *utility], dtype=torch.float64)


@pytest.mark.parametrize(
    ("utility", "k"),
    [
        ((1, 1, -1, -0.25), 2),
        ((-1, -1, 1), 0),
        ((-0.25, 1, 1, -1, 1, -1), 3),
        ((-0.25, -0.25, -0.25, -0.25, 1), 0),  # the shortest of equals
        ((1,) + (-0.1,) * 10, 1),
        ((1, 1, 1), 3),
        ((), 0),
    ],
)
def test_best_cutoff(utility, k):
    assert best_cutoff(*genes_of(utility)) == k


def test_best_cutoff_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        genes = toy_genes(3, 30)
        utility = torch.tensor([1.0, -1.0, -0.25], dtype=torch.float64)[torch.randint(3, (33,), generator=generator)]
        utility = utility * ~genes.primary
        totals = [float(utility[(genes.rank >= 0) & (genes.rank < k)].sum()) for k in range(31)]
        assert best_cutoff(genes, utility) == totals.index(max(totals))


def test_utilities_are_aligned_by_name():
    genes, _ = genes_of((0, 0, 0))
    found = utilities({"G3": -1.0, "G0": 1.0, "G1": 0.5, "other": 9.0}, genes)
    assert found.tolist() == [0.0, 0.5, 0.0, -1.0]  # G0 is primary, nobody knows G2


def test_selection_scores():
    genes, utility = genes_of((1, 1, 1, -1, -0.25, -1))
    weights = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.6, 0.0, 0.51])  # a gene of weight one half is not selected
    assert selection_scores(genes, utility, weights) == {
        "selection_precision": 2 / 4,
        "selection_recall": 2 / 3,
        "selection_k_minus_planted": 1.0,
    }
    nothing = selection_scores(genes, utility, torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))
    assert nothing == {"selection_recall": 0.0, "selection_k_minus_planted": -3.0}
    no_helper = selection_scores(*genes_of((-1, -1)), torch.tensor([1.0, 1.0, 0.0]))
    assert no_helper == {"selection_precision": 0.0, "selection_k_minus_planted": 1.0}


def test_the_truth_reaches_controls_alone(tmp_path, grid):
    (tmp_path / "spy.py").write_text(textwrap.dedent(SPY))
    cells, bench = grid("plain", "control", files=[tmp_path / "spy.py"])
    for spec, plan in cells[:2]:
        setting = bench.setting(spec, plan)
        bench.build(spec, setting)
    seen = bench.plugins.entry("plain").load().__init__.__globals__["SEEN"]
    assert set(seen) == {"Plain", "Control"} and seen["Plain"] is None
    truth = seen["Control"]
    assert torch.equal(truth, bench.truth(spec.dataset, setting.genes))
    assert truth.shape == (len(setting.genes.names),) and (truth[setting.genes.primary] == 0).all()
    assert set(truth[~setting.genes.primary].tolist()) == {1.0, -1.0, -0.25}


def test_results_on_planted_data_say_how_the_selection_was(tmp_path, run):
    done = [e.result for e in run(tmp_path, "pgl", "agl", "oracle") if isinstance(e, Finished)]
    by = {name: [r for r in done if r.spec.selector.name == name] for name in ("pgl", "agl", "oracle")}
    for pgl, agl, oracle in zip(*by.values(), strict=True):
        assert oracle.scores["selection_precision"] == oracle.scores["selection_recall"] == 1
        assert "selection_precision" not in pgl.scores and pgl.scores["selection_recall"] == 0
        assert agl.scores["selection_recall"] == 1 and 0 < agl.scores["selection_precision"] < 1
        k = {r.spec.selector.name: int(r.epochs["selected"].iloc[r.best_epoch]) for r in (pgl, agl, oracle)}
        planted = {k[r.spec.selector.name] - r.scores["selection_k_minus_planted"] for r in (pgl, agl, oracle)}
        assert len(planted) == 1 and k["pgl"] == 0 and k["agl"] == agl.counts["auxiliary_genes"]
    pgl, agl, oracle = summarise(done)
    assert oracle.regret == [0.0, 0.0]
    assert pgl.regret == pytest.approx([o - p for o, p in zip(oracle.pcc, pgl.pcc, strict=True)])
    line = as_json(done)["lines"][1]
    assert line["selection_precision_mean"] == pytest.approx(agl.against_truth["selection_precision"])
    assert line["regret_mean"] == pytest.approx(sum(agl.regret) / 2) and line["bound"] == "oracle"


def test_other_data_say_nothing_of_a_truth(make_result):
    (line,) = as_json([make_result()])["lines"]
    assert not [name for name in line if "selection" in name or "regret" in name]
