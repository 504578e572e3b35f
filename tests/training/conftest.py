"""A toy cell: three small synthetic sections, the third one tested, and everything a trainer needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agl_bench.data.folds import Fold, FoldPlan, make_fold
from agl_bench.data.gene_split import split_genes
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import Dense, SpotStore
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, TrainingView
from agl_bench.interfaces.spots import Spots
from agl_bench.protocol import Protocol
from agl_bench.training.model import Model, build_model
from agl_bench.training.trainer import DevelopmentRows, Trainer
from agl_bench_plugins.datasets.synthetic import Synthetic

PX, UM = 16, 112.0
CPU = torch.device("cpu")


class Flat(Backbone):
    """One smooth layer on the pixels, in any floating-point type."""

    width, patch_px, learning_rate = 6, PX, 1e-3

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.mix = nn.Linear(3 * PX * PX, self.width)

    def forward(self, spots: Spots) -> Tensor:
        assert spots.patches is not None
        return torch.tanh(self.mix(2 * spots.patches.flatten(1).to(self.mix.weight.dtype) - 1))


@dataclass
class Toy:
    """A fold and its stores; `trainer` starts one cell on them."""

    table: SpotTable
    protocol: Protocol
    fold: Fold
    genes: GeneSplit
    development: SpotStore
    test: SpotStore
    rows: DevelopmentRows

    def model(self, backbone: type[Backbone] = Flat, seed: int = 0) -> Model:
        example = self.development.spots(torch.arange(4))
        return build_model(lambda: backbone(example), len(self.genes.names), seed, "toy")

    def trainer(
        self,
        selector: type[Selector],
        backbone: type[Backbone] = Flat,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **settings: object,
    ) -> Trainer:
        if self.development.leading_expression(1).dtype != dtype:
            self.development.matrix = Dense(self.development.expression_of().to(dtype))
        view = TrainingView(
            self.genes,
            self.development.leading_expression(len(self.rows.train)),
            torch.Generator().manual_seed(seed),
            self.protocol.detach_weight_sum,
        )
        return Trainer(
            self.model(backbone, seed).to(dtype),
            selector(view, **settings),
            self.development,
            self.rows,
            self.genes,
            self.protocol,
            seed=seed,
        )


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The work is so small that threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_table() -> SpotTable:
    planted = {"markers": 6, "helpful_genes": 8, "harmful_genes": 10, "useless_genes": 16}
    sections = Synthetic(sections=3, spots=50, patch_px=PX, **planted)
    return tabulate(sections.load(Path()), Protocol(min_genes_per_spot=5))


@pytest.fixture
def make_toy(toy_table: SpotTable) -> Callable[..., Toy]:
    """A factory: keyword arguments are protocol settings; `only_primary` leaves the auxiliary genes out.

    `place` says where and how the stores keep their data.
    """

    def make(
        table: SpotTable = toy_table,
        *,
        only_primary: bool = False,
        place: Mapping[str, Any] = MappingProxyType({}),
        **settings: object,
    ) -> Toy:
        protocol = Protocol.of(
            {
                "primary_score": "seurat",
                "ranking": "seurat",
                "primary_genes": 6,
                "batch_size": 12,
                "epochs": 4,
                "buffer_um": 0,
                "outer_start": 0,
                "detach_weight_sum": False,
                "outer_batches": 1,
            }
            | settings
        )
        fold = make_fold(FoldPlan("S3", ("S1", "S2", "S3"), ("S3",), -1), table, protocol, 0)
        genes, columns = split_genes(table, fold.train, protocol)
        if only_primary:
            kept = genes.primary.numpy()
            names = tuple(np.array(genes.names)[kept].tolist())
            genes = GeneSplit(names, genes.primary[kept], genes.rank[kept], genes.score[kept])
            columns = columns[kept]
        sizes = np.cumsum([len(fold.train), len(fold.held_out), len(fold.validation)])
        train, held_out, validation = np.split(np.arange(sizes[-1]), sizes[:-1])
        stores = [
            SpotStore(table, rows, columns, sees="patches", patch_px=PX, patch_um=UM, device=CPU, **place)
            for rows in (np.concatenate([fold.train, fold.held_out, fold.validation]), fold.test)
        ]
        return Toy(table, protocol, fold, genes, *stores, DevelopmentRows(train, held_out, validation))

    return make
