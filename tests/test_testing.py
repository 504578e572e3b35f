"""The rules of the doors accept what comes with agl-bench, and name the rule that a plug-in breaks."""

import pytest
import torch
from torch import nn

from agl_bench import ArrayPatches, Backbone, Selector
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import check_backbone, check_dataset, check_selector
from agl_bench_plugins.backbones.densenet import DenseNet121
from agl_bench_plugins.backbones.embedding import Embedding
from agl_bench_plugins.backbones.position import Position
from agl_bench_plugins.backbones.resnet import ResNet18, ResNet50
from agl_bench_plugins.backbones.stain_statistics import StainStatistics
from agl_bench_plugins.backbones.timm import Timm
from agl_bench_plugins.backbones.tiny import Tiny
from agl_bench_plugins.backbones.vit_small import VitSmall
from agl_bench_plugins.datasets.synthetic import Synthetic
from agl_bench_plugins.selectors.pgl import Pgl

PLUGINS = Plugins.discover(strict=True)


def broken(verdicts):
    return {v.rule: v.problem for v in verdicts if v.problem is not None}


@pytest.mark.parametrize("name", PLUGINS.names("selector"))
def test_selectors(name):
    verdicts = check_selector(PLUGINS.entry(name).load(), {})
    assert len(verdicts) >= 12
    assert broken(verdicts) == {}


@pytest.mark.parametrize("name", ["agl", "random_k", "dkgsb"])
def test_nothing_global_changes(name):
    before = torch.get_rng_state()
    check_selector(PLUGINS.entry(name).load(), {})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Tiny, {}),
        (Embedding, {}),
        (Position, {}),
        (Timm, {"model": "resnet10t", "weights": "none", "patch_px": 64}),
        (ResNet18, {"weights": "none", "patch_px": 64}),
        (ResNet50, {"weights": "none", "patch_px": 32}),
        (DenseNet121, {"weights": "none", "patch_px": 32}),
        (VitSmall, {"weights": "none", "patch_px": 32}),
        (VitSmall, {"weights": "none", "patch_px": 32, "frozen": True}),
        (StainStatistics, {}),
    ],
)
def test_backbones(cls, settings):
    assert broken(check_backbone(cls, settings)) == {}


def test_synthetic(tmp_path):
    dataset = Synthetic(sections=2, spots=30, patch_px=16, helpful_genes=10, harmful_genes=20, useless_genes=20)
    assert broken(check_dataset(dataset, tmp_path)) == {}


# --- selectors that break a rule -------------------------------------------------------------------------------------


class Counting(Pgl):
    """Keeps count in its state."""

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, losses, step):
        self.calls += 1
        return super().forward(losses, step)


class InPlace(Pgl):
    """Changes the losses."""

    def forward(self, losses, step):
        losses.detach().mul_(0.5)
        return super().forward(losses, step)


class GlobalTorch(Pgl):
    """Draws its weights from the global generator."""

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("weights", torch.rand(len(view.genes.names)))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


class GlobalNumpy(Pgl):
    """Draws its weights from numpy's global generator."""

    def __init__(self, view):
        super().__init__(view)
        import numpy as np

        self.register_buffer("weights", torch.from_numpy(np.random.rand(len(view.genes.names))).float())  # noqa: NPY002

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


class NoScalar(Pgl):
    """Returns a vector."""

    def forward(self, losses, step):
        return losses[self.is_primary]


class Number(Pgl):
    """Returns a number."""

    def forward(self, losses, step):
        return float(losses[self.is_primary].mean())


class OffTheGraph(Pgl):
    """Returns a detached tensor."""

    def forward(self, losses, step):
        return losses[self.is_primary].mean().detach()


class Infinite(Pgl):
    """Divides by nothing."""

    def forward(self, losses, step):
        return losses[self.is_primary].mean() / 0


class Negative(Pgl):
    """Makes one primary gene worse."""

    def forward(self, losses, step):
        primary = losses[self.is_primary]
        return primary[1:].mean() - primary[0]


class Forgetful(Pgl):
    """Leaves one primary gene out."""

    def forward(self, losses, step):
        return losses[self.is_primary][1:].mean()


class ByColumn(Pgl):
    """Weights genes by their column."""

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.linspace(0, 1, len(losses), dtype=losses.dtype))


class PlainTensor(Pgl):
    """Keeps a tensor as a plain attribute."""

    def __init__(self, view):
        super().__init__(view)
        self.weights = torch.full((len(view.genes.names),), 0.5)

    def forward(self, losses, step):
        return (torch.where(self.is_primary, 1.0, self.weights) * losses).sum().to(self.weights.dtype)


class Hidden(Pgl):
    """Keeps a drawn tensor outside its state."""

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.rand(view.genes.auxiliary_count + 1, generator=view.generator)
        self.register_buffer("drawn", drawn[view.genes.rank], persistent=False)

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.drawn)


