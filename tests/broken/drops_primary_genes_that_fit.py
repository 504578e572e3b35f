"""No weight for what is predicted well."""

import torch

from agl_bench import Selector, hookimpl


class DropsPrimaryGenesThatFit(Selector):
    """No weight for what is predicted well."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return torch.where(losses.detach() > 0.05, losses, 0 * losses).mean()


@hookimpl
def register_selectors():
    return {"broken": DropsPrimaryGenesThatFit}
