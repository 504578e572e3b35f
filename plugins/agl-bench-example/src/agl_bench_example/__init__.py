"""A third-party plug-in for agl-bench."""

from agl_bench import hookimpl

agl_bench_api = "1.0"  # the interface that it is written for


@hookimpl
def register_selectors() -> dict[str, str]:
    """Name -> "module:Class"; the module is imported when the name is used."""
    return {"correlated_k": "agl_bench_example.correlated_k:CorrelatedK"}
