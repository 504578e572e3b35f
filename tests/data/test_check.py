"""Each check of a section names the section, the first offender and the remedy."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from agl_bench import ArrayPatches, BadSection, BadSpec, ImagePatches, Section
from agl_bench.data.check import check_dataset, check_section, pixel_problems, problems


def section(x: object = None, *, name: str = "S1", genes: str = "ABCD", **fields: object) -> Section:
    x = np.arange(12, dtype=np.float32).reshape(3, 4) if x is None else x
    counts = anndata.AnnData(
        x, obs=pd.DataFrame(index=[f"s{i}" for i in range(3)]), var=pd.DataFrame(index=list(genes))
    )
    counts.obsm["spatial"] = np.arange(6, dtype=np.float64).reshape(3, 2)
    return Section(name, counts, **{"um_per_px": 0.5, **fields})  # type: ignore[arg-type]


LAYOUTS: dict[str, Callable[[np.ndarray], object]] = {
    "dense": lambda x: x,
    "csr": scipy.sparse.csr_matrix,
    "csc": scipy.sparse.csc_matrix,
    "csr_array": scipy.sparse.csr_array,
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_section_passes(layout: str, dtype: str) -> None:
    check_section(section(LAYOUTS[layout](np.arange(12, dtype=dtype).reshape(3, 4))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.6931, "spot 's1', gene 'C' is 0.6931, not a whole number; give raw counts"),
        (-2.0, "spot 's1', gene 'C' is -2; raw counts are not negative"),
        (np.nan, "spot 's1', gene 'C' is nan; raw counts are finite"),
        (np.inf, "spot 's1', gene 'C' is inf; raw counts are finite"),
    ],
)
def test_value_that_is_no_count(layout: str, value: float, message: str) -> None:
    x = np.arange(12, dtype=np.float64).reshape(3, 4)
    x[0, 1] = 0  # stored positions differ from dense ones
    x[1, 2] = value
    with pytest.raises(BadSection, match=f"section 'S1': the count of {message}"):
        check_section(section(LAYOUTS[layout](x)))


def test_negative_integer() -> None:
    x = np.ones((3, 4), dtype=np.int32)
    x[2, 3] = -1
    with pytest.raises(BadSection, match="spot 's2', gene 'D' is -1"):
        check_section(section(scipy.sparse.csr_matrix(x)))


def test_offender_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agl_bench.data.check._ENTRIES", 5)
    x = np.ones((3, 4))
    x[2, 1] = 0.5
    for layout in ("dense", "csr", "csc"):
        with pytest.raises(BadSection, match=r"spot 's2', gene 'B' is 0\.5"):
            check_section(section(LAYOUTS[layout](x)))


def test_remedy_points_at_a_layer_with_counts() -> None:
    normalised = section(np.full((3, 4), 0.5))
    normalised.counts.layers["counts"] = np.ones((3, 4))
    with pytest.raises(BadSection, match=r"X = layers\['counts'\]"):
        check_section(normalised)


def test_repeated_names() -> None:
    with pytest.warns(UserWarning, match="unique"):
        repeated = section(genes="ABCB")
    with pytest.raises(BadSection, match=r"gene 'B' occurs more than once \(1 repeated\).*var_names_make_unique"):
        check_section(repeated)
    twice = section()
    twice.counts.obs_names = ["a", "b", "a"]
    with pytest.raises(BadSection, match="spot 'a' occurs more than once"):
        check_section(twice)


def test_empty_sections() -> None:
    for rows, columns, what in ((0, 4, "no spots"), (3, 0, "no genes")):
        empty = section()
        empty.counts = empty.counts[:rows, :columns].copy()
        with pytest.raises(BadSection, match=what):
            check_section(empty)
    without = section()
    without.counts = anndata.AnnData(obs=without.counts.obs, var=without.counts.var)
    with pytest.raises(BadSection, match=r"counts\.X is empty"):
        check_section(without)


def test_positions() -> None:
    lost = section()
    del lost.counts.obsm["spatial"]
    with pytest.raises(BadSection, match=r"obsm\['spatial'\] is missing"):
        check_section(lost)
    for stored in (np.zeros((3, 3)), np.zeros(3)[:, None], np.full((3, 2), "a")):
        wrong = section()
        wrong.counts.obsm["spatial"] = stored
        with pytest.raises(BadSection, match=r"it has to be numbers of shape \(3, 2\)"):
            check_section(wrong)
    unknown = section()
    unknown.counts.obsm["spatial"][1, 0] = np.nan
    with pytest.raises(BadSection, match="spot 's1' has no finite position"):
        check_section(unknown)


def test_spot_outside_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (10, 4)).save(tmp_path / "image.png")
    good = section()  # positions (0, 1), (2, 3), (4, 5)
    patches = ImagePatches(tmp_path / "image.png", good.counts.obsm["spatial"], 0.5)
    with pytest.raises(BadSection, match=r"spot 's2' at x = 4, y = 5 lies outside the image \(1 spots\)"):
        check_section(section(patches=patches))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_pixel_size(value: float) -> None:
    with pytest.raises(BadSection, match="um_per_px is"):
        check_section(section(um_per_px=value))


def test_embedding() -> None:
    check_section(section(embedding=np.zeros((3, 2), dtype=np.float32)))
    for shape in ((2, 5), (3,), (3, 0)):
        with pytest.raises(BadSection, match=r"has to be \(3, width\)"):
            check_section(section(embedding=np.zeros(shape)))
    values = np.zeros((3, 2))
    values[2, 1] = np.nan
    with pytest.raises(BadSection, match="embedding of spot 's2' is not finite"):
        check_section(section(embedding=values))


def test_dataset() -> None:
    check_dataset("d", [section(), section(name="S2", genes="DCXY")])
    with pytest.raises(BadSpec, match="'d' has no section"):
        check_dataset("d", [])
    with pytest.raises(BadSpec, match="'S1' more than once"):
        check_dataset("d", [section(), section()])
    with pytest.raises(BadSection, match=r"section 'S3': no gene of it is in all of 'S1', 'S2'.*'P'.*'S1' has 'A'"):
        check_dataset("d", [section(), section(name="S2"), section(name="S3", genes="PQRS")])


def look(*kinds: str) -> list[str]:
    """What the pixels of three spots say, each a square of one kind."""
    noise = np.random.default_rng(0).normal(0, 1, (32, 32, 3))
    colour = {
        "white": (240, 241, 238) + 2 * noise,
        "tinted": (205, 217, 224) + 2 * noise,
        "black": np.zeros((32, 32, 3)),
        "tissue": (190, 120, 170) + 25 * noise,
        "pale": (225, 222, 226) + 25 * noise,
        "blood": np.array([200, 90, 110]) + noise,
    }
    pixels = np.stack([np.clip(colour[kind], 0, 255).astype(np.uint8) for kind in kinds])
    return list(pixel_problems(section(patches=ArrayPatches(pixels, 50.0))))


def test_spots_on_glass() -> None:
    assert look("tissue", "pale", "blood") == []
    assert look("tissue", "white", "pale") == []
    for kinds in (("white", "tinted", "tissue"), ("black", "pale", "black")):
        (problem,) = look(*kinds)
        assert problem.startswith("2 of 3 spots looked at lie on bare glass, the first is 's0'")


@pytest.mark.parametrize("kind", ["fluorescence", "12 bits of 16", "no light"])
def test_dark_images(kind: str) -> None:
    tissue = np.random.default_rng(0).integers(60, 256, (3, 20, 20, 3), dtype=np.uint8)
    sound = section(patches=ArrayPatches(tissue))
    assert list(pixel_problems(sound)) == []
    dark = tissue // 16 if kind == "12 bits of 16" else np.zeros_like(tissue)
    if kind == "fluorescence":
        dark[:, 8:11, 8:11, 2] = 255  # a nucleus
    (problem,) = pixel_problems(section(patches=ArrayPatches(dark)))
    assert "not a bright-field image" in problem and "use the bright-field scan" in problem


def test_every_problem_is_told() -> None:
    with pytest.warns(UserWarning, match="unique"):
        bad = section(np.full((3, 4), 0.5), genes="ABCB", um_per_px=-1.0, embedding=np.zeros((2, 2)))
    bad.counts.obsm["spatial"][1] = bad.counts.obsm["spatial"][0]
    assert [problem.partition(" ")[0] for problem in problems(bad)] == ["gene", "the", "um_per_px", "spot", "the"]
    with pytest.raises(BadSection, match="gene 'B' occurs more than once"):
        check_section(bad)


@pytest.mark.parametrize(
    ("positions", "um_per_px", "message"),
    [
        ([[0, 1], [2, 3], [0, 1]], 0.5, r"'s0' shares its place x = 0, y = 1 with another \(2 spots\)"),
        ([[0, 1], [2, -3], [4, 5]], 0.5, r"'s1' at x = 2, y = -3 has a negative coordinate \(1 spots\)"),
        ([[0, 0], [0, 1], [0, 2]], 0.9, r"neighbouring spots are 0\.9 µm apart"),
        ([[0, 0], [0, 1], [0, 2]], 2001.0, r"neighbouring spots are 2e\+03 µm apart"),
    ],
)
def test_places(positions: list[list[int]], um_per_px: float, message: str) -> None:
    wrong = section(um_per_px=um_per_px)
    wrong.counts.obsm["spatial"] = np.array(positions, dtype=np.float64)
    (problem,) = problems(wrong)
    assert re.search(message, problem)


def test_counts_that_tell_nothing() -> None:
    assert list(problems(section(np.zeros((3, 4))))) == [
        "all of its counts are zero; check that X holds the raw counts"
    ]
    assert list(problems(section(np.ones((3, 1)), genes="A"))) == [
        "it has one gene, 'A'; a primary and an auxiliary gene are needed at least"
    ]


def test_large_section_is_checked_without_a_copy() -> None:
    large = scipy.sparse.random(5_000, 18_000, density=0.1, format="csr", dtype=np.float32, rng=0)
    large.data = np.ceil(large.data * 9)
    counts = anndata.AnnData(large)
    counts.obsm["spatial"] = np.stack(np.divmod(np.arange(5_000.0), 70), axis=1)
    tracemalloc.start()
    check_section(Section("S", counts, 100.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.data.nbytes
