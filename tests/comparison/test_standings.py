"""How lines stand: ranks among methods alone, differences with intervals where the statistics allow them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.table import BASELINE
from agl_bench.cli import main
from agl_bench.comparison.gather import gather
from agl_bench.comparison.standings import standings
from agl_bench.registry.plugins import Plugins

RUN = ["run", "--datasets", "synthetic", "--evaluation", "inter", "--preset", "smoke", "--tracking", "none"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    for words in (
        ["--selectors", "pgl,agl,oracle", "--seeds", "0,1,2", "--controls"],
        ["--selectors", "hvg_k", "--seeds", "0", "--set", "hvg_k.k=10"],
        ["--selectors", "pgl,agl", "--seeds", "0", "--set", "protocol.epochs=1"],
    ):
        with pytest.raises(SystemExit) as end:
            main([*RUN, *words, "--work", str(work)])
        assert not end.value.code
    return work


def test_standings(work: Path) -> None:
    store = CellStore(work)
    gathered = gather(store)
    found = standings(gathered, Plugins.discover(strict=True))
    assert set(found) == {r.spec.group for r in store}
    mean: dict[str, pd.Series] = {}
    for result in store:
        mean.setdefault(result.spec.group, []).append(result.pcc)  # type: ignore[arg-type]
    for group, standing in found.items():
        assert standing.pcc == pytest.approx(np.mean(mean[group]))
    specs = {r.spec.group: r.spec for r in store}
    controls = {g for g, s in found.items() if s.is_control}
    assert controls == {
        g for g, spec in specs.items()
        if spec.selector.name == "oracle" or spec.protocol.patches == "shuffled" or spec.backbone.name != "tiny"
    }  # fmt: skip
    assert all(found[g].rank is None for g in controls)

    def line(selector: str, epochs: int) -> str:
        (group,) = (
            g for g, s in specs.items()
            if (s.selector.name, s.protocol.epochs) == (selector, epochs) and g not in controls
        )  # fmt: skip
        return group

    # Three methods share a place, and one of them has fewer seeds: no order.
    assert {found[line(s, 3)].rank for s in ("pgl", "agl", "hvg_k")} == {None}
    short = [found[line(s, 1)] for s in ("pgl", "agl")]
    assert sorted(s.rank for s in short) == [1, 2] and {s.of for s in short} == {2}
    assert (short[0].rank == 1) == (short[0].pcc > short[1].pcc) == short[0].is_best


def test_no_interval_from_fewer_than_three_seeds(work: Path) -> None:
    store = CellStore(work)
    found = standings(gather(store), Plugins.discover(strict=True))
    for result in store:
        standing, spec = found[result.spec.group], result.spec
        if standing.is_control or spec.selector.name == BASELINE:
            continue
        assert np.isfinite(standing.difference) and standing.verdict
        has_three_seeds = spec.selector.name == "agl" and spec.protocol.epochs == 3
        assert np.isfinite(standing.low) == np.isfinite(standing.high) == has_three_seeds
        if not has_three_seeds:
            assert standing.verdict == f"too few units to tell from {BASELINE}"


def test_an_empty_folder_has_no_standings(tmp_path: Path) -> None:
    assert standings(gather(CellStore(tmp_path)), Plugins.discover(strict=True)) == {}
