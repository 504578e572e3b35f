"""Selectors that would change the results of those beside them: `check` names each by one rule and one sentence."""

import textwrap

import pytest

from agl_bench.registry.plugins import Plugins
from agl_bench.testing import BackboneContract, SelectorContract

VIEW, PROCESS, PURE = "leaves_the_view_as_it_is", "leaves_the_process_as_it_is", "forward_is_pure"
GLOBAL = "randomness_is_not_global"
HEAD = """
    import gc, os, random, signal, sys, warnings
    import numpy as np
    import torch
    from agl_bench import Backbone, Selector, hookimpl

    class Harmful(Selector):
        '''It means no harm.'''

        reference = "a broken plug-in"

        def __init__(self, view):
            super().__init__(view)
            {building}
            self.view = view

        def forward(self, losses, step):
            {stepping}
            return losses.mean()

    @hookimpl
    def register_selectors():
        return {{"harmful": Harmful}}
"""
BUILDING = {  # what is done in the constructor -> rule, what its sentence says
    "use = view.genes.primary; use |= view.genes.rank < 10": (VIEW, "view.genes.primary was changed in place"),
    "view.genes.rank.clamp_(min=0)": (VIEW, "view.genes.rank was changed in place"),
    "view.genes.score.nan_to_num_().neg_()": (VIEW, "view.genes.score was changed in place"),
    "here = view.position; here -= here.mean(0)": (VIEW, "view.position was changed in place"),
    "view.section.add_(1)": (VIEW, "view.section was changed in place"),
    "view.expression.data.sub_(1)": (VIEW, "view.expression was changed in place"),
    "view.expression.numpy()[:] = 0": (VIEW, "view.expression was changed in place"),
    "view.expression.detach().T[0].zero_()": (VIEW, "view.expression was changed in place"),
    "torch.set_default_dtype(torch.float64)": (PROCESS, "`__init__` changes torch's default type"),
    "torch.set_default_device('meta')": (PROCESS, "`__init__` changes torch's default device"),
    "torch.set_float32_matmul_precision('medium')": (PROCESS, "torch's precision of matrix products"),
    "torch.use_deterministic_algorithms(True)": (PROCESS, "torch's deterministic algorithms"),
    "torch.set_num_threads(torch.get_num_threads() + 1)": (PROCESS, "torch's number of threads"),
    "torch.set_grad_enabled(False)": (PROCESS, "`__init__` changes torch's gradient mode"),
    "self.mode = torch.inference_mode(); self.mode.__enter__()": (PROCESS, "torch's inference mode"),
    "torch.nn.modules.module.register_module_forward_hook(print)": (PROCESS, "torch's forward hooks on all modules"),
    "torch.nn.Linear.forward = lambda layer, x: x": (PROCESS, "`__init__` changes torch.nn.Linear.forward"),
    "torch.optim.Adam.step = lambda *_: None": (PROCESS, "`__init__` changes torch.optim.Adam.step"),
    "torch.Tensor.mean = torch.Tensor.sum": (PROCESS, "`__init__` changes torch.Tensor.mean"),
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": (PROCESS, "`__init__` changes the handler of SIGTERM"),
    "sys.stdout = sys.stderr": (PROCESS, "`__init__` changes sys.stdout"),
    "self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()": (PROCESS, "torch's autocast"),
    "warnings.simplefilter('error')": (PROCESS, "`__init__` changes the warnings that are errors"),
    "os.chdir('/')": (PROCESS, "`__init__` changes the working directory"),
    "torch.manual_seed(0)": (GLOBAL, "generator of torch in `__init__`"),
    "np.random.seed(0)": (GLOBAL, "generator of numpy in `__init__`"),
    "random.seed(0)": (GLOBAL, "generator of Python's random in `__init__`"),
}
STEPPING = {  # likewise in `forward`
    "torch.set_grad_enabled(False)": (PROCESS, "`forward` changes torch's gradient mode"),
    "torch.use_deterministic_algorithms(True)": (PROCESS, "`forward` changes torch's deterministic algorithms"),
    "gc.disable()": (PROCESS, "`forward` changes the garbage collector"),
    "os.environ['OMP_NUM_THREADS'] = '77'": (PROCESS, "`forward` changes the environment's OMP_NUM_THREADS"),
    "self.view.expression.data.zero_()": (VIEW, "view.expression was changed in place"),
    "self.genes.primary[:3] = True": (VIEW, "view.genes.primary was changed in place"),
    "losses.data.mul_(2)": (PURE, "it changes the losses in place"),
    "step.target.zero_()": (PURE, "it changes step.target in place"),
    "step.row.add_(1)": (PURE, "it changes step.row in place"),
    "step.prediction.data.zero_()": (PURE, "it changes step.prediction in place"),
}
CASES = [(deed, "pass", *told) for deed, told in BUILDING.items()]
CASES += [("pass", deed, *told) for deed, told in STEPPING.items()]


@pytest.mark.parametrize(("building", "stepping", "rule", "sentence"), CASES)
def test_selectors(building, stepping, rule, sentence, tmp_path):
    path = tmp_path / "harmful.py"
    path.write_text(textwrap.dedent(HEAD).format(building=building, stepping=stepping))
    plugins = Plugins.discover([path], strict=True)
    contract = SelectorContract.of(plugins.entry("harmful").load())
    looked_at = {VIEW, PROCESS, PURE, GLOBAL, "builds", "every_primary_gene_counts", "same_seed_same_result"}
    found = {v.name: v.reason for v in contract.verdicts(looked_at) if v.outcome == "broken"}
    assert set(found) == {rule}
    assert sentence in found[rule] and "\n" not in found[rule]


SEEING = """
    import torch
    from agl_bench import Backbone, hookimpl

    class Harmful(Backbone):
        '''It means no harm.'''

        reference, width, patch_px = "a broken plug-in", 4, 16

        def __init__(self, example):
            super().__init__(example)
            {building}
            self.mix = torch.nn.Linear(3, 4)

        def forward(self, spots):
            {stepping}
            return self.mix(spots.patches.mean((2, 3)))

    @hookimpl
    def register_backbones():
        return {{"harmful": Harmful}}
"""


@pytest.mark.parametrize(
    ("building", "stepping", "rule", "sentence"),
    [
        ("torch.set_grad_enabled(False)", "pass", PROCESS, "`__init__` changes torch's gradient mode"),
        ("pass", "torch.set_flush_denormal(True)", PROCESS, "`forward` changes torch's flushing of denormal"),
        ("example.patches.sub_(1)", "pass", "leaves_the_spots_as_they_are", "it changes spots.patches in place"),
        ("pass", "spots.section.add_(1)", "leaves_the_spots_as_they_are", "it changes spots.section in place"),
        ("pass", "spots.position.data.zero_()", "leaves_the_spots_as_they_are", "it changes spots.position in place"),
    ],
)
def test_backbones(building, stepping, rule, sentence, tmp_path):
    path = tmp_path / "harmful.py"
    path.write_text(textwrap.dedent(SEEING).format(building=building, stepping=stepping))
    contract = BackboneContract.of(Plugins.discover([path], strict=True).entry("harmful").load())
    found = {v.name: v.reason for v in contract.verdicts() if v.outcome == "broken"}
    assert set(found) == {rule}
    assert sentence in found[rule]
