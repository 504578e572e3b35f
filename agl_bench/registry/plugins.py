"""Find plug-ins, check each one alone, and turn names into classes.

A plug-in that fails in any way (import error, wrong signature, misspelt hook, name clash, wrong type) is disabled as a
whole and remembered in `Plugins.broken`; everything else works. Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pluggy

from agl_bench.digests import file_digest, text_digest
from agl_bench.errors import AglBenchError, BadPlugin, NameTaken, UnknownName
from agl_bench.protocol import preset_names
from agl_bench.registry import hooks

GROUP = "agl_bench"
STRICT = "AGL_BENCH_STRICT_PLUGINS"
KINDS = {"selector": "register_selectors", "backbone": "register_backbones", "dataset": "register_datasets"}
BASES = {"selector": "Selector", "backbone": "Backbone", "dataset": "Dataset"}
RESERVED = ("protocol", *preset_names())
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Entry:
    """A name and what stands behind it; the class is imported by `load`.

    Attributes:
        kind: "selector", "backbone" or "dataset".
        name: as used on the command line.
        provider: distribution and version, or the file.
        target: the class, or "module:Class".
        source: the file it is defined in.
        summary: first line of its docstring.
    """

    kind: str
    name: str
    provider: str
    target: type | str
    source: Path | None
    summary: str

    def load(self) -> type:
        """Import the class and check that it is of its kind.

        Raises:
            BadPlugin: if the import fails or the class is of another kind.
        """
        cls: object = self.target
        if isinstance(self.target, str):
            module, _, attribute = self.target.partition(":")
            try:
                cls = getattr(importlib.import_module(module), attribute)
            except Exception as error:
                raise BadPlugin(
                    f"{self.kind} '{self.name}' of {self.provider} cannot be loaded: {_one_line(error)}"
                ) from error
        base = getattr(importlib.import_module("agl_bench"), BASES[self.kind])
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise BadPlugin(
                f"{self.kind} '{self.name}' of {self.provider} must be a subclass of agl_bench.{base.__name__}, "
                f"got {cls!r}"
            )
        return cls

    def digest(self) -> str:
        """Digest of the source files of the class, of its bases outside agl-bench's core, and of what it takes from
        other modules of its package.

        Part of the identity of every result that used it.
        """
        cls = self.load()
        files = [inspect.getsourcefile(base) for base in cls.__mro__ if _is_specimen(base)]
        files += [file for file in _files_beside(cls) if file not in files]
        return text_digest("".join(file_digest(Path(f), 8) for f in files if f), 8)


@dataclass(frozen=True)
class Broken:
    """A plug-in that was disabled."""

    provider: str
    reason: str


class Plugins:
    """The three registries."""

    def __init__(self) -> None:
        self.broken: list[Broken] = []
        self._entries: dict[str, Entry] = {}

    @classmethod
    def discover(cls, files: Sequence[Path] = (), *, strict: bool | None = None) -> Plugins:
        """Load every entry point of the group `agl_bench`, then the given files.

        Args:
            files: single-file plug-ins. They were asked for by name, so that a broken one is an error.
            strict: make every broken plug-in an error; the default is the environment's `AGL_BENCH_STRICT_PLUGINS`.

        Raises:
            BadPlugin: see `files` and `strict`.
        """
        strict = os.environ.get(STRICT, "") not in ("", "0") if strict is None else strict
        plugins = cls()
        for point in _entry_points():
            provider = f"{point.dist.name} {point.dist.version}" if point.dist else point.name
            try:
                plugins._add(point.load(), provider)
            except (Exception, SystemExit) as error:
                # A stranger's module may raise anything, at import, in a hook or in a __repr__.
                if strict:
                    raise BadPlugin(f"plug-in {provider} ({point.value}): {_one_line(error)}") from error
                plugins.broken.append(Broken(f"{provider} ({point.value})", _one_line(error)))
        for path in files:
            try:
                plugins._add(_import_file(path), path.name)
            except (Exception, SystemExit) as error:
                raise BadPlugin(f"plug-in {path}: {_one_line(error)}") from error
        return plugins

    def names(self, kind: str) -> list[str]:
        """Names of a kind, in the order of registration."""
        return [e.name for e in self._entries.values() if e.kind == kind]

    def entries(self) -> list[Entry]:
        """Everything that is registered."""
        return list(self._entries.values())

    def entry(self, name: str, kind: str | None = None) -> Entry:
        """What stands behind a name.

        Raises:
            UnknownName: with the nearest name, all names of the kind and who provides them.
        """
        found = self._entries.get(name)
        if found is not None and kind in (None, found.kind):
            return found
        known = [e for e in self._entries.values() if kind in (None, e.kind)]
        remedy = f"Provided by {', '.join(dict.fromkeys(e.provider for e in known))}."
        if found is not None:
            remedy += f" '{name}' is a {found.kind}."
        if self.broken:
            remedy += f" Disabled: {', '.join(b.provider for b in self.broken)} (see agl-bench list)."
        raise UnknownName(kind or "plug-in", name, [e.name for e in known], remedy=remedy)

    def _add(self, plugin: object, provider: str) -> None:
        """Check one plug-in alone, then register all of its names or none."""
        manager = pluggy.PluginManager(hooks.PROJECT)
        manager.add_hookspecs(hooks)
        manager.register(plugin)  # raises on a wrong signature
        manager.check_pending()  # raises on a misspelt hook
        if not any(getattr(manager.hook, hook).get_hookimpls() for hook in KINDS.values()):
            raise BadPlugin(f"implements none of {', '.join(KINDS.values())} (is @hookimpl missing?)")
        new: dict[str, Entry] = {}
        for kind, hook in KINDS.items():
            for mapping in getattr(manager.hook, hook)():
                if not isinstance(mapping, dict):
                    raise BadPlugin(f"{hook} must return a dict {{name: class}}, got {type(mapping).__name__}")
                for name, target in mapping.items():
                    entry = _entry(kind, name, provider, target)
                    taken = self._entries.get(entry.name) or new.get(entry.name)
                    if taken is not None:
                        raise NameTaken(entry.name, taken.provider, provider)
                    new[entry.name] = entry
        self._entries |= new


def check_name(name: object) -> str:
    """A name that a plug-in may register.

    Raises:
        BadPlugin: if it is not one.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise BadPlugin(f"{name!r} is not a usable name: lower-case letters, digits, '_' and '-', first a letter")
    if name in RESERVED:
        raise BadPlugin(f"'{name}' is not a usable name: `--set {name}.…` and `show {name}` mean something else")
    return name


