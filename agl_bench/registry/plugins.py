"""Find plug-ins, check each one alone, and turn names into classes.

A plug-in that fails in any way (import error, wrong signature, misspelt hook, name clash, wrong type, another API) is
disabled as a whole and remembered in `Plugins.broken`; everything else works. One that works and misbehaves (a slow
import, prints, settings of the process that it changes, a second version of it) works on, and `Plugins.remarks` says
so. Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pluggy

from agl_bench import API_VERSION
from agl_bench.digests import file_digest
from agl_bench.errors import AglBenchError, BadPlugin, NameTaken, UnknownName, told
from agl_bench.protocol import preset_names
from agl_bench.registry import hooks, stated, watch
from agl_bench.registry.folders import Folder
from agl_bench.registry.sources import source_digest
from agl_bench.registry.strangers import OURS, importing, raise_if_ours

GROUP = "agl_bench"
OWN = "agl-bench"  # the distribution whose plug-ins are not a stranger's
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
        version: of the distribution; "" for a file.
        stated: what the class says of itself, see `registry.stated`.
    """

    kind: str
    name: str
    provider: str
    target: type | str
    source: Path | None
    summary: str
    version: str = ""
    stated: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def is_own(self) -> bool:
        """Whether agl-bench brings it; all others are strangers, and their code may do anything."""
        return bool(self.version) and self.provider == f"{OWN} {self.version}"

    def load(self) -> type:
        """Import the class and check that it is of its kind.

        What its module prints goes to standard error, and settings of the process that it changes are put back.

        Raises:
            BadPlugin: if the import fails or the class is of another kind.
        """
        cls: object = self.target
        if isinstance(self.target, str):
            module, _, attribute = self.target.partition(":")
            try:
                cls = getattr(_imported(module, self.provider), attribute)
            except BaseException as error:
                raise_if_ours(error)
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
        """Digest of the source files of the class, its bases, and all that they import of their distribution.

        Part of the identity of every result that used it.
        """
        return source_digest(self.load(), self.provider.removesuffix(self.version).rstrip() if self.version else "")


@dataclass(frozen=True)
class Broken:
    """A plug-in that was disabled."""

    provider: str
    reason: str


@dataclass(frozen=True)
class Remark:
    """Something about a plug-in that works. A fault is an error where plug-ins are taken strictly."""

    provider: str
    sentence: str
    is_fault: bool = False


class Plugins:
    """The three registries."""

    def __init__(self) -> None:
        self.broken: list[Broken] = []
        self.remarks: list[Remark] = []
        self.files: tuple[Path, ...] = ()
        self._entries: dict[str, Entry] = {}

    @classmethod
    def discover(cls, files: Sequence[Path] = (), *, strict: bool | None = None) -> Plugins:
        """Load every entry point of the group `agl_bench`, then the given files.

        Args:
            files: single-file plug-ins, and folders of distributions that are not installed (or not as they are
                there). They were asked for by name, so that a broken one is an error.
            strict: make every broken plug-in and every fault an error; the default is the environment's
                `AGL_BENCH_STRICT_PLUGINS`.

        Raises:
            BadPlugin: see `files` and `strict`.
        """
        strict = _is_strict() if strict is None else strict
        plugins, files = cls(), tuple(dict.fromkeys(files))
        plugins.files = files
        folders = {path: _folder_at(path) for path in files if path.is_dir()}
        for point in _entry_points():
            if point.dist and any(folder.is_also(point.dist.name) for folder in folders.values()):
                continue  # it is looked at as it is in its folder
            provider = f"{point.dist.name} {point.dist.version}" if point.dist else point.name
            try:
                with plugins._remarking(provider, strict):
                    plugins._check_api(_source_of(point), provider)
                    plugins._add(point.load(), provider, point.dist.version if point.dist else "")
                    plugins._check_versions(point, provider)
            except BaseException as error:
                # A stranger's module may raise anything, at import, in a hook or in a __repr__.
                raise_if_ours(error)
                if strict:
                    raise BadPlugin(f"plug-in {provider} ({point.value}): {_one_line(error)}") from error
                plugins.broken.append(Broken(f"{provider} ({point.value})", _one_line(error)))
        for path in files:
            try:
                if folder := folders.get(path):
                    folder.expose()
                    with plugins._remarking(folder.provider, strict):
                        for point in folder.points:
                            plugins._check_api(_source_of(point), folder.provider)
                            plugins._add(point.load(), folder.provider, folder.version)
                else:
                    with plugins._remarking(path.name, strict):
                        if path.is_file():
                            plugins._check_api(path, path.name)
                        plugins._add(_import_file(path), path.name)
            except BaseException as error:
                raise_if_ours(error)
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

    @contextlib.contextmanager
    def _remarking(self, provider: str, strict: bool) -> Iterator[None]:
        """Watch a plug-in while it is loaded and remark on what it did, unless it turns out to be broken.

        Raises:
            BadPlugin: for a fault, if `strict`.
        """
        with importing(provider), watch.watched() as seen:
            yield
        if seen.seconds > watch.SLOW and not provider.endswith(".py"):  # a single file has no other module to wait in
            self.remarks.append(
                Remark(
                    provider,
                    f"takes {seen.seconds:.1f} s to import, and every command waits for it; let its hooks return "
                    'texts, "package.module:Class", and import what is heavy in that module',
                )
            )
        if seen.printed.strip():
            first = seen.printed.strip().splitlines()[0][:60]
            self.remarks.append(Remark(provider, f"prints to standard output at import ('{first}'); not shown"))
        if seen.changed:
            self.remarks.append(Remark(provider, _of_changes(seen.changed), is_fault=True))
        for remark in self.remarks:
            if strict and remark.is_fault:
                raise BadPlugin(remark.sentence)

    def _check_api(self, source: Path | None, provider: str) -> None:
        """Whether a plug-in is written for this version of the interface; looks before it is imported.

        Raises:
            BadPlugin: if it is written for another one.
        """
        wanted = stated.api_of(source) if source is not None else ""
        if not wanted:
            return
        if not re.fullmatch(r"\d+\.\d+", wanted):
            raise BadPlugin(f"{stated.API} = '{wanted}' is not a version such as 1.0")
        (major, minor), (our_major, our_minor) = (map(int, v.split(".")) for v in (wanted, API_VERSION))
        if major != our_major or minor > our_minor + 1:
            older = " or a newer version of the plug-in" if major < our_major else " or an older version of the plug-in"
            remedy = "install an older agl-bench" if major < our_major else "upgrade agl-bench"
            raise BadPlugin(f"needs agl-bench API {wanted}, this is {API_VERSION}; {remedy}{older}")
        if minor > our_minor:
            self.remarks.append(
                Remark(
                    provider,
                    f"is written for agl-bench API {wanted}, this is {API_VERSION}: what is new there is not here; "
                    "upgrade agl-bench",
                )
            )

    def _check_versions(self, point: EntryPoint, provider: str) -> None:
        """Remark where several versions of a distribution are installed: one is listed, another may be imported."""
        if point.dist is None:
            return
        found = importlib.metadata.distributions(name=point.dist.name)
        versions = list(dict.fromkeys(d.version for d in found if d.version))
        if len(versions) > 1:
            sentence = (
                f"is installed in {len(versions)} versions ({', '.join(versions)}), and which one runs is not certain; "
                f"pip uninstall {point.dist.name} until none is left, and install one"
            )
            self.remarks.append(Remark(provider, sentence, is_fault=True))

    def _add(self, plugin: object, provider: str, version: str = "") -> None:
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
                    entry = _entry(kind, name, provider, target, version)
                    if entry.name in new:
                        raise BadPlugin(f"registers '{name}' twice, as {new[entry.name].kind} and as {kind}")
                    taken = self._entries.get(entry.name)
                    if taken is not None:
                        raise NameTaken(entry.name, taken.provider, provider)
                    new[entry.name] = entry
        self._entries |= new


