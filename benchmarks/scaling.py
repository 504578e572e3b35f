"""How time and memory grow with spots, genes, inner steps and sections.

    python benchmarks/scaling.py                                    # embeddings, so that data and head decide
    python benchmarks/scaling.py --backbone tiny --vary spots --max-spots 30000
    python benchmarks/scaling.py --max-batches 100000               # whole epochs, however long

One size varies at a time, the others stay at --spots, --genes, --steps and --sections. Each point has a process of its
own. Data are made up in memory: expression with a tenth of its entries, embeddings of 256 numbers or random patches.
The store keeps them as `agl_bench.data.store.fit` chooses within its `budget`; `data` says how. Selectors: pgl, agl,
dkgsb (whose outer pass is what the inner steps act on). The first epoch is not counted.

    store_MiB           what the store holds; budget_share of what it may
    make_s              to make the store from the table
    peak_MiB            of training alone, model included, beyond the store
    train_s, outer_s    training and outer pass of an epoch (medians), where all of it was run
    …_of_BATCHES        where an epoch has more than that many batches (--max-batches): times extrapolated from so many,
                        memory as it was with so many
    us_per_spot         train + outer

Then the slopes of log(time) and log(peak) against log(size), by least squares: 1 is linear. Where small sizes are
dominated by what does not grow, slopes are below 1; `last` is the slope between the two largest sizes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import measure
import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from speed_epoch import Clocked

from agl_bench.data.patches import ArrayPatches
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import SpotStore, budget, fit
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, TrainingView
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench.training.model import Model, build_model
from agl_bench.training.trainer import DevelopmentRows
from agl_bench_plugins.backbones.embedding import Embedding
from agl_bench_plugins.backbones.tiny import Tiny
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.pgl import Pgl

UM, WIDTH, SPARSITY, PRIMARY = 112.0, 256, 10, 50  # one entry in SPARSITY is not zero
SIZES = {
    "spots": [1000, 3000, 10_000, 30_000, 100_000],
    "genes": [1000, 5000, 20_000],
    "steps": [1, 3, 6, 12],
    "sections": [1, 4, 16],
}
BACKBONES: dict[str, Callable[..., Backbone]] = {"embedding": Embedding, "tiny": Tiny}
SELECTORS: dict[str, Callable[..., Selector]] = {"pgl": Pgl, "agl": Agl, "dkgsb": Dkgsb}
QUICK = {"spots": 200, "genes": 200, "max_spots": 400, "vary": ["spots"], "sizes": [200, 400], "px": 16}


def make_table(spots: int, genes: int, sections: int, px: int) -> SpotTable:
    """Random spots; each has one entry in every SPARSITY genes, drawn from them.

    Args:
        spots: of all sections together.
        genes: a multiple of SPARSITY.
        sections: of nearly equal size.
        px: side of the patches; 0 = embeddings instead.
    """
    rng = np.random.default_rng(0)
    count = genes // SPARSITY
    indices = rng.integers(0, SPARSITY, (spots, count), dtype=np.int32)
    indices += np.arange(0, genes, SPARSITY, dtype=np.int32)
    made, start = [], 0
    for number, size in enumerate(np.bincount(np.arange(spots) % sections)):
        values = rng.integers(1, 10, size * count).astype(np.float32)
        parts = (values, indices[start : start + size].ravel(), np.arange(size + 1) * count)
        counts = AnnData(sparse.csr_matrix(parts, shape=(size, genes)), obsm={"spatial": rng.random((size, 2))})
        counts.var_names = list(map(str, range(genes)))
        patches = ArrayPatches(rng.integers(0, 256, (size, px, px, 3), dtype=np.uint8), UM) if px else None
        embedding = None if px else rng.standard_normal((size, WIDTH), dtype=np.float32)
        made.append(Section(f"S{number}", counts, 1.0, patches=patches, embedding=embedding))
        start += size
    return tabulate(made, Protocol(min_genes_per_spot=0, spot_mads=0))


def point(
    spots: int,
    genes: int,
    steps: int,
    sections: int,
    *,
    backbone: str,
    px: int,
    batch: int,
    max_batches: int,
    outer_batches: int,
    repeats: int,
    selectors: list[str],
    device: torch.device,
) -> measure.Row:
    """All measurements of one size, for a fresh process: {"rows": one for each selector}."""
    px = px if backbone != "embedding" else 0
    table = make_table(spots, genes, sections, px)
    allowed = budget(device)
    elsewhere = None if device.type == "cpu" else budget(torch.device("cpu"))
    form, place = fit(spots, genes, spots * (genes // SPARSITY), 3 * spots * px**2, allowed, elsewhere)
    every = np.arange(spots)
    sees = "patches" if px else "embedding"
    started = measure.now()
    store = SpotStore(
        table,
        every,
        np.arange(genes),
        sees=sees,
        patch_px=px,
        patch_um=UM,
        device=device,
        form=form,
        patches_on=place,
    )
    common = {
        "data": f"{form}{f', patches {place}' if px else ''}",
        "make_s": measure.now() - started,
        "store_MiB": sum(store.nbytes.values()) / measure.MIB,
        "budget_share": store.nbytes["device"] / allowed,
    }
    del table
    shuffled = np.random.default_rng(1).permutation(spots)
    tenth = spots // 10
    held_out, validation, train_rows = (np.sort(part) for part in np.split(shuffled, [tenth, 2 * tenth]))
    # Of a long epoch a part: some of the spots, which lie anywhere in the store.
    measured = np.sort(np.random.default_rng(2).permutation(train_rows)[: max_batches * batch])
    share = len(measured) / len(train_rows)
    rank = torch.arange(-PRIMARY, genes - PRIMARY).clamp(min=-1)
    split = GeneSplit(tuple(map(str, range(genes))), rank < 0, rank, -rank.double())
    protocol = Protocol(batch_size=batch, epochs=10**6, patience=10**6, outer_start=0, outer_batches=outer_batches)

    def train(name: str, rows: DevelopmentRows, epochs: int) -> tuple[list[tuple[float, float]], float]:
        """Seconds of the two passes of each epoch, and peak memory."""
        most = measure.Peak(device)
        model = _model(backbone, store, genes, px).to(device)
        view = TrainingView(split, lambda: store.leading_expression(len(train_rows)), torch.Generator())
        selector = SELECTORS[name](view, **({"steps": steps} if name == "dkgsb" else {})).to(device)
        trainer = Clocked(model, selector, store, rows, split, protocol, seed=0)
        seconds = [(trainer.train_seconds, trainer.outer_seconds) for _ in itertools.islice(trainer, epochs)]
        return seconds, most.mib()

    found = []
    for name in selectors:
        train(name, DevelopmentRows(measured[:batch], held_out[:batch], validation[:batch]), 1)  # first uses of torch
        seconds, peak = train(name, DevelopmentRows(measured, held_out, validation), 1 + repeats)
        train_s, outer_s = (statistics.median(column) / share for column in zip(*seconds[1:], strict=True))
        suffix = "" if share == 1 else f"_of_{max_batches}"
        timed = {f"train_s{suffix}": train_s, f"outer_s{suffix}": outer_s or None}
        total = train_s + outer_s
        row = {"selector": name, **common, f"peak_MiB{suffix}": peak, **timed}
        found.append({**row, "us_per_spot": 1e6 * total / len(train_rows), "total_s": total})
    return {"rows": found}


def _model(backbone: str, store: SpotStore, genes: int, px: int) -> Model:
    example = store.spots(torch.arange(2, device=store.device))
    settings = {"patch_px": px} if px else {}
    return build_model(lambda: BACKBONES[backbone](example, **settings), genes, 0, "scaling")


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each point and selector."""
    base = {name: getattr(options, name) for name in SIZES}
    limits = {"spots": options.max_spots, "genes": options.max_genes}
    shared = {n: getattr(options, n) for n in ("backbone", "px", "batch", "max_batches", "outer_batches", "repeats")}
    found, known = [], {}
    for vary in options.vary:
        sizes = [s for s in options.sizes or SIZES[vary] if s <= limits.get(vary, s)]
        for size in sizes:
            at = base | {vary: size}
            selectors = ["dkgsb"] if vary == "steps" else options.selectors
            key = (*at.values(), *selectors)
            if key not in known:  # where the lines cross
                known[key] = measure.fresh("scaling:point", options.device, **at, **shared, selectors=selectors)
            found += [{"vary": vary, **at, **row} for row in known[key].get("rows", [])]
    return found


