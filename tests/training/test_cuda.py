"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, choose_device
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def cell(device: str, selector: str, **protocol: Any) -> tuple[Bench, Any, Any]:
    """A bench with one small cell."""
    plugins = Plugins.discover()
    campaign = Campaign.of(
        plugins,
        preset="smoke",
        selectors=[selector],
        datasets=["synthetic"],
        evaluation=["inter"],
        fold=["D1"],
        assignments=[f"protocol.{k}={v}" for k, v in protocol.items()],
    )
    ((spec, plan),) = campaign.cells(plugins, Path(), device=device, fingerprint={})
    return Bench(plugins, Path(), choose_device(device)), spec, plan


@pytest.mark.parametrize("selector", ["agl", "hvg_k", "dkgsb", "amal"])
def test_a_cell_is_that_of_the_cpu(selector: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        bench, spec, plan = cell(device, selector)
        *records, result = bench.train(spec, plan)
        assert isinstance(result, Result)
        found.append(records)
    for one, other in zip(*found, strict=True):
        assert other.training_loss == pytest.approx(one.training_loss, rel=1e-2)
        assert other.validation_pcc == pytest.approx(one.validation_pcc, abs=2e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_is_near(precision: str) -> None:
    losses = []
    for chosen in ("fp32", precision):
        bench, spec, plan = cell("cuda", "agl", precision=chosen)
        *records, _ = bench.train(spec, plan)
        losses.append([r.training_loss for r in records])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("selector", ["agl", "hvg_k", "dkgsb", "amal"])
def test_no_step_waits_for_the_device(selector: str) -> None:
    """A pass with four times the batches synchronises as often as one with a quarter of them."""
    counts = []
    for size in (64, 16):
        bench, spec, plan = cell("cuda", selector, batch_size=size)
        setting = bench.setting(spec, plan)
        model, chosen = bench.build(spec, setting)
        protocol = replace(spec.protocol, outer_start=0)
        trainer = Trainer(model, chosen, setting.development, setting.rows, setting.genes, protocol, seed=0)
        trainer._train_pass(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer._train_pass(1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in said))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("settings", [{}, {"normalisation": "pearson_residuals", "standardise": "section"}], ids=str)
def test_where_data_are_changes_no_result(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for memory in ("4G", "1M", "0"):
        monkeypatch.setenv("AGL_BENCH_MEMORY", memory)
        bench, spec, plan = cell("cuda", "hvg_k", **settings)
        *records, result = bench.train(spec, plan)
        found.append([[(r.training_loss, r.validation_pcc) for r in records], result.scores])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("selector", ["random_k", "dkgsb", "amal"])
def test_a_cell_is_continued_bit_for_bit(selector: str, tmp_path: Path) -> None:
    """Also where the file was read onto the host."""
    bench, spec, plan = cell("cuda", selector, epochs=4)
    setting = bench.setting(spec, plan)

    def trainer() -> Trainer:
        made = bench.build(spec, setting)
        return Trainer(*made, setting.development, setting.rows, setting.genes, spec.protocol, seed=spec.seed)

    whole, rest = trainer(), trainer()
    for record in whole:
        if record.epoch == 1:
            torch.save(whole.state(), tmp_path / "state.pt")
    rest.resume(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    assert [r.epoch for r in rest] == [2, 3]
    for one, other in zip(whole.whole.state_dict().values(), rest.whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.fit.effective_weights, rest.fit.effective_weights)
