"""Adaptive mixing of auxiliary losses as published: one weight for each training spot.

Source: Sivasubramanian, Maheshwari, Prathosh, Shenoy and Ramakrishnan, AAAI 2023 (AMAL): the auxiliary loss of training
sample i counts w_i, which follows the gradient of the primary loss on held-out spots after one SGD step of the last
layer, and is clipped: w ← clip(w − η g, 0, 2). For one weight for each gene, as Shiku et al., AAAI 2026 have it, see
`amal`.

A correlation over a batch has no loss for a single spot. What a spot does have is the gradient that it sends through
the auxiliary genes, and that is what w_i scales:

    ∇J = (Σ_primary ∇L_j + Σ_i w_i Σ_auxiliary (∂L_j / ∂p_ij) ∇p_ij) / genes

For a loss that is a mean over spots this is AMAL. With w = 1 it is `agl`, and the weights of genes are those of `agl`
always: what the tables count as selected are genes, so all.

A correlation sees neither the level nor the scale of a gene's predictions over the batch: its slopes along both sum to
zero. Unequal weights would let the predictions drift along them without end, so that part of the weighted slope which
goes along what the loss of a gene does not see is taken out. A loss that sees both, such as a squared error, loses
nothing.

How it differs from the source:
- One weight for each spot, from 1, for all auxiliary genes together; the primary genes have no weight. There each
  (sample, loss) has one, from 0.9 for the auxiliary losses and 0.1 for the primary one, so that it moves too.
- The step reaches the last stage and the head (`reach`), at a rate of its own; there the last layer, at the model's.
- Outer steps as the protocol schedules them: `protocol.outer_every = 10` is theirs. There five repeats follow each
  other on the same batch, the weights moved between them.
- η is 1500, as theirs, but for means over genes and spots, where theirs are sums over samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agl_bench import LogRange, OneStep, Range, Selector, Step, TrainingView

UNSEEN = 1e-3  # of the length of the slopes: what rounding leaves of them along what the loss does not see


class AmalSpot(Selector):
    """One learnt weight in [0, 2] for each training spot, on what it sends through the auxiliary genes."""

    reference = "Sivasubramanian et al., AAAI 2023"

    def __init__(
        self,
        view: TrainingView,
        *,
        start: Annotated[float, Range(0, 2)] = 1.0,
        outer_rate: Annotated[float, LogRange(1e-2, 1e5)] = 1500.0,
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
    ) -> None:
        super().__init__(view)
        self.outer_rate = outer_rate
        # The gradient of a spot is asked of the graph of its batch, which a forward derivative does not have.
        self.hypergradient = OneStep(inner_rate, reach, mode="double backward")
        self.weights = nn.Parameter(torch.full((view.spot_count,), start, dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean of all losses; the slope of its auxiliary part is weighted by spots."""
        sent = seen_part(step.slopes(losses), step.prediction, ~self.is_primary)
        surplus = ((self.weights[step.row] - 1) @ sent) / len(losses)
        return losses.mean() + (surplus - surplus.detach())

    def learn(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """w ← clip(w − η g, 0, 2)."""
        self.weights.sub_(gradients["weights"], alpha=self.outer_rate).clamp_(0, 2)


def seen_part(slopes: Tensor, prediction: Tensor, is_auxiliary: Tensor) -> Tensor:
    """What each spot sends through the auxiliary genes, (spots,): Σ_j slope_ij p_ij, the slopes constants.

    Of p, level and scale over the spots are taken out where the loss of a gene sees neither. Three products of size
    (spots, genes), and none for the weights.

    Args:
        slopes: (spots, genes), of the losses at the prediction.
        prediction: (spots, genes), on its graph.
        is_auxiliary: (genes,) bool.
    """
    values = prediction.detach()
    centred = values - values.mean(0)
    squares, along = centred.square().sum(0), slopes * centred
    size = slopes.square().sum(0).sqrt() * UNSEEN
    counts = is_auxiliary.to(slopes.dtype)
    blind_to_level = counts * (slopes.sum(0).abs() <= size * len(slopes) ** 0.5)
    blind_to_scale = counts * (along.sum(0).abs() <= size * squares.sqrt())
    scale = (centred * prediction).sum(0) / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return (
        (slopes * prediction) @ counts
        - slopes @ (blind_to_level * prediction.mean(0))
        - along @ (blind_to_scale * scale)
    )
