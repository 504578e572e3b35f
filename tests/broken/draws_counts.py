"""Its counts hang on numpy's global generator."""

import numpy as np

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class DrawsCounts(Synthetic):
    """Its counts hang on numpy's global generator."""

    def read(self, root, name):
        np.random.rand()  # noqa: NPY002
        return super().read(root, name)


@hookimpl
def register_datasets():
    return {"broken": DrawsCounts}
