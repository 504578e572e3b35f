"""Colour and texture statistics against scikit-image patch by patch, and under the symmetries of a patch."""

from __future__ import annotations

import numpy as np
import pytest
import skimage
import torch

from agl_bench_plugins.backbones import patch_statistics as own


@pytest.fixture
def pixels() -> np.ndarray:
    """Patches (5, 32, 32, 3) of smooth colours on 256 levels."""
    noise = np.random.default_rng(0).uniform(0.1, 1, (5, 32, 32, 3))
    return np.rint(255 * skimage.filters.gaussian(noise, sigma=(0, 1, 1, 0))) / 255


def test_co_occurrence_is_that_of_scikit_image(pixels: np.ndarray) -> None:
    grey = skimage.color.rgb2gray(pixels)
    levels = np.minimum((grey * own.LEVELS).astype(np.uint8), own.LEVELS - 1)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    for patch, found in zip(levels, own.co_occurrence(grey), strict=True):
        expected = []
        for distance in own.DISTANCES:
            step = round(distance * 32) or 1
            # Diagonal neighbours are step pixels away along both axes.
            straight = skimage.feature.graycomatrix(patch, [step], angles[::2], own.LEVELS, symmetric=True)
            slanted = skimage.feature.graycomatrix(patch, [step * 2**0.5], angles[1::2], own.LEVELS, symmetric=True)
            counts = (straight.sum(3) + slanted.sum(3)).astype(float)[..., None]
            shares = counts / counts.sum()
            expected += [skimage.feature.graycoprops(shares, name)[0, 0] for name in own.PROPERTIES]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_batch_is_its_patches(pixels: np.ndarray) -> None:
    alone = np.concatenate([own.statistics(patch[None]) for patch in pixels])
    np.testing.assert_allclose(own.statistics(pixels), alone, rtol=0, atol=1e-9)
    assert alone.shape == (5, own.STATISTICS) and np.isfinite(alone).all()


@pytest.mark.parametrize("turn", [lambda p: p[:, ::-1], lambda p: p[:, :, ::-1], lambda p: p.transpose(0, 2, 1, 3)])
def test_how_a_patch_is_turned_does_not_matter(turn, pixels: np.ndarray) -> None:
    one, two = own.statistics(pixels), own.statistics(np.ascontiguousarray(turn(pixels)))
    patterns = slice(52, 62)
    np.testing.assert_allclose(np.delete(one, np.r_[patterns], 1), np.delete(two, np.r_[patterns], 1), atol=1e-8)
    np.testing.assert_allclose(one[:, patterns], two[:, patterns], atol=0.2)  # a pixel or two of 900, in spreads


def test_blank_patches_have_statistics() -> None:
    for level in (0.0, 1.0):
        assert np.isfinite(own.statistics(np.full((2, 16, 16, 3), level))).all()


def test_blobs_are_counted() -> None:
    stain = np.zeros((2, 64, 64))
    rows, columns = torch.meshgrid(torch.arange(8, 64, 16), torch.arange(8, 64, 16), indexing="ij")
    stain[0, rows.ravel(), columns.ravel()] = 5
    stain[0] = skimage.filters.gaussian(stain[0], 1.3)
    room = 1 / (4 * own.SCALES[1]) ** 2
    np.testing.assert_allclose(own.blobs(stain) * room, [[16, 16, 16], [0, 0, 0]])
