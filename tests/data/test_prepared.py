"""Prepared sections: what comes back is what was read, whatever happens to the files and processes in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from agl_bench import ArrayPatches, BadSection, Section, digests
from agl_bench.data import prepared
from agl_bench.data.patches import BLOCK
from agl_bench.data.prepared import PatchSize, PreparedPatches, SectionCache
from agl_bench.digests import FileDigests, signed
from agl_bench.errors import BadWorkFolder

KEY = "0123456789abcdef"
SIZE = PatchSize(12, 112.0)


def make_section(spots: int = 20, genes: int = 30, *, dtype: type = np.int64, most: int = 9) -> Section:
    rng = np.random.default_rng(0)
    X = sparse.random_array((spots, genes), density=0.3, format="csr", rng=rng)
    X.data = rng.integers(1, 10, X.nnz).astype(dtype)
    X.data[0] = most
    counts = AnnData(
        sparse.csr_matrix(X),
        obs=pd.DataFrame({"answer": range(spots)}, index=[f"spot{i}" for i in range(spots)]),
        var=pd.DataFrame({"role": "secret"}, index=[f"GENE{i}" for i in range(genes)]),
        obsm={"spatial": rng.uniform(0, 10_000, (spots, 2)), "other": np.zeros((spots, 1))},
        layers={"truth": X.toarray()},
    )
    pixels = rng.integers(0, 256, (spots, 16, 16, 3), dtype=np.uint8)
    return Section(
        "S1", counts, 0.25, ArrayPatches(pixels, 112.0, section="S1"), rng.random((spots, 3), dtype=np.float32), "D1", 4
    )


class Reader:
    """Gives a section and counts how often it was asked."""

    def __init__(self, section: Section) -> None:
        self.section, self.calls = section, 0

    def __call__(self) -> Section:
        self.calls += 1
        return self.section


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_cache(tmp_path: Path, said: list[str]) -> Callable[[], SectionCache]:
    """A cache as a new process sees it."""
    folder = tmp_path / "cache"
    return lambda: SectionCache(folder, FileDigests(folder / "files.json"), said.append)


def base_of(array: np.ndarray) -> object:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_what_comes_back_is_what_was_read(make_cache: Callable[[], SectionCache]) -> None:
    section = make_section()
    read = Reader(section)
    for _ in range(2):
        found = make_cache().section(KEY, read)
        assert (found.counts.X != section.counts.X).nnz == 0
        assert list(found.counts.obs_names) == list(section.counts.obs_names)
        assert list(found.counts.var_names) == list(section.counts.var_names)
        np.testing.assert_array_equal(found.counts.obsm["spatial"], section.counts.obsm["spatial"])
        np.testing.assert_array_equal(found.embedding, section.embedding)
        assert (found.name, found.um_per_px, found.donor, found.dropped_spots) == ("S1", 0.25, "D1", 4)
        patches = found.patches.read(np.array([3, 0, 3]), 12, 112.0)
        np.testing.assert_array_equal(patches, section.patches.read(np.array([3, 0, 3]), 12, 112.0))
        patches[:] = 0  # the caller's own copy
        assert found.patches.read(np.array([3]), 12, 112.0).any()
    assert read.calls == 2  # for the section, and for a size of patches that nobody had announced


def test_nothing_else_that_the_reader_knows_is_kept(make_cache: Callable[[], SectionCache]) -> None:
    counts = make_cache().section(KEY, Reader(make_section())).counts
    assert list(counts.obs) == list(counts.var) == list(counts.layers) == list(counts.uns) == []
    assert list(counts.obsm) == ["spatial"]


def test_counts_are_mapped_and_not_copied(make_cache: Callable[[], SectionCache]) -> None:
    found = make_cache().section(KEY, Reader(make_section()), SIZE)
    for array in (found.counts.X.data, found.counts.X.indices, found.counts.X.indptr, found.embedding):
        assert isinstance(base_of(array), np.memmap)
        assert not array.flags.writeable
    assert found.counts.X.indices.dtype == found.counts.X.indptr.dtype == np.int32
    assert found.counts.X[3:5].shape == (2, 30)
    assert isinstance(base_of(found.patches.prepare(SIZE)), np.memmap)


@pytest.mark.parametrize(
    ("dtype", "most", "kept"),
    [
        (np.int64, 65_535, np.uint16),
        (np.float32, 9, np.uint16),
        (np.int64, 65_536, np.int32),
        (np.float64, 2**31, np.float32),
        (np.float64, 2**31 + 1, np.float64),
    ],
)
def test_counts_take_little_and_stay_exact(
    make_cache: Callable[[], SectionCache], dtype: type, most: int, kept: type
) -> None:
    section = make_section(dtype=dtype, most=most)
    X = make_cache().section(KEY, Reader(section)).counts.X
    assert X.dtype == kept
    np.testing.assert_array_equal(X.toarray().astype(np.float64), section.counts.X.toarray().astype(np.float64))


@pytest.mark.parametrize("form", ["dense", "csc", "unsorted", "one"])
def test_counts_in_any_form(make_cache: Callable[[], SectionCache], form: str) -> None:
    section = make_section()
    dense = section.counts.X.toarray()
    if form == "dense":
        section.counts.X = dense
    elif form == "csc":
        section.counts.X = sparse.csc_matrix(dense)
    elif form == "unsorted":
        X = section.counts.X
        X.indices[X.indptr[2] : X.indptr[3]] = X.indices[X.indptr[2] : X.indptr[3]][::-1].copy()
        X.data[X.indptr[2] : X.indptr[3]] = X.data[X.indptr[2] : X.indptr[3]][::-1].copy()
        X.has_sorted_indices = False
    else:
        dense = dense * 0
        dense[3, 2] = 1
        section.counts.X = sparse.csr_matrix(dense)
    X = make_cache().section(KEY, Reader(section)).counts.X
    np.testing.assert_array_equal(X.toarray(), dense)
    assert np.array_equal(X.indices, sparse.csr_matrix(dense).indices)


def test_a_bad_section_leaves_nothing(make_cache: Callable[[], SectionCache]) -> None:
    section = make_section()
    section.counts.X.data[3] = -1
    cache = make_cache()
    with pytest.raises(BadSection, match="is -1"):
        cache.section(KEY, Reader(section))
    assert not (cache.folder / KEY).exists()
    section.counts.X.data[3] = 1
    assert cache.section(KEY, Reader(section)).counts.n_obs == 20


def test_a_section_whose_files_change_while_it_is_used(make_cache: Callable[[], SectionCache]) -> None:
    read = Reader(make_section())
    found = make_cache().section(KEY, read)
    read.section = make_section(spots=19)
    with pytest.raises(BadSection, match="have changed while they were used"):
        found.patches.read(np.array([0]), 12, 112.0)


# --- damage ----------------------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["counts.data.npy", "counts.indptr.npy", "names.json", "embedding.npy", "section.json"]
)
def test_damage_is_recognised(
    make_cache: Callable[[], SectionCache], said: list[str], name: str, damage: Callable[[Path], None]
) -> None:
    section = make_section()
    read = Reader(section)
    cache = make_cache()
    cache.section(KEY, read)
    damage(cache.folder / KEY / name)
    found = make_cache().section(KEY, read)
    assert (found.counts.X != section.counts.X).nnz == 0
    assert read.calls == 2
    (line,) = said
    assert name in line and "set aside" in line
    assert (cache.folder / f"{KEY}.damaged").is_dir()
    make_cache().section(KEY, read)
    assert (read.calls, len(said)) == (2, 1)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
def test_damaged_patches_are_cut_again(
    make_cache: Callable[[], SectionCache], said: list[str], damage: Callable[[Path], None]
) -> None:
    read = Reader(make_section())
    cache = make_cache()
    before = np.array(cache.section(KEY, read, SIZE).patches.prepare(SIZE))
    assert read.calls == 1
    damage(cache.folder / KEY / f"{SIZE.stem}.npy")
    found = make_cache().section(KEY, read)
    np.testing.assert_array_equal(found.patches.prepare(SIZE), before)
    assert read.calls == 2  # the counts were good
    (line,) = said
    assert f"{SIZE.stem}.npy is damaged" in line


def no_sign(sign: Path) -> None:
    sign.unlink()
    sign.mkdir()


def of_another(sign: Path) -> None:
    sign.write_text(json.dumps(signed({"files": {"another.npy": [1, "0a"]}})), encoding="utf-8")


@pytest.mark.parametrize("damage", [no_sign, of_another, shorten, flip])
def test_a_damaged_sign_is_set_aside_with_its_patches(
    make_cache: Callable[[], SectionCache], said: list[str], damage: Callable[[Path], None]
) -> None:
    read = Reader(make_section())
    before = np.array(make_cache().section(KEY, read, SIZE).patches.prepare(SIZE))
    sign = make_cache().folder / KEY / f"{SIZE.stem}.json"
    damage(sign)
    found = make_cache().section(KEY, read)
    np.testing.assert_array_equal(found.patches.prepare(SIZE), before)
    assert sign.is_file() and os.path.lexists(sign.with_suffix(".json.damaged"))
    (line,) = said
    assert f"{SIZE.stem}.npy is damaged" in line


def rot(path: Path) -> None:
    """One bit, as a failing disk or `rsync -t` changes it: size and time stay."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


