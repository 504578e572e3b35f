"""A reference that was left for later."""

from agl_bench import Selector, hookimpl


class UnfinishedMetadata(Selector):
    """A reference that was left for later."""

    reference = "TODO: name the paper"

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": UnfinishedMetadata}
