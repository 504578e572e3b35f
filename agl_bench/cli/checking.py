"""Commands that judge: audit, check, validate, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.cli.group import cli
from agl_bench.cli.opening import check_writable, discover, say_left_out
from agl_bench.cli.options import DATA, PLUGIN, SET, WORK
from agl_bench.errors import BadPlugin
from agl_bench.terminal import (
    make_console,
    show_findings,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    pass


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to audit.")
@click.option("--datasets", multiple=True, metavar="A,B", help="Datasets to audit them on.")
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--fold", multiple=True, metavar="A,B", help="These folds.  [default: the first of each evaluation]")
@click.option("--preset", help="Protocol to audit: clean, paper or smoke.  [default: clean]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file as for run; options here win.")
@SET
@click.option("--epochs", type=click.IntRange(2), default=3, show_default=True, help="Of each training.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every finding.")
@PLUGIN
@DATA
def audit(
    files: tuple[Path, ...],
    root: Path,
    config: Path | None,
    preset: str | None,
    assignments: tuple[str, ...],
    epochs: int,
    device: str,
    json_file: Path | None,
    **lists: tuple[str, ...],
) -> None:
    """Show that test and validation expression reach nothing before their turn.

    Everything is built and trained with the expression as measured, with garbage at the test spots and with garbage at
    the validation spots, and compared stage by stage, bit for bit. The exit status is 0 if nothing changes but what the
    protocol declares, 1 if something else does, 2 if the input is wrong.
    """
    from dataclasses import replace

    from agl_bench.bench.spec import Campaign

    plugins = discover(files)
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    check_writable("--json", json_file)

    from agl_bench.bench.audit import as_json, audit, short
    from agl_bench.bench.run import choose_device, fingerprints

    torch_device = choose_device(device)
    campaign = replace(campaign, protocol=short(campaign.protocol, epochs))
    known = fingerprints(campaign, plugins, root, None)
    cells = campaign.cells(plugins, root, device=torch_device.type, fingerprint=known)
    if not campaign.folds:
        first = {(spec.dataset.label, spec.evaluation): plan for spec, plan in reversed(cells)}
        cells = [(s, plan) for s, plan in cells if first[s.dataset.label, s.evaluation] == plan]
    console = make_console()
    say_left_out(campaign, cells)
    with console.status("building and training three times each"):
        findings = list(audit(cells, plugins, root, torch_device))
    show_findings(findings, campaign.preset, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(findings, campaign.protocol), indent=1), encoding="utf-8")
    if any(f.is_bad for f in findings):
        sys.exit(1)


@cli.command()
@click.argument("name", metavar="PATH|NAME")
@SET
@PLUGIN
@DATA
def validate(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Check sections, yours or a dataset's: a line for each sound one, a sentence for every problem.

    PATH is a folder or a store in the layout of any dataset, which is recognised. The exit status is 0 if all is
    sound, 2 otherwise.
    """
    from agl_bench.bench.validate import find_dataset, validate

    called, dataset = find_dataset(discover(files), name, assignments)
    click.echo(f"read as {called}")
    found = 0
    for verdict in validate(called, dataset, root):
        if verdict.facts:
            click.echo(f"{verdict.section}: {verdict.facts}")
        for problem in verdict.problems:
            found += 1
            click.echo(f"agl-bench: {' '.join(problem.split())}", err=True)
    if found:
        click.echo(f"{found} problem{'s' if found > 1 else ''} found")
        sys.exit(2)


@cli.command()
@click.argument("name")
@SET
@PLUGIN
@DATA
def check(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Check a plug-in against the rules of its door. NAME is a plug-in or a .py file."""
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.testing import check_backbone, check_dataset, check_selector

    if name.endswith(".py"):
        plugins = discover((*files, Path(name)))
        entries = [e for e in plugins.entries() if e.provider == Path(name).name]
        if not entries:
            raise BadPlugin(f"plug-in {name}: it registers nothing; return {{name: class}} from a hook")
    else:
        plugins = discover(files)
        entries = [plugins.entry(name.partition(":")[0])]
    console = make_console()
    broken = 0
    for entry in entries:
        word = name if name.startswith(f"{entry.name}:") else entry.name
        part = one_part(plugins, word, entry.kind, assignments)
        if entry.kind == "selector":
            verdicts = check_selector(entry.load(), part.settings)
        elif entry.kind == "backbone":
            verdicts = check_backbone(entry.load(), part.settings)
        else:
            verdicts = check_dataset(make_dataset(plugins, part), root)
        console.print(f"[bold]{entry.name}[/]  {entry.kind} of {entry.provider}")
        for verdict in verdicts:
            mark = "[green]ok[/]  " if verdict.problem is None else "[red]FAIL[/]"
            console.print(f"  {mark} {verdict.rule}")
            if verdict.problem is not None:
                broken += 1
                console.print(f"       {verdict.problem}", markup=False, highlight=False)
    if broken:
        console.print(f"{broken} rule{'s' if broken > 1 else ''} broken")
        sys.exit(1)


@cli.command()
@PLUGIN
@DATA
@WORK
def doctor(files: tuple[Path, ...], root: Path, work: Path) -> None:
    """Say what this machine has and what is missing."""
    from agl_bench.bench.doctor import diagnose

    console = make_console()
    findings = diagnose(discover(files, warn=False), root, work)
    for finding in findings:
        mark = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "problem": "[red]FAIL[/]"}[finding.level]
        console.print(f"{mark} [bold]{finding.subject}[/]: ", end="")
        console.print(finding.text, markup=False, highlight=False)
    if any(f.level == "problem" for f in findings):
        sys.exit(1)
