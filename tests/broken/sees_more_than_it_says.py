"""It looks at embeddings, which nobody loads for it."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class SeesMoreThanItSays(Backbone):
    """It looks at embeddings, which nobody loads for it."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(example.embedding.shape[1], self.width)

    def forward(self, spots):
        return torch.tanh(self.mix(spots.embedding))


@hookimpl
def register_backbones():
    return {"broken": SeesMoreThanItSays}
