"""The weight of a gene is that of its column."""

import torch

from agl_bench import Selector, hookimpl


class WeighsByColumn(Selector):
    """The weight of a gene is that of its column."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.linspace(0, 1, len(losses), dtype=losses.dtype))


@hookimpl
def register_selectors():
    return {"broken": WeighsByColumn}
