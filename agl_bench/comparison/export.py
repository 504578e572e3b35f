"""What a benchmark has found about one section, as an AnnData file for users of scanpy."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import write_elem

from agl_bench import __version__
from agl_bench.bench.describe import drawn_diameter_px
from agl_bench.bench.prepare import Preparation, fingerprint
from agl_bench.bench.spec import Part, make_dataset, naming_the_dataset, part_here
from agl_bench.comparison.gather import PLACE, Gathered
from agl_bench.data.check import check_section
from agl_bench.data.folds import plan_folds
from agl_bench.data.gene_ids import name_by_id
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import HALF

_LONGEST = 1200  # pixels of the longer side of the tissue image


def export_section(
    gathered: Gathered,
    plugins: Plugins,
    prepared: Preparation,
    *,
    place: Mapping[str, str],
    section: str,
    seeds: Sequence[int] = (),
    warn: Callable[[str], None],
) -> AnnData:
    """One section as its dataset reads it, with what every selector has made of it.

    X and obsm["spatial"] are those of the dataset: raw counts, and spot centres in pixels. Added are, over all folds
    that test spots of the section, and all seeds:

        var["agl_primary"]               whether the gene is primary, hence predicted, in any of those folds
        var["agl_weight_SELECTOR"]       effective weight (primary mean = 1), mean over the cells that have the gene;
                                         NaN where none has it
        var["agl_selected_SELECTOR"]     whether it weighs more than half a primary gene in more than half of the cells
                                         in which it is auxiliary
        layers["agl_predicted_SELECTOR"] (spots, genes) float32: prediction for the spot while it was a test spot, in
                                         the units of the targets (by the affine fit of the training spots), mean over
                                         seeds; NaN where the gene was not predicted, which scanpy draws as missing
        uns["agl_bench"]                 place, version, and for each selector the spec (JSON) and the scored cells
        uns["spatial"]                   the tissue image, where there is one that the reader did not bring already

    Args:
        gathered: all cells.
        plugins: who provides which name.
        prepared: the data folder and known digests.
        place: at least "dataset" and "evaluation"; "backbone", "preset" and "tuning" where several were run.
        section: name.
        seeds: only these; empty = all.
        warn: told, in one sentence, of what is left out.

    Raises:
        UnknownName: if nothing was run there.
        BadSpec: if the place is not one, or the data have changed since.
        MissingData: if the data are not there.
    """
    cells = _cells(gathered, place, seeds)
    spec = gathered.specs[cells["key"].iloc[0]]
    part = part_here(plugins, Part(**spec["dataset"]), "dataset")
    dataset = make_dataset(plugins, part)
    label = place["dataset"]
    found = fingerprint(part, dataset, prepared.root, prepared.digests)
    if spec["data"].partition("+")[0] != found:
        raise BadSpec(f"the files of dataset '{label}' have changed since the cells were made; bring them back")
    with naming_the_dataset(part):
        donors = dataset.sections(prepared.root)
    if section not in donors:
        raise UnknownName(f"section of '{label}'", section, donors)
    protocol = Protocol.of(spec["protocol"])
    plans = plan_folds(place["evaluation"], donors, protocol, dataset=label)
    testing = [p.label for p in plans if section in p.test_sections]
    cells = cells[cells["fold"].isin(testing)]
    if cells.empty:
        raise BadSpec(
            f"no finished cell tests section '{section}' ({place['evaluation']}-batch): its folds are "
            f"{', '.join(testing) or 'none'}; run them first"
        )
    with naming_the_dataset(part):
        read = dataset.read(prepared.root, section)
    check_section(read, has_counts=dataset.has_counts)
    data = read.counts.copy()
    name_by_id(data, {gene for key in cells["key"] for gene in gathered.result(key).genes["gene"]})
    _add_image(data, read, section)
    data.var["agl_primary"] = False
    selectors: dict[str, Any] = {}
    for selector, lines in cells.groupby("selector", sort=False):
        tables = {key: gathered.result(key).genes for key in lines["key"]}
        _add_genes(data, str(selector), list(tables.values()))
        _add_predictions(data, str(selector), section, gathered, tables, warn)
        scored = lines[["key", "fold", "seed", "pcc", "selected"]].reset_index(drop=True)
        shared = {k: v for k, v in gathered.specs[lines["key"].iloc[0]].items() if k not in ("fold", "seed")}
        selectors[str(selector)] = {
            "pcc": float(lines["pcc"].mean()),
            "cells": scored.set_axis(scored.index.astype(str)),
            "spec": json.dumps(shared),
        }
    data.uns["agl_bench"] = {
        "version": __version__,
        "section": section,
        "place": {name: str(cells[name].iloc[0]) for name in PLACE},
        "made_by": sorted(set(cells["version"])),
        "machines": sorted(set(cells["machine"])),
        "selectors": selectors,
    }
    return data


def write_h5ad(data: AnnData, path: Path) -> None:
    """Write a file that is whole or not there; what is not predicted takes next to no room.

    HDF5 writes into memory: a file that a full disk breaks stays open in it, and ends the process later on.
    """
    partial = path.with_name(f".{path.name}.part")
    data.strings_to_categoricals()
    try:
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            write_elem(file, "/", data, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
        partial.write_bytes(image.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cells(gathered: Gathered, place: Mapping[str, str], seeds: Sequence[int]) -> pd.DataFrame:
    """Finished cells of one place, controls apart."""
    cells = gathered.cells
    cells = cells[~cells["shuffled"].astype(bool)]
    if cells.empty:
        raise BadSpec(f"{gathered.store.work} has no finished cell to export; run some first")
    for name in PLACE:
        known = list(dict.fromkeys(cells[name]))
        wanted = place.get(name)
        if wanted is not None:
            if wanted not in known:
                raise UnknownName(name, wanted, map(str, known), remedy="Those have finished cells.")
            cells = cells[cells[name] == wanted]
        elif name == "tuning" and "" in known:
            cells = cells[cells[name] == ""]  # fixed settings, unless asked otherwise
        elif len(known) > 1:
            raise BadSpec(f"there are cells of several {name}s, choose by --{name}: {'; '.join(known)}")
    if seeds:
        absent = sorted(set(seeds) - set(cells["seed"]))
        if absent:
            raise UnknownName("seed", str(absent[0]), map(str, dict.fromkeys(cells["seed"])))
        cells = cells[cells["seed"].isin(seeds)]
    return cells


def _add_genes(data: AnnData, selector: str, tables: list[pd.DataFrame]) -> None:
    weight, times, chosen, auxiliary = (np.zeros(data.n_vars) for _ in range(4))
    primary = data.var["agl_primary"].to_numpy(copy=True)
    for table in tables:
        column = data.var_names.get_indexer(table["gene"])
        there, is_primary = column >= 0, table["primary"].to_numpy(dtype=bool)
        own, free = table["weight"].to_numpy(dtype=np.float64), there & ~is_primary
        weight[column[there]] += own[there]
        times[column[there]] += 1
        chosen[column[free]] += own[free] > HALF
        auxiliary[column[free]] += 1
        primary[column[there & is_primary]] = True
    data.var["agl_primary"] = primary
    data.var[f"agl_weight_{selector}"] = np.where(times > 0, weight / np.maximum(times, 1), np.nan).astype(np.float32)
    data.var[f"agl_selected_{selector}"] = chosen * 2 > auxiliary


def _add_predictions(
    data: AnnData,
    selector: str,
    section: str,
    gathered: Gathered,
    tables: Mapping[str, pd.DataFrame],
    warn: Callable[[str], None],
) -> None:
    lacking = [k for k, t in tables.items() if "slope" not in t or "predictions" not in gathered.store.kept(k)]
    if lacking:
        warn(
            f"{selector}: no predictions, since {len(lacking)} of {len(tables)} cells have kept none; "
            f"`agl-bench rerun {lacking[0]} --keep predictions --work {gathered.store.work}` brings those of one"
        )
        return
    names = data.var_names[data.var["agl_primary"]]
    total, times = (np.zeros((data.n_obs, len(names))) for _ in range(2))
    for key, table in tables.items():
        primary = table[table["primary"]]
        kept = gathered.store.predictions(key, ["section", "spot", *("predicted:" + primary["gene"])])
        kept = kept[kept["section"] == section]
        rows, columns = data.obs_names.get_indexer(kept["spot"]), names.get_indexer(primary["gene"])
        there = columns >= 0  # a section may lack a gene of the panel
        made = kept.iloc[:, 2:].to_numpy(np.float64) * primary["slope"].to_numpy() + primary["offset"].to_numpy()
        place = np.ix_(rows, columns[there])
        total[place] += made[:, there]
        times[place] += 1
    layer = np.full(data.shape, np.nan, dtype=np.float32)
    layer[:, data.var_names.get_indexer(names)] = np.where(times > 0, total / np.maximum(times, 1), np.nan)
    data.layers[f"agl_predicted_{selector}"] = layer


def _add_image(data: AnnData, section: Section, name: str) -> None:
    """The tissue in the layout of Space Ranger, which scanpy and squidpy plot under the spots."""
    overview = getattr(section.patches, "overview", None)
    if overview is None or "spatial" in data.uns:
        return
    picture, scale = overview(_LONGEST)
    data.uns["spatial"] = {
        name: {
            "images": {"hires": picture},
            "scalefactors": {"tissue_hires_scalef": 1 / scale, "spot_diameter_fullres": drawn_diameter_px(section)},
        }
    }
