"""Is every bad command line refused with one sentence?

    python benchmarks/reliability_invocations.py --write        writes its section of benchmarks/reliability.md

Every option of every command is given values that nobody can mean: text for numbers, numbers out of range, thousands of
digits, missing files, folders instead of files, pipes, names with mark-up or control characters, addresses with
passwords. Files of campaigns and searches are broken in the same way. Each invocation is a process, forked after one
import, that calls what `agl-bench` calls. A few odd words are valid and counted apart: their command must succeed.

Refused means exit status 2 with a sentence, before anything is done; the output must not show a secret, and the
finished cells of the work folder must be unchanged.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import measure
import reliability
import scanpy  # noqa: F401  (imported once, here: the invocations are forks)
from reliability import HARMED, REFUSED, RIGHT, TRACEBACK, WRONG, Trial

from agl_bench.bench import mlflow_recorder, prepare, run, tune  # noqa: F401  (likewise)
from agl_bench.cli import cli, main
from agl_bench.cli.options import Finite
from agl_bench.comparison import report  # noqa: F401  (likewise)

PATIENCE = 60.0  # seconds; who has not answered by then has begun to work, or hangs
SECRET = "s3cr"  # part of every secret below
HUGE, LONG = "9" * 5000, "x" * 5000
SMALL = (
    *("--datasets", "synthetic", "--evaluation", "inter", "--preset", "smoke", "--device", "cpu"),
    *("--set", "synthetic.sections=2", "--set", "synthetic.spots=30", "--set", "synthetic.markers=4"),
    *("--set", "synthetic.helpful_genes=16", "--set", "synthetic.harmful_genes=10", "--set", "synthetic.patch_px=16"),
    *("--set", "synthetic.useless_genes=10", "--set", "tiny.patch_px=16", "--set", "protocol.primary_genes=4"),
    *("--set", "protocol.min_genes_per_spot=5", "--set", "protocol.buffer_um=0"),
)
RUN = ("--selectors", "pgl", *SMALL)
# What else a command needs, so that one word alone is wrong.
SOUND: Mapping[str, Sequence[str]] = {
    "run": (*RUN, "--tracking", "none"),
    "plan": RUN,
    "tune": ("--selectors", "hvg_k", *SMALL, "--trials", "1", "--tracking", "none"),
    "audit": RUN,
    "list": (),
    "show": ("agl",),
    "check": ("hvg_k", "--rule", "reference_is_given"),
    "validate": ("synthetic",),
    "doctor": (),
    "fetch": ("synthetic",),
    "folds": ("synthetic",),
    "prepare": ("synthetic", "--set", "synthetic.spots=30"),
    "describe": ("synthetic", "--set", "synthetic.spots=30"),
    "status": (),
    "merge": ("work",),
    "rerun": ("KEY",),
    "sync": (),
    "ui": (),
    "report": ("--tracking", "none"),
    "compare": ("pgl", "random_k"),
    "reproduce": ("table1", "--dry-run"),
    "export": ("out.h5ad", "--dataset", "synthetic", "--section", "S1", "--evaluation", "inter"),
    "new-plugin": ("selector", "mine"),
}
NAMES = ("", ",", "nosuch", "pgl;agl", "[/b]", "\x1b[31mred", LONG, "../pgl")
LISTS: Mapping[str, Sequence[str]] = {
    "seeds": ("", "x", "-1", "1.5", "0-3", "0..2", "1e3", "nan", "True", "٣", HUGE, "1" * 19, "0,x"),
    "evaluation": ("", "outer", "INTRA", "intra;inter"),
    "fold": ("", "nosuch", "S1.0.0"),
    "rules": ("", "nosuch", "[/b]"),
    "further": ("", "x", "protocol", "protocol.nosuch", "nosuch.k", "tiny.nosuch", "protocol.epochs", ".k", "tiny."),
}
SETTINGS = (
    *("x", "=", "x=1", ".epochs=1", "protocol.=1", "protocol.epochs", "protocol.epochs=", "protocol.epochs=-1"),
    *("protocol.epochs=1.5", "protocol.epochs=nan", f"protocol.epochs={HUGE}", "protocol.epochs=1e999"),
    *("protocol.patch_um=nan", "protocol.patch_um=inf", "protocol.patch_um=", "protocol.loss=nosuch"),
    *("protocol.nosuch=1", "nosuch.k=1", "tiny.nosuch=1", "tiny.channels=x", "protocol.fold_file=absent.csv"),
    *("protocol.fold_file=work", "protocol.primary_file=pipe", "protocol.augment=maybe", "[/b].k=1", f"{LONG}.k=1"),
)
TIMES = ("", "0", "-1h", "nan", "inf", "h", "1e9", "3d", HUGE, f"{HUGE}h", "1h-30m")
UNREADABLE = (
    *("", "x", "http://host:port", "file:///tmp/x", "nosuch://x", "sqlite://", "sqlite:///", "sqlite:///:memory:"),
    *("postgresql://me:p@s3cr@127.0.0.1:9/x", "postgresql://me:s3cr/s3cr@127.0.0.1:9/x", "nosuch://me:s3cr@host/x"),
    "host=127.0.0.1 password=s3cr",
)
UNREACHABLE = (
    *("http://", "http://127.0.0.1:9", "sqlite:///work", "sqlite:///pipe", "sqlite:///garbage.bin", "databricks"),
    *("http://me:s3cr@127.0.0.1:9", "http://127.0.0.1:9/?token=s3cr", "postgresql://me:s3cr@127.0.0.1:9/x"),
    "mysql://me:s3cr@127.0.0.1:9/x?password=s3cr",
)
TRACKERS = (*UNREADABLE, *UNREACHABLE)
STORAGES = (*UNREADABLE[:5], *UNREADABLE[8:], *UNREACHABLE[6:], "sqlite:////absent/x.db", "sqlite:///garbage.bin")
NUMBERS = ("", "x", "nan", "inf", "-inf", "-1", "1e999")
COUNTS = ("", "x", "1.5", "nan", "0", "-1", HUGE, "1e3")
READ = ("", "absent.toml", "work", "pipe", "/dev/zero", "garbage.bin", "nested.toml", "file.txt/x", LONG)
PLUGINS = ("", "absent.py", "garbage.bin", "pipe", "work", LONG, "broken.py", "[/b].py")
WRITTEN = ("", "work", "absent/x", "file.txt/x", LONG)
FOLDERS = ("", "file.txt", "file.txt/x", "/dev/null", LONG)
FREE: Mapping[str, Sequence[str]] = {  # texts that no type of click's looks at
    "preset": ("", "cleen", "clean,paper", "[/b]", "../clean"),
    "on": ("", "nosuch", "[/b]", "synthetic:"),
    "backbone": ("", "nosuch", "[/b]"),
    "baseline": ("", "nosuch", "[/b]", LONG),
    "cell": ("", "zz", "../..", "[/b]", "*", LONG),
    "register": ("", "a/b", "[/b]"),
    "dataset": ("", "nosuch", "[/b]"),
    "section": ("", "nosuch", "[/b]", "../x"),
    "tuning": ("nosuch",),
    "ray_address": ("x", "http://me:s3cr@host:port"),
    "slurm_partition": ("x",),
}
ARGUMENTS: Mapping[str, Sequence[str]] = {
    "show": ("", "nosuch", "[/b]", LONG, "\x1b[31m", "hest:x"),
    "check": ("", "nosuch", "[/b]", LONG, "absent.py", "garbage.bin", "work", "pipe", "synthetic:x"),
    "validate": ("", "nosuch", "[/b]", LONG, "garbage.bin", "work", "pipe", "file.txt", "/dev/null"),
    "fetch": ("", "nosuch", "[/b]", LONG, "synthetic:", "synthetic:x", "pgl"),
    "folds": ("", "nosuch", "[/b]", LONG, "synthetic:x", "tiny"),
    "prepare": ("", "nosuch", "[/b]", LONG, "synthetic:x"),
    "describe": ("", "nosuch", "[/b]", LONG, "folder:absent", "folder:~nobody_here", "visium:file.txt"),
    "merge": ("", "absent", "file.txt", "pipe", LONG, "/dev/null"),
    "rerun": ("", "zz", "../..", "[/b]", LONG, "*"),
    "compare": ("", "nosuch", "[/b]", LONG, "absent/work"),
    "reproduce": ("", "table9", "[/b]", LONG),
    "export": ("", "out.txt", "work", "absent/out.h5ad", "file.txt/out.h5ad", f"{LONG}.h5ad"),
    "new-plugin": ("nosuch",),
    "list": ("nosuch", "", "selector"),
    "nosuch": ("",),
}
CAMPAIGNS = (
    *("selectors = 5", "selectors = true", "selectors = {}", "selectors = []", "preset = []", "preset = false"),
    *("datasets = [[]]", "backbone = 1.5", "evaluation = 'outer'", "seeds = [-1]", "seeds = true", "seeds = 1.5"),
    *(f"seeds = {HUGE}", "fold = []", "fold = 0.5", "selector = 'pgl'", "protocol = 1", "plugins = []"),
    *("[protocol]\nepochs = -1", "[protocol]\nepochs = 'many'", "[protocol]\nepochs = nan", "[protocol]\nx = 1"),
    *(f"[protocol]\nepochs = {HUGE}", "[protocol]\npatch_um = inf", "[protocol]\nloss = ['pearson']"),
    *("[plugins]\npgl = 1", "[plugins.nosuch]\nk = 1", "[plugins.tiny]\nnosuch = 1", "[plugins.tiny]\nchannels = []"),
    *(f"a = {'[' * 5000}", "a = ", "\x00", "selectors = 'pgl'\nselectors = 'agl'", "[protocol", "'"),
)
SEARCHES = (
    *("x = 1", "protocol = 1", "[protocol]\nnosuch = true", "[protocol]\nlearning_rate = 'yes'"),
    *("[protocol]\nlearning_rate = []", "[protocol]\nlearning_rate = {low = 1}", "[nosuch]\nk = true"),
    *("[protocol]\nlearning_rate = {low = 1e-4, high = 1e-2, log = 'yes'}", "[protocol]\nepochs = true"),
    *("[protocol]\nlearning_rate = {low = 1e-2, high = 1e-4}", "[protocol]\nlearning_rate = {low = nan, high = 1}"),
    *("[protocol]\nlearning_rate = {low = 0, high = 1, log = true}", "[hvg_k]\nnosuch = true", "[dkgsb]\nx = true"),
    *("[protocol]\nlearning_rate = {low = 1e-4, high = 1e-2, step = 1}", f"[hvg_k]\nk = [{HUGE}]", "[tiny]\nk = 1"),
)
CONTRADICTIONS = (
    ("run", "--transfer"), ("run", "--workers", "2"), ("run", "--executor", "slurm"), ("run", "--set", "pgl.k=1"),
    ("run", "--executor", "local", "--ray-address", "x"), ("run", "--precision", "tf32"), ("run", "--tuned", "absent"),
    ("run", "--device", "cuda"), ("run", "--executor", "ray", "--gpus-per-cell", "1.5"), ("run", "--again=nosuch"),
    ("sync", "--register", "x"), ("sync", "--cell", "x"), ("sync", "--tracking", "none"), ("run", "extra"),
    ("prepare", "--px", "16", "--backbone", "tiny"), ("folds", "--seeds", "0,1", "--out", "x.csv"), ("run", "--nosuch"),
    ("new-plugin", "--here", "--into", "x"), ("rerun", "--keep", "nosuch"), ("compare", "third"), ("status", "extra"),
    ("report", "--work", os.fsdecode(b"w\xff")), ("run", "--work", os.fsdecode(b"w\xff")),
)  # fmt: skip
ODD_BUT_RIGHT = (  # which must succeed
    ("show", "agl"), ("status", "--work", "w[/b]:cat:"), ("status", "--work", b"w\xff"), ("list", "--plugin", "[b].py"),
    ("run", *RUN, "--tracking", "none", "--work", "w[/b]:cat:", "--json", "w[/b]:cat:/t[b].json"),
    ("run", *RUN, "--tracking", "none", "--seeds", "0,0, 0"),
    ("sync", "--work", "w[/b]:cat:"),
    ("report", "--tracking", "none", "--work", "w[/b]:cat:", "--partial"), ("compare", "pgl", "random_k", "--json"),
    ("folds", "synthetic", "--out", b"f\xff.csv"), ("describe", "synthetic", "--out", "p[/b]"),
)  # fmt: skip


@dataclass
class Place:
    """A folder with what words may name, and a work folder with finished cells.

    Attributes:
        folder: which is the current one of every invocation.
        key: of a finished cell.
    """

    folder: Path
    key: str = ""
    before: list[tuple[str, int, int]] = field(default_factory=list)

    def make(self) -> None:
        """Fill it."""
        os.mkfifo(self.folder / "pipe")
        (self.folder / "file.txt").write_text("text\n")
        (self.folder / "garbage.bin").write_bytes(bytes(range(256)) * 20)
        (self.folder / "nested.toml").write_text(f"a = {'[' * 5000}")
        (self.folder / "broken.py").write_text("raise RuntimeError('[/b] on purpose')\n")
        (self.folder / "[b].py").write_text(
            "from agl_bench import hookimpl\n\n\n@hookimpl\ndef register_selectors():\n    return {}\n"
        )
        words = ("run", *RUN, "--selectors", "pgl,random_k", "--set", "random_k.k=5", "--tracking", "none")
        ended = invoke(self.folder, [*words, "--work", "work"])
        if ended.status:
            raise SystemExit(f"the sound invocation fails: {ended.last_line}")
        for name in ("w[/b]:cat:", b"w\xff"):
            shutil.copytree(self.folder / "work", self.folder / os.fsdecode(name))
        self.key = sorted(p.name for p in (self.folder / "work" / "cells").iterdir())[0]
        self.before = self.cells()

    def cells(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file of the finished cells."""
        found = sorted((self.folder / "work" / "cells").rglob("*"))
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]

    def is_harmed(self) -> bool:
        """Whether the finished cells have changed."""
        return self.cells() != self.before


