"""Whether a cell can run here, and why not: the one home of what capability flags mean.

A cell whose combination of plug-ins cannot run is skipped: no result and no failure, but shown with its reason wherever
cells are shown. Every run decides anew. What is noted of skips in the work folder serves those who only look, and gives
way to any cell that was asked for in the same words, e.g. one of another machine, which has a GPU.

    skipped/<digest of what was asked for>.json
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agl_bench.bench.checkpoints import replace_text
from agl_bench.bench.spec import RunSpec, asked_for, make_dataset
from agl_bench.digests import Damaged, read_object
from agl_bench.errors import AglBenchError, CannotRun
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.selector import Selector
from agl_bench.maths.hypergradient import FiniteDifference
from agl_bench.registry.plugins import Plugins


@dataclass(frozen=True)
class Skipped:
    """A cell that cannot run here."""

    spec: RunSpec
    reason: str

    @property
    def line(self) -> str:
        """Which line of the grid it is of, for people."""
        return self.spec.title.partition(" · fold ")[0]


def unfit(spec: RunSpec, plugins: Plugins) -> str:
    """Why a cell cannot run, as far as the classes of its plug-ins tell; "" if nothing speaks against it.

    What they do not tell, because it depends on the genes of a fold or on an instance, `check_genes` and `check_built`
    find out.
    """
    selector, backbone = _classes(spec, plugins)
    for kind, part, cls in (("selector", spec.selector, selector), ("backbone", spec.backbone, backbone)):
        if getattr(cls, "needs_gpu", Selector.needs_gpu) and spec.device != "cuda":
            return f"{kind} '{part.name}' needs a CUDA device, and this run is on the {spec.device}"
    if getattr(selector, "needs_second_order", Selector.needs_second_order):
        if not getattr(backbone, "second_order", Backbone.second_order):
            return _no_second_order(spec)
        if spec.protocol.compile:
            return _compiled(spec)
    if getattr(selector, "needs_counts", Selector.needs_counts) and not make_dataset(plugins, spec.dataset).has_counts:
        return f"selector '{spec.selector.name}' needs raw counts, and dataset '{spec.dataset.label}' has none"
    return ""


def check_genes(spec: RunSpec, genes: int, plugins: Plugins) -> None:
    """Look at a cell whose fold is made.

    Args:
        spec: the cell.
        genes: of the fold, primary ones included.
        plugins: who provides which name.

    Raises:
        CannotRun: with the reason, also one of `unfit`.
    """
    if reason := unfit(spec, plugins):
        raise CannotRun(reason)
    most = getattr(_classes(spec, plugins)[0], "max_genes", Selector.max_genes)
    if most is not None and genes > most:
        raise CannotRun(
            f"selector '{spec.selector.name}' takes {most:,} genes at most, and there are {genes:,} "
            "(a larger protocol.min_spots_per_gene leaves fewer)"
        )


def check_built(spec: RunSpec, selector: Selector, backbone: Backbone) -> None:
    """Look at a cell whose selector and backbone are built.

    Raises:
        CannotRun: if the selector differentiates twice what the backbone or the protocol does not allow to.
    """
    learns = selector.learns_from == "validation" and any(p.requires_grad for p in selector.parameters())
    looks_ahead = learns and not isinstance(selector.hypergradient, FiniteDifference)
    if (looks_ahead or selector.needs_second_order) and not backbone.second_order:
        raise CannotRun(_no_second_order(spec))
    if selector.needs_second_order and spec.protocol.compile:
        raise CannotRun(_compiled(spec))


def note(work: Path, skipped: Skipped) -> None:
    """Keep that a cell was skipped, for those who look at the work folder."""
    folder = _folder(work)
    folder.mkdir(exist_ok=True)
    spec = skipped.spec.as_json()
    replace_text(folder / f"{asked_for(spec)}.json", json.dumps({"spec": spec, "reason": skipped.reason}))


def forget(work: Path, specs: Iterable[RunSpec]) -> None:
    """These cells are about to run."""
    if any(_folder(work).glob("[!.]*.json")):
        for spec in specs:
            (_folder(work) / f"{asked_for(spec.as_json())}.json").unlink(missing_ok=True)


def adopt(work: Path, other: Path) -> None:
    """Keep what another work folder has noted, too; what is damaged stays there."""
    for path in _folder(other).glob("[!.]*.json"):
        if not (_folder(work) / path.name).exists():
            _folder(work).mkdir(exist_ok=True)
            with contextlib.suppress(OSError, Damaged):
                replace_text(_folder(work) / path.name, json.dumps(read_object(path)))


def noted(
    work: Path, cells: Iterable[Mapping[str, Any]], warn: Callable[[str], None] = lambda _: None
) -> list[Skipped]:
    """What was skipped, and was not run by anybody else.

    Args:
        work: the work folder.
        cells: specs, as JSON, of all cells that have begun, failed or are finished there.
        warn: told, in one sentence, what is damaged.
    """
    found: dict[str, Skipped] = {}
    for path in sorted(_folder(work).glob("[!.]*.json")):
        try:
            content = read_object(path)
            if asked_for(content["spec"]) != path.stem:
                raise Damaged(f"{path.name} belongs to another cell")
            found[path.stem] = Skipped(RunSpec.from_json(content["spec"]), str(content["reason"]))
        except (OSError, Damaged) as error:
            warn(
                f"{path}, the record of a skipped cell, is damaged ({error}) and ignored; the next run writes it again"
            )
        except (ValueError, KeyError, TypeError, AttributeError, AglBenchError):
            continue  # of another version
    if found:
        for spec in cells:
            found.pop(asked_for(spec), None)
    return list(found.values())


def known_unfit(specs: Iterable[RunSpec], plugins: Plugins, work: Path) -> dict[str, str]:
    """key -> why the cell cannot run, as the classes of its plug-ins tell or as an earlier run of this very cell found.

    What depends on the genes of a fold is not known before the first run.
    """
    before = {s.spec.key: s.reason for s in noted(work, ())}
    found = {spec.key: unfit(spec, plugins) or before.get(spec.key, "") for spec in specs}
    return {key: reason for key, reason in found.items() if reason}


def summed(skips: Iterable[Skipped]) -> list[str]:
    """A sentence for each line of the grid and each reason."""
    count = Counter((s.line, s.reason) for s in skips)
    return [f"{line}: {n} cell{'s' if n > 1 else ''} skipped: {reason}" for (line, reason), n in count.items()]


def as_json(skips: Iterable[Skipped]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {
            "key": s.spec.key,
            "dataset": s.spec.dataset.label,
            "evaluation": s.spec.evaluation,
            "backbone": s.spec.backbone.name,
            "selector": s.spec.selector.name,
            "tuning": s.spec.tuning.label if s.spec.tuning else "",
            "fold": s.spec.fold,
            "seed": s.spec.seed,
            "reason": s.reason,
        }
        for s in skips
    ]


def _classes(spec: RunSpec, plugins: Plugins) -> tuple[type, type]:
    return plugins.entry(spec.selector.name, "selector").load(), plugins.entry(spec.backbone.name, "backbone").load()


def _no_second_order(spec: RunSpec) -> str:
    return (
        f"selector '{spec.selector.name}' needs second derivatives, and backbone '{spec.backbone.name}' has none "
        "(second_order = False)"
    )


def _compiled(spec: RunSpec) -> str:
    return (
        f"selector '{spec.selector.name}' differentiates twice, which a compiled model cannot (protocol.compile = true)"
    )


def _folder(work: Path) -> Path:
    return work / "skipped"
