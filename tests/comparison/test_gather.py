"""One table of all cells: complete, told apart, and light."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.cli import main
from agl_bench.comparison.gather import LINE, UNIT, _labels, gather

RUN = ["run", "--datasets", "synthetic", "--evaluation", "inter", "--preset", "smoke", "--tracking", "none"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    for words in (
        ["--selectors", "pgl,agl"],
        ["--selectors", "hvg_k,random_k", "--set", "hvg_k.k=10"],
        ["--selectors", "hvg_k", "--set", "hvg_k.k=20"],
        ["--selectors", "pgl", "--set", "protocol.epochs=1"],
    ):
        with pytest.raises(SystemExit) as end:
            main([*RUN, *words, "--work", str(work)])
        assert not end.value.code
    return work


def test_every_cell_has_its_line_and_unit(work: Path) -> None:
    store = CellStore(work)
    found = gather(store)
    assert sorted(found.cells["key"]) == sorted(r.spec.key for r in store)
    assert not found.cells.duplicated([*LINE, *UNIT]).any()
    assert set(found.cells["selector"]) == {"pgl", "agl", "random_k", "hvg_k(k=10)", "hvg_k(k=20)"}
    assert len(set(found.cells["preset"])) == 2  # other epochs are other conditions
    for row in found.cells.itertuples():
        result = found.result(row.key)
        assert row.pcc == result.pcc
        assert row.selected == result.epochs["selected"].iloc[result.best_epoch]
        assert (row.fold, row.seed, row.name) == (result.spec.fold, result.spec.seed, result.spec.selector.name)


def test_cells_of_the_time_before_a_glance_said_it_all(
    work: Path, tmp_path: Path, unsign: Callable[[Path], None]
) -> None:
    before = gather(CellStore(work)).cells
    shutil.copytree(work / "cells", tmp_path / "cells")
    for path in (tmp_path / "cells").glob("*/result.json"):
        unsign(path)
        content = json.loads(path.read_text())
        del content["selected"], content["epochs"]
        path.write_text(json.dumps(content))
    pd.testing.assert_frame_equal(gather(CellStore(tmp_path)).cells, before)


def test_equal_labels_for_different_data_are_told_apart(work: Path) -> None:
    found = gather(CellStore(work))
    specs = {key: dict(spec) for key, spec in found.specs.items()}
    key = next(iter(specs))
    specs[key] |= {"data": "other"}

    labels = _labels(specs)
    assert len({preset for _, preset in labels.values()}) == 3


def test_an_empty_folder_gives_empty_tables(tmp_path: Path) -> None:
    found = gather(CellStore(tmp_path))
    assert found.cells.empty and found.failed.empty
    assert {*LINE, *UNIT} <= set(found.cells.columns)
