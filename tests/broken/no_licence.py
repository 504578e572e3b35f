"""It does not say under which terms it may be used."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class NoLicence(Synthetic):
    """It does not say under which terms it may be used."""

    licence = ""


@hookimpl
def register_datasets():
    return {"broken": NoLicence}
