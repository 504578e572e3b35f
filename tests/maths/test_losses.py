"""The losses against numpy, their closed form and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agl_bench.maths.losses import LOSSES, pearson_loss, squared_error

SPOTS, GENES = 9, 4


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Prediction (a leaf) and target, (spots, genes)."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, SPOTS, GENES, generator=generator, dtype=dtype)
    return prediction.requires_grad_(), target


def test_is_one_minus_the_correlation() -> None:
    prediction, target = pair()
    loss = pearson_loss(prediction, target).detach().numpy()
    expected = [
        1 - np.corrcoef(p, y)[0, 1] for p, y in zip(prediction.detach().numpy().T, target.numpy().T, strict=True)
    ]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-8)  # EPSILON over the product of the norms


def test_gradient_is_the_closed_form() -> None:
    prediction, target = pair()
    (gradient,) = torch.autograd.grad(pearson_loss(prediction, target).sum(), prediction)
    p, y = prediction.detach() - prediction.detach().mean(0), target - target.mean(0)
    unit_p, unit_y = p / p.norm(dim=0), y / y.norm(dim=0)
    r = (unit_p * unit_y).sum(0)
    torch.testing.assert_close(gradient, -(unit_y - r * unit_p) / p.norm(dim=0), rtol=0, atol=1e-8)


def test_both_derivatives_match_finite_differences() -> None:
    prediction, target = pair()
    assert torch.autograd.gradcheck(pearson_loss, (prediction, target))
    assert torch.autograd.gradgradcheck(pearson_loss, (prediction, target))


def derivatives(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (genes,), gradient and the gradient of its squared sum, both (spots, genes)."""
    loss = pearson_loss(prediction, target)
    (first,) = torch.autograd.grad(loss.sum(), prediction, create_graph=True)
    (second,) = torch.autograd.grad((first + first.square()).sum(), prediction)
    return loss.detach(), first.detach(), second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["prediction", "target", "both"])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.7, -1e4])
def test_a_constant_column_has_loss_one_and_no_derivative(dtype: torch.dtype, side: str, value: float) -> None:
    prediction, target = (t.detach().clone() for t in pair(dtype))
    for tensor, constant in ((prediction, side != "target"), (target, side != "prediction")):
        if constant:
            tensor[:, 1] = value
    loss, first, second = derivatives(prediction.requires_grad_(), target)
    assert loss[1] == 1
    assert (first[:, 1] == 0).all() and (second[:, 1] == 0).all()
    assert first.isfinite().all() and second.isfinite().all()
    assert (first[:, [0, 2, 3]].abs().amax(0) > 1e-3).all()  # the other genes keep their gradient


def test_one_spot_has_loss_one_and_no_derivative() -> None:
    prediction, target = pair()
    loss, first, second = derivatives(prediction[:1].detach().requires_grad_(), target[:1])
    assert (loss == 1).all() and (first == 0).all() and (second == 0).all()


def test_scale_and_offset_do_not_matter() -> None:
    prediction, target = pair()
    plain = pearson_loss(prediction, target)
    torch.testing.assert_close(pearson_loss(3.5 * prediction - 40, 0.2 * target + 7), plain, rtol=0, atol=1e-7)
    torch.testing.assert_close(pearson_loss(-prediction, target), 2 - plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spots", [7, 64, 1000])
@pytest.mark.parametrize("mean", [1e3, 12345.678, 1e6])
def test_rounding_of_a_large_mean_is_not_taken_for_variation(spots: int, mean: float) -> None:
    """The mean of a constant float32 column need not be the constant itself."""
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randn(spots, 3, generator=generator)
    target = torch.full((spots, 3), mean)
    assert (pearson_loss(prediction, target) == 1).all()
    assert (pearson_loss(target, prediction) == 1).all()


def test_small_variation_around_a_large_mean_is_kept() -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(64, 3, generator=generator)
    assert (pearson_loss(target + 100, target) < 1e-3).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_a_number_is_not_hidden(bad: float) -> None:
    """A model that has diverged must not look like one whose prediction is constant."""
    prediction, target = (t.detach().clone() for t in pair(torch.float32))
    prediction[0, 1] = bad
    loss = pearson_loss(prediction, target)
    assert not loss[1].isfinite()
    assert loss[[0, 2, 3]].isfinite().all()


def test_squared_error() -> None:
    prediction, target = pair()
    torch.testing.assert_close(squared_error(prediction, target), ((prediction - target) ** 2).sum(0) / SPOTS)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_genes_do_not_mix(name: str) -> None:
    prediction, target = pair()
    together = LOSSES[name](prediction, target)
    assert together.shape == (GENES,)
    alone = [LOSSES[name](prediction[:, [g]], target[:, [g]]) for g in range(GENES)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-15)
