"""Its weights are a plain attribute, which no device gets."""

import torch

from agl_bench import Selector, hookimpl


class PlainTensor(Selector):
    """Its weights are a plain attribute, which no device gets."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.weights = torch.full((len(view.genes.names),), 0.5)

    def forward(self, losses, step):
        return (torch.where(self.is_primary, 1.0, self.weights) @ losses) / len(losses)


@hookimpl
def register_selectors():
    return {"broken": PlainTensor}
