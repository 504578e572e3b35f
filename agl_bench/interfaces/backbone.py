"""The door for backbones: spots in, features out."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from agl_bench.interfaces.spots import Spots


class Backbone(nn.Module):
    """Maps spots to features; the model puts one linear head with an output for each gene on top.

    The constructor gets `example`, a few training spots (no expression), from which it may read shapes. Settings are
    keyword-only arguments with their range in the annotation.

    Attributes:
        width: number of features.
        sees: what it looks at; the store loads nothing else.
        patch_px: side of the patches it wants, read from the class or set from a tunable of the same name.
        learning_rate: of the model, used where the protocol says "backbone".
        reference: the publication that this backbone implements.
    """

    width: int
    sees: Literal["patches", "embedding", "position"] = "patches"
    patch_px: int = 224
    learning_rate: float = 1e-4
    reference: str = ""

    def __init__(self, example: Spots) -> None:
        super().__init__()

    def forward(self, spots: Spots) -> Tensor:
        """Features (spots, width)."""
        raise NotImplementedError
