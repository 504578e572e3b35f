"""It remembers losses in a buffer that no state has."""

import torch

from agl_bench import Selector, hookimpl


class ObservesIntoAnUnsavedBuffer(Selector):
    """It remembers losses in a buffer that no state has."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("seen", torch.ones(len(view.genes.names)), persistent=False)

    def observe(self, losses, step):
        self.seen.lerp_(losses.detach().to(self.seen.dtype), 0.1)

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.seen)


@hookimpl
def register_selectors():
    return {"broken": ObservesIntoAnUnsavedBuffer}
