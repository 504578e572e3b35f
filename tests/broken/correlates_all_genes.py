"""A matrix of all genes with all genes, by numpy."""

import numpy as np
import torch

from agl_bench import Selector, hookimpl


class CorrelatesAllGenes(Selector):
    """A matrix of all genes with all genes, by numpy."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        together = np.corrcoef(view.expression.numpy(), rowvar=False)
        self.register_buffer("weights", torch.from_numpy(np.nan_to_num(np.abs(together)).mean(0)).to(view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": CorrelatesAllGenes}
