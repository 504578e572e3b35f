"""Weights from a generator that nobody has seeded."""

import numpy as np
import torch

from agl_bench import Selector, hookimpl


class DrawsWithoutASeed(Selector):
    """Weights from a generator that nobody has seeded."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.from_numpy(np.random.default_rng().random(view.genes.auxiliary_count + 1)).float()
        self.register_buffer("weights", drawn[view.genes.rank])

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": DrawsWithoutASeed}
