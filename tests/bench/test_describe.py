"""Numbers and pictures of sections, whatever a section has to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from agl_bench import ArrayPatches, Section
from agl_bench.bench.describe import cautions, pitch_px, section_card, spot_diameter_px
from agl_bench.bench.overlay import draw_overlay
from agl_bench_plugins.datasets.synthetic import Synthetic

RED = np.broadcast_to(np.array([200, 0, 0], dtype=np.uint8), (6, 8, 8, 3))


def make(patches: ArrayPatches | None = None, um_per_px: float = 0.5, **uns: Any) -> Section:
    counts = anndata.AnnData(sparse.csr_matrix(np.arange(24, dtype=np.float32).reshape(6, 4) % 5), uns=uns)
    counts.obsm["spatial"] = np.array([[0, 0], [200, 0], [400, 0], [0, 200], [200, 200], [400, 200]])
    return Section("S", counts, um_per_px, patches)


def test_card() -> None:
    section = make(ArrayPatches(RED), spot_diameter_px=110)
    section.counts.X = section.counts.X.toarray()
    section.embedding = np.zeros((6, 2), dtype=np.float32)
    card = section_card(section)
    dense = section.counts.X
    assert (card.spots, card.genes, card.pitch_um, card.spot_um) == (6, 4, 100.0, 55.0)
    assert (card.median_umi, card.sparsity) == (np.median(dense.sum(1)), (dense == 0).mean())
    assert card.sees == ("patches", "embedding", "position")


def test_stored_zeros_are_zeros() -> None:
    section = make()
    before = section_card(section).sparsity
    section.counts.X.data[2] = 0
    assert (before, section_card(section).sparsity) == (5 / 24, 6 / 24)


@pytest.mark.parametrize(
    ("uns", "diameter"),
    [
        ({}, None),
        ({"spot_diameter_px": 30}, 30.0),
        ({"spot_diameter_px": np.float32(30)}, 30.0),
        ({"spot_diameter_px": "wide"}, None),
        ({"spot_diameter_px": float("nan")}, None),
        ({"spatial": {"library": {"scalefactors": {"spot_diameter_fullres": 89.4}}}}, 89.4),
        ({"spatial": {"library": {"scalefactors": {}}}}, None),
        ({"spatial": {"is_single": True}}, None),
    ],
)
def test_diameter(uns: dict[str, Any], diameter: float | None) -> None:
    assert spot_diameter_px(uns) == diameter


def test_pitch_of_few_spots() -> None:
    section = make()
    section.counts = section.counts[:1].copy()
    assert pitch_px(section) is None
    assert section_card(section).pitch_um is None


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("side_um", [None, 112.0, 56.0])
def test_patches_are_placed_where_they_belong(tmp_path: Path, side_um: float | None) -> None:
    draw_overlay("made", make(ArrayPatches(RED, side_um)), tmp_path / "picture.png")
    red = (np.abs(pixels_of(tmp_path / "picture.png").astype(int) - (200, 0, 0)) < 3).all(2)
    assert red.sum() > 500
    columns = np.flatnonzero(red.any(0))
    assert (np.diff(columns) > 20).any() == (side_um == 56.0)  # 100 µm apart: gaps show between narrow patches


def test_nothing_but_positions(tmp_path: Path) -> None:
    section = make()
    draw_overlay("made", section, tmp_path / "many.png")
    section.counts = section.counts[:1].copy()
    draw_overlay("made", section, tmp_path / "one.png")
    many, one = ((pixels_of(tmp_path / f"{n}.png") == (255, 230, 0)).all(2).sum() for n in ("many", "one"))
    assert many > 0 and one > 0


def test_what_primary_genes_of_a_section_rest_on() -> None:
    section = Synthetic(sections=1, spots=120, patch_px=16).read(Path(), "S1")
    assert cautions(section) == []
    counts = section.counts.X.tolil()
    carried = [n for n, name in enumerate(section.counts.var_names) if name.endswith("7")][:3]
    counts[:, carried] = 1
    for spot in (3, 50, 90):
        counts[spot, carried] = 900
    section.counts.X = counts.tocsr()
    (sentence,) = cautions(section)
    assert "3 of 50 primary genes owe more than half of their score to 3 of 120 spots each" in sentence
    (reason,) = cautions(Synthetic(sections=1, spots=20, markers=9, helpful_genes=0, harmful_genes=0, useless_genes=9,
                                   patch_px=16, depth=10).read(Path(), "S1"))  # fmt: skip
    assert "cannot choose primary genes" in reason


@pytest.mark.parametrize(("thin", "is_told"), [(0, False), (6, False), (7, True), (40, True)])
def test_a_tissue_that_the_default_protocol_leaves_out_is_told(thin: int, is_told: bool) -> None:
    section = Synthetic(sections=1, spots=120, patch_px=16).read(Path(), "S1")
    counts = section.counts.X.tolil()
    counts[:thin, 20:] = 0  # fewer than 50 genes
    section.counts.X = counts.tocsr()
    said = [sentence for sentence in cautions(section) if "leaves out" in sentence]
    assert bool(said) is is_told
    if is_told:
        assert f"leaves out {thin} of its 120 spots" in said[0] and "protocol.spot_mads = 0" in said[0]
