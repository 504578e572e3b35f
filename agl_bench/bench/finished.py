"""The folder of a finished cell: what is in it, and whether it is as it was written. Only `write_cell` writes.

`cells/<key>/` holds result.json and the tables, and what else the cell keeps. result.json carries its own digest, and
size and digest of every file beside it. What it does not name is nobody's business: it is neither read nor copied. A
symbolic link in the place of a file is damage. Every reader of cells comes through `look`, `check_cell` or `read_cell`.
"""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch

from agl_bench.bench.checkpoints import flush
from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec, is_typed
from agl_bench.bench.table_types import check_types
from agl_bench.digests import Damaged, NoFile, bytes_digest, check_signed, file_digest, opened, read_object, signed
from agl_bench.errors import AglBenchError

FORMAT = 3
UNSIGNED = 2  # format of earlier versions: no digest of result.json itself
DIGEST = 16  # bytes of a file's digest; part of the format
TABLES = ("genes", "epochs", "outer")
KEPT = {"predictions": "predictions.parquet", "model": "model.pt"}  # what a cell may keep beside its tables
_FILES = {*(f"{name}.parquet" for name in TABLES), *KEPT.values()}
_RESULT = "result.json"
_NUMBERS, _NAMES = ("scores", "counts", "cost"), ("spec", "provenance", "fold")  # of result.json, all objects
Files = dict[str, tuple[int | None, str]]  # name -> size, None where an earlier version has not noted it, and digest


class Unreadable(Exception):
    """A folder holds no finished cell that can be read; `is_damaged` where that is no matter of the version."""

    def __init__(self, what: object, *, is_damaged: bool) -> None:
        super().__init__(what)
        self.is_damaged = is_damaged


