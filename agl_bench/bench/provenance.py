"""Versions and machine that a result is from."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from agl_bench import __version__


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "agl_bench": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **_versions(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {sys.platform}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Of libraries, for the record; each look-up takes a millisecond."""
    return {name: version(name) for name in ("torch", "numpy", "scanpy", "anndata")}


@functools.cache
def _commit() -> str:
    """Commit of the checkout that this file is in, with "+" if it has changes; "" outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.strip() + ("+" if changes.strip() else "")


@functools.cache
def processor() -> str:
    """Model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
