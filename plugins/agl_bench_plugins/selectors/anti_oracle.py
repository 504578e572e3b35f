"""The harmful genes and nothing else; for planted data, where somebody knows them.

Source: own design, a control, the mirror of `oracle`: no method, but a bound for methods from below. A method that ends
here takes genes by what they are worth, and takes the wrong ones.
"""

from __future__ import annotations

from torch import Tensor

from agl_bench import BadSpec, Selector, Step, TrainingView


class AntiOracle(Selector):
    """Every auxiliary gene that is known to harm: the floor for planted data."""

    reference = "agl-bench"
    is_control = True
    mask: Tensor

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        if view.truth is None:
            raise BadSpec(
                "the anti-oracle must know which genes harm, and of this dataset nobody does; "
                "use it on planted data, e.g. --datasets synthetic"
            )
        self.register_buffer("mask", ((view.truth < 0) & ~view.genes.primary).to(view.dtype))

    @property
    def used(self) -> Tensor:
        """The primary genes and the harmful ones; of the mask, which a saved state brings along."""
        return (self.mask > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the harmful ones."""
        return self.weighted_mean(losses, self.mask)
