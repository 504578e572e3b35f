"""Scores of a trained model, section by section, against scipy and numpy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import ndimage

from agl_bench.data.store import SpotStore
from agl_bench.maths.metrics import structural_similarity
from agl_bench.training import evaluate as module
from agl_bench.training.evaluate import (
    PositionControl,
    Scores,
    _around,
    _position_control,
    _window,
    evaluate,
    pcc_by_section,
    predict,
)
from agl_bench.training.model import Model
from agl_bench_plugins.selectors.pgl import Pgl

NAN = float("nan")


class Cell:
    """A toy cell whose development store is tested too: it has two sections."""

    def __init__(self, make_toy: Callable) -> None:
        self.toy = make_toy()
        self.model: Model = self.toy.model()
        self.store, self.genes = self.toy.development, self.toy.genes
        self.rows = torch.from_numpy(self.toy.rows.train)
        self.columns = self.genes.primary.nonzero().squeeze(1)

    def scores(self) -> Scores:
        return evaluate(self.model, self.store, self.store, self.rows, self.genes.primary)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prediction and target (spots, primary) and the section of each spot, straight from the model."""
        with torch.no_grad():
            prediction = self.model(self.store.spots(torch.arange(len(self.store))))[1][:, self.columns]
        target = self.store.expression_of(columns=self.columns)
        return prediction.double().numpy(), target.double().numpy(), self.store.section_on_host


@pytest.fixture
def cell(make_toy: Callable) -> Cell:
    return Cell(make_toy)


