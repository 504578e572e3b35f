"""What preparing a large section takes: seconds, and memory beyond what the process has when it begins.

    python benchmarks/prepare.py                       # 5,000 spots, image of 25,000 × 25,000 px, patches of 224 px
    python benchmarks/prepare.py --forms tiles         # of .tif only; jpeg = one .jpg; small parts of it are re-used

The section is made up and written to a folder that goes with the process. Each form is prepared in a process of its
own: "prepare" reads, checks and writes the counts and cuts the patches, "again" opens what is there and
compares it with its digests, as each process does once, "trusted" opens it with AGL_BENCH_TRUST_TIMES=1, "share" is how
much of preparing the comparison takes, "another size" cuts patches of 32 px, "read" gathers the patches of a random
tenth of the spots.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import anndata
import measure
import numpy as np
import tifffile
import torch
from PIL import Image
from scipy import sparse

from agl_bench import ImagePatches, Section
from agl_bench.data.prepared import PatchSize, SectionCache
from agl_bench.digests import TRUST, FileDigests

UM_PER_PX, UM = 0.5, 112.0
TILE = 256
KEY = "made-up"


def write(folder: Path, form: str, options: argparse.Namespace) -> None:
    """Counts and an image of smooth noise: what costs is the number of pixels and tiles, not what they show."""
    rng = np.random.default_rng(0)
    nonzero = round(options.genes * options.density)
    indices = np.concatenate([np.sort(rng.choice(options.genes, nonzero, replace=False)) for _ in range(options.spots)])
    values = rng.geometric(0.4, len(indices)).astype(np.int32)
    indptr = np.arange(options.spots + 1) * nonzero
    counts = anndata.AnnData(
        sparse.csr_matrix((values, indices.astype(np.int32), indptr), (options.spots, options.genes))
    )
    counts.obs_names, counts.var_names = (
        [f"{c}{i}" for i in range(n)] for c, n in zip("sg", counts.shape, strict=True)
    )
    counts.obsm["spatial"] = rng.uniform(0, options.side, (options.spots, 2))
    counts.write_h5ad(folder / "counts.h5ad")
    rough = Image.fromarray(rng.integers(0, 256, (TILE // 4, TILE // 4, 3), dtype=np.uint8))
    piece = np.asarray(rough.resize((TILE, TILE), Image.Resampling.BICUBIC))
    if form == "tiles":
        across = -(-options.side // TILE)
        tiles = (np.roll(piece, number % TILE, axis=0) for number in range(across * across))
        tifffile.imwrite(
            folder / "image.tif", tiles, shape=(options.side, options.side, 3), dtype=np.uint8, tile=(TILE, TILE),
            photometric="rgb", compression="jpeg", compressionargs={"level": 85}, bigtiff=True,
        )  # fmt: skip
    else:
        times = -(-options.side // TILE)
        whole = np.tile(piece, (times, times, 1))[: options.side, : options.side]
        guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        Image.fromarray(whole).save(folder / "image.jpg", quality=85)
        Image.MAX_IMAGE_PIXELS = guard


def measured(device: torch.device, folder: str, px: int) -> measure.Row:
    """One section prepared, in a process of its own."""
    here = Path(folder)
    (image,) = here.glob("image.*")

    def read() -> Section:
        counts = anndata.read_h5ad(here / "counts.h5ad")
        return Section("S", counts, UM_PER_PX, ImagePatches(image, counts.obsm["spatial"], UM_PER_PX, section="S"))

    def timed(work: object) -> tuple[float, object]:
        started = time.perf_counter()
        result = work()  # type: ignore[operator]
        return time.perf_counter() - started, result

    size = PatchSize(px, UM)

    def opened(cache: SectionCache) -> Section:
        found = cache.section(KEY, read, size)
        found.patches.prepare(size)
        return found

    most = measure.Peak(device)
    cache = SectionCache(here / "cache", FileDigests(here / "cache" / "files.json"), print)
    prepare, section = timed(lambda: cache.section(KEY, read, size))
    peak = most.mib()
    cache = SectionCache(here / "cache", FileDigests(here / "cache" / "files.json"), print)
    again, section = timed(lambda: opened(cache))
    cache.digests.keep()
    os.environ[TRUST] = "1"
    trusted, _ = timed(lambda: opened(SectionCache(here / "cache", FileDigests(here / "cache" / "files.json"), print)))
    del os.environ[TRUST]
    other, _ = timed(lambda: section.patches.prepare(PatchSize(32, UM)))
    rows = np.random.default_rng(1).permutation(section.counts.n_obs)[: max(section.counts.n_obs // 10, 1)]
    gather, _ = timed(lambda: section.patches.read(rows, px, UM))
    return {
        "image_MiB": image.stat().st_size / measure.MIB,
        "cache_MiB": cache.bytes(KEY) / measure.MIB,
        "prepare_s": prepare,
        "peak_MiB": peak,
        "again_s": again,
        "trusted_s": trusted,
        "share": (again - trusted) / prepare,
        "another_size_s": other,
        "read_s": gather,
    }


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """One row for each form of image."""
    found = []
    for form in options.forms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), form, options)
            row = measure.fresh("prepare:measured", options.device, folder=folder, px=options.px)
        found.append({"image": form, "spots": options.spots, "side_px": options.side, "patch_px": options.px, **row})
    return found


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__, repeats=1)
    parser.add_argument("--forms", default="tiles,jpeg", help="of the image, separated by ,: tiles, jpeg")
    parser.add_argument("--spots", type=int, default=5000)
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--density", type=float, default=0.1, help="share of genes that are counted in a spot")
    parser.add_argument("--side", type=int, default=25_000, help="of the image in pixels")
    parser.add_argument("--px", type=int, default=224, help="side of the patches")
    options = measure.options(parser, quick={"spots": 40, "genes": 50, "side": 600, "px": 16})
    measure.report("prepare", rows(options), options)


if __name__ == "__main__":
    main()
