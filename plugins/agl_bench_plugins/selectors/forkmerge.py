"""Models trained with and without blocks of auxiliary genes, mixed as held-out spots like it best. On gene blocks.

Source: Jiang, Chen, Pan, Wang, Liu, Jiang, Long, NeurIPS 2023 (ForkMerge). From time to time the model forks: branch b
trains with a set of auxiliary tasks of its own, branch 0 with none. Then the branches merge, θ = Σ_b Λ_b θ_b / Σ_b Λ_b.
The best branch has Λ = 1; the others, best first, get

    Λ_i = a · (Λ_1 + … + Λ_{i−1}) / (i − 1),   a of {0, 0.2, 0.4, 0.6, 0.8, 1} with the best merged model

and all go on from the merged model.

How it differs from the source:
- On gene blocks: branch b has the primary genes and the first b blocks of the auxiliary ranking (`branches = prefixes`,
  as the source takes its best auxiliary tasks one after the other), or block b alone (`blocks`), see blocks.py. The
  source ranks tasks by a training with each; here the protocol's ranking stands for that.
- Each branch takes `steps` steps, with Adam's moments carried on, where the source trains for some epochs; and the
  losses of held-out spots decide, not their scores. So near θ these are almost linear in Λ: mostly one branch wins.
- Λ / ΣΛ is therefore a running mean over forks (`fading = 0`: that of the last one alone). It begins equal for all.
- The merged model is not kept: its Λ are, for the training that follows, on Σ_b Λ_b J_b / Σ_b Λ_b with J_b the loss of
  branch b. That is merged training to first order in the learning rate: after one SGD step from θ,
  Σ_b Λ_b (θ − η ∇J_b) / Σ_b Λ_b = θ − η ∇(Σ_b Λ_b J_b / Σ_b Λ_b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import Adam, Hypergradient, LogRange, Problem, Range, Rule, Step, TrainingView
from agl_bench_plugins.selectors.blocks import BlockSelector

GRID = (0.2, 0.4, 0.6, 0.8, 1.0)  # and 0, which leaves the merged model as it is


@dataclass(frozen=True)
class Fork(Hypergradient):
    """No gradient: in its place the Λ (branches,) that mix the branches best, for a selector with an own `learn`."""

    rule: Rule
    steps: int = 3
    reach: Literal["late", "all"] = "late"
    batches: Literal["same", "new"] = "new"

    def solve(self, problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        """E of the merged model, and Λ under the name of the only tensor of φ."""
        ((name, mixing),) = problem.hyper.items()
        single = torch.eye(len(mixing), dtype=mixing.dtype, device=mixing.device)
        branches = [problem.after({name: row}, self.rule, self.steps) for row in single]
        stacked = {n: torch.stack([branch[n] for branch in branches]) for n in problem.parameters}

        def merged(weights: Tensor) -> Tensor:
            return problem.outer({n: torch.tensordot(weights / weights.sum(), t, 1) for n, t in stacked.items()})

        alone = torch.stack([merged(row) for row in single])
        first, *others = alone.argsort(stable=True).tolist()
        best, least = single[first], alone[first]
        for rank, branch in enumerate(others, start=1):
            tried = torch.stack([best, *(best + a * best.sum() / rank * single[branch] for a in GRID)])
            errors = torch.stack([least, *map(merged, tried[1:])])
            choice = errors.argmin()
            best, least = tried[choice], errors[choice]
        return least, {name: best}


class ForkMerge(BlockSelector):
    """Gene blocks, not genes: a mixture of trainings with more and more blocks of auxiliary genes."""

    reference = "Jiang et al., NeurIPS 2023 (ForkMerge), on gene blocks"
    plan: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        blocks: Annotated[int, LogRange(1, 32)] = 4,
        branches: Literal["prefixes", "blocks"] = "prefixes",
        steps: Annotated[int, Range(1, 12)] = 3,
        reach: Literal["late", "all"] = "late",
        fading: Annotated[float, Range(0, 0.99)] = 0.9,
    ) -> None:
        super().__init__(view, blocks)
        self.fading = fading
        self.hypergradient = Fork(Adam(carried=True), steps, reach)
        tasks = len(self.members)
        takes = torch.eye(tasks, dtype=view.dtype)
        if branches == "prefixes":
            takes = torch.ones_like(takes).tril()
        takes[:, 0] = 1  # every branch has the primary genes
        # The weight of a gene of each task in the mean of each branch, (branches, tasks).
        plan = takes / (takes @ self.is_member.sum(1).to(view.dtype))[:, None]
        self.register_buffer("plan", plan, persistent=False)
        self.mixing = nn.Parameter(torch.full((tasks,), 1 / tasks, dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Σ_b Λ_b J_b / Σ_b Λ_b."""
        weights = self.mixing @ self.plan / self.mixing.sum()
        return (weights[self.task] * losses).sum()

    def learn(self, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Take the mixing weights over; the optimiser is not asked."""
        found = gradients["mixing"]
        self.mixing.lerp_(found / found.sum(), 1 - self.fading)
