"""Sections of HER2-positive breast tumours (Andersson et al. 2021), measured with Spatial Transcriptomics arrays.

Spots are 100 µm wide and 200 µm apart, about 180 to a section, so a run takes minutes on a CPU. All four default
sections are of patient C: with `leave_out = "auto"` there is one known donor, and sections are left out instead. Other
sections in the folder (B4, of patient B, has few counts) are chosen with `--set her2st.sections=B4,C2,C3`.
"""

from __future__ import annotations

from pathlib import Path

from agl_bench import BadSection, ImagePatches, Section
from agl_bench_plugins.datasets.folder import Folder


class Her2st(Folder):
    """HER2-positive breast tumour, Spatial Transcriptomics: four sections of one donor by default.

    Args:
        sections: names of the sections to use, in this order.
    """

    citation = "Andersson et al. 2021, Nat Commun 12:6012, doi:10.1038/s41467-021-26271-2"
    licence = "CC BY 4.0 (Zenodo 4751624)"
    revision = "almaan/her2st 85df7411b987"
    technology = "Spatial Transcriptomics 1k array, 100 µm spots"
    tissue = "breast, HER2-positive tumour"
    argument = "sections"

    def __init__(self, *, sections: tuple[str, ...] = ("C2", "C3", "C4", "C5")) -> None:
        super().__init__(path="her2st", sections=sections)

    def read(self, root: Path, name: str) -> Section:
        """A section whose image has the size that its positions refer to."""
        section = super().read(root, name)
        stated, image = section.counts.uns, section.patches
        if {"image_width", "image_height"} <= set(stated) and isinstance(image, ImagePatches):
            meant = stated["image_width"], stated["image_height"]
            if meant != (image.width, image.height):
                raise BadSection(
                    name,
                    f"{image.source} is {image.width} × {image.height} px, but its positions refer to an image "
                    f"of {meant[0]} × {meant[1]} px; use that image",
                )
        return section

    def remedy(self) -> str:
        """What to do about absent files."""
        return "set AGL_BENCH_DATA to the folder that holds her2st/"
