"""Commands that begin something: new-plugin."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from agl_bench.cli.group import cli
from agl_bench.cli.opening import discover
from agl_bench.cli.options import PATH
from agl_bench.errors import BadSpec


@cli.command(name="new-plugin")
@click.argument("kind", type=click.Choice(["selector", "backbone", "dataset"]))
@click.argument("name")
@click.option("--here", is_flag=True, help="One file in this folder, for --plugin, and no distribution.")
@click.option("--into", type=PATH, metavar="FOLDER", help="New folder.  [default: agl-bench-NAME]")
def new_plugin(kind: str, name: str, here: bool, into: Path | None) -> None:
    """Write a plug-in that works and is yours to change: a distribution to publish, or one file to try.

    Nothing that is there is ever overwritten.
    """
    from agl_bench.scaffold.plugin import author_in_git, draft, write_distribution, write_file

    if here and into is not None:
        raise BadSpec("--here writes into the folder that you are in; leave out --into, or --here")
    made = draft(kind, name, discover((), warn=False))
    if here:
        path = write_file(made, Path())
        click.echo(f"wrote {path}: the class {made.class_name}, and the hook that calls it {name}")
        _say_next(f"agl-bench check {path}", f"{made.run} --plugin {path}", f"agl-bench report --plugin {path}")
        return
    folder = into or Path(made.distribution)
    author = author_in_git()
    for path in write_distribution(made, folder, author):
        click.echo(f"wrote {path}")
    named = (
        f"by {author}" if author else "with no name in it, because git knows none; set it in LICENSE, pyproject.toml"
    )
    click.echo(f"\nThe distribution {made.distribution}, MIT licence, {named}.")
    target = shlex.quote(str(folder) if folder.is_absolute() else f".{os.sep}{folder}")
    _say_next(f"pip install -e {target}", f"agl-bench check {name}", made.run)


def _say_next(*commands: str) -> None:
    click.echo("\nNext:\n" + "\n".join(f"  {command}" for command in commands))
