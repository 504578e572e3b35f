"""What faulty plug-ins do to the selectors that run beside them.

    python benchmarks/reliability_plugins.py --write        writes its section of benchmarks/reliability.md

Short faulty statements are inserted into plug-ins: into the module, hook, constructor, `forward`, `observe` or `learn`
of a selector, the constructor or `forward` of a backbone, or `sections` or `read` of a dataset. Each plug-in then runs
before `pgl` (some before `dkgsb` too), by `agl-bench run` in its own work folder, on small generated sections that are
prepared once. A trial is clean if the plug-in fails, is skipped or is refused with a sentence, or does no harm. Others
are harmed if a neighbour's result is missing, or if its gene table differs in a single bit from that of a run without
the plug-in.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import reliability
import scanpy  # noqa: F401  (imported once, here: the commands are forks)
import torch

from agl_bench.bench import apart, run  # noqa: F401  (likewise)
from agl_bench.bench.cells import CellStore
from agl_bench.cli import main as command

SETTINGS = {
    "synthetic.sections": 2,
    "synthetic.spots": 40,
    "synthetic.patch_px": 16,
    "synthetic.markers": 5,
    "synthetic.helpful_genes": 25,
    "synthetic.harmful_genes": 20,
    "synthetic.useless_genes": 30,
    "tiny.patch_px": 16,
    "tiny.channels": 8,
    "protocol.primary_genes": 5,
    "protocol.min_genes_per_spot": 5,
    "protocol.buffer_um": 0,
    "protocol.epochs": 3,
}
PATIENCE = 400.0  # seconds that a command may take
INTRODUCTION = (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2]

SHOWN = {  # deeds on what a selector is shown; `view` is there in the constructor, `self.view` later
    "genes.primary, in place": "use = VIEW.genes.primary; use |= VIEW.genes.rank < 10",
    "genes.primary, all of it": "VIEW.genes.primary.fill_(True)",
    "genes.rank, in place": "VIEW.genes.rank.clamp_(min=0)",
    "genes.rank, reversed": "VIEW.genes.rank.copy_(VIEW.genes.rank.flip(0))",
    "genes.score, in place": "VIEW.genes.score.nan_to_num_().neg_()",
    "section": "VIEW.section.add_(1)",
    "position, centred": "here = VIEW.position; here -= here.mean(0)",
    "position, through numpy": "VIEW.position.numpy()[:] = 0",
    "expression, in place": "VIEW.expression.sub_(VIEW.expression.mean(0))",
    "expression, through .data": "VIEW.expression.data.mul_(2)",
    "expression, through numpy": "VIEW.expression.numpy()[:, 0] = 7",
    "expression, a detached view": "VIEW.expression.detach().T[0].zero_()",
    "expression, what lies behind": "VIEW.expression._base.zero_()",
    "counts": "VIEW.counts.log1p_()",
    "a score": "VIEW.score_genes('mean').zero_()",
}
STEP = {  # deeds on what a step is given
    "losses, in place": "losses.mul_(2)",
    "losses, through .data": "losses.data.zero_()",
    "target, in place": "step.target.zero_()",
    "target, through numpy": "step.target.numpy()[:] = 0",
    "prediction, through .data": "step.prediction.data.zero_()",
    "row": "step.row.zero_()",
}
PROCESS = {  # deeds on the process
    "default type": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
    "deterministic algorithms off": "torch.use_deterministic_algorithms(False)",
    "threads": "torch.set_num_threads(2)",
    "gradient mode": "torch.set_grad_enabled(False)",
    "inference mode": "HELD.append(torch.inference_mode()); HELD[-1].__enter__()",
    "autocast": "HELD.append(torch.autocast('cpu', torch.bfloat16)); HELD[-1].__enter__()",
    "anomaly mode": "torch.autograd.set_detect_anomaly(True)",
    "denormal numbers": "torch.set_flush_denormal(False)",
    "oneDNN off": "torch.backends.mkldnn.set_flags(False)",
    "hook on all modules": "torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: None)",
    "torch.nn.Linear.forward": "torch.nn.Linear.forward = lambda layer, x: x.new_zeros(len(x), layer.out_features)",
    "torch.optim.Adam.step": "torch.optim.Adam.step = lambda *_: None",
    "torch.Tensor.mean": "torch.Tensor.mean = torch.Tensor.sum",
    "torch.manual_seed": "torch.manual_seed = lambda seed: None",
    "Selector.weighted_mean": "Selector.weighted_mean = lambda self, losses, weights: losses.sum()",
    "a loss of agl-bench": "LOSSES.update(pearson=LOSSES['squared_error'])",
    "signal handler": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "alarm": "signal.alarm(1)",
    "stdout replaced": "sys.stdout = open(os.devnull, 'w')",
    "stdout closed": "os.close(1)",
    "seeds": "torch.manual_seed(0); np.random.seed(0); random.seed(0)",
    "numpy raises": "np.seterr(all='raise')",
    "warnings are errors": "warnings.simplefilter('error')",
    "working directory": "os.chdir('/')",
    "umask": "os.umask(0o777)",
    "environment": "os.environ.clear()",
    "garbage collector": "gc.disable()",
    "recursion limit": "sys.setrecursionlimit(120)",
    "files": "resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
    "sys.modules": "sys.modules['json'] = sys.modules['pickle'] = sys",
    "sys.path": "sys.path.clear()",
}
ENDS = {  # deeds that end, or do not
    "os._exit(0)": "os._exit(0)",
    "sys.exit(0)": "sys.exit(0)",
    "SIGSEGV": "os.kill(os.getpid(), signal.SIGSEGV)",
    "a null pointer": "ctypes.string_at(0)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "BaseException": "raise BaseException('no reason')",
    "GeneratorExit": "raise GeneratorExit",
    "StopIteration": "raise StopIteration",
    "an exception that cannot say": "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "a lone surrogate": "raise ValueError('\\ud800')",
    "markup in the text": "raise ValueError('[/b] [link')",
    "a text of a megabyte": "raise ValueError('x' * 10**6)",
    "recursion without an end": "again = lambda: again(); again()",
    "MemoryError": "bytearray(10**18)",
}
ENDLESS = {"an endless loop": "while True: pass"}

SELECTOR = """
{head}
{module}