def write_cell(result: Result, folder: Path) -> None:
    """Write a finished cell into a folder that is not there yet, and see it to the disk.

    Raises:
        OSError: where it cannot be written.
    """
    folder.mkdir()
    for name in TABLES:
        getattr(result, name).to_parquet(folder / f"{name}.parquet", index=False)
    if result.predictions is not None:
        result.predictions.to_parquet(folder / KEPT["predictions"], index=False)
    if result.model is not None:
        stream = io.BytesIO()  # torch's own writer aborts the process where a disk is full
        torch.save(result.model.state(), stream)
        (folder / KEPT["model"]).write_bytes(stream.getbuffer())
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
        "files": {p.name: (p.stat().st_size, file_digest(p, DIGEST)) for p in sorted(folder.iterdir())},
    }
    plain = json.loads(json.dumps(content))  # what will be read, e.g. with lists for tuples
    (folder / _RESULT).write_text(json.dumps(signed(plain), indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def look(folder: Path) -> dict[str, Any]:
    """What result.json says of a finished cell, with "unsigned" where that is of a version without signatures.

    Light: of its tables, only kind and size are looked at. Changes nothing.

    Raises:
        Unreadable: if it is damaged, or of a version that is too different.
    """
    try:
        if folder.is_symlink() or not folder.is_dir():
            raise Damaged("it is not a folder")
        content = read_object(folder / _RESULT, follow=False)
        version = content.get("format")
        if version == FORMAT or "digest" in content:
            content = check_signed(content, _RESULT)
        elif version == UNSIGNED:
            content = _of_earlier_version(folder, content)
        if version not in (FORMAT, UNSIGNED):
            raise Unreadable(f"its format is {version}", is_damaged=False)
        if not {f"{name}.parquet" for name in TABLES} <= files_of(content).keys() <= _FILES:
            raise Damaged(f"{_RESULT} does not name the files of a cell")
        for name, (size, _) in files_of(content).items():
            if name in KEPT.values():
                continue  # it may be gone to make room, and no result hangs on it: who asks for it is told
            status = (folder / name).lstat()
            if not stat.S_ISREG(status.st_mode) or size not in (None, status.st_size):
                raise Damaged(f"{name} is not a regular file of the recorded size")
    except (FileNotFoundError, NotADirectoryError, NoFile, Damaged) as error:
        raise Unreadable(_reason(error), is_damaged=True) from error
    return content


def _of_earlier_version(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a result.json that says less of itself; its shape has to do for a digest."""
    try:
        epochs, best = content.get("epochs"), content["best_epoch"]
        if epochs is None:  # of the time when the file did not say so
            with opened(folder / "epochs.parquet", follow=False) as stream, pq.ParquetFile(stream) as table:
                # threads would cost more than they save
                selected = table.read(columns=["selected"], use_threads=False)["selected"]
                content |= {"selected": int(selected[best].as_py()), "epochs": len(selected)}
        digests = content["digests"]
        is_sound = all(_is_number(v) for name in _NUMBERS for v in content[name].values())
        is_sound &= all(isinstance(content[name], dict) for name in _NAMES)
        is_sound &= is_typed(content["spec"])
        is_sound &= all(isinstance(content[name], int) for name in ("best_epoch", "selected", "epochs"))
        is_sound &= all(isinstance(digests[name], str) for name in (*TABLES, *digests))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{_RESULT} is incomplete ({_reason(error)})") from error
    if not is_sound:
        raise Damaged(f"{_RESULT} has values of the wrong type")
    return content | {"unsigned": True}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def files_of(content: dict[str, Any]) -> Files:
    """The files of a cell beside its result.json, by what that says."""
    if "files" in content:
        return {name: (size, digest) for name, (size, digest) in content["files"].items()}
    return {KEPT.get(what, f"{what}.parquet"): (None, digest) for what, digest in content["digests"].items()}


def check_cell(folder: Path, key: str, *, kept: bool = False, of_this_version: bool = True) -> dict[str, Any]:
    """What result.json says of a finished cell whose tables are whole, as `look`. Changes nothing.

    Args:
        folder: of the cell.
        key: that it must have, unless it may be of another version.
        kept: check what it keeps beside its tables, too.
        of_this_version: whether it must be of this version.

    Raises:
        Unreadable: if it is damaged or of another version.
    """
    content = look(folder)
    check_files(folder, content, kept=kept)
    try:
        found = RunSpec.from_json(content["spec"]).key
    except (KeyError, TypeError, ValueError, AttributeError, AglBenchError) as error:
        raise Unreadable(error, is_damaged=False) from error
    if of_this_version and found != key:  # of a version that counted other things into the key, or copied by hand
        raise Unreadable(f"its content belongs to key {found}", is_damaged=False)
    return content


def check_files(folder: Path, content: dict[str, Any], *, kept: bool = False) -> None:
    """Compare the files of a cell with digests and `table_types`: of its tables, with `kept` of all.

    Raises:
        Unreadable: if one is not as it was written, or no table of ours.
    """
    for name, (_, digest) in files_of(content).items():
        if kept or name not in KEPT.values():
            try:
                is_whole = file_digest(folder / name, DIGEST, follow=False) == digest
            except (FileNotFoundError, NoFile):
                is_whole = False
            if not is_whole:
                raise Unreadable(f"{name} does not match its recorded digest", is_damaged=True)
            if name.endswith(".parquet"):
                _check_types(folder / name)


def _check_types(table: Path) -> None:
    try:
        check_types(table)
    except (Damaged, OSError) as error:
        raise Unreadable(_reason(error), is_damaged=True) from error


def read_cell(folder: Path, *, of_this_version: bool = True) -> Result:
    """The finished cell in a folder that is named after its key; see `check_cell`.

    Raises:
        Unreadable: if it is damaged or of another version.
    """
    return with_tables(folder, check_cell(folder, folder.name, of_this_version=of_this_version))


def with_tables(folder: Path, content: dict[str, Any]) -> Result:
    """What `check_cell` has found, with its tables."""
    return Result(
        spec=RunSpec.from_json(content["spec"]),
        **{name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES},
        **{k: content[k] for k in ("scores", "best_epoch", "counts", "cost", "provenance", "fold")},
    )


def kept_of(content: dict[str, Any]) -> frozenset[str]:
    """What a finished cell keeps beside its tables, by what its result.json says."""
    return frozenset(what for what, name in KEPT.items() if name in files_of(content))


def read_kept(folder: Path, content: dict[str, Any], what: str) -> bytes:
    """A file that a cell has kept, as it was written.

    Raises:
        Damaged: if it is not.
        OSError: if it cannot be read.
    """
    with opened(folder / KEPT[what], follow=False) as stream:
        data = stream.read()
    if bytes_digest(data, DIGEST) != files_of(content)[KEPT[what]][1]:
        raise Damaged(f"{KEPT[what]} does not match its recorded digest")
    return data


def of_earlier_version(count: int) -> str:
    """What a person is told of cells without signature."""
    cells = "1 cell of an earlier version has" if count == 1 else f"{count} cells of an earlier version have"
    return f"{cells} no digest of result.json; such cells are read as usual, but damage to that file may go unnoticed"


def folders(cells: Path) -> Iterator[Path]:
    """What stands for a cell each, in the order of their keys; what is set aside or being written does not."""
    return (path for path in sorted(cells.glob("[!.]*")) if path.is_symlink() or path.is_dir())


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        name = Path(error.filename).name if error.filename else ""
        return f"{name} {error.strerror}" if isinstance(error, NoFile) else f"{name} is missing"
    return str(error) or type(error).__name__
