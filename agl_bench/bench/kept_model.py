"""The model of a cell as it is kept: all that predicts the primary genes of new spots, and nothing that trains."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agl_bench.bench.spec import RunSpec
from agl_bench.errors import AglBenchError, BadPlugin, BadSpec, UnknownName
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.spots import Spots
from agl_bench.registry.plugins import Plugins
from agl_bench.training.evaluate import BATCH, Maps
from agl_bench.training.model import Model, build_model

FORMAT = 1


@dataclass(frozen=True)
class KeptModel:
    """A trained model in its best state, with the head of the primary genes alone: no other output is ever scored.

    Attributes:
        spec: of the cell, as JSON.
        genes: (primary,) names, in the order of the outputs.
        weights: state of backbone and head, on the host; that of a frozen encoder too, so that no file is missed later.
        slope, offset: (primary,) as in `Maps`: what brings predictions into the units of the targets.
        example: some training spots, from which the backbone's constructor reads shapes.
    """

    spec: Mapping[str, Any]
    genes: tuple[str, ...]
    weights: Mapping[str, Tensor] = field(repr=False)
    slope: Tensor = field(repr=False)
    offset: Tensor = field(repr=False)
    example: Spots = field(repr=False)

    @classmethod
    def of(cls, spec: RunSpec, model: Model, genes: GeneSplit, example: Spots, maps: Maps) -> KeptModel:
        """The model of a cell, as it is now.

        Args:
            spec: of the cell.
            model: trained, with an output for each gene.
            genes: which are primary.
            example: some training spots.
            maps: for the affine fit.
        """
        narrow = model.narrow(genes.primary.nonzero().squeeze(1).to(model.head.weight.device))
        seen = (example.patches, example.position, example.section, example.embedding)
        return cls(
            spec=spec.as_json(),
            genes=tuple(np.asarray(genes.names, dtype=object)[genes.primary.numpy()]),
            weights={n: t.detach().cpu().contiguous().clone() for n, t in narrow.state_dict().items()},
            slope=torch.from_numpy(maps.slope.copy()),
            offset=torch.from_numpy(maps.offset.copy()),
            example=Spots(*(None if t is None else t.cpu() for t in seen)),  # type: ignore[arg-type]
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `torch.load(weights_only=True)`; patches as the bytes that they are."""
        patches = self.example.patches
        return {
            "format": FORMAT,
            "spec": json.dumps(self.spec),
            "genes": list(self.genes),
            "weights": dict(self.weights),
            "slope": self.slope,
            "offset": self.offset,
            "example": {
                "patches": None if patches is None else (patches * 255).round().to(torch.uint8),
                "position": self.example.position,
                "section": self.example.section,
                "embedding": self.example.embedding,
            },
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> KeptModel:
        """Inverse of `state`.

        Raises:
            BadSpec: if another version of agl-bench has written it.
        """
        if state.get("format") != FORMAT:
            raise BadSpec(f"the model is of format {state.get('format')} and this agl-bench reads {FORMAT}; update it")
        example = dict(state["example"])
        if example["patches"] is not None:
            example["patches"] = torch.true_divide(example["patches"], 255)
        return cls(
            spec=json.loads(state["spec"]),
            genes=tuple(state["genes"]),
            weights=state["weights"],
            slope=state["slope"],
            offset=state["offset"],
            example=Spots(**example),
        )

    @property
    def sees(self) -> str:
        """What the backbone looks at: "patches", "embedding" or "position"."""
        if self.example.patches is not None:
            return "patches"
        return "position" if self.example.embedding is None else "embedding"

    def build(self, plugins: Plugins) -> Model:
        """The model, on the host and in evaluation mode.

        Raises:
            BadSpec: if the backbone is not there.
            BadPlugin: if it has changed so that the weights do not fit.
        """
        part, seed = self.spec["backbone"], int(self.spec["seed"])
        try:
            make = plugins.entry(part["name"], "backbone").load()
        except UnknownName as error:
            raise BadSpec(f"the model needs backbone '{part['name']}' of {part['provider']}: {error}") from None
        settings = part["settings"] | getattr(make, "rebuilt_with", {})
        try:
            model = build_model(functools.partial(make, self.example, **settings), len(self.genes), seed, "kept")
            model.load_state_dict(dict(self.weights))
        except AglBenchError:
            raise
        except Exception as error:  # whatever another version of the plug-in raises
            raise BadPlugin(
                f"backbone '{part['name']}' is not what the model was trained with ({part['provider']}): "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return model.eval()

    def check(self, seen: np.ndarray) -> None:
        """Raises BadSpec unless `seen` is what `predict` takes."""
        wanted: tuple[int, ...]
        kind: type
        if self.example.patches is not None:
            side = self.example.patches.shape[-1]
            wanted, kind, words = (side, side, 3), np.uint8, "RGB patches as uint8"
        elif self.example.embedding is not None:
            wanted, kind, words = (self.example.embedding.shape[1],), np.float32, "embeddings as float32"
        else:
            wanted, kind, words = (2,), np.float32, "positions (x, y) in µm as float32"
        if seen.shape[1:] != wanted or seen.dtype != kind:
            shape = ", ".join(map(str, ("spots", *wanted)))
            raise BadSpec(f"the model takes {words} of shape ({shape}), got {seen.dtype} {seen.shape}")

    @torch.no_grad()
    def predict(self, model: Model, seen: np.ndarray, *, fitted: bool = False) -> pd.DataFrame:
        """Primary genes of new spots, one column for each, float32.

        Args:
            model: from `build`.
            seen: what the backbone sees: RGB patches uint8 (spots, px, px, 3), of the side and the width on the tissue
                that the spec says, embeddings float32 (spots, width), or positions float32 (spots, 2) in µm.
            fitted: in the units of the targets; else as the model gives them, in which only the order within a gene
                has a meaning where the loss was a correlation.

        Raises:
            BadSpec: if `seen` has another shape or type.
        """
        self.check(seen)
        device = model.head.weight.device
        parts = [torch.empty(0, len(self.genes), device=device)]
        for start in range(0, len(seen), BATCH):
            spots = self._spots(torch.from_numpy(np.ascontiguousarray(seen[start : start + BATCH])).to(device))
            if model.backbone.frozen:
                spots = replace(spots, patches=None, embedding=model.backbone.encode(spots))
            parts.append(model(spots)[1])
        predicted = torch.cat(parts)
        if fitted:
            predicted = predicted * self.slope.to(device) + self.offset.to(device)
        return pd.DataFrame(predicted.cpu().numpy(), columns=list(self.genes))

    def _spots(self, seen: Tensor) -> Spots:
        """What the backbone gets to see of new spots; they lie nowhere unless positions are all that it sees."""
        nowhere, section = torch.zeros(len(seen), 2, device=seen.device), seen.new_zeros(len(seen), dtype=torch.int64)
        if self.sees == "patches":
            return Spots(torch.true_divide(seen.permute(0, 3, 1, 2).contiguous(), 255), nowhere, section)
        if self.sees == "embedding":
            return Spots(None, nowhere, section, seen)
        return Spots(None, seen, section)
