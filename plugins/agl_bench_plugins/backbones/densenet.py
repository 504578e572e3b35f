"""DenseNet-121, the network of ST-Net.

Source: He et al., Integrating spatial gene expression and breast tumour morphology via deep learning, Nature Biomedical
Engineering 2020 (ST-Net): an ImageNet DenseNet-121 (Huang et al., CVPR 2017) on 224 px patches, trained end to end,
with one linear output for each of 250 genes. Difference: which genes, their targets, the loss, the optimiser (Adam in
place of SGD with momentum), augmentation and stopping are the protocol's, the same for all backbones here; the learning
rate is that of the other convolutional networks.
"""

from __future__ import annotations

from agl_bench_plugins.backbones.timm import Convolutional


class DenseNet121(Convolutional):
    """DenseNet-121, the network of ST-Net."""

    model = "densenet121.tv_in1k"
    reference = "ST-Net: He et al., Nature Biomedical Engineering 2020"
