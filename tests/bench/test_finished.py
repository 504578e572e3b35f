"""A finished cell: what was not written is never read, and what was written earlier still is."""

import json
import os
import random
from dataclasses import replace

import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.finished import DIGEST, Unreadable, check_cell, look
from agl_bench.bench.merge import Outcome, Store, merge, plan_merge
from agl_bench.bench.status import status_of
from agl_bench.comparison.gather import gather
from agl_bench.digests import file_digest, read_signed, signed


@pytest.fixture
def store(tmp_path, make_result):
    store = CellStore(tmp_path / "work")
    sizes = dict.fromkeys(("auxiliary_genes", "primary_genes", "train_spots", "test_spots"), 5)
    for fold in ("D1", "D2"):
        made = make_result("agl", fold=fold, pcc=0.037)
        store.write(replace(made, counts=sizes, cost={"seconds": 1.0, "peak_memory_mb": 1.0}))
    return store


@pytest.fixture
def cell(store, make_result):
    """One of two finished cells."""
    return store.cells / make_result("agl", fold="D1").spec.key


def merged(store, work):
    """What a merge of a store into a fresh folder copies, and its notes."""
    outcome = Outcome({}, [])
    list(merge(plan_merge([store.work], work), outcome))
    return CellStore(work), outcome.notes


def damage(path, how):
    """Put something else in the place of a file of a cell."""
    content = path.read_bytes()
    path.unlink()
    if how == "symlink":
        (path.parent.parent.parent / "elsewhere").write_bytes(content)
        path.symlink_to(path.parent.parent.parent / "elsewhere")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.write_bytes(how(content))


OTHERS = {
    "a digit": lambda c: c.replace(b'"pcc_gene_mean_section_mean": 0.0', b'"pcc_gene_mean_section_mean": 0.9'),
    "another format": lambda c: c.replace(b'"format": 3', b'"format": 2'),
    "a later format": lambda c: c.replace(b'"format": 3', b'"format": 7'),
    "no signature": lambda c: c.replace(b'"digest": ', b'"digesu": '),
    "nested": lambda c: b"[" * 100_000,
    "nested objects": lambda c: b'{"format":' * 100_000,
    "not UTF-8": lambda c: c.replace(b'"D1"', b'"D\xff"'),
    "zeros": lambda c: bytes(len(c)),
    "appended": lambda c: c + b"\n{}",
    "wrong types": lambda c: c.replace(b'"scores": {', b'"scores": 5, "was": {'),
}


@pytest.mark.parametrize("how", [*OTHERS, "symlink", "pipe", "folder"])
def test_what_result_json_did_not_say_is_noticed_by_all(store, cell, tmp_path, how):
    damage(cell / "result.json", OTHERS.get(how, how))
    assert [look(f)["spec"]["fold"] for f in store.cells.iterdir() if f != cell] == ["D2"]
    assert status_of(store.work).damaged == [cell.name]
    found = Store.look(store.work)
    assert found.damaged == (cell.name,) and len(found.cells) == 1
    copy, notes = merged(store, tmp_path / "copy")
    assert [r.spec.fold for r in copy] == ["D2"] and notes == [f"{store.work}: 1 cell is damaged and left out"]
    said = []
    again = CellStore(store.work, warn=said.append)
    assert gather(again).cells["fold"].tolist() == ["D2"]
    assert len(said) == 1 and f"the result of cell {cell.name} is damaged" in said[0]
    assert gather(again).cells["fold"].tolist() == ["D2"] and len(said) == 1


