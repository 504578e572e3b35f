"""Looks at a number on the host in every step."""

import torch

from agl_bench import Selector, hookimpl


class WaitsForTheDevice(Selector):
    """Looks at a number on the host in every step."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        bound = losses.mean().item()
        return self.weighted_mean(losses, torch.where(losses.detach() < bound, 1.0, 0.5))


@hookimpl
def register_selectors():
    return {"broken": WaitsForTheDevice}
