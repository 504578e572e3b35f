"""Which files are opened or looked for while something runs, as Python tells its audit hooks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "glob.glob", "sqlite3.connect")
_watched: list[tuple[Path, list[tuple[str, str]]]] = []  # folders, each with the events in it, and their paths
_installed: list[bool] = []


@contextlib.contextmanager
def opened_in(*folders: Path) -> Iterator[list[tuple[str, str]]]:
    """What is opened or listed inside these folders, as it happens.

    Libraries that open files in C, as HDF5 does, are not seen; what lists a folder first is.
    """
    if not _installed:
        sys.addaudithook(_note)  # there is no way to take a hook back; it does nothing outside
        _installed.append(True)
    found: list[tuple[str, str]] = []
    entries = [(folder.resolve(), found) for folder in folders]
    _watched.extend(entries)
    try:
        yield found
    finally:
        for entry in entries:
            _watched.remove(entry)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if not _watched or event not in _EVENTS or not arguments:
        return
    named = arguments[0]
    if isinstance(named, bytes):
        named = os.fsdecode(named)
    if not isinstance(named, str | os.PathLike):
        return
    path = Path(named).resolve()
    for folder, found in list(_watched):
        if path == folder or folder in path.parents:
            found.append((event, str(path)))
