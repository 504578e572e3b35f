"""What it has drawn is in no state."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class ProjectionThatIsNotSaved(Backbone):
    """What it has drawn is in no state."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)
        self.register_buffer("turn", torch.randn(3, 3), persistent=False)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.patches.mean((2, 3)) @ self.turn))


@hookimpl
def register_backbones():
    return {"broken": ProjectionThatIsNotSaved}
