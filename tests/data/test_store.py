"""Spots on the device: what is gathered, and how it is augmented."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from anndata import AnnData

from agl_bench.data.patches import ArrayPatches
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import SpotStore
from agl_bench.errors import BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

PX, UM, WIDTH = 8, 112.0, 3
CPU = torch.device("cpu")
SIZES = {"one": 7, "two": 5, "three": 6}


def make_section(name: str, spots: int, *, patches: bool = True, width: int | None = WIDTH) -> Section:
    rng = np.random.default_rng(spots)
    counts = AnnData(rng.poisson(1.5, (spots, 4)).astype(np.float32), obsm={"spatial": rng.uniform(0, 99, (spots, 2))})
    counts.X[1, :2] = 0  # dropped: one detected gene at most
    counts.X[1, 2:] = (0, 1)
    counts.X[[0, 2, 3, 4]] += 1
    counts.var_names = list("ABCD")
    pixels = rng.integers(0, 256, (spots, PX, PX, 3), dtype=np.uint8)
    return Section(
        name,
        counts,
        1.0,
        patches=ArrayPatches(pixels, UM, section=name) if patches else None,
        embedding=rng.random((spots, width)).astype(np.float32) if width else None,
    )


@pytest.fixture(scope="module")
def table() -> SpotTable:
    return tabulate([make_section(n, s) for n, s in SIZES.items()], Protocol(min_genes_per_spot=2))


def store_of(
    table: SpotTable, rows: np.ndarray, sees: str = "patches", columns: tuple[int, ...] = (0, 1, 2, 3)
) -> SpotStore:
    return SpotStore(table, rows, np.array(columns), sees=sees, patch_px=PX, patch_um=UM, device=CPU)  # type: ignore[arg-type]


def shuffled(table: SpotTable) -> np.ndarray:
    """Rows of all sections, interleaved."""
    return np.random.default_rng(0).permutation(len(table))


def test_everything_is_gathered_in_the_order_of_the_rows(table: SpotTable) -> None:
    rows = shuffled(table)
    assert len(rows) < sum(SIZES.values())  # spots were dropped, so that table rows are not source rows
    store = store_of(table, rows, columns=(2, 0))
    assert len(store) == len(rows)
    spots = store.spots(torch.arange(len(rows)))
    assert spots.patches is not None and spots.patches.dtype == torch.float32 and spots.embedding is None
    for i, row in enumerate(rows):
        section = table.sections[table.section[row]]
        pixels = section.patches.read(table.source_row[[row]], PX, UM)[0]  # type: ignore[union-attr]
        np.testing.assert_array_equal(spots.patches[i], pixels.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(store.expression[i], table.expression[[row]].toarray()[0, [2, 0]])
        np.testing.assert_array_equal(spots.position[i], table.position[row])
    np.testing.assert_array_equal(spots.section, table.section[rows])
    np.testing.assert_array_equal(store.section_on_host, table.section[rows])


def test_embeddings_are_gathered_in_the_order_of_the_rows(table: SpotTable) -> None:
    rows = shuffled(table)
    spots = store_of(table, rows, "embedding").spots(torch.arange(len(rows)))
    expected = [table.sections[table.section[r]].embedding[table.source_row[r]] for r in rows]  # type: ignore[index]
    assert spots.patches is None
    np.testing.assert_array_equal(spots.embedding, np.stack(expected))


def test_a_batch_holds_the_rows_asked_for(table: SpotTable) -> None:
    store = store_of(table, shuffled(table))
    rows = torch.tensor([4, 0, 4, 9])
    batch = store.batch(rows)
    assert torch.equal(batch.row, rows) and torch.equal(batch.expression, store.expression[rows])
    assert torch.equal(batch.spots.position, store.position[rows])
    assert torch.equal(batch.spots.patches, store.spots(torch.arange(len(store))).patches[rows])  # type: ignore[index]


def test_nothing_is_loaded_that_the_backbone_does_not_see(table: SpotTable) -> None:
    spots = store_of(table, shuffled(table), "position").spots(torch.arange(3))
    assert spots.patches is None and spots.embedding is None and spots.position.shape == (3, 2)


def symmetries(patch: torch.Tensor) -> dict[bytes, tuple[int, bool]]:
    """Content of the eight turned and flipped patches (3, px, px)."""
    return {
        (p.flip(-1) if flip else p).numpy().tobytes(): (turn, flip)
        for turn, flip in itertools.product(range(4), (False, True))
        for p in [torch.rot90(patch, turn, (-2, -1))]
    }


def test_augmentation_is_one_of_the_eight_symmetries_of_each_patch(table: SpotTable) -> None:
    store = store_of(table, shuffled(table))
    rows = torch.arange(10).repeat(200)
    plain = store.spots(torch.arange(10)).patches
    turned = store.spots(rows, torch.Generator().manual_seed(0)).patches
    assert plain is not None and turned is not None
    known = [symmetries(p) for p in plain]
    assert all(len(k) == 8 for k in known)
    found = [known[row][patch.contiguous().numpy().tobytes()] for row, patch in zip(rows.tolist(), turned, strict=True)]
    counts = [found.count(symmetry) for symmetry in itertools.product(range(4), (False, True))]
    assert sum(counts) == 2000 and min(counts) > 190 and max(counts) < 310  # 250 each, sd 15
    assert len(set(found[:10])) > 2  # each patch on its own


def test_augmentation_follows_its_generator_alone(table: SpotTable) -> None:
    store = store_of(table, shuffled(table))
    state = torch.get_rng_state()
    one, again, other = (store.batch(torch.arange(8), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.spots.patches, again.spots.patches)  # type: ignore[arg-type]
    assert not torch.equal(one.spots.patches, other.spots.patches)  # type: ignore[arg-type]
    assert torch.equal(one.expression, other.expression) and torch.equal(one.spots.position, other.spots.position)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_nothing_is_augmented(table: SpotTable) -> None:
    store = store_of(table, shuffled(table))
    before = store.spots(torch.arange(len(store))).patches
    store.batch(torch.arange(8), torch.Generator().manual_seed(1))
    assert torch.equal(store.spots(torch.arange(len(store))).patches, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sections", "sees", "sentence"),
    [
        ([make_section("a", 5), make_section("b", 5, patches=False)], "patches", "section 'b' has no image or patches"),
        ([make_section("a", 5), make_section("b", 5, width=None)], "embedding", "section 'b' has no embedding"),
        ([make_section("a", 5), make_section("b", 5, width=4)], "embedding", r"differ in width .*'a': 3, 'b': 4"),
    ],
)
def test_sections_without_what_the_backbone_sees(sections: list[Section], sees: str, sentence: str) -> None:
    table = tabulate(sections, Protocol(min_genes_per_spot=0))
    with pytest.raises(BadSpec, match=sentence):
        store_of(table, np.arange(len(table)), sees)
