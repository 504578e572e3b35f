"""What frozen encoders make of sections: once for all folds, cells and runs, kept beside the prepared sections."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch

from agl_bench.bench.provenance import processor
from agl_bench.bench.spec import Part
from agl_bench.data.prepared import PatchSize, PreparedPatches
from agl_bench.data.preprocess import tabulate
from agl_bench.data.shuffled import ShuffledPatches
from agl_bench.data.store import SpotStore
from agl_bench.digests import text_digest
from agl_bench.errors import BadSpec
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol
from agl_bench.registry.plugins import Plugins
from agl_bench.training.model import build_model, on_device

FORMAT = 1  # of the features; another number is another encoder
Symmetries = Literal[1, 8]


@dataclass(frozen=True)
class Encoded:
    """What a frozen encoder makes of a section.

    Attributes:
        features: (symmetries, spots, n) float32, of all spots of the section in its order; mostly memory-mapped.
        was_there: nothing had to be encoded.
        seconds: for encoding and writing.
    """

    features: np.ndarray
    was_there: bool
    seconds: float


def encoder_digest(part: Part, backbone: Backbone, size: PatchSize, device: torch.device) -> str:
    """Digest of all that decides the features of a patch: state, settings, code, libraries, size and device.

    Args:
        part: the backbone as it takes part in a cell.
        backbone: its instance.
        size: of the patches.
        device: that encodes; another one rounds otherwise.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        if not name.startswith(backbone.late_prefixes):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    content = {
        "format": FORMAT,
        "backbone": [part.name, part.provider, part.source],
        "settings": {k: v for k, v in part.settings.items() if k not in backbone.late_settings},
        "state": state.hexdigest(),
        "libraries": [f"{name} {version(name)}" for name in ("torch", *backbone.made_with)],
        "patches": size.stem,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
    }
    return text_digest(json.dumps(content, sort_keys=True, default=str))


def encode_section(
    section: Section, backbone: Backbone, encoder: str, size: PatchSize, symmetries: Symmetries, device: torch.device
) -> Encoded:
    """Features of all spots of a section, found on the disk or made and kept there.

    Args:
        section: prepared, maybe with shuffled patches.
        backbone: frozen, on the device.
        encoder: from `encoder_digest`.
        size: of the patches.
        symmetries: 8 where patches are augmented, else 1.
        device: that encodes.

    Raises:
        BadSpec: if the section has no patches.
        BadWorkFolder: if features cannot be written, e.g. because the disk is full.
    """
    started = time.perf_counter()
    shuffled = section.patches if isinstance(section.patches, ShuffledPatches) else None
    patches = section.patches if shuffled is None else shuffled.source
    if patches is None:
        raise BadSpec(f"section '{section.name}' has no image or patches; use a backbone that sees something else")

    own = Section(section.name, section.counts, section.um_per_px, patches)

    def make(rows: np.ndarray) -> np.ndarray:
        store = _patches_of(own, rows, size, device)
        store.encode(backbone, symmetries)
        assert store.embedding is not None
        return store.embedding.cpu().numpy()

    if isinstance(patches, PreparedPatches):
        features, was_there = patches.features(encoder, symmetries, make)
    else:
        features, was_there = make(np.arange(section.counts.n_obs)), False
    if shuffled is not None:
        features = features[:, shuffled.order]
    return Encoded(features, was_there, time.perf_counter() - started)


def _patches_of(section: Section, rows: np.ndarray, size: PatchSize, device: torch.device) -> SpotStore:
    """Spots of a section without any gene; which of them take part is a cell's matter."""
    every_spot = Protocol(min_genes_per_spot=0, spot_mads=0)
    table, no_genes = tabulate([section], every_spot), np.empty(0, dtype=np.int64)
    return SpotStore(
        table, rows, no_genes, sees="patches", patch_px=size.px, patch_um=size.um, device=device,
        patches_on="mapped",
    )  # fmt: skip


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen backbone outside any cell, that makes the features which cells will find.

    Attributes:
        backbone: on the device.
        digest: of all that decides its features.
        size: of the patches.
        device: that encodes.
    """

    backbone: Backbone
    digest: str
    size: PatchSize
    device: torch.device

    @classmethod
    def of(
        cls, plugins: Plugins, part: Part, size: PatchSize, device: torch.device, section: Section
    ) -> FrozenEncoder | None:
        """The backbone of these settings; None if nothing of it is frozen.

        Args:
            plugins: where it is from.
            part: the backbone as it takes part in cells.
            size: of the patches.
            device: that encodes.
            section: whose first spots its constructor is shown.
        """
        make = plugins.entry(part.name, "backbone").load()
        if not part.settings.get("frozen", getattr(make, "frozen", False)):
            return None
        store = _patches_of(section, np.arange(min(4, section.counts.n_obs)), size, torch.device("cpu"))
        example = store.spots(torch.arange(len(store)))
        model = on_device(build_model(functools.partial(make, example, **part.settings), 1, 0, "encoder"), device)
        return cls(model.backbone, encoder_digest(part, model.backbone, size, device), size, device)

    def encode(self, section: Section, symmetries: Symmetries) -> Encoded:
        """As `encode_section`."""
        return encode_section(section, self.backbone, self.digest, self.size, symmetries, self.device)
