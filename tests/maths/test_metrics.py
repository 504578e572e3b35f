"""The metrics against scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from agl_bench.maths import metrics
from agl_bench.maths.metrics import affine_fit, mean_squared_error, moran, pearson, spearman, structural_similarity


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


# ---- Maps -----------------------------------------------------------------------------------------------------------


def around(spots: int = 40, most: int = 7) -> tuple[Tensor, Tensor]:
    """Neighbours of unequal number, each spot among its own, padded with spot 0 at weight 0."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(spots, spots, generator=generator).argsort(1)[:, :most]
    index[:, 0] = torch.arange(spots)
    weights = torch.rand(spots, most, generator=generator, dtype=torch.float64)
    padded = torch.arange(most) > torch.randint(1, most, (spots, 1), generator=generator)
    return index.masked_fill(padded, 0), weights.masked_fill(padded, 0)


def moran_of_one(values: np.ndarray, index: np.ndarray, weights: np.ndarray) -> float:
    z = values - values.mean()
    pairs = sum(weights[i, k] * z[i] * z[index[i, k]] for i in range(len(z)) for k in range(index.shape[1]))
    return len(z) / weights.sum() * pairs / (z**2).sum()


def ssim_of_one(p: np.ndarray, y: np.ndarray, index: np.ndarray, weights: np.ndarray) -> float:
    c1, c2 = (0.01 * np.ptp(y)) ** 2, (0.03 * np.ptp(y)) ** 2
    found = []
    for i in range(len(y)):
        w, a, b = weights[i] / weights[i].sum(), p[index[i]], y[index[i]]
        mp, my = (w * a).sum(), (w * b).sum()
        vp, vy, c = (w * a * a).sum() - mp**2, (w * b * b).sum() - my**2, (w * a * b).sum() - mp * my
        found.append((2 * mp * my + c1) * (2 * c + c2) / ((mp**2 + my**2 + c1) * (vp + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("block", [1, 100, 2**19])
def test_map_scores_are_those_of_plain_loops(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)  # no influence on results
    prediction, target = pair()
    index, weights = around()
    p, y, i, w = (
        t.double().numpy() if t.is_floating_point() else t.numpy() for t in (prediction, target, index, weights)
    )
    expected = [moran_of_one(y[:, g], i, w) for g in range(5)]
    np.testing.assert_allclose(moran(target, index, weights).numpy(), expected, rtol=0, atol=1e-13)
    expected = [ssim_of_one(p[:, g], y[:, g], i, w) for g in range(5)]
    found = structural_similarity(prediction, target, index, weights)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_moran_of_a_chequerboard_and_of_a_slope() -> None:
    """On a ring each spot has two neighbours: alternating values are -1, a wave of period n is cos(2π/n)."""
    n = 24
    ring = torch.arange(n)
    index, weights = torch.stack([ring - 1, ring + 1], 1) % n, torch.ones(n, 2)
    values = torch.stack([(-1.0) ** ring, torch.cos(2 * torch.pi * ring.double() / n).float(), torch.ones(n)], 1)
    found = moran(values, index, weights)
    np.testing.assert_allclose(found[:2].numpy(), [-1, np.cos(2 * np.pi / n)], atol=1e-6)
    assert found[2].isnan()
    assert moran(values, index, torch.zeros(n, 2)).isnan().all()  # nobody has a neighbour


def test_ssim_of_equal_maps_is_one_and_falls_with_what_is_lost() -> None:
    prediction, target = pair()
    index, weights = around()
    target = target - target.amin() + 1  # ln(1 + …) is not negative; SSIM is not made for maps around 0
    same = structural_similarity(target, target, index, weights)
    torch.testing.assert_close(same, torch.ones(5, dtype=torch.float64))
    flat = structural_similarity(target.mean(0).expand_as(target), target, index, weights)
    opposite = structural_similarity(2 * target.mean(0) - target, target, index, weights)
    assert (flat < same).all() and (opposite < flat).all()
    constant = torch.where(torch.arange(5) == 2, torch.full_like(target, 0.1), target)
    assert structural_similarity(prediction, constant, index, weights).isnan().tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
