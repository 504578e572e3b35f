"""What code does, as a digest: equal for sources that differ in wording, names or place alone.

Comments, docstrings, annotations, messages of exceptions and names of locals do not count, nor do the name of a
function or constant and the module that it stands in. A reference to a definition counts as what it refers to: in
rounds, each statement gets a digest in which references are the digests that the statements they refer to had in the
round before, until no further statements are told apart.

What is equal here does the same, but for code that looks at its own text: names of its classes, docstrings, line
numbers. What does the same may well be different here: there is `same_results.toml` for that.
"""

from __future__ import annotations

import ast
import gc
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

from agl_bench.digests import file_digest, text_digest
from agl_bench.registry.scopes import FUNCTIONS, Target, imported, names_bound, unused
from agl_bench.registry.syntax import Place, Reference, Tokens, is_for_types, kept, tokens_of, with_attributes

OURS = "agl_bench"
_SAME = Path(__file__).with_name("same_results.toml")


def code_digest(modules: Mapping[str, Path], size: int, roots: Iterable[Reference] = ()) -> str:
    """Digest of what some modules do together, `size` bytes in hexadecimal; of equals, that of the oldest.

    Args:
        modules: files by the names that they are imported by. The names serve to find what an import refers to.
        size: of the digest.
        roots: definitions, by module and name, that others ask for by name; what stands there counts.
    """
    code = _read(modules)
    asked = {f"{name}={code.known.get((module, name), '')}" for module, name in roots}
    found = text_digest("\n".join(sorted(code.found | asked)), size)
    return same_results().get(found, found)


def file_meanings(modules: Mapping[str, Path]) -> dict[str, str]:
    """Digest of what each of some modules says, by its name. Unlike above, names of definitions count."""
    return dict(_read(modules).said)


@dataclass(frozen=True)
class _Meaning:
    """What is left of modules when they have been read.

    Attributes:
        found: digests of all that they do.
        known: of their definitions.
        said: of what each says.
    """

    found: frozenset[str]
    known: Mapping[Reference, str]
    said: Mapping[str, str]


def _read(modules: Mapping[str, Path]) -> _Meaning:
    return _meaning(tuple((name, path, file_digest(path)) for name, path in sorted(modules.items())))


@lru_cache(maxsize=256)
def _meaning(named: tuple[tuple[str, Path, str], ...]) -> _Meaning:
    """Of files by name, path and content: what has not changed is not read twice."""
    collects = gc.isenabled()
    gc.disable()  # in a process that has torch, collections would take half of the time
    try:
        return _Code({name: _Module.read(name, path) for name, path, _ in named}).meaning()
    finally:
        if collects:
            gc.enable()


