"""Its own rule divides by a gradient that may be zero."""

import torch
from torch import nn

from agl_bench import Selector, hookimpl


class LearnsToInfinity(Selector):
    """Its own rule divides by a gradient that may be zero."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.sigmoid(self.logits))

    def learn(self, gradients, optimizer):
        self.logits.sub_(1 / (gradients["logits"] - gradients["logits"].mean()))


@hookimpl
def register_selectors():
    return {"broken": LearnsToInfinity}
