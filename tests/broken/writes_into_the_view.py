"""It centres the expression that all selectors share."""

from agl_bench import Selector, hookimpl


class WritesIntoTheView(Selector):
    """It centres the expression that all selectors share."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        view.expression.sub_(view.expression.mean(0))

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": WritesIntoTheView}
