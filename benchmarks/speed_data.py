"""How fast spots reach a model: this store against slicing AnnData and transforming with Pillow spot by spot.

    python benchmarks/speed_data.py            # spots per second with augmentation, batch by batch
    python benchmarks/speed_data.py --frozen   # also: training on kept features of a frozen ResNet-18, or end to end

Data are made up in memory. Every way ends with the same: a batch of turned and flipped patches as float32, normalised
with ImageNet's mean and deviation, and dense expression, on the device.

A batch of 128 × 224 px is 77 MB. With glibc on a CPU most of its time is the kernel's, which hands out fresh pages for
each array of more than 32 MB; MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 in the environment
keeps them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import measure
import numpy as np
import torch
from anndata import AnnData
from PIL import Image
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from agl_bench.data.patches import ArrayPatches
from agl_bench.data.preprocess import SpotTable, tabulate
from agl_bench.data.store import SpotStore
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench.training.model import Model
from agl_bench_plugins.backbones.resnet import ResNet18

UM = 112.0
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STORES = {
    "store: dense, on the device": {"form": "dense", "patches_on": "device"},
    "store: CSR, on the device": {"form": "csr", "patches_on": "device"},
    "store: CSR, patches on the host": {"form": "csr", "patches_on": "host"},
    "store: all in the sections": {"form": "mapped", "patches_on": "mapped"},
}


def make_table(spots: int, genes: int, density: float, px: int) -> tuple[SpotTable, np.ndarray]:
    """One section with random counts and patches, and the patches (spots, px, px, 3) themselves."""
    rng = np.random.default_rng(0)
    columns = [np.sort(rng.choice(genes, round(genes * density), replace=False)) for _ in range(spots)]
    indices = np.concatenate(columns).astype(np.int32)
    values = rng.geometric(0.4, len(indices)).astype(np.float32)
    counts = sparse.csr_matrix((values, indices, np.cumsum([0, *map(len, columns)])), shape=(spots, genes))
    pixels = rng.integers(0, 256, (spots, px, px, 3), dtype=np.uint8)
    made = AnnData(counts, obsm={"spatial": rng.random((spots, 2))})
    made.var_names = list(map(str, range(genes)))
    section = Section("made up", made, 1.0, patches=ArrayPatches(pixels, UM))
    return tabulate([section], Protocol(min_genes_per_spot=0, spot_mads=0)), pixels


class Items(Dataset[tuple[Tensor, Tensor]]):
    """Spots one by one, as the code of Shiku et al. reads them."""

    def __init__(self, expression: sparse.csr_matrix, pixels: np.ndarray, rows: np.ndarray) -> None:
        self.view, self.pixels, self.rows = AnnData(expression)[rows], pixels, rows
        self.px, self.rng = pixels.shape[1], np.random.default_rng(0)
        self.mean, self.deviation = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, DEVIATION))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Patch (3, px, px) and expression (genes,)."""
        image = Image.fromarray(self.pixels[self.rows[i]])
        image = image.resize((self.px, self.px), Image.Resampling.BICUBIC)
        image = image.crop((0, 0, self.px, self.px))  # patches are square: the centre is all of it
        for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_90):
            if self.rng.random() < 0.5:
                image = image.transpose(turn)
        patch = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return (patch - self.mean) / self.deviation, torch.from_numpy(self.view[i].X.toarray()[0])


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median time of `work`, which runs once beforehand."""
    return statistics.median(measure.alternate({"work": work}, repeats)["work"])


def batches(count: int, size: int) -> list[np.ndarray]:
    """All rows in random order."""
    return np.split(np.random.default_rng(1).permutation(count), range(size, count, size))


def rows(options: argparse.Namespace) -> list[measure.Row]:
    """Measure each way: what, spots per second, and how many times the first way of its part."""
    place, px, batch = options.device, options.px, options.batch
    spots = options.spots
    table, pixels = make_table(spots, options.genes, options.density, px)
    mean, deviation = (torch.tensor(t, device=place).view(3, 1, 1) for t in (MEAN, DEVIATION))

    def one_by_one() -> None:
        some = np.random.default_rng(1).permutation(spots)[: options.items]
        items = Items(table.rows(np.arange(spots)), pixels, some)
        for patches, expression in DataLoader(items, batch_size=batch, shuffle=True):
            patches.to(place), expression.to(place)

    def stream(store: SpotStore) -> None:
        for at in store.stream(batches(spots, batch), torch.Generator(place).manual_seed(0)):
            (at.spots.patches - mean).div_(deviation)

    found = [("AnnData and Pillow, one by one", min(options.items, spots) / seconds(one_by_one, 1))]
    for name, choice in STORES.items():
        store = make_store(table, px, place, **choice)
        found.append((name, spots / seconds(partial(stream, store), options.repeats)))
    some = torch.from_numpy(pixels[:batch]).to(place)  # for scale: what no way of giving out floats can beat

    def floats() -> None:
        for _ in range(spots // batch):
            torch.true_divide(some, 255)

    found.append(("bytes to floats, nothing else", spots // batch * batch / seconds(floats, options.repeats)))
    results = [*_against_the_first(found)]
    return results + (training_rows(table, px, place) if options.frozen else [])


def training_rows(table: SpotTable, px: int, device: torch.device, batch: int = 64) -> list[measure.Row]:
    """Training a ResNet-18 end to end on two batches, against its shared layer on kept features of all spots."""
    spots, genes = len(table), len(table.genes)
    store = make_store(table, px, device)
    few = batches(spots, batch)[:2]

    def train(model: Model, chosen: list[np.ndarray]) -> Callable[[], None]:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])

        def epoch() -> None:
            model.train()
            for at in store.stream(chosen, torch.Generator(device).manual_seed(0)):
                loss = torch.nn.functional.mse_loss(model(at.spots)[1], at.expression)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return epoch

    def model(frozen: bool) -> Model:
        example = store.spots(torch.arange(1, device=device))
        return Model(ResNet18(example, weights="none", patch_px=px, frozen=frozen), genes).to(device)

    whole, part = model(frozen=False), model(frozen=True)
    found = [("ResNet-18, end to end", sum(map(len, few)) / seconds(train(whole, few), 1))]
    some = make_store(table, px, device, count=batch)
    encoding = batch / seconds(lambda: [part.backbone.encode(at.spots) for at in some.stream([np.arange(batch)])])
    store.take_embedding(
        torch.rand(8, spots, part.backbone.trunk.num_features, device=device)
    )  # speed is all that counts
    found.append(("ResNet-18, frozen, features kept", spots / seconds(train(part, batches(spots, batch)))))
    found.append(("  once for each symmetry: encoding", encoding))
    return [*_against_the_first(found)]


def make_store(
    table: SpotTable, px: int, device: torch.device, count: int | None = None, **choice: object
) -> SpotStore:
    """A store of the first spots."""
    chosen, columns = np.arange(len(table))[:count], np.arange(len(table.genes))
    return SpotStore(table, chosen, columns, sees="patches", patch_px=px, patch_um=UM, device=device, **choice)


def _against_the_first(found: list[tuple[str, float]]) -> Iterator[measure.Row]:
    for name, speed in found:
        yield {"what": name, "spots_per_s": speed, "times": speed / found[0][1]}


def main() -> None:
    """Print the table."""
    parser = measure.parser(__doc__)
    parser.add_argument("--spots", type=int, default=2000, help="in the stores; one epoch of them is timed")
    parser.add_argument("--genes", type=int, default=15_000, help="columns of the expression")
    parser.add_argument("--density", type=float, default=0.1, help="share of them that is not zero in a spot")
    parser.add_argument("--px", type=int, default=224, help="side of the patches as stored")
    parser.add_argument("--batch", type=int, default=128, help="spots in a batch")
    parser.add_argument("--items", type=int, default=512, help="spots that are timed where they come one by one")
    parser.add_argument("--frozen", action="store_true", help="measure training too")
    options = measure.options(parser, quick={"spots": 40, "genes": 50, "px": 16, "batch": 8, "items": 16})
    measure.report("speed_data", rows(options), options)


if __name__ == "__main__":
    main()
