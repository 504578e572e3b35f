"""What a work folder holds, told apart: methods and controls, fixed and tuned settings."""

from dataclasses import replace

import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.spec import Tuning
from agl_bench.bench.status import Place, as_json, status_of
from agl_bench.cli import main

TUNING = Tuning(20, 20, "a study", 0.4, ("protocol.learning_rate",))


def test_tuned_and_shuffled_cells_have_lines_of_their_own(make_result, tmp_path):
    store, plain = CellStore(tmp_path), make_result()
    shuffled = replace(plain.spec, protocol=replace(plain.spec.protocol, patches="shuffled"))
    specs = (plain.spec, replace(plain.spec, tuning=TUNING), shuffled)
    for spec in specs:
        store.write(replace(plain, spec=spec))
    found = status_of(tmp_path).counts
    assert found == {
        Place("synthetic", "inter", "tiny", "pgl"): {"done": 1},
        Place("synthetic", "inter", "tiny", "pgl", tuning="tuned (20 trials)"): {"done": 1},
        Place("synthetic", "inter", "tiny", "pgl", shuffled=True): {"done": 1},
    }
    assert [place.settings for place in found] == ["fixed", "tuned (20 trials)", "control: shuffled patches"]
    lines = as_json(status_of(tmp_path))["lines"]
    assert [(line["tuning"], line["shuffled"], line["done"]) for line in lines] == [
        ("", False, 1), ("tuned (20 trials)", False, 1), ("", True, 1)
    ]  # fmt: skip


def test_what_is_left_to_do_is_told_apart_too(make_result, tmp_path):
    store, spec = CellStore(tmp_path), make_result().spec
    with store.announced([spec, replace(spec, tuning=TUNING)]):
        found = {place.settings: dict(count) for place, count in status_of(tmp_path).counts.items()}
    assert found == {"fixed": {"to do": 1}, "tuned (20 trials)": {"to do": 1}}


@pytest.mark.parametrize("damage", [b"[" * 50_000, b"{}", b"\xff\xfe", None])
@pytest.mark.parametrize("kind", ["partial", "failed"])
def test_cells_that_do_not_say_which_they_are(make_result, tmp_path, kind, damage, capsys):
    store, spec = CellStore(tmp_path), make_result().spec
    if kind == "partial":
        store.begun(spec.key).begin(spec)
    else:
        store.write_failure(spec, "it broke", "")
    path = tmp_path / kind / spec.key / "spec.json"
    path.unlink()
    path.mkdir() if damage is None else path.write_bytes(damage)
    with pytest.raises(SystemExit) as ended:
        main(["status", "--work", str(tmp_path)])
    assert not ended.value.code
    said = capsys.readouterr()
    assert said.err == f"agl-bench: {path} is damaged or of another version, so its cell is not counted\n"
    assert list(store.failures()) == []
