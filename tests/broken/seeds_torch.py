"""It makes everything repeatable for everybody."""

import torch

from agl_bench import Selector, hookimpl


class SeedsTorch(Selector):
    """It makes everything repeatable for everybody."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        torch.manual_seed(1)

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": SeedsTorch}