def slopes(found: list[measure.Row]) -> list[measure.Row]:
    """Growth of time and memory with each size, by selector."""
    table = []
    for vary, selector in dict.fromkeys((row["vary"], row["selector"]) for row in found):
        line = [row for row in found if (row["vary"], row["selector"]) == (vary, selector)]
        if len(line) < 2:
            continue
        row: measure.Row = {"vary": vary, "selector": selector, "from": line[0][vary], "to": line[-1][vary]}
        for name, key in (("time", "total_s"), ("peak", "peak_MiB"), ("store", "store_MiB")):
            size, value = np.log([(r[vary], max(r[key], 1e-9)) for r in line if key in r]).T
            if len(size) < 2:
                continue
            row[f"{name}_slope"] = float(np.polyfit(size, value, 1)[0])
            row[f"{name}_last"] = float((value[-1] - value[-2]) / (size[-1] - size[-2]))
        table.append(row)
    return table


def main() -> None:
    """Print the points, then the slopes."""
    parser = measure.parser(__doc__, repeats=2)
    parser.add_argument("--vary", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help=f"of what varies; default: {SIZES}")
    parser.add_argument("--spots", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=5000, help=f"a multiple of {SPARSITY}")
    parser.add_argument("--steps", type=int, default=3, help="inner steps of dkgsb")
    parser.add_argument("--sections", type=int, default=1)
    parser.add_argument("--max-spots", type=int, default=10**9)
    parser.add_argument("--max-genes", type=int, default=10**9)
    parser.add_argument("--max-batches", type=int, default=400, help="that are run of an epoch")
    parser.add_argument("--batch", type=int, default=64, help="spots in a batch")
    parser.add_argument(
        "--outer-batches", type=int, default=Protocol().outer_batches, help="that a look-ahead averages; 0 = all"
    )
    parser.add_argument("--backbone", choices=BACKBONES, default="embedding")
    parser.add_argument("--px", type=int, default=32, help="of patches, where the backbone sees any")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    options = measure.options(parser, quick=QUICK)
    found = rows(options)
    growth = slopes(found)
    for row in found:
        del row["total_s"]
    measure.report("scaling", found, options)
    print()
    print(measure.table(growth, markdown=options.markdown))
    if options.save:
        measure.save("scaling_slopes", growth, options.device)


if __name__ == "__main__":
    main()
