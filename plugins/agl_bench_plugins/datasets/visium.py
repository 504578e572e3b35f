"""Output folders of 10x Space Ranger for Visium and Visium CytAssist: `--set visium.path=/data/mine`.

/data/mine is the folder of one sample, or of several, each a section; the files may lie in its subfolder outs/:

filtered_feature_bc_matrix.h5         raw counts, or the folder filtered_feature_bc_matrix/ with matrix.mtx,
                                      features.tsv (or genes.tsv) and barcodes.tsv, with or without .gz; genes are named
                                      by symbol, and only features of type "Gene Expression" are taken
spatial/tissue_positions.csv          or .parquet, or tissue_positions_list.csv (without header, before Space Ranger 2);
                                      columns are found by name
spatial/scalefactors_json.json        microns_per_pixel is used where it is there; else the size of a pixel follows from
                                      the array, whose neighbouring spots are 100 µm apart
<image>.tif                           the full-resolution image that Space Ranger was given (.tif, .btf, .jpg, .png,
                                      .svs, .ndpi, …); Space Ranger does not copy it, so that it has to be put here or
                                      named. `visium.image=hires` takes spatial/tissue_hires_image.png instead, whose
                                      pixels are too coarse for nuclei

Spots that in_tissue says lie beside the tissue are left out and counted.

Of Visium HD, bins of 8 µm and more are read: /data/mine is then the folder binned_outputs/square_016um, or the whole
output with `visium.bins=16`.

What Space Ranger says twice has to agree: several tables of positions, rows and columns of the array and positions, the
size of a pixel and of a spot, and where they are there the sizes and contents of tissue_hires_image.png and
tissue_lowres_image.png and the image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agl_bench import BadSection, BadSpec, Dataset, ImagePatches, MissingData, Section, known_names, read_embedding
from agl_bench_plugins.datasets.entries import entries
from agl_bench_plugins.datasets.folder import positive_or_0
from agl_bench_plugins.datasets.space_ranger import PLACES, read_matrix, read_scales, read_table
from agl_bench_plugins.datasets.visium_array import (
    HIRES,
    SCALES,
    array_scale,
    bin_width,
    check_pictures,
    check_spots,
    pictures_in,
)

_MATRIX = "filtered_feature_bc_matrix"
_TRIPLE = (("matrix.mtx",), ("features.tsv", "genes.tsv"), ("barcodes.tsv",))
_TABLES = ("tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
_BINNED = "binned_outputs"  # of Visium HD, with a folder for each width of bins
_FINEST_UM = 8.0
_CYTASSIST = "cytassist_image"  # what the instrument took, coarse and of eosin; taken only if it is named
_REDUCED = (
    *(HIRES, "tissue_lowres_image.png", "aligned_fiducials.jpg", "aligned_tissue_image.jpg"),
    "detected_tissue_image.jpg",
)


class Visium(Dataset):
    """Space Ranger outputs of Visium, Visium CytAssist and Visium HD samples.

    Args:
        path: the folder of one sample or of several, absolute or relative to the data folder.
        sections: names of the samples to use, in this order; all by default, sorted.
        image: the image, absolute or relative to the sample's folder; "hires" for the reduced one; the only one beside
            the matrix by default.
        donors: whom each sample is from, as section=donor,…
        embeddings: folder of <section>.h5 with features computed beforehand, absolute or relative to the data folder.
        bins: µm of the bins to read where `path` is a whole output of Visium HD: 8 or 16, or another width that is
            there.
        mirrored: the array may lie mirrored in the image, because the scan is mirrored.
    """

    citation = "the user's own sections"
    licence = "as the user knows"
    revision = "local"
    technology = "10x Visium, 55 µm spots 100 µm apart, or bins of Visium HD"
    argument = "path"

    def __init__(
        self,
        *,
        path: str = "",
        sections: tuple[str, ...] = (),
        image: str = "",
        donors: tuple[str, ...] = (),
        embeddings: str = "",
        bins: int = 0,
        mirrored: bool = False,
    ) -> None:
        self.path = path
        self.chosen = sections
        self.image = image
        self.donors = donors
        self.embeddings = embeddings
        self.bins = bins
        self.mirrored = mirrored

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
        """The matrix, the positions, the scale factors, the pictures, the image and the features."""
        sample = self._sample(root, name)
        pictures = [path for path in sample.pictures if path not in sample.image]
        return [*sample.matrix, *sample.tables, sample.scales, *pictures, *sample.image, *sample.embedding]

    def read(self, root: Path, name: str) -> Section:
        """A sample with the raw counts of its spots on tissue."""
        sample = self._sample(root, name)
        scales = read_scales(sample.scales, name)
        _require_width(positive_or_0(scales.get("bin_size_um")), name)  # before two million bins are read
        counts = read_matrix(sample.matrix, name)
        bin_um = bin_width(scales, counts.obs_names, name)
        _require_width(bin_um, name)
        if self.bins not in (0, bin_um):
            what = f"bins of {bin_um:g} µm" if bin_um else "spots, not bins of Visium HD"
            raise BadSpec(f"visium.bins is {self.bins}, but section '{name}' has {what}; leave the setting out")
        table, whole = read_table(sample.tables, counts.obs_names, name)
        um_per_px = array_scale(scales, table, whole, sample.tables[0], bin_um, self.mirrored, name)
        spot_um = check_spots(scales, um_per_px, bin_um, name)
        on_tissue = np.flatnonzero(table["in_tissue"].to_numpy() == 1)
        dropped = counts.n_obs - len(on_tissue)
        if dropped:
            counts = counts[on_tissue].copy()
        full = table[PLACES[::-1]].to_numpy(dtype=np.float64)[on_tissue]  # in full-resolution pixels, (x, y)
        factor = self._factor(scales, sample, name)
        positions = full * factor
        counts.obsm["spatial"] = positions
        if spot_um:
            counts.uns["spot_diameter_px"] = spot_um / um_per_px * factor
        patches = None
        for path in sample.image:
            patches = ImagePatches(path, positions, um_per_px / factor, section=name)
        shown = patches if factor == 1.0 else None
        check_pictures(shown, sample.scales.parent, scales, full, um_per_px, name)
        embedding = None
        for path in sample.embedding:
            embedding = read_embedding(path, counts.obs_names, full, section=name)
        facts = {"matrix": sample.matrix[0].parent.name if sample.matrix[0].suffix != ".h5" else sample.matrix[0].name}
        facts |= {"image": sample.image[0].name} if sample.image else {}
        facts |= {"bins": f"{bin_um:g} µm"} if bin_um else {}
        return Section(
            name,
            counts,
            um_per_px / factor,
            patches=patches,
            embedding=embedding,
            donor=donor_of(name, self.donors, self.names(root), "visium"),
            dropped_spots=dropped,
            facts=facts,
        )

    def _factor(self, scales: dict[str, object], sample: _Sample, name: str) -> float:
        """Pixels of the image that is used for one of the full resolution."""
        if self.image != "hires":
            return 1.0
        factor = positive_or_0(scales.get("tissue_hires_scalef"))
        if not factor:
            raise BadSection(
                name, f"{sample.scales} does not state a positive tissue_hires_scalef, which visium.image=hires needs"
            )
        return factor

    def _folders(self, root: Path) -> dict[str, Path]:
        """The folder of each chosen sample."""
        if not self.path:
            raise MissingData("dataset 'visium' does not know where to look; give --set visium.path=/your/folder")
        base = (root / Path(self.path).expanduser()).absolute()
        base = base.parent if base.name == _BINNED else base
        if not base.is_dir():
            raise MissingData(f"there is no folder {base}; {_REMEDY}")
        if _outs(base) is not None:
            there = {_name_of(base): base}
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
        places = [folder, outs]
        if outs.parent.name == _BINNED:
            places += [outs.parent.parent, outs.parent.parent.parent if outs.parent.parent.name == "outs" else outs]
        if (outs / _BINNED).is_dir():
            outs = self._bins_of(outs, name)
            places += [outs.parent, outs]
        matrix = _matrix_files(outs, name)
        tables = [path for path in (outs / "spatial" / file for file in _TABLES) if path.is_file()]
        tables = tables or [_one_of([outs / "spatial" / file for file in _TABLES], name)]
        scales = _one_of([outs / "spatial" / SCALES], name)
        embedding = []
        if self.embeddings:
            embedding = [_one_of([root / Path(self.embeddings).expanduser() / f"{name}.h5"], name)]
        image = self._image_of(list(dict.fromkeys(places)), outs, name, bool(embedding))
        return _Sample(matrix, tables, scales, image, embedding)

    def _bins_of(self, outs: Path, name: str) -> Path:
        """The folder of the chosen bins of an output of Visium HD."""
        there = sorted(path.name for path in (outs / _BINNED).iterdir() if path.name.startswith("square_"))
        listing = ", ".join(there) or "none"
        if not self.bins:
            raise MissingData(
                f"section '{name}': {outs} is an output of Visium HD, which has bins of several widths ({listing}); "
                f"choose with --set visium.bins=16 or 8, or give the folder of the bins"
            )
        _require_width(float(self.bins), name)
        chosen = outs / _BINNED / f"square_{self.bins:03d}um"
        if not chosen.is_dir():
            raise MissingData(
                f"section '{name}': there is no folder {chosen} (there is: {listing}); choose another width"
            )
        return chosen

    def _image_of(self, places: list[Path], outs: Path, name: str, optional: bool) -> list[Path]:
        """The image as one path; none where there is none and features are enough."""
        if self.image == "hires":
            return [_one_of([outs / "spatial" / HIRES], name)]
        if self.image:
            return [_no_picture(_one_of([place / Path(self.image).expanduser() for place in places], name), name)]
        found = sorted(
            path
            for place in places
            for path in entries(place)
            if path.suffix.lower() in ImagePatches.SUFFIXES and path.is_file() and path.stem != _CYTASSIST
        )
        if len(found) > 1:
            listing = ", ".join(path.name for path in found)
            raise BadSection(name, f"it has several images ({listing}); say which with --set visium.image=NAME")
        if not found and not optional:
            raise MissingData(
                f"section '{name}': there is no full-resolution image in {places[0]}; put the image "
                f"that Space Ranger was given there, name it with --set visium.image=FILE, or use the reduced one "
                f"with visium.image=hires"
            )
        return [_no_picture(path, name) for path in found]


class _Sample:
    """The files of one sample, each there."""

    def __init__(
        self, matrix: list[Path], tables: list[Path], scales: Path, image: list[Path], embedding: list[Path]
    ) -> None:
        self.matrix, self.tables, self.scales, self.image, self.embedding = matrix, tables, scales, image, embedding
        self.pictures = pictures_in(scales.parent)


_REMEDY = "see `agl-bench show visium` for the files of a sample"


def donor_of(name: str, donors: tuple[str, ...], names: list[str], called: str) -> str:
    """Whom a section is from, by a setting of the form section=donor,…; "" where it says nothing, or "not known".

    Raises:
        BadSpec: if the setting has another form, names an unknown section, or one twice.
    """
    owners = {}
    for text in donors:
        section, equals, owner = (part.strip() for part in text.partition("="))
        if not (equals and owner and section in names):
            raise BadSpec(
                f"{called}.donors has '{text}'; it takes section=donor, and the sections are {', '.join(names)}"
            )
        if owners.setdefault(section, owner) != owner:
            raise BadSpec(f"{called}.donors names '{owners[section]}' and '{owner}' for section '{section}'; give one")
    return "".join(known_names(owners.get(name)))


def _name_of(sample: Path) -> str:
    """What a sample is called: the folder that holds outs/ or binned_outputs/, where there are such."""
    if sample.parent.name == _BINNED:
        sample = sample.parent.parent
    return sample.parent.name if sample.name == "outs" else sample.name


def _outs(folder: Path) -> Path | None:
    """Where the output of Space Ranger lies, if `folder` is of a sample."""
    for place in (folder, folder / "outs"):
        spatial = place / "spatial"
        matrix = (place / f"{_MATRIX}.h5").exists() or (place / _MATRIX).exists() or (place / _BINNED).exists()
        if matrix or any((spatial / file).exists() for file in (*_TABLES, SCALES)):
            return place
    return None


def _require_width(bin_um: float, section: str) -> None:
    """Refuse bins that are too fine to be spots."""
    if 0 < bin_um < _FINEST_UM:
        raise BadSection(
            section,
            f"Visium HD bins of {bin_um:g} µm hold only a molecule or two each; use those of 8 or "
            f"16 µm, which are in {_BINNED} too",
        )


def _no_picture(path: Path, section: str) -> Path:
    """An image that is not one of the reduced pictures that Space Ranger makes."""
    if path.name in _REDUCED:
        raise BadSection(
            section,
            f"{path} is a reduced picture made by Space Ranger, but the positions refer to the image that it was "
            f"given; use that image, or the reduced one with visium.image=hires",
        )
    return path


def _one_of(paths: list[Path], section: str) -> Path:
    """The first that is a file."""
    for path in paths:
        if path.is_file():
            return path
    others = f" (nor {' nor '.join(path.name for path in paths[1:])})" if len(paths) > 1 else ""
    raise MissingData(f"section '{section}': {paths[0]} is not there{others}; {_REMEDY}")


def _matrix_files(outs: Path, section: str) -> list[Path]:
    """The .h5 file and the barcodes of the folder that is beside it, or the three files of the folder, matrix first."""
    folder = outs / _MATRIX
    if (outs / f"{_MATRIX}.h5").is_file():
        beside = [path for path in (folder / "barcodes.tsv.gz", folder / "barcodes.tsv") if path.is_file()]
        return [outs / f"{_MATRIX}.h5", *beside[:1]]
    if not folder.is_dir():
        raise MissingData(
            f"section '{section}': {outs} has neither the file {_MATRIX}.h5 nor the folder {_MATRIX}; {_REMEDY}"
        )
    return [_one_of([folder / f"{file}{end}" for file in files for end in (".gz", "")], section) for files in _TRIPLE]
