"""The rules accept what comes with agl-bench; `broken`, skips and flags; the same rules as classes of pytest."""

import random
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from agl_bench import Implicit, Selector
from agl_bench.errors import BadPlugin, UnknownName
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import (
    BackboneContract,
    DatasetContract,
    SelectorContract,
    check_backbone,
    check_dataset,
    check_selector,
)
from agl_bench_plugins.backbones.densenet import DenseNet121
from agl_bench_plugins.backbones.embedding import Embedding
from agl_bench_plugins.backbones.position import Position
from agl_bench_plugins.backbones.resnet import ResNet18, ResNet50
from agl_bench_plugins.backbones.stain_statistics import StainStatistics
from agl_bench_plugins.backbones.timm import Timm
from agl_bench_plugins.backbones.tiny import Tiny
from agl_bench_plugins.backbones.vit_small import VitSmall
from agl_bench_plugins.datasets.synthetic import Synthetic

PLUGINS = Plugins.discover(strict=True)
SMALL = {"sections": 2, "spots": 30, "patch_px": 16, "helpful_genes": 10, "harmful_genes": 20, "useless_genes": 20}


def broken(verdicts):
    return {v.name: v.problem for v in verdicts if v.problem is not None}


@pytest.mark.parametrize("name", PLUGINS.names("selector"))
def test_selectors(name):
    verdicts = check_selector(PLUGINS.entry(name).load(), {})
    assert len(verdicts) == len(SelectorContract.rules())
    assert broken(verdicts) == {}
    assert {v.name for v in verdicts if v.outcome == "kept"} >= {"sees_training_spots_only", "works_at_20000_genes"}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Tiny, {}),
        (Embedding, {}),
        (Position, {}),
        (Timm, {"model": "resnet10t", "weights": "none", "patch_px": 64}),
        (Timm, {"model": "resnet10t", "weights": "none", "patch_px": 64, "frozen": True}),
        (ResNet18, {"weights": "none", "patch_px": 64}),
        (ResNet50, {"weights": "none", "patch_px": 32}),
        (DenseNet121, {"weights": "none", "patch_px": 64}),
        (VitSmall, {"weights": "none", "patch_px": 32}),
        (VitSmall, {"weights": "none", "patch_px": 32, "frozen": True}),
        (StainStatistics, {}),
    ],
)
def test_backbones(cls, settings):
    assert broken(check_backbone(cls, settings)) == {}


def test_synthetic(tmp_path):
    assert broken(check_dataset(Synthetic(**SMALL), tmp_path)) == {}


@pytest.mark.parametrize("name", ["agl", "random_k", "dkgsb"])
def test_nothing_global_changes(name):
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
    check_selector(PLUGINS.entry(name).load(), {})
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


class ByColumn(Selector):
    """Weighs genes by their column."""

    reference = "a test"

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.linspace(0, 1, len(losses), dtype=losses.dtype))


class Declared(ByColumn):
    """Says that the order of genes matters."""

    broken = {"test_gene_order_does_not_matter": "genes are weighed by column on purpose"}  # noqa: RUF012


def test_what_is_known_to_be_broken():
    (verdict,) = check_selector(Declared, {}, ["gene_order_does_not_matter"])
    assert verdict.outcome == "known"
    assert verdict.problem is None
    assert verdict.reason.startswith("genes are weighed by column on purpose (slopes do not follow the genes")


def test_what_is_declared_broken_and_is_kept():
    declared = {"test_forward_is_pure": "it counts calls"}
    verdict = SelectorContract.of(ByColumn, broken=declared).check("forward_is_pure")
    assert verdict.outcome == "broken"
    assert verdict.reason == "it is declared as broken (it counts calls) and yet kept: take it out of `broken`"


def test_declarations_are_checked():
    with pytest.raises(BadPlugin, match=r"unknown rule 'test_forward_is_pur'\. Did you mean 'test_forward_is_pure'"):
        SelectorContract.of(ByColumn, broken={"test_forward_is_pur": "why"})
    with pytest.raises(BadPlugin, match="gives no reason for test_forward_is_pure"):
        SelectorContract.of(ByColumn, broken={"test_forward_is_pure": ""})
    with pytest.raises(UnknownName, match="Did you mean 'forward_is_pure'"):
        check_selector(ByColumn, {}, ["forward_pure"])


