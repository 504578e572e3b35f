"""It asks for what no view has."""

from agl_bench import Selector, hookimpl


class RaisingConstructor(Selector):
    """It asks for what no view has."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.image = view.image

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": RaisingConstructor}
