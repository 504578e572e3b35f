"""Its setting `patch_px` changes nothing."""

from typing import Annotated

import torch
from torch import nn

from agl_bench import Backbone, Range, hookimpl


class IgnoresItsPatchSize(Backbone):
    """Its setting `patch_px` changes nothing."""

    reference = "a broken plug-in"
    width = 4

    def __init__(self, example, *, patch_px: Annotated[int, Range(16, 64)] = 32):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.mean((2, 3))))


@hookimpl
def register_backbones():
    return {"broken": IgnoresItsPatchSize}
