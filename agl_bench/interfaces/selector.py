"""The door for auxiliary selectors: turn one loss per gene into the one loss that is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from agl_bench.interfaces.genes import GeneSplit
from agl_bench.maths.hypergradient import Hypergradient, Unrolled


class TrainingView:
    """All that a selector may know before training: leak-free by construction.

    Args:
        genes: the gene axis, with primary genes and ranks.
        expression: (spots, genes) of the training spots, or how to make it where the device holds a sparse matrix.
        generator: the selector's own randomness; the only one it may use.
        detach_weight_sum: the protocol's choice for `Selector.weighted_mean`.
        truth: (genes,) what each gene is worth on planted data, for selectors that say `is_control`; None for all
            others, and where nobody knows.
    """

    def __init__(
        self,
        genes: GeneSplit,
        expression: Tensor | Callable[[], Tensor],
        generator: torch.Generator,
        detach_weight_sum: bool = False,
        truth: Tensor | None = None,
    ) -> None:
        self.genes, self.generator, self.detach_weight_sum, self.truth = genes, generator, detach_weight_sum, truth
        self._expression = expression

    @cached_property
    def expression(self) -> Tensor:
        """(spots, genes) of the training spots, normalised as the protocol says. Not to be changed."""
        return self._expression if isinstance(self._expression, Tensor) else self._expression()

    @property
    def dtype(self) -> torch.dtype:
        """Of expression and losses; asking for it makes no dense copy."""
        return self._expression.dtype if isinstance(self._expression, Tensor) else torch.float32


@dataclass(frozen=True)
class Step:
    """What one forward pass of the model produced.

    Attributes:
        features: (spots, width).
        prediction: (spots, genes), or (spots, used genes) where the selector names the genes it uses.
        target: like the prediction.
        row: (spots,) int64, rows in the store of training spots.
        epoch: counts from 0.
    """

    features: Tensor
    prediction: Tensor
    target: Tensor
    row: Tensor
    epoch: int


class Selector(nn.Module):
    """Turns one loss per gene into the one loss that is trained on.

    Write `forward`; everything else is data. Parameters registered in `__init__` are learnt: from the held-out spots
    through `hypergradient` where `learns_from` is "validation", together with the model where it is "training".
    Settings are keyword-only arguments of `__init__` with their range in the annotation (`agl_bench.LogRange`).

    Rules of the door, checked by `agl-bench check NAME`: the result is a finite scalar on the graph; its slope is
    positive on every primary gene; `forward` changes no state (it also runs inside look-aheads); random numbers come
    from `view.generator` alone; the order of the genes does not matter; 0 and 1 auxiliary genes work.

    Attributes:
        learns_from: where parameters learn, if there are any.
        learning_rate: of those parameters, Adam.
        hypergradient: how their gradient is obtained where they learn from validation.
        used: (genes,) bool, the genes whose loss can ever get a weight, primary ones included; None = all. The others
            are not computed at all: their losses are 0 and their outputs stay as they began. A plain attribute or a
            property, no buffer.
        reference: the publication or idea that this selector implements.
        generator: `view.generator`; its state is part of a checkpoint.
        is_control: whether it is no method but a bound for methods, and may know the truth of planted data. Tables
            mark it.
        needs_gpu: whether it is of use on a CUDA device only.
        needs_second_order: whether `forward` or `observe` differentiates twice. A selector that learns from validation
            needs second derivatives anyway, unless its hypergradient is `FiniteDifference`.
        needs_counts: whether it reads raw counts.
        max_genes: the most genes, primary ones included, that it can do with; None = any number.

    Cells that cannot run for the sake of these four are skipped, and every table says why. They are read from the
    class, literals in its body, since `agl-bench list` imports nothing.
    """

    learns_from: Literal["training", "validation"] = "validation"
    learning_rate: float = 3e-3
    hypergradient: Hypergradient = Unrolled(1)
    reference: str = ""
    is_control: bool = False
    needs_gpu: bool = False
    needs_second_order: bool = False
    needs_counts: bool = False
    max_genes: int | None = None
    used: Tensor | None = None

    is_primary: Tensor

    def __init__(self, view: TrainingView) -> None:
        super().__init__()
        self.genes, self.generator = view.genes, view.generator
        self.detach_weight_sum = view.detach_weight_sum
        self.register_buffer("is_primary", view.genes.primary, persistent=False)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """The loss to train on.

        Args:
            losses: (genes,) one loss per gene of the batch.
            step: what the forward pass produced.

        Returns:
            () a finite scalar.
        """
        raise NotImplementedError

    def weighted_mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Σ w·l / Σ w with the weight of every primary gene fixed at 1.

        The single home of the choice whether Σw is a constant for differentiation (`protocol.detach_weight_sum`, as
        in the authors' released code) or not.

        Args:
            losses: (genes,).
            weights: (genes,) ≥ 0; entries of primary genes are ignored.
        """
        weights = torch.where(self.is_primary, torch.ones_like(weights), weights)
        total = weights.sum()
        return (weights * losses).sum() / (total.detach() if self.detach_weight_sum else total)
