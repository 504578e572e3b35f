"""A plug-in that is still to be written: one file to try, or a distribution to publish.

The templates are files of the wheel (`templates/`), in which `string.Template` puts names. What comes out works as it
is: it passes `agl-bench check`, its own tests and ruff.
"""

from __future__ import annotations

import ast
import builtins
import datetime
import importlib.util
import json
import keyword
import re
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import agl_bench
from agl_bench.errors import BadPlugin, BadSpec
from agl_bench.registry.plugins import BASES, KINDS, Plugins, check_name

LONGEST = 30  # letters of a name: no line of what is written is too long then

# What tries a plug-in of each kind, beside what comes with agl-bench.
_RUNS = {
    "selector": "--selectors pgl,{name} --datasets synthetic",
    "backbone": "--selectors pgl,agl --backbone {name} --datasets synthetic",
    "dataset": "--selectors pgl,agl --datasets {name}",
}


@dataclass(frozen=True)
class Draft:
    """What a plug-in is called, from which everything else follows.

    Attributes:
        kind: "selector", "backbone" or "dataset".
        name: as used on the command line.
    """

    kind: str
    name: str

    @property
    def module(self) -> str:
        """my_corr of my-corr."""
        return self.name.replace("-", "_")

    @property
    def class_name(self) -> str:
        """MyCorr of my-corr."""
        return "".join(part.capitalize() for part in re.split("[_-]+", self.name))

    @property
    def distribution(self) -> str:
        """agl-bench-my-corr, also of my_corr: indices of packages know no difference."""
        return "agl-bench-" + re.sub("[_-]+", "-", self.name).strip("-")

    @property
    def package(self) -> str:
        """agl_bench_my_corr."""
        return self.distribution.replace("-", "_")

    @property
    def run(self) -> str:
        """The command that tries it once it is installed."""
        return f"agl-bench run {_RUNS[self.kind].format(name=self.name)} --evaluation inter --preset smoke"

    def file(self) -> str:
        """Class and hook in one text, for `--plugin`."""
        return self._render(f"{self.kind}.py", hookimpl=", hookimpl", hook=self._render("here.py"))

    def distribution_files(self, author: str) -> dict[str, str]:
        """The texts of a distribution, by path.

        Args:
            author: for the licence and the metadata; the distribution's authors where it is empty.
        """
        author = author or f"The {self.distribution} authors"
        here = f"src/{self.package}"
        return {
            "pyproject.toml": self._render(
                "pyproject.toml", quoted_author=json.dumps(author, ensure_ascii=False), version=agl_bench.__version__
            ),
            f"{here}/__init__.py": self._render("package.py"),
            f"{here}/{self.module}.py": self._render(f"{self.kind}.py", hookimpl="", hook=""),
            f"tests/test_{self.module}.py": self._render(f"{self.kind}_test.py"),
            "README.md": self._render("README.md", run=self.run),
            "LICENSE": self._render("LICENSE", author=author, year=str(datetime.date.today().year)),
            ".github/workflows/ci.yml": self._render("ci.yml"),
            ".gitignore": self._render("gitignore"),
        }

    def _render(self, template: str, **more: str) -> str:
        text = (files(__package__) / "templates" / f"{template}.template").read_text(encoding="utf-8")
        names = {
            "kind": self.kind,
            "name": self.name,
            "module": self.module,
            "class_name": self.class_name,
            "package": self.package,
            "distribution": self.distribution,
            "base": BASES[self.kind],
            "register": KINDS[self.kind],
        }
        return Template(text).substitute(names, **more)


def draft(kind: str, name: str, plugins: Plugins) -> Draft:
    """A plug-in with a name that can be registered, imported and published.

    Raises:
        BadPlugin: what is wrong with the name.
    """
    check_name(name)
    if len(name) > LONGEST:
        raise BadPlugin(f"'{name}' has {len(name)} letters; choose a name of at most {LONGEST}")
    taken = next((entry for entry in plugins.entries() if entry.name == name), None)
    if taken is not None:
        raise BadPlugin(f"'{name}' is taken, by a {taken.kind} of {taken.provider}; choose another name")
    made = Draft(kind, name)
    if keyword.iskeyword(made.module):
        raise BadPlugin(f"'{name}' is a word of Python, and no module can be called so; choose another name")
    if made.class_name in dir(builtins) or made.class_name in _imported(made):
        raise BadPlugin(f"the class of '{name}' would be {made.class_name}, which is taken; choose another name")
    return made


def write_file(made: Draft, folder: Path) -> Path:
    """Write the plug-in as one file into `folder`.

    Raises:
        BadSpec: if it is there already, or would stand in the way of a module of that name.
    """
    path = folder / f"{made.module}.py"
    if path.exists():
        raise BadSpec(f"{path} is there already and stays as it is; choose another name, or move it away")
    _check_free(made.module)
    path.write_text(made.file(), encoding="utf-8")
    return path


def write_distribution(made: Draft, folder: Path, author: str) -> list[Path]:
    """Write the plug-in as a distribution into `folder`, which becomes new.

    Raises:
        BadSpec: if the folder is there already, or its package would stand in the way of an installed one.
    """
    if folder.exists():
        raise BadSpec(f"{folder} is there already and stays as it is; give another folder with --into, or move it away")
    _check_free(made.package)
    written = []
    for name, text in made.distribution_files(author).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def author_in_git() -> str:
    """user.name of git; "" where there is no git or it does not know."""
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return " ".join(done.stdout.split())


def _check_free(module: str) -> None:
    """Raises `BadSpec` where Python would find two modules of one name."""
    found = importlib.util.find_spec(module)
    if found is not None:
        raise BadSpec(f"Python has a module '{module}' already ({found.origin}); choose another name")


def _imported(made: Draft) -> set[str]:
    """Names that what is written gets from elsewhere."""
    texts = [made.file(), made._render(f"{made.kind}_test.py")]
    return {
        alias.asname or alias.name
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", "") != f"{made.package}.{made.module}"
        for alias in node.names
    }
