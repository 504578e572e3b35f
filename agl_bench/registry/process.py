"""Settings of the process that a stranger's code may change: how to read each, and how to put it back.

Nothing is imported for them: of a library that is not there yet there are no settings. The functions that read them and
put them back are those that were there when this was first asked, so that replacing them helps nobody.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import locale
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

CLOCKS = {signal.ITIMER_REAL: "alarm", signal.ITIMER_VIRTUAL: "virtual alarm", signal.ITIMER_PROF: "profiling alarm"}
LIMITS = {getattr(resource, name): name for name in sorted(vars(resource), reverse=True) if name.startswith("RLIMIT_")}
DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
DENORMAL = 5e-324  # the smallest number above zero; 0 where such numbers are flushed


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        get: its value now.
        put: give it a value that `get` returned.
        fresh: what it is right after its library was imported; None = nobody can tell.
        when: "always"; "later": not while a module is imported, which may change it for good reasons; or "import".
        is_harmless: it decides no result and stops nothing; modules that are imported meanwhile change it by the way.
        is_drawn: a library that is imported may draw from it, which is put back without a word.
    """

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    fresh: Callable[[], Any] = lambda: None
    when: str = "always"
    is_harmless: bool = False
    is_drawn: bool = False


def settings() -> dict[str, Setting]:
    """Settings of those libraries that are imported by now, by name, in the order in which they are to be put back."""
    found: Any = [sys.modules.get(name) for name in ("torch", "numpy", "random", "logging", "decimal")]
    torch, numpy, random, logging, decimal = found
    is_whole = hasattr(torch, "set_flush_denormal")  # or absent, or half imported
    return _settings(
        torch if is_whole else None, numpy if hasattr(numpy, "set_printoptions") else None, random, logging, decimal
    )


@functools.lru_cache(maxsize=4)
def _settings(torch: Any, numpy: Any, random: Any, logging: Any, decimal: Any) -> dict[str, Setting]:
    made: dict[str, Setting] = {}
    if torch is not None:
        made |= dict(_modes(torch))
    if random is not None:
        made["Python's random state"] = Setting(random.getstate, random.setstate, is_drawn=True)
    if numpy is not None:
        made["numpy's random state"] = Setting(numpy.random.get_state, numpy.random.set_state, is_drawn=True)
        made["numpy's handling of floating-point errors"] = Setting(numpy.geterr, lambda old: numpy.seterr(**old))
        made["numpy's print options"] = Setting(
            numpy.get_printoptions, lambda old: numpy.set_printoptions(**old), when="later", is_harmless=True
        )
    if torch is not None:
        made |= dict(_arithmetic(torch)) | dict(_hooks(torch))
    made |= dict(_python()) | dict(_system())
    if decimal is not None:
        made["decimal's context"] = Setting(partial(_decimal, decimal), partial(_put_decimal, decimal))
    if logging is not None:
        made["logging"] = Setting(
            partial(_logging, logging), partial(_put_logging, logging), when="later", is_harmless=True
        )
    return made


def _modes(torch: Any) -> Iterator[tuple[str, Setting]]:
    """What acts on every operation of torch; first, so that what follows is not under its influence."""
    autograd, native = torch.autograd, torch._C
    yield (
        "torch's default device",
        Setting(
            lambda: str(torch.get_default_device()),
            lambda old: torch.set_default_device(None if old == "cpu" else old),
            lambda: "cpu",
        ),
    )
    for what in ("function", "dispatch"):
        length, pop = (getattr(native, f"_{verb}_torch_{what}_stack") for verb in ("len", "pop"))
        yield f"the torch {what} modes", Setting(length, partial(_shorten, length, pop), lambda: 0)
    hooks = native._autograd
    yield (
        "torch's hooks on saved tensors",
        Setting(
            lambda: hooks._top_saved_tensors_default_hooks(True) is not None,
            lambda _: hooks._pop_saved_tensors_default_hooks(),
            lambda: False,
        ),
    )
    yield (
        "torch's inference mode",
        Setting(torch.is_inference_mode_enabled, partial(_inference, torch), lambda: False),
    )
    yield "torch's gradient mode", Setting(torch.is_grad_enabled, torch.set_grad_enabled, lambda: True)
    yield (
        "torch's anomaly mode",
        Setting(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda old: autograd.set_detect_anomaly(*old),
            lambda: (False, True),
        ),
    )
    yield "torch's autocast", Setting(partial(_autocast, torch), partial(_put_autocast, torch))


