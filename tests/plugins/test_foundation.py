"""Pathology foundation models without a network: a folder as they are published, and a hub that refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub_errors
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf
from torch import nn

from agl_bench import BadSpec
from agl_bench.bench.spec import one_part
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import check_backbone, toy_spots
from agl_bench_plugins.backbones import foundation, hub
from agl_bench_plugins.backbones.foundation import Foundation
from agl_bench_plugins.backbones.foundation_models import CARDS
from agl_bench_plugins.backbones.timm import Timm

# Parameters as published, in millions.
SIZES = {
    "uni": 303, "uni2-h": 681, "virchow": 631, "virchow2": 631, "prov-gigapath": 1135, "h-optimus-0": 1135,
    "h-optimus-1": 1135, "h0-mini": 86, "phikon": 86, "lunit-s8": 22, "kaiko-s16": 22, "kaiko-b8": 86,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT as models are published: config.json and model.safetensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    save_for_hf(timm.create_model("test_vit", num_classes=0), path)
    return path


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the hub raise an error."""

    def refusing(error: type[Exception]) -> None:
        def download(*_: object, **__: object) -> str:
            made = error.__new__(error)
            Exception.__init__(made, "no")
            raise made

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    return refusing


@pytest.mark.parametrize("name", CARDS)
def test_architectures_are_those_published(name: str) -> None:
    card = CARDS[name]
    units = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if card.gated_units else {}
    with torch.device("meta"):
        trunk = timm.create_model(card.architecture, num_classes=0, **card.options, **units)
    assert round(sum(p.numel() for p in trunk.parameters()) / 1e6) == SIZES[name]
    assert trunk.num_features * (2 if card.class_and_mean else 1) == card.width
    assert trunk.patch_embed.img_size == (224, 224) and (trunk.global_pool == "") == card.class_and_mean
    assert name in str(foundation.__doc__) and card.licence in str(foundation.__doc__)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_contract(folder: Path, frozen: bool) -> None:
    settings = {"model": f"local-dir:{folder}", "patch_px": 32, "frozen": frozen}
    assert [v for v in check_backbone(Foundation, settings) if v.problem] == []


def test_a_frozen_model_is_in_no_state(folder: Path) -> None:
    spots = toy_spots(3, patch_px=32)
    first, second = (Foundation(spots, model=f"local-dir:{folder}", patch_px=32) for _ in range(2))
    assert [n for n in first.state_dict() if not n.startswith("shared.")] == ["mark"]
    holder = nn.ModuleDict({"backbone": second})
    holder.load_state_dict(nn.ModuleDict({"backbone": first}).state_dict())
    assert torch.equal(first.eval()(spots), second.eval()(spots))
    trained = Foundation(spots, model=f"local-dir:{folder}", patch_px=32, frozen=False)
    assert any(n.startswith("trunk.") for n in trained.state_dict())


def test_a_head_does_not_go_behind_another_trunk(folder: Path) -> None:
    spots = toy_spots(3, patch_px=32)
    trained = Foundation(spots, model=f"local-dir:{folder}", patch_px=32)
    other = Foundation(spots, model=f"local-dir:{folder}", weights="none", patch_px=32)
    with pytest.raises(BadSpec, match="not those that this model was trained behind"):
        other.load_state_dict(trained.state_dict())


def test_files_in_folders_make_the_identity(folder: Path, tmp_path: Path) -> None:
    """A folder that changes is another backbone: finished cells and kept features are not taken for its own."""
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    plugins = Plugins.discover()

    def source(**settings: str) -> str:
        return one_part(plugins, "foundation", "backbone", [f"foundation.{k}={v}" for k, v in settings.items()]).source

    for settings in ({"model": f"local-dir:{copied}"}, {"model": "phikon", "weights": str(copied)}):
        sources = [source(**settings)]
        with foundation._file(copied).open("ab") as stream:
            stream.write(b"more")
        sources.append(source(**settings))
        assert len(set(sources)) == 2
    before = source(model=f"local-dir:{copied}")
    config = copied / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"token"', '"avg"'), encoding="utf-8")
    assert source(model=f"local-dir:{copied}") != before
    assert source(model="phikon") == source(model="phikon")


def test_weights_of_a_richer_model_are_refused(tmp_path: Path) -> None:
    """What is left over of a file changes what the model computes; only a classifier does not."""
    donor = timm.create_model("test_vit", num_classes=7, init_values=1e-5)
    state = donor.state_dict()
    save_file(state, tmp_path / "scaled.safetensors")
    with pytest.raises(BadSpec, match=r"of another model than test_vit: it has no 'blocks\.0\.ls1\.gamma'"):
        Timm(toy_spots(1), model="test_vit", weights=str(tmp_path / "scaled.safetensors"), patch_px=32)
    plain = {n: t for n, t in state.items() if ".ls" not in n} | {"mask_token": torch.zeros(1)}
    save_file(plain, tmp_path / "plain.safetensors")
    backbone = Timm(toy_spots(1), model="test_vit", weights=str(tmp_path / "plain.safetensors"), patch_px=160)
    assert torch.equal(backbone.trunk.norm.weight, donor.norm.weight)


