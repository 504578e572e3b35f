"""Tuning with Optuna: one study for each selector, dataset, evaluation and backbone. With `journal` the home of optuna.

A trial trains every (outer fold, seed) of its study once with the settings at hand and is worth the mean of the best
validation PCC of these fits. Test spots are not read (`Bench.trainer`). With one study for all outer folds, spots that
one fold tests are training or validation spots of another, so that the *choice* of settings has seen them; with
`nested` there is one study for each outer fold, of as many fits in all, and it has not.

Equal budgets: a trial counts if it was completed, pruned, diverged or did not fit into memory, and a study has as many
as were asked for, whatever the selector; fewer only where its space has no more points.

A study goes on where it stood: the sampler of a trial is seeded by the study's name and the number of trials before it,
so that one that was killed tries the very points of one that was not. Trials of processes that died are ended and
their points tried again. Several processes may work on one study.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from agl_bench.addresses import is_ambiguous, masked
from agl_bench.bench.fitness import unfit
from agl_bench.bench.journal import open_journal
from agl_bench.bench.run import Bench
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.bench.tuned import Entry, conditions, with_settings
from agl_bench.data.folds import FoldPlan
from agl_bench.digests import text_digest
from agl_bench.errors import (
    BadSpec,
    BadWorkFolder,
    CannotRun,
    Diverged,
    TooLittleMemory,
    UnknownName,
    told,
)
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.tunable import LogRange, Range, Tunable, Value, tunable, tunables
from agl_bench.maths.seeds import seed_for
from agl_bench.protocol import TRAINING, Protocol, read_toml
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.strangers import raise_if_ours

SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
BY_EPOCH = ("median", "hyperband")  # pruners that look at every epoch, the others at every fit
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
# The ranges of these settings say what is allowed; here is where to look.
USUAL = {
    "learning_rate": LogRange(1e-5, 1e-1),
    "weight_decay": LogRange(1e-6, 1e-1),
    "patience": LogRange(5, 80),
    "batch_size": LogRange(16, 256),
}
# Neither what says how exactly to compute, nor the length of training: a longer one is a larger budget.
SEARCHABLE = TRAINING - {"precision", "compile", "epochs"}
SILENT_SECONDS = 3600.0  # after which a trial of another machine is taken for dead
OWNERLESS_SECONDS = 5.0  # likewise one whose process died before it could say who it was
BEAT_SECONDS = 60.0
_FAR = 1e300  # beyond it no interval has a width
_WRITER = "writer "  # how the names of a study's attributes begin that say who has written to it

optuna.logging.set_verbosity(optuna.logging.ERROR)


# --- what is searched ------------------------------------------------------------------------------------------------

Search = Mapping[str, Mapping[str, object]]  # owner -> setting -> True, False, a list of values, or low/high/log


def read_search(plugins: Plugins, file: Path | None, names: Sequence[str]) -> Search:
    """What is searched beside the selectors' own settings, and where, from a file and from "NAME.KEY,NAME.KEY".

    The file has a table for the protocol and for each plug-in that it has something to say about; a line is
    `KEY = true` (search the whole range), `KEY = false` (leave it), a list of values, or {low = …, high = …, log = …}.

    Raises:
        BadSpec, UnknownName: for anything else.
    """
    known = {e.name: e.kind for e in plugins.entries() if e.kind in ("selector", "backbone")}
    table = read_toml(file, allowed=("protocol", *known)) if file else {}
    for owner, lines in table.items():
        if not isinstance(lines, dict):
            raise BadSpec(f"{file}: {owner} is not a table; write [{owner}] and below it lines KEY = true or a range")
        if owner != "protocol":
            settings = tunables(plugins.entry(owner, known[owner]).load())
            for key in lines:
                if key not in settings:
                    raise UnknownName(f"setting of {owner}", key, settings)
    search = {owner: dict(lines) for owner, lines in table.items()}
    for name in (n.strip() for item in names for n in item.split(",") if n.strip()):
        owner, dot, key = name.partition(".")
        if not dot:
            raise BadSpec(f"--tune {name!r} is not of the form NAME.KEY, e.g. protocol.learning_rate")
        if owner != "protocol" and owner not in known:
            raise UnknownName("plug-in", owner, ["protocol", *known])
        search.setdefault(owner, {}).setdefault(key, True)
    for key in search.get("protocol", {}):
        if key not in SEARCHABLE:
            raise UnknownName("protocol setting that can be searched", key, SEARCHABLE)
    return search


def space_of(
    plugins: Plugins, campaign: Campaign, spec: RunSpec, search: Search
) -> tuple[dict[str, BaseDistribution], dict[str, Value]]:
    """The search space of a cell and the point where it begins, by NAME.KEY.

    Of the selector: every setting with a range, every switch and every choice, unless the user has given its value. Of
    the backbone and the protocol: what `search` says, for all selectors alike.

    Raises:
        UnknownName, BadSpec: for a setting that does not exist, is fixed at the same time, or cannot be searched.
    """
    space: dict[str, BaseDistribution] = {}
    start: dict[str, Value] = {}
    backbone = plugins.entry(spec.backbone.name, "backbone").load()
    protocol = {k: tunable(k, a, getattr(spec.protocol, k)) for k, a in _protocol_hints().items()}
    selector = plugins.entry(spec.selector.name, "selector").load()
    owners: list[tuple[str, Mapping[str, Tunable], Mapping[str, Value], bool]] = [
        (spec.selector.name, tunables(selector), spec.selector.settings, True),
        (spec.backbone.name, tunables(backbone), spec.backbone.settings, False),
        ("protocol", protocol, spec.protocol.settings(), False),
    ]
    for owner, known, values, every in owners:
        asked = search.get(owner, {})
        for key in asked:
            if key not in known:
                raise UnknownName(f"setting of {owner}", key, known)
        for key, entry in known.items():
            name, how = f"{owner}.{key}", asked.get(key, every)
            if name in campaign.given and key in asked and how is not False:
                raise BadSpec(f"{name} is searched and given a value at the same time; leave one of the two out")
            if how is False or name in campaign.given:
                continue
            if owner == spec.backbone.name and key == "patch_px":
                raise BadSpec(f"{name} cannot be searched: patches are prepared once, at one size")
            usual = USUAL.get(key) if owner == "protocol" else None
            found = _distribution(name, entry, how, usual, must=key in asked)
            if found is None:
                continue
            space[name] = found
            value = values[key]
            if name == "protocol.learning_rate" and value == "backbone":
                rate = getattr(backbone, "learning_rate", Backbone.learning_rate)
                value = spec.backbone.settings.get("learning_rate", rate)
            if isinstance(value, bool | int | float | str) and _contains(found, value):
                start[name] = value
    return space, start


def _protocol_hints() -> dict[str, Any]:
    import typing

    hints = typing.get_type_hints(Protocol, include_extras=True)
    return {name: hint for name, hint in hints.items() if name in SEARCHABLE}


def _distribution(
    name: str, entry: Tunable, how: object, usual: Range | None, *, must: bool
) -> BaseDistribution | None:
    """Where to look for one setting; None for one that has nothing to be searched."""
    owner = name.partition(".")[0]
    if isinstance(how, list):
        if not how:
            raise BadSpec(f"the search of {name} lists no value")
        return CategoricalDistribution(list(dict.fromkeys(_scalar(entry.parse(v, owner=owner), name) for v in how)))
    kind = _searched_kind(entry.kind)
    limits = usual or entry.range
    if isinstance(how, dict):
        unknown = set(how) - {"low", "high", "log"}
        if unknown or not {"low", "high"} <= set(how):
            raise BadSpec(f"the search of {name} takes low, high and log, or a list of values")
        low, high = (entry.parse(how[k], owner=owner) for k in ("low", "high"))
        log = how.get("log", bool(entry.range and entry.range.log))
        if not isinstance(log, bool):
            raise BadSpec(f"the search of {name}: log = {log!r} is neither true nor false")
        if (
            kind not in (int, float)
            or isinstance(low, str | tuple)
            or isinstance(high, str | tuple)
            or not -_FAR <= low <= high <= _FAR
        ):
            raise BadSpec(f"the search of {name} from {how['low']} to {how['high']} is not an interval of numbers")
        limits = Range(float(low), float(high), log)
    elif how is not True:
        raise BadSpec(f"the search of {name} is {how!r}; it takes true, false, a list of values, or low, high and log")
    if get_origin(kind) is Literal:
        return CategoricalDistribution(list(get_args(kind)))
    if kind is bool:
        return CategoricalDistribution([False, True])
    if limits is None or kind not in (int, float):
        if must:
            raise BadSpec(f"{name} has no range to search; say where to look by a --search file")
        return None
    if limits.log and limits.low <= 0:
        raise BadSpec(f"the search of {name} is logarithmic and begins at {limits.low:g}; begin above 0")
    if kind is int:
        return IntDistribution(math.ceil(limits.low), math.floor(limits.high), log=limits.log)
    return FloatDistribution(limits.low, limits.high, log=limits.log)


def _searched_kind(kind: Any) -> Any:
    """The kind itself, and of a union the numbers, e.g. of a rate that may also be a word."""
    members = get_args(kind) if get_origin(kind) is not Literal else ()
    return next((k for k in members if k in (int, float)), kind)


def _scalar(value: Value, name: str) -> bool | int | float | str:
    if isinstance(value, tuple):
        raise BadSpec(f"{name} is a list, and lists cannot be searched")
    return value


def _contains(distribution: BaseDistribution, value: bool | int | float | str) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and distribution.low <= value <= distribution.high  # type: ignore[operator]


def _size(space: Mapping[str, BaseDistribution]) -> float:
    """Number of points; infinite where a number is continuous."""
    size = 1.0
    for d in space.values():
        if isinstance(d, CategoricalDistribution):
            size *= len(d.choices)
        elif isinstance(d, IntDistribution):
            size *= d.high - d.low + 1
        elif not d.single():
            return math.inf
    return size


# --- studies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """One search.

    Attributes:
        cells: what a trial trains, with fixed settings.
        fold: the outer fold that it is for; "" = all of them.
        space: where to look, by NAME.KEY.
        start: the first point, the fixed settings, without those that lie outside the space.
        trials: the budget.
        sampler, pruner: names.
    """

    cells: tuple[tuple[RunSpec, FoldPlan], ...]
    fold: str
    space: dict[str, BaseDistribution]
    start: dict[str, Value]
    trials: int
    sampler: str
    pruner: str

    @property
    def spec(self) -> RunSpec:
        """The first of its cells."""
        return self.cells[0][0]

    @property
    def target(self) -> int:
        """Trials to finish: the budget, or all points there are."""
        return int(min(self.trials, _size(self.space)))

    @property
    def title(self) -> str:
        """For progress lines."""
        spec = self.spec
        words = [spec.dataset.label, spec.evaluation, spec.backbone.name, spec.selector.name]
        return " · ".join(words + ([f"fold {self.fold}"] if self.fold else []))

    @property
    def name(self) -> str:
        """Name in the storage. Its digest covers everything that trials must share to be compared, not the budget."""
        content = []
        for spec, _ in self.cells:
            fixed = conditions(spec, tuple(self.space))
            content.append([fixed, spec.selector.name, spec.fold, spec.seed, spec.version, spec.libraries, spec.device])
        searched = {name: distribution_to_json(d) for name, d in self.space.items()}
        digest = text_digest(json.dumps([content, searched, self.sampler, self.pruner], sort_keys=True), 6)
        return f"{self.title} · {digest}"


def studies(
    campaign: Campaign,
    plugins: Plugins,
    cells: Sequence[tuple[RunSpec, FoldPlan]],
    search: Search,
    *,
    trials: int,
    sampler: str = "tpe",
    pruner: str = "none",
    folds: int | None = None,
    nested: bool = False,
) -> list[Study]:
    """The studies of a campaign, in the order of its cells.

    Args:
        campaign: what was asked for.
        plugins: who provides which name.
        cells: from `Campaign.cells`.
        search: from `read_search`.
        trials: the budget of each.
        sampler, pruner: names.
        folds: a trial trains the first so many outer folds alone; None = all.
        nested: one study for each outer fold.
    """
    groups: dict[tuple[str, str, str, str, str], list[tuple[RunSpec, FoldPlan]]] = {}
    for spec, plan in cells:
        fold = spec.fold if nested else ""
        key = (spec.dataset.label, spec.evaluation, spec.backbone.name, spec.selector.name, fold)
        groups.setdefault(key, []).append((spec, plan))
    used = {"protocol", *(s.selector.name for s, _ in cells), *(s.backbone.name for s, _ in cells)}
    for owner in search:
        if owner not in used and plugins.entry(owner).kind == "backbone":
            raise BadSpec(f"{owner} is searched and takes no part; add --backbone {owner} or leave its search out")
    found = []
    for (*_, fold), members in groups.items():
        first = list(dict.fromkeys(s.fold for s, _ in members))[:folds]
        space, start = space_of(plugins, campaign, members[0][0], search)
        kept = tuple((s, plan) for s, plan in members if s.fold in first)
        found.append(Study(kept, fold, space, start, trials, sampler, pruner))
    return found


@dataclass(frozen=True)
class TrialDone:
    """A trial counts from now on; `value` is its validation PCC, None if it has no score, for `reason`."""

    study: Study
    number: int
    value: float | None
    best: float | None
    reason: str
    settings: dict[str, Value]


@dataclass(frozen=True)
class StudyFailed:
    """A plug-in failed in a trial, or no trial has a score; the other studies go on."""

    study: Study
    sentence: str


@dataclass(frozen=True)
class StudySkipped:
    """What a study tunes cannot run here; the other studies go on."""

    study: Study
    reason: str


@dataclass(frozen=True)
class StudyOpen:
    """Other processes are still at the last trials; whoever ends last writes the outcome."""

    study: Study
    running: int


@dataclass(frozen=True)
class StudyDone:
    """A study has its trials.

    Attributes:
        entry: for the file of tuned settings.
        importances: share of each searched setting in the spread of the score; empty for fewer than two scores.
        history: one row per counted trial: number, state, value, its settings, seconds.
    """

    study: Study
    entry: Entry
    importances: dict[str, float]
    history: list[dict[str, Any]]


TuneEvent = TrialDone | StudyFailed | StudySkipped | StudyOpen | StudyDone


def tune(study: Study, bench: Bench, storage: BaseStorage) -> Iterator[TuneEvent]:
    """Bring a study to its number of trials, from wherever it stands.

    Raises:
        BadWorkFolder: if trials can no longer be kept, e.g. on a full disk or because the database has gone.
    """
    if reason := unfit(study.spec, bench.plugins):
        yield StudySkipped(study, reason)
        return
    try:
        yield from _tune(study, bench, storage)
    except CannotRun as error:  # as the genes of a fold, or what was built, say
        yield StudySkipped(study, str(error))
    except (optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200].rstrip(".")
        raise BadWorkFolder(
            f"the trials of {study.title} cannot be kept ({reason}); finished ones are safe, the same command continues"
        ) from error


def _tune(study: Study, bench: Bench, storage: BaseStorage) -> Iterator[TuneEvent]:
    with _quietly():
        handle = optuna.create_study(storage=storage, study_name=study.name, direction="maximize", load_if_exists=True)
    handle.set_user_attr(f"{_WRITER}{_me()}", _born(os.getpid()))
    _try_failed_again(handle)
    while True:
        _take_over(handle, study)
        trials = handle.get_trials(deepcopy=False)
        counted = [t for t in trials if _counts(t, study)]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if len(counted) >= study.target:
            break
        if len(counted) + len(running) >= study.target:
            if any("born" not in t.user_attrs for t in running):
                time.sleep(OWNERLESS_SECONDS / 10)
                continue
            yield StudyOpen(study, len(running))
            return
        if not trials and study.start:
            handle.enqueue_trial(study.start)
        try:
            done = _one_trial(handle, study, bench, len(counted) + len(running))
        except _PluginFault as fault:
            yield StudyFailed(study, str(fault))
            return
        if done is not None:
            yield done
    yield _outcome(handle, study)


def _counts(trial: FrozenTrial, study: Study) -> bool:
    """Whether a trial is part of the budget: it has ended by itself, and no damage has taken a setting from it."""
    return trial.state in COUNTED and trial.params.keys() == study.space.keys()


class _PluginFault(Exception):
    """A trial raised what is neither bad luck with its point nor an interruption."""


def _one_trial(handle: optuna.Study, study: Study, bench: Bench, before: int) -> TrialDone | None:
    """Ask for a point, train, tell. None if the point was not to be trained."""
    with _quietly():
        handle.sampler, handle.pruner = _sampler(study, before), _pruner(study)
        trial = handle.ask(study.space)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "thread": threading.get_ident()}
    for key, value in {**owner, "born": _born(os.getpid())}.items():  # in this order, see `_is_dead`
        trial.set_user_attr(key, value)
    others = [t for t in handle.get_trials(deepcopy=False) if t.number != trial.number]
    earlier = [t for t in others if t.state == TrialState.RUNNING and t.number < trial.number]
    taken = [t for t in others if _counts(t, study)] + earlier
    if len(taken) >= study.target:  # another process was faster
        handle.tell(trial, state=TrialState.FAIL)
        return None
    if any(t.params == trial.params for t in taken):
        if fresh := _fresh(handle, study, trial.number, taken):
            handle.enqueue_trial(fresh)
        handle.tell(trial, state=TrialState.FAIL)
        return None
    reason, value = "", None
    try:
        started = time.perf_counter()
        value = _score(trial, study, bench)
        trial.set_user_attr("seconds", time.perf_counter() - started)
        if value is None:
            reason = "pruned"
        elif not math.isfinite(value):
            reason, value = "no validation PCC", None
    except Diverged as error:
        reason = f"diverged: {error}"
    except TooLittleMemory as error:  # like a rate that diverges: bad luck with its point
        reason = str(error)
    except BaseException as error:
        try:
            raise_if_ours(error)
        except BaseException:
            _again(handle, study, trial.number)
            raise
        sentence = told(error)
        trial.set_user_attr("error", sentence)
        handle.tell(trial, state=TrialState.FAIL)
        if isinstance(error, CannotRun):
            raise
        raise _PluginFault(sentence) from error
    if reason:
        trial.set_user_attr("reason", reason)
    # Somebody may have taken this process for dead and ended its trial.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
        handle.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
    now = [t for t in handle.get_trials(deepcopy=False) if _counts(t, study)]
    scores = [t.value for t in now if t.state == TrialState.COMPLETE and t.value is not None]
    return TrialDone(study, len(now), value, max(scores, default=None), reason, dict(trial.params))


def _score(trial: Trial, study: Study, bench: Bench) -> float | None:
    """Mean over the fits of the best validation PCC; None if the pruner ends the trial.

    What the pruner sees. Median and hyperband: after each epoch, at step (number of the fit) × protocol.epochs +
    epoch, the mean over all fits of the best validation PCC so far, where fits that have not begun count −1, the
    lowest PCC: it never falls and ends as the score. Wilcoxon: after each fit, at the number of the fit, its
    validation PCC, so that two trials are paired by fold and seed (with fewer than four fits no pairing is significant
    and none is pruned).
    """
    found: list[float] = []
    fits, by_epoch = len(study.cells), study.pruner in BY_EPOCH
    beat = time.monotonic()
    for number, (fixed, plan) in enumerate(study.cells):
        spec = with_settings(fixed, trial.params)
        setting, best = bench.setting(spec, plan), -math.inf
        with bench.watching(spec):
            trainer = bench.trainer(spec, plan, setting)
            for record in trainer:
                best = max(best, record.validation_pcc) if math.isfinite(record.validation_pcc) else best
                if time.monotonic() - beat > BEAT_SECONDS:
                    trial.set_user_attr("beat", time.time())
                    beat = time.monotonic()
                if by_epoch:
                    so_far = sum(found) + max(best, -1.0) - (fits - number - 1)
                    trial.report(so_far / fits, number * fixed.protocol.epochs + record.epoch)
                    if trial.should_prune():
                        return None
        found.append(trainer.fit.validation_pcc)
        if not math.isfinite(found[-1]):
            return math.nan
        if not by_epoch:
            trial.report(found[-1], number)
            if trial.should_prune():
                return None
    trial.set_user_attr("validation_pcc", found)
    return math.fsum(found) / fits


def _sampler(study: Study, before: int) -> optuna.samplers.BaseSampler:
    """A sampler for one trial, seeded by the study and the number of trials before it."""
    seed = seed_for(study.spec.seed, "tune", study.name, str(before)) % 2**32
    if study.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(study: Study) -> optuna.pruners.BasePruner:
    steps = len(study.cells) * study.spec.protocol.epochs
    if study.pruner == "median":
        return optuna.pruners.MedianPruner()
    if study.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max(1, steps // 27), max(2, steps))
    if study.pruner == "wilcoxon":
        return optuna.pruners.WilcoxonPruner()
    return optuna.pruners.NopPruner()


def _fresh(handle: optuna.Study, study: Study, number: int, taken: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """A point that nobody has tried, for a sampler that repeats itself in a small space; None if there is none left."""
    known = [t.params for t in taken]
    known += [t.system_attrs.get("fixed_params", {}) for t in handle.get_trials(states=[TrialState.WAITING])]
    size = _size(study.space)
    if size <= len({json.dumps(p, sort_keys=True) for p in known}):
        return None
    rng = np.random.default_rng(seed_for(study.spec.seed, "fresh", study.name, str(number)))
    while True:
        point = {name: _draw(distribution, rng) for name, distribution in study.space.items()}
        if point not in known:
            return point


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    """A value, uniformly on the distribution's scale."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        return int(rng.integers(int(low), int(high) + 1))
    number = math.exp(rng.uniform(math.log(low), math.log(high))) if distribution.log else rng.uniform(low, high)
    return float(min(max(number, low), high))


