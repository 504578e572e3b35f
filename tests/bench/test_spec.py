"""Which settings make a cell what it is."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agl_bench.bench.spec import Campaign, RunSpec, Tuning
from agl_bench.errors import AglBenchError, BadSpec, UnknownName
from agl_bench.protocol import Protocol
from agl_bench.registry.plugins import Plugins

SELECTOR = """
from agl_bench import Selector, hookimpl

class Mine(Selector):
    "{}"

@hookimpl
def register_selectors():
    return {{"mine": Mine}}
"""


@pytest.fixture
def spec(grid):
    return grid("dkgsb", fold=["D1"])[0][0][0]


@pytest.fixture(scope="module")
def plugins():
    return Plugins.discover(strict=True)


def campaign(plugins, *assignments, **options):
    return Campaign.of(plugins, selectors=["pgl"], datasets=["synthetic"], assignments=assignments, **options)


def test_key_survives_json_and_another_process_and_dict_order(spec):
    def turned(value):
        return {k: turned(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    content = json.loads(json.dumps(spec.as_json()))
    assert RunSpec.from_json(content).key == spec.key
    assert RunSpec.from_json(turned(content)).key == spec.key
    script = "import json, sys; from agl_bench.bench.spec import RunSpec as R; s = R.from_json(json.load(sys.stdin))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(s.key, s.group)"],
        input=json.dumps(turned(content)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [spec.key, spec.group]


def test_round_trip_keeps_lists_of_names(plugins, tmp_path):
    made = Campaign.of(plugins, selectors=["pgl"], datasets=["her2st"])
    assert made.part(plugins, "her2st", "dataset").settings == {"sections": ("C2", "C3", "C4", "C5")}


def test_key_changes_with_everything_but_the_preset(spec):
    def other(part):
        return [replace(part, **{f: getattr(part, f) + "x"}) for f in ("name", "provider", "source")] + [
            replace(part, settings=part.settings | {"another": 1})
        ]

    changes = {
        "dataset": other(spec.dataset),
        "backbone": other(spec.backbone),
        "selector": other(spec.selector),
        "evaluation": ["intra"],
        "fold": ["D2"],
        "seed": [1],
        "protocol": [
            replace(spec.protocol, **{f.name: change(getattr(spec.protocol, f.name))})
            for f in dataclasses.fields(Protocol)
        ],
        "data": ["x"],
        "device": ["cuda"],
        "version": ["9"],
        "libraries": ["torch 9"],
        "tuning": [Tuning(5, points, "study", 0.5, ()) for points in (4, 5)],
    }
    assert {*changes, "preset"} == {f.name for f in dataclasses.fields(RunSpec)}
    keys = [replace(spec, **{field: value}).key for field, values in changes.items() for value in values]
    assert len({spec.key, *keys}) == 1 + len(keys)
    assert replace(spec, preset="another").key == spec.key
    groups = {field: {replace(spec, **{field: v}).group for v in values} for field, values in changes.items()}
    assert {field for field, found in groups.items() if spec.group in found} == {"fold", "seed"}
    assert replace(spec, preset="another").group == spec.group


def change(value):
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else value + "x"


def test_same_protocol_by_another_way_has_the_same_key(grid):
    direct = grid("pgl")[0]
    by_hand = grid("pgl", preset="clean", more=["protocol.folds=2", "protocol.epochs=3", "protocol.patience=3"])[0]
    assert direct[0][0].preset != by_hand[0][0].preset
    assert [s.key for s, _ in direct] == [s.key for s, _ in by_hand]


def test_source_of_a_file_is_part_of_the_key(tmp_path, grid):
    specs = {}
    for place, text, learns in (("one", "A.", "training"), ("two", "B.", "training"), ("three", "A.", "validation")):
        path = tmp_path / place / "mine.py"
        path.parent.mkdir()
        path.write_text(SELECTOR.format(text).replace("@hookimpl", f'    learns_from = "{learns}"\n\n@hookimpl'))
        specs[place] = grid("mine", files=[path])[0][0][0]
    assert specs["one"].selector.source == specs["two"].selector.source != specs["three"].selector.source
    edited = replace(specs["one"], selector=replace(specs["one"].selector, source=specs["three"].selector.source))
    assert edited.key != specs["one"].key


@pytest.mark.parametrize("setting", ["primary_file", "ranking_file"])
def test_content_of_a_file_of_the_protocol_is_part_of_the_key(tmp_path, grid, setting):
    path = tmp_path / "genes.txt"
    keys = []
    for text in ("A\n", "B\n", "A\n"):
        path.write_text(text)
        keys.append([spec.key for spec, _ in grid("pgl", more=[f"protocol.{setting}={path}"])[0]])
    assert keys[0] == keys[2] and not set(keys[0]) & set(keys[1])


def test_a_file_of_the_protocol_has_to_be_there(tmp_path, grid):
    with pytest.raises(BadSpec, match=r"protocol\.ranking_file = '.*nothing\.txt' is not a file"):
        grid("pgl", more=[f"protocol.ranking_file={tmp_path / 'nothing.txt'}"])


def test_cells_of_a_file_of_folds(tmp_path, grid):
    path = tmp_path / "folds.csv"
    lines = [f"S1,s{i},mine,{name}" for i, name in enumerate(("train", "validation", "test"))]
    path.write_text("\n".join(["section,spot,fold,set", *lines]))
    more = [f"protocol.fold_file={path}"]
    for evaluation in (["intra"], ["intra", "inter"]):
        cells, _ = grid("pgl", evaluation=evaluation, more=more)
        assert [(spec.fold, spec.evaluation) for spec, _ in cells] == [("mine", "intra")]
    with pytest.raises(BadSpec, match=r"fold_file = '.*' has no fold for --evaluation inter: intra tests spots of"):
        grid("pgl", more=more)


def test_key_does_not_depend_on_how_the_file_is_written(tmp_path, grid, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(SELECTOR.format("A."))
    monkeypatch.chdir(tmp_path)
    keys = {grid("mine", files=[p])[0][0][0].key for p in (path, Path("mine.py"), Path("./mine.py"))}
    assert len(keys) == 1


def test_command_line_over_file_over_preset(plugins, tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text("""
        preset = "smoke"
        selectors = ["agl", "pgl"]
        datasets = "synthetic"
        seeds = [3, 4]
        evaluation = ["inter"]
        [protocol]
        epochs = 7
        folds = 4
        [plugins.tiny]
        width = 16
        channels = 16
    """)
    from_file = Campaign.of(plugins, file=file)
    assert from_file.selectors == ("agl", "pgl")
    assert from_file.seeds == (3, 4)
    assert from_file.evaluations == ("inter",)
    assert (from_file.protocol.epochs, from_file.protocol.folds, from_file.protocol.patience) == (7, 4, 3)
    assert from_file.part(plugins, "tiny", "backbone").settings["width"] == 16
    over = Campaign.of(
        plugins, file=file, preset="clean", selectors=["pgl"], seeds=["0,1"],
        assignments=["protocol.epochs=9", "tiny.width=8"],
    )  # fmt: skip
    assert over.selectors == ("pgl",)
    assert over.seeds == (0, 1)
    assert (over.protocol.epochs, over.protocol.folds, over.protocol.patience) == (9, 4, 20)
    settings = over.part(plugins, "tiny", "backbone").settings
    assert (settings["width"], settings["channels"]) == (8, 16)


def test_preset_brings_plugin_settings(plugins):
    made = Campaign.of(plugins, selectors=["dkgsb"], datasets=["synthetic"], preset="paper")
    assert made.part(plugins, "dkgsb", "selector").settings["bounded"] is False
    assert made.preset == "paper"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("selector = ['pgl']", ["unknown key of grid.toml 'selector'", "Did you mean 'selectors'?"]),
        ("[protocol]\nepoch = 3", ["epoch", "Did you mean 'epochs'?"]),
        ("[plugins.dkgbs]\nsteps = 3", ["dkgbs", "Did you mean 'dkgsb'?"]),
        ("[plugins.dkgsb]\nstep = 3", ["step", "Did you mean 'steps'?"]),
        ("preset = 'cleen'", ["unknown preset 'cleen'", "Did you mean 'clean'?"]),
        ("seeds = [-1]", ["seed '-1'"]),
        ("seeds = [1.5]", ["[1.5] is not a name or a list of names"]),
        ("protocol = 3", ["protocol"]),
        ("plugins = 'dkgsb'", ["plugins"]),
        ("plugins.dkgsb = 3", ["dkgsb"]),
        ("selectors = 3", ["selectors = 3 is not a name or a list of names"]),
        ("selectors = [", ["grid.toml is not valid TOML"]),
    ],
)
def test_bad_file(plugins, tmp_path, text, words):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    lists = {} if text.startswith("selectors") else {"selectors": ["pgl"]}
    with pytest.raises(AglBenchError) as caught:
        Campaign.of(plugins, file=file, datasets=["synthetic"], **lists)
    for word in words:
        assert word in str(caught.value)


def test_file_that_is_not_there(plugins, tmp_path):
    with pytest.raises(BadSpec, match=r"cannot read .*nothing\.toml: No such file"):
        Campaign.of(plugins, file=tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("epochs=3", BadSpec, "--set 'epochs=3' is not of the form NAME.KEY=VALUE"),
        ("protocol.epochs", BadSpec, "is not of the form"),
        ("protocol.=3", BadSpec, "is not of the form"),
        ("protocol.epoch=3", UnknownName, "Did you mean 'epochs'?"),
        ("protocl.epochs=3", UnknownName, "protocl"),
        ("dkgsb.steps=0", BadSpec, "dkgsb.steps = '0' is not allowed; it takes a whole number in 1"),
        ("dkgsb.steps=two", BadSpec, "a whole number"),
        ("dkgsb.temperature=nan", BadSpec, "dkgsb.temperature"),
        ("dkgsb.inner=lion", BadSpec, "adam | adam_higher | sgd"),
        ("protocol.augment=maybe", BadSpec, "true | false"),
        ("tiny.patch_px=32.5", BadSpec, "tiny.patch_px"),
        ("pgl.k=5", UnknownName, "k"),
    ],
)
def test_assignments(plugins, text, error, words):
    with pytest.raises(error) as caught:
        campaign(plugins, text)
    assert words in str(caught.value)


def test_label_shows_what_differs(plugins):
    assert campaign(plugins).preset == "clean v2"
    assert campaign(plugins, "protocol.epochs=100", "tiny.width=32").preset == "clean v2"
    made = campaign(plugins, "protocol.epochs=50", "tiny.width=16")
    assert made.preset == "clean v2 with epochs=50, tiny.width=16"


def test_nothing_asked_for(plugins):
    with pytest.raises(BadSpec, match="no selectors given; use --selectors pgl,agl"):
        Campaign.of(plugins, datasets=["synthetic"])
    with pytest.raises(BadSpec, match="no datasets given; use --datasets synthetic"):
        Campaign.of(plugins, selectors=["pgl"])


def test_unknown_evaluation_and_fold(plugins, grid):
    with pytest.raises(UnknownName, match=r"unknown evaluation 'intr'\. Did you mean 'intra'\?"):
        campaign(plugins, evaluation=["intr"])
    with pytest.raises(UnknownName, match=r"unknown fold 'S1'.*Known: D1, D2"):
        grid("pgl", fold=["S1"])


def test_order_keeps_data_together(grid):
    cells = grid("pgl,agl", seeds=["0,1"])[0]
    assert [(s.fold, s.seed, s.selector.name) for s, _ in cells] == [
        (fold, seed, name) for fold in ("D1", "D2") for seed in (0, 1) for name in ("pgl", "agl")
    ]


def test_one_section_has_no_inter_evaluation(plugins, tmp_path):
    """Beside intra it is left out; asked for alone it is an error."""
    one = {"assignments": ["synthetic.sections=1"], "selectors": ["pgl"], "datasets": ["synthetic"]}
    cells = Campaign.of(plugins, **one).cells(plugins, tmp_path, device="cpu", fingerprint={})
    assert {spec.evaluation for spec, _ in cells} == {"intra"}
    with pytest.raises(BadSpec, match="needs at least two sections and synthetic has 1"):
        Campaign.of(plugins, evaluation=["inter"], **one).cells(plugins, tmp_path, device="cpu", fingerprint={})


def words_of(plugins, **lists):
    return Campaign.of(plugins, selectors=["pgl"], **lists)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["hest:TENX152,TENX89,heart"], ("hest:TENX152,TENX89", "heart")),
        (["hest:TENX152,hest:TENX89"], ("hest:TENX152", "hest:TENX89")),
        (["her2st:C2", "C3", "synthetic"], ("her2st:C2,C3", "synthetic")),
        (["synthetic", "hest:A"], ("synthetic", "hest:A")),
    ],
)
def test_datasets_with_a_value(plugins, given, expected):
    assert words_of(plugins, datasets=given).datasets == expected


def test_a_path_may_hold_commas(plugins, tmp_path):
    for name in ("a,b/c", "a, b", "mine,heart", ",a,,b"):
        (tmp_path / name).mkdir(parents=True)
        word = f"folder:{tmp_path}/{name}"
        assert words_of(plugins, datasets=[f"{word},synthetic"]).datasets == (word, "synthetic")
        assert words_of(plugins, datasets=["synthetic", word]).datasets == ("synthetic", word)
    assert words_of(plugins, datasets=[f"folder:{tmp_path}/none,heart"]).datasets[1] == "heart"


def test_a_dataset_chosen_twice_with_different_values_is_two(plugins):
    campaign = words_of(plugins, datasets=["her2st:C2,C3", "her2st:C4"], assignments=["synthetic.spots=30"])
    one, two = (campaign.part(plugins, word, "dataset") for word in campaign.datasets)
    assert (one.label, one.settings["sections"]) == ("her2st:C2,C3", ("C2", "C3"))
    assert (two.label, two.settings["sections"]) == ("her2st:C4", ("C4",))


def test_the_word_is_not_part_of_the_identity(spec):
    said = dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, label="synthetic:said-so"))
    assert said.key == spec.key and said.group == spec.group
    assert "synthetic:said-so" in said.title


def test_a_value_and_a_setting_do_not_contradict_each_other(plugins):
    made = words_of(plugins, datasets=["synthetic:null"], assignments=["synthetic.regime=helpful"])
    with pytest.raises(BadSpec, match=r"'synthetic:null' and a setting of synthetic\.regime say the same thing twice"):
        made.part(plugins, "synthetic:null", "dataset")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ovary:3", "dataset 'ovary' takes nothing after a colon"),
        ("hest:", "'hest:' names nothing after the colon; it takes hest.ids"),
        ("hset:TENX152", "unknown dataset 'hset'. Did you mean 'hest'"),
    ],
)
def test_bad_values_of_a_dataset(plugins, word, sentence):
    with pytest.raises(AglBenchError, match=re.escape(sentence)):
        words_of(plugins, datasets=[word]).part(plugins, word, "dataset")
