"""What a plug-in consists of at some moment, so that two moments can be compared, and what exceptions say."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from agl_bench.errors import AglBenchError

Bits = dict[str, bytes]  # of tensors, by name


def bits_of(module: nn.Module) -> Bits:
    """Parameters and buffers, those that are not kept included."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: t.detach().cpu().contiguous().numpy().tobytes() for n, t in tensors.items()}


def state_of(module: nn.Module) -> dict[str, object]:
    """All that a method could change: parameters, buffers, and attributes, its parts' too."""
    found: dict[str, object] = dict(bits_of(module))
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if not name.startswith("_") or name not in vars(nn.Module()):
                found[f"{path}.{name}" if path else name] = _image(value)
    return found


def _image(value: object) -> object:
    """What is left of a value that may change: equal if it has not."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, list | tuple | set):
        return type(value), tuple(_image(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _image(v)) for k, v in value.items())
    return value if isinstance(value, int | float | str | bytes | type(None)) else id(value)


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Names of what was there before and is not the same."""
    return [name for name, value in before.items() if after.get(name) != value]


def global_states() -> dict[str, object]:
    """The states of the generators that belong to nobody."""
    numbers = np.random.get_state()  # noqa: NPY002  (it is what is looked at)
    found: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr((numbers[0], numbers[1].tobytes(), *numbers[2:])),  # type: ignore[index]
        "Python's random": random.getstate(),
    }
    if torch.cuda.is_available():
        found["torch on CUDA"] = torch.cuda.get_rng_state().numpy().tobytes()
    return found


def stirred_states() -> dict[str, object]:
    """The same after draws, so that whoever seeds a generator with a number that people like changes it."""
    torch.rand(7)
    np.random.random(7)  # noqa: NPY002  (it is what is looked at)
    random.random()
    return global_states()


def said(error: BaseException) -> str:
    """What an exception says, one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AglBenchError) else f"{type(error).__name__}: {text}"
