"""Predict the primary genes of some spots and score them section by section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from agl_bench.data.neighbours import REACH, pitch
from agl_bench.data.store import SpotStore
from agl_bench.maths import metrics
from agl_bench.training.model import Model

BATCH = 256  # spots for each forward pass; no influence on results in evaluation mode
SIGMA, TRUNCATE = 1.5, 3.5  # pitches, sigmas: the Gaussian window of Wang et al. 2004, cut off as usual
NEAREST = (1, 3, 6, 12, 24)  # numbers of neighbours that the position control chooses from


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
class PositionControl:
    """What a spot's place alone predicts: the mean of the nearest training spots of its section, no image, no model.

    Attributes:
        k: how many, chosen on the validation spots.
        pearson: (sections, genes) PCC on the test spots; NaN = not defined.
    """

    k: int
    pearson: np.ndarray


@dataclass(frozen=True)
class Maps:
    """What was scored, spot by spot, on the host.

    Attributes:
        predicted: (spots, genes) float32, as the model gives it; a loss of correlations leaves its scale open.
        measured: (spots, genes) float32, the targets.
        slope, offset: (genes,) float32, the affine fit of the training spots: predicted · slope + offset has the units
            of the targets.
    """

    predicted: np.ndarray
    measured: np.ndarray
    slope: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Scores of the primary genes, (sections, genes) float64 on the host; NaN = the gene does not vary there.

    Attributes:
        pearson: PCC over the spots of the section.
        spearman: likewise with ranks.
        mse: mean squared error after the affine fit of the training spots, in squared units of the targets: ln(1 + …),
            Pearson residuals or standard scores, as the protocol says.
        moran_measured: Moran's I of the measured map; neighbours are test spots of the section.
        moran_predicted: Moran's I of the predicted map.
        ssim: structural similarity of the measured map and the predicted one after the affine fit.
        pooled: (genes,) PCC over the test spots of all sections at once, which also rewards offsets between sections.
        position: the position control; None where a test section has no training spots.
        maps: what was scored; None where nobody has kept it.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    mse: np.ndarray
    moran_measured: np.ndarray
    moran_predicted: np.ndarray
    ssim: np.ndarray
    pooled: np.ndarray
    position: PositionControl | None = None
    maps: Maps | None = None

    def summary(self) -> dict[str, float]:
        """Each score with its reduction in the name: over genes within a section, then over sections."""
        difference = np.abs(self.moran_predicted - self.moran_measured)
        with np.errstate(all="ignore"):
            summary = {
                "pcc_gene_mean_section_mean": _mean_of_means(self.pearson),
                "pcc_gene_median_section_mean": float(np.mean([_reduce(np.nanmedian, r) for r in self.pearson])),
                "pcc_nan_as_zero_gene_mean_section_mean": float(np.nan_to_num(self.pearson).mean()),
                "pcc_nan_genes": float(np.isnan(self.pearson).sum()),
                "pcc_pooled_gene_mean": _reduce(np.nanmean, self.pooled),
                "spearman_gene_mean_section_mean": _mean_of_means(self.spearman),
                "spearman_nan_as_zero_gene_mean_section_mean": float(np.nan_to_num(self.spearman).mean()),
                "mse_after_training_affine_gene_mean_section_mean": _mean_of_means(self.mse),
                "moran_absolute_difference_gene_mean_section_mean": _mean_of_means(difference),
                "moran_correlation_over_genes_section_mean": float(np.mean(self._moran_correlations())),
                "ssim_after_training_affine_gene_mean_section_mean": _mean_of_means(self.ssim),
            }
            if self.position is not None:
                summary["control_position_knn_pcc_gene_mean_section_mean"] = _mean_of_means(self.position.pearson)
                summary["control_position_knn_k"] = float(self.position.k)
        return summary

    def _moran_correlations(self) -> list[float]:
        """Pearson correlation over genes of predicted and measured Moran's I in each section."""
        found = []
        for predicted, measured in zip(self.moran_predicted, self.moran_measured, strict=True):
            both = torch.from_numpy(np.stack([predicted, measured], 1)[np.isfinite(predicted + measured)])
            found.append(float(metrics.pearson(both[:, :1], both[:, 1:])) if len(both) > 1 else float("nan"))
        return found


def evaluate(
    model: Model,
    test: SpotStore,
    development: SpotStore,
    training_rows: Tensor,
    primary: Tensor,
    validation_rows: Tensor | None = None,
) -> Scores:
    """Score a trained model on test spots.

    Args:
        model: trained.
        test: the spots to score, all of them.
        development: the store the model was trained from, for the affine fit of the squared error.
        training_rows: its training spots.
        primary: (genes,) bool.
        validation_rows: its validation spots, for the position control; None = there is none.
    """
    columns = primary.to(test.device).nonzero().squeeze(1)
    prediction = predict(model, test, torch.arange(len(test), device=test.device), columns)
    target = test.expression_of(columns=columns)
    slope, offset = metrics.affine_fit(
        predict(model, development, training_rows, columns), development.expression_of(training_rows, columns)
    )
    fitted = prediction * slope + offset
    sections = [
        _scores_of_section(prediction[s], fitted[s], target[s], test.position[s])
        for s in _rows_of_sections(test.section_on_host, prediction.device)
    ]
    position = None
    if validation_rows is not None:
        position = _position_control(test, development, training_rows, validation_rows, columns)
    return Scores(
        **{name: torch.stack([scores[name] for scores in sections]).cpu().numpy() for name in sections[0]},
        pooled=metrics.pearson(prediction, target).cpu().numpy(),
        position=position,
        maps=Maps(*(t.float().cpu().numpy() for t in (prediction, target, slope, offset))),
    )


