"""Selections of written cells, against sets, scipy and closed forms."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from agl_bench.bench.cells import CellStore
from agl_bench.bench.table import BASELINE
from agl_bench.cli import main
from agl_bench.comparison import selection, statistics
from agl_bench.comparison.gather import LINE, PLACE, Gathered, gather
from agl_bench.training.trainer import HALF

PLACE_OF = {"dataset": "d", "evaluation": "intra", "backbone": "net", "preset": "clean", "tuning": ""}
Weights = Mapping[str, float]


class Written:
    """A work folder whose cells have gene tables and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.store = CellStore(folder)
        self.rows: list[dict[str, object]] = []

    def cell(
        self,
        selector: str,
        fold: str,
        seed: int,
        weights: Weights,
        primary: Mapping[str, float],
        of_genes: Mapping[str, np.ndarray] | None = None,
        **columns: object,
    ) -> Path:
        """One cell; genes are ranked in the order given."""
        key = f"{len(self.rows):020x}"
        path = self.store.cells / key / "genes.parquet"
        path.parent.mkdir()
        names = [*weights, *primary]
        pd.DataFrame(
            {
                "gene": names,
                "primary": [n in primary for n in names],
                "rank": [*range(len(weights)), *[-1] * len(primary)],
                "score": [*(100.0 - np.arange(len(weights))), *[200.0] * len(primary)],
                "weight": np.array([*weights.values(), *[1.0] * len(primary)], dtype=np.float32),
                "pearson": [*[math.nan] * len(weights), *primary.values()],
                **(of_genes or {}),
            }
        ).to_parquet(path, index=False)
        self.rows.append(
            {
                "key": key, **PLACE_OF, "selector": selector, "name": selector, "fold": fold, "seed": seed,
                "shuffled": False, "pcc": float(np.nanmean(list(primary.values()))),
                "selected": sum(w > HALF for w in weights.values()), "seconds": 36.0, "peak_memory_mb": 10.0 + seed,
                **columns,
            }
        )  # fmt: skip
        return path

    def gathered(self) -> Gathered:
        cells = pd.DataFrame(self.rows)
        return Gathered(cells, cells.iloc[:0], cells.iloc[:0], {}, self.store)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def whole(genes: Sequence[str], chosen: Sequence[str]) -> dict[str, float]:
    return {g: float(g in chosen) for g in genes}


def line(found: pd.DataFrame, selector: str) -> pd.Series:
    (index,) = found.index[found["selector"] == selector]
    return found.loc[index]


def test_stability_is_taken_on_common_genes(written: Written):
    first = whole("abcdefgh", "abcd")
    second = whole("hgfedcxy", "dcxy")  # has no a and b, but x and y
    written.cell("s", "S.0", 0, first, {"P": 0.1})
    written.cell("s", "S.1", 0, second, {"Q": 0.1})

    found = line(selection.summary(written.gathered()), "s")

    # common: c to h; of those the first selects c, d and the second c, d
    assert found["jaccard"] == 1 and found["kuncheva"] == pytest.approx(1)
    assert (found["selected_mean"], found["selected_sd"]) == (4, 0)


def test_kuncheva_is_that_of_the_published_definition(written: Written):
    """Kuncheva (2007): (r n − k²) / (k (n − k)), mean over pairs."""
    genes = [f"g{i}" for i in range(20)]
    rng = np.random.default_rng(0)
    sets = [set(rng.choice(genes, 6, replace=False)) for _ in range(4)]
    for seed, chosen in enumerate(sets):
        written.cell("s", "S.0", seed, whole(genes, chosen), {"P": 0.1})

    found = line(selection.summary(written.gathered()), "s")

    pairs = [(len(a & b), len(a | b)) for a, b in itertools.combinations(sets, 2)]
    assert found["kuncheva"] == pytest.approx(np.mean([(r * 20 - 36) / (6 * 14) for r, _ in pairs]))
    assert found["jaccard"] == pytest.approx(np.mean([r / u for r, u in pairs]))


def test_selections_of_unequal_size_agree_as_their_indicators_correlate(written: Written):
    genes = [f"g{i}" for i in range(12)]
    sets = [genes[:3], genes[1:8]]
    for seed, chosen in enumerate(sets):
        written.cell("s", "S.0", seed, whole(genes, chosen), {"P": 0.1})
    expected = np.corrcoef(*[[g in chosen for g in genes] for chosen in sets])[0, 1]
    assert line(selection.summary(written.gathered()), "s")["kuncheva"] == pytest.approx(expected)


