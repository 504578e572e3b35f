"""One loss for each primary gene."""

from agl_bench import Selector, hookimpl


class ReturnsAVector(Selector):
    """One loss for each primary gene."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary]


@hookimpl
def register_selectors():
    return {"broken": ReturnsAVector}
