"""Set up before any test module is imported."""

import os

import pytest

pytest_plugins = ["pytester"]  # tests of the contracts run pytest on small files

# Several workers of pytest-xdist share the cores: each takes its part, or all of them wait for each other.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(autouse=True)
def same_conditions():
    """`choose_device` sets up the process for a run; each test starts as a new process does."""
    import torch  # after what is set above

    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def unsign():
    """Make the result.json of a cell, given its path, what it was before cells were signed."""
    import json

    from agl_bench.bench.finished import UNSIGNED, files_of
    from agl_bench.digests import read_signed

    def unsign(path):
        content = read_signed(path)
        digests = {name.partition(".")[0]: digest for name, (_, digest) in files_of(content).items()}
        del content["files"]
        path.write_text(json.dumps(content | {"format": UNSIGNED, "digests": digests}, indent=1))

    return unsign
