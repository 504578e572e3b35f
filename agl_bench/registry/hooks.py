"""The three hooks. Each returns {name: class}.

A value may also be the text "package.module:Class"; then the module is imported when the name is used and not before,
so that `agl-bench list` stays fast. Names are unique across the three registries.

A module that registers may say which version of the interface it is written for, as a text in quotes at its top level:

    agl_bench_api = "1.0"

The same version or a lower minor one is fine, one minor version ahead of `agl_bench.API_VERSION` works with a warning,
anything else is disabled. It is read before the import, which for another interface is likely to fail.
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
