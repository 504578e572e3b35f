"""What counts as the same code. Each case is a change to one of three small modules, by text."""

import ast
import textwrap

import pytest

from agl_bench.registry.meaning import code_digest

MODULES = {
    "agl_bench.maths": '''
        """Mathematics."""
        from __future__ import annotations

        import numpy as np
        from scipy.stats import rankdata

        __all__ = ["score"]
        HALF = 0.5  # of all

        def score(values: np.ndarray, power: int = 2) -> float:
            """A score."""
            total = 0.0
            for one in values:  # each
                total += one**power
            if total < 0:
                raise ValueError(f"{total} is negative")
            return _scaled(total, rankdata(values), [np.linalg.norm(v) for v in values])

        def _scaled(total, ranks, norms):
            return total * HALF

        def _unscaled(total, ranks, norms):
            return total / HALF
        ''',
    "agl_bench.data": '''
        from collections.abc import Sequence
        from dataclasses import dataclass
        from typing import TYPE_CHECKING

        from agl_bench import maths
        from agl_bench.elsewhere import reader
        from agl_bench.maths import score as scored

        if TYPE_CHECKING:
            from agl_bench.other import Other

        def _helper(x):
            return x + 1

        @dataclass(frozen=True)
        class Fold:
            size: int
            names: Sequence[str] = ()

            def value(self, rows: Other, *, deep=False):
                """Its value."""
                picked = [_helper(row) for row in rows if deep]
                def inner(a, b=3):
                    sum_ = a + b
                    return sum_
                kept: list[int] = [inner(p) for p in picked]
                assert kept, "none"
                return scored(kept), maths.HALF, reader(self.size)

            @staticmethod
            def first(): return 1
        ''',
    "agl_bench.training": """
        import torch
        from agl_bench.data import Fold

        def _helper(x):
            return x - 1

        def train(fold: Fold):
            import torch.nn.functional as F
            try:
                with torch.no_grad():
                    loss = F.relu(_helper(fold.value(3)))
            except ValueError as error:
                loss = str(error)
            return loss, train
        """,
}


@pytest.fixture
def digest(tmp_path):
    """Digest of the three modules after changes; a change is (module, old text, new text)."""

    def digest(*changes, more=(), of=code_digest, roots=()):
        texts = {name: textwrap.dedent(text) for name, text in [*MODULES.items(), *more]}
        for module, old, new in changes:
            assert old in texts[f"agl_bench.{module}"], old
            texts[f"agl_bench.{module}"] = texts[f"agl_bench.{module}"].replace(old, new)
        files = {}
        for name, text in texts.items():
            ast.parse(text)
            files[name] = tmp_path / f"{name}.py"
            files[name].write_text(text)
        return code_digest(files, 8, roots) if of is code_digest else of(files)

    return digest


