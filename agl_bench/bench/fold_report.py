"""What a person should know of the folds before believing a number: sizes, distances, digests."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agl_bench.data.folds import Fold, FoldPlan, fold_table, make_fold, plan_folds, separation
from agl_bench.data.gene_split import split_genes
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.spreadsheet import as_csv
from agl_bench.data.support import support_of
from agl_bench.digests import text_digest
from agl_bench.errors import BadSpec
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol


@dataclass(frozen=True)
class FoldReport:
    """A fold as it is told, stored and compared.

    Attributes:
        label: of the fold.
        csv: the fold as a file of folds has it (`data.folds.fold_table`).
        counts: spots in each set, within a buffer, and not listed.
        record: digest of `csv`, and the distances between test and training spots (`data.folds.Separation`).
        evaluation, seed: what it belongs to.
        cautions: sentences on its primary genes, where they were looked at (`data.support.Support`).
    """

    label: str
    csv: str = field(repr=False)
    counts: dict[str, int]
    record: dict[str, Any]
    evaluation: str
    seed: int
    cautions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, plan: FoldPlan, fold: Fold, table: SpotTable, protocol: Protocol, *, evaluation: str, seed: int
    ) -> FoldReport:
        """Of a fold that has been made."""
        csv = as_csv(fold_table(plan.label, fold, table))
        return cls(
            label=plan.label,
            csv=csv,
            counts={
                "train_spots": len(fold.train),
                "held_out_spots": len(fold.held_out),
                "validation_spots": len(fold.validation),
                "test_spots": len(fold.test),
                "buffer_spots": fold.dropped,
                "unlisted_spots": fold.unlisted,
            },
            record={"digest": text_digest(csv)} | asdict(separation(fold, table, protocol.patch_um)),
            evaluation=evaluation,
            seed=seed,
        )


def report_folds(
    sections: Sequence[Section],
    protocol: Protocol,
    *,
    dataset: str,
    evaluations: Sequence[str],
    seeds: Sequence[int],
    genes: bool = False,
) -> Iterator[FoldReport]:
    """Make every fold of a dataset without training anything.

    A dataset of one section has no inter-batch folds; beside intra-batch ones that is no error. With `genes` the
    primary genes of each fold are chosen and looked at, too.

    Raises:
        BadSpec: if a fold cannot be made.
    """
    donors = {section.name: section.donor for section in sections}
    for evaluation in evaluations:
        if evaluation == "inter" and len(donors) < 2 and "intra" in evaluations:
            continue
        table: SpotTable | None = None
        taken: object = None
        for plan in plan_folds(evaluation, donors, protocol, dataset=dataset):
            # As a run does: the panel decides which spots have enough genes.
            decide = plan.training_sections if protocol.genes_from == "training" else plan.sections
            if table is None or (plan.sections, decide) != taken:
                table = tabulate([s for s in sections if s.name in plan.sections], protocol, decide)
                taken = plan.sections, decide
            for seed in seeds:
                fold = make_fold(plan, table, protocol, seed)
                report = FoldReport.of(plan, fold, table, protocol, evaluation=evaluation, seed=seed)
                yield replace(report, cautions=_about_genes(table, fold, protocol)) if genes else report


def _about_genes(table: SpotTable, fold: Fold, protocol: Protocol) -> tuple[str, ...]:
    """Sentences on the primary genes of a fold, or why there are none."""
    try:
        split, _ = split_genes(table, fold.train, protocol)
    except BadSpec as error:
        return (f"no run is possible: {error}",)
    return tuple(support_of(table, fold.train, split, protocol).sentences)


def fold_line(folds: Sequence[tuple[Mapping[str, int], Mapping[str, Any]]]) -> str:
    """One line about the folds of an evaluation: how many, sizes, and how far test and training spots are apart.

    Args:
        folds: counts and record of each (`FoldReport`); the same fold may come more than once.
    """
    distinct = list({record["digest"]: (counts, record) for counts, record in folds}.values())

    def sizes(name: str) -> str:
        low, high = (pick(counts[f"{name}_spots"] for counts, _ in distinct) for pick in (min, max))
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"

    parts = [f"{sizes(name)} {name.replace('_', '-')}" for name in ("train", "held_out", "validation", "test")]
    text = f"{len(distinct)} fold{'s' if len(distinct) > 1 else ''} of {', '.join(parts)} spots"
    if not any(counts["held_out_spots"] for counts, _ in distinct):
        text += " (the outer loss uses the validation spots)"
    for name, words in (("buffer", "within the buffer"), ("unlisted", "in no set")):
        if any(counts[f"{name}_spots"] for counts, _ in distinct):
            text += f", {sizes(name)} {words}"
    measured = [record for _, record in distinct if record["nearest_um"] is not None]
    if not measured:
        return f"{text}; no section is both trained on and tested"
    text += (
        f"; test spots lie ≥ {min(r['nearest_um'] for r in measured):,.0f} µm from training spots "
        f"(median {statistics.median(r['median_um'] for r in measured):,.0f} µm)"
    )
    overlapping = sum(r["overlapping"] for r in measured)
    if overlapping:
        tested = sum(counts["test_spots"] for counts, _ in distinct)
        text += f"; {overlapping:,} of {tested:,} test patches overlap a training patch"
    return text
