"""It lists a file that is not there."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class AbsentFile(Synthetic):
    """It lists a file that is not there."""

    def files(self, root, name):
        return [root / "absent.h5ad"]


@hookimpl
def register_datasets():
    return {"broken": AbsentFile}
