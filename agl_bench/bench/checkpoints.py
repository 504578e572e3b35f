"""Checkpoints of a cell in training: what a killed, preempted or stopped run continues from.

`partial/<key>/` holds, of a cell that has begun and has no result yet,

    spec.json             what it is
    progress.json         its last epoch, for `agl-bench status`
    <epoch>-<digest>.pt   its last checkpoint; it appears by one rename, and the digest of its content is in its name

A checkpoint is a plain consumer of the epochs of a trainer. Only the holder of the cell's lease writes here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agl_bench.bench.leases import HeldLease
from agl_bench.bench.spec import RunSpec
from agl_bench.digests import Damaged, NoFile, bytes_digest, file_digest, opened, read_object, set_aside
from agl_bench.errors import AglBenchError
from agl_bench.training.records import EpochRecord, OuterPass
from agl_bench.training.trainer import Trainer

FORMAT = 1
DIGEST = 16  # bytes; part of the format
EVERY = 20.0  # seconds between checkpoints unless the user says otherwise
SHARE = 0.05  # of the time, at most, goes into writing checkpoints
PROGRESS = 1.0  # seconds between two notes of the last epoch


class Interrupted(Exception):
    """A cell was stopped between two epochs and can be continued; says why."""


class Partial:
    """The folder of one cell that has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, spec: RunSpec) -> None:
        """Note that the cell has begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "spec.json", json.dumps(spec.as_json(), indent=1))

    def write(self, content: Mapping[str, Any], epoch: int) -> None:
        """Keep a checkpoint in place of the one before.

        Raises:
            OSError: where it cannot be written, e.g. for want of space; the one before stays.
        """
        stream = io.BytesIO()  # torch's own writer aborts the process where a disk is full
        torch.save({"format": FORMAT, **content}, stream)
        data = stream.getbuffer()
        self._put(f"{epoch:07d}-{bytes_digest(data, DIGEST)}.pt", data)

    def read(self) -> tuple[dict[str, Any] | None, str]:
        """The last checkpoint, None if there is none, and what is wrong with it.

        One that is damaged or that cannot be read is set aside as `damaged-NAME`.
        """
        problem = ""
        for path in sorted(self.folder.glob("[0-9]*.pt"), reverse=True):
            if not _is_whole(path):
                problem = "its checkpoint is damaged"
            else:
                try:
                    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                    if content.pop("format") == FORMAT:
                        return content, ""
                    problem = "its checkpoint was written by another version of agl-bench"
                except (RuntimeError, KeyError, pickle.UnpicklingError, EOFError):
                    problem = "its checkpoint cannot be read"
            self.set_aside(path)
        return None, problem

    def furthest(self) -> tuple[int, Path] | None:
        """Epoch and file of the last checkpoint that is whole; only looks."""
        for path in sorted(self.folder.glob("[0-9]*.pt"), reverse=True):
            epoch = path.stem.partition("-")[0]
            if epoch.isdecimal() and _is_whole(path):
                return int(epoch), path
        return None

    def adopt(self, path: Path) -> None:
        """Keep a copy of a checkpoint of the same cell from another store, in place of what is here.

        Raises:
            OSError: where it cannot be read or written; what is here stays.
        """
        with opened(path) as stream:
            data = stream.read()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("spec.json", "progress.json"):
            with contextlib.suppress(OSError, Damaged):
                replace_text(self.folder / name, json.dumps(read_object(path.parent / name), indent=1))
        self._put(path.name, data)

    def _put(self, name: str, data: bytes | memoryview) -> None:
        """Write a checkpoint, and let go of the others."""
        write_through(self.folder / name, data)
        for other in self.folder.glob("*.pt"):
            if other.name != name:
                other.unlink()

    def set_aside(self, path: Path | None = None) -> None:
        """Keep a checkpoint, the last one by default, out of the way."""
        for one in [path] if path else list(self.folder.glob("[0-9]*.pt")):
            set_aside(one, one.with_name(f"damaged-{one.name}"))

    def note(self, epoch: int, of: int) -> None:
        """Say how far the cell is."""
        replace_text(self.folder / "progress.json", json.dumps({"epoch": epoch, "of": of}))

    def progress(self) -> tuple[int, int] | None:
        """The last epoch that was noted, and how many there are at most."""
        try:
            content = read_object(self.folder / "progress.json")
            return int(content["epoch"]), int(content["of"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def discard(self) -> None:
        """The cell has its result, or begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Keeper:
    """Follows the training of one cell: continues it, keeps checkpoints and stops it where it must.

    Args:
        partial: the cell's folder.
        lease: on the cell.
        every: seconds between checkpoints; 0 = each epoch.
        limit: seconds that the cell may take this time; None = no limit.
        stop: why training must stop, asked after each epoch; "" = it goes on.

    Attributes:
        found: the epoch that training continues after, None where it began anew.
        problem: why a checkpoint could not be used.
    """

    def __init__(
        self,
        partial: Partial,
        lease: HeldLease,
        *,
        every: float = EVERY,
        limit: float | None = None,
        stop: Callable[[], str] = lambda: "",
    ) -> None:
        self.partial, self.lease, self.every, self.limit, self.stop = partial, lease, every, limit, stop
        self.found: int | None = None
        self.problem = ""
        self._began = self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last checkpoint took
        self._before = 0.0
        self._noted = -PROGRESS

    @property
    def seconds(self) -> float:
        """That the cell has taken so far, earlier times included."""
        return self._before + time.monotonic() - self._began

    def resume(self, trainer: Trainer) -> list[EpochRecord]:
        """Bring a fresh trainer to where the cell was left; the records up to there."""
        content, self.problem = self.partial.read()
        if content is None:
            return []
        trainer.resume(content["trainer"])
        self._before = content["seconds"]
        records = [record_of(plain) for plain in content["records"]]
        self.found = records[-1].epoch
        return records

    def follow(self, trainer: Trainer, records: list[EpochRecord]) -> None:
        """An epoch has ended; `records` are those of all epochs so far.

        Raises:
            Interrupted: if training must stop here; nothing is lost.
            TakenOver: if another process goes on with the cell.
            OSError: if a checkpoint cannot be written.
        """
        now = time.monotonic()
        why = self.stop()
        if not why and self.limit is not None and now - self._began >= self.limit:
            why = "time limit"
        since = now - self._last
        if why or (since >= self.every and (since * SHARE >= self._cost or not self.every)):
            self.lease.check()
            content = {"trainer": trainer.state(), "records": [asdict(r) for r in records], "seconds": self.seconds}
            self.partial.write(content, trainer.epoch)
            self._last = time.monotonic()
            self._cost = self._last - now
        if why or now - self._noted >= PROGRESS:
            self.partial.note(trainer.epoch, trainer.protocol.epochs)
            self._noted = now
        if why:
            raise Interrupted(why)


def read_spec(folder: Path) -> dict[str, Any] | None:
    """The spec, as JSON, of a cell that has begun or failed, from the folder that is named after its key.

    None if it says something else than that key, as another version may, or is being written.
    """
    try:
        content = read_object(folder / "spec.json")
        return content if RunSpec.from_json(content).key == folder.name else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AglBenchError):
        return None


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint has the content that its name says."""
    try:
        return file_digest(path, DIGEST) == path.stem.partition("-")[2]
    except (FileNotFoundError, NoFile):
        return False


def write_through(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is either there and whole or not there, even if the machine stops."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file at once; after a crash of the machine either text may be there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(plain: Mapping[str, Any]) -> EpochRecord:
    """Inverse of `asdict`."""
    return EpochRecord(**{**plain, "outer": tuple(OuterPass(**made) for made in plain["outer"])})
