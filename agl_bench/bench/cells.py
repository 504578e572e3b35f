"""The local cell store: one folder per finished cell, written atomically. It is the truth; everything else shows it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.digests import file_digest, text_digest
from agl_bench.errors import AglBenchError, BadWorkFolder

FORMAT = 2
DIGEST = 16  # bytes of a table's digest; part of the format
_TABLES = ("genes", "epochs", "outer")


class CellStore:
    """Finished cells in `cells/<key>/`, failed ones in `failed/<key>/`, folds in `folds/<digest>.csv`.

    A cell folder appears by one rename after everything in it has been written and flushed, and its tables carry a
    digest, so that nothing half-written is taken for finished.
    """

    def __init__(self, work: Path) -> None:
        """Create the folders.

        Raises:
            BadWorkFolder: if they cannot be created or written.
        """
        self.work, self.cells, self.failed, self.folds = work, work / "cells", work / "failed", work / "folds"
        try:
            for folder in (self.cells, self.failed, self.folds):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.cells / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise BadWorkFolder(
                f"cannot write to the work folder {work}: {error.strerror or error}; choose another with --work"
            ) from None
        self._sweep()

    def read(self, key: str) -> Result | None:
        """The finished cell, or None.

        A damaged one is set aside as `cells/.damaged-<key>`; one that another version of agl-bench has written stays
        where it is. Both count as absent.
        """
        folder = self.cells / key
        if not folder.is_dir():
            return None
        try:
            return _read(folder)
        except _Damaged:
            aside = self.cells / f".damaged-{key}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            return None
        except (KeyError, TypeError, AglBenchError):
            return None

    def __iter__(self) -> Iterator[Result]:
        """Every finished cell that can be read, in the order of their keys."""
        for folder in sorted(self.cells.iterdir()):
            if folder.name.startswith("."):
                continue
            result = self.read(folder.name)
            if result is not None:
                yield result

    def write(self, result: Result) -> None:
        """Keep a finished cell, in place of an older one."""
        key = result.spec.key
        fresh = self.cells / f".new-{key}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        digests = {}
        for name in _TABLES:
            path = fresh / f"{name}.parquet"
            getattr(result, name).to_parquet(path, index=False)
            digests[name] = file_digest(path, DIGEST)
        content = {
            "format": FORMAT,
            "spec": result.spec.as_json(),
            "scores": result.scores,
            "best_epoch": result.best_epoch,
            "counts": result.counts,
            "cost": result.cost,
            "provenance": result.provenance,
            "fold": result.fold,
            "digests": digests,
        }
        (fresh / "result.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        target, old = self.cells / key, self.cells / f".old-{key}-{os.getpid()}"
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:  # another process has finished the same cell in between: one of two equal results is enough
            shutil.rmtree(fresh, ignore_errors=True)
            if self.read(key) is None:
                raise
        shutil.rmtree(old, ignore_errors=True)
        _flush(self.cells)
        shutil.rmtree(self.failed / key, ignore_errors=True)

    def keep_fold(self, table: str) -> None:
        """Keep a fold, as CSV, under its digest; one that is there already stays as it is."""
        path = self.folds / f"{text_digest(table)}.csv"
        if path.exists():
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(table, encoding="utf-8")
        _flush(partial)
        partial.replace(path)

    def write_failure(self, spec: RunSpec, sentence: str, trace: str) -> Path:
        """Keep what is known of a failed cell; it is tried again on the next run."""
        folder = self.failed / spec.key
        folder.mkdir(exist_ok=True)
        (folder / "spec.json").write_text(json.dumps(spec.as_json(), indent=1), encoding="utf-8")
        (folder / "error.txt").write_text(f"{sentence}\n\n{trace}", encoding="utf-8")
        return folder / "error.txt"

    def _sweep(self) -> None:
        """Clear what killed processes left half-written; bring back a cell whose replacement did not arrive."""
        for path in self.cells.glob(".*-*-*"):
            purpose, key, pid = path.name[1:].split("-")[:3]
            # Our own number was another process's before a container was started again.
            if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if purpose == "old" and not (self.cells / key).exists():
                path.rename(self.cells / key)
            else:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folds.glob("*.csv.*"):
            pid = path.suffix[1:]
            if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
                path.unlink(missing_ok=True)


class _Damaged(Exception):
    """What was written is not what is there."""


def _read(folder: Path) -> Result:
    try:
        content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise _Damaged from error
    if content["format"] != FORMAT:
        raise KeyError(content["format"])
    for name in _TABLES:
        path = folder / f"{name}.parquet"
        if not path.is_file() or file_digest(path, DIGEST) != content["digests"][name]:
            raise _Damaged(name)
    spec = RunSpec.from_json(content["spec"])
    if spec.key != folder.name:  # of a version that counted other things into the key, or copied by hand
        raise KeyError(spec.key)
    return Result(
        spec=spec,
        **{name: pd.read_parquet(folder / f"{name}.parquet") for name in _TABLES},
        **{k: content[k] for k in ("scores", "best_epoch", "counts", "cost", "provenance", "fold")},
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
