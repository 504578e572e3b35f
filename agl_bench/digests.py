"""Digests of files and texts: what makes identities and shows damage."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_digest(path: Path, size: int = 10) -> str:
    """Digest of the content of a file, `size` bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def text_digest(text: str, size: int = 10) -> str:
    """Digest of a text, `size` bytes in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
