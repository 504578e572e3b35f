"""Files that commands write: whole or as they were before; where a disk is full, a sentence says what is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from agl_bench.errors import BadSpec, CannotWrite

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(what: object, kept: str = "what was there before is kept") -> Iterator[None]:
    """While something is written.

    Args:
        what: for the sentence.
        kept: likewise: what is not lost, and how to go on.

    Raises:
        CannotWrite: where the disk is full, or the system does not say which file it is about.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # some libraries raise the latter
        number, reason = _reason(error)
        if number not in _FULL and (isinstance(error, RuntimeError) or error.filename is not None):
            raise
        raise CannotWrite(f"{what} cannot be written ({reason}); {kept}") from None


def write_text(path: Path, text: str, kept: str = "what was there before is kept") -> None:
    """Write a file in place of an older one, at once; a device or a pipe is written to as it is.

    Raises:
        CannotWrite: see `writing`.
        OSError: for any other reason.
    """
    with writing(path, kept):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        partial = target.with_name(f".{os.getpid()}.part")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(option: str, file: Path | None) -> None:
    """Raises `BadSpec` before the work and not after it."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise BadSpec(f"{option} {file} cannot be written; name a file in a folder that exists and can be written")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder that is written to later.

    Raises:
        BadSpec: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
        reason = "no permission"
    except OSError as error:
        reason = "a file is there" if error.errno in (errno.EEXIST, errno.ENOTDIR) else str(error.strerror)
    raise BadSpec(f"{option} {folder} cannot be written ({reason}); name a folder that can be made and written")


def _reason(error: Exception) -> tuple[int | None, str]:
    """Number of the system's error, and words for it."""
    number = getattr(error, "errno", None)
    told = re.search(r"errno[ =]+(\d+)", str(error), re.IGNORECASE)  # how HDF5 and Arrow put it into their texts
    number = int(told[1]) if number is None and told else number
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return number, os.strerror(number) if number is not None else lines[0]
