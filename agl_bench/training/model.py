"""A backbone with one linear output for each gene."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import Spots
from agl_bench.maths.seeds import seed_for

Module = TypeVar("Module", bound=nn.Module)


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

    def forward(
        self, spots: Spots | None, hidden: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (spots, width) and prediction (spots, genes).

        Args:
            spots: what the backbone sees.
            hidden: what its early part has made of them, if that is known; `spots` is then not looked at.
            columns: (n,) the genes to predict, all if None.
        """
        features = self.backbone(spots) if hidden is None else self.backbone.late(hidden)
        if columns is None:
            return features, self.head(features)
        return features, nn.functional.linear(features, self.head.weight[columns], self.head.bias[columns])

    def late_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the late part of the backbone and of the head, by name."""
        names = {"head.weight", "head.bias", *(f"backbone.{n}" for n in self.backbone.late_names())}
        return {n: p for n, p in self.named_parameters() if p.requires_grad and n in names}

    def narrow(self, columns: Tensor) -> Model:
        """A model of the same backbone with the head's rows `columns` alone, as copies."""
        narrow = Model.__new__(Model)
        nn.Module.__init__(narrow)
        narrow.backbone = self.backbone
        # Made without drawing numbers: the global generator belongs to dropout.
        narrow.head = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, self.head.in_features, len(columns), dtype=self.head.weight.dtype
        )
        narrow.head = narrow.head.to(self.head.weight.device)
        with torch.no_grad():
            narrow.head.weight.copy_(self.head.weight[columns])
            narrow.head.bias.copy_(self.head.bias[columns])
        return narrow

    def widen(self, narrow: Model, columns: Tensor) -> None:
        """Take over the head's rows `columns` from a narrow model; the backbone is the same object."""
        with torch.no_grad():
            self.head.weight[columns] = narrow.head.weight
            self.head.bias[columns] = narrow.head.bias


def build_model(make_backbone: Callable[[], Backbone], genes: int, seed: int, label: str) -> Model:
    """A model whose initial weights depend on the seed and `label` alone, never on the selector.

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights", label))
        return Model(make_backbone(), genes)


def on_device(module: Module, device: torch.device) -> Module:
    """A module on a device, with the channels innermost on a GPU, where convolutions are fastest so."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return module.to(device, memory_format=layout)  # type: ignore[call-overload, no-any-return]
