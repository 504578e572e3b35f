"""Where a spot lies and nothing else: the control that an image model has to beat.

Own design: sines and cosines of the coordinates (Tancik et al., NeurIPS 2020) with wavelengths from the width of a
section down to a few spots, along directions spread over the half circle, then two layers. Waves are bounded wherever
the origin of the coordinates lies, so that no statistic of any spot is needed to standardise them. It scores where
training spots are near: on random folds nearly as well as an image model, and between serial sections of one piece of
tissue that lie alike on their slides; on compact blocks it should not.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from agl_bench import Backbone, LogRange, Range, Spots


class Position(Backbone):
    """Coordinates alone, no image: a control."""

    reference = "agl-bench; Fourier features: Tancik et al., NeurIPS 2020"
    sees = "position"
    is_control = True
    splits, late_prefixes = True, ("layers.",)
    waves: Tensor

    def __init__(
        self,
        example: Spots,
        *,
        width: Annotated[int, LogRange(4, 512)] = 32,
        longest_um: Annotated[float, LogRange(100, 100_000)] = 10_000.0,
        shortest_um: Annotated[float, LogRange(10, 10_000)] = 500.0,
        wavelengths: Annotated[int, Range(1, 32)] = 5,
        directions: Annotated[int, Range(1, 32)] = 6,
        learning_rate: Annotated[float, LogRange(1e-6, 1e-1)] = 3e-3,
    ) -> None:
        super().__init__(example)
        self.width, self.learning_rate = width, learning_rate
        length = torch.logspace(math.log10(longest_um), math.log10(shortest_um), wavelengths, dtype=torch.float64)
        angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
        heading = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
        waves = (heading[:, :, None] * (2 * math.pi / length)).flatten(1)  # rad / µm
        self.register_buffer("waves", waves.float(), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves.shape[1], 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def early(self, spots: Spots) -> Tensor:
        """Sines and cosines (spots, 2 · wavelengths · directions)."""
        phase = spots.position.to(self.waves.dtype) @ self.waves
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from waves."""
        return torch.nn.functional.silu(self.layers(hidden))
