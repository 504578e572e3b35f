"""What a finished cell leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.spec import RunSpec
from agl_bench.data.preprocess import SpotTable
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.training.evaluate import Maps, Scores
from agl_bench.training.records import EpochRecord, Fit

PER_SECTION = ("pearson", "spearman", "mse", "moran_measured", "moran_predicted", "ssim")  # fields of `Scores`


@dataclass(frozen=True)
class Result:
    """A cell and its outcome.

    Attributes:
        spec: what was run.
        scores: test scores, each with its reduction in the name.
        genes: one row per gene: gene, primary, rank, score, mean (of the normalised values over training spots),
            detection (share of training spots that have any), weight (effective), and, NaN for auxiliary genes, which
            are not scored, those of `PER_SECTION` (mean over test sections), pearson_pooled, slope and offset (see
            `training.evaluate.Maps`).
        epochs: one row per epoch record.
        outer: one row per pass of outer steps (Fig. 4 of Shiku et al. 2026): epoch, turn within the epoch, outer_loss,
            outer_signal_to_noise, validation_pcc and selected (k) after it. The last two are those of the copy of the
            model that awaits convergence, and where there is none those of the epoch.
        best_epoch: whose state was tested.
        counts: spots in each set, genes, what was dropped, unlisted, unscored or tied.
        cost: seconds and peak memory; not part of what must be reproducible.
        provenance: versions, machine, commit.
        fold: digest of the fold's table, by which `folds/` has it, and how far test and training spots are apart
            (`data.folds.Separation`).
        predictions: see `prediction_table`; None unless the cell has just been made, see `CellStore.predictions`.
        model: in its best state; None likewise, see `CellStore.model`.
    """

    spec: RunSpec
    scores: dict[str, float]
    genes: pd.DataFrame = field(repr=False)
    epochs: pd.DataFrame = field(repr=False)
    outer: pd.DataFrame = field(repr=False)
    best_epoch: int
    counts: dict[str, int]
    cost: dict[str, float]
    provenance: dict[str, Any]
    fold: dict[str, Any] = field(default_factory=dict)
    predictions: pd.DataFrame | None = field(default=None, repr=False)
    model: KeptModel | None = field(default=None, repr=False)

    @property
    def pcc(self) -> float:
        """The headline score: PCC, mean over primary genes within a section, then over sections."""
        return self.scores["pcc_gene_mean_section_mean"]


def gene_table(genes: GeneSplit, fit: Fit, scores: Scores, mean: np.ndarray, detection: np.ndarray) -> pd.DataFrame:
    """See `Result.genes`.

    Args:
        genes: gene axis of the fold.
        fit: what training has led to.
        scores: of the test spots.
        mean, detection: (genes,) over the training spots.
    """
    primary = genes.primary.numpy()
    table = pd.DataFrame(
        {
            "gene": genes.names,
            "primary": primary,
            "rank": genes.rank.numpy(),
            "score": genes.score.numpy(),
            "mean": mean.astype(np.float32),
            "detection": detection.astype(np.float32),
            "weight": fit.effective_weights.numpy(),
        }
    )
    columns = {name: mean_over_sections(getattr(scores, name)) for name in PER_SECTION}
    columns["pearson_pooled"] = scores.pooled
    if scores.maps is not None:
        columns |= {"slope": scores.maps.slope, "offset": scores.maps.offset}
    for name, values in columns.items():
        table[name] = np.full(len(primary), np.nan)
        table.loc[primary, name] = values
    return table


def prediction_table(table: SpotTable, rows: np.ndarray, genes: GeneSplit, maps: Maps) -> pd.DataFrame:
    """One row per test spot: section, spot, x_px and y_px (of its centre, as in the section's `obsm["spatial"]`), and
    for each primary gene "predicted:GENE" and "measured:GENE", float32, as in `Maps`: what the scores are made of.

    Args:
        table: all spots.
        rows: of the test spots.
        genes: gene axis of the fold.
        maps: of the test spots, in the order of `rows`.
    """
    section, source = table.section[rows], table.source_row[rows]
    spots, places = np.empty(len(rows), dtype=object), np.empty((len(rows), 2))
    for index in np.unique(section):
        here, counts = section == index, table.sections[index].counts
        spots[here] = counts.obs_names[source[here]]
        places[here] = np.asarray(counts.obsm["spatial"])[source[here], :2]
    names = [name for name, primary in zip(genes.names, genes.primary.tolist(), strict=True) if primary]
    columns = {
        "section": np.asarray([s.name for s in table.sections], dtype=object)[section],
        "spot": spots,
        "x_px": places[:, 0],
        "y_px": places[:, 1],
    }
    for kind, values in (("predicted", maps.predicted), ("measured", maps.measured)):
        columns |= {f"{kind}:{name}": values[:, place] for place, name in enumerate(names)}
    return pd.DataFrame(columns)


def mean_over_sections(values: np.ndarray) -> np.ndarray:
    """(sections, genes) -> (genes,), ignoring sections where a gene has no score."""
    scored = np.isfinite(values)
    mean: np.ndarray = np.where(scored, values, 0).sum(0) / np.where(scored.any(0), scored.sum(0), np.nan)
    return mean


def epoch_table(records: list[EpochRecord]) -> pd.DataFrame:
    """One row per epoch; the selector's scalar parameters as columns "parameter.NAME"."""
    rows = [record.row() for record in records]
    return pd.DataFrame(rows).astype({"outer_loss": float, "outer_signal_to_noise": float})


def outer_table(records: list[EpochRecord]) -> pd.DataFrame:
    """See `Result.outer`."""
    rows = [
        {
            "epoch": record.epoch,
            "turn": turn,
            "outer_loss": made.loss,
            "outer_signal_to_noise": made.signal_to_noise,
            "validation_pcc": record.validation_pcc if made.validation_pcc is None else made.validation_pcc,
            "selected": record.selected if made.selected is None else made.selected,
        }
        for record in records
        for turn, made in enumerate(record.outer)
    ]
    kinds = {"epoch": int, "turn": int, "outer_loss": float, "outer_signal_to_noise": float, "validation_pcc": float}
    return pd.DataFrame(rows, columns=[*kinds, "selected"]).astype(kinds | {"selected": int})
