"""It normalises the patches of everybody."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class ChangesThePatches(Backbone):
    """It normalises the patches of everybody."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.sub_(0.5).mean((2, 3))))


@hookimpl
def register_backbones():
    return {"broken": ChangesThePatches}
