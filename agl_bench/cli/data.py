"""Commands on datasets: fetch, folds, prepare, describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.cli.group import cli
from agl_bench.cli.opening import cache_of, discover
from agl_bench.cli.options import DATA, PATH, PLUGIN, SET, WORK, Finite
from agl_bench.cli.writing import check_writable, make_folder, write_text, writing
from agl_bench.errors import BadSpec
from agl_bench.terminal import (
    make_console,
    show_card,
    styled,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    pass


@cli.command()
@click.argument("name")
@SET
@PLUGIN
@DATA
def fetch(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Download a dataset: only what is missing, checked."""
    from agl_bench.bench.spec import make_dataset, naming_the_dataset, one_part

    plugins = discover(files)
    part = one_part(plugins, name, "dataset", assignments)
    dataset = make_dataset(plugins, part)
    console = make_console()
    if dataset.licence:
        console.print(f"{name}: {dataset.citation} Licence: {dataset.licence}.")
    with naming_the_dataset(part):
        dataset.fetch(root)
        sections = dataset.sections(root)
    console.print(f"{name} is there: {len(sections)} sections ({', '.join(sections)}).")


@cli.command()
@click.argument("dataset")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--seeds", multiple=True, metavar="0,1", help="Roots of all randomness.  [default: 0]")
@click.option("--preset", default="clean", show_default=True, help="Protocol to start from: clean, paper or smoke.")
@SET
@click.option("--out", type=PATH, help="Write the folds as CSV, for --set protocol.fold_file=CSV.")
@PLUGIN
@DATA
def folds(
    dataset: str,
    evaluation: tuple[str, ...],
    seeds: tuple[str, ...],
    preset: str,
    assignments: tuple[str, ...],
    out: Path | None,
    files: tuple[Path, ...],
    root: Path,
) -> None:
    """Make the folds of a dataset without training: sizes, distances between train and test, digests."""
    from agl_bench.bench.spec import check_normalisation, evaluations_of, make_dataset, one_dataset, seeds_of

    plugins = discover(files)
    roots = seeds_of(seeds or ("0",))
    evaluations = evaluations_of(evaluation or ("intra", "inter"))
    if out is not None and len(roots) != 1:
        raise BadSpec(f"--out writes the folds of one seed, there are {len(roots)}; choose one with --seeds")
    check_writable("--out", out)
    part, protocol = one_dataset(plugins, dataset, preset, assignments)
    protocol.files()  # one that is not there ends here
    check_normalisation(dataset, make_dataset(plugins, part), protocol)

    import torch
    from rich.table import Table

    from agl_bench.bench.fold_report import fold_line, report_folds
    from agl_bench.bench.run import Bench

    sections = Bench(plugins, root, torch.device("cpu")).sections(part)
    reports = list(report_folds(sections, protocol, dataset=dataset, evaluations=evaluations, seeds=roots, genes=True))
    if not reports:
        raise BadSpec(f"protocol.fold_file = '{protocol.fold_file}' has no fold for --evaluation {evaluations[0]}")
    console = make_console()
    for name in dict.fromkeys(r.evaluation for r in reports):
        here = [r for r in reports if r.evaluation == name]
        table = Table(title=f"{dataset} · {name}-batch", title_justify="left", title_style="bold")
        for column in ("fold", "seed", "train", "held-out", "validation", "test", "buffer", "unlisted"):
            table.add_column(column, justify="left" if column == "fold" else "right", no_wrap=True)
        for column in ("nearest µm", "median µm", "overlapping", "digest"):
            table.add_column(column, justify="left" if column == "digest" else "right", no_wrap=True)
        for report in here:
            distances = (report.record["nearest_um"], report.record["median_um"])
            table.add_row(
                report.label,
                str(report.seed),
                *(f"{count:,}" for count in report.counts.values()),
                *("–" if value is None else f"{value:,.0f}" for value in distances),
                f"{report.record['overlapping']:,}",
                report.record["digest"],
            )
        console.print(table)
        console.print(f"{fold_line([(r.counts, r.record) for r in here])}.")
        for report in here:
            for caution in report.cautions:
                console.print(f"Fold {report.label}, seed {report.seed}: {caution}.")
        planned = name == "inter" and protocol.leave_out == "auto" and not protocol.fold_file
        if planned and not any(section.donor for section in sections):
            console.print("No donor is known, so sections are left out one by one.")
        console.print()
    if out is not None:
        header = reports[0].csv.partition("\n")[0]
        write_text(out, "\n".join([header, *(r.csv.partition("\n")[2].rstrip("\n") for r in reports), ""]))
        console.print(f"{len(reports)} folds written to {out}")


