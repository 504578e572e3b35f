"""It wants to see the answer."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class WantsExpression(Backbone):
    """It wants to see the answer."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots, expression):
        return torch.tanh(self.mix(spots.patches.mean((2, 3)))) + expression.mean()


@hookimpl
def register_backbones():
    return {"broken": WantsExpression}
