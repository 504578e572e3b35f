"""It keeps count in evaluation too."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class CountsSpots(Backbone):
    """It keeps count in evaluation too."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, spots):
        self.seen += len(spots.patches)
        return torch.tanh(self.mix(spots.patches.mean((2, 3))))


@hookimpl
def register_backbones():
    return {"broken": CountsSpots}