def test_prediction_is_that_of_the_model_in_evaluation_mode(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = torch.arange(len(cell.store))
    expected = torch.from_numpy(cell.arrays()[0]).float()
    for batch in (1, 7, 256):
        monkeypatch.setattr(module, "BATCH", batch)
        torch.testing.assert_close(
            predict(cell.model, cell.store, everything, cell.columns), expected, rtol=0, atol=1e-6
        )
    some = torch.tensor([5, 0, 5])
    found = predict(cell.model, cell.store, some, cell.columns.flip(0))
    torch.testing.assert_close(found, expected[some].flip(1), rtol=0, atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(cell: Cell, training: bool) -> None:
    cell.model.train(training)
    predict(cell.model, cell.store, torch.arange(3), cell.columns)
    assert cell.model.training == training


def test_correlations_are_within_sections(cell: Cell) -> None:
    prediction, target, section = cell.arrays()
    scores = cell.scores()
    assert set(section) == {0, 1} and scores.pearson.shape == scores.spearman.shape == scores.mse.shape == (2, 6)
    for s in (0, 1):
        for g in range(6):
            p, y = prediction[section == s, g], target[section == s, g]
            assert scores.pearson[s, g] == pytest.approx(scipy.stats.pearsonr(p, y)[0], rel=0, abs=1e-5)
            assert scores.spearman[s, g] == pytest.approx(scipy.stats.spearmanr(p, y)[0], rel=0, abs=2e-3)


def test_squared_error_is_after_the_affine_fit_of_the_training_spots(cell: Cell) -> None:
    prediction, target, section = cell.arrays()
    train = cell.toy.rows.train
    for g in range(6):
        line = np.polyfit(prediction[train, g], target[train, g], 1)
        error = (np.polyval(line, prediction[:, g]) - target[:, g]) ** 2
        for s in (0, 1):
            assert cell.scores().mse[s, g] == pytest.approx(error[section == s].mean(), rel=1e-3)


def test_scale_and_offset_of_the_head_change_no_score(cell: Cell) -> None:
    before = cell.scores()
    with torch.no_grad():
        cell.model.head.weight.mul_(4.0)
        cell.model.head.bias.mul_(4.0).add_(3.0)
    after = cell.scores()
    np.testing.assert_allclose(after.pearson, before.pearson, atol=1e-4)
    np.testing.assert_allclose(after.mse, before.mse, rtol=1e-3)


def test_genes_that_do_not_vary_are_counted(cell: Cell) -> None:
    rows = np.flatnonzero(cell.store.section_on_host == 1)
    cell.store.expression_of()[rows, int(cell.columns[2])] = 0.7  # constant in one section
    with torch.no_grad():
        cell.model.head.weight[cell.columns[4]] = 0  # predicted to be constant everywhere
    scores = cell.scores()
    expected = np.zeros((2, 6), dtype=bool)
    expected[1, 2] = expected[:, 4] = True
    np.testing.assert_array_equal(np.isnan(scores.pearson), expected)
    np.testing.assert_array_equal(np.isnan(scores.spearman), expected)
    assert np.isfinite(scores.mse).all()
    assert scores.summary()["pcc_nan_genes"] == 3
    train, section = cell.toy.rows.train, cell.store.section_on_host
    target = cell.store.expression_of()[:, cell.columns[4]].double().numpy()
    for s in (0, 1):  # slope 0, the mean of the training spots
        error = (target[section == s] - target[train].mean()) ** 2
        assert scores.mse[s, 4] == pytest.approx(error.mean(), rel=1e-5)


def test_pcc_by_section_follows_the_order_of_the_sections() -> None:
    section = np.array([5, 2, 5, 2, 5, 2])
    prediction = torch.tensor([[1.0], [1], [2], [2], [3], [3]])
    target = torch.tensor([[1.0], [3], [2], [2], [3], [1]])
    assert pcc_by_section(prediction, target, section).squeeze(1).tolist() == pytest.approx([-1, 1])


def made_up(**known: np.ndarray | PositionControl) -> Scores:
    """Scores of two sections and two genes, all 0.5 but those that are given."""
    names = ("pearson", "spearman", "mse", "moran_measured", "moran_predicted", "ssim")
    return Scores(**{n: np.full((2, 2), 0.5) for n in names} | {"pooled": np.full(2, 0.5)} | known)


def test_summary() -> None:
    scores = Scores(
        pearson=np.array([[0.1, 0.2, 0.6, NAN], [0.5, NAN, NAN, -0.1]]),
        spearman=np.array([[0.2, 0.4, NAN, NAN], [0.1, 0.3, 0.5, 0.7]]),
        mse=np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        moran_measured=np.array([[0.1, 0.2, 0.3, 0.9], [0.0, 0.1, NAN, 0.5]]),
        moran_predicted=np.array([[0.2, 0.4, 0.6, NAN], [0.6, 0.5, 0.3, 0.1]]),
        ssim=np.array([[0.1, 0.3, NAN, NAN], [0.5, 0.5, 0.6, 0.8]]),
        pooled=np.array([0.1, NAN, 0.2, 0.6]),
        position=PositionControl(6, np.array([[0.1, 0.3, NAN, NAN], [0.5, 0.5, 0.6, 0.8]])),
    )
    second = np.corrcoef([0.0, 0.1, 0.5], [0.6, 0.5, 0.1])[0, 1]
    assert scores.summary() == {
        "pcc_gene_mean_section_mean": pytest.approx((0.3 + 0.2) / 2),
        "pcc_gene_median_section_mean": pytest.approx((0.2 + 0.2) / 2),
        "pcc_nan_as_zero_gene_mean_section_mean": pytest.approx((0.9 + 0.4) / 8),
        "pcc_nan_genes": 3,
        "pcc_pooled_gene_mean": pytest.approx(0.3),
        "spearman_gene_mean_section_mean": pytest.approx((0.3 + 0.4) / 2),
        "spearman_nan_as_zero_gene_mean_section_mean": pytest.approx((0.6 + 1.6) / 8),
        "mse_after_training_affine_gene_mean_section_mean": 4.5,
        "moran_absolute_difference_gene_mean_section_mean": pytest.approx((0.2 + 1.4 / 3) / 2),
        "moran_correlation_over_genes_section_mean": pytest.approx((1 + second) / 2),
        "ssim_after_training_affine_gene_mean_section_mean": pytest.approx((0.2 + 0.6) / 2),
        "control_position_knn_pcc_gene_mean_section_mean": pytest.approx((0.2 + 0.6) / 2),
        "control_position_knn_k": 6,
    }
    assert not [name for name in scores.summary() if re.search(r"[^a-z0-9_/.-]", name)]  # as MLflow takes them


def test_a_section_without_any_score_is_nan_without_a_warning() -> None:
    nothing = np.array([[NAN, NAN], [0.5, 0.7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = made_up(
            pearson=nothing, spearman=nothing, ssim=nothing, moran_predicted=nothing, pooled=np.full(2, NAN)
        )
        summary = scores.summary()
    for name in (
        "pcc_gene_mean",
        "pcc_gene_median",
        "moran_correlation_over_genes",
        "ssim_after_training_affine_gene_mean",
    ):
        assert np.isnan(summary[f"{name}_section_mean"])
    assert np.isnan(summary["pcc_pooled_gene_mean"])
    assert summary["pcc_nan_as_zero_gene_mean_section_mean"] == pytest.approx(0.3) and summary["pcc_nan_genes"] == 2
    assert "control_position_knn_k" not in summary


def test_pooled_correlation_is_over_all_sections_at_once(cell: Cell) -> None:
    prediction, target, _ = cell.arrays()
    expected = [scipy.stats.pearsonr(prediction[:, g], target[:, g])[0] for g in range(6)]
    np.testing.assert_allclose(cell.scores().pooled, expected, atol=1e-5)


def brute(position: np.ndarray, pitches: float) -> tuple[np.ndarray, float]:
    """All distances between spots in pitches, and the radius."""
    distance = np.linalg.norm(position[:, None] - position, axis=-1)
    pitch = np.median(np.sort(distance, axis=1)[:, 1])
    return distance / pitch, pitches


def test_maps_are_compared_within_sections(cell: Cell) -> None:
    """Moran's I and SSIM against all pairs of spots of a section, float64."""
    prediction, target, section = cell.arrays()
    train = cell.toy.rows.train
    scores = cell.scores()
    for s in (0, 1):
        here = section == s
        position = cell.store.position.double().numpy()[here]
        distance, _ = brute(position, 1.5)
        adjacent = (distance < 1.5) & (distance > 0)
        window = np.exp(-((distance / 1.5) ** 2) / 2) * (distance <= 5.25)
        window /= window.sum(1, keepdims=True)
        for g in range(6):
            slope, offset = np.polyfit(prediction[train, g], target[train, g], 1)
            p, y = prediction[here, g] * slope + offset, target[here, g]
            for values, found in ((y, scores.moran_measured), (prediction[here, g], scores.moran_predicted)):
                z = values - values.mean()
                expected = len(z) / adjacent.sum() * (z @ adjacent @ z) / (z @ z)
                assert found[s, g] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            c1, c2 = (0.01 * np.ptp(y)) ** 2, (0.03 * np.ptp(y)) ** 2
            mp, my = window @ p, window @ y
            vp, vy, c = window @ p**2 - mp**2, window @ y**2 - my**2, window @ (p * y) - mp * my
            expected = (2 * mp * my + c1) * (2 * c + c2) / ((mp**2 + my**2 + c1) * (vp + vy + c2))
            assert scores.ssim[s, g] == pytest.approx(expected.mean(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("shift", "neighbours"), [(0.5, 6), (0.0, 8)], ids=["hexagonal", "square"])
def test_neighbours_on_a_grid(shift: float, neighbours: int) -> None:
    row, column = np.divmod(np.arange(400), 20)
    height = np.sqrt(3) / 2 if shift else 1
    position = 100 * np.stack([column + shift * (row % 2), height * row], 1) + 7000
    index, distance = _around(torch.from_numpy(position).float(), 1.5)
    inner = (row > 0) & (row < 19) & (column > 0) & (column < 19)
    count = ((distance > 0) & distance.isfinite()).sum(1).numpy()
    assert (count[inner] == neighbours).all() and (count[~inner] < neighbours).all()
    assert (index[~distance.isfinite()] == 0).all()


def test_ssim_on_a_square_grid_is_that_of_images() -> None:
    """Away from the border it is the Gaussian-window SSIM of an image."""
    rng = np.random.default_rng(0)
    side = 24
    y = ndimage.gaussian_filter(rng.standard_normal((side, side)), 2)
    p = y + 0.1 * rng.standard_normal((side, side))
    row, column = np.divmod(np.arange(side**2), side)
    index, weights = _window(torch.from_numpy(np.stack([column, row], 1) * 55.0))
    offsets = np.arange(-5, 6)
    square = np.exp(-(offsets**2 + offsets[:, None] ** 2) / (2 * 1.5**2))
    square[offsets**2 + offsets[:, None] ** 2 > 5.25**2] = 0
    square /= square.sum()

    def local(values: np.ndarray) -> np.ndarray:
        return ndimage.correlate(values, square)

    c1, c2 = (0.01 * np.ptp(y)) ** 2, (0.03 * np.ptp(y)) ** 2
    mp, my = local(p), local(y)
    vp, vy, c = local(p * p) - mp**2, local(y * y) - my**2, local(p * y) - mp * my
    image = (2 * mp * my + c1) * (2 * c + c2) / ((mp**2 + my**2 + c1) * (vp + vy + c2))
    inner = np.zeros((side, side), dtype=bool)
    inner[6:-6, 6:-6] = True
    expected = image[inner].mean()
    flat = [torch.from_numpy(v.reshape(-1, 1)) for v in (p, y)]
    keep = torch.from_numpy(inner.ravel())
    # The mean over inner spots alone: that over all less the others, each spot by itself.
    parts = [
        float(structural_similarity(*flat, index[[i]].expand(side**2, -1), weights[[i]].expand(side**2, -1)))
        for i in np.flatnonzero(keep)
    ]
    assert np.mean(parts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("spots", [1, 2, 5])
def test_few_spots_and_spots_in_one_place_have_neighbours_or_none(spots: int) -> None:
    index, distance = _around(torch.zeros(spots, 2), 1.5)
    assert index.shape == (spots, spots) and (distance == 0).all()


# ---- The position control -------------------------------------------------------------------------------------------


class Split:
    """Two stores on one table: a section of 50 spots, cut at random, as within a section."""

    def __init__(self, make_toy: Callable) -> None:
        toy = make_toy()
        rng = np.random.default_rng(3)
        rows = rng.permutation(np.flatnonzero(toy.table.section == 0))
        table = replace(toy.table, position=toy.table.position + rng.uniform(0, 30, (150, 2)).astype(np.float32))
        self.train, self.validation, self.test = rows[:30], rows[30:40], rows[40:]
        self.development, self.tested = (
            SpotStore(
                table, r, np.arange(len(table.genes)), sees="position", patch_px=8, patch_um=112.0,
                device=torch.device("cpu"),
            )
            for r in (rows[:40], self.test)
        )  # fmt: skip
        self.table, self.columns = table, torch.tensor([4, 1, 7])

    def control(self, train: np.ndarray) -> PositionControl | None:
        return _position_control(
            self.tested, self.development, torch.from_numpy(train), torch.arange(30, 40), self.columns
        )

    def by_hand(self, k: int, rows: np.ndarray, train: np.ndarray) -> np.ndarray:
        """PCC (genes,) of the means of the k nearest training spots."""
        y = self.table.rows(np.arange(len(self.table))).toarray()[:, self.columns.numpy()].astype(np.float64)
        x = self.table.position.astype(np.float64)
        predicted = [y[train[np.argsort(((x[train] - x[r]) ** 2).sum(1))[:k]]].mean(0) for r in rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array([scipy.stats.pearsonr(np.array(predicted)[:, g], y[rows, g])[0] for g in range(3)])


def test_position_control_is_the_mean_of_the_nearest_training_spots(make_toy: Callable) -> None:
    split = Split(make_toy)
    for count in (30, 7, 1):
        train = split.train[:count]
        choices = [k for k in (1, 3, 6, 12, 24) if k <= count]
        best = max(choices, key=lambda k: np.nan_to_num(split.by_hand(k, split.validation, train)).mean())
        found = split.control(np.arange(count))
        assert found is not None and found.k == best
        np.testing.assert_allclose(found.pearson, [split.by_hand(best, split.test, train)], atol=1e-12)


def test_position_control_needs_training_spots_of_the_section(make_toy: Callable) -> None:
    toy = make_toy()  # S3 is tested, S1 and S2 are trained on
    rows = [torch.from_numpy(r) for r in (toy.rows.train, toy.rows.validation)]
    scores = evaluate(toy.model(), toy.test, toy.development, rows[0], toy.genes.primary, rows[1])
    assert scores.position is None
    assert not [name for name in scores.summary() if name.startswith("control")]


def test_a_trained_model_scores_better_than_an_untrained_one(make_toy: Callable) -> None:
    """On its own training spots."""
    cell = Cell(make_toy)
    before = cell.scores().summary()["pcc_gene_mean_section_mean"]
    trainer = cell.toy.trainer(Pgl)
    list(trainer)
    cell.model = trainer.whole
    assert cell.scores().summary()["pcc_gene_mean_section_mean"] > before + 0.05


def test_test_spots_within_one_section_are_one_row(make_toy: Callable) -> None:
    toy = make_toy()
    scores = evaluate(toy.model(), toy.test, toy.development, torch.from_numpy(toy.rows.train), toy.genes.primary)
    assert scores.pearson.shape == (1, 6) and np.isfinite(scores.pearson).all()
