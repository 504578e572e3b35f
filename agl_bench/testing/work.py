"""How much a piece of code works, counted and not timed: operations of torch, and the memory that they fill.

Counts are the same on every machine and under every load.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result the host needs before it goes on: .item(), float(), bool() and if, nonzero, torch.equal.
WAITING = ("_local_scalar_dense", "nonzero", "equal")
ENDLESS = 20_000  # operations after which nobody waits any longer


class TooManyOperations(AssertionError):
    """More operations than anything needs that treats all genes at once."""


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside, backward passes included.

    Attributes:
        where: what runs, for sentences.
        operations: of torch.
        numbers: elements of all tensors that were made, views not counted.
        largest: elements of the largest of them.
        shape: of that one.
        waits: how often the host waits for a result.
        array_bytes: most that Python and numpy held at once of what was made, where `arrays` looked.
    """

    def __init__(self, where: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.operations = self.numbers = self.largest = self.waits = self.array_bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchDispatchMode`."""
        self.operations += 1
        self.waits += func.overloadpacket.__name__ in WAITING
        if self.operations > ENDLESS:
            raise TooManyOperations(f"it loops over genes in {self.where}: more than {ENDLESS:,} operations")
        result = func(*args, **(kwargs or {}))
        given = {0, *(_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _storage(made) not in given:
                self.numbers += made.numel()
                if made.numel() > self.largest:
                    self.largest, self.shape = made.numel(), tuple(made.shape)
        return result


@contextlib.contextmanager
def arrays(work: Work) -> Iterator[None]:
    """Count arrays of numpy too, which tell of their memory themselves; not where somebody else counts already."""
    if tracemalloc.is_tracing():
        yield
        return
    tracemalloc.start()
    try:
        yield
        work.array_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _storage(tensor: Tensor) -> int:
    """Where a tensor's numbers lie, 0 where it has none of its own."""
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return 0
    return tensor.untyped_storage().data_ptr()
