"""A backward pass for each gene."""

import torch

from agl_bench import Selector, hookimpl


class LoopsOverGenes(Selector):
    """A backward pass for each gene."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        norms = [torch.autograd.grad(loss, step.features, retain_graph=True)[0].norm() for loss in losses]
        return self.weighted_mean(losses, torch.stack(norms).sigmoid())


@hookimpl
def register_selectors():
    return {"broken": LoopsOverGenes}
