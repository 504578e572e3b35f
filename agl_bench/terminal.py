"""What the command line shows: progress, tables and cards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from rich.console import Console

    from agl_bench.bench.audit import Finding
    from agl_bench.bench.controls import Control
    from agl_bench.bench.recorder import Recorder
    from agl_bench.bench.rerun import Comparison
    from agl_bench.bench.result import Result
    from agl_bench.bench.run import Event, Failed, Stopped
    from agl_bench.bench.spec import Campaign
    from agl_bench.bench.table import Summary
    from agl_bench.bench.tune import StudyDone


def make_console() -> Console:
    """A console on standard output."""
    from rich.console import Console

    # A pipe or a log has no width of its own: do not fold tables there.
    return Console(width=None if sys.stdout.isatty() else 160)


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


def follow(events: Any, total: int, console: Console) -> tuple[list[Result], list[Failed], list[Stopped]]:
    """Show events as they come: two bars on a terminal, plain lines elsewhere."""
    from agl_bench.bench.run import Failed, Finished, Stopped

    results: list[Result] = []
    failures: list[Failed] = []
    stopped: list[Stopped] = []
    show = _Bars(total, console) if console.is_terminal else _Lines(total)
    with show:
        for event in events:
            if isinstance(event, Finished):
                results.append(event.result)
            elif isinstance(event, Failed):
                failures.append(event)
            elif isinstance(event, Stopped):
                stopped.append(event)
            show.take(event)
    return results, failures, stopped


class _Lines:
    """One plain line for each cell."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.kept = total, 0, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.kept:
            click.echo(f"{self.kept} cells were finished before and kept")

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
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
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
            self.progress.console.print(text, style=style, highlight=False, markup=False)


def _line(event: Event) -> tuple[str, bool]:
    """What an event is worth to say, "" if nothing, and whether a cell has ended with it."""
    from agl_bench.bench.run import Failed, Finished, Noted, Stopped, Waiting

    if isinstance(event, Finished):
        return _outcome(event.result), True
    if isinstance(event, Failed):
        how = f"{event.status} before and not tried again" if event.kept else event.status.upper()
        return f"{event.spec.title}: {how}, {event.sentence}", True
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


def show_card(card: dict[str, Any], sections: list[dict[str, Any]]) -> None:
    """A dataset and its sections."""
    from rich.table import Table

    console = make_console()
    console.print(f"[bold]{card['dataset']}[/]  dataset of {card['provider']}", highlight=False)
    for word in ("technology", "tissue", "citation", "licence", "revision", "fingerprint"):
        if card[word]:
            console.print(f"  {word}: {card[word]}", markup=False, highlight=False)
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
            console.print(f"{section}  {text}", markup=False, highlight=False)


