"""Spots of one purpose on the device: gathered by index, augmented in batches, streamed without a synchronisation.

fit, budget           choose what is kept where; results do not depend on it
Dense, Csr, Mapped    the expression of all spots, (spots, genes)
SpotStore             expression with what a backbone may see: patches, embeddings or features of a frozen encoder
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agl_bench.data.preprocess import SpotTable
from agl_bench.data.room import Room, forward
from agl_bench.data.targets import TargetRule, Targets
from agl_bench.errors import BadSpec
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import SpotBatch, Spots

SYMMETRIES = 8  # of the square: bit 0 flips left and right, bit 1 flips up and down, bit 2 transposes afterwards
AHEAD = 2  # batches that are gathered from elsewhere than the device before they are asked for
_BLOCK = 1024  # spots whose expression is made dense at a time
_AS_STORED = TargetRule()  # log-normalised expression

Form = Literal["dense", "csr", "mapped"]  # of the expression; "mapped" stays where the sections have it
Place = Literal["device", "host", "mapped"]  # of the patches; "mapped" ones are read from their source by the batch
MEMORY = "AGL_BENCH_MEMORY"  # environment variable: the budget, e.g. 4G


def fit(
    spots: int, genes: int, nonzero: int, patch_bytes: int, budget_bytes: int, host_bytes: int | None = None
) -> tuple[Form, Place]:
    """What fits into the budget, fastest first: the form of the expression, and where the patches are.

    Args:
        spots: in all stores together, as the other sizes.
        genes: columns of the expression.
        nonzero: values that CSR would hold; an upper bound will do.
        patch_bytes: of all patches; 0 where the backbone sees none.
        budget_bytes: on the device.
        host_bytes: likewise on the host, where patches may be kept too; None = the device is the host.
    """
    sizes: dict[Form, int] = {"dense": 4 * spots * genes, "csr": 8 * nonzero + 8 * (spots + 1)}
    if sizes["csr"] >= sizes["dense"]:
        del sizes["csr"]
    places: tuple[Place, ...] = ("device", "mapped")
    if host_bytes is not None and patch_bytes <= host_bytes:
        places = ("device", "host", "mapped")
    choices: list[tuple[Form, Place]] = [(form, place) for place in places for form in sizes]
    choices += [("mapped", place) for place in places]
    for form, place in choices:
        if sizes.get(form, 0) + (patch_bytes if place == "device" else 0) <= budget_bytes:
            return form, place
    return "mapped", "mapped"


def budget(device: torch.device) -> int:
    """Bytes on the device that data may take: `AGL_BENCH_MEMORY`, or else 60 % of what is free on CUDA and half of the
    memory of the host.

    Raises:
        BadSpec: if `AGL_BENCH_MEMORY` is no amount of memory.
    """
    asked = os.environ.get(MEMORY)
    if asked:
        amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", asked.strip(), flags=re.IGNORECASE)
        if not amount:
            raise BadSpec(
                f"{MEMORY} = '{asked}' is not an amount of memory; give bytes or a number with K, M, G or T, e.g. 4G"
            )
        return int(float(amount[1]) * 1024 ** " KMGT".index(amount[2].upper() or " "))
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
        values: (nonzero,) float32, as stored.
        targets: what makes targets of gathered rows; None = they are so already.
    """

    def __init__(
        self, pointers: Tensor, columns: Tensor, values: Tensor, genes: int, targets: Targets | None = None
    ) -> None:
        self.pointers, self.columns, self.values, self.genes = pointers, columns, values, genes
        self.targets = targets
        self.nbytes = pointers.nbytes + columns.nbytes + values.nbytes + (targets.nbytes if targets else 0)
        self._pointers_on_host: np.ndarray = pointers.cpu().numpy()

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
        dense = dense.scatter_(0, target, self.values.index_select(0, source)).view(len(rows), self.genes)
        return dense if self.targets is None else self.targets(dense, rows)

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
        targets = None if self.targets is None else self.targets.narrow(columns)
        narrow = Csr(pointers, moved[kept], self.values[kept], len(columns), targets)
        return Dense(narrow.pick(None, None)) if 4 * (len(pointers) - 1) * len(columns) <= narrow.nbytes else narrow


