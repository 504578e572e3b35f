"""What counts as the same code. Each case is a change to one of three small modules, by text."""

import ast
import textwrap

import pytest

from agl_bench.registry import meaning
from agl_bench.registry.meaning import code_digest, file_meanings

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


ELSEWHERE = """
def _scaled(total, ranks, norms):
    return total * HALF
"""
AGAIN = """
def _unscaled(total, ranks, norms):
    return total / HALF
"""
LOCALLY = "total = 0.0\n    from scipy.stats import rankdata"

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
    "a local": [("data", "picked", "chosen")],
    "a loop's name": [("maths", "for one in", "for item in"), ("maths", "+= one**", "+= item**")],
    "a comprehension's name": [("maths", "np.linalg.norm(v) for v in", "np.linalg.norm(w) for w in")],
    "a nested function": [("data", "inner", "within")],
    "a local of a nested function": [("data", "sum_", "result")],
    "the name of an error": [("training", "as error", "as e"), ("training", "str(error)", "str(e)")],
    "__all__": [("maths", '__all__ = ["score"]', "")],
    "no imports for types": [
        ("data", "if TYPE_CHECKING:\n    from agl_bench.other import Other\n", ""),
        ("data", "rows: Other", "rows"),
    ],
    "alias of a library": [("maths", "import numpy as np", "import numpy"), ("maths", "np.", "numpy.")],
    "a name of a library": [
        ("maths", "import numpy as np", "import numpy as np\nfrom numpy.linalg import norm as size"),
        ("maths", "np.linalg.norm(v)", "size(v)"),
    ],
    "an import moved into the function": [
        ("maths", "from scipy.stats import rankdata", ""),
        ("maths", "total = 0.0", LOCALLY),
    ],
    "an import moved out of the function": [
        ("training", "    import torch.nn.functional as F\n", ""),
        ("training", "import torch\n", "import torch\nfrom torch.nn import functional as F\n"),
    ],
    "alias of an own import": [("data", "score as scored", "score"), ("data", "scored(", "score(")],
    "an own import by its module": [
        ("data", "from agl_bench.maths import score as scored\n", ""),
        ("data", "scored(", "maths.score("),
    ],
    "an unused own import": [("training", "import torch\n", "import torch\nfrom agl_bench.maths import HALF\n")],
    "an unused import of Python's own": [("training", "import torch\n", "import json\nimport torch\n")],
    "place of what is outside": [("data", "agl_bench.elsewhere", "agl_bench.somewhere")],
    "a function with its callers": [("data", "_helper", "_further")],
    "a public function with its callers": [
        ("maths", "score", "rating"),
        ("data", "import score as", "import rating as"),
    ],
    "a constant with its users": [("maths", "HALF", "SHARE"), ("data", "HALF", "SHARE")],
    "order in a module": [("maths", AGAIN, ""), ("maths", "def score(", AGAIN + "\ndef score(")],
    "a function moved to another module": [
        ("maths", ELSEWHERE, "from agl_bench.training import _scaled\n"),
        ("training", "import torch\n", "import torch\nfrom agl_bench.maths import HALF\n" + ELSEWHERE),
    ],
    "an import by way of another module": [
        ("training", "from agl_bench.data import Fold", "from agl_bench.maths import Fold"),
        ("maths", "import numpy as np", "import numpy as np\nfrom agl_bench.data import Fold"),
    ],
}

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
    "a parameter": [("training", "def _helper(x):\n    return x", "def _helper(y):\n    return y")],
    "kind of a parameter": [("data", "rows: Other, *, deep", "rows: Other, deep")],
    "a method": [("data", "def first", "def second")],
    "an attribute": [("data", "self.size", "self.names")],
    "what is outside": [("data", "import reader", "import writer"), ("data", "reader(", "writer(")],
    "a kind of exception": [("maths", "raise ValueError", "raise TypeError")],
    "a caught exception": [("training", "except ValueError", "except TypeError")],
    "which local": [("data", "sum_ = a + b", "sum_ = a + a")],
    "a local in place of a global": [("data", "_helper(row)", "row(row)")],
    "a statement more": [("training", "    try", "    fold = 1\n    try")],
    "order of statements": [
        ("maths", "        total += one**power\n    if total < 0", "        total += one**power\n        if total < 0"),
        ("maths", '        raise ValueError(f"{total} is', '            raise ValueError(f"{total} is'),
    ],
    "a text": [("training", "loss = str(error)", 'loss = "x"')],
    "helpers of one name, swapped": [
        ("data", "x + 1", "x ? 1"),
        ("training", "x - 1", "x + 1"),
        ("data", "x ? 1", "x - 1"),
    ],
    "names of two helpers, swapped": [
        ("maths", "def _scaled", "def __"),
        ("maths", "def _unscaled", "def _scaled"),
        ("maths", "def __", "def _unscaled"),
    ],
    "a default of a nested function": [("data", "b=3", "b=4")],
    "the name of a class": [("data", "class Fold:", "class Part:"), ("training", "Fold", "Part")],
    "what an exception carries": [("maths", 'ValueError(f"{total} is negative")', "ValueError(power)")],
    "a keyword of an exception": [("maths", 'f"{total} is negative"', 'kind="negative"')],
}

