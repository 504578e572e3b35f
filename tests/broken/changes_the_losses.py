"""It scales the losses of everybody."""

from agl_bench import Selector, hookimpl


class ChangesTheLosses(Selector):
    """It scales the losses of everybody."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        losses.detach().mul_(0.5)
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": ChangesTheLosses}
