"""The correlation of every gene with every other one."""

from agl_bench import Selector, hookimpl


class GenesByGenes(Selector):
    """The correlation of every gene with every other one."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        centred = view.expression - view.expression.mean(0)
        unit = centred / centred.norm(dim=0).clamp(min=1e-12)
        self.register_buffer("weights", (unit.T @ unit).abs().mean(0))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": GenesByGenes}
