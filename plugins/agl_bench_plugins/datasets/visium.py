"""Output folders of 10x Space Ranger for Visium and Visium CytAssist: `--set visium.path=/data/mine`.

/data/mine is the folder of one sample, or of several, each a section; the files may lie in its subfolder outs/:

filtered_feature_bc_matrix.h5         raw counts, or the folder filtered_feature_bc_matrix/ with matrix.mtx.gz,
                                      features.tsv.gz and barcodes.tsv.gz; genes are named by symbol, and only features
                                      of type "Gene Expression" are taken
spatial/tissue_positions.csv          or .parquet, or tissue_positions_list.csv (without header, before Space Ranger 2)
spatial/scalefactors_json.json        microns_per_pixel is used where it is there; else the size of a pixel follows from
                                      the array, whose neighbouring spots are 100 µm apart
<image>.tif                           the full-resolution image that Space Ranger was given (.tif, .tiff, .btf, .jpg,
                                      .jpeg, .png); Space Ranger does not copy it, so that it has to be put here or
                                      named. `visium.image=hires` takes spatial/tissue_hires_image.png instead, whose
                                      pixels are too coarse for nuclei

Spots that in_tissue says lie beside the tissue are left out and counted. Visium HD has other files and is not read.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from agl_bench import BadSection, BadSpec, Dataset, ImagePatches, MissingData, Section, read_embedding
from agl_bench_plugins.datasets.entries import entries
from agl_bench_plugins.datasets.folder import positive_or_0

_MATRIX = "filtered_feature_bc_matrix"
_TRIPLE = ("matrix.mtx", "features.tsv", "barcodes.tsv")
_TABLES = ("tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
_SCALES = "scalefactors_json.json"
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_HIRES = "tissue_hires_image.png"
_IMAGES = (".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png")
_PITCH_UM = 100.0  # of the hexagonal array: a column is half of it, a row √3/2 of it
_OFF_GRID = 0.25  # pitches that a spot may be away from where the array says, by rotation and scale alone


class Visium(Dataset):
    """Space Ranger outputs of Visium and Visium CytAssist samples.

    Args:
        path: the folder of one sample or of several, absolute or relative to the data folder.
        sections: names of the samples to use, in this order; all by default, sorted.
        image: the image, absolute or relative to the sample's folder; "hires" for the reduced one; the only one beside
            the matrix by default.
        donors: whom each sample is from, as section=donor,…
        embeddings: folder of <section>.h5 with features computed beforehand, absolute or relative to the data folder.
    """

    citation = "the user's own sections"
    licence = "as the user knows"
    revision = "local"
    technology = "10x Visium, 55 µm spots 100 µm apart"
    argument = "path"

    def __init__(
        self,
        *,
        path: str = "",
        sections: tuple[str, ...] = (),
        image: str = "",
        donors: tuple[str, ...] = (),
        embeddings: str = "",
    ) -> None:
        self.path = path
        self.chosen = sections
        self.image = image
        self.donors = donors
        self.embeddings = embeddings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether it is the folder of a sample, or one of such folders."""
        return path.is_dir() and (_outs(path) is not None or any(_outs(entry) is not None for entry in entries(path)))

    def names(self, root: Path) -> list[str]:
        """The chosen samples, or all."""
        return list(self._folders(root))

    def sections(self, root: Path) -> dict[str, str]:
        """Names of the samples, each with its donor from the setting `donors`."""
        names = self.names(root)
        return {name: donor_of(name, self.donors, names, "visium") for name in names}

    def files(self, root: Path, name: str) -> list[Path]:
        """The matrix, the positions, the scale factors, the image and the features."""
        sample = self._sample(root, name)
        return [*sample.matrix, sample.table, sample.scales, *sample.image, *sample.embedding]

    def read(self, root: Path, name: str) -> Section:
        """A sample with the raw counts of its spots on tissue."""
        sample = self._sample(root, name)
        counts = _read_matrix(sample.matrix, name)
        scales = _read_scales(sample.scales, name)
        table = _matched(_read_table(sample.table, name), counts.obs_names, sample.table, name)
        um_per_px = _um_per_px(scales, table, sample.table, name)
        spot_um = positive_or_0(scales.get("spot_diameter_fullres")) * um_per_px
        full = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=np.float64)
        positions = full  # in pixels of the image that is used
        if self.image == "hires":
            factor = positive_or_0(scales.get("tissue_hires_scalef"))
            if not factor:
                raise BadSection(
                    name, f"{sample.scales} states no positive tissue_hires_scalef, which visium.image=hires needs"
                )
            positions, um_per_px = full * factor, um_per_px / factor
        on_tissue = np.flatnonzero(table["in_tissue"].to_numpy() == 1)
        dropped = counts.n_obs - len(on_tissue)
        if dropped:
            counts, positions, full = counts[on_tissue].copy(), positions[on_tissue], full[on_tissue]
        counts.obsm["spatial"] = positions
        if spot_um:
            counts.uns["spot_diameter_px"] = spot_um / um_per_px
        patches = None
        for path in sample.image:
            patches = ImagePatches(path, positions, um_per_px, section=name)
        embedding = None
        for path in sample.embedding:
            embedding = read_embedding(path, counts.obs_names, full, section=name)
        facts = {"matrix": sample.matrix[0].parent.name if len(sample.matrix) > 1 else sample.matrix[0].name}
        facts |= {"image": sample.image[0].name} if sample.image else {}
        return Section(
            name,
            counts,
            um_per_px,
            patches=patches,
            embedding=embedding,
            donor=donor_of(name, self.donors, self.names(root), "visium"),
            dropped_spots=dropped,
            facts=facts,
        )

    def _folders(self, root: Path) -> dict[str, Path]:
        """The folder of each chosen sample."""
        if not self.path:
            raise MissingData("dataset 'visium' does not know where to look; give --set visium.path=/your/folder")
        base = (root / Path(self.path).expanduser()).absolute()
        if not base.is_dir():
            raise MissingData(f"there is no folder {base}; {_REMEDY}")
        if _outs(base) is not None:
            there = {base.parent.name if base.name == "outs" else base.name: base}
        else:
            there = {entry.name: entry for entry in entries(base) if _outs(entry) is not None}
        if not there:
            raise MissingData(f"{base} has no output of Space Ranger, itself or in a subfolder; {_REMEDY}")
        for name in self.chosen:
            if name not in there:
                raise MissingData(f"{base} has no sample '{name}' (it has: {', '.join(there)}); {_REMEDY}")
            if self.chosen.count(name) > 1:
                raise BadSpec(f"section '{name}' is chosen more than once; name each section once")
        return {name: there[name] for name in self.chosen or there}

    def _sample(self, root: Path, name: str) -> _Sample:
        """The files of one sample."""
        folders = self._folders(root)
        if name not in folders:
            raise MissingData(f"there is no sample '{name}' (there is {', '.join(folders)}); {_REMEDY}")
        folder = folders[name]
        outs = _outs(folder)
        assert outs is not None  # that is why it is a sample
        matrix = _matrix_files(outs, name)
        table = _one_of([outs / "spatial" / file for file in _TABLES], name)
        scales = _one_of([outs / "spatial" / _SCALES], name)
        embedding = []
        if self.embeddings:
            embedding = [_one_of([root / Path(self.embeddings).expanduser() / f"{name}.h5"], name)]
        return _Sample(matrix, table, scales, self._image_of(folder, outs, name, bool(embedding)), embedding)

    def _image_of(self, folder: Path, outs: Path, name: str, optional: bool) -> list[Path]:
        """The image as one path; none where there is none and features are enough."""
        if self.image == "hires":
            return [_one_of([outs / "spatial" / _HIRES], name)]
        places = list(dict.fromkeys((folder, outs)))
        if self.image:
            return [_one_of([place / Path(self.image).expanduser() for place in places], name)]
        found = sorted(
            path for place in places for path in entries(place) if path.suffix.lower() in _IMAGES and path.is_file()
        )
        if len(found) > 1:
            listing = ", ".join(path.name for path in found)
            raise BadSection(name, f"it has several images ({listing}); say which with --set visium.image=NAME")
        if not found and not optional:
            raise MissingData(
                f"section '{name}': there is no full-resolution image in {folder}; put the image that Space Ranger was "
                f"given there, name it with --set visium.image=FILE, or take the reduced one with visium.image=hires"
            )
        return found


