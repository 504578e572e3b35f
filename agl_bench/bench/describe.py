"""What a dataset is: its card, and the numbers of each of its sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from agl_bench.bench.prepare import fingerprint
from agl_bench.bench.spec import Part
from agl_bench.data.gene_split import split_genes
from agl_bench.data.neighbours import pitch
from agl_bench.data.preprocess import computable, tabulate
from agl_bench.data.support import support_of
from agl_bench.digests import FileDigests
from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

_LOOKED_AT = 5000  # spots of a section, evenly chosen, that say what its primary genes rest on
_ODD = 0.05  # share of the spots up to which those that are too thin are nothing to speak of; up to 0.022 on her2st
_UNKNOWN = 0.55  # of the pitch: the diameter of a spot where it is not known, as for Visium


@dataclass(frozen=True)
class SectionCard:
    """Numbers of a section.

    Attributes:
        section: its name.
        donor: whom it is from; "" = not known.
        spots, genes: as measured, before any filter.
        dropped_spots: left out by the reader, as `Section.dropped_spots` says.
        um_per_px: tissue micrometres for one pixel of the coordinates.
        pitch_um: distance from a spot to its nearest, median.
        spot_um: diameter of a spot; None = not known.
        median_umi: of the spots.
        sparsity: share of counts that are 0.
        sees: what a backbone may see: patches, embedding, position.
        facts: what its files say of it beside, e.g. organ and technology.
    """

    section: str
    donor: str
    spots: int
    genes: int
    dropped_spots: int
    um_per_px: float
    pitch_um: float | None
    spot_um: float | None
    median_umi: float
    sparsity: float
    sees: tuple[str, ...]
    facts: dict[str, str]


def dataset_card(part: Part, dataset: Dataset, root: Path, digests: FileDigests) -> dict[str, Any]:
    """What is the same for all sections, plain values.

    Raises:
        MissingData: if a file is not there.
    """
    words = ("technology", "tissue", "citation", "licence", "revision")
    return {
        "dataset": part.name,
        "provider": part.provider,
        **{word: getattr(dataset, word) for word in words},
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in part.settings.items()},
        "fingerprint": fingerprint(part, dataset, root, digests),
    }


def section_card(section: Section) -> SectionCard:
    """The numbers of a section that has passed its checks."""
    X = section.counts.X
    entries = X.shape[0] * X.shape[1]
    zeros = entries - int(np.count_nonzero(X.data if sparse.issparse(X) else X))
    diameter = spot_diameter_px(section.counts.uns)
    apart = pitch_px(section)
    seen = {"patches": section.patches, "embedding": section.embedding}
    return SectionCard(
        section=section.name,
        donor=section.donor,
        spots=section.counts.n_obs,
        genes=section.counts.n_vars,
        dropped_spots=section.dropped_spots,
        um_per_px=float(section.um_per_px),
        pitch_um=None if apart is None else apart * section.um_per_px,
        spot_um=None if diameter is None else diameter * section.um_per_px,
        median_umi=float(np.median(umi_of(section))),
        sparsity=zeros / entries,
        sees=(*(name for name, there in seen.items() if there is not None), "position"),
        facts=dict(section.facts),
    )


def cautions(section: Section, *, has_counts: bool = True) -> list[str]:
    """Sentences on the genes that the default protocol would make primary in a section alone, or why it cannot.

    Args:
        section: that has passed its checks.
        has_counts: as the dataset says.
    """
    of_values = {"normalisation": "none", "primary_score": "seurat", "ranking": "seurat"}
    protocol = Protocol.of({} if has_counts else of_values)
    try:
        table = tabulate([section], protocol)
        rows = np.unique(np.linspace(0, len(table) - 1, _LOOKED_AT).astype(np.int64))
        genes, _ = split_genes(table, rows, protocol)
    except (BadSection, BadSpec) as error:
        return [f"the default protocol cannot choose primary genes in it: {error}"]
    return [*_left_out(section, len(table)), *support_of(table, rows, genes, protocol).sentences]


def _left_out(section: Section, kept: int) -> list[str]:
    """A sentence where the default protocol takes more than odd spots for too thin."""
    spots = section.counts.n_obs
    if kept >= spots * (1 - _ODD):
        return []
    return [
        f"the default protocol leaves out {spots - kept:,} of its {spots:,} spots, which have few detected genes; "
        "where they are a tissue of their own, such as fat, keep them with protocol.spot_mads = 0, or lower "
        "protocol.min_genes_per_spot"
    ]


def umi_of(section: Section) -> np.ndarray:
    """Counts of each spot, summed over genes: (spots,) float64."""
    return np.asarray(computable(section.counts.X).sum(axis=1, dtype=np.float64)).ravel()


def pitch_px(section: Section) -> float | None:
    """Distance from a spot to its nearest, median; None for a single spot or where spots lie upon each other."""
    positions = np.asarray(section.counts.obsm["spatial"], dtype=np.float64)
    return pitch(positions) or None


def drawn_diameter_px(section: Section) -> float:
    """Diameter in pixels that a spot is drawn with: its own, or else a share of the pitch or of a patch."""
    known = spot_diameter_px(section.counts.uns)
    return known or _UNKNOWN * (pitch_px(section) or Protocol().patch_um / section.um_per_px)


def spot_diameter_px(uns: Mapping[str, Any]) -> float | None:
    """Diameter of a spot in pixels, where `uns` has `spot_diameter_px` or scanpy's scale factors."""
    found = [uns.get("spot_diameter_px")]
    libraries = uns.get("spatial")
    for library in libraries.values() if isinstance(libraries, Mapping) else ():
        factors = library.get("scalefactors") if isinstance(library, Mapping) else None
        if isinstance(factors, Mapping):
            found.append(factors.get("spot_diameter_fullres"))
    for value in found:
        if isinstance(value, int | float | np.number) and math.isfinite(value) and value > 0:
            return float(value)
    return None
