"""Commands on plug-ins: list, show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.cli.group import cli
from agl_bench.cli.opening import discover
from agl_bench.cli.options import PLUGIN
from agl_bench.errors import UnknownName
from agl_bench.terminal import (
    make_console,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    pass


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@PLUGIN
def list_(files: tuple[Path, ...], as_json: bool) -> None:
    """List selectors, backbones and datasets, who provides them, and what is broken."""
    plugins = discover(files, warn=False)
    if as_json:
        entries = [
            {"kind": e.kind, "name": e.name, "provider": e.provider, "summary": e.summary} for e in plugins.entries()
        ]
        click.echo(json.dumps({"entries": entries, "broken": [vars(b) for b in plugins.broken]}, indent=1))
        return
    from rich.table import Table

    console = make_console()
    for kind in ("selector", "backbone", "dataset"):
        table = Table(title=f"{kind}s", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("name", "what it is", "provided by"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for name in plugins.names(kind):
            entry = plugins.entry(name)
            table.add_row(name, entry.summary, entry.provider)
        console.print(table, "")
    if plugins.broken:
        console.print("[bold red]disabled[/]")
        for broken in plugins.broken:
            console.print(f"{broken.provider}: {broken.reason}", markup=False, highlight=False)


@cli.command()
@click.argument("name")
@PLUGIN
def show(name: str, files: tuple[Path, ...]) -> None:
    """Show one plug-in, or a preset: what it is, where it is from, and its settings."""
    from rich.table import Table

    from agl_bench.interfaces.tunable import tunables
    from agl_bench.protocol import Protocol, load_preset, preset_names

    console = make_console()
    if name in preset_names():
        preset = load_preset(name)
        console.print(f"[bold]{name}[/]  preset")
        for key, value in Protocol.of(preset.protocol).settings().items():
            console.print(f"  protocol.{key} = {value}", highlight=False)
        for plugin, settings in preset.plugins.items():
            for key, given in settings.items():
                console.print(f"  {plugin}.{key} = {given}", highlight=False)
        return
    plugins = discover(files)
    names = [e.name for e in plugins.entries()]
    if name not in names:
        raise UnknownName("plug-in or preset", name, [*names, *preset_names()])
    entry = plugins.entry(name)
    cls = entry.load()
    module = sys.modules[cls.__module__]
    console.print(f"[bold]{name}[/]  {entry.kind} of {entry.provider}\n")
    console.print((module.__doc__ or cls.__doc__ or "").strip(), markup=False, highlight=False)
    for attribute in ("reference", "citation", "licence", "revision"):
        if getattr(cls, attribute, ""):
            console.print(f"\n{attribute}: {getattr(cls, attribute)}", markup=False, highlight=False, end="")
    table = Table(title="\nsettings (--set)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("setting", "default", "takes"):
        table.add_column(column, overflow="fold")
    for tunable in tunables(cls).values():
        default = ",".join(tunable.default) if isinstance(tunable.default, tuple) else str(tunable.default)
        table.add_row(f"{name}.{tunable.name}", default, tunable.allowed())
    console.print("\n" if not table.rows else table)
