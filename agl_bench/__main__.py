"""`python -m agl_bench` is `agl-bench`."""

from agl_bench.cli import main

main()
