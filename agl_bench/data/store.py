"""Spots of one purpose on the device: resident, gathered by index, augmented in batches."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.spots import SpotBatch, Spots


class SpotStore:
    """Patches (uint8) and expression (float32) of some rows of a table, resident on the device.

    A trainer gets a store of development spots; test spots live in another store that it never sees.

    Attributes:
        expression: (spots, genes) float32.
        section: (spots,) int64, on the device.
        section_on_host: (spots,) the same for planning batches without a synchronisation.
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
    ) -> None:
        """Gather `rows` × `columns` of the table.

        Raises:
            BadSpec: if the backbone wants to see what the sections do not have.
        """
        self.device = device
        self.section_on_host = table.section[rows]
        self.expression = torch.from_numpy(table.expression[rows][:, columns].toarray()).to(device)
        self.section = torch.from_numpy(self.section_on_host).to(device)
        self.position = torch.from_numpy(table.position[rows]).to(device)
        self.patches: Tensor | None = None
        self.embedding: Tensor | None = None
        if sees == "patches":
            self.patches = torch.from_numpy(_patches(table, rows, patch_px, patch_um)).to(device)
        elif sees == "embedding":
            self.embedding = torch.from_numpy(_embedding(table, rows)).to(device)

    def __len__(self) -> int:
        return len(self.section_on_host)

    def spots(self, rows: Tensor, augment: torch.Generator | None = None) -> Spots:
        """What a backbone may see of `rows` (spots,), turned and flipped at random if a generator is given."""
        patches = None
        if self.patches is not None:
            patches = self.patches[rows]
            if augment is not None:
                patches = _turn_and_flip(patches, augment)
            patches = patches.to(torch.float32) / 255
        embedding = None if self.embedding is None else self.embedding[rows]
        return Spots(patches, self.position[rows], self.section[rows], embedding)

    def batch(self, rows: Tensor, augment: torch.Generator | None = None) -> SpotBatch:
        """Spots with their expression."""
        return SpotBatch(self.spots(rows, augment), self.expression[rows], rows)


def _turn_and_flip(patches: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square for each patch, uniformly: (spots, 3, px, px)."""
    flips = torch.rand(3, len(patches), 1, 1, 1, generator=generator, device=patches.device) < 0.5
    patches = torch.where(flips[0], patches.flip(-1), patches)
    patches = torch.where(flips[1], patches.flip(-2), patches)
    return torch.where(flips[2], patches.transpose(-1, -2), patches)


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
