"""A section that it has not is a KeyError."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class UnknownSection(Synthetic):
    """A section that it has not is a KeyError."""

    def read(self, root, name):
        return super().read(root, {"S1": "S1", "S2": "S2"}[name])


@hookimpl
def register_datasets():
    return {"broken": UnknownSection}
