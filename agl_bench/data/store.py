"""Spots of one purpose on the device: gathered by index, augmented in batches, streamed without a synchronisation.

fit, budget   choose what is kept where; results do not depend on it
Dense, Csr    the expression of all spots, (spots, genes)
SpotStore     expression with what a backbone may see: patches, embeddings or features of a frozen encoder
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import SpotBatch, Spots

SYMMETRIES = 8  # of the square: bit 0 flips left and right, bit 1 flips up and down, bit 2 transposes afterwards
AHEAD = 2  # batches of patches that are gathered before they are asked for
_BLOCK = 1024  # spots whose expression is made dense at a time

Place = Literal["device", "host"]


def fit(spots: int, genes: int, nonzero: int, patch_bytes: int, budget_bytes: int) -> tuple[bool, Place]:
    """What fits into the budget, fastest first: whether expression is dense, and where the patches are.

    Args:
        spots: in all stores together, as the other sizes.
        genes: columns of the expression.
        nonzero: values that CSR would hold; an upper bound will do.
        patch_bytes: of all patches; 0 where the backbone sees none.
        budget_bytes: on the device.
    """
    dense_bytes, csr_bytes = 4 * spots * genes, 8 * nonzero + 8 * (spots + 1)
    kinds = ((True, dense_bytes), (False, csr_bytes)) if csr_bytes < dense_bytes else ((True, dense_bytes),)
    places: tuple[tuple[Place, int], ...] = (("device", patch_bytes), ("host", 0))
    for place, patches in places:
        for dense, expression in kinds:
            if expression + patches <= budget_bytes:
                return dense, place
    return kinds[-1][0], "host"  # nothing fits: the least there is


def budget(device: torch.device) -> int:
    """Bytes on the device that data may take: 60 % of what is free on CUDA, half of the memory of the host."""
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    return device_memory(device) // 2


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Dense:
    """Expression as a tensor: `values` (spots, genes) float32."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.genes = values.shape[1]
        self.nbytes = values.nbytes
        self._version = values._version

    @property
    def is_spoilt(self) -> bool:
        """Whether somebody has changed the values in place, also through a view; torch counts the changes."""
        return self.values._version != self._version

    def nonzero(self, rows: np.ndarray) -> int | None:
        """`take` does not need it: all rows are of one length."""
        return None

    def take(self, rows: Tensor, nonzero: int | None = None) -> Tensor:
        """Dense (rows, genes)."""
        return self.values.index_select(0, rows)

    def leading(self, count: int) -> Tensor:
        """The first rows, (count, genes): a view."""
        return self.values[:count]

    def pick(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """Dense (rows, columns); None is all of them, and both None are the values themselves."""
        if columns is None:
            return self.values if rows is None else self.take(rows)
        return self.values[:, columns] if rows is None else self.values[rows[:, None], columns]

    def narrow(self, columns: Tensor) -> Dense:
        """Only these genes, in this order."""
        return Dense(self.values.index_select(1, columns))


class Csr:
    """Expression by its nonzero values, row after row; a gathered row is bit for bit that of `Dense`.

    Attributes:
        pointers: (spots + 1,) int64, where each row begins.
        columns: (nonzero,) int32, distinct within a row, in any order.
        values: (nonzero,) float32.
    """

    def __init__(self, pointers: Tensor, columns: Tensor, values: Tensor, genes: int) -> None:
        self.pointers, self.columns, self.values, self.genes = pointers, columns, values, genes
        self.nbytes = pointers.nbytes + columns.nbytes + values.nbytes
        self._pointers_on_host: np.ndarray = pointers.cpu().numpy()
        self._version = values._version

    @property
    def is_spoilt(self) -> bool:
        """Whether somebody has changed the values in place."""
        return self.values._version != self._version

    def nonzero(self, rows: np.ndarray) -> int:
        """Values in these rows, counted on the host: with it `take` need not wait for the device."""
        return int((self._pointers_on_host[rows + 1] - self._pointers_on_host[rows]).sum())

    def take(self, rows: Tensor, nonzero: int | None = None) -> Tensor:
        """Dense (rows, genes)."""
        starts = self.pointers[rows]
        lengths = self.pointers[rows + 1] - starts
        total = int(lengths.sum()) if nonzero is None else nonzero
        order = torch.arange(max(len(rows), total), device=rows.device)
        row = order[: len(rows)].repeat_interleave(lengths, output_size=total)
        source = (starts - lengths.cumsum(0) + lengths).index_select(0, row) + order[:total]
        target = row * self.genes + self.columns.index_select(0, source)
        dense = self.values.new_zeros(len(rows) * self.genes)
        return dense.scatter_(0, target, self.values.index_select(0, source)).view(len(rows), self.genes)

    def leading(self, count: int) -> Tensor:
        """The first rows, (count, genes): a new tensor."""
        return self.pick(torch.arange(count, device=self.values.device), None)

    def pick(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """Dense (rows, columns); None is all of them."""
        if columns is not None:
            return self.narrow(columns).pick(rows, None)
        if rows is None:
            rows = torch.arange(len(self.pointers) - 1, device=self.values.device)
        dense = self.values.new_empty(len(rows), self.genes)
        for at, block in zip(torch.split(dense, _BLOCK), torch.split(rows, _BLOCK), strict=True):
            at.copy_(self.take(block))
        return dense

    def narrow(self, columns: Tensor) -> Dense | Csr:
        """Only these genes (distinct), in this order; dense where that takes no more memory."""
        place = self.columns.new_full((self.genes,), -1)
        place[columns] = torch.arange(len(columns), dtype=place.dtype, device=place.device)
        moved = place.index_select(0, self.columns)
        kept = (moved >= 0).nonzero().squeeze(1)
        pointers = torch.searchsorted(kept, self.pointers)  # the number of kept values before each row
        narrow = Csr(pointers, moved[kept], self.values[kept], len(columns))
        return Dense(narrow.pick(None, None)) if 4 * (len(pointers) - 1) * len(columns) <= narrow.nbytes else narrow


class SpotStore:
    """Expression and patches (uint8) of some rows of a table, gathered by index.

    A trainer gets a store of development spots; test spots live in another store that it never sees.

    Attributes:
        matrix: the expression, on the device.
        section: (spots,) int64, on the device.
        section_on_host: (spots,) the same for planning batches without a synchronisation.
        position: (spots, 2) float32, on the device.
        patches: (spots, 3, px, px) uint8, on the device or the host; None if the backbone sees none, or once encoded.
        embedding: (symmetries, spots, n) float32, on the device; one symmetry where the features are of patches as
            they are.
    """

    def __init__(
        self,
        table: SpotTable,
        rows: np.ndarray,
        columns: np.ndarray,
        *,
        sees: Literal["patches", "embedding", "position"],
        patch_px: int,
        patch_um: float,
        device: torch.device,
        dense: bool = True,
        patches_on: Place = "device",
    ) -> None:
        """Gather `rows` × `columns` of the table; `fit` chooses `dense` and `patches_on`.

        Raises:
            BadSpec: if the backbone wants to see what the sections do not have.
        """
        self.device = device
        self.section_on_host = table.section[rows]
        self.matrix = _dense(table, rows, columns, device) if dense else _csr(table, rows, columns, device)
        self.section = torch.from_numpy(self.section_on_host).to(device)
        self.position = torch.from_numpy(table.position[rows]).to(device)
        self.patches: Tensor | None = None
        self.embedding: Tensor | None = None
        self._prefetches = patches_on == "host"
        if sees == "patches":
            patches = torch.from_numpy(_patches(table, rows, patch_px, patch_um))
            self.patches = patches if self._prefetches else patches.to(device)
        elif sees == "embedding":
            self.embedding = torch.from_numpy(_embedding(table, rows)).to(device)[None]

    def __len__(self) -> int:
        return len(self.section_on_host)

    @property
    def genes(self) -> int:
        """Number of columns of the expression."""
        return self.matrix.genes

    @property
    def is_spoilt(self) -> bool:
        """Whether somebody has changed the stored expression in place."""
        return self.matrix.is_spoilt

    @property
    def nbytes(self) -> dict[Place, int]:
        """What the data take on the device and on the host."""
        size: dict[Place, int] = {"device": self.matrix.nbytes + self.section.nbytes + self.position.nbytes, "host": 0}
        size["device"] += 0 if self.embedding is None else self.embedding.nbytes
        size["host" if self._prefetches else "device"] += 0 if self.patches is None else self.patches.nbytes
        return size

    def expression_of(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Expression of these rows and (distinct) columns, (rows, columns) float32; None is all of them.

        All of a dense store is the stored tensor itself, no copy.
        """
        return self.matrix.pick(rows, columns)

    def leading_expression(self, count: int) -> Tensor:
        """Expression of the first spots, (count, genes) float32: a view where the store is dense."""
        return self.matrix.leading(count)

    def narrow(self, columns: Tensor) -> SpotStore:
        """A store of the same spots with only these genes (distinct), in this order; the rest is shared."""
        narrow = copy.copy(self)
        narrow.matrix = self.matrix.narrow(columns)
        return narrow

    def spots(self, rows: Tensor, augment: torch.Generator | None = None) -> Spots:
        """What a backbone may see of `rows` (spots,), turned and flipped at random if a generator is given."""
        if self.patches is None:
            return self._look(rows, None, augment)
        patches = self.patches.index_select(0, rows.to(self.patches.device))
        return self._look(rows, patches.to(self.device), augment)

    def batch(self, rows: Tensor, augment: torch.Generator | None = None) -> SpotBatch:
        """Spots with their expression."""
        return SpotBatch(self.spots(rows, augment), self.matrix.take(rows), rows)

    def stream(
        self, batches: Iterable[np.ndarray], augment: torch.Generator | None = None, *, expression: bool = True
    ) -> Generator[SpotBatch, None, None]:
        """`batch` of each of `batches`, without waiting for the device.

        Patches on the host are gathered ahead by a thread that ends with the iterator.

        Args:
            batches: rows (spots,) int64 on the host; those of a sequence are sent to the device at once.
            augment: as in `spots`.
            expression: without it batches have no column of expression.
        """
        with contextlib.closing(self._with_patches(batches)) as gathered:
            for here, rows, patches in gathered:
                measured = (
                    self.matrix.take(rows, self.matrix.nonzero(here))
                    if expression
                    else self.position.new_empty(len(here), 0)
                )
                yield SpotBatch(self._look(rows, patches, augment), measured, rows)

    @torch.no_grad()
    def encode(self, backbone: Backbone, symmetries: Literal[1, 8], batch: int = 64) -> None:
        """Replace the patches by what a frozen backbone makes of them.

        Args:
            backbone: on the device of the store.
            symmetries: 8 where patches are augmented, else 1.
            batch: spots for each pass.
        """
        features: Tensor | None = None
        was_training = backbone.training
        backbone.eval()
        for here, rows, patches in self._with_patches(np.split(np.arange(len(self)), range(batch, len(self), batch))):
            assert patches is not None, "there are no patches to encode"
            for symmetry in range(symmetries):
                turned = _pixels(patches, torch.full_like(rows, symmetry) if symmetry else None)
                part = backbone.encode(Spots(turned, self.position[rows], self.section[rows]))
                if features is None:
                    features = torch.empty(symmetries, len(self), part.shape[1], device=self.device)
                features[symmetry, here[0] : here[-1] + 1] = part
        backbone.train(was_training)
        assert features is not None
        self.take_embedding(features)

    def take_embedding(self, features: Tensor) -> None:
        """Replace the patches by features (1 or 8 symmetries, spots, n) float32, as `encode` made them before."""
        if features.ndim != 3 or features.shape[0] not in (1, SYMMETRIES) or features.shape[1] != len(self):
            raise ValueError(f"features are {tuple(features.shape)}, not (1 or {SYMMETRIES}, {len(self)}, n)")
        self.embedding, self.patches = features.to(self.device), None

    def _look(self, rows: Tensor, patches: Tensor | None, augment: torch.Generator | None) -> Spots:
        """Spots of `rows`, given their patches as stored; features are found for the same symmetry as patches."""
        variants = self.embedding
        symmetry = None
        if augment is not None and (patches is not None or (variants is not None and len(variants) > 1)):
            symmetry = _draw(len(rows), augment)
        embedding = None
        if variants is not None:
            embedding = variants[0].index_select(0, rows) if symmetry is None else variants[symmetry, rows]
        pixels = None if patches is None else _pixels(patches, symmetry)
        return Spots(pixels, self.position[rows], self.section[rows], embedding)

    def _with_patches(
        self, batches: Iterable[np.ndarray]
    ) -> Generator[tuple[np.ndarray, Tensor, Tensor | None], None, None]:
        """Each batch with its rows and patches on the device."""
        if self.patches is None or not self._prefetches:
            for here, rows in self._sent(batches):
                yield here, rows, None if self.patches is None else self.patches.index_select(0, rows)
            return
        waiting: deque[tuple[np.ndarray, Tensor, Future[Tensor]]] = deque()

        def first() -> tuple[np.ndarray, Tensor, Tensor]:
            here, rows, patches = waiting.popleft()
            return here, rows, patches.result().to(self.device, non_blocking=True)

        worker = ThreadPoolExecutor(1, thread_name_prefix="patches")
        try:
            for here, rows in self._sent(batches):
                waiting.append((here, rows, worker.submit(_gather, self.patches, here, self.device)))
                if len(waiting) > AHEAD:
                    yield first()
            while waiting:
                yield first()
        finally:  # also where the consumer stops early
            worker.shutdown(cancel_futures=True)

    def _sent(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Each batch with its rows on the device: one transfer for a sequence, one for each batch of an iterator."""
        if isinstance(batches, Sequence) and batches:
            everything = self._send(np.concatenate(batches))
            yield from zip(batches, torch.split(everything, [len(b) for b in batches]), strict=True)
        else:
            for here in batches:
                yield here, self._send(here)

    def _send(self, rows: np.ndarray) -> Tensor:
        """Rows on the device, without waiting for it."""
        there = torch.from_numpy(rows)
        return (there.pin_memory() if self.device.type == "cuda" else there).to(self.device, non_blocking=True)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Numbers of symmetries, uniform: (count,) int64."""
    flips = (torch.rand(3, count, generator=generator, device=generator.device) < 0.5).to(torch.int64)
    return flips[0] + 2 * flips[1] + 4 * flips[2]


def _pixels(patches: Tensor, symmetry: Tensor | None) -> Tensor:
    """Patches (spots, 3, px, px) uint8, each under its symmetry, as float32 in [0, 1]."""
    if symmetry is not None:
        patches = _turn_and_flip(patches, symmetry)
    return torch.true_divide(patches, 255)  # one pass from uint8 to float32


def _turn_and_flip(patches: Tensor, symmetry: Tensor) -> Tensor:
    """Each patch under its symmetry: (spots, 3, px, px) uint8.

    p ^ ((p ^ turned) & mask) is `turned` where the mask is 255 and p where it is 0: a third of the time of
    `torch.where` on a CPU, and unlike a grouping of the patches it does not ask the device how many there are.
    """
    for bit in range(3):
        chosen = ((symmetry >> bit & 1) * 255).to(torch.uint8).view(-1, 1, 1, 1)
        if bit < 2:
            turned = patches.flip(-1 - bit)
        else:
            turned = patches.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
        patches = turned.bitwise_xor_(patches).bitwise_and_(chosen).bitwise_xor_(patches)
    return patches


def _gather(patches: Tensor, rows: np.ndarray, device: torch.device) -> Tensor:
    """Some patches of the host, pinned where a CUDA device will fetch them."""
    pinned = device.type == "cuda"
    gathered = torch.empty((len(rows), *patches.shape[1:]), dtype=patches.dtype, pin_memory=pinned)
    torch.index_select(patches, 0, torch.from_numpy(rows), out=gathered)
    return gathered


def _dense(table: SpotTable, rows: np.ndarray, columns: np.ndarray, device: torch.device) -> Dense:
    """Block by block, so that no second array of all spots × genes exists."""
    values = torch.empty(len(rows), len(columns), device=device)
    for start in range(0, len(rows), _BLOCK):
        block = table.expression[rows[start : start + _BLOCK]][:, columns]
        values[start : start + _BLOCK] = torch.from_numpy(block.toarray())
    return Dense(values)


def _csr(table: SpotTable, rows: np.ndarray, columns: np.ndarray, device: torch.device) -> Csr:
    gathered: sparse.csr_matrix = table.expression[rows][:, columns]
    gathered.sum_duplicates()
    return Csr(
        torch.from_numpy(gathered.indptr.astype(np.int64, copy=False)).to(device),
        torch.from_numpy(gathered.indices.astype(np.int32, copy=False)).to(device),
        torch.from_numpy(gathered.data).to(device),
        len(columns),
    )


def _patches(table: SpotTable, rows: np.ndarray, patch_px: int, patch_um: float) -> np.ndarray:
    patches = np.empty((len(rows), 3, patch_px, patch_px), dtype=np.uint8)
    for index, section in enumerate(table.sections):
        here = table.section[rows] == index
        if not here.any():
            continue
        if section.patches is None:
            raise BadSpec(f"section '{section.name}' has no image or patches; use --backbone embedding")
        patches[here] = section.patches.read(table.source_row[rows[here]], patch_px, patch_um)
    return patches


def _embedding(table: SpotTable, rows: np.ndarray) -> np.ndarray:
    stacked = []
    for section in table.sections:
        if section.embedding is None:
            raise BadSpec(
                f"section '{section.name}' has no embedding; put embedding.h5 (embeddings, barcodes) beside its counts "
                "or use a backbone that sees patches"
            )
        stacked.append(np.asarray(section.embedding, dtype=np.float32))
    widths = {section.name: e.shape[1] for section, e in zip(table.sections, stacked, strict=True)}
    if len(set(widths.values())) > 1:
        raise BadSpec(f"embeddings differ in width between sections: {widths}; compute them with one encoder")
    offset = np.cumsum([0, *map(len, stacked)])
    every: np.ndarray = np.concatenate(stacked)
    here: np.ndarray = every[offset[table.section[rows]] + table.source_row[rows]]
    return here
