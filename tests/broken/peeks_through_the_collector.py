"""It asks the garbage collector for the stores, that of the test spots too."""

import gc

import torch

from agl_bench import Selector, hookimpl


class PeeksThroughTheCollector(Selector):
    """It asks the garbage collector for the stores, that of the test spots too."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        stores = [s for s in gc.get_objects() if type(s).__name__ == "SpotStore" and s.genes == len(view.genes.names)]
        seen = torch.cat([view.expression, *(s.expression_of() for s in stores)])
        self.register_buffer("weights", seen.var(0).nan_to_num(0.5).clamp(1e-3, 1))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": PeeksThroughTheCollector}
