"""What do damaged files in a work folder do to the commands that read them?

    python benchmarks/reliability_damage.py --write        writes its section of benchmarks/reliability.md

The script makes a work folder with finished cells that keep predictions and models, prepared sections with patches and
features of a frozen encoder, folds, a skip, a failure, a checkpoint, a trial journal, tuned settings and MLflow's
database. Each trial damages one file in a copy: a changed byte or bit (also with the old time), truncation, zeros,
another file's content, extra bytes at the end, values of other types, deep nesting, bytes that are not UTF-8, or a
pipe, a link or a folder in its place. Then a command that reads the file runs, forked after one import.

Right: the output is that of the undamaged folder, or the command names the damage. Refused: the command ends with
one sentence and a status. Silently wrong: the output differs without a word. A hang counts as a traceback.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import reliability
from reliability import REFUSED, RIGHT, TRACEBACK, WRONG, Answer, Trial
from reliability_invocations import SMALL, invoke

from agl_bench.bench import fitness
from agl_bench.bench.cells import CellStore
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import Bench, EpochDone, choose_device, fingerprints, run_cells
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins

Words = tuple[str, ...]
Outcome = Any  # what can be compared
TIMES = 6  # trials of a kind of weight one
SHOWN: Words = ("--tracking", "none", "--json", "table.json")
RUN: Words = ("run", "--selectors", "pgl,hvg_k", *SMALL, "--keep", "model", *SHOWN)
ONE: Words = ("run", "--selectors", "pgl", *SMALL, "--fold", "D1", *SHOWN)
BEGUN: Words = ("run", "--selectors", "agl", *SMALL, "--fold", "D1", *SHOWN)
TUNE: Words = ("tune", "--selectors", "hvg_k", *SMALL, "--fold", "D1", "--trials", "3", "--tracking", "none")
TUNED: Words = ("--selectors", "hvg_k", *SMALL, "--fold", "D1", "--tuned", "work/tuned", "--tracking", "none")
NOTICED = (
    "damaged",
    "left out",
    "does not match",
    "cannot be read",
    "set aside",
    "incomplete",
    "has changed",
    "is not",
)
OF_DATA = tuple(
    word for option, value in itertools.pairwise(SMALL) if value.startswith("synthetic.") for word in (option, value)
)
STILL = '''
"""A frozen encoder of a few features."""
import torch
from agl_bench import Backbone, Spots, hookimpl


class Still(Backbone):
    """Frozen: means of colours through a fixed layer."""

    sees, patch_px, frozen, width, late_prefixes = "patches", 16, True, 6, ("mix.",)

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.layer, self.mix = torch.nn.Linear(3, 6), torch.nn.Linear(6, 6)

    def encode(self, spots: Spots) -> torch.Tensor:
        return self.layer(spots.patches.mean((2, 3)))

    def late(self, features: torch.Tensor) -> torch.Tensor:
        return self.mix(features)


@hookimpl
def register_backbones():
    return {"still": Still}
'''


# --- what is read ----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A JSON table without what no two runs share."""
    if isinstance(value, dict):
        unequal = ("cost", "seconds_total", "seconds", "running", "provenance")
        return {k: _plain(v) for k, v in value.items() if k not in unequal}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def table(folder: Path, answer: Answer) -> Outcome:
    """The table of a run."""
    return _plain(json.loads((folder / "table.json").read_text(encoding="utf-8")))


def printed(folder: Path, answer: Answer) -> Outcome:
    """JSON that was printed."""
    return _plain(json.loads(answer.out))


