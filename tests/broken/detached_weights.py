"""Half of what its weights depend on is detached."""

import torch
from torch import nn

from agl_bench import Selector, hookimpl


class DetachedWeights(Selector):
    """Half of what its weights depend on is detached."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.sigmoid(self.logits) + torch.tanh(self.logits.detach()) / 2)


@hookimpl
def register_selectors():
    return {"broken": DetachedWeights}
