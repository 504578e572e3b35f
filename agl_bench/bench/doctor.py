"""What this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from agl_bench.addresses import masked
from agl_bench.bench.cells import CellStore
from agl_bench.bench.spec import Part, make_dataset
from agl_bench.errors import AglBenchError, MissingData
from agl_bench.interfaces.tunable import resolve, tunables
from agl_bench.registry.plugins import Plugins


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def diagnose(plugins: Plugins, root: Path, work: Path) -> list[Finding]:
    """Look at Python, libraries, device, plug-ins, data and work folder; changes nothing outside `work`."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scanpy", "anndata", "mlflow", "timm"))
    findings = [
        Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        Finding("ok", "libraries", libraries),
        _device(),
        *(Finding("problem", "plug-in", f"{b.provider} is disabled: {b.reason}") for b in plugins.broken),
        *(Finding("note", "plug-in", f"{r.provider} {r.sentence}") for r in plugins.remarks),
    ]
    for entry in plugins.entries():
        try:
            entry.load()
        except AglBenchError as error:
            findings.append(Finding("problem", "plug-in", str(error)))
    counts = [f"{len(plugins.names(kind))} {kind}s" for kind in ("selector", "backbone", "dataset")]
    findings.append(Finding("ok", "plug-ins", ", ".join(counts)))
    findings.append(
        Finding(
            "ok" if root.is_dir() else "note",
            "data folder",
            f"{root}" + ("" if root.is_dir() else " does not exist (AGL_BENCH_DATA)"),
        )
    )
    for name in plugins.names("dataset"):
        findings.append(_dataset(plugins, name, root))
    try:
        if work.exists():
            store = CellStore(work)
            findings.append(Finding("ok", "work folder", f"{work}, {sum(1 for _ in store)} finished cells"))
        else:
            findings.append(Finding("ok", "work folder", f"{work} will be created by the first run"))
    except AglBenchError as error:
        findings.append(Finding("problem", "work folder", str(error)))
    here = work if work.exists() else Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    findings.append(Finding("ok" if free > 1 else "problem", "free disk", f"{free:.0f} GiB"))
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    findings.append(
        Finding(
            "ok", "tracking", masked(uri) if uri else f"sqlite in {work}/mlflow.db (MLFLOW_TRACKING_URI is not set)"
        )
    )
    return findings


def _device() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("ok", "device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return Finding("note", "device", f"no CUDA device; {torch.get_num_threads()} CPU threads (use --backbone tiny)")


def _dataset(plugins: Plugins, name: str, root: Path) -> Finding:
    entry = plugins.entry(name, "dataset")
    try:
        part = Part(name, resolve(name, tunables(entry.load()), {}), entry.provider, "")
        sections = make_dataset(plugins, part).sections(root)
    except MissingData as error:
        return Finding("note", f"dataset {name}", str(error))
    except AglBenchError as error:
        return Finding("problem", f"dataset {name}", str(error))
    return Finding("ok", f"dataset {name}", f"{len(sections)} sections: {', '.join(sections)}")
