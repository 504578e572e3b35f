"""Functions and classes of torch, numpy, Python and agl-bench that a stranger's code may replace for everybody."""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

MODULES = (
    *("builtins", "gc", "math", "os", "random", "signal", "sys", "threading", "time", "warnings"),
    *("numpy", "numpy.linalg", "numpy.random"),
    *("torch", "torch.autograd", "torch.func", "torch.linalg", "torch.nn", "torch.nn.functional", "torch.nn.init"),
    *("torch.nn.modules.module", "torch.nn.utils", "torch.optim", "torch.optim.optimizer", "torch.random"),
)
OURS = ("agl_bench", "agl_bench_plugins")
WITH_CLASSES = ("torch", "torch.autograd", "torch.nn", "torch.optim", *OURS)  # whose classes are looked into
CODE = (property, classmethod, staticmethod)
FOLLOWING = ("torch.Storage",)  # the default type
WRAPPERS = ("torch/optim/optimizer.py", "torch/_compile.py")  # where torch wraps functions of its own


class Patches:
    """What the names of those modules and classes stand for, remembered, so that it can be put back."""

    def __init__(self) -> None:
        self._owners = _owners(len(sys.modules))
        self._before = [dict(_names(owner)) for _, owner in self._owners]
        self._modules = dict(sys.modules)
        self._libraries: set[str] = set()

    def undo(self, is_import: bool = False) -> list[str]:
        """Put everything back; names of what was replaced.

        A library that is imported may replace modules of others, and one that was imported by the way has its reasons
        to replace a name by a function of its own.
        """
        found = []
        self._libraries = set() if is_import else {n.partition(".")[0] for n in set(sys.modules) - set(self._modules)}
        for name, module in self._modules.items():
            is_theirs = is_import and name not in MODULES and name.partition(".")[0] not in OURS
            if sys.modules.get(name) is not module and not is_theirs:
                sys.modules[name] = module
                found.append(f"sys.modules['{name}']")
        for (label, owner), before in zip(self._owners, self._before, strict=True):
            if not _equal(_names(owner), before):
                found += [f"{label}.{name}" for name in self._put_back(owner, before, label)]
        return found

    def _put_back(self, owner: Any, before: Mapping[str, Any], label: str) -> Iterator[str]:
        """Put the names of one owner back, each of which is then yielded."""
        absent = object()
        for name in list({**before, **_names(owner)}):
            old, new = before.get(name, absent), _names(owner).get(name, absent)
            is_lazy = old is absent and isinstance(owner, ModuleType) and owner is not builtins
            is_lazy = is_lazy or f"{label}.{name}" in FOLLOWING
            if old is new or is_lazy or not (_is_code(old) or _is_code(new)) or self._is_of_a_library(old, new):
                continue
            if isinstance(owner, dict):
                owner[name] = old
                if old is absent:
                    del owner[name]
            elif old is absent:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
            yield name

    def _is_of_a_library(self, old: Any, new: Any) -> bool:
        """Whether torch has wrapped a function of its own, as it does with `step` when the first optimiser is made and
        with `manual_seed` when its compiler is imported, or whether what is new belongs to a library that was not there
        before.
        """
        file = getattr(getattr(new, "__code__", None), "co_filename", "")
        if getattr(new, "__wrapped__", None) is old and file.endswith(WRAPPERS):
            return True
        root = str(getattr(new, "__module__", "")).partition(".")[0]
        return root in self._libraries and root not in self._modules


@functools.lru_cache(maxsize=1)
def _owners(_: int) -> list[tuple[str, Any]]:
    """Modules, the classes in them and tables of ours, each once, with the name to call it by; anew for new modules."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in list(sys.modules.items()):
        is_ours = name.partition(".")[0] in OURS
        if not isinstance(module, ModuleType) or not (is_ours or name in MODULES):
            continue
        found.setdefault(id(module), (name, module))
        if not (is_ours or name in WITH_CLASSES):
            continue
        for label, value in list(vars(module).items()):
            is_class = isinstance(value, type) and value.__module__.partition(".")[0] in ("torch", *OURS)
            if is_class or (is_ours and label.isupper() and isinstance(value, dict)):
                found.setdefault(id(value), (f"{name}.{label}", value))
    return list(found.values())


def _names(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _equal(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether all values are the same objects; False where that cannot be told at once."""
    try:
        return bool(now == before)
    except Exception:  # noqa: BLE001  (an array among them was replaced; the caller looks at one after the other)
        return False


def _is_code(value: Any) -> bool:
    return isinstance(value, CODE) or callable(value)