ROTTEN = ["counts.data.npy", "counts.indices.npy", "positions.npy", "names.json", "embedding.npy", f"{SIZE.stem}.npy"]


@pytest.mark.parametrize("name", [*ROTTEN, "features-0a-1.npy"])
def test_bits_that_change_under_an_unchanged_time_are_noticed(
    make_cache: Callable[[], SectionCache], said: list[str], name: str
) -> None:
    section, read = make_section(), Reader(make_section())
    features = np.arange(40, dtype=np.float32).reshape(1, 20, 2)

    def use() -> tuple[Section, np.ndarray, np.ndarray]:
        found = make_cache().section(KEY, read, SIZE)
        assert isinstance(found.patches, PreparedPatches)
        return (
            found,
            np.array(found.patches.prepare(SIZE)),
            found.patches.features("0a", 1, lambda rows: features[:, rows])[0],
        )

    _, patches, _ = use()
    cache = make_cache()
    cache.digests.keep()  # as a memo of times knows it
    rot(cache.folder / KEY / name)
    found, again, made = use()
    assert (found.counts.X != section.counts.X).nnz == 0
    np.testing.assert_array_equal(found.counts.obsm["spatial"], section.counts.obsm["spatial"])
    np.testing.assert_array_equal(again, patches)
    np.testing.assert_array_equal(made, features)
    (line,) = said
    assert name in line and "does not match its recorded digest" in line


