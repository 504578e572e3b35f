"""It writes what is there once more."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class FetchesAgain(Synthetic):
    """It writes what is there once more."""

    def files(self, root, name):
        (root / "mine.txt").touch() if not (root / "mine.txt").exists() else None
        return [root / "mine.txt"]

    def fetch(self, root):
        (root / "mine.txt").write_text("anew")


@hookimpl
def register_datasets():
    return {"broken": FetchesAgain}
