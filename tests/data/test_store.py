"""Spots on the device: what is gathered, and how it is augmented."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench.data import store as module
from agl_bench.data.patches import ArrayPatches
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import Csr, Dense, Mapped, SpotStore, budget, fit
from agl_bench.data.targets import fit_targets
from agl_bench.errors import BadSpec
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import Section, SpotBatch, Spots
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
    table: SpotTable, rows: np.ndarray, sees: str = "patches", columns: tuple[int, ...] = (0, 1, 2, 3), **place: Any
) -> SpotStore:
    return SpotStore(table, rows, np.array(columns), sees=sees, patch_px=PX, patch_um=UM, device=CPU, **place)  # type: ignore[arg-type]


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
        np.testing.assert_array_equal(store.expression_of()[i], table.rows(np.array([row])).toarray()[0, [2, 0]])
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
    assert torch.equal(batch.row, rows) and torch.equal(batch.expression, store.expression_of()[rows])
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
    table = tabulate(sections, Protocol(min_genes_per_spot=0, spot_mads=0))
    with pytest.raises(BadSpec, match=sentence):
        store_of(table, np.arange(len(table)), sees)


# ---- where the data are ---------------------------------------------------------------------------------------------

FORMS = ("dense", "csr", "mapped")
CHOICES = [{"form": f, "patches_on": p} for f in FORMS for p in ("device", "host", "mapped")]
BATCHES = [np.array([3, 0, 3]), np.array([7]), np.array([1, 9, 4, 2]), np.array([5, 6]), np.array([8])]


@pytest.mark.parametrize(
    ("budget_bytes", "expected"),
    [
        (4000 + 500, ("dense", "device")),
        (4499, ("csr", "device")),
        (8 * 100 + 8 * 11 + 500, ("csr", "device")),
        (8 * 100 + 8 * 11 + 499, ("csr", "host")),
        (8 * 100 + 8 * 11 - 1, ("mapped", "device")),
        (499, ("mapped", "host")),
        (0, ("mapped", "host")),
    ],
)
def test_the_fastest_that_fits(budget_bytes: int, expected: tuple[str, str]) -> None:
    assert fit(10, 100, 100, 500, budget_bytes, 500) == expected
    without = (expected[0], expected[1].replace("host", "mapped"))
    assert fit(10, 100, 100, 500, budget_bytes, 499) == without  # nor do they fit on the host
    assert fit(10, 100, 100, 500, budget_bytes) == without  # the host is the device


def test_many_patches_leave_the_device_before_expression_becomes_sparse() -> None:
    assert fit(10, 100, 100, 50_000, 4000, 50_000) == ("dense", "host")
    assert fit(10, 100, 100, 50_000, 4000) == ("dense", "mapped")


def test_csr_that_is_larger_is_no_choice() -> None:
    assert fit(10, 100, 900, 500, 4499) == ("dense", "mapped")
    assert fit(10, 100, 900, 500, 3999) == ("mapped", "device")


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 5000))
    assert budget(torch.device("cuda")) == 600


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("4G", 4 * 2**30), ("1.5 GiB", 3 * 2**29), ("512MB", 2**29), ("2k", 2048), ("1T", 2**40), ("77", 77), ("0", 0)],
)
def test_the_budget_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str, expected: int) -> None:
    monkeypatch.setenv("AGL_BENCH_MEMORY", asked)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 5000))
    assert budget(CPU) == budget(torch.device("cuda")) == expected


@pytest.mark.parametrize("asked", ["much", "-4G", "4 X", "G", "4G4", "1e9", "nan"])
def test_a_budget_that_is_none(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("AGL_BENCH_MEMORY", asked)
    with pytest.raises(BadSpec, match=f"AGL_BENCH_MEMORY = '{asked}' is not an amount of memory; give bytes or .* 4G$"):
        budget(CPU)


def sparse_table(table: SpotTable, genes: int = 40) -> SpotTable:
    """The same spots with mostly empty counts, a row and a column of zeros among them."""
    rng = np.random.default_rng(3)
    matrices = []
    for size in SIZES.values():
        counts = rng.poisson(0.25, (size, genes)).astype(np.float32)
        counts[2] = counts[:, 5] = 0
        matrices.append(sparse.csr_matrix(counts))
    total = np.concatenate(
        [np.asarray(m.sum(1)).ravel()[table.source_row[table.section == i]] for i, m in enumerate(matrices)]
    )
    return replace(
        table,
        matrices=tuple(matrices),
        source_columns=np.tile(np.arange(genes), (len(matrices), 1)),
        genes=tuple(f"g{i}" for i in range(genes)),
        total=total,
    )


def targets_of(table: SpotTable, rows: np.ndarray, columns: Any, kind: str) -> dict[str, Any]:
    """Stored values as they are, residuals, or standard scores of the sections, as an argument of the store."""
    protocol = {
        "stored": Protocol(),
        "residuals": Protocol(normalisation="pearson_residuals"),
        "scores": Protocol(standardise="section"),
        "both": Protocol(normalisation="pearson_residuals", standardise="section"),
    }[kind]
    return {"targets": fit_targets(table, rows[table.section[rows] < 2], np.asarray(columns), protocol)}


def memory_mapped(table: SpotTable, folder: Path) -> SpotTable:
    """The same table over files that nobody may write to."""

    def on_disk(index: int, matrix: sparse.csr_matrix) -> sparse.csr_matrix:
        arrays = []
        for name in ("data", "indices", "indptr"):
            path = folder / f"{index}.{name}.npy"
            np.save(path, getattr(matrix, name))
            arrays.append(np.load(path, mmap_mode="r"))
        return sparse.csr_matrix(tuple(arrays), shape=matrix.shape)

    return replace(table, matrices=tuple(on_disk(i, m) for i, m in enumerate(table.matrices)))


@pytest.mark.parametrize("kind", ["stored", "residuals", "scores", "both"])
@pytest.mark.parametrize("block", [1024, 4])
def test_every_form_is_dense_bit_for_bit(
    table: SpotTable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int, kind: str
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    table, rows = memory_mapped(sparse_table(table), tmp_path), shuffled(table)
    columns = tuple(np.random.default_rng(0).permutation(40)[:30].tolist())
    made = targets_of(table, rows, columns, kind)
    stores = [store_of(table, rows, "position", columns, form=f, **made) for f in FORMS]
    stores.append(store_of(table, rows, "position", columns, form="mapped", spare_bytes=4 * len(rows) * 3, **made))
    dense = stores[0]
    assert [type(s.matrix) for s in stores] == [Dense, Csr, Mapped, Mapped]
    if kind == "stored":
        np.testing.assert_array_equal(
            dense.expression_of(), table.rows(np.arange(len(table))).toarray()[rows][:, columns]
        )
    some, few = torch.tensor([4, 0, 2, 2, 9, 11]), torch.tensor([7, 29, 0])
    assert torch.equal(dense.expression_of(some, few), dense.expression_of()[some][:, few])
    for other in stores:
        assert other.genes == 30
        for r, c in itertools.product((None, some), (None, few)):
            assert torch.equal(dense.expression_of(r, c), other.expression_of(r, c))
        for n in (0, 1, 7):
            assert torch.equal(other.leading_expression(n), dense.expression_of()[:n])
        assert torch.equal(dense.batch(some).expression, other.batch(some).expression)
        narrow = other.narrow(few)
        assert torch.equal(narrow.expression_of(), dense.expression_of()[:, few])
        assert torch.equal(narrow.batch(some).expression, dense.expression_of(some, few))
    assert isinstance(stores[2].narrow(few).matrix, Mapped) and isinstance(stores[3].narrow(few).matrix, Dense)
    assert isinstance(stores[3].narrow(torch.arange(4)).matrix, Mapped)  # more than is spare
    sizes = [s.nbytes["device"] for s in stores]
    assert sizes[2] < sizes[1] and (kind != "stored" or sizes[1] < sizes[0])


def test_a_value_that_is_stored_in_two_parts_is_their_sum() -> None:
    section = make_section("S", 5)
    section.counts.X = sparse.csr_matrix((np.float32([1, 2]), [1, 1], [0, 2, 2, 2, 2, 2]), shape=(5, 4))
    table = tabulate([section], Protocol(min_genes_per_spot=0, spot_mads=0, normalisation="log1p"))
    for form in FORMS:
        found = store_of(table, np.arange(5), "position", form=form).expression_of()[0]
        assert found.tolist() == [0, np.log1p(np.float32(3)), 0, 0]
    assert section.counts.X.nnz == 2  # the section stays as measured


def test_dense_expression_is_shown_without_a_copy(table: SpotTable) -> None:
    store = store_of(table, shuffled(table))
    assert store.expression_of().data_ptr() == store.leading_expression(3).data_ptr()
    assert store.expression_of() is store.expression_of()


def test_what_is_compressed_or_mapped_is_shown_as_a_copy(table: SpotTable) -> None:
    for form in ("csr", "mapped"):
        store = store_of(table, shuffled(table), form=form)
        store.leading_expression(3).zero_()
        assert store.leading_expression(3).any()


@pytest.mark.parametrize("genes", [4, 40])
@pytest.mark.parametrize("form", FORMS)
def test_a_narrow_store_has_some_genes_and_shares_the_rest(table: SpotTable, form: Any, genes: int) -> None:
    if genes == 40:
        table = sparse_table(table)
    store = store_of(table, shuffled(table), columns=tuple(range(genes)), form=form)
    columns = torch.tensor([3, 0, 2] if genes == 4 else [3, 0, 2, *range(10, 40)])
    narrow = store.narrow(columns)
    assert narrow.genes == len(columns) and store.genes == genes and len(narrow) == len(store)
    assert torch.equal(narrow.expression_of(), store.expression_of()[:, columns])
    assert torch.equal(narrow.batch(torch.tensor([5, 1])).expression, store.expression_of()[[5, 1]][:, columns])
    assert narrow.patches is store.patches and narrow.position is store.position
    again = narrow.narrow(torch.tensor([2]))
    assert torch.equal(again.expression_of(), store.expression_of()[:, [2]])
    if form == "csr":  # whichever takes less
        assert isinstance(narrow.matrix, Csr if genes == 40 else Dense)


def test_bytes(table: SpotTable) -> None:
    rows = np.arange(10)
    fixed, expression, patches = 10 * 8 + 10 * 2 * 4, 10 * 4 * 4, 10 * 3 * PX * PX
    assert store_of(table, rows).nbytes == {"device": fixed + expression + patches, "host": 0}
    assert store_of(table, rows, patches_on="host").nbytes == {"device": fixed + expression, "host": patches}
    assert store_of(table, rows, form="mapped", patches_on="mapped").nbytes == {"device": fixed, "host": 0}
    embedded = store_of(table, rows, "embedding")
    assert embedded.nbytes == {"device": fixed + expression + 10 * WIDTH * 4, "host": 0}


# ---- streams --------------------------------------------------------------------------------------------------------


def contents(batch: SpotBatch) -> tuple[bytes, ...]:
    """All that a batch holds."""
    spots = batch.spots
    tensors = (spots.patches, spots.embedding, spots.position, spots.section, batch.expression, batch.row)
    return tuple(b"" if t is None else t.contiguous().numpy().tobytes() for t in tensors)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_stream_is_the_batches_wherever_the_data_are(table: SpotTable, choice: Any, augmented: bool) -> None:
    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(7) if augmented else None

    rows, reference = shuffled(table), generator()
    plain = store_of(table, rows)
    expected = [contents(plain.batch(torch.from_numpy(b), reference)) for b in BATCHES]
    store = store_of(table, rows, **choice)
    assert [contents(b) for b in store.stream(BATCHES, generator())] == expected
    assert [contents(b) for b in store.stream(iter(BATCHES), generator())] == expected
    used = generator()
    assert [contents(store.batch(torch.from_numpy(b), used)) for b in BATCHES] == expected
    bare = list(store.stream(BATCHES, generator(), expression=False))
    assert [b.expression.shape for b in bare] == [(len(b), 0) for b in BATCHES]
    assert [contents(b)[:4] for b in bare] == [c[:4] for c in expected]
    assert list(store.stream([])) == []


def test_patches_are_those_of_flips_one_after_the_other(table: SpotTable) -> None:
    """Results stay what they were before patches were turned by bits."""
    store, rows = store_of(table, shuffled(table)), torch.arange(12)
    flips = torch.rand(3, 12, 1, 1, 1, generator=torch.Generator().manual_seed(5)) < 0.5
    expected = store.spots(rows).patches
    assert expected is not None
    expected = torch.where(flips[0], expected.flip(-1), expected)
    expected = torch.where(flips[1], expected.flip(-2), expected)
    expected = torch.where(flips[2], expected.transpose(-1, -2), expected)
    assert torch.equal(store.spots(rows, torch.Generator().manual_seed(5)).patches, expected)  # type: ignore[arg-type]


def gatherers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("patches")]


def test_an_endless_stream_ends_with_its_consumer(table: SpotTable) -> None:
    pulled = []

    def endless() -> Iterator[np.ndarray]:
        for number in itertools.count():
            pulled.append(number)
            yield np.array([number % 5])

    stream = store_of(table, shuffled(table), patches_on="host").stream(endless())
    assert [next(stream).row.tolist() for _ in range(3)] == [[0], [1], [2]]
    assert len(pulled) == 3 + module.AHEAD and len(gatherers()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not gatherers()


def test_a_fault_of_the_thread_reaches_the_consumer(table: SpotTable) -> None:
    stream = store_of(table, shuffled(table), patches_on="host").stream(iter([np.array([0]), np.array([999])]))
    next(stream)
    with pytest.raises((IndexError, RuntimeError), match=r"range|bounds"):
        next(stream)
    assert not gatherers()


# ---- frozen encoders ------------------------------------------------------------------------------------------------


class Encoder(Backbone):
    """Depends on how a patch is turned."""

    frozen, width = True, 5

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3 * PX * PX, self.width)
        self.asked = 0

    def encode(self, spots: Spots) -> torch.Tensor:
        assert spots.patches is not None and not self.training
        self.asked += len(spots.patches)
        return torch.tanh(self.layer(spots.patches.flatten(1)))


@pytest.mark.parametrize("place", ["device", "host", "mapped"])
@pytest.mark.parametrize("symmetries", [1, 8])
def test_kept_features_are_those_encoded_on_the_fly(table: SpotTable, symmetries: Any, place: str) -> None:
    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(3) if symmetries == 8 else None

    store, encoder = store_of(table, shuffled(table), patches_on=place), Encoder()
    on_the_fly = list(store.stream(BATCHES, generator()))
    encoder.train()
    store.encode(encoder, symmetries, batch=4)
    assert encoder.training and encoder.asked == symmetries * len(store)
    assert store.patches is None and store.embedding is not None and not store.embedding.requires_grad
    assert store.embedding.shape == (symmetries, len(store), 5) and store.nbytes["host"] == 0
    encoder.eval()
    for patch, kept in zip(on_the_fly, store.stream(BATCHES, generator()), strict=True):
        assert kept.spots.patches is None and kept.spots.embedding is not None
        torch.testing.assert_close(kept.spots.embedding, encoder.encode(patch.spots).detach(), rtol=0, atol=1e-6)
        assert torch.equal(kept.expression, patch.expression)
    plain = store.spots(torch.tensor([2, 0])).embedding
    assert plain is not None and torch.equal(plain, store.embedding[0][[2, 0]])


def test_an_encoder_that_needs_much_memory_sees_fewer_spots_at_a_time(table: SpotTable) -> None:
    class Large(Encoder):
        def encode(self, spots: Spots) -> torch.Tensor:
            features = super().encode(spots)
            if len(features) > 3:
                raise torch.OutOfMemoryError
            return features

    store, expected = (store_of(table, shuffled(table)) for _ in range(2))
    expected.encode(Encoder(), 8)
    store.encode(Large(), 8)
    assert store.embedding is not None and expected.embedding is not None
    torch.testing.assert_close(store.embedding, expected.embedding, rtol=0, atol=1e-6)


def test_features_made_before_can_be_handed_in(table: SpotTable) -> None:
    first, second = (store_of(table, shuffled(table)) for _ in range(2))
    first.encode(Encoder(), 8)
    assert first.embedding is not None
    second.take_embedding(first.embedding)
    one, two = (s.spots(torch.arange(9), torch.Generator().manual_seed(1)).embedding for s in (first, second))
    assert one is not None and two is not None and torch.equal(one, two) and second.patches is None
    assert not torch.equal(one, first.spots(torch.arange(9)).embedding)  # type: ignore[arg-type]
    for wrong in (first.embedding[0], first.embedding[:2], first.embedding[:, 1:]):
        with pytest.raises(ValueError, match=r"not \(1 or 8, "):
            second.take_embedding(wrong)


def test_embeddings_of_files_are_not_augmented(table: SpotTable) -> None:
    store, generator = store_of(table, shuffled(table), "embedding"), torch.Generator().manual_seed(1)
    before = generator.get_state()
    turned, plain = store.spots(torch.arange(4), generator).embedding, store.spots(torch.arange(4)).embedding
    assert turned is not None and plain is not None and torch.equal(turned, plain)
    assert torch.equal(generator.get_state(), before)
