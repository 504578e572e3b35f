"""Its own rule remembers the last gradient where no state has it."""

import torch
from torch import nn

from agl_bench import Selector, hookimpl


class MomentumInAnAttribute(Selector):
    """Its own rule remembers the last gradient where no state has it."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))
        self.velocity = 0.0

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.sigmoid(self.logits))

    def learn(self, gradients, optimizer):
        self.velocity = 0.9 * self.velocity + gradients["logits"]
        self.logits.sub_(self.velocity)


@hookimpl
def register_selectors():
    return {"broken": MomentumInAnAttribute}
