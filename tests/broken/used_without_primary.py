"""It says that it does not use the primary genes."""

from agl_bench import Selector, hookimpl


class UsedWithoutPrimary(Selector):
    """It says that it does not use the primary genes."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.used = ~view.genes.primary

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": UsedWithoutPrimary}
