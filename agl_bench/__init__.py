"""agl-bench: the pluggable benchmark for auxiliary-gene selection.

The names below are the public API for plug-in authors. They load on first use, so that `import agl_bench` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from agl_bench.registry.hooks import hookimpl

if TYPE_CHECKING:
    from agl_bench.data.arrays import ArrayFit, fit_array
    from agl_bench.data.gene_files import read_gene_scores
    from agl_bench.data.h5ad_files import known_names, read_constants, read_donors, read_h5ad, read_uns
    from agl_bench.data.neighbours import neighbour_weights
    from agl_bench.data.patches import ArrayPatches, ImagePatches, read_embedding
    from agl_bench.errors import AglBenchError, BadSection, BadSpec, FetchFailed, MissingData
    from agl_bench.interfaces.backbone import Backbone
    from agl_bench.interfaces.dataset import Dataset, is_offline
    from agl_bench.interfaces.genes import GeneSplit
    from agl_bench.interfaces.selector import Selector, Step, TrainingView
    from agl_bench.interfaces.spots import PatchSource, Section, SpotBatch, Spots
    from agl_bench.interfaces.tunable import LogRange, Range
    from agl_bench.maths.hypergradient import (
        SGD,
        Adam,
        AdamW,
        FiniteDifference,
        Hypergradient,
        Implicit,
        OneStep,
        Problem,
        Rule,
        Unrolled,
    )
    from agl_bench.protocol import Protocol

__version__ = "0.1.0"
# Of the names below and of the hooks: the minor number grows with additions, the major one where a plug-in may break.
API_VERSION = "1.1"

_HOMES = {
    "ArrayFit": "data.arrays",
    "fit_array": "data.arrays",
    "read_gene_scores": "data.gene_files",
    "known_names": "data.h5ad_files",
    "read_constants": "data.h5ad_files",
    "read_donors": "data.h5ad_files",
    "read_h5ad": "data.h5ad_files",
    "read_uns": "data.h5ad_files",
    "neighbour_weights": "data.neighbours",
    "ArrayPatches": "data.patches",
    "ImagePatches": "data.patches",
    "read_embedding": "data.patches",
    "AglBenchError": "errors",
    "BadSection": "errors",
    "BadSpec": "errors",
    "FetchFailed": "errors",
    "MissingData": "errors",
    "Backbone": "interfaces.backbone",
    "Dataset": "interfaces.dataset",
    "is_offline": "interfaces.dataset",
    "GeneSplit": "interfaces.genes",
    "Selector": "interfaces.selector",
    "Step": "interfaces.selector",
    "TrainingView": "interfaces.selector",
    "PatchSource": "interfaces.spots",
    "Section": "interfaces.spots",
    "SpotBatch": "interfaces.spots",
    "Spots": "interfaces.spots",
    "LogRange": "interfaces.tunable",
    "Range": "interfaces.tunable",
    "SGD": "maths.hypergradient",
    "Adam": "maths.hypergradient",
    "AdamW": "maths.hypergradient",
    "FiniteDifference": "maths.hypergradient",
    "Hypergradient": "maths.hypergradient",
    "Implicit": "maths.hypergradient",
    "OneStep": "maths.hypergradient",
    "Problem": "maths.hypergradient",
    "Rule": "maths.hypergradient",
    "Unrolled": "maths.hypergradient",
    "Protocol": "protocol",
}

__all__ = [
    "API_VERSION",
    "SGD",
    "Adam",
    "AdamW",
    "AglBenchError",
    "ArrayFit",
    "ArrayPatches",
    "Backbone",
    "BadSection",
    "BadSpec",
    "Dataset",
    "FetchFailed",
    "FiniteDifference",
    "GeneSplit",
    "Hypergradient",
    "ImagePatches",
    "Implicit",
    "LogRange",
    "MissingData",
    "OneStep",
    "PatchSource",
    "Problem",
    "Protocol",
    "Range",
    "Rule",
    "Section",
    "Selector",
    "SpotBatch",
    "Spots",
    "Step",
    "TrainingView",
    "Unrolled",
    "__version__",
    "fit_array",
    "hookimpl",
    "is_offline",
    "known_names",
    "neighbour_weights",
    "read_constants",
    "read_donors",
    "read_embedding",
    "read_gene_scores",
    "read_h5ad",
    "read_uns",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agl_bench' has no attribute '{name}'")
    return getattr(importlib.import_module(f"agl_bench.{_HOMES[name]}"), name)
