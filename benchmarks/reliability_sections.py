"""Small sections whose truth is known, and what `validate` and `prepare` make of them. For the reliability of files.

Around each spot lies a disc of its own colour, and the first gene counts the spot's number, so that whatever is turned,
shifted, scaled, swapped or repeated on the way shows in what was prepared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy  # noqa: F401  (imported once, here: the commands are forks)
import tifffile  # noqa: F401  (likewise)
import zarr  # noqa: F401  (likewise)
from reliability import REFUSED, RIGHT, TRACEBACK, WRONG, Answer, Trial
from scipy import sparse

from agl_bench.bench import prepare, run, validate  # noqa: F401  (likewise)
from agl_bench.cli import main as command

PX = 32  # of a prepared patch, which shows 112 µm
OURS = itertools.repeat(True)  # whether the next trial is one of this process
NEAR = 20  # levels that a colour may differ, for JPEG and the bicubic filter


@dataclass
class Truth:
    """A section as it is.

    Attributes:
        names: (spots,) barcodes.
        genes: (genes,) symbols.
        counts: (spots, genes) int32.
        xy: (spots, 2) px, 1 µm each.
        array: (spots, 2) row and column on the hexagonal array.
        colours: (spots, 3) uint8 of the discs.
        pixels: (height, width, 3) uint8.
    """

    names: list[str]
    genes: list[str]
    counts: np.ndarray
    xy: np.ndarray
    array: np.ndarray
    colours: np.ndarray
    pixels: np.ndarray

    @property
    def n(self) -> int:
        """Spots."""
        return len(self.names)

    def table(self, **uns: object) -> anndata.AnnData:
        """As AnnData, positions in `obsm["spatial"]`."""
        return anndata.AnnData(
            sparse.csr_matrix(self.counts),
            obs=pd.DataFrame(index=self.names),
            var=pd.DataFrame(index=self.genes),
            obsm={"spatial": self.xy.copy()},
            uns={"um_per_px": 1.0, **uns},
        )


def section(rows: int = 5, columns: int = 6, genes: int = 30, seed: int = 0) -> Truth:
    """A hexagonal grid of spots 100 µm apart."""
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(rows * columns), columns)
    n = len(row)
    array = np.stack([row, 2 * column + row % 2], axis=1)
    xy = np.stack([array[:, 1] * 50.0, array[:, 0] * 50 * 3**0.5], axis=1) + 90
    counts = rng.poisson(rng.gamma(2, 1, (n, 1)) * (1 + rng.uniform(0, 3, (1, genes)))).astype(np.int32)
    counts[:, 0] = np.arange(n) + 1
    width, height = (xy.max(axis=0) + 90).astype(int)
    pixels = rng.integers(180, 220, (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    colours = np.stack(
        [30 + np.arange(n) * 7 % 200, 220 - np.arange(n) * 5 % 180, np.arange(n) * 53 % 200], axis=1
    ).astype(np.uint8)
    for (left, top), colour in zip(xy, colours, strict=True):
        pixels[(x - left) ** 2 + (y - top) ** 2 <= 32**2] = colour
    return Truth(
        [f"SPOT{i:03d}-1" for i in range(n)], [f"GENE{g}" for g in range(genes)], counts, xy, array, colours, pixels
    )


def forked(words: Sequence[object]) -> Answer:
    """Run the command as a fork of this process, as a user would run it in one of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status: Any = 1
            try:
                os.environ.update({"NO_COLOR": "1", "COLUMNS": "200"})
                command([str(word) for word in words])
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:  # noqa: BLE001  (nothing of it may go on as this process)
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 1)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Answer(ended, *texts)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has stored of a section.

    Attributes:
        spots, genes: names.
        counts: (spots, genes).
        patches: (spots, 3, PX, PX), if any.
        donor: "" where it is not known.
    """

    spots: list[str]
    genes: list[str]
    counts: np.ndarray
    patches: np.ndarray | None
    donor: str = ""


def prepared_in(work: Path) -> dict[str, Prepared]:
    """All sections below a work folder, by name."""
    found = {}
    for manifest in work.rglob("section.json"):
        folder = manifest.parent
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        parts = [np.load(folder / f"counts.{part}.npy") for part in ("data", "indices", "indptr")]
        shape = len(names["spots"]), len(names["genes"])
        patches = [np.load(path) for path in folder.glob("patches-*.npy")]
        stated = json.loads(manifest.read_text(encoding="utf-8"))
        counts = sparse.csr_matrix(tuple(parts), shape=shape).toarray()
        found[stated["name"]] = Prepared(names["spots"], names["genes"], counts, (*patches, None)[0], stated["donor"])
    return found


def difference(truth: Truth, got: Prepared, kept: int | None = None) -> str:
    """How what was prepared differs from what is true, "" if it does not.

    Args:
        truth: of the section.
        got: what was prepared of it.
        kept: how many spots are to be there; None = all.
    """
    if len(got.spots) != (truth.n if kept is None else kept) or not set(got.spots) <= set(truth.names):
        return f"spots: {len(got.spots)}, the first is {got.spots[0]}"
    rows = [truth.names.index(name) for name in got.spots]
    if list(got.genes) != truth.genes:
        return f"genes: {', '.join(got.genes[:3])}, …"
    if not np.array_equal(got.counts, truth.counts[rows]):
        return f"counts of {int((got.counts != truth.counts[rows]).any(axis=1).sum())} spots"
    if got.patches is None:
        return "no patches"
    middle = got.patches[:, :, PX // 2 - 2 : PX // 2 + 2, PX // 2 - 2 : PX // 2 + 2].mean(axis=(2, 3))
    off = int((np.abs(middle - truth.colours[rows]).max(axis=1) > NEAR).sum())
    return f"colours of {off} of {len(rows)} spots" if off else ""


Judge = Callable[[Mapping[str, Prepared]], str]


def tried(kind: str, name: str, spec: str, truth: Truth | Judge, *words: str, kept: int | None = None) -> Trial | None:
    """One bad or odd input: `validate` and `prepare` on it, and whether what came out is true. None if not `OURS`.

    Args:
        kind: row of the table.
        name: which input.
        spec: what the commands are given, a dataset or a path.
        truth: of the only section, or what judges all prepared sections: it says what is wrong, "" for nothing.
        words: further words of both commands, e.g. --set NAME.KEY=VALUE.
        kept: how many spots of `truth` are to be there; None = all.
    """
    if not next(OURS):
        return None
    with tempfile.TemporaryDirectory(prefix="reliability-") as work:
        looked = forked(["validate", spec, *words])
        made = forked(["prepare", spec, "--px", PX, "--work", work, *words])
        found = prepared_in(Path(work))
    for answer in (looked, made):
        is_traced = answer.has_traceback or "Warning: " in answer.err
        if is_traced or (answer.status and not answer.is_refusal):
            return Trial(kind, name, TRACEBACK, f"status {answer.status}: {answer.last_line}")
    if made.status or looked.status:
        return Trial(kind, name, REFUSED, (made if made.status else looked).last_line)
    if isinstance(truth, Truth):
        wrong = difference(truth, next(iter(found.values())), kept) if len(found) == 1 else f"{len(found)} sections"
    else:
        wrong = truth(found)
    return Trial(kind, name, WRONG if wrong else RIGHT, wrong)
