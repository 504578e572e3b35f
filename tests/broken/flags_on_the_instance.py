"""Says what it needs when it is too late."""

import torch

from agl_bench import Selector, hookimpl


class FlagsOnTheInstance(Selector):
    """Says what it needs when it is too late."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.max_genes = 100

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.ones_like(losses))


@hookimpl
def register_selectors():
    return {"broken": FlagsOnTheInstance}
