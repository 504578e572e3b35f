"""Nothing for `agl-bench list` to show."""

from agl_bench import Selector, hookimpl


class NoDocstring(Selector):
    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": NoDocstring}
