"""Its buffer keeps the graph of every batch."""

import torch

from agl_bench import Selector, hookimpl


class ObservesOnTheGraph(Selector):
    """Its buffer keeps the graph of every batch."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("seen", torch.ones(len(view.genes.names)))

    def observe(self, losses, step):
        self.seen = 0.9 * self.seen + 0.1 * losses

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.seen.detach())


@hookimpl
def register_selectors():
    return {"broken": ObservesOnTheGraph}
