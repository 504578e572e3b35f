"""One finished cell once more, from what its result says of itself, and how the two results differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.prepare import Preparation, fingerprint
from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, Keep, choose_device
from agl_bench.bench.spec import RunSpec, content_of_files, make_dataset, part_here
from agl_bench.data.folds import FoldPlan, plan_folds
from agl_bench.errors import AglBenchError, BadSpec, NotKept
from agl_bench.registry.plugins import Plugins
from agl_bench.training.records import EpochRecord

_NAMES = ("gene", "primary")  # columns of the table of genes that say which gene it is


@dataclass(frozen=True)
class Difference:
    """A number that is not the same.

    Attributes:
        name: of the score, or of the column of the table of genes.
        before, after: its values; for a column, those of the gene where they differ most.
        gene: that gene; "" for a score.
        genes: how many genes differ.
    """

    name: str
    before: float
    after: float
    gene: str = ""
    genes: int = 0


@dataclass(frozen=True)
class Comparison:
    """A cell made twice.

    Attributes:
        conditions: what was not the same when it was made again, a sentence each: versions, plug-ins, machine.
        scores: test scores that differ.
        genes: columns of the table of genes that differ, each by the gene where it differs most.
        tables: what else differs, a sentence each: which genes there are, the course of training.
    """

    conditions: tuple[str, ...]
    scores: tuple[Difference, ...]
    genes: tuple[Difference, ...]
    tables: tuple[str, ...] = field(default=())

    @property
    def is_identical(self) -> bool:
        """Whether the results are the same bit for bit, cost apart."""
        return not (self.scores or self.genes or self.tables)


@dataclass(frozen=True)
class Repetition:
    """A cell that is to be made again.

    Attributes:
        key: under which the store has it.
        before: as it was made.
        spec: as it will be made, here and now.
        plan: its fold.
    """

    key: str
    before: Result
    spec: RunSpec
    plan: FoldPlan

    @property
    def is_same_cell(self) -> bool:
        """Whether this machine and this version would give it the same key."""
        return self.spec.key == self.key

    @property
    def can_be_added_to(self) -> bool:
        """Whether this version calls the kept cell by the key that the store has it under."""
        return self.before.spec.key == self.key


def prepare_repetition(
    store: CellStore, text: str, plugins: Plugins, prepared: Preparation, *, device: str | None = None
) -> Repetition:
    """Find a cell and turn its stored spec into one of here and now.

    Args:
        store: that has it.
        text: its key, or the beginning of it.
        plugins: who provides which name.
        prepared: the prepared sections and the data folder.
        device: "cpu", "cuda" or "auto"; None = the device that it was made on.

    Raises:
        UnknownName, BadSpec: if there is no such cell, its plug-ins or its fold are not there, or the data are others.
        MissingData: if the data are not there.
    """
    key = store.find(text)
    before = store.read_of_any_version(key)
    old = before.spec
    where = f"cell {key}"
    parts = {}
    for kind in ("dataset", "backbone", "selector"):
        try:
            parts[kind] = part_here(plugins, getattr(old, kind), kind)
        except AglBenchError as error:
            provider = getattr(old, kind).provider
            hint = f"; name its file with --plugin {provider}" if provider.endswith(".py") else ""
            raise BadSpec(f"{where} needs {kind} '{getattr(old, kind).name}' of {provider}: {error}{hint}") from None
    dataset = make_dataset(plugins, parts["dataset"])
    data = fingerprint(parts["dataset"], dataset, prepared.root, prepared.digests) + content_of_files(old.protocol)
    prepared.digests.keep()
    if data != old.data:
        raise BadSpec(
            f"{where} was made from other data: the files of dataset '{old.dataset.label}' or those that its protocol "
            f"names have the digest {data} and had {old.data}; bring them back, or run the campaign again"
        )
    plans = plan_folds(old.evaluation, dataset.sections(prepared.root), old.protocol, dataset=old.dataset.label)
    plan = next((p for p in plans if p.label == old.fold), None)
    if plan is None:
        raise BadSpec(f"{where} is of fold {old.fold}, which '{old.dataset.label}' no longer has")
    spec = RunSpec(
        parts["dataset"], parts["backbone"], parts["selector"], old.evaluation, old.fold, old.seed, old.protocol,
        old.preset, old.data, choose_device(device or old.device).type, tuning=old.tuning,
    )  # fmt: skip
    return Repetition(key, before, spec, plan)


def repeat(
    repetition: Repetition, plugins: Plugins, prepared: Preparation, *, keep: Keep
) -> Iterator[EpochRecord | Result | str]:
    """Make the cell again, on as many threads as before, and write nothing: what `Bench.train` yields."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(repetition.before.provenance.get("threads", threads)))
    try:
        bench = Bench(plugins, prepared.root, torch.device(repetition.spec.device), prepared)
        yield from bench.train(repetition.spec, repetition.plan, keep=keep)
    finally:
        torch.set_num_threads(threads)


def compare(before: Result, after: Result) -> Comparison:
    """How two results of one cell differ. NaN is equal to NaN."""
    scores = []
    for name in {**before.scores, **after.scores}:
        one, other = before.scores.get(name, np.nan), after.scores.get(name, np.nan)
        if not _equal(one, other):
            scores.append(Difference(name, one, other))
    genes, tables = _compare_genes(before.genes, after.genes)
    for what in ("epochs", "outer"):
        tables += _compare_courses(what, getattr(before, what), getattr(after, what))
    if before.best_epoch != after.best_epoch:
        tables.append(f"the best epoch was {before.best_epoch} and is {after.best_epoch}")
    return Comparison(tuple(_conditions(before, after)), tuple(scores), tuple(genes), tuple(tables))


