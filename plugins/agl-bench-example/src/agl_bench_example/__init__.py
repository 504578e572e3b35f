"""A third-party plug-in for agl-bench."""

from agl_bench import hookimpl


@hookimpl
def register_selectors() -> dict[str, str]:
    """Name -> "module:Class"; the module is imported when the name is used."""
    return {"correlated_k": "agl_bench_example.correlated_k:CorrelatedK"}
