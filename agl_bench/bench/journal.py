"""The journal of studies: Optuna's file of one JSON record in each line, locked, signed, and recovered where damaged.

A record carries its own digest beside what Optuna reads of it; those of earlier versions carry none. Optuna counts
studies and trials by the records that made them: where such a record is lost, one of a failed trial stands in, so that
all others keep their numbers. Other lost records give way to one that Optuna skips, of the same length, since
processes that have the journal open remember where its lines begin.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import (
    BaseJournalBackend,
    JournalFileBackend,
    JournalFileOpenLock,
    JournalFileSymlinkLock,
)
from optuna.trial import TrialState

from agl_bench.bench.checkpoints import write_through
from agl_bench.digests import check_signed, opened, signed

Record = dict[str, Any]
_NEW_STUDY, _NEW_TRIAL, _SKIPPED = 0, 4, 10  # operations of Optuna's journal
_OF_TRIALS = range(5, 10)
_MAXIMIZE = 2
_SHORT = 4  # bytes; less than any record
_LONG_AGO = "2000-01-01T00:00:00.000000+00:00"


class _KernelLock(JournalFileOpenLock):
    """A lock that the kernel lets go of when its holder dies, for local file systems."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._lock = FileLock(f"{journal}.flock")

    def acquire(self) -> bool:
        """Wait for it."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let it go."""
        self._lock.release()


class _SignedJournal(JournalFileBackend):
    """A journal whose records carry their digest."""

    def append_logs(self, logs: list[Record]) -> None:
        """Write records."""
        super().append_logs([signed(json.loads(json.dumps(log))) for log in logs])

    def read_logs(self, log_number_from: int) -> Iterator[Record]:  # type: ignore[override]
        """Records from a number on.

        Raises:
            OSError: if a line cannot be read.
        """
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            raise OSError(f"a line of {self._file_path} is damaged") from error


def open_journal(journal: Path, warn: Callable[[str], None]) -> BaseJournalBackend:
    """The journal, made or mended where it has to be.

    The lock follows from its file system: of the kernel on local ones; a symbolic link on NFS and other cluster file
    systems, where kernel locks are unreliable; an exclusively created file on CIFS and FUSE, which may lack links. The
    latter two are taken over from a dead holder after 30 s.

    Args:
        journal: its file.
        warn: told, in one sentence, what was lost.

    Raises:
        OSError: if it cannot be read or written.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_for(journal, _filesystem(journal))
    lock.acquire()
    try:
        _mend(journal, warn)
    finally:
        lock.release()
    return _SignedJournal(str(journal), lock_obj=lock)


def lock_for(journal: Path, filesystem: str) -> JournalFileOpenLock | JournalFileSymlinkLock:
    """The lock that is safe on a file system, see `open_journal`."""
    if filesystem.startswith(("cifs", "smb", "fuse")):
        return JournalFileOpenLock(str(journal))
    if filesystem.startswith(("nfs", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "glusterfs")):
        return JournalFileSymlinkLock(str(journal))
    return _KernelLock(journal)


def _filesystem(path: Path) -> str:
    """Kind of the file system that a path lies on, as the kernel names it; "" where it does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = {line.split()[1].replace("\\040", " "): line.split()[2] for line in lines}
    here = path.absolute().resolve()
    return next((mounts[str(p)] for p in here.parents if str(p) in mounts), "")


# --- damage ----------------------------------------------------------------------------------------------------------


@dataclass
class _Line:
    """A line of the journal, without its end.

    Attributes:
        content: as it stands in the file.
        record: what it says; None where it is lost.
        stands_for: what is lost, "" where nothing is known of it: "study", "trial" (that it began) or "more" of one.
        told: what can still be read of a lost one: "study_id", "trial_id", "study_name".
    """

    content: bytes
    record: Record | None
    stands_for: str = ""
    told: Record = field(default_factory=dict)

    @classmethod
    def lost(cls, content: bytes) -> _Line:
        """One that cannot be read as a whole."""
        told: Record = {}
        for name in (b"op_code", b"study_id", b"trial_id"):
            if found := re.search(rb'"%s": ?(\d{1,9})[,}]' % name, content):
                told[name.decode()] = int(found[1])
        if found := re.search(rb'"study_name": ?("(?:[^"\\\x00-\x1f]|\\.)*"),', content):
            with contextlib.suppress(ValueError):  # its name is lost, too
                told["study_name"] = json.loads(found[1].decode("utf-8"))
        stands_for = {_NEW_STUDY: "study", _NEW_TRIAL: "trial", None: ""}.get(told.get("op_code"), "more")
        return cls(content, None, stands_for, told)


def _mend(journal: Path, warn: Callable[[str], None]) -> None:
    """Recover all complete records of a damaged journal, and keep a copy of it as it was.

    A last line that a killed process left unfinished is no damage: it is cut off, or the next one would be glued to it.
    """
    try:
        with opened(journal) as stream:
            content = stream.read()
    except FileNotFoundError:
        return
    whole, _, rest = content.rpartition(b"\n")
    lines = [line for text in whole.split(b"\n") for line in _lines_of(text)]
    lines += [line for line in _lines_of(rest) if line.record is not None or b"\0" in rest]
    while (place := _refused([line.record for line in lines])) is not None:
        lines[place] = _Line.lost(lines[place].content)
    lost = sum(line.record is None for line in lines)
    trials = _stand_in(lines) if lost else 0
    mended = b"".join(line.content + b"\n" for line in lines)
    if mended == content:
        return
    if lost:
        aside = next(p for n in range(1, 1000) if not (p := journal.with_name(f"{journal.name}.damaged-{n}")).exists())
        write_through(aside, content)
        warn(
            f"{journal} was damaged: {lost} of {len(lines)} records {'is' if lost == 1 else 'are'} lost, which "
            f"affects {trials} trial{'' if trials == 1 else 's'}; all other records were recovered, unfinished trials "
            f"run again, and {aside.name} is a copy of the damaged file"
        )
    write_through(journal, mended)


