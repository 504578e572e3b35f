"""What is measured at a spot, on the host (`Section`) and on the device (`Spots`, `SpotBatch`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData


class PatchSource(Protocol):
    """Where the patches of a section come from: an image to cut from, or an array."""

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """Patches of the spots `rows`, uint8 (spots, 3, side_px, side_px), each `side_um` wide on the tissue."""

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the positions (spots, 2) in pixels, (x, y), that lie outside the image."""


@dataclass
class Section:
    """One tissue slide on the host, as measured: no filter, no normalisation.

    Attributes:
        name: unique within the dataset.
        counts: AnnData, spots × genes, raw UMI counts in X; obsm["spatial"] = (x, y) of the spot centre in pixels.
        um_per_px: tissue micrometres for one pixel of the coordinates.
        patches: where the images of the spots come from; None where only embeddings are known.
        embedding: (spots, width) float32 features computed beforehand; None where there are none.
        donor: whom the tissue is from; "" where it is not known.
        dropped_spots: spots that the reader left out because they have no patch or lie beside the tissue.
        facts: what else is known of it, for the card, e.g. {"organ": "Heart"}; nothing is computed from it.
    """

    name: str
    counts: AnnData
    um_per_px: float
    patches: PatchSource | None = None
    embedding: np.ndarray | None = None
    donor: str = ""
    dropped_spots: int = 0
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spots:
    """What a backbone may see. No expression: the answer is absent by type.

    Attributes:
        patches: (spots, 3, H, W) float32, RGB / 255, or None if the backbone does not see patches.
        position: (spots, 2) float32, µm on the section.
        section: (spots,) int64, index of the section.
        embedding: (spots, width) float32 or None if the backbone does not see embeddings.
    """

    patches: Tensor | None
    position: Tensor
    section: Tensor
    embedding: Tensor | None = None


@dataclass(frozen=True)
class SpotBatch:
    """Spots with their measured expression, for training.

    Attributes:
        spots: what the backbone sees.
        expression: (spots, genes) float32, normalised as the protocol says.
        row: (spots,) int64, row in the store.
    """

    spots: Spots
    expression: Tensor
    row: Tensor = field(repr=False)

    def split(self, size: int) -> list[SpotBatch]:
        """Parts of at most `size` spots, in order; views."""
        return [self._part(slice(start, start + size)) for start in range(0, len(self.row), size)]

    def _part(self, rows: slice) -> SpotBatch:
        seen = self.spots
        patches, embedding = (None if t is None else t[rows] for t in (seen.patches, seen.embedding))
        spots = Spots(patches, seen.position[rows], seen.section[rows], embedding)
        return SpotBatch(spots, self.expression[rows], self.row[rows])
