"""From sections as measured to one table of spots over a panel of genes, normalised as the protocol says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

NORMAL_MAD = 0.6744897501960817  # median absolute deviation of the standard normal distribution
NEVER_THIN = (
    0.5  # of the section's median of detected genes: a spot with so many is no outlier, however alike spots are
)
TARGET_SUM = 1e4  # fixed, so that a spot's values do not depend on other spots (scanpy's default is their median)
_BLOCK = 1024  # spots whose counts are looked at at a time


@dataclass(frozen=True)
class SpotTable:
    """All spots that take part: where their counts are, and what normalises them.

    Counts stay in the sections, in memory or memory-mapped. Rows are gathered and normalised when they are asked for,
    so that a table holds nothing of size spots × genes; ask for blocks of rows where there are many.

    Attributes:
        sections: the sections the spots are from.
        matrices: raw counts of each section, CSR (its spots, its genes) with sorted, distinct columns.
        source_columns: (sections, genes) column of each gene in the section's matrix, −1 where the section lacks it.
        genes: (genes,) symbols of the panel.
        section: (spots,) index into `sections`.
        source_row: (spots,) row in the section's AnnData.
        position: (spots, 2) float32, µm.
        total: (spots,) float64, counts of all genes of the panel.
        scales: whether `rows` scales each spot to `TARGET_SUM` before the logarithm.
        has_counts: False = the sections hold values that were normalised before; then "counts" are these values, and
            `rows` gives them as they are.
        dropped_spots: spots left out because too few genes were detected (`deep_enough`) or no patch was found.
    """

    sections: tuple[Section, ...]
    matrices: tuple[sparse.csr_matrix, ...]
    source_columns: np.ndarray
    genes: tuple[str, ...]
    section: np.ndarray
    source_row: np.ndarray
    position: np.ndarray
    total: np.ndarray
    scales: bool
    dropped_spots: int
    has_counts: bool = True

    def __len__(self) -> int:
        return len(self.section)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Stored values of each spot, (rows,) int64; genes outside the panel are counted too."""
        lengths = np.empty(len(rows), dtype=np.int64)
        for index, matrix in enumerate(self.matrices):
            here = self.section[rows] == index
            lengths[here] = np.diff(matrix.indptr)[self.source_row[rows[here]]]
        return lengths

    def rows(self, rows: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        """Log-normalised expression of some spots, (rows, columns) float32; None is all genes.

        ln(1 + count), after scaling the spot to `TARGET_SUM` if `scales`.
        """
        values = self.counts(rows, columns)
        if not self.has_counts:
            return values
        if self.scales:
            total = self.total[rows].astype(np.float32)  # > 0 unless min_genes_per_spot is 0
            factor = (TARGET_SUM / np.where(total > 0, total, 1)).astype(np.float32)
            values.data *= np.repeat(factor, np.diff(values.indptr))
        np.log1p(values.data, out=values.data)
        return values

    def counts(self, rows: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        """Raw counts of some spots, (rows, columns) float32, in the order of `rows`; None is all genes.

        A gene that a section lacks is 0 there.
        """
        wanted = self.source_columns if columns is None else self.source_columns[:, columns]
        section = self.section[rows]
        parts, order = [], []
        for index in np.unique(section):
            here = np.flatnonzero(section == index)
            parts.append(_gather(self.matrices[index], self.source_row[rows[here]], wanted[index]))
            order.append(here)
        if not parts:
            return sparse.csr_matrix((0, wanted.shape[1]), dtype=np.float32)
        if len(parts) == 1:
            return parts[0]
        stacked: sparse.csr_matrix = sparse.vstack(parts, format="csr")
        place = np.concatenate(order)
        return stacked if (np.diff(place) > 0).all() else stacked[np.argsort(place)]


def panel(sections: Sequence[Section], names: Collection[str] | None = None) -> tuple[str, ...]:
    """Genes common to the sections called `names` (None = all), in the order of the first of them.

    Raises:
        BadSpec: if they have no gene in common.
    """
    decide = [s for s in sections if names is None or s.name in names]
    shared = set.intersection(*(set(s.counts.var_names) for s in decide))
    if not shared:
        raise BadSpec(
            f"sections {', '.join(s.name for s in decide)} have no gene in common; "
            "check that all use the same gene naming (symbols or Ensembl ids)"
        )
    return tuple(g for g in decide[0].counts.var_names if g in shared)


def tabulate(sections: Sequence[Section], protocol: Protocol, panel_from: Collection[str] | None = None) -> SpotTable:
    """The panel of genes, and the spots in which enough of them are detected.

    Args:
        sections: all that take part.
        protocol: normalisation, and which spots are too thin.
        panel_from: names of the sections that decide the panel, by default all; another section that lacks a gene of
            it has zeros there.

    Raises:
        BadSpec: if the sections that decide have no gene in common.
        BadSection: if no spot of a section has enough detected genes.
    """
    genes = panel(sections, panel_from)
    matrices, source_columns, rows, totals, dropped = [], [], [], [], 0
    for section in sections:
        matrix, columns = canonical(section.counts.X), section.counts.var_names.get_indexer(genes)
        detected, total = _sums(matrix, columns)
        kept = deep_enough(detected, protocol)
        if not len(kept):
            raise BadSection(
                section.name,
                f"no spot has {protocol.min_genes_per_spot} detected genes among the {(columns >= 0).sum()} of the "
                "panel that it has; lower protocol.min_genes_per_spot or leave out the section that lacks genes",
            )
        dropped += matrix.shape[0] - len(kept) + section.dropped_spots
        matrices.append(matrix)
        source_columns.append(columns)
        rows.append(kept)
        totals.append(total[kept])
    return SpotTable(
        sections=tuple(sections),
        matrices=tuple(matrices),
        source_columns=np.stack(source_columns),
        genes=genes,
        section=np.repeat(np.arange(len(sections)), [len(r) for r in rows]),
        source_row=np.concatenate(rows),
        position=np.concatenate(
            [
                np.asarray(s.counts.obsm["spatial"], dtype=np.float64)[r, :2] * s.um_per_px
                for s, r in zip(sections, rows, strict=True)
            ]
        ).astype(np.float32),
        total=np.concatenate(totals),
        scales=protocol.normalisation not in ("log1p", "none"),
        has_counts=protocol.normalisation != "none",
        dropped_spots=dropped,
    )


def deep_enough(detected: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Rows of the spots of a section that take part.

    First those with `protocol.min_genes_per_spot` detected genes. Of them, a spot is left out whose ln number of genes
    lies more than `protocol.spot_mads` median absolute deviations (in units of a normal distribution's standard
    deviation) below their median, as scater's isOutlier has it for the lower tail, unless it has `NEVER_THIN` of the
    median. Only these numbers are looked at, of all spots of the section alike; the sum of counts is not: in our
    sections it finds no spot that the number of genes does not, and size factors of test spots stay unseen.

    Args:
        detected: (spots,) genes of the panel with any count.
        protocol: both thresholds.
    """
    kept = np.flatnonzero(detected >= protocol.min_genes_per_spot)
    if not len(kept) or not protocol.spot_mads:
        return kept
    found = detected[kept]
    depth = np.log(np.maximum(found, 1))
    median = np.median(depth)
    spread = np.median(np.abs(depth - median)) / NORMAL_MAD
    thin = (depth < median - protocol.spot_mads * spread) & (found < NEVER_THIN * np.median(found))
    rows: np.ndarray = kept[~thin]
    return rows


def computable(counts: Any) -> Any:
    """Counts in a type that SciPy computes with: half precision becomes single, foreign bytes the machine's order."""
    kind = np.dtype(np.float32) if counts.dtype == np.float16 else counts.dtype.newbyteorder("=")
    if kind == counts.dtype and counts.dtype.isnative:
        return counts
    if isinstance(counts, np.ndarray):
        return counts.astype(kind)
    rows = counts.tocsr() if counts.format not in ("csr", "csc") else counts
    return type(rows)((rows.data.astype(kind), rows.indices, rows.indptr), shape=rows.shape)


def canonical(counts: Any) -> sparse.csr_matrix:
    """Counts as CSR with sorted, distinct columns; the very arrays of the section where they are so already."""
    matrix = sparse.csr_matrix(computable(counts))
    if not matrix.has_canonical_format:
        # A copy, for the section stays as measured; a wide one, for a sum may not fit the type of its parts.
        matrix = matrix.astype(np.int64 if matrix.dtype.kind in "bi" else np.result_type(matrix.dtype, np.uint32))
        matrix.sum_duplicates()
    return matrix


def _sums(matrix: sparse.csr_matrix, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each spot the number of detected genes and the sum of counts over the panel, (spots,) float64 each."""
    chosen = np.zeros(matrix.shape[1])
    chosen[columns[columns >= 0]] = 1
    detected, total = np.empty(matrix.shape[0]), np.empty(matrix.shape[0])
    for start in range(0, matrix.shape[0], _BLOCK):
        block = matrix[start : start + _BLOCK].astype(np.float64)
        total[start : start + _BLOCK] = block @ chosen
        block.data = (block.data > 0).astype(np.float64)
        detected[start : start + _BLOCK] = block @ chosen
    return detected, total


def _gather(matrix: sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
    """Counts (rows, columns) float32 in arrays of their own; zeros where a column is −1."""
    taken = matrix[rows]
    if not np.array_equal(columns, np.arange(matrix.shape[1])):
        there = np.flatnonzero(columns >= 0)
        taken = taken[:, columns[there]]
        if len(there) < len(columns):
            moved = there.astype(taken.indices.dtype)[taken.indices]
            taken = sparse.csr_matrix((taken.data, moved, taken.indptr), shape=(len(rows), len(columns)))
    return taken.astype(np.float32, copy=False)
