"""What the command line shows: progress, tables and cards."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench.addresses import masked

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    import pandas as pd
    from rich.console import Console
    from rich.text import Text

    from agl_bench.bench.audit import Finding
    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.controls import Control
    from agl_bench.bench.fitness import Skipped
    from agl_bench.bench.merge import Outcome, Plan
    from agl_bench.bench.plan import Estimate
    from agl_bench.bench.recorder import Recorder
    from agl_bench.bench.rerun import Comparison
    from agl_bench.bench.result import Result
    from agl_bench.bench.run import Event, Failed, Stopped
    from agl_bench.bench.spec import Campaign
    from agl_bench.bench.table import Summary
    from agl_bench.bench.tune import StudyDone
    from agl_bench.comparison.reproduce import Grid
    from agl_bench.registry.plugins import Plugins
    from agl_bench.testing import Verdict


_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def make_console() -> Console:
    """A console on standard output. It shows texts as they are: what has a style of its own is a rich `Text`."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with status 1
            raise BrokenPipeError

    # A pipe or a log has no width of its own: do not fold tables there. Names and paths may hold [/b] or :cat:.
    return Terminal(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False, emoji=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """A line of parts; those with a style are (text, style)."""
    from rich.text import Text

    return Text.assemble(*parts)


def show_study_end(done: StudyDone, console: Console) -> None:
    """The outcome of a study: the best settings, and how much each mattered."""
    from rich.table import Table

    entry = done.entry
    table = Table(
        title=f"{done.study.title}: validation PCC {entry.validation_pcc:.4f}, best of {entry.points} trials"
        + (f", {entry.pruned} of them pruned" if entry.pruned else ""),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("setting")
    for column in ("fixed", "tuned", "importance"):
        table.add_column(column, justify="right")
    for name, value in entry.settings.items():
        share = done.importances.get(name)
        fixed, tuned = (
            "–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
            for v in (done.study.start.get(name), value)
        )
        table.add_row(name, fixed, tuned, "–" if share is None else f"{share:.2f}")
    if entry.settings:
        console.print("", table)


def follow(
    events: Any, total: int, console: Console
) -> tuple[list[Result], list[Failed], list[Stopped], list[Skipped]]:
    """Show events as they come: two bars on a terminal, plain lines elsewhere."""
    from agl_bench.bench.fitness import Skipped
    from agl_bench.bench.run import Failed, Finished, Stopped

    results: list[Result] = []
    failures: list[Failed] = []
    stopped: list[Stopped] = []
    skips: list[Skipped] = []
    show = _Bars(total, console) if console.is_terminal else _Lines(total)
    with show:
        for event in events:
            if isinstance(event, Finished):
                results.append(event.result)
            elif isinstance(event, Failed):
                failures.append(event)
            elif isinstance(event, Stopped):
                stopped.append(event)
            elif isinstance(event, Skipped):
                skips.append(event)
            show.take(event)
    return results, failures, stopped, skips


class _Lines:
    """One plain line for each cell."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.kept = total, 0, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.kept:
            click.echo(f"{self.kept} {'cell was' if self.kept == 1 else 'cells were'} finished before and kept")

    def take(self, event: Event) -> None:
        """Print what is worth a line."""
        from agl_bench.bench.run import Finished

        if isinstance(event, Finished) and event.kept:
            self.number += 1
            self.kept += 1
            return
        text, is_end = _line(event)
        self.number += is_end
        if text:
            click.echo(f"[{self.number}/{self.total}] {text}" if is_end else text)


class _Bars:
    """A bar for the grid and one for the epochs of the cell at hand."""

    def __init__(self, total: int, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.grid = self.progress.add_task("cells", total=total)
        self.cell = self.progress.add_task("epochs", total=None, visible=False)

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.update(self.cell, visible=False)
        self.progress.stop()

    def take(self, event: Event) -> None:
        """Move the bars."""
        from agl_bench.bench.run import EpochDone, Failed, Finished, Started

        if isinstance(event, Started):
            self.progress.reset(self.cell, total=event.spec.protocol.epochs, description=event.spec.title, visible=True)
        elif isinstance(event, EpochDone):
            self.progress.advance(self.cell)
        text, is_end = _line(event)
        if is_end:
            self.progress.advance(self.grid)
        if text and not (isinstance(event, Finished) and event.kept):
            style = "red" if isinstance(event, Failed) else None
            self.progress.console.print(text, style=style)


def _line(event: Event) -> tuple[str, bool]:
    """What an event is worth to say, "" if nothing, and whether a cell has ended with it."""
    from agl_bench.bench.fitness import Skipped
    from agl_bench.bench.run import Failed, Finished, Noted, Stopped, Waiting

    if isinstance(event, Finished):
        return _outcome(event.result), True
    if isinstance(event, Skipped):
        return f"{event.spec.title}: SKIPPED, {event.reason}", True
    if isinstance(event, Failed):
        how = f"{event.status} before and not tried again" if event.kept else event.status.upper()
        return f"{event.spec.title}: {how}, {masked(event.sentence)}", True
    if isinstance(event, Stopped):
        return f"{event.spec.title}: INTERRUPTED, {event.why}", True
    if isinstance(event, Noted):
        return f"{event.spec.title}: {event.sentence}", False
    if isinstance(event, Waiting):
        by = ", ".join(f"process {o.pid} on {o.host}" for o in event.holders) or "other processes"
        return f"waiting for {event.cells} cells that others work on: {by}", False
    return "", False


def _outcome(result: Result) -> str:
    return (
        f"{result.spec.title}: PCC {result.pcc:.3f}, best epoch {result.best_epoch} of {len(result.epochs)}, "
        f"k {result.epochs['selected'].iloc[result.best_epoch]}, {result.cost['seconds']:.1f} s"
    )


def show_plugins(plugins: Plugins, kinds: Sequence[str], console: Console) -> None:
    """What is installed, one table for each kind, and what is wrong with plug-ins."""
    from rich.table import Table
    from rich.text import Text

    from agl_bench.registry import stated

    for kind in kinds:
        entries = [plugins.entry(name) for name in plugins.names(kind)]
        flags = [", ".join(stated.words(kind, entry.stated)) for entry in entries]
        table = Table(title=f"{kind}s", title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it is, and where it is from", overflow="fold", ratio=1)
        if any(flags):
            table.add_column("flags", max_width=18)
        table.add_column("provided by", overflow="fold", max_width=24)
        for entry, said in zip(entries, flags, strict=True):
            what = Text(entry.summary)
            if origin := entry.stated.get(stated.SAYS[kind]):
                what.append(f"\n{origin}", style="dim")
            table.add_row(entry.name, what, *([said or "–"] if any(flags) else []), entry.provider)
        console.print(table, "")
    if plugins.broken:
        console.print("disabled", style="bold red")
    for broken in plugins.broken:
        console.print(f"{broken.provider}: {broken.reason}")
    if plugins.remarks:
        console.print("works, but", style="bold yellow")
    for remark in plugins.remarks:
        console.print(f"{remark.provider} {remark.sentence}")


def show_card(card: dict[str, Any], sections: list[dict[str, Any]]) -> None:
    """A dataset and its sections."""
    from rich.table import Table

    console = make_console()
    console.print(styled((card["dataset"], "bold"), f"  dataset of {card['provider']}"))
    for word in ("technology", "tissue", "citation", "licence", "revision", "fingerprint"):
        if card[word]:
            console.print(f"  {word}: {card[word]}")
    table = Table(box=None, pad_edge=False)
    for column in ("section", "donor"):
        table.add_column(column)
    for column in ("spots", "dropped", "genes", "µm / px", "pitch µm", "spot µm", "median UMI", "sparsity"):
        table.add_column(column, justify="right")
    table.add_column("to see")
    for line in sections:
        table.add_row(
            line["section"], line["donor"] or "–", f"{line['spots']:,}", f"{line['dropped_spots']:,}",
            f"{line['genes']:,}", f"{line['um_per_px']:.4g}", *(
                "–" if line[length] is None else f"{line[length]:.0f}" for length in ("pitch_um", "spot_um")
            ), f"{line['median_umi']:,.0f}", f"{line['sparsity']:.2f}", ", ".join(line["sees"]),
        )  # fmt: skip
    console.print("", table)
    facts = [(line["section"], "; ".join(f"{k}: {v}" for k, v in line["facts"].items())) for line in sections]
    for section, text in facts:
        if text:
            console.print(f"{section}  {text}")
    for line in sections:
        for caution in line["cautions"]:
            console.print(f"{line['section']}: {caution}.")


def show_table(
    results: list[Result],
    campaign: Campaign,
    console: Console,
    controls: Sequence[Control],
    bounds: frozenset[str],
    notes: Sequence[str],
    skips: Sequence[Skipped],
) -> None:
    """Selectors × datasets, one table for each evaluation and backbone, with what bounds it below it.

    Fixed and tuned settings have tables of their own.

    Args:
        results: of the cells that were asked for.
        campaign: what was asked for.
        console: where to.
        controls: of all tables.
        bounds: selectors that are controls: marked, and never best.
        notes: on results outside their controls.
        skips: cells of the table, and of its controls, that could not run; a mark stands where they are missing.
    """
    import statistics

    from rich.table import Table

    from agl_bench.bench.fold_report import fold_line
    from agl_bench.bench.table import BASELINE, FEW_SEEDS, spread, summarise

    summaries = summarise(results)
    points = {
        (r.spec.selector.name, r.spec.tuning.label): r.spec.tuning.points
        for r in results
        if r.spec.tuning and r.spec.tuning.points < r.spec.tuning.trials
    }
    reasons = list(dict.fromkeys(s.reason for s in skips))
    absent: dict[tuple[str, str, str], dict[tuple[str, str], list[Skipped]]] = {}
    for skip in skips:
        spec = skip.spec
        place = (spec.evaluation, spec.backbone.name, spec.tuning.label if spec.tuning else "")
        absent.setdefault(place, {}).setdefault((spec.dataset.label, spec.selector.name), []).append(skip)

    def marked(word: str, lost: Sequence[Skipped]) -> str:
        numbers = sorted({reasons.index(s.reason) + 1 for s in lost})
        return word + ",".join(str(n) for n in numbers).translate(_SUPERSCRIPTS)

    any_tuned = any(s.tuning for s in summaries)
    places = dict.fromkeys([*((s.evaluation, s.backbone, s.tuning) for s in summaries), *absent])
    for evaluation, backbone, tuning in places:
        here = [s for s in summaries if (s.evaluation, s.backbone, s.tuning) == (evaluation, backbone, tuning)]
        lost = absent.get((evaluation, backbone, tuning), {})
        budget = f" · {tuning or 'fixed settings'}" if any_tuned else ""
        best: dict[str, float | None] = {}
        for dataset in dict.fromkeys([*(s.dataset for s in here), *(dataset for dataset, _ in lost)]):
            lines = [s for s in here if s.dataset == dataset and s.selector not in bounds]
            comparable = len({frozenset(s.units) for s in lines}) == 1  # means over different folds have no best
            best[dataset] = max(statistics.fmean(s.pcc) for s in lines) if comparable else None
        table = Table(
            title=f"{evaluation}-batch · backbone {backbone} · preset {campaign.preset}{budget}",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("selector", no_wrap=True)
        for dataset in best:
            heading = f"{dataset}, {tuning}" if tuning else dataset
            table.add_column(f"{heading}\nPCC mean ± sd", justify="right", no_wrap=True)
            table.add_column(f"\nΔ {BASELINE} ± sd", justify="right", no_wrap=True)
            table.add_column("\nk", justify="right", no_wrap=True)
            table.add_column("\ncells", justify="right", no_wrap=True)
        for selector in dict.fromkeys([*(s.selector for s in here), *(selector for _, selector in lost)]):
            row: list[str | Text] = [f"{selector} (control)" if selector in bounds else selector]
            if (selector, tuning) in points:  # its search space has no more
                tried = points[selector, tuning]
                row = [f"{selector} ({tried} point{'s' if tried > 1 else ''})"]
            for dataset in best:
                line = next((s for s in here if (s.dataset, s.selector) == (dataset, selector)), None)
                skipped = lost.get((dataset, selector), [])
                if line is None:
                    row += [marked("skipped", skipped) if skipped else "–", "–", "–", "–"]
                    continue
                mean = statistics.fmean(line.pcc)
                pcc = f"{mean:.3f}{_plus_minus(spread(line.pcc))}"
                difference = "–"
                if line.difference and selector != BASELINE:
                    difference = f"{statistics.fmean(line.difference):+.3f}{_plus_minus(spread(line.difference))}"
                    if len(line.difference) < len(line.pcc):
                        difference += f" ({len(line.difference)})"
                k = f"{statistics.fmean(line.selected):,.0f}"
                is_best = mean == best[dataset] and selector not in bounds
                number = str(len(line.pcc)) + (f", {marked(f'{len(skipped)} skipped', skipped)}" if skipped else "")
                row += [styled((pcc, "bold")) if is_best else pcc, difference, k, number]
            table.add_row(*row)
        below = {
            (c.dataset, c.name): c
            for c in controls
            if (c.evaluation, c.backbone) == (evaluation, backbone) and not tuning
        }
        if below:
            table.add_section()
            table.add_row("controls", style="dim")
        for name in dict.fromkeys(name for _, name in below):
            row = [name]
            for dataset in best:
                values = list(below[dataset, name].pcc.values()) if (dataset, name) in below else []
                pcc = f"{statistics.fmean(values):.3f}{_plus_minus(spread(values))}" if values else "–"
                row += [pcc, "–", "–", str(len(values)) if values else "–"]
            table.add_row(*row)
        console.print("", table)
        _show_against_truth(here, console)
        for dataset in best:
            folds = {}
            for result in results:
                place = (result.spec.dataset.label, result.spec.evaluation, result.spec.backbone.name)
                if place == (dataset, evaluation, backbone) and result.fold:
                    folds[result.spec.fold, result.spec.seed] = (result.counts, result.fold)
            if folds:
                console.print(f"{dataset}: {fold_line(list(folds.values()))}.")
    for reason in reasons:
        those = [s for s in skips if s.reason == reason]
        cells = f"{len(those)} cell{'s' if len(those) > 1 else ''}"
        console.print(f"{marked('', those)} {cells} skipped: {reason}.")
    for note in notes:
        console.print(f"note: {note}")
    seeds = len(campaign.seeds)
    console.print(
        f"PCC: mean over primary genes within a section, then over sections; sd over folds and seeds; "
        f"{seeds} seed{'s' if seeds > 1 else ''}; k: auxiliary genes with more than half the weight of a primary one.",
    )
    if seeds < FEW_SEEDS:
        console.print(
            f"Fewer than {FEW_SEEDS} seeds: no ranking can be concluded from this table (--seeds 0,1,2).",
        )


def _show_against_truth(summaries: list[Summary], console: Console) -> None:
    """On planted data: how each selection compares with the truth."""
    import statistics

    from rich.table import Table

    from agl_bench.bench.table import BOUND, spread

    for dataset in dict.fromkeys(s.dataset for s in summaries if s.against_truth):
        table = Table(title=f"{dataset}: selection against the planted truth", title_justify="left")
        lines = [s for s in summaries if s.dataset == dataset]
        table.add_column("selector", no_wrap=True)
        for name in ("precision", "recall", "k − k*"):
            table.add_column(name, justify="right", no_wrap=True)
        has_regret = any(line.regret for line in lines)  # where the bound ran
        if has_regret:
            table.add_column(f"regret to {BOUND} ± sd", justify="right", no_wrap=True)
        for line in lines:
            row = [line.selector]
            for name, form in (("precision", ".2f"), ("recall", ".2f"), ("k_minus_planted", "+,.0f")):
                score = line.against_truth.get(f"selection_{name}")
                row.append("–" if score is None else f"{score:{form}}")
            regret = f"{statistics.fmean(line.regret):+.3f}{_plus_minus(spread(line.regret))}" if line.regret else "–"
            table.add_row(*row, *([regret] if has_regret else []))
        console.print(table)


def show_comparison(pairs: pd.DataFrame, a: str, b: str, console: Console) -> None:
    """A − B, one line for each place, from `comparison.duel`."""
    from rich.table import Table

    from agl_bench.comparison.statistics import TOO_FEW
    from agl_bench.comparison.tables import interval, number, p_text

    table = Table(title=f"{a} − {b}", title_justify="left", title_style="bold")
    shared = [c for c in ("dataset", "evaluation", "backbone", "preset", "tuning", "selector") if c in pairs]
    telling = [c for c in shared if c in ("dataset", "evaluation", "selector") or pairs[c].nunique() > 1]
    for column in telling:
        table.add_column(column)
    for column in ("difference", "95 % interval", "p", "effect", "P(A > B)", "units", "folds", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("A is", no_wrap=True)
    for row in pairs.to_dict("records"):
        table.add_row(
            *(str(row[c]) or "fixed settings" for c in telling), number(row["difference"], "+.3f").text,
            interval(row["low"], row["high"]).text, p_text(row["p"]), number(row["effect"], ".2f").text,
            number(row["superiority"], ".2f").text, *(f"{row[c]:,}" for c in ("units", "folds", "seeds")),
            row["verdict"],
        )  # fmt: skip
    console.print(table)
    alike = " · ".join(f"{c} {pairs[c].iloc[0] or 'fixed settings'}" for c in shared if c not in telling)
    console.print(
        f"{alike}. Difference of test PCC, mean over units: tested sections (intra-batch) or folds (inter-batch); "
        "hierarchical bootstrap; sign-flip test over units.",
    )  # fmt: skip
    few = pairs[pairs["verdict"] == TOO_FEW]
    if len(few):
        least = few["least_p"].max()
        console.print(
            f"Too few units (units: {few['units'].min()}, seeds: {few['seeds'].min()}): no p can fall below "
            f"{least:.3g}, or the luck of seeds stays open, so that nothing is concluded.",
        )  # fmt: skip


def show_findings(findings: Sequence[Finding], preset: str, console: Console) -> None:
    """Stages × sets of spots, one table for each fold, and what is declared."""
    from rich.table import Table

    from agl_bench.bench.audit import SETS

    words: dict[str, str | Text] = {
        "same": "same",
        "meant": "changed, as meant",
        "declared": styled(("CHANGED, declared", "yellow")),
        "LEAK": styled(("CHANGED: LEAK", "bold red")),
        "BLIND": styled(("same: the audit is blind", "bold red")),
    }
    for place in dict.fromkeys((f.dataset, f.evaluation, f.backbone, f.fold) for f in findings):
        dataset, evaluation, backbone, fold = place
        table = Table(
            title=f"{dataset} · {evaluation}-batch · fold {fold} · backbone {backbone} · preset {preset}",
            title_justify="left",
            title_style="bold",
        )
        for column in ("selector", "stage", *(f"other {spots} expression" for spots in SETS)):
            table.add_column(column, no_wrap=True)
        here = [f for f in findings if (f.dataset, f.evaluation, f.backbone, f.fold) == place]
        for selector in dict.fromkeys(f.selector for f in here):
            table.add_section()
            name = selector or "(all)"
            for finding in (f for f in here if f.selector == selector):
                table.add_row(name, finding.stage, *(words[finding.verdict[spots]] for spots in SETS))
                name = ""
        console.print("", table)
    for reason in dict.fromkeys(reason for f in findings for reason in f.reasons):
        console.print(reason)
    bad = [f for f in findings if f.is_bad]
    for finding in bad:
        where = f"{finding.dataset}, {finding.evaluation}-batch, fold {finding.fold}"
        spots = ", ".join(s for s, verdict in finding.verdict.items() if verdict in ("LEAK", "BLIND"))
        console.print(f"{where}: {finding.selector or 'all selectors'}: {finding.stage} ({spots})")
    end = f"{len(bad)} stages leak or could not be audited." if bad else ""
    console.print(end or "Nothing leaks that the protocol does not declare.")


def show_verdict(verdict: Verdict, console: Console, before: Verdict | None = None) -> None:
    """A rule, green, red or yellow; if it is not kept, why, unless that was just said, and where it is explained."""
    marks = {"kept": ("ok   ", "green"), "broken": ("FAIL ", "bold red"), "known": ("known", "yellow")}
    console.print(styled("  ", marks.get(verdict.outcome, ("skip ", "yellow")), " "), end="")

    def say(line: str, style: str = "") -> None:
        console.print(line, soft_wrap=True, style=style)

    say(verdict.rule)
    if verdict.reason:
        say("        likewise" if before and before.reason == verdict.reason else f"        {verdict.reason}")
    if verdict.outcome == "broken":
        say(f"        {verdict.docs}, once more with --rule {verdict.name}", style="dim")


def show_verdict_counts(verdicts: Sequence[Verdict], console: Console) -> None:
    """How many rules are kept, and how many are not."""
    words = {"kept": "kept", "broken": "broken", "known": "known to be broken", "skipped": "skipped"}
    counts = {word: sum(v.outcome == outcome for v in verdicts) for outcome, word in words.items()}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n or word in ("kept", "broken"))
    style = "bold red" if counts["broken"] else "bold green"
    console.print(f"{len(verdicts)} rule{'s' * (len(verdicts) != 1)}: {told}", style=style)


def show_target(grid: Grid, plugins: Plugins, console: Console) -> None:
    """What is about to be reproduced, under which conditions, and at what cost."""
    target = grid.target
    console.print(styled((target.title, "bold"), f" ({target.source})"))
    changed = f" with {', '.join(grid.assignments)}" if grid.assignments else ""
    for preset, backbone, device in dict.fromkeys(
        (s.preset.partition(" with ")[0], s.backbone.name, s.device) for s, _ in grid.cells
    ):
        console.print(f"preset {preset}{changed} · backbone {backbone} · {device}")
    if target.is_elsewhere:
        console.print("The paper has no numbers for these data: its columns show –.")
    else:
        console.print(
            f"The whole of {target.name} takes some {target.gpu_hours:,g} h on one GPU: a rough estimate, see "
            "benchmarks/reproduce.md.",
        )
    for row in target.absent(plugins):
        console.print(f"{row.name}: selector '{row.selector}' is not installed, so this row is left out.")


def show_planned(grid: Grid, store: CellStore | None, console: Console) -> None:
    """The lines of a grid, and how many of their cells are finished."""
    total = done = 0
    for column in grid.target.columns:
        for row in grid.target.rows:
            keys = grid.keys(column, row)
            if keys:
                finished = sum(store is not None and store.read(key) is not None for key in keys)
                name = f"{column.name} · {row.name}" + (f" · {row.preset}" if row.preset else "")
                console.print(f"{name}: {len(keys)} cells, {finished} finished")
                total, done = total + len(keys), done + finished
    console.print(f"{total} cells, {done} finished, {total - done} to run")


def show_lines(grid: Grid, table: pd.DataFrame, console: Console) -> None:
    """Paper's number, ours and the difference: one table for each column of the paper's."""
    from rich.table import Table

    from agl_bench.bench.table import BASELINE

    few = False
    for column in grid.target.columns:
        here = table[table["column"] == column.name]
        shown = Table(title=column.name, title_justify="left", title_style="bold")
        presets = here["preset"].nunique() > 1
        has_gain, has_k = here["gain"].notna().any(), here["paper_selected"].notna().any()
        gains = (f"paper's Δ {BASELINE}", f"our Δ {BASELINE} [95 %]") if has_gain else ()
        shown.add_column("method", no_wrap=True)
        for heading in (
            "paper's PCC ± sd", "ours [95 %]", "ours − paper's [95 %]", *gains, *(["paper's k"] if has_k else []),
            "our k", "cells",
        ):  # fmt: skip
            shown.add_column(heading, justify="right", no_wrap=True)
        for line in here.to_dict("records"):
            few = few or line["cells"] < line["expected"]
            row = [line["method"] + (f" ({line['preset']})" if presets else "")]
            row.append(
                _number(line["paper"], ".3f") + ("" if math.isnan(line["paper_sd"]) else f" ± {line['paper_sd']:.3f}")
            )
            row += [_interval(line, "pcc", ".3f"), _interval(line, "difference", "+.3f")]
            if has_gain:
                row += [_number(line["paper_gain"], "+.3f"), _interval(line, "gain", "+.3f")]
            row += [_number(line["paper_selected"], ",.0f")] if has_k else []
            done = str(line["cells"]) if line["cells"] == line["expected"] else f"{line['cells']} of {line['expected']}"
            shown.add_row(*row, _number(line["selected"], ",.0f"), done)
        console.print("", shown)
    console.print(
        "PCC: test PCC, mean over primary genes, then folds and seeds, then sections; [95 %]: bootstrap over "
        "sections and, within them, seeds, which deal new folds; of one section, over seeds alone. The paper's number "
        f"is taken as printed. Δ {BASELINE}: on the same folds and seeds.",
    )
    if few:
        console.print("Cells are missing: means over different folds are not comparable.")


def show_ends(table: pd.DataFrame, console: Console) -> None:
    """Where k and the validation PCC begin and end."""
    from rich.table import Table

    shown = Table(title="over outer iterations, mean over folds and seeds", title_justify="left", title_style="bold")
    for heading in ("column", "method", "preset"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("cells", "iterations", "k first", "k last", "of all", "PCC first", "best", "last"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for line in table.to_dict("records"):
        shown.add_row(
            line["column"], line["method"], line["preset"] or "–", str(line["cells"]), f"{line['iterations']:,.0f}",
            f"{line['first']:,.0f}", f"{line['last']:,.0f}", f"{line['last_share']:.1%}",
            *(f"{line[name]:.3f}" for name in ("first_pcc", "best_pcc", "last_pcc")),
        )  # fmt: skip
    console.print("", shown)
    console.print("PCC here is the validation PCC.")


def show_genes(grid: Grid, genes: pd.DataFrame, table: pd.DataFrame, console: Console, most: int = 10) -> None:
    """Genes that one method takes and the others do not, and those that the paper names."""
    from rich.table import Table

    for column in grid.target.columns:
        shown = Table(title=f"{column.name}: genes that one takes", title_justify="left", title_style="bold")
        for heading in ("method", "gene"):
            shown.add_column(heading, no_wrap=True)
        for heading in ("takes it in", "another in", "weight ahead by"):
            shown.add_column(heading, justify="right", no_wrap=True)
        here = table[table["column"] == column.name]
        for method, lines in here.groupby("method", sort=False):
            shown.add_section()
            for line in lines.head(most).itertuples():
                shown.add_row(
                    method, line.gene, f"{line.taken:.0%} of cells", f"{line.others:.0%}", f"{line.margin:+.2f}"
                )
            if len(lines) > most:
                shown.add_row(method, f"… and {len(lines) - most:,} more", "", "", "")
        console.print("", shown)
        if grid.target.is_elsewhere:
            continue
        for row in grid.target.rows:
            for gene in row.genes:
                found = genes[(genes["column"] == column.name) & (genes["gene"] == gene)]
                ours = ", ".join(f"{f.method} takes it in {f.taken:.0%} of {f.cells} cells" for f in found.itertuples())
                sentence = f"{gene}: the paper says {row.name} only; here {ours or 'it is no auxiliary gene'}."
                console.print(sentence)


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _interval(line: dict[str, Any], name: str, form: str) -> str:
    """A value with its interval, e.g. .514 [.498, .530]."""
    value, low, high = (line[n] for n in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return "–"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def show_export(file: Path, data: Any, console: Console) -> None:
    """What a file of one section holds, and how to draw it."""
    selectors = data.uns["agl_bench"]["selectors"]
    made = ", ".join(f"{name} ({len(known['cells'])} cells)" for name, known in selectors.items())
    primary = int(data.var["agl_primary"].sum())
    size = f"{data.n_obs:,} spots × {data.n_vars:,} genes, {primary} of them primary"
    console.print(f"{file}: {size}; {made}")
    if data.layers:
        layer = next(iter(data.layers))
        predicted = (data.layers[layer] == data.layers[layer]).sum(axis=0)  # the rest is NaN
        gene = data.var_names[predicted.argmax()]  # folds choose their own primary genes: few are predicted everywhere
        console.print(
            f'to see: sc.pl.embedding(sc.read_h5ad("{file}"), "spatial", color="{gene}", layer="{layer}")',
        )  # fmt: skip


def show_repetition(key: str, title: str, comparison: Comparison, console: Console) -> None:
    """How a cell that was made again differs from the kept one."""
    from rich.table import Table

    console.print(f"cell {key}: {title}")
    for sentence in comparison.conditions:
        console.print(f"other conditions: {sentence}")
    if not comparison.conditions:
        console.print("the conditions are the same")
    if comparison.is_identical:
        console.print("The result is the same bit for bit.")
        return
    for what, differences in (("test scores", comparison.scores), ("columns of the table of genes", comparison.genes)):
        if not differences:
            continue
        of_genes = differences is comparison.genes
        table = Table(title=f"{what} that differ", title_justify="left")
        table.add_column("column" if of_genes else "score", no_wrap=True)
        for column in ("before", "now", "difference"):
            table.add_column(column, justify="right", no_wrap=True)
        if of_genes:
            table.add_column("largest at", no_wrap=True)
            table.add_column("genes that differ", justify="right", no_wrap=True)
        for d in differences:
            row = [d.name, f"{d.before:.6g}", f"{d.after:.6g}", f"{d.after - d.before:+.3g}"]
            table.add_row(*row, *([d.gene, f"{d.genes:,}"] if of_genes else []))
        console.print("", table)
    for sentence in comparison.tables:
        console.print(sentence)
    console.print("The result is NOT the same.")


def _plus_minus(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.3f}"


def show_end(work: Path, tracking: str | None, recorder: Recorder, failures: list[Failed], console: Console) -> None:
    """What failed, and where the results are."""
    for failure in failures:
        where = f" (details: {failure.details})" if failure.details else ""
        click.echo(f"agl-bench: {failure.status}: {failure.spec.title}: {masked(failure.sentence)}{where}", err=True)
    if failures:
        click.echo("agl-bench: --retry-failed tries failed cells again", err=True)
    if recorder.dead:
        click.echo(f"agl-bench: MLflow is incomplete; `agl-bench sync --work {work}` brings it up to date", err=True)
    elif tracking != "none":
        console.print(f"Results: {work}/cells; in the browser: agl-bench ui --work {work}")


def show_merge(plan: Plan, outcome: Outcome, console: Console) -> None:
    """What came from which store, what was left out, and what to do next."""
    from rich.table import Table

    from agl_bench.bench.merge import WHAT

    table = Table(title=f"merged into {plan.work}", title_justify="left", title_style="bold")
    table.add_column("store", overflow="fold")
    for column in WHAT:
        table.add_column(column, justify="right", no_wrap=True)
    for work, count in outcome.counts.items():
        own = work == plan.work
        table.add_row(
            str(work), *("–" if own and name not in ("cells", "left out") else str(count[name] or "–") for name in WHAT)
        )
    console.print(table)
    for note in outcome.notes:
        click.echo(f"note: {note}")
    copied = sum(count["copied"] for count in outcome.counts.values())
    click.echo(
        f"{copied} finished cell{'s' if copied != 1 else ''} copied into {plan.work}; show them in MLflow: "
        f"agl-bench sync --work {plan.work}"
    )


def show_plan(found: Estimate, preset: str, console: Console, skips: Sequence[Skipped]) -> None:
    """What each line of a grid costs, all of them together, what that rests on, and what cannot run."""
    from rich.table import Table

    lines = found.lines
    table = Table(title=f"plan · preset {preset}", title_justify="left", title_style="bold")
    names = ["dataset", "evaluation", "backbone", "selector"]
    if any(line.place.settings != "fixed" for line in lines):
        names.append("settings")
    for name in names:
        table.add_column(name, no_wrap=True)
    failed = any(line.count["failed"] + line.count["diverged"] for line in lines)
    skipped = ["skipped"] if skips else []
    for name in (
        "cells", "done", *(["failed"] if failed else []), *skipped, "to do", "s per cell", "total", "peak MB"
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("judged by", overflow="fold")
    for line in lines:
        cost, count = line.cost, line.count
        numbers = [count.total(), count["done"], *([count["failed"] + count["diverged"]] if failed else [])]
        numbers += [*(count[name] for name in skipped), line.left]
        each, total, memory, basis = "–", "–", "–", ""
        if cost is not None:
            each = f"{cost.seconds:,.1f}" + (f" ({cost.low:,.1f}–{cost.high:,.1f})" if cost.low is not None else "")
            total, basis = duration(line.total("seconds") or 0.0), cost.basis
            memory = "–" if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:,.0f}"
        elif line.left:
            each, total, memory, basis = "unknown", "unknown", "unknown", "nothing alike has been run"
        words = (getattr(line.place, name) for name in names)
        table.add_row(*words, *(str(n or "–") for n in numbers), each, total, memory, basis)
    console.print(table)
    show_skips(skips)
    click.echo(_plan_line(found))
    if any(line.cost and line.cost.low is not None for line in lines):
        click.echo("s per cell: median (10–90 %) of the past cells; cells that have begun are counted whole.")


def show_skips(skips: Sequence[Skipped]) -> None:
    """A line for each line of the grid and each reason."""
    from agl_bench.bench.fitness import summed

    for sentence in summed(skips):
        click.echo(sentence)


def _plan_line(found: Estimate) -> str:
    """The grid in one sentence."""
    cells, left = (sum(n) for n in zip(*((line.count.total(), line.left) for line in found.lines), strict=True))
    text = f"{cells} cell{'s' if cells != 1 else ''}, {left} to do"
    known = left - found.unknown
    if known:
        span = f" ({duration(found.low)} to {duration(found.high)})" if found.high > found.low else ""
        who = f"{found.workers} workers that do not slow each other" if found.workers > 1 else "one worker"
        text += f": {'at least' if found.unknown else 'about'} {duration(found.elapsed)}{span} with {who}"
        if found.peak_memory_mb is not None:
            text += f", peak memory {found.peak_memory_mb:,.0f} MB" + (" each" if found.workers > 1 else "")
    if found.unknown:
        text += f"; {found.unknown} of unknown cost" + (", not counted" if known else ": run one of each line first")
    return f"{text}."


def duration(seconds: float) -> str:
    """For people: seconds below two minutes, else minutes, hours or days with the next smaller unit."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
