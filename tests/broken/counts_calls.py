"""It keeps count in a buffer, in `forward`."""

import torch

from agl_bench import Selector, hookimpl


class CountsCalls(Selector):
    """It keeps count in a buffer, in `forward`."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, losses, step):
        self.calls += 1
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": CountsCalls}
