"""`learn` puts another parameter in the place of the old one."""

import torch
from torch import nn

from agl_bench import Selector, hookimpl


class ReplacesItsParameter(Selector):
    """`learn` puts another parameter in the place of the old one."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.sigmoid(self.logits))

    def learn(self, gradients, optimizer):
        self.logits = nn.Parameter(self.logits - gradients["logits"])


@hookimpl
def register_selectors():
    return {"broken": ReplacesItsParameter}