def test_what_is_not_defined_is_nan(written: Written):
    for seed in (0, 1):
        written.cell("none", "S.0", seed, whole("abcd", ""), {"P": 0.1})
        written.cell("all", "S.0", seed, whole("abcd", "abcd"), {"P": 0.1})
    written.cell("once", "S.0", 0, whole("abcd", "a"), {"P": 0.1})

    found = selection.summary(written.gathered())

    none, every, once = (line(found, n) for n in ("none", "all", "once"))
    names = ["jaccard", "kuncheva", "prefix_overlap", "rank_correlation"]
    assert none[names].isna().all() and none["effective"] == 0
    assert (every["jaccard"], every["prefix_overlap"], every["effective"]) == (1, 1, 4)
    assert every[["kuncheva", "rank_correlation"]].isna().all()
    assert once[["jaccard", "kuncheva", "selected_sd"]].isna().all() and once["prefix_overlap"] == 1


def test_effective_genes_overlap_with_the_ranking_and_rank_correlation(written: Written):
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(50)]
    weights = dict(zip(genes, np.round(rng.uniform(0, 1.2, 50), 1), strict=True))  # with ties, some above 1
    halves = whole(genes, genes[40:])
    written.cell("soft", "S.0", 0, weights, {"P": 0.1})
    written.cell("hard", "S.0", 0, halves, {"P": 0.1})

    found = selection.summary(written.gathered())

    soft, hard = line(found, "soft"), line(found, "hard")
    assert soft["effective"] == pytest.approx(sum(min(w, 1) for w in weights.values()), rel=1e-6)
    k = sum(w > 0.55 for w in weights.values())
    assert soft["prefix_overlap"] == pytest.approx(sum(w > 0.55 for w in list(weights.values())[:k]) / k)
    for own, found_of in ((weights, soft), (halves, hard)):
        expected = stats.spearmanr(list(own.values()), -np.arange(50)).statistic
        assert found_of["rank_correlation"] == pytest.approx(expected)
    assert hard["prefix_overlap"] == 0
    assert math.isnan(soft["mean_correlation"])  # the table does not have it


def test_weights_go_with_mean_expression_and_detection(written: Written):
    rng = np.random.default_rng(1)
    weights = {f"g{i}": float(w) for i, w in enumerate(np.round(rng.uniform(0, 1, 40), 1))}
    of_genes = {name: np.round(rng.uniform(0, 1, 41), 1).astype(np.float32) for name in ("mean", "detection")}
    written.cell("s", "S.0", 0, weights, {"P": 0.1}, of_genes)

    found = line(selection.summary(written.gathered()), "s")

    for name, values in of_genes.items():
        expected = stats.spearmanr(list(weights.values()), values[:-1]).statistic
        assert found[f"{name}_correlation"] == pytest.approx(expected)


def test_means_of_planted_scores_are_over_the_cells_that_have_them(written: Written):
    written.cell("s", "S.0", 0, whole("ab", "a"), {"P": 0.1}, selection_precision=0.5)
    written.cell("s", "S.0", 1, whole("ab", ""), {"P": 0.1})
    assert line(selection.summary(written.gathered()), "s")["selection_precision"] == 0.5


def test_overlap_of_selectors_is_of_the_same_fold_and_seed(written: Written):
    written.cell("a", "S.0", 0, whole("abcd", "ab"), {"P": 0.1})
    written.cell("b", "S.0", 0, whole("abcd", "bc"), {"P": 0.1})
    written.cell("a", "S.0", 1, whole("abcd", "ab"), {"P": 0.1})
    written.cell("b", "S.0", 1, whole("abcd", "ab"), {"P": 0.1})
    written.cell("b", "S.1", 1, whole("abcd", "cd"), {"P": 0.1})  # which a lacks
    written.cell("none", "S.0", 0, whole("abcd", ""), {"P": 0.1})

    found = selection.overlap(written.gathered(), PLACE_OF)

    assert found.loc["a", "b"] == found.loc["b", "a"] == pytest.approx((1 / 3 + 1) / 2)
    assert found.loc["a", "a"] == 1 and found.loc["none", "a"] == 0 and math.isnan(found.loc["none", "none"])


