"""Positions that contradict what is beside them; files of Space Ranger, HEST-1k and patches. For `reliability_files`.

Sound forms that look odd stand among the bad ones: they have to be read right.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
from PIL import Image
from reliability import Trial
from reliability_sections import Truth, section, tried
from scipy import sparse

POSITIONS, FORMATS = "positions", "formats"
PLACES = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
SCALES = {"spot_diameter_fullres": 55.0, "tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.1}
Change = Callable[[Path, Truth], object]  # of the folder of a sample that is sound


def positions(truth: Truth) -> pd.DataFrame:
    """The table of positions as Space Ranger has it."""
    columns = {"array_row": truth.array[:, 0], "array_col": truth.array[:, 1]}
    places = dict(zip(PLACES, truth.xy[:, ::-1].T, strict=True))
    return pd.DataFrame({"barcode": truth.names, "in_tissue": 1} | columns | places)


def space_ranger(home: Path, truth: Truth, bin_um: int = 0) -> None:
    """A sample with matrix, positions, scale factors, reduced pictures and image."""
    (home / "spatial").mkdir(parents=True)
    by_spot = sparse.csr_matrix(truth.counts)
    with h5py.File(home / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(truth.names, "S")
        matrix["data"], matrix["indices"], matrix["indptr"] = by_spot.data, by_spot.indices, by_spot.indptr
        matrix["shape"] = np.array(truth.counts.shape[::-1], "i4")
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{g:011d}" for g in range(len(truth.genes))], "S")
        features["name"] = np.array(truth.genes, "S")
        features["feature_type"] = np.array(["Gene Expression"] * len(truth.genes), "S")
        features["genome"] = np.array(["GRCh38"] * len(truth.genes), "S")
    positions(truth).to_csv(home / "spatial" / "tissue_positions.csv", index=False)
    stated = {"bin_size_um": bin_um, "microns_per_pixel": 1.0, "spot_diameter_fullres": bin_um} if bin_um else {}
    (home / "spatial" / "scalefactors_json.json").write_text(json.dumps(SCALES | stated))
    image = Image.fromarray(truth.pixels)
    image.save(home / "slide.png")
    for key, name in (("tissue_hires_scalef", "hires"), ("tissue_lowres_scalef", "lowres")):
        size = round(image.width * SCALES[key]), round(image.height * SCALES[key])
        image.resize(size, Image.Resampling.BOX).save(home / "spatial" / f"tissue_{name}_image.png")


def as_folder(home: Path, truth: Truth, columns: int, packed: bool = True, called: str = "features.tsv") -> None:
    """The matrix as a folder of text instead."""
    (home / "filtered_feature_bc_matrix.h5").unlink()
    folder = home / "filtered_feature_bc_matrix"
    folder.mkdir()
    opened: Any = gzip.open if packed else open
    end = ".gz" if packed else ""
    with opened(folder / f"matrix.mtx{end}", "wb") as file:
        scipy.io.mmwrite(file, sparse.coo_matrix(truth.counts.T))
    with opened(folder / f"{called}{end}", "wt") as file:
        for number, gene in enumerate(truth.genes):
            file.write("\t".join([f"ENSG{number:011d}", gene, "Gene Expression"][:columns]) + "\n")
    with opened(folder / f"barcodes.tsv{end}", "wt") as file:
        file.write("\n".join(truth.names) + "\n")


def table(change: Callable[[pd.DataFrame], pd.DataFrame], name: str = "tissue_positions.csv", **how: Any) -> Change:
    """Write a changed table of positions."""

    def write(home: Path, truth: Truth) -> None:
        changed = change(positions(truth))
        if name.endswith("parquet"):
            changed.to_parquet(home / "spatial" / name)
        else:
            changed.to_csv(home / "spatial" / name, **{"index": False, **how})

    return write


def moved(factor: float = 1.0, by: float = 0.0) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Places at another scale or shifted."""
    return lambda t: t.assign(**{place: t[place] * factor + by for place in PLACES})


