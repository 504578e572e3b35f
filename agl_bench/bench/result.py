"""What a finished cell leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from agl_bench.bench.spec import RunSpec
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.training.evaluate import Scores
from agl_bench.training.records import EpochRecord, Fit


@dataclass(frozen=True)
class Result:
    """A cell and its outcome.

    Attributes:
        spec: what was run.
        scores: test scores, each with its reduction in the name.
        genes: one row per gene: gene, primary, rank, score, weight (effective), pearson, spearman, mse (mean over
            test sections; NaN for auxiliary genes, which are not scored).
        epochs: one row per epoch record.
        best_epoch: whose state was tested.
        counts: spots in each set, genes, what was dropped, unlisted, unscored or tied.
        cost: seconds and peak memory; not part of what must be reproducible.
        provenance: versions, machine, commit.
        fold: digest of the fold's table, by which `folds/` has it, and how far test and training spots are apart
            (`data.folds.Separation`).
    """

    spec: RunSpec
    scores: dict[str, float]
    genes: pd.DataFrame = field(repr=False)
    epochs: pd.DataFrame = field(repr=False)
    best_epoch: int
    counts: dict[str, int]
    cost: dict[str, float]
    provenance: dict[str, Any]
    fold: dict[str, Any] = field(default_factory=dict)

    @property
    def pcc(self) -> float:
        """The headline score: PCC, mean over primary genes within a section, then over sections."""
        return self.scores["pcc_gene_mean_section_mean"]


def gene_table(genes: GeneSplit, fit: Fit, scores: Scores) -> pd.DataFrame:
    """See `Result.genes`."""
    primary = genes.primary.numpy()
    table = pd.DataFrame(
        {
            "gene": genes.names,
            "primary": primary,
            "rank": genes.rank.numpy(),
            "score": genes.score.numpy(),
            "weight": fit.effective_weights.numpy(),
        }
    )
    for name in ("pearson", "spearman", "mse"):
        column = np.full(len(primary), np.nan)
        column[primary] = mean_over_sections(getattr(scores, name))
        table[name] = column
    return table


def mean_over_sections(values: np.ndarray) -> np.ndarray:
    """(sections, genes) -> (genes,), ignoring sections where a gene has no score."""
    scored = np.isfinite(values)
    mean: np.ndarray = np.where(scored, values, 0).sum(0) / np.where(scored.any(0), scored.sum(0), np.nan)
    return mean


def epoch_table(records: list[EpochRecord]) -> pd.DataFrame:
    """One row per epoch; the selector's scalar parameters as columns "parameter.NAME"."""
    rows = []
    for record in records:
        row = {k: v for k, v in vars(record).items() if k != "parameters"}
        rows.append(row | {f"parameter.{k}": v for k, v in record.parameters.items()})
    return pd.DataFrame(rows).astype({"outer_loss": float, "outer_signal_to_noise": float})
