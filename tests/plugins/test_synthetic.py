"""The planted data: reproducible, shaped like measured data, and with the roles that its docstring promises."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse, stats

from agl_bench import GeneSplit, Protocol, Section
from agl_bench.bench.planted import best_cutoff, utilities
from agl_bench.data.gene_split import split_genes
from agl_bench.data.preprocess import tabulate
from agl_bench_plugins.datasets import synthetic
from agl_bench_plugins.datasets.synthetic import (
    ARTEFACTS,
    PATCH_UM,
    PITCH_UM,
    PROGRAMMES,
    ROLES,
    Synthetic,
    hexagonal_grid,
    render,
    smooth_fields,
)

NOWHERE = Path("/does/not/exist")  # generated data reads no file
SMALL = {
    "spots": 40, "patch_px": 16, "markers": 5, "helpful_genes": 15, "harmful_genes": 10, "useless_genes": 30,
}  # fmt: skip
FIELDS = PROGRAMMES + ARTEFACTS
REGIMES = ("helpful", "harmful", "null", "misleading")


@pytest.fixture(scope="module")
def default() -> list[Section]:
    return Synthetic().load(NOWHERE)


def _roles(dataset: Synthetic) -> np.ndarray:
    """(genes,) name of each gene's role; of the generator, for nothing outside it says so."""
    return np.array(ROLES)[dataset._genes().role]


def _truth(dataset: Synthetic) -> np.ndarray:
    """Noise-free ln expression of the first section, (spots, genes) float64."""
    return dataset.log_mean(NOWHERE, "S1").astype(np.float64)


@cache
def _fold(regime: str, data_seed: int, reliability: float = 1.0) -> tuple[GeneSplit, torch.Tensor]:
    """Genes of the fold that tests the last of three sections, and what each is worth."""
    dataset = Synthetic(regime=regime, data_seed=data_seed, reliability=reliability, patch_px=16)
    protocol = Protocol()
    table = tabulate(dataset.load(NOWHERE), protocol)
    genes, _ = split_genes(table, np.flatnonzero(table.section < 2), protocol)
    return genes, utilities(dataset.truth(NOWHERE), genes)


def _pixels(section: Section, side_px: int = 48) -> np.ndarray:
    """(spots, 3, side_px, side_px)."""
    assert section.patches is not None
    return section.patches.read(np.arange(section.counts.n_obs), side_px, PATCH_UM)


def _assert_same(one: Section, two: Section, side_px: int) -> None:
    assert (one.name, one.um_per_px) == (two.name, two.um_per_px)
    assert list(one.counts.var_names) == list(two.counts.var_names)
    assert list(one.counts.obs_names) == list(two.counts.obs_names)
    np.testing.assert_array_equal(one.counts.X.toarray(), two.counts.X.toarray())
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


@pytest.mark.parametrize("regime", REGIMES)
def test_same_seed_same_bits(regime: str) -> None:
    one, two = (Synthetic(**SMALL, regime=regime) for _ in range(2))
    for a, b in zip(one.load(NOWHERE), two.load(NOWHERE), strict=True):
        _assert_same(a, b, 16)
    assert one.truth(NOWHERE) == two.truth(NOWHERE)
    np.testing.assert_array_equal(one.log_mean(NOWHERE, "S2"), two.log_mean(NOWHERE, "S2"))