class _Sample:
    """The files of one sample, each there."""

    def __init__(self, matrix: list[Path], table: Path, scales: Path, image: list[Path], embedding: list[Path]) -> None:
        self.matrix, self.table, self.scales, self.image, self.embedding = matrix, table, scales, image, embedding


_REMEDY = "see `agl-bench show visium` for the files of a sample"


def donor_of(name: str, donors: tuple[str, ...], names: list[str], called: str) -> str:
    """Whom a section is from, by a setting of the form section=donor,…; "" where it says nothing.

    Raises:
        BadSpec: if the setting has another form or names an unknown section.
    """
    owners = {}
    for text in donors:
        section, equals, owner = (part.strip() for part in text.partition("="))
        if not (equals and owner and section in names):
            raise BadSpec(
                f"{called}.donors has '{text}'; it takes section=donor, and the sections are {', '.join(names)}"
            )
        owners[section] = owner
    return owners.get(name, "")


def _outs(folder: Path) -> Path | None:
    """Where the output of Space Ranger lies, if `folder` is of a sample."""
    for place in (folder, folder / "outs"):
        spatial = place / "spatial"
        matrix = (place / f"{_MATRIX}.h5").exists() or (place / _MATRIX).exists()
        if matrix or any((spatial / file).exists() for file in (*_TABLES, _SCALES)):
            return place
    return None