# --- trials of processes that are gone -------------------------------------------------------------------------------


def _take_over(handle: optuna.Study, study: Study) -> None:
    """End the trials of dead processes and put their points back in the queue."""
    running = handle.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    alone = bool(running) and _is_alone(handle)  # in this order: a writer makes itself known before its first trial
    for frozen in running:
        if _is_dead(frozen, alone=alone):
            _again(handle, study, frozen.number)


def _me() -> str:
    """This writer of a study."""
    return f"{socket.gethostname()} {os.getpid()} {threading.get_ident()}"


def _is_alone(handle: optuna.Study) -> bool:
    """Whether nobody else who ever wrote to the study can be at it now."""
    for name, born in handle.user_attrs.items():
        if not name.startswith(_WRITER) or name == f"{_WRITER}{_me()}":
            continue
        host, pid, _ = name.removeprefix(_WRITER).rsplit(" ", 2)
        if host != socket.gethostname() or _born(int(pid)) == born:
            return False
    return True


def _again(handle: optuna.Study, study: Study, number: int) -> None:
    """End a running trial and put its point back in the queue: first the latter, so that no kill loses it.

    A point that was only half drawn is left to the sampler, which draws it again; one that came from the queue is not.
    """
    trial = handle.get_trials(deepcopy=False)[number]
    queued = trial.system_attrs.get("fixed_params", {})
    point = queued | trial.params if len(trial.params) == len(study.space) else queued
    if point and number not in _repeated(handle):
        handle.enqueue_trial(point, user_attrs={"again": number})
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # another process has done it
        handle.tell(number, state=TrialState.FAIL)


