"""What code does, as a digest: equal for sources that differ in wording, names or place alone.

Comments, docstrings, annotations, messages of exceptions and names of locals do not count, nor do the name of a
definition and the module that it stands in. A reference to a definition counts as what it refers to: in rounds, each
statement gets a digest in which references are the digests that the statements they refer to had in the round before.
The serialisation of syntax is our own, since `ast.dump` differs between versions of Python.

What is equal here does the same, but for code that looks at its own text: names of its classes, docstrings, line
numbers. What does the same may well be different here: there is `same_results.toml` for that.
"""

from __future__ import annotations

import ast
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from agl_bench.digests import file_digest, text_digest
from agl_bench.registry.scopes import COMPREHENSIONS, FUNCTIONS, Scope, Target, arguments, imported, names_bound, unused

ROUNDS = 3  # as far as a reference is followed; all statements count anyway, this tells which one is meant
OURS = "agl_bench"
_SAME = Path(__file__).with_name("same_results.toml")
_SKIPPED = {"ctx", "kind", "type_comment", "lineno", "col_offset", "end_lineno", "end_col_offset"}
_TELLING = ("SystemExit", "StopIteration")  # exceptions whose arguments are no message
_LOOK_AT_LOCALS = {"locals", "eval", "exec"}
Reference = tuple[str, str]  # module and name of a definition; "" = the module itself
Tokens = list[str | Reference]


def code_digest(modules: Mapping[str, Path], size: int, roots: Iterable[Reference] = ()) -> str:
    """Digest of what some modules do together, `size` bytes in hexadecimal; of equals, that of the oldest.

    Args:
        modules: files by the names that they are imported by. The names serve to find what an import refers to.
        size: of the digest.
        roots: definitions, by module and name, that others ask for by name; what stands there counts.
    """
    named = tuple((name, path, file_digest(path)) for name, path in sorted(modules.items()))
    found = _digest(named, size, tuple(roots))
    return same_results().get(found, found)


@lru_cache(maxsize=256)
def _digest(named: tuple[tuple[str, Path, str], ...], size: int, roots: tuple[Reference, ...]) -> str:
    """Of files by name, path and content: what has not changed is not looked at twice."""
    return _Code.of({name: path for name, path, _ in named}).digest(size, roots)