class Wrong(Selector):
    '''Something is wrong with it.'''

    reference, needs_counts = "test", True

    def __init__(self, view):
        super().__init__(view)
        self.view = view
        self.weight = torch.nn.Parameter(torch.zeros(()))
        {constructor}

    def observe(self, losses, step):
        {observe}

    def learn(self, gradients, optimizer):
        {learn}
        super().learn(gradients, optimizer)

    def forward(self, losses, step):
        {forward}
        return self.weighted_mean(losses, self.weight.sigmoid().expand_as(losses))

@hookimpl
def register_selectors():
    {hook}
    return {{"wrong": Wrong}}
"""
BACKBONE = """
{head}

class Wrong(Backbone):
    '''Something is wrong with it.'''

    reference, width, patch_px = "test", 4, 16

    def __init__(self, example):
        super().__init__(example)
        spots = example
        {constructor}
        self.mix = torch.nn.Linear(3, 4)

    def forward(self, spots):
        {forward}
        return self.mix(spots.patches.mean((2, 3)))

@hookimpl
def register_backbones():
    return {{"wrong": Wrong}}
"""
DATASET = """
{head}
from agl_bench import Dataset, MissingData, Section
from agl_bench_plugins.datasets.synthetic import Synthetic

class Wrong(Synthetic):
    '''Something is wrong with it.'''

    def sections(self, root):
        {sections}
        return super().sections(root)

    def read(self, root, name):
        {read}
        return super().read(root, name)

@hookimpl
def register_datasets():
    return {{"wrong": Wrong}}
"""
HEAD = """
import ctypes, gc, os, random, resource, signal, sys, warnings
import numpy as np
import torch
from agl_bench.maths.losses import LOSSES
from agl_bench import Backbone, Selector, hookimpl

