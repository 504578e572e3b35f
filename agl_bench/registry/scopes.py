"""What the names in a piece of source code stand for: its scopes, and what binds a name in each of them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Target = tuple[str, str]  # module, and a name in it; "" = the module itself


@dataclass(eq=False)
class Scope:
    """A function, class or comprehension, and the names that it binds.

    Attributes:
        kind: what it is. Names of a class are not seen by functions within it.
        parameters: names by which callers may call them.
        bound: names that it binds otherwise.
        imports: names that are bound by imports of one thing only, with that thing.
        outside: names that it declares to be global.
    """

    kind: Literal["function", "class", "comprehension"]
    parameters: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    imports: dict[str, Target] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)

    @classmethod
    def of_function(cls, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, package: str) -> Scope:
        """Of a function; `package` is the one that relative imports in it start from."""
        scope = cls("function", {one.arg for one in arguments(node.args)})
        return scope._filled(node.body if isinstance(node.body, list) else [node.body], package)

    @classmethod
    def of_class(cls, node: ast.ClassDef, package: str) -> Scope:
        """Of the body of a class."""
        return cls("class")._filled(node.body, package)

    @classmethod
    def of_comprehension(cls, generators: Iterable[ast.comprehension]) -> Scope:
        """Of a comprehension: what it loops over."""
        return cls("comprehension", bound={name for g in generators for name in _stored(g.target)})

    def _filled(self, body: Sequence[ast.AST], package: str) -> Scope:
        inner: set[str] = set()
        targets: dict[str, set[Target]] = {}
        for node in _of_one_scope(body):
            if isinstance(node, ast.Global):
                self.outside |= set(node.names)
            elif isinstance(node, ast.Nonlocal):
                inner |= set(node.names)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for name, target in imported(node, package):
                    targets.setdefault(name, set()).add(target)
            else:
                self.bound |= set(binds(node))
        self.bound -= self.outside | inner
        several = {name for name, found in targets.items() if len(found) > 1 or name in self.bound | self.parameters}
        if self.kind == "class":
            several = set(targets)  # it has them as attributes
        elif targets:  # what is imported and not used is imported for what it does
            several |= unused(targets, body)
        self.bound |= several
        self.imports = {n: next(iter(found)) for n, found in targets.items() if n not in several | self.outside | inner}
        self.bound -= self.parameters
        return self


def arguments(node: ast.arguments) -> list[ast.arg]:
    """All parameters of a function."""
    starred = [one for one in (node.vararg, node.kwarg) if one is not None]
    return [*node.posonlyargs, *node.args, *node.kwonlyargs, *starred]


def imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Target]]:
    """The names that an import binds, and what they stand for. A star binds "*"."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, (alias.name if alias.asname else top, "")
        return
    above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
    module = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, (module, alias.name)


def binds(node: ast.AST) -> Iterator[str]:
    """Names that a node itself binds in the scope that it stands in."""
    if isinstance(node, ast.Name):
        if type(node.ctx) is not ast.Load:
            yield node.id
    elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        yield from [node.name] if node.name else []
    elif isinstance(node, ast.MatchMapping):
        yield from [node.rest] if node.rest else []


def names_bound(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module binds there, in order."""
    found: list[tuple[int, int, str]] = []
    for node in _of_one_scope([statement]):
        names = [n for n, _ in imported(node, "")] if isinstance(node, ast.Import | ast.ImportFrom) else binds(node)
        found += [(node.lineno, node.col_offset, name) for name in names]  # type: ignore[attr-defined]
    return list(dict.fromkeys(name for *_, name in sorted(found)))


def all_nodes(top: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, in no order; as `ast.walk`, which takes five times as long."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += below(node)


def below(node: ast.AST) -> list[ast.AST]:
    """The children of a node that have a place in the source, but for constants."""
    found = []
    for value in node.__dict__.values():
        kind = value.__class__
        if kind is list:
            found += [one for one in value if isinstance(one, ast.AST)]
        elif kind not in _ATOMS and isinstance(value, ast.AST):
            found.append(value)
    return found


def unused(names: Iterable[str], tops: Iterable[ast.AST]) -> set[str]:
    """Those of some names that stand nowhere in some nodes."""
    left = set(names)
    for top in tops:
        if not left:
            break
        left -= {node.id for node in all_nodes(top) if type(node) is ast.Name}
    return left


def _stored(target: ast.AST) -> Iterator[str]:
    return (n.id for n in all_nodes(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


_ATOMS = {int, str, type(None), ast.Load, ast.Store, ast.Del, ast.Constant}
_LEAVES = (ast.Name, ast.Constant, ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom, ast.alias)


def _of_one_scope(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Nodes of a body without those of functions, classes and comprehensions in it, which bind in scopes of theirs.

    Of a comprehension, what `:=` assigns binds here.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _LEAVES):
            continue
        if isinstance(node, FUNCTIONS):
            waiting += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.Lambda):
            waiting += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.ClassDef):
            waiting += [*node.decorator_list, *node.bases, *node.keywords]
        elif isinstance(node, COMPREHENSIONS):
            yield from _assigned_within(node)
        else:
            waiting += below(node)


def _assigned_within(comprehension: ast.AST) -> Iterator[ast.Name]:
    """What `:=` assigns in a comprehension."""
    waiting = below(comprehension)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.NamedExpr):
            yield node.target
        if not isinstance(node, ast.Lambda):
            waiting += below(node)
