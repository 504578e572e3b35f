"""Digests of files and texts, and files that carry their own: what makes identities and shows damage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SMALL = 2**20  # bytes: read at once, since `hashlib.file_digest` makes a large buffer for each file
TRUST = "AGL_BENCH_TRUST_TIMES"


class NoFile(OSError):
    """What stands in the place of a file is a folder, a pipe, a device or a link: opening it might wait for ever."""


class Damaged(ValueError):
    """A file is not as it was written; says how, after the name of the file."""


@contextlib.contextmanager
def opened(path: Path, *, follow: bool = True) -> Iterator[io.BufferedReader]:
    """A regular file, to be read.

    Args:
        path: of the file.
        follow: a symbolic link to one will do.

    Raises:
        NoFile: if it is something else.
        OSError: if it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):  # a link, a socket; a link on BSD
            raise NoFile(errno.EINVAL, "is not a regular file", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NoFile(errno.EINVAL, "is not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


def file_digest(path: Path, size: int = 10, *, follow: bool = True) -> str:
    """Digest of the content of a file, `size` bytes in hexadecimal; see `opened`."""
    with opened(path, follow=follow) as stream:
        if os.fstat(stream.fileno()).st_size <= _SMALL:
            return bytes_digest(stream.read(), size)
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def read_text(path: Path, *, follow: bool = True) -> str:
    """A text in UTF-8.

    Raises:
        Damaged: if it is none.
        OSError: as `opened`.
    """
    with opened(path, follow=follow) as stream:
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{path.name} is not UTF-8") from None


def read_object(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        Damaged: if the file holds none.
        OSError: as `opened`.
    """
    text = read_text(path, follow=follow)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the latter for [[[[…
        raise Damaged(f"{path.name} is not valid JSON") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path.name} does not hold a JSON object")
    return content


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all that it says, as "digest"."""
    return {**content, "digest": text_digest(json.dumps(content, sort_keys=True))}


def check_signed(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Inverse of `signed`.

    Args:
        content: as it was read.
        name: of its file.

    Raises:
        Damaged: if it says something else than what was signed.
    """
    plain = {key: value for key, value in content.items() if key != "digest"}
    try:
        is_whole = content.get("digest") == text_digest(json.dumps(plain, sort_keys=True))
    except (ValueError, RecursionError):  # half a pair of surrogates; nested almost too deeply to be read
        is_whole = False
    if not is_whole:
        raise Damaged(f"{name} does not match its recorded digest")
    return plain


def read_signed(path: Path) -> dict[str, Any]:
    """What `signed` has made, from a file.

    Raises:
        Damaged: if it is not as it was written.
        OSError: as `opened`.
    """
    return check_signed(read_object(path), path.name)


def bytes_digest(data: bytes | memoryview, size: int = 10) -> str:
    """Digest of a content in memory, that of `file_digest` for a file of it."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def text_digest(text: str, size: int = 10) -> str:
    """Digest of a text, `size` bytes in hexadecimal."""
    return bytes_digest(text.encode(), size)


def set_aside(path: Path, aside: Path) -> None:
    """Move what is damaged out of the way, in place of what was moved there before; another process may be faster."""
    with contextlib.suppress(FileNotFoundError):
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        elif os.path.lexists(aside):
            aside.unlink()
        path.rename(aside)


def trusts_times() -> bool:
    """Whether the user has said that a file of the same size and time is the same file."""
    return os.environ.get(TRUST, "").lower() in ("1", "true", "yes", "on")


class FileDigests:
    """Digests of the content of large files; a file of the same size and time as before is not read again by `of`.

    Args:
        memo: JSON file that remembers them between processes; None = only this object does. It is a cache: nothing
            is lost with it.
    """

    def __init__(self, memo: Path | None = None) -> None:
        self.memo, self._is_new = memo, False
        self._known: dict[str, list[object]] = {}
        self._read: dict[str, list[object]] = {}  # the same of what this object has read itself
        if memo is not None:
            with contextlib.suppress(OSError, Damaged):
                self._known = read_signed(memo)

    def of(self, path: Path) -> str:
        """Digest of a file, as `file_digest`."""
        stamp, name = _stamp(path), str(path.absolute())
        known = self._known.get(name)
        if known is None or known[:2] != stamp:
            known = self._known[name] = self._read[name] = [*stamp, file_digest(path)]
            self._is_new = True
        return str(known[2])

    def forget(self, paths: Iterable[Path]) -> None:
        """Read these files again when they are asked for next."""
        for path in paths:
            for known in (self._known, self._read):
                known.pop(str(path.absolute()), None)

    def now(self, path: Path) -> str:
        """Digest of a file as it is now: read once by this object, whatever its time says, unless times are trusted."""
        if trusts_times():
            return self.of(path)
        stamp, name = _stamp(path), str(path.absolute())
        if self._read.get(name, [])[:2] != stamp:
            self._read[name] = [*stamp, file_digest(path)]
        return str(self._read[name][2])

    def keep(self) -> None:
        """Write what is new to the memo, atomically, where that is possible. Files that are gone are forgotten."""
        if self.memo is None or not self._is_new:
            return
        there = {name: known for name, known in self._known.items() if Path(name).is_file()}
        partial = self.memo.with_name(f"{self.memo.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk or a folder of somebody else: files are read again next time
            self.memo.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(signed(there)), encoding="utf-8")
            partial.replace(self.memo)
            self._is_new = False


def _stamp(path: Path) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
