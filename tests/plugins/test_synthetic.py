"""The planted data: reproducible, shaped like measured data, and with the roles that its docstring promises."""

from __future__ import annotations

import random
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
import torch

from agl_bench import Section
from agl_bench_plugins.datasets.synthetic import (
    ARTEFACTS,
    PATCH_UM,
    PITCH_UM,
    PROGRAMMES,
    Synthetic,
    hexagonal_grid,
    render,
    smooth_fields,
)

NOWHERE = Path("/does/not/exist")  # generated data reads no file
SMALL = {"spots": 40, "patch_px": 16, "programme_genes": 20, "artefact_genes": 10, "noise_genes": 30}
FIELDS = PROGRAMMES + ARTEFACTS


@pytest.fixture(scope="module")
def default() -> list[Section]:
    return Synthetic().load(NOWHERE)


def _pixels(section: Section, side_px: int = 48) -> np.ndarray:
    """(spots, 3, side_px, side_px)."""
    assert section.patches is not None
    return section.patches.read(np.arange(section.counts.n_obs), side_px, PATCH_UM)


def _assert_same(one: Section, two: Section, side_px: int) -> None:
    assert (one.name, one.um_per_px) == (two.name, two.um_per_px)
    assert list(one.counts.var_names) == list(two.counts.var_names)
    assert list(one.counts.obs_names) == list(two.counts.obs_names)
    assert (one.counts.var["role"] == two.counts.var["role"]).all()
    np.testing.assert_array_equal(one.counts.X.toarray(), two.counts.X.toarray())
    np.testing.assert_array_equal(one.counts.layers["log_mean"], two.counts.layers["log_mean"])
    np.testing.assert_array_equal(one.counts.obsm["spatial"], two.counts.obsm["spatial"])
    np.testing.assert_array_equal(_pixels(one, side_px), _pixels(two, side_px))


def _normalised(sections: list[Section], normalisation: str) -> anndata.AnnData:
    joined = anndata.concat([section.counts for section in sections])
    if normalisation == "normalize_total+log1p":
        sc.pp.normalize_total(joined, target_sum=1e4)
    sc.pp.log1p(joined)
    return joined


