"""Commands on plug-ins: list, show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench import API_VERSION
from agl_bench.cli.group import cli
from agl_bench.cli.opening import discover
from agl_bench.cli.options import PLUGIN
from agl_bench.errors import UnknownName
from agl_bench.registry import stated
from agl_bench.terminal import make_console, show_plugins, styled

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from agl_bench.registry.plugins import Entry


@cli.command(name="list")
@click.argument("kind", required=False, type=click.Choice(["selectors", "backbones", "datasets"]))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@PLUGIN
def list_(kind: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """List selectors, backbones and datasets: what they are, what they need, who provides them, and what is broken.

    Nothing is imported for it but the modules that plug-ins register with.
    """
    plugins = discover(files, warn=False)
    kinds = ("selector", "backbone", "dataset") if kind is None else (kind.removesuffix("s"),)
    if as_json:
        entries = [_entry_as_json(e) for e in plugins.entries() if e.kind in kinds]
        content = {
            "api": API_VERSION,
            "entries": entries,
            "broken": [vars(b) for b in plugins.broken],
            "remarks": [vars(r) for r in plugins.remarks],
        }
        click.echo(json.dumps(content, indent=1))
        return
    show_plugins(plugins, kinds, make_console())


def _entry_as_json(entry: Entry) -> dict[str, Any]:
    """Everything that is known of an entry without its import; a flag that only the import tells is not there."""
    says = dict(entry.stated)
    return {
        "kind": entry.kind,
        "name": entry.name,
        "provider": entry.provider,
        "version": entry.version,
        "file": str(entry.source) if entry.source else None,
        "summary": entry.summary,
        "reference": says.pop(stated.SAYS[entry.kind], None),
        "flags": says,
    }


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
        console.print(styled((name, "bold"), "  preset"))
        for key, value in Protocol.of(preset.protocol).settings().items():
            console.print(f"  protocol.{key} = {value}")
        for plugin, settings in preset.plugins.items():
            for key, given in settings.items():
                console.print(f"  {plugin}.{key} = {given}")
        return
    plugins = discover(files)
    names = [e.name for e in plugins.entries()]
    if name not in names:
        raise UnknownName("plug-in or preset", name, [*names, *preset_names()])
    entry = plugins.entry(name)
    cls = entry.load()
    module = sys.modules[cls.__module__]
    console.print(styled((name, "bold"), f"  {entry.kind} of {entry.provider}\n"))
    console.print((module.__doc__ or cls.__doc__ or "").strip())
    for attribute in ("reference", "citation", "licence", "revision"):
        if getattr(cls, attribute, ""):
            console.print(f"\n{attribute}: {getattr(cls, attribute)}", end="")
    flags = stated.words(entry.kind, stated.of_class(cls, entry.kind)[1])
    if flags:
        console.print(f"\nflags: {', '.join(flags)}", end="")
    table = Table(title="\nsettings (--set)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("setting", "default", "takes"):
        table.add_column(column, overflow="fold")
    for tunable in tunables(cls).values():
        default = ",".join(tunable.default) if isinstance(tunable.default, tuple) else str(tunable.default)
        table.add_row(f"{name}.{tunable.name}", default, tunable.allowed())
    console.print("\n" if not table.rows else table)
