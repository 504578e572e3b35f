"""The door for backbones: spots in, features out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from agl_bench.interfaces.spots import Spots


class Backbone(nn.Module):
    """Maps spots to features; the model puts one linear head with an output for each gene on top.

    The constructor gets `example`, a few training spots (no expression), from which it may read shapes. Settings are
    keyword-only arguments with their range in the annotation.

    A backbone writes `forward`; or sets `splits` and writes `early` and `late`; and `encode` if it sets `frozen`.
    `frozen`, `splits` and `late_prefixes` may be set on the class or, where they depend on settings, on the instance.

    Attributes:
        width: number of features.
        sees: what it looks at; the store loads nothing else.
        patch_px: side of the patches it wants, read from the class or set from a tunable of the same name.
        learning_rate: of the model, used where the protocol says "backbone".
        reference: the publication that this backbone implements.
        frozen: whether `encode` is a part that training never changes, so that its results may be kept.
        splits: whether `forward` is `late(early(spots))`; a look-ahead may then move `late` and the head only, and
            compute `early` once.
        late_prefixes: how the names of the parameters that `late` uses begin, e.g. ("stages.6.", "mix.").
        late_settings: settings that `encode` does not depend on: features that are kept serve all their values.
        made_with: distributions whose version decides what `encode` gives, beside torch and the plug-in's own.
        rebuilt_with: settings that differ where its state is loaded right after it is built, e.g. {"weights": "none"}
            where the constructor would download what the state holds anyway.
        is_control: whether it is no image model but a bound for image models; `run --controls` adds it, tables show it
            below them.
        needs_gpu: whether it runs on a CUDA device only; cells elsewhere are skipped, and tables say so.
        second_order: whether what training moves can be differentiated twice. Cells of selectors that need it are
            skipped where it cannot.
        broken: rules of the door that it breaks on purpose, see `Selector`.
    """

    width: int
    sees: Literal["patches", "embedding", "position"] = "patches"
    patch_px: int = 224
    learning_rate: float = 1e-4
    reference: str = ""
    frozen: bool = False
    splits: bool = False
    late_prefixes: tuple[str, ...] = ()
    late_settings: ClassVar[tuple[str, ...]] = ("learning_rate",)
    made_with: ClassVar[tuple[str, ...]] = ()
    rebuilt_with: ClassVar[dict[str, object]] = {}
    is_control: bool = False
    needs_gpu: bool = False
    second_order: bool = True
    broken: ClassVar[Mapping[str, str]] = {}

    def __init__(self, example: Spots) -> None:
        super().__init__()

    @classmethod
    def weight_files(cls, settings: Mapping[str, Any]) -> list[Path]:
        """Files that settings lead to without naming them, e.g. those of a folder; asked before it is built.

        Their content makes the identity of a cell, as does that of every file that a setting names.

        Args:
            settings: all of them, of this class.
        """
        return []

    def forward(self, spots: Spots) -> Tensor:
        """Features (spots, width)."""
        if not self.splits:
            raise NotImplementedError
        return self.late(self.early(spots))

    def encode(self, spots: Spots) -> Tensor:
        """(spots, n), the part of the network that training never changes.

        Asked once for each spot of a section (and each symmetry of its patch, where the protocol augments), in
        evaluation mode, with positions in µm and section 0; the results are kept on the disk. `forward` then finds them
        in `spots.embedding`.
        """
        raise NotImplementedError

    def early(self, spots: Spots) -> Tensor:
        """What `late` starts from, spots first."""
        raise NotImplementedError

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from what `early` returned."""
        raise NotImplementedError

    def late_names(self) -> tuple[str, ...]:
        """Names of the parameters that `late` uses, as in `named_parameters`."""
        return tuple(name for name, _ in self.named_parameters() if name.startswith(self.late_prefixes))