def _pearson(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    p, y = prediction - prediction.mean(0), target - target.mean(0)
    return (p * y).sum(0) / np.sqrt((p**2).sum(0) * (y**2).sum(0))


def test_same_seed_same_bits() -> None:
    for one, two in zip(Synthetic(**SMALL).load(NOWHERE), Synthetic(**SMALL).load(NOWHERE), strict=True):
        _assert_same(one, two, 16)


def test_another_seed_is_other_data() -> None:
    one, two = (Synthetic(**SMALL, data_seed=seed).load(NOWHERE)[0] for seed in (0, 1))
    assert (one.counts.X.toarray() != two.counts.X.toarray()).mean() > 0.2
    assert (_pixels(one, 16) != _pixels(two, 16)).mean() > 0.5


def test_more_sections_leave_the_earlier_ones_unchanged() -> None:
    few, many = (Synthetic(**SMALL, sections=count).load(NOWHERE) for count in (2, 4))
    assert len(many) == 4
    for one, two in zip(few, many, strict=False):
        _assert_same(one, two, 16)


def test_sections_differ() -> None:
    one, two = Synthetic(**SMALL, sections=2).load(NOWHERE)
    assert (one.counts.X.toarray() != two.counts.X.toarray()).mean() > 0.2
    assert (_pixels(one, 16) != _pixels(two, 16)).mean() > 0.5


def test_size_of_the_patches_does_not_touch_the_counts() -> None:
    one, two = (Synthetic(**{**SMALL, "patch_px": side}).load(NOWHERE)[0] for side in (16, 31))
    np.testing.assert_array_equal(one.counts.X.toarray(), two.counts.X.toarray())
    assert _pixels(two, 31).shape == (40, 3, 31, 31)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    reference = Synthetic(**SMALL).load(NOWHERE)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    random.seed(7)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()  # noqa: NPY002
    again = Synthetic(**SMALL).load(NOWHERE)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == random.getstate()
    for one, two in zip(reference, again, strict=True):
        _assert_same(one, two, 16)


def test_counts_are_whole_numbers_and_deep_enough(default: list[Section]) -> None:
    for section in default:
        counts = section.counts.X.toarray()
        assert counts.shape == (150, 2000)
        assert (counts >= 0).all() and (counts == np.rint(counts)).all()
        assert (counts > 0).sum(1).min() > 500
        depth = np.log(counts.sum(1))
        assert 0.15 < depth.std() < 0.4  # library size varies


def test_counts_follow_the_planted_mean(default: list[Section]) -> None:
    counts = np.concatenate([section.counts.X.toarray() for section in default])
    log_mean = np.concatenate([section.counts.layers["log_mean"] for section in default])
    noise = (default[0].counts.var["role"] == "noise").to_numpy()
    ratio = counts[:, noise].mean() / np.exp(log_mean[:, noise]).mean()
    assert ratio == pytest.approx(0.95, abs=0.05)  # one count in twenty drops out
    spread = log_mean[:150].std(0)
    assert spread[noise].max() < 1e-5 < 0.3 < spread[~noise].min()


def test_roles(default: list[Section]) -> None:
    role = default[0].counts.var["role"]
    assert role.value_counts().to_dict() == {"noise": 1000, "artefact": 700, "programme": 300}
    assert all(isinstance(value, str) for value in role)
    assert role.index.is_unique
    assert default[0].counts.layers["log_mean"].dtype == np.float32
    for section in default[1:]:
        assert (section.counts.var["role"] == role).all()


def test_artefact_genes_are_unrelated_to_programme_genes(default: list[Section]) -> None:
    for section in default:
        role, truth = section.counts.var["role"].to_numpy(), section.counts.layers["log_mean"].astype(np.float64)
        centred = truth - truth.mean(0)
        product = centred[:, role == "programme"].T @ centred[:, role == "artefact"] / len(truth)
        assert np.abs(product).max() < 1e-4


def test_neighbours_on_the_grid_are_one_pitch_apart(default: list[Section]) -> None:
    for section in default:
        position = section.counts.obsm["spatial"] * section.um_per_px
        distance = np.linalg.norm(position[:, None] - position[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        np.testing.assert_allclose(distance.min(1), PITCH_UM, rtol=1e-9)
        assert np.isclose(distance, PITCH_UM).sum(1).max() == 6
        assert section.um_per_px * 48 == pytest.approx(PATCH_UM)


@pytest.mark.parametrize("spots", [20, 21, 150, 997])
def test_fields_are_standardised_uncorrelated_and_smooth(spots: int) -> None:
    position = hexagonal_grid(spots)
    fields = smooth_fields(position, FIELDS, np.random.default_rng(0))
    np.testing.assert_allclose(fields.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(fields.T @ fields / spots, np.eye(FIELDS), atol=1e-9)
    if spots > 100:
        distance = np.linalg.norm(position[:, None] - position[None], axis=2)
        one, two = np.nonzero(np.isclose(distance, PITCH_UM))
        assert (fields[one] * fields[two]).mean() > 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_primary_genes_are_programme_genes(seed: int) -> None:
    sections = Synthetic(data_seed=seed, patch_px=16).load(NOWHERE)
    training = _normalised(sections[:2], "normalize_total+log1p")
    score = sc.pp.highly_variable_genes(training, flavor="seurat", inplace=False)["dispersions_norm"].to_numpy()
    role = sections[0].counts.var["role"].to_numpy()[np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")]
    assert (role[:50] == "programme").sum() >= 45
    rank = {kind: np.median(np.flatnonzero(role[50:] == kind)) for kind in ("programme", "artefact", "noise")}
    assert rank["programme"] < 250 < rank["artefact"] < rank["noise"]
    assert (role[50:300] == "programme").mean() > 0.7


@pytest.mark.parametrize("normalisation", ["normalize_total+log1p", "log1p"])
def test_scanpy_accepts_the_counts(default: list[Section], normalisation: str) -> None:
    table = _normalised(default, normalisation)
    assert np.isfinite(table.X.toarray()).all()
    found = sc.pp.highly_variable_genes(table, flavor="seurat", n_top_genes=50, inplace=False)
    assert found["highly_variable"].sum() == 50
    assert (default[0].counts.var["role"].to_numpy()[found["highly_variable"].to_numpy()] == "programme").sum() >= 40


def test_raw_counts_survive_scanpy(default: list[Section]) -> None:
    before = default[0].counts.X.sum()
    _normalised(default, "normalize_total+log1p")
    assert default[0].counts.X.sum() == before


def _rendered(column: int, value: float) -> np.ndarray:
    """Twenty patches with one field moved and all others at rest, (20, 48, 48, 3) float."""
    fields = np.zeros((20, FIELDS))
    fields[:, column] = value
    return render(fields, 48, np.random.default_rng(3)).astype(np.float64)


def _dark(image: np.ndarray) -> float:
    return float((image[..., 0] < 130).mean())  # nuclei are what absorbs red


def _white(image: np.ndarray) -> float:
    return float((image.min(-1) > 215).mean())


def _texture(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.mean(-1), axis=1)).mean())


@pytest.mark.parametrize(
    ("column", "shows", "grows"),
    [
        (0, _dark, True),  # nuclear density
        (1, _dark, True),  # nuclear size
        (2, lambda image: image[..., 1].mean(), False),  # eosin absorbs green
        (3, _white, True),  # lumens
        (4, lambda image: image.mean(), True),  # brightness
        (5, lambda image: (image[..., 0] - image[..., 2]).mean(), True),  # tint
        (6, _texture, False),  # blur
        (7, _texture, True),  # grain
    ],
)
def test_every_field_shows_in_the_patch(column: int, shows: object, grows: bool) -> None:
    assert callable(shows)
    low, rest, high = (shows(_rendered(column, value)) for value in (-1.5, 0.0, 1.5))
    assert (low < rest < high) if grows else (low > rest > high)


def test_patches_predict_programme_and_artefact_genes_of_an_unseen_section(default: list[Section]) -> None:
    def statistics(section: Section) -> np.ndarray:
        x = _pixels(section).astype(np.float64)
        step = np.log(1 + np.abs(np.diff(x.mean(1), axis=2)).mean((1, 2)))
        white = (x.min(1) > 215).mean((1, 2))
        levels = np.percentile(x.reshape(len(x), 3, -1), [3, 10, 25, 50, 75, 90, 97], axis=2)
        return np.column_stack([x.mean((2, 3)), x.std((2, 3)), *levels, step, white])

    image = np.concatenate([statistics(section) for section in default])
    image = (image - image[:300].mean(0)) / image[:300].std(0)
    expression = _normalised(default, "normalize_total+log1p").X.toarray()
    centre = expression[:300].mean(0)
    square = image[:300].T @ image[:300] + 30 * np.eye(image.shape[1])
    weight = np.linalg.solve(square, image[:300].T @ (expression[:300] - centre))
    score = _pearson(image[300:] @ weight, expression[300:])
    role = default[0].counts.var["role"].to_numpy()
    assert score[role == "programme"].mean() > 0.2
    assert score[role == "artefact"].mean() > 0.2
    assert abs(score[role == "noise"].mean()) < 0.03


def test_donors() -> None:
    assert Synthetic().sections(NOWHERE) == {"S1": "D1", "S2": "D2", "S3": "D3"}
    assert list(Synthetic(sections=5, donors=2).sections(NOWHERE).values()) == ["D1", "D2", "D1", "D2", "D1"]
    dataset = Synthetic(**SMALL, sections=3, donors=2)
    assert {s.name: s.donor for s in dataset.load(NOWHERE)} == dataset.sections(NOWHERE)
    assert dataset.files(NOWHERE, "S1") == []


def test_smallest_settings() -> None:
    sections = Synthetic(sections=1, spots=20, patch_px=16, programme_genes=1, artefact_genes=0, noise_genes=0).load(
        NOWHERE
    )
    assert sections[0].counts.shape == (20, 1)
    assert _pixels(sections[0], 16).dtype == np.uint8
