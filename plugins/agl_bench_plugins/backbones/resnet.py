"""Residual networks with 18 and 50 layers.

Source: He et al., CVPR 2016, with torchvision's first ImageNet weights, which Shiku et al., AAAI 2026 start the
ResNet-18 from. Difference: none but the classifier, which is left out. `_in1k` weights of other recipes are there as
`timm` with `model=resnet50.a1_in1k` and the like.
"""

from __future__ import annotations

from agl_bench_plugins.backbones.timm import Convolutional


class ResNet18(Convolutional):
    """ResNet-18, the backbone of the paper."""

    model = "resnet18.tv_in1k"
    reference = "He et al., CVPR 2016"


class ResNet50(Convolutional):
    """ResNet-50: deeper, four times as wide in its features."""

    model = "resnet50.tv_in1k"
    reference = "He et al., CVPR 2016"
