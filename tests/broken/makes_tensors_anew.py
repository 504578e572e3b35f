"""Weights made in every step, on the host."""

import torch

from agl_bench import Selector, hookimpl


class MakesTensorsAnew(Selector):
    """Weights made in every step, on the host."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.full(losses.shape, 0.5))


@hookimpl
def register_selectors():
    return {"broken": MakesTensorsAnew}
