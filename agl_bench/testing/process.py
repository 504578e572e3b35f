"""Whether a plug-in leaves the process as it is: a rule of every door."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from agl_bench.registry.watch import watched
from agl_bench.testing.verdicts import listed


def leaves_the_process(uses: Iterable[Callable[[], object]]) -> None:
    """Raises `AssertionError` where a use of a plug-in changes a setting of the process or replaces a function.

    Random states are the matter of a rule of their own, and so is it that a use fails.
    """
    for use in uses:
        with watched(is_import=False) as seen, contextlib.suppress(Exception):
            use()
        changed = [name for name in seen.changed if "random" not in name]
        assert not changed, f"`{use.__name__}` changes {listed(changed)}, which affects everything that runs afterwards"