def test_class_token_beside_the_mean_patch_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    card = replace(CARDS["virchow2"], architecture="test_vit", options={"global_pool": "", "reg_tokens": 2}, width=128)
    monkeypatch.setitem(CARDS, "virchow2", card)
    units = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    published = timm.create_model("test_vit", num_classes=0, global_pool="", reg_tokens=2, **units).eval()
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    spots = toy_spots(3, patch_px=160)
    foundation._say.cache_clear()
    backbone, again = (Foundation(spots, model="virchow2", weights=str(tmp_path), patch_px=160) for _ in range(2))
    assert capsys.readouterr().err.count("licence CC-BY-NC-ND-4.0, gated") == 1
    tokens = published((spots.patches - backbone.mean) / backbone.deviation)  # type: ignore[operator]
    expected = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(backbone.encode(spots), expected)
    assert again.shared[0].normalized_shape == (card.width,)
    trained = Foundation(spots, model="virchow2", weights=str(tmp_path), patch_px=160, frozen=False).eval()
    torch.testing.assert_close(trained(spots), expected)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (hub_errors.GatedRepoError, ["gated", "accept its terms at https://huggingface.co/MahmoodLab/UNI", "HF_TOKEN"]),
        (hub_errors.RepositoryNotFoundError, ["no model 'MahmoodLab/UNI' that this account may see", "HF_TOKEN"]),
        (hub_errors.LocalEntryNotFoundError, ["cannot be reached", "foundation.weights=PATH"]),
        (hub_errors.RevisionNotFoundError, ["https://huggingface.co/MahmoodLab/UNI has no revision"]),
        (hub_errors.HFValidationError, ["'MahmoodLab/UNI' is no name on the hub"]),
        (hub_errors.EntryNotFoundError, ["has no model.safetensors or pytorch_model.bin"]),
        (ConnectionError, ["could not be downloaded (ConnectionError)", "foundation.weights=PATH"]),
    ],
)
def test_what_to_do_where_the_hub_refuses(refusing: Any, error: type[Exception], parts: list[str]) -> None:
    refusing(error)
    with pytest.raises(BadSpec) as caught:
        Foundation(toy_spots(1), model="uni")
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("variable", ["AGL_BENCH_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(refusing: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    refusing(hub_errors.LocalEntryNotFoundError)
    with pytest.raises(BadSpec, match=rf"{variable} forbids downloads, and owner/name is not in the cache of the hub"):
        hub.download("owner/name", hub.WEIGHTS, "do without")


def test_a_revision_of_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked, weights = [], foundation._file(folder)

    def download(repository: str, name: str, revision: str | None, **_: object) -> str:
        asked.append((repository, name, revision))
        return str(weights if name in hub.WEIGHTS else folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    Foundation(toy_spots(1), model="hf-hub:owner/name@v1.2", patch_px=32)
    Foundation(toy_spots(1), model="hf-hub:owner/name", patch_px=32)
    assert asked == [("owner/name", n, r) for r in ("v1.2", None) for n in ("config.json", "model.safetensors")]


def test_offline_imagenet_weights_come_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from agl_bench_plugins.backbones import timm as machinery

    monkeypatch.setenv("AGL_BENCH_OFFLINE", "1")
    donor = timm.create_model("test_resnet.r160_in1k")
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(machinery, "in_cache", lambda repository: tmp_path / "model.safetensors")
    backbone = machinery.Timm(toy_spots(1), model="test_resnet.r160_in1k", patch_px=32)
    assert torch.equal(next(backbone.trunk.parameters()), next(donor.parameters()))
    monkeypatch.setattr(machinery, "in_cache", lambda repository: None)
    with pytest.raises(BadSpec, match="AGL_BENCH_OFFLINE forbids downloads, and the ImageNet weights of"):
        machinery.Timm(toy_spots(1), model="test_resnet.r160_in1k", patch_px=32)


def test_a_model_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"no foundation model 'unii'; take hf-hub:OWNER/NAME, .*uni2-h"):
        Foundation(toy_spots(1), model="unii")
    with pytest.raises(BadSpec, match=r"has no config\.json"):
        Foundation(toy_spots(1), model=f"local-dir:{tmp_path}")
