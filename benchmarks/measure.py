"""What all benchmarks share: clocks, peak memory in processes of their own, tables, and results kept by machine.

A benchmark is a script with `rows(options) -> list of rows` and a `main` that is

    options = measure.options(parser, quick={...})
    measure.report("name", rows(options), options)

This file is also the process that `fresh` starts: python benchmarks/measure.py SCRIPT:FUNCTION ARGUMENTS-AS-JSON
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command sets it, before torch starts its threads

import torch

from agl_bench.bench.provenance import provenance
from agl_bench.bench.run import choose_device

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# Options and reports -------------------------------------------------------------------------------------------------


def parser(documentation: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; its help is the script's docstring."""
    made = argparse.ArgumentParser(
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = made.add_argument_group("all benchmarks")
    common.add_argument("--repeats", type=int, default=repeats, help=f"timed runs of each, default {repeats}")
    common.add_argument("--threads", type=int, help="of torch; default: its own choice")
    common.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    common.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    common.add_argument("--markdown", action="store_true", help="tables in Markdown")
    common.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/MACHINE.json")
    return made


def options(made: argparse.ArgumentParser, *, quick: Mapping[str, object]) -> argparse.Namespace:
    """The options given; with --quick those in `quick` instead. Sets up threads and device for the process."""
    found = made.parse_args()
    if found.quick:
        vars(found).update({"repeats": 1, **quick})
    found.device = start(found.device, found.threads)
    return found


def start(device: str, threads: int | None) -> torch.device:
    """Threads, determinism and the device, as a run of cells has them."""
    if threads:
        torch.set_num_threads(threads)
    return choose_device(device)


def report(name: str, rows: Sequence[Row], chosen: argparse.Namespace, title: str = "") -> None:
    """Print the machine and a table, and keep the rows if asked to."""
    here = machine(chosen.device)
    print(f"{here['processor']}, {here['threads']} threads, device {here['device']}, torch {here['torch']},", end=" ")
    print(f"commit {here['commit'] or 'unknown'}")
    if title:
        print(title)
    print(table(rows, markdown=chosen.markdown))
    if chosen.save:
        print(f"saved in {save(name, rows, chosen.device)}")


def publish(name: str, text: str, rows: Sequence[Row], chosen: argparse.Namespace) -> None:
    """Print a page, write it as NAME.md if asked to, and keep its rows if asked to."""
    if chosen.write:
        (HERE / f"{name}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(text)
    if chosen.save:
        print(f"saved in {save(name, rows, chosen.device)}")


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, device, memory, versions and commit."""
    known = provenance(torch.device(device))
    return {
        "processor": known["machine"],
        "cores": os.cpu_count(),
        "threads": known["threads"],
        "device": known["device"],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "platform": platform.platform(terse=True),
        "commit": known["commit"],
        **{name: known[name] for name in ("agl_bench", "python", "torch", "numpy")},
    }


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Rows below each other, columns aligned; the columns are those of all rows in the order of their appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(names))]
    aligned = [
        [cell.ljust(w) if t else cell.rjust(w) for cell, w, t in zip(line, widths, is_text, strict=True)]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in aligned)
    rule = ["-" * w if t else "-" * (w - 1) + ":" for w, t in zip(widths, is_text, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])


def _text(value: object) -> str:
    """Three digits of a fraction, all of a whole number, a dash for what was not measured."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def save(name: str, rows: Sequence[Row], device: torch.device | str = "cpu", folder: Path | None = None) -> Path:
    """Write the rows of one benchmark into the file of this machine, over those that it had."""
    here = machine(device)
    of_cpu = f"{here['processor']} {here['memory_gib']:.0f} GiB"
    slug = of_cpu if here["device"] == "cpu" else here["device"]
    path = (folder or HERE / "results") / f"{re.sub('[^a-z0-9]+', '-', slug.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": here,
        "rows": list(rows),
    }
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False, sort_keys=False) + "\n", encoding="utf-8")
    return path


# Time ----------------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, once all that was asked of a CUDA device is done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each function, run in turn A B C A B C …, so that a slow minute of the machine hits all alike.

    Args:
        functions: by name.
        repeats: timed runs of each.
        warm_up: runs of each beforehand.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.freeze()  # what is there already; the rubbish of one run is then found at once and does not burden the next
    for turn in range(-warm_up, repeats):
        for name, function in functions.items():
            gc.collect()
            started = now()
            function()
            took = now() - started
            if turn >= 0:
                seconds[name].append(took)
    gc.unfreeze()
    return seconds


def spread(seconds: Sequence[float]) -> Row:
    """Median, least and most."""
    return {"seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


# Memory --------------------------------------------------------------------------------------------------------------


class Peak:
    """Most memory taken since it was made, beyond what was taken then.

    Of the device's allocator on CUDA, of the process elsewhere. Where the kernel cannot forget an earlier peak of the
    process, what stays below that peak is not seen: measure in a `fresh` process.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            _give_back()
            if CLEAR.exists():
                CLEAR.write_text("5")  # Linux: forget the peak
            self.before = _most_resident()

    def mib(self) -> float:
        """MiB so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / MIB
        return (_most_resident() - self.before) / MIB


def _give_back() -> None:
    """Return to the kernel what glibc has freed but kept, which later work would take unseen."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _most_resident() -> int:
    """Bytes. Not `ru_maxrss` where it can be helped: on Linux a process inherits that of the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fresh(target: str, device: torch.device, **arguments: object) -> Row:
    """The row that a function returns in a process of its own with as many threads; {} where memory ran out.

    Args:
        target: "SCRIPT:FUNCTION"; the function gets `device` and the arguments by name.
        device: to run on.
        arguments: plain values.
    """
    call = json.dumps({"device": device.type, "threads": torch.get_num_threads(), "arguments": arguments})
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), target, call], capture_output=True, text=True)
    if done.returncode == 0:
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row
    if done.returncode == -signal.SIGKILL or re.search("out of memory|can't allocate memory", done.stderr):
        print(f"out of memory: {target} {arguments}", file=sys.stderr)
        return {}
    raise RuntimeError(f"{target} {call} ended with {done.returncode}:\n{done.stderr}")


def main() -> None:
    """The other side of `fresh`."""
    target, call = sys.argv[1:]
    script, _, function = target.partition(":")
    given = json.loads(call)
    device = start(given["device"], given["threads"])
    print(json.dumps(getattr(importlib.import_module(script), function)(device=device, **given["arguments"])))


if __name__ == "__main__":
    main()
