"""It reads another section than it was asked for."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class ReadsAnotherSection(Synthetic):
    """It reads another section than it was asked for."""

    def read(self, root, name):
        super().read(root, name)
        return super().read(root, "S1")


@hookimpl
def register_datasets():
    return {"broken": ReadsAnotherSection}
