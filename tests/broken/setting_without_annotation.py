"""A setting that nobody can parse."""

from agl_bench import Selector, hookimpl


class SettingWithoutAnnotation(Selector):
    """A setting that nobody can parse."""

    reference = "a broken plug-in"

    def __init__(self, view, *, k=3):
        super().__init__(view)

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": SettingWithoutAnnotation}
