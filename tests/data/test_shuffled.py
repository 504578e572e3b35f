"""Patches and embeddings of a section dealt to the wrong spots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from anndata import AnnData

from agl_bench.data.patches import ArrayPatches
from agl_bench.data.shuffled import shuffle_patches
from agl_bench.interfaces.spots import Section

SPOTS, PX, UM = 30, 8, 112.0


@pytest.fixture
def section() -> Section:
    rng = np.random.default_rng(0)
    counts = AnnData(rng.poisson(2, (SPOTS, 3)).astype(np.float32), obsm={"spatial": rng.uniform(0, 99, (SPOTS, 2))})
    pixels = np.broadcast_to(np.arange(SPOTS, dtype=np.uint8)[:, None, None, None], (SPOTS, PX, PX, 3)).copy()
    embedding = np.arange(SPOTS, dtype=np.float32)[:, None]
    return Section("S", counts, 1.0, patches=ArrayPatches(pixels, UM, section="S"), embedding=embedding)


def whose(section: Section, rows: np.ndarray) -> list[int]:
    """Whose patch each of `rows` has."""
    assert section.patches is not None
    return section.patches.read(rows, PX, UM)[:, 0, 0, 0].tolist()


def test_each_patch_goes_to_one_spot_with_its_embedding(section: Section) -> None:
    other = shuffle_patches(section, 0)
    everyone = np.arange(SPOTS)
    assert whose(section, everyone) == list(range(SPOTS))
    dealt = whose(other, everyone)
    assert sorted(dealt) == list(range(SPOTS)) and sum(a == b for a, b in enumerate(dealt)) < 5
    assert other.embedding is not None and other.embedding[:, 0].tolist() == dealt
    some = np.array([7, 0, 29, 7])
    assert whose(other, some) == [dealt[r] for r in some]
    assert other.counts is section.counts and other.name == section.name  # expression and places stay


def test_the_deal_follows_from_seed_and_section(section: Section) -> None:
    everyone = np.arange(SPOTS)
    dealt = whose(shuffle_patches(section, 0), everyone)
    assert whose(shuffle_patches(section, 0), everyone) == dealt
    assert whose(shuffle_patches(section, 1), everyone) != dealt
    assert whose(shuffle_patches(replace(section, name="T"), 0), everyone) != dealt


def test_what_is_not_there_stays_away(section: Section) -> None:
    bare = shuffle_patches(replace(section, patches=None, embedding=None), 0)
    assert bare.patches is None and bare.embedding is None
    source = shuffle_patches(section, 0).patches
    assert source is not None and section.patches is not None
    places = np.array([[0.0, 0.0], [50.0, 50.0]])
    np.testing.assert_array_equal(source.outside(places), section.patches.outside(places))
