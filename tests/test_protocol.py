"""The conditions of a comparison: defaults, presets, errors."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from agl_bench.errors import BadSpec, UnknownName
from agl_bench.interfaces.tunable import resolve, tunables
from agl_bench.protocol import Protocol, load_preset, preset_names, read_toml
from agl_bench.registry.plugins import Plugins

NAMES = {field.name for field in fields(Protocol)}


def test_clean_is_the_defaults_and_mentions_every_field() -> None:
    clean = load_preset("clean")
    assert set(clean.protocol) == NAMES
    assert Protocol.of(clean.protocol) == Protocol() == Protocol.of({})
    assert not clean.plugins
    for name, value in clean.protocol.items():
        assert type(value) is type(getattr(Protocol(), name)), name


def test_defaults_are_inside_their_ranges() -> None:
    assert Protocol.of(asdict(Protocol())) == Protocol()


def test_presets_load() -> None:
    assert preset_names() == ["clean", "clean_v1", "paper", "paper_v1", "paper_v2", "paper_v3", "smoke"]
    assert Protocol.of(load_preset("smoke").protocol).epochs == 3
    paper = Protocol.of(load_preset("paper").protocol)
    assert set(load_preset("paper").protocol) == NAMES
    assert (paper.genes_from, paper.fold_shape, paper.normalisation) == ("all", "random", "log1p")
    assert (paper.primary_score, paper.ranking, paper.nan_scores) == ("seurat", "seurat", "first")
    assert (paper.held_out_share, paper.buffer_um, paper.detach_weight_sum) == (0, 0, True)
    assert (paper.batch_size, paper.learning_rate, paper.epochs, paper.patience) == (128, 3e-5, 1000, 20)


def test_the_first_version_of_clean_stays_at_hand() -> None:
    first, second = load_preset("clean_v1"), load_preset("clean")
    assert [preset.label for preset in (first, second)] == ["clean_v1", "clean v2"]
    before, after = Protocol.of(first.protocol), Protocol.of(second.protocol)
    changed = {name for name in NAMES if getattr(before, name) != getattr(after, name)}
    assert changed == set(first.protocol) == {"spot_mads", "primary_score", "ranking"}
    assert (before.spot_mads, before.primary_score, before.ranking) == (0, "seurat", "seurat")
    assert load_preset("paper").label == "paper"


@pytest.mark.parametrize("name", preset_names())
def test_a_record_has_no_setting_that_has_no_effect(name: str) -> None:
    protocol = Protocol.of(load_preset(name).protocol)
    record = protocol.record()
    assert Protocol.recorded(record) == protocol
    assert ("spot_mads" in record) == (protocol.spot_mads > 0)
    assert record == {k: v for k, v in protocol.settings().items() if k in record}


def test_each_schedule_of_the_paper_is_a_preset() -> None:
    """Shiku et al. 2026: the three trainers of the released code."""
    first, second, third = (load_preset(f"paper_v{n}") for n in (1, 2, 3))
    paper = load_preset("paper")
    assert (second.protocol, second.plugins) == (paper.protocol, paper.plugins) and second.name == "paper_v2"
    v1, v2 = Protocol.of(first.protocol), Protocol.of(second.protocol)
    assert Protocol.of(third.protocol) == v2
    assert [p.plugins["dkgsb"]["steps"] for p in (first, second, third)] == [2, 2, 12]
    assert all(p.plugins["dkgsb"] | {"steps": 2} == paper.plugins["dkgsb"] for p in (first, second, third))
    assert (v2.schedule, v2.warm_start, v2.outer_start, v2.outer_every) == ("alternating", "none", 1, 1)
    assert (v2.outer_batch_size, v2.inner_batch_size, v2.inner_subsets, v2.inner_divisor) == (64, 0, 0, 64)
    assert (v2.outer_patience, v2.outer_restart, v2.outer_pass_over) == (0, False, "training")
    assert (v1.schedule, v1.warm_start, v1.outer_restart) == ("two_stage", "learners", True)
    assert (v1.patience, v1.round_patience, v1.outer_patience, v1.outer_passes) == (20, 50, 20, 1000)
    assert (v1.inner_batch_size, v1.outer_batch_size, v1.outer_pass_over) == (320, 128, "held_out")
    assert (v1.inner_subsets, v1.inner_subset_size, v1.inner_divisor) == (64, 128, 1)
    for protocol in (v1, v2):
        assert protocol.outer_augment and protocol.outer_mode == "train" and protocol.detach_weight_sum


@pytest.mark.parametrize("name", preset_names())
def test_plugin_settings_of_presets_fit_their_plugins(name: str) -> None:
    plugins = Plugins.discover()
    for plugin, settings in load_preset(name).plugins.items():
        resolve(plugin, tunables(plugins.entry(plugin).load()), settings)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown preset 'papers'. Did you mean 'paper'\? Known: clean, clean_v1, paper, paper_v1"
    ):
        load_preset("papers")


def test_an_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match=r"unknown setting of protocol 'batchsize'. Did you mean 'batch_size'\?"):
        Protocol.of({"batchsize": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("folds", 1),
        ("folds", 2.5),
        ("folds", "many"),
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", "fast"),
        ("learning_rate", 0),
        ("learning_rate", "nan"),
        ("validation_share", 0),
        ("held_out_share", 0.6),
        ("buffer_um", -1),
        ("fold_shape", "stripes"),
        ("augment", "yes"),
        ("augment", 1),
        ("normalisation", ["log1p"]),
        ("precision", "fp16"),
        ("compile", 1),
        ("outer_batches", -1),
        ("schedule", "v1"),
        ("warm_start", True),
        ("outer_mode", "running"),
        ("outer_pass_over", "validation"),
        ("inner_divisor", 0),
        ("inner_subset_size", 1),
        ("outer_patience", -1),
        ("primary_score", "mean"),
        ("ranking", "seurat_v4"),
        ("nan_scores", "middle"),
        ("fold_file", ["a.csv"]),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(BadSpec, match=rf"protocol\.{name} = .* is not allowed; it takes "):
        Protocol.of({name: value})


def test_no_spots_to_train_on() -> None:
    with pytest.raises(BadSpec, match=r"protocol\.validation_share \+ protocol\.held_out_share = 1 leaves no spots"):
        Protocol.of({"validation_share": 0.5, "held_out_share": 0.5})


@pytest.mark.parametrize("name", preset_names())
def test_settings_round_trip(name: str) -> None:
    protocol = Protocol.of(load_preset(name).protocol)
    assert Protocol.of(protocol.settings()) == protocol
    as_text = {n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in protocol.settings().items()}
    assert Protocol.of(as_text) == protocol


def test_equal_protocols_are_one_key() -> None:
    assert len({Protocol(), Protocol.of({}), Protocol.of({"folds": "5"}), Protocol.of({"folds": 4})}) == 2


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (b"folds = 3", UnknownName, r"unknown key of my\.toml 'folds'"),
        (b"[protocl]", UnknownName, "Did you mean 'protocol'"),
        (b"[protocol", BadSpec, r"my\.toml is not valid TOML"),
        (b"\xff\xfe", BadSpec, r"my\.toml is not valid TOML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, error: type[Exception], sentence: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(error, match=sentence):
        read_toml(path, allowed=("protocol", "plugins"))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"cannot read .*absent\.toml: No such file"):
        read_toml(tmp_path / "absent.toml", allowed=())


def test_files_that_a_protocol_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    settings = dict(zip(("primary_file", "ranking_file", "fold_file"), map(str, paths), strict=True))
    assert Protocol.of({}).files() == []
    protocol = Protocol.of(settings)  # may be read from a result long after the files are gone
    with pytest.raises(BadSpec, match=r"protocol\.primary_file = '.*a' is not a file; name one that exists"):
        protocol.files()
    for path in paths:
        path.touch()
    assert protocol.files() == paths
    assert Protocol.of({"ranking_file": str(paths[1])}).files() == [paths[1]]


def test_the_buffer_is_as_wide_as_a_patch():
    assert Protocol().buffer == 112 and Protocol(patch_um=224.0).buffer == 224
    assert Protocol.of({"buffer_um": "50"}).buffer == 50