def test_negative_transfer_is_that_of_each_gene(written: Written):
    rng = np.random.default_rng(0)
    by_cell: dict[tuple[str, str, int], dict[str, float]] = {}
    for selector in (BASELINE, "s"):
        for unit, part, seed in itertools.product(range(3), range(2), range(3)):
            primary = {"P": rng.normal(), "Q": rng.normal()} | ({"R": 0.5} if (unit, part, seed) == (0, 0, 0) else {})
            if (selector, unit, part, seed) == ("s", 1, 1, 2):
                primary["Q"] = math.nan  # not expressed there
            by_cell[selector, f"S{unit}.{part}", seed] = primary
            written.cell(selector, f"S{unit}.{part}", seed, whole("ab", "a"), primary)

    found = selection.negative_transfer(written.gathered(), PLACE_OF).set_index("gene")

    assert (found["selector"] == "s").all() and list(found["difference"]) == sorted(found["difference"])
    apart = np.full((2, 3, 2, 3), np.nan)
    for (selector, fold, seed), own in by_cell.items():
        if selector == "s":
            for g, gene in enumerate("PQ"):
                apart[g, int(fold[1]), int(fold[3]), seed] = own[gene] - by_cell[BASELINE, fold, seed][gene]
    by_seed = np.nanmean(apart, 2)
    low, high = statistics.interval(by_seed, resamples=2_000, seed=0)
    for g, gene in enumerate("PQ"):
        assert found.loc[gene, "difference"] == pytest.approx(np.nanmean(by_seed[g], 1).mean(), abs=1e-6)
        assert found.loc[gene, ["low", "high"]].tolist() == pytest.approx([low[g], high[g]], abs=1e-6)
    assert found.loc["R", "difference"] == 0 and found.loc["R", ["low", "high"]].isna().all()


def test_without_a_baseline_nothing_is_transferred(written: Written):
    written.cell("s", "S.0", 0, whole("ab", "a"), {"P": 0.1})
    found = selection.negative_transfer(written.gathered(), PLACE_OF)
    assert found.empty and list(found.columns) == ["selector", "gene", "difference", "low", "high"]


def test_costs_are_per_hour_of_a_cell(written: Written):
    for seed, pcc in enumerate((0.1, 0.3)):
        written.cell("s", "S.0", seed, whole("ab", "a"), {"P": pcc})
    found = selection.costs(written.gathered().cells)
    assert list(found.columns) == [*LINE, "pcc", "seconds", "pcc_per_hour", "peak_memory_mb"]
    assert found.iloc[0][["pcc", "seconds", "pcc_per_hour", "peak_memory_mb"]].tolist() == pytest.approx(
        [0.2, 36, 20, 11]
    )


def test_a_cell_that_is_written_anew_is_read_anew_and_a_damaged_one_left_out(written: Written):
    path = written.cell("s", "S.0", 0, whole("abcd", "ab"), {"P": 0.1})
    other = written.cell("s", "S.0", 1, whole("abcd", "ab"), {"P": 0.1})
    gathered = written.gathered()
    assert line(selection.summary(gathered), "s")["effective"] == 2

    table = pd.read_parquet(path)
    table.loc[table["gene"] == "c", "weight"] = 1.0
    table.to_parquet(path, index=False)
    os.utime(path, ns=(0, 1))
    assert line(selection.summary(gathered), "s")["effective"] == 2.5
    other.write_bytes(b"no table")
    assert line(selection.summary(gathered), "s")["effective"] == 3


def test_few_of_many_cells_are_paired_and_spread_evenly():
    assert selection._evenly(range(10), 20) == list(range(10))
    assert selection._evenly(range(1_000), 5) == [0, 249, 499, 749, 999]


def test_a_real_run_has_all_of_it(tmp_path: Path):
    words = ["run", "--datasets", "synthetic", "--evaluation", "inter", "--preset", "smoke", "--tracking", "none"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--selectors", "pgl,agl,hvg_k", "--set", "hvg_k.k=10", "--work", str(tmp_path)])
    assert not end.value.code
    found = gather(CellStore(tmp_path))
    place = found.cells.iloc[0][PLACE].to_dict()

    table = selection.summary(found).set_index("selector")
    for selector, cells in found.cells.groupby("selector"):
        results = [found.result(key) for key in cells["key"]]
        weights = [r.genes.loc[~r.genes["primary"], "weight"] for r in results]
        assert table.loc[selector, "effective"] == pytest.approx(np.mean([w.sum() for w in weights]), rel=1e-6)
        assert table.loc[selector, "selected_mean"] == np.mean([(w > HALF).sum() for w in weights])
    assert table.loc["hvg_k", "prefix_overlap"] == 1
    assert table.loc["hvg_k", "selection_recall"] <= table.loc["agl", "selection_recall"] == 1
    assert selection.overlap(found, place).loc["agl", "agl"] == 1
    transfer = selection.negative_transfer(found, place)
    primary = {g for key in found.cells["key"] for g in found.result(key).genes.query("primary")["gene"]}
    assert set(transfer["gene"]) <= primary and set(transfer["selector"]) == {"agl", "hvg_k"}
    assert statistics.pairs(found.cells)["verdict"].eq("too few units").all()