SAME = {
    "a docstring": [("maths", '"""A score."""', '"""Another text."""')],
    "no docstring": [("data", '"""Its value."""', "")],
    "docstring of a module": [("maths", '"""Mathematics."""', "")],
    "a comment": [("maths", "# each", "# one after the other")],
    "annotations": [("maths", "values: np.ndarray, power: int = 2) -> float", "values, power: float = 2)")],
    "annotation of a local": [("data", "kept: list[int] =", "kept =")],
    "a message": [("maths", 'f"{total} is negative"', '"it is negative: " + str(total)')],
    "no message": [("maths", 'raise ValueError(f"{total} is negative")', "raise ValueError")],
    "an assertion's message": [("data", ', "none"', "")],
    "a local": [("maths", "total", "whole"), ("maths", "def _scaled(whole,", "def _scaled(total,"),
                ("maths", "return whole * HALF", "return total * HALF"),
                ("maths", "def _unscaled(whole,", "def _unscaled(total,"),
                ("maths", "return whole / HALF", "return total / HALF")],
    "a loop's name": [("maths", "for one in", "for item in"), ("maths", "+= one**", "+= item**")],
    "a comprehension's name": [("maths", "np.linalg.norm(v) for v in", "np.linalg.norm(w) for w in")],
    "a nested function": [("data", "inner", "within")],
    "a local of a nested function": [("data", "sum_", "result")],
    "the name of an error": [("training", "as error", "as e"), ("training", "str(error)", "str(e)")],
    "__all__": [("maths", '__all__ = ["score"]', "")],
    "no imports for types": [("data", "if TYPE_CHECKING:\n    from agl_bench.other import Other\n", ""),
                             ("data", "rows: Other", "rows")],
    "alias of a library": [("maths", "import numpy as np", "import numpy"), ("maths", "np.", "numpy.")],
    "a name of a library": [("maths", "import numpy as np", "import numpy as np\nfrom numpy.linalg import norm as size"),
                            ("maths", "np.linalg.norm(v)", "size(v)")],
    "an import moved into the function": [
        ("maths", "from scipy.stats import rankdata", ""),
        ("maths", "total = 0.0", "from scipy.stats import rankdata\n    total = 0.0")],
    "an import moved out of the function": [
        ("training", "    import torch.nn.functional as F\n", ""),
        ("training", "import torch\n", "import torch\nfrom torch.nn import functional as F\n")],
    "alias of an own import": [("data", "score as scored", "score"), ("data", "scored(", "score(")],
    "an own import by its module": [("data", "from agl_bench.maths import score as scored\n", ""),
                                    ("data", "scored(", "maths.score(")],
    "an unused own import": [("training", "import torch\n", "import torch\nfrom agl_bench.maths import HALF\n")],
    "place of what is outside": [("data", "agl_bench.elsewhere", "agl_bench.somewhere")],
    "a function with its callers": [("maths", "_scaled(", "_weighted("), ("maths", "_un_weighted(", "_unscaled(")
                                    ][:1],
    "a public function with its callers": [("maths", "def score(", "def rating("), ("maths", '"score"', '"rating"'),
                                           ("data", "import score as", "import rating as")],
    "a class with its users": [("data", "class Fold:", "class Part:"), ("training", "Fold", "Part")],
    "a constant with its users": [("maths", "HALF", "SHARE"), ("data", "HALF", "SHARE")],
    "order in a module": [("maths", "def _unscaled(total, ranks, norms):\n    return total / HALF\n", ""),
                          ("maths", "def score(", "def _unscaled(total, ranks, norms):\n    return total / HALF\n\n"
                           "def score(")],
    "a function moved to another module": [
        ("maths", "def _scaled(total, ranks, norms):\n    return total * HALF\n", "from agl_bench.training import _scaled"),
        ("training", "import torch\n", "import torch\nfrom agl_bench.maths import HALF\n"
         "def _scaled(total, ranks, norms):\n    return total * HALF\n")],
    "an import by way of another module": [
        ("training", "from agl_bench.data import Fold", "from agl_bench.data import Fold, scored as s"),
        ("data", "def _helper", "from agl_bench.maths import HALF\ndef _helper"),
    ],
}  # fmt: skip

OTHER = {
    "a number": [("maths", "HALF = 0.5", "HALF = 0.25")],
    "a type of number": [("data", "x + 1", "x + 1.0")],
    "a default": [("maths", "power: int = 2", "power: int = 3")],
    "an operator": [("maths", "one**power", "one*power")],
    "a comparison": [("maths", "total < 0", "total <= 0")],
    "a called function": [("maths", "return _scaled(", "return _unscaled(")],
    "a called function of another module": [("data", "import score as", "import _scaled as")],
    "a constant of another module": [("data", "maths.HALF", "maths.score")],
    "a decorator": [("data", "@dataclass(frozen=True)", "@dataclass")],
    "no decorator": [("data", "@staticmethod", "")],
    "a library": [("maths", "from scipy.stats import rankdata", "from scipy.special import rankdata")],
    "a library behind the same name": [("maths", "import numpy as np", "import torch as np")],
    "a library imported for what it does": [("maths", "import numpy as np", "import numpy as np\nimport hdf5plugin")],
    "a library in a function": [("training", "torch.nn.functional as F", "torch.special as F")],
    "an annotation of a class": [("data", "size: int", "size: float")],
    "a field": [("data", "names: Sequence[str] = ()", "")],
    "a parameter": [("maths", "_scaled(total, ranks, norms):\n    return total", "_scaled(whole, ranks, norms):\n    return whole")],
    "kind of a parameter": [("data", "rows: Other, *, deep", "rows: Other, deep")],
    "a method": [("data", "def first", "def second")],
    "an attribute": [("data", "self.size", "self.names")],
    "a kind of exception": [("maths", "raise ValueError", "raise TypeError")],
    "a caught exception": [("training", "except ValueError", "except TypeError")],
    "which local": [("data", "sum_ = a + b", "sum_ = a + a")],
    "a local that was a global": [("data", "row in rows", "_helper in rows"), ("data", "_helper(row)", "_helper(_helper)")],
    "order of statements": [("training", "import torch.nn.functional as F\n    try", "import torch.nn.functional as F\n    fold = 1\n    try")],
    "a text": [("training", "loss = str(error)", 'loss = "x"')],
    "unpacking": [("maths", "total * HALF", "{**total}"), ],
    "helpers of one name, swapped": [("data", "x + 1", "x ? 1"), ("training", "x - 1", "x + 1"), ("data", "x ? 1", "x - 1")],
    "a default of a nested function": [("data", "b=3", "b=4")],
    "a file that does not parse": [],
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_same(case, digest):
    assert digest(*SAME[case]) == digest()


@pytest.mark.parametrize("case", [case for case in OTHER if OTHER[case]])
def test_other(case, digest):
    assert digest(*OTHER[case]) != digest()
