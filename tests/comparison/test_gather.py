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
from agl_bench.comparison.quality import about_primary_genes, versions_of_presets
from agl_bench.digests import text_digest

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


def test_cells_of_an_earlier_version_of_a_preset_are_read_and_kept_apart(
    work: Path, tmp_path: Path, unsign: Callable[[Path], None]
) -> None:
    """As they lie in a work folder of the time before: no word of the setting, keyed without it."""
    shutil.copytree(work / "cells", tmp_path / "cells")
    for path in list((tmp_path / "cells").glob("*/result.json")):
        unsign(path)
        content = json.loads(path.read_text())
        spec = content["spec"]
        del spec["protocol"]["spot_mads"]
        named = {k: v for k, v in spec.items() if k != "preset"}
        for part in ("dataset", "backbone", "selector"):
            named[part] = {k: v for k, v in spec[part].items() if k != "label"}
        key = text_digest(json.dumps(named, sort_keys=True, separators=(",", ":")))
        path.write_text(json.dumps(content))
        shutil.copytree(path.parent, tmp_path / "cells" / key)
        content["spec"]["protocol"]["spot_mads"] = 5.0
        content["spec"]["preset"] = spec["preset"].replace("smoke", "smoke v2")
        path.write_text(json.dumps(content))
    store = CellStore(tmp_path)
    found = gather(store)
    assert len(found.cells) == 2 * len(gather(CellStore(work)).cells)
    results = {key: store.read(key) for key in found.cells["key"]}
    for row in found.cells.itertuples():
        result = results[row.key]
        assert result is not None and result.spec.key == row.key
        assert result.spec.protocol.spot_mads == (5 if " v2" in row.preset else 0)
    versions = found.cells.groupby([c for c in LINE if c != "preset"])["preset"]
    for _, presets in versions:
        old = {p for p in presets if " v2" not in p}
        assert old and set(presets) == old | {p.replace("smoke", "smoke v2") for p in old}
    said = " ".join(versions_of_presets(found.cells["preset"]))
    assert "2 versions of preset smoke: smoke, smoke v2" in said and "never share a row" in said


def test_what_primary_genes_rest_on_is_told_once_for_each_place() -> None:
    cells = pd.DataFrame(
        [
            {"dataset": "d", "evaluation": e, "preset": "clean v2", "selector": s, "fold": f, "seed": 0, "cautions": c}
            for e, f, c in (("intra", "A.0", ""), ("intra", "A.1", "3 of 50 genes"), ("intra", "A.2", "2 of 50 genes"))
            for s in ("pgl", "agl")
        ]
        + [{"dataset": "d", "evaluation": "inter", "preset": "clean v2", "selector": "pgl", "fold": "A", "seed": 0,
            "cautions": ""}]
    )  # fmt: skip
    assert about_primary_genes(cells) == [
        "d, intra-batch, clean v2: in 2 of 3 folds and seeds primary genes rest on few spots; in A.1, seed 0, "
        "3 of 50 genes"
    ]
    assert about_primary_genes(cells.drop(columns="cautions")) == []


@pytest.mark.parametrize(
    ("presets", "expected"),
    [
        (["clean", "clean with epochs=2", "clean #2"], []),
        (["clean v2", "clean v2 with patches=shuffled", "paper"], []),
        (["clean with epochs=2", "clean v2", "paper_v1"], ["clean: clean, clean v2"]),
        (["clean v3", "clean v2 with a=1", "clean v10", "smoke"], ["clean: clean v2, clean v3, clean v10"]),
    ],
)
def test_versions_of_a_preset_are_told(presets: list[str], expected: list[str]) -> None:
    said = versions_of_presets(presets)
    assert len(said) == len(expected)
    assert all(f"of preset {words};" in sentence for words, sentence in zip(expected, said, strict=True))


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
