"""A folder of the user's own sections: `agl-bench run --datasets folder --set folder.path=/data/mine`.

/data/mine/<section>/counts.h5ad      raw counts, spots × genes; obsm["spatial"] = (x, y) of the spot centres in pixels;
                                      uns["um_per_px"]; where it is known, uns["patient"] or uns["donor"], or a
                                      column of that name in obs with one value; positions may be a table with
                                      columns x and y as well
/data/mine/<section>/image.jpg        the slide, one plane of 8-bit colour or grey in bright field (.jpg, .jpeg, .png,
                                      .tif, .tiff, .ome.tif, .btf, .svs, .ndpi, .mrxs, .scn, .bif, .vms, .vmu or .dcm,
                                      in small or capital letters), or
/data/mine/<section>/patches.h5       patches cut beforehand: img (patches, H, H, 3) uint8, barcode (patches,);
                                      uns["patch_um"] in counts.h5ad says how much tissue they show, else attributes
                                      or coords as HEST writes them; else it is taken that they show what the protocol
                                      asks for
/data/mine/<section>/embedding.h5     optional: embeddings (rows, width), barcodes (rows,), as HEST-bench writes them,
                                      or features and coords, as TRIDENT does

Where both an image and patches.h5 are there, the image is used, because it can give patches of any size. Spots without
a patch in patches.h5 are left out and counted.
"""

from __future__ import annotations

import math
from pathlib import Path

import anndata
import numpy as np

from agl_bench import (
    ArrayPatches,
    BadSection,
    BadSpec,
    Dataset,
    ImagePatches,
    MissingData,
    PatchSource,
    Section,
    read_donors,
    read_embedding,
    read_h5ad,
)
from agl_bench_plugins.datasets.entries import entries

_IMAGES = tuple(f"image{middle}{suffix}" for middle in ("", ".ome") for suffix in ImagePatches.SUFFIXES)
_PARTS = ("counts.h5ad", "patches.h5", "embedding.h5")


class Folder(Dataset):
    """Your own sections: subfolders of one folder.

    Args:
        path: the folder, absolute or relative to the data folder.
        sections: names of the subfolders to use, in this order; all by default, sorted.
        has_counts: false where counts.h5ad holds values that are normalised already, finite and ≥ 0; they are taken as
            they are, with protocol.normalisation=none.
    """

    citation = "the user's own sections"
    licence = "as the user knows"
    revision = "local"
    argument = "path"

    def __init__(self, *, path: str = "", sections: tuple[str, ...] = (), has_counts: bool = True) -> None:
        self.path = path
        self.chosen = sections
        self.has_counts = has_counts

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether it is the folder of a section, or one of such folders. A subclass has a folder of its own."""
        if cls is not Folder or not path.is_dir():
            return False
        return _is_section(path) or any(_is_section(entry) for entry in entries(path))

    @classmethod
    def settings_at(cls, path: Path) -> dict[str, object]:
        """The folder, and the section where the path is of one."""
        return {"path": str(path.parent), "sections": (path.name,)} if _is_section(path) else {"path": str(path)}

    def folder(self, root: Path) -> Path:
        """Where the subfolders are."""
        if not self.path:
            raise MissingData("dataset 'folder' does not know where to look; give --set folder.path=/your/folder")
        return root / Path(self.path).expanduser()

    def remedy(self) -> str:
        """What to do about absent files."""
        return "see `agl-bench show folder` for the files of a section"

    def sections(self, root: Path) -> dict[str, str]:
        """Names of the sections, each with its donor as counts.h5ad states it."""
        return {name: _donor(read_donors(self.files(root, name)[0], section=name)) for name in self.names(root)}

    def names(self, root: Path) -> list[str]:
        """The chosen subfolders, or all that have a file of a section."""
        base = self.folder(root)
        if not base.is_dir():
            raise MissingData(f"there is no folder {base}; {self.remedy()}")
        there = [entry.name for entry in entries(base) if _is_section(entry) or _images(entry)]
        for name in self.chosen:
            if name not in there:
                cure = f"choose from {', '.join(there)}" if there else f"it has none; {self.remedy()}"
                raise MissingData(f"{base} has no section '{name}'; {cure}")
            if self.chosen.count(name) > 1:
                raise BadSpec(f"section '{name}' is chosen more than once; name each section once")
        if not there:
            raise MissingData(f"{base} has no subfolder with a counts.h5ad; {self.remedy()}")
        return list(self.chosen) or there

    def read(self, root: Path, name: str) -> Section:
        """One section with raw counts as stored."""
        return _read(name, self.files(root, name))

    def files(self, root: Path, name: str) -> list[Path]:
        """counts.h5ad, the image or patches.h5, and embedding.h5."""
        return self._files_of(self.folder(root) / name)

    def _files_of(self, folder: Path) -> list[Path]:
        """The files of one section that are read, counts.h5ad first."""
        counts, patches, embedding = folder / "counts.h5ad", folder / "patches.h5", folder / "embedding.h5"
        images = _images(folder)
        if len(images) > 1:
            raise BadSection(folder.name, f"it has {images[0].name} and {images[1].name}; keep the one that is meant")
        if not counts.is_file():
            raise MissingData(f"section '{folder.name}': {counts} is not there; {self.remedy()}")
        pictures = images or ([patches] if patches.is_file() else [])
        features = [embedding] if embedding.is_file() else []
        if not pictures and not features:
            other = "".join(f" (it has {path.name}, which is not read)" for path in folder.glob("image.*"))
            raise MissingData(
                f"section '{folder.name}': {folder} has no image.jpg (.png, .tif, .svs){other}, no patches.h5 and "
                f"no embedding.h5; {self.remedy()}"
            )
        return [counts, *pictures, *features]


def _is_section(folder: Path) -> bool:
    # Pictures alone say nothing: other layouts have them too.
    return any((folder / part).exists() for part in _PARTS)


def _images(folder: Path) -> list[Path]:
    """The files of a folder that are named as images, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.lower() in _IMAGES and path.is_file())


