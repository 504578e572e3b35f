"""It looks for the validation spots where it is called from."""

import sys

import torch

from agl_bench import Selector, hookimpl


class PeeksThroughFrames(Selector):
    """It looks for the validation spots where it is called from."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        frame, seen = sys._getframe(), step.target.new_zeros(1)
        while frame is not None:
            seen = getattr(frame.f_locals.get("self"), "validation_target", seen)
            frame = frame.f_back
        return self.weighted_mean(losses, torch.ones_like(losses) * seen.mean().abs().clamp(0.1, 1))


@hookimpl
def register_selectors():
    return {"broken": PeeksThroughFrames}
