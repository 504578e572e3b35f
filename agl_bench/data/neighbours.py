"""Which spots of a section lie beside each other."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

REACH = 1.5  # × the median distance to the nearest spot: 6 neighbours on a hexagonal grid (√3 > 1.5), 8 on a square one


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
    tree = cKDTree(position)
    nearest = tree.query(position, k=2)[0][:, 1]
    pairs = tree.query_pairs(REACH * float(np.median(nearest)), output_type="ndarray")
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    weights = sparse.csr_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(position), len(position)))
    weights.sort_indices()
    number = np.diff(weights.indptr)
    weights.data /= np.repeat(number, number)
    return weights
