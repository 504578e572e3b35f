"""A statement of Python as tokens: what it does, without its wording.

Comments, docstrings, annotations and messages of exceptions leave no token, names of locals become numbers, and names
of definitions become references. `ast.dump` would differ between versions of Python.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl_bench.registry.scopes import COMPREHENSIONS, FUNCTIONS, Scope, Target, arguments, imported

_SKIPPED = {"ctx", "kind", "type_comment"}
_LOOK_AT_LOCALS = {"locals", "eval", "exec"}
_UNCHANGING = (
    ast.Constant,
    ast.Tuple,
    ast.Name,
    ast.Attribute,
    ast.UnaryOp,
    ast.BinOp,
    ast.operator,
    ast.unaryop,
    ast.Load,
)
Reference = tuple[str, str]  # module and name of a definition; "" = the module itself
Tokens = list[str | Reference]


@dataclass(frozen=True)
class Place:
    """Where a statement stands.

    Attributes:
        module: name of it.
        package: from which its relative imports start.
        defined: names that the module defines.
        imports: names that it imports, with what they stand for.
        resolve: tokens of what was imported, with attributes after it.
        words: is filled with what may be the name of a definition: texts, and names from elsewhere.
        used: is filled with names of `imports` that are used.
    """

    module: str
    package: str
    defined: Container[str]
    imports: Mapping[str, Target]
    resolve: Callable[[Target, list[str]], Tokens]
    words: set[str]
    used: set[str]


def tokens_of(statement: ast.stmt, names: Sequence[str], place: Place) -> Tokens:
    """What a statement of a module says; texts between references are one token.

    Args:
        statement: as it was parsed.
        names: that it binds in the module.
        place: of it.
    """
    tokens = _Writer(place, names).written(statement)
    return tokens if _is_interchangeable(statement) else _joined([f"named:{' '.join(names)}", *tokens])


def _is_interchangeable(statement: ast.stmt) -> bool:
    """Whether two definitions that do the same are as good as one.

    Not so of classes, which `isinstance` and `except` tell apart, nor of what a call or a display makes anew.
    """
    if isinstance(statement, FUNCTIONS):
        return not statement.decorator_list
    value = getattr(statement, "value", None)
    return value is not None and all(isinstance(node, _UNCHANGING) for node in ast.walk(value))


class _Writer:
    """Writes a statement of a module as tokens."""

    def __init__(self, place: Place, names: Sequence[str]) -> None:
        self.place, self.names = place, list(names)
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
            for one in kept(value) if statements else value:
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
        if name in self.place.defined:
            return "definition", None
        if name in self.place.imports:
            self.place.used.add(name)
            return "import", self.place.imports[name]
        return "name", None

    def _name(self, name: str) -> None:
        kind, what = self._lookup(name)
        if kind == "import":
            self.tokens += self.place.resolve(what, [])  # type: ignore[arg-type]
        elif kind == "definition":
            self.tokens.append((self.place.module, name))
        elif kind == "local" and self.renames:
            key = (what, name)
            self.tokens.append(self.locals.setdefault(key, f"local:{len(self.locals)}"))  # type: ignore[arg-type]
        else:
            self.tokens.append(f"{kind}:{name}")
            if kind == "attribute" and name in self.place.defined:  # before it is bound, it is that of the module
                self.tokens.append((self.place.module, name))
            elif kind == "attribute" and name in self.place.imports:
                self.tokens += self.place.resolve(self.place.imports[name], [])
            elif kind == "name":
                self.place.words.add(name)
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
            self.tokens += self.place.resolve(what, chain[::-1])  # type: ignore[arg-type]
            return
        mark = len(self.tokens)
        self.node(below)
        self.tokens[mark:] = with_attributes(self.tokens[mark:], chain[::-1])

    def on_call(self, node: ast.Call) -> None:
        """A call; of `vars` and `dir` without arguments, it sees the names of locals."""
        if not (node.args or node.keywords) and getattr(node.func, "id", "") in ("vars", "dir"):
            self.looks = True
        self._plain(node, "Call")

    def on_constant(self, node: ast.Constant) -> None:
        """A constant; a text may be a name that something is looked up by."""
        if isinstance(node.value, str) and node.value.isidentifier():
            self.place.words.add(node.value)
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
        self._within(Scope.of_function(node, self.place.package), node.body)

    def on_lambda(self, node: ast.Lambda) -> None:
        """A function without a name."""
        self.tokens.append("(Lambda")
        self._arguments(node.args)
        self._within(Scope.of_function(node, self.place.package), node.body)

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
        self._within(Scope.of_class(node, self.place.package), node.body)

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
        """Outside of classes, an assignment as any other; one without a value does nothing."""
        if self.scopes and self.scopes[-1].kind == "class":
            self._plain(node, "AnnAssign", ("simple",))
        elif node.value is not None:
            self._plain(ast.Assign([node.target], node.value), "Assign")

    def on_raise(self, node: ast.Raise) -> None:
        """An exception without its message: the positional arguments that are texts."""
        self.tokens.append("(Raise")
        error = node.exc
        if isinstance(error, ast.Name | ast.Attribute):
            error = ast.Call(error, [], [])  # without brackets it is the same
        if isinstance(error, ast.Call):
            self.node(error.func)
            self._value([argument for argument in error.args if not _is_message(argument)])
            self._value(error.keywords)
        elif error is not None:
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
        for name, target in imported(node, self.place.package):
            if not self.scopes or name not in self.scopes[-1].imports:
                self.tokens.append("(import")
                self._binding(name)
                self.tokens += [*self.place.resolve(target, []), ")"]

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


def kept(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that do something."""
    for statement in body:
        if isinstance(statement, ast.If) and is_for_types(statement.test):
            yield from kept(statement.orelse)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        elif not isinstance(statement, ast.Pass) and getattr(statement, "module", "") != "__future__":
            yield statement


def is_for_types(test: ast.expr) -> bool:
    """Whether a condition holds for type checkers alone."""
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def with_attributes(tokens: Tokens, names: Sequence[str]) -> Tokens:
    """What tokens stand for, with attributes after it."""
    inner = [token for name in names for token in (f".{name}", ")")]
    return [*["(Attribute"] * len(names), *tokens, *inner]


def _is_message(argument: ast.expr) -> bool:
    """Whether an argument is a text that is written or put together there."""
    if isinstance(argument, ast.BinOp):
        return _is_message(argument.left) or _is_message(argument.right)
    if isinstance(argument, ast.Call) and isinstance(argument.func, ast.Attribute):
        return _is_message(argument.func.value)
    return isinstance(argument, ast.JoinedStr) or (isinstance(argument, ast.Constant) and type(argument.value) is str)


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
