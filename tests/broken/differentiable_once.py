"""It has no second derivative and does not say so."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from agl_bench import Backbone, hookimpl


class Once(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return cotangent.clone()


class DifferentiableOnce(Backbone):
    """It has no second derivative and does not say so."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return Once.apply(torch.tanh(self.mix(spots.patches.mean((2, 3)))))


@hookimpl
def register_backbones():
    return {"broken": DifferentiableOnce}
