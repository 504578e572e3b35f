"""It looks at features of one width only."""

import torch

from agl_bench import Selector, hookimpl


class WantsSixFeatures(Selector):
    """It looks at features of one width only."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("direction", torch.ones(6))

    def forward(self, losses, step):
        projected = step.features.detach() @ self.direction.to(losses.dtype)
        return self.weighted_mean(losses, projected.mean().sigmoid().expand(len(losses)))


@hookimpl
def register_selectors():
    return {"broken": WantsSixFeatures}
