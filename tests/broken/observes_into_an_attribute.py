"""It remembers losses in a plain attribute."""

import torch

from agl_bench import Selector, hookimpl


class ObservesIntoAnAttribute(Selector):
    """It remembers losses in a plain attribute."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.first = 1.0

    def observe(self, losses, step):
        self.first = 0.9 * self.first + 0.1 * torch.where(self.is_primary, losses, 0).mean().detach()

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.ones_like(losses) * self.first)


@hookimpl
def register_selectors():
    return {"broken": ObservesIntoAnAttribute}
