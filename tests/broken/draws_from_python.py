"""Weights from the module `random`."""

import random

import torch

from agl_bench import Selector, hookimpl


class DrawsFromPython(Selector):
    """Weights from the module `random`."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.tensor([random.random() for _ in range(view.genes.auxiliary_count + 1)])
        self.register_buffer("weights", drawn[view.genes.rank])

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": DrawsFromPython}
