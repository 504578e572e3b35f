"""Tuned settings as files: `tuned/<selector>.toml`, written by `tune`, taken by `run --tuned`.

A file holds one entry for each study of its selector: what was searched, at what budget, under which conditions, and
the settings that were best on validation spots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from agl_bench.bench.spec import RunSpec, Tuning
from agl_bench.data.folds import FoldPlan
from agl_bench.digests import text_digest
from agl_bench.errors import AglBenchError, BadSpec, BadWorkFolder
from agl_bench.interfaces.tunable import Value, resolve, tunables
from agl_bench.protocol import Protocol, read_toml
from agl_bench.registry.plugins import Plugins

FORMAT = 1
STUDIES = "studies"  # folder beside the files, with trials and figures of each study


@dataclass(frozen=True)
class Entry:
    """The outcome of one study.

    Attributes:
        study: name.
        dataset, evaluation, backbone: what the study is about; the dataset as the user named it.
        fold: the outer fold that the settings are for; "" = all of them.
        trials: the budget.
        points: trials that were finished, fewer where the search space has no more points.
        pruned: of these, those that were ended early or diverged.
        folds, seeds: a trial trains each pair of them once.
        sampler, pruner: how points were chosen and bad ones ended.
        validation_pcc: of the best trial.
        conditions: digest of everything that was held equal, see `conditions`.
        settings: the best value of every searched setting, by NAME.KEY.
    """

    study: str
    dataset: str
    evaluation: str
    backbone: str
    fold: str
    trials: int
    points: int
    pruned: int
    folds: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str
    pruner: str
    validation_pcc: float
    conditions: str
    settings: dict[str, Value]

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What a file has one entry for."""
        return self.dataset, self.evaluation, self.backbone, self.fold

    @property
    def tuning(self) -> Tuning:
        """As a cell carries it."""
        return Tuning(self.trials, self.points, self.study, self.validation_pcc, tuple(self.settings))


def conditions(spec: RunSpec, searched: Sequence[str]) -> str:
    """Digest of what a tuned setting was found under: data, evaluation, and every setting that was not searched."""
    content: dict[str, Any] = {"data": spec.data, "evaluation": spec.evaluation}
    for part in (spec.dataset, spec.backbone, spec.selector):
        content[part.name] = {k: v for k, v in part.settings.items() if f"{part.name}.{k}" not in searched}
    content["protocol"] = {k: v for k, v in spec.protocol.record().items() if f"protocol.{k}" not in searched}
    return text_digest(json.dumps(content, sort_keys=True))


def with_settings(spec: RunSpec, settings: Mapping[str, Value]) -> RunSpec:
    """The cell with other settings of its selector, its backbone or the protocol, by NAME.KEY."""
    values: dict[str, dict[str, Value]] = {
        spec.selector.name: dict(spec.selector.settings),
        spec.backbone.name: dict(spec.backbone.settings),
        "protocol": spec.protocol.settings(),
    }
    for name, value in settings.items():
        owner, _, key = name.partition(".")
        values[owner][key] = value
    return replace(
        spec,
        selector=replace(spec.selector, settings=values[spec.selector.name]),
        backbone=replace(spec.backbone, settings=values[spec.backbone.name]),
        protocol=Protocol.of(values["protocol"]),
    )


