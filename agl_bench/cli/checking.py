"""Commands that judge: audit, check, validate, doctor."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.addresses import masked
from agl_bench.cli.group import cli
from agl_bench.cli.opening import discover, say_left_out
from agl_bench.cli.options import DATA, MOST, PATH, PLUGIN, SET, WORK, words
from agl_bench.cli.writing import check_writable, write_text
from agl_bench.errors import BadPlugin, MissingData, UnknownName
from agl_bench.terminal import (
    make_console,
    show_findings,
    show_verdict,
    show_verdict_counts,
    styled,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from agl_bench.registry.plugins import Entry, Plugins
    from agl_bench.testing import Contract, Verdict


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to audit.")
@click.option("--datasets", multiple=True, metavar="A,B", help="Datasets to audit them on.")
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--fold", multiple=True, metavar="A,B", help="These folds.  [default: the first of each evaluation]")
@click.option("--preset", help="Protocol to audit: clean, paper or smoke.  [default: clean]")
@click.option("--config", type=PATH, help="TOML file as for run; options here win.")
@SET
@click.option("--epochs", type=click.IntRange(2, MOST), default=3, show_default=True, help="Of each training.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write every finding.")
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
        write_text(json_file, json.dumps(as_json(findings, campaign.protocol), indent=1))
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
            click.echo(f"{verdict.section}: {verdict.facts}" if verdict.section else verdict.facts)
        for problem in verdict.problems:
            found += 1
            click.echo(f"agl-bench: {' '.join(problem.split())}", err=True)
    if found:
        click.echo(f"{found} problem{'s' if found > 1 else ''} found")
        sys.exit(2)


@cli.command()
@click.argument("name", metavar="NAME|PATH")
@click.option("--rule", "rules", multiple=True, metavar="A,B", help="These rules only, named as in the list.")
@click.option("--json", "json_file", type=PATH, help="Write every verdict.")
@SET
@PLUGIN
@DATA
def check(
    name: str,
    rules: tuple[str, ...],
    json_file: Path | None,
    assignments: tuple[str, ...],
    files: tuple[Path, ...],
    root: Path,
) -> None:
    """Check a plug-in against the rules of its door.

    NAME is a plug-in, PATH a .py file or the folder of a distribution, installed or not. Of each rule it says whether
    it is kept, broken, known to be broken, or skipped and why, and which paragraph of docs/rules.md explains it. The
    exit status is 0 if no rule is broken, 1 if one is, 2 if the input is wrong.
    """
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.testing import BackboneContract, DatasetContract, SelectorContract
    from agl_bench.testing.dataset import ABSENT

    check_writable("--json", json_file)
    plugins, entries = _named(name, files)
    contracts: list[tuple[Entry, Contract]] = []
    for entry in entries:
        word = name if name.startswith(f"{entry.name}:") else entry.name
        about = [a for a in assignments if len(entries) == 1 or a.startswith(f"{entry.name}.")]
        part = one_part(plugins, word, entry.kind, about)
        given = {key: part.settings[key] for key in (a.partition("=")[0].partition(".")[2] for a in about)}
        if entry.kind == "selector":
            contracts.append((entry, SelectorContract.of(entry.load(), settings=given)))
        elif entry.kind == "backbone":
            contracts.append((entry, BackboneContract.of(entry.load(), settings=given)))
        else:
            contracts.append((entry, DatasetContract.of(make_dataset(plugins, part), root=root)))
    wanted = words("--rule", rules)
    known = {rule for _, contract in contracts for rule in contract.rules()}
    for rule in wanted:
        if rule.removeprefix("test_") not in known:
            raise UnknownName("rule", rule, known)
    console = make_console()
    found: dict[str, list[Verdict]] = {}
    for entry, contract in contracts:
        console.print(styled((entry.name, "bold"), f"  {entry.kind} of {entry.provider}"))
        here = [rule for rule in wanted if rule.removeprefix("test_") in contract.rules()]
        if wanted and not here:
            continue
        here_found = found[entry.name] = []
        for verdict in contract.verdicts(here):
            show_verdict(verdict, console, here_found[-1] if here_found else None)
            here_found.append(verdict)
    every = [verdict for verdicts in found.values() for verdict in verdicts]
    if json_file is not None:
        told = {name: [verdict.as_json() for verdict in verdicts] for name, verdicts in found.items()}
        write_text(json_file, json.dumps({"format": 1, "plugins": told}, indent=1))
    show_verdict_counts(every, console)
    if any(verdict.outcome == "broken" for verdict in every):
        sys.exit(1)
    absent = [verdict.reason for verdict in every if verdict.reason.startswith(ABSENT)]
    if absent:  # half a check is no check
        raise MissingData(f"{len(absent)} rules could not be looked at: {absent[0]}")


def _named(name: str, files: tuple[Path, ...]) -> tuple[Plugins, list[Entry]]:
    """What a name or a path stands for, and the plug-ins among which it is.

    Raises:
        UnknownName, BadPlugin: if nothing is there, or what is there registers nothing.
    """
    path = Path(name)
    is_path = os.sep in name and ":" not in name
    is_folder = path.is_dir() and (is_path or name in (".", "..") or (path / "pyproject.toml").is_file())
    if not (name.endswith(".py") or is_folder):
        if is_path or path.is_file():
            raise BadPlugin(
                f"plug-in {name}: {'it is not a .py file' if path.exists() else 'there is no such path'}; give a "
                "name, a .py file or the folder of a distribution"
            )
        plugins = discover(files)
        return plugins, [plugins.entry(name.partition(":")[0])]
    plugins = discover((*files, path))
    provider = path.name
    if is_folder:
        from agl_bench.registry.folders import Folder
        from agl_bench.registry.plugins import GROUP

        provider = Folder.at(path, GROUP).provider
    entries = [e for e in plugins.entries() if e.provider == provider]
    if not entries:
        raise BadPlugin(f"plug-in {name}: it registers nothing; return {{name: class}} from a hook")
    return plugins, entries


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
        mark = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "problem": ("FAIL", "red")}[finding.level]
        console.print(styled(mark, " ", (finding.subject, "bold"), f": {masked(finding.text)}"))
    if any(f.level == "problem" for f in findings):
        sys.exit(1)