def keep_more(store: CellStore, repetition: Repetition, after: Result) -> None:
    """Add what the repeated cell has kept to the kept one, whose result is the same.

    Raises:
        BadSpec: if another process works on the cell.
    """
    model = after.model
    if model is None and "model" in store.kept(repetition.key):
        try:
            model = store.model(repetition.key)
        except NotKept:  # damaged: no loss
            model = None
    kept = replace(repetition.before, genes=after.genes, predictions=after.predictions, model=model)
    _write(store, repetition, kept)  # genes: the same, with the columns that older versions did not write


def replace_result(store: CellStore, repetition: Repetition, after: Result) -> None:
    """Put the repeated cell in place of the kept one.

    Raises:
        BadSpec: if another process works on the cell.
    """
    _write(store, repetition, after)


def check_can_be_written(repetition: Repetition, *, keeps: bool, replaces: bool) -> None:
    """Before the work and not after it.

    Raises:
        BadSpec: if what is made here and now would be another cell, or the kept one is of a version that called it by
            another key.
    """
    if replaces and not repetition.is_same_cell:
        raise BadSpec(
            f"--replace: made here and now, cell {repetition.key} is another one, {repetition.spec.key} "
            f"({'; '.join(_identity(repetition.before.spec, repetition.spec))}); `agl-bench run` makes that one"
        )
    if keeps and not repetition.can_be_added_to:
        raise BadSpec(
            f"--keep: cell {repetition.key} is of {repetition.before.spec.version}, which counted other things into "
            "its key, and cannot be added to; `agl-bench run` makes it as one of this version"
        )


def _write(store: CellStore, repetition: Repetition, result: Result) -> None:
    lease = store.leases.take(repetition.key)
    if lease is None:
        raise BadSpec(f"another process works on cell {repetition.key}; try again when it is done")
    with lease:
        store.write(result)


def _compare_genes(before: pd.DataFrame, after: pd.DataFrame) -> tuple[list[Difference], list[str]]:
    """Columns that both tables have, gene by gene; of older results some columns are absent."""
    if before["gene"].tolist() != after["gene"].tolist():
        gone, new = set(before["gene"]) - set(after["gene"]), set(after["gene"]) - set(before["gene"])
        return [], [f"the genes are others: {len(gone)} are gone, {len(new)} are new, {len(after)} in all"]
    sentences = []
    changed = int((before["primary"].to_numpy() != after["primary"].to_numpy()).sum())
    if changed:
        sentences.append(f"{changed} genes are primary in one result and not in the other")
    found = []
    for name in before.columns.intersection(after.columns, sort=False).difference(_NAMES, sort=False):
        one, other = (t[name].to_numpy(dtype=np.float64) for t in (before, after))
        differs = ~((one == other) | (np.isnan(one) & np.isnan(other)))
        if differs.any():
            distance = np.where(differs, np.nan_to_num(np.abs(one - other), nan=np.inf), -1)
            place = int(distance.argmax())
            found.append(
                Difference(name, float(one[place]), float(other[place]), str(before["gene"][place]), int(differs.sum()))
            )
    return found, sentences


def _compare_courses(what: str, before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """The first row in which two courses of training part, seconds apart."""
    one, other = (t.drop(columns="seconds", errors="ignore") for t in (before, after))
    if one.columns.tolist() != other.columns.tolist():
        return [f"the table of {what} has other columns"]
    rows = min(len(one), len(other))
    left, right = one[:rows].reset_index(drop=True), other[:rows].reset_index(drop=True)
    differs = ~((left == right) | (left.isna() & right.isna()))
    if differs.to_numpy().any():
        row = int(differs.any(axis=1).to_numpy().argmax())
        columns = ", ".join(differs.columns[differs.iloc[row].to_numpy()])
        return [f"training parts at epoch {left['epoch'][row]}: {columns} ({what})"]
    return [f"there were {len(one)} rows of {what} and are {len(other)}"] if len(one) != len(other) else []


def _conditions(before: Result, after: Result) -> Iterator[str]:
    """What of identity and provenance is not as it was."""
    yield from _identity(before.spec, after.spec)
    for name in ("commit", "python", "machine", "threads"):
        one, other = before.provenance.get(name), after.provenance.get(name)
        if one != other:
            yield f"{name} {one}, now {other}"


def _identity(before: RunSpec, after: RunSpec) -> Iterator[str]:
    """What makes another cell of it."""
    for name in ("version", "device"):
        if getattr(before, name) != getattr(after, name):
            yield f"{'agl-bench' if name == 'version' else name} {getattr(before, name)}, now {getattr(after, name)}"
    libraries = [dict(pair.split(" ", 1) for pair in s.libraries.split(", ")) for s in (before, after)]
    for name in {**libraries[0], **libraries[1]}:
        one, other = (known.get(name, "not there") for known in libraries)
        if one != other:
            yield f"{name} {one}, now {other}"
    for kind in ("dataset", "backbone", "selector"):
        one, other = getattr(before, kind), getattr(after, kind)
        if one.source != other.source:
            yield f"the code or a file of {kind} '{one.name}' has changed ({one.provider}, now {other.provider})"
        elif one.provider != other.provider:
            yield f"{kind} '{one.name}' is of {other.provider} instead of {one.provider}"
        if new := sorted(set(other.settings) - set(one.settings)):
            yield f"{kind} '{one.name}' has settings that it did not have: {', '.join(new)}"


def _equal(one: float, other: float) -> bool:
    return one == other or (np.isnan(one) and np.isnan(other))
