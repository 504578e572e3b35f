"""Tuning: validation alone decides, budgets are equal and exact, and a study goes on where it stood."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from agl_bench.bench.cells import CellStore
from agl_bench.bench.journal import _filesystem, _KernelLock, lock_for
from agl_bench.bench.run import Bench, Setting, choose_device, fingerprints
from agl_bench.bench.spec import Campaign, RunSpec, Tuning
from agl_bench.bench.tune import (
    StudyDone,
    StudyFailed,
    StudyOpen,
    TrialDone,
    _born,
    open_storage,
    read_search,
    studies,
    tune,
)
from agl_bench.bench.tuned import Entry, conditions, read_entries, tuned_cells, with_settings, write_entry
from agl_bench.cli import main
from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import AglBenchError, BadSpec, BadWorkFolder, Diverged, TooLittleMemory
from agl_bench.registry.plugins import Plugins

ROOT = Path(os.devnull)
RATE = ("protocol.learning_rate",)
SEVEN = ("hvg_k.k=7", "hvg_k.prior=protocol")  # with these given, nothing is searched


@pytest.fixture
def make(small):
    """Studies on the small grid, as the command line makes them."""

    def make(*selectors, trials=5, search=(), file=None, more=(), fold=(), **options):
        plugins = Plugins.discover((), strict=True)
        lists = {"datasets": ["synthetic"], "evaluation": ["inter"], "preset": "smoke", "fold": fold}
        lists |= {k: options.pop(k) for k in ("seeds", "evaluation") if k in options}
        campaign = Campaign.of(plugins, selectors=selectors, assignments=[*small, *more], **lists)
        known = fingerprints(campaign, plugins, ROOT, None)
        cells = campaign.cells(plugins, ROOT, device="cpu", fingerprint=known)
        return studies(campaign, plugins, cells, read_search(plugins, file, search), trials=trials, **options)

    return make


@pytest.fixture
def bench():
    return Bench(Plugins.discover((), strict=True), ROOT, choose_device("cpu"))


class Played:
    """In place of a bench: the score of a fit is a function of its cell, and nothing is trained.

    Every point that is trained is noted; `disturb` may raise.
    """

    plugins = Plugins.discover()

    def __init__(self, score=None, epochs=3, disturb=None):
        self.score = score or (lambda spec: 1 - abs(math.log10(spec.protocol.learning_rate) + 3) / 2)
        self.epochs, self.disturb, self.trained = epochs, disturb, []

    def setting(self, spec, plan):
        return None

    def watching(self, spec):
        return contextlib.nullcontext()

    def trainer(self, spec, plan, setting):
        self.trained.append((spec.protocol.learning_rate, spec.selector.settings, spec.fold))
        if self.disturb:
            self.disturb(len(self.trained))
        best = self.score(spec)
        curve = [best - 0.1 * (self.epochs - 1 - e) for e in range(self.epochs)]
        records = [SimpleNamespace(epoch=e, validation_pcc=pcc) for e, pcc in enumerate(curve)]

        class Trainer(list):
            fit = SimpleNamespace(validation_pcc=best)

        return Trainer(records)


def open_study(study, work):
    return optuna.load_study(study_name=study.name, storage=open_storage(work, None))


def counted(study, work, storage=None):
    trials = optuna.load_study(study_name=study.name, storage=storage or open_storage(work, None)).trials
    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def points(study, work):
    return [t.params for t in counted(study, work)]


# --- what is searched ------------------------------------------------------------------------------------------------


def test_the_space_is_what_the_selector_declares(make):
    dkgsb, pgl = make("dkgsb", "pgl")
    assert set(dkgsb.space) == {
        f"dkgsb.{k}"
        for k in (
            *("temperature", "start", "bounded", "learning_rate", "steps", "inner", "inner_rate"),
            *("carried", "reach", "batches", "prior"),
        )
    }
    assert dkgsb.space["dkgsb.temperature"] == optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)
    assert dkgsb.space["dkgsb.steps"] == optuna.distributions.IntDistribution(1, 12)
    assert dkgsb.space["dkgsb.bounded"].choices == (False, True)
    assert dkgsb.space["dkgsb.inner"].choices == ("adam", "adam_higher", "sgd")
    assert dkgsb.start == {name: dkgsb.spec.selector.settings[name.partition(".")[2]] for name in dkgsb.space}
    assert pgl.space == {} and pgl.target == 1 and pgl.trials == dkgsb.target == 5


def test_what_is_given_is_not_searched(make):
    (study,) = make("dkgsb", more=("dkgsb.temperature=0.01", "dkgsb.inner=sgd"))
    assert not {"dkgsb.temperature", "dkgsb.inner"} & set(study.space)
    assert study.spec.selector.settings["inner"] == "sgd"


def test_the_protocol_is_searched_for_every_selector_alike(make):
    found = make("pgl", "amal", search=["protocol.learning_rate,protocol.weight_decay", "protocol.patience"])
    for study in found:
        common = {k: v for k, v in study.space.items() if k.startswith("protocol.")}
        assert set(common) == {f"protocol.{k}" for k in ("learning_rate", "weight_decay", "patience")}
        assert common == {k: v for k, v in found[0].space.items() if k.startswith("protocol.")}
    # The preset's weight decay of 0 has no place on a logarithmic scale, its rate is the backbone's.
    assert "protocol.weight_decay" not in found[0].start
    (rated,) = make("pgl", search=RATE)
    assert rated.start == {"protocol.learning_rate": 3e-3}


def test_a_file_says_where(make, tmp_path):
    file = tmp_path / "search.toml"
    file.write_text(
        "[protocol]\nlearning_rate = {low = 1e-4, high = 1e-2}\nweight_decay = [0.0, 0.1]\n"
        "[amal]\ndivisor = false\ntemperature = {low = 0.01, high = 0.02, log = false}\n"
        "[tiny]\nchannels = false\n[dkgsb]\nstart = false\n"
    )
    (study,) = make("amal", file=file)
    assert "amal.divisor" not in study.space
    assert study.space["amal.temperature"] == optuna.distributions.FloatDistribution(0.01, 0.02)
    assert study.space["protocol.learning_rate"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert study.space["protocol.weight_decay"].choices == (0.0, 0.1)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("protocol.epochs", ["protocol setting that can be searched", "epochs"]),
        ("protocol.validation_share", ["protocol setting that can be searched", "validation_share"]),
        ("protocol.lerning_rate", ["lerning_rate", "Did you mean 'learning_rate'"]),
        ("learning_rate", ["not of the form NAME.KEY"]),
        ("nobody.k", ["unknown plug-in 'nobody'"]),
        ("tiny.patch_px", ["tiny.patch_px", "searched and given a value"]),
        ("protocol.buffer_um", ["protocol setting that can be searched"]),
    ],
)
def test_bad_searches(make, search, words):
    with pytest.raises(AglBenchError) as caught:
        make("pgl", search=[search])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[protocol]\nlearning_rate = {low = 1}", ["takes low, high and log"]),
        ("[protocol]\nlearning_rate = {low = 1e-2, high = 1e-4}", ["not an interval"]),
        ("[protocol]\nlearning_rate = {low = 1e-9, high = 1e-4}", ["not allowed"]),
        ("[protocol]\nweight_decay = {low = 0, high = 0.1, log = true}", ["begin above 0"]),
        ("[protocol]\nlearning_rate = 'fast'", ["it takes true, false"]),
        ("[protocol]\nlearning_rate = []", ["lists no value"]),
        ("[amal]\nk = true", ["unknown setting of amal 'k'"]),
        ("protocol = 3", ["not a table"]),
        ("[synthetic]\nspots = true", ["unknown key of search.toml 'synthetic'"]),
    ],
)
def test_bad_search_files(make, tmp_path, text, words):
    file = tmp_path / "search.toml"
    file.write_text(text)
    with pytest.raises(AglBenchError) as caught:
        make("amal", file=file)
    for word in words:
        assert word in str(caught.value)


# --- one study -------------------------------------------------------------------------------------------------------


def test_a_study_has_exactly_its_trials(make, tmp_path):
    (study,) = make("pgl", trials=6, search=RATE)
    storage, bench = open_storage(tmp_path, None), Played()
    *trials, done = tune(study, bench, storage)
    assert [t.number for t in trials] == [1, 2, 3, 4, 5, 6] and all(isinstance(t, TrialDone) for t in trials)
    assert trials[0].settings == study.start
    assert len(bench.trained) == 6 * 2  # folds
    assert isinstance(done, StudyDone) and (done.entry.trials, done.entry.points, done.entry.pruned) == (6, 6, 0)
    best = max(trials, key=lambda t: t.value)
    assert done.entry.settings == best.settings and done.entry.validation_pcc == best.value == trials[-1].best
    assert done.entry.folds == ("D1", "D2") and done.entry.seeds == (0,)
    assert [row["value"] for row in done.history] == [t.value for t in trials]
    (again,) = tune(study, bench, storage)  # nothing is left to do
    assert again.entry == done.entry and len(bench.trained) == 12
    *more, done = tune(replace(study, trials=8), bench, storage)  # a larger budget continues
    assert [t.number for t in more] == [7, 8] and done.entry.points == 8
    for trials, best in ((1, 1), (6, 6)):  # a smaller one counts no trial that it does not pay for
        (less,) = tune(replace(study, trials=trials), bench, storage)
        assert len(less.history) == less.entry.points == less.entry.trials == trials
        assert less.entry.validation_pcc == max(row["value"] for row in done.history[:best])


def test_the_score_is_the_mean_over_folds_and_seeds(make, tmp_path):
    (study,) = make("pgl", trials=1, search=RATE, seeds=["0,3"])
    bench = Played(lambda spec: {"D1": 0.1, "D2": 0.4}[spec.fold] + spec.seed)
    trial, _ = tune(study, bench, open_storage(tmp_path, None))
    assert trial.value == pytest.approx((0.1 + 0.4 + 3.1 + 3.4) / 4)
    assert counted(study, tmp_path)[0].user_attrs["validation_pcc"] == [0.1, 3.1, 0.4, 3.4]


def test_fewer_folds_and_nested_folds(make):
    (part,) = make("pgl", search=RATE, folds=1)
    assert [s.fold for s, _ in part.cells] == ["D1"]
    one, two = make("pgl", search=RATE, nested=True)
    assert [(s.fold, [c.fold for c, _ in s.cells]) for s in (one, two)] == [("D1", ["D1"]), ("D2", ["D2"])]
    assert len({part.name, one.name, two.name, make("pgl", search=RATE)[0].name}) == 4


def test_every_selector_has_the_same_budget(make, tmp_path):
    storage = open_storage(tmp_path, None)
    done = []
    for study in make("pgl", "dkgsb", "hvg_k", trials=4, search=RATE):
        done += [e for e in tune(study, Played(), storage) if isinstance(e, StudyDone)]
    assert [(d.entry.trials, d.entry.points) for d in done] == [(4, 4)] * 3
    assert [len(points(d.study, tmp_path)) for d in done] == [4] * 3


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_seeds(make, tmp_path, sampler):
    """The same study tries the same points, another seed other ones."""
    tried = []
    for number, seed in enumerate("001"):
        (study,) = make("amal", trials=13, search=RATE, seeds=[seed], sampler=sampler)
        list(tune(study, Played(), open_storage(tmp_path / str(number), None)))
        tried.append(points(study, tmp_path / str(number)))
    assert tried[0] == tried[1]
    assert tried[0][0] == tried[2][0]  # the fixed settings come first
    assert all(a != b for a, b in zip(tried[0][1:], tried[2][1:], strict=True))


def test_a_small_space_is_exhausted_and_never_repeated(make, tmp_path):
    file = tmp_path / "search.toml"
    file.write_text("[protocol]\nweight_decay = [0.0, 0.1, 0.2, 0.1]\naugment = true\n")
    (study,) = make("pgl", trials=40, file=file)
    *_, done = tune(study, Played(lambda spec: spec.protocol.weight_decay), open_storage(tmp_path, None))
    assert (study.target, done.entry.points, done.entry.trials) == (6, 6, 40)
    assert len({json.dumps(p, sort_keys=True) for p in points(study, tmp_path)}) == 6
    assert done.entry.settings["protocol.weight_decay"] == 0.2


def test_nothing_to_search_is_one_trial(make, tmp_path):
    (study,) = make("hvg_k", trials=40, more=SEVEN)
    *trials, done = tune(study, Played(lambda spec: 0.3), open_storage(tmp_path, None))
    assert len(trials) == 1 and done.entry.settings == {} and done.importances == {}


def test_diverged_trials_count_and_never_win(make, tmp_path):
    def disturb(number):
        if number == 3:
            raise Diverged("the training loss became nan in epoch 0")
        if number == 4:
            raise TooLittleMemory("out of device memory with 64 spots in a batch")

    (study,) = make("pgl", trials=6, search=RATE, folds=1)
    *trials, done = tune(study, Played(disturb=disturb), open_storage(tmp_path, None))
    assert [t.value is None for t in trials] == [False, False, True, True, False, False]
    assert "diverged" in trials[2].reason and trials[3].reason.startswith("out of device memory")
    assert (done.entry.points, done.entry.pruned) == (6, 2)
    nowhere = Played(lambda spec: math.nan)
    *_, failed = tune(replace(study, trials=2, sampler="random"), nowhere, open_storage(tmp_path, None))
    assert isinstance(failed, StudyFailed) and "none of 2 trials" in failed.sentence


def test_a_plugins_fault_ends_the_study_and_its_point_is_tried_again(make, tmp_path):
    def fault(number):
        if number == 3:
            raise ValueError("on\npurpose")

    (study,) = make("pgl", trials=4, search=RATE, folds=1)
    storage, bench = open_storage(tmp_path, None), Played(disturb=fault)
    *_, failed = tune(study, bench, storage)
    assert isinstance(failed, StudyFailed) and failed.sentence == "ValueError: on purpose"
    *_, done = tune(study, mended := Played(), storage)
    assert mended.trained[0] == bench.trained[2] and done.entry.points == 4


def test_what_a_plugin_does_to_the_process_ends_its_study_alone(make, tmp_path):
    class Spoilt(Bench):
        def trainer(self, spec, plan, setting):
            torch.set_float32_matmul_precision("medium")
            return super().trainer(spec, plan, setting)

    (study,) = make("pgl", trials=1, search=RATE, folds=1)
    spoilt = Spoilt(Plugins.discover((), strict=True), ROOT, choose_device("cpu"))
    *_, failed = tune(study, spoilt, open_storage(tmp_path, None))
    assert isinstance(failed, StudyFailed) and "changes torch's precision of matrix products" in failed.sentence
    assert torch.get_float32_matmul_precision() == "highest"


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pruner", "trials"), [("median", 12), ("hyperband", 25), ("wilcoxon", 12), ("none", 12)])
def test_bad_trials_are_pruned(make, tmp_path, pruner, trials):
    """What ends early is not among the best, counts as a trial, and saves epochs."""
    (study,) = make("pgl", trials=trials, search=RATE, seeds=["0,1,2,3"], sampler="random", pruner=pruner)
    bench = Played()
    *done, outcome = tune(study, bench, open_storage(tmp_path, None))
    pruned = [t for t in done if t.value is None]
    assert len(done) == outcome.entry.points == trials and outcome.entry.pruned == len(pruned)
    if pruner == "none":
        assert not pruned
        return
    assert pruned and all(t.reason == "pruned" for t in pruned)
    assert len(bench.trained) < trials * 8
    score = [1 - abs(math.log10(t.settings["protocol.learning_rate"]) + 3) / 2 for t in done]
    assert outcome.entry.validation_pcc == pytest.approx(max(score))
    assert max(1 - abs(math.log10(t.settings["protocol.learning_rate"]) + 3) / 2 for t in pruned) < max(score)


def test_what_a_pruner_sees_never_falls_and_ends_as_the_score(make, tmp_path):
    (study,) = make("pgl", trials=1, search=RATE, pruner="median")
    trial, _ = tune(study, Played(lambda spec: {"D1": 0.5, "D2": 0.1}[spec.fold]), open_storage(tmp_path, None))
    seen = counted(study, tmp_path)[0].intermediate_values
    assert list(seen) == [0, 1, 2, 3, 4, 5]  # 2 fits of 3 epochs
    assert list(seen.values()) == sorted(seen.values())
    assert seen[5] == pytest.approx(trial.value) == 0.3
    assert seen[2] == pytest.approx((0.5 - 1) / 2)


# --- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_study_tries_the_points_of_an_undisturbed_one(make, tmp_path):
    (study,) = make("amal", trials=14, search=RATE, folds=1)
    whole = open_storage(tmp_path / "whole", None)
    list(tune(study, Played(), whole))

    def stop(number):
        if number in (4, 9):
            raise KeyboardInterrupt

    bench, cut = Played(disturb=stop), tmp_path / "cut"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            list(tune(study, bench, open_storage(cut, None)))
    *_, done = tune(study, bench, open_storage(cut, None))
    assert points(study, cut) == points(study, tmp_path / "whole")
    assert done.entry.points == 14 and len(bench.trained) == 14 + 2
    assert bench.trained[3] == bench.trained[4] and bench.trained[8] == bench.trained[9]


def abandoned(study, storage, **owner):
    """A running trial that somebody left; its point."""
    handle = optuna.create_study(storage=storage, study_name=study.name, direction="maximize", load_if_exists=True)
    trial = handle.ask(study.space)
    for key, value in owner.items():
        trial.set_user_attr(key, value)
    return trial.params


def test_trials_of_dead_processes_are_tried_again(make, tmp_path):
    (study,) = make("pgl", trials=3, search=RATE)
    storage = open_storage(tmp_path, None)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lost = [
        abandoned(study, storage, host=socket.gethostname(), pid=gone.pid, born="1"),
        abandoned(study, storage, host=socket.gethostname(), pid=os.getpid(), born="another process of our number"),
    ]
    *_, done = tune(study, Played(), storage)
    assert isinstance(done, StudyDone) and done.entry.points == 3
    assert [p in points(study, tmp_path) for p in lost] == [True, True]
    states = [t.state for t in open_study(study, tmp_path).trials]
    assert states.count(TrialState.FAIL) == 2 and TrialState.RUNNING not in states


def test_trials_of_living_processes_are_left_alone(make, tmp_path):
    (study,) = make("pgl", trials=3, search=RATE)
    storage = open_storage(tmp_path, None)
    abandoned(study, storage, host=socket.gethostname(), pid=os.getpid(), born=_born(os.getpid()))
    abandoned(study, storage, host="elsewhere", pid=1, born="1", beat=time.time())
    *trials, end = tune(study, Played(), storage)
    assert len(trials) == 1 and isinstance(end, StudyOpen) and end.running == 2


def test_a_silent_machine_is_taken_for_dead(make, tmp_path, monkeypatch):
    (study,) = make("pgl", trials=2, search=RATE)
    storage = open_storage(tmp_path, None)
    lost = abandoned(study, storage, host="elsewhere", pid=1, born="1", beat=time.time())
    monkeypatch.setattr("agl_bench.bench.tune.SILENT_SECONDS", -1.0)
    *_, done = tune(study, Played(), storage)
    assert done.entry.points == 2 and lost in points(study, tmp_path)


def test_a_trial_without_an_owner_is_waited_for_and_taken_over(make, tmp_path, monkeypatch):
    """Its process died between asking and saying who it was; at once, if nobody else can have been that."""
    (study,) = make("pgl", trials=2, search=RATE)
    for wait, name in ((1e6, "alone"), (0.5, "not alone")):
        monkeypatch.setattr("agl_bench.bench.tune.OWNERLESS_SECONDS", wait)
        storage = open_storage(tmp_path / name, None)
        lost = abandoned(study, storage)
        if name == "not alone":
            open_study(study, tmp_path / name).set_user_attr("writer elsewhere 1 1", "1")
        *trials, done = tune(study, Played(), storage)
        assert len(trials) == 2 and isinstance(done, StudyDone) and lost in points(study, tmp_path / name)


def test_a_process_knows_whether_another_lives():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert _born(gone.pid) == "" and _born(os.getpid()) == _born(os.getpid()) != ""


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_many_writers_share_a_study(make, tmp_path, kind, request):
    """Exactly the trials that were asked for, each point once, though nobody waits for anybody."""
    (study,) = make("pgl", trials=12, search=RATE, folds=1)
    url = request.getfixturevalue("postgresql") if kind == "postgresql" else None
    open_storage(tmp_path, url)  # creates the tables once
    benches = [Played(disturb=lambda _: time.sleep(0.02)) for _ in range(3)]
    ends, faults = [], []

    def work(bench):
        try:
            ends.append(list(tune(study, bench, open_storage(tmp_path, url)))[-1])
        except Exception as error:  # noqa: BLE001  (a thread's fault is the test's)
            faults.append(error)

    threads = [threading.Thread(target=work, args=(bench,)) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    *_, done = tune(study, Played(), open_storage(tmp_path, url))
    assert done.entry.points == 12 and any(isinstance(end, StudyDone) for end in ends)
    tried = [json.dumps(t.params) for t in counted(study, tmp_path, open_storage(tmp_path, url))]
    assert len(tried) == len(set(tried)) == 12
    assert sum(len(bench.trained) for bench in benches) == 12
    assert sum(bool(bench.trained) for bench in benches) > 1


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_killed_at_random_times(make, tmp_path, sampler):
    """Between any two writes to the journal, or in the middle of one: nothing lost, nothing twice, the same points."""
    (study,) = make("amal", trials=16, search=RATE, folds=1, sampler=sampler)
    list(tune(study, Played(), open_storage(tmp_path / "whole", None)))
    fork, rng, kills = multiprocessing.get_context("fork"), np.random.default_rng(0), 0

    def work():
        slow = Played(disturb=lambda _: time.sleep(0.02))  # 0.32 s in all: the first two kills come before the end
        list(tune(study, slow, open_storage(tmp_path / "cut", None)))

    while True:
        process = fork.Process(target=work)
        process.start()
        process.join(rng.uniform(0.02, 0.2))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills > 1
    assert len(counted(study, tmp_path / "cut")) == 16
    by_text = [sorted(json.dumps(p) for p in points(study, tmp_path / name)) for name in ("cut", "whole")]
    assert by_text[0] == by_text[1]


def test_killed_twice(words, tmp_path, make):
    """SIGKILL in the middle of trials: the asked number in the end, no point twice, those of an undisturbed study."""
    command = [sys.executable, "-m", "agl_bench", "tune", "--selectors", "amal", "--trials", "7", "--fold", "D1"]
    command += [*words, "--work", str(tmp_path / "cut")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for until in ("[2/7]", "[4/7]"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                if line.startswith(until):
                    time.sleep(0.02)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    time.sleep(0.1)
    with pytest.raises(SystemExit) as caught:
        main([*command[3:]])
    assert not caught.value.code
    (study,) = make("amal", trials=7, fold=["D1"])
    tried = points(study, tmp_path / "cut")
    assert len(tried) == 7 and len({json.dumps(p) for p in tried}) == 7
    (entry,) = read_entries(tmp_path / "cut/tuned/amal.toml")
    assert (entry.trials, entry.points, entry.study) == (7, 7, study.name)
    whole = [*command[3:-1], str(tmp_path / "whole")]
    with pytest.raises(SystemExit):
        main(whole)
    assert sorted(map(json.dumps, points(study, tmp_path / "whole"))) == sorted(map(json.dumps, tried))
    values = [{t.value for t in counted(study, tmp_path / name)} for name in ("cut", "whole")]
    assert values[0] == values[1]


# --- storage ---------------------------------------------------------------------------------------------------------


def test_the_lock_follows_the_file_system(tmp_path):
    journal = tmp_path / "journal.log"
    kinds = {kind: type(lock_for(journal, kind)).__name__ for kind in ("ext4", "", "overlay", "nfs4", "cifs", "fuse.s")}
    local, links, files = "_KernelLock", "JournalFileSymlinkLock", "JournalFileOpenLock"
    assert kinds == {"ext4": local, "": local, "overlay": local, "nfs4": links, "cifs": files, "fuse.s": files}
    assert _filesystem(Path("/proc/self/status")) == "proc"


def test_the_lock_dies_with_its_holder(tmp_path):
    journal = tmp_path / "journal.log"
    text = (
        "import sys, os\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        f"FileLock('{journal}.flock').acquire()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    lock = _KernelLock(journal)
    assert lock.acquire()
    lock.release()


def test_a_line_cut_by_a_kill_is_cut_off(make, tmp_path):
    (study,) = make("pgl", trials=3, search=RATE)
    list(tune(study, Played(), open_storage(tmp_path, None)))
    before, journal = points(study, tmp_path), tmp_path / "tune/journal.log"
    with journal.open("a") as stream:
        stream.write('{"op_code":4,"worker_id":"x')
    *_, done = tune(replace(study, trials=5), Played(), open_storage(tmp_path, None))
    assert done.entry.points == 5 and points(study, tmp_path)[:3] == before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("trials.db", ["not a database URL"]),
        ("nosuch://host/x", ["cannot be used"]),
        ("sqlite://", ["does not name a file"]),
        ("sqlite:///:memory:", ["does not name a file"]),
        ("postgresql://me:sec/secret@127.0.0.1:9/x", ["a password holds a separator"]),
        ("sqlite:////no/such/folder/x.db", ["cannot be used"]),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/x", ["postgresql+psycopg://***@127.0.0.1:9/x cannot be used"]),
    ],
)
def test_bad_storages(tmp_path, url, words):
    with pytest.raises(BadSpec) as caught:
        open_storage(tmp_path, url)
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_journal_and_a_folder_without_access(tmp_path):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/journal.log").mkdir()
    with pytest.raises(BadWorkFolder, match="is not a regular file"):
        open_storage(tmp_path, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadWorkFolder, match="cannot write"):
        open_storage(tmp_path / "file", None)


def test_a_full_disk_is_one_sentence_and_loses_nothing(make, tmp_path, monkeypatch):
    (study,) = make("pgl", trials=4, search=RATE)
    whole, written = optuna.storages.journal.JournalFileBackend.append_logs, []

    def append(self, logs):
        written.append(logs)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, logs)

    storage = open_storage(tmp_path, None)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", append)
        with pytest.raises(BadWorkFolder, match=r"No space left on device.*the same command continues"):
            list(tune(study, Played(), storage))
    kept = points(study, tmp_path)
    *_, done = tune(study, Played(), open_storage(tmp_path, None))
    assert 0 < len(kept) < 4 and done.entry.points == 4 and points(study, tmp_path)[: len(kept)] == kept


def test_a_database_holds_studies_too(make, tmp_path):
    (study,) = make("pgl", trials=3, search=RATE)
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    *_, done = tune(study, Played(), open_storage(tmp_path, url))
    (again,) = tune(study, Played(), open_storage(tmp_path, url))
    assert done.entry == again.entry and not (tmp_path / "tune").exists()


# --- the test fold ---------------------------------------------------------------------------------------------------


def test_a_trial_builds_no_test_store_and_reads_no_test_spot(make, bench, tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("a trial asked for the test spots")

    read = []
    monkeypatch.setattr(Setting, "test", property(refuse))
    for name in ("rows", "counts"):
        whole = getattr(SpotTable, name)

        def noted(self, rows, columns=None, whole=whole):
            read.append(np.asarray(rows))
            return whole(self, rows, columns)

        monkeypatch.setattr(SpotTable, name, noted)
    (study,) = make("dkgsb", trials=2, search=RATE, folds=1)
    *trials, end = tune(study, bench, open_storage(tmp_path, None))
    assert isinstance(end, StudyDone), end
    assert len(trials) == 2 and read
    test = bench.setting(*study.cells[0]).fold.test
    assert len(test) and not np.isin(np.concatenate(read), test).any()


def test_test_expression_changes_nothing(make, tmp_path):
    """Not a number at every test spot: the same points, scores and settings, bit for bit."""
    keep = ("protocol.min_genes_per_spot=0", "protocol.spot_mads=0")  # what is not a number is not detected
    (study,) = make("dkgsb", trials=3, search=RATE, fold=["D1"], more=keep)
    found = []
    for spoil in (False, True):
        bench = Bench(Plugins.discover((), strict=True), ROOT, choose_device("cpu"))
        bench.setting(*study.cells[0])
        sections = bench.sections(study.spec.dataset)
        tested = [s for s in sections if s.name in study.cells[0][1].test_sections]
        assert len(tested) == 1
        if spoil:
            values = tested[0].counts.X.copy()
            values.data = np.full(values.data.shape, np.nan, dtype=np.float32)
            tested[0].counts.X = values
            bench._table = bench._setting = None
        *trials, done = tune(study, bench, open_storage(tmp_path / str(spoil), None))
        assert isinstance(done, StudyDone), done
        found.append(([(t.settings, t.value) for t in trials], done.entry))
        if spoil:
            assert np.isnan(bench.setting(*study.cells[0]).test.expression_of().numpy()).any()
    assert found[0] == found[1]


# --- tuned settings --------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(make):
    (study,) = make("amal", search=RATE)
    settings = {name: value for name, value in study.start.items() if name != "amal.reach"}
    return Entry(
        study.name, "synthetic", "inter", "tiny", "", 5, 5, 1, ("D1", "D2"), (0,), "tpe", "none", 0.25,
        conditions(study.spec, tuple(settings)), settings | {"amal.temperature": 0.05, "protocol.learning_rate": 2e-4},
    )  # fmt: skip


def test_file_round_trip(entry, tmp_path):
    path = write_entry(tmp_path, "amal", entry)
    assert read_entries(path) == [entry]
    other = replace(entry, dataset='a "strange" name', fold="D1")
    write_entry(tmp_path, "amal", other)
    newer = replace(entry, validation_pcc=1 / 3)
    assert read_entries(write_entry(tmp_path, "amal", newer)) == [newer, other]


def test_tuned_cells(make, entry, tmp_path):
    (study,) = make("amal")
    write_entry(tmp_path, "amal", entry)
    plugins = Plugins.discover((), strict=True)
    cells = tuned_cells(study.cells, plugins, tmp_path)
    for (spec, plan), (fixed, same) in zip(cells, study.cells, strict=True):
        assert plan is same
        assert spec.selector.settings == fixed.selector.settings | {"temperature": 0.05}
        assert spec.protocol == replace(fixed.protocol, learning_rate=2e-4)
        assert spec.tuning == Tuning(5, 5, entry.study, 0.25, tuple(entry.settings))
        assert spec.key != fixed.key and spec.group != fixed.group
        assert replace(spec, tuning=None).key != spec.key  # equal settings, yet never one for the other
        assert RunSpec.from_json(json.loads(json.dumps(spec.as_json()))) == spec
        assert "tuned (5 trials)" in spec.title


def test_settings_for_one_fold_go_before_those_for_all(make, entry, tmp_path):
    (study,) = make("amal")
    write_entry(tmp_path, "amal", entry)
    own = replace(entry, fold="D2", settings=entry.settings | {"amal.temperature": 0.9})
    write_entry(tmp_path, "amal", own)
    cells = tuned_cells(study.cells, Plugins.discover((), strict=True), tmp_path)
    assert [s.selector.settings["temperature"] for s, _ in cells] == [0.05, 0.9]


def test_settings_of_elsewhere_are_refused_unless_asked_for(make, entry, tmp_path):
    plugins = Plugins.discover((), strict=True)
    write_entry(tmp_path, "amal", entry)
    for more in (("protocol.validation_share=0.3",), ("amal.reach=all",), ("synthetic.spots=44",)):
        (study,) = make("amal", more=more)
        with pytest.raises(BadSpec, match="other data or under another protocol"):
            tuned_cells(study.cells, plugins, tmp_path)
        cells = tuned_cells(study.cells, plugins, tmp_path, transfer=True)
        assert cells[0][0].selector.settings["temperature"] == 0.05
    inside = make("amal", evaluation=["intra"])[0].cells
    with pytest.raises(BadSpec, match="no settings for synthetic, intra-batch"):
        tuned_cells(inside, plugins, tmp_path)
    assert tuned_cells(inside, plugins, tmp_path, transfer=True)
    write_entry(tmp_path, "amal", replace(entry, backbone="position"))
    with pytest.raises(BadSpec, match="2 candidates"):
        tuned_cells(inside, plugins, tmp_path, transfer=True)


def test_unequal_budgets_are_refused(make, entry, tmp_path):
    plugins = Plugins.discover((), strict=True)
    one, two = make("amal", "pgl")
    write_entry(tmp_path, "amal", entry)
    with pytest.raises(BadSpec, match="pgl has not been tuned"):
        tuned_cells([*one.cells, *two.cells], plugins, tmp_path)
    rate = {"protocol.learning_rate": 1e-3}
    other = replace(entry, settings=rate, conditions=conditions(two.spec, tuple(rate)))
    write_entry(tmp_path, "pgl", other)
    assert len(tuned_cells([*one.cells, *two.cells], plugins, tmp_path)) == 4
    for unequal in (
        replace(other, trials=4),
        replace(other, folds=("D1",)),
        replace(other, pruner="median"),
        replace(other, settings={}, conditions=conditions(two.spec, ())),
    ):
        write_entry(tmp_path, "pgl", unequal)
        with pytest.raises(BadSpec, match="different budgets on synthetic, inter-batch"):
            tuned_cells([*one.cells, *two.cells], plugins, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format = 1", "format = 9", ["not a file of tuned settings of format 1"]),
        ("trials = 5", "", ["study 1 is incomplete"]),
        ('"amal.temperature" = 0.05', '"amal.temperature" = 7.0', ["amal.temperature = 7.0 is not allowed"]),
        ('"amal.temperature" = 0.05', '"amal.heat" = 7.0', ["unknown setting of amal 'heat'"]),
        ('"amal.temperature" = 0.05', '"dkgsb.start" = 0.5', ["dkgsb.start belongs to no part"]),
        ("[[studies]]", "[[studies", ["not valid TOML"]),
    ],
)
def test_damaged_files(make, entry, tmp_path, old, new, words):
    path = write_entry(tmp_path, "amal", entry)
    text = re.sub("digest = .*", "", path.read_text())  # as who means a change
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(BadSpec) as caught:
        tuned_cells(make("amal")[0].cells, Plugins.discover((), strict=True), tmp_path, transfer=True)
    for word in (*words, "amal.toml"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"amal.temperature" = 0.05', '"amal.temperature" = 0.07', "has changed since `agl-bench tune` wrote it"),
        ("trials = 5", "trials = 6", "has changed"),
        ("trials = 5", 'trials = "5"', "study 1 is incomplete"),
        ("seeds = [0]", 'seeds = ["0"]', "study 1 is incomplete"),
        ('evaluation = "inter"', "evaluation = 3", "study 1 is incomplete"),
    ],
)
def test_tuned_settings_that_nobody_has_written(entry, tmp_path, old, new, words):
    path = write_entry(tmp_path, "amal", entry)
    (read,) = read_entries(path)
    assert read == entry
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(AglBenchError, match=words):
        read_entries(path)


def test_no_folder(make, tmp_path):
    with pytest.raises(BadSpec, match="not a folder"):
        tuned_cells(make("amal")[0].cells, Plugins.discover((), strict=True), tmp_path / "nowhere")


def test_with_settings_reaches_all_three_parts(make):
    (study,) = make("amal")
    spec = with_settings(study.spec, {"amal.temperature": 0.5, "tiny.channels": 16, "protocol.patience": 7})
    assert spec.selector.settings["temperature"] == 0.5
    assert spec.backbone.settings["channels"] == 16
    assert spec.protocol.patience == 7
    assert study.spec.backbone.settings["channels"] == 8


# --- commands --------------------------------------------------------------------------------------------------------


def test_tune_and_run(words, tmp_path, capsys):
    """Tuned and fixed cells stand in tables of their own, with the budget."""
    work = ["--work", str(tmp_path)]

    def command(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *words, *work])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    both = ["--selectors", "pgl,hvg_k"]
    code, out, _ = command("tune", *both, "--trials", "3", "--tune", "protocol.learning_rate")
    assert code == 0 and "[3/3] synthetic · inter · tiny · pgl" in out and "best of 3 trials" in out
    table = tmp_path / "table.json"
    run = ["run", *both, "--tuned", str(tmp_path / "tuned")]
    code, out, _ = command(*run, "--json", str(table))
    assert code == 0 and "fixed settings" in out and "synthetic, tuned (3 trials)" in out
    lines = json.loads(table.read_text())["lines"]
    assert [(line["selector"], bool(line["tuning"])) for line in lines] == [
        ("pgl", False), ("pgl", True), ("hvg_k", False), ("hvg_k", True)
    ]  # fmt: skip
    for line in lines:
        assert len(line["cells"]) == 2 and line["difference_to_baseline_mean"] is not None
        if line["tuning"]:
            assert line["tuning"]["label"] == "tuned (3 trials)" and line["tuning"]["trials"] == 3
            assert "protocol.learning_rate" in line["tuning"]["settings"]
    assert sum(r.spec.tuning is not None for r in CellStore(tmp_path)) == 4
    code, out, _ = command(*run)
    assert code == 0 and "8 cells were finished before and kept" in out
    code, out, _ = command(*run, "--dry-run")
    assert "8 cells, 8 finished" in out

    given = [word for setting in SEVEN for word in ("--set", setting)]
    code, out, err = command("tune", "--selectors", "hvg_k", "--trials", "2", *given)
    assert code == 0 and "nothing is searched" in err and "[1/1]" in out
    for arguments, said in (
        (["tune", *both, "--tune", "protocol.epochs"], "epochs"),
        (["tune", *both, "--storage", "here"], "not a database URL"),
        (["tune", *both, "--search", "no.toml"], "cannot read no.toml"),
        (["tune", *both, "--out", str(table)], "cannot write to"),
        (["run", *both, "--tuned", "nowhere"], "not a folder"),
        (["run", *both, "--transfer"], "--tuned"),
        (run, "found on other data or under another protocol"),
        ([*run, "--transfer"], "different budgets"),
    ):
        code, out, err = command(*arguments)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, (arguments, err)


def test_interrupted(words, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "trainer", stop)
    with pytest.raises(SystemExit) as caught:
        main(["tune", "--selectors", "amal", "--trials", "2", *words, "--work", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert (caught.value.code, said) == (
        75, "agl-bench: interrupted; finished trials are kept, the same command continues"
    )  # fmt: skip
    monkeypatch.undo()
    (study,) = studies_of(tmp_path)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def studies_of(work):
    storage = open_storage(work, None)
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
