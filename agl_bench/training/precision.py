"""In which arithmetic first-order steps run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from agl_bench.protocol import Precision


@contextlib.contextmanager
def fast(precision: Precision, device: torch.device, *, backward: bool = False) -> Iterator[None]:
    """First-order work inside runs in this precision; parameters, optimisers and losses stay in float32.

    - "fp32": as it is.
    - "tf32": matrix products and convolutions of CUDA round their inputs to 10 bits of mantissa.
    - "bf16": they run under autocast, in bfloat16; a backward pass follows its forward pass by itself.

    A look-ahead is never inside: bfloat16 would leave its gradient little but noise.
    """
    if precision == "bf16" and not backward:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif precision == "tf32":
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before
    else:
        yield
