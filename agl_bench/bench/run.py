"""Run cells. The only place where names become objects."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from agl_bench.bench.cells import CellStore, Status
from agl_bench.bench.checkpoints import EVERY, Interrupted, Keeper, Partial
from agl_bench.bench.encoded import Encoded, Symmetries, encode_section, encoder_digest
from agl_bench.bench.fitness import Skipped, check_built, check_genes, forget, note, unfit
from agl_bench.bench.fold_report import FoldReport
from agl_bench.bench.guard import Guard, Unguarded
from agl_bench.bench.kept_model import KeptModel
from agl_bench.bench.leases import Owner, TakenOver
from agl_bench.bench.planted import selection_scores, utilities
from agl_bench.bench.prepare import Preparation, fingerprint, seen_by
from agl_bench.bench.provenance import provenance
from agl_bench.bench.recorder import CellLog, NoRecorder, Recorder
from agl_bench.bench.result import Result, epoch_table, gene_table, outer_table, prediction_table
from agl_bench.bench.spec import Campaign, Part, RunSpec, make_dataset, naming_the_dataset
from agl_bench.data.check import check_dataset
from agl_bench.data.fingerprint import same_sections
from agl_bench.data.folds import Fold, FoldPlan, make_fold, partly_known
from agl_bench.data.gene_ids import tell_apart
from agl_bench.data.gene_split import SCORES, score_genes, split_genes
from agl_bench.data.loans import Loans
from agl_bench.data.prepared import PatchSize
from agl_bench.data.preprocess import SpotTable, panel, tabulate
from agl_bench.data.room import Room
from agl_bench.data.shuffled import shuffle_patches
from agl_bench.data.store import MEMORY, SpotStore, budget, fit
from agl_bench.data.support import support_of
from agl_bench.data.targets import fit_targets
from agl_bench.digests import FileDigests
from agl_bench.errors import AglBenchError, BadPlugin, BadSpec, CannotRun, Diverged, UnknownName, printable, told
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, TrainingView
from agl_bench.interfaces.spots import Section, Spots
from agl_bench.maths.seeds import generator_for
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.strangers import raise_if_ours
from agl_bench.training.evaluate import Scores, evaluate
from agl_bench.training.model import Model, build_model, on_device
from agl_bench.training.records import EpochRecord
from agl_bench.training.trainer import DevelopmentRows, Trainer

if TYPE_CHECKING:
    from agl_bench.bench.apart import Apart

EXAMPLE_SPOTS = 4  # shown to a backbone's constructor
POLL = 2.0  # seconds between two looks at cells that other processes work on
Keep = Literal["predictions", "model", "nothing"]  # beside the tables of a cell; "model" keeps both
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Started:
    """A cell begins."""

    spec: RunSpec


@dataclass(frozen=True)
class EpochDone:
    """A running cell has finished an epoch."""

    spec: RunSpec
    record: EpochRecord


@dataclass(frozen=True)
class Finished:
    """A cell is done; `kept` says that it was found in the store and not run again."""

    result: Result
    kept: bool


@dataclass(frozen=True)
class Failed:
    """A cell failed; the others go on. `kept` says that it failed before and was not tried again."""

    spec: RunSpec
    sentence: str
    details: Path | None
    status: Status = "failed"
    kept: bool = False


@dataclass(frozen=True)
class Noted:
    """Something about a running cell that a person may want to know."""

    spec: RunSpec
    sentence: str


@dataclass(frozen=True)
class Stopped:
    """A cell was interrupted between two epochs, with a checkpoint to continue from."""

    spec: RunSpec
    why: str


@dataclass(frozen=True)
class Waiting:
    """All that is left is held by other processes; what they leave unfinished is taken over."""

    cells: int
    holders: tuple[Owner, ...]


Event = Started | EpochDone | Finished | Failed | Skipped | Noted | Stopped | Waiting


class Opened:
    """It is known that a cell can run; its record may begin."""


class Lost:
    """Another process has taken the cell over."""


Happening = Event | Opened | Lost  # of one cell; its outcome comes last


@dataclass(frozen=True)
class Setting:
    """Everything of a cell that does not depend on the selector.

    Attributes:
        fold: rows of the spot table.
        genes: gene axis.
        mean, detection: (genes,) mean of the normalised values and share of spots that have any, over training spots.
        development: training, held-out and validation spots, in this order; all that a trainer gets.
        rows: which is which.
        counts: sizes, for the record.
        report: of the fold.
        make_test: see `test`.
        score: a named score of each gene over the training spots, (genes,) float64.
        counts_of_training: raw counts of the training spots, (spots, genes), made when asked; None = there are none.
    """

    fold: Fold
    genes: GeneSplit
    mean: np.ndarray = field(repr=False)
    detection: np.ndarray = field(repr=False)
    development: SpotStore
    rows: DevelopmentRows
    counts: dict[str, int] = field(repr=False)
    report: FoldReport = field(repr=False)
    make_test: Callable[[], SpotStore] = field(repr=False)
    score: Callable[[str], Tensor] = field(repr=False)
    counts_of_training: Callable[[], Tensor] | None = field(repr=False)

    @functools.cached_property
    def test(self) -> SpotStore:
        """Test spots, read when they are first asked for: what only trains and validates never reads them."""
        return self.make_test()

    def view(
        self, loans: Loans, generator: torch.Generator, detach_weight_sum: bool, truth: Tensor | None
    ) -> TrainingView:
        """What a selector is shown, noted in `loans`; see `TrainingView` for the rest."""
        count = len(self.rows.train)
        genes = replace(
            self.genes,
            primary=loans.copy("genes.primary", self.genes.primary),
            rank=loans.copy("genes.rank", self.genes.rank),
            score=loans.copy("genes.score", self.genes.score),
        )
        expression = functools.partial(self.development.leading_expression, count)  # training spots come first
        counts = self.counts_of_training
        return TrainingView(
            genes,
            loans.lending("expression", expression),
            generator,
            detach_weight_sum,
            truth,
            position=loans.copy("position", self.development.position[:count]),
            section=loans.copy("section", self.development.section[:count]),
            counts=counts and loans.lending("counts", counts),
            scores=self.score,
        )


class Bench:
    """Turns specs into objects and keeps the last data of each kind, so that neighbouring cells share them."""

    def __init__(self, plugins: Plugins, root: Path, device: torch.device, prepared: Preparation | None = None) -> None:
        """Without `prepared`, sections are prepared in a folder that goes with this object."""
        self.plugins, self.root, self.device = plugins, root, device
        if prepared is None:
            prepared = Preparation(root, Path(folder := tempfile.mkdtemp(prefix="agl-bench-")))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.prepared = prepared
        self._sections: tuple[Part, list[Section]] | None = None
        self._read: set[Part] = set()
        self._table: tuple[object, SpotTable] | None = None
        self._setting: tuple[object, Setting] | None = None
        self._features: tuple[object, Tensor] | None = None
        self._encoders: weakref.WeakKeyDictionary[Backbone, str] = weakref.WeakKeyDictionary()
        self._guard = Guard(plugins)
        self._loans = Loans()  # to the selector that was built last
        self._told: set[str] = set()  # what is odd about datasets
        self.said = ""  # of features that were encoded or found, until somebody has been told
        self.split: tuple[GeneSplit, np.ndarray] | None = None  # in place of what a fold's spots decide (leak audit)

    def sections(self, part: Part, size: PatchSize | None = None) -> list[Section]:
        """The checked sections of a dataset, memory-mapped; `size` is of the patches that will be asked for."""
        if self._sections is None or self._sections[0] != part:
            # Let go of the old before reading the new.
            self._sections = self._table = self._setting = self._features = None
            dataset = make_dataset(self.plugins, part)
            prepared = list(self.prepared.sections(part, dataset, size))
            sections = [p.section for p in prepared]
            same = same_sections({p.section.name: p.content for p in prepared})
            for told in (tell_apart(sections), partly_known({s.name: s.donor for s in sections}), same):
                if told and told not in self._told:
                    self._told.add(told)
                    self.prepared.cache.say(f"dataset '{part.label}': {told}")
            check_dataset(part.name, sections)
            self._sections = (part, sections)
            self._read.add(part)
        return self._sections[1]

    def has_read(self, part: Part) -> bool:
        """Whether the sections of a dataset were opened here."""
        return part in self._read

    def patch_size(self, spec: RunSpec) -> PatchSize | None:
        """Of the patches that a cell looks at; None if it looks at none."""
        sees, patch_px = seen_by(self.plugins, spec.backbone)
        return PatchSize(patch_px, spec.protocol.patch_um) if sees == "patches" else None

    def setting(self, spec: RunSpec, plan: FoldPlan) -> Setting:
        """Data of a cell, on the device."""
        sees, patch_px = seen_by(self.plugins, spec.backbone)
        sections = self.sections(spec.dataset, self.patch_size(spec))  # also clears what belongs to another dataset
        key = (spec.evaluation, plan, spec.seed, spec.protocol.of_data(), sees, patch_px)
        if self._setting is None or self._setting[0] != key:
            self._setting = None
            table = self._tabulate(sections, plan, spec)
            self._setting = (key, _setting(table, plan, spec, sees, patch_px, self.device, self.split))
        return self._setting[1]

    def build(self, spec: RunSpec, setting: Setting) -> tuple[Model, Selector]:
        """Model and selector of a cell, before training.

        Raises:
            CannotRun: if they do not go together.
        """
        check_genes(spec, len(setting.genes.names), self.plugins)
        make = self.plugins.entry(spec.backbone.name, "backbone").load()
        with self._guard.watching(f"backbone '{spec.backbone.name}'"):
            model = build_model(
                functools.partial(make, _example(setting), **spec.backbone.settings),
                len(setting.genes.names),
                spec.seed,
                f"{spec.backbone.name}/{spec.fold}",
            )
        model = on_device(model, self.device)
        make_selector = self.plugins.entry(spec.selector.name, "selector").load()
        is_control = getattr(make_selector, "is_control", Selector.is_control)
        self._loans = Loans()
        view = setting.view(
            self._loans,
            generator_for(spec.seed, "selector", spec.fold),
            spec.protocol.detach_weight_sum,
            self.truth(spec.dataset, setting.genes) if is_control else None,
        )
        watching = self._guard.watching(f"selector '{spec.selector.name}'")
        with self._untouched(spec), watching, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # who draws from torch's generator harms itself
            selector: Selector = make_selector(view, **spec.selector.settings)
        check_built(spec, selector, model.backbone)
        return model, selector.to(self.device)

    def truth(self, part: Part, genes: GeneSplit) -> Tensor | None:
        """What each gene of a fold is worth as an auxiliary one, (genes,); None where nobody knows."""
        dataset = make_dataset(self.plugins, part)
        with naming_the_dataset(part):
            known = dataset.truth(self.root)
        return None if known is None else utilities(known, genes)

    @contextlib.contextmanager
    def _untouched(self, spec: RunSpec) -> Iterator[None]:
        """A selector that changes what it was shown fails, and the fold's data are made anew for those after it.

        Raises:
            BadPlugin: naming what was changed, whatever else has gone wrong for it.
        """
        try:
            yield
        except BaseException as error:
            sentence = self._spoilt(spec)
            if sentence and isinstance(error, Exception):
                raise BadPlugin(sentence) from error
            raise
        if sentence := self._spoilt(spec):
            raise BadPlugin(sentence)

    def _spoilt(self, spec: RunSpec) -> str:
        """What the selector has changed of what it was shown, a sentence; "" if nothing."""
        changed = self._loans.changed()
        if not changed:
            return ""
        self._setting = None
        return f"selector '{spec.selector.name}' has changed {', '.join(changed)}, which is read-only; work on a copy"

    def train(
        self, spec: RunSpec, plan: FoldPlan, keeper: Keeper | None = None, *, keep: Keep = "predictions"
    ) -> Iterator[EpochRecord | Result | str]:
        """Train one cell: its epochs, then its result; between them sentences where memory did not suffice.

        With a keeper, from where the cell was left; the epochs up to there are yielded as well. What is kept beside the
        tables changes nothing in them.
        """
        started = time.perf_counter()
        setting = self.setting(spec, plan)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        records: list[EpochRecord] = []
        trainer, scores = yield from self._course(spec, plan, setting, keeper, records)
        model = trainer.whole
        if not np.isfinite(scores.pearson).any(1).all():
            raise BadSpec(
                f"in a test section of fold {spec.fold} no primary gene has a PCC: the model predicts constants or the "
                "genes do not vary there; train longer, or use larger folds or a larger protocol.primary_detection"
            )
        truth = self.truth(spec.dataset, setting.genes)
        selection = {} if truth is None else selection_scores(setting.genes, truth, trainer.fit.effective_weights)
        maps = scores.maps
        assert maps is not None
        predictions = kept_model = None
        if keep != "nothing":
            table = self._tabulate(self.sections(spec.dataset), plan, spec)
            predictions = prediction_table(table, setting.fold.test, setting.genes, maps)
        if keep == "model":
            kept_model = KeptModel.of(spec, model, setting.genes, _example(setting), maps)
        yield Result(
            spec=spec,
            scores=scores.summary() | selection,
            genes=gene_table(setting.genes, trainer.fit, scores, setting.mean, setting.detection),
            epochs=epoch_table(records),
            outer=outer_table(records),
            best_epoch=trainer.fit.best_epoch,
            counts=setting.counts,
            cost={
                "seconds": keeper.seconds if keeper else time.perf_counter() - started,
                "peak_memory_mb": _peak_memory_mb(self.device),
            },
            provenance=provenance(self.device)
            | {"hypergradient": trainer.fit.hypergradient}
            | ({"micro_batch": trainer.rooms} if trainer.rooms else {}),
            fold=setting.report.record | ({"cautions": list(c)} if (c := setting.report.cautions) else {}),
            predictions=predictions,
            model=kept_model,
        )

    def _course(
        self, spec: RunSpec, plan: FoldPlan, setting: Setting, keeper: Keeper | None, records: list[EpochRecord]
    ) -> Generator[EpochRecord | str, None, tuple[Trainer, Scores]]:
        """See `train`: the trainer at its end and the test scores; `records` are filled."""
        who = self._guard.trainees(spec)
        # torch's compiler itself changes the process, for good.
        guard = Unguarded(self.plugins) if spec.protocol.compile else self._guard
        watching = functools.partial(guard.watching, who, patches=False)
        with guard.unpatched(who):
            with watching():
                trainer = self.trainer(spec, plan, setting)
            with self._untouched(spec):
                yield from self._sayings()
                with watching():
                    records += keeper.resume(trainer) if keeper else []
                yield from records
                epochs, rooms = iter(trainer), trainer.rooms
                while True:
                    with watching():
                        record = next(epochs, None)
                    yield from self._sayings()
                    if record is None:
                        break
                    if trainer.rooms != rooms:
                        yield _of_rooms(rooms, trainer.rooms)
                        rooms = trainer.rooms
                    records.append(record)
                    if keeper:
                        keeper.follow(trainer, records)
                    yield record
                with watching():
                    test = self.seen(spec, plan, setting, trainer.whole.backbone, "test")
                    scores = self.scores(trainer.whole, test, trainer.whole_store, setting, trainer.evaluation_room)
                if trainer.rooms != rooms:
                    yield _of_rooms(rooms, trainer.rooms)
        yield from self._sayings()
        return trainer, scores

    @contextlib.contextmanager
    def watching(self, spec: RunSpec) -> Iterator[None]:
        """While a trainer of this bench trains outside `train`.

        Raises:
            BadPlugin: naming what a plug-in has changed of the process or of what it was shown.
        """
        guard = Unguarded(self.plugins) if spec.protocol.compile else self._guard
        with guard.watching(self._guard.trainees(spec)), self._untouched(spec):
            yield

    def _sayings(self) -> Iterator[str]:
        """What somebody should be told of, once."""
        said, self.said = [self.said] if self.said else [], ""
        remarks, self._guard.remarks = self._guard.remarks, []
        yield from (*said, *remarks)

    def trainer(self, spec: RunSpec, plan: FoldPlan, setting: Setting) -> Trainer:
        """What trains and validates a cell. It has no test spots, and none are read for it."""
        model, selector = self.build(spec, setting)
        development = self.seen(spec, plan, setting, model.backbone, "development")
        return Trainer(model, selector, development, setting.rows, setting.genes, spec.protocol, seed=spec.seed)

    def seen(
        self,
        spec: RunSpec,
        plan: FoldPlan,
        setting: Setting,
        backbone: Backbone,
        spots: Literal["development", "test"],
    ) -> SpotStore:
        """Spots as the backbone will see them: encoded once, if a part of it is frozen."""
        if not backbone.frozen:
            return setting.development if spots == "development" else setting.test
        if backbone.sees != "patches":
            raise BadPlugin(f"backbone '{spec.backbone.name}' is frozen and sees no patches: nothing to encode")
        return self._encoded(spec, plan, setting, backbone, spots)

    def scores(
        self,
        model: Model,
        test: SpotStore,
        development: SpotStore,
        setting: Setting,
        room: Room | None = None,
    ) -> Scores:
        """Test scores of a trained model; `room` as in `evaluate`."""
        training_rows, validation_rows = (
            torch.from_numpy(rows).to(self.device) for rows in (setting.rows.train, setting.rows.validation)
        )
        return evaluate(model, test, development, training_rows, setting.genes.primary, validation_rows, room)

    def _encoded(
        self,
        spec: RunSpec,
        plan: FoldPlan,
        setting: Setting,
        backbone: Backbone,
        spots: Literal["development", "test"],
    ) -> SpotStore:
        """Spots with the features of a frozen encoder in place of patches.

        The encoder sees each spot of the sections once, for all folds: it learns nothing, so that nothing leaks.
        """
        table = self._tabulate(self.sections(spec.dataset), plan, spec)
        size = PatchSize(backbone.patch_px, spec.protocol.patch_um)
        if backbone not in self._encoders:
            self._encoders[backbone] = encoder_digest(spec.backbone, backbone, size, self.device)
        encoder = self._encoders[backbone]
        symmetries: Symmetries = 8 if spec.protocol.augment or spec.protocol.outer_augment else 1
        key = (self._table_key(plan, spec), table.genes, encoder, symmetries)
        if self._features is None or self._features[0] != key:
            self._features = None
            parts = [encode_section(s, backbone, encoder, size, symmetries, self.device) for s in table.sections]
            here = [table.source_row[table.section == index] for index in range(len(parts))]
            features = np.concatenate([p.features[:, rows] for p, rows in zip(parts, here, strict=True)], axis=1)
            self._features = (key, torch.from_numpy(features).to(self.device))
            self.said = _of_features(parts)
        fold = setting.fold
        if spots == "development":
            encoded, rows = copy.copy(setting.development), np.concatenate([fold.train, fold.held_out, fold.validation])
        else:
            encoded, rows = copy.copy(setting.test), fold.test
        encoded.take_embedding(self._features[1][:, torch.from_numpy(rows).to(self.device)])
        return encoded

    def _tabulate(self, sections: list[Section], plan: FoldPlan, spec: RunSpec) -> SpotTable:
        taking_part = [s for s in sections if s.name in plan.sections]
        decide = plan.training_sections if spec.protocol.genes_from == "training" else plan.sections
        key = (self._table_key(plan, spec), panel(taking_part, decide))
        if self._table is None or self._table[0] != key:
            self._table = None
            if spec.protocol.patches == "shuffled":
                taking_part = [shuffle_patches(s, spec.seed) for s in taking_part]
            self._table = (key, tabulate(taking_part, spec.protocol, decide))
        return self._table[1]

    @staticmethod
    def _table_key(plan: FoldPlan, spec: RunSpec) -> object:
        """What a table depends on beside its panel, for sections of one dataset."""
        return plan.sections, spec.protocol.of_data(), spec.seed if spec.protocol.patches == "shuffled" else None


def _example(setting: Setting) -> Spots:
    """The training spots that a backbone's constructor is shown."""
    store = setting.development
    return store.spots(torch.arange(min(EXAMPLE_SPOTS, len(setting.rows.train)), device=store.device))


