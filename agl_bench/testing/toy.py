"""A toy world: genes, spots, training views, steps, and small cells for the real trainer, made in milliseconds.

Nothing here is tissue. Numbers are random, of fixed seeds; genes are primary and auxiliary in a mixed order, ranked in
another one than that of the columns.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor, nn

from agl_bench.data.preprocess import tabulate
from agl_bench.data.store import SpotStore
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.interfaces.spots import Section, Spots
from agl_bench.maths.losses import LOSSES
from agl_bench.protocol import Protocol
from agl_bench.training.model import build_model
from agl_bench.training.trainer import DevelopmentRows, Trainer

SPOTS, PRIMARY, AUXILIARY, WIDTH = 24, 5, 40, 6
INPUTS = 7  # numbers for each spot that the toy models see


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


def toy_view(
    genes: GeneSplit | None = None,
    seed: int = 0,
    *,
    planted: bool = False,
    expression: Tensor | None = None,
    spots: int = SPOTS,
    has_counts: bool = True,
) -> TrainingView:
    """A view over random training expression.

    Args:
        genes: `toy_genes()` by default.
        seed: of the view's generator.
        planted: of data whose truth is known, as controls are shown it.
        expression: (spots, genes) to show; random by default.
        spots: how many, where `expression` is not given.
        has_counts: whether the view has raw counts.
    """
    genes = genes or toy_genes()
    generator = torch.Generator().manual_seed(2)
    if expression is None:
        expression = torch.rand(spots, len(genes.names), generator=generator)
    spots = len(expression)
    return TrainingView(
        genes,
        expression,
        _seeded(seed),
        truth=toy_truth(genes) if planted else None,
        position=(1000 * torch.rand(spots, 2, generator=_seeded(3))).to(expression.device),
        section=(torch.arange(spots) % 2).to(expression.device),
        counts=(lambda: (10 * expression).round()) if has_counts else None,
        scores=functools.partial(toy_scores, expression),
    )


def toy_scores(expression: Tensor, name: str) -> Tensor:
    """A score of each gene, (genes,) float64: mean, detection, or for all other names dispersion, NaN if constant 0."""
    values = expression.double()
    if name == "mean":
        return values.mean(0)
    if name == "detection":
        return (values > 0).double().mean(0)
    return values.var(0) / values.mean(0)


def toy_truth(genes: GeneSplit) -> Tensor:
    """What each gene is worth, (genes,): the first half of the ranking helps, the rest harms, primary genes 0."""
    return torch.where(genes.rank < genes.auxiliary_count / 2, 1.0, -1.0) * ~genes.primary


def toy_spots(count: int = SPOTS, *, patch_px: int = 32, embedding: int = 16) -> Spots:
    """Random spots with patches, positions and embeddings."""
    generator = _seeded(3)
    return Spots(
        patches=torch.rand(count, 3, patch_px, patch_px, generator=generator),
        position=1000 * torch.rand(count, 2, generator=generator),
        section=torch.zeros(count, dtype=torch.int64),
        embedding=torch.rand(count, embedding, generator=generator),
    )


def toy_step(
    genes: GeneSplit,
    seed: int = 4,
    *,
    loss: str = "squared_error",
    spots: int = SPOTS,
    width: int = WIDTH,
    used: Tensor | None = None,
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Step]:
    """Losses (genes,) on the graph of a model of two layers, and the step that made them.

    Args:
        genes: the gene axis.
        seed: of spots, model and targets.
        loss: as `protocol.loss`.
        spots: in the batch.
        width: of the features.
        used: (genes,) bool, the genes that are predicted; None = all.
        order: (genes,) how to permute the genes; a gene keeps its numbers.
        dtype: of all that floats.
        device: where all of it is.
    """
    generator = _seeded(seed)
    count = len(genes.names)
    # A gene's numbers depend on its place before the permutation alone.
    shared = torch.randn(width, INPUTS, generator=generator, dtype=torch.float64)
    seen = torch.rand(spots, INPUTS, generator=generator, dtype=torch.float64)
    head = torch.randn(count, width, generator=generator, dtype=torch.float64)
    target = torch.rand(spots, count, generator=generator, dtype=torch.float64)
    if order is not None:
        head, target = head[order], target[:, order]
    shared, seen, head, target = (t.to(device, dtype) for t in (shared, seen, head, target))
    columns = None if used is None or bool(used.all()) else used.to(device).nonzero().squeeze(1)
    if columns is not None:
        head, target = head[columns], target[:, columns]
    shared, head = shared.requires_grad_(), head.requires_grad_()
    features = torch.tanh(seen @ shared.T)
    prediction = features @ head.T
    losses = LOSSES[loss](prediction, target)
    if columns is not None:
        losses = torch.zeros(count, dtype=dtype, device=device).index_copy(0, columns, losses)
    row = torch.arange(spots, device=device)
    return losses, Step(features, prediction, target, row, 0, head, (shared,), (shared,), columns)


class ToyBackbone(Backbone):
    """Two small smooth layers, of which a look-ahead may move the last."""

    sees, width, learning_rate = "embedding", WIDTH, 1e-2
    splits, late_prefixes = True, ("last.",)

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.first, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, WIDTH)

    def early(self, spots: Spots) -> Tensor:
        """(spots, 8)."""
        assert spots.embedding is not None
        return torch.tanh(self.first(spots.embedding))

    def late(self, hidden: Tensor) -> Tensor:
        """(spots, width)."""
        return torch.tanh(self.last(hidden))


class ToyCell:
    """A small cell: two sections, a store of development spots and one of test spots, as a run has them.

    Attributes:
        genes: the gene axis.
        protocol: of the training.
        rows: of the development store.
        development, test: the stores.
    """

    TRAIN, HELD_OUT, VALIDATION, TEST = 24, 12, 12, 12  # spots, half of them in each section

    def __init__(
        self,
        *,
        is_measured: bool = True,
        learns: bool = True,
        loss: Literal["pearson", "squared_error"] = "pearson",
        backbone: type[Backbone] = ToyBackbone,
    ) -> None:
        """Make the data.

        Args:
            is_measured: else the expression of every spot is NaN where a selector must not look: of validation and
                test spots, and of held-out spots that of auxiliary genes.
            learns: whether a selector learns from held-out spots; else their primary genes are NaN as well.
            loss: as `protocol.loss`.
            backbone: what the model sees spots with.
        """
        self.genes, self.backbone = toy_genes(), backbone
        self.protocol = Protocol.of(
            {
                "normalisation": "log1p",
                "min_genes_per_spot": 0,
                "spot_mads": 0,
                "buffer_um": 0,
                "augment": False,
                "loss": loss,
                "batch_size": 12,
                "epochs": 4,
                "patience": 4,
                "outer_start": 1,
                "outer_batches": 1,
            }
        )
        sizes = np.array([self.TRAIN, self.HELD_OUT, self.VALIDATION, self.TEST])
        purpose = np.repeat(np.arange(4), sizes)
        primary = self.genes.primary.numpy()
        rng = np.random.default_rng(11)
        seen = rng.normal(size=(len(purpose), INPUTS)).astype(np.float32)
        effect = rng.normal(size=(INPUTS, len(primary)))
        counts = rng.poisson(np.exp(1 + 0.5 * seen @ effect)).astype(np.float32)
        if not is_measured:
            counts[purpose >= 2] = np.nan
            counts[np.ix_(purpose == 1, np.ones(len(primary), dtype=bool) if not learns else ~primary)] = np.nan
        halves = [np.flatnonzero(np.arange(len(purpose)) % 2 == half) for half in (0, 1)]
        sections = [self._section(f"S{n}", counts[half], seen[half], rng) for n, half in enumerate(halves, start=1)]
        table, purpose = tabulate(sections, self.protocol), np.concatenate([purpose[half] for half in halves])
        train, held_out, validation, test = (np.flatnonzero(purpose == number) for number in range(4))
        columns = np.arange(len(primary))
        self.development, self.test = (
            SpotStore(table, rows, columns, sees="embedding", patch_px=0, patch_um=0, device=torch.device("cpu"))
            for rows in (np.concatenate([train, held_out, validation]), test)
        )
        self.rows = DevelopmentRows(*np.split(np.arange(sizes[:3].sum()), np.cumsum(sizes[:2])))
        self._counts = torch.from_numpy(table.counts(train, columns).toarray())

    def _section(self, name: str, counts: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> Section:
        table = AnnData(counts)
        table.var_names = list(self.genes.names)
        table.obsm["spatial"] = 1000 * rng.random((len(counts), 2))
        return Section(name, table, um_per_px=1.0, embedding=seen)

    def trainer(self, make: Callable[[TrainingView], Selector], *, planted: bool = False) -> Trainer:
        """A trainer with a fresh model and a fresh selector.

        Args:
            make: builds the selector on a view, which shows the training spots of the development store.
            planted: whether the view knows the truth.
        """
        count = len(self.rows.train)
        expression = functools.partial(self.development.leading_expression, count)
        view = TrainingView(
            self.genes,
            expression,
            _seeded(0),
            self.protocol.detach_weight_sum,
            toy_truth(self.genes) if planted else None,
            position=self.development.position[:count],
            section=self.development.section[:count],
            counts=self._counts.clone,
            scores=lambda name: toy_scores(expression(), name),
        )
        example = self.development.spots(torch.arange(4))
        model = build_model(lambda: self.backbone(example), len(self.genes.names), 0, "toy")
        selector = make(view)
        return Trainer(model, selector, self.development, self.rows, self.genes, self.protocol, seed=0)


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's state as another process would find it."""
    stream = io.BytesIO()
    torch.save(dict(state), stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