def _one_of(paths: list[Path], section: str) -> Path:
    """The first that is a file."""
    for path in paths:
        if path.is_file():
            return path
    others = f" (nor {' nor '.join(path.name for path in paths[1:])})" if len(paths) > 1 else ""
    raise MissingData(f"section '{section}': {paths[0]} is not there{others}; {_REMEDY}")


def _matrix_files(outs: Path, section: str) -> list[Path]:
    """The .h5 file, or the three files of the folder, matrix first."""
    if (outs / f"{_MATRIX}.h5").is_file():
        return [outs / f"{_MATRIX}.h5"]
    if not (outs / _MATRIX).is_dir():
        raise MissingData(
            f"section '{section}': {outs} has neither the file {_MATRIX}.h5 nor the folder {_MATRIX}; {_REMEDY}"
        )
    return [_one_of([outs / _MATRIX / f"{file}.gz"], section) for file in _TRIPLE]


def _read_matrix(files: list[Path], section: str) -> anndata.AnnData:
    """Counts of spots × genes; repeated symbols are told apart as NAME-1, NAME-2, …"""
    # Imported here: it takes seconds, and only reading needs it.
    import scanpy

    def read() -> anndata.AnnData:
        if len(files) == 1:
            return scanpy.read_10x_h5(files[0], gex_only=True)
        return scanpy.read_10x_mtx(files[0].parent, var_names="gene_symbols", make_unique=False, gex_only=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # they are made so here
        counts = _readable(read, files[0], section)
        counts.var_names_make_unique()
    return counts


def _readable(read: Callable[[], anndata.AnnData], path: Path, section: str) -> anndata.AnnData:
    try:
        return read()
    except Exception as error:  # noqa: BLE001  (a damaged or foreign file makes the readers raise nearly anything)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadSection(
            section, f"{path} cannot be read as a matrix of Space Ranger ({reason}); copy it anew"
        ) from None


def _read_scales(path: Path, section: str) -> dict[str, object]:
    try:
        scales = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadSection(section, f"{path} cannot be read as JSON ({error}); copy it anew") from None
    if not isinstance(scales, dict):
        raise BadSection(section, f"{path} holds a {type(scales).__name__}, not an object with names; copy it anew")
    return scales


