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

PER_SECTION = ("pearson", "spearman", "mse", "moran_measured", "moran_predicted", "ssim")  # fields of `Scores`


@dataclass(frozen=True)
class Result:
    """A cell and its outcome.

    Attributes:
        spec: what was run.
        scores: test scores, each with its reduction in the name.
        genes: one row per gene: gene, primary, rank, score, weight (effective), those of `PER_SECTION` (mean over test
            sections) and pearson_pooled; NaN for auxiliary genes, which are not scored.
        epochs: one row per epoch record.
        best_epoch: whose state was tested.
        counts: spots in each set, genes, what was dropped.
        cost: seconds and peak memory; not part of what must be reproducible.
        provenance: versions, machine, commit.
    """

    spec: RunSpec
    scores: dict[str, float]
    genes: pd.DataFrame = field(repr=False)
    epochs: pd.DataFrame = field(repr=False)
    best_epoch: int
    counts: dict[str, int]
    cost: dict[str, float]
    provenance: dict[str, Any]

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
    columns = {name: mean_over_sections(getattr(scores, name)) for name in PER_SECTION}
    for name, values in (columns | {"pearson_pooled": scores.pooled}).items():
        table[name] = np.full(len(primary), np.nan)
        table.loc[primary, name] = values
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
