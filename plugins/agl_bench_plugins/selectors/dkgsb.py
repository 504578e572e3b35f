"""Differentiable top-k gene selection by bi-level optimisation.

Source: Shiku et al., AAAI 2026, Eq. 6 and Algorithm 1. Auxiliary genes are ranked by variability; one learnable
cut-off t decides how long a prefix of the ranking takes part:

    w_j = σ((t − ρ_j) / τ),   ρ_j = rank_j / (auxiliary − 1),   w_j = 1 for primary genes

t follows the gradient of the primary loss on held-out spots after a look-ahead of `steps` inner steps.

Differences from the paper and its released code, chosen by the experiment in benchmarks/hypergradient.md:
- The look-ahead carries on Adam's moments from training instead of starting from none, moves the last stage of the
  backbone and the head alone (`reach`), and takes a new group of batches for each step (`batches`). The hypergradient
  of the authors' look-ahead (fresh Adam steps of the whole network on one batch) is mostly noise.
- One outer step is therefore worth a larger learning rate than theirs.
- t = σ(4 (u − ½)) with u learnt. The slope is 1 at the start t = ½ and t cannot leave (0, 1), where the authors' free t
  gets no gradient any more. `bounded = false` restores the free t.
- The ranking may be another prior than variability (`prior`, `prior_file`).
- There is no division of the inner loss by a left-over 64 (`protocol.inner_divisor`).
The presets `paper_v1`, `paper_v2` and `paper_v3` undo all of it, each with one of the authors' three schedules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import SGD, Adam, LogRange, Range, Selector, Step, TrainingView, Unrolled
from agl_bench_plugins.selectors.priors import Prior, ranked


class Dkgsb(Selector):
    """A prefix of the variability ranking whose length is learnt on held-out spots."""

    reference = "Shiku et al., AAAI 2026 (DkGSB)"
    rho: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        temperature: Annotated[float, LogRange(1e-3, 1e-1)] = 0.01,
        start: Annotated[float, Range(0.01, 0.99)] = 0.5,
        bounded: bool = True,
        learning_rate: Annotated[float, LogRange(1e-4, 1.0)] = 0.1,
        steps: Annotated[int, Range(1, 12)] = 3,
        inner: Literal["adam", "adam_higher", "sgd"] = "adam",
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
        carried: bool = True,
        reach: Literal["late", "all"] = "late",
        batches: Literal["new", "same"] = "new",
        prior: Prior = "protocol",
        prior_file: str = "",
    ) -> None:
        super().__init__(view)
        self.temperature, self.bounded, self.learning_rate = temperature, bounded, learning_rate
        # Adam goes at the model's rate; `inner_rate` is that of SGD.
        rule = SGD(inner_rate) if inner == "sgd" else Adam(corrected=inner == "adam", carried=carried)
        self.hypergradient = Unrolled(steps, rule, reach=reach, batches=batches)
        dtype = view.dtype
        genes = replace(view.genes, rank=ranked(view, prior, prior_file))
        self.register_buffer("rho", genes.relative_rank(dtype))
        begin = torch.tensor(start, dtype=dtype)
        self.cutoff = nn.Parameter(0.5 + torch.logit(begin) / 4 if bounded else begin)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean with a soft step at the cut-off."""
        t = torch.sigmoid(4 * (self.cutoff - 0.5)) if self.bounded else self.cutoff
        return self.weighted_mean(losses, torch.sigmoid((t - self.rho) / self.temperature))
