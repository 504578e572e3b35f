"""Asks for counts and does not say so."""

import torch

from agl_bench import Selector, hookimpl


class AsksForCounts(Selector):
    """Asks for counts and does not say so."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("weights", torch.log1p(view.counts.mean(0)))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": AsksForCounts}
