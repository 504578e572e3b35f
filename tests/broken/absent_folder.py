"""It does not look whether its folder is there."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class AbsentFolder(Synthetic):
    """It does not look whether its folder is there."""

    def sections(self, root):
        listed = sorted(p.name for p in (root / "mine").iterdir())
        return dict.fromkeys(listed, "D1")


@hookimpl
def register_datasets():
    return {"broken": AbsentFolder}
