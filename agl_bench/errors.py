"""Everything agl-bench raises on purpose: what is wrong, which one, what to do instead.

AglBenchError
├── UnknownName        a selector, backbone, dataset, preset or key that nobody provides
├── NameTaken          two plug-ins provide the same name
├── BadPlugin          a plug-in breaks a rule of its door
├── BadSpec            a setting outside its range, or settings that contradict each other
├── CannotRun          a combination of plug-ins that this machine, these data or this protocol cannot run
├── BadSection         a tissue section that fails a check
├── MissingData        a dataset's files are not where they should be
├── FetchFailed        a download could not be started or did not pass its check
├── NotKept            a finished cell has not kept what is asked for
├── BadWorkFolder      the work folder cannot be written, or holds something unreadable
├── CannotWrite        a file that was asked for cannot be written
├── TrackerUnavailable the MLflow server does not answer
├── ExecutorFailed     an engine that runs cells is not there, or its workers cannot run them
├── NoGradients        gradients of single genes where a batch is trained in parts
├── Diverged           training produced a non-finite loss
└── TooLittleMemory    a batch does not fit into the memory of the device and must not be parted

The command line prints the sentence and exits with status 2; it never shows a traceback for one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FORBIDDEN = "cannot be read: permission denied; change its permissions"  # after the name of a file
LONGEST = 1000  # characters of a stranger's message; nobody reads more, and it stands in tables


class AglBenchError(Exception):
    """Root of the tree. The message is one sentence for a person."""


class UnknownName(AglBenchError):
    """A name that nobody provides; suggests the nearest one and lists the rest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, remedy: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        listing = f" Known: {', '.join(names)}." if names else f" There is no {kind} at all."
        super().__init__(f"unknown {kind} '{name}'.{hint}{listing}{' ' + remedy if remedy else ''}")


class NameTaken(AglBenchError):
    """Two plug-ins provide the same name; names both providers."""

    def __init__(self, name: str, first: str, second: str) -> None:
        super().__init__(f"'{name}' is provided by both {first} and {second}; rename one in its hook, or leave it out")


class BadPlugin(AglBenchError):
    """A plug-in breaks a rule of its door: which plug-in, which rule, what was got."""


class BadSpec(AglBenchError):
    """A setting outside its range: field, value, allowed range."""


class CannotRun(AglBenchError):
    """A combination that cannot run, through nobody's fault: who needs what. Its cells are skipped."""


class BadSection(AglBenchError):
    """A section that fails a check: section, check, first offending spot or gene."""

    def __init__(self, section: str, problem: str) -> None:
        self.section, self.problem = section, problem
        super().__init__(f"section '{section}': {problem}")


class MissingData(AglBenchError):
    """Files of a dataset are absent: which file, which command brings it."""


class FetchFailed(AglBenchError):
    """A download could not be started, finished or verified."""


class NotKept(AglBenchError):
    """A finished cell has not kept what is asked for: which cell, which command brings it."""


class BadWorkFolder(AglBenchError):
    """The work folder cannot be created, written or read."""


class CannotWrite(AglBenchError):
    """A file that was asked for cannot be written, e.g. since the disk is full: which, why, and what is kept."""


class TrackerUnavailable(AglBenchError):
    """The tracking server does not answer or refuses."""


class ExecutorFailed(AglBenchError):
    """An engine that runs cells elsewhere: which one, what it lacks or says, what to do."""


class NoGradients(AglBenchError):
    """A selector asks for the gradients of single genes where they are not to be had."""


class Diverged(AglBenchError):
    """Training produced a non-finite loss: epoch and first non-finite gene."""


class TooLittleMemory(AglBenchError):
    """A batch that must not be parted does not fit into the device: how many spots fit, and what to set."""


def told(error: BaseException) -> str:
    """An error as one line that every file and table takes; one of ours is a sentence, others name their type.

    A stranger's error may fail to say anything, and may say what is no text.
    """
    try:
        text = " ".join(str(error).split())
    except BaseException as why:  # noqa: BLE001  (its own __str__)
        text = f"it has no message, because its __str__ raises {type(why).__name__}"
    if isinstance(error, SystemExit):
        text = f"it called sys.exit({text})"
    elif not isinstance(error, AglBenchError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")


def printable(text: str) -> str:
    """A text without what no encoding takes: a lone surrogate becomes its number."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
