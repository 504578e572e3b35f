"""A small convolutional network for machines without a GPU.

Own design: three strided 3 × 3 convolutions with group normalisation on a 32 px patch, then mean and standard deviation
over the positions, which is what colour and texture statistics are made of. No BatchNorm: the batches of small sections
are too small for it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from agl_bench import Backbone, LogRange, Range, Spots


class Tiny(Backbone):
    """A small CNN that trains on two CPU cores."""

    reference = "agl-bench"
    splits, late_prefixes = True, ("stages.6.", "stages.7.", "mix.")  # the last convolution with its normalisation

    def __init__(
        self,
        example: Spots,
        *,
        width: Annotated[int, LogRange(4, 512)] = 32,
        channels: Annotated[int, LogRange(4, 256)] = 32,
        patch_px: Annotated[int, Range(16, 512)] = 32,
        learning_rate: Annotated[float, LogRange(1e-6, 1e-1)] = 3e-3,
    ) -> None:
        super().__init__(example)
        self.width, self.patch_px, self.learning_rate = width, patch_px, learning_rate
        self.stages = nn.Sequential(
            *(
                layer
                for into, out in ((3, channels // 2), (channels // 2, channels), (channels, channels))
                for layer in (nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(1, out), nn.SiLU())
            )
        )
        self.mix = nn.Linear(2 * channels, width)

    def early(self, spots: Spots) -> Tensor:
        """Maps (spots, channels, px / 4, px / 4) after two of the three convolutions."""
        assert spots.patches is not None
        maps: Tensor = self.stages[:6](2 * spots.patches - 1)
        return maps

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from maps."""
        maps = self.stages[6:](hidden).flatten(2)  # (spots, channels, positions)
        centre = maps.mean(2)
        spread = ((maps - centre[..., None]).square().mean(2) + 1e-6).sqrt()
        return torch.nn.functional.silu(self.mix(torch.cat([centre, spread], dim=1)))
