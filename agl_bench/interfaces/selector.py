"""The door for auxiliary selectors: turn one loss per gene into the one loss that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from agl_bench.errors import BadPlugin, BadSpec, NoGradients
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.maths.hypergradient import Hypergradient, Unrolled

T = TypeVar("T")


class TrainingView:
    """All that a selector may know before training: leak-free by construction.

    Args:
        genes: the gene axis, with primary genes and ranks.
        expression: (spots, genes) of the training spots, or how to make it where the device holds a sparse matrix.
        generator: the selector's own randomness; the only one it may use.
        detach_weight_sum: the protocol's choice for `Selector.weighted_mean`.
        truth: (genes,) what each gene is worth on planted data, for selectors that say `is_control`; None for all
            others, and where nobody knows.
        position: (spots, 2) µm on the section; None in a view that has no tissue.
        section: (spots,) int64, index of the section; likewise.
        counts: how to make the raw counts, (spots, genes).
        scores: how to make a named score of each gene, (genes,) float64.
    """

    def __init__(
        self,
        genes: GeneSplit,
        expression: Tensor | Callable[[], Tensor],
        generator: torch.Generator,
        detach_weight_sum: bool = False,
        truth: Tensor | None = None,
        *,
        position: Tensor | None = None,
        section: Tensor | None = None,
        counts: Callable[[], Tensor] | None = None,
        scores: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.genes, self.generator, self.detach_weight_sum, self.truth = genes, generator, detach_weight_sum, truth
        self._expression, self._position, self._section = expression, position, section
        self._counts, self._scores = counts, scores

    @cached_property
    def expression(self) -> Tensor:
        """(spots, genes) of the training spots, normalised as the protocol says. Not to be changed."""
        return self._expression if isinstance(self._expression, Tensor) else self._expression()

    @property
    def dtype(self) -> torch.dtype:
        """Of expression and losses; asking for it makes no dense copy."""
        return self._expression.dtype if isinstance(self._expression, Tensor) else torch.float32

    @property
    def spot_count(self) -> int:
        """Number of training spots; asking for it makes no dense copy."""
        return len(self.expression if self._position is None else self._position)

    @property
    def position(self) -> Tensor:
        """(spots, 2) float32, µm on the section."""
        return _known(self._position, "positions")

    @property
    def section(self) -> Tensor:
        """(spots,) int64, index of the section."""
        return _known(self._section, "sections")

    @cached_property
    def counts(self) -> Tensor:
        """(spots, genes) float32, raw counts of the training spots; a dense copy, made when it is first asked for.

        Raises:
            BadPlugin: if the dataset has none; cells of a selector with `needs_counts` are skipped there.
        """
        if self._counts is None:
            raise BadPlugin("it asks for raw counts, and here are none; needs_counts = True has such cells skipped")
        return self._counts()

    def score_genes(self, name: str) -> Tensor:
        """A score of each gene over the training spots, (genes,) float64, NaN where it is not defined.

        Args:
            name: as of `protocol.ranking`: "pearson_residuals", "seurat", "cell_ranger", "seurat_v3", "moran", "mean"
                or "detection".
        """
        return _known(self._scores, "gene scores")(name).clone()  # all selectors of a fold share it


def _known(value: T | None, what: str) -> T:
    if value is None:
        raise BadSpec(f"this training view knows no {what}: its dataset has none, or it is no view of a run")
    return value


@dataclass(frozen=True)
class Step:
    """What one forward pass of the model produced.

    The methods give gradients of every gene's loss at once, detached and without a loop over genes.

    Attributes:
        features: (spots, width).
        prediction: (spots, genes), or (spots, used genes) where the selector names the genes it uses.
        target: like the prediction.
        row: (spots,) int64, in training and inner batches rows of the spots of `TrainingView`.
        epoch: counts from 0.
        head: (genes or used genes, width) weights of the linear head: prediction = features · headᵀ + bias. None where
            gradients are not to be had: where a batch is trained in parts.
        shared: the trained parameters of the backbone; in a look-ahead those that it moves.
        late: those of them that belong to its late part; all where it does not say what that is.
        columns: (used genes,) int64, the genes that are predicted; None = all.
    """

    features: Tensor
    prediction: Tensor
    target: Tensor
    row: Tensor
    epoch: int
    head: Tensor | None = None
    shared: tuple[Tensor, ...] = ()
    late: tuple[Tensor, ...] = ()
    columns: Tensor | None = None

    def slopes(self, losses: Tensor) -> Tensor:
        """∂L_j/∂p_ij of every spot i and gene j, like the prediction; the loss of a gene depends on its column alone.

        Args:
            losses: (genes,) of this step, on its graph.

        Raises:
            NoGradients: where they are not to be had.
        """
        self._head()
        (found,) = torch.autograd.grad(losses.sum(), self.prediction, retain_graph=True)
        return found

    def alignment(
        self, losses: Tensor, toward: Tensor, within: Literal["features", "late", "all"] = "features"
    ) -> Tensor:
        """⟨∇L_j, ∇toward⟩ of every gene j, (genes,).

        Args:
            losses: (genes,) of this step, on its graph.
            toward: () a loss on the graph of the prediction, e.g. the mean of the primary losses.
            within: gradients with respect to what. "features": products of matrices, since the head is linear.
                "late" and "all": the parameters of the backbone's late part, or all of them, by one double backward
                pass; the head has no part in it, genes share none of it. 0 where nothing is trained there.

        Raises:
            NoGradients: where they are not to be had.
        """
        if within == "features":
            head = self._head()
            (pull,) = torch.autograd.grad(toward, self.prediction, retain_graph=True)
            head = head.detach()
            # Σ_s D_sj ⟨head_j, v_s⟩, spots first: nothing of size (spots, genes) is made but the slopes D.
            return self._spread(((self.slopes(losses).T @ (pull @ head)) * head).sum(1), losses)
        self._head()
        shared = [p for p in (self.late if within == "late" else self.shared) if p.requires_grad]
        weights = torch.ones_like(losses, requires_grad=True)
        if not shared:
            return torch.zeros_like(weights).detach()
        along = torch.autograd.grad(toward, shared, retain_graph=True, allow_unused=True)
        taped = torch.autograd.grad((weights * losses).sum(), shared, create_graph=True, allow_unused=True)
        pairs = [(t, a) for t, a in zip(taped, along, strict=True) if t is not None and a is not None]
        if not pairs:
            return torch.zeros_like(weights).detach()
        ends, pulls = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(ends, weights, grad_outputs=pulls, retain_graph=True)
        return found

    def norms(self, losses: Tensor) -> Tensor:
        """‖∂L_j/∂features‖ of every gene j, (genes,): ‖∂L_j/∂p_j‖ · ‖head_j‖.

        Args:
            losses: (genes,) of this step, on its graph.

        Raises:
            NoGradients: where they are not to be had.
        """
        head = self._head()
        return self._spread(self.slopes(losses).norm(dim=0) * head.detach().norm(dim=1), losses)

    def _head(self) -> Tensor:
        if self.head is None or not self.prediction.requires_grad:
            raise NoGradients(
                "the gradients of single genes are not to be had where a batch is trained in parts, nor in a "
                "look-ahead that differentiates forward; there OneStep(mode='double backward') has them"
            )
        return self.head

    def _spread(self, found: Tensor, losses: Tensor) -> Tensor:
        """From the genes that are predicted to all of them, 0 for the others."""
        if self.columns is None:
            return found
        return torch.zeros(losses.shape, dtype=found.dtype, device=found.device).index_copy(0, self.columns, found)


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
        needs_counts: whether it asks for `view.counts`.
        max_genes: the most genes, primary ones included, that it can do with; None = any number.
        broken: rules of the door that it breaks on purpose, by name, each with the reason; `agl-bench check` shows them
            so, and complains where one of them is kept after all.

    Cells that cannot run for the sake of `needs_gpu`, `needs_second_order`, `needs_counts` or `max_genes` are skipped,
    and every table says why. They are read from the class, where they are literals: `agl-bench list` imports nothing.
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
    broken: ClassVar[Mapping[str, str]] = {}
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

    def observe(self, losses: Tensor, step: Step) -> None:
        """Look at a training batch before `forward` does, and change buffers.

        Called once for each batch of a training pass, after a warm start and never in a look-ahead; the only place
        beside `learn` where a selector may change its state or draw from `generator`. Buffers that it changes have to
        be persistent, and are changed under `torch.no_grad`.

        Args:
            losses: (genes,) on the graph of the step.
            step: what the forward pass produced.
        """

    def learn(self, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Move the parameters by the hypergradients of one outer step; as `optimizer` does unless overridden.

        Called under `torch.no_grad`.

        Args:
            gradients: of each parameter that is learnt from validation, by name.
            optimizer: Adam of these parameters at `learning_rate`.
        """
        for name, gradient in gradients.items():
            self.get_parameter(name).grad = gradient
        optimizer.step()
        optimizer.zero_grad()  # backward passes of training would add to them

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
