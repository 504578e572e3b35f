"""What a selector is shown: whoever changes it fails, and those beside it have the same results bit for bit."""

import textwrap

import pandas as pd
import pytest

from agl_bench.errors import BadPlugin

# what is done -> what the sentence names
BUILDING = {
    "use = view.genes.primary; use |= view.genes.rank < 3": "genes.primary",
    "view.genes.rank.clamp_(min=0)": "genes.rank",
    "view.genes.score.nan_to_num_(7.0).neg_()": "genes.score",
    "view.position -= view.position.mean(0)": "position",
    "view.position.numpy()[:] = 0": "position",
    "view.section.sub_(7)": "section",
    "view.counts.log1p_()": "counts",
    "view.expression.sub_(1)": "expression",
    "view.expression.data.mul_(2)": "expression",
    "view.expression.numpy()[0] = 7": "expression",
    "view.expression.detach()[:, :3].zero_()": "expression",
    "view.expression.T[0].fill_(1)": "expression",
    "x = view.expression; x._base[-1].add_(1)": "expression",
    "view.expression.add_(1); 1 / 0": "expression",
    "view.genes.primary.logical_not_(); view.position.zero_()": "genes.primary, position",
}
LATER = {  # within a step: self.view is kept
    "self.view.expression.data.zero_()": "expression",
    "self.genes.primary[:3] = True": "genes.primary",
    "self.view.position.add_(1)": "position",
}
STEP = {  # what is given in a step belongs to the cell alone
    "losses.mul_(2)": "changes losses in place",
    "step.target.zero_()": "changes target in place",
    "step.row.add_(1)": "changes row in place",
    "step.prediction.data.zero_()": "",  # harms its own cell alone
}
HEAD = """
    from agl_bench import Backbone, Selector, hookimpl
    import torch

    class Base(Selector):
        '''Changes what it is shown.'''
        reference, needs_counts = "test", True

        def __init__(self, view):
            super().__init__(view)
            self.view = view
            self.build(view)

        def build(self, view):
            pass

        def step(self, losses, step):
            pass

        def forward(self, losses, step):
            self.step(losses, step)
            return losses.mean()
"""


def source():
    text = textwrap.dedent(HEAD)
    names = []
    for method, deeds in {"build(self, view)": BUILDING, "step(self, losses, step)": LATER | STEP}.items():
        for deed in deeds:
            names.append(f"bad{len(names)}")
            text += f"\nclass B{len(names)}(Base):\n    def {method}:\n        {deed}\n"
    table = ", ".join(f"'{name}': B{number}" for number, name in enumerate(names, start=1))
    return text + f"\n@hookimpl\ndef register_selectors():\n    return {{{table}}}\n", names


def test_a_change_fails_its_own_cell_and_harms_nobody(grid, tmp_path):
    text, names = source()
    path = tmp_path / "changing.py"
    path.write_text(text)
    cells, bench = grid("pgl", *names, files=[path])
    cells = {spec.selector.name: (spec, plan) for spec, plan in cells if spec.fold == "D1"}
    *_, alone = bench.train(*cells["pgl"])
    sentences = [*BUILDING.values(), *LATER.values(), *STEP.values()]
    for name, sentence in zip(names, sentences, strict=True):
        if sentence:
            with pytest.raises(BadPlugin) as caught:
                list(bench.train(*cells[name]))
            told = str(caught.value)
            if sentence.startswith("changes"):
                assert f"{sentence}; make new tensors" in told
            else:
                assert told == f"selector '{name}' has changed {sentence}, which is read-only; work on a copy"
        else:
            list(bench.train(*cells[name]))
        *_, beside = bench.train(*cells["pgl"])
        pd.testing.assert_frame_equal(beside.genes, alone.genes, check_exact=True)


@pytest.mark.parametrize("form", ["csr", "mapped"])
def test_a_form_without_a_shared_tensor_is_treated_alike(grid, tmp_path, monkeypatch, form):
    monkeypatch.setattr("agl_bench.bench.run.fit", lambda *_: (form, "device"))
    text, names = source()
    path = tmp_path / "changing.py"
    path.write_text(text)
    number = list(BUILDING).index("view.expression.data.mul_(2)")
    cells, bench = grid(names[number], files=[path])
    with pytest.raises(BadPlugin, match="has changed expression, which is read-only"):
        list(bench.train(*cells[0]))
