"""It takes the memory of patches for granted."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class ViewsPatches(Backbone):
    """It takes the memory of patches for granted."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3 * 16 * 16, self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.view(len(spots.patches), -1)))


@hookimpl
def register_backbones():
    return {"broken": ViewsPatches}
