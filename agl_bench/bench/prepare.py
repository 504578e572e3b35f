"""Datasets as prepared sections: what names them, and reading one after the other."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import agl_bench
from agl_bench.bench.spec import Part, naming_the_dataset
from agl_bench.data.prepared import FORMAT, PatchSize, PreparedPatches, SectionCache
from agl_bench.digests import FileDigests, text_digest
from agl_bench.errors import BadSection, MissingData
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.dataset import Dataset, is_offline
from agl_bench.interfaces.spots import Section
from agl_bench.registry import meaning
from agl_bench.registry.plugins import Plugins

_MEMO = "files.json"  # digests of files, in the folder of prepared sections
# Modules of `data` that decide the pixels and counts of a prepared section, and whether it is let in.
DECIDING = (
    *("arrays", "check", "gene_ids", "h5ad_files", "patch_facts", "patches", "pieces", "prepared", "preprocess"),
    *("slides", "stored_pixels"),
)


@dataclass(frozen=True)
class PreparedSection:
    """A prepared section and what it took.

    Attributes:
        section: memory-mapped.
        content: digest of what it says, see `SectionCache.content`.
        was_there: nothing had to be read.
        bytes: on the disk, with patches of all sizes.
        seconds: for reading, checking, writing and cutting.
    """

    section: Section
    content: str
    was_there: bool
    bytes: int
    seconds: float


class Preparation:
    """Prepares the sections of datasets in a folder, one after the other: one raw section is in memory at a time.

    Args:
        root: data folder.
        folder: of prepared sections.
        say: takes one line for the user where something damaged is set aside; on stderr by default.
    """

    def __init__(self, root: Path, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.root = root
        self.digests = FileDigests(folder / _MEMO)
        self.cache = SectionCache(folder, self.digests, say or _to_stderr)

    def sections(self, part: Part, dataset: Dataset, size: PatchSize | None = None) -> Iterator[PreparedSection]:
        """The sections of a dataset, in order.

        Args:
            part: the dataset as it takes part in a cell.
            dataset: its instance.
            size: patches that are wanted; others are cut when they are asked for.

        Raises:
            MissingData: if a file is not there.
            BadSection: if a section cannot be read or fails a check.
            BadPlugin: if the dataset raises anything else.
            BadWorkFolder: if the folder cannot be written.
        """
        with naming_the_dataset(part):
            names = list(dataset.sections(self.root))
        for name in names:
            started = time.perf_counter()
            key = self._key(part, dataset, name)
            read = _Reader(part, dataset, self.root, name, self.digests)
            section = self.cache.section(key, read, size, has_counts=dataset.has_counts)
            if size is not None and isinstance(section.patches, PreparedPatches):
                section.patches.prepare(size)
            seconds = time.perf_counter() - started
            yield PreparedSection(section, self.cache.content(key), not read.was_used, self.cache.bytes(key), seconds)
        self.digests.keep()

    def discard(self, part: Part, dataset: Dataset) -> None:
        """Take away what is prepared of a dataset's files as they are, to be prepared anew; its files are read again.

        Raises:
            MissingData: if a file is not there.
            BadWorkFolder: if it cannot be taken away.
        """
        with naming_the_dataset(part):
            names = list(dataset.sections(self.root))
            for name in names:
                self.digests.forget(dataset.files(self.root, name))
        for name in names:
            self.cache.discard(self._key(part, dataset, name))

    def _key(self, part: Part, dataset: Dataset, name: str) -> str:
        """Digest of all that decides the content of a prepared section."""
        content = {
            "format": FORMAT,
            "code": code_digest(),
            "dataset": [part.name, part.settings, part.source, dataset.revision],
            "section": name,
            "files": _file_digests(part, dataset, self.root, [name], self.digests),
        }
        return text_digest(json.dumps(content, sort_keys=True))


class _Reader:
    """Reads one section of a dataset, and knows whether it was asked to."""

    def __init__(self, part: Part, dataset: Dataset, root: Path, name: str, digests: FileDigests) -> None:
        self.part, self.dataset, self.root, self.name, self.digests = part, dataset, root, name, digests
        self.was_used = False

    def __call__(self) -> Section:
        """Read it.

        Raises:
            BadSection: if a file has not the content any more that its size and time stand for.
        """
        self.was_used = True
        with naming_the_dataset(self.part):
            paths = list(self.dataset.files(self.root, self.name))
        for path in paths:
            if self.digests.now(path) != self.digests.of(path):
                raise BadSection(
                    self.name,
                    f"{path} has changed since it was first read, although its size and time are the same: the disk "
                    "may be failing, or a tool resets times; restore the file, or `touch` it if the change is intended",
                )
        with naming_the_dataset(self.part):
            return self.dataset.read(self.root, self.name)


def bring(part: Part, dataset: Dataset, root: Path) -> None:
    """Fetch what is absent; nothing is fetched where all is there, or where AGL_BENCH_OFFLINE is set.

    Raises:
        MissingData: if a file is absent and nothing may be fetched.
        FetchFailed: with what the user has to do.
    """
    try:
        with naming_the_dataset(part):
            for name in dataset.sections(root):
                dataset.files(root, name)
    except MissingData:
        if is_offline():
            raise
        with naming_the_dataset(part):
            dataset.fetch(root)


def fingerprint(part: Part, dataset: Dataset, root: Path, digests: FileDigests) -> str:
    """Digest of the content of a dataset's files and of its revision.

    Raises:
        MissingData: if a file is not there.
    """
    with naming_the_dataset(part):
        names = list(dataset.sections(root))
    whole = hashlib.blake2b(dataset.revision.encode(), digest_size=10)
    for line in _file_digests(part, dataset, root, names, digests):
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def seen_by(plugins: Plugins, part: Part) -> tuple[Literal["patches", "embedding", "position"], int]:
    """What a backbone with these settings looks at, and the side of its patches in pixels."""
    backbone = plugins.entry(part.name, "backbone").load()
    patch_px = part.settings.get("patch_px", getattr(backbone, "patch_px", Backbone.patch_px))
    return getattr(backbone, "sees", Backbone.sees), int(patch_px)  # type: ignore[arg-type]


def _file_digests(part: Part, dataset: Dataset, root: Path, names: list[str], digests: FileDigests) -> list[str]:
    """folder/file=digest of every file of some sections."""
    with naming_the_dataset(part):
        paths = [path for name in names for path in dataset.files(root, name)]
    return [f"{path.parent.name}/{path.name}={digests.of(path)}" for path in paths]


@cache
def code_digest() -> str:
    """Digest of code and libraries that decide what a prepared section holds."""
    libraries = " ".join(f"{name} {version(name)}" for name in ("pillow", "tifffile", "imagecodecs"))
    return text_digest(f"{pixel_code()} {libraries}", 4)


def pixel_code() -> str:
    """Digest of the code alone."""
    here = Path(agl_bench.__file__).parent / "data"
    return meaning.code_digest({f"agl_bench.data.{name}": here / f"{name}.py" for name in DECIDING}, 8)


def _to_stderr(line: str) -> None:
    print(f"agl-bench: {line}", file=sys.stderr, flush=True)
