"""The mean that it subtracts stays where it was made."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class PlainMean(Backbone):
    """The mean that it subtracts stays where it was made."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)
        self.mean = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float32)

    def forward(self, spots):
        return torch.tanh(self.mix((spots.patches.mean((2, 3)) - self.mean).to(self.mean.dtype)))


@hookimpl
def register_backbones():
    return {"broken": PlainMean}
