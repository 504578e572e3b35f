"""The project itself: names where they belong, nothing that only one machine has."""

import ast
import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import agl_bench
from agl_bench.bench.table import BASELINE, BOUND
from agl_bench.cli import cli
from agl_bench.registry.hooks import PROJECT
from agl_bench.registry.plugins import GROUP, KINDS, Plugins

ROOT = Path(__file__).parents[1]
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = sorted((ROOT / "agl_bench").rglob("*.py"))
NAMES = {entry.name for entry in Plugins.discover(strict=True).entries() if entry.provider.startswith("agl-bench ")}
ORDINARY = {"folder", "embedding", "position", "spatial"}  # words of the instrument as well
ALLOWED = {
    "data.py": {"tiny"},  # stands in where patches are prepared for no run
    "spec.py": {"tiny"},  # the default backbone
    "doctor.py": {"timm"},  # the library
    "mlflow_views.py": {"agl"},  # short for the project
}


def test_version():
    assert agl_bench.__version__ == PROJECT_FILE["project"]["version"]


def test_public_names():
    assert set(agl_bench.__all__) == {*agl_bench._HOMES, "API_VERSION", "__version__", "hookimpl"}
    for name in agl_bench.__all__:
        assert getattr(agl_bench, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = agl_bench.Nothing


def test_public_names_are_what_type_checkers_see():
    tree = ast.parse((ROOT / "agl_bench/__init__.py").read_text(encoding="utf-8"))
    seen = {
        (alias.name, node.module.removeprefix("agl_bench."))
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {(n, m) for n, m in seen if n != "Any"} == set(agl_bench._HOMES.items())


def test_every_hook_has_a_user():
    assert GROUP == PROJECT
    module = importlib.import_module(PROJECT_FILE["project"]["entry-points"][GROUP]["agl-bench-plugins"])
    for hook in KINDS.values():
        assert getattr(module, hook)(), f"nothing uses {hook}"
    specs = importlib.import_module("agl_bench.registry.hooks")
    assert {n for n in vars(specs) if n.startswith("register_")} == set(KINDS.values())


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_instrument_names_no_specimen(path):
    """No identifier and no text of the code is a selector, backbone or dataset, declared baseline and bound apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(id(node.value))  # docstrings
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "option":
            documentation |= {id(n) for n in ast.walk(node)}  # help texts
    words: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            words.add(node.value)  # the whole text: a name in a sentence is an example
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            words.add(node.name.lower())
    found = (words & NAMES) - ORDINARY - {BASELINE, BOUND} - ALLOWED.get(path.name, set())
    assert not found


def test_baseline_and_bound_are_there():
    assert {BASELINE, BOUND} <= set(Plugins.discover(strict=True).names("selector"))


def test_no_machine_paths():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|scratch)/\w+|/tmp/w/")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or path.suffix in (".png", ".jpg", ".h5ad") or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []


def test_readme_mentions_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    absent = [name for name in cli.commands if f"agl-bench {name}" not in text]
    assert absent == []


def test_readme_is_finished():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z_]+@", text) == []
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_every_dependency_is_imported():
    modules = {"pillow": "PIL", "scikit-image": "skimage"}
    imported = set()
    for folder in ("agl_bench", "plugins/agl_bench_plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = (
                    [a.name for a in node.names] if isinstance(node, ast.Import)
                    else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                )  # fmt: skip
                imported |= {name.partition(".")[0] for name in names}
    declared = {re.split(r"[<>=\[ ]", d)[0] for d in PROJECT_FILE["project"]["dependencies"]}
    indirect = {"imagecodecs", "pyarrow", "scikit-misc"}  # of tifffile, pandas and scanpy
    assert {d for d in declared if modules.get(d, d) not in imported} <= indirect


def test_presets_are_packed():
    packed = PROJECT_FILE["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    found = (ROOT / "benchmarks").rglob("*.toml")
    assert set(packed) == {p.relative_to(ROOT).as_posix() for p in found}


def test_readme_shows_the_example_as_it_is():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = ROOT / "plugins/agl-bench-example/src/agl_bench_example/correlated_k.py"
    assert shown is not None and shown[1] == example.read_text(encoding="utf-8")