def _scores_of_section(prediction: Tensor, fitted: Tensor, target: Tensor, position: Tensor) -> dict[str, Tensor]:
    """The scores (genes,) of one section, each under its name in `Scores`; `fitted` is in the units of the target."""
    index, distance = _around(position, REACH)
    adjacent = (distance > 0) & distance.isfinite()
    return {
        "pearson": metrics.pearson(prediction, target),
        "spearman": metrics.spearman(prediction, target),
        "mse": metrics.mean_squared_error(fitted, target),
        "moran_measured": metrics.moran(target, index, adjacent),
        "moran_predicted": metrics.moran(prediction, index, adjacent),
        "ssim": metrics.structural_similarity(fitted, target, *_window(position)),
    }


def _position_control(
    test: SpotStore, development: SpotStore, training_rows: Tensor, validation_rows: Tensor, columns: Tensor
) -> PositionControl | None:
    """Means of the nearest training spots of the same section, as many as do best on the validation spots."""
    section = development.section_on_host
    train, validation = training_rows.cpu().numpy(), validation_rows.cpu().numpy()
    fewest = min(int((section[train] == s).sum()) for s in np.unique([*test.section_on_host, *section[validation]]))
    if not fewest:
        return None
    expression = development.expression_of(training_rows, columns).double()
    places = development.position[training_rows].double().cpu().numpy()

    def predictions(store: SpotStore, rows: np.ndarray) -> Iterator[Tensor]:
        """(spots, genes) for each of `NEAREST`, as far as there are so many training spots."""
        here = store.section_on_host[rows]
        position = store.position[torch.from_numpy(rows).to(store.device)].double().cpu().numpy()
        most = min(NEAREST[-1], fewest)
        nearest = np.empty((len(rows), most), dtype=np.int64)
        for s in np.unique(here):
            there = np.flatnonzero(section[train] == s)
            found = cKDTree(places[there]).query(position[here == s], k=range(1, most + 1))[1]
            nearest[here == s] = there[found]
        around = expression[torch.from_numpy(nearest).to(expression.device)]  # (spots, most, genes)
        return (around[:, :k].mean(1) for k in NEAREST if k <= most)

    def pcc(store: SpotStore, rows: np.ndarray) -> list[np.ndarray]:
        target = store.expression_of(torch.from_numpy(rows).to(store.device), columns)
        return [pcc_by_section(p, target, store.section_on_host[rows]).cpu().numpy() for p in predictions(store, rows)]

    chosen = int(np.argmax([np.nan_to_num(p).mean() for p in pcc(development, validation)]))
    return PositionControl(NEAREST[chosen], pcc(test, np.arange(len(test)))[chosen])


def _around(position: Tensor, pitches: float) -> tuple[Tensor, Tensor]:
    """The spots within so many pitches of each spot, itself included.

    The pitch is the median distance from a spot to the next one, so that sparse test spots have neighbours as well.

    Args:
        position: (spots, 2) of one section.
        pitches: radius.

    Returns:
        index (spots, most) int64, and distance (spots, most) float64 in pitches, infinite where the row is padded.
    """
    places = position.double().cpu().numpy()
    tree = cKDTree(places)
    unit = pitch(places) or 1.0  # of spots in one place: any will do
    radius = unit * pitches * (1 + 1e-6)  # positions are float32
    most = int(tree.query_ball_point(places, radius, return_length=True).max())
    distance, index = tree.query(places, k=range(1, most + 1), distance_upper_bound=np.nextafter(radius, np.inf))
    index = np.where(np.isfinite(distance), index, 0)
    return torch.from_numpy(index).to(position.device), torch.from_numpy(distance / unit).to(position.device)


def _window(position: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (spots, most) of the spots around each and their Gaussian weights, 0 where the row is padded."""
    index, distance = _around(position, SIGMA * TRUNCATE)
    return index, torch.exp(-(distance / SIGMA).square() / 2)


def _rows_of_sections(section: np.ndarray, device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(np.flatnonzero(section == s)).to(device) for s in np.unique(section)]


def _mean_of_means(scores: np.ndarray) -> float:
    """Mean over genes that have a score, within each section, then over sections; NaN if a section has none."""
    return float(np.mean([_reduce(np.nanmean, row) for row in scores]))


def _reduce(how: object, row: np.ndarray) -> float:
    return float(how(row)) if np.isfinite(row).any() else float("nan")  # type: ignore[operator]
