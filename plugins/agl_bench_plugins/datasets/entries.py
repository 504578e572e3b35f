"""What a folder of data holds, without what systems and programs leave there."""

from __future__ import annotations

from pathlib import Path

_LITTER = (
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
)
_UNFINISHED = (".lock", ".tmp", ".part", ".partial", ".crdownload", "~")  # of a file that is written or downloaded


def is_data(path: Path) -> bool:
    """Whether a name is one that a person gives to data: not hidden, not a lock, not a system's own."""
    name = path.name.casefold()
    return not name.startswith((".", "~$")) and not name.endswith(_UNFINISHED) and name not in _LITTER


def entries(folder: Path) -> list[Path]:
    """The files and folders in a folder that are data, sorted."""
    return sorted(path for path in folder.iterdir() if is_data(path))
