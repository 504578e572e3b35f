"""Image encoders of timm, trained end to end: ResNet-18 and any other model by name.

Source: Wightman, PyTorch Image Models (timm); ResNet-18: He et al., CVPR 2016, with the torchvision ImageNet weights
that Shiku et al., AAAI 2026 start from. Difference: weights are named by the user (`imagenet`, `none` or a file) and
never replaced by others in silence.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from agl_bench import Backbone, BadSpec, LogRange, Range, Spots


class Timm(Backbone):
    """Any timm model, by name."""

    reference = "Wightman, PyTorch Image Models"
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        example: Spots,
        *,
        model: str = "resnet18.tv_in1k",
        weights: str = "imagenet",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-4,
    ) -> None:
        super().__init__(example)
        self.patch_px, self.learning_rate = patch_px, learning_rate
        self.trunk = _create(model, weights)
        self.width = int(getattr(self.trunk, "num_features", 0))
        config = self.trunk.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, spots: Spots) -> Tensor:
        """Pooled features (spots, width)."""
        assert spots.patches is not None
        return self.trunk((spots.patches - self.mean) / self.deviation)


class ResNet18(Timm):
    """ResNet-18, the backbone of the paper."""

    reference = "He et al., CVPR 2016"

    def __init__(
        self,
        example: Spots,
        *,
        weights: str = "imagenet",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-4,
    ) -> None:
        super().__init__(
            example, model="resnet18.tv_in1k", weights=weights, patch_px=patch_px, learning_rate=learning_rate
        )


def _create(name: str, weights: str) -> Any:
    """The timm model without its classifier.

    Raises:
        BadSpec: if the model does not exist, or its weights cannot be had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's use of what torch will retire; no user's matter
        import timm

    architecture = name.split(".")[0]
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
        _load_file(model, name, Path(weights))
    return model


def _load_imagenet(model: Any, name: str) -> None:
    from timm.models import load_pretrained

    config = model.pretrained_cfg
    source = config.get("hf_hub_id") or config.get("url")
    if not source:
        raise BadSpec(f"timm publishes no weights for '{name}'; use --set <backbone>.weights=none or a file")
    try:
        load_pretrained(model, num_classes=0, strict=False)
    except Exception as error:  # noqa: BLE001  (whatever the hub client raises without a network)
        raise BadSpec(
            f"the ImageNet weights of '{name}' ({source}) could not be downloaded ({type(error).__name__}). Download "
            f"its model.safetensors (or .pth) on a machine with a network and name it: "
            f"--set <backbone>.weights=/path/to/file; or choose --set <backbone>.weights=none"
        ) from None


def _load_file(model: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise BadSpec(f"weights '{path}' of {name} is not a file; weights takes imagenet, none or the path of a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
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
    model.load_state_dict(state, strict=False)  # what is left over is the classifier
