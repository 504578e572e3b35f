"""Every spot of a batch a hundred times."""

from agl_bench import Selector, hookimpl


class HundredCopies(Selector):
    """Every spot of a batch a hundred times."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary].mean() + 0 * step.prediction.repeat(100, 1).square().mean()


@hookimpl
def register_selectors():
    return {"broken": HundredCopies}