def _setting(
    table: SpotTable,
    plan: FoldPlan,
    spec: RunSpec,
    sees: Any,
    patch_px: int,
    device: torch.device,
    split: tuple[GeneSplit, np.ndarray] | None,
) -> Setting:
    fold = make_fold(plan, table, spec.protocol, spec.seed)
    genes, columns = split or split_genes(table, fold.train, spec.protocol)
    report = replace(
        FoldReport.of(plan, fold, table, spec.protocol, evaluation=spec.evaluation, seed=spec.seed),
        cautions=tuple(support_of(table, fold.train, genes, spec.protocol).sentences),
    )
    for index, name in enumerate(s.name for s in table.sections):
        if (table.source_columns[index, columns[genes.primary.numpy()]] < 0).all():
            raise BadSpec(
                f"section '{name}', tested in fold {spec.fold}, has none of the {genes.primary_count} primary genes; "
                "check that it names genes as the training sections do, or leave it out"
            )
    sizes = np.cumsum([len(fold.train), len(fold.held_out), len(fold.validation)])
    train, held_out, validation = np.split(np.arange(sizes[-1]), sizes[:-1])

    # Both stores on the device as far as they fit; where data lie changes no result.
    spots = sizes[-1] + len(fold.test)
    patch_bytes = int(spots) * 3 * patch_px**2 if sees == "patches" else 0
    allowed, host = budget(device), None if device.type == "cpu" else budget(torch.device("cpu"))
    nonzero = int(table.lengths(np.arange(len(table))).sum())
    form, patches_on = fit(int(spots), len(columns), nonzero, patch_bytes, allowed, host)
    spare = (allowed - patch_bytes if patches_on == "device" else allowed) // 4  # a trainer picks genes twice or thrice
    targets = fit_targets(table, fold.train, columns, spec.protocol)

    def store_of(rows: np.ndarray) -> SpotStore:
        return SpotStore(
            table, rows, columns, sees=sees, patch_px=patch_px, patch_um=spec.protocol.patch_um, device=device,
            form=form, patches_on=patches_on, targets=targets, spare_bytes=spare,
        )  # fmt: skip

    @functools.cache  # for all selectors of the fold
    def score(name: str) -> Tensor:
        if name not in SCORES:
            raise UnknownName("gene score", name, SCORES)
        return torch.from_numpy(score_genes(name, table, fold.train, columns))

    def counts_of_training() -> Tensor:
        return torch.from_numpy(table.counts(fold.train, columns).toarray()).to(device)

    development = store_of(np.concatenate([fold.train, fold.held_out, fold.validation]))
    return Setting(
        fold=fold,
        genes=genes,
        **{name: score(name).numpy() for name in ("mean", "detection")},
        development=development,
        rows=DevelopmentRows(train, held_out if len(held_out) else validation, validation),
        counts={
            **report.counts,
            "dropped_spots": table.dropped_spots,
            "primary_genes": genes.primary_count,
            "auxiliary_genes": genes.auxiliary_count,
            "unscored_genes": genes.unscored,
            "tied_genes": genes.tied,
        },
        report=report,
        make_test=functools.partial(store_of, fold.test),
        score=score,
        counts_of_training=counts_of_training if table.has_counts else None,
    )


