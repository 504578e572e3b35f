"""It downloads without asking whether it may."""

from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic


class DownloadsOffline(Synthetic):
    """It downloads without asking whether it may."""

    def fetch(self, root):
        raise ConnectionError("name or service not known")


@hookimpl
def register_datasets():
    return {"broken": DownloadsOffline}
