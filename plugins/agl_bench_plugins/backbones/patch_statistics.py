"""Colour and texture statistics of H&E patches, by scikit-image, a batch at a time: all its calls are here.

Lengths are shares of the side of a patch. Sums over pixels are taken in order of size, so that they do not depend on
the orientation of a patch; what is left of it is rounding in the interpolated corners of binary patterns.
"""

from __future__ import annotations

import itertools

import numpy as np
import skimage  # loads what is used of it

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEVELS = 16  # of grey in co-occurrence
DISTANCES = (0.015, 0.05)  # of its pairs: 1.7 and 5.6 µm of 112
PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "ASM", "correlation")
NEIGHBOURS = 8  # of a pixel in a binary pattern
SCALES = (0.01, 0.02, 0.04, 0.08)  # standard deviations of Gaussians
BLOBS = (0.005, 0.01, 0.02)  # least heights of a blob, in units of stain

# Centre and spread of each statistic in sections C2 to C5 of her2st, 64 px for 112 µm, to a digit or two.
# fmt: off
_CENTRE = (
    0.56, 0.5, 0.67, 0.21, 0.18, 0.15, 0.18, 0.19, 0.39, 0.4, 0.37, 0.57, 0.6, 0.52, 0.69, 0.73, 0.65, 0.78, 0.86, 0.77,
    0.88,  # mean, standard deviation and quantiles of red, green, blue
    0.073, 0.0038, 0.014, 0.06, 0.0039, 0.0077, 0.013, 0, 0.0032, 0.031, 0.00055, 0.0085, 0.053, 0.0026, 0.013, 0.1,
    0.0062, 0.017, 0.2, 0.011, 0.026,  # likewise of haematoxylin, eosin, the rest
    3.1, 1.1, 0.61, 0.041, 0.82, 9.4, 2.1, 0.43, 0.027, 0.46,  # co-occurrence
    0.053, 0.067, 0.072, 0.13, 0.22, 0.16, 0.077, 0.064, 0.064, 0.1,  # patterns
    0.1, 0.011, 0.036, 0.076, 0.14, 0.27,  # edges
    0.054, 0.046, 0.037, 0.027, 0.012, 0.014, 0.016, 0.015,  # scales
    0.32, 0.31, 0.28,  # blobs
)
_SPREAD = (
    0.08, 0.06, 0.05, 0.04, 0.03, 0.03, 0.08, 0.07, 0.08, 0.1, 0.09, 0.07, 0.09, 0.08, 0.06, 0.08, 0.08, 0.05, 0.06,
    0.06, 0.04,
    0.02, 0.002, 0.002, 0.01, 0.001, 0.003, 0.007, 0.0005, 0.002, 0.01, 0.001, 0.002, 0.02, 0.003, 0.003, 0.03, 0.003,
    0.003, 0.05, 0.005, 0.006,
    1, 0.3, 0.08, 0.04, 0.06, 3, 0.5, 0.08, 0.03, 0.2,
    0.009, 0.008, 0.01, 0.01, 0.04, 0.01, 0.009, 0.006, 0.03, 0.02,
    0.02, 0.006, 0.01, 0.02, 0.03, 0.05,
    0.01, 0.01, 0.01, 0.01, 0.004, 0.004, 0.004, 0.004,
    0.07, 0.07, 0.08,
)
# fmt: on
STATISTICS = len(_CENTRE)


def statistics(pixels: np.ndarray) -> np.ndarray:
    """All statistics of patches (spots, px, px, 3) in [0, 1], each of about unit spread: (spots, STATISTICS)."""
    stains, grey = skimage.color.rgb2hed(pixels), skimage.color.rgb2gray(pixels)
    haematoxylin = stains[..., 0]
    parts = (
        colour(pixels), colour(stains), co_occurrence(grey), patterns(grey), edges(grey), scales(haematoxylin),
        blobs(haematoxylin),
    )  # fmt: skip
    scaled: np.ndarray = (np.concatenate(parts, axis=1) - np.array(_CENTRE)) / np.array(_SPREAD)
    return scaled


