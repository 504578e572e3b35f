"""AuxiLearn: a small network makes one loss of all, learnt by implicit differentiation.

Source: Navon, Achituve, Maron, Chechik and Fetaya, ICLR 2021:

    J = mean primary loss + g(l),   g(l) = v · softplus(W l + b),   W, v ≥ 0   (`form = linear`: g(l) = v · l)

so that the slope of every gene is positive, and that of a gene depends on the losses of all. W, v and b follow the
implicit gradient of the primary loss on held-out spots: −∂/∂φ ⟨∇J, u⟩ with u ≈ (∇²J)⁻¹ ∇E by a Neumann series.

How it differs from the source:
- All genes enter g, primary ones too, and `hidden` is 8; there 3, and 64 in the code of Shiku et al. The primary loss
  stands beside a linear g as well, as in some of the source's experiments (`skip_connection`).
- W and v are softplus of what is learnt, where the source clips them at 0; there is no weight normalisation.
- Sums over genes and hidden units are means, and the primary losses are divided by the number of genes (`scaling`):
  a gene counts beside a primary one as much as a task does in the source, which has three. With their sums over 15,000
  genes and U(0, 1) weights the softplus is a straight line, the primary term vanishes beside g, and J is `agl` with
  random weights; so it is in the code of Shiku et al., AAAI 2026. `scaling = sum` restores it.
- `terms` of the series: 1, where the source takes 3. Each costs two training steps, and an outer step is due for every
  batch here, not once in 50.
- Adam instead of SGD (momentum 0.9, decay 1e-4, clipped at 25), told the gradient times the number of genes: else its ε
  would outweigh what is spread over so many. The series is scaled by `scale`, which the source leaves out in front.
- Held-out batches are drawn anew; the AGL authors take the first four of the validation set, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Optimizer

from agl_bench import Implicit, LogRange, Range, Selector, Step, TrainingView


class AuxiLearn(Selector):
    """A monotone network on the losses of all genes, beside the mean of the primary ones."""

    reference = "Navon et al., ICLR 2021"

    def __init__(
        self,
        view: TrainingView,
        *,
        form: Literal["nonlinear", "linear"] = "nonlinear",
        hidden: Annotated[int, Range(1, 256)] = 8,
        scaling: Literal["mean", "sum"] = "mean",
        learning_rate: Annotated[float, LogRange(1e-4, 1.0)] = 1e-2,
        terms: Annotated[int, Range(0, 20)] = 1,
        scale: Annotated[float, LogRange(1e-6, 10)] = 0.1,
        reach: Literal["late", "all"] = "late",
    ) -> None:
        super().__init__(view)
        self.form, self.scaling, self.learning_rate = form, scaling, learning_rate
        self.hypergradient = Implicit(terms, scale=scale, reach=reach)
        genes, dtype = len(view.genes.names), view.dtype
        if form == "linear":
            self.output = nn.Parameter(_before_softplus(torch.ones(genes, dtype=dtype)))
            return
        # Drawn in the order of the names: the same network whatever order the columns have.
        by_name = torch.tensor(sorted(range(genes), key=view.genes.names.__getitem__))
        drawn = torch.rand(hidden, genes + 1, generator=view.generator, dtype=dtype).clamp(min=1e-3)
        first = torch.empty(hidden, genes, dtype=dtype)
        first[:, by_name] = drawn[:, 1:]
        self.input = nn.Parameter(_before_softplus(first))
        self.bias = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.output = nn.Parameter(_before_softplus(drawn[:, 0].contiguous()))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """The primary losses, and the network's one."""
        divisor = self.genes.primary_count if self.scaling == "sum" else len(losses)
        primary = torch.where(self.is_primary, losses, 0).sum() / divisor
        if self.form == "nonlinear":
            losses = softplus(self._pooled(self.input, losses) + self.bias)
        return primary + self._pooled(self.output, losses)

    def _pooled(self, raw: Tensor, values: Tensor) -> Tensor:
        """Sum or mean of the last axis, with weights ≥ 0."""
        return softplus(raw) @ values / (1 if self.scaling == "sum" else len(values))

    def learn(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """A step of Adam on the gradients times the number of genes."""
        super().learn({n: g * len(self.genes.names) for n, g in gradients.items()}, optimizer)


def _before_softplus(values: Tensor) -> Tensor:
    """What softplus makes the values of."""
    return torch.log(torch.expm1(values))
