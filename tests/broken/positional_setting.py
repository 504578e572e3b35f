"""A setting that no command can set."""

import torch

from agl_bench import Selector, hookimpl


class PositionalSetting(Selector):
    """A setting that no command can set."""

    reference = "a broken plug-in"

    def __init__(self, view, k: int = 3):
        super().__init__(view)
        self.register_buffer("weights", (view.genes.rank < k).to(view.dtype))

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.where(self.weights > 0, 1.0, 0.5))


@hookimpl
def register_selectors():
    return {"broken": PositionalSetting}
