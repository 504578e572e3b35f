"""The rules of the three doors, as checks: for `agl-bench check`, and for a plug-in's own tests.

    from agl_bench.testing import SelectorContract
    from my_package import MySelector

    class TestMySelector(SelectorContract):
        selector = MySelector

Each rule is one method whose docstring is the rule; the command line and pytest run the same methods.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from agl_bench.data import check as sections_check
from agl_bench.errors import AglBenchError
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.interfaces.spots import Spots
from agl_bench.interfaces.tunable import tunables

__all__ = [
    "BackboneContract",
    "DatasetContract",
    "SelectorContract",
    "Verdict",
    "check_backbone",
    "check_dataset",
    "check_selector",
    "toy_genes",
    "toy_spots",
    "toy_truth",
    "toy_view",
]

SPOTS, PRIMARY, AUXILIARY, WIDTH = 24, 5, 40, 6


@dataclass(frozen=True)
class Verdict:
    """One rule and what is wrong with it, None = kept."""

    rule: str
    problem: str | None


def toy_genes(primary: int = PRIMARY, auxiliary: int = AUXILIARY) -> GeneSplit:
    """A gene axis with primary and auxiliary genes interleaved and a ranking that is not the column order."""
    count = primary + auxiliary
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    is_primary = torch.zeros(count, dtype=torch.bool)
    is_primary[order[:primary]] = True
    rank = torch.full((count,), -1)
    rank[order[primary:]] = torch.arange(auxiliary)
    score = torch.linspace(2, -2, max(count, 2), dtype=torch.float64)[:count]
    return GeneSplit(tuple(f"GENE{i:05d}" for i in range(count)), is_primary, rank, score[order.argsort()])


def toy_view(genes: GeneSplit | None = None, seed: int = 0, *, planted: bool = False) -> TrainingView:
    """A view over random training expression; `planted`: of data whose truth is known, as controls are shown it."""
    genes = genes or toy_genes()
    expression = torch.rand(SPOTS, len(genes.names), generator=torch.Generator().manual_seed(2))
    return TrainingView(
        genes, expression, torch.Generator().manual_seed(seed), truth=toy_truth(genes) if planted else None
    )


def toy_truth(genes: GeneSplit) -> Tensor:
    """What each gene is worth, (genes,): the first half of the ranking helps, the rest harms, primary genes 0."""
    return torch.where(genes.rank < genes.auxiliary_count / 2, 1.0, -1.0) * ~genes.primary


def toy_spots(count: int = SPOTS, *, patch_px: int = 32, embedding: int = 16) -> Spots:
    """Random spots with patches, positions and embeddings."""
    generator = torch.Generator().manual_seed(3)
    return Spots(
        patches=torch.rand(count, 3, patch_px, patch_px, generator=generator),
        position=1000 * torch.rand(count, 2, generator=generator),
        section=torch.zeros(count, dtype=torch.int64),
        embedding=torch.rand(count, embedding, generator=generator),
    )


def toy_step(genes: GeneSplit, seed: int = 4, *, order: Tensor | None = None) -> tuple[Tensor, Step]:
    """Losses (genes,) on the graph of a model of two layers, and the step that made them.

    Args:
        genes: the gene axis.
        seed: of spots, model and targets.
        order: (genes,) how to permute the genes; a gene keeps its numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(SPOTS, WIDTH, generator=generator)
    shared = torch.randn(WIDTH, WIDTH, generator=generator, requires_grad=True)
    head = torch.randn(len(genes.names), WIDTH, generator=generator)
    target = torch.rand(SPOTS, len(genes.names), generator=generator)
    if order is not None:
        head, target = head[order], target[:, order]
    head.requires_grad_()
    features = torch.tanh(spots @ shared)
    prediction = features @ head.T
    losses = (prediction - target).square().mean(0)
    row = torch.arange(SPOTS)
    return losses, Step(features, prediction, target, row, epoch=0, head=head, shared=(shared,), late=(shared,))