def _entry(kind: str, name: object, provider: str, target: object) -> Entry:
    name = check_name(name)
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise BadPlugin(f"{kind} '{name}': there is no module {module}")
        source = Path(spec.origin)
        return Entry(kind, name, provider, target, source, _summary_in(source, attribute))
    base = getattr(importlib.import_module("agl_bench"), BASES[kind])
    if not (isinstance(target, type) and issubclass(target, base)):
        raise BadPlugin(f"{kind} '{name}' must be a subclass of agl_bench.{base.__name__}, got {target!r}")
    source_file = inspect.getsourcefile(target)
    summary = (inspect.getdoc(target) or "").partition("\n")[0] if target.__doc__ else ""
    return Entry(kind, name, provider, target, Path(source_file) if source_file else None, summary)


def _summary_in(source: Path, attribute: str) -> str:
    """First line of a class's docstring, read without importing its module."""
    if source.suffix != ".py":
        return ""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise BadPlugin(f"there is no class {attribute} in {source.name}")


def _entry_points() -> Iterable[EntryPoint]:
    """Each entry point once, agl-bench's own first, the others by name."""
    unique = {(p.name, p.value): p for p in entry_points(group=GROUP)}
    return sorted(unique.values(), key=lambda p: (p.dist is None or p.dist.name != "agl-bench", p.name, p.value))


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadPlugin("no such file")
    name = f"agl_bench_file_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{file_digest(path, 8)[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadPlugin("not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_specimen(cls: type) -> bool:
    """Whether a class belongs to a plug-in, not to Python, torch or the instrument."""
    return cls.__module__.partition(".")[0] not in ("builtins", "abc", "typing", "torch", "agl_bench")


def _files_beside(cls: type) -> list[str]:
    """Source files of the modules whose functions, classes or selves the module of a class uses, within its package."""
    package = cls.__module__.partition(".")[0]
    seen, waiting = {cls.__module__}, [cls.__module__]
    while waiting:
        module = sys.modules.get(waiting.pop())
        for value in vars(module).values() if module else ():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.partition(".")[0] == package and name not in seen:
                seen.add(name)
                waiting.append(name)
    files = (getattr(sys.modules.get(name), "__file__", None) for name in sorted(seen))
    return [file for file in files if file]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"it called sys.exit({text})"
    return text if isinstance(error, AglBenchError) else f"{type(error).__name__}: {text}"
