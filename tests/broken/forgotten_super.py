"""The constructor does not call that of `Selector`."""

from agl_bench import Selector, hookimpl


class ForgottenSuper(Selector):
    """The constructor does not call that of `Selector`."""

    reference = "a broken plug-in"

    def __init__(self, view):
        self.temperature = 0.1

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": ForgottenSuper}