class Mapped:
    """Expression that stays in the sections, mostly memory-mapped; a gathered row is bit for bit that of `Dense`.

    Attributes:
        source: where stored values of which rows and columns come from, and what makes targets of them.
        genes: number of columns.
        spare_bytes: what a narrow form may take on the device to be held there.
    """

    def __init__(self, source: _Source, targets: Targets | None, spare_bytes: int) -> None:
        self.source, self.targets, self.spare_bytes = source, targets, spare_bytes
        self.genes = len(source.columns)
        self.nbytes = targets.nbytes if targets else 0

    def nonzero(self, rows: np.ndarray) -> int | None:
        """`take` does not need it."""
        return None

    def gather(self, rows: np.ndarray) -> Tensor:
        """Stored values of some rows on the host, (rows, genes): what may be done ahead, by a thread."""
        return self.source.gather(rows)

    def receive(self, values: Tensor, rows: Tensor) -> Tensor:
        """On the device, from what `gather` returned: dense (rows, genes)."""
        values = values.to(self.source.device, non_blocking=True)
        return values if self.targets is None else self.targets(values, rows)

    def take(self, rows: Tensor, nonzero: int | None = None) -> Tensor:
        """Dense (rows, genes)."""
        return self.receive(self.gather(rows.cpu().numpy()), rows)

    def leading(self, count: int) -> Tensor:
        """The first rows, (count, genes): a new tensor."""
        return self.pick(torch.arange(count, device=self.source.device), None)

    def pick(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """Dense (rows, columns); None is all of them."""
        if columns is not None:
            return self._narrow(columns).pick(rows, None)
        if rows is None:
            rows = torch.arange(len(self.source.rows), device=self.source.device)
        dense = torch.empty(len(rows), self.genes, device=self.source.device)
        for at, block in zip(torch.split(dense, _BLOCK), torch.split(rows, _BLOCK), strict=True):
            at.copy_(self.take(block))
        return dense

    def narrow(self, columns: Tensor) -> Dense | Mapped:
        """Only these genes (distinct), in this order; dense on the device where that takes no more than is spare."""
        narrow = self._narrow(columns)
        fits = 4 * len(self.source.rows) * len(columns) <= self.spare_bytes
        return Dense(narrow.pick(None, None)) if fits else narrow

    def _narrow(self, columns: Tensor) -> Mapped:
        source = replace(self.source, columns=self.source.columns[columns.cpu().numpy()])
        return Mapped(source, None if self.targets is None else self.targets.narrow(columns), self.spare_bytes)


@dataclass(frozen=True)
class _Source:
    """Some rows × columns of a table, and the device they are for."""

    table: SpotTable
    rows: np.ndarray
    columns: np.ndarray
    rule: TargetRule
    device: torch.device

    def gather(self, rows: np.ndarray | slice) -> Tensor:
        """Stored values of some of the rows as a dense tensor on the host, pinned where a CUDA device will fetch it."""
        block = self.rule.stored(self.table, self.rows[rows], self.columns)
        if self.device.type != "cuda":
            return torch.from_numpy(block.toarray())
        pinned = torch.empty(block.shape, pin_memory=True)
        block.toarray(out=pinned.numpy())
        return pinned

    def targets(self) -> Targets | None:
        """What makes targets of them."""
        return Targets.of(self.rule, self.table, self.rows, self.columns, self.device)

    def dense(self) -> Dense:
        """Block by block, so that no second array of all spots × genes exists."""
        values, targets = torch.empty(len(self.rows), len(self.columns), device=self.device), self.targets()
        for start in range(0, len(self.rows), _BLOCK):
            block = self.gather(slice(start, start + _BLOCK)).to(self.device)
            rows = torch.arange(start, start + len(block), device=self.device)
            values[start : start + _BLOCK] = block if targets is None else targets(block, rows)
        return Dense(values)

    def csr(self) -> Csr:
        """Block by block into arrays with room for all genes of the sections; room left over is never touched."""
        room = int(self.table.lengths(self.rows).sum())
        pointers = np.zeros(len(self.rows) + 1, dtype=np.int64)
        columns, values = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
        end = 0
        for start in range(0, len(self.rows), _BLOCK):
            block = self.rule.stored(self.table, self.rows[start : start + _BLOCK], self.columns)
            pointers[start + 1 : start + 1 + block.shape[0]] = block.indptr[1:] + end
            columns[end : end + block.nnz], values[end : end + block.nnz] = block.indices, block.data
            end += block.nnz
        arrays = [torch.from_numpy(a).to(self.device) for a in (pointers, columns[:end], values[:end])]
        return Csr(arrays[0], arrays[1], arrays[2], len(self.columns), self.targets())


class _Patches:
    """Patches that stay where the sections have them, memory-mapped or decoded, and are read by rows."""

    def __init__(self, table: SpotTable, rows: np.ndarray, patch_px: int, patch_um: float) -> None:
        self.table, self.rows, self.patch_px, self.patch_um = table, rows, patch_px, patch_um
        firsts = np.unique(table.section[rows], return_index=True)[1]
        self.read(firsts)  # what cannot be read is found now, not in the middle of an epoch

    def read(self, rows: np.ndarray) -> Tensor:
        """Patches of some of the rows, (rows, 3, px, px) uint8 on the host."""
        return torch.from_numpy(_patches(self.table, self.rows[rows], self.patch_px, self.patch_um))


class SpotStore:
    """Expression and patches (uint8) of some rows of a table, gathered by index.

    A trainer gets a store of development spots; test spots live in another store that it never sees.

    Attributes:
        matrix: the expression, on the device.
        section: (spots,) int64, on the device.
        section_on_host: (spots,) the same for planning batches without a synchronisation.
        position: (spots, 2) float32, on the device.
        patches: (spots, 3, px, px) uint8, on the device or the host, or what reads them from the sections; None if the
            backbone sees none, or once encoded.
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
        form: Form = "dense",
        patches_on: Place = "device",
        targets: TargetRule = _AS_STORED,
        spare_bytes: int = 0,
    ) -> None:
        """Gather `rows` × `columns` of the table; `fit` chooses `form` and `patches_on`.

        Args:
            table: of all spots.
            rows: spots of the store.
            columns: genes of the store.
            sees: what the backbone looks at.
            patch_px: side of its patches.
            patch_um: likewise on the tissue.
            device: where batches are wanted.
            form: of the expression.
            patches_on: where the patches are.
            targets: fitted for `columns`; log-normalised expression by default.
            spare_bytes: what the genes that a trainer picks out of mapped expression may take on the device.

        Raises:
            BadSpec: if the backbone wants to see what the sections do not have.
        """
        self.device = device
        self.section_on_host = table.section[rows]
        source = _Source(table, rows, columns, targets, device)
        self.matrix: Dense | Csr | Mapped
        if form == "mapped":
            self.matrix = Mapped(source, source.targets(), spare_bytes)
        else:
            self.matrix = source.dense() if form == "dense" else source.csr()
        self.section = torch.from_numpy(self.section_on_host).to(device)
        self.position = torch.from_numpy(table.position[rows]).to(device)
        self.patches: Tensor | _Patches | None = None
        self.embedding: Tensor | None = None
        self._patches_on = patches_on
        if sees == "patches" and patches_on == "mapped":
            self.patches = _Patches(table, rows, patch_px, patch_um)
        elif sees == "patches":
            patches = torch.from_numpy(_patches(table, rows, patch_px, patch_um))
            self.patches = patches if patches_on == "host" else patches.to(device)
        elif sees == "embedding":
            self.embedding = torch.from_numpy(_embedding(table, rows)).to(device)[None]

    def __len__(self) -> int:
        return len(self.section_on_host)

    @property
    def genes(self) -> int:
        """Number of columns of the expression."""
        return self.matrix.genes

    @property
    def nbytes(self) -> dict[Place, int]:
        """What the data take on the device and on the host; what stays in the sections is not counted."""
        size: dict[Place, int] = {"device": self.matrix.nbytes + self.section.nbytes + self.position.nbytes, "host": 0}
        size["device"] += 0 if self.embedding is None else self.embedding.nbytes
        if isinstance(self.patches, Tensor):
            size[self._patches_on] += self.patches.nbytes
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
        if isinstance(self.patches, Tensor):
            patches = self.patches.index_select(0, rows.to(self.patches.device))
        else:
            patches = self.patches.read(rows.cpu().numpy())
        return self._look(rows, patches.to(self.device), augment)

    def batch(self, rows: Tensor, augment: torch.Generator | None = None) -> SpotBatch:
        """Spots with their expression."""
        return SpotBatch(self.spots(rows, augment), self.matrix.take(rows), rows)

    def stream(
        self, batches: Iterable[np.ndarray], augment: torch.Generator | None = None, *, expression: bool = True
    ) -> Generator[SpotBatch, None, None]:
        """`batch` of each of `batches`, without waiting for the device.

        What is not on the device is gathered ahead by a thread that ends with the iterator.

        Args:
            batches: rows (spots,) int64 on the host; those of a sequence are sent to the device at once.
            augment: as in `spots`.
            expression: without it batches have no column of expression.
        """
        with contextlib.closing(self._gathered(batches, expression=expression)) as gathered:
            for here, rows, patches, stored in gathered:
                if not expression:
                    measured = self.position.new_empty(len(here), 0)
                elif isinstance(self.matrix, Mapped):
                    assert stored is not None
                    measured = self.matrix.receive(stored, rows)
                else:
                    measured = self.matrix.take(rows, self.matrix.nonzero(here))
                yield SpotBatch(self._look(rows, patches, augment), measured, rows)

    @torch.no_grad()
    def encode(self, backbone: Backbone, symmetries: Literal[1, 8], batch: int = 64) -> None:
        """Replace the patches by what a frozen backbone makes of them.

        Args:
            backbone: on the device of the store.
            symmetries: 8 where patches are augmented, else 1.
            batch: spots for each pass, fewer where the memory of the device does not suffice.
        """
        features: Tensor | None = None
        was_training = backbone.training
        backbone.eval()

        def encoded(batches: list[np.ndarray]) -> Generator[None, None, None]:
            nonlocal features
            with contextlib.closing(self._gathered(batches, expression=False)) as gathered:
                for here, rows, patches, _ in gathered:
                    assert patches is not None, "there are no patches to encode"
                    for symmetry in range(symmetries):
                        turned = _pixels(patches, torch.full_like(rows, symmetry) if symmetry else None)
                        part = backbone.encode(Spots(turned, self.position[rows], self.section[rows]))
                        if features is None:
                            features = torch.empty(symmetries, len(self), part.shape[1], device=self.device)
                        features[symmetry, here[0] : here[-1] + 1] = part
                    yield

        forward(np.arange(len(self)), Room(batch), encoded)
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

    def _gathered(
        self, batches: Iterable[np.ndarray], *, expression: bool
    ) -> Generator[tuple[np.ndarray, Tensor, Tensor | None, Tensor | None], None, None]:
        """Each batch with its rows and patches on the device, and stored values on the host where they are mapped."""
        mapped = self.matrix if expression and isinstance(self.matrix, Mapped) else None
        kept = self.patches if isinstance(self.patches, Tensor) and self._patches_on == "device" else None
        elsewhere = self.patches if kept is None else None
        if mapped is None and elsewhere is None:
            for here, rows in self._sent(batches):
                yield here, rows, None if kept is None else kept.index_select(0, rows), None
            return

        def gather(here: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
            patches = None if elsewhere is None else _gather(elsewhere, here, self.device)
            return patches, None if mapped is None else mapped.gather(here)

        waiting: deque[tuple[np.ndarray, Tensor, Future[tuple[Tensor | None, Tensor | None]]]] = deque()

        def first() -> tuple[np.ndarray, Tensor, Tensor | None, Tensor | None]:
            here, rows, ahead = waiting.popleft()
            patches, stored = ahead.result()
            if patches is not None:
                patches = patches.to(self.device, non_blocking=True)
            elif kept is not None:
                patches = kept.index_select(0, rows)
            return here, rows, patches, stored

        worker = ThreadPoolExecutor(1, thread_name_prefix="patches")
        try:
            for here, rows in self._sent(batches):
                waiting.append((here, rows, worker.submit(gather, here)))
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


def _gather(patches: Tensor | _Patches, rows: np.ndarray, device: torch.device) -> Tensor:
    """Some patches of the host, pinned where a CUDA device will fetch them."""
    pinned = device.type == "cuda"
    if isinstance(patches, _Patches):
        read = patches.read(rows)
        return read.pin_memory() if pinned else read
    gathered = torch.empty((len(rows), *patches.shape[1:]), dtype=patches.dtype, pin_memory=pinned)
    torch.index_select(patches, 0, torch.from_numpy(rows), out=gathered)
    return gathered


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
