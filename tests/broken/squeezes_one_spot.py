"""The axis of a single spot is lost."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class SqueezesOneSpot(Backbone):
    """The axis of a single spot is lost."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.mean((2, 3)))).squeeze()


@hookimpl
def register_backbones():
    return {"broken": SqueezesOneSpot}
