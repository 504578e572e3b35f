"""What bounds a table: which cells are added, which lines are shown, and what is said of results outside."""

import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from agl_bench.bench.controls import (
    NEAREST,
    NEAREST_SCORE,
    SHUFFLED,
    control_backbones,
    control_cells,
    control_selectors,
    controls_as_json,
    controls_of,
    notes_on,
)
from agl_bench.bench.spec import Campaign
from agl_bench.cli import main
from agl_bench.registry.plugins import Plugins

NONE = frozenset()
PLUGIN = """
    import torch
    from agl_bench import Backbone, Selector, hookimpl

    class Bound(Selector):
        '''A bound for methods.'''
        reference = "test"
        is_control = True

        def forward(self, losses, step):
            return losses.mean()

    class Blind(Backbone):
        '''Sees that there is a spot.'''
        sees, is_control, width = "position", True, 1

        def forward(self, spots):
            return torch.ones(len(spots.position), 1)

    @hookimpl
    def register_selectors():
        return {"bound": Bound}

    @hookimpl
    def register_backbones():
        return {"blind": Blind}
"""


@pytest.fixture
def plugins(tmp_path):
    path = tmp_path / "bounds.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return Plugins.discover([path], strict=True)


def cells_of(plugins, small, **lists):
    lists = {"selectors": ["agl,hvg_k"], "datasets": ["synthetic"], "preset": "smoke", "fold": ["D1,S1.0"]} | lists
    campaign = Campaign.of(plugins, assignments=[*small, *lists.pop("more", ())], **lists)
    cells = control_cells(campaign, plugins, Path(os.devnull), device="cpu", fingerprint={})
    return campaign, [spec for spec, _ in cells]


def test_controls_say_so_themselves(plugins):
    assert control_selectors(plugins, ["agl", "bound", "pgl"]) == {"bound"}
    assert control_backbones(plugins) == ("position", "blind")
    assert control_backbones(plugins, ["tiny", "blind"]) == ("blind",)


def test_control_cells(plugins, small):
    campaign, cells = cells_of(plugins, small, seeds=["0,1"], backbone=["tiny", "embedding", "position"])
    assert {s.selector.name for s in cells} == {"pgl"}
    units = {(e, f, s) for e, f in (("intra", "S1.0"), ("inter", "D1")) for s in (0, 1)}
    found = {}
    for spec in cells:
        found.setdefault((spec.backbone.name, spec.protocol.patches), set()).add(
            (spec.evaluation, spec.fold, spec.seed)
        )
        assert replace(spec.protocol, patches="own") == campaign.protocol
    own = dict.fromkeys([("position", "own"), ("blind", "own"), ("tiny", "shuffled"), ("embedding", "shuffled")], units)
    assert found == own
    assert len({s.key for s in cells}) == len(cells)
    assert all(s.preset.endswith(", patches=shuffled") for s in cells if s.protocol.patches == "shuffled")


def test_shuffled_patches_are_not_shuffled_again(plugins, small):
    _, cells = cells_of(plugins, small, more=["protocol.patches=shuffled"])
    assert {s.backbone.name for s in cells} == {"position", "blind"}


@pytest.fixture
def made(make_result):
    """Results of pgl and agl, and of their control cells."""

    def of(backbone, patches, pcc, selector="pgl"):
        results = [make_result(selector, fold, pcc=value) for fold, value in zip(("D1", "D2"), pcc, strict=True)]
        return [
            replace(
                r,
                spec=replace(
                    r.spec,
                    backbone=replace(r.spec.backbone, name=backbone),
                    protocol=replace(r.spec.protocol, patches=patches),
                ),
            )
            for r in results
        ]

    return of


def test_lines_below_a_table(made):
    own = (
        made("tiny", "own", [0.3, 0.5]) + made("tiny", "own", [0.2, 0.1], "agl") + made("embedding", "own", [0.4, 0.4])
    )
    own = [replace(r, scores=r.scores | {NEAREST_SCORE: 0.25}) if r.spec.backbone.name == "tiny" else r for r in own]
    others = made("position", "own", [0.1, 0.2]) + made("tiny", "shuffled", [0.01, -0.03])
    found = {(c.backbone, c.name): c.pcc for c in controls_of(own, others)}
    assert found == {
        ("tiny", NEAREST): {("D1", 0): 0.25, ("D2", 0): 0.25},
        ("tiny", "position (backbone)"): {("D1", 0): 0.1, ("D2", 0): 0.2},
        ("tiny", SHUFFLED): {("D1", 0): 0.01, ("D2", 0): -0.03},
        ("embedding", "position (backbone)"): {("D1", 0): 0.1, ("D2", 0): 0.2},
    }
    assert [c.name for c in controls_of(own, [])] == [NEAREST]
    assert controls_of(made("tiny", "own", [0.3, 0.5]), []) == []