# Definitions that say the same of themselves, and which of them is meant.
TWINS = {
    "events": ("class A: pass\nclass B: pass", "isinstance(x, A)", "isinstance(x, B)"),
    "exceptions": ("class A(Exception): pass\nclass B(Exception): pass", "raise_(A)", "raise_(B)"),
    "sentinels": ("A = object()\nB = object()", "x is A", "x is B"),
    "tables": ("A = {}\nB = {}", "A.update(x)", "B.update(x)"),
    "caches": ("@cache\ndef A(): return []\n@cache\ndef B(): return []", "A().append(x)", "B().append(x)"),
    "deep ones": (
        "\n".join(f"def {a}{n}(): return {a}{n - 1}()" for a in "AB" for n in range(6, 0, -1))
        + "\ndef A0(): return 1\ndef B0(): return 2",
        "{'a': A6, 'b': B6}",
        "{'a': B6, 'b': A6}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWINS)
def test_which_of_two_is_meant(case, digest):
    definitions, one, other = TWINS[case]
    texts = (f"from functools import cache\n{definitions}\ndef use(x): return {said}\n" for said in (one, other))
    assert len({digest(more=[("agl_bench.twins", text)]) for text in texts}) == 2


@pytest.mark.parametrize("case", SAME)
def test_same(case, digest):
    assert digest(*SAME[case]) == digest()


@pytest.mark.parametrize("case", OTHER)
def test_other(case, digest):
    assert digest(*OTHER[case]) != digest()


ALIKE = {  # two texts of one module that look alike and do different things
    "a star and a key": ("d = {**x}", "d = {None: x}"),
    "a constant bound twice": ("X = 1\nX = 2\nY = X", "X = 2\nX = 1\nY = X"),
    "what happens when": ("X = [1]\nX.pop()\nY = len(X)", "X = [1]\nY = len(X)\nX.pop()"),
    "a global in one scope and a local in another": (
        "A = 1\nB = 2\ndef f():\n    a = [A for B in (3,)]\n    return B",
        "A = 1\nB = 2\ndef f():\n    a = [B for A in (3,)]\n    return A",
    ),
    "a global variable": (
        "A = 1\nB = 2\ndef f():\n    global A\n    A = 3",
        "A = 1\nB = 2\ndef f():\n    global B\n    B = 3",
    ),
    "a local that others see": (
        "def f():\n    a = 1\n    def g():\n        nonlocal a\n        a = 2\n    g()\n    return a",
        "def f():\n    a = 1\n    def g():\n        a = 2\n    g()\n    return a",
    ),
    "names of locals that are looked at": (
        "def f():\n    a = 1\n    return locals()", "def f():\n    b = 1\n    return locals()"
    ),
    "a name that is looked up": ("def f(): return 1\ndef g(): return 2\nh = globals()['f']()",
                                 "def g(): return 1\ndef f(): return 2\nh = globals()['f']()"),
    "attributes of what is outside": (
        "from agl_bench import A, B\nx = A.make()", "from agl_bench import A, B\nx = B.make()"
    ),
    "a name of a class and of its module": ("a = 1\nb = 2\nclass C:\n    a = a", "b = 1\na = 2\nclass C:\n    a = a"),
    "a status": ("def f(): raise SystemExit(1)", "def f(): raise SystemExit(2)"),
    "a flag of an exception": ("def f(): raise Bad('x', final=True)", "def f(): raise Bad('x', final=False)"),
    "an import that depends": (
        "try:\n    import fast as m\nexcept ImportError:\n    import slow as m\nx = m.f()",
        "try:\n    import slow as m\nexcept ImportError:\n    import fast as m\nx = m.f()",
    ),
    "types that decide": ("@f.register\ndef _(x: int): pass", "@f.register\ndef _(x: str): pass"),
    "a wrapped import": ("from a import x\nx = wrap(x)", "from b import x\nx = wrap(x)"),
    "all names of a module": ("from .sizes import *\nx = A", "from .sizes import *\nx = B"),
    "a file that cannot be read": ("def f(:", "def f(:  #"),
    "a sum without end": ("+".join(["1"] * 9000), "+".join(["1"] * 9001)),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIKE)
def test_what_looks_alike_is_told_apart(case, tmp_path):
    found = []
    for number, text in enumerate(ALIKE[case]):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        found.append(code_digest({"mine": path}, 8))
    assert found[0] != found[1]


def test_a_name_that_is_asked_for_is_what_stands_there(tmp_path):
    """A plug-in's class is found by its name: swapping the names of two classes of a file swaps what they are."""
    path, digests = tmp_path / "mine.py", []
    for text in ("class A:\n    k = 1\nclass B:\n    k = 2\n", "class B:\n    k = 1\nclass A:\n    k = 2\n"):
        path.write_text(text)
        digests.append([code_digest({"mine": path}, 8, [("mine", name)]) for name in "AB"])
    (a, b), (other_a, other_b) = digests
    assert a != b and (a, b) != (other_a, other_b)


def test_names_of_modules_do_not_count(digest, tmp_path):
    """As little as where they lie: installed, in a checkout or beside a file."""
    path, other = tmp_path / "x.py", tmp_path / "y.py"
    path.write_text("def f(): return 1\n")
    other.write_text("from {} import f\ng = f()\n".format("pack.x"))
    one = code_digest({"pack.x": path, "pack.y": other}, 8)
    other.write_text("from .w import f\ng = f()\n")
    assert code_digest({"elsewhere.deep.w": path, "elsewhere.deep.y": other}, 8) == one


def test_which_file_differs(digest):
    before = digest(of=file_meanings)
    after = digest(("data", "x + 1", "x + 2"), ("maths", "# each", "# all"), of=file_meanings)
    assert [name for name in before if before[name] != after[name]] == ["agl_bench.data"]
    moved = digest(*SAME["a function moved to another module"], of=file_meanings)
    assert [name for name in before if before[name] != moved[name]] == ["agl_bench.maths", "agl_bench.training"]


def test_older_digests_stand_for_equal_results(digest, monkeypatch):
    old, new = digest(), digest(*OTHER["an operator"])
    monkeypatch.setattr(meaning, "same_results", lambda: {new: old})
    assert digest(*OTHER["an operator"]) == old != digest(*OTHER["a number"])


def test_no_digest_stands_for_two_others():
    table = meaning.same_results()
    assert not table.keys() & set(table.values()), "the older digest is the one that results carry"


def test_digests_do_not_depend_on_the_version_of_python(digest):
    """Results are compared between machines. A change here is one of the serialisation: it retrains every cell."""
    assert digest() == "b57ab18d9fbb39ed"
