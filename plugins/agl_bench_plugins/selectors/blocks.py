"""Gene blocks: what methods that cost a gradient or a model for each task use as tasks. No selector.

At 15,000 genes such methods cannot have a task for each gene. Their tasks here are the primary genes and equal-sized
consecutive pieces of the auxiliary ranking; a task's loss is the sum of those of its genes, so that tasks of equal
weight are plain `agl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agl_bench import Selector, Step, TrainingView


class BlockSelector(Selector):
    """A selector of tasks: 0 = the primary genes, 1, 2, … = blocks of auxiliary genes, the most variable first.

    Where there are fewer auxiliary genes than blocks, each is one.

    Attributes:
        task: (genes,) int64.
        members: (tasks, most genes of a task) int64, columns of its genes, filled up with 0.
        is_member: likewise bool, False where filled up.
    """

    task: Tensor
    members: Tensor
    is_member: Tensor

    def __init__(self, view: TrainingView, blocks: int) -> None:
        super().__init__(view)
        auxiliary = view.genes.auxiliary_count
        blocks = min(blocks, auxiliary)
        task = torch.where(view.genes.primary, 0, 1 + view.genes.rank * blocks // max(auxiliary, 1))
        # By rank within a task, so that sums run in the same order whatever the order of the columns.
        rows = [(task == t).nonzero().squeeze(1) for t in range(blocks + 1)]
        rows = [row[view.genes.rank[row].argsort(stable=True)] for row in rows]
        self.register_buffer("task", task, persistent=False)
        self.register_buffer("members", torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), persistent=False)
        lengths = torch.tensor([len(row) for row in rows])
        self.register_buffer("is_member", torch.arange(self.members.shape[1]) < lengths[:, None], persistent=False)

    def sums(self, losses: Tensor) -> Tensor:
        """The loss of each task, (tasks,)."""
        return torch.where(self.is_member, losses[self.members], 0).sum(1)

    def gradients(self, losses: Tensor, step: Step) -> Tensor:
        """Of each task's loss with respect to the features, (tasks, spots × width), detached.

        One batched product for all tasks: the gradient of a task is Σ_j ∂L_j/∂prediction_j ⊗ (row j of the head).
        """
        slopes = step.slopes(losses)
        assert step.head is not None, "where there is no head there are no slopes"
        head = torch.where(self.is_member[..., None], step.head.detach()[self.members], 0)
        return (slopes.T[self.members].transpose(1, 2) @ head).flatten(1)

    def mean_by_task(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Σ w·l / Σ w over genes, with the weights (tasks,) of their tasks, which are constants."""
        of_gene = weights[self.task]
        return (of_gene * losses).sum() / of_gene.sum()
