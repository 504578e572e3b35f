"""A backbone with one linear output for each gene."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import Spots
from agl_bench.maths.seeds import seed_for


class Model(nn.Module):
    """Spots -> features -> prediction.

    Attributes:
        backbone: spots -> (spots, width).
        head: (spots, width) -> (spots, genes).
    """

    def __init__(self, backbone: Backbone, genes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, genes)

    def forward(self, spots: Spots) -> tuple[Tensor, Tensor]:
        """Features (spots, width) and prediction (spots, genes)."""
        features = self.backbone(spots)
        return features, self.head(features)


def build_model(make_backbone: Callable[[], Backbone], genes: int, seed: int, label: str) -> Model:
    """A model whose initial weights depend on the seed and `label` alone, never on the selector.

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights", label))
        return Model(make_backbone(), genes)
