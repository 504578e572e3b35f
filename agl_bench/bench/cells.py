"""The cell store: one folder per finished cell, written atomically. It is the truth; everything else shows it.

Several processes, of several machines where the folder is shared, may work on one store.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.parquet as pq
import torch

from agl_bench.bench.checkpoints import Partial, flush, replace_text
from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.leases import Leases, Owner, is_stale
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.bench.status import Place
from agl_bench.digests import bytes_digest, file_digest, text_digest
from agl_bench.errors import AglBenchError, BadSpec, BadWorkFolder, NotKept, UnknownName

FORMAT = 2
DIGEST = 16  # bytes of a table's digest; part of the format
Status = Literal["failed", "diverged"]
_TABLES = ("genes", "epochs", "outer")
_KEPT = {"predictions": "predictions.parquet", "model": "model.pt"}  # what a cell may keep beside its tables


@dataclass(frozen=True)
class Failure:
    """How a cell ended that has no result.

    Attributes:
        status: "diverged" where training produced a loss that is not finite.
        sentence: why.
        details: file with the traceback.
    """

    status: Status
    sentence: str
    details: Path


class CellStore:
    """Finished cells in `cells/<key>/`, failed ones in `failed/<key>/`, folds in `folds/<digest>.csv`.

    Cells that have begun are in `partial/<key>/`, who works on them is in `leases/<key>/`. A cell folder appears by one
    rename after everything in it has been written and flushed, and its tables carry a digest, so that nothing
    half-written is taken for finished.
    """

    def __init__(self, work: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        """Create the folders.

        Args:
            work: the work folder.
            warn: told, in one sentence, what was found damaged.

        Raises:
            BadWorkFolder: if they cannot be created or written.
        """
        self.work, self.cells, self.failed, self.folds = work, work / "cells", work / "failed", work / "folds"
        self.partial, self.leases, self.grids = work / "partial", Leases(work / "leases"), work / "grids"
        self.owner, self.warn = Owner.this(), warn
        try:
            for folder in (self.cells, self.failed, self.folds, self.partial, self.leases.folder, self.grids):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.cells / f".probe-{self.owner.name}"
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
            return read_cell(folder)
        except Unreadable as error:
            if not error.is_damaged:
                return None
            aside = self.cells / f".damaged-{key}"
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process has done so
                folder.rename(aside)
            self.warn(f"the result of cell {key} is damaged: set aside as {aside}, to be computed anew")
            return None

    def read_of_any_version(self, key: str) -> Result:
        """A finished cell, also where this version would call it by another key.

        Raises:
            BadWorkFolder: if it cannot be read.
        """
        try:
            return read_cell(self.cells / key, of_this_version=False)
        except Unreadable as error:
            raise BadWorkFolder(
                f"cell {key} in {self.cells} cannot be read ({error}): it is damaged, or of a "
                "version of agl-bench that is too different; run its campaign again"
            ) from None

    def __iter__(self) -> Iterator[Result]:
        """Every finished cell that can be read, in the order of their keys."""
        for folder in sorted(self.cells.iterdir()):
            if folder.name.startswith("."):
                continue
            result = self.read(folder.name)
            if result is not None:
                yield result

    def glances(self) -> Iterator[dict[str, Any]]:
        """What `result.json` says of every finished cell, with "key", and "selected" and "epochs" of its epochs.

        Light: the tables and their digests are left to `read`. Cells that cannot be read are left out.
        """
        return glances(self.cells)

    def find(self, text: str) -> str:
        """Key of the finished cell that is called so, by its key or the beginning of it.

        Raises:
            UnknownName: if there is none.
            BadSpec: if several begin so.
        """
        keys = sorted(p.name for p in self.cells.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [text] if text in keys else [k for k in keys if text and k.startswith(text)]
        if not found:
            raise UnknownName("cell", text, keys[:5], remedy=f"{len(keys)} in all, in {self.cells}.")
        if len(found) > 1:
            raise BadSpec(
                f"cell '{text}' is not one: {len(found)} keys begin so ({', '.join(found[:3])}, …); add to it"
            )
        return found[0]

    def kept(self, key: str) -> frozenset[str]:
        """What a finished cell keeps beside its tables: "predictions", "model", both or nothing."""
        try:
            content = json.loads((self.cells / key / "result.json").read_text(encoding="utf-8"))
            return frozenset(_KEPT) & frozenset(content["digests"])
        except (OSError, ValueError, KeyError, TypeError):
            return frozenset()

    def predictions(self, key: str, columns: list[str] | None = None) -> pd.DataFrame:
        """Predicted and measured expression of a cell's test spots, see `result.prediction_table`.

        Args:
            key: of a finished cell.
            columns: only these; None = all.

        Raises:
            NotKept: if the cell has not kept them, or they are damaged.
        """
        return pd.read_parquet(io.BytesIO(self._content(key, "predictions")), columns=columns)

    def model(self, key: str) -> KeptModel:
        """The model of a finished cell in its best state.

        Raises:
            NotKept: if the cell has not kept it, or it is damaged.
        """
        stream = io.BytesIO(self._content(key, "model"))
        return KeptModel.of_state(torch.load(stream, map_location="cpu", weights_only=True))

    def _content(self, key: str, what: str) -> bytes:
        """Of a file that a cell has kept, as it was written."""
        remedy = f"`agl-bench rerun {key} --keep {what} --work {self.work}` makes the cell once more and keeps it"
        try:
            written = json.loads((self.cells / key / "result.json").read_text(encoding="utf-8"))["digests"].get(what)
            if written is None:
                raise NotKept(f"cell {key} has kept no {what}; {remedy}")
            content = (self.cells / key / _KEPT[what]).read_bytes()
        except FileNotFoundError as error:
            if not (self.cells / key).is_dir():
                raise NotKept(f"there is no finished cell {key} in {self.cells}") from None
            raise NotKept(f"cell {key} has lost {Path(error.filename).name}; {remedy}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NotKept(f"result.json of cell {key} is damaged; run its campaign again") from None
        if bytes_digest(content, DIGEST) != written:
            raise NotKept(f"{_KEPT[what]} of cell {key} is damaged; {remedy}")
        return content

    def write(self, result: Result) -> None:
        """Keep a finished cell, in place of an older one.

        Raises:
            OSError: if it cannot be written, e.g. for want of space; then nothing has changed.
        """
        self._publish(result.spec.key, lambda fresh: self._write(result, fresh))

    def adopt(self, folder: Path) -> None:
        """Keep a copy of a finished cell of another store, in place of an older one.

        Args:
            folder: of the cell, named after its key; it stays as it is.

        Raises:
            Unreadable: if the copy is not whole; then nothing has changed.
            OSError: as for `write`.
        """

        def copy(fresh: Path) -> None:
            fresh.mkdir()
            for path in folder.iterdir():
                shutil.copyfile(path, fresh / path.name)
            check_cell(fresh, folder.name, kept=True)  # what was copied, not what there was to copy
            for path in (*fresh.iterdir(), fresh):
                flush(path)

        self._publish(folder.name, copy)

    def is_finished(self, key: str) -> bool:
        """Whether the cell is finished and whole; only looks."""
        try:
            check_cell(self.cells / key, key)
        except Unreadable:
            return False
        return True

    def _publish(self, key: str, write: Callable[[Path], None]) -> None:
        """Have a cell written into a fresh folder, and put this in place of an older one."""
        fresh = self.cells / f".new-{key}-{self.owner.name}"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            write(fresh)
        except (OSError, Unreadable):
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        target, old = self.cells / key, self.cells / f".old-{key}-{self.owner.name}"
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
        flush(self.cells)
        self.forget_failure(key)
        self.begun(key).discard()

    @staticmethod
    def _write(result: Result, fresh: Path) -> None:
        """Everything of a finished cell, into a folder that is not there yet."""
        fresh.mkdir()
        digests = {}
        for name in _TABLES:
            path = fresh / f"{name}.parquet"
            getattr(result, name).to_parquet(path, index=False)
            digests[name] = file_digest(path, DIGEST)
        if result.predictions is not None:
            result.predictions.to_parquet(fresh / _KEPT["predictions"], index=False)
        if result.model is not None:
            stream = io.BytesIO()  # torch's own writer aborts the process where a disk is full
            torch.save(result.model.state(), stream)
            (fresh / _KEPT["model"]).write_bytes(stream.getbuffer())
        digests |= {what: file_digest(fresh / name, DIGEST) for what, name in _KEPT.items() if (fresh / name).is_file()}
        content = {
            "format": FORMAT,
            "spec": result.spec.as_json(),
            "scores": result.scores,
            "best_epoch": result.best_epoch,
            "selected": int(result.epochs["selected"].iloc[result.best_epoch]),
            "epochs": len(result.epochs),
            "counts": result.counts,
            "cost": result.cost,
            "provenance": result.provenance,
            "fold": result.fold,
            "digests": digests,
        }
        (fresh / "result.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*fresh.iterdir(), fresh):
            flush(path)

    @contextlib.contextmanager
    def announced(self, specs: Iterable[RunSpec]) -> Iterator[None]:
        """While this lasts, `agl-bench status` knows what this process is going to run."""
        path = self.grids / f"{self.owner.name}.json"
        places = {s.key: astuple(Place.of(s.as_json())) for s in specs}
        replace_text(path, json.dumps(places))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def begun(self, key: str) -> Partial:
        """What is kept of a cell that has begun and is not finished."""
        return Partial(self.partial / key)

    def keep_fold(self, table: str) -> None:
        """Keep a fold, as CSV, under its digest; one that is there already stays as it is."""
        path = self.folds / f"{text_digest(table)}.csv"
        if path.exists():
            return
        partial = path.with_name(f"{path.name}.{self.owner.name}")
        partial.write_text(table, encoding="utf-8")
        flush(partial)
        partial.replace(path)

    def write_failure(self, spec: RunSpec, sentence: str, trace: str, status: Status = "failed") -> Path:
        """Keep what is known of a failed cell."""
        folder = self.failed / spec.key
        folder.mkdir(exist_ok=True)
        (folder / "spec.json").write_text(json.dumps(spec.as_json(), indent=1), encoding="utf-8")
        (folder / "error.txt").write_text(f"{sentence}\n\n{trace}", encoding="utf-8")
        replace_text(folder / "failure.json", json.dumps({"status": status, "sentence": sentence}))
        return folder / "error.txt"

    def adopt_failure(self, folder: Path) -> None:
        """Keep a copy of what another store knows of a failed cell; the folder is named after its key."""
        copy = self.failed / folder.name
        copy.mkdir(exist_ok=True)
        for name in ("spec.json", "error.txt", "failure.json"):  # the last one makes it count
            replace_text(copy / name, (folder / name).read_text(encoding="utf-8"))

    def failure(self, key: str) -> Failure | None:
        """How a cell failed; None if it did not, or if what is known of it is not whole."""
        return read_failure(self.failed / key)

    def failures(self) -> Iterator[tuple[str, dict[str, Any], Failure]]:
        """Key, spec as JSON and failure of every cell that failed, in the order of their keys."""
        for folder in sorted(self.failed.iterdir()):
            failure = self.failure(folder.name)
            with contextlib.suppress(OSError, ValueError):  # being written
                spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
                if failure is not None:
                    yield folder.name, spec, failure

    def forget_failure(self, key: str) -> None:
        """The cell is tried again."""
        shutil.rmtree(self.failed / key, ignore_errors=True)

    def _sweep(self) -> None:
        """Clear what killed processes left half-written; bring back a cell whose replacement did not arrive."""
        for path in self.cells.glob(".*-*-*"):
            purpose, key, name = path.name[1:].split("-", 2)
            if not is_stale(path, Owner.parse(name)):
                continue
            if purpose == "old" and not (self.cells / key).exists():
                path.rename(self.cells / key)
            else:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folds.glob("*.csv.*"):
            if is_stale(path, Owner.parse(path.name.partition(".csv.")[2])):
                path.unlink(missing_ok=True)
        for path in self.grids.glob("*.json"):
            if is_stale(path, Owner.parse(path.stem)):
                path.unlink(missing_ok=True)
        self.leases.sweep()


def read_failure(folder: Path) -> Failure | None:
    """What a folder says of a failed cell; None if it says nothing whole."""
    try:
        content = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
        status: Status = "diverged" if content["status"] == "diverged" else "failed"
        return Failure(status, str(content["sentence"]), folder / "error.txt")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def glances(cells: Path) -> Iterator[dict[str, Any]]:
    """See `CellStore.glances`; of any store's folder `cells`, which stays as it is."""
    for folder in sorted(cells.iterdir()):
        if folder.name.startswith("."):
            continue
        try:
            content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                continue
            if "epochs" not in content:  # of the time when the file did not say so
                with pq.ParquetFile(folder / "epochs.parquet") as epochs:  # threads would cost more than they save
                    selected = epochs.read(columns=["selected"], use_threads=False)["selected"]
                content["selected"] = int(selected[content["best_epoch"]].as_py())
                content["epochs"] = len(selected)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue  # being written, damaged or of another version
        yield content | {"key": folder.name}