def tables(folder: Path, answer: Answer) -> Outcome:
    """The CSV files of a report."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted((folder / "work/report/tables").glob("*.csv"))}


def tuned(folder: Path, answer: Answer) -> Outcome:
    """Tuned settings."""
    return (folder / "work/tuned/hvg_k.toml").read_text(encoding="utf-8")


def arrays(folder: Path, answer: Answer) -> Outcome:
    """What is prepared, and what an encoder made of it."""
    found = sorted((folder / "work/cache").glob("*/*.npy"))
    return {f"{p.parent.name}/{p.name}": hashlib.sha1(p.read_bytes()).hexdigest() for p in found if p.is_file()}


def exported(folder: Path, answer: Answer) -> Outcome:
    """Weights and predictions in an exported section."""
    import anndata

    data = anndata.read_h5ad(folder / "out.h5ad")
    layers = {name: hashlib.sha1(layer.tobytes()).hexdigest() for name, layer in sorted(data.layers.items())}
    return layers, {name: float(data.var[name].sum()) for name in data.var}


def nothing(folder: Path, answer: Answer) -> Outcome:
    """That it ended well."""
    return answer.status


@dataclass(frozen=True)
class Use:
    """A command that reads what is damaged.

    Attributes:
        words: one or more commands, one after the other.
        outcome: what is compared.
        takes_away: folders that it shall make anew.
    """

    words: Sequence[Words]
    outcome: Callable[[Path, Answer], Outcome]
    takes_away: Words = ()


USES: Mapping[str, Use] = {
    "run": Use([RUN], table),
    "run from prepared data": Use([ONE], table, ("cells",)),
    "run what has begun": Use([BEGUN], table),
    "run tuned": Use([("run", *TUNED, "--json", "table.json")], table),
    "compare": Use([("compare", "hvg_k", "pgl", "--json", "--work", "work")], printed),
    "status": Use([("status", "--json", "--work", "work")], printed),
    "merge": Use(
        [("merge", "work", "--work", "copy"), ("compare", "hvg_k", "pgl", "--json", "--work", "copy")], printed
    ),
    "plan": Use([("plan", "--selectors", "pgl,hvg_k", *SMALL, "--json", "--work", "work")], nothing),
    "export": Use(
        [("export", "out.h5ad", "--dataset", "synthetic", "--section", "S1", "--evaluation", "inter")], exported
    ),
    "report": Use([("report", "--work", "work", "--tracking", "none", "--partial")], tables),
    "sync": Use([("sync", "--work", "work")], nothing),
    "tune": Use([(*TUNE, "--work", "work")], tuned),
    "prepare": Use(
        [("prepare", "synthetic", "--backbone", "still", "--plugin", "still.py", *OF_DATA, "--work", "work")], arrays
    ),
}  # fmt: skip


# --- what is damaged -------------------------------------------------------------------------------------------------

KINDS: Mapping[str, tuple[str, Words, int]] = {  # glob, what reads it, weight
    "result.json of a cell": (
        "cells/*/result.json",
        ("compare", "run", "status", "merge", "plan", "report", "sync"),
        8,
    ),
    "tables of a cell": ("cells/*/[geo]*.parquet", ("compare", "run", "merge", "report"), 5),
    "predictions and model of a cell": ("cells/*/[pm]*.[pm]*t*", ("export", "merge", "run"), 3),
    "counts and positions": ("cache/*/[cnp]*[stn].[nj]*", ("run from prepared data", "prepare"), 5),
    "patches": ("cache/*/patches*", ("run from prepared data", "prepare"), 4),
    "manifests": ("cache/*/*.json", ("run from prepared data", "prepare"), 4),
    "features of an encoder": ("cache/*/features*", ("prepare",), 4),
    "digests of files": ("cache/files.json", ("run from prepared data",), 1),
    "folds": ("folds/*.csv", ("merge", "run", "run from prepared data"), 2),
    "skips": ("skipped/*.json", ("status", "merge", "report"), 2),
    "failures": ("failed/*/*.json", ("status", "merge", "report"), 2),
    "checkpoints": ("partial/*/*", ("run what has begun", "status", "merge"), 5),
    "journal of trials": ("tune/journal.log", ("tune",), 5),
    "tuned settings": ("tuned/*.toml", ("run tuned", "merge"), 3),
    "leases and grids": ("[lg]*s/*", ("status", "run what has begun"), 2),
    "MLflow's database": ("mlflow.db", ("sync",), 1),
}
ANY = (
    "a byte", "a bit", "a bit under an old time", "cut", "empty", "zeros", "zeros within", "swapped", "appended",
    "pipe", "link", "folder",
)  # fmt: skip
OF_TEXT = ("deep nesting", "not UTF-8", "other type", "another digit")


def harm(path: Path, how: str, others: Sequence[Path], chance: random.Random) -> None:
    """Damage a file, or a folder of leases in its stead."""
    if path.is_dir():
        path = next(iter(sorted(p for p in path.iterdir() if p.is_file())), path / "x")
    content = bytearray(path.read_bytes() if path.is_file() else b"x")
    status = path.stat() if path.exists() else None
    path.unlink(missing_ok=True)
    at = chance.randrange(max(len(content), 1))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        elsewhere = path.parents[1] / f"elsewhere-{path.name}"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif how == "folder":
        path.mkdir()
    else:
        path.write_bytes(_harmed(content, how, at, others, chance))
        if how.endswith("old time") and status is not None:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _harmed(content: bytearray, how: str, at: int, others: Sequence[Path], chance: random.Random) -> bytes:
    places = [i for i, byte in enumerate(content) if chr(byte).isdecimal()]
    match how:
        case "a byte":
            content[at : at + 1] = bytes([(content[at] + chance.randrange(1, 256)) % 256]) if content else b"x"
        case "a bit" | "a bit under an old time":
            content[at : at + 1] = bytes([content[at] ^ (1 << chance.randrange(8))]) if content else b"x"
        case "cut":
            del content[at:]
        case "empty":
            content.clear()
        case "zeros":
            content[:] = bytes(len(content))
        case "zeros within":
            content[at : at + 40] = bytes(len(content[at : at + 40]))
        case "swapped":
            return chance.choice(others).read_bytes() if others else bytes(content[::-1])
        case "appended":
            content += chance.choice([b"{}", b"\xff\xfe", b"\n[[[", bytes(30), b"x"])
        case "deep nesting":
            content[:] = chance.choice([b"[", b'{"format":']) * 50_000
        case "not UTF-8":
            content[at:at] = b"\xff\xfe"
        case "other type":
            changes = [(b": 0", b': "x", "y": 0'), (b'": "', b'": 5, "z": "'), (b": {", b': [], "w": {')]
            return bytes(content).replace(*chance.choice(changes), 1)
        case "another digit" if places:
            place = chance.choice(places)
            content[place : place + 1] = str((int(chr(content[place])) + chance.randrange(1, 10)) % 10).encode()
    return bytes(content)


# --- trials ----------------------------------------------------------------------------------------------------------


def make(folder: Path, *, quick: bool) -> None:
    """The undamaged work folder; with `quick`, finished cells and what they need are all."""
    (folder / "still.py").write_text(STILL, encoding="utf-8")
    for words in (RUN,) if quick else (RUN, TUNE, *USES["prepare"].words, *USES["sync"].words):
        ended = invoke(folder, [*words, *(() if "--work" in words else ("--work", "work"))])
        if ended.status:
            raise SystemExit(f"the sound command fails: {' '.join(words[:2])}: {ended.err[-500:]}")
    if quick:
        return
    store, plugins = CellStore(folder / "work"), Plugins.discover()
    sets = [SMALL[i + 1] for i, word in enumerate(SMALL) if word == "--set"]
    campaign = Campaign.of(
        plugins, selectors=["agl"], datasets=["synthetic"], evaluation=["inter"], preset="smoke", assignments=sets
    )
    known = fingerprints(campaign, plugins, folder, None)
    cells = campaign.cells(plugins, folder, device="cpu", fingerprint=known)
    (spec, plan), (other, _) = cells[:2]
    for event in run_cells(
        [(spec, plan)], Bench(plugins, folder, choose_device("cpu")), store, NoRecorder(), checkpoint_every=0
    ):
        if isinstance(event, EpochDone):
            break
    store.write_failure(other, "it was made up", "Traceback: none")
    fitness.note(store.work, fitness.Skipped(cells[-1][0], "it was made up"))
    lease = store.leases.folder / "0123456789abcdef"
    lease.mkdir()
    (lease / "elsewhere~1~5~0a~0b").touch()
    (store.grids / "elsewhere~1~5~0a~0b.json").write_text("{}", encoding="utf-8")


def use(folder: Path, name: str) -> tuple[Answer, Outcome]:
    """Run a command in a folder; what came out is None where it failed."""
    one = USES[name]
    for part in one.takes_away:
        shutil.rmtree(folder / "work" / part)
    (folder / "table.json").unlink(missing_ok=True)  # of the run that made the folder
    answers = []
    for words in one.words:
        answers.append(invoke(folder, [*words, *(() if "--work" in words else ("--work", "work"))]))
        if answers[-1].status not in (0, 1) or answers[-1].has_traceback:
            break
    last, before = answers[-1], answers[:-1]
    answer = Answer(last.status, last.out, "".join(a.out + a.err for a in before) + last.err)
    try:
        return answer, one.outcome(folder, answer)
    except (OSError, ValueError, KeyError):
        return answer, None


def judged(answer: Answer, outcome: Outcome, sound: Outcome) -> str:
    """The verdict on one trial."""
    if answer.has_traceback or answer.status < 0:
        return TRACEBACK
    if outcome == sound:
        return RIGHT
    said = answer.err + (answer.out if outcome is None else "")
    if outcome is None:
        return REFUSED if answer.is_refusal else TRACEBACK
    return RIGHT if any(word in said for word in NOTICED) else WRONG


def plan(chance: random.Random, *, quick: bool) -> list[tuple[str, str, str]]:
    """Kind, damage and use of each trial, all kinds and damages in turns."""
    found = []
    for kind, (pattern, readers, weight) in KINDS.items():
        if quick and not (pattern.startswith("cells/") and "compare" in readers):
            continue
        is_text = pattern.endswith(("json", "csv", "toml", "log")) or kind == "checkpoints"
        ways = [*ANY, *(OF_TEXT if is_text else ())]
        chance.shuffle(ways)
        times = 2 if quick else weight * TIMES
        found.append([(kind, ways[i % len(ways)], readers[0 if quick else i % len(readers)]) for i in range(times)])
    return [trial for row in itertools.zip_longest(*found) for trial in row if trial is not None]


def trials(folder: Path, chance: random.Random, *, quick: bool) -> list[Trial]:
    """Damage one file after the other."""
    base = folder / "base"
    base.mkdir()
    make(base, quick=quick)
    sound: dict[str, Outcome] = {}
    found = []
    for number, (kind, how, name) in enumerate(plan(chance, quick=quick)):
        if name not in sound:
            shutil.copytree(base, folder / "sound", symlinks=True)
            answer, sound[name] = use(folder / "sound", name)
            shutil.rmtree(folder / "sound")
            if sound[name] is None:
                raise SystemExit(f"the sound command fails: {name}: {answer.err[-800:]}{answer.out[-300:]}")
        here = folder / "here"
        shutil.copytree(base, here, symlinks=True)
        files = sorted((here / "work").glob(KINDS[kind][0]))
        path = chance.choice(files)
        harm(path, how, [p for p in files if p != path and p.is_file()], chance)
        answer, outcome = use(here, name)
        verdict = judged(answer, outcome, sound[name])
        print(f"{number}: {kind}: {how}, {name}: {verdict}", file=sys.stderr, flush=True)
        said = answer.last_line if not answer.has_traceback else answer.err.strip().splitlines()[-1][:200]
        what = f"{path.relative_to(here / 'work')}: {how}, {name}".replace(path.parent.name, "KEY")
        found.append(Trial(kind, f"{number}, {what}", verdict, said or f"status {answer.status}"))
        if verdict not in reliability.CLEAN:
            print(found[-1], file=sys.stderr, flush=True)
        shutil.rmtree(here)
    return found


def main() -> None:
    """Try all, print the table, and write it if asked to."""
    made = reliability.parser(__doc__)
    made.add_argument("--chance", type=int, default=0, help="seed of what is damaged where")
    options = measure.options(made, quick={"write": False})
    introduction = (__doc__ or "").partition("benchmarks/reliability.md\n\n")[2]
    with tempfile.TemporaryDirectory(prefix="reliability-damage-") as folder:
        found = trials(Path(folder), random.Random(options.chance), quick=options.quick)
    reliability.report("damage", "Damaged files", introduction, found, options)


if __name__ == "__main__":
    main()
