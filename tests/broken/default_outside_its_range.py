"""A default that its own range does not allow."""

from typing import Annotated

from agl_bench import Range, Selector, hookimpl


class DefaultOutsideItsRange(Selector):
    """A default that its own range does not allow."""

    reference = "a broken plug-in"

    def __init__(self, view, *, k: Annotated[int, Range(1, 10)] = 11):
        super().__init__(view)

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": DefaultOutsideItsRange}
