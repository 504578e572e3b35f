"""The selector keeps every rule of its door."""

from typing import ClassVar

from agl_bench.testing import SelectorContract
from agl_bench_example.correlated_k import CorrelatedK


class TestCorrelatedK(SelectorContract):
    """All rules, one test each."""

    selector = CorrelatedK
    settings: ClassVar = {"k": 10}