def are_strangers_there(files: Sequence[Path] = ()) -> bool:
    """Whether there is any plug-in that agl-bench does not bring; nothing is imported to find out."""
    return bool(files) or any(point.dist is None or point.dist.name != OWN for point in _entry_points())


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


def _entry(kind: str, name: object, provider: str, target: object, version: str) -> Entry:
    name = check_name(name)
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise BadPlugin(f"{kind} '{name}': there is no module {module}")
        source = Path(spec.origin)
        summary, says = stated.of_source(source, attribute, kind)
        return Entry(kind, name, provider, target, source, summary, version, says)
    base = getattr(importlib.import_module("agl_bench"), BASES[kind])
    if not (isinstance(target, type) and issubclass(target, base)):
        raise BadPlugin(f"{kind} '{name}' must be a subclass of agl_bench.{base.__name__}, got {target!r}")
    source_file = inspect.getsourcefile(target)
    summary, says = stated.of_class(target, kind)
    return Entry(kind, name, provider, target, Path(source_file) if source_file else None, summary, version, says)


def _source_of(point: EntryPoint) -> Path | None:
    """File of the module that an entry point names."""
    spec = importlib.util.find_spec(point.module)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _imported(module: str, provider: str) -> ModuleType:
    """A module of a plug-in, watched while it is imported.

    Raises:
        BadPlugin: if it changes settings of the process and plug-ins are taken strictly.
    """
    if module in sys.modules:
        return sys.modules[module]
    with importing(provider), watch.watched() as seen:
        found = importlib.import_module(module)
    sys.stderr.write(seen.printed)
    if seen.changed:
        if _is_strict():
            raise BadPlugin(_of_changes(seen.changed))
        print(f"agl-bench: plug-in {provider} ({module}) {_of_changes(seen.changed)}", file=sys.stderr)
    return found


def _of_changes(changed: Sequence[str]) -> str:
    return f"changes {', '.join(changed)} at import; the change was undone, because every result depends on it"


def _is_strict() -> bool:
    return os.environ.get(STRICT, "") not in ("", "0")


def _entry_points() -> Iterable[EntryPoint]:
    """Each entry point once, agl-bench's own first, the others by name."""
    unique = {(p.name, p.value): p for p in entry_points(group=GROUP)}
    return sorted(unique.values(), key=lambda p: (p.dist is None or p.dist.name != OWN, p.name, p.value))


def _folder_at(path: Path) -> Folder:
    try:
        return Folder.at(path, GROUP)
    except BadPlugin as error:
        raise BadPlugin(f"plug-in {path}: {error}") from None


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


def _one_line(error: BaseException) -> str:
    is_said = isinstance(error, AglBenchError | SystemExit)
    return told(error) if is_said else f"{told(error)}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where in a stranger's code it was raised; "" where that is no file of theirs, or the error says so itself."""
    places = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in OURS
    ]
    return places[-1] if places and not isinstance(error, SyntaxError) else ""
