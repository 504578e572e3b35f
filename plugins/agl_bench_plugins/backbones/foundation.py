"""Pathology foundation models, frozen behind one trained layer: those named below, and any timm model on the hub.

Source: the model cards on the Hugging Face hub (`agl-bench show foundation` lists them). `model` takes a name of the
list, `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME@REVISION` for any other timm model, or `local-dir:FOLDER` with
config.json and weights; `weights` takes `hub`, `none`, or a file or folder downloaded before. Differences: features
are float32 throughout; patches are cut at protocol.patch_um, 112 µm by default, which at 224 px is the 0.5 µm per
pixel that most of these models were trained on. Each patch is encoded once and its features are kept beside the
prepared sections. A frozen model is in no checkpoint and no kept model, since most licences forbid to hand it on: what
needs it again gets it from where it was, and refuses another one. With frozen=false it is trained end to end; set
learning_rate to 1e-5 or so then.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from agl_bench import BadSpec, LogRange, Range, Spots
from agl_bench_plugins.backbones.foundation_models import CARDS, Card, listing
from agl_bench_plugins.backbones.hub import WEIGHTS, download
from agl_bench_plugins.backbones.timm import Trunk, load_file

__doc__ = f"{__doc__}\n{listing()}\n"

OTHER_FILE = "download the file on another machine and name it with --set foundation.weights=PATH"
OTHER_FOLDER = "download config.json and weights elsewhere and name the folder: --set foundation.model=local-dir:FOLDER"
LOOKED_AT = 256  # numbers of each tensor, which tell one training of a model from another


class Foundation(Trunk):
    """A pathology foundation model by name, frozen; its licence is shown."""

    reference = "the model cards on the Hugging Face hub"
    rebuilt_with: ClassVar[dict[str, object]] = {}
    mark: Tensor

    @classmethod
    def weight_files(cls, settings: Mapping[str, Any]) -> list[Path]:
        """Configuration and weights in a folder that `model` or `weights` names."""
        scheme, _, place = str(settings["model"]).partition(":")
        found = []
        if scheme == "local-dir":
            found = [Path(place) / "config.json"] + [_file(Path(place))] * (settings["weights"] == "hub")
        if settings["weights"] not in ("hub", "none"):
            found.append(_file(Path(str(settings["weights"]))))
        return [path for path in found if path.is_file()]

    def __init__(
        self,
        example: Spots,
        *,
        model: str = "phikon",
        weights: str = "hub",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-3,
        frozen: bool = True,
        shared: Annotated[int, LogRange(2, 4096)] = 128,
    ) -> None:
        card = CARDS.get(model)
        trunk = _of_folder(model, weights) if card is None else _of_card(model, card, weights)
        super().__init__(
            example,
            trunk,
            model,
            patch_px=patch_px,
            learning_rate=learning_rate,
            frozen=frozen,
            shared=shared,
            class_and_mean=card is not None and card.class_and_mean,
            mean=card and card.colours[0],
            deviation=card and card.colours[1],
        )
        if frozen:  # stands in the state for the trunk, which does not
            self.register_buffer("mark", _mark(trunk))

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Without a frozen trunk."""
        state = super().state_dict(*args, **more)
        if self.frozen:
            for name in [n for n in state if n.startswith(f"{more.get('prefix', '')}trunk.")]:
                del state[name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """A frozen trunk stays what it is, and has to be the one of the state."""
        if self.frozen:
            there = state_dict.get(f"{prefix}mark")
            if there is not None and not torch.equal(there.to(self.mark), self.mark):
                raise BadSpec(
                    "the weights of the foundation model are not those that this model was trained behind; name the "
                    "revision of then (hf-hub:OWNER/NAME@REVISION), or the file"
                )
            state_dict.update({f"{prefix}trunk.{n}": t for n, t in self.trunk.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *more)


def _of_card(name: str, card: Card, weights: str) -> Any:
    """A model of the list with its weights."""
    import timm
    from timm.layers import SwiGLUPacked
    from torch import nn

    _say(f"{name} is {card.repository}, licence {card.licence}{', gated' if card.gated else ''}")
    path = download(card.repository, WEIGHTS, OTHER_FILE) if weights == "hub" else _file(Path(weights))
    units = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if card.gated_units else {}
    trunk = timm.create_model(card.architecture, num_classes=0, **card.options, **units)
    if weights != "none":
        load_file(trunk, name, path, "hub")
    return trunk


def _of_folder(name: str, weights: str) -> Any:
    """A model that is described by a config.json, on the hub or in a folder, with its weights."""
    import timm

    scheme, _, place = name.partition(":")
    if scheme not in ("hf-hub", "local-dir") or not place:
        known = ", ".join(CARDS)
        raise BadSpec(f"no foundation model '{name}'; take hf-hub:OWNER/NAME, local-dir:FOLDER or one of {known}")
    folder = Path(place) if scheme == "local-dir" else download(place, ("config.json",), OTHER_FOLDER).parent
    if not (folder / "config.json").is_file():
        raise BadSpec(f"{folder} has no config.json; name a folder as timm's models are published on the hub")
    if scheme == "hf-hub":
        _say(f"{place}: its licence stands at https://huggingface.co/{place.partition('@')[0]}")
    try:
        trunk = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    except Exception as error:  # noqa: BLE001  (a configuration may ask for anything)
        raise BadSpec(f"timm cannot build '{name}' from its config.json ({type(error).__name__}: {error})") from None
    if getattr(trunk, "global_pool", None) == "":
        raise BadSpec(f"'{name}' gives tokens and its config.json says not how to pool them; set global_pool in a copy")
    if weights == "hub":
        load_file(trunk, name, _file(folder) if scheme == "local-dir" else download(place, WEIGHTS, OTHER_FILE), "hub")
    elif weights != "none":
        load_file(trunk, name, _file(Path(weights)), "hub")
    return trunk


def _file(path: Path) -> Path:
    """A file of weights, also named by the folder that it is in."""
    return next((path / name for name in WEIGHTS if (path / name).is_file()), path)


def _mark(trunk: Any) -> Tensor:
    """What tells this trunk from others, (16,) uint8."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in trunk.state_dict().items():
        some = tensor.detach().reshape(-1)[:LOOKED_AT].cpu().contiguous()
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + some.view(torch.uint8).numpy().tobytes()
        )
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


@functools.cache
def _say(line: str) -> None:
    """Once for each process."""
    print(f"agl-bench: {line}", file=sys.stderr, flush=True)
