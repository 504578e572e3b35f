"""Its range promises a temperature of 0."""

from typing import Annotated

from agl_bench import Range, Selector, hookimpl


class FailsAtTheEndOfARange(Selector):
    """Its range promises a temperature of 0."""

    reference = "a broken plug-in"

    def __init__(self, view, *, temperature: Annotated[float, Range(0, 1)] = 0.1):
        super().__init__(view)
        self.register_buffer("weights", (-view.genes.relative_rank(view.dtype) / temperature).exp())

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": FailsAtTheEndOfARange}
