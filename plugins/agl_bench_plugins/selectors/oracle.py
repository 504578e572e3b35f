"""What a selector could reach that knew which genes help; for planted data, where somebody does.

Source: own design, a control: no method, but a bound for methods. Not the best selection that there could be: it takes
each gene for what it is worth alone, all helpful ones with the weight of a primary gene.
"""

from __future__ import annotations

from torch import Tensor

from agl_bench import BadSpec, Selector, Step, TrainingView


class Oracle(Selector):
    """Every auxiliary gene that is known to help: the bound for planted data."""

    reference = "agl-bench"
    is_control = True
    mask: Tensor

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        if view.truth is None:
            raise BadSpec(
                "the oracle must know which genes help, and of this dataset nobody does; "
                "use it on planted data, e.g. --datasets synthetic"
            )
        self.register_buffer("mask", ((view.truth > 0) & ~view.genes.primary).to(view.dtype))

    @property
    def used(self) -> Tensor:
        """The primary genes and the helpful ones; of the mask, which a saved state brings along."""
        return (self.mask > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the helpful ones."""
        return self.weighted_mean(losses, self.mask)