def run_cells(
    cells: Sequence[tuple[RunSpec, FoldPlan]],
    bench: Bench,
    store: CellStore,
    recorder: Recorder,
    *,
    again: bool = False,
    retry_failed: bool = False,
    checkpoint_every: float = EVERY,
    time_limit: float | None = None,
    stop: Callable[[], str] = lambda: "",
    keep: Keep = "predictions",
    apart: Apart | None = None,
) -> Generator[Event, None, None]:
    """Run what is not finished, one cell after the other.

    A finished or failed cell is kept, an interrupted one is continued, one that cannot run here is skipped, and a
    failure of one cell is recorded and costs no other. Cells that another process works on come last: when they are
    done they count as kept, and what a process leaves unfinished is taken over.

    Args:
        cells: from `Campaign.cells`.
        bench: names to objects.
        store: where results are kept.
        recorder: where they are shown.
        again: run finished and failed cells anew, from the beginning.
        retry_failed: run failed cells anew.
        checkpoint_every: seconds from one checkpoint of a cell to the next; 0 = each epoch.
        time_limit: seconds after which a cell is interrupted; None = no limit.
        stop: why no more must be done, asked often; "" = go on. The running cell ends with its epoch.
        keep: what the store keeps of a cell beside its tables; those that are finished stay as they are.
        apart: where cells with plug-ins of others run; None = in this process, as all others do.
    """
    left, said = list(cells), False
    with contextlib.ExitStack() as end:
        end.callback(recorder.finish)
        end.enter_context(store.announced(spec for spec, _ in cells))
        forget(store.work, (spec for spec, _ in cells))
        while left:
            held = []
            for spec, plan in left:
                if stop():
                    return
                known = outcome_before(spec, store, again=again, retry_failed=retry_failed)
                if known is None and (reason := unfit(spec, bench.plugins)):
                    yield _skip(Skipped(spec, reason), store)
                    continue
                if known is not None and store.leases.holder(spec.key) is not None:
                    held.append((spec, plan))  # its process is still busy with showing it
                    continue
                lease = None if known else store.leases.take(spec.key)
                if lease is not None:
                    with lease:
                        # Another process may have finished it a moment ago.
                        known = outcome_before(spec, store, again=again, retry_failed=retry_failed)
                        if known is None:
                            yield Started(spec)
                            keeper = Keeper(
                                store.begun(spec.key), lease, every=checkpoint_every, limit=time_limit, stop=stop
                            )
                            if again:
                                keeper.partial.discard()
                            where = apart.run_cell if apart and apart.is_for(spec, bench.plugins) else run_cell
                            happenings = where(spec, plan, bench, store, keeper, keep)
                            if not (yield from _recorded(spec, happenings, recorder)):
                                held.append((spec, plan))
                elif known is None:
                    held.append((spec, plan))
                if known is not None:
                    if isinstance(known, Finished):
                        store.begun(spec.key).discard()  # where a process was killed right after it wrote the result
                        recorder.record(known.result)
                    yield known
            if held and len(held) == len(left):
                if not said:
                    holders = store.leases.running()
                    yield Waiting(len(held), tuple({o.name: o for o in holders.values()}.values()))
                    said = True
                _sleep(POLL, stop)
            left = held


