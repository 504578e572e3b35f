"""Which spots of a section lie beside each other."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

REACH = 1.5  # pitches: 6 neighbours on a hexagonal grid (√3 > 1.5), 8 on a square one


def pitch(position: np.ndarray) -> float:
    """Median distance from a spot to the next one, in the unit of `position` (spots, 2); 0 for fewer than two spots."""
    return float(np.median(cKDTree(position).query(position, k=2)[0][:, 1])) if len(position) > 1 else 0.0


def neighbour_weights(position: np.ndarray) -> sparse.csr_matrix:
    """Weights of each spot's neighbours: 1 / their number for all within reach, 0 for the others.

    A radius and not the k nearest, so that no tie on a grid has to be broken by the order of the spots.

    Args:
        position: (spots, 2), any unit; the spots of one section.

    Returns:
        (spots, spots) float64; each row sums to 1, or to 0 where a spot has no neighbour.
    """
    if len(position) < 2:
        return sparse.csr_matrix((len(position), len(position)))
    pairs = cKDTree(position).query_pairs(REACH * pitch(position), output_type="ndarray")
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    weights = sparse.csr_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(position), len(position)))
    weights.sort_indices()
    number = np.diff(weights.indptr)
    weights.data /= np.repeat(number, number)
    return weights
