"""Prepared sections: read and checked once, then memory-mapped from a folder that is named by what they were made of.

<cache>/<key>/section.json             name, µm per pixel, donor, shape; size and digest of every file below
<cache>/<key>/counts.{data,indices,indptr}.npy    raw counts, CSR, canonical: sorted, no repeated entry
<cache>/<key>/names.json               names of spots and genes, and Ensembl ids of the genes where they are known
<cache>/<key>/positions.npy            (spots, 2) as the reader gave them
<cache>/<key>/embedding.npy            (spots, width) float32, where there is one
<cache>/<key>/patches-<px>px-<µm>um.npy           uint8 (spots, 3, px, px); beside it .json once it is complete,
                                       .done (a digest of each patch that is there) until then
<cache>/<key>/features-<encoder>-<n>.npy          float32 (n symmetries, spots, width), what a frozen encoder makes of
                                       the patches; beside it .json once it is complete, .pieces/ until then.
                                       Delete it at any time: it is made again
<cache>/<key>.lock                     held by the process that writes; <key>.features-….lock likewise

A section appears under its key when it is complete. Patches are cut in blocks, and a block is marked only when it is
on the disk, so that a preparation killed at any point goes on where it stood and ends with the same bytes. What is
opened is compared with its digest, once by each process (AGL_BENCH_TRUST_TIMES leaves that to size and time). Only
names, Ensembl ids, counts and positions of the reader's AnnData are kept: nothing else that it may hold can reach a
model.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from filelock import FileLock
from scipy import sparse

from agl_bench.data.check import check_section
from agl_bench.data.gene_ids import COLUMN, ids_of
from agl_bench.data.patches import Block, blocks_of
from agl_bench.data.pieces import put_together
from agl_bench.data.preprocess import canonical
from agl_bench.digests import Damaged, FileDigests, bytes_digest, opened, read_signed, set_aside, signed, text_digest
from agl_bench.errors import AglBenchError, BadSection, BadWorkFolder
from agl_bench.interfaces.spots import PatchSource, Section

FORMAT = 1  # of the files; another number is another key
_MANIFEST = "section.json"
_MARK = 8  # bytes


@dataclass(frozen=True)
class PatchSize:
    """Patches of one size: pixels of a side, and how many µm of tissue it shows."""

    px: int
    um: float

    @property
    def stem(self) -> str:
        """Of the names of their files."""
        return f"patches-{self.px}px-{float(self.um)!r}um"


class SectionCache:
    """The folder of prepared sections.

    Args:
        folder: made when something is written.
        digests: of files; those of prepared files are remembered there too.
        say: takes one line for the user when something damaged is set aside.
    """

    def __init__(self, folder: Path, digests: FileDigests, say: Callable[[str], None]) -> None:
        self.folder, self.digests, self.say = folder, digests, say

    def section(
        self, key: str, read: Callable[[], Section], size: PatchSize | None = None, *, has_counts: bool = True
    ) -> Section:
        """The section of this key, memory-mapped; prepared first where it is not there.

        Args:
            key: digest of all that decides the content; names the folder.
            read: gives the section as measured; called when it has to be prepared, and again for sizes of patches
                that are asked for later.
            size: patches to cut while the section is in memory.
            has_counts: as its dataset says.

        Raises:
            BadSection: if it fails a check.
            BadWorkFolder: if the folder cannot be written, e.g. because the disk is full.
        """
        found = self._opened(key, read)
        if found is None:
            with self.writing(key):
                found = self._opened(key, read)  # another process may have prepared it meanwhile
                if found is None:
                    raw = read()
                    check_section(raw, has_counts=has_counts)
                    self._write(key, raw)
                    found = self._opened(key, read)
                    assert found is not None
                    if size is not None and raw.patches is not None:
                        assert isinstance(found.patches, PreparedPatches)
                        found.patches.prepare(size, raw.patches)
        return found

    def array(self, key: str, stem: str, make: Callable[[], np.ndarray] | None = None) -> np.ndarray | None:
        """An array beside the section of this key, memory-mapped; where it is not there, what `make` gives is written.

        Several processes may ask at once: one makes it, the others wait for it.

        Args:
            key: of a section that is prepared.
            stem: of the name of its file.
            make: called when it has to be made; None = only look.

        Raises:
            BadWorkFolder: if it cannot be written, e.g. because the disk is full.
        """
        path = self.folder / key / f"{stem}.npy"
        again = f"{path} is damaged ({{}}); it is set aside and made again"
        found = self.opened(key, path, path.with_suffix(".json"), again)
        if found is None and make is not None:
            with self.writing(f"{key}.{stem}"):
                found = self.opened(key, path, path.with_suffix(".json"), again)  # made by another process meanwhile
                if found is None:
                    partial = path.with_suffix(".partial")
                    with partial.open("wb") as file:
                        np.save(file, make())
                        _sync(file)
                    partial.replace(path)
                    self.sign(path, path.with_suffix(".json"))
                    found = self.opened(key, path, path.with_suffix(".json"), again)
        return found

    def opened(self, key: str, path: Path, sign: Path, again: str) -> np.ndarray | None:
        """A complete array of a section, memory-mapped; None where `sign` does not say that it is complete.

        One that is damaged is set aside, and `again` says so, with the damage in its braces.
        """
        if not os.path.lexists(sign):
            return None
        try:
            return self._whole(path, sign)
        except Damaged:
            with self.writing(key):
                try:
                    return self._whole(path, sign)  # another process may have mended it
                except Damaged as damage:
                    set_aside(path, path.with_suffix(".damaged"))
                    set_aside(sign, sign.with_suffix(".json.damaged"))
                    self.say(again.format(damage))
            return None

    def _whole(self, path: Path, sign: Path) -> np.ndarray:
        files = _manifest(sign).get("files", {})
        if path.name not in files:
            raise Damaged(f"{sign.name} belongs to another array")
        self.verify(path, *files[path.name])
        return _mapped(path)

    def sign(self, path: Path, sign: Path) -> None:
        """Say that a file is complete."""
        content = {"files": {path.name: [path.stat().st_size, self.digests.of(path)]}}
        partial = sign.with_suffix(".json.partial")
        partial.write_text(json.dumps(signed(content), indent=1), encoding="utf-8")
        partial.replace(sign)

    def discard(self, key: str) -> None:
        """Take a prepared section away, with its patches and features; nothing happens where there is none.

        Raises:
            BadWorkFolder: if the folder cannot be written.
        """
        if (self.folder / key).is_dir():
            with self.writing(key):
                shutil.rmtree(self.folder / key)

    def content(self, key: str) -> str:
        """Digest of what a prepared section says: names, counts and places of its spots, whatever it is called."""
        files = _manifest(self.folder / key / _MANIFEST)["files"]
        return text_digest(json.dumps(files, sort_keys=True))

    def bytes(self, key: str) -> int:
        """What a prepared section takes on the disk."""
        return sum(path.lstat().st_size for path in (self.folder / key).iterdir())

    def _opened(self, key: str, read: Callable[[], Section]) -> Section | None:
        folder = self.folder / key
        if not os.path.lexists(folder):
            return None
        try:
            return self._open(key, read)
        except Damaged:
            with self.writing(key):
                try:
                    return self._open(key, read)  # another process may have mended it
                except Damaged as damage:
                    set_aside(folder, self.folder / f"{key}.damaged")
                    self.say(f"{folder} is damaged ({damage}); it is set aside and the section is prepared again")
            return None

    def _open(self, key: str, read: Callable[[], Section]) -> Section:
        folder = self.folder / key
        known = _manifest(folder / _MANIFEST)
        if known.get("key") != key:
            raise Damaged(f"{_MANIFEST} belongs to another section")
        for name, (size, digest) in known["files"].items():
            self.verify(folder / name, size, digest)
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        counts = AnnData(
            _counts(folder, (len(names["spots"]), len(names["genes"]))),
            obs=pd.DataFrame(index=pd.Index(names["spots"], dtype=str)),
            var=pd.DataFrame(
                {COLUMN: names["gene_ids"]} if "gene_ids" in names else None, index=pd.Index(names["genes"], dtype=str)
            ),
            obsm={"spatial": np.load(folder / "positions.npy")},
        )

        def source() -> PatchSource:
            again = read()
            if again.patches is None or list(again.counts.obs_names) != names["spots"]:
                raise BadSection(known["name"], "its files have changed while they were used; run the command again")
            return again.patches

        return Section(
            known["name"],
            counts,
            known["um_per_px"],
            patches=(
                PreparedPatches(self, key, known["name"], len(names["spots"]), source) if known["has_patches"] else None
            ),
            embedding=_mapped(folder / "embedding.npy") if "embedding.npy" in known["files"] else None,
            donor=known["donor"],
            dropped_spots=known["dropped_spots"],
        )

    def verify(self, path: Path, size: int, digest: str) -> None:
        """Raises `Damaged` unless a file is as it was written. Its content is read once, whatever its time says."""
        if not path.is_file():
            raise Damaged(f"{path.name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path.name} has {path.stat().st_size} bytes instead of {size}")
        if self.digests.now(path) != digest:
            raise Damaged(f"{path.name} does not match its recorded digest")

    def _write(self, key: str, section: Section) -> None:
        partial = self.folder / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left; the lock is ours
        partial.mkdir(parents=True)
        counts = _without_zeros(section.counts.X)
        wide = np.int64 if max(counts.nnz, counts.shape[1]) > np.iinfo(np.int32).max else np.int32
        np.save(partial / "counts.data.npy", _narrowed(counts.data))
        np.save(partial / "counts.indices.npy", counts.indices.astype(wide, copy=False))
        np.save(partial / "counts.indptr.npy", counts.indptr.astype(wide, copy=False))
        np.save(partial / "positions.npy", np.asarray(section.counts.obsm["spatial"]))
        names = {"spots": list(map(str, section.counts.obs_names)), "genes": list(map(str, section.counts.var_names))}
        if (ids := ids_of(section.counts)) is not None:
            names["gene_ids"] = list(ids)
        (partial / "names.json").write_text(json.dumps(names), encoding="utf-8")
        if section.embedding is not None:
            np.save(partial / "embedding.npy", np.asarray(section.embedding, dtype=np.float32))
        files = {path.name: [path.stat().st_size, self.digests.of(path)] for path in sorted(partial.iterdir())}
        manifest = {
            "key": key,
            "name": section.name,
            "um_per_px": float(section.um_per_px),
            "donor": section.donor,
            "dropped_spots": int(section.dropped_spots),
            "has_patches": section.patches is not None,
            "files": files,
        }
        (partial / _MANIFEST).write_text(json.dumps(signed(manifest), indent=1), encoding="utf-8")
        for path in partial.iterdir():
            _to_disk(path)
        partial.rename(self.folder / key)

    @contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Alone with a section; trouble with the disk becomes a sentence."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{key}.lock", is_singleton=True)  # so that one process may enter twice
            with lock:
                yield
                self.digests.keep()
        except OSError as error:
            reason = error.strerror or f"the disk did not take all: {error}"  # numpy counts what was written
            raise BadWorkFolder(
                f"prepared sections cannot be written to {self.folder} ({reason}); make it writable, make room, "
                "or set AGL_BENCH_CACHE to another folder"
            ) from error


class PreparedPatches:
    """Patches of a prepared section, memory-mapped; cut from the section's own source when a size is new."""

    def __init__(self, cache: SectionCache, key: str, name: str, spots: int, source: Callable[[], PatchSource]) -> None:
        self._cache, self._key, self._name, self._spots, self._source = cache, key, name, spots, source
        self._folder = cache.folder / key
        self._open: dict[PatchSize, np.ndarray] = {}
        self._opening = threading.RLock()

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """Patches of the spots `rows`, uint8 (spots, 3, side_px, side_px), each `side_um` wide on the tissue."""
        patches: np.ndarray = self.prepare(PatchSize(side_px, side_um))[np.asarray(rows, dtype=np.intp)]
        return patches

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the positions (spots, 2) in pixels, (x, y), that lie outside the image."""
        return self._source().outside(positions)

    def prepare(self, size: PatchSize, source: PatchSource | None = None) -> np.ndarray:
        """All patches of a size, uint8 (spots, 3, px, px), memory-mapped; cut first where they are not there.

        Args:
            size: of the patches.
            source: to cut from, where it is at hand; read anew otherwise.

        Raises:
            BadSection: if the source is damaged or cannot give that size.
            BadWorkFolder: if they cannot be written, e.g. because the disk is full.
        """
        with self._opening:
            if size not in self._open:
                found = self._opened(size)
                if found is None:
                    with self._cache.writing(self._key):
                        found = self._opened(size)
                        if found is None:
                            self._cut(size, source or self._source())
                            found = self._opened(size)
                            assert found is not None
                self._open[size] = found
            return self._open[size]

    def features(
        self, encoder: str, symmetries: int, make: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, bool]:
        """What a frozen encoder makes of all patches, (symmetries, spots, n) float32, and whether it was there.

        Args:
            encoder: digest of all that decides the features, but the section.
            symmetries: 8 where patches are augmented, else 1, which the first of 8 will do for.
            make: rows of spots -> (symmetries, rows, n); called where it is not there, for some rows after the other.
        """
        for there in range(symmetries, 9, 7):
            found = self._cache.array(self._key, f"features-{encoder}-{there}")
            if found is not None:
                return found[:symmetries], True
        stem = f"features-{encoder}-{symmetries}"
        pieces = self._folder / f"{stem}.pieces"
        made = self._cache.array(self._key, stem, lambda: put_together(pieces, self._spots, make))
        assert made is not None
        shutil.rmtree(pieces, ignore_errors=True)
        return made, False

    def _files(self, size: PatchSize) -> tuple[Path, Path, Path]:
        """The patches, which are done, and the sign that all are."""
        return tuple(self._folder / f"{size.stem}.{ending}" for ending in ("npy", "done", "json"))  # type: ignore[return-value]

    def _opened(self, size: PatchSize) -> np.ndarray | None:
        path, _, sign = self._files(size)
        again = f"{path} is damaged ({{}}); it is set aside and the patches are cut again"
        return self._cache.opened(self._key, path, sign, again)

    def _cut(self, size: PatchSize, source: PatchSource) -> None:
        path, progress, sign = self._files(size)
        shape = (self._spots, 3, size.px, size.px)
        missing = _missing(path, progress, shape)
        if missing is None:
            progress.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            progress.write_bytes(bytes(self._spots * _MARK))
            missing = np.arange(self._spots)
        start = path.stat().st_size - int(np.prod(shape))  # after the header
        # Written as a file and not through the map: a full disk is then an error and not the end of the process.
        with path.open("r+b") as file, progress.open("r+b") as done:
            for rows, patches in self._blocks(source, missing, size):
                for row, patch in zip(rows, patches, strict=True):
                    file.seek(start + int(row) * patch.nbytes)
                    file.write(patch.tobytes())
                _sync(file)
                for row, patch in zip(rows, patches, strict=True):
                    done.seek(int(row) * _MARK)
                    done.write(_mark(patch))
                done.flush()
        self._cache.sign(path, sign)
        progress.unlink()

    def _blocks(self, source: PatchSource, rows: np.ndarray, size: PatchSize) -> Iterator[Block]:
        """Whatever a source raises or gives by mistake becomes a sentence, and no trouble with the cache."""
        try:
            for here, patches in blocks_of(source, rows, size.px, size.um):
                wanted = (len(here), 3, size.px, size.px)
                if patches.dtype != np.uint8 or patches.shape != wanted:
                    raise BadSection(
                        self._name,
                        f"its source gives patches {patches.dtype} {patches.shape} instead of uint8 {wanted}",
                    )
                yield here, patches
        except AglBenchError:
            raise
        except Exception as error:
            raise BadSection(self._name, f"its patches cannot be read ({type(error).__name__}: {error})") from error


def _missing(path: Path, progress: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Rows that are not cut yet, or not as they were cut; None where nothing usable is there."""
    try:
        with opened(progress) as stream:
            marks = stream.read()
        with opened(path):
            there = _mapped(path)
    except (OSError, Damaged):
        return None
    if there.shape != shape or there.dtype != np.uint8 or len(marks) != shape[0] * _MARK:
        return None
    rows = range(shape[0])
    return np.array([i for i in rows if marks[i * _MARK : (i + 1) * _MARK] != _mark(there[i])], dtype=np.intp)


