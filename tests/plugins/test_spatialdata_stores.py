"""SpatialData stores as their writers make them: several coordinate systems, named channels, alpha, litter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agl_bench import BadSection, Section
from agl_bench.data.check import check_section
from agl_bench_plugins.datasets.spatialdata import SpatialDataStores

pytest.importorskip("spatialdata", reason="the extra spatialdata is not installed")
NOWHERE = Path("/nowhere")


@pytest.fixture(autouse=True)
def no_warnings():
    """What its libraries say of each other reaches nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def store(
    measured: Any,
    path: Path,
    pixels: np.ndarray,
    *,
    systems: dict[str, tuple[float, float]],
    index: Any = None,
    **image: Any,
) -> Path:
    """Shapes in pixels of `measured.pixels`; `systems` are scales of the shapes and of the image."""
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    def scales(which: int) -> dict[str, Any]:
        return {name: Scale([pair[which]] * 2, axes=("x", "y")) for name, pair in systems.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = measured.table(spatial=False)
        table.obs["region"] = pd.Categorical(["spots"] * table.n_obs)
        table.obs["spot"] = np.arange(table.n_obs)
        spots = ShapesModel.parse(
            measured.positions.astype(float), geometry=0, radius=55 / 14, transformations=scales(0),
            **({} if index is None else {"index": pd.Index(index)}),
        )  # fmt: skip
        slide = Image2DModel.parse(pixels.transpose(2, 0, 1), dims=("c", "y", "x"), transformations=scales(1), **image)
        SpatialData(
            images={"slide": slide},
            shapes={"spots": spots},
            tables={
                "table": TableModel.parse(
                    table if index is None else table[:5].copy(),
                    region="spots", region_key="region", instance_key="spot",
                )
            },
        ).write(path)  # fmt: skip
    return path


def read(path: Path, **settings: Any) -> Section:
    section = SpatialDataStores(path=str(path), spot_diameter_um=55.0, **settings).read(NOWHERE, path.stem)
    check_section(section)
    return section


def patches(section: Section) -> np.ndarray:
    assert section.patches is not None
    return section.patches.read(np.arange(section.counts.n_obs), 16, 112.0)


def plain(measured: Any) -> np.ndarray:
    from agl_bench import ImagePatches

    return ImagePatches(measured.pixels, measured.positions, 7.0).read(np.arange(80), 16, 112.0)


@pytest.mark.parametrize(
    "systems",
    [
        {"vis": (1.0, 1.0)},
        {"vis": (1.0, 1.0), "vis_downscaled_hires": (0.5, 0.5), "vis_downscaled_lowres": (0.1, 0.1)},
        {"micrometres": (7.0, 7.0), "other": (3.0, 3.0)},
    ],
)
def test_shared_coordinate_systems(measured: Any, tmp_path: Path, systems: dict[str, tuple[float, float]]) -> None:
    section = read(store(measured, tmp_path / "a.zarr", measured.pixels, systems=systems))
    assert section.um_per_px == pytest.approx(7.0)
    np.testing.assert_allclose(section.counts.obsm["spatial"], measured.positions)
    np.testing.assert_array_equal(patches(section), plain(measured))


def test_a_reduced_image_of_several_systems(measured: Any, tmp_path: Path) -> None:
    half = measured.pixels[::2, ::2]
    path = store(measured, tmp_path / "a.zarr", half, systems={"vis": (1.0, 2.0), "vis_downscaled_hires": (0.5, 1.0)})
    section = read(path)
    assert section.um_per_px == pytest.approx(14.0)
    np.testing.assert_allclose(section.counts.obsm["spatial"], measured.positions / 2)


def test_systems_that_contradict_each_other_or_are_apart(measured: Any, tmp_path: Path) -> None:
    path = store(measured, tmp_path / "a.zarr", measured.pixels, systems={"one": (1.0, 1.0), "two": (1.0, 2.0)})
    with pytest.raises(BadSection, match=r"'one' and 'two' place its shapes .* image pixels apart; remove"):
        read(path)
    with pytest.raises(BadSection, match=r"um_per_px = 3, but circles .* make a pixel of 7 µm; give only one of them"):
        read(store(measured, tmp_path / "b.zarr", measured.pixels, systems={"one": (1.0, 1.0)}), um_per_px=3.0)


@pytest.mark.parametrize(
    ("order", "names"),
    [("bgr", ["b", "g", "r"]), ("gbr", ["Green", "BLUE", "red"]), ("rgba", None), ("rgba", ["r", "g", "b", "a"]),
     ("abgr", ["alpha", "blue", "green", "red"])],
)  # fmt: skip
def test_channels_by_name(measured: Any, tmp_path: Path, order: str, names: list[str] | None) -> None:
    planes = dict(zip("rgb", measured.pixels.transpose(2, 0, 1), strict=True)) | {
        "a": np.full_like(measured.pixels[..., 0], 255)
    }
    named = {} if names is None else {"c_coords": names}
    path = store(
        measured, tmp_path / "a.zarr", np.stack([planes[c] for c in order], -1), systems={"one": (1, 1)}, **named
    )
    np.testing.assert_array_equal(patches(read(path)), plain(measured))


def test_alpha_lies_on_white(measured: Any, tmp_path: Path) -> None:
    alpha = np.full_like(measured.pixels[..., :1], 255)
    alpha[:, :80] = 0
    both = np.concatenate([measured.pixels, alpha], -1)
    measured.pixels[:, :80] = 255
    found = read(store(measured, tmp_path / "a.zarr", both, systems={"one": (1, 1)}, c_coords=["r", "g", "b", "a"]))
    np.testing.assert_array_equal(patches(found), plain(measured))
    with pytest.raises(
        BadSection, match="four channels without names, and the last is not an opaque alpha channel; name them"
    ):
        read(store(measured, tmp_path / "b.zarr", both, systems={"one": (1, 1)}))


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda p: p, ["DAPI", "CD3", "CD8"], "has channels DAPI, CD3, CD8; it has to be a bright-field image"),
        (lambda p: p[..., :1], None, "has channels 0; it has to be"),
        (lambda p: p[..., :2], ["r", "g"], "has channels r, g; it has to be"),
        (lambda p: np.concatenate([p, p], -1), None, "has channels 0, 1, 2, 3, 4, 5; it has to be"),
        (lambda p: p.astype(np.uint16) * 257, None, "holds uint16; scale its values"),
        (lambda p: p / 255.0, None, "holds float64; scale its values"),
    ],
)
def test_images_that_are_refused(measured: Any, tmp_path: Path, change: Any, names: Any, message: str) -> None:
    named = {} if names is None else {"c_coords": names}
    path = store(measured, tmp_path / "a.zarr", change(measured.pixels), systems={"one": (1, 1)}, **named)
    with pytest.raises(BadSection, match=f"section 'a': image 'slide' {message}"):
        read(path)


def test_a_repeated_instance(measured: Any, tmp_path: Path) -> None:
    index = np.r_[0, np.arange(79)]
    path = store(measured, tmp_path / "a.zarr", measured.pixels, systems={"one": (1, 1)}, index=index)
    with pytest.raises(BadSection, match="shapes 'spots' have instance '0' more than once"):
        read(path)


def test_what_systems_leave_in_stores(measured: Any, tmp_path: Path) -> None:
    path = store(measured, tmp_path / "a.zarr", measured.pixels, systems={"one": (1, 1)})
    dataset = SpatialDataStores(path=str(tmp_path))
    before = dataset.files(tmp_path, "a")
    for folder in (path, path / "images", path / "tables" / "table", path / "shapes"):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / "._slide").write_bytes(b"\0\5\x16\7")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    for name in (".hidden.zarr", "@eaDir", "__MACOSX", "._a.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zgroup").write_text("{}")
    assert dataset.names(tmp_path) == ["a"] and dataset.files(tmp_path, "a") == before
    np.testing.assert_array_equal(patches(read(path)), plain(measured))
