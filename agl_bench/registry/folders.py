"""A distribution that is not installed: what its pyproject.toml registers, imported from its folder."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from agl_bench.errors import BadPlugin

PROJECT_FILE = "pyproject.toml"


@dataclass(frozen=True)
class Folder:
    """The folder of a distribution.

    Attributes:
        path: of the folder.
        name, version: of the distribution; the version is "" where the build decides it.
        points: its entry points of the group.
    """

    path: Path
    name: str
    version: str
    points: tuple[EntryPoint, ...]

    @classmethod
    def at(cls, path: Path, group: str) -> Folder:
        """Read its pyproject.toml.

        Raises:
            BadPlugin: if there is none, or it registers nothing in the group.
        """
        file = path / PROJECT_FILE
        if not file.is_file():
            raise BadPlugin(f"it has no {PROJECT_FILE}; give the folder of a distribution, or a .py file")
        try:
            project = _table(tomllib.loads(file.read_text(encoding="utf-8")), "project")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadPlugin(f"{PROJECT_FILE} is not valid TOML: {error}") from None
        named = _table(_table(project, "entry-points"), group)
        if not named:
            raise BadPlugin(
                f'{PROJECT_FILE} registers nothing; add [project.entry-points.{group}] with NAME = "package"'
            )
        about = {"name": path.name, "version": ""} | {k: v for k, v in project.items() if k in ("name", "version")}
        for name, value in (*about.items(), *named.items()):
            if not isinstance(value, str):
                raise BadPlugin(f"{PROJECT_FILE}: {name} = {value!r} has to be a text")
        points = tuple(EntryPoint(name, value, group) for name, value in named.items())
        return cls(path, about["name"], about["version"], points)

    @property
    def provider(self) -> str:
        """As of an installed distribution."""
        return f"{self.name} {self.version}".strip()

    def is_also(self, distribution: str) -> bool:
        """Whether an installed distribution of this name is the same one."""
        return _plain(self.name) == _plain(distribution)

    def expose(self) -> None:
        """Put its source folder before all others on the path of imports, where it stays.

        Raises:
            BadPlugin: if a module is not in it.
        """
        for point in self.points:
            top = point.module.partition(".")[0]
            places = [place for place in (self.path / "src", self.path) if _holds(place, top)]
            if not places:
                raise BadPlugin(f"{PROJECT_FILE} registers {point.value}, and neither src/{top} nor {top} is there")
            place = str(places[0].resolve())
            if place not in sys.path:
                sys.path.insert(0, place)


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, dict):
        raise BadPlugin(f"{PROJECT_FILE}: {name} has to be a table and is {found!r}")
    return found


def _holds(place: Path, module: str) -> bool:
    return (place / module).is_dir() or (place / f"{module}.py").is_file()


def _plain(name: str) -> str:
    """Of a distribution, as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