def _lines_of(text: bytes) -> Iterator[_Line]:
    """What a line holds: one record, or where its end was lost several, with garbage between them."""
    record = _record(text)
    if record is not None or not text.strip():
        if record is not None:
            yield _Line(text, record)
        return
    garbage, begins = b"", [m.start() for m in re.finditer(rb'\{"op_code"', text)]
    for begin, end in zip([0, *begins], [*begins, len(text)], strict=True):
        piece = text[begin:end]
        last = piece.rfind(b"}") + 1
        record = _record(piece[:last])
        if record is None:
            garbage += piece
            continue
        if garbage:
            yield _Line.lost(garbage)
        yield _Line(piece[:last], record)
        garbage = piece[last:]
        if len(garbage) < _SHORT:  # what was the end of a line
            garbage = b""
    if garbage:
        yield _Line.lost(garbage)


def _record(text: bytes) -> Record | None:
    """The record that a line is; None if it is none, or not as it was written."""
    try:
        record = json.loads(text.decode("utf-8"))
        kinds = {"op_code": int, "study_id": int, "trial_id": int, "study_name": str}
        if not all(type(record.get(name, kind())) is kind for name, kind in kinds.items()):
            return None
        return check_signed(record, "") if "digest" in record else record
    except (ValueError, RecursionError, AttributeError):  # the last for what is no object
        return None


class _Replay(BaseJournalBackend):
    """Records as a journal; `place` is of the last one that was asked for."""

    def __init__(self, records: Sequence[Record | None]) -> None:
        self.records, self.place = records, -1

    def read_logs(self, log_number_from: int) -> Iterator[Record]:
        """What is there, without what is lost."""
        for place, record in enumerate(self.records):
            self.place = place
            if record is not None:
                yield record

    def append_logs(self, logs: list[Record]) -> None:
        """Nothing is written."""


def _refused(records: Sequence[Record | None]) -> int | None:
    """Place of the first record that Optuna cannot make sense of; None if there is none."""
    replay = _Replay(records)
    try:
        JournalStorage(replay)
    except Exception:  # noqa: BLE001  (it trusts its records: whatever is not there raises what it likes)
        return replay.place
    return None


def _stand_in(lines: list[_Line]) -> int:
    """Put something in the place of each lost record; the number of trials that have lost something.

    What is lost and cannot be told began a study or a trial if records below it speak of one that nobody has begun.
    """
    while (at := _first_unfounded(lines)) is not None:
        place, kind = at
        before = [line for line in lines[:place] if line.record is None and line.stands_for in ("", "more")]
        unknown = [line for line in before if not line.stands_for]
        if not before:
            lines[place] = _Line(lines[place].content, None, "more", dict(lines[place].record or {}))
            continue
        (unknown or before)[-1].stands_for = kind
    trials: set[object] = set()
    latest = study = 0
    names = 0
    for line in lines:
        if line.record is not None:
            latest = line.record.get("trial_id", latest)
            study = line.record.get("study_id", study)
            continue
        if line.stands_for == "study":
            names += 1
            name = line.told.get("study_name", f"lost {names}")
            line.record = {"op_code": _NEW_STUDY, "worker_id": "", "study_name": name, "directions": [_MAXIMIZE]}
        elif line.stands_for == "trial":
            line.record = {
                "op_code": _NEW_TRIAL, "worker_id": "", "study_id": line.told.get("study_id", study),
                "datetime_start": None, "datetime_complete": _LONG_AGO, "state": TrialState.FAIL.value,
            }  # fmt: skip
            trials.add(id(line))
        else:
            trials.add(line.told.get("trial_id", latest))
            line.record = {"op_code": _SKIPPED, "worker_id": ""}
        line.content = json.dumps(line.record, separators=(",", ":")).encode().ljust(len(line.content))
    return len(trials)


def _first_unfounded(lines: Sequence[_Line]) -> tuple[int, str] | None:
    """Place of the first record that speaks of a study or trial that nothing above it began, and which of the two."""
    studies, trials = set[str](), 0
    for place, line in enumerate(lines):
        record = line.record
        if record is None:
            if line.stands_for == "study":
                studies.add(line.told.get("study_name", f"lost {place}"))
            trials += line.stands_for == "trial"
            continue
        if record["op_code"] == _NEW_STUDY:
            studies.add(record["study_name"])
        elif record["op_code"] == _NEW_TRIAL and record["study_id"] < len(studies):
            trials += 1
        elif record["op_code"] in _OF_TRIALS:
            if record["trial_id"] >= trials:
                return place, "trial"
            continue
        if record.get("study_id", -1) >= len(studies):
            return place, "study"
    return None