def write_entry(folder: Path, selector: str, entry: Entry) -> Path:
    """Put an entry in the file of its selector, in place of an earlier one about the same.

    Raises:
        BadWorkFolder: if the file cannot be written.
        BadSpec: if what is there is no such file.
    """
    path = folder / f"{selector}.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # studies of one selector may end in several processes at once
            known = {e.place: e for e in read_entries(path)} if path.exists() else {}
            known[entry.place] = entry
            partial = path.with_name(f".{path.name}.new")
            partial.write_text(_text(selector, list(known.values())), encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise BadWorkFolder(
            f"cannot write {path}: {error.strerror or error}; choose another folder with --out"
        ) from None
    return path


def _text(selector: str, entries: Sequence[Entry]) -> str:
    """The content of a file."""
    lines = [
        "# Written by agl-bench tune; agl-bench run --tuned DIR takes the folder that this file is in.",
        "# Settings are the best on validation spots; no test score was computed to find them.",
        f"format = {FORMAT}",
        f"selector = {_toml(selector)}",
    ]
    for one in entries:
        content = asdict(one)
        settings = content.pop("settings")
        content["digest"] = _digest(one)
        lines += ["", "[[studies]]", *(f"{key} = {_toml(value)}" for key, value in content.items())]
        lines += ["[studies.settings]", *(f"{_toml(key)} = {_toml(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def check_writable(folder: Path) -> None:
    """Before the work and not after it.

    Raises:
        BadWorkFolder: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise BadWorkFolder(f"cannot write to {folder}: {error.strerror or error}; choose another with --out") from None


def _toml(value: object) -> str:
    """A value as TOML writes it: text, numbers, switches and lists of these look as in JSON."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # which JSON lets stand


def _digest(entry: Entry) -> str:
    """Of what a file says of a study."""
    return text_digest(json.dumps(asdict(entry), sort_keys=True))


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        BadSpec: if it cannot be read or is no such file.
    """
    table = read_toml(path, allowed=("format", "selector", "studies"))
    if table.get("format") != FORMAT:
        raise BadSpec(f"{path} is not a file of tuned settings of format {FORMAT}; write it with `agl-bench tune`")
    names = {f.name for f in fields(Entry)}
    entries = []
    for number, study in enumerate(table.get("studies", []), start=1):
        digest = study.pop("digest", None) if isinstance(study, dict) else None
        if not isinstance(study, dict) or set(study) != names or not _is_typed(study):
            raise BadSpec(f"{path}: study {number} is incomplete; write the file again with `agl-bench tune`")
        entries.append(Entry(**study | {name: tuple(study[name]) for name in ("folds", "seeds")}))
        if digest not in (None, _digest(entries[-1])):
            raise BadSpec(
                f"{path}: study {number} has changed since `agl-bench tune` wrote it; run the same command again, "
                "which keeps finished trials, or delete its line 'digest' if the change is intended"
            )
    return entries


def _is_typed(study: Mapping[str, Any]) -> bool:
    """Whether a study has texts, numbers and lists where they belong."""
    kinds = {"int": int, "float": float, "str": str, "tuple[str, ...]": list, "tuple[int, ...]": list}
    is_typed = all(type(study[f.name]) is kinds.get(str(f.type), dict) for f in fields(Entry))
    return (
        is_typed
        and all(type(fold) is str for fold in study["folds"])
        and all(type(seed) is int for seed in study["seeds"])
        and all(isinstance(value, bool | int | float | str | list) for value in study["settings"].values())
    )


def tuned_cells(
    cells: Sequence[tuple[RunSpec, FoldPlan]], plugins: Plugins, folder: Path, *, transfer: bool = False
) -> list[tuple[RunSpec, FoldPlan]]:
    """The cells again with the tuned settings of their selectors.

    Args:
        cells: with fixed settings.
        plugins: who provides which name.
        folder: of `<selector>.toml`.
        transfer: take settings that were found on other data or under other conditions.

    Raises:
        BadSpec: if a selector has no settings for a cell, if they were found under other conditions, or if selectors
            had different budgets.
    """
    if not folder.is_dir():
        raise BadSpec(f"--tuned {folder} is not a folder; `agl-bench tune` writes one, by default WORK/tuned")
    entries: dict[str, list[Entry]] = {}
    found = []
    budgets: dict[tuple[str, str, str, str], dict[str, object]] = {}
    for spec, plan in cells:
        name = spec.selector.name
        if name not in entries:
            path = folder / f"{name}.toml"
            if os.path.lexists(path) and not path.is_file():
                raise BadSpec(f"{path} is not a file; move it away and run `agl-bench tune --selectors {name} …` again")
            if not path.is_file():
                raise BadSpec(
                    f"{path} does not exist: {name} has not been tuned, and untuned beside tuned is no comparison; "
                    f"run `agl-bench tune --selectors {name} …` with the same budget, or leave it out"
                )
            entries[name] = read_entries(path)
        entry = _entry_for(spec, entries[name], folder / f"{name}.toml", transfer=transfer)
        common = sorted(key for key in entry.settings if not key.startswith(f"{name}."))
        budget = entry.trials, len(entry.folds), len(entry.seeds), entry.sampler, entry.pruner, common
        budgets.setdefault((spec.dataset.label, spec.evaluation, spec.backbone.name, spec.fold), {})[name] = budget
        found.append((replace(_applied(spec, entry, plugins, folder), tuning=entry.tuning), plan))
    for (dataset, evaluation, backbone, _), by_selector in budgets.items():
        if len({repr(b) for b in by_selector.values()}) > 1:
            said = "; ".join(f"{name} {_budget_text(b)}" for name, b in by_selector.items())
            raise BadSpec(
                f"selectors were tuned with different budgets on {dataset}, {evaluation}-batch, backbone {backbone}: "
                f"{said}; tune all of them by one command"
            )
    return found


def _entry_for(spec: RunSpec, entries: Sequence[Entry], path: Path, *, transfer: bool) -> Entry:
    where = f"{spec.dataset.label}, {spec.evaluation}-batch, backbone {spec.backbone.name}"
    place = spec.dataset.label, spec.evaluation, spec.backbone.name
    here = [e for e in entries if e.place in ((*place, spec.fold), (*place, ""))]
    here.sort(key=lambda e: not e.fold)  # settings for this very fold first
    if here and not transfer and conditions(spec, tuple(here[0].settings)) != here[0].conditions:
        raise BadSpec(
            f"{path}: its settings for {where} were found on other data or under another protocol than this run's; "
            "tune again, or take them all the same with --transfer"
        )
    if here:
        return here[0]
    if not transfer:
        raise BadSpec(f"{path} has no settings for {where}; tune there too, or take those of elsewhere with --transfer")
    near = [e for e in entries if (e.evaluation, e.backbone, e.fold) == (*place[1:], "")] or list(entries)
    if len(near) != 1:
        raise BadSpec(f"{path} has {len(near)} candidates for --transfer to {where}, and it takes exactly one")
    return near[0]


def _applied(spec: RunSpec, entry: Entry, plugins: Plugins, folder: Path) -> RunSpec:
    """The cell with the settings of an entry, checked as if they had been typed."""
    own = (spec.selector.name, "selector"), (spec.backbone.name, "backbone")
    try:
        for name, kind in own:
            given = {k.partition(".")[2]: v for k, v in entry.settings.items() if k.partition(".")[0] == name}
            resolve(name, tunables(plugins.entry(name, kind).load()), given)
        for key in entry.settings:
            if key.partition(".")[0] not in ("protocol", spec.selector.name, spec.backbone.name):
                raise BadSpec(f"{key} belongs to no part of this cell")
        return with_settings(spec, entry.settings)
    except AglBenchError as error:
        raise BadSpec(f"{folder / spec.selector.name}.toml: {error}") from None


def _budget_text(budget: object) -> str:
    assert isinstance(budget, tuple)
    trials, folds, seeds, sampler, pruner, common = budget
    also = f", with {', '.join(common)}" if common else ""
    return f"{trials} trials of {folds} folds × {seeds} seeds ({sampler}, pruner {pruner}{also})"
