"""Backbones that come with agl-bench, without a network. The rules of the door are checked by the contract kit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from agl_bench import Backbone, BadSpec, Spots
from agl_bench.testing import toy_spots
from agl_bench_plugins.backbones.densenet import DenseNet121
from agl_bench_plugins.backbones.embedding import Embedding
from agl_bench_plugins.backbones.position import Position
from agl_bench_plugins.backbones.resnet import ResNet18, ResNet50
from agl_bench_plugins.backbones.timm import Timm
from agl_bench_plugins.backbones.tiny import Tiny
from agl_bench_plugins.backbones.vit_small import VitSmall

SMALL = "test_resnet.r160_in1k"  # timm's own toy: half a million parameters


def spots(count: int = 4, px: int = 32) -> Spots:
    return toy_spots(count, patch_px=px)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("timm.models.load_pretrained", refuse)


# ---- tiny -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "channels", "px"), [(32, 32, 32), (4, 6, 16), (10, 8, 47)])
def test_tiny_shapes(width: int, channels: int, px: int) -> None:
    backbone = Tiny(spots(px=px), width=width, channels=channels, patch_px=px)
    assert (backbone.width, backbone.patch_px, backbone.sees) == (width, px, "patches")
    for count in (1, 5):
        features = backbone(spots(count, px))
        assert features.shape == (count, width) and features.dtype == torch.float32 and features.isfinite().all()


def test_tiny_is_deterministic_and_treats_spots_alone() -> None:
    first = Tiny(spots())
    torch.manual_seed(0)
    second = Tiny(spots())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    features = first(spots(5))
    assert torch.equal(features, first(spots(5)))
    alone = torch.cat([first(replace(spots(5), patches=patch[None])) for patch in spots(5).patches])  # type: ignore[union-attr]
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-5)  # also in training mode
    assert first.training and not any(b.is_floating_point() for b in first.buffers())


def test_tiny_on_a_blank_patch_has_finite_derivatives() -> None:
    """The standard deviation over positions is zero there."""
    backbone = Tiny(spots(), width=4, channels=4)
    blank = replace(spots(2), patches=torch.ones(2, 3, 32, 32))
    own = list(backbone.parameters())
    first = torch.autograd.grad(backbone(blank).sum(), own, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), own, allow_unused=True)
    assert all(g.isfinite().all() for g in (*first, *(s for s in second if s is not None)))


# ---- embedding ------------------------------------------------------------------------------------------------------


def test_embedding_shares_one_layer() -> None:
    """With nothing shared, no auxiliary gene could help or harm a primary one."""
    backbone = Embedding(spots(), width=8, learning_rate=0.01)
    assert backbone.width == 8 and backbone.learning_rate == 0.01 and Embedding.sees == "embedding"
    assert backbone(spots(3)).shape == (3, 8)
    assert all(p.requires_grad for p in backbone.parameters()) and list(backbone.parameters())


def test_embedding_without_embeddings() -> None:
    with pytest.raises(BadSpec, match=r"no embedding; put embedding\.h5"):
        Embedding(replace(spots(), embedding=None))


# ---- position -------------------------------------------------------------------------------------------------------


def test_position_sees_nothing_else() -> None:
    backbone, seen = Position(spots()), spots(5)
    assert backbone.is_control and Position.sees == "position" and not Tiny.is_control
    blind = replace(seen, patches=None, embedding=None, section=seen.section + 1)
    assert torch.equal(backbone(blind), backbone(seen))
    assert not torch.allclose(backbone(replace(blind, position=seen.position + 100)), backbone(seen))


def test_position_waves() -> None:
    """The shortest wave along x is the same again one wavelength on, the phase of the longest along y moves by 2π/8."""
    backbone = Position(spots(), longest_um=8000, shortest_um=500, wavelengths=5, directions=2)
    x, y = backbone.waves.double()
    length = [8000, 4000, 2000, 1000, 500]
    torch.testing.assert_close(x[:5], 2 * torch.pi / torch.tensor(length, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(y[5:], x[:5])
    assert (y[:5] == 0).all() and x[5:].abs().max() < 1e-8
    hidden = backbone.early(replace(spots(2), position=torch.tensor([[1000.0, 0.0], [9000.0, 8000.0]])))
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-4)
    assert hidden.shape == (2, 20) and hidden.abs().max() <= 1


# ---- split in two ---------------------------------------------------------------------------------------------------

VIT = "test_vit.r160_in1k"


def split_backbones() -> list[Any]:
    return [
        pytest.param(lambda: (Tiny(spots()), spots(5)), id="tiny"),
        pytest.param(lambda: (Embedding(spots()), spots(5)), id="embedding"),
        pytest.param(lambda: (Position(spots()), spots(5)), id="position"),
        pytest.param(lambda: (ResNet18(spots(), weights="none", patch_px=32), spots(5)), id="resnet18"),
        pytest.param(lambda: (Timm(spots(), model=SMALL, weights="none", patch_px=32), spots(5)), id="resnet"),
        pytest.param(lambda: (Timm(spots(), model=VIT, weights="none", patch_px=160), spots(3, 160)), id="vit"),
        pytest.param(lambda: (ResNet50(spots(), weights="none", patch_px=32), spots(5)), id="resnet50"),
        pytest.param(lambda: (DenseNet121(spots(), weights="none", patch_px=32), spots(5)), id="densenet121"),
        pytest.param(lambda: (VitSmall(spots(), weights="none", patch_px=32), spots(5)), id="vit_small"),
        pytest.param(lambda: (frozen(), spots(5)), id="frozen"),
    ]


def frozen(model: str = SMALL) -> Timm:
    return Timm(spots(), model=model, weights="none", patch_px=32, frozen=True, shared=7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make_split", split_backbones())
def test_late_after_early_is_forward(make_split: Any, training: bool) -> None:
    backbone, seen = make_split()
    assert backbone.train(training).splits
    once, again, whole = (copy.deepcopy(backbone) for _ in range(3))  # of its own: normalisation has running statistics
    hidden = once.early(seen)
    features = once.late(hidden)
    assert len(hidden) == len(seen.position) and torch.equal(features, again(seen))
    if isinstance(whole, Timm) and not whole.frozen:
        assert torch.equal(features, whole.trunk(whole._normalised(seen)))


@pytest.mark.parametrize("make_split", split_backbones())
def test_late_names_are_the_parameters_that_late_uses(make_split: Any) -> None:
    backbone, seen = make_split()
    hidden = backbone.early(seen).detach()
    backbone.zero_grad()
    backbone.late(hidden).square().sum().backward()
    assert set(backbone.late_names()) == {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert backbone.late_names()


def test_a_transformer_takes_patches_that_its_squares_tile() -> None:
    assert VitSmall(spots(), weights="none", patch_px=48).trunk.pos_embed.shape == (1, 1 + 9, 384)
    with pytest.raises(BadSpec, match=r"in squares of 16 px: patch_px = 50 is no multiple; use 48"):
        VitSmall(spots(), weights="none", patch_px=50)


def test_other_models_are_not_split() -> None:
    backbone = Timm(spots(px=64), model="test_efficientnet.r160_in1k", weights="none", patch_px=64)
    assert not backbone.splits and backbone.late_names() == () and backbone(spots(2, 64)).shape == (2, backbone.width)


# ---- frozen ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMALL, "test_efficientnet.r160_in1k"])
def test_a_frozen_trunk_never_changes(model: str) -> None:
    backbone = frozen(model).train()
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert backbone.frozen and backbone.width == 7 and len(trained) == 4  # of the shared layer
    backbone(spots(5)).square().sum().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    changed = {n for n, t in backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(n.startswith("shared.") for n in changed)
    assert backbone.training and not backbone.trunk.training


def test_a_frozen_backbone_takes_patches_or_what_it_made_of_them() -> None:
    backbone, seen = frozen().train(), spots(5)
    kept = backbone.encode(seen)
    assert kept.shape == (5, backbone.trunk.num_features) and not kept.requires_grad
    features = backbone(seen)  # never an embedding of another origin where there are patches
    assert features.shape == (5, 7)
    assert torch.equal(features, backbone(replace(seen, patches=None, embedding=kept)))
    torch.testing.assert_close(features[:2], backbone(replace(seen, patches=seen.patches[:2])))  # type: ignore[index]


def test_frozen_or_not_the_trunk_starts_the_same() -> None:
    states = []
    for is_frozen in (False, True):
        torch.manual_seed(0)
        states.append(ResNet18(spots(), weights="none", patch_px=32, frozen=is_frozen).trunk.state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_what_a_plain_backbone_need_not_write() -> None:
    class Plain(Backbone):
        pass

    plain = Plain(spots())
    assert not plain.frozen and not plain.splits and plain.late_names() == () and not Tiny(spots()).frozen
    for call in (plain, plain.encode, plain.early, plain.late):
        with pytest.raises(NotImplementedError):
            call(spots())


# ---- timm -----------------------------------------------------------------------------------------------------------


def test_resnet18_without_weights_at_64_px() -> None:
    backbone = ResNet18(spots(px=64), weights="none", patch_px=64)
    assert (backbone.width, backbone.patch_px, backbone.learning_rate) == (512, 64, 1e-4)
    assert backbone(spots(1, 64)).shape == (1, 512) and backbone.eval()(spots(3, 64)).shape == (3, 512)
    assert sum(p.numel() for p in backbone.parameters()) == 11_176_512  # without a classifier
    assert ResNet18.patch_px == 224


def test_patches_are_normalised_as_the_weights_expect() -> None:
    backbone = Timm(spots(px=64), model=SMALL, weights="none", patch_px=64).eval()
    seen: list[Tensor] = []
    backbone.trunk.conv1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    backbone(spots(2, 64))
    config = backbone.trunk.pretrained_cfg
    mean, deviation = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen[0], (spots(2, 64).patches - mean) / deviation)  # type: ignore[operator]


@pytest.fixture(scope="module")
def donor() -> Any:
    """A whole model with classifier, as it is published."""
    torch.manual_seed(1)
    model = timm.create_model(SMALL, pretrained=False)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def write(path: Path, state: Any) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "nested.pth"])
def test_weights_from_a_file(tmp_path: Path, donor: Any, name: str) -> None:
    state = donor.state_dict()
    path = write(tmp_path / name, {"state_dict": state, "epoch": 3} if name == "nested.pth" else state)
    backbone = Timm(spots(px=64), model=SMALL, weights=str(path), patch_px=64).eval()
    expected = donor.forward_head(
        donor.forward_features((spots(2, 64).patches - backbone.mean) / backbone.deviation),  # type: ignore[operator]
        pre_logits=True,
    )
    torch.testing.assert_close(backbone(spots(2, 64)), expected)


def make(weights: object) -> Timm:
    return Timm(spots(px=64), model=SMALL, weights=str(weights), patch_px=64)


def test_a_file_of_another_model(tmp_path: Path, donor: Any) -> None:
    other = timm.create_model("test_vit", pretrained=False).state_dict()
    with pytest.raises(BadSpec, match=rf"other\.pth' do not fit {SMALL}: '[\w.]+' is missing"):
        make(write(tmp_path / "other.pth", other))
    part = {n: t for n, t in donor.state_dict().items() if not n.startswith("layer4")}
    with pytest.raises(BadSpec, match=r"part\.safetensors' do not fit .* 'layer4[\w.]+' is missing"):
        make(write(tmp_path / "part.safetensors", part))


@pytest.mark.parametrize("name", ["old.pth", "old.safetensors"])
def test_a_file_from_before_batches_were_counted(tmp_path: Path, donor: Any, name: str) -> None:
    """As the file of torchvision's ResNet-18 is; torch fills in the counters."""
    state = {n: t for n, t in donor.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(state) < len(donor.state_dict())
    loaded = make(write(tmp_path / name, state)).trunk.state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in state.items() if n in loaded)