def test_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does it matter that parts of a section are made at the same time."""
    monkeypatch.setattr(synthetic, "DRAWN_AT_ONCE", 7 * 60)
    monkeypatch.setattr(synthetic, "RENDERED_AT_ONCE", 7 * 16**2)
    parts = []
    for cores in (1, 5):
        monkeypatch.setattr(synthetic.os, "cpu_count", lambda cores=cores: cores)
        parts.append(Synthetic(**SMALL).read(NOWHERE, "S1"))
    _assert_same(*parts, 16)


def test_a_section_can_be_read_alone() -> None:
    dataset = Synthetic(**SMALL)
    _assert_same(dataset.load(NOWHERE)[2], dataset.read(NOWHERE, "S3"), 16)


def test_another_seed_is_other_data() -> None:
    one, two = (Synthetic(**SMALL, data_seed=seed).load(NOWHERE)[0] for seed in (0, 1))
    assert (one.counts.X.toarray() != two.counts.X.toarray()).mean() > 0.2
    assert (_pixels(one, 16) != _pixels(two, 16)).mean() > 0.5


def test_more_sections_leave_the_earlier_ones_unchanged() -> None:
    few, many = (Synthetic(**SMALL, sections=count).load(NOWHERE) for count in (2, 4))
    assert len(many) == 4
    for one, two in zip(few, many, strict=False):
        _assert_same(one, two, 16)
    two, four = (Synthetic(**SMALL, sections=count) for count in (2, 4))
    assert two.truth(NOWHERE) == four.truth(NOWHERE)
    np.testing.assert_array_equal(two.log_mean(NOWHERE, "S2"), four.log_mean(NOWHERE, "S2"))


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
    dataset = Synthetic()
    counts = np.concatenate([section.counts.X.toarray() for section in default])
    log_mean = np.concatenate([dataset.log_mean(NOWHERE, name) for name in dataset.sections(NOWHERE)])
    assert log_mean.dtype == np.float32 and log_mean.shape == counts.shape
    role = _roles(dataset)
    useless, marker = role == "useless", role == "marker"
    kept = {name: counts[:, mask].mean() / np.exp(log_mean[:, mask]).mean() for name, mask in
            (("useless", useless), ("marker", marker))}  # fmt: skip
    assert kept["useless"] == pytest.approx(0.95, abs=0.04)  # one count in twenty drops out
    assert kept["marker"] == pytest.approx(0.85, abs=0.04)
    spread = log_mean[:150].std(0)
    assert spread[useless].max() < 1e-5 < 0.3 < spread[~useless].min()


def test_spread_of_the_counts_is_as_planned() -> None:
    """CV² beyond Poisson noise, of spots with equal library size, by the method of moments."""
    dataset = Synthetic(sections=1, spots=4000, patch_px=16, markers=40, helpful_genes=40, harmful_genes=40)
    genes = dataset._genes()
    fields, none = dataset._fields(0), np.zeros(len(genes.names))
    synthetic_library = np.exp(synthetic.LIBRARY_SD**2)  # E[library²]
    counts = genes.draw(fields, none, np.random.default_rng(0)).toarray().astype(np.float64)
    mean, variance = counts.mean(0), counts.var(0)
    spread = (1 + (variance - mean) / mean**2) / synthetic_library - 1
    for kind, planned in enumerate(synthetic.SPREAD):
        assert np.median(spread[genes.role == kind]) == pytest.approx(planned, rel=0.12)


@pytest.mark.parametrize(
    ("regime", "sizes"),
    [
        ("helpful", (50, 1000, 0, 950)),
        ("harmful", (50, 300, 700, 950)),
        ("null", (50, 0, 700, 1250)),
        ("misleading", (50, 300, 700, 950)),
    ],
)
def test_numbers_of_each_role_and_its_worth(regime: str, sizes: tuple[int, ...]) -> None:
    dataset = Synthetic(regime=regime)
    role, truth = _roles(dataset), dataset.truth(NOWHERE)
    assert tuple(int((role == name).sum()) for name in ROLES) == sizes
    worth = {"marker": 1.0, "helpful": 1.0, "harmful": -1.0, "useless": -0.25}
    assert list(truth.values()) == [worth[name] for name in role]
    assert list(truth) == list(dataset.read(NOWHERE, "S1").counts.var_names)


@pytest.mark.parametrize("regime", REGIMES)
def test_nothing_of_the_truth_is_in_the_sections(regime: str) -> None:
    dataset = Synthetic(**{**SMALL, "harmful_genes": 100, "useless_genes": 100, "helpful_genes": 100}, regime=regime)
    for section in dataset.load(NOWHERE):
        table = section.counts
        assert list(table.var.columns) == list(table.obs.columns) == list(table.uns) == list(table.layers) == []
        assert list(table.varm) == list(table.obsp) == list(table.varp) == [] and list(table.obsm) == ["spatial"]
        assert table.raw is None and sparse.issparse(table.X)
        assert list(table.var_names) == [f"G{i:05d}" for i in range(1, table.n_vars + 1)]
    # Neither does the order of the genes say what they are: utilities of neighbours are unrelated.
    worth = np.array(list(dataset.truth(NOWHERE).values()))
    assert abs(stats.spearmanr(np.arange(len(worth)), worth)[0]) < 0.2
    assert abs(stats.spearmanr(worth[1:], worth[:-1])[0]) < 0.2


def test_artefact_genes_are_unrelated_to_programme_genes() -> None:
    dataset = Synthetic()
    role, truth = _roles(dataset), _truth(dataset)
    centred = truth - truth.mean(0)
    product = centred[:, np.isin(role, ("marker", "helpful"))].T @ centred[:, role == "harmful"] / len(truth)
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


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("regime", REGIMES)
def test_primary_genes_are_programme_genes(regime: str, seed: int) -> None:
    genes, _ = _fold(regime, seed)
    worth = Synthetic(regime=regime, data_seed=seed).truth(NOWHERE)
    primary = [worth[name] for name, chosen in zip(genes.names, genes.primary, strict=True) if chosen]
    assert primary.count(1.0) >= 40


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reliable_ranking_follows_the_roles(seed: int) -> None:
    """Helpful before harmful before useless, but for the noise of an estimate from 300 spots."""
    genes, utility = _fold("harmful", seed)
    in_order = utility[~genes.primary][genes.rank[~genes.primary].argsort()]
    helpful = int((utility > 0).sum())
    assert 295 <= helpful <= 350
    assert (in_order[:helpful] > 0).double().mean() > 0.8
    assert (in_order[helpful : helpful + 700] == -1).double().mean() > 0.8
    assert (in_order[helpful + 700 :] == -0.25).double().mean() > 0.85


def test_reliability_says_how_much_the_score_knows() -> None:
    """Spearman correlation of score and being helpful, mean of three seeds."""
    found = []
    for reliability in (0.0, 0.5, 1.0):
        folds = [_fold("harmful", seed, reliability) for seed in range(3)]
        pairs = [(g.score[~g.primary].numpy(), (u[~g.primary] > 0).numpy()) for g, u in folds]
        found.append(np.mean([stats.spearmanr(score, helps)[0] for score, helps in pairs]))
    none, half, full = found
    assert abs(none) < 0.08 and full > 0.5
    assert none + 0.1 < half < full - 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_cutoff_is_known(seed: int) -> None:
    for regime, helpful in (("helpful", 1000), ("harmful", 300)):
        genes, utility = _fold(regime, seed)
        assert best_cutoff(genes, utility) == pytest.approx(helpful, rel=0.1)
    for regime in ("null", "misleading"):
        genes, utility = _fold(regime, seed)
        assert best_cutoff(genes, utility) <= 20


def test_misleading_is_harmful_without_reliability() -> None:
    one, two = Synthetic(**SMALL, regime="misleading"), Synthetic(**SMALL, regime="harmful", reliability=0.0)
    _assert_same(one.read(NOWHERE, "S1"), two.read(NOWHERE, "S1"), 16)
    assert one.truth(NOWHERE) == two.truth(NOWHERE)


def test_depth_makes_counts_sparse() -> None:
    deep, shallow = (Synthetic(**SMALL, depth=depth).read(NOWHERE, "S1").counts.X for depth in (1.0, 0.05))
    assert shallow.nnz < 0.5 * deep.nnz
    assert shallow.sum() == pytest.approx(0.05 * deep.sum(), rel=0.15)


@pytest.mark.parametrize("normalisation", ["normalize_total+log1p", "log1p"])
def test_scanpy_accepts_the_counts(default: list[Section], normalisation: str) -> None:
    table = _normalised(default, normalisation)
    assert np.isfinite(table.X.toarray()).all()
    found = sc.pp.highly_variable_genes(table, flavor="seurat", n_top_genes=50, inplace=False)
    assert found["highly_variable"].sum() == 50
    top = _roles(Synthetic())[found["highly_variable"].to_numpy()]
    assert np.isin(top, ("marker", "helpful")).sum() >= 40


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
    role = _roles(Synthetic())
    assert score[role == "helpful"].mean() > 0.1
    assert score[role == "marker"].mean() > 0.1
    assert score[role == "harmful"].mean() > 0.1
    assert abs(score[role == "useless"].mean()) < 0.03


def test_donors() -> None:
    assert Synthetic().sections(NOWHERE) == {"S1": "D1", "S2": "D2", "S3": "D3"}
    assert list(Synthetic(sections=5, donors=2).sections(NOWHERE).values()) == ["D1", "D2", "D1", "D2", "D1"]
    dataset = Synthetic(**SMALL, sections=3, donors=2)
    assert {s.name: s.donor for s in dataset.load(NOWHERE)} == dataset.sections(NOWHERE)
    assert dataset.files(NOWHERE, "S1") == []


def test_smallest_settings() -> None:
    sections = Synthetic(
        sections=1, spots=20, patch_px=16, markers=1, helpful_genes=0, harmful_genes=0, useless_genes=0
    ).load(NOWHERE)
    assert sections[0].counts.shape == (20, 1)
    assert _pixels(sections[0], 16).dtype == np.uint8
