"""What a plug-in says of itself in its source, read without importing it: `agl-bench list` stays fast, and says what a
broken plug-in would be."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from agl_bench.errors import BadPlugin

API = "agl_bench_api"  # of the module that an entry point names, and of a single-file plug-in
# What a class is taken to say where it says nothing; equal to the attributes of the doors.
FLAGS: dict[str, dict[str, object]] = {
    "selector": {
        "needs_gpu": False,
        "needs_second_order": False,
        "needs_counts": False,
        "max_genes": None,
        "is_control": False,
    },
    "backbone": {"needs_gpu": False, "second_order": True, "is_control": False},
    "dataset": {"has_counts": True},
}
SAYS = {"selector": "reference", "backbone": "reference", "dataset": "citation"}  # where it is from


def of_source(source: Path, name: str, kind: str) -> tuple[str, dict[str, object]]:
    """First line of a class's docstring, and its flags and where it is from.

    Args:
        source: the file of its module.
        name: of the class.
        kind: "selector", "backbone" or "dataset".

    Returns:
        The line, and `SAYS` and `FLAGS` of the kind as literals in the body of the class or of its bases in the same
        file have them. What is there and no literal is left out: it is known once the class is imported.

    Raises:
        BadPlugin: if the file has no such class.
        SyntaxError: if it is no Python.
    """
    defaults = {SAYS[kind]: "", **FLAGS[kind]}
    if source.suffix != ".py":
        return "", {}
    classes = {n.name: n for n in _parse(source).body if isinstance(n, ast.ClassDef)}
    if name not in classes:
        raise BadPlugin(f"there is no class {name} in {source.name}")
    found: dict[str, ast.expr | None] = {}
    for node in _with_bases(name, classes):
        for target, value in _assignments(node):
            found.setdefault(target, value)
    stated = {}
    for attribute, default in defaults.items():
        if attribute not in found:
            stated[attribute] = default
        elif (known := _literal(found[attribute])) is not _UNKNOWN:
            stated[attribute] = known
    return (ast.get_docstring(classes[name]) or "").partition("\n")[0], stated


def of_class(cls: type, kind: str) -> tuple[str, dict[str, object]]:
    """The same of a class that is imported."""
    summary = (inspect.getdoc(cls) or "").partition("\n")[0] if cls.__doc__ else ""
    return summary, {name: getattr(cls, name, value) for name, value in {SAYS[kind]: "", **FLAGS[kind]}.items()}


def words(kind: str, stated: Mapping[str, object]) -> list[str]:
    """Flags that are not as usual, for people; "?" where one is known only after the import."""
    said = []
    for name, usual in FLAGS[kind].items():
        value = stated.get(name, _UNKNOWN)
        if value is _UNKNOWN:
            said.append(f"{name}?")
        elif value != usual:
            said.append(f"≤ {value:,} genes" if name == "max_genes" and isinstance(value, int) else _WORDS[name])
    return said


def api_of(source: Path) -> str:
    """The version of the plug-in interface that a module says it is written for; "" if it says nothing.

    Raises:
        BadPlugin: if it says so other than by a text literal.
        SyntaxError: if it is no Python.
    """
    if source.suffix != ".py":
        return ""
    value = next((value for target, value in _assignments(_parse(source)) if target == API), None)
    if value is None:
        return ""
    known = _literal(value)
    if not isinstance(known, str):
        raise BadPlugin(f'{API} has to be a text in quotes, such as {API} = "1.0": it is read before the import')
    return known


_UNKNOWN = object()
_WORDS = {
    "needs_gpu": "GPU",
    "needs_second_order": "2nd order",
    "needs_counts": "counts",
    "max_genes": "few genes",
    "is_control": "control",
    "second_order": "no 2nd order",
    "has_counts": "no counts",
}


def _parse(source: Path) -> ast.Module:
    return ast.parse(source.read_bytes(), filename=source.name)


def _with_bases(name: str, classes: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class and its bases in the same file, the nearest first."""
    seen, waiting = set(), [name]
    while waiting:
        name = waiting.pop(0)
        if name in classes and name not in seen:
            seen.add(name)
            yield classes[name]
            waiting += [base.id for base in classes[name].bases if isinstance(base, ast.Name)]


def _assignments(node: ast.ClassDef | ast.Module) -> Iterator[tuple[str, ast.expr | None]]:
    """Names assigned or defined in a body; None instead of a value that is more than one expression."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            yield line.target.id, line.value
        elif isinstance(line, ast.FunctionDef):
            yield line.name, None  # e.g. a property
        elif isinstance(line, ast.Assign):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    yield target.id, line.value
                elif isinstance(target, ast.Tuple):
                    values = line.value.elts if isinstance(line.value, ast.Tuple) else [None] * len(target.elts)
                    for one, value in zip(target.elts, values, strict=False):
                        if isinstance(one, ast.Name):
                            yield one.id, value


def _literal(value: ast.expr | None) -> object:
    if value is None:
        return _UNKNOWN
    try:
        return ast.literal_eval(value)
    except ValueError:
        return _UNKNOWN
