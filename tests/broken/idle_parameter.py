"""A parameter that nothing depends on."""

import torch
from torch import nn

from agl_bench import Selector, hookimpl


class IdleParameter(Selector):
    """A parameter that nothing depends on."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.unused = nn.Parameter(torch.zeros((), dtype=view.dtype))

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": IdleParameter}
