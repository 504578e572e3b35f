"""A small vision transformer: 12 blocks of width 384 on 16 px patches, 22 million parameters.

Source: Dosovitskiy et al., ICLR 2021, with weights of Steiner et al., TMLR 2022 (ImageNet-21k, then ImageNet-1k).
Difference: the position embedding is interpolated where patches have another size than 224 px; the learning rate is
lower than that of the convolutional networks, as fine-tuned transformers want it.
"""

from __future__ import annotations

from typing import Annotated

from agl_bench import LogRange, Range, Spots
from agl_bench_plugins.backbones.timm import Timm


class VitSmall(Timm):
    """ViT-S/16, a transformer that still trains on one GPU."""

    reference = "Dosovitskiy et al., ICLR 2021; Steiner et al., TMLR 2022"

    def __init__(
        self,
        example: Spots,
        *,
        weights: str = "imagenet",
        patch_px: Annotated[int, Range(16, 1024)] = 224,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 3e-5,
        frozen: bool = False,
        shared: Annotated[int, LogRange(2, 4096)] = 128,
    ) -> None:
        super().__init__(
            example,
            model="vit_small_patch16_224.augreg_in21k_ft_in1k",
            weights=weights,
            patch_px=patch_px,
            learning_rate=learning_rate,
            frozen=frozen,
            shared=shared,
        )
