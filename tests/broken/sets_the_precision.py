"""Changes how everybody multiplies."""

import torch

from agl_bench import Selector, hookimpl


class SetsThePrecision(Selector):
    """Changes how everybody multiplies."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        torch.set_float32_matmul_precision("medium")

    def forward(self, losses, step):
        return losses.mean()


@hookimpl
def register_selectors():
    return {"broken": SetsThePrecision}
