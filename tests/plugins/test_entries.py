"""What systems and programs leave in folders is no data, in any reader; numbers and names as files have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agl_bench.bench.validate import find_dataset
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.entries import entries, is_data
from agl_bench_plugins.datasets.folder import positive_or_0

FILES = (".DS_Store", "._slide.tif", "._S1", "Thumbs.db", "desktop.ini", "~$notes.docx", ".~lock.notes.odt#", "S1.lock")
FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", ".hidden", "S2.part", "S2.tmp")


def test_names_that_are_data(tmp_path: Path) -> None:
    for name in (*FILES, *FOLDERS, "S1", "a.b", "s,1", "Sample lock", "part"):
        (tmp_path / name).touch()
    assert [path.name for path in entries(tmp_path)] == ["S1", "Sample lock", "a.b", "part", "s,1"]
    assert is_data(Path("S1")) and not is_data(Path("THUMBS.DB"))


@pytest.mark.parametrize("layout", ["folder", "folder_patches", "hest", "visium_h5", "visium_mtx"])
def test_every_reader_passes_litter_by(layout: str, measured: Any, tmp_path: Path) -> None:
    root = getattr(measured, layout)(tmp_path / "mine")
    plugins = Plugins.discover()
    _, before = find_dataset(plugins, str(root), [])
    files = {name: before.files(tmp_path, name) for name in before.names(tmp_path)}
    for place in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in FILES:
            (place / name).write_bytes(b"\0\5\x16\7" + bytes(60))
        for found in list(place.glob("*.h5ad")) + list(place.glob("*.h5")) + list(place.glob("slide.tif")):
            shutil.copy(found, found.with_name(f"._{found.name}"))
    for name in FOLDERS:
        shutil.copytree(root / "S1" if (root / "S1").is_dir() else root / "st", root / name)
    _, dataset = find_dataset(plugins, str(root), [])
    assert {name: dataset.files(tmp_path, name) for name in dataset.names(tmp_path)} == files
    assert dataset.read(tmp_path, "S1").counts.n_obs == 80


@pytest.mark.parametrize(
    ("stored", "number"),
    [
        *(
            (value, 0.5)
            for value in (0.5, np.float32(0.5), np.array(0.5), np.array([0.5]), [0.5], "0.5", b"0.5", " 0.5 ")
        ),
        *((value, 2.0) for value in (2, np.int64(2), np.array([[2]]), "2")),
        *(
            (value, 0.0)
            for value in (0, -1, np.nan, np.inf, True, None, "", "wide", "0,5", "1 um", [1, 1], [], {"x": 1})
        ),
    ],
)
def test_numbers_as_files_have_them(stored: object, number: float) -> None:
    assert positive_or_0(stored) == number
