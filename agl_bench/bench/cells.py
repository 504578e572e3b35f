"""The cell store: one folder per finished cell, written atomically. It is the truth; everything else shows it.

Several processes, of several machines where the folder is shared, may work on one store.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import torch

from agl_bench.addresses import masked
from agl_bench.bench.checkpoints import Partial, flush, read_spec, replace_text
from agl_bench.bench.finished import (
    KEPT,
    Unreadable,
    check_cell,
    check_files,
    files_of,
    folders,
    kept_of,
    look,
    of_earlier_version,
    read_cell,
    read_kept,
    with_tables,
    write_cell,
)
from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.leases import Leases, Owner, is_stale
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.bench.status import Place
from agl_bench.bench.versions import keep_version
from agl_bench.digests import Damaged, NoFile, opened, read_object, read_text, set_aside, text_digest
from agl_bench.errors import BadSpec, BadWorkFolder, NotKept, UnknownName

T = TypeVar("T")
Status = Literal["failed", "diverged"]


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
            BadWorkFolder: if they cannot be created or written, or no library could write a table there.
        """
        try:
            os.fsencode(work).decode("utf-8")
        except UnicodeDecodeError:
            raise BadWorkFolder(
                f"the work folder's name {os.fsencode(work)!r} is not UTF-8; rename it, or choose another with --work"
            ) from None
        self.work, self.cells, self.failed, self.folds = work, work / "cells", work / "failed", work / "folds"
        self.partial, self.leases, self.grids = work / "partial", Leases(work / "leases"), work / "grids"
        self.owner, self.warn = Owner.this(), warn
        self._unsigned: set[str] | None = set()  # keys; None = it has been told
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

        def read(folder: Path) -> Result:
            content = check_cell(folder, key)
            self._note(content, key)
            return with_tables(folder, content)

        return self._whole(key, read)

    def _note(self, content: dict[str, Any], key: str) -> None:
        """Remember what `tell_unsigned` tells."""
        if "unsigned" in content and self._unsigned is not None:
            self._unsigned.add(key)

    def tell_unsigned(self) -> None:
        """Say once, when all cells have been read, how many of them carry no signature."""
        if self._unsigned:
            self.warn(of_earlier_version(len(self._unsigned)))
            self._unsigned = None

    def _whole(self, key: str, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of the folder of a cell; None where it is absent, damaged or of another version."""
        folder = self.cells / key
        if not os.path.lexists(folder):
            return None
        try:
            try:
                return read(folder)
            except Unreadable as error:
                if not error.is_damaged:
                    return None
                return read(folder)  # it may have been replaced while it was read
        except Unreadable as error:
            if error.is_damaged and os.path.lexists(folder):
                aside = self.cells / f".damaged-{key}"
                set_aside(folder, aside)
                self.warn(f"the result of cell {key} is damaged ({error}); set aside as {aside}, to be computed again")
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
        for folder in folders(self.cells):
            result = self.read(folder.name)
            if result is not None:
                yield result
        self.tell_unsigned()

    def glances(self) -> Iterator[dict[str, Any]]:
        """What `result.json` says of every finished cell that is whole, with "key", as `finished.look`.

        The tables are compared with their digests and not read; damaged cells are set aside.
        """

        def glance(folder: Path) -> dict[str, Any]:
            content = look(folder)
            check_files(folder, content)
            self._note(content, folder.name)
            return content | {"key": folder.name}

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # digests let other threads go on
            found = pool.map(lambda folder: self._whole(folder.name, glance), folders(self.cells))
            yield from (content for content in found if content is not None)
        self.tell_unsigned()

    def find(self, text: str) -> str:
        """Key of the finished cell that is called so, by its key or the beginning of it.

        Raises:
            UnknownName: if there is none.
            BadSpec: if several begin so.
        """
        keys = [folder.name for folder in folders(self.cells)]
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
            return kept_of(look(self.cells / key))
        except Unreadable:
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
        remedy = f"`agl-bench rerun {key} --keep {what} --work {self.work}` runs the cell again and keeps it"
        folder = self.cells / key
        if not folder.is_dir():
            raise NotKept(f"there is no finished cell {key} in {self.cells}")
        try:
            content = look(folder)
            if what not in kept_of(content):
                raise NotKept(f"cell {key} did not keep its {what}; {remedy}")
            return read_kept(folder, content, what)
        except Unreadable as error:
            raise NotKept(f"cell {key} is damaged ({error}); run its campaign again") from None
        except FileNotFoundError as error:
            raise NotKept(f"{Path(error.filename).name} of cell {key} is missing; {remedy}") from None
        except (NoFile, Damaged):
            raise NotKept(f"{KEPT[what]} of cell {key} is damaged; {remedy}") from None

    def write(self, result: Result) -> None:
        """Keep a finished cell, in place of an older one.

        Raises:
            OSError: if it cannot be written, e.g. for want of space; then nothing has changed.
        """
        keep_version(self.work, result.spec.version)
        self._publish(result.spec.key, lambda fresh: write_cell(result, fresh))

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
            for name in ("result.json", *files_of(look(folder))):
                try:
                    shutil.copyfile(folder / name, fresh / name, follow_symlinks=False)
                except (FileNotFoundError, shutil.SpecialFileError) as error:
                    raise Unreadable(f"{name} is missing or not a regular file", is_damaged=True) from error
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
        """Keep a fold, as CSV, under its digest; one that is there already stays as it is, unless it is damaged."""
        path = self.folds / f"{text_digest(table)}.csv"
        with contextlib.suppress(FileNotFoundError):
            if read_fold(path) == table:
                return
            aside = path.with_suffix(".damaged")
            set_aside(path, aside)
            self.warn(f"the fold {path} is damaged; it was set aside as {aside.name} and written again")
        partial = path.with_name(f"{path.name}.{self.owner.name}")
        partial.write_text(table, encoding="utf-8")
        flush(partial)
        partial.replace(path)

    def write_failure(self, spec: RunSpec, sentence: str, trace: str, status: Status = "failed") -> Path:
        """Keep what is known of a failed cell, without the secrets of addresses in it."""
        sentence, trace = masked(sentence), masked(trace)
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
            with opened(folder / name) as source:
                replace_text(copy / name, source.read().decode("utf-8", errors="replace"))

    def failure(self, key: str) -> Failure | None:
        """How a cell failed; None if it did not, or if what is known of it is not whole."""
        return read_failure(self.failed / key)

    def failures(self) -> Iterator[tuple[str, dict[str, Any], Failure]]:
        """Key, spec as JSON and failure of every cell that failed, in the order of their keys."""
        for folder in sorted(self.failed.iterdir()):
            failure, spec = self.failure(folder.name), read_spec(folder)
            if failure is not None and spec is not None:
                yield folder.name, spec, failure
            elif os.path.lexists(folder / "failure.json"):  # which is written last
                why = "damaged" if failure is None else "damaged or of another version"
                self.warn(f"the failure record in {folder} is {why} and ignored; the next run tries the cell again")

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
        content = read_object(folder / "failure.json")
        status: Status = "diverged" if content["status"] == "diverged" else "failed"
        return Failure(status, str(content["sentence"]), folder / "error.txt")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_fold(path: Path) -> str | None:
    """A kept fold as CSV; None if it is not as it was written.

    Raises:
        FileNotFoundError: if it is not there.
    """
    try:
        table = read_text(path)
    except (Damaged, NoFile):
        return None
    return table if text_digest(table) == path.stem else None
