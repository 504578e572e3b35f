"""Does a campaign survive being killed, again and again?

    python benchmarks/campaign.py --kills 100 --write        writes benchmarks/campaign.md

One campaign runs undisturbed. The same one runs again in another work folder, and its processes are ended at random
times, mostly by SIGKILL, until as many kills as asked for have hit; then it may finish. Part of the time two processes
work on the same folder. Each process is `agl-bench run --checkpoint-every 0`; a checkpoint then stands at the end of
every epoch. In the end nothing may be missing, nothing may have been trained twice, and every table (genes, epochs, the
JSON of the comparison) must be the same bit for bit, cost and durations apart.

Where a SIGKILL hit is read from what the process left: its lease on a cell, and the cell's checkpoint or result.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import pandas as pd
import scanpy  # noqa: F401  (imported once, here: the processes are forks)
import torch

from agl_bench.bench import prepare, run  # noqa: F401  (likewise)
from agl_bench.bench.cells import CellStore
from agl_bench.cli import main as command

SELECTORS = ("pgl", "agl", "random_k", "hvg_k", "dkgsb", "amal")
SETTINGS = {
    "synthetic.sections": 2,
    "synthetic.spots": 120,
    "synthetic.patch_px": 16,
    "tiny.patch_px": 16,
    "tiny.channels": 8,
    "protocol.primary_genes": 20,
    "protocol.epochs": 12,
    "protocol.patience": 12,
    "random_k.k": 50,
    "hvg_k.k": 50,
}
EARLY = 0.15  # share of the kills that hit in the first moments of a process
TOGETHER = 0.35  # share of the turns in which a second process joins
GENTLE = 0.15  # share of SIGTERM
PATIENCE = 20.0  # seconds that a process may take to its first cell
FINISHED, INTERRUPTED = 0, 75
WHERE = (
    "before its first cell",
    "before the first epoch of a cell",
    "within a training",
    "after a training, its result being kept or shown",
    "between two cells, or while waiting for another process",
)
BY_ITSELF = "ended by itself with status 75: at the end of an epoch, or before a training"


@dataclass
class Child:
    """A process of the campaign.

    Attributes:
        began: when, by the monotonic clock.
        had_cell: whether it has been seen at work.
    """

    pid: int
    began: float
    had_cell: bool = False


@dataclass
class Campaign:
    """The campaign in one work folder, and what happened to it."""

    work: Path
    words: Sequence[str]
    cells: int
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (signal, where)
    processes: int = 0
    together: int = 0

    def start(self) -> Child:
        """A new process on the folder."""
        self.processes += 1
        pid = os.fork()
        if pid:
            return Child(pid, time.monotonic())
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status: Any = 1
        try:
            command([*self.words, "--work", str(self.work), "--json", str(self.table)])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:  # noqa: BLE001  (nothing of it may go on as this process)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status if isinstance(status, int) else 1)

    @property
    def log(self) -> Path:
        """All that the processes said."""
        return self.work.with_suffix(".log")

    @property
    def table(self) -> Path:
        """The table as JSON."""
        return self.work.with_suffix(".json")

    def finished(self) -> float:
        """Share of the cells that have a result."""
        return len(list((self.work / "cells").glob("[!.]*"))) / self.cells

    def held(self, child: Child) -> str:
        """The cell that a process, running or killed, has a lease on; "" if none."""
        for folder in (self.work / "leases").glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # it has just been given back
                if any(path.name.split("~")[1] == str(child.pid) for path in folder.iterdir()):
                    return folder.name
        return ""

    def where(self, child: Child) -> str:
        """Where a process was hit, by what it left."""
        key = self.held(child)
        if not key:
            return WHERE[4] if child.had_cell else WHERE[0]
        if (self.work / "cells" / key).exists():
            return WHERE[3]
        with contextlib.suppress(FileNotFoundError):  # another process has taken it over, and is done
            return WHERE[2] if any((self.work / "partial" / key).glob("[0-9]*.pt")) else WHERE[1]
        return WHERE[2]

    def leave_alone(self) -> float:
        """Let one process do it all; seconds from its first cell to its end."""
        child = self.start()
        self._see_at_work(child)
        began = time.monotonic()
        self._await(child)
        return time.monotonic() - began

    def disturb(self, kills: int, seconds: float, chance: random.Random) -> None:
        """Kill so many times, fewer if it is finished before, then let it finish.

        Args:
            kills: number.
            seconds: that the cells take undisturbed.
            chance: when, whom and how.
        """
        children = [self.start()]
        with contextlib.ExitStack() as end:
            end.callback(lambda: [os.kill(child.pid, signal.SIGKILL) for child in children])  # where this one fails
            self._kill(children, kills, seconds, chance)
            while children:
                self._await(children[0])
                children.pop(0)

    def _kill(self, children: list[Child], kills: int, seconds: float, chance: random.Random) -> None:
        while sum(self.hits.values()) < kills:
            if len(children) < 2 and chance.random() < TOGETHER:
                children.append(self.start())
            self.together += len(children) == 2
            victim = chance.choice(children)
            if chance.random() < EARLY:
                time.sleep(chance.uniform(0, 1))
            else:
                self._see_at_work(victim)
                # What is left to do, dealt out to the kills that are left.
                share = seconds * (1 - self.finished()) / (kills - sum(self.hits.values()))
                time.sleep(chance.uniform(0, share / len(children)))
            victim.had_cell = victim.had_cell or bool(self.held(victim))
            children.remove(victim)
            if not self._end(victim, signal.SIGTERM if chance.random() < GENTLE else signal.SIGKILL):
                return
            if not children:
                children.append(self.start())
            print(f"{sum(self.hits.values())} kills, {self.finished():.0%} of the cells", file=sys.stderr, flush=True)

    def _see_at_work(self, child: Child) -> None:
        """Wait until a process has a cell, or does not get one for long because another one has the last."""
        while not child.had_cell and time.monotonic() - child.began < PATIENCE:
            child.had_cell = bool(self.held(child))
            time.sleep(0.01)

    def _await(self, child: Child) -> None:
        """Wait for the end of a process that nobody disturbs."""
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        assert status == FINISHED, f"a process that nobody disturbed ended with {status}, see {self.log}"

    def _end(self, child: Child, number: signal.Signals) -> bool:
        """Send a signal; False if the campaign was finished before it came."""
        os.kill(child.pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if status == -number:
            self.hits[number.name, self.where(child)] += 1
        elif status == INTERRUPTED:
            self.hits[number.name, BY_ITSELF] += 1
        else:
            assert status == FINISHED, f"a process ended with {status}, see {self.log}"
        return status != FINISHED

    def said(self, text: str) -> list[str]:
        """Lines of the log with this text."""
        return [line for line in self.log.read_text(encoding="utf-8").splitlines() if text in line]

    def trained(self) -> Counter[str]:
        """How often each cell was reported as newly finished, by its title."""
        return Counter(line.partition("] ")[2].partition(": PCC")[0] for line in self.said(": PCC "))


def compare(campaign: Campaign, undisturbed: Campaign) -> list[measure.Row]:
    """What must hold in the end: findings with how many there are, and how many there must be."""
    found, expected = ({r.spec.key: r for r in CellStore(c.work)} for c in (campaign, undisturbed))
    same = {"gene tables": 0, "epoch tables": 0, "scores and outer steps": 0}
    for key in found.keys() & expected.keys():
        one, other = found[key], expected[key]
        same["gene tables"] += _bits(one.genes) == _bits(other.genes)
        same["epoch tables"] += _bits(one.epochs) == _bits(other.epochs)
        same["scores and outer steps"] += _bits(one.outer) == _bits(other.outer) and all(
            json.dumps(getattr(one, name)) == json.dumps(getattr(other, name))
            for name in ("scores", "best_epoch", "counts", "fold")
        )
    store, cells = CellStore(campaign.work), len(expected)
    left = [p for folder in (store.partial, store.failed, store.grids) for p in folder.iterdir()]
    tables = [_without_cost(json.loads(c.table.read_text(encoding="utf-8"))) for c in (campaign, undisturbed)]
    rows = [
        ("cells of the undisturbed campaign", cells, campaign.cells),
        ("cells of the disturbed one", len(found), cells),
        ("lost cells", len(expected.keys() - found.keys()), 0),
        ("cells too many", len(found.keys() - expected.keys()), 0),
        ("cells trained to the end twice", sum(n > 1 for n in campaign.trained().values()), 0),
        *((f"{name}, the same bit for bit", count, cells) for name, count in same.items()),
        ("JSON table, the same", int(tables[0] == tables[1]), 1),
        ("leases, checkpoints, failures left behind", len(left) + len(store.leases.running()), 0),
    ]
    return [
        {"what": what, "found": n, "must be": must, "verdict": "met" if n == must else "NOT MET"}
        for what, n, must in rows
    ]


def _bits(frame: pd.DataFrame) -> list[Any]:
    """A table as its bytes, column by column, without durations."""
    columns = {name: column.to_numpy() for name, column in frame.items() if name != "seconds"}
    return [(n, str(c.dtype), c.tolist() if c.dtype == object else c.tobytes()) for n, c in columns.items()]


def _without_cost(value: Any) -> Any:
    """A JSON table without what no two runs share."""
    if isinstance(value, dict):
        return {k: _without_cost(v) for k, v in value.items() if k not in ("cost", "seconds_total")}
    return [_without_cost(v) for v in value] if isinstance(value, list) else value


def document(rows: Sequence[measure.Row], campaign: Campaign, alone: float, seconds: float, options: Any) -> str:
    """The findings as Markdown."""
    here = measure.machine(options.device)
    found = {where for _, where in campaign.hits}
    wheres = [*(w for w in WHERE if w in found), *sorted(found - set(WHERE))]
    table = [
        {"where it hit": where, **{name: campaign.hits[name, where] for name in ("SIGKILL", "SIGTERM")}}
        for where in wheres
    ]
    total = {name: sum(row[name] for row in table) for name in ("SIGKILL", "SIGTERM")}
    continued = len(campaign.said("continued after epoch"))
    parts = [
        "# A campaign that is killed",
        f"`python benchmarks/campaign.py --kills {options.kills} --seeds {options.seeds} --write`",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        f"{here['processor']}, {here['threads']} threads, device {here['device']}, torch "
        f"{here['torch']}, commit {here['commit'] or 'unknown'}; the machine had other work. {campaign.cells} cells, "
        f"{sum(total.values())} kills. Undisturbed they took {alone:.0f} s, disturbed {seconds:.0f} s with the starts "
        f"of {campaign.processes} processes, two at once before {campaign.together} of the kills; {continued} times a "
        "cell went on from a checkpoint. Settings: " + ", ".join(f"{k}={v}" for k, v in options.settings.items()) + ".",
        "## What must hold",
        measure.table(rows, markdown=True),
        "## Where the kills hit",
        measure.table([*table, {"where it hit": "all", **total}], markdown=True),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--kills", type=int, default=100)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--chance", type=int, default=0, help="seed of the times of the kills")
    made.add_argument("--write", action="store_true", help="write benchmarks/campaign.md")
    options = measure.options(made, quick={"kills": 5, "seeds": 1, "write": False})
    small = {"synthetic.spots": 40, "protocol.epochs": 5, "protocol.primary_genes": 5} if options.quick else {}
    options.settings = SETTINGS | small
    torch.set_num_threads(1)
    words = ["run", "--selectors", ",".join(SELECTORS), "--datasets", "synthetic", "--preset", "smoke"]
    words += ["--evaluation", "inter", "--seeds", ",".join(map(str, range(options.seeds))), "--device", "cpu"]
    words += ["--tracking", "none", "--checkpoint-every", "0"]
    words += [w for k, v in options.settings.items() for w in ("--set", f"{k}={v}")]
    cells = len(SELECTORS) * options.seeds * int(str(options.settings["synthetic.sections"]))
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        undisturbed, campaign = (Campaign(Path(folder) / name, words, cells) for name in ("undisturbed", "disturbed"))
        alone = undisturbed.leave_alone()
        began = time.monotonic()
        campaign.disturb(options.kills, alone, random.Random(options.chance))
        seconds = time.monotonic() - began
        rows = compare(campaign, undisturbed)
        text = document(rows, campaign, alone, seconds, options)
        hit = sum(campaign.hits.values())
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if options.save:
        print(f"saved in {measure.save('campaign', rows, options.device)}")
    if (hit < options.kills and not options.quick) or any(row["verdict"] != "met" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
