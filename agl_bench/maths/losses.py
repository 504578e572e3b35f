"""One loss per gene: (spots, genes)² -> (genes,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Loss = Callable[[Tensor, Tensor], Tensor]
Pairs = tuple[tuple[int, int], ...]

EPSILON = 1e-8  # Shiku et al. 2026, Eq. 5 as coded: added to the product of the two norms
CHUNK = 2**17  # elements that a pass over some spots takes at a time on a CPU: a few such buffers stay in its cache


class _Products(Function):
    """Inner products over the spots, per gene, of pairs of centred tensors.

    With `_Combination` it is closed under differentiation: the derivatives of each, forward or reverse, are made of the
    two. So all orders are exact, and no graph keeps more of size (spots, genes) than the tensors themselves.
    """

    @staticmethod
    def forward(pairs: Pairs, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The products (pairs, genes), and the means (tensors, genes), which are not differentiable.

        Args:
            pairs: which two of the tensors to multiply.
            *tensors: (spots, genes) each.
        """
        # Centred before multiplying (mean squares less squared means would cancel), and on a CPU some spots at a time.
        # No matmul: under autocast and TF32 it would round.
        means = torch.stack([t.mean(0) for t in tensors])
        rows, genes = _rows_at_a_time(tensors[0]), tensors[0].shape[1]
        centred = tensors[0].new_empty(len(tensors), rows, genes)
        sums = tensors[0].new_empty(len(pairs), rows, genes)
        for number, chunk in enumerate(zip(*(torch.split(t, rows) for t in tensors), strict=True)):
            size = len(chunk[0])
            c = [torch.sub(t, m, out=b[:size]) for t, m, b in zip(chunk, means, centred, strict=True)]
            for (i, j), total in zip(pairs, sums, strict=True):
                if number:
                    total[:size].addcmul_(c[i], c[j])
                else:
                    torch.mul(c[i], c[j], out=total)
        return sums.sum(1), means

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """See `torch.autograd.Function.setup_context`."""
        ctx.pairs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """d⟨u, v⟩/du = v, centred."""
        tensors = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(tensors)
        for k in range(len(tensors)):
            weights: dict[int, Tensor] = {}  # by the other tensor of the pair
            if cotangent is None or not ctx.needs_input_grad[1 + k]:
                continue
            for (i, j), c in zip(ctx.pairs, cotangent, strict=True):
                for mine, other in ((i, j), (j, i)):
                    if mine == k:
                        weights[other] = weights[other] + c if other in weights else c
            if weights:
                gradients[k] = _combination(list(weights.values()), [tensors[other] for other in weights])
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        """d⟨u, v⟩ = ⟨du, v⟩ + ⟨u, dv⟩."""
        moving = {k: t for k, t in enumerate(tangents) if t is not None}
        place = {k: len(tangents) + n for n, k in enumerate(moving)}
        terms = [[(place[m], o) for m, o in ((i, j), (j, i)) if m in place] for i, j in ctx.pairs]
        pairs = tuple(dict.fromkeys(pair for row in terms for pair in row))
        if not pairs:
            return None, None
        found = dict(zip(pairs, _products(pairs, *ctx.saved_tensors, *moving.values())[0], strict=True))
        zero = torch.zeros_like(found[pairs[0]])
        return torch.stack([sum((found[pair] for pair in row), zero) for row in terms]), None


