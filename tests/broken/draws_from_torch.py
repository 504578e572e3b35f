"""Weights from torch's global generator."""

import torch

from agl_bench import Selector, hookimpl


class DrawsFromTorch(Selector):
    """Weights from torch's global generator."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.rand(view.genes.auxiliary_count + 1)
        self.register_buffer("weights", drawn[view.genes.rank])

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": DrawsFromTorch}
