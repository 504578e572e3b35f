"""The specimens that come with agl-bench. They enter by the same door as anybody's."""

from __future__ import annotations

from agl_bench import hookimpl

_HERE = "agl_bench_plugins"


@hookimpl
def register_selectors() -> dict[str, str]:
    """Selectors of the paper, its comparators, others that learn, and the bounds for planted data."""
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
        "uncertainty": f"{_HERE}.selectors.uncertainty:Uncertainty",
        "auxilearn": f"{_HERE}.selectors.auxilearn:AuxiLearn",
        "amal_spot": f"{_HERE}.selectors.amal_spot:AmalSpot",
        "maxl_weights": f"{_HERE}.selectors.maxl_weights:MaxlWeights",
        "auto_lambda": f"{_HERE}.selectors.auto_lambda:AutoLambda",
        "soft_topk": f"{_HERE}.selectors.soft_topk:SoftTopk",
        "oracle": f"{_HERE}.selectors.oracle:Oracle",
        "anti_oracle": f"{_HERE}.selectors.anti_oracle:AntiOracle",
    }


@hookimpl
def register_backbones() -> dict[str, str]:
    """Image encoders, trained or frozen, and the control that sees no image."""
    return {
        "tiny": f"{_HERE}.backbones.tiny:Tiny",
        "resnet18": f"{_HERE}.backbones.resnet:ResNet18",
        "resnet50": f"{_HERE}.backbones.resnet:ResNet50",
        "densenet121": f"{_HERE}.backbones.densenet:DenseNet121",
        "vit_small": f"{_HERE}.backbones.vit_small:VitSmall",
        "timm": f"{_HERE}.backbones.timm:Timm",
        "foundation": f"{_HERE}.backbones.foundation:Foundation",
        "stain_statistics": f"{_HERE}.backbones.stain_statistics:StainStatistics",
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
