"""It says a width that it has not."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class WrongWidth(Backbone):
    """It says a width that it has not."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)
        self.width += 1

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.mean((2, 3))))


@hookimpl
def register_backbones():
    return {"broken": WrongWidth}
