"""It gives weight to genes that it says it does not use."""

from agl_bench import Selector, hookimpl


class WeighsUnusedGenes(Selector):
    """It gives weight to genes that it says it does not use."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.used = view.genes.primary

    def forward(self, losses, step):
        return losses.mean()


@hookimpl
def register_selectors():
    return {"broken": WeighsUnusedGenes}
