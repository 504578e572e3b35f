"""Digests of files and texts: what makes identities and shows damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


def file_digest(path: Path, size: int = 10) -> str:
    """Digest of the content of a file, `size` bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def bytes_digest(data: bytes | memoryview, size: int = 10) -> str:
    """Digest of a content in memory, that of `file_digest` for a file of it."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def text_digest(text: str, size: int = 10) -> str:
    """Digest of a text, `size` bytes in hexadecimal."""
    return bytes_digest(text.encode(), size)


class FileDigests:
    """Digests of the content of large files; a file of the same size and time as before is not read again.

    Args:
        memo: JSON file that remembers them between processes; None = only this object does. It is a cache: nothing
            is lost with it.
    """

    def __init__(self, memo: Path | None = None) -> None:
        self.memo, self._is_new = memo, False
        self._known: dict[str, list[object]] = {}
        if memo is not None and memo.is_file():
            try:
                content = json.loads(memo.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = None
            if isinstance(content, dict):
                self._known = {k: v for k, v in content.items() if isinstance(v, list) and len(v) == 3}

    def of(self, path: Path) -> str:
        """Digest of a file, as `file_digest`."""
        status, name = path.stat(), str(path.absolute())
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(name)
        if known is None or known[:2] != stamp:
            known = self._known[name] = [*stamp, file_digest(path)]
            self._is_new = True
        return str(known[2])

    def forget(self, paths: Iterable[Path]) -> None:
        """Read these files again when they are asked for next."""
        for path in paths:
            self._known.pop(str(path.absolute()), None)

    def keep(self) -> None:
        """Write what is new to the memo, atomically, where that is possible. Files that are gone are forgotten."""
        if self.memo is None or not self._is_new:
            return
        there = {name: known for name, known in self._known.items() if Path(name).is_file()}
        partial = self.memo.with_name(f"{self.memo.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk or a folder of somebody else: files are read again next time
            self.memo.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(there), encoding="utf-8")
            partial.replace(self.memo)
            self._is_new = False