@pytest.mark.parametrize("name", ["shape.pth", "shape.safetensors"])
def test_a_file_of_a_model_of_another_size(tmp_path: Path, donor: Any, name: str) -> None:
    """The same names with other shapes, e.g. a wider variant."""
    state = {n: t.clone() for n, t in donor.state_dict().items()}
    wrong = next(n for n, t in state.items() if t.ndim == 4)
    state[wrong] = torch.zeros(2, *state[wrong].shape[1:])
    with pytest.raises(BadSpec, match=rf"{name}' do not fit {SMALL}"):
        make(write(tmp_path / name, state))


@pytest.mark.parametrize("content", [{}, [1, 2], 3, {"state_dict": {}}, {"state_dict": 3}, {"epoch": 3}], ids=str)
def test_a_file_of_something_else(tmp_path: Path, content: Any) -> None:
    with pytest.raises(BadSpec, match=r"odd\.pth' (do not fit|hold no tensors)"):
        make(write(tmp_path / "odd.pth", content))


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is not a model")
    with pytest.raises(BadSpec, match=rf"{name}' cannot be read: "):
        make(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"absent\.pth' of .* is not a file; weights takes imagenet, none or the path"):
        make(tmp_path / "absent.pth")
    with pytest.raises(BadSpec, match=r"'imagenett' of .* is not a file; weights takes imagenet"):
        make("imagenett")


def test_an_unknown_model_gets_near_names() -> None:
    with pytest.raises(BadSpec, match=r"timm has no model 'resnet81'\. Near: .*resnet"):
        Timm(spots(), model="resnet81", weights="none")
    with pytest.raises(BadSpec, match=r"timm cannot build 'resnet18\.no_such_tag'"):
        Timm(spots(), model="resnet18.no_such_tag", weights="none")


def test_imagenet_without_a_network_says_what_to_download() -> None:
    with pytest.raises(BadSpec) as caught:
        ResNet18(spots(px=64), patch_px=64)
    sentence = str(caught.value)
    for part in ("resnet18.tv_in1k", "timm/resnet18.tv_in1k", "ConnectionError", "model.safetensors", "weights=/path"):
        assert part in sentence


def test_imagenet_where_nobody_publishes_weights() -> None:
    with pytest.raises(BadSpec, match=r"timm publishes no weights for 'coatnet_nano_cc_224'; use .*weights=none"):
        Timm(spots(), model="coatnet_nano_cc_224")
