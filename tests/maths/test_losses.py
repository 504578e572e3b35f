"""The losses against numpy, their closed form and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agl_bench.maths import losses
from agl_bench.maths.losses import EPSILON, LOSSES, pearson_loss, squared_error

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


def plain(prediction: Tensor, target: Tensor) -> Tensor:
    """The formula in autograd's own operations; all genes must vary."""
    p, y = prediction - prediction.mean(0), target - target.mean(0)
    return 1 - (p * y).sum(0) / ((p * p).sum(0).sqrt() * (y * y).sum(0).sqrt() + EPSILON)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over two spots, the last over one."""
    monkeypatch.setattr(losses, "CHUNK", 2 * GENES + 1)


def all_orders(loss: Callable, prediction: Tensor, target: Tensor) -> list[Tensor]:
    """Loss, gradients, and gradients of functions of those up to the third order, with respect to both arguments."""
    inputs = [t.detach().clone().requires_grad_() for t in (prediction, target)]
    found = [loss(*inputs)]
    for _ in range(3):
        steep = sum((f * torch.linspace(-1, 2, f.numel(), dtype=f.dtype).view_as(f)).sin().sum() for f in found[-2:])
        found += torch.autograd.grad(steep, inputs, create_graph=True)
    return [f.detach() for f in found]


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_derivatives_of_both_arguments_are_those_of_the_plain_formula(offset: float) -> None:
    prediction, target = pair()
    found = [all_orders(f, prediction + offset, target - offset) for f in (pearson_loss, plain)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (7, 50_001), (128, 2000), (1500, 100)])
def test_many_sizes_against_the_plain_formula(
    dtype: torch.dtype, tolerance: float, offset: float, shape: tuple[int, int]
) -> None:
    """One pass over the spots and several, also with a smaller last one; against the formula in float64."""
    generator = torch.Generator().manual_seed(3)
    prediction, noise = torch.randn(2, *shape, generator=generator)
    if shape[0] == 2:  # of two spots the correlation is ±1 and its gradient a difference of equals
        noise, tolerance = noise * 10, tolerance * 10
    weights = torch.rand(shape[1], generator=generator)
    prediction, target = prediction + offset, 0.5 * prediction + noise + offset
    found = []
    for loss, precision in ((pearson_loss, dtype), (plain, torch.float64)):
        leaf = prediction.to(precision, copy=True).requires_grad_()
        value = loss(leaf, target.to(precision))
        (gradient,) = torch.autograd.grad((value * weights.to(precision)).sum(), leaf)
        assert value.dtype == gradient.dtype == precision
        found.append((value.detach().double(), gradient.double()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.usefixtures("small_chunks")
def test_both_modes_match_finite_differences_with_still_genes() -> None:
    """Finite differences see a still gene's jump, so that its input is held."""
    whole = pair()
    prediction, target = (t.detach().repeat(1, 2)[:, :7].clone() for t in whole)
    target[:, 4], prediction[:, 5], prediction[:, 6] = 2.5, -0.3, 0.0
    held = [prediction[:, 4:].clone(), target[:, 4:].clone()]
    moving = [t[:, :4].clone().requires_grad_() for t in (prediction, target)]

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return pearson_loss(torch.cat([p, held[0]], 1), torch.cat([y, held[1]], 1))

    assert torch.autograd.gradcheck(loss, moving, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, moving, check_fwd_over_rev=True, check_rev_over_rev=True)
    found = all_orders(pearson_loss, prediction, target)
    assert (found[0][4:] == 1).all()
    assert all(f.isfinite().all() for f in found) and all((f[:, 4:] == 0).all() for f in found[1:])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("of_target", [False, True])
def test_all_compositions_of_modes_agree(of_target: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    prediction, target, tangent = torch.randn(3, SPOTS, GENES, generator=generator, dtype=torch.float64)

    def total(at: Tensor, loss: Callable = pearson_loss) -> Tensor:
        inputs = (prediction, at) if of_target else (at, target)
        return (loss(*inputs) * torch.arange(1, GENES + 1)).square().sum()

    at = target if of_target else prediction
    leaf = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(leaf, plain), leaf, create_graph=True)
    (curve,) = torch.autograd.grad(slope, leaf, tangent)

    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)

    (ours,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    close(torch.autograd.grad(ours, leaf, tangent)[0], curve)  # reverse over reverse
    close(torch.func.grad(total)(at), slope)
    close(torch.func.jvp(total, (at,), (tangent,))[1], (slope * tangent).sum())
    close(torch.func.jvp(torch.func.grad(total), (at,), (tangent,))[1], curve)  # forward over reverse
    close(torch.func.grad(lambda a: torch.func.jvp(total, (a,), (tangent,))[1])(at), curve)
    close(torch.func.grad(lambda a: (torch.func.grad(total)(a) * tangent).sum())(at), curve)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at, tangent)
        close(torch.autograd.forward_ad.unpack_dual(total(dual)).tangent, (slope * tangent).sum())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half: torch.dtype) -> None:
    prediction, target = (t.detach().to(half).float() for t in pair())
    leaf = prediction.to(half).requires_grad_()
    loss = pearson_loss(leaf, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(prediction, target), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    reference = prediction.requires_grad_()
    (expected,) = torch.autograd.grad(plain(reference, target).sum(), reference)
    torch.testing.assert_close(gradient, expected.to(half), rtol=2**-7, atol=1e-6)


def test_memory_layout_does_not_matter() -> None:
    prediction, target = pair()
    expected = all_orders(pearson_loss, prediction, target)
    for change in (lambda t: t.T.contiguous().T, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        leaf = change(prediction.detach()).requires_grad_()
        assert not leaf.is_contiguous()
        loss = pearson_loss(leaf, change(target))
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-14)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        (plainly,) = torch.autograd.grad(plain(leaf, target).sum(), leaf)
        torch.testing.assert_close(gradient, plainly, rtol=0, atol=1e-13)


def test_a_large_offset_does_not_leak_into_the_gradient() -> None:
    """The loss does not change with an offset: the gradient of a gene sums to zero, however large its mean."""
    prediction, target = (t.detach() for t in pair(torch.float32))
    leaf = (prediction + 1e4).requires_grad_()
    (gradient,) = torch.autograd.grad(pearson_loss(leaf, target + 1e4).sum(), leaf)
    assert (gradient.sum(0).abs() < 1e-6 * gradient.abs().amax(0)).all()


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
    loss = pearson_loss(prediction.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert gradient[:, 1].isnan().all() and gradient[:, [0, 2, 3]].isfinite().all()
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