HELD = []
"""
BLANKS = {"head": HEAD, **dict.fromkeys(("module", "constructor", "observe", "learn", "forward", "hook"), "pass")}
BLANKS |= {"sections": "pass", "read": "pass"}
SPOTS = {
    "patches, in place": "spots.patches.sub_(1)",
    "position, through .data": "spots.position.data.zero_()",
    "section": "spots.section.add_(1)",
}


@dataclass(frozen=True)
class Case:
    """A wrong plug-in.

    Attributes:
        kind: row of the table.
        name: which one.
        text: its source.
        door: "selector", "backbone" or "dataset".
        beside: the neighbours.
        seconds: time limit of a cell; 0 = none.
    """

    kind: str
    name: str
    text: str
    door: str = "selector"
    beside: tuple[str, ...] = ("pgl",)
    seconds: int = 0


def cases() -> Iterator[Case]:
    """All wrong plug-ins."""

    def selector(kind: str, name: str, place: str, deed: str, **more: Any) -> Case:
        deed = deed.replace("VIEW", "view" if place == "constructor" else "self.view")
        return Case(kind, f"{name}, {place}", SELECTOR.format(**BLANKS | {place: deed}), **more)

    both = ("pgl", "dkgsb")
    for number, (name, deed) in enumerate(SHOWN.items()):
        yield selector("selector: what it is shown", name, "constructor", deed, beside=both if number < 4 else ("pgl",))
        if number % 2:
            yield selector("selector: what it is shown", name, "forward", deed)
    for number, (name, deed) in enumerate(STEP.items()):
        yield selector("selector: what a step is given", name, ("forward", "observe")[number % 2], deed)
    for number, (name, deed) in enumerate(PROCESS.items()):
        kind = "selector: the process"
        yield selector(kind, name, "constructor", deed, beside=both if number < 3 else ("pgl",))
        yield selector(kind, name, ("forward", "observe", "learn", "hook", "module")[number % 5], deed)
    for number, (name, deed) in enumerate(ENDS.items()):
        yield selector("selector: an end", name, ("constructor", "forward")[number % 2], deed)
        if number < 8:
            yield selector("selector: an end", name, ("hook", "observe", "module", "learn")[number % 4], deed)
    for name, deed in ENDLESS.items():
        for place in ("forward", "constructor"):
            yield selector("selector: no end", name, place, deed, seconds=60)
    for number, (name, deed) in enumerate((*SPOTS.items(), *list(PROCESS.items())[:14], *list(ENDS.items())[:6])):
        place = ("constructor", "forward")[number % 2]
        text = BACKBONE.format(**BLANKS | {place: deed})
        yield Case("backbone", f"{name}, {place}", text, "backbone")
    for number, (name, deed) in enumerate((*list(PROCESS.items())[:9], *list(ENDS.items())[:8])):
        place = ("read", "sections")[number % 2]
        yield Case("dataset", f"{name}, {place}", DATASET.format(**BLANKS | {place: deed}), "dataset")


def start(words: list[str], work: Path, cache: Path) -> int:
    """Begin a command in a fork of this process; its number."""
    work.mkdir()
    pid = os.fork()
    if pid:
        return pid
    status: Any = 1
    try:
        os.environ["AGL_BENCH_CACHE"] = str(cache)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT), number)
        os.setpgid(0, 0)
        sys.argv = ["agl-bench", *words, "--work", str(work / "work")]
        command()  # as the script does: with plug-ins of others it is watched from outside
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001  (as Python itself would end)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def ended(pid: int) -> int | None:
    """The status of a command; None if it had to be killed."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, 9)
    os.waitpid(pid, 0)
    return None


