"""One measured section, written in every layout that a reader knows."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from agl_bench import ImagePatches

ROWS, COLUMNS, GENES = 8, 10, 30
UM_PER_PX = 7.0  # 112 µm are 16 px
SIDE_PX = 16
NAME = "S1"


class Measured:
    """The arrays that every layout is written from; tests change them before or the files after.

    Attributes:
        counts: (spots, genes) int32.
        array: (spots, 2) row and column on the hexagonal array.
        positions: (spots, 2) whole pixels, (x, y).
        pixels: (height, width, 3) uint8, tissue of many colours.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        row, column = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
        self.array = np.stack([row, 2 * column + row % 2], axis=1)
        um = np.stack([self.array[:, 1] * 50.0, row * 50.0 * math.sqrt(3)], axis=1)
        self.positions = np.rint(um / UM_PER_PX).astype(np.int64) + 20
        width, height = self.positions.max(0) + 20
        self.pixels = rng.integers(60, 220, (height, width, 3), dtype=np.uint8)
        rate = rng.gamma(4.0, 1.0, (len(row), 1)) * rng.uniform(0.5, 2.0, GENES)
        self.counts = rng.poisson(rate).astype(np.int32)
        self.barcodes = [f"{'ACGT'[s % 4]}{'ACGT'[s // 4 % 4]}{s:04d}-1" for s in range(len(row))]
        self.genes = [f"GENE{g:02d}" for g in range(GENES)]

    def table(self, *, spatial: bool = True, **uns: object) -> anndata.AnnData:
        return anndata.AnnData(
            scipy.sparse.csr_matrix(self.counts),
            obs=pd.DataFrame(index=self.barcodes),
            var=pd.DataFrame(index=self.genes),
            obsm={"spatial": self.positions.astype(np.float64)} if spatial else {},
            uns=uns,
        )

    def write_image(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels).save(path)

    def write_patches(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = ImagePatches(self.pixels, self.positions, UM_PER_PX).read(
            np.arange(len(self.barcodes)), SIDE_PX, SIDE_PX * UM_PER_PX
        )
        with h5py.File(path, "w") as file:
            file["img"] = cut.transpose(0, 2, 3, 1)
            file["coords"] = self.positions
            file["barcode"] = np.array(self.barcodes, dtype="S")[:, None]

    def folder(self, root: Path) -> Path:
        """counts.h5ad and image.png."""
        (root / NAME).mkdir(parents=True)
        self.table(um_per_px=UM_PER_PX).write_h5ad(root / NAME / "counts.h5ad")
        self.write_image(root / NAME / "image.png")
        return root

    def folder_patches(self, root: Path) -> Path:
        """counts.h5ad and patches.h5."""
        (root / NAME).mkdir(parents=True)
        self.table(um_per_px=UM_PER_PX, patch_um=SIDE_PX * UM_PER_PX).write_h5ad(root / NAME / "counts.h5ad")
        self.write_patches(root / NAME / "patches.h5")
        return root

    def hest(self, root: Path) -> Path:
        """st/, patches/ and metadata/."""
        for kind in ("st", "metadata"):
            (root / kind).mkdir(parents=True)
        self.table().write_h5ad(root / "st" / f"{NAME}.h5ad")
        self.write_patches(root / "patches" / f"{NAME}.h5")
        (root / "metadata" / f"{NAME}.json").write_text(
            json.dumps({"pixel_size_um_estimated": UM_PER_PX, "organ": "Heart", "st_technology": "Visium"})
        )
        return root

    def write_positions(self, path: Path) -> None:
        table = pd.DataFrame(
            {
                "barcode": self.barcodes,
                "in_tissue": 1,
                "array_row": self.array[:, 0],
                "array_col": self.array[:, 1],
                "pxl_row_in_fullres": self.positions[:, 1],
                "pxl_col_in_fullres": self.positions[:, 0],
            }
        )
        if path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, index=False, header="list" not in path.name)

    def _spatial(self, root: Path, table: str) -> Path:
        sample = root / NAME
        (sample / "outs" / "spatial").mkdir(parents=True)
        self.write_positions(sample / "outs" / "spatial" / table)
        (sample / "outs" / "spatial" / "scalefactors_json.json").write_text(
            json.dumps({"spot_diameter_fullres": 55 / UM_PER_PX, "microns_per_pixel": UM_PER_PX})
        )
        self.write_image(sample / "slide.tif")
        return sample / "outs"

    def visium_h5(self, root: Path) -> Path:
        """filtered_feature_bc_matrix.h5 and a headed table."""
        outs = self._spatial(root, "tissue_positions.csv")
        by_spot = scipy.sparse.csr_matrix(self.counts)  # spots × genes by rows = genes × spots by columns
        with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as file:
            matrix = file.create_group("matrix")
            matrix["barcodes"] = np.array(self.barcodes, dtype="S")
            matrix["data"], matrix["indices"] = by_spot.data, by_spot.indices.astype(np.int64)
            matrix["indptr"] = by_spot.indptr.astype(np.int64)
            matrix["shape"] = np.array(self.counts.shape[::-1], dtype=np.int32)
            features = matrix.create_group("features")
            features["id"] = np.array([f"ENSG{g:011d}" for g in range(len(self.genes))], dtype="S")
            features["name"] = np.array(self.genes, dtype="S")
            features["feature_type"] = np.array(["Gene Expression"] * len(self.genes), dtype="S")
            features["genome"] = np.array(["GRCh38"] * len(self.genes), dtype="S")
        return root

    def visium_mtx(self, root: Path) -> Path:
        """filtered_feature_bc_matrix/ and a table without header."""
        folder = self._spatial(root, "tissue_positions_list.csv") / "filtered_feature_bc_matrix"
        folder.mkdir()
        with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
            scipy.io.mmwrite(file, scipy.sparse.coo_matrix(self.counts.T))
        with gzip.open(folder / "features.tsv.gz", "wt") as file:
            file.writelines(f"ENSG{g:011d}\t{name}\tGene Expression\n" for g, name in enumerate(self.genes))
        with gzip.open(folder / "barcodes.tsv.gz", "wt") as file:
            file.writelines(f"{barcode}\n" for barcode in self.barcodes)
        return root

    def visium_parquet(self, root: Path) -> Path:
        """As `visium_h5`, with the positions in a parquet file."""
        spatial = self.visium_h5(root) / NAME / "outs" / "spatial"
        (spatial / "tissue_positions.csv").unlink()
        self.write_positions(spatial / "tissue_positions.parquet")
        return root

    def spatialdata(self, root: Path) -> Path:
        """A zarr store."""
        pytest.importorskip("spatialdata", reason="the extra spatialdata is not installed")
        self.store().write(root / f"{NAME}.zarr")
        return root

    def store(self, *, scale: float = 1.0, pyramid: bool = False):
        """A SpatialData object whose shapes are in pixels of the image × `scale`."""
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Identity, Scale

        spots = ShapesModel.parse(
            self.positions * scale,
            geometry=0,
            radius=55 / 2 / UM_PER_PX * scale,
            transformations={"global": Scale([1 / scale, 1 / scale], axes=("x", "y"))},
        )
        table = self.table(spatial=False)
        table.obs["region"] = pd.Categorical(["spots"] * table.n_obs)
        table.obs["spot"] = np.arange(table.n_obs)
        slide = Image2DModel.parse(
            self.pixels.transpose(2, 0, 1),
            dims=("c", "y", "x"),
            transformations={"global": Identity()},
            scale_factors=[2] if pyramid else None,
        )
        return SpatialData(
            images={"slide": slide},
            shapes={"spots": spots},
            tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot")},
        )


@pytest.fixture
def measured() -> Measured:
    return Measured()
