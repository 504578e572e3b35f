"""The leak audit: build and train everything twice, with other expression at the test or validation spots.

What is computed before evaluation must be the same bit for bit. Three variants of the same sections: as measured, with
garbage at the test spots, with garbage at the validation spots. Garbage are valid counts: those of each spot are dealt
to its genes anew and multiplied, so that a spot has as many detected genes as before and nothing else. The sections are
changed in place, so that whatever a plug-in has kept of them changes too.

A protocol may declare that it lets such spots in (`DECLARED`); then the stages are named, and the genes are held as
they were so that what comes after is still looked at. Everything else that changes is a leak.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from agl_bench.bench.run import Bench
from agl_bench.bench.spec import Part, RunSpec, make_dataset, naming_the_dataset
from agl_bench.data.check import check_dataset, check_section
from agl_bench.data.folds import Fold, FoldPlan
from agl_bench.data.gene_ids import tell_apart
from agl_bench.data.prepared import PatchSize
from agl_bench.data.preprocess import SpotTable
from agl_bench.data.store import SpotStore
from agl_bench.errors import AglBenchError, BadPlugin, told
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.spots import Section
from agl_bench.maths.seeds import seed_for
from agl_bench.protocol import Protocol
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import Trainer

Counts = Any  # of a section: an array or a sparse matrix, (spots, genes)
Spots = Literal["test", "validation"]
SETS: tuple[Spots, ...] = ("test", "validation")
MOST = 5  # counts of a garbage spot are multiplied by 1 to so many
AT_ONCE = 256  # spots whose images are looked at at once

FOLD_SETS = ("train", "held_out", "validation", "test")

# Stages, in the order in which they are computed; the first six are shared by all selectors.
FOLDS, FILTER, PRIMARY, RANKS = "folds", "gene filter", "primary genes", "ranks"
SEEN, TRAINING_EXPRESSION = "what the backbone sees", "training expression"
MODEL, SELECTOR, REACH = "model before training", "selector before training", "test spots out of reach"
TRAINING, CHOICE, FINAL = "training, every epoch", "choice of the epoch", "model, selector and weights kept"
SCORES = "test scores"


@dataclass(frozen=True)
class Declared:
    """Something that a protocol does in the open.

    Attributes:
        stages: what changes with it.
        spots: whose expression it lets in.
        applies: whether a protocol does it.
        reason: one line.
    """

    stages: tuple[str, ...]
    spots: tuple[Spots, ...]
    applies: Callable[[Protocol], bool]
    reason: str


DECLARED = (
    Declared(
        (FILTER, PRIMARY, RANKS),
        SETS,
        lambda protocol: protocol.genes_from == "all",
        "protocol.genes_from = all: genes are filtered, chosen and ranked on all spots, test and validation ones "
        "included (later stages are shown with the genes held)",
    ),
    Declared(
        (TRAINING,),
        ("validation",),
        lambda protocol: protocol.held_out_share == 0,
        "protocol.held_out_share = 0: the outer loss of selectors that learn is that of the validation spots, which "
        "also choose the epoch",
    ),
    Declared(
        (TRAINING,),
        ("validation",),
        lambda protocol: protocol.schedule == "two_stage" or protocol.warm_start != "none",
        "protocol.schedule = two_stage or protocol.warm_start: validation spots end the rounds, and the model goes on "
        "from the best epoch of a round",
    ),
)
# What test and validation spots are for, in every protocol: the scores, and the choice of the epoch with what follows.
MEANT: frozenset[tuple[str, Spots]] = frozenset(
    {(SCORES, "test"), (CHOICE, "validation"), (FINAL, "validation"), (SCORES, "validation")}
)
MUST_CHANGE: frozenset[tuple[str, Spots]] = frozenset({(SCORES, "test"), (CHOICE, "validation")})


@dataclass(frozen=True)
class Finding:
    """One stage of one cell.

    Attributes:
        dataset, evaluation, backbone, fold: where.
        selector: "" for what all selectors share.
        stage: what was compared.
        verdict: of each set of spots: "same"; "declared", it changed and the protocol says so; "meant", it changed
            and may; "LEAK"; "BLIND", it should have changed and did not, so that the audit proves nothing.
        reasons: of what is declared.
    """

    dataset: str
    evaluation: str
    backbone: str
    fold: str
    selector: str
    stage: str
    verdict: dict[Spots, str]
    reasons: tuple[str, ...] = ()

    @property
    def is_bad(self) -> bool:
        """Whether something leaks that nobody declares, or the audit is blind."""
        return bool({"LEAK", "BLIND"} & set(self.verdict.values()))


def short(protocol: Protocol, epochs: int) -> Protocol:
    """The same protocol with few epochs, all of them trained, outer steps among them."""
    return replace(
        protocol,
        epochs=epochs,
        patience=max(epochs, protocol.patience),
        outer_start=min(protocol.outer_start, epochs - 1),
        round_patience=1,  # a round ends within the few epochs, wherever it can
        outer_passes=min(protocol.outer_passes, 2),
    )


def audit(
    cells: Iterable[tuple[RunSpec, FoldPlan]], plugins: Plugins, root: Path, device: torch.device
) -> Iterator[Finding]:
    """Audit cells; neighbours that differ in the selector only share what selectors share.

    Args:
        cells: of `Campaign.cells`.
        plugins: names to objects.
        root: data folder.
        device: to train on.

    Raises:
        AglBenchError: for bad input, as a run would.
    """
    bench = Bench(plugins, root, device)
    for _, group in itertools.groupby(cells, lambda cell: (replace(cell[0], selector=_NOBODY), cell[1])):
        members = list(group)
        spec = members[0][0]
        sections = _read(spec.dataset, bench)
        measured = _Variant(bench, sections, {})
        digests: dict[str, list[dict[str, Any]]] = {"measured": measured.digests(members, None)}
        for spots in SETS:
            variant = _Variant(bench, sections, _garbage(measured.table, measured.fold, spots, spec.seed))
            digests[spots] = variant.digests(members, measured.split)
        for number, selector in enumerate(["", *(s.selector.name for s, _ in members)]):
            yield from _compare(spec, selector, {name: found[number] for name, found in digests.items()})


_NOBODY = Part("", {}, "", "")


def _read(part: Part, bench: Bench) -> list[Section]:
    """The sections as the dataset gives them, and not as they were prepared: it may have kept them, or leak itself."""
    dataset = make_dataset(bench.plugins, part)
    with naming_the_dataset(part):
        sections = dataset.load(bench.root)
    for section in sections:
        check_section(section, has_counts=dataset.has_counts)
    tell_apart(sections)
    check_dataset(part.label, sections)
    return sections


def _compare(spec: RunSpec, selector: str, digests: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """One finding for each stage of `digests["measured"]`."""
    for stage, expected in digests["measured"].items():
        verdict: dict[Spots, str] = {}
        reasons = []
        for spots in SETS:
            if stage == REACH:  # looked for, not compared
                verdict[spots] = "LEAK" if expected and spots == "test" else "same"
                continue
            declared = next(
                (d for d in DECLARED if stage in d.stages and spots in d.spots and d.applies(spec.protocol)), None
            )
            if digests[spots][stage] == expected:
                verdict[spots] = "BLIND" if (stage, spots) in MUST_CHANGE else "same"
            elif declared is not None:
                verdict[spots] = "declared"
                reasons.append(declared.reason)
            else:
                verdict[spots] = "meant" if (stage, spots) in MEANT else "LEAK"
        if stage == REACH and expected:
            reasons.append(f"the trainer of {selector} can reach {expected}")
        yield Finding(
            spec.dataset.label, spec.evaluation, spec.backbone.name, spec.fold, selector, stage, verdict,
            tuple(dict.fromkeys(reasons)),
        )  # fmt: skip


class _Variant(Bench):
    """A bench on given sections with other counts at some of their spots.

    Attributes:
        split: genes and columns of the fold, once looked at.
        table: spots of the fold.
        fold: rows of the table.
    """

    table: SpotTable
    fold: Fold

    def __init__(self, bench: Bench, sections: list[Section], garbage: Mapping[str, Counts]) -> None:
        super().__init__(bench.plugins, bench.root, bench.device)
        self._given, self._garbage = sections, garbage

    def sections(self, part: Part, size: PatchSize | None = None) -> list[Section]:
        """Those given."""
        return self._given

    def digests(
        self, members: Sequence[tuple[RunSpec, FoldPlan]], held: tuple[GeneSplit, np.ndarray] | None
    ) -> list[dict[str, Any]]:
        """For what all selectors share, and then for each selector: stage -> digest, all before the test but `SCORES`.

        Args:
            members: cells on one fold.
            held: genes to go on with where the protocol lets other spots decide them.
        """
        with self._in_place():
            found = [self._shared(*members[0], held)]
            for spec, plan in members:
                try:
                    found.append(self._trained(spec, plan))
                except (Exception, SystemExit) as error:
                    if isinstance(error, AglBenchError):
                        raise
                    raise BadPlugin(f"selector '{spec.selector.name}': {told(error)}") from error
        self._setting = self._features = None  # one variant's data at a time
        return found

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """The counts of the sections are garbage, whoever holds the sections."""
        changed = [s for s in self._given if s.name in self._garbage]
        measured = [s.counts.X for s in changed]
        try:
            for section in changed:
                section.counts.X = self._garbage[section.name]
            yield
        finally:
            for section, counts in zip(changed, measured, strict=True):
                section.counts.X = counts

    def _shared(self, spec: RunSpec, plan: FoldPlan, held: tuple[GeneSplit, np.ndarray] | None) -> dict[str, Any]:
        setting = self.setting(spec, plan)
        self.table, self.fold = self._tabulate(self._given, plan, spec), setting.fold
        genes = setting.genes
        found = {
            FOLDS: _digest(*(self._spots(getattr(setting.fold, name)) for name in FOLD_SETS)),
            FILTER: _digest(genes.names),
            PRIMARY: _digest([n for n, p in zip(genes.names, genes.primary.tolist(), strict=True) if p]),
            RANKS: _digest(genes.names, genes.rank, genes.score),
        }
        if held is not None and any(FILTER in d.stages and d.applies(spec.protocol) for d in DECLARED):
            self.split, self._setting = held, None
            setting = self.setting(spec, plan)
        place = {name: index for index, name in enumerate(self.table.genes)}
        self.split = setting.genes, np.array([place[name] for name in setting.genes.names], dtype=np.int64)
        return found | {
            SEEN: _digest(*_looks(setting.development), *_looks(setting.test)),
            TRAINING_EXPRESSION: _digest(setting.development.leading_expression(len(setting.rows.train))),
        }

    def _spots(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Section and row of each spot, which no filter moves."""
        return list(zip(self.table.section[rows].tolist(), self.table.source_row[rows].tolist(), strict=True))

    def _trained(self, spec: RunSpec, plan: FoldPlan) -> dict[str, Any]:
        setting = self.setting(spec, plan)
        model, selector = self.build(spec, setting)
        found: dict[str, Any] = {
            MODEL: _digest(model.state_dict()),
            SELECTOR: _digest(selector.state_dict(), selector.used),
        }
        development = self.seen(spec, plan, setting, model.backbone, "development")
        test = self.seen(spec, plan, setting, model.backbone, "test")
        trainer = Trainer(model, selector, development, setting.rows, setting.genes, spec.protocol, seed=spec.seed)
        found[REACH] = _reached(trainer, (setting.test, test))
        training: list[object] = []
        choice: list[object] = []
        for record in trainer:
            training += [_digest(trainer.model.state_dict(), selector.state_dict())]
            training += [record.training_loss, record.outer_loss, record.parameters, record.effective]
            choice += [record.validation_pcc, record.is_best]
        scores = self.scores(model, test, development, setting)
        return found | {
            TRAINING: _digest(training),
            CHOICE: _digest(choice, trainer.fit.best_epoch),
            FINAL: _digest(model.state_dict(), selector.state_dict(), trainer.fit.effective_weights),
            SCORES: _digest(scores.pearson, scores.mse),
        }