def positive_or_0(value: object) -> float:
    """A positive finite number, also as text or as an array of one; 0 for anything else."""
    if np.size(value) != 1 or isinstance(value, bool | np.bool_):  # type: ignore[arg-type]
        return 0.0
    try:
        number = float(np.ravel(value)[0])  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


def _read(name: str, files: list[Path]) -> Section:
    by_name = {path.name: path for path in files}
    donors = read_donors(by_name["counts.h5ad"], section=name)
    counts = read_h5ad(by_name.pop("counts.h5ad"), section=name)
    if "um_per_px" not in counts.uns:
        raise BadSection(name, "uns['um_per_px'] is missing in counts.h5ad; set it to the size of an image pixel in µm")
    um_per_px = _positive(counts.uns["um_per_px"], "um_per_px", name)
    measured = counts.n_obs
    features = by_name.pop("embedding.h5", None)
    patches: PatchSource | None = None
    for path in by_name.values():
        if path.name == "patches.h5":
            side_um = _positive(counts.uns["patch_um"], "patch_um", name) if "patch_um" in counts.uns else None
            patches, kept = ArrayPatches.matched(
                path, counts.obs_names, side_um, positions=positions_of(counts), um_per_px=um_per_px, section=name
            )
            if len(kept) < counts.n_obs:
                counts = counts[kept].copy()
        elif "spatial" not in counts.obsm:
            raise BadSection(
                name, "obsm['spatial'] is missing in counts.h5ad; it has to be (x, y) of the spots in pixels"
            )
        else:
            patches = ImagePatches(path, counts.obsm["spatial"], um_per_px, section=name)
    embedding = None
    if features is not None:
        embedding = read_embedding(features, counts.obs_names, positions_of(counts), section=name)
    return Section(
        name,
        counts,
        um_per_px,
        patches=patches,
        embedding=embedding,
        donor=_donor(donors),
        dropped_spots=measured - counts.n_obs,
        facts={"donors": f"{', '.join(donors)}: several, so the donor is unknown"} if len(donors) > 1 else {},
    )


def _positive(value: object, key: str, section: str) -> float:
    number = positive_or_0(value)
    if not number:
        raise BadSection(section, f"uns['{key}'] in counts.h5ad is {value!r}; it has to be a positive number of µm")
    return number


def positions_of(counts: anndata.AnnData) -> np.ndarray | None:
    """obsm["spatial"], (spots, 2) px; None where it is absent or cannot be positions, which checking tells."""
    stored = np.asarray(counts.obsm["spatial"]) if "spatial" in counts.obsm else np.empty(0)
    return stored if stored.shape == (counts.n_obs, 2) and stored.dtype.kind in "iuf" else None


def _donor(stated: tuple[str, ...]) -> str:
    """The one that is stated; "" where there is none, or not one."""
    return stated[0] if len(stated) == 1 else ""
