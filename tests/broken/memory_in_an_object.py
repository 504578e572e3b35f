"""It remembers in an object of its own, which a killed training loses."""

import torch

from agl_bench import Selector, hookimpl


class Memory:
    """How many batches there were."""

    batches = 0


class MemoryInAnObject(Selector):
    """It remembers in an object of its own, which a killed training loses."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.memory = Memory()

    def observe(self, losses, step):
        self.memory.batches += 1

    def forward(self, losses, step):
        return self.weighted_mean(losses, torch.full_like(losses, 1 / (1 + self.memory.batches)))


@hookimpl
def register_selectors():
    return {"broken": MemoryInAnObject}
