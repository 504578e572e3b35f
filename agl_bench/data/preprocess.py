"""From sections as measured to one table of spots over common genes, normalised as the protocol says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

TARGET_SUM = 1e4  # fixed, so that a spot's values do not depend on other spots (scanpy's default is their median)


@dataclass(frozen=True)
class SpotTable:
    """All spots that take part, on the host.

    Attributes:
        sections: the sections the spots are from.
        expression: (spots, genes) float32 CSR, normalised as the protocol says.
        genes: (genes,) symbols common to all sections, in the order of the first.
        section: (spots,) index into `sections`.
        source_row: (spots,) row in the section's AnnData.
        position: (spots, 2) float32, µm.
        dropped_spots: spots left out because too few genes were detected or no patch was found.
    """

    sections: tuple[Section, ...]
    expression: sparse.csr_matrix
    genes: tuple[str, ...]
    section: np.ndarray
    source_row: np.ndarray
    position: np.ndarray
    dropped_spots: int

    def __len__(self) -> int:
        return len(self.section)

    def rows(self, rows: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        """Normalised expression of some spots, (rows, columns) float32; None is all genes."""
        taken = self.expression[rows]
        return taken if columns is None else taken[:, columns]

    def counts(self, rows: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        """Raw counts of some spots, (rows, columns) float32, in the order of `rows`; None is all genes."""
        genes = self.genes if columns is None else tuple(np.asarray(self.genes)[columns])
        parts, order = [], []
        for index, section in enumerate(self.sections):
            here = np.flatnonzero(self.section[rows] == index)
            if len(here):
                counts = sparse.csr_matrix(section.counts.X)[self.source_row[rows[here]]]
                parts.append(counts[:, section.counts.var_names.get_indexer(genes)].astype(np.float32))
                order.append(here)
        stacked: sparse.csr_matrix = sparse.vstack(parts, format="csr")[np.argsort(np.concatenate(order))]
        return stacked


def tabulate(sections: Sequence[Section], protocol: Protocol) -> SpotTable:
    """Common genes, spots with enough detected genes, normalised expression.

    Raises:
        BadSpec: if the sections have no gene in common.
        BadSection: if no spot of a section has enough detected genes.
    """
    shared = set.intersection(*(set(s.counts.var_names) for s in sections))
    if not shared:
        raise BadSpec(
            f"sections {', '.join(s.name for s in sections)} have no gene in common; "
            "check that all use the same gene naming (symbols or Ensembl ids)"
        )
    genes = tuple(g for g in sections[0].counts.var_names if g in shared)
    blocks, rows, dropped = [], [], 0
    for section in sections:
        columns = section.counts.var_names.get_indexer(genes)
        counts = sparse.csr_matrix(section.counts.X)[:, columns].astype(np.float32)
        kept = np.flatnonzero(np.asarray((counts > 0).sum(1)).ravel() >= protocol.min_genes_per_spot)
        if not len(kept):
            raise BadSection(
                section.name,
                f"no spot has {protocol.min_genes_per_spot} detected genes among the {len(genes)} that all sections "
                "have; lower protocol.min_genes_per_spot or leave out the section that lacks genes",
            )
        dropped += counts.shape[0] - len(kept) + section.dropped_spots
        blocks.append(_normalise(counts[kept], protocol))
        rows.append(kept)
    return SpotTable(
        sections=tuple(sections),
        expression=sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0],
        genes=genes,
        section=np.repeat(np.arange(len(sections)), [len(r) for r in rows]),
        source_row=np.concatenate(rows),
        position=np.concatenate(
            [
                np.asarray(s.counts.obsm["spatial"], dtype=np.float64)[r, :2] * s.um_per_px
                for s, r in zip(sections, rows, strict=True)
            ]
        ).astype(np.float32),
        dropped_spots=dropped,
    )


def _normalise(counts: sparse.csr_matrix, protocol: Protocol) -> sparse.csr_matrix:
    """ln(1 + count), after scaling each spot to `TARGET_SUM` if the protocol says so: (spots, genes) float32."""
    counts = counts.copy()
    if protocol.normalisation == "normalize_total+log1p":
        total = np.asarray(counts.sum(1)).ravel()  # > 0 unless min_genes_per_spot is 0
        counts = sparse.diags_array((TARGET_SUM / np.where(total > 0, total, 1)).astype(np.float32)) @ counts
    normalised = sparse.csr_matrix(counts, dtype=np.float32)
    np.log1p(normalised.data, out=normalised.data)
    return normalised
