"""Join the stores of different machines: finished cells, failures, skips, folds, checkpoints and tuned settings.

First every store is surveyed, and nothing is written while two of them contradict each other. Then things are copied
one by one, each whole or not at all, under the lease of its cell: a merge may be killed at any time and started again,
and the store that it writes to may be in use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agl_bench.bench import fitness
from agl_bench.bench.cells import CellStore, read_failure, read_fold
from agl_bench.bench.checkpoints import Partial
from agl_bench.bench.finished import TABLES, Unreadable, check_cell, files_of, folders, of_earlier_version, read_cell
from agl_bench.bench.leases import Leases, Owner
from agl_bench.bench.spec import RunSpec
from agl_bench.bench.tuned import Entry, read_entries, write_entry
from agl_bench.bench.versions import adopt_versions
from agl_bench.errors import BadSpec, BadWorkFolder

WHAT = ("cells", "copied", "failures", "checkpoints", "tuned", "left out")
Pair = tuple[str, tuple[str, str, str, str]]  # a selector, and what its tuned settings are for


@dataclass(frozen=True)
class Store:
    """One of the stores, as it was found. It is only looked at.

    Attributes:
        work: its work folder.
        cells: key -> what `result.json` says, of every cell that is finished and whole.
        failures: key -> folder.
        checkpoints: key -> epoch and file of the furthest one of a cell that has begun.
        tuned: what was tuned -> the settings.
        held: key -> who works on it; these cells are in none of the above.
        damaged, foreign: keys of cells that cannot be read, the latter since another version has written them.
    """

    work: Path
    cells: Mapping[str, dict[str, Any]] = field(repr=False)
    failures: Mapping[str, Path] = field(repr=False)
    checkpoints: Mapping[str, tuple[int, Path]] = field(repr=False)
    tuned: Mapping[Pair, Entry] = field(repr=False)
    held: Mapping[str, Owner] = field(repr=False)
    damaged: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @classmethod
    def look(cls, work: Path) -> Store:
        """Survey a work folder.

        Raises:
            BadSpec: if it is none, or holds tuned settings that cannot be read.
        """
        if not (work / "cells").is_dir():
            raise BadSpec(f"{work} is not a work folder of agl-bench: nothing has been run there, nothing to merge")
        held = Leases(work / "leases").running()
        cells, unreadable = {}, {}
        for folder in folders(work / "cells"):
            try:
                cells[folder.name] = check_cell(folder, folder.name)
            except Unreadable as error:
                unreadable[folder.name] = error.is_damaged
        begun = {folder.name: Partial(folder).furthest() for folder in _folders(work / "partial")}
        tuned = {
            (path.stem, entry.place): entry
            for path in sorted((work / "tuned").glob("[!.]*.toml"))
            for entry in read_entries(path)
        }
        return cls(
            work=work,
            cells={key: content for key, content in cells.items() if key not in held},
            failures={f.name: f for f in _folders(work / "failed") if f.name not in held and read_failure(f)},
            checkpoints={key: found for key, found in begun.items() if found and key not in held},
            tuned=tuned,
            held=held,
            damaged=tuple(key for key, is_damaged in unreadable.items() if is_damaged and key not in held),
            foreign=tuple(key for key, is_damaged in unreadable.items() if not is_damaged and key not in held),
        )

    def notes(self) -> list[str]:
        """What is left out of it, one sentence for each reason."""
        notes = []
        if self.held:
            who = ", ".join(dict.fromkeys(f"process {o.pid} on {o.host}" for o in self.held.values()))
            notes.append(f"{_cells(self.held)} running ({who}) and left out; merge again when they have ended")
        if self.damaged:
            notes.append(f"{_cells(self.damaged)} damaged and left out")
        if unsigned := sum("unsigned" in content for content in self.cells.values()):
            notes.append(of_earlier_version(unsigned))
        if self.foreign:
            notes.append(f"{_cells(self.foreign)} of another version of agl-bench and left out")
        if (self.work / "tune").is_dir():
            notes.append("its studies stay where they are (tune/), of them only the tuned settings are merged")
        return [f"{self.work}: {note}" for note in notes]


@dataclass(frozen=True)
class Conflict:
    """Something that stores say differently.

    Attributes:
        what: which cell, or which tuned settings.
        sides: what each store that has it says.
    """

    what: str
    sides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what}: {'; '.join(self.sides)}"


@dataclass(frozen=True)
class Plan:
    """What is going to be copied into a store, from which one.

    Attributes:
        work: of the store that is written to.
        stores: all that take part, in the order in which they were named; that of `work` first, if it was there.
        cells, failures, checkpoints: key -> where it comes from.
        tuned: what was tuned -> where its settings come from.
        conflicts: in what they differ, with nobody preferred.
        versions: of agl-bench, and how many cells each has made.
    """

    work: Path
    stores: Sequence[Store]
    cells: Mapping[str, Store] = field(repr=False)
    failures: Mapping[str, Store] = field(repr=False)
    checkpoints: Mapping[str, Store] = field(repr=False)
    tuned: Mapping[Pair, Store] = field(repr=False)
    conflicts: Sequence[Conflict]
    versions: Counter[str]

    @property
    def steps(self) -> int:
        """How many things are to be copied, folds apart."""
        return len(self.cells) + len(self.failures) + len(self.checkpoints) + len(self.tuned)


def plan_merge(sources: Sequence[Path], work: Path, prefer: Sequence[Path] = ()) -> Plan:
    """Survey all stores and decide what comes from where. Nothing is written.

    Args:
        sources: work folders; `work` may be among them.
        work: where they are joined; it need not be there yet.
        prefer: of these, the first one that has a cell decides where stores differ.

    Raises:
        BadSpec: if one of them is no work folder, or there is nothing to join.
    """
    named = list({path.resolve(): path for path in sources}.values())
    others = [path for path in named if path.resolve() != work.resolve()]
    if not others:
        raise BadSpec(f"{work} cannot be merged with itself; name another store, or another folder with --work")
    known = {path.resolve() for path in (*named, work)}
    for path in prefer:
        if path.resolve() not in known:
            raise BadSpec(f"--prefer {path} is none of the stores: {', '.join(map(str, named))}")
    own = Store.look(work) if (work / "cells").is_dir() else None
    stores = [*([own] if own else []), *map(Store.look, others)]
    first = [s for path in prefer for s in stores if s.work.resolve() == path.resolve()]
    conflicts: list[Conflict] = []
    cells: dict[str, Store] = {}
    for key in sorted({key for s in stores for key in s.cells}):
        holders = [s for s in stores if key in s.cells]
        differing = sorted({name for other in holders[1:] for name in _differing(key, holders[0], other)})
        preferred = [s for s in first if s in holders] if differing else []
        if differing and not preferred:
            title = RunSpec.from_json(holders[0].cells[key]["spec"]).title
            sides = tuple(_cell_side(s, key) for s in holders)
            conflicts.append(Conflict(f"{title} (other {', '.join(differing)})", sides))
        chosen = (preferred or holders)[0]
        is_there = own is not None and key in own.cells and not _differing(key, own, chosen)
        cells[key] = own if own and is_there else chosen
    settings: dict[Pair, Store] = {}
    for pair in sorted({pair for s in stores for pair in s.tuned}):
        holders = [s for s in stores if pair in s.tuned]
        differs = any(s.tuned[pair] != holders[0].tuned[pair] for s in holders[1:])
        preferred = [s for s in first if s in holders] if differs else []
        if differs and not preferred:
            conflicts.append(Conflict(_tuned_title(pair), tuple(_tuned_side(s, pair) for s in holders)))
        chosen = (preferred or holders)[0]
        settings[pair] = own if own and own.tuned.get(pair) == chosen.tuned[pair] else chosen
    failures = {key: s for s in reversed(stores) for key in s.failures if key not in cells}
    furthest: dict[str, Store] = {}
    for store in stores:
        for key, (epoch, _) in store.checkpoints.items():
            if key not in cells and (key not in furthest or epoch > furthest[key].checkpoints[key][0]):
                furthest[key] = store
    return Plan(
        work=work,
        stores=stores,
        cells={key: s for key, s in cells.items() if s is not own},
        failures={key: s for key, s in failures.items() if s is not own},
        checkpoints={key: s for key, s in furthest.items() if s is not own},
        tuned={pair: s for pair, s in settings.items() if s is not own},
        conflicts=conflicts,
        versions=Counter(str(s.cells[key]["spec"]["version"]) for key, s in cells.items()),
    )


@dataclass
class Outcome:
    """What a merge has done.

    Attributes:
        counts: by work folder, how much of `WHAT`: its finished cells, and what was copied from it.
        notes: what a person should know, one sentence each.
    """

    counts: dict[Path, Counter[str]]
    notes: list[str]


def merge(plan: Plan, outcome: Outcome) -> Iterator[int]:
    """Copy what is planned. Yields how much has been copied so far.

    Args:
        plan: without conflicts.
        outcome: is filled.

    Raises:
        BadWorkFolder: if something cannot be read or written; what was copied before stays, and the same merge goes on.
    """
    try:
        yield from _merge(plan, CellStore(plan.work), outcome)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise BadWorkFolder(
            f"merging into {plan.work} stopped: {where}{error.strerror or error}; what is copied is kept, the same "
            "command continues"
        ) from None


def _merge(plan: Plan, store: CellStore, outcome: Outcome) -> Iterator[int]:
    for one in plan.stores:
        count = outcome.counts[one.work] = Counter[str]()
        count["cells"] = len(one.cells)
        if one.work == plan.work and (replaced := len(plan.cells.keys() & one.cells.keys())):
            outcome.notes.append(
                f"{plan.work}: {replaced} of its own cells were replaced; MLflow shows the former ones until it is "
                "begun anew"
            )
        count["left out"] = len(one.held) + len(one.damaged) + len(one.foreign)
        outcome.notes += one.notes()
        if one.work != plan.work:
            outcome.notes += _keep_folds(one.work, store)
            fitness.adopt(plan.work, one.work)
            adopt_versions(plan.work, one.work)
    done, busy = 0, list[str]()

    def take(key: str, source: Store, what: str) -> None:
        """Copy one thing of a cell, unless another process works on the cell or has just finished it."""
        count = outcome.counts[source.work]
        lease = store.leases.take(key)
        if lease is None:
            busy.append(key)
            count["left out"] += 1
            return
        with lease:
            if what == "copied":
                try:
                    store.adopt(source.work / "cells" / key)
                except Unreadable as error:
                    outcome.notes.append(f"{source.work}: cell {key} is damaged and was left out ({error})")
                    count["left out"] += 1
                    return
            elif store.is_finished(key):
                return
            elif what == "failures":
                store.adopt_failure(source.failures[key])
            else:
                store.begun(key).adopt(source.checkpoints[key][1])
            count[what] += 1

    for what, planned in (("copied", plan.cells), ("checkpoints", plan.checkpoints), ("failures", plan.failures)):
        for key, source in planned.items():
            take(key, source, what)
            done += 1
            yield done
    for (selector, place), source in plan.tuned.items():
        write_entry(plan.work / "tuned", selector, source.tuned[selector, place])
        outcome.counts[source.work]["tuned"] += 1
        done += 1
        yield done
    if busy:
        outcome.notes.append(
            f"{plan.work}: other processes work on {len(set(busy))} of these cells, left out; merge again when they end"
        )
    if len(plan.versions) > 1:
        made = ", ".join(f"{version}: {count}" for version, count in plan.versions.most_common())
        outcome.notes.append(
            f"cells of {len(plan.versions)} versions of agl-bench ({made}): comparisons keep them apart, and `run` "
            "finds those of its own version"
        )


def _keep_folds(work: Path, store: CellStore) -> list[str]:
    """Copy the folds of a store; what is wrong with any."""
    notes = []
    for path in sorted((work / "folds").glob("[!.]*.csv")):
        table = read_fold(path)
        if table is not None:
            store.keep_fold(table)
        else:
            notes.append(f"{work}: the fold {path.name} is damaged and left out")
    return notes


def _differing(key: str, one: Store, other: Store) -> list[str]:
    """In what two results of one cell differ; cost, times and provenance may."""
    if one is other:
        return []
    first, second = one.cells[key], other.cells[key]
    names = [n for n in ("scores", "best_epoch") if json.dumps(first[n]) != json.dumps(second[n])]
    if all(files_of(first)[f"{n}.parquet"][1] == files_of(second)[f"{n}.parquet"][1] for n in TABLES):
        return names
    left, right = (_tables(s.work / "cells" / key) for s in (one, other))
    return names + [n for n in left if not left[n].equals(right[n])]


def _tables(folder: Path) -> dict[str, Any]:
    """The tables of a cell, without what needs not be reproducible in them."""
    result = read_cell(folder)
    return {
        "genes": result.genes,
        "epochs": result.epochs.drop(columns="seconds", errors="ignore"),
        "outer": result.outer,
    }


def _cell_side(store: Store, key: str) -> str:
    content = store.cells[key]
    made = content["provenance"]
    return (
        f"PCC {content['scores']['pcc_gene_mean_section_mean']:.9g} in {store.work} "
        f"({made.get('machine', 'unknown machine')}, commit {made.get('commit') or 'unknown'})"
    )


def _tuned_title(pair: Pair) -> str:
    selector, (dataset, evaluation, backbone, fold) = pair
    return f"tuned settings of {selector} on {dataset}, {evaluation}-batch, backbone {backbone}" + (
        f", fold {fold}" if fold else ""
    )


def _tuned_side(store: Store, pair: Pair) -> str:
    entry = store.tuned[pair]
    return f"validation PCC {entry.validation_pcc:.6g} of {entry.trials} trials in {store.work}"


def _folders(folder: Path) -> list[Path]:
    """The folders of cells in a folder that may be absent."""
    return sorted(p for p in folder.glob("[!.]*") if p.is_dir())


def _cells(keys: Any) -> str:
    return f"{len(keys)} cells are" if len(keys) > 1 else "1 cell is"