def test_rules_that_hang_on_a_broken_one_are_not_looked_at():
    class Crashing(ByColumn):
        def forward(self, losses, step):
            raise RuntimeError("on purpose")

    verdicts = {v.name: v for v in check_selector(Crashing, {})}
    assert broken(verdicts.values()) == {
        "returns_a_finite_scalar_on_the_graph": "RuntimeError: on purpose",
        "says_where_it_is_from": "the class has no docstring; its first line is shown by agl-bench list",
    }
    assert verdicts["goes_on_after_a_kill"].outcome == "skipped"
    assert "returns_a_finite_scalar_on_the_graph" in verdicts["goes_on_after_a_kill"].reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_needs_a_gpu_is_skipped_with_the_reason():
    class OnGpu(ByColumn):
        """Needs a GPU."""

        needs_gpu = True

    class TinyOnGpu(Tiny):
        """Needs a GPU."""

        needs_gpu = True

    for verdicts in (check_selector(OnGpu, {}), check_backbone(TinyOnGpu, {})):
        assert broken(verdicts) == {}
        skipped = [v for v in verdicts if v.outcome == "skipped"]
        assert len(skipped) > 15
        assert {v.reason for v in skipped if "GPU" in v.reason} == {"it needs a GPU, and there is none here"}


def test_what_copes_with_few_genes_only():
    class Few(ByColumn):
        """For targeted panels."""

        max_genes = 500

    verdicts = check_selector(Few, {}, ["no_loop_over_genes", "works_at_20000_genes"])
    assert [v.outcome for v in verdicts] == ["skipped", "skipped"]
    assert verdicts[0].reason == "it copes with 500 genes at most (`max_genes`)"


class Learnt(Selector):
    """One weight for each gene, implicitly."""

    reference, hypergradient = "a test", Implicit(terms=20, scale=0.1)

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def weights(self):
        return torch.sigmoid(self.logits)

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights())


class HalfDetached(Learnt):
    """Half of the way from its parameter to its result is cut."""

    def weights(self):
        return torch.sigmoid(self.logits) + torch.tanh(self.logits.detach())


class Diverging(Learnt):
    """Its Neumann series diverges and points away."""

    hypergradient = Implicit(terms=3, scale=3.0)


@pytest.mark.parametrize(
    ("cls", "problem"),
    [(Learnt, None), (HalfDetached, "Implicit's gradient, with terms enough"), (Diverging, "points away")],
)
def test_implicit_gradients(cls, problem):
    (verdict,) = check_selector(cls, {}, ["hypergradient_is_exact"])
    assert (verdict.problem is None) if problem is None else (problem in verdict.problem)


@pytest.mark.parametrize("name", SelectorContract.rules())
def test_rules_one_parameter_each(name):
    """As the documentation shows it."""
    assert SelectorContract.of(Declared).check(name).problem is None


# --- as classes of pytest --------------------------------------------------------------------------------------------

CLASSES = """
    import torch
    from agl_bench import Selector
    from agl_bench.testing import SelectorContract

    class ByColumn(Selector):
        "Weighs genes by their column."
        reference = "a test"
        def forward(self, losses, step):
            return self.weighted_mean(losses, torch.linspace(0, 1, len(losses), dtype=losses.dtype))

    class TestUndeclared(SelectorContract):
        selector = ByColumn

    class TestDeclared(SelectorContract):
        selector = ByColumn
        broken = {"test_gene_order_does_not_matter": "on purpose"}

    class TestDeclaredForNothing(SelectorContract):
        selector = ByColumn
        broken = {"test_forward_is_pure": "it is not true"}
"""


def test_classes_of_pytest(pytester):
    pytester.makepyfile(textwrap.dedent(CLASSES))
    result = pytester.runpytest_subprocess(
        "-q", "-rA", "-p", "no:cacheprovider", "-k", "gene_order or forward_is_pure or unscored"
    )
    result.assert_outcomes(passed=5, failed=3, xfailed=1)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *TestUndeclared::test_gene_order_does_not_matter*",
            "XFAIL *TestDeclared::test_gene_order_does_not_matter*on purpose*",
            "FAILED *TestDeclaredForNothing::test_forward_is_pure*",
            "*XPASS(strict)*it is not true*",
        ]
    )


def test_pytest_is_no_dependency(tmp_path):
    import subprocess
    import sys

    code = "import sys, agl_bench.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


def test_the_three_doors_have_rules():
    assert [len(c.rules()) for c in (SelectorContract, BackboneContract, DatasetContract)] == [34, 24, 14]
