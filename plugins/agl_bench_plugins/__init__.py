"""The specimens that come with agl-bench. They enter by the same door as anybody's."""

from __future__ import annotations

from agl_bench import hookimpl

_HERE = "agl_bench_plugins"


@hookimpl
def register_selectors() -> dict[str, str]:
    """Selectors of the paper, its comparators, and the bound for planted data."""
    return {
        "pgl": f"{_HERE}.selectors.pgl:Pgl",
        "agl": f"{_HERE}.selectors.agl:Agl",
        "random_k": f"{_HERE}.selectors.random_k:RandomK",
        "hvg_k": f"{_HERE}.selectors.hvg_k:HvgK",
        "dkgsb": f"{_HERE}.selectors.dkgsb:Dkgsb",
        "amal": f"{_HERE}.selectors.amal:Amal",
        "coexpression": f"{_HERE}.selectors.coexpression:Coexpression",
        "spatial": f"{_HERE}.selectors.spatial:Spatial",
        "gradient_cosine": f"{_HERE}.selectors.gradient_cosine:GradientCosine",
        "ol_aux": f"{_HERE}.selectors.ol_aux:OlAux",
        "slgrad": f"{_HERE}.selectors.slgrad:SlGrad",
        "gradnorm": f"{_HERE}.selectors.gradnorm:GradNorm",
        "pcgrad": f"{_HERE}.selectors.pcgrad:PcGrad",
        "forkmerge": f"{_HERE}.selectors.forkmerge:ForkMerge",
        "oracle": f"{_HERE}.selectors.oracle:Oracle",
    }


@hookimpl
def register_backbones() -> dict[str, str]:
    """Image encoders, trained or frozen, and the control that sees no image."""
    return {
        "tiny": f"{_HERE}.backbones.tiny:Tiny",
        "resnet18": f"{_HERE}.backbones.timm:ResNet18",
        "timm": f"{_HERE}.backbones.timm:Timm",
        "embedding": f"{_HERE}.backbones.embedding:Embedding",
        "position": f"{_HERE}.backbones.position:Position",
    }


@hookimpl
def register_datasets() -> dict[str, str]:
    """Sections that need no download, the user's own, and those of the paper."""
    return {
        "synthetic": f"{_HERE}.datasets.synthetic:Synthetic",
        "folder": f"{_HERE}.datasets.folder:Folder",
        "visium": f"{_HERE}.datasets.visium:Visium",
        "spatialdata": f"{_HERE}.datasets.spatialdata:SpatialDataStores",
        "her2st": f"{_HERE}.datasets.her2st:Her2st",
        "hest": f"{_HERE}.datasets.hest:Hest",
        "heart": f"{_HERE}.datasets.heart:Heart",
        "bowel_a": f"{_HERE}.datasets.bowel_a:BowelA",
        "bowel_b": f"{_HERE}.datasets.bowel_b:BowelB",
        "ovary": f"{_HERE}.datasets.ovary:Ovary",
    }
