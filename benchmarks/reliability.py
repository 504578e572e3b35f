"""What the reliability benchmarks share: how a trial is judged, how trials are counted, and the page that they write.

Each of `reliability_files.py`, `reliability_invocations.py`, `reliability_plugins.py` and `reliability_damage.py` tries
many bad inputs of one sort against the command, as a user would meet them, and is a script whose `main` ends with

    reliability.report("files", "Bad files", INTRODUCTION, trials, options)

With `--write` it replaces its own section of benchmarks/reliability.md; the other sections stay. The exit status is 1
if a trial is neither right nor refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure

PAGE = Path(__file__).resolve().with_name("reliability.md")
TITLE = "# Reliability: bad input, faulty plug-ins, damage and kills\n"
RIGHT, REFUSED = "right", "refused"
WRONG, TRACEBACK, HARMED = "silently wrong", "traceback", "others harmed"
CLEAN = (
    RIGHT,
    REFUSED,
)  # right: accepted, and what came out is right; refused: one sentence and a non-zero exit status
VERDICTS = (*CLEAN, WRONG, TRACEBACK, HARMED)


@dataclass(frozen=True)
class Trial:
    """One bad input and what became of it.

    Attributes:
        kind: row of the table.
        name: which one.
        verdict: one of `VERDICTS`.
        said: what the command said, shortened; shown where the verdict is not clean.
    """

    kind: str
    name: str
    verdict: str
    said: str = ""


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def has_traceback(self) -> bool:
        """Whether Python's own error report was printed."""
        return "Traceback (most recent call last)" in self.out + self.err

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with exit status 1 or 2 and a sentence of agl-bench."""
        return self.status in (1, 2) and not self.has_traceback and "agl-bench: " in self.err

    @property
    def last_line(self) -> str:
        """What a person would read first."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1][:200] if lines else ""


def agl_bench(
    *words: object, timeout: float = 300, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Answer:
    """Run the command in a process of its own, with one thread."""
    own = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "agl_bench", *map(str, words)]
    ended = subprocess.run(
        command, capture_output=True, timeout=timeout, env={**os.environ, **own, **(environment or {})}, cwd=cwd
    )
    return Answer(ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))


def section(title: str, introduction: str, trials: Sequence[Trial], options: argparse.Namespace) -> str:
    """One section of the page in Markdown: what was tried, a row for each kind, and every trial that is not clean."""
    unknown = {t.verdict for t in trials} - set(VERDICTS)
    if unknown:
        raise ValueError(f"not a verdict: {', '.join(sorted(unknown))}")
    rows = []
    for kind in dict.fromkeys(t.kind for t in trials):
        mine = [t for t in trials if t.kind == kind]
        rows.append({"kind": kind, "tried": len(mine)} | {v: sum(t.verdict == v for t in mine) for v in VERDICTS})
    rows.append({"kind": "all", "tried": len(trials)} | {v: sum(t.verdict == v for t in trials) for v in VERDICTS})
    odd = [f"- {t.kind}, {t.name}: {t.verdict}. `{t.said}`" for t in trials if t.verdict not in CLEAN]
    parts = [f"## {title}", introduction.strip(), _where(options), measure.table(rows, markdown=True)]
    return "\n\n".join(parts + (["\n".join(odd)] if odd else [])) + "\n"


def _where(options: argparse.Namespace) -> str:
    here = measure.machine(options.device)
    threads = f"{here['threads']} threads, device {here['device']}"
    return f"{here['processor']}, {threads}, torch {here['torch']}, commit {here['commit'] or 'unknown'}."


def put(name: str, text: str) -> None:
    """Replace a section of the page, or add it at the end."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else TITLE
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin in page:
        before, rest = page.split(begin, 1)
        after = rest.split(end, 1)[1]
    else:
        before, after = f"{page.rstrip()}\n\n", ""
    PAGE.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def report(name: str, title: str, introduction: str, trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Print the section, write it if asked to, and end with status 1 if a trial is not clean."""
    text = section(title, introduction, trials, options)
    if options.write:
        put(name, text)
    print(text)
    if any(t.verdict not in CLEAN for t in trials):
        sys.exit(1)


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """The options of all benchmarks, and `--write`."""
    made = measure.parser(documentation)
    made.add_argument("--write", action="store_true", help="write this script's section of benchmarks/reliability.md")
    return made
