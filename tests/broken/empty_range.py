"""A range with nothing in it to tune."""

from typing import Annotated

from agl_bench import Range, Selector, hookimpl


class EmptyRange(Selector):
    """A range with nothing in it to tune."""

    reference = "a broken plug-in"

    def __init__(self, view, *, k: Annotated[int, Range(5, 5)] = 5):
        super().__init__(view)

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": EmptyRange}
