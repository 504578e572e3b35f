"""Whether all of a module moves with `.to`, as far as a machine without a GPU can tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEPTH = 3  # of lists and dicts that are looked into
OWN = ("_parameters", "_buffers", "_modules", "used")  # what `.to` moves, and a mask that never leaves the host


def left_behind(part: nn.Module) -> list[str]:
    """Names of attributes that hold tensors which `.to` does not move, also in lists, tuples and dicts."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in part.named_modules()
        for name, value in vars(module).items()
        if name not in OWN and next(_tensors(value, DEPTH), None) is not None
    ]


def _tensors(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, depth - 1)


class OneType(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, where all state and all inputs are float64, no operation may meet a float32 tensor as well."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchDispatchMode`."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        types_here = {t.dtype for t in tensors if t.ndim}
        name = func.overloadpacket.__name__
        assert name in ("copy_", "_to_copy") or not types_here >= {torch.float32, torch.float64}, (
            f"after .double(), `{name}` still meets a float32 tensor: it is made anew without the type and device "
            "of the losses, or kept where .to(…) does not reach it"
        )
        result = func(*args, **(kwargs or {}))
        # What is computed from masks, from whole numbers or by .float() lies where they lie: no stranger.
        follows = types_here and torch.float32 not in types_here
        return result.double() if follows and isinstance(result, Tensor) and result.dtype == torch.float32 else result
