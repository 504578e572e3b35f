"""Weights from numpy's global generator."""

import numpy as np
import torch

from agl_bench import Selector, hookimpl


class DrawsFromNumpy(Selector):
    """Weights from numpy's global generator."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.from_numpy(np.random.rand(view.genes.auxiliary_count + 1)).float()  # noqa: NPY002
        self.register_buffer("weights", drawn[view.genes.rank])

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": DrawsFromNumpy}