def _arithmetic(torch: Any) -> Iterator[tuple[str, Setting]]:
    """What decides in which numbers torch computes, and in which order."""
    backends = torch.backends
    yield "torch's default type", Setting(torch.get_default_dtype, torch.set_default_dtype, lambda: torch.float32)
    yield (
        "torch's precision of matrix products",
        Setting(partial(_precision, torch), partial(_put_precision, torch), lambda: ("highest", *["none"] * 4)),
    )
    yield (
        "torch's deterministic algorithms",
        Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, lambda: 0),
    )
    flags: list[tuple[Any, str, str, Any]] = [
        (backends.cudnn, "torch.backends.cudnn", flag, fresh)
        for flag, fresh in (("benchmark", False), ("deterministic", False), ("enabled", None), ("allow_tf32", None))
    ]
    for flag in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        flags.append((backends.cuda.matmul, "torch.backends.cuda.matmul", flag, None))
    for part in ("conv", "rnn"):
        flags.append((getattr(backends.mkldnn, part), f"torch.backends.mkldnn.{part}", "fp32_precision", None))
    flags.append((torch.utils.deterministic, "torch.utils.deterministic", "fill_uninitialized_memory", None))
    for owner, where, flag, fresh in flags:
        if hasattr(owner, flag):
            yield (
                f"{where}.{flag}",
                Setting(partial(getattr, owner, flag), partial(setattr, owner, flag), partial(_same_value, fresh)),
            )
    for library in ("mkldnn", "nnpack"):
        get, put = (getattr(torch._C, f"_{verb}_{library}_enabled", None) for verb in ("get", "set"))
        if get and put:
            yield f"torch.backends.{library}", Setting(get, put)
    for kind in ("flash", "mem_efficient", "math", "cudnn"):
        get, put = getattr(backends.cuda, f"{kind}_sdp_enabled"), getattr(backends.cuda, f"enable_{kind}_sdp")
        yield f"torch.backends.cuda.enable_{kind}_sdp", Setting(get, put)
    yield "torch's flushing of denormal numbers", Setting(lambda: DENORMAL * 1.0 == 0, torch.set_flush_denormal)
    yield "torch's number of threads", Setting(torch.get_num_threads, torch.set_num_threads)
    yield (
        "torch's number of threads between operations",
        Setting(torch.get_num_interop_threads, torch.set_num_interop_threads),
    )
    yield "torch's random state", Setting(torch.get_rng_state, torch.set_rng_state, when="import")
    options = sys.modules["torch._tensor_str"].PRINT_OPTS
    yield (
        "torch's print options",
        Setting(lambda: dict(vars(options)), vars(options).update, when="later", is_harmless=True),
    )


def _hooks(torch: Any) -> Iterator[tuple[str, Setting]]:
    """Hooks on all modules and all optimisers."""
    for module, what in ((torch.nn.modules.module, "modules"), (sys.modules["torch.optim.optimizer"], "optimisers")):
        tables = {n: v for n, v in vars(module).items() if n.startswith("_global_") and isinstance(v, dict)}
        for name, table in tables.items():
            kind = name.removeprefix("_global_").removeprefix("optimizer_").replace("_", " ")
            yield f"torch's {kind} on all {what}", Setting(partial(dict, table), partial(_refill, table))


def _python() -> Iterator[tuple[str, Setting]]:
    """What belongs to the interpreter."""
    yield "the warnings that are errors", Setting(_strict_filters, lambda old: _put_filters(_mild_filters() + old))
    yield (
        "the filters of warnings",
        Setting(lambda: list(warnings.filters), _put_filters, when="later", is_harmless=True),
    )
    yield "sys.setrecursionlimit", Setting(sys.getrecursionlimit, sys.setrecursionlimit)
    yield "sys.setswitchinterval", Setting(sys.getswitchinterval, sys.setswitchinterval)
    yield "sys.set_int_max_str_digits", Setting(sys.get_int_max_str_digits, sys.set_int_max_str_digits)
    yield "the garbage collector", Setting(_collector, _put_collector)
    yield (
        "faulthandler",
        Setting(
            faulthandler.is_enabled,
            lambda old: faulthandler.enable() if old else faulthandler.disable(),
            when="later",
            is_harmless=True,
        ),
    )
    yield "sys.settrace", Setting(sys.gettrace, sys.settrace)
    yield "sys.setprofile", Setting(sys.getprofile, sys.setprofile)
    yield "sys.path", Setting(lambda: list(sys.path), partial(_replace, sys.path), when="later", is_harmless=True)
    yield "sys.meta_path", Setting(lambda: list(sys.meta_path), partial(_replace, sys.meta_path), when="later")
    yield "the locale", Setting(partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL))


