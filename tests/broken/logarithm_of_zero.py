"""A logarithmic range that begins at 0."""

from typing import Annotated

from agl_bench import LogRange, Selector, hookimpl


class LogarithmOfZero(Selector):
    """A logarithmic range that begins at 0."""

    reference = "a broken plug-in"

    def __init__(self, view, *, rate: Annotated[float, LogRange(0, 1)] = 0.1):
        super().__init__(view)

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": LogarithmOfZero}
