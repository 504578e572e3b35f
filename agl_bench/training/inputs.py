"""What a plug-in is given in a step, and whether it has left it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from agl_bench.errors import BadPlugin


@contextlib.contextmanager
def left_alone(who: str, **given: Tensor | None) -> Iterator[None]:
    """Nothing that is given inside may be changed in place; torch counts such changes, so that looking costs nothing.

    Raises:
        BadPlugin: naming `who` and what was changed.
    """
    before = {name: tensor._version for name, tensor in given.items() if tensor is not None}
    yield
    changed = [name for name, version in before.items() if given[name]._version != version]  # type: ignore[union-attr]
    if changed:
        raise BadPlugin(f"{who} changes {', '.join(changed)} in place; make new tensors instead")
