"""It leaves the first primary gene out."""

import torch

from agl_bench import Selector, hookimpl


class ForgetsAPrimaryGene(Selector):
    """It leaves the first primary gene out."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.first = int(view.genes.score.where(view.genes.primary, -torch.inf).argmax())

    def forward(self, losses, step):
        return losses[self.is_primary].sum() - losses[self.first]


@hookimpl
def register_selectors():
    return {"broken": ForgetsAPrimaryGene}