def show_table(
    results: list[Result],
    campaign: Campaign,
    console: Console,
    controls: Sequence[Control],
    bounds: frozenset[str],
    notes: Sequence[str],
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
    any_tuned = any(s.tuning for s in summaries)
    for evaluation, backbone, tuning in dict.fromkeys((s.evaluation, s.backbone, s.tuning) for s in summaries):
        here = [s for s in summaries if (s.evaluation, s.backbone, s.tuning) == (evaluation, backbone, tuning)]
        budget = f" · {tuning or 'fixed settings'}" if any_tuned else ""
        best: dict[str, float | None] = {}
        for dataset in dict.fromkeys(s.dataset for s in here):
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
        for selector in dict.fromkeys(s.selector for s in here):
            row = [f"{selector} (control)" if selector in bounds else selector]
            if (selector, tuning) in points:  # its search space has no more
                number = points[selector, tuning]
                row = [f"{selector} ({number} point{'s' if number > 1 else ''})"]
            for dataset in best:
                line = next((s for s in here if (s.dataset, s.selector) == (dataset, selector)), None)
                if line is None:
                    row += ["–"] * 4
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
                row += [f"[bold]{pcc}[/]" if is_best else pcc, difference, k, str(len(line.pcc))]
            table.add_row(*row)
        below = {
            (c.dataset, c.name): c
            for c in controls
            if (c.evaluation, c.backbone) == (evaluation, backbone) and not tuning
        }
        if below:
            table.add_section()
            table.add_row("[dim]controls[/]")
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
                console.print(f"{dataset}: {fold_line(list(folds.values()))}.", markup=False, highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    seeds = len(campaign.seeds)
    console.print(
        f"PCC: mean over primary genes within a section, then over sections; sd over folds and seeds; "
        f"{seeds} seed{'s' if seeds > 1 else ''}; k: auxiliary genes with more than half the weight of a primary one.",
        highlight=False,
    )
    if seeds < FEW_SEEDS:
        console.print(
            f"Fewer than {FEW_SEEDS} seeds: no ranking can be concluded from this table (--seeds 0,1,2).",
            highlight=False,
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


def show_findings(findings: Sequence[Finding], preset: str, console: Console) -> None:
    """Stages × sets of spots, one table for each fold, and what is declared."""
    from rich.table import Table

    from agl_bench.bench.audit import SETS

    words = {
        "same": "same",
        "meant": "changed, as meant",
        "declared": "[yellow]CHANGED, declared[/]",
        "LEAK": "[bold red]CHANGED: LEAK[/]",
        "BLIND": "[bold red]same: the audit is blind[/]",
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
        console.print(reason, highlight=False, markup=False)
    bad = [f for f in findings if f.is_bad]
    for finding in bad:
        where = f"{finding.dataset}, {finding.evaluation}-batch, fold {finding.fold}"
        spots = ", ".join(s for s, verdict in finding.verdict.items() if verdict in ("LEAK", "BLIND"))
        console.print(f"{where}: {finding.selector or 'all selectors'}: {finding.stage} ({spots})", highlight=False)
    end = f"{len(bad)} stages leak or could not be audited." if bad else ""
    console.print(end or "Nothing leaks that the protocol does not declare.", highlight=False)


def show_export(file: Path, data: Any, console: Console) -> None:
    """What a file of one section holds, and how to draw it."""
    selectors = data.uns["agl_bench"]["selectors"]
    made = ", ".join(f"{name} ({len(known['cells'])} cells)" for name, known in selectors.items())
    primary = int(data.var["agl_primary"].sum())
    size = f"{data.n_obs:,} spots × {data.n_vars:,} genes, {primary} of them primary"
    console.print(f"{file}: {size}; {made}", markup=False, highlight=False)
    if data.layers:
        layer = next(iter(data.layers))
        predicted = (data.layers[layer] == data.layers[layer]).sum(axis=0)  # the rest is NaN
        gene = data.var_names[predicted.argmax()]  # folds choose their own primary genes: few are predicted everywhere
        console.print(
            f'to see: sc.pl.embedding(sc.read_h5ad("{file}"), "spatial", color="{gene}", layer="{layer}")',
            markup=False, highlight=False,
        )  # fmt: skip


def show_repetition(key: str, title: str, comparison: Comparison, console: Console) -> None:
    """How a cell that was made again differs from the kept one."""
    from rich.table import Table

    console.print(f"cell {key}: {title}", markup=False, highlight=False)
    for sentence in comparison.conditions:
        console.print(f"other conditions: {sentence}", markup=False, highlight=False)
    if not comparison.conditions:
        console.print("the conditions are the same", highlight=False)
    if comparison.is_identical:
        console.print("The result is the same bit for bit.", highlight=False)
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
        console.print(sentence, markup=False, highlight=False)
    console.print("The result is NOT the same.", highlight=False)


def _plus_minus(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.3f}"


def show_end(work: Path, tracking: str | None, recorder: Recorder, failures: list[Failed], console: Console) -> None:
    """What failed, and where the results are."""
    for failure in failures:
        where = f" (details: {failure.details})" if failure.details else ""
        click.echo(f"agl-bench: {failure.status}: {failure.spec.title}: {failure.sentence}{where}", err=True)
    if failures:
        click.echo("agl-bench: --retry-failed tries failed cells again", err=True)
    if recorder.dead:
        click.echo(f"agl-bench: MLflow is incomplete; `agl-bench sync --work {work}` brings it up to date", err=True)
    elif tracking != "none":
        console.print(f"Results: {work}/cells; in the browser: agl-bench ui --work {work}", highlight=False)
