"""Datasets as prepared sections: read one at a time, and anew exactly when something that decides them has changed."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

import agl_bench
from agl_bench import ArrayPatches, BadSection, Dataset, Section
from agl_bench.bench import prepare
from agl_bench.bench.prepare import Preparation
from agl_bench.bench.spec import Part
from agl_bench.data.prepared import PatchSize
from agl_bench.errors import BadPlugin, MissingData

PART = Part("made", {"size": 3}, "made 1.0", "source")
SIZE = PatchSize(6, 112.0)


class Made(Dataset):
    """Two sections, one file each; knows which are still in memory when the next is read."""

    revision = "1"

    def __init__(self) -> None:
        self.read_so_far: list[str] = []
        self.alive: list[int] = []
        self._given: list[weakref.ref[Section]] = []

    def sections(self, root: Path) -> dict[str, str]:
        return {"A": "D1", "B": "D2"}

    def files(self, root: Path, name: str) -> list[Path]:
        return [root / name]

    def read(self, root: Path, name: str) -> Section:
        gc.collect()
        self.alive.append(sum(given() is not None for given in self._given))
        self.read_so_far.append(name)
        rng = np.random.default_rng(int((root / name).read_text()))
        counts = anndata.AnnData(sparse.csr_matrix(rng.poisson(1, (9, 5)).astype(np.float32)))
        counts.obsm["spatial"] = rng.uniform(0, 1000, (9, 2))
        pixels = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
        section = Section(name, counts, 1.0, ArrayPatches(pixels, 112.0, section=name))
        self._given.append(weakref.ref(section))
        return section


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("AB"):
        (tmp_path / name).write_text(str(seed))
    return tmp_path


def sections(root: Path, dataset: Made, part: Part = PART, size: PatchSize | None = SIZE) -> list[Section]:
    return [p.section for p in Preparation(root, root / "cache").sections(part, dataset, size)]


def test_one_raw_section_is_in_memory_at_a_time(root: Path) -> None:
    dataset = Made()
    kept = sections(root, dataset)
    assert dataset.read_so_far == ["A", "B"]
    assert dataset.alive == [0, 0]
    kept[0].patches.read(np.arange(9), 4, 112.0)  # a size that nobody announced
    kept[1].patches.read(np.arange(9), 4, 112.0)
    assert dataset.read_so_far == ["A", "B", "A", "B"]
    assert dataset.alive == [0, 0, 0, 0]


def test_nothing_is_read_where_all_is_there(root: Path) -> None:
    before = sections(root, Made())
    dataset = Made()
    found = list(Preparation(root, root / "cache").sections(PART, dataset, SIZE))
    assert dataset.read_so_far == []
    assert all(p.was_there for p in found)
    for one, two in zip(before, found, strict=True):
        assert (one.counts.X != two.section.counts.X).nnz == 0
        np.testing.assert_array_equal(
            one.patches.read(np.arange(9), 6, 112.0), two.section.patches.read(np.arange(9), 6, 112.0)
        )


def test_what_is_discarded_is_read_anew(root: Path) -> None:
    sections(root, Made())
    (changed := root / "B").write_text("7")
    os.utime(changed, ns=(0, 0))
    sections(root, Made())
    changed.write_text("8")
    os.utime(changed, ns=(0, 0))  # another content of the same size and time: nothing tells
    dataset = Made()
    sections(root, dataset)
    assert dataset.read_so_far == []
    Preparation(root, root / "cache").discard(PART, Made())
    found = sections(root, dataset)
    assert dataset.read_so_far == ["A", "B"]
    expected = np.random.default_rng(8).poisson(1, (9, 5))
    np.testing.assert_array_equal(found[1].counts.X.toarray(), expected)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("nothing", []),
        ("provider", []),  # a version without a change of the code
        ("file", ["B"]),
        ("touched", []),
        ("settings", ["A", "B"]),
        ("source", ["A", "B"]),
        ("name", ["A", "B"]),
        ("revision", ["A", "B"]),
        ("code", ["A", "B"]),
    ],
)
def test_what_makes_it_read_anew(root: Path, change: str, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sections(root, Made())
    dataset, part = Made(), PART
    if change == "file":
        (root / "B").write_text("7")
    elif change == "touched":
        (root / "B").write_text("1")
    elif change == "settings":
        part = replace(PART, settings={"size": 4})
    elif change == "source":
        part = replace(PART, source="other")
    elif change == "name":
        part = replace(PART, name="other")
    elif change == "provider":
        part = replace(PART, provider="made 1.1")
    elif change == "revision":
        dataset.revision = "2"
    elif change == "code":
        monkeypatch.setattr(prepare, "code_digest", lambda: "other")
    sections(root, dataset, part)
    assert dataset.read_so_far == read


def test_all_that_reads_and_writes_sections_counts() -> None:
    """Whatever module of `data` is imported on the way from files to a prepared section decides what it holds."""
    folder = Path(agl_bench.__file__).parent / "data"
    found, waiting = set[str](), ["prepared"]
    while waiting:
        name = waiting.pop()
        found.add(name)
        imported = re.findall(r"^from agl_bench\.data\.(\w+) import", (folder / f"{name}.py").read_text(), re.MULTILINE)
        waiting += [other for other in imported if other not in found]
    assert set(prepare.DECIDING) == found


def test_a_new_size_is_cut_and_reported(root: Path) -> None:
    sections(root, Made(), size=None)
    dataset = Made()
    found = list(Preparation(root, root / "cache").sections(PART, dataset, SIZE))
    assert [p.was_there for p in found] == [False, False]
    assert [p.bytes for p in Preparation(root, root / "cache").sections(PART, dataset, SIZE)] == [
        p.bytes for p in found
    ]
    assert dataset.read_so_far == ["A", "B"]


def test_errors_of_a_dataset_name_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Made, root: Path, name: str) -> Section:
        raise OSError("unplugged")  # must not look like trouble with the cache

    monkeypatch.setattr(Made, "read", broken)
    with pytest.raises(BadPlugin, match=r"dataset 'made' of made 1\.0: OSError: unplugged"):
        sections(root, Made())


def test_what_may_not_be_read_is_no_fault_of_the_dataset(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Made, root: Path) -> dict[str, str]:
        raise PermissionError(13, "Permission denied", str(root / "A"))

    monkeypatch.setattr(Made, "sections", forbidden)
    with pytest.raises(MissingData, match=r"dataset 'made': .*A cannot be read: permission denied"):
        sections(root, Made())


def test_a_bad_section_keeps_what_was_prepared_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Made.read

    def bad(self: Made, root: Path, name: str) -> Section:
        section = read(self, root, name)
        if name == "B":
            section.counts.X.data[0] = 0.5
        return section

    with monkeypatch.context() as patch:
        patch.setattr(Made, "read", bad)
        with pytest.raises(BadSection, match="section 'B'"):
            sections(root, Made())
    dataset = Made()
    sections(root, dataset)
    assert dataset.read_so_far == ["B"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder


def test_a_bench_without_a_cache_leaves_nothing(temporary: Path, grid) -> None:
    ((spec, plan), *_), bench = grid("pgl")
    setting = bench.setting(spec, plan)
    assert len(list(temporary.iterdir())) == 1
    del bench, setting
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_source_that_rots_is_not_read_for_new_patches(root: Path) -> None:
    """Its key says what it was: patches of other pixels would hide under it."""
    sections(root, Made())
    path = root / "B"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sections(root, Made())  # what was prepared is whole
    with pytest.raises(BadSection, match=f"{path} has changed since it was first read.*touch"):
        sections(root, Made(), size=PatchSize(SIZE.px // 2, SIZE.um))
    path.touch()
    assert sections(root, Made(), size=PatchSize(SIZE.px // 2, SIZE.um))
