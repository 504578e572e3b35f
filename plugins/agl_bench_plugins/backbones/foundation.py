"""Pathology foundation models, frozen behind one trained layer: those named below, and any timm model on the hub.

Source: the model cards on the Hugging Face hub (`agl-bench show foundation` lists them). `model` takes a name of the
list, `hf-hub:OWNER/NAME` for any other timm model, or `local-dir:FOLDER` with config.json and weights; `weights` takes
`hub`, `none`, or a file or folder downloaded before. Differences: features are float32 throughout; patches are cut at
protocol.patch_um, 112 µm by default, which at 224 px is the 0.5 µm per pixel that these models were trained on. Each
patch is encoded once and its features are kept beside the prepared sections. A frozen model is in no checkpoint and no
kept model, since most licences forbid to hand it on: what needs it again gets it from where it was. With frozen=false
it is trained end to end; set learning_rate to 1e-5 or so then.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

from agl_bench import BadSpec, LogRange, Range, Spots
from agl_bench_plugins.backbones.foundation_models import CARDS, Card, listing
from agl_bench_plugins.backbones.hub import WEIGHTS, download
from agl_bench_plugins.backbones.timm import Trunk, load_file

__doc__ = f"{__doc__}\n{listing()}\n"


class Foundation(Trunk):
    """A pathology foundation model by name, frozen; its licence is shown."""

    reference = "the model cards on the Hugging Face hub"
    rebuilt_with: ClassVar[dict[str, object]] = {}

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

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Without a frozen trunk."""
        state = super().state_dict(*args, **more)
        if self.frozen:
            for name in [n for n in state if n.startswith(f"{more.get('prefix', '')}trunk.")]:
                del state[name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """A frozen trunk stays what it is."""
        if self.frozen:
            state_dict.update({f"{prefix}trunk.{n}": t for n, t in self.trunk.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *more)


def _of_card(name: str, card: Card, weights: str) -> Any:
    """A model of the list with its weights."""
    import timm
    from timm.layers import SwiGLUPacked
    from torch import nn

    _say(f"{name} is {card.repository}, licence {card.licence}{', gated' if card.gated else ''}")
    path = download(card.repository, WEIGHTS) if weights == "hub" else _file(Path(weights))
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
    folder = Path(place) if scheme == "local-dir" else download(place, ("config.json",)).parent
    if not (folder / "config.json").is_file():
        raise BadSpec(f"{folder} has no config.json; name a folder as timm's models are published on the hub")
    if scheme == "hf-hub":
        _say(f"{place}: its licence stands at https://huggingface.co/{place}")
    try:
        trunk = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    except Exception as error:  # noqa: BLE001  (a configuration may ask for anything)
        raise BadSpec(f"timm cannot build '{name}' from its config.json ({type(error).__name__}: {error})") from None
    if getattr(trunk, "global_pool", None) == "":
        raise BadSpec(f"'{name}' gives tokens and its config.json says not how to pool them; set global_pool in a copy")
    if weights == "hub":
        load_file(trunk, name, _file(folder) if scheme == "local-dir" else download(place, WEIGHTS), "hub")
    elif weights != "none":
        load_file(trunk, name, _file(Path(weights)), "hub")
    return trunk


def _file(path: Path) -> Path:
    """A file of weights, also named by the folder that it is in."""
    return next((path / name for name in WEIGHTS if (path / name).is_file()), path)


@functools.cache
def _say(line: str) -> None:
    """Once for each process."""
    print(f"agl-bench: {line}", file=sys.stderr, flush=True)