def _read_table(path: Path, section: str) -> pd.DataFrame:
    """Positions of all spots of the array, one row for each barcode."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            with path.open(encoding="utf-8") as file:
                headed = file.readline().startswith("barcode")
            table = pd.read_csv(path, header=0 if headed else None)
            if not headed and table.shape[1] == len(_COLUMNS):
                table.columns = list(_COLUMNS)
    except (OSError, ValueError) as error:  # pandas and pyarrow raise their own kinds of ValueError
        reason = str(error).strip().partition("\n")[0]
        raise BadSection(section, f"{path} cannot be read as a table ({reason}); copy it anew") from None
    lacking = [column for column in _COLUMNS if column not in table.columns]
    if lacking:
        raise BadSection(
            section,
            f"{path} has no column {', '.join(lacking)} (it has: {', '.join(map(str, table.columns))}); it takes "
            f"{', '.join(_COLUMNS)}",
        )
    table = table[list(_COLUMNS)].set_index("barcode")
    if not table.index.is_unique:
        raise BadSection(section, f"{path} has barcode '{table.index[table.index.duplicated()][0]}' more than once")
    for column in table.columns:
        if table[column].dtype.kind not in "iufb":
            raise BadSection(section, f"{path} has text in column {column}; it takes numbers")
    return table


def _matched(table: pd.DataFrame, barcodes: pd.Index, path: Path, section: str) -> pd.DataFrame:
    """The rows of the spots of the matrix, in their order."""
    found = table.index.get_indexer(barcodes)
    lacking = np.flatnonzero(found < 0)
    if len(lacking):
        example = f"'{table.index[0]}'" if len(table) else "nothing"
        raise BadSection(
            section,
            f"{path} has no position for {len(lacking)} of {len(barcodes)} spots, the first is "
            f"'{barcodes[lacking[0]]}' (the file has {example}); check that both files are of the same sample",
        )
    return table.iloc[found]


def _um_per_px(scales: dict[str, object], table: pd.DataFrame, path: Path, section: str) -> float:
    """Size of a full-resolution pixel: as stated, or from the array that the pixels are of.

    The array is laid over the pixels by the rotation, mirroring and scale that fit best. Spots that are far from
    where it puts them are at the place of another.
    """
    stated = positive_or_0(scales.get("microns_per_pixel"))
    place = (table["pxl_col_in_fullres"] + 1j * table["pxl_row_in_fullres"]).to_numpy(dtype=np.complex128)
    array = (table["array_col"] * _PITCH_UM / 2 + 1j * table["array_row"] * _PITCH_UM * math.sqrt(3) / 2).to_numpy(
        dtype=np.complex128
    )
    if not (np.isfinite(place).all() and np.isfinite(array).all()):
        if stated:
            return stated  # the missing position is told when the section is checked
        raise BadSection(section, f"{path} has positions that are no numbers; copy it anew")
    place, array = place - place.mean(), array - array.mean()
    extent = np.vdot(array, array).real
    if len(table) < 3 or not extent or not np.abs(place).any():
        if stated:
            return stated
        raise BadSection(
            section, f"the size of a pixel is not stated in {_SCALES} and cannot be had from {len(table)} spots"
        )
    fits = [(np.vdot(side, place) / extent, side) for side in (array, array.conj())]
    slope, side = max(fits, key=lambda fit: abs(fit[0]))
    off_um = np.abs(place - slope * side) / abs(slope) if slope else np.full(len(place), np.inf)
    strays = np.flatnonzero(off_um > _OFF_GRID * _PITCH_UM)
    if len(strays):
        raise BadSection(
            section,
            f"{path} puts spot '{table.index[strays[0]]}' where its place on the array is not ({len(strays)} spots); "
            f"the columns {', '.join(_COLUMNS[2:])} do not belong together",
        )
    return stated or 1 / abs(slope)