def _mark(patch: np.ndarray) -> bytes:
    """What stands for a patch that is on the disk."""
    return bytes.fromhex(bytes_digest(patch.tobytes(), _MARK))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_signed(path)
    except OSError:
        raise Damaged(f"{path.name} cannot be read") from None


def _mapped(path: Path) -> np.ndarray:
    """An array in a .npy file, memory-mapped, read-only; an empty one cannot be mapped and is read."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, SyntaxError, RecursionError):
        try:
            array = np.load(path)
        except (ValueError, EOFError, SyntaxError, RecursionError):  # what is read as a header may be anything
            raise Damaged(f"{path.name} is not an array") from None
    return array.view(np.ndarray)  # so that what is picked from it is an ordinary array


def _without_zeros(X: Any) -> sparse.csr_matrix:
    """Counts as CSR with sorted, distinct, non-zero entries; `X` stays as it is."""
    counts = canonical(X)
    if not counts.data.all():
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Values ≥ 0 in the smallest of uint16, int32, float32 and float64 that holds them exactly."""
    most = values.max(initial=0)
    is_whole = values.dtype.kind in "uib" or bool((values == np.rint(values)).all())
    for kind in (np.uint16, np.int32):
        if is_whole and most <= np.iinfo(kind).max:
            return values.astype(kind, copy=False)
    single = values.astype(np.float32)
    return single if np.array_equal(single, values) else values.astype(np.float64)


def _counts(folder: Path, shape: tuple[int, int]) -> sparse.csr_matrix:
    data, indices, indptr = (_mapped(folder / f"counts.{part}.npy") for part in ("data", "indices", "indptr"))
    counts = sparse.csr_matrix((data, indices, indptr), shape=shape, copy=False)
    counts.has_sorted_indices = counts.has_canonical_format = True  # as written; looking would read every page
    return counts


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
