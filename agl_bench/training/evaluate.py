"""Predict the primary genes of some spots and score them section by section."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agl_bench.data.store import SpotStore
from agl_bench.maths import metrics
from agl_bench.training.model import Model

BATCH = 256  # spots for each forward pass; no influence on results in evaluation mode


@torch.no_grad()
def predict(model: Model, store: SpotStore, rows: Tensor, columns: Tensor) -> Tensor:
    """Predictions of the genes `columns` for the spots `rows`: (spots, columns), in evaluation mode."""
    was_training = model.training
    model.eval()
    here: np.ndarray = rows.cpu().numpy()
    batches = [here[start : start + BATCH] for start in range(0, len(here), BATCH)]
    parts = [model(batch.spots, None, columns)[1] for batch in store.stream(batches, expression=False)]
    model.train(was_training)
    return torch.cat(parts)


def pcc_by_section(prediction: Tensor, target: Tensor, section: np.ndarray) -> Tensor:
    """Pearson correlation of each gene within each section: (sections, genes) float64, NaN where not defined."""
    return torch.stack(
        [metrics.pearson(prediction[s], target[s]) for s in _rows_of_sections(section, prediction.device)]
    )


@dataclass(frozen=True)
class Scores:
    """Scores of the primary genes, (sections, genes) float64 on the host; NaN = the gene does not vary there.

    Attributes:
        pearson: PCC over the spots of the section.
        spearman: likewise with ranks.
        mse: mean squared error after the affine fit of the training spots, in squared ln(1 + …) units.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    mse: np.ndarray

    def summary(self) -> dict[str, float]:
        """Each score with its reduction in the name: over genes within a section, then over sections."""
        with np.errstate(all="ignore"):
            return {
                "pcc_gene_mean_section_mean": _mean_of_means(self.pearson),
                "pcc_gene_median_section_mean": float(np.mean([_reduce(np.nanmedian, r) for r in self.pearson])),
                "pcc_nan_as_zero_gene_mean_section_mean": float(np.nan_to_num(self.pearson).mean()),
                "pcc_nan_genes": float(np.isnan(self.pearson).sum()),
                "spearman_gene_mean_section_mean": _mean_of_means(self.spearman),
                "mse_after_training_affine_gene_mean_section_mean": _mean_of_means(self.mse),
            }


def evaluate(model: Model, test: SpotStore, development: SpotStore, training_rows: Tensor, primary: Tensor) -> Scores:
    """Score a trained model on test spots.

    Args:
        model: trained.
        test: the spots to score, all of them.
        development: the store the model was trained from, for the affine fit of the squared error.
        training_rows: its training spots.
        primary: (genes,) bool.
    """
    columns = primary.to(test.device).nonzero().squeeze(1)
    prediction = predict(model, test, torch.arange(len(test), device=test.device), columns)
    target = test.expression_of(columns=columns)
    slope, offset = metrics.affine_fit(
        predict(model, development, training_rows, columns), development.expression_of(training_rows, columns)
    )
    fitted = prediction * slope + offset
    parts = _rows_of_sections(test.section_on_host, prediction.device)
    return Scores(
        pearson=pcc_by_section(prediction, target, test.section_on_host).cpu().numpy(),
        spearman=torch.stack([metrics.spearman(prediction[s], target[s]) for s in parts]).cpu().numpy(),
        mse=torch.stack([metrics.mean_squared_error(fitted[s], target[s]) for s in parts]).cpu().numpy(),
    )


def _rows_of_sections(section: np.ndarray, device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(np.flatnonzero(section == s)).to(device) for s in np.unique(section)]


def _mean_of_means(scores: np.ndarray) -> float:
    """Mean over genes that have a score, within each section, then over sections; NaN if a section has none."""
    return float(np.mean([_reduce(np.nanmean, row) for row in scores]))


def _reduce(how: object, row: np.ndarray) -> float:
    return float(how(row)) if np.isfinite(row).any() else float("nan")  # type: ignore[operator]
