"""What it has drawn is in no state."""

import torch

from agl_bench import Selector, hookimpl


class StateThatIsNotSaved(Selector):
    """What it has drawn is in no state."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        drawn = torch.rand(view.genes.auxiliary_count + 1, generator=view.generator, dtype=view.dtype)
        self.register_buffer("weights", drawn[view.genes.rank], persistent=False)

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": StateThatIsNotSaved}