class Unreadable(Exception):
    """A folder holds no finished cell that can be read; `is_damaged` where that is no matter of the version."""

    def __init__(self, what: object, *, is_damaged: bool) -> None:
        super().__init__(what)
        self.is_damaged = is_damaged


def check_cell(folder: Path, key: str, *, kept: bool = False, of_this_version: bool = True) -> dict[str, Any]:
    """What `result.json` says of a finished cell whose tables are whole. Changes nothing.

    Args:
        folder: of the cell.
        key: that it must have, unless it may be of another version.
        kept: check what it keeps beside its tables, too.
        of_this_version: whether it must be of this version.

    Raises:
        Unreadable: if it is damaged or of another version.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise Unreadable("result.json", is_damaged=True) from error
    try:
        if content["format"] != FORMAT:
            raise Unreadable(content["format"], is_damaged=False)
        files = {name: f"{name}.parquet" for name in _TABLES}
        if kept:
            files |= {name: file for name, file in _KEPT.items() if name in content["digests"]}
        for name, file in files.items():
            path = folder / file
            if not path.is_file() or file_digest(path, DIGEST) != content["digests"][name]:
                raise Unreadable(name, is_damaged=True)
        found = RunSpec.from_json(content["spec"]).key
    except (KeyError, TypeError, AttributeError, AglBenchError) as error:
        raise Unreadable(error, is_damaged=False) from error
    if of_this_version and found != key:  # of a version that counted other things into the key, or copied by hand
        raise Unreadable(found, is_damaged=False)
    return content


def read_cell(folder: Path, *, of_this_version: bool = True) -> Result:
    """The finished cell in a folder that is named after its key; see `check_cell`.

    Raises:
        Unreadable: if it is damaged or of another version.
    """
    content = check_cell(folder, folder.name, of_this_version=of_this_version)
    return Result(
        spec=RunSpec.from_json(content["spec"]),
        **{name: pd.read_parquet(folder / f"{name}.parquet") for name in _TABLES},
        **{k: content[k] for k in ("scores", "best_epoch", "counts", "cost", "provenance", "fold")},
    )
