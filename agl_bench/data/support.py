"""What primary genes rest on: whether they are seen in many spots, and whether a few spots carry their scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np
from scipy import sparse

from agl_bench.data.gene_split import detection, score_genes
from agl_bench.data.preprocess import SpotTable
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.protocol import OF_COUNTS, Protocol

RARE, FEWEST = 0.1, 10  # share and number of training spots; a primary gene seen in fewer is rare
FEW, FEW_SPOTS = 0.01, 3  # share and number of training spots that are taken from a gene: the larger of both, ...
MANY = 40  # ... but no more than one of so many, unless there are fewer
LOSS = 0.5  # of its score: a gene that loses more without those spots is carried by them
_NAMED = 5  # genes that a sentence names
_ROBUST = Protocol.primary_score  # the default
_CURES = (
    f"a few thin spots may decide: use protocol.primary_score = {_ROBUST}, or raise protocol.min_genes_per_spot",
    "look at the spots where these genes are highest, and remove such spots or genes if they are artefacts",
)


@dataclass(frozen=True)
class Support:
    """What the primary genes of a fold rest on.

    Attributes:
        genes: how many they are.
        spots: that decide.
        few: spots that were taken from each gene.
        cure: what to do where a few spots carry genes.
        rare: gene -> number of spots it is detected in, fewest first.
        carried: gene -> share of its score that is left without its `few` most influential spots, least first.
    """

    genes: int
    spots: int
    few: int
    cure: str
    rare: dict[str, int]
    carried: dict[str, float]

    @property
    def sentences(self) -> list[str]:
        """A sentence for each thing that a reader should know; none where all is well."""
        found = []
        if self.rare:
            names = _some(f"{gene} in {spots}" for gene, spots in self.rare.items())
            found.append(
                f"{len(self.rare)} of {self.genes} primary genes {'is' if len(self.rare) == 1 else 'are'} detected in "
                f"only a few of the {self.spots:,} spots that count ({names}); raise protocol.primary_detection, or "
                "name other genes in protocol.primary_file"
            )
        if self.carried:
            names = _some(f"{gene} keeps {left:.0%}" for gene, left in self.carried.items())
            one = len(self.carried) == 1
            found.append(
                f"{len(self.carried)} of {self.genes} primary genes {'owes' if one else 'owe'} more than half of "
                f"{'its' if one else 'their'} score to {self.few} of {self.spots:,} spots{'' if one else ' each'} "
                f"({names}); {self.cure}"
            )
        return found


def support_of(table: SpotTable, training_rows: np.ndarray, genes: GeneSplit, protocol: Protocol) -> Support:
    """Look at the primary genes of a fold as `split_genes` has chosen them.

    The most influential spots of a gene are those with its largest values: where the score is of counts, the largest
    Poisson residuals, else the largest normalised values. Its counts there are taken away and the score made anew,
    for all primary genes at once. Genes that a file names owe nothing to a score.

    Args:
        table: all spots.
        training_rows: rows of the training spots.
        genes: of the fold.
        protocol: with the score, and the spots that decide.
    """
    rows = training_rows if protocol.genes_from == "training" else np.arange(len(table))
    place = {name: column for column, name in enumerate(table.genes)}
    columns = np.array([place[name] for name in genes.names], dtype=np.int64)
    primary = np.flatnonzero(genes.primary.numpy())
    names = [genes.names[gene] for gene in primary]
    seen = detection(table, rows)[columns[primary]]
    rare = {n: int(s) for n, s in zip(names, seen, strict=True) if s < max(FEWEST, RARE * len(rows))}
    few = max(1, min(FEW_SPOTS, len(rows) // MANY), int(np.ceil(FEW * len(rows))))
    carried: dict[str, float] = {}
    if not protocol.primary_file and few < len(rows):
        taken = _influential(table, rows, columns[primary], few, of_counts=protocol.primary_score in OF_COUNTS)
        lesser = _Lesser(**{f.name: getattr(table, f.name) for f in fields(table)}, taken=taken)
        known = protocol.ranking == protocol.primary_score and not protocol.ranking_file
        before = genes.score.numpy() if known else score_genes(protocol.primary_score, table, rows, columns)
        before, after = (s[primary] for s in (before, score_genes(protocol.primary_score, lesser, rows, columns)))
        left = {
            n: max(float(a), 0.0) / float(b)
            for n, b, a in zip(names, before, np.nan_to_num(after), strict=True)
            if b > 0
        }
        carried = {n: share for n, share in left.items() if share < 1 - LOSS}
    return Support(
        len(names), len(rows), few, _CURES[protocol.primary_score == _ROBUST],
        dict(sorted(rare.items(), key=lambda item: item[1])), dict(sorted(carried.items(), key=lambda item: item[1])),
    )  # fmt: skip


@dataclass(frozen=True)
class _Lesser(SpotTable):
    """A table in which genes have no counts at some spots; totals stay.

    Attributes:
        taken: (spots, genes) with 1 where a count is taken away.
    """

    taken: sparse.csr_matrix = field(kw_only=True)

    def counts(self, rows: np.ndarray, columns: np.ndarray | None = None) -> sparse.csr_matrix:
        values = super().counts(rows, columns)
        taken = self.taken[rows] if columns is None else self.taken[rows][:, columns]
        return (values - values.multiply(taken)).tocsr()


def _influential(
    table: SpotTable, rows: np.ndarray, columns: np.ndarray, few: int, *, of_counts: bool
) -> sparse.csr_matrix:
    """Of each gene the `few` spots with the largest values, (spots, genes of the table) with 1 there."""
    values = (table.counts if of_counts else table.rows)(rows, columns).toarray().astype(np.float64)
    if of_counts:
        for section in np.unique(table.section[rows]):
            here = table.section[rows] == section
            total = table.total[rows[here], None]
            expected = total * (values[here].sum(0) / max(total.sum(), 1.0))
            values[here] = (values[here] - expected) / np.sqrt(np.where(expected > 0, expected, 1))
    top = np.argsort(-values, axis=0, kind="stable")[:few]
    spots, genes = rows[top].ravel(), np.tile(columns, few)
    return sparse.csr_matrix(
        (np.ones(len(spots), dtype=np.float32), (spots, genes)), shape=(len(table), len(table.genes))
    )


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:_NAMED]) + (" …" if len(listed) > _NAMED else "")