def test_who_trusts_times_reads_nothing_twice(
    make_cache: Callable[[], SectionCache], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Reader(make_section())
    cache = make_cache()
    cache.section(KEY, read, SIZE)
    cache.digests.keep()
    digested: list[Path] = []
    whole = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: digested.append(path) or whole(path))
    for _ in range(2):
        make_cache().section(KEY, read, SIZE)
    assert len(digested) == 2 * len(set(digested))  # once for each that opens it
    monkeypatch.setenv("AGL_BENCH_TRUST_TIMES", "1")
    cache = make_cache()
    cache.section(KEY, read, SIZE)
    cache.digests.keep()
    digested.clear()
    make_cache().section(KEY, read, SIZE)
    assert digested == [] and said == []


@pytest.mark.parametrize("name", [f"{SIZE.stem}.json", "features-0a-1.json"])
@pytest.mark.parametrize("more", [b"\n{}", b"\xff", b"\0\0", b"["])
def test_bytes_behind_what_signs_an_array(
    make_cache: Callable[[], SectionCache], said: list[str], name: str, more: bytes
) -> None:
    read = Reader(make_section())

    def use() -> None:
        patches = make_cache().section(KEY, read, SIZE).patches
        assert isinstance(patches, PreparedPatches)
        patches.prepare(SIZE)
        made, _ = patches.features("0a", 1, lambda rows: np.ones((1, len(rows), 2), dtype=np.float32))
        assert made.sum() == 40

    use()
    with (make_cache().folder / KEY / name).open("ab") as file:
        file.write(more)
    for _ in range(2):
        use()
    (line,) = said
    assert "is damaged" in line and "set aside" in line