def _system() -> Iterator[tuple[str, Setting]]:
    """What belongs to the process as the operating system knows it."""
    yield "the working directory", Setting(_folder, os.chdir)
    yield "the umask", Setting(_umask, os.umask)
    for number in sorted(signal.valid_signals()):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and hasattr(number, "name"):
            yield f"the handler of {number.name}", Setting(partial(signal.getsignal, number), partial(_handle, number))
    yield (
        "the signals that are blocked",
        Setting(
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), partial(signal.pthread_sigmask, signal.SIG_SETMASK)
        ),
    )
    for timer, name in CLOCKS.items():
        yield f"the {name}", Setting(partial(_is_set, timer), partial(_unset, timer))
    for number, name in LIMITS.items():
        yield f"the limit {name}", Setting(partial(resource.getrlimit, number), partial(resource.setrlimit, number))
    if hasattr(os, "sched_getaffinity"):
        yield (
            "the processors that may be used",
            Setting(partial(os.sched_getaffinity, 0), partial(os.sched_setaffinity, 0)),
        )


def _same_value(value: Any) -> Any:
    return value


def _is_set(clock: int) -> bool:
    return signal.getitimer(clock)[0] > 0


def _unset(clock: int, old: bool) -> None:
    if not old:
        signal.setitimer(clock, 0)


def _decimal(decimal: Any) -> dict[str, Any]:
    context = decimal.getcontext()
    return {name: getattr(context, name) for name in DECIMAL} | {"traps": dict(context.traps)}


def _put_decimal(decimal: Any, old: dict[str, Any]) -> None:
    for name in DECIMAL:
        setattr(decimal.getcontext(), name, old[name])
    decimal.getcontext().traps.update(old["traps"])


def _shorten(length: Callable[[], int], pop: Callable[[], Any], old: int) -> None:
    while length() > old:
        pop()


_held: list[Any] = []  # contexts that end with the process


def _inference(torch: Any, old: bool) -> None:
    context = torch.inference_mode(old)
    context.__enter__()
    _held.append(context)


def _autocast(torch: Any) -> Any:
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    kinds = ("cpu", "cuda")
    return nesting, *((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def _put_autocast(torch: Any, old: Any) -> None:
    nesting, *kinds = old
    for kind, (is_on, dtype) in zip(("cpu", "cuda"), kinds, strict=True):
        torch.set_autocast_enabled(kind, is_on)
        torch.set_autocast_dtype(kind, dtype)
    while _autocast(torch)[0] > nesting:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _precision(torch: Any) -> tuple[str, ...]:
    """Of matrix products, as older code has it and as newer code has it: one moves the other."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "a mixture"
    return legacy, *(getattr(part, "fp32_precision", "") for part in _multiplying(torch))


def _put_precision(torch: Any, old: tuple[str, ...]) -> None:
    torch.set_float32_matmul_precision(old[0])
    for part, value in zip(_multiplying(torch), old[1:], strict=True):
        if value and part.fp32_precision != value:
            part.fp32_precision = value


def _multiplying(torch: Any) -> tuple[Any, ...]:
    backends = torch.backends
    return backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul


def _refill(table: dict[Any, Any], old: dict[Any, Any]) -> None:
    table.clear()
    table.update(old)


def _replace(values: list[Any], old: list[Any]) -> None:
    values[:] = old


def _strict_filters() -> list[Any]:
    return [f for f in warnings.filters if f[0] == "error"]


def _mild_filters() -> list[Any]:
    return [f for f in warnings.filters if f[0] != "error"]


def _put_filters(old: list[Any]) -> None:
    warnings.resetwarnings()  # which also tells those who have looked at the filters before
    warnings.filters[:] = old  # type: ignore[index]


def _collector() -> Any:
    return gc.isenabled(), gc.get_threshold()


def _put_collector(old: Any) -> None:
    (gc.enable if old[0] else gc.disable)()
    gc.set_threshold(*old[1])


def _folder() -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(Path.cwd())
    return ""  # it has been deleted


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _handle(number: signal.Signals, old: Any) -> None:
    if old is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, old)


def _logging(logging: ModuleType) -> Any:
    root: Any = logging.root
    return root.manager.disable, root.level, list(root.handlers), logging.raiseExceptions


def _put_logging(logging: Any, old: Any) -> None:
    root = logging.root
    root.manager.disable, root.level, handlers, logging.raiseExceptions = old
    root.handlers[:] = handlers
    root.manager._clear_cache()
