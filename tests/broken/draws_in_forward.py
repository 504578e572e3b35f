"""It draws its weights anew whenever it is asked."""

import torch

from agl_bench import Selector, hookimpl


class DrawsInForward(Selector):
    """It draws its weights anew whenever it is asked."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        drawn = torch.rand(len(losses), generator=self.generator, dtype=losses.dtype)
        return self.weighted_mean(losses, drawn[self.genes.rank])


@hookimpl
def register_selectors():
    return {"broken": DrawsInForward}
