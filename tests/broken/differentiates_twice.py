"""It differentiates through a gradient and does not say so."""

import torch

from agl_bench import Selector, hookimpl


class DifferentiatesTwice(Selector):
    """It differentiates through a gradient and does not say so."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        primary = losses[self.is_primary].mean()
        pulls = torch.autograd.grad(primary, step.shared, create_graph=True)
        return primary + 1e-3 * sum(pull.square().sum() for pull in pulls)


@hookimpl
def register_selectors():
    return {"broken": DifferentiatesTwice}
