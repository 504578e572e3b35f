"""SpatialData stores: `--set spatialdata.path=/data/mine.zarr`. Needs the extra: pip install 'agl-bench[spatialdata]'.

The path is one store, or a folder of several NAME.zarr, each a section:

tables/<table>      raw counts, spots × genes, annotating shapes as SpatialData does (region, region_key, instance_key)
shapes/<shapes>     the spots: circles, or polygons, whose centroids are taken
images/<image>      the slide, uint8, channels red, green, blue by name, or in this order where they have none; a fourth
                    may be alpha, which is laid on white; the finest scale of a pyramid is used

Where there is one element of a kind, or one that the table annotates, it is taken; else the settings name it. Shapes
are brought to pixels of the image by the transformations of the store; where they share several coordinate systems,
all have to give the same. The size of a pixel is `um_per_px`, or follows from the radius of the circles and
`spot_diameter_um`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import anndata
import numpy as np

from agl_bench import BadSection, BadSpec, Dataset, ImagePatches, MissingData, Range, Section
from agl_bench_plugins.datasets.entries import entries, is_data
from agl_bench_plugins.datasets.visium import donor_of

_REMEDY = "see `agl-bench show spatialdata` for what a store has to hold"
_ROOTS = ("zarr.json", ".zgroup", ".zattrs")
_COLOURS = {"red": "r", "green": "g", "blue": "b", "alpha": "a"}
_SAME_PX = 0.5  # pixels that coordinate systems may put a spot apart
_SAME_SIZE = 0.1  # share by which sizes of a pixel that are given twice may differ


class SpatialDataStores(Dataset):
    """Sections in SpatialData zarr stores (scverse).

    Args:
        path: a store, or a folder of stores, absolute or relative to the data folder.
        sections: names of the stores to use, without .zarr, in this order; all by default, sorted.
        table: name of the table; the only one by default.
        image: name of the image; the only one by default.
        shapes: name of the shapes; those that the table annotates by default.
        um_per_px: size of a pixel of the image, µm; 0 = from spot_diameter_um.
        spot_diameter_um: what the diameter of the circles stands for, µm; 0 = not known.
        donors: whom each section is from, as section=donor,…
    """

    citation = "the user's own sections"
    licence = "as the user knows"
    revision = "local"
    argument = "path"

    def __init__(
        self,
        *,
        path: str = "",
        sections: tuple[str, ...] = (),
        table: str = "",
        image: str = "",
        shapes: str = "",
        um_per_px: Annotated[float, Range(0, 1_000)] = 0.0,
        spot_diameter_um: Annotated[float, Range(0, 10_000)] = 0.0,
        donors: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.chosen = sections
        self.table, self.image, self.shapes = table, image, shapes
        self.um_per_px = um_per_px
        self.spot_diameter_um = spot_diameter_um
        self.donors = donors

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether it is a store, or a folder of stores."""
        return path.is_dir() and (_is_store(path) or any(_is_store(entry) for entry in entries(path)))

    def names(self, root: Path) -> list[str]:
        """The chosen stores, or all, without .zarr."""
        return list(self._stores(root))

    def sections(self, root: Path) -> dict[str, str]:
        """Names of the stores, each with its donor from the setting `donors`."""
        names = self.names(root)
        return {name: donor_of(name, self.donors, names, "spatialdata") for name in names}

    def files(self, root: Path, name: str) -> list[Path]:
        """Everything in the store; names of zarr's own begin with a dot, too."""
        found = (path for path in self._store(root, name).rglob("*") if path.is_file())
        return sorted(path for path in found if path.name.startswith(".z") or is_data(path))

    def read(self, root: Path, name: str) -> Section:
        """A store's table, with the places of its spots in pixels of the image."""
        store = self._store(root, name)
        data = _open(store, name)
        table_name = self._only("table", self.table, list(data.tables), name)
        image_name = self._only("image", self.image, list(data.images), name)
        counts, instances, shapes_name = self._annotated(data, data.tables[table_name], table_name, name)
        shapes = data.shapes[shapes_name]
        to_pixels = _transformation(data, shapes, data.images[image_name], name)
        if not shapes.index.is_unique:
            raise BadSection(
                name,
                f"shapes '{shapes_name}' have instance '{shapes.index[shapes.index.duplicated()][0]}' more than once, "
                f"so it is unclear which one the table refers to; renumber them and write the store again",
            )
        found = shapes.index.get_indexer(instances)
        lacking = np.flatnonzero(found < 0)
        if len(lacking):
            raise BadSection(
                name,
                f"shapes '{shapes_name}' have no instance '{instances[lacking[0]]}' of spot "
                f"'{counts.obs_names[lacking[0]]}' ({len(lacking)} spots); write table and shapes anew",
            )
        centres = shapes.geometry.centroid
        places = np.stack([centres.x.to_numpy(), centres.y.to_numpy(), np.ones(len(shapes))])[:, found]
        positions = (to_pixels @ places)[:2].T
        um_per_px = self._pixel_size(shapes, to_pixels, shapes_name, name)
        counts.obsm["spatial"] = positions
        pixels = _finest(data.images[image_name], image_name, name)
        return Section(
            name,
            counts,
            um_per_px,
            patches=ImagePatches(pixels, positions, um_per_px, section=name),
            donor=donor_of(name, self.donors, self.names(root), "spatialdata"),
            facts={"table": table_name, "image": image_name, "shapes": shapes_name},
        )

    def _store(self, root: Path, name: str) -> Path:
        stores = self._stores(root)
        if name not in stores:
            raise MissingData(f"there is no store '{name}' (there is {', '.join(stores)}); {_REMEDY}")
        return stores[name]

    def _stores(self, root: Path) -> dict[str, Path]:
        """Each chosen store by its name."""
        if not self.path:
            raise MissingData(
                "dataset 'spatialdata' does not know where to look; give --set spatialdata.path=/your/store.zarr"
            )
        base = root / Path(self.path).expanduser()
        if not base.is_dir():
            raise MissingData(f"there is no store or folder {base}; {_REMEDY}")
        paths = [base] if _is_store(base) else [entry for entry in entries(base) if _is_store(entry)]
        there = {path.name.removesuffix(".zarr"): path for path in paths}
        if not there:
            raise MissingData(f"{base} is no zarr store and has none in it; {_REMEDY}")
        for name in self.chosen:
            if name not in there:
                raise MissingData(f"{base} has no store '{name}' (it has: {', '.join(there)}); {_REMEDY}")
            if self.chosen.count(name) > 1:
                raise BadSpec(f"section '{name}' is chosen more than once; name each section once")
        return {name: there[name] for name in self.chosen or there}

    def _only(self, kind: str, chosen: str, there: list[str], section: str) -> str:
        """The name of the element to use."""
        listing = ", ".join(f"'{name}'" for name in there) or "none"
        if chosen and chosen not in there:
            raise BadSection(section, f"its store has no {kind} '{chosen}'; it has: {listing}")
        if not chosen and len(there) != 1:
            remedy = f"say which with --set spatialdata.{kind}=NAME" if there else "write one into the store"
            raise BadSection(section, f"its store has {len(there)} {kind.removesuffix('s')}s ({listing}); {remedy}")
        return chosen or there[0]

    def _annotated(
        self, data: Any, table: anndata.AnnData, table_name: str, section: str
    ) -> tuple[anndata.AnnData, np.ndarray, str]:
        """Counts of the spots of one shapes element, the instances they annotate, and its name."""
        link = table.uns.get("spatialdata_attrs")
        keys = [link.get(key) for key in ("region_key", "instance_key")] if isinstance(link, dict) else []
        if not keys or any(key not in table.obs for key in keys):
            raise BadSection(
                section, f"table '{table_name}' does not say which shapes it annotates; set its region and instance key"
            )
        region = table.obs[keys[0]].astype(str).to_numpy()
        there = [name for name in dict.fromkeys(region) if name in data.shapes]
        if not there:
            raise BadSection(
                section,
                f"table '{table_name}' annotates {', '.join(sorted(set(region))) or 'nothing'}, which are no shapes of "
                f"the store; it has: {', '.join(data.shapes) or 'none'}",
            )
        name = self._only("shapes", self.shapes, there, section)
        rows = np.flatnonzero(region == name)
        counts = table if len(rows) == table.n_obs else table[rows].copy()
        return counts, counts.obs[keys[1]].to_numpy(), name

    def _pixel_size(self, shapes: Any, to_pixels: np.ndarray, shapes_name: str, section: str) -> float:
        radius = float(np.median(shapes["radius"])) if "radius" in shapes.columns else 0.0
        scale = float(np.sqrt(abs(np.linalg.det(to_pixels[:2, :2]))))
        follows = self.spot_diameter_um / (2 * radius * scale) if np.isfinite(radius) and radius > 0 and scale else 0.0
        if self.um_per_px and follows and abs(follows / self.um_per_px - 1) > _SAME_SIZE:
            raise BadSection(
                section,
                f"spatialdata.um_per_px = {self.um_per_px:g}, but circles of {self.spot_diameter_um:g} µm "
                f"(spatialdata.spot_diameter_um) make a pixel of {follows:.4g} µm; give only one of them",
            )
        if self.um_per_px:
            return self.um_per_px
        if not follows:
            raise BadSection(
                section,
                f"the size of a pixel is not known: spatialdata.um_per_px is 0, spatialdata.spot_diameter_um is "
                f"{self.spot_diameter_um:g}, and the radius of shapes '{shapes_name}' is {radius:g}; set the first, or "
                f"the second where the shapes are circles",
            )
        return follows


