"""It takes k genes whether there are k or not."""

from typing import Annotated

import torch

from agl_bench import LogRange, Selector, hookimpl


class TakesMoreGenesThanThereAre(Selector):
    """It takes k genes whether there are k or not."""

    reference = "a broken plug-in"

    def __init__(self, view, *, k: Annotated[int, LogRange(1, 50_000)] = 10):
        super().__init__(view)
        first = view.genes.score.topk(k if k > 10 else min(k, view.genes.auxiliary_count)).indices
        mask = torch.zeros(len(view.genes.names), dtype=view.dtype).index_fill(0, first, 1)
        self.register_buffer("mask", mask)

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.mask)


@hookimpl
def register_selectors():
    return {"broken": TakesMoreGenesThanThereAre}