class Mutating(Pgl):
    """Normalises the expression of everybody."""

    def __init__(self, view):
        super().__init__(view)
        view.expression.sub_(view.expression.mean(0))


class Idle(Pgl):
    """Has a parameter that it does not use."""

    def __init__(self, view):
        super().__init__(view)
        self.unused = nn.Parameter(torch.zeros(()))


class Crashing(Pgl):
    """Needs two auxiliary genes."""

    def forward(self, losses, step):
        return losses[self.is_primary].mean() + 0 * losses[~self.is_primary][1]


class NoSource(Selector):
    """Does not say where it is from."""

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


class Untyped(Pgl):
    """Has a setting without an annotation."""

    def __init__(self, view, *, k=3):
        super().__init__(view)


@pytest.mark.parametrize(
    ("cls", "rule", "problem"),
    [
        (Counting, "changes neither state nor inputs", "calls"),
        (InPlace, "changes neither state nor inputs", "then"),
        (GlobalTorch, "`view.generator` alone", "torch's global generator"),
        (GlobalNumpy, "`view.generator` alone", "numpy's global generator"),
        (NoScalar, "returns a finite scalar", "got Tensor"),
        (Number, "returns a finite scalar", "got float"),
        (OffTheGraph, "returns a finite scalar", "not on the graph"),
        (Infinite, "returns a finite scalar", "inf"),
        (Negative, "positive on every primary gene", "-1"),
        (Forgetful, "positive on every primary gene", "is 0"),
        (ByColumn, "Permuting the genes", "slopes do not follow"),
        (PlainTensor, "Every tensor moves", "not a buffer"),
        (Hidden, "`state_dict` holds everything", "acts differently"),
        (Mutating, "does not change the training expression", "view.expression was changed"),
        (Idle, "Every learnt parameter gets a finite gradient", "unused"),
        (Crashing, "0 and 1 auxiliary genes", "IndexError"),
        (NoSource, "`reference` names the publication", "reference is empty"),
        (Untyped, "keyword-only argument with an annotation", "'k' needs a type annotation"),
    ],
)
def test_broken_selectors(cls, rule, problem):
    found = broken(check_selector(cls, {}))
    named = [text for name, text in found.items() if rule in name]
    assert named, f"the rule was not named: {found}"
    assert problem in named[0]


class Mixing(Tiny):
    """Looks at the whole batch."""

    def forward(self, spots):
        features = super().forward(spots)
        return features - features.mean(0)


class Lying(Tiny):
    """Says a wrong width."""

    def __init__(self, example):
        super().__init__(example)
        self.width += 1


class Rounded(Backbone):
    """Is not differentiable twice."""

    width = 3

    def __init__(self, example):
        super().__init__(example)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, spots):
        return spots.patches.mean((2, 3)).round() * (self.scale.detach() + 0 * self.scale.sign())


@pytest.mark.parametrize(
    ("cls", "rule"),
    [(Mixing, "do not depend on the other spots"), (Lying, "`forward` returns (spots, width)"), (Rounded, "second")],
)
def test_broken_backbones(cls, rule):
    assert any(rule in name for name in broken(check_backbone(cls, {})))


class Renaming(Synthetic):
    """Reads another section than it was asked for."""

    def read(self, root, name):
        return super().read(root, "S1")


class Fickle(Synthetic):
    """Reads other counts each time."""

    calls = 0

    def read(self, root, name):
        section = super().read(root, name)
        Fickle.calls += 1
        section.counts.X[0, 0] += Fickle.calls
        return section


class Blurred(Synthetic):
    """Has counts that are no counts."""

    def read(self, root, name):
        section = super().read(root, name)
        if name == "S2":
            section.counts.X = section.counts.X * 0.5
        return section


class Borrowed(Synthetic):
    """Lists a file that is not there."""

    def files(self, root, name):
        return [root / "absent.h5ad"]


class Patchless(Synthetic):
    """Has pictures of another number of spots."""

    def read(self, root, name):
        section = super().read(root, name)
        section.patches = ArrayPatches(section.patches.read(range(3), 16, 112.0).transpose(0, 2, 3, 1), 112.0)
        return section


@pytest.mark.parametrize(
    ("cls", "rule", "problem"),
    [
        (Renaming, "`read` returns the section", "S2"),
        (Fickle, "Read twice", "counts of S1 differ"),
        (Blurred, "pass the checks of every run", "section 'S2'"),
        (Borrowed, "Every file of `files` exists", "absent.h5ad"),
        (Patchless, "patches", ""),
    ],
)
def test_broken_datasets(cls, rule, problem, tmp_path):
    dataset = cls(sections=2, spots=20, patch_px=16, helpful_genes=5, harmful_genes=5, useless_genes=5)
    found = broken(check_dataset(dataset, tmp_path))
    named = [text for name, text in found.items() if rule in name]
    assert named, f"the rule was not named: {found}"
    assert problem in named[0]
