"""What a stranger's code does to the process while it is imported, built or run, seen and undone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from agl_bench.registry.patches import Patches
from agl_bench.registry.process import Setting, settings

SLOW = 2.0  # seconds that an import may take; torch alone takes about that where the disk is cold
DECIDING = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES")  # of the environment; and what says how many threads
STREAMS = ("standard input", "standard output", "standard error")


@dataclass
class Watch:
    """What was seen.

    Attributes:
        seconds: that it took; 0 where everything was imported before, and a busy machine alone let it wait.
        printed: to standard output, which belongs to the results.
        changed: global settings that others depend on; each is as it was before.
        harmless: settings that decide nothing, and are as they were before.
    """

    seconds: float = 0.0
    printed: str = ""
    changed: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched(*, is_import: bool = True, patches: bool = True) -> Iterator[Watch]:
    """Watch some code; standard output is taken, and what it changes of the process is put back.

    `patches` = False leaves out what takes longest, milliseconds: the names of `patches`.

    Watched are the settings of `process`, the names of `patches`, standard streams, and the environment: of an import
    what it says of threads and of devices, since libraries set other variables for good reasons. Of a library that is
    not there before, the values right after its own import count; where those differ from process to process, what
    becomes of them is not seen. A library that a constructor or a step is the first to import may do what an import
    may, and draw random numbers. Settings that decide nothing are put back too, and told where no library was imported
    meanwhile, which changes them by the way.
    """
    watch, out = Watch(), _Heard() if not is_import else io.StringIO()
    started, known, names = time.perf_counter(), set(sys.modules), Patches() if patches else None
    before = {name: _value(setting.get) for name, setting in _looked_at(is_import)}
    environment, streams = _environment(is_import), contextlib.nullcontext() if is_import else _Descriptors()
    outputs = sys.stderr, sys.stdin
    try:
        with streams as descriptors, contextlib.redirect_stdout(out):
            try:
                yield watch
            finally:
                if sys.stdout is not out:
                    watch.changed.append("sys.stdout")
                watch.changed += descriptors.put_back() if descriptors else []
    finally:
        is_new = len(sys.modules) > len(known)
        watch.seconds = time.perf_counter() - started if is_new else 0.0
        watch.printed = out.getvalue()
        for name, old in zip(("stderr", "stdin"), outputs, strict=True):
            if getattr(sys, name) is not old:
                setattr(sys, name, old)
                watch.changed.append(f"sys.{name}")
        watch.changed += names.undo(is_import) if names else []
        has_library = is_import or _has_new_library(known)
        for name, setting in _looked_at(is_import):
            if has_library and setting.when == "later" and not setting.is_harmless:
                continue
            old = before[name] if name in before else setting.fresh()
            if old is not None and not _same(_value(setting.get), old):
                is_by_the_way = has_library and not is_import and setting.is_drawn
                told = watch.harmless if setting.is_harmless or is_by_the_way else watch.changed
                told.append(name + _put(setting, old))
        watch.changed += _put_environment(environment, has_library)
        if is_new:
            watch.harmless.clear()


class _Heard(io.StringIO):
    """Keeps what the thread that made it prints; others, e.g. one that draws a progress bar, write as before."""

    def __init__(self) -> None:
        super().__init__()
        self._real: TextIO = sys.stdout
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return super().write(text)
        return self._real.write(text)

    def isatty(self) -> bool:
        return self._real.isatty()

    def fileno(self) -> int:
        return self._real.fileno()


class _Descriptors:
    """The standard streams as the operating system knows them, kept so that they can be put back."""

    def __enter__(self) -> _Descriptors:
        self._kept = {number: os.dup(number) for number in range(len(STREAMS)) if _is_open(number)}
        return self

    def put_back(self) -> list[str]:
        """Names of those that were closed or lead elsewhere."""
        changed = []
        for number, kept in self._kept.items():
            if not (_is_open(number) and os.path.sameopenfile(number, kept)):
                os.dup2(kept, number)
                changed.append(f"the descriptor of {STREAMS[number]}")
        return changed

    def __exit__(self, *_: object) -> None:
        for kept in self._kept.values():
            os.close(kept)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _looked_at(is_import: bool) -> Iterator[tuple[str, Setting]]:
    other = "later" if is_import else "import"
    return ((name, setting) for name, setting in settings().items() if setting.when != other)


def _value(get: Callable[[], Any]) -> Any:
    """A setting's value, or what kept it from being read, e.g. two ways to set it that do not go together."""
    try:
        return get()
    except Exception as error:  # noqa: BLE001  (it is compared with what was there before)
        return type(error).__name__


def _put(setting: Setting, old: Any) -> str:
    """Put a setting back; what to add to its name where that cannot be done."""
    try:
        setting.put(old)
    except Exception as error:  # noqa: BLE001  (it is told)
        return f" (which cannot be restored: {type(error).__name__})"
    return ""


def _has_new_library(known: set[str]) -> bool:
    """Whether a library was imported that was not there: what it sets once, it sets for good reasons."""
    new = {name.partition(".")[0] for name in set(sys.modules) - known}
    return bool(new - {name.partition(".")[0] for name in known} - sys.stdlib_module_names)


def _environment(is_import: bool) -> dict[str, str]:
    return _deciding(os.environ) if is_import else dict(os.environ)


def _deciding(variables: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in variables.items() if n.endswith("_NUM_THREADS") or n in DECIDING}


def _put_environment(before: dict[str, str], is_import: bool) -> Iterator[str]:
    """Put it back; each name that differed."""
    before, now = _deciding(before) if is_import else before, _environment(is_import)
    for name in sorted(n for n in {*before, *now} if before.get(n) != now.get(n)):
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
        yield f"the environment's {name}"


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal; states of generators are tensors, or tuples with arrays."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "shape"):
        return bool((one == other).all())
    return bool(one == other)
