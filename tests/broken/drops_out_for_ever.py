"""Its dropout does not end with training."""

from torch import nn

from agl_bench import Backbone, hookimpl


class DropsOutForEver(Backbone):
    """Its dropout does not end with training."""

    reference = "a broken plug-in"
    width, patch_px = 4, 16

    def __init__(self, example):
        super().__init__(example)
        self.mix = nn.Linear(3, self.width)

    def forward(self, spots):
        return nn.functional.dropout(self.mix(spots.patches.mean((2, 3))), 0.5, training=True)


@hookimpl
def register_backbones():
    return {"broken": DropsOutForEver}
