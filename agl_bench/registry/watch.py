"""What a stranger's module does to the process while it is imported, seen and undone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

SLOW = 2.0  # seconds that an import may take; torch alone takes about that where the disk is cold


@dataclass
class Watch:
    """What was seen.

    Attributes:
        seconds: that it took; 0 where everything was imported before, and a busy machine alone let it wait.
        printed: to standard output, which belongs to the results.
        changed: global settings that others depend on; each is as it was before.
    """

    seconds: float = 0.0
    printed: str = ""
    changed: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Watch an import; standard output is taken, and settings of the process are put back.

    Watched are torch's default type, precision of matrix products, deterministic and cuDNN flags, gradient mode,
    threads and random state; numpy's and Python's random state; and what the environment says of threads and of visible
    devices. Of a library that is not there before, the values right after its own import count; random states and the
    number of threads then differ from process to process anyway, and what becomes of them is not seen.
    """
    watch, out, started = Watch(), io.StringIO(), time.perf_counter()
    before = {name: (setting.get(), setting) for name, setting in _settings()}
    environment, known = _environment(), len(sys.modules)
    try:
        with contextlib.redirect_stdout(out):
            yield watch
    finally:
        watch.seconds = time.perf_counter() - started if len(sys.modules) > known else 0.0
        watch.printed = out.getvalue()
        for name, setting in _settings():
            old = before[name][0] if name in before else setting.fresh()
            if old is not None and not _same(setting.get(), old):
                setting.put(old)
                watch.changed.append(name)
        for name in sorted({*environment, *_environment()}):
            if os.environ.get(name) != environment.get(name):
                watch.changed.append(f"the environment's {name}")
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    del os.environ[name]


@dataclass(frozen=True)
class _Setting:
    """How to get and put a setting, and what it is right after its library was imported; None = nobody can tell."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    fresh: Callable[[], Any] = lambda: None


def _settings() -> Iterator[tuple[str, _Setting]]:
    """Settings of those libraries that are imported by now; nothing is imported for them."""
    found: Any = [sys.modules.get(name) for name in ("torch", "numpy", "random")]
    torch, numpy, random = found
    if random is not None:
        yield "Python's random state", _Setting(random.getstate, random.setstate)
    if hasattr(numpy, "random"):
        yield "numpy's random state", _Setting(numpy.random.get_state, numpy.random.set_state)
    if not hasattr(torch, "set_flush_denormal"):  # absent, or half imported
        return
    cudnn = torch.backends.cudnn
    yield "torch's default type", _Setting(torch.get_default_dtype, torch.set_default_dtype, lambda: torch.float32)
    yield (
        "torch's precision of matrix products",
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, lambda: "highest"),
    )
    yield (
        "torch's deterministic algorithms",
        _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, lambda: 0),
    )
    for flag in ("benchmark", "deterministic"):
        yield (
            f"torch.backends.cudnn.{flag}",
            _Setting(partial(getattr, cudnn, flag), partial(setattr, cudnn, flag), lambda: False),
        )
    yield "torch's gradient mode", _Setting(torch.is_grad_enabled, torch.set_grad_enabled, lambda: True)
    yield "torch's number of threads", _Setting(torch.get_num_threads, torch.set_num_threads)
    yield "torch's random state", _Setting(torch.get_rng_state, torch.set_rng_state)


def _environment() -> dict[str, str]:
    return {n: v for n, v in os.environ.items() if n.endswith("_NUM_THREADS") or n == "CUDA_VISIBLE_DEVICES"}


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal; states of generators are tensors, or tuples with arrays."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "shape"):
        return bool((one == other).all())
    return bool(one == other)