@pytest.mark.parametrize("what", [b"[" * 100_000, b"\0" * 400, b"{}"])
def test_a_manifest_of_something_else(make_cache: Callable[[], SectionCache], said: list[str], what: bytes) -> None:
    read = Reader(make_section())
    cache = make_cache()
    cache.section(KEY, read)
    (cache.folder / KEY / "section.json").write_bytes(what)
    assert make_cache().section(KEY, read).counts.n_obs == 20
    assert len(said) == 1


def test_patches_that_rot_while_others_are_still_to_be_cut(make_cache: Callable[[], SectionCache]) -> None:
    read = Reader(make_section())
    cache = make_cache()
    before = np.array(cache.section(KEY, read, SIZE).patches.prepare(SIZE))
    path = cache.folder / KEY / f"{SIZE.stem}.npy"
    marks = b"".join(prepared._mark(patch) for patch in before)
    path.with_suffix(".done").write_bytes(marks[:-16] + bytes(8) + b"\1" + bytes(7))  # one is to come, one is not true
    path.with_suffix(".json").unlink()
    start = path.stat().st_size - before.nbytes
    with path.open("r+b") as file:
        for row in (3, 18, 19):
            file.seek(start + row * before[0].nbytes + 5)
            file.write(b"\xaa\xbb")
    again = make_cache().section(KEY, read, SIZE).patches.prepare(SIZE)
    np.testing.assert_array_equal(again, before)


def test_a_folder_of_another_section_is_foreign(make_cache: Callable[[], SectionCache], said: list[str]) -> None:
    cache = make_cache()
    cache.section("another", Reader(make_section(spots=7)))
    shutil.copytree(cache.folder / "another", cache.folder / KEY)
    assert make_cache().section(KEY, Reader(make_section())).counts.n_obs == 20
    assert "belongs to another section" in said[0]


