"""MLflow's SQLite database: it appears whole, by one rename, and its schema is never changed in place.

MLflow makes and migrates a database step by step in the live file. Where that is cut short, nothing can read the file
any more; where two processes do it at once, all but one fail. Here both happen on a file beside it, under the lock of
`mlflow_tracker`, and the result is moved into place. What is damaged is set aside: cells are the truth.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import sqlalchemy
from mlflow.store.db import utils as schema  # MLflow has no public door to this but `mlflow db upgrade`, which is these

from agl_bench.errors import TrackerUnavailable

_SIDECARS = ("-journal", "-wal", "-shm")  # that SQLite keeps beside a database
_NO_DAMAGE = frozenset(  # SQLite's codes for what a disk, a permission or another process is the reason of
    {
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY),
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM),
    }
)
_PATIENCE = 20.0  # seconds that another process may keep the database locked
_State = Literal["absent", "ready", "older", "newer", "damaged"]
_held: dict[Path, IO[bytes]] = {}  # marks of use, until this process ends


def make_ready(database: Path, *, is_ours: bool, warn: Callable[[str], None]) -> None:
    """Have a database with the schema of this MLflow, and mark it as in use until this process ends.

    To be called by one process at a time.

    Args:
        database: its file; need not be there.
        is_ours: it is that of a work folder, which `agl-bench sync` can make anew.
        warn: told, in one sentence, what was damaged and set aside.

    Raises:
        TrackerUnavailable: if it cannot be used, or is not ours and damaged.
        OSError, sqlalchemy.exc.SQLAlchemyError: if it cannot be written.
    """
    database = Path(os.path.realpath(database))
    if database.exists() and not database.is_file():
        raise TrackerUnavailable(f"{database} is not a file, so it cannot be an MLflow database; move it away")
    fresh = database.with_name(f".{database.name}.new")
    _remove(fresh)  # of a process that was killed
    try:
        state = _state(database)
        if state == "older":
            state = _migrate(database, fresh)
        if state == "newer":
            raise TrackerUnavailable(
                f"{database} was made by a newer MLflow; upgrade mlflow, or move the file away and run `agl-bench "
                "sync` to rebuild it from the finished cells"
            )
        if state == "damaged":
            _set_aside(database, is_ours, warn)
        if state in ("absent", "damaged"):
            _remove(fresh)  # a copy that could not be migrated
            _upgrade(fresh)
            _move(fresh, database)
    finally:
        _remove(fresh)
    _mark(database)


def _state(database: Path) -> _State:
    if not database.exists() or not database.stat().st_size:  # SQLite leaves an empty file where it was killed early
        return "absent"
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=_PATIENCE)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",) or "experiments" not in tables:
                return "damaged"
        engine = _engine(database)
        revision, latest = schema._get_schema_version(engine), schema._get_latest_schema_revision()
    except (sqlite3.DatabaseError, sqlalchemy.exc.DatabaseError) as error:
        return _damaged_by(error)
    if revision == latest:
        return "ready" if schema._all_tables_exist(engine) else "damaged"
    return "older"


def _migrate(database: Path, fresh: Path) -> _State:
    """Bring a copy up to date and put it in place; what cannot be migrated was cut short while it was made."""
    with (_users(database)).open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrackerUnavailable(
                f"{database} was made by an older MLflow and is in use by another agl-bench process; end that process "
                "and repeat the command, which then upgrades the database"
            ) from None
        try:
            with (
                contextlib.closing(sqlite3.connect(database, timeout=_PATIENCE)) as source,
                contextlib.closing(sqlite3.connect(fresh)) as copy,
            ):
                source.backup(copy)
            _upgrade(fresh)
        except (sqlite3.DatabaseError, sqlalchemy.exc.DatabaseError) as error:
            return _damaged_by(error)
        except Exception as error:  # alembic has errors of its own
            if "Can't locate revision" in str(error):
                return "newer"
            raise
        _move(fresh, database)
    return "ready"


def _upgrade(database: Path) -> None:
    """Make or migrate the tables."""
    engine = _engine(database)
    if schema._is_empty_database(engine):
        schema._initialize_tables(engine)
    else:
        schema._upgrade_db(engine)


def _engine(database: Path) -> sqlalchemy.Engine:
    """Whose connections close the file again."""
    address = sqlalchemy.URL.create("sqlite", database=str(database))
    return sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)


def _damaged_by(error: Exception) -> Literal["damaged"]:
    """What an error says of the database; raises it where it is about the disk, permissions or another process."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _NO_DAMAGE:
        raise error
    return "damaged"


def _set_aside(database: Path, is_ours: bool, warn: Callable[[str], None]) -> None:
    if not is_ours:
        raise TrackerUnavailable(
            f"{database} is damaged, incomplete or not an MLflow database; name another, or move it away and run "
            "`agl-bench sync` to rebuild it from the finished cells"
        )
    number = 1
    while (aside := database.with_name(f"{database.name}.damaged-{number}")).exists():
        number += 1
    for end in _SIDECARS:
        if database.with_name(database.name + end).exists():
            database.with_name(database.name + end).rename(aside.with_name(aside.name + end))
    database.rename(aside)
    warn(
        f"{database} is damaged or incomplete and was set aside as {aside.name}; `agl-bench sync --work "
        f"{database.parent}` rebuilds it from the finished cells"
    )


def _move(fresh: Path, database: Path) -> None:
    """Put a database that is whole in its place; what SQLite has left of an older one would spoil it."""
    with fresh.open("rb") as handle:
        os.fsync(handle.fileno())
    for end in _SIDECARS:
        database.with_name(database.name + end).unlink(missing_ok=True)
    fresh.replace(database)


def _remove(database: Path) -> None:
    for end in ("", *_SIDECARS):
        database.with_name(database.name + end).unlink(missing_ok=True)


def _users(database: Path) -> Path:
    """Locked, shared, by everyone who has the database open."""
    return database.with_name(f".{database.name}.users")


def _mark(database: Path) -> None:
    if database not in _held:
        _held[database] = _users(database).open("ab")
        fcntl.flock(_held[database], fcntl.LOCK_SH)
