"""What the plug-ins of a cell do to the process: seen, undone, and named in the sentence that the cell fails with."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from agl_bench.bench.spec import RunSpec
from agl_bench.errors import BadPlugin
from agl_bench.registry.patches import Patches
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.watch import watched


class Guard:
    """Watches the plug-ins of cells, one cell after the other.

    Attributes:
        remarks: sentences about what is harmless and yet not as it should be, until somebody has been told.
    """

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self.remarks: list[str] = []
        self._known: set[str] = set()  # those that have been made

    @contextlib.contextmanager
    def watching(self, who: str, *, patches: bool = True) -> Iterator[None]:
        """Whoever changes settings of the process in here fails, and they are put back.

        Args:
            who: whose code runs inside, e.g. "selector 'mine'".
            patches: whether replaced functions are looked for as well, which takes milliseconds; see `unpatched`.

        Raises:
            BadPlugin: naming what was changed, whatever else has gone wrong for it.
        """
        failure: BaseException | None = None
        try:
            with watched(is_import=False, patches=patches) as seen:
                yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._judge(who, seen.changed, failure)
            self._note(who, seen.printed, seen.harmless)

    @contextlib.contextmanager
    def unpatched(self, who: str) -> Iterator[None]:
        """Whoever replaces functions of torch, Python or agl-bench in here fails, and they are put back."""
        names, failure = Patches(), None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._judge(who, names.undo(), failure)

    def trainees(self, spec: RunSpec) -> str:
        """Who takes part in a training: a stranger alone, where one of both is agl-bench's own."""
        both = {"selector": spec.selector.name, "backbone": spec.backbone.name}
        strange = [(kind, name) for kind, name in both.items() if not self.plugins.entry(name, kind).is_own]
        return " or ".join(f"{kind} '{name}'" for kind, name in strange or both.items())

    def _judge(self, who: str, changed: list[str], failure: BaseException | None) -> None:
        if changed and (failure is None or isinstance(failure, Exception)):
            raise BadPlugin(
                f"{who} changes {', '.join(changed)}, which affects everything that runs afterwards; leave it unchanged"
            ) from failure

    def _note(self, who: str, printed: str, harmless: list[str]) -> None:
        sys.stderr.write(printed)
        made = []
        if first := printed.strip().partition("\n")[0][:60]:
            made.append(f"{who} prints to standard output ('{first}'); the text was sent to standard error")
        if harmless:
            made.append(f"{who} changes {', '.join(harmless)}; the change was undone")
        self.remarks += [remark for remark in made if remark not in self._known]
        self._known.update(made)


class Unguarded(Guard):
    """Lets everything be, where what a plug-in does and what torch does itself cannot be told apart."""

    @contextlib.contextmanager
    def watching(self, who: str, *, patches: bool = True) -> Iterator[None]:
        """Nothing is watched, and nothing put back."""
        yield

    @contextlib.contextmanager
    def unpatched(self, who: str) -> Iterator[None]:
        """Likewise."""
        yield