class SelectorContract:
    """Rules of the selector door. Set `selector` to the class, `settings` to what the constructor needs."""

    selector: ClassVar[type[Selector]]
    settings: ClassVar[Mapping[str, Any]] = {}

    def view(self, genes: GeneSplit | None = None, seed: int = 0) -> TrainingView:
        """A toy view, with the truth for a control."""
        return toy_view(genes, seed, planted=self.selector.is_control)

    def make(self, view: TrainingView | None = None) -> Selector:
        """An instance on the toy view."""
        return self.selector(view or self.view(), **self.settings)

    def test_settings_are_tunable(self) -> None:
        """Every setting is a keyword-only argument with an annotation and a default inside its range."""
        tunables(self.selector)

    def test_says_where_it_is_from(self) -> None:
        """`reference` names the publication or idea, and the class has a docstring."""
        assert self.selector.reference, "reference is empty"
        assert (self.selector.__doc__ or "").strip(), "the class has no docstring"

    def test_returns_a_finite_scalar_on_the_graph(self) -> None:
        """`forward` returns a finite scalar that depends on the losses."""
        selector = self.make()
        losses, step = toy_step(selector.genes)
        total = selector(losses, step)
        assert isinstance(total, Tensor) and total.shape == (), (
            f"got {type(total).__name__} {getattr(total, 'shape', '')}"
        )
        assert bool(total.isfinite()), f"got {total.item()}"
        assert total.requires_grad, "the result is not on the graph"

    def test_every_primary_gene_counts(self) -> None:
        """The slope of the result is positive on every primary gene, and finite everywhere."""
        selector = self.make()
        slope = _slope(selector)
        assert bool(slope.isfinite().all()), "a slope is not finite"
        lowest = float(slope[selector.genes.primary].min())
        assert lowest > 0, f"the lowest slope of a primary gene is {lowest:g}"

    def test_forward_is_pure(self) -> None:
        """`forward` changes neither state nor inputs, and gives the same result twice (it also runs in look-aheads)."""
        selector = self.make()
        losses, step = toy_step(selector.genes)
        before, given = copy.deepcopy(selector.state_dict()), losses.detach().clone()
        first, second = selector(losses, step), selector(losses, step)
        assert torch.equal(first, second), f"{first.item()} then {second.item()}"
        assert torch.equal(losses.detach(), given), "the losses were changed in place"
        changed = [n for n, t in selector.state_dict().items() if not torch.equal(t, before[n])]
        assert not changed, f"state changed: {', '.join(changed)}"

    def test_leaves_the_view_as_it_is(self) -> None:
        """Building a selector does not change the training expression."""
        view = self.view()
        before = view.expression.clone()
        self.make(view)
        assert torch.equal(view.expression, before), "view.expression was changed"

    def test_randomness_comes_from_the_view(self) -> None:
        """Random numbers come from `view.generator` alone: equal seeds give equal selectors."""
        state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002  (it is what is checked)
        first, second = self.make(self.view(seed=5)), self.make(self.view(seed=5))
        _slope(first)
        assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
        assert str(np.random.get_state()) == numpy_state, "numpy's global generator was used"  # noqa: NPY002
        assert torch.equal(_slope(first), _slope(second)), "equal seeds gave different selectors"

    def test_parameters_get_gradients(self) -> None:
        """Every learnt parameter gets a finite gradient from its declared source."""
        selector = self.make()
        own = {n: p for n, p in selector.named_parameters() if p.requires_grad}
        if not own:
            return
        if selector.learns_from == "training":
            losses, step = toy_step(selector.genes)
            found = torch.autograd.grad(selector(losses, step), list(own.values()), allow_unused=True)
            gradients = {
                n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(own.items(), found, strict=True)
            }
        else:
            gradients = _hypergradients(selector, own)
        for name, gradient in gradients.items():
            assert bool(gradient.isfinite().all()), f"the gradient of {name} is not finite"
            assert bool(gradient.abs().sum() > 0), f"{name} gets no gradient"

    def test_unused_genes_have_no_weight(self) -> None:
        """If `used` leaves genes out, it holds every primary gene, and the others have no slope."""
        selector = self.make()
        if selector.used is None:
            return
        used, genes = selector.used, selector.genes
        assert used.shape == (len(genes.names),) and used.dtype == torch.bool, f"got {used.dtype} {tuple(used.shape)}"
        assert bool(used[genes.primary].all()), "a primary gene is not used"
        assert bool((_slope(selector)[~used] == 0).all()), "a gene that is not used has a slope"

    def test_gene_order_does_not_matter(self) -> None:
        """Permuting the genes permutes the slopes and leaves the result."""
        genes = toy_genes()
        order = torch.randperm(len(genes.names), generator=torch.Generator().manual_seed(6))
        moved = GeneSplit(
            tuple(genes.names[i] for i in order), genes.primary[order], genes.rank[order], genes.score[order]
        )
        view = self.view(genes)
        truth = None if view.truth is None else view.truth[order]
        other = TrainingView(moved, view.expression[:, order], torch.Generator().manual_seed(0), truth=truth)
        a, b = _slope(self.make(view)), _slope(self.make(other), order)
        assert torch.allclose(a[order], b, atol=1e-6), "slopes do not follow the genes"

    def test_few_auxiliary_genes(self) -> None:
        """0 and 1 auxiliary genes work."""
        for auxiliary in (0, 1):
            slope = _slope(self.make(self.view(toy_genes(PRIMARY, auxiliary))))
            assert bool(slope.isfinite().all()), f"not finite with {auxiliary} auxiliary genes"

    def test_unscored_genes(self) -> None:
        """Genes without a score (NaN) and genes that do not vary work."""
        genes = toy_genes()
        score = genes.score.clone()
        score[genes.rank >= AUXILIARY - 3] = math.nan
        view = self.view(GeneSplit(genes.names, genes.primary, genes.rank, score, unscored=3))
        view.expression[:, genes.rank >= AUXILIARY - 3] = 0
        assert bool(_slope(self.make(view)).isfinite().all()), "a slope is not finite"

    def test_state_round_trip(self) -> None:
        """`state_dict` holds everything: a fresh instance with the state loaded acts the same."""
        selector = self.make(self.view(seed=7))
        with torch.no_grad():
            for parameter in selector.parameters():
                parameter.add_(0.01)
        other = self.make(self.view(seed=8))
        other.load_state_dict(selector.state_dict())
        assert torch.equal(_slope(selector), _slope(other)), "the loaded selector acts differently"

    def test_moves_between_devices(self) -> None:
        """Every tensor moves with `.to`: checked by changing the type of floating-point state."""
        selector = self.make().double()
        losses, step = toy_step(selector.genes)
        total = selector(losses.double(), step)
        assert total.dtype == torch.float64, f"got {total.dtype} after .double(): a tensor is not a buffer"


