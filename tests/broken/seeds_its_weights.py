"""Its weights are the same for every seed."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class SeedsItsWeights(Backbone):
    """Its weights are the same for every seed."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        torch.manual_seed(0)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.mean((2, 3))))


@hookimpl
def register_backbones():
    return {"broken": SeedsItsWeights}
