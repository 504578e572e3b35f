"""Its engine gives the gradient of what it is not asked for."""

import torch
from torch import nn

from agl_bench import OneStep, Problem, Selector, hookimpl


class Uphill(OneStep):
    """The right gradient with the wrong sign."""

    def solve(self, problem: Problem):
        outer, found = super().solve(problem)
        return outer, {name: -gradient for name, gradient in found.items()}


class WrongEngine(Selector):
    """Its engine gives the gradient of what it is not asked for."""

    reference = "a broken plug-in"

    hypergradient = Uphill()

    def __init__(self, view):
        super().__init__(view)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.sigmoid(self.logits))


@hookimpl
def register_selectors():
    return {"broken": WrongEngine}
