"""Its frozen encoder is trained."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class TrainsWhatIsFrozen(Backbone):
    """Its frozen encoder is trained."""

    reference = "a broken plug-in"
    width, patch_px, frozen = 4, 16, True

    def __init__(self, example):
        super().__init__(example)
        self.trunk, self.last = nn.Linear(3, 8), nn.Linear(8, self.width)

    def encode(self, spots):
        return self.trunk(spots.patches.mean((2, 3)))

    def forward(self, spots):
        return torch.tanh(self.last(self.encode(spots) if spots.patches is not None else spots.embedding))


@hookimpl
def register_backbones():
    return {"broken": TrainsWhatIsFrozen}
