"""It looks for counts of its own in the data folder."""

import os
from pathlib import Path

from agl_bench import Selector, hookimpl


class ReadsTheDataFolder(Selector):
    """It looks for counts of its own in the data folder."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        self.found = sorted(Path(os.environ.get("AGL_BENCH_DATA", "data")).glob("*/counts.h5ad"))

    def forward(self, losses, step):
        return losses[self.is_primary].mean()


@hookimpl
def register_selectors():
    return {"broken": ReadsTheDataFolder}
