"""The three hooks. Each returns {name: class}.

A value may also be the text "package.module:Class"; then the module is imported when the name is used and not before,
so that `agl-bench list` stays fast. Names are unique across the three registries.
"""

from __future__ import annotations

import pluggy

PROJECT = "agl_bench"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_selectors() -> dict[str, type | str]:  # type: ignore[empty-body]
    """Auxiliary selectors: name -> subclass of `agl_bench.Selector`."""


@hookspec
def register_backbones() -> dict[str, type | str]:  # type: ignore[empty-body]
    """Backbones: name -> subclass of `agl_bench.Backbone`."""


@hookspec
def register_datasets() -> dict[str, type | str]:  # type: ignore[empty-body]
    """Datasets: name -> subclass of `agl_bench.Dataset`."""
