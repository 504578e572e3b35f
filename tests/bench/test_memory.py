"""Cells on a device with too little memory: what is recorded, what a person is told, and what comes after."""

import textwrap

import pandas as pd
import pytest
import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import EpochDone, Failed, Finished, Noted, Started, Stopped, run_cells

PLUGIN = """
    import os
    import torch
    from torch import nn
    from agl_bench import Backbone, hookimpl

    class Narrow(Backbone):
        '''Runs out of memory with more spots than AGL_TEST_MOST.'''
        reference, width, patch_px, learning_rate = "test", 5, 16, 1e-3

        def __init__(self, example):
            super().__init__(example)
            self.mix = nn.Linear(768, self.width)

        def forward(self, spots):
            if len(spots.position) > float(os.environ.get("AGL_TEST_MOST", "inf")):
                raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate 2.00 GiB.")
            return torch.tanh(self.mix(2 * spots.patches.flatten(1) - 1))

    @hookimpl
    def register_backbones():
        return {"narrow": Narrow}
"""
SQUARED = ("protocol.loss=squared_error", "protocol.epochs=4")


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "narrow.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return path


@pytest.fixture
def campaign(grid, plugin):
    """Cells of one fold and their bench."""

    def campaign(*selectors, more=SQUARED):
        return grid(*selectors, files=[plugin], backbone=["narrow"], fold=["D1"], more=list(more))

    return campaign


def results(store):
    return {r.spec.selector.name: r for r in store}


def close(one, other):
    genes = ["gene", "primary", "weight", "pearson"]  # a rank may flip by rounding
    pd.testing.assert_frame_equal(one.genes[genes], other.genes[genes], check_exact=False, rtol=0, atol=1e-3)
    columns = ["training_loss", "validation_pcc"]
    pd.testing.assert_frame_equal(one.epochs[columns], other.epochs[columns], check_exact=False, rtol=0, atol=1e-3)


def test_it_is_noted_once_and_recorded(campaign, tmp_path, monkeypatch):
    cells, bench = campaign("pgl,agl")
    list(run_cells(cells, bench, CellStore(tmp_path / "whole"), NoRecorder()))
    monkeypatch.setenv("AGL_TEST_MOST", "7")
    events = list(run_cells(cells, bench, CellStore(tmp_path / "work"), NoRecorder()))
    assert [type(e) for e in events] == [Started, Noted, *[EpochDone] * 4, Finished] * 2
    found, whole = results(CellStore(tmp_path / "work")), results(CellStore(tmp_path / "whole"))
    for event in events:
        if isinstance(event, Noted):
            rooms = found[event.spec.selector.name].provenance["micro_batch"]
            assert event.sentence == (
                f"out of device memory: a batch is trained on {rooms['training']} spots at a time, with the gradient "
                f"of the whole; {rooms['evaluation']} spots are predicted at a time, which changes no score"
            )
    for name, result in found.items():
        assert all(2 <= spots <= 7 for spots in result.provenance["micro_batch"].values())
        assert "micro_batch" not in whole[name].provenance
        close(result, whole[name])


def test_only_the_test_spots_are_too_many(campaign, tmp_path, monkeypatch):
    """The validation spots fit, all training spots at once do not."""
    cells, bench = campaign("pgl", more=(*SQUARED, "protocol.batch_size=8"))
    setting = bench.setting(*cells[0])
    fit = len(setting.rows.validation)
    assert fit < len(setting.rows.train)
    monkeypatch.setenv("AGL_TEST_MOST", str(fit))
    events = list(run_cells(cells, bench, CellStore(tmp_path), NoRecorder()))
    *_, done, noted, finished = events
    assert isinstance(done, EpochDone) and noted.sentence.startswith("out of device memory: ")
    assert "trained" not in noted.sentence and set(finished.result.provenance["micro_batch"]) == {"evaluation"}


def test_it_goes_on_from_a_checkpoint_with_memory_to_spare(campaign, tmp_path, monkeypatch):
    """Moved to a larger device, the rest is computed in the same parts, bit for bit, and nothing is said again."""
    cells, bench = campaign("agl")
    monkeypatch.setenv("AGL_TEST_MOST", "7")
    expected = list(run_cells(cells, bench, CellStore(tmp_path / "whole"), NoRecorder()))[-1].result
    seen = []
    stop = {"checkpoint_every": 0, "stop": lambda: "test" if len(seen) > 3 else ""}
    first = [seen.append(e) or e for e in run_cells(cells, bench, CellStore(tmp_path / "work"), NoRecorder(), **stop)]
    assert [type(e) for e in first] == [Started, Noted, EpochDone, EpochDone, Stopped]
    monkeypatch.delenv("AGL_TEST_MOST")
    second = list(run_cells(cells, bench, CellStore(tmp_path / "work"), NoRecorder()))
    said = [e.sentence for e in second if isinstance(e, Noted)]
    assert len(said) == 1 and said[0].startswith("continued after epoch")
    result = second[-1].result
    pd.testing.assert_frame_equal(result.genes, expected.genes, check_exact=True)
    assert result.scores == expected.scores
    assert result.provenance["micro_batch"] == expected.provenance["micro_batch"]


def test_a_correlation_fails_with_what_fits_and_the_others_go_on(campaign, tmp_path, monkeypatch):
    cells, bench = campaign("agl,pgl", more=["protocol.epochs=2"])
    monkeypatch.setenv("AGL_TEST_MOST", "7")
    events = list(run_cells(cells, bench, CellStore(tmp_path), NoRecorder()))
    assert [type(e) for e in events] == [Started, Failed] * 2
    for event in events[1::2]:
        assert event.status == "failed" and "protocol.batch_size=" in event.sentence


@pytest.mark.parametrize("where", ["build", "setting"])
def test_memory_that_is_short_beside_any_batch(campaign, tmp_path, monkeypatch, where):
    cells, bench = campaign("pgl")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(bench, where, full)
    *_, failed = run_cells(cells, bench, CellStore(tmp_path), NoRecorder())
    assert isinstance(failed, Failed) and failed.sentence.startswith("out of device memory beside any batch; ")