def outcome_before(spec: RunSpec, store: CellStore, *, again: bool, retry_failed: bool) -> Finished | Failed | None:
    """How a cell ended before; None if it is to be run."""
    if again:
        return None
    kept = store.read(spec.key)
    if kept is not None:
        return Finished(replace(kept, spec=spec), kept=True)  # the same but for the preset's label
    failure = None if retry_failed else store.failure(spec.key)
    if failure is None:
        return None
    return Failed(spec, failure.sentence, failure.details, failure.status, kept=True)


def _sleep(seconds: float, stop: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not stop() and time.monotonic() < end:
        time.sleep(0.1)


def _recorded(
    spec: RunSpec, happenings: Generator[Happening, None, None], recorder: Recorder
) -> Generator[Event, None, bool]:
    """Record what happens to a cell, wherever it runs; False if another process has taken it over."""
    log: CellLog = NoRecorder()  # until it is known that the cell can run
    try:
        with contextlib.closing(happenings):
            for event in happenings:
                if isinstance(event, Opened):
                    log = recorder.open(spec)
                    continue
                if isinstance(event, Lost):
                    log.fail("taken over by another process")
                    yield Noted(spec, "taken over by another process")
                    return False
                if isinstance(event, EpochDone):
                    log.epoch(event.record)
                elif isinstance(event, Finished):
                    log.close(event.result)
                elif isinstance(event, Skipped):
                    log.fail(f"skipped: {event.reason}")
                elif isinstance(event, Stopped):
                    log.fail("interrupted")
                elif isinstance(event, Failed):
                    log = recorder.open(spec) if isinstance(log, NoRecorder) else log
                    log.fail(event.sentence)
                yield event
    except (KeyboardInterrupt, GeneratorExit):
        log.fail("interrupted")
        raise
    return True


def run_cell(
    spec: RunSpec, plan: FoldPlan, bench: Bench, store: CellStore, keeper: Keeper, keep: Keep
) -> Generator[Happening, None, None]:
    """Run one cell in this process, under its lease, and keep its outcome."""
    is_new = True
    try:
        setting = bench.setting(spec, plan)
        check_genes(spec, len(setting.genes.names), bench.plugins)
        yield Opened()
        store.keep_fold(setting.report.csv)
        del setting  # the bench lets go of it when it reads other data
        if why := keeper.stop():  # reading the data may take as long as an epoch
            raise Interrupted(why)
        keeper.partial.begin(spec)
        store.forget_failure(spec.key)
        for item in bench.train(spec, plan, keeper, keep=keep):
            if is_new and keeper.problem:
                yield Noted(spec, f"{keeper.problem}; it was set aside, and the cell starts again")
            if is_new and keeper.found is not None:
                yield Noted(spec, f"continued after epoch {keeper.found}")
            is_new = False
            if isinstance(item, str):
                yield Noted(spec, item)
            elif isinstance(item, Result):
                keeper.lease.check()
                store.write(item)
                # The rest is in the store: a table of many cells stays small.
                yield Finished(replace(item, predictions=None, model=None), kept=False)
            else:
                yield EpochDone(spec, item)
    except CannotRun as why:
        keeper.partial.discard()
        yield _skip(Skipped(spec, str(why)), store)
    except Interrupted as why:
        yield Stopped(spec, str(why))
    except TakenOver:
        yield Lost()
    except BaseException as error:  # noqa: BLE001  (a plug-in may raise anything, at its own cost only)
        raise_if_ours(error)
        yield failure(spec, error, store, keeper.partial)


def _skip(skipped: Skipped, store: CellStore) -> Skipped:
    note(store.work, skipped)
    return skipped


def _of_rooms(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """What a person is told where the memory of the device has not sufficed."""
    said = {
        "training": "a batch is trained on {} spots at a time, with the gradient of the whole",
        "evaluation": "{} spots are predicted at a time, which changes no score",
    }
    changes = [text.format(now[name]) for name, text in said.items() if now.get(name) != before.get(name)]
    return f"out of device memory: {'; '.join(changes)}"


def _of_features(parts: Sequence[Encoded]) -> str:
    """What a person is told of the features of a frozen encoder."""
    made, spots = [p for p in parts if not p.was_there], sum(p.features.shape[1] for p in parts)
    size = sum(p.features.nbytes for p in parts) / 1e6
    if not made:
        return f"features of {spots:,} spots found beside the prepared sections ({size:,.1f} MB)"
    new, seconds = sum(p.features.shape[1] for p in made), sum(p.seconds for p in made)
    return (
        f"features of {new:,} of {spots:,} spots encoded in {seconds:.1f} s; "
        f"{size:,.1f} MB are kept beside the prepared sections"
    )


def failure(spec: RunSpec, error: BaseException, store: CellStore, partial: Partial, trace: str = "") -> Failed:
    """Record why a cell failed; `trace` is what is known of it where there is no traceback."""
    sentence = told(error)
    if isinstance(error, torch.OutOfMemoryError):
        sentence = (
            "out of device memory beside any batch; end other processes on the device, use a smaller backbone, or set "
            f"{MEMORY} lower, which keeps data on the host"
        )
    is_full = isinstance(error, OSError) and error.errno in FULL
    if is_full:
        sentence = (
            f"no space is left to write to {store.work} ({os.strerror(error.errno)}); "  # type: ignore[attr-defined]
            "free some, and continue the cell with --retry-failed"
        )
    else:
        partial.discard()  # what led to the failure is no place to continue from
    status: Status = "diverged" if isinstance(error, Diverged) else "failed"
    details: Path | None
    try:
        details = store.write_failure(spec, sentence, printable(trace or traceback.format_exc()), status)
    except OSError as full:  # the very fault that ended the cell, e.g. a full disk
        details, sentence = None, f"{sentence}; nor can its failure be recorded: {full.strerror or full}"
    return Failed(spec, sentence, details, status)


def preflight(
    cells: Sequence[tuple[RunSpec, FoldPlan]],
    bench: Bench,
    store: CellStore,
    *,
    again: bool = False,
    retry_failed: bool = False,
    apart: Apart | None = None,
) -> None:
    """Make every fold and read every patch, and build each selector and backbone once, without training.

    Bad input ends the run here, at once, and not after hours. A plug-in's own fault is no bad input: it is recorded
    when its cell runs and costs no other. What is of others is not built here where it runs apart, and a dataset of
    theirs is read there.

    Raises:
        AglBenchError: the first thing that is wrong.
    """
    built = set()
    for spec, plan in cells:
        if outcome_before(spec, store, again=again, retry_failed=retry_failed) is not None:
            continue
        if unfit(spec, bench.plugins):
            continue
        elsewhere = apart if apart and apart.is_for(spec, bench.plugins) else None
        if elsewhere and not elsewhere.has_prepared(spec, bench):
            continue
        setting = bench.setting(spec, plan)
        if elsewhere:
            continue
        combination = (spec.dataset.label, spec.evaluation, spec.backbone.name, spec.selector.name)
        if combination in built:
            continue
        built.add(combination)
        try:
            bench.build(spec, setting)
        except BaseException as error:
            raise_if_ours(error)
            if isinstance(error, AglBenchError) and not isinstance(error, BadPlugin | CannotRun):
                raise


def fingerprints(
    campaign: Campaign, plugins: Plugins, root: Path, digests: FileDigests | None = None
) -> dict[str, str]:
    """Digest of the content of each dataset's files; those that `digests` knows are not read again.

    Raises:
        MissingData: if a dataset is not there.
    """
    found, digests = {}, digests or FileDigests()
    for name in campaign.datasets:
        part = campaign.part(plugins, name, "dataset")
        found[name] = fingerprint(part, make_dataset(plugins, part), root, digests)
    return found


def choose_device(name: str) -> torch.device:
    """The device to run on; also sets up determinism for the process.

    Args:
        name: "auto", "cpu" or "cuda".

    Raises:
        BadSpec: if CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadSpec("--device cuda: torch sees no CUDA device; use --device cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # unless the protocol says so
    # Sigmoid tails and carried tangents underflow into denormals, which x86 handles in slow microcode.
    torch.set_flush_denormal(True)
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the device, or of the process so far where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
