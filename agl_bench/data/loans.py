"""What a plug-in is shown of data that others share, and whether it has left it as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from agl_bench.maths.checksum import checksum


class Loans:
    """Tensors that the plug-ins of one cell are shown.

    Small ones are copies, so that nobody else is harmed; of large ones there is no second copy, and a checksum of their
    bits tells, whatever way they were changed.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[str, weakref.ref[Tensor], Tensor]] = []
        self._kept: list[Tensor] = []

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a small tensor, to be shown under this name."""
        self._kept.append(copied := tensor.clone())
        return self.lend(name, copied)

    def lend(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself, noted under this name; of a view all that lies behind it is looked at."""
        whole = tensor if tensor._base is None else tensor._base
        self._lent.append((name, weakref.ref(whole), checksum(whole)))
        return tensor

    def lending(self, name: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`make`, whose result is noted when somebody asks for it."""
        return lambda: self.lend(name, make())

    def changed(self) -> list[str]:
        """Names of those that are not what they were; waits for the device."""
        left = [(name, whole, before) for name, of, before in self._lent if (whole := of()) is not None]
        return [name for name, whole, before in left if not bool(checksum(whole) == before)]
