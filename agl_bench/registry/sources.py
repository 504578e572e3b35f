"""Which files a class of a plug-in is made of: its own, its bases', and what these import of their distribution.

Imports are read from the source and not from what is loaded: a number that a module takes from another one does not say
where it is from, and an import inside a function has not happened yet. What is imported by a computed name is not seen.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from agl_bench.registry.meaning import code_digest
from agl_bench.registry.scopes import imported

_SITE = ("site-packages", "dist-packages")


def source_digest(cls: type, distribution: str = "") -> str:
    """Digest of what all files do that a class is made of, see `meaning`.

    Args:
        cls: of a plug-in.
        distribution: that provides it; "" for a single file.
    """
    return code_digest(source_files(cls, distribution), 8, [(cls.__module__, cls.__qualname__.partition(".")[0])])


def source_files(cls: type, distribution: str = "") -> dict[str, Path]:
    """The files of `source_digest` by the names of their modules: of the class, of its bases, and what they import."""
    bases = [(base.__module__, inspect.getsourcefile(base)) for base in cls.__mro__ if _is_specimen(base)]
    own = {module: Path(file) for module, file in bases if file}
    home = _Home.of(cls.__module__, own.get(cls.__module__), distribution)
    found: dict[str, Path] = {}
    waiting = [(module, path) for module, path in own.items() if home.holds(path)]
    while waiting:
        module, path = waiting.pop()
        for name, file in home.imports(module, path):
            if name not in found and file not in own.values():
                found[name] = file
                waiting.append((name, file))
    return own | found


@dataclass(frozen=True)
class _Home:
    """Where the modules of a distribution lie.

    Attributes:
        folder: from which they are imported.
        top: top-level module of the class.
        distribution: its name, "" for a single file.
    """

    folder: Path
    top: str
    distribution: str

    @classmethod
    def of(cls, module: str, path: Path | None, distribution: str) -> _Home:
        """The home of a class by its module and that module's file."""
        top = module.partition(".")[0]
        outermost = getattr(sys.modules.get(top), "__path__", None)
        if outermost:  # a package
            return cls(Path(next(iter(outermost))).parent, top, distribution)
        return cls(path.parent if path else Path(), top, distribution)

    def holds(self, path: Path) -> bool:
        """Whether a file is of this distribution; the instrument, which has a version of its own, is of none."""
        if not path.is_relative_to(self.folder):
            return False
        inside = path.relative_to(self.folder)
        if inside.parts[0] == "agl_bench":  # installed with our own plug-ins, or copied beside a file
            return False
        if self.folder.name not in _SITE:  # a checkout, or the folder of a single file
            return not any(part in _SITE for part in inside.parts)
        return inside.parts[0].removesuffix(".py") in self._installed

    @cached_property
    def _installed(self) -> set[str]:
        """Top-level modules that the distribution has installed."""
        try:
            files = importlib.metadata.files(self.distribution) if self.distribution else None
        except importlib.metadata.PackageNotFoundError:
            files = None
        return {self.top, *(file.parts[0].removesuffix(".py") for file in files or () if file.suffix == ".py")}

    def imports(self, module: str, path: Path) -> Iterator[tuple[str, Path]]:
        """Modules of this distribution that a module imports anywhere in its source, each with its file."""
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # of a module that nothing has imported yet; its text counts all the same
            return
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [n for _, (base, name) in imported(node, package) for n in (base, f"{base}.{name}")]
            for name in names:
                file = self._file(name)
                if file is not None:
                    yield name, file

    def _file(self, name: str) -> Path | None:
        place = self.folder.joinpath(*name.split("."))
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if name and file.is_file() and self.holds(file):
                return file
        return None


def _is_specimen(cls: type) -> bool:
    """Whether a class belongs to a plug-in, not to Python, torch or the instrument."""
    return cls.__module__.partition(".")[0] not in ("builtins", "abc", "typing", "torch", "agl_bench")
