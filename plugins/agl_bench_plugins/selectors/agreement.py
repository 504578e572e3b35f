"""How well the gradient of each gene agrees with that of the mean primary loss. No selector; `gradient_cosine` and
`ol_aux` weigh genes by it.

Gradients with respect to the features, (spots, width) for each gene, need no backward pass for each gene: the head is
linear, so that of gene j is the outer product of ∂L_j/∂prediction_j and the head's row j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agl_bench import Selector, Step


def dots(selector: Selector, losses: Tensor, step: Step, within: str) -> Tensor:
    """⟨∇L_j, ∇L_primary⟩, (genes,); `within` as in `Step.alignment`."""
    return step.alignment(losses, _primary_mean(selector, losses), within=within)


def cosines(selector: Selector, losses: Tensor, step: Step) -> Tensor:
    """cos(∇L_j, ∇L_primary) of the gradients with respect to the features, (genes,); 0 where one of them is zero."""
    products = dots(selector, losses, step, "features")
    # L_primary is a mean of losses, so that the square of its gradient is the mean of its products with theirs.
    square = _primary_mean(selector, products).clamp(min=0)
    sizes = step.norms(losses) * square.sqrt()
    return torch.where(sizes > 0, products / sizes, 0)


def _primary_mean(selector: Selector, values: Tensor) -> Tensor:
    """Not by a boolean index, which would wait for the device."""
    return torch.where(selector.is_primary, values, 0).sum() / selector.genes.primary_count
