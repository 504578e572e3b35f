"""Its counts are no counts."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class HalvedCounts(Synthetic):
    """Its counts are no counts."""

    def read(self, root, name):
        section = super().read(root, name)
        section.counts.X = section.counts.X * 0.5
        return section


@hookimpl
def register_datasets():
    return {"broken": HalvedCounts}