def file_meanings(modules: Mapping[str, Path]) -> dict[str, str]:
    """Digest of what each of some modules says, by its name. Unlike above, names of definitions count."""
    return {name: module.said() for name, module in _Code.of(modules).modules.items()}


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

    def body(self, tops: set[str]) -> list[ast.stmt]:
        """Its statements but for imports that count where they are used, which are noted.

        Args:
            tops: packages whose imports count nowhere else.
        """
        if self.tree is None:
            return []
        kept = [s for s in _kept(self.tree.body) if not _is_listing(s)]
        imports = [s for s in kept if isinstance(s, ast.Import | ast.ImportFrom)]
        others = {name for s in kept if s not in imports for name in names_bound(s)}
        targets: dict[str, set[Target]] = {}
        for statement in imports:
            for name, target in imported(statement, self.package):
                targets.setdefault(name, set()).add(target)
        plain = {n: next(iter(found)) for n, found in targets.items() if len(found) == 1 and n not in {*others, "*"}}
        for hidden in _for_types(self.tree.body):
            self.imports |= dict(imported(hidden, self.package))
        self.imports |= plain
        idle = tops | sys.stdlib_module_names  # their import does nothing that counts
        foreign = (name for name, (module, _) in plain.items() if module.partition(".")[0] not in idle)
        counted = {*(targets.keys() - plain.keys()), *unused(foreign, self.tree.body)}
        found: list[ast.stmt] = []
        for one in kept:
            if isinstance(one, ast.Import | ast.ImportFrom):
                names = [name for name, _ in imported(one, self.package)]
                found += [_of_alias(one, a) for a, name in zip(one.names, names, strict=True) if name in counted]
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
        bodies = {module.name: module.body(self.tops) for module in modules.values()}
        for module in modules.values():
            self._enter(module, bodies[module.name])
        for module in modules.values():
            try:
                for statement, said in zip(bodies[module.name], module.statements, strict=True):
                    said.tokens = _Writer(self, module, said.names).written(statement)
            except RecursionError:  # a sum of a thousand terms
                module.statements, module.defined, module.tree = [], {}, None

    @classmethod
    def of(cls, modules: Mapping[str, Path]) -> _Code:
        """Read some files."""
        return cls({name: _Module.read(name, path) for name, path in modules.items()})

    def _enter(self, module: _Module, body: list[ast.stmt]) -> None:
        """Note what a module imports and defines."""
        for statement in body:
            known = _Statement.of(statement)
            for place, name in enumerate(known.names):
                module.defined.setdefault(name, []).append((len(module.statements), place))
            module.statements.append(known)

    def digest(self, size: int, roots: Iterable[Reference]) -> str:
        """See `code_digest`."""
        known: dict[Reference, str] = {}
        for _ in range(ROUNDS):
            known = self._definitions(self._round(known))
        final = self._round(known)
        known = self._definitions(final)
        found = {digest for digests in final.values() for digest in digests}
        found |= {module.content for module in self.modules.values() if module.tree is None}
        found |= {module.in_order(final[name]) for name, module in self.modules.items()}
        # What is asked for by its name is what it is under that name.
        found |= {f"{ref[1]}={known[ref]}" for ref in known if ref[1] and ref[1] in self.words}
        found |= {f"{name}={known.get((module, name), '')}" for module, name in roots}
        return text_digest("\n".join(sorted(found)), size)

    def _round(self, known: Mapping[Reference, str]) -> dict[str, list[str]]:
        """Digest of each statement of each module."""
        return {
            name: [text_digest(_text(s.tokens, lambda ref: known.get(ref, "")), 8) for s in module.statements]
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
                return _attributes([(module, parts[0])], parts[1:])
            further = own.imports.get(parts[0])
            if further is not None and further not in seen:
                return self.resolve(further, parts[1:], (*seen, further))
        if module.partition(".")[0] not in self.tops:
            return [f"library:{'.'.join([module, *parts])}"]
        self.words |= set(parts)
        return _attributes([f"own:{parts[0] if parts else module.rpartition('.')[2]}"], parts[1:])

    def _defined(self, module: str) -> Mapping[str, object]:
        return self.modules[module].defined if module in self.modules else {}


class _Writer:
    """Writes a statement of a module as tokens."""

    def __init__(self, code: _Code, module: _Module, names: list[str]) -> None:
        self.code, self.module, self.names = code, module, names
        self.tokens: Tokens = []
        self.scopes: list[Scope] = []
        self.locals: dict[tuple[Scope, str], str] = {}
        self.renames, self.looks = True, False

    def written(self, statement: ast.stmt) -> Tokens:
        """The tokens of the statement."""
        self.node(statement)
        if self.looks and self.locals:  # it may see the names of its locals
            self.tokens, self.scopes, self.locals, self.renames = [], [], {}, False
            self.node(statement)
        return _joined(self.tokens)

    def node(self, node: ast.AST) -> None:
        """Write one node with all below it."""
        kind = type(node)
        special = _SPECIAL.get(kind)
        if special is not None:
            special(self, node)
        else:
            self._plain(node, kind.__name__)

    def _plain(self, node: ast.AST, kind: str, without: tuple[str, ...] = ()) -> None:
        put = self.tokens.append
        put(f"({kind}")
        for name in node._fields:
            if name in _SKIPPED or name in without:
                continue
            value = getattr(node, name, None)
            if value is None or value == []:
                continue
            put(name)
            self._value(value)
        put(")")

    def _value(self, value: object) -> None:
        if isinstance(value, ast.AST):
            self.node(value)
        elif isinstance(value, list):
            self.tokens.append("[")
            statements = bool(value) and isinstance(value[0], ast.stmt)
            for one in _kept(value) if statements else value:
                self._value(one)
            self.tokens.append("]")
        else:
            self.tokens.append(ascii(value))

    def _lookup(self, name: str) -> tuple[str, Scope | Target | None]:
        """What has bound a name that is read here: the kind of it, and the scope or what was imported."""
        for depth in range(len(self.scopes) - 1, -1, -1):
            scope = self.scopes[depth]
            if scope.kind == "class" and depth != len(self.scopes) - 1:
                continue
            if name in scope.outside:
                break
            if name in scope.parameters:
                return "parameter", None
            if name in scope.imports:
                return "import", scope.imports[name]
            if name in scope.bound:
                return ("attribute" if scope.kind == "class" else "local"), scope
        if name in self.module.defined:
            return "definition", None
        if name in self.module.imports:
            return "import", self.module.imports[name]
        return "name", None

    def _name(self, name: str) -> None:
        kind, what = self._lookup(name)
        if kind == "import":
            self.tokens += self.code.resolve(what, [])  # type: ignore[arg-type]
        elif kind == "definition":
            self.tokens.append((self.module.name, name))
        elif kind == "local" and self.renames:
            key = (what, name)
            self.tokens.append(self.locals.setdefault(key, f"local:{len(self.locals)}"))  # type: ignore[arg-type]
        else:
            self.tokens.append(f"{kind}:{name}")
            if kind == "attribute" and name in self.module.defined:  # before it is bound, it is that of the module
                self.tokens.append((self.module.name, name))
            elif kind == "attribute" and name in self.module.imports:
                self.tokens += self.code.resolve(self.module.imports[name], [])
            elif kind == "name":
                self.code.words.add(name)
                self.looks |= name in _LOOK_AT_LOCALS

    def _binding(self, name: str) -> None:
        """A name that is bound here: of the module's, its place among those that this statement binds."""
        if self.scopes:
            self._name(name)
        else:
            self.tokens.append(name if name.startswith("__") else f"self:{self.names.index(name)}")

    def on_name(self, node: ast.Name) -> None:
        """A name, read or bound."""
        if isinstance(node.ctx, ast.Load):
            self._name(node.id)
        else:
            self._binding(node.id)

    def on_attribute(self, node: ast.Attribute) -> None:
        """An attribute; of an imported module, the definition that it is."""
        chain, below = [node.attr], node.value
        while isinstance(below, ast.Attribute):
            chain.append(below.attr)
            below = below.value
        kind, what = self._lookup(below.id) if isinstance(below, ast.Name) else ("", None)
        if kind == "import":
            self.tokens += self.code.resolve(what, chain[::-1])  # type: ignore[arg-type]
            return
        mark = len(self.tokens)
        self.node(below)
        self.tokens[mark:] = _attributes(self.tokens[mark:], chain[::-1])

    def on_call(self, node: ast.Call) -> None:
        """A call; of `vars` and `dir` without arguments, it sees the names of locals."""
        if not (node.args or node.keywords) and getattr(node.func, "id", "") in ("vars", "dir"):
            self.looks = True
        self._plain(node, "Call")

    def on_constant(self, node: ast.Constant) -> None:
        """A constant; a text may be a name that something is looked up by."""
        if isinstance(node.value, str) and node.value.isidentifier():
            self.code.words.add(node.value)
        self.tokens.append(f"={node.value!a}")

    def on_joined(self, node: ast.JoinedStr) -> None:
        """An f-string; versions of Python cut its texts differently."""
        self.tokens.append("(JoinedStr")
        text = ""
        for value in node.values:
            if isinstance(value, ast.Constant):
                text += str(value.value)
                continue
            self.tokens.append(ascii(text))
            text = ""
            self.node(value)
        self.tokens += [ascii(text), ")"]

    def on_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """A function, without its annotations."""
        self.tokens.append(f"({type(node).__name__}")
        self._binding(node.name)
        self._value(node.decorator_list)
        if any(getattr(one, "attr", "") == "register" for one in node.decorator_list):
            self._value([one.annotation for one in arguments(node.args) if one.annotation])  # it may go by types
        self._value(getattr(node, "type_params", []))
        self._arguments(node.args)
        self._within(Scope.of_function(node, self.module.package), node.body)

    def on_lambda(self, node: ast.Lambda) -> None:
        """A function without a name."""
        self.tokens.append("(Lambda")
        self._arguments(node.args)
        self._within(Scope.of_function(node, self.module.package), node.body)

    def _within(self, scope: Scope, body: object) -> None:
        self.scopes.append(scope)
        self._value(body)
        self.scopes.pop()
        self.tokens.append(")")

    def _arguments(self, node: ast.arguments) -> None:
        for kind in ("posonlyargs", "args", "kwonlyargs"):
            self.tokens += [kind, *(f"parameter:{one.arg}" for one in getattr(node, kind))]
        for kind in ("vararg", "kwarg"):
            self.tokens += [kind, *([f"parameter:{getattr(node, kind).arg}"] if getattr(node, kind) else [])]
        for default in (*node.defaults, *node.kw_defaults):
            self._value(default)

    def on_class(self, node: ast.ClassDef) -> None:
        """A class, with its annotations: dataclasses read them."""
        self.tokens.append("(ClassDef")
        self._binding(node.name)
        self._value(node.decorator_list)
        self._value(getattr(node, "type_params", []))
        self._value(node.bases)
        self._value(node.keywords)
        self._within(Scope.of_class(node, self.module.package), node.body)

    def on_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        """A comprehension: what it loops over first is looked up outside."""
        self.tokens.append(f"({type(node).__name__}")
        self.node(node.generators[0].iter)
        self.scopes.append(Scope.of_comprehension(node.generators))
        for number, one in enumerate(node.generators):
            self._plain(one, "comprehension", ("iter",) if number == 0 else ())
        parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        for part in parts:
            self.node(part)
        self.scopes.pop()
        self.tokens.append(")")

    def on_walrus(self, node: ast.NamedExpr) -> None:
        """An assignment in an expression binds outside of comprehensions."""
        self.tokens.append("(NamedExpr")
        inner = []
        while self.scopes and self.scopes[-1].kind == "comprehension":
            inner.append(self.scopes.pop())
        self.on_name(node.target)
        self.scopes += reversed(inner)
        self.node(node.value)
        self.tokens.append(")")

    def on_annotated(self, node: ast.AnnAssign) -> None:
        """Outside of classes, an assignment as any other; `_kept` leaves those without value out."""
        if self.scopes and self.scopes[-1].kind == "class":
            self._plain(node, "AnnAssign", ("simple",))
        elif node.value is not None:
            self._plain(ast.Assign([node.target], node.value), "Assign")

    def on_raise(self, node: ast.Raise) -> None:
        """An exception without its message: positional arguments and texts."""
        self.tokens.append("(Raise")
        error = node.exc
        if isinstance(error, ast.Call):
            called = getattr(error.func, "attr", getattr(error.func, "id", ""))
            if called[:1].isupper() and called not in _TELLING:
                self.node(error.func)
                self._value([keyword for keyword in error.keywords if not _is_text(keyword)])
                error = None
        elif isinstance(error, ast.Name | ast.Attribute):  # without brackets it is the same
            self.node(error)
            self._value([])
            error = None
        if error is not None:
            self.node(error)
        if node.cause is not None:
            self.node(node.cause)
        self.tokens.append(")")

    def on_assert(self, node: ast.Assert) -> None:
        """An assertion without its message."""
        self._plain(node, "Assert", ("msg",))

    def on_handler(self, node: ast.ExceptHandler) -> None:
        """What binds a name as a text: except, and patterns."""
        self.tokens.append(f"({type(node).__name__}")
        for name in ("name", "rest"):
            if getattr(node, name, None):
                self._binding(getattr(node, name))
        self._plain(node, "of", ("name", "rest"))
        self.tokens.append(")")

    def on_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """An import that counts here: its name stands for other things too, or it is imported for what it does."""
        for name, target in imported(node, self.module.package):
            if not self.scopes or name not in self.scopes[-1].imports:
                self.tokens.append("(import")
                self._binding(name)
                self.tokens += [*self.code.resolve(target, []), ")"]

    def on_names(self, node: ast.Global | ast.Nonlocal) -> None:
        """Nothing: what they declare is in the scopes."""


_SPECIAL: dict[type[ast.AST], Callable[[_Writer, Any], None]] = {
    ast.Name: _Writer.on_name,
    ast.Attribute: _Writer.on_attribute,
    ast.Call: _Writer.on_call,
    ast.Constant: _Writer.on_constant,
    ast.JoinedStr: _Writer.on_joined,
    ast.Lambda: _Writer.on_lambda,
    ast.ClassDef: _Writer.on_class,
    ast.NamedExpr: _Writer.on_walrus,
    ast.AnnAssign: _Writer.on_annotated,
    ast.Raise: _Writer.on_raise,
    ast.Assert: _Writer.on_assert,
    **dict.fromkeys(FUNCTIONS, _Writer.on_function),
    **dict.fromkeys(COMPREHENSIONS, _Writer.on_comprehension),
    **dict.fromkeys((ast.ExceptHandler, ast.MatchAs, ast.MatchStar, ast.MatchMapping), _Writer.on_handler),
    **dict.fromkeys((ast.Import, ast.ImportFrom), _Writer.on_import),
    **dict.fromkeys((ast.Global, ast.Nonlocal), _Writer.on_names),
}


def _kept(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that do something."""
    for statement in body:
        if isinstance(statement, ast.If) and _is_for_types(statement.test):
            yield from _kept(statement.orelse)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        elif not isinstance(statement, ast.Pass) and getattr(statement, "module", "") != "__future__":
            yield statement


def _for_types(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that only type checkers see; annotations of classes name them."""
    for statement in body:
        if isinstance(statement, ast.If) and _is_for_types(statement.test):
            yield from (one for one in statement.body if isinstance(one, ast.Import | ast.ImportFrom))


def _is_for_types(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _is_listing(statement: ast.stmt) -> bool:
    """Whether it assigns `__all__`."""
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return any(getattr(target, "id", "") == "__all__" for target in targets)


def _of_alias(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    """The import of one thing alone."""
    one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
    return ast.copy_location(one, node)


def _is_text(keyword: ast.keyword) -> bool:
    value = keyword.value
    return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str))


def _attributes(tokens: Tokens, names: Sequence[str]) -> Tokens:
    """What tokens stand for, with attributes after it."""
    inner = [token for name in names for token in (f".{name}", ")")]
    return [*["(Attribute"] * len(names), *tokens, *inner]


def _joined(tokens: Tokens) -> Tokens:
    """The same in few pieces: texts between references."""
    found: Tokens = []
    texts: list[str] = []
    for token in tokens:
        if isinstance(token, str):
            texts.append(token)
        else:
            found += [" ".join(texts), token]
            texts = []
    return [*found, " ".join(texts)]


def _text(tokens: Tokens, of: Callable[[Reference], str]) -> str:
    """Tokens as a text, each reference as what `of` says of it."""
    return "\n".join(token if isinstance(token, str) else f"definition:{of(token)}" for token in tokens)
