"""A learning rate that is none."""

from agl_bench import Selector, hookimpl


class LearningRateInWords(Selector):
    """A learning rate that is none."""

    reference = "a broken plug-in"

    learning_rate = "fast"

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": LearningRateInWords}
