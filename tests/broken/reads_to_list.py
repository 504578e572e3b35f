"""It reads every section in order to name it."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class ReadsToList(Synthetic):
    """It reads every section in order to name it."""

    def sections(self, root):
        return {name: self.read(root, name).donor for name in ("S1", "S2")}

    def read(self, root, name):
        return Synthetic(sections=2, spots=20, patch_px=16).read(root, name)


@hookimpl
def register_datasets():
    return {"broken": ReadsToList}