def _is_store(path: Path) -> bool:
    return path.is_dir() and (path.suffix == ".zarr" or any((path / name).is_file() for name in _ROOTS))


def _open(store: Path, section: str) -> Any:
    """The store, its images not yet read."""
    try:
        import spatialdata  # an extra, and slow to import
    except ImportError:
        raise MissingData(
            "dataset 'spatialdata' needs the package spatialdata; pip install 'agl-bench[spatialdata]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its libraries about each other; damage is an error
            return spatialdata.read_zarr(store, selection=("images", "shapes", "tables"))
    except Exception as error:  # noqa: BLE001  (a damaged store makes zarr, anndata and geopandas raise anything)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadSection(section, f"{store} cannot be read as a SpatialData store ({reason}); write it anew") from None


def _transformation(data: Any, shapes: Any, image: Any, section: str) -> np.ndarray:
    """From the coordinates of the shapes to pixels of the image, (3, 3) on (x, y, 1)."""
    from spatialdata.transformations import get_transformation, get_transformation_between_coordinate_systems

    ways = [get_transformation(element, get_all=True) for element in (shapes, image)]
    shared = [system for system in ways[0] if system in ways[1]]
    try:
        if not shared:  # by way of other elements
            return _affine(get_transformation_between_coordinate_systems(data, shapes, image))
        # Not asked for the shortest way: where there are several, the library takes none.
        found = [np.linalg.solve(_affine(ways[1][system]), _affine(ways[0][system])) for system in shared]
    except (RuntimeError, ValueError, np.linalg.LinAlgError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadSection(
            section, f"its shapes and its image share no coordinate system ({reason}); add the transformation"
        ) from None
    left, top, right, bottom = shapes.total_bounds
    corners = np.array([[left, right, left, right], [top, top, bottom, bottom], [1, 1, 1, 1]])
    for system, matrix in zip(shared[1:], found[1:], strict=True):
        apart = np.abs((matrix - found[0]) @ corners)[:2].max()
        if not apart <= _SAME_PX:
            raise BadSection(
                section,
                f"coordinate systems '{shared[0]}' and '{system}' place its shapes {apart:.3g} image pixels "
                f"apart; remove the wrong transformation",
            )
    return found[0]


def _affine(transformation: Any) -> np.ndarray:
    matrix: np.ndarray = transformation.to_affine_matrix(("x", "y"), ("x", "y"))
    return matrix


def _finest(image: Any, name: str, section: str) -> Any:
    """The pixels of an image or of the finest scale of a pyramid, (height, width, 3), still on disk."""
    from spatialdata import get_pyramid_levels
    from xarray import DataTree

    levels = list(get_pyramid_levels(image)) if isinstance(image, DataTree) else [image]
    finest, coarsest = levels[0], levels[-1]
    channels = [str(channel).strip().casefold() for channel in finest.coords["c"].values]
    channels = [_COLOURS.get(channel, channel) for channel in channels]
    if finest.dtype != np.uint8:
        raise BadSection(
            section, f"image '{name}' holds {finest.dtype}; scale its values to 0 to 255, and write it as uint8"
        )
    if channels == [str(number) for number in range(len(channels))] and len(channels) in (3, 4):
        if len(channels) == 4 and not bool((coarsest.isel(c=3) == 255).all()):
            raise BadSection(
                section,
                f"image '{name}' has four channels without names, and the last is not an opaque alpha channel; name "
                f"them (c_coords = r, g, b, a) if they are colours",
            )
        channels = ["r", "g", "b", "a"][: len(channels)]
    if sorted(channels) not in (sorted("rgb"), sorted("rgba")):
        raise BadSection(
            section,
            f"image '{name}' has channels {', '.join(map(str, finest.coords['c'].values))}; it has to be a "
            f"bright-field image with channels r, g and b",
        )
    planes = finest.assign_coords(c=channels)
    colours = planes.sel(c=["r", "g", "b"])
    if "a" in channels:
        alpha = planes.sel(c="a", drop=True).astype(np.uint16)
        colours = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return colours.transpose("y", "x", "c")