def ordered(rows: list[int], columns: list[str]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Some columns in another order of the rows."""
    return lambda t: t.assign(**{column: t[column].to_numpy()[rows] for column in columns})


def scales(**changes: object) -> Change:
    """Write changed scale factors."""

    def write(home: Path, truth: Truth) -> None:
        (home / "spatial" / "scalefactors_json.json").write_text(json.dumps(SCALES | changes))

    return write


def image(change: Callable[[Image.Image], Image.Image], name: str = "slide.png") -> Change:
    """Write a changed image."""
    return lambda home, truth: change(Image.fromarray(truth.pixels)).save(home / name)


def turned(home: Path, truth: Truth) -> None:
    """The slide turned by a quarter on its way to Space Ranger: image, pictures and positions agree."""
    truth.xy = np.stack([len(truth.pixels) - truth.xy[:, 1], truth.xy[:, 0]], axis=1)
    truth.pixels = np.rot90(truth.pixels, -1).copy()
    for name, factor in (("../slide", 1.0), ("tissue_hires_image", 0.5), ("tissue_lowres_image", 0.1)):
        here = Image.fromarray(truth.pixels)
        here.resize((round(here.width * factor), round(here.height * factor)), Image.Resampling.BOX).save(
            home / "spatial" / f"{name}.png"
        )
    table(lambda t: t)(home, truth)


def without(*names: str) -> Change:
    """Files of the sample removed."""
    return lambda home, truth: [(home / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    """One after another."""
    return lambda home, truth: [change(home, truth) for change in changes]


BARE = without("spatial/tissue_hires_image.png", "spatial/tissue_lowres_image.png")
OLDER = "tissue_positions_list.csv"
# What contradicts what is beside it, and what does not.
PLACED: dict[str, Change] = {
    "positions of the reduced image": table(moved(0.5)),
    "positions of the reduced image, no pictures": both(BARE, table(moved(0.5))),
    "positions of a larger export": both(BARE, table(moved(1.5))),
    "stale older table": both(table(lambda t: t), table(moved(0.5), OLDER, header=False)),
    "stale parquet": table(moved(by=40), "tissue_positions.parquet"),
    "stale table of another sample": table(lambda t: t.assign(barcode="X" + t["barcode"]), OLDER, header=False),
    "older table in whole pixels": table(lambda t: t.astype(dict.fromkeys(PLACES, int)), OLDER, header=False),
    "two spots exchanged": table(ordered([1, 0, *range(2, 30)], PLACES)),
    "rows reversed": table(ordered([*range(29, -1, -1)], [PLACES[0]])),
    "places sorted": table(lambda t: t.assign(**{place: np.sort(t[place]) for place in PLACES})),
    "columns of places exchanged": table(lambda t: t.rename(columns=dict(zip(PLACES, PLACES[::-1], strict=True)))),
    "array rows and columns exchanged": table(
        lambda t: t.rename(columns={"array_row": "array_col", "array_col": "array_row"})
    ),
    "mirrored places": table(lambda t: t.assign(pxl_col_in_fullres=730 - t[PLACES[1]])),
    "one direction at half scale": table(lambda t: t.assign(pxl_row_in_fullres=t[PLACES[0]] / 2)),
    "microns_per_pixel of another scan": scales(microns_per_pixel=0.5),
    "spot_diameter_fullres of another scan": scales(spot_diameter_fullres=110.0),
    "spots of 65 µm as Space Ranger 1 has them": scales(spot_diameter_fullres=65.0),
    "tissue_hires_scalef of another run": scales(tissue_hires_scalef=0.17),
    "image of twice the size": image(lambda i: i.resize((i.width * 2, i.height * 2))),
    "image of half the size": image(lambda i: i.resize((i.width // 2, i.height // 2))),
    "image turned": image(lambda i: i.rotate(180)),
    "image mirrored": image(lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "image cropped": image(lambda i: i.crop((40, 0, i.width, i.height))),
    "image shifted": image(lambda i: i.rotate(0, translate=(0, 60))),
    "reduced image for the image": both(
        without("slide.png"), image(lambda i: i.resize((i.width // 2, i.height // 2)), "tissue_hires_image.png")
    ),
    "slide turned, all agree": turned,
}
WRITTEN: dict[str, Change] = {
    "quoted header": table(lambda t: t, quoting=csv.QUOTE_NONNUMERIC),
    "byte-order mark": table(lambda t: t, encoding="utf-8-sig"),
    "UTF-16 with tabs": table(lambda t: t, encoding="utf-16", sep="\t"),
    "semicolons and decimal commas": table(lambda t: t, sep=";", decimal=","),
    "capitals": table(lambda t: t.rename(columns=str.upper)),
    "row names of R": table(lambda t: t.set_index("barcode"), index=True, index_label=""),
    "columns in another order": table(lambda t: t[t.columns[::-1]]),
    "parquet with an index": both(
        without("spatial/tissue_positions.csv"),
        table(lambda t: t.set_index("barcode"), "tissue_positions.parquet"),
    ),
    "older table, quoted": both(
        without("spatial/tissue_positions.csv"), table(lambda t: t, OLDER, header=False, quoting=csv.QUOTE_ALL)
    ),
    "features of two columns": lambda home, truth: as_folder(home, truth, 2),
    "genes.tsv, not packed": lambda home, truth: as_folder(home, truth, 2, packed=False, called="genes.tsv"),
    "in_tissue of other numbers": table(lambda t: t.assign(in_tissue=7)),
    "table of another sample": table(lambda t: t.assign(barcode="X" + t["barcode"])),
    "table without names and of five columns": table(lambda t: t.iloc[:, :5], header=False),
    "scale factors of text": lambda home, truth: (home / "spatial" / "scalefactors_json.json").write_text("none"),
}
Patches = Callable[[h5py.File, Truth], object]


def drop_barcodes(file: h5py.File, truth: Truth) -> None:
    """As a mask applied to the barcodes alone does."""
    kept = file["barcode"][5:]
    del file["barcode"]
    file["barcode"] = kept


def stated(**attributes: object) -> Patches:
    """Attributes of the images."""
    return lambda file, truth: file["img"].attrs.update(attributes)


def cut_at(change: Callable[[np.ndarray], np.ndarray]) -> Patches:
    """Corners where the patches were cut, as the file has them."""

    def write(file: h5py.File, truth: Truth) -> None:
        file["coords"] = change(truth.xy - 56).astype(int)

    return write


CUT: dict[str, Patches] = {
    "fewer barcodes than patches": drop_barcodes,
    "width stated": stated(patch_size_src=112, patch_size_target=64, pixel_size=1.0),
    "wider than stated beside": stated(patch_size_src=224, patch_size_target=64, pixel_size=1.0),
    "other pixels than stored": stated(patch_size_src=112, patch_size_target=224),
    "cut at another pixel size": stated(patch_size_src=112, pixel_size=0.25),
    "corners of the spots": cut_at(lambda corners: corners),
    "corners of other spots": cut_at(lambda corners: np.roll(corners, 3, axis=0)),
    "corners of the reduced image": cut_at(lambda corners: corners / 2),
    "corners as row and column": cut_at(lambda corners: corners[:, ::-1]),
    "fewer corners than patches": cut_at(lambda corners: corners[:-2]),
}


def write_patches(path: Path, truth: Truth, change: Patches) -> None:
    """Patches of 112 µm, 64 px wide."""
    whole = Image.fromarray(truth.pixels)
    boxes = [(x - 56, y - 56, x + 56, y + 56) for x, y in truth.xy]
    with h5py.File(path, "w") as file:
        file["img"] = np.stack([np.asarray(whole.resize((64, 64), box=box)) for box in boxes])
        file["barcode"] = np.array(truth.names, "S")[:, None]
        change(file, truth)


def of_patches(home: Path) -> Iterator[Trial]:
    """Files of patches in a folder of sections and in HEST-1k, and metadata of HEST-1k."""
    for number, (name, change) in enumerate(CUT.items()):
        truth, mine = section(), home / f"folder{number}" / "s"
        mine.mkdir(parents=True)
        truth.table(patch_um=112.0).write_h5ad(mine / "counts.h5ad")
        write_patches(mine / "patches.h5", truth, change)
        yield tried(FORMATS, f"patches.h5, {name}", f"folder:{mine.parent}", truth)
    metadata: dict[str, dict[str, object]] = {
        "sound": {"pixel_size_um_estimated": 1.0, "st_technology": "Visium", "inter_spot_dist": 100},
        "another magnification": {"pixel_size_um_estimated": 0.5, "st_technology": "Visium"},
        "another array": {"pixel_size_um_estimated": 1.0, "inter_spot_dist": 200},
        "a smaller scan": {"pixel_size_um_estimated": 1.0, "fullres_px_width": 300, "fullres_px_height": 300},
    }
    for number, (name, told) in enumerate(metadata.items()):
        truth, mine = section(), home / f"hest{number}"
        for kind in ("st", "patches", "metadata"):
            (mine / kind).mkdir(parents=True)
        truth.table().write_h5ad(mine / "st" / "X1.h5ad")
        write_patches(mine / "patches" / "X1.h5", truth, CUT["corners of the spots"])
        (mine / "metadata" / "X1.json").write_text(json.dumps(told))
        yield tried(FORMATS, f"HEST-1k, {name}", "hest:X1", truth, "--set", f"hest.path={mine}")


def bins(width: int, rows: int = 5, columns: int = 6) -> Truth:
    """The section with bins for spots, a tenth of a bin for a disc."""
    truth = section(rows, columns)
    row, column = np.divmod(np.arange(truth.n), columns)
    truth.array, truth.xy = np.stack([row, column], axis=1), np.stack([column, row], axis=1) * float(width) + 90.5
    truth.names = [f"s_{width:03d}um_{r:05d}_{c:05d}-1" for r, c in truth.array]
    for (x, y), colour in zip(truth.xy, truth.colours, strict=True):
        truth.pixels[int(y) - 7 : int(y) + 8, int(x) - 7 : int(x) + 8] = colour
    return truth


def of_bins(home: Path) -> Iterator[Trial]:
    """Outputs of Visium HD."""
    for width in (2, 16):
        truth, mine = bins(16), home / f"hd{width}" / "outs" / "binned_outputs" / f"square_{width:03d}um"
        truth.names = [name.replace("016um", f"{width:03d}um") for name in truth.names]
        space_ranger(mine, truth, width)
        yield tried(FORMATS, f"Visium HD, bins of {width} µm", f"visium:{mine}", truth)
    yield tried(FORMATS, "Visium HD, the whole output", f"visium:{mine.parents[1]}", truth)
    yield tried(FORMATS, "Visium HD, bins chosen", f"visium:{mine.parents[1]}", truth, "--set", "visium.bins=16")
    rolled = table(lambda t: t.assign(array_row=np.roll(t["array_row"], 6)))
    rolled(mine, truth)
    yield tried(FORMATS, "Visium HD, rows of other bins", f"visium:{mine}", truth)


def trials(folder: Path, quick: bool) -> list[Trial]:
    """All of them; the first few of each sort if `quick`."""
    found = []
    for kind, changes in ((POSITIONS, PLACED), (FORMATS, WRITTEN)):
        for number, (name, change) in enumerate([*changes.items()][: 1 if quick else None]):
            truth, home = section(), folder / f"{kind}{number}" / "sample"
            space_ranger(home, truth)
            change(home, truth)
            found.append(tried(kind, f"Space Ranger, {name}", f"visium:{home}", truth))
    return found if quick else [*found, *of_patches(folder), *of_bins(folder)]
