"""It opens what it is shown."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class OpensToRecognise(Synthetic):
    """It opens what it is shown."""

    @classmethod
    def recognises(cls, path):
        return path.is_file() and path.read_bytes().startswith(b"CFG")


@hookimpl
def register_datasets():
    return {"broken": OpensToRecognise}