def _try_failed_again(handle: optuna.Study) -> None:
    """Put the points of trials in which a plug-in failed back in the queue."""
    repeated = _repeated(handle)
    for frozen in handle.get_trials(deepcopy=False, states=[TrialState.FAIL]):
        if "error" in frozen.user_attrs and frozen.number not in repeated:
            handle.enqueue_trial(frozen.params, user_attrs={"again": frozen.number})


def _repeated(handle: optuna.Study) -> set[int]:
    return {t.user_attrs["again"] for t in handle.get_trials(deepcopy=False) if "again" in t.user_attrs}


def _is_dead(trial: FrozenTrial, *, alone: bool) -> bool:
    """Whether the process of a running trial is gone.

    On this machine that is known; on another one it is concluded from an hour of silence. A trial whose process died
    before it could say who it was is dead at once where nobody else writes to the study, and else after some seconds.
    """
    owner, begun = trial.user_attrs, trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    if "born" not in owner:
        return alone or time.time() - begun > OWNERLESS_SECONDS
    if owner["host"] != socket.gethostname():
        return time.time() - max(begun, float(owner.get("beat", 0.0))) > SILENT_SECONDS
    if (owner["pid"], owner.get("thread")) == (os.getpid(), threading.get_ident()):
        return True  # of this very loop, which asks between trials
    return _born(int(owner["pid"])) != str(owner["born"])


