"""Seeds hashed from names, so that adding one stream of randomness never shifts another."""

from __future__ import annotations

import hashlib

import torch


def seed_for(root: int, *names: str) -> int:
    """A 63-bit seed that depends on the root seed and on the names of what may depend on it, and on nothing else."""
    text = "\x1f".join((str(root), *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(root: int, *names: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `seed_for`."""
    return torch.Generator(device=device).manual_seed(seed_for(root, *names))