@cli.command()
@click.argument("name")
@click.option("--backbone", help="Cut patches as this backbone sees them.  [default: tiny]")
@click.option("--px", type=click.IntRange(1, 4096), help="Cut patches with sides of so many pixels instead.")
@click.option("--um", type=Finite(1, 10_000), help="How much tissue they show.  [default: the protocol's]")
@SET
@PLUGIN
@DATA
@WORK
def prepare(
    name: str,
    backbone: str | None,
    px: int | None,
    um: float | None,
    assignments: tuple[str, ...],
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Read, check and store a dataset as `run` uses it: memory-mapped, under AGL_BENCH_CACHE or WORK/cache.

    `run` does the same when it needs it. What is absent is fetched, unless AGL_BENCH_OFFLINE=1; what is there already
    is kept, and an interrupted preparation goes on where it stood. With a frozen --backbone its features are made and
    kept too. Nothing is ever deleted: remove the folder, or features-* in it, to make room.
    """
    from agl_bench.bench.encoded import FrozenEncoder
    from agl_bench.bench.prepare import Preparation, bring, seen_by
    from agl_bench.bench.run import choose_device
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.data.prepared import PatchSize
    from agl_bench.protocol import Protocol

    if backbone is not None and px is not None:
        raise BadSpec(f"--backbone {backbone} and --px {px} both say how large patches are; leave one out")
    plugins = discover(files)
    backbone = backbone or "tiny"
    of_backbone = [a for a in assignments if a.strip().startswith(f"{backbone}.")]
    part = one_part(plugins, name, "dataset", [a for a in assignments if a not in of_backbone])
    dataset = make_dataset(plugins, part)
    backbone_part = one_part(plugins, backbone, "backbone", of_backbone)
    sees, side = seen_by(plugins, backbone_part)
    seen = px is not None or sees == "patches"
    size = PatchSize(px or side, um or Protocol().patch_um) if seen else None
    console, cache = make_console(), cache_of(work)
    kept = "prepared sections are kept, and the same command continues"
    with console.status(styled(f"preparing {name}")), writing(f"the prepared data in {cache}", kept):
        bring(part, dataset, root)
        count = total = 0
        protocol, encoder = Protocol(), None
        for prepared in Preparation(root, cache).sections(part, dataset, size):
            section = prepared.section
            patches = features = ""
            if section.patches is not None and size is not None:
                patches = f", patches of {size.px} px for {size.um:g} µm"
                if px is None:
                    encoder = encoder or FrozenEncoder.of(plugins, backbone_part, size, choose_device("auto"), section)
                if encoder is not None:
                    encoded = encoder.encode(section, 8 if protocol.augment else 1)
                    took = "were there" if encoded.was_there else f"{encoded.seconds:.1f} s"
                    total += 0 if encoded.was_there else encoded.features.nbytes
                    width, size_mb = encoded.features.shape[2], encoded.features.nbytes / 1e6
                    features = f"; {width:,} features for each symmetry, {size_mb:,.1f} MB, {took}"
            took = "was there" if prepared.was_there else f"{prepared.seconds:.1f} s"
            spots, genes = section.counts.shape
            console.print(
                f"{section.name}: {spots:,} spots × {genes:,} genes{patches}, {prepared.bytes / 1e6:,.1f} MB, {took}"
                f"{features}",
            )  # fmt: skip
            count, total = count + 1, total + prepared.bytes
    console.print(f"{count} section{'s' if count != 1 else ''}, {total / 1e6:,.1f} MB in {cache}")


@cli.command()
@click.argument("name")
@click.option("--out", type=PATH, help="Folder for a picture of each section: spots on tissue.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@SET
@PLUGIN
@DATA
@WORK
def describe(
    name: str,
    out: Path | None,
    as_json: bool,
    assignments: tuple[str, ...],
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Show what a dataset is: source, tissue, and the numbers of each section. Reads it, writes --out only."""
    from agl_bench.bench.describe import cautions, dataset_card, section_card
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.spec import make_dataset, naming_the_dataset, one_part
    from agl_bench.data.check import check_section
    from agl_bench.data.fingerprint import same_sections, section_fingerprint
    from agl_bench.data.folds import partly_known
    from agl_bench.data.gene_ids import tell_apart
    from agl_bench.interfaces.spots import Section

    plugins = discover(files)
    part = one_part(plugins, name, "dataset", assignments)
    dataset = make_dataset(plugins, part)
    card = dataset_card(part, dataset, root, Preparation(root, cache_of(work)).digests)
    if out is not None:
        make_folder("--out", out)
    cards, pictures, read, fingerprints = [], [], [], {}
    with naming_the_dataset(part):
        donors = dataset.sections(root)
    for section_name in donors:  # one at a time: they may be large
        with naming_the_dataset(part):
            section = dataset.read(root, section_name)
        check_section(section, has_counts=dataset.has_counts)
        about = cautions(section, has_counts=dataset.has_counts)
        cards.append(vars(section_card(section)) | {"cautions": about})
        fingerprints[section_name] = section_fingerprint(section)
        read.append(Section(section_name, section.counts[:0].copy(), section.um_per_px))  # names of its genes
        if out is not None:
            from agl_bench.bench.overlay import draw_overlay

            pictures.append(
                out / "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{name}-{section_name}.png")
            )
            with writing(pictures[-1], "earlier pictures are kept"):
                draw_overlay(name, section, pictures[-1])
        del section  # before the next is read
    if as_json:
        click.echo(json.dumps(card | {"sections": cards, "pictures": [str(p) for p in pictures]}, indent=1))
    else:
        show_card(card, cards)
        for told in (partly_known(donors), tell_apart(read), same_sections(fingerprints)):
            if told:
                click.echo(f"Note: {told}.")
        for picture in pictures:
            click.echo(f"wrote {picture}")