class _Combination(Function):
    """The sum of centred tensors, each times a weight per gene; the other half of `_Products`."""

    @staticmethod
    def forward(weights: Tensor, *tensors: Tensor) -> Tensor:
        """The sum, (spots, genes).

        Args:
            weights: (tensors, genes).
            *tensors: (spots, genes) each.
        """
        # Centred roughly, so that a large offset does not round; then exactly, as the centre of a chunk is not of all.
        rows = _rows_at_a_time(tensors[0])
        total, buffer = torch.empty_like(tensors[0]), tensors[0].new_empty(rows, tensors[0].shape[1])
        centres = [t[:rows].mean(0) for t in tensors]
        for out, *chunk in zip(*(torch.split(t, rows) for t in (total, *tensors)), strict=True):
            for k, (tensor, centre, weight) in enumerate(zip(chunk, centres, weights, strict=True)):
                centred = torch.sub(tensor, centre, out=buffer[: len(out)])
                if k:
                    out.addcmul_(centred, weight)
                else:
                    torch.mul(centred, weight, out=out)
        return total.sub_(total.mean(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """See `torch.autograd.Function.setup_context`."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        """Products of the cotangent with the tensors, for the weights; the centred cotangent, weighted, for each."""
        weights, *tensors = ctx.saved_tensors
        if cotangent is None:
            return (None,) * (1 + len(tensors))
        of_weights = None
        if ctx.needs_input_grad[0]:
            of_weights = _products(tuple((0, 1 + k) for k in range(len(tensors))), cotangent, *tensors)[0]
        needs = ctx.needs_input_grad[1:]
        return of_weights, *(_combination([w], [cotangent]) if n else None for w, n in zip(weights, needs, strict=True))

    @staticmethod
    def jvp(ctx: Any, of_weights: Tensor | None, *tangents: Tensor | None) -> Tensor | None:
        """The product rule."""
        weights, *tensors = ctx.saved_tensors
        terms = [] if of_weights is None else list(zip(of_weights, tensors, strict=True))
        terms += [(w, t) for w, t in zip(weights, tangents, strict=True) if t is not None]
        return _combination([w for w, _ in terms], [t for _, t in terms]) if terms else None


def _rows_at_a_time(tensor: Tensor) -> int:
    """All spots on an accelerator; on a CPU as many as keep (spots, genes) buffers in its cache."""
    spots, genes = tensor.shape
    return spots if tensor.device.type != "cpu" else min(spots, max(1, CHUNK // max(1, genes)))


def _products(pairs: Pairs, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """See `_Products.forward`."""
    result: tuple[Tensor, Tensor] = _Products.apply(pairs, *tensors)
    return result


def _combination(weights: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """See `_Combination.forward`."""
    result: Tensor = _Combination.apply(torch.stack(weights), *tensors)
    return result


def pearson_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 − Pearson correlation over the batch, per gene (Shiku et al. 2026, Eq. 5).

    A gene whose target or prediction does not vary in the batch has loss 1 and gradient 0: it carries no signal, and
    the square root in the norm would otherwise give it a non-finite first or second derivative.

    Derivatives of any order and mode are closed forms over the (spots, genes) tensors, see `_Products`; torch.vmap is
    not supported.

    Args:
        prediction: (spots, genes), any scale and offset.
        target: (spots, genes), any scale and offset.

    Returns:
        (genes,) in [0, 2], in float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    products, means = _products(((0, 0), (1, 1), (0, 1)), prediction.to(dtype), target.to(dtype))
    pp, yy, py = products  # (genes,)
    # Rounding leaves a constant column with a centred norm of about eps·|mean|·√spots, not with exactly zero.
    spots = prediction.shape[0]
    rounding = (4 * torch.finfo(dtype).eps) ** 2
    still = (products[:2] <= rounding * (products[:2] + spots * means.square())).any(0)
    varies = ~still  # so that NaN stays NaN: a model that has diverged must not look like a constant one
    one = torch.ones((), dtype=dtype, device=pp.device)
    norms = torch.where(varies, pp, one).sqrt() * torch.where(varies, yy, one).sqrt()
    return 1 - torch.where(varies, py, torch.zeros_like(one)) / (norms + EPSILON)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch, per gene.

    Args:
        prediction: (spots, genes).
        target: (spots, genes).

    Returns:
        (genes,), in squared units of the target.
    """
    return (prediction - target).square().mean(0)


LOSSES: dict[str, Loss] = {"pearson": pearson_loss, "squared_error": squared_error}
# Means over the spots: of a batch, the mean of those of its parts, each counting by its spots. A correlation is not.
SEPARABLE = frozenset({"squared_error"})
