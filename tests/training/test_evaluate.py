"""Scores of a trained model, section by section, against scipy and numpy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from agl_bench.training import evaluate as module
from agl_bench.training.evaluate import Scores, evaluate, pcc_by_section, predict
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


def test_summary() -> None:
    scores = Scores(
        pearson=np.array([[0.1, 0.2, 0.6, NAN], [0.5, NAN, NAN, -0.1]]),
        spearman=np.array([[0.2, 0.4, NAN, NAN], [0.1, 0.3, 0.5, 0.7]]),
        mse=np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
    )
    assert scores.summary() == {
        "pcc_gene_mean_section_mean": pytest.approx((0.3 + 0.2) / 2),
        "pcc_gene_median_section_mean": pytest.approx((0.2 + 0.2) / 2),
        "pcc_nan_as_zero_gene_mean_section_mean": pytest.approx((0.9 + 0.4) / 8),
        "pcc_nan_genes": 3,
        "spearman_gene_mean_section_mean": pytest.approx((0.3 + 0.4) / 2),
        "mse_after_training_affine_gene_mean_section_mean": 4.5,
    }


def test_a_section_without_any_score_is_nan_without_a_warning() -> None:
    nothing = np.array([[NAN, NAN], [0.5, 0.7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = Scores(nothing, nothing, np.ones((2, 2))).summary()
    assert np.isnan(summary["pcc_gene_mean_section_mean"]) and np.isnan(summary["pcc_gene_median_section_mean"])
    assert summary["pcc_nan_as_zero_gene_mean_section_mean"] == pytest.approx(0.3) and summary["pcc_nan_genes"] == 2


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
