"""What plug-ins do to the process in a cell: they fail by a sentence, and those beside them have the same results."""

import textwrap

import pandas as pd
import pytest
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.run import preflight
from agl_bench.errors import BadPlugin

HEAD = """
    import gc, os, random, signal, sys, warnings
    import numpy as np
    import torch
    from agl_bench import Backbone, Selector, hookimpl

    class Base(Selector):
        '''Changes the process.'''
        reference = "test"

        def __init__(self, view):
            super().__init__(view)
            self.build()

        def build(self):
            pass

        def step(self, losses):
            pass

        def forward(self, losses, step):
            self.step(losses)
            return losses.mean()

    class Seeing(Backbone):
        '''Changes the process.'''
        width, patch_px = 4, 16

        def __init__(self, example):
            super().__init__(example)
            torch.set_grad_enabled(False)
            self.mix = torch.nn.Linear(3, 4)

        def forward(self, spots):
            return self.mix(spots.patches.mean((2, 3)))

    class Later(Seeing):
        '''Changes the process in its forward.'''

        def __init__(self, example):
            Backbone.__init__(self, example)
            self.mix = torch.nn.Linear(3, 4)

        def forward(self, spots):
            random.seed(0)
            return super().forward(spots)
"""
DEEDS = {  # (method, what is done) -> what the sentence names
    ("build(self)", "torch.set_float32_matmul_precision('medium')"): "torch's precision of matrix products",
    ("build(self)", "torch.nn.Linear.forward = lambda layer, x: x"): "torch.nn.Linear.forward",
    ("build(self)", "torch.set_default_dtype(torch.float64); 1 / 0"): "torch's default type",
    ("build(self)", "random.seed(0); np.random.seed(0)"): "Python's random state, numpy's random state",
    ("step(self, losses)", "torch.set_grad_enabled(False)"): "torch's gradient mode",
    ("step(self, losses)", "torch.use_deterministic_algorithms(False)"): "torch's deterministic algorithms",
    ("step(self, losses)", "torch.optim.Adam.step = lambda *_: None"): "torch.optim.Adam.step",
    ("step(self, losses)", "self.mode = torch.inference_mode(); self.mode.__enter__()"): "torch's inference mode",
    ("step(self, losses)", "os.chdir('/'); gc.disable()"): "the garbage collector, the working directory",
}

LOUD = """
class Loud(Base):
    def step(self, losses):
        print('hello')
        warnings.simplefilter('always')
"""


@pytest.fixture
def plugin(tmp_path):
    text, names = textwrap.dedent(HEAD), [f"bad{n}" for n in range(len(DEEDS))]
    for name, (method, deed) in zip(names, DEEDS, strict=True):
        text += f"\nclass {name.title()}(Base):\n    def {method}:\n        {deed}\n"
    text += LOUD
    table = ", ".join(f"'{name}': {name.title()}" for name in [*names, "loud"])
    text += f"\n@hookimpl\ndef register_selectors():\n    return {{{table}}}\n"
    text += "\n@hookimpl\ndef register_backbones():\n    return {'seeing': Seeing, 'later': Later}\n"
    path = tmp_path / "changing.py"
    path.write_text(text)
    return path, names


def test_a_change_fails_its_own_cell_and_harms_nobody(grid, plugin):
    path, names = plugin
    cells, bench = grid("pgl", *names, files=[path])
    cells = {spec.selector.name: (spec, plan) for spec, plan in cells if spec.fold == "D1"}
    *_, alone = bench.train(*cells["pgl"])
    for name, named in zip(names, DEEDS.values(), strict=True):
        with pytest.raises(BadPlugin) as caught:
            list(bench.train(*cells[name]))
        assert str(caught.value) == (
            f"selector '{name}' changes {named}, which affects everything that runs afterwards; leave it unchanged"
        )
        *_, beside = bench.train(*cells["pgl"])
        pd.testing.assert_frame_equal(beside.genes, alone.genes, check_exact=True)


def test_what_the_compiler_changes_is_no_fault_of_a_plugin(grid, monkeypatch):
    def compiled(model):  # as torch's does, beside much else
        monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *_: None)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp")
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    cells, bench = grid("pgl", more=["protocol.compile=true"])
    *_, result = bench.train(*cells[0])
    assert result.scores


def test_what_is_built_before_a_run_leaves_the_process_as_it_is(grid, plugin, tmp_path):
    path, names = plugin
    cells, bench = grid(*names[:4], files=[path])
    preflight(cells, bench, CellStore(tmp_path / "work"))
    assert torch.get_default_dtype() == torch.float32 and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("backbone", "named"), [("seeing", "torch's gradient mode"), ("later", "Python's random state")]
)
def test_a_backbone_is_named_alone(grid, plugin, backbone, named):
    cells, bench = grid("pgl", files=[plugin[0]], backbone=backbone)
    with pytest.raises(BadPlugin, match=f"^backbone '{backbone}' changes {named}, which affects"):
        list(bench.train(*cells[0]))
    assert torch.is_grad_enabled()


def test_what_is_harmless_is_a_remark(grid, plugin, capsys):
    cells, bench = grid("loud", files=[plugin[0]])
    said = [item for item in bench.train(*cells[0]) if isinstance(item, str)]
    assert said == [
        "selector 'loud' prints to standard output ('hello'); the text was sent to standard error",
        "selector 'loud' changes the filters of warnings; the change was undone",
    ]
    out, err = capsys.readouterr()
    assert "hello" in err and out == ""


READING = """
    import os
    import torch
    from agl_bench import hookimpl
    from agl_bench_plugins.datasets.synthetic import Synthetic

    class Reading(Synthetic):
        '''Changes the process when it is asked for its sections.'''

        def sections(self, root):
            print("reading")
            torch.set_default_dtype(torch.float64)
            os.umask(0o777)
            return super().sections(root)

    @hookimpl
    def register_datasets():
        return {"reading": Reading}
"""


def test_a_dataset_is_named_too(grid, tmp_path, capsys):
    path = tmp_path / "reading.py"
    path.write_text(textwrap.dedent(READING))
    with pytest.raises(
        BadPlugin, match=r"^dataset 'reading' of reading.py changes torch's default type, the umask, which"
    ):
        grid("pgl", files=[path], datasets=["reading"])
    assert torch.get_default_dtype() == torch.float32
    out, err = capsys.readouterr()
    assert (out, err) == ("", "reading\n")