def _garbage(table: SpotTable, fold: Fold, spots: Spots, seed: int) -> dict[str, Counts]:
    """Section -> its counts with other ones at the test or validation spots of the fold."""
    rows = getattr(fold, spots)
    found = {}
    for index, section in enumerate(table.sections):
        here = table.source_row[rows[table.section[rows] == index]]
        if len(here):
            rng = np.random.default_rng(seed_for(seed, "audit", spots, section.name))
            columns = section.counts.var_names.get_indexer(table.genes)
            found[section.name] = _dealt_anew(section.counts.X, here, columns, rng)
    return found


def _dealt_anew(counts: Counts, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> Counts:
    """Counts (spots, genes) with those of `rows` dealt to other ones of `columns` and multiplied by 1 to `MOST`."""
    whole = sparse.csr_matrix(counts, copy=True)
    whole.eliminate_zeros()
    block = whole[rows][:, columns].tocoo()
    detected = np.bincount(block.row, minlength=len(rows))
    dealt = np.concatenate([rng.permutation(len(columns))[:n] for n in detected])
    block = sparse.coo_matrix(
        (block.data[np.argsort(block.row, kind="stable")], (np.repeat(np.arange(len(rows)), detected), dealt)),
        shape=block.shape,
    )
    block.data = block.data * rng.integers(1, MOST + 1, len(rows)).astype(block.dtype)[block.row]
    rest = whole.tocoo()
    kept = ~(np.isin(rest.row, rows) & np.isin(rest.col, columns))
    changed = sparse.csr_matrix(
        (
            np.concatenate([rest.data[kept], block.data]),
            (np.concatenate([rest.row[kept], rows[block.row]]), np.concatenate([rest.col[kept], columns[block.col]])),
        ),
        shape=whole.shape,
    )
    return type(counts)(changed) if sparse.issparse(counts) else changed.toarray()


def _looks(store: SpotStore) -> Iterator[Tensor]:
    """All that a backbone may see of the spots of a store."""
    for rows in torch.split(torch.arange(len(store), device=store.device), AT_ONCE):
        spots = store.spots(rows)
        yield from (t for t in (spots.patches, spots.position, spots.section, spots.embedding) if t is not None)


def _reached(trainer: Trainer, tests: tuple[SpotStore, ...]) -> str:
    """What of the test spots can be reached from a trainer by following references; "" if nothing."""
    stores = {id(store) for store in tests} | {id(store.matrix) for store in tests}
    memory = {
        t.untyped_storage().data_ptr()
        for store in tests
        for t in (getattr(store.matrix, "values", None), store.patches, store.embedding)
        if isinstance(t, Tensor)  # memory-mapped data are in no tensor
    } - {0}
    seen: set[int] = set()
    waiting: list[object] = [trainer]
    while waiting:
        one = waiting.pop()
        # A class or module is shared by everything and belongs to no cell; so are the globals of a function.
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FrameType | types.CodeType):
            continue
        seen.add(id(one))
        if id(one) in stores or isinstance(one, SpotTable | Section):
            return f"a {type(one).__name__} with the test spots"
        if isinstance(one, Tensor) and one.device.type != "meta" and one.untyped_storage().data_ptr() in memory:
            return "a tensor of the test spots"
        if isinstance(one, types.FunctionType):
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        else:
            waiting += gc.get_referents(one)
    return ""


def _digest(*values: object) -> str:
    """Of tensors and arrays their bits, of everything else what `repr` says; of dictionaries each item."""
    state = hashlib.blake2b(digest_size=16)

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, Tensor | np.ndarray):
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            state.update(f"{array.dtype} {array.shape}".encode())
            state.update(np.ascontiguousarray(array).tobytes())
        else:
            state.update(repr(value).encode())

    for value in values:
        add(value)
    return state.hexdigest()


def as_json(findings: Sequence[Finding], protocol: Protocol) -> dict[str, Any]:
    """For programs."""
    return {
        "format": 1,
        "protocol": protocol.settings(),
        "leaks": sum(f.is_bad for f in findings),
        "findings": [vars(f) for f in findings],
    }
