"""The metrics against scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from agl_bench.maths.metrics import affine_fit, mean_squared_error, pearson, spearman


def pair(spots: int = 40, *, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Related float32 prediction and target, (spots, 5); many ties on request."""
    generator = torch.Generator().manual_seed(0)
    prediction, noise = torch.randn(2, spots, 5, generator=generator)
    target = prediction * torch.linspace(-1, 1, 5) + noise
    return ((prediction * 2).round(), target.round()) if ties else (prediction, target)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(pearson, scipy.stats.pearsonr), (spearman, scipy.stats.spearmanr)],
    ids=["pearson", "spearman"],
)
def test_correlations_are_those_of_scipy(ours: object, theirs: object, ties: bool) -> None:
    prediction, target = pair(ties=ties)
    found = ours(prediction, target)
    assert found.dtype == torch.float64
    p, y = prediction.double().numpy(), target.double().numpy()
    expected = [theirs(p[:, g], y[:, g]).statistic for g in range(5)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", [pearson, spearman])
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_a_gene_that_does_not_vary_has_no_correlation(metric: object, value: float) -> None:
    prediction, target = pair()
    flat = torch.full_like(prediction, value)
    mixed = torch.where(torch.arange(5) == 2, flat, prediction)
    assert metric(mixed, target).isnan().tolist() == [False, False, True, False, False]
    assert metric(prediction, flat).isnan().all()
    assert metric(flat, flat).isnan().all()
    assert metric(prediction[:1], target[:1]).isnan().all()


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_a_score_of_nan_is_nan(metric: object) -> None:
    prediction, target = pair()
    prediction[3, 1] = torch.nan
    assert metric(prediction, target).isnan().tolist() == [False, True, False, False, False]


def test_perfect_correlation_does_not_exceed_one() -> None:
    prediction, _ = pair(1001)
    assert (pearson(prediction, 3 * prediction + 1) <= 1).all()
    assert (spearman(prediction, -prediction.exp()) >= -1).all()
    torch.testing.assert_close(spearman(prediction, prediction.exp()), torch.ones(5, dtype=torch.float64))


def test_mean_squared_error() -> None:
    prediction, target = pair()
    expected = np.square(prediction.double().numpy() - target.double().numpy()).mean(0)
    np.testing.assert_allclose(mean_squared_error(prediction, target).numpy(), expected, rtol=1e-14)


def test_affine_fit_is_the_least_squares_line() -> None:
    prediction, target = pair()
    slope, offset = affine_fit(prediction, target)
    lines = [np.polyfit(prediction[:, g].double(), target[:, g].double(), 1) for g in range(5)]
    np.testing.assert_allclose(torch.stack([slope, offset], 1).numpy(), lines, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1234.567])
def test_affine_fit_of_a_constant_is_the_mean_of_the_target(value: float) -> None:
    """Rounding leaves a constant column with a centred norm that is not exactly zero."""
    _, target = pair(37)
    slope, offset = affine_fit(torch.full_like(target, value, dtype=torch.float64), target)
    assert (slope == 0).all()
    torch.testing.assert_close(offset, target.double().mean(0))
