"""One fold of real tissue."""

import math
import os
from pathlib import Path

import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import Bench, choose_device, fingerprints, run_cells
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins

ROOT = Path(os.environ.get("AGL_BENCH_DATA", Path(__file__).parents[2] / "shared/data"))

pytestmark = pytest.mark.skipif(
    not (ROOT / "her2st").is_dir(), reason=f"there is no {ROOT / 'her2st'}; set AGL_BENCH_DATA"
)


def test_one_fold_of_her2st(tmp_path):
    plugins = Plugins.discover(strict=True)
    campaign = Campaign.of(
        plugins, selectors=["pgl"], datasets=["her2st"], evaluation=["inter"], fold=["C2"], preset="smoke"
    )
    known = fingerprints(campaign, plugins, ROOT, None)
    cells = campaign.cells(plugins, ROOT, device="cpu", fingerprint=known)
    bench = Bench(plugins, ROOT, choose_device("cpu"))
    (_, *_, last) = run_cells(cells, bench, CellStore(tmp_path), NoRecorder())
    result = last.result
    assert math.isfinite(result.pcc)
    assert result.counts["auxiliary_genes"] >= 13_000
    assert result.counts["primary_genes"] == 50
    assert result.counts["test_spots"] > 100
    assert result.spec.data
