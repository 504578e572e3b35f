"""What a model predicts, made from the values that a store holds: Pearson residuals, standard scores of a section.

Both are dense. They are made when spots are gathered, on the device, so that storage stays sparse, by elementwise
operations of IEEE arithmetic alone: a target is the same bit for bit in whatever block it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from agl_bench.data.preprocess import SpotTable
from agl_bench.protocol import Protocol

THETA = 100.0  # overdispersion of the counts (Lause et al. 2021)
_BLOCK = 1024  # spots looked at at a time


@dataclass(frozen=True)
class TargetRule:
    """How targets are made from stored values, as fitted on a fold; without anything set, they are the stored values.

    Attributes:
        share: (genes,) float64, of all counts of the panel; None = what is stored is log-normalised, no counts.
        clip: largest absolute residual.
        mean: (sections, genes) float64 that is subtracted; None = no standard scores.
        deviation: (sections, genes) float64 that is divided by, > 0.
    """

    share: np.ndarray | None = None
    clip: float = 0.0
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None

    def stored(self, table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """What a store holds of some spots, (rows, columns) float32."""
        return table.rows(rows, columns) if self.share is None else table.counts(rows, columns)


def fit_targets(table: SpotTable, training_rows: np.ndarray, columns: np.ndarray, protocol: Protocol) -> TargetRule:
    """Fit the targets of a fold.

    Pearson residuals (Lause et al. 2021): (x − μ) / √(μ + μ²/θ) with μ = total of the spot × share of the gene and
    θ = 100, clipped to ±√n. Shares and n are of the training spots, or of all where `protocol.genes_from` is "all".

    Standard scores: mean and standard deviation (of the population) of the section's training spots. A section without
    such spots, tested in inter-batch evaluation, gets the mean of theirs, so that it is in the units that a model has
    learnt to predict; a correlation within a section does not change with them. A gene that does not vary is only
    centred.

    Args:
        table: all spots.
        training_rows: rows of the training spots.
        columns: (genes,) columns of the table, the genes of the fold.
        protocol: which targets.
    """
    rule = TargetRule()
    if protocol.normalisation == "pearson_residuals":
        decide = training_rows if protocol.genes_from == "training" else np.arange(len(table))
        counts = np.zeros(len(columns))
        for block in _blocks(decide):
            counts += np.asarray(table.counts(block, columns).sum(0, dtype=np.float64)).ravel()
        rule = TargetRule(share=counts / max(table.total[decide].sum(), 1.0), clip=float(np.sqrt(len(decide))))
    if protocol.standardise == "section":
        mean, deviation = _moments(table, training_rows, columns, rule)
        rule = replace(rule, mean=mean, deviation=deviation)
    return rule


def _moments(
    table: SpotTable, rows: np.ndarray, columns: np.ndarray, rule: TargetRule
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each section's targets, (sections, genes) float64.

    Where a section has none of `rows`, the mean of the others' means and variances, by their numbers of spots.
    """
    mean = np.zeros((len(table.sections), len(columns)))
    variance = np.zeros_like(mean)
    spots = np.bincount(table.section[rows], minlength=len(mean))
    for section in np.unique(table.section[rows]):
        here = rows[table.section[rows] == section]
        first, total, squares = None, np.zeros(len(columns)), np.zeros(len(columns))
        for block in _blocks(here):
            made = torch.from_numpy(rule.stored(table, block, columns).toarray())
            targets = Targets.of(rule, table, block, columns, made.device)
            values = (made if targets is None else targets(made, torch.arange(len(block)))).numpy().astype(np.float64)
            first = values[0].copy() if first is None else first
            values -= first  # so that a gene that does not vary has exactly no deviation
            total += values.sum(0)
            squares += np.square(values, out=values).sum(0)
        assert first is not None
        away = total / len(here)
        mean[section], variance[section] = first + away, np.maximum(squares / len(here) - away**2, 0)
    for values in (mean, variance):
        values[spots == 0] = spots @ values / len(rows)
    return mean, np.where(variance > 0, np.sqrt(variance), 1)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))


@dataclass(frozen=True)
class Targets:
    """A rule for the spots and genes of a store, on its device; called with blocks of stored values.

    Attributes:
        total: (spots, 1) float32, counts of all genes of the panel.
        section: (spots,) int64.
        clip: as in the rule, whose other numbers are float32 here.
        absent: (sections, genes) bool, genes that a section lacks: their residual is 0, a constant.
    """

    total: Tensor
    section: Tensor
    clip: float
    share: Tensor | None
    absent: Tensor | None
    mean: Tensor | None
    deviation: Tensor | None

    @classmethod
    def of(
        cls, rule: TargetRule, table: SpotTable, rows: np.ndarray, columns: np.ndarray, device: torch.device
    ) -> Targets | None:
        """For the spots `rows` of the table and all genes of the rule, which are its `columns`; None: nothing to do."""
        if rule.share is None and rule.mean is None:
            return None

        def there(values: np.ndarray | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).to(device, dtype)

        absent = table.source_columns[:, columns] < 0
        return cls(
            total=torch.from_numpy(table.total[rows]).to(device, torch.float32)[:, None],
            section=torch.from_numpy(table.section[rows]).to(device),
            clip=rule.clip,
            share=there(rule.share),
            absent=there(absent, torch.bool) if rule.share is not None and absent.any() else None,
            mean=there(rule.mean),
            deviation=there(rule.deviation),
        )

    def __call__(self, values: Tensor, rows: Tensor) -> Tensor:
        """Targets (rows, genes) of the spots `rows` (of the store) from their stored values."""
        section = self.section[rows]
        if self.share is not None:
            expected = self.total[rows] * self.share
            spread = (expected + expected.square() / THETA).sqrt_()
            values = torch.sub(values, expected, out=expected).div_(spread)
            # A gene without counts in the spots that decide: 0 / 0 is no surprise, a count is the largest there is.
            values = values.nan_to_num_(nan=0.0).clamp_(-self.clip, self.clip)
            if self.absent is not None:
                values = values.masked_fill_(self.absent[section], 0)
        if self.mean is not None and self.deviation is not None:
            values = (values - self.mean[section]).div_(self.deviation[section])
        return values

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        held = (self.total, self.section, self.share, self.absent, self.mean, self.deviation)
        return sum(t.nbytes for t in held if t is not None)

    def narrow(self, columns: Tensor) -> Targets:
        """Only these genes, in this order."""
        share = None if self.share is None else self.share[columns]
        absent, mean, deviation = (
            None if t is None else t[:, columns] for t in (self.absent, self.mean, self.deviation)
        )
        return replace(self, share=share, absent=absent, mean=mean, deviation=deviation)
