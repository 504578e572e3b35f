"""It applies one more layer where features were kept."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class ForgetsWhatWasEncoded(Backbone):
    """It applies one more layer where features were kept."""

    reference = "a broken plug-in"
    width, patch_px, frozen = 4, 16, True

    def __init__(self, example):
        super().__init__(example)
        self.trunk, self.last = nn.Linear(3, 8), nn.Linear(8, self.width)
        self.trunk.requires_grad_(False)

    def encode(self, spots):
        return self.trunk(spots.patches.mean((2, 3)))

    def forward(self, spots):
        kept = self.encode(spots) if spots.patches is not None else torch.tanh(spots.embedding)
        return torch.tanh(self.last(kept))


@hookimpl
def register_backbones():
    return {"broken": ForgetsWhatWasEncoded}