def test_results_outside_their_controls_get_a_note(made):
    own = made("tiny", "own", [0.3, 0.5]) + made("tiny", "own", [0.15, 0.1], "agl")

    def notes(others, bounds=NONE):
        return notes_on(own, controls_of(own, others), bounds)

    assert notes(made("tiny", "shuffled", [0.01, -0.03])) == []
    assert notes(made("position", "own", [0.1, 0.1])) == []
    (below,) = notes(made("position", "own", [0.2, 0.15]))
    assert below == "synthetic, inter-batch, backbone tiny: agl below the control position (backbone) (PCC 0.175)"
    assert notes(made("position", "own", [0.2, 0.15]), frozenset({"agl"})) == []
    (high,) = notes(made("tiny", "shuffled", [0.09, 0.11]))
    assert "backbone tiny: images of wrong spots still reach a PCC of 0.100" in high
    assert len(notes(made("tiny", "shuffled", [0.4, 0.42]))) == 2  # above 0, and both selectors below
    assert notes(made("tiny", "shuffled", [0.09, 0.11])[:1]) == []  # one value has no standard error


def test_datasets_are_told_apart_by_what_the_user_called_them(made):
    """Two parts of one dataset have a table column each, and controls each."""

    def called(label, results):
        return [replace(r, spec=replace(r.spec, dataset=replace(r.spec.dataset, label=label))) for r in results]

    own, others = made("tiny", "own", [0.3, 0.2]), made("position", "own", [0.1, 0.4])
    controls = controls_of(called("toy:a", own) + called("toy:b", own), called("toy:a", others))
    assert [(c.dataset, c.name) for c in controls] == [("toy:a", "position (backbone)")]
    assert notes_on(called("toy:b", own), controls, NONE) == []


def test_pairs_are_of_the_same_fold(made):
    """agl is below on D2, which the control does not have."""
    own = made("tiny", "own", [0.3, 0.0], "agl")
    others = made("position", "own", [0.2, 0.9])[:1]
    assert notes_on(own, controls_of(own, others), NONE) == []


def test_json(made):
    own = made("tiny", "own", [0.1, 0.1])
    controls = controls_of(own, made("position", "own", [0.2, float("nan")]))
    content = json.loads(json.dumps(controls_as_json(controls, ["a note"], frozenset({"bound"})), allow_nan=False))
    assert content["notes"] == ["a note"] and content["control_selectors"] == ["bound"]
    (line,) = content["controls"]
    assert (line["control"], line["backbone"], line["pcc_mean"]) == ("position (backbone)", "tiny", 0.2)
    assert line["cells"] == [{"fold": "D1", "seed": 0, "pcc": 0.2}]  # where no gene has a PCC, nothing is counted


def test_run_with_controls(tmp_path, words, plugins, capsys):
    """The table, its controls, and a control selector that is marked; finished cells are kept."""
    grid = ["run", "--selectors", "agl,bound", "--plugin", str(tmp_path / "bounds.py"), "--controls", *words]
    grid += ["--evaluation", "intra", "--fold", "S1.0", "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as caught:
        main([*grid, "--dry-run"])
    assert not caught.value.code
    assert "5 cells, 0 finished, 5 to run" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([*grid, "--json", str(tmp_path / "table.json")])
    said = capsys.readouterr().out
    assert caught.value.code == 1, said  # the blind backbone predicts constants: its cell fails and costs no other
    for line in ("bound (control)", "controls", "position (k-NN)", "position (backbone)", "shuffled patches"):
        assert line in said
    content = json.loads((tmp_path / "table.json").read_text())
    assert [line["selector"] for line in content["lines"]] == ["agl", "bound"]
    assert content["control_selectors"] == ["bound"]
    assert {c["control"] for c in content["controls"]} == {NEAREST, "position (backbone)", SHUFFLED}
    assert all(len(c["cells"]) == 1 for c in content["controls"])