@pytest.mark.parametrize("name", ["genes.parquet", "outer.parquet"])
@pytest.mark.parametrize("how", ["symlink", "pipe", "folder", "bit"])
def test_a_table_that_is_another_file_is_damage_in_tables_of_many_cells_too(store, cell, name, how):
    def flipped(content):
        changed = bytearray(content)
        changed[len(content) // 2] ^= 4
        return bytes(changed)

    damage(cell / name, flipped if how == "bit" else how)
    said = []
    assert gather(CellStore(store.work, warn=said.append)).cells["fold"].tolist() == ["D2"]
    assert len(said) == 1 and name in said[0]


def test_no_single_bit_of_result_json_changes_what_is_read(store, cell):
    path = cell / "result.json"
    content, before = path.read_bytes(), look(cell)
    chance = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            assert look(cell) == before  # a space for a newline
        except Unreadable as error:
            assert error.is_damaged


def test_extra_files_are_neither_read_nor_copied(store, cell, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (cell / "link").symlink_to(secret)
    (cell / "notes.txt").write_text("mine")
    os.mkfifo(cell / "pipe")
    copy, notes = merged(store, tmp_path / "copy")
    assert len(list(copy)) == 2 and notes == []
    names = {path.name for path in (copy.cells / cell.name).iterdir()}
    assert names == {"result.json", "genes.parquet", "epochs.parquet", "outer.parquet"}


def test_a_signature_names_no_file_outside_the_cell(store, cell, tmp_path):
    """Whoever signs it: a merge would write there."""
    content = read_signed(cell / "result.json")
    content["files"]["../../../stolen.parquet"] = content["files"]["genes.parquet"]
    (cell / "result.json").write_text(json.dumps(signed(content)))
    assert Store.look(store.work).damaged == (cell.name,)


def test_a_cell_that_is_a_link_is_set_aside(store, cell, tmp_path):
    cell.rename(tmp_path / "elsewhere")
    cell.symlink_to(tmp_path / "elsewhere")
    said = []
    assert CellStore(store.work, warn=said.append).read(cell.name) is None
    assert len(said) == 1 and "it is not a folder" in said[0]
    assert (tmp_path / "elsewhere" / "result.json").is_file()


def test_a_file_in_place_of_a_cell_gives_way(store, cell, make_result):
    for path in cell.iterdir():
        path.unlink()
    cell.rmdir()
    cell.write_text("mine")
    store.write(make_result("agl", fold="D1", pcc=0.037))
    assert store.read(cell.name).pcc == 0.037


def test_cells_of_earlier_versions_stay_and_are_told_once(store, cell, unsign, tmp_path):
    for path in store.cells.glob("*/result.json"):
        unsign(path)
    said = []
    again = CellStore(store.work, warn=said.append)
    assert gather(again).cells["fold"].tolist() == ["D1", "D2"]
    assert len(list(again)) == 2
    sentence = "2 cells of an earlier version have no digest of result.json; such cells are read as usual, but damage"
    assert said == [f"{sentence} to that file may go unnoticed"]
    copy, notes = merged(store, tmp_path / "copy")
    assert notes == [f"{store.work}: {said[0]}"]
    assert check_cell(copy.cells / cell.name, cell.name)["unsigned"] is True


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"scores": {', '"scores": [], "was": {'),
        ('"fold": "D1"', '"fold": 3'),
        ('"seed": 0', '"seed": "0"'),
        ('"train_spots": ', '"train_spots": null, "was": '),
        ('"best_epoch": ', '"best_epoch": "x", "was": '),
        ('"genes": "', '"genes": 5, "was": "'),
    ],
)
def test_wrong_types_in_cells_of_earlier_versions_are_damage(store, cell, unsign, old, new):
    unsign(cell / "result.json")
    text = (cell / "result.json").read_text()
    assert old in text
    (cell / "result.json").write_text(text.replace(old, new))
    said = []
    assert gather(CellStore(store.work, warn=said.append)).cells["fold"].tolist() == ["D2"]
    assert len(said) == 1 and "damaged" in said[0]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b"[]", b"7", b'{"spec": 3, "reason": []}'])
@pytest.mark.parametrize(
    "name", ["failed/K/failure.json", "failed/K/spec.json", "partial/K/spec.json", "skipped/K.json"]
)
def test_what_is_noted_beside_cells_stops_nobody(store, cell, make_result, tmp_path, name, content):
    spec = make_result("hvg_k").spec
    store.write_failure(spec, "it broke", "")
    store.begun(spec.key).begin(spec)
    path = store.work / f"{name.replace('K', spec.key)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert status_of(store.work).damaged == []
    assert len(gather(CellStore(store.work)).cells) == 2
    assert len(list(merged(store, tmp_path / "copy")[0])) == 2


@pytest.mark.parametrize("content", [b"section,spot\n\xff\n", b"", b"other\n"])
def test_a_damaged_fold_is_left_out_of_a_merge_and_written_anew_by_a_run(store, tmp_path, content):
    store.keep_fold("fold,1\n")
    (path,) = store.folds.iterdir()
    path.write_bytes(content)
    copy, notes = merged(store, tmp_path / "copy")
    assert notes == [f"{store.work}: the fold {path.name} is damaged and left out"]
    assert list(copy.folds.iterdir()) == []
    said = []
    CellStore(store.work, warn=said.append).keep_fold("fold,1\n")
    assert path.read_text() == "fold,1\n" and len(said) == 1
    assert path.with_suffix(".damaged").read_bytes() == content


def stored_otherwise(folder, name, change):
    """Write a table of a cell anew, signed as if the cell had been written so."""
    path = folder / f"{name}.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    content = json.loads((folder / "result.json").read_text())
    content.pop("digest")
    content["files"][path.name] = (path.stat().st_size, file_digest(path, DIGEST))
    (folder / "result.json").write_text(json.dumps(signed(content)))


@pytest.mark.parametrize(
    ("name", "column", "change"),
    [
        ("genes", "pearson", lambda t: t.assign(pearson="0.1")),
        ("genes", "weight", lambda t: t.assign(weight=[[1.0]] * len(t))),
        ("genes", "primary", lambda t: t.assign(primary=t["primary"].astype(int))),
        ("genes", "gene", lambda t: t.assign(gene=range(len(t)))),
        ("genes", "weight", lambda t: t.drop(columns="weight")),
        ("epochs", "selected", lambda t: t.assign(selected=0.5)),
        ("epochs", "training_loss", lambda t: t.assign(training_loss=None)),
        ("outer", "validation_pcc", lambda t: t.assign(validation_pcc="")),
    ],
)
def test_columns_of_other_types_are_damage_for_every_reader(store, cell, name, column, change):
    said = []
    store.warn = said.append
    stored_otherwise(cell, name, change)
    others = {c["key"] for c in store.glances()}
    assert cell.name not in others and len(others) == 1
    assert len(said) == 1 and column in said[0] and f"{name}.parquet" in said[0] and "set aside" in said[0]
    assert store.read(cell.name) is None and len(list(gather(store).cells["key"])) == 1