def run_words(selectors: list[str], *, backbones: tuple[str, ...] = ("tiny",), datasets: tuple[str, ...]) -> list[str]:
    """A command over the small grid."""
    words = ["run", "--selectors", ",".join(selectors), "--datasets", ",".join(datasets), "--preset", "smoke"]
    words += ["--backbone", ",".join(backbones), "--evaluation", "inter", "--fold", "D1", "--device", "cpu"]
    words += ["--tracking", "none"]
    settings = SETTINGS | {f"wrong.{k.partition('.')[2]}": v for k, v in SETTINGS.items() if k.startswith("synthetic.")}
    taken = {k: v for k, v in settings.items() if "wrong" in datasets or not k.startswith("wrong.")}
    return words + [w for k, v in taken.items() for w in ("--set", f"{k}={v}")]


def bits(work: Path) -> dict[str, dict[str, bytes]]:
    """The table of genes of each finished cell of the sound plug-ins, as bytes, by selector."""
    return {
        r.spec.selector.name: {n: repr(c.tolist()).encode() for n, c in r.genes.items()}
        for r in CellStore(work / "work")
        if "wrong" not in (r.spec.selector.name, r.spec.backbone.name, r.spec.dataset.name)
    }


def judge(case: Case, work: Path, status: int | None, expected: dict[str, Any]) -> reliability.Trial:
    """What became of a wrong plug-in and of its neighbours."""
    out, err = ((work / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    answer = reliability.Answer(-1 if status is None else status, out, err)
    found = bits(work) if (work / "work" / "cells").is_dir() else {}
    refused = answer.status == 2 and answer.is_refusal  # before anything was begun: a file that was asked for by name
    if answer.has_traceback:
        verdict = reliability.TRACEBACK
    elif any(found.get(name) != expected[name] for name in case.beside) and not refused:
        verdict = reliability.HARMED
    elif status == 0:
        verdict = reliability.RIGHT
    else:
        verdict = reliability.REFUSED if answer.is_refusal else reliability.WRONG
    return reliability.Trial(case.kind, case.name, verdict, f"{status}: {answer.last_line}")


def tried(case: Case, folder: Path, cache: Path, expected: dict[str, Any]) -> reliability.Trial:
    """Run one wrong plug-in beside its neighbours."""
    plugin = folder.with_suffix(".py")
    plugin.write_text(case.text, encoding="utf-8")
    if case.door == "selector":
        words = run_words(["wrong", *case.beside], datasets=("synthetic",))
    elif case.door == "backbone":
        words = run_words(list(case.beside), backbones=("wrong", "tiny"), datasets=("synthetic",))
    else:
        words = run_words(list(case.beside), datasets=("wrong", "synthetic"))
    words += ["--plugin", str(plugin)] + (["--time-limit", str(case.seconds)] if case.seconds else [])
    began = time.monotonic()
    trial = judge(case, folder, ended(start(words, folder, cache)), expected)
    print(
        f"{time.monotonic() - began:5.1f} s  {case.kind}, {case.name}: {trial.verdict}  {trial.said}", file=sys.stderr
    )
    return trial


def main() -> None:
    """See the module."""
    made = reliability.parser(__doc__)
    made.add_argument("--only", default="", help="cases whose kind and name hold this text")
    made.add_argument("--jobs", type=int, default=1, help="commands at a time")
    options = measure.options(made, quick={"write": False})
    torch.set_num_threads(1)
    nursery = apart._forked()  # where all forks have their cells forked: libraries are imported once
    apart._bare = lambda: (nursery, None)
    chosen = [c for c in cases() if options.only in f"{c.kind}, {c.name}"]
    chosen = chosen[5 :: len(chosen) // 2][:2] if options.quick else chosen
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as name:
        folder, cache = Path(name), Path(name) / "cache"
        beside = sorted({n for case in chosen for n in case.beside})
        assert ended(start(run_words(beside, datasets=("synthetic",)), folder / "alone", cache)) == 0, (
            folder / "alone" / "err"
        ).read_text(encoding="utf-8")
        expected = bits(folder / "alone")
        with ThreadPoolExecutor(options.jobs) as pool:
            trials = list(pool.map(lambda nc: tried(nc[1], folder / f"n{nc[0]}", cache, expected), enumerate(chosen)))
    reliability.report("plugins", "Wrong plug-ins", INTRODUCTION, trials, options)


if __name__ == "__main__":
    main()
