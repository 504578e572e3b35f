"""Versions of the code that decides results: finished cells that another one has made, and the files that differ.

`code/VERSION.json` in the work folder holds a digest of what each deciding file said, for every version that has
finished a cell there.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agl_bench.bench.checkpoints import replace_text
from agl_bench.bench.finished import Unreadable, folders, look
from agl_bench.bench.spec import RunSpec, asked_for, deciding_modules, version_here
from agl_bench.digests import Damaged, read_signed, signed
from agl_bench.registry.meaning import file_meanings

LISTED = 4  # files that a sentence names


@dataclass(frozen=True)
class Version:
    """Another version of the deciding code.

    Attributes:
        version: as cells say it.
        cells: finished ones that it has made.
        files: that do something else here, or are there or here alone; None where this was not recorded.
    """

    version: str
    cells: int
    files: tuple[str, ...] | None


def keep_version(work: Path, version: str) -> None:
    """Note what the deciding files say, once, if they are of the version that a cell says."""
    path = _path(work, version)
    if version == version_here() and _recorded(path) is None:
        with contextlib.suppress(OSError):  # a later sentence names no files then
            _record(path, _files())


def adopt_versions(work: Path, other: Path) -> None:
    """Take over the notes of another work folder; what is damaged stays there."""
    for path in sorted((other / "code").glob("[!.]*.json")):
        files, ours = _recorded(path), work / "code" / path.name
        if files is not None and _recorded(ours) is None:
            _record(ours, files)


def not_reused(work: Path, cells: Sequence[RunSpec]) -> list[Version]:
    """Other versions that have made cells of a grid which are not finished by this one.

    Args:
        work: the work folder.
        cells: of the grid.
    """
    keys = {spec.key for spec in cells}
    finished = {path.name for path in folders(work / "cells")}
    left = {asked_for(spec.as_json()) for spec in cells if spec.key not in finished}
    found = []
    for key in sorted(finished - keys) if left else ():
        try:
            spec = look(work / "cells" / key)["spec"]
            found += [spec] if asked_for(spec) in left else []
        except (Unreadable, KeyError, TypeError):
            continue  # damaged, or of a version that says less
    return others(work, found)


def others(work: Path, specs: Iterable[Mapping[str, Any]]) -> list[Version]:
    """The versions of finished cells, given as JSON, that are not the one here; the most cells first."""
    counts = Counter(str(spec["version"]) for spec in specs)
    if not counts:
        return []
    counts.pop(version_here(), None)
    return [Version(version, count, _differing(_path(work, version))) for version, count in counts.most_common()]


def told(versions: Sequence[Version]) -> str:
    """What a person is told of cells of other versions; there is at least one."""
    count = sum(v.cells for v in versions)
    cells = "1 finished cell was" if count == 1 else f"{count} finished cells were"
    by = "another version" if len(versions) == 1 else f"{len(versions)} other versions"
    files = sorted({file for v in versions for file in v.files or ()})
    which = ""
    if files:
        more = [f"{len(files) - LISTED} more"] if len(files) > LISTED else []
        which = f": {_listed([*files[:LISTED], *more])} differ{'s' if len(files) == 1 else ''}"
    elif all(v.files is None for v in versions):
        which = ", and which files differ is not recorded"
    elif all(v.files == () for v in versions):
        which = ", although no file differs: the release does"
    stay = (
        "it stays in the work folder, and `agl-bench report` shows it in a line of its own"
        if count == 1
        else "they stay in the work folder, and `agl-bench report` shows them in lines of their own"
    )
    return f"{cells} made by {by} of the deciding code and {'is' if count == 1 else 'are'} not reused{which}; {stay}"


def as_json(versions: Iterable[Version]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(version) for version in versions]


def _path(work: Path, version: str) -> Path:
    return work / "code" / f"{version.replace('/', '_')}.json"


def _files() -> dict[str, str]:
    """Digest of what each deciding file says here, by its path from the folder that agl_bench is in."""
    modules = deciding_modules()
    top = next(iter(modules.values())).parents[2]
    return {str(modules[name].relative_to(top)): digest for name, digest in file_meanings(modules).items()}


def _record(path: Path, files: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_text(path, json.dumps(signed(files), indent=1))


def _recorded(path: Path) -> dict[str, str] | None:
    try:
        return read_signed(path)
    except (OSError, Damaged):
        return None


def _differing(path: Path) -> tuple[str, ...] | None:
    there, here = _recorded(path), _files()
    return None if there is None else tuple(n for n in sorted({*there, *here}) if there.get(n) != here.get(n))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