def test_a_folder_that_killed_processes_left(make_cache: Callable[[], SectionCache], said: list[str]) -> None:
    cache = make_cache()
    (cache.folder / f"{KEY}.partial").mkdir(parents=True)
    (cache.folder / f"{KEY}.partial" / "counts.data.npy").write_bytes(b"half")
    assert cache.section(KEY, Reader(make_section())).counts.n_obs == 20
    assert not (cache.folder / f"{KEY}.partial").exists()
    assert said == []


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"\(No space left on device\).*AGL_BENCH_CACHE"),
        (OSError("9 requested and 4 written"), r"did not take all: 9 requested and 4 written.*AGL_BENCH_CACHE"),
    ],
)
def test_a_full_disk_is_a_sentence(
    make_cache: Callable[[], SectionCache], monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    read = Reader(make_section())
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(BadWorkFolder, match=words):
            make_cache().section(KEY, read)
    found = make_cache().section(KEY, read)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_sync", full)
        with pytest.raises(BadWorkFolder, match=words):
            found.patches.prepare(SIZE)
    np.testing.assert_array_equal(
        found.patches.prepare(SIZE), read.section.patches.read(np.arange(20), SIZE.px, SIZE.um)
    )


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    cache = SectionCache(tmp_path / "cache", FileDigests(), print)
    with pytest.raises(BadWorkFolder, match="AGL_BENCH_CACHE"):
        cache.section(KEY, Reader(make_section()))


def test_an_error_of_the_source_is_not_the_disk(make_cache: Callable[[], SectionCache]) -> None:
    class Gone(ArrayPatches):
        def blocks(self, *_: object) -> object:
            raise OSError(errno.EIO, "unplugged")

    section = make_section()
    section.patches = Gone(np.zeros((20, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(BadSection, match=r"section 'S1': its patches cannot be read .*unplugged"):
        make_cache().section(KEY, Reader(section), SIZE)


@pytest.mark.parametrize("given", [np.zeros((20, 4, 12, 12), dtype=np.uint8), np.zeros((20, 3, 12, 12))])
def test_a_source_that_gives_something_else(make_cache: Callable[[], SectionCache], given: np.ndarray) -> None:
    class Odd:
        def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
            return given[rows]

        def outside(self, positions: np.ndarray) -> np.ndarray:
            return np.empty(0, dtype=np.int64)

    section = make_section()
    section.patches = Odd()
    with pytest.raises(BadSection, match=r"section 'S1': its source gives patches .* instead of uint8"):
        make_cache().section(KEY, Reader(section), SIZE)


# --- processes -------------------------------------------------------------------------------------------------------

CHILD = f"""
import sys, time
from pathlib import Path
import numpy as np
from tests_of_prepared import make_section, Reader
from agl_bench.data.prepared import PatchSize, SectionCache
from agl_bench.digests import FileDigests, signed
from agl_bench import digests
from agl_bench.data import prepared

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
section = make_section(spots={3 * BLOCK})
blocks_of = prepared.blocks_of

def slow(*words):
    for number, block in enumerate(blocks_of(*words)):
        if number:
            print("block", flush=True)
            time.sleep(pause)
        yield block

prepared.blocks_of = slow
read = Reader(section)
cache = SectionCache(folder, FileDigests(), lambda line: print("said", line))
found = cache.section("{KEY}", read, PatchSize(12, 112.0))
found.patches.prepare(PatchSize(12, 112.0))
print("calls", read.calls, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[float], subprocess.Popen[str]]:
    """Prepare a section of three blocks in another process."""
    shutil.copy(__file__, tmp_path / "tests_of_prepared.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def start(pause: float) -> subprocess.Popen[str]:
        words = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), str(tmp_path / "cache"), str(pause)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    return start


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kills", [1, 2])
def test_killed_while_cutting_and_continued(
    kills: int, tmp_path: Path, start: Callable[[float], subprocess.Popen[str]]
) -> None:
    undisturbed = SectionCache(tmp_path / "undisturbed", FileDigests(), print)
    undisturbed.section(KEY, Reader(make_section(spots=3 * BLOCK)), SIZE)
    folder = tmp_path / "cache" / KEY
    for number in range(kills):
        child = start(60)
        assert child.stdout is not None
        assert child.stdout.readline() == "block\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        done = np.frombuffer((folder / f"{SIZE.stem}.done").read_bytes(), dtype=np.uint64)
        assert np.count_nonzero(done) == (number + 1) * BLOCK
        assert not (folder / f"{SIZE.stem}.json").exists()
    child = start(0)
    out, _ = child.communicate()
    assert out.splitlines() == ["block"] * (2 - kills) + ["calls 1"]
    assert files_of(folder) == files_of(undisturbed.folder / KEY)


def test_two_processes_at_once(tmp_path: Path, start: Callable[[float], subprocess.Popen[str]]) -> None:
    children = [start(0.2), start(0.2)]
    said = sorted(child.communicate()[0].splitlines()[-1] for child in children)
    assert said == ["calls 0", "calls 1"]  # one prepared it, the other waited and found it
    undisturbed = SectionCache(tmp_path / "undisturbed", FileDigests(), print)
    undisturbed.section(KEY, Reader(make_section(spots=3 * BLOCK)), SIZE)
    assert files_of(tmp_path / "cache" / KEY) == files_of(undisturbed.folder / KEY)


# --- digests of files ------------------------------------------------------------------------------------------------


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memo = tmp_path / "file", tmp_path / "memo" / "files.json"
    path.write_text("one")
    known = FileDigests(memo)
    digest = known.of(path)
    known.keep()
    read = []
    monkeypatch.setattr("agl_bench.digests.file_digest", lambda path: read.append(path) or "new")
    assert FileDigests(memo).of(path) == digest
    assert read == []
    path.write_text("another")
    assert FileDigests(memo).of(path) == "new"
    for content in ("", "[]", json.dumps({str(path): 3})):
        memo.write_text(content)
        assert FileDigests(memo).of(path) == "new"


def test_prepared_patches_know_what_lies_outside(make_cache: Callable[[], SectionCache]) -> None:
    section = make_section()
    found = make_cache().section(KEY, Reader(section)).patches
    assert isinstance(found, PreparedPatches)
    assert found.outside(np.full((2, 2), -1.0)).tolist() == []