def colour(channels: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and quantiles of each channel, from (spots, px, px, channels)."""
    flat = channels.reshape(len(channels), -1, channels.shape[-1])
    flat = np.sort(flat, axis=1)  # sums do not depend on the orientation to the last bit
    quantiles = np.quantile(flat, QUANTILES, axis=1)
    return np.concatenate([flat.mean(1), flat.std(1), *quantiles], axis=1)


def co_occurrence(grey: np.ndarray) -> np.ndarray:
    """Haralick's properties of pairs of pixels in all directions, from (spots, px, px) in [0, 1]."""
    spots, side, _ = grey.shape
    levels = np.minimum((grey * LEVELS).astype(np.int64), LEVELS - 1)
    offset = LEVELS * LEVELS * np.arange(spots)[:, None, None]
    found = []
    for distance in DISTANCES:
        step = max(round(distance * side), 1)
        first = (slice(None, -step), slice(step, None))
        counts = np.zeros((spots, LEVELS, LEVELS))
        whole = slice(None)
        for rows, columns in (((whole, whole), first), (first, (whole, whole)), (first, first), (first, first[::-1])):
            one, two = levels[:, rows[0], columns[0]], levels[:, rows[1], columns[1]]
            pairs = np.bincount((offset + LEVELS * one + two).ravel(), minlength=spots * LEVELS * LEVELS)
            counts += pairs.reshape(spots, LEVELS, LEVELS)
        counts += counts.transpose(0, 2, 1)
        shares = (counts / counts.sum((1, 2), keepdims=True)).transpose(1, 2, 0)[..., None]  # patches as distances
        found += [skimage.feature.graycoprops(shares, name)[:, 0] for name in PROPERTIES]
    return np.stack(found, axis=1)


def patterns(grey: np.ndarray) -> np.ndarray:
    """Shares of the uniform local binary patterns, from (spots, px, px)."""
    levels = _mosaic(np.rint(255 * grey).astype(np.uint8))  # of floats, rounding would decide between equal pixels
    codes = _inner(skimage.feature.local_binary_pattern(levels, NEIGHBOURS, 1, method="uniform"), grey.shape)
    return np.stack([(codes == code).mean((1, 2)) for code in range(NEIGHBOURS + 2)], axis=1)


def edges(grey: np.ndarray) -> np.ndarray:
    """Mean and quantiles of the slope of grey, from (spots, px, px)."""
    slopes = np.sort(_inner(skimage.filters.sobel(_mosaic(grey)), grey.shape).reshape(len(grey), -1), axis=1)
    return np.stack([slopes.mean(1), *np.quantile(slopes, QUANTILES, axis=1)], axis=1)


def scales(stain: np.ndarray) -> np.ndarray:
    """Standard deviations of a stain at several scales and between them, from (spots, px, px)."""
    smooth = [stain, *(_smoothed(stain, scale) for scale in SCALES)]
    between = [one - two for one, two in itertools.pairwise(smooth)]
    return np.stack([image.std((1, 2)) for image in (*smooth[1:], *between)], axis=1)


def blobs(stain: np.ndarray) -> np.ndarray:
    """Number of blobs higher than some heights, as a share of how many there is room for, from (spots, px, px)."""
    height = _smoothed(stain, SCALES[1]) - _smoothed(stain, SCALES[3])
    around = np.zeros((3, 3, 3))
    around[1] = 1  # within a patch
    peaks = skimage.morphology.local_maxima(height, footprint=around)
    room = 1 / (4 * SCALES[1]) ** 2
    return np.stack([(peaks & (height > least)).sum((1, 2)) / room for least in BLOBS], axis=1)


def _smoothed(images: np.ndarray, scale: float) -> np.ndarray:
    sigma = scale * images.shape[1]
    return skimage.filters.gaussian(images, sigma=(0, sigma, sigma), mode="reflect", preserve_range=True)


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Patches above each other, so that one call does for all."""
    return images.reshape(-1, images.shape[2])


def _inner(mosaic: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Patches of a mosaic without their outermost pixels, which have seen the neighbours."""
    return mosaic.reshape(shape)[:, 1:-1, 1:-1]
