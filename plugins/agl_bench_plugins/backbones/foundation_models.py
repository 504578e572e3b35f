"""Pathology foundation models that timm can build: where they are, what they may be used for, how they are pooled.

Architectures and pooling are those of the model cards on the Hugging Face hub; the loader accepts weights that fit them
to the last tensor and no others. All were trained on patches of 224 px. Left out, because timm alone cannot build
them: CONCH, CTransPath, Phikon-v2, Hibou, Midnight, MUSK; their features can be used through the backbone `embedding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of each channel
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NO_DERIVATIVES = "CC-BY-NC-ND-4.0"


@dataclass(frozen=True)
class Card:
    """A model as its card on the hub describes it.

    Attributes:
        repository: on the hub.
        licence: of the weights.
        gated: whether its terms have to be accepted on the hub before it can be downloaded.
        width: of its features.
        architecture: name in timm.
        options: of timm's constructor.
        gated_units: whether its blocks have SwiGLU layers, which have no name in timm's configurations.
        class_and_mean: whether its features are the class token beside the mean of the patch tokens; the class token
            alone otherwise.
        colours: mean and standard deviation of each channel, that its pixels are normalised with.
        paper: that it is from.
    """

    repository: str
    licence: str
    gated: bool
    width: int
    architecture: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gated_units: bool = False
    class_and_mean: bool = False
    colours: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET


_UNI2 = {
    "patch_size": 14, "embed_dim": 1536, "depth": 24, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "init_values": 1e-5,
    "reg_tokens": 8, "no_embed_class": True,
}  # fmt: skip
_VIRCHOW = {"mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": ""}
_OPTIMUS = {"img_size": 224, "init_values": 1e-5, "global_pool": "token"}

CARDS: dict[str, Card] = {
    "uni": Card(
        "MahmoodLab/UNI", NO_DERIVATIVES, True, 1024, "vit_large_patch16_224", "Chen et al., Nature Medicine 2024",
        {"init_values": 1e-5},
    ),
    "uni2-h": Card(
        "MahmoodLab/UNI2-h", NO_DERIVATIVES, True, 1536, "vit_giant_patch14_224", "Chen et al., Nature Medicine 2024",
        _UNI2, gated_units=True,
    ),
    "virchow": Card(
        "paige-ai/Virchow", "Apache-2.0", True, 2560, "vit_huge_patch14_224", "Vorontsov et al., Nature Medicine 2024",
        _VIRCHOW, gated_units=True, class_and_mean=True,
    ),
    "virchow2": Card(
        "paige-ai/Virchow2", NO_DERIVATIVES, True, 2560, "vit_huge_patch14_224", "Zimmermann et al., arXiv:2408.00738",
        {**_VIRCHOW, "reg_tokens": 4}, gated_units=True, class_and_mean=True,
    ),
    "prov-gigapath": Card(
        "prov-gigapath/prov-gigapath", "Apache-2.0, for research only", True, 1536, "vit_giant_patch14_dinov2",
        "Xu et al., Nature 2024", {"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334},
    ),
    "h-optimus-0": Card(
        "bioptimus/H-optimus-0", "Apache-2.0", True, 1536, "vit_giant_patch14_reg4_dinov2", "Saillard et al., 2024",
        _OPTIMUS, colours=BIOPTIMUS,
    ),
    "h-optimus-1": Card(
        "bioptimus/H-optimus-1", NO_DERIVATIVES, True, 1536, "vit_giant_patch14_reg4_dinov2", "Bioptimus, 2025",
        _OPTIMUS, colours=BIOPTIMUS,
    ),
    "h0-mini": Card(
        "bioptimus/H0-mini", NO_DERIVATIVES, True, 1536, "vit_base_patch14_reg4_dinov2", "Filiot et al., 2025",
        {"img_size": 224, "mlp_ratio": 5.33334, "init_values": 1e-5, "global_pool": ""},
        gated_units=True, class_and_mean=True, colours=BIOPTIMUS,
    ),
    "phikon": Card(
        "1aurent/vit_base_patch16_224.owkin_pancancer", "Owkin non-commercial", False, 768, "vit_base_patch16_224",
        "Filiot et al., medRxiv 2023",
    ),
    "lunit-s8": Card(
        "1aurent/vit_small_patch8_224.lunit_dino", "Lunit non-commercial", False, 384, "vit_small_patch8_224",
        "Kang et al., CVPR 2023", colours=LUNIT,
    ),
    "kaiko-s16": Card(
        "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms", "Kaiko non-commercial", False, 384,
        "vit_small_patch16_224", "Aben et al., arXiv:2404.15217", colours=HALF,
    ),
    "kaiko-b8": Card(
        "1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms", "Kaiko non-commercial", False, 768,
        "vit_base_patch8_224", "Aben et al., arXiv:2404.15217", colours=HALF,
    ),
}  # fmt: skip


def listing() -> str:
    """Two lines for each model, for people."""
    lines = []
    for name, card in CARDS.items():
        features = "class token, mean patch token" if card.class_and_mean else "class token"
        gate = "gated" if card.gated else "free to download"
        lines.append(f"{name:<14} {card.licence}, {gate}; {card.width} features: {features}")
        lines.append(f"{'':<14} {card.repository}; {card.paper}")
    return "\n".join(lines)
