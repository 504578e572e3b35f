"""An exact checksum of the bits of a tensor, made where the tensor lies."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_BLOCK = 2**16  # words summed at a time: what is made of them stays in the cache of a processor
_STRIDE = 0x5851_F42D_4C95_7F2D  # from block to block; odd, as the weights within a block are
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Σ of mixed words, modulo 2⁶⁴: () int64 on the tensor's device, which nobody waits for.

    A change goes unseen by a chance of 2⁻³¹ or less; another order is a change too, another NaN, the sign of a zero.
    Sums compare for one tensor at one place alone.
    """
    words = _words(tensor.detach().contiguous().reshape(-1))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in torch.split(words, _BLOCK):
        mixed = block * _weights(tensor.device)[: len(block)]
        mixed ^= mixed >> 32  # the highest bits of two words, e.g. their signs, would cancel
        total = total * _STRIDE + mixed.sum()
    return total


def _words(flat: Tensor) -> Tensor:
    """The bytes of a tensor as the longest words that fit to its place in memory and its length."""
    size, begin = flat.element_size(), flat.storage_offset() * flat.element_size()
    word = next(w for w in _WORDS if not (begin % w.itemsize or flat.numel() * size % w.itemsize))
    return flat.view(torch.uint8).view(word)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, the same in every process."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)
