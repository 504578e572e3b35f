"""A loss that nothing can be learnt from."""

from agl_bench import Selector, hookimpl


class OffTheGraph(Selector):
    """A loss that nothing can be learnt from."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary].mean().detach()


@hookimpl
def register_selectors():
    return {"broken": OffTheGraph}