def _born(pid: int) -> str:
    """When a process began, so that a number that is given anew is not mistaken for it; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[19] + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "alive"
    return "alive"


# --- outcome ---------------------------------------------------------------------------------------------------------


def _outcome(handle: optuna.Study, study: Study) -> StudyDone | StudyFailed:
    # Of a study that had a larger budget once, the trials that this one allows.
    counted = [t for t in handle.get_trials(deepcopy=False) if _counts(t, study)][: study.target]
    complete = [t for t in counted if t.state == TrialState.COMPLETE]
    if not complete:
        return StudyFailed(study, f"none of {len(counted)} trials has a validation score; search a narrower range")
    best = max(complete, key=lambda t: (t.value, -t.number))
    spec = study.spec
    entry = Entry(
        study=study.name,
        dataset=spec.dataset.label,
        evaluation=spec.evaluation,
        backbone=spec.backbone.name,
        fold=study.fold,
        trials=study.trials,
        points=len(counted),
        pruned=len(counted) - len(complete),
        folds=tuple(dict.fromkeys(s.fold for s, _ in study.cells)),
        seeds=tuple(dict.fromkeys(s.seed for s, _ in study.cells)),
        sampler=study.sampler,
        pruner=study.pruner,
        validation_pcc=float(best.value or 0.0),
        conditions=conditions(spec, tuple(study.space)),
        settings={name: best.params[name] for name in study.space},
    )
    history = [
        {
            "trial": t.number,
            "state": t.user_attrs.get("reason", "complete").partition(":")[0],
            "value": t.value if t.state == TrialState.COMPLETE else None,
            **t.params,
            "seconds": t.user_attrs.get("seconds"),
        }
        for t in counted
    ]
    return StudyDone(study, entry, _importances(handle, study, complete), history)


def _importances(handle: optuna.Study, study: Study, complete: Sequence[FrozenTrial]) -> dict[str, float]:
    if len({t.value for t in complete}) < 2 or not study.space:
        return {}
    with _quietly():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(handle, evaluator=evaluator)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


# --- storage ---------------------------------------------------------------------------------------------------------


def open_storage(work: Path, url: str | None, warn: Callable[[str], None] = lambda _: None) -> BaseStorage:
    """Where trials are kept: a journal file in the work folder, or a database by its SQLAlchemy URL.

    Args:
        work: the work folder.
        url: of the database; None = a journal, see `journal.open_journal`.
        warn: told, in one sentence, what a damaged journal has lost.

    Raises:
        BadWorkFolder: if the journal cannot be written or read.
        BadSpec: if the database cannot be used.
    """
    if url is not None:
        return _database(url)
    journal = work / "tune" / "journal.log"
    try:
        with _quietly():
            return JournalStorage(open_journal(journal, warn))
    except OSError as error:
        raise BadWorkFolder(f"cannot write {journal}: {error.strerror or error}; choose another with --work") from None


def _database(url: str) -> BaseStorage:
    shown = masked(url)
    if "://" not in url:
        raise BadSpec(f"--storage {shown!r} is not a database URL such as postgresql+psycopg://user@host/name")
    if url.startswith("sqlite") and url.partition("//")[2].strip("/").partition("?")[0] in ("", ":memory:"):
        raise BadSpec(
            f"--storage {shown} does not name a file, so no trial would be kept; use sqlite:///PATH/trials.db"
        )
    if is_ambiguous(url):
        raise BadSpec(
            f"--storage {shown}: its port is not a number, or a password holds a separator; write %40 for @, %3A for "
            ":, %2F for /, %3F for ? and %23 for # in a password"
        )
    try:
        with _quietly():
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except Exception as error:  # noqa: BLE001  (SQLAlchemy, its drivers and Optuna each raise their own)
        text = masked(error).strip().splitlines() or [type(error).__name__]
        raise BadSpec(f"--storage {shown} cannot be used: {text[0][:200].rstrip('.')}") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's warnings that a feature is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
