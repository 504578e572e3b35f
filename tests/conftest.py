"""Set up before any test module is imported."""

import os

pytest_plugins = ["pytester"]  # tests of the contracts run pytest on small files

# Several workers of pytest-xdist share the cores: each takes its part, or all of them wait for each other.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
