"""Which genes are primary: do a few thin spots decide, and what do the scores of a run make of it?

    python benchmarks/primary_genes.py --processes 2 --write         writes benchmarks/primary_genes.md

Genes: of each section, and of the sections of all donors but one, the 50 primary genes by each rule; how many stay
(Jaccard index) when 5 % of the spots are dropped at random (mean of three draws), when the 5 % of a section with the
fewest counts are dropped, and when five spots of each section are thinned to about 60 genes, which a floor of 50 lets
pass. Beside it the share of spots in which the chosen are detected (median of the 50), and their Moran's I (mean),
which no rule looks at; `carried` are those that owe more than half of their score to 1 % of the spots, or three.
Rules that are no setting of the protocol are made here: `seurat` where only spots with a quarter of the section's
median count have a say, `seurat` with the largest 2 % of each gene's values cut down to the next, and Pearson residuals
with θ = 100.

Planted: the generated tissue of the plug-in `synthetic`; of the primary genes, and of the first k* auxiliary ones, the
share that follow the tissue, which is what the generator means them to do.

PCC: `pgl` and `hvg_k`, and the controls `position` (a backbone that sees coordinates alone) and shuffled patches, with
the presets `clean_v1` and `clean` and backbone `tiny`; across donors, and within sections in two folds.

Written down before the run (1 to 4 with first trials on the same sections known, so that they are no blind guesses):
1. seurat keeps less than .4 of its genes when the thinnest 5 % go, and as little when thin spots are planted; clean
   keeps .85.
2. When 5 % go at random clean keeps at least as many as seurat.
3. Quality control alone does not suffice: with it seurat stays below .5 when the thinnest 5 % go.
4. Pearson residuals with θ = 100 are as stable, and fail on planted tissue, where abundant genes come first.
5. pgl rises, within sections and across donors. So may `position`: genes seen in more spots are easier to
   predict, whatever does. Shuffled patches stay within ±.03.
6. On planted thin spots pgl across donors is with clean what it is without them (within .03); with clean_v1 it
   falls.

What came of it, in the run below:
1. Holds in the mean: seurat keeps .23 when the thinnest 5 % go and .12 when thin spots are planted, clean .92 and .94.
   Not everywhere: seurat keeps .49 on B4, the shallow section, and .52 and .61 on two of the three sets of donors;
   clean keeps .82 on A1+A2+B4.
2. Holds in the mean (.91 for .86), not on C2 (.91 for .96) nor on A1+A2+C2–C5 (.96 for .97).
3. Holds in the mean (.26), not on the sets where seurat alone is above .5.
4. The first half holds (.94). The second is not measured here: no preset has θ = 100.
5. Half of it fails. Within sections pgl rises from .042 to .153, `position` stays at .01. Across donors pgl does not
   rise (.098 and .096; its spread over donors and seeds halves), hvg_k falls from .101 to .079, and `position`
   rises from −.020 to .074: the new primary genes are those with a pattern, and part of such a pattern is the same
   place in every tumour's section. What an image adds across donors has become smaller, .022 of .096. Shuffled patches
   stay within ±.02.
6. The first half holds: .083 with thin spots, .096 without. The second fails: clean_v1 loses only .007 of .098,
   which is less than the spread. Its genes change entirely (Jaccard .00 to .14), but the new ones are no harder to
   predict.

So the new default makes the question stable: the same genes are primary whatever a few thin spots say. Of 50 primary
genes 29 to 49 owed more than half of their score to 1 % of the spots, now three at most. They are detected in more
spots (.75 for .44) and have more pattern (Moran's I .24 for .09). Across these three donors the new ones are not
predicted better."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import scanpy
import torch
from anndata import AnnData
from scipy import sparse

from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, fingerprints
from agl_bench.bench.spec import Campaign, Part, make_dataset, one_part
from agl_bench.data.gene_split import detection, score_genes, split_genes
from agl_bench.data.prepared import PatchSize
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.support import support_of
from agl_bench.interfaces.genes import order_of
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol, load_preset
from agl_bench.registry.plugins import Plugins

MISSING = "Not measured yet."
SECTIONS = "A1,A2,B4,C2,C3,C4,C5"
DROPPED, DRAWS = 0.05, 3
THIN, THIN_GENES = 5, 60  # spots of a section that are thinned, and to how many genes
BEFORE, AFTER = "seurat (clean_v1)", "Pearson, quality control (clean)"
SCORE = "pcc_gene_mean_section_mean"
LINES = {  # of the table of PCC: selector, backbone, settings
    "pgl": ("pgl", "tiny", ()),
    "hvg_k": ("hvg_k", "tiny", ()),
    "position": ("pgl", "position", ()),
    "shuffled patches": ("pgl", "tiny", ("protocol.patches=shuffled",)),
}
QUICK = (
    "synthetic.sections=2",
    "synthetic.spots=50",
    "synthetic.patch_px=16",
    "synthetic.useless_genes=60",
    "synthetic.harmful_genes=60",
    "synthetic.helpful_genes=40",
)
QUICK_RUN = ("protocol.epochs=1", "protocol.primary_genes=10", "tiny.channels=4", "hvg_k.k=20", "protocol.buffer_um=0")

Score = Callable[[SpotTable, np.ndarray, np.ndarray], np.ndarray]
Job = tuple[str, Path, tuple[str, ...], str, str, bool, int, tuple[str, ...]]


# ---- Rules -----------------------------------------------------------------------------------------------------------


def named(name: str) -> Score:
    """A score of the protocol."""
    return functools.partial(score_genes, name)


def of_deep_spots(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`seurat` of the spots with a quarter of their section's median count."""
    kept = [here[table.total[here] >= np.median(table.total[here]) / 4] for here in by_section(table, rows)]
    return score_genes("seurat", table, np.concatenate(kept), columns)