def invoke(folder: Path, words: Sequence[str | bytes]) -> reliability.Answer:
    """Run a command in a fork of this process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _become(folder, words, out.fileno(), err.fileno())
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.005)
        if ended == (0, 0):
            os.killpg(child, 9)
            ended = os.waitpid(child, 0)
        for stream in (out, err):
            stream.seek(0)
        said = [stream.read().decode(errors="replace") for stream in (out, err)]
    return reliability.Answer(os.waitstatus_to_exitcode(ended[1]), *said)


def _become(folder: Path, words: Sequence[str | bytes], out: int, err: int) -> None:
    """Be the command, and end with it."""
    status: Any = 1
    try:
        os.setsid()
        os.chdir(folder)
        for target, stream in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(stream, target)
        main([os.fsdecode(word) for word in words])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001  (nothing of it may go on as this process)
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def values_of(command: str, option: click.Parameter) -> Sequence[str]:
    """What nobody can mean by an option."""
    name, kind = str(option.name), option.type
    if name in LISTS and (name != "rules" or command == "check"):
        return LISTS[name]
    if name in ("selectors", "datasets") or (name == "backbone" and option.multiple):
        return NAMES
    if name == "assignments":
        return SETTINGS if command in ("run", "folds") else ("x", "=", "nosuch.k=1", "[/b]=1", "protocol.epochs")
    if name == "tracking" and command in ("plan", "report", "tune"):  # the first ignores it, the others need no server
        return () if command == "plan" else UNREADABLE
    by_name = {"time_limit": TIMES, "slurm_time": TIMES, "tracking": TRACKERS, "storage": STORAGES, "files": PLUGINS}
    if name in by_name:
        return by_name[name]
    if isinstance(kind, click.Choice):
        return ("", "nosuch", "[/b]")
    if isinstance(kind, Finite):
        return NUMBERS
    if isinstance(kind, click.IntRange | click.types.IntParamType):
        return COUNTS if isinstance(kind, click.IntRange) else ("", "x", "nan", "-1", HUGE)
    if name in ("config", "search"):
        return READ
    if name in ("json_file", "out", "into"):
        return WRITTEN if name == "json_file" or command == "folds" else ("", "file.txt", "file.txt/x", LONG)
    if name in ("work", "others", "prefer", "tuned"):
        return FOLDERS
    return FREE.get(name, ())


def sound(command: str, place: Place, without: click.Parameter | None = None) -> list[str]:
    """The words of a sound invocation, without what sets one option."""
    words = [place.key if word == "KEY" else word for word in SOUND.get(command, ())]
    flags = without.opts if without is not None else ()
    kept, skip = list[str](), False
    for word in words:
        if not skip and word not in flags:
            kept.append(word)
        skip = word in flags and not skip
    has_work = any(p.name == "work" for p in cli.commands[command].params) if command in cli.commands else False
    return kept + (["--work", "work"] if has_work and "--work" not in flags else [])


def invocations(place: Place) -> Iterator[tuple[str, str, list[str | bytes], bool]]:
    """Kind, name, words, and whether they are right."""
    seen = set[str]()
    for command, group in sorted(cli.commands.items(), key=lambda one: (one[0] != "run", one[0])):
        for place_of, option in enumerate(group.params):
            if isinstance(option, click.Option) and not option.is_flag:
                flag, values = max(option.opts, key=len), values_of(command, option)
                if flag in seen:  # the same option of a second command: some of them
                    values = values[(place_of + len(command)) % 4 :: 4]
                seen.add(flag)
                for value in values:
                    # with =, since a value may begin with a hyphen
                    words = [command, *sound(command, place, option), f"{flag}={value}"]
                    yield f"{flag}", f"{command} {flag}={value}", list(words), False
    for command, values in ARGUMENTS.items():
        rest = sound(command, place)
        first = 1 if rest and not rest[0].startswith("-") else 0
        for value in values:
            yield "arguments", f"{command} {value}", [command, value, *rest[first:]], False
    for number, text in enumerate((*CAMPAIGNS, *SEARCHES)):
        path = place.folder / f"file{number}.toml"
        path.write_text(text, encoding="utf-8")
        command, flag = ("run", "--config") if number < len(CAMPAIGNS) else ("tune", "--search")
        yield f"content of {flag}", text, [command, *sound(command, place), "--seeds=0", flag, path.name], False
    for command, *more in CONTRADICTIONS:
        yield "contradictions", " ".join((command, *more)), [command, *sound(command, place), *more], False
    for words in ODD_BUT_RIGHT:
        name = " ".join(w for w in map(os.fsdecode, words) if "=" not in w)
        command_has_work = any(p.name == "work" for p in cli.commands[str(words[0])].params)
        own = [] if "--work" in words or not command_has_work else ["--work", "work"]
        yield "odd, and right", name, [*words, *own], True


def judge(kind: str, name: str, answer: reliability.Answer, *, is_right: bool, place: Place) -> Trial:
    """The verdict on one invocation."""
    said, short = answer.out + answer.err, name.encode("unicode_escape").decode()[:100]
    is_sentence = answer.err.strip().splitlines()[-1:] and (
        answer.err.strip().splitlines()[-1].startswith(("agl-bench: ", "Error: ")) or "Error: " in answer.err
    )
    if answer.has_traceback:
        verdict = TRACEBACK
    elif SECRET in said:
        return Trial(kind, short, WRONG, "a secret is shown")
    elif place.is_harmed():
        verdict, place.before = HARMED, place.cells()
    elif is_right:
        verdict = RIGHT if answer.status == 0 else WRONG
    else:
        verdict = REFUSED if answer.status == 2 and is_sentence else WRONG
    last = answer.last_line.encode("unicode_escape").decode()
    return Trial(kind, short, verdict, f"status {answer.status}: {last[:160]}")


def trials(options: Any) -> list[Trial]:
    """Every invocation, judged."""
    shares = options.shares or len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(shares) as pool:
        parts = pool.starmap(share, [(number, shares, options) for number in range(shares)])
    found = {number: trial for part in parts for number, trial in part}
    return [found[number] for number in sorted(found)]


def share(mine: int, shares: int, options: Any) -> list[tuple[int, Trial]]:
    """Some of the invocations, by number, in a folder of their own."""
    found = []
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        place = Place(Path(folder))
        place.make()
        every = [(number, one) for number, one in enumerate(invocations(place)) if options.only in one[1]]
        most = min(options.most or len(every), len(every))
        for number, one in [every[i * len(every) // most] for i in range(most)][mine::shares]:
            kind, name, words, is_right = one
            trial = judge(kind, name, invoke(place.folder, words), is_right=is_right, place=place)
            if trial.verdict not in reliability.CLEAN:
                print(f"{trial.verdict}: {trial.name}: {trial.said}", file=sys.stderr, flush=True)
            found.append((number, trial))
            if len(found) % 25 == 0:
                print(f"{len(found)} judged", file=sys.stderr, flush=True)
    return found


INTRODUCTION = """
Every option of every command gets values that nobody can mean; so do arguments and files of campaigns and searches, and
combinations of options. `benchmarks/reliability_invocations.py` makes these from tables of options and values.
Each invocation is a process. Refused: exit status 2, with a sentence, and nothing done. Showing a secret counts as
silently wrong. The last row has odd words that are valid, e.g. folders whose names contain mark-up or are not UTF-8.
"""


if __name__ == "__main__":
    parser = reliability.parser(__doc__)
    parser.add_argument("--most", type=int, default=0, help="so many invocations, evenly over all; 0 = all")
    parser.add_argument("--shares", type=int, default=0, help="processes that judge at once; 0 = one for each core")
    parser.add_argument("--only", default="", help="those with this text")
    given = measure.options(parser, quick={"most": 20, "threads": 1})
    reliability.report("invocations", "Bad invocations", INTRODUCTION, trials(given), given)