def module_name(path: Path, package: Path) -> str:
    """The name that a file within a top-level package is imported by."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def same_results() -> dict[str, str]:
    """Digests of code -> the older digest of code that gives the same results bit for bit."""
    table = tomllib.loads(_SAME.read_text(encoding="utf-8"))
    return {str(new): str(old) for new, old in table["same"].items()}


@dataclass
class _Statement:
    """A statement of a module.

    Attributes:
        tokens: what it says.
        names: that it binds, in order.
        kind: a "function"; a "definition", i.e. a class or an assignment to names; or an "effect".
    """

    tokens: Tokens
    names: list[str]
    kind: str

    @classmethod
    def of(cls, node: ast.stmt) -> _Statement:
        """What is known of it before it is written."""
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        is_named = bool(targets) and all(isinstance(t, ast.Name | ast.Tuple) for t in targets)
        is_definition = isinstance(node, ast.ClassDef) or (is_named and not isinstance(node, ast.Delete))
        kind = "function" if isinstance(node, FUNCTIONS) else "definition" if is_definition else "effect"
        return cls([], names_bound(node), kind)


@dataclass
class _Module:
    name: str
    package: str
    tree: ast.Module | None
    content: str
    imports: dict[str, Target] = field(default_factory=dict)
    defined: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # statements, and places in `names`
    statements: list[_Statement] = field(default_factory=list)

    @classmethod
    def read(cls, name: str, path: Path) -> _Module:
        """A file; one that is no Python has no tree."""
        tree = None
        if path.suffix == ".py":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of escapes: they were told when it was imported
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                tree = None
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        return cls(name, package, tree, file_digest(path, 8))

    def body(self) -> list[ast.stmt]:
        """Its statements but for imports that count where they are used, which are noted."""
        if self.tree is None:
            return []
        body = [s for s in kept(self.tree.body) if not _is_listing(s)]
        imports = [s for s in body if isinstance(s, ast.Import | ast.ImportFrom)]
        others = {name for s in body if s not in imports for name in names_bound(s)}
        targets: dict[str, set[Target]] = {}
        for statement in imports:
            for name, target in imported(statement, self.package):
                targets.setdefault(name, set()).add(target)
        plain = {n: next(iter(found)) for n, found in targets.items() if len(found) == 1 and n not in {*others, "*"}}
        for hidden in _for_types(self.tree.body):
            self.imports |= dict(imported(hidden, self.package))
        self.imports |= plain
        found: list[ast.stmt] = []
        for one in body:
            if isinstance(one, ast.Import | ast.ImportFrom):
                names = [name for name, _ in imported(one, self.package)]
                found += [_of_alias(one, a) for a, name in zip(one.names, names, strict=True) if name not in plain]
            else:
                found.append(one)
        return found

    def in_order(self, digests: Sequence[str]) -> str:
        """What a change of order would change: of statements that do things, or that bind a name anew."""
        anew = {n for places in self.defined.values() for n, _ in places if len(places) > 1}
        if not anew and all(statement.kind != "effect" for statement in self.statements):
            return ""
        return " ".join(d for n, d in enumerate(digests) if n in anew or self.statements[n].kind != "function")

    def said(self) -> str:
        """Digest of its statements, with definitions by their names."""
        if self.tree is None:
            return self.content
        texts = [_text(s.tokens, lambda ref: ref[1]) + "\n" + " ".join(s.names) for s in self.statements]
        return text_digest("\n".join(sorted(texts)), 8)


class _Code:
    """Modules that belong together, read."""

    def __init__(self, modules: Mapping[str, _Module]) -> None:
        self.modules = modules
        self.tops = {OURS, *(name.partition(".")[0] for name in modules)}
        self.words: set[str] = set()  # by which something may be looked up that no import shows
        bodies = {module.name: module.body() for module in modules.values()}
        for module in modules.values():
            self._enter(module, bodies[module.name])
        for module in modules.values():
            used: set[str] = set()
            place = Place(module.name, module.package, module.defined, module.imports, self.resolve, self.words, used)
            try:
                for statement, said in zip(bodies[module.name], module.statements, strict=True):
                    said.tokens = tokens_of(statement, said.names, place)
            except RecursionError:  # a sum of a thousand terms
                module.statements, module.defined, module.tree = [], {}, None
            self._add_idle_imports(module, used)

    def _add_idle_imports(self, module: _Module, used: set[str]) -> None:
        """What is imported and not used is imported for what it does; that of our own and of Python does nothing."""
        if module.tree is not None:
            idle = self.tops | sys.stdlib_module_names
            left = {n for n, (top, _) in module.imports.items() if n not in used and top.partition(".")[0] not in idle}
            for name in sorted(unused(left, module.tree.body)):  # annotations use some
                module.statements.append(_Statement(["import", *self.resolve(module.imports[name], [])], [], "effect"))

    def _enter(self, module: _Module, body: list[ast.stmt]) -> None:
        """Note what a module imports and defines."""
        for statement in body:
            known = _Statement.of(statement)
            for place, name in enumerate(known.names):
                module.defined.setdefault(name, []).append((len(module.statements), place))
            module.statements.append(known)

    def meaning(self) -> _Meaning:
        """Of all of them."""
        known: dict[Reference, str] = {}
        final, told_apart = self._round(known), 0
        while (different := len(set(chain.from_iterable(final.values())))) > told_apart:
            told_apart, known = different, self._definitions(final)
            final = self._round(known)
        known = self._definitions(final)
        found = set(chain.from_iterable(final.values()))
        found |= {module.content for module in self.modules.values() if module.tree is None}
        found |= {module.in_order(final[name]) for name, module in self.modules.items()} - {""}
        # What is asked for by its name is what it is under that name.
        found |= {f"{ref[1]}={known[ref]}" for ref in known if ref[1] and ref[1] in self.words}
        return _Meaning(frozenset(found), known, {name: module.said() for name, module in self.modules.items()})

    def _round(self, known: Mapping[Reference, str]) -> dict[str, list[str]]:
        """Digest of each statement of each module; what nothing is known of counts by its name, but for the first."""

        def digest(reference: Reference) -> str:
            return known.get(reference, reference[1]) if known else ""

        return {
            name: [text_digest(_text(s.tokens, digest), 8) for s in module.statements]
            for name, module in self.modules.items()
        }

    def _definitions(self, digests: Mapping[str, list[str]]) -> dict[Reference, str]:
        """Digest of every definition: of the statements that bind its name, in their order; and of whole modules."""
        found = {}
        for name, module in self.modules.items():
            for word, places in module.defined.items():
                found[name, word] = text_digest(" ".join(f"{digests[name][n]}.{place}" for n, place in places), 8)
            own = [f"{word}={found[name, word]}" for word in sorted(module.defined)] or [module.content]
            found[name, ""] = text_digest(" ".join(own), 8)
        return found

    def resolve(self, target: Target, attributes: list[str], seen: tuple[Target, ...] = ()) -> Tokens:
        """What an imported name with attributes after it stands for.

        Args:
            target: that was imported.
            attributes: looked up one after the other.
            seen: imports that were followed on the way here.
        """
        module, name = target
        parts = [*([name] if name else []), *attributes]
        while parts and f"{module}.{parts[0]}" in self.modules and parts[0] not in self._defined(module):
            module, parts = f"{module}.{parts[0]}", parts[1:]
        own = self.modules.get(module)
        if own is not None and own.tree is not None:
            if not parts:
                return [(module, "")]
            if parts[0] in own.defined:
                return with_attributes([(module, parts[0])], parts[1:])
            further = own.imports.get(parts[0])
            if further is not None and further not in seen:
                return self.resolve(further, parts[1:], (*seen, further))
        if module.partition(".")[0] not in self.tops:
            return [f"library:{'.'.join([module, *parts])}"]
        self.words |= set(parts)
        return with_attributes([f"own:{parts[0] if parts else module.rpartition('.')[2]}"], parts[1:])

    def _defined(self, module: str) -> Mapping[str, object]:
        return self.modules[module].defined if module in self.modules else {}


def _for_types(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that only type checkers see; annotations of classes name them."""
    for statement in body:
        if isinstance(statement, ast.If) and is_for_types(statement.test):
            yield from (one for one in statement.body if isinstance(one, ast.Import | ast.ImportFrom))


def _is_listing(statement: ast.stmt) -> bool:
    """Whether it assigns `__all__`."""
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return any(getattr(target, "id", "") == "__all__" for target in targets)


def _of_alias(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    """The import of one thing alone."""
    one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
    return ast.copy_location(one, node)


def _text(tokens: Tokens, of: Callable[[Reference], str]) -> str:
    """Tokens as a text, each reference as what `of` says of it."""
    return "\n".join(token if isinstance(token, str) else f"definition:{of(token)}" for token in tokens)
