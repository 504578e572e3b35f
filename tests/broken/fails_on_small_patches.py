"""Its range promises patches that its layers do not take."""

from typing import Annotated

import torch
from torch import nn

from agl_bench import Backbone, Range, hookimpl


class FailsOnSmallPatches(Backbone):
    """Its range promises patches that its layers do not take."""

    reference = "a broken plug-in"
    width = 4

    def __init__(self, example, *, patch_px: Annotated[int, Range(2, 64)] = 32):
        super().__init__(example)
        self.patch_px = patch_px
        self.mix = nn.Conv2d(3, self.width, 5)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches).mean((2, 3)))


@hookimpl
def register_backbones():
    return {"broken": FailsOnSmallPatches}
