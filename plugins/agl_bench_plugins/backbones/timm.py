"""Image encoders of timm, trained end to end or frozen: any model by name, and what the named ones share.

Source: Wightman, PyTorch Image Models (timm). Difference: weights are named by the user (`imagenet`, `none` or a file)
and never replaced by others in silence. ResNets, DenseNets and plain ViTs are cut before their last stage or block, so
that look-aheads need not go through the whole network; a ViT is set to the size of the patches. A frozen encoder stays
in evaluation mode, behind the trained layer that the backbone `embedding` has too, which all genes share.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from agl_bench import Backbone, BadSpec, LogRange, Range, Spots, is_offline
from agl_bench_plugins.backbones.hub import in_cache


class Trunk(Backbone):
    """A timm model without its classifier, trained end to end, or frozen behind one trained layer.

    Args:
        example: as in `Backbone`.
        trunk: the model.
        name: of the model, for errors.
        patch_px: side of the patches.
        learning_rate: of everything that is trained.
        frozen: whether the trunk is.
        shared: width of the trained layer behind a frozen trunk.
        class_and_mean: whether the trunk gives tokens, to be pooled as the class token beside the mean patch token.
        mean: of each channel, that pixels are normalised with; those of the trunk's configuration by default.
        deviation: likewise.
    """

    rebuilt_with: ClassVar[dict[str, object]] = {"weights": "none"}
    made_with: ClassVar[tuple[str, ...]] = ("timm",)
    late_settings: ClassVar[tuple[str, ...]] = ("learning_rate", "shared", "frozen", "weights")
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        example: Spots,
        trunk: Any,
        name: str,
        *,
        patch_px: int,
        learning_rate: float,
        frozen: bool,
        shared: int,
        class_and_mean: bool = False,
        mean: tuple[float, float, float] | None = None,
        deviation: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__(example)
        self.patch_px, self.learning_rate, self.frozen = patch_px, learning_rate, frozen
        self.trunk, self.class_and_mean = trunk, class_and_mean
        _fit_size(trunk, name, patch_px)
        self._cut = _cut(trunk)
        self.width = int(getattr(trunk, "num_features", 0)) * (2 if class_and_mean else 1)
        self.splits = frozen or self._cut is not None
        if self._cut is not None:
            self.late_prefixes = self._cut.late_prefixes
        if frozen:
            trunk.requires_grad_(False).eval()
            self.shared = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, shared), nn.SiLU())
            self.width, self.late_prefixes = shared, ("shared.",)
        config = trunk.pretrained_cfg
        for buffer, values in (("mean", mean or config["mean"]), ("deviation", deviation or config["std"])):
            self.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Trunk:
        """A frozen trunk stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, spots: Spots) -> Tensor:
        """Features (spots, width): pooled, or those of the shared layer if the trunk is frozen."""
        return super().forward(spots) if self.splits else self.encode(spots)

    def encode(self, spots: Spots) -> Tensor:
        """Pooled features (spots, n) of the trunk."""
        return self._pooled(self.trunk(self._normalised(spots)))

    def early(self, spots: Spots) -> Tensor:
        """Up to the last stage or block; of a frozen trunk everything, or what was kept of it in place of patches."""
        if self.frozen:
            return spots.embedding if spots.patches is None else self.encode(spots)
        return self._cut.early(self.trunk, self._normalised(spots))

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from what `early` returned."""
        return self.shared(hidden) if self.frozen else self._pooled(self._cut.late(self.trunk, hidden))

    def _pooled(self, given: Tensor) -> Tensor:
        """(spots, n) from what the trunk gives, which most trunks have pooled themselves."""
        if not self.class_and_mean:
            return given
        return torch.cat([given[:, 0], given[:, self.trunk.num_prefix_tokens :].mean(1)], dim=1)

    def _normalised(self, spots: Spots) -> Tensor:
        assert spots.patches is not None
        return (spots.patches - self.mean).div_(self.deviation)


class Timm(Trunk):
    """Any timm model, by name."""

    reference = "Wightman, PyTorch Image Models"

    def __init__(
        self,
        example: Spots,
        *,
        model: str = "resnet18.tv_in1k",
        weights: str = "imagenet",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-4,
        frozen: bool = False,
        shared: Annotated[int, LogRange(2, 4096)] = 128,
    ) -> None:
        super().__init__(
            example,
            _create(model, weights),
            model,
            patch_px=patch_px,
            learning_rate=learning_rate,
            frozen=frozen,
            shared=shared,
        )


class Convolutional(Timm):
    """A convolutional timm model with a name of its own here: a subclass sets `model`."""

    model: ClassVar[str]

    def __init__(
        self,
        example: Spots,
        *,
        weights: str = "imagenet",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-4,
        frozen: bool = False,
        shared: Annotated[int, LogRange(2, 4096)] = 128,
    ) -> None:
        super().__init__(
            example,
            model=self.model,
            weights=weights,
            patch_px=patch_px,
            learning_rate=learning_rate,
            frozen=frozen,
            shared=shared,
        )


@dataclass(frozen=True)
class _Cut:
    """Where a trunk is cut in two: `late(trunk, early(trunk, pixels))` is `trunk(pixels)`.

    Attributes:
        early: up to the last stage or block.
        late: the rest and the pooling.
        late_prefixes: as in `Backbone`.
    """

    early: Callable[[Any, Tensor], Tensor]
    late: Callable[[Any, Tensor], Tensor]
    late_prefixes: tuple[str, ...]


def _cut(trunk: Any) -> _Cut | None:
    """Before layer 4 of a ResNet, block 4 of a DenseNet or the last block of a plain ViT; None for other models."""
    from timm.models.densenet import DenseNet
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    if type(trunk) is ResNet:
        return _Cut(_resnet_early, _resnet_late, ("trunk.layer4.",))
    if type(trunk) is DenseNet and list(dict(trunk.features.named_children()))[-2:] == ["denseblock4", "norm5"]:
        return _Cut(_densenet_early, _densenet_late, ("trunk.features.denseblock4.", "trunk.features.norm5."))
    if type(trunk) is VisionTransformer:
        last = f"trunk.blocks.{len(trunk.blocks) - 1}."
        return _Cut(_vit_early, _vit_late, (last, "trunk.norm.", "trunk.fc_norm.", "trunk.attn_pool."))
    return None


def _fit_size(trunk: Any, name: str, patch_px: int) -> None:
    """Set a plain ViT to patches of this size, with its position embedding interpolated once and for all.

    Raises:
        BadSpec: if its own patches do not tile them.
    """
    from timm.models.vision_transformer import VisionTransformer

    if type(trunk) is not VisionTransformer or trunk.patch_embed.img_size == (patch_px, patch_px):
        return
    side = trunk.patch_embed.patch_size[0]
    if patch_px % side:
        near = max(round(patch_px / side), 1) * side
        raise BadSpec(f"{name} reads a patch in squares of {side} px: patch_px = {patch_px} is no multiple; use {near}")
    trunk.set_input_size(img_size=(patch_px, patch_px))


def _resnet_early(trunk: Any, pixels: Tensor) -> Tensor:
    stem = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(pixels))))
    return trunk.layer3(trunk.layer2(trunk.layer1(stem)))


def _resnet_late(trunk: Any, maps: Tensor) -> Tensor:
    return trunk.forward_head(trunk.layer4(maps))


def _densenet_early(trunk: Any, pixels: Tensor) -> Tensor:
    return trunk.features[:-2](pixels)


def _densenet_late(trunk: Any, maps: Tensor) -> Tensor:
    return trunk.forward_head(trunk.features[-2:](maps))


def _vit_early(trunk: Any, pixels: Tensor) -> Tensor:
    tokens = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels))))
    return trunk.blocks[:-1](tokens)


def _vit_late(trunk: Any, tokens: Tensor) -> Tensor:
    return trunk.forward_head(trunk.norm(trunk.blocks[-1](tokens)))


def _create(name: str, weights: str) -> Any:
    """The timm model without its classifier.

    Raises:
        BadSpec: if the model does not exist, or its weights cannot be had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's use of what torch will retire; no user's matter
        import timm

    architecture = name.split(".")[0]
    if name.startswith(("hf-hub:", "hf_hub:")):
        raise BadSpec(f"'{name}' is a model of the hub; use --backbone foundation --set foundation.model={name}")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise BadSpec(f"timm has no model '{name}'.{' Near: ' + ', '.join(near) + '.' if near else ''}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # an unknown pretrained tag
        raise BadSpec(f"timm cannot build '{name}': {error}") from None
    if weights == "none":
        return model
    if weights == "imagenet":
        _load_imagenet(model, name)
    else:
        load_file(model, name, Path(weights))
    return model


def _load_imagenet(model: Any, name: str) -> None:
    from timm.models import load_pretrained

    config = model.pretrained_cfg
    source = config.get("hf_hub_id") or config.get("url")
    if not source:
        raise BadSpec(f"timm publishes no weights for '{name}'; use --set <backbone>.weights=none or a file")
    if offline := is_offline("HF_HUB_OFFLINE"):
        if found := in_cache(source):
            load_file(model, name, found)
            return
        raise BadSpec(
            f"{offline} forbids downloads, and the ImageNet weights of '{name}' ({source}) are not in the cache of the "
            "hub; unset it, name a file with --set <backbone>.weights=/path/to/file, or choose "
            "--set <backbone>.weights=none"
        )
    try:
        load_pretrained(model, num_classes=0, strict=False)
    except Exception as error:  # noqa: BLE001  (whatever the hub client raises without a network)
        raise BadSpec(
            f"the ImageNet weights of '{name}' ({source}) could not be downloaded ({type(error).__name__}). Download "
            f"its model.safetensors (or .pth) on a machine with a network and name it: "
            f"--set <backbone>.weights=/path/to/file; or choose --set <backbone>.weights=none"
        ) from None


def load_file(model: Any, name: str, path: Path, published: str = "imagenet") -> None:
    """Load a file of weights: none may be missing, and none left over but those of the classifier.

    Args:
        model: to load them into.
        name: of the model, for errors.
        path: .safetensors, or what torch.save wrote.
        published: what `weights` calls those that are downloaded.

    Raises:
        BadSpec: if it is no such file, or of another model.
    """
    if not path.is_file():
        raise BadSpec(
            f"weights '{path}' of {name} is not a file; weights takes {published}, none or the path of a file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors

            state = load_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (unpicklers raise anything on a damaged file)
        raise BadSpec(f"weights '{path}' cannot be read: {type(error).__name__}: {error}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise BadSpec(f"weights '{path}' hold no tensors by name; save model.state_dict() of timm's {name}")
    for tensor_name, tensor in model.state_dict().items():
        there = state.get(tensor_name)
        if there is None and tensor_name.endswith("num_batches_tracked"):
            continue  # older files lack this counter, which nothing here reads
        if not isinstance(there, Tensor) or there.shape != tensor.shape:
            got = f"is {tuple(there.shape)}" if isinstance(there, Tensor) else "is missing"
            raise BadSpec(
                f"weights '{path}' do not fit {name}: '{tensor_name}' {got}, it has to be {tuple(tensor.shape)}"
            )
    known = model.state_dict().keys()
    for tensor_name in state:
        if tensor_name not in known and not tensor_name.startswith(_left_over(model)):
            raise BadSpec(
                f"weights '{path}' are of another model than {name}: it has no '{tensor_name}'; choose the one that "
                "they were saved from"
            )
    model.load_state_dict(state, strict=False)


def _left_over(model: Any) -> tuple[str, ...]:
    """How the names begin of what a file may hold beside the model: the classifier, and a token of its training."""
    found = model.pretrained_cfg.get("classifier") or ()
    return (*(f"{n}." for n in ((found,) if isinstance(found, str) else found)), "mask_token")