def winsorised(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`seurat` of values of which the largest 2 % of each gene are cut down to the next."""
    values = table.rows(rows).tocsc()
    most = int(np.ceil(0.02 * len(rows)))
    for gene in range(values.shape[1]):
        own = values.data[values.indptr[gene] : values.indptr[gene + 1]]
        limit = np.partition(own, -most - 1)[-most - 1] if len(own) > most else 0
        np.minimum(own, limit, out=own)
    plain = replace(
        table, matrices=(values.tocsr(),), source_columns=np.arange(values.shape[1])[None], has_counts=False,
        section=np.zeros(len(rows), dtype=np.int64), source_row=np.arange(len(rows)),
    )  # fmt: skip
    return score_genes("seurat", plain, np.arange(len(rows)), columns)


def fixed_theta(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Variance of scanpy's Pearson residuals with θ = 100 within sections, mean over spots."""
    found = np.zeros(len(columns))
    for here in by_section(table, rows):
        data = AnnData(table.counts(here, columns).astype(np.float64))
        own = scanpy.experimental.pp.highly_variable_genes(data, n_top_genes=1, check_values=False, inplace=False)
        found += np.nan_to_num(own["residual_variances"].to_numpy()) * len(here) / len(rows)
    return found


RULES: dict[str, tuple[float, Score]] = {  # spot_mads and score
    BEFORE: (0, named("seurat")),
    "seurat, quality control": (5, named("seurat")),
    "seurat, deep spots have a say": (0, of_deep_spots),
    "seurat, winsorised": (0, winsorised),
    "seurat_v3": (0, named("seurat_v3")),
    "Pearson, θ = 100": (0, fixed_theta),
    "Pearson": (0, named("pearson_residuals")),
    AFTER: (5, named("pearson_residuals")),
}


def by_section(table: SpotTable, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each section."""
    return [rows[table.section[rows] == section] for section in np.unique(table.section[rows])]


def chosen(table: SpotTable, rows: np.ndarray, score: Score, genes: int) -> list[int]:
    """Columns of the primary genes, as `split_genes` chooses them."""
    detected = detection(table, rows)
    columns = np.flatnonzero(detected >= 1)
    order = columns[order_of(score(table, rows, columns).round(9), np.asarray(table.genes)[columns])]
    return order[detected[order] >= Protocol().primary_detection * len(rows)][:genes].tolist()


def jaccard(one: Sequence[object], other: Sequence[object]) -> float:
    """Of two sets."""
    return len({*one} & {*other}) / len({*one} | {*other})


def thinned(section: Section, seed: int) -> Section:
    """The section with `THIN` of its ordinary spots thinned, count by count, to about `THIN_GENES` genes."""
    counts = sparse.csr_matrix(section.counts.X).copy()
    rng = np.random.default_rng(seed)
    ordinary = np.flatnonzero(np.diff(counts.indptr) >= 3 * THIN_GENES)
    for row in rng.choice(ordinary, min(THIN, len(ordinary)), replace=False):
        own = counts.data[counts.indptr[row] : counts.indptr[row + 1]]
        shares = np.geomspace(1e-4, 1, 400)
        expected = [(1 - (1 - share) ** own).sum() for share in shares]
        own[:] = rng.binomial(own.astype(np.int64), shares[np.searchsorted(expected, THIN_GENES)])
    counts.eliminate_zeros()
    table = section.counts.copy()
    table.X = counts
    return replace(section, counts=table)


# ---- Genes -----------------------------------------------------------------------------------------------------------


@functools.cache
def sections_of(dataset: str, root: Path, settings: tuple[str, ...]) -> tuple[Section, ...]:
    """As measured."""
    plugins = Plugins.discover()
    own = [s for s in settings if s.startswith(f"{dataset}.")]
    made = make_dataset(plugins, one_part(plugins, dataset, "dataset", own))
    return tuple(made.read(root, name) for name in made.sections(root))


def genes_of(job: tuple[str, Path, tuple[str, ...], tuple[str, ...], int]) -> list[measure.Row]:
    """Every rule on some sections together."""
    dataset, root, settings, names, genes = job
    sections = [s for s in sections_of(dataset, root, settings) if s.name in names]
    rows = []
    for rule, (mads, score) in RULES.items():
        if len(names) > 1 and rule not in (BEFORE, AFTER):
            continue
        protocol = Protocol(spot_mads=mads)
        table, spoilt = (
            tabulate(given, protocol) for given in (sections, [thinned(s, n) for n, s in enumerate(sections)])
        )
        every = np.arange(len(table))
        own = chosen(table, every, score, genes)
        rng = np.random.default_rng(0)
        draws = [np.sort(rng.permutation(every)[int(np.ceil(DROPPED * len(every))) :]) for _ in range(DRAWS)]
        deep = np.sort(np.concatenate([_without_thinnest(table, here) for here in by_section(table, every)]))
        share = detection(table, every)[own] / len(every)
        rows.append(
            {
                "unit": "+".join(names),
                "rule": rule,
                "5 % at random": statistics.fmean(jaccard(own, chosen(table, d, score, genes)) for d in draws),
                "thinnest 5 %": jaccard(own, chosen(table, deep, score, genes)),
                "thin spots planted": jaccard(
                    [table.genes[c] for c in own],
                    [spoilt.genes[c] for c in chosen(spoilt, np.arange(len(spoilt)), score, genes)],
                ),
                "detected in": float(np.median(share)),
                "Moran's I": float(np.nanmean(score_genes("moran", table, every, np.asarray(own)))),
                "left out": int(table.dropped_spots),
                **_carried(table, every, rule, mads, genes),
            }
        )
    return rows


def _carried(table: SpotTable, rows: np.ndarray, rule: str, mads: float, genes: int) -> measure.Row:
    """How many primary genes owe more than half of their score to few spots, for rules that are presets."""
    if rule not in (BEFORE, AFTER):
        return {}
    score = "seurat" if rule == BEFORE else "pearson_residuals"
    protocol = Protocol.of({"spot_mads": mads, "primary_score": score, "ranking": score, "primary_genes": genes})
    return {"carried": len(support_of(table, rows, split_genes(table, rows, protocol)[0], protocol).carried)}


def _without_thinnest(table: SpotTable, rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(table.total[rows], kind="stable")[int(np.ceil(DROPPED * len(rows))) :]]


def planted_of(job: tuple[str, int, bool, tuple[str, ...]]) -> list[measure.Row]:
    """Whether the genes of generated tissue are what they are meant to be."""
    preset, seed, spoil, settings = job
    plugins, root = Plugins.discover(), Path("/does/not/exist")
    own = [*(s for s in settings if s.startswith("synthetic.")), f"synthetic.data_seed={seed}"]
    dataset = make_dataset(plugins, one_part(plugins, "synthetic", "dataset", own))
    sections = [dataset.read(root, name) for name in dataset.sections(root)]
    sections = [thinned(s, n) for n, s in enumerate(sections)] if spoil else sections
    protocol = replace(
        Protocol.of(load_preset(preset).protocol), primary_genes=10 if "synthetic.spots=50" in own else 50
    )
    table = tabulate(sections, protocol)
    genes, _ = split_genes(table, np.arange(len(table)), protocol)
    truth = dataset.truth(root) or {}
    worth = np.array([truth[name] for name in genes.names])
    rank, primary = genes.rank.numpy(), genes.primary.numpy()
    best = int(((worth > 0) & ~primary).sum())
    found = {
        "data": "thin spots planted" if spoil else "as generated",
        "preset": preset,
        "primary genes of the tissue": float((worth[primary] > 0).mean()),
        "of the first k* auxiliary genes": float((worth[(rank >= 0) & (rank < best)] > 0).mean()),
    }
    return [found]


# ---- Scores ----------------------------------------------------------------------------------------------------------


class Spoilt(Bench):
    """A bench whose sections have thin spots."""

    def sections(self, part: Part, size: PatchSize | None = None) -> list[Section]:
        """With `THIN` spots of each thinned, the same at each call."""
        return [thinned(s, n) for n, s in enumerate(super().sections(part, size))]


@functools.cache
def bench_of(root: Path, spoil: bool) -> Bench:
    """One for each process, so that sections are prepared once."""
    return (Spoilt if spoil else Bench)(Plugins.discover(), root, torch.device("cpu"))


def scores_of(job: Job) -> list[measure.Row]:
    """The lines of a preset on every fold of an evaluation, with one seed."""
    dataset, root, settings, preset, evaluation, spoil, seed, lines = job
    bench, rows = bench_of(root, spoil), []
    for line in lines:
        selector, backbone, own = LINES[line]
        taking_part = (dataset, "protocol", selector, backbone)
        campaign = Campaign.of(
            bench.plugins, preset=preset, selectors=[selector], datasets=[dataset], backbone=[backbone],
            evaluation=[evaluation], seeds=[str(seed)],
            assignments=[s for s in (*settings, *own) if s.partition(".")[0] in taking_part],
        )  # fmt: skip
        known = fingerprints(campaign, bench.plugins, root)
        for spec, plan in campaign.cells(bench.plugins, root, device="cpu", fingerprint=known):
            *_, result = bench.train(spec, plan, keep="nothing")
            assert isinstance(result, Result)
            rows.append(
                {
                    "evaluation": evaluation, "data": "thin spots planted" if spoil else "as measured",
                    "preset": preset, "line": line, "fold": spec.fold, "seed": seed, "PCC": float(result.scores[SCORE]),
                }
            )  # fmt: skip
    return rows


# ---- The page --------------------------------------------------------------------------------------------------------


def averaged(rows: Sequence[measure.Row], by: Sequence[str], columns: Sequence[str]) -> list[measure.Row]:
    """Means of the columns for each combination of `by`."""
    groups: dict[tuple[object, ...], list[measure.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        dict(zip(by, key, strict=True)) | {c: f"{statistics.fmean(row[c] for row in own):.2f}" for c in columns}
        for key, own in groups.items()
    ]


def pcc_table(rows: Sequence[measure.Row]) -> list[measure.Row]:
    """Mean over folds and seeds and their standard deviation, one column for each line."""
    found = []
    for evaluation, data, preset in dict.fromkeys((r["evaluation"], r["data"], r["preset"]) for r in rows):
        own: measure.Row = {"evaluation": evaluation, "data": data, "preset": preset}
        for line in LINES:
            pcc = [
                r["PCC"]
                for r in rows
                if (r["evaluation"], r["data"], r["preset"], r["line"]) == (evaluation, data, preset, line)
            ]
            own[line] = f"{statistics.fmean(pcc):.3f} ± {np.std(pcc, ddof=min(1, len(pcc) - 1)):.3f}" if pcc else "–"
        found.append(own)
    return found


def document(
    genes: Sequence[measure.Row],
    planted: Sequence[measure.Row],
    pcc: Sequence[measure.Row],
    options: argparse.Namespace,
) -> str:
    """The findings as Markdown."""
    here = measure.machine(options.device)
    kept = ["5 % at random", "thinnest 5 %", "thin spots planted"]
    alone = [r for r in genes if "+" not in r["unit"]]
    each = []
    for unit in dict.fromkeys(r["unit"] for r in genes):
        row: measure.Row = {"training spots": unit}
        for rule, word in ((BEFORE, "before"), (AFTER, "after")):
            (own,) = (r for r in genes if (r["unit"], r["rule"]) == (unit, rule))
            row |= {f"{column}, {word}": f"{own[column]:.2f}" for column in kept}
            row |= {f"left out, {word}": own["left out"], f"carried, {word}": own["carried"]}
        each.append(row)
    asked = f"--processes {options.processes} --seeds {options.seeds} --write"
    parts = [
        "# Primary genes",
        f"`python benchmarks/primary_genes.py {asked}`",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        f"{here['processor']}, {here['cores']} cores, {options.processes} processes, {here['threads']} threads, "
        f"device {here['device']}, torch {here['torch']}, commit {here['commit'] or 'unknown'}: {options.took:.0f} s."
        + (f" {options.missing} parts were not measured." if options.missing else ""),
        f"## {options.real}: rules, mean of {len({r['unit'] for r in alone})} sections one by one",
        measure.table(averaged(alone, ["rule"], [*kept, "detected in", "Moran's I", "left out"]), markdown=True),
        f"## {options.real}: before ({BEFORE}) and after ({AFTER})",
        measure.table(each, markdown=True),
        "## Planted tissue",
        measure.table(averaged(planted, ["data", "preset"], list(planted[0])[2:]), markdown=True)
        if planted
        else MISSING,
        f"## PCC on {options.real}",
        f"{len(pcc):,} cells; mean and standard deviation over folds and seeds. The genes differ between the presets, "
        "so that a higher PCC alone is no better method: compare with the controls beside it.",
        measure.table(pcc_table(pcc), markdown=True) if pcc else MISSING,
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--real", default="her2st", help="dataset of real sections")
    made.add_argument("--data", type=Path, default=Path(os.environ.get("AGL_BENCH_DATA", "data")))
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--planted-seeds", type=int, default=3)
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--parts", type=Path, help="folder that keeps what is done, for the next time")
    made.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is begun")
    made.add_argument("--write", action="store_true", help="write benchmarks/primary_genes.md")
    options = measure.options(made, quick={"real": "synthetic", "seeds": 1, "planted_seeds": 1, "write": False})
    torch.set_num_threads(1)
    settings = (*QUICK, *QUICK_RUN) if options.quick else (f"{options.real}.sections={SECTIONS}",)
    genes = 10 if options.quick else Protocol().primary_genes
    donors = {s.name: s.donor for s in sections_of(options.real, options.data, settings)}
    groups = [(name,) for name in donors]
    groups += [tuple(n for n in donors if donors[n] != left) for left in dict.fromkeys(donors.values())]
    groups = list(dict.fromkeys(groups))
    of_genes = [(options.real, options.data, settings, names, genes) for names in groups]
    of_planted = [
        (p, s, t, settings) for s in range(options.planted_seeds) for t in (False, True) for p in ("clean_v1", "clean")
    ]
    every = ("pgl", "shuffled patches") if options.quick else tuple(LINES)
    presets, job = ("clean_v1", "clean"), (options.real, options.data, settings)
    folds = (options.real, options.data, (*settings, "protocol.folds=2"))
    of_pcc = []
    for seed in range(options.seeds):
        of_pcc += [(*job, preset, "inter", False, seed, (line,)) for line in every for preset in presets]
        of_pcc += [(*job, preset, "inter", True, seed, ("pgl",)) for preset in presets if not options.quick]
        of_pcc += [
            (*folds, preset, "intra", False, seed, (line,))
            for line in every
            for preset in presets
            if not (options.quick or seed or line == "hvg_k")
        ]
    began = time.monotonic()
    work = [
        (task, one) for task, of in ((genes_of, of_genes), (planted_of, of_planted), (scores_of, of_pcc)) for one in of
    ]
    run = functools.partial(part, folder=options.parts, end=began + options.seconds)
    if options.processes == 1:
        found = [run(task, one) for task, one in work]
    else:
        with ProcessPoolExecutor(
            options.processes, multiprocessing.get_context("spawn"), initializer=measure.start, initargs=("cpu", 1)
        ) as pool:
            found = list(pool.map(run, *zip(*work, strict=True)))
    options.took = time.monotonic() - began
    options.missing = sum(rows is None for rows in found)
    genes_rows, planted, pcc = (
        [row for (task, _), rows in zip(work, found, strict=True) if task is which for row in rows or ()]
        for which in (genes_of, planted_of, scores_of)
    )
    text = document(genes_rows, planted, pcc, options)
    measure.publish("primary_genes", text, [*genes_rows, *planted, *pcc], options)


def part(
    task: Callable[[Any], list[measure.Row]], job: tuple[object, ...], folder: Path | None, end: float
) -> list[measure.Row] | None:
    """The rows of a job, those kept in a folder if it was done before; None if there is no time left to begin it."""
    name = hashlib.blake2b(repr((task.__name__, job)).encode(), digest_size=8).hexdigest()
    path = folder and folder / f"{name}.json"
    if path and path.exists():
        kept: list[measure.Row] = json.loads(path.read_text())
        return kept
    if time.monotonic() > end:
        return None
    rows = task(job)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
