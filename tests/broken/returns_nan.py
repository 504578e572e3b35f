"""Zero over zero."""

from agl_bench import Selector, hookimpl


class ReturnsNan(Selector):
    """Zero over zero."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary].mean() * 0 / 0


@hookimpl
def register_selectors():
    return {"broken": ReturnsNan}