class BackboneContract:
    """Rules of the backbone door. Set `backbone` to the class, `settings` to what the constructor needs."""

    backbone: ClassVar[type[Backbone]]
    settings: ClassVar[Mapping[str, Any]] = {}

    def spots(self, count: int) -> Spots:
        """Toy spots of the size that the backbone wants."""
        known = tunables(self.backbone)
        default = known["patch_px"].default if "patch_px" in known else self.backbone.patch_px
        return toy_spots(count, patch_px=int(self.settings.get("patch_px", default)))

    def make(self) -> Backbone:
        """An instance on toy spots."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.backbone(self.spots(4), **self.settings)

    def test_settings_are_tunable(self) -> None:
        """Every setting is a keyword-only argument with an annotation and a default inside its range."""
        tunables(self.backbone)

    def test_width_is_true(self) -> None:
        """`forward` returns (spots, width), finite float32."""
        backbone = self.make()
        features = backbone(self.spots(3))
        assert features.shape == (3, backbone.width), f"got {tuple(features.shape)}, width says {backbone.width}"
        assert bool(features.isfinite().all()), "features are not finite"

    def test_one_spot(self) -> None:
        """A batch of one spot works in evaluation mode and keeps its axis."""
        backbone = self.make().eval()
        features = backbone(self.spots(1))
        assert features.shape == (1, backbone.width), f"got {tuple(features.shape)}"

    def test_evaluation_is_per_spot(self) -> None:
        """In evaluation mode the features of a spot do not depend on the other spots of its batch."""
        backbone = self.make().eval()
        spots = self.spots(4)
        alone = Spots(
            None if spots.patches is None else spots.patches[:1],
            spots.position[:1],
            spots.section[:1],
            None if spots.embedding is None else spots.embedding[:1],
        )
        with torch.no_grad():
            assert torch.allclose(backbone(spots)[:1], backbone(alone), atol=1e-4), "the batch matters"

    def test_same_seed_same_weights(self) -> None:
        """Equal seeds give equal weights."""
        first, second = self.make().state_dict(), self.make().state_dict()
        assert all(torch.equal(t, second[n]) for n, t in first.items()), "weights differ"

    def test_parts_make_the_whole(self) -> None:
        """If it splits, `late` of `early` is `forward`, and `late_names` are the parameters that `late` uses."""
        backbone = self.make().eval()
        if not backbone.splits:
            return
        spots = self.spots(4)
        with torch.no_grad():
            hidden = backbone.early(spots)
            assert torch.equal(backbone.late(hidden), backbone(spots)), "late(early(spots)) is not forward(spots)"
        named = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(backbone.late(hidden).square().sum(), list(named.values()), allow_unused=True)
        uses = {n for n, g in zip(named, found, strict=True) if g is not None}
        told = uses ^ {n for n in backbone.late_names() if n in named}
        assert not told, f"late_names and late disagree about {', '.join(sorted(told))}"

    def test_a_frozen_encoder_stays(self) -> None:
        """If it is frozen, `encode` gives one row for each spot, in training mode as well, and has no trained part."""
        backbone = self.make()
        if not backbone.frozen:
            return
        spots = self.spots(4)
        first = backbone.eval().encode(spots)
        second = backbone.train().encode(spots)
        assert first.shape[0] == 4 and first.ndim == 2, f"encode gives {tuple(first.shape)}, not (spots, n)"
        assert torch.equal(first, second), "encode depends on the training mode"
        assert not first.requires_grad, "encode has trained parameters"

    def test_second_order(self) -> None:
        """A second derivative exists: selectors that learn from validation need it."""
        backbone = self.make()
        own = [p for p in backbone.parameters() if p.requires_grad]
        if not own:
            return
        with sdpa_kernel(SDPBackend.MATH):  # as in a look-ahead: fused attention has no second derivative
            features = backbone(self.spots(4))
        first = torch.autograd.grad(features.square().sum(), own, create_graph=True, allow_unused=True)
        size = torch.stack([g.square().sum() for g in first if g is not None]).sum()
        second = torch.autograd.grad(size, own, allow_unused=True)
        assert any(g is not None and bool(g.isfinite().all()) for g in second), "no finite second derivative"


class DatasetContract:
    """Rules of the dataset door. Give an instance as `dataset` and the data folder as `root`."""

    dataset: ClassVar[Dataset]
    root: ClassVar[Path] = Path("data")

    def test_says_what_it_is(self) -> None:
        """Citation, licence and revision are there."""
        for name in ("citation", "licence", "revision"):
            assert getattr(self.dataset, name), f"{name} is empty"

    def test_names_before_loading(self) -> None:
        """`read` returns the section that it was asked for, with the donor that `sections` names."""
        named = self.dataset.sections(self.root)
        assert list(named) == self.dataset.names(self.root), "names and sections differ"
        read = {s.name: s.donor for s in self.dataset.load(self.root)}
        assert list(named.items()) == list(read.items()), f"{named} before, {read} after reading"

    def test_sections_are_sound(self) -> None:
        """Counts, names, coordinates, patches and embeddings pass the checks of every run."""
        sections = self.dataset.load(self.root)
        for section in sections:
            sections_check.check_section(section)
        sections_check.check_dataset(type(self.dataset).__name__.lower(), sections)

    def test_loads_the_same_twice(self) -> None:
        """Read twice, counts and patches are the same."""
        for first, second in zip(self.dataset.load(self.root), self.dataset.load(self.root), strict=True):
            a, b = first.counts.to_df().to_numpy(), second.counts.to_df().to_numpy()
            assert np.array_equal(a, b), f"counts of {first.name} differ"
            if first.patches is not None and second.patches is not None:
                rows = np.arange(min(8, first.counts.n_obs))
                one, two = (patches.read(rows, 32, 112.0) for patches in (first.patches, second.patches))
                assert np.array_equal(one, two), f"patches of {first.name} differ"

    def test_files_exist(self) -> None:
        """Every file of `files` exists: they make the fingerprint."""
        files = [p for name in self.dataset.sections(self.root) for p in self.dataset.files(self.root, name)]
        absent = [str(p) for p in files if not p.is_file()]
        assert not absent, f"absent: {', '.join(absent)}"


def check_selector(cls: type, settings: Mapping[str, Any]) -> list[Verdict]:
    """Run every rule of the selector door."""
    return _verdicts(type("Checked", (SelectorContract,), {"selector": cls, "settings": dict(settings)})())


def check_backbone(cls: type, settings: Mapping[str, Any]) -> list[Verdict]:
    """Run every rule of the backbone door."""
    return _verdicts(type("Checked", (BackboneContract,), {"backbone": cls, "settings": dict(settings)})())


def check_dataset(dataset: Dataset, root: Path) -> list[Verdict]:
    """Run every rule of the dataset door."""
    return _verdicts(type("Checked", (DatasetContract,), {"dataset": dataset, "root": root})())


def _verdicts(contract: object) -> list[Verdict]:
    rules: list[tuple[str, Callable[[], None]]] = [
        (name, method)
        for base in reversed(type(contract).__mro__)
        for name in vars(base)
        if name.startswith("test_") and inspect.ismethod(method := getattr(contract, name))
    ]
    return [Verdict(inspect.getdoc(method) or name, _problem(method)) for name, method in rules]


def _problem(method: Callable[[], None]) -> str | None:
    try:
        method()
    except AssertionError as error:
        return str(error).partition("\n")[0] or "not kept"
    except AglBenchError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (the plug-in under test may raise anything)
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _slope(selector: Selector, order: Tensor | None = None) -> Tensor:
    """∂total/∂losses (genes,) on the toy step, whose genes are permuted by `order`."""
    losses, step = toy_step(selector.genes, order=order)
    (slope,) = torch.autograd.grad(selector(losses, step), losses, allow_unused=True)
    return torch.zeros_like(losses) if slope is None else slope


def _hypergradients(selector: Selector, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the trainer would use: through a look-ahead of a linear model."""
    genes = selector.genes
    generator = torch.Generator().manual_seed(9)
    features = torch.rand(SPOTS, WIDTH, generator=generator)
    target = torch.rand(SPOTS, len(genes.names), generator=generator)
    # All genes share one hidden layer: without anything shared no gene could help another.
    start = {
        "shared": torch.randn(WIDTH, WIDTH, generator=generator),
        "head": torch.randn(len(genes.names), WIDTH, generator=generator),
    }

    def losses_at(at: Mapping[str, Tensor]) -> tuple[Tensor, Step]:
        hidden = torch.tanh(features @ at["shared"])
        prediction = hidden @ at["head"].T
        losses = (prediction - target).square().mean(0)
        return losses, Step(hidden, prediction, target, torch.arange(SPOTS), epoch=0)

    def inner(at: Mapping[str, Tensor], selector_at: Mapping[str, Tensor], _: int) -> Iterator[Tensor]:
        for _ in range(2):  # in parts, as of two batches
            yield functional_call(selector, dict(selector_at), losses_at(at)) / 2

    def outer(at: Mapping[str, Tensor]) -> Tensor:
        return losses_at(at)[0][genes.primary].mean()

    _, gradients = selector.hypergradient(inner, outer, start, own, rate=1e-2)
    return gradients
