"""What it says is late is early."""

import torch
from torch import nn

from agl_bench import Backbone, hookimpl


class WrongLatePrefixes(Backbone):
    """What it says is late is early."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16
    splits, late_prefixes = True, ("first.",)

    def __init__(self, example):
        super().__init__(example)
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, self.width)

    def early(self, spots):
        return torch.tanh(self.first(spots.patches.mean((2, 3))))

    def late(self, hidden):
        return torch.tanh(self.last(hidden))


@hookimpl
def register_backbones():
    return {"broken": WrongLatePrefixes}
