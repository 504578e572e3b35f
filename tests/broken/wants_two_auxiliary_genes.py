"""It compares with the second auxiliary gene."""

from agl_bench import Selector, hookimpl


class WantsTwoAuxiliaryGenes(Selector):
    """It compares with the second auxiliary gene."""

    reference = "a broken plug-in"

    def forward(self, losses, step):
        return losses[self.is_primary].mean() + 0 * losses[self.genes.rank == 1][0]


@hookimpl
def register_selectors():
    return {"broken": WantsTwoAuxiliaryGenes}
