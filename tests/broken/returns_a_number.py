"""A number, whose graph is gone."""

from agl_bench import Selector, hookimpl


class ReturnsANumber(Selector):
    """A number, whose graph is gone."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return float(losses[self.is_primary].mean())


@hookimpl
def register_selectors():
    return {"broken": ReturnsANumber}
