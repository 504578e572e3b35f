"""Against scipy, statsmodels, scikit-posthocs and published numbers; and right where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from agl_bench.bench.table import BASELINE, BOUND
from agl_bench.comparison import statistics
from agl_bench.comparison.gather import PLACE


def table(pcc: np.ndarray, *, evaluation: str = "intra", names: Sequence[str] = (BASELINE, "a", "b", "c")):
    """Cells of (datasets, selectors, units, folds, seeds)."""
    rows = [
        {
            "dataset": f"d{d}", "evaluation": evaluation, "backbone": "net", "preset": "clean", "tuning": "",
            "selector": names[a], "fold": f"S{u}.{f}" if evaluation == "intra" else f"S{u}", "seed": s,
            "shuffled": False, "pcc": value, "test_spots": 20 + u, "train_spots": 80, "seconds": 1.0,
        }
        for (d, a, u, f, s), value in np.ndenumerate(pcc)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def made(*shape: int, seed: int = 0, sd: float = 0.03) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, sd, shape)


def row(found: pd.DataFrame, a: str, b: str) -> pd.Series:
    (index,) = found.index[(found["a"] == a) & (found["b"] == b)]
    return found.loc[index]


def test_every_ordered_pair_has_its_row_and_its_mirror():
    found = statistics.pairs(table(made(2, 3, 4, 5, 3)))

    assert list(found.columns) == [*PLACE, *statistics._PAIR]
    assert len(found) == 2 * 3 * 2
    one = found[found["dataset"] == "d1"]
    ab, ba = row(one, "a", BASELINE), row(one, BASELINE, "a")
    assert (ab["units"], ab["folds"], ab["seeds"]) == (4, 20, 3)
    for name in ("difference", "effect"):
        assert ab[name] == -ba[name]
    assert (ab["low"], ab["high"]) == (-ba["high"], -ba["low"])
    assert ab["superiority"] == ba["inferiority"]
    assert ab[["p", "p_corrected", "p_holm", "least_p", "equivalence"]].equals(
        ba[["p", "p_corrected", "p_holm", "least_p", "equivalence"]]
    )


def test_the_difference_is_that_of_shared_cells_and_every_unit_counts_alike():
    pcc = made(1, 2, 3, 2, 2)
    pcc[0, 1, 0, 0, 1] = np.nan  # a cell without a score, so not shared
    cells = table(pcc)
    cells = cells[~((cells["selector"] == BASELINE) & (cells["fold"] == "S2.1"))]  # a fold that the baseline lacks
    apart = pcc[0, 1] - pcc[0, 0]
    apart[2, 1] = np.nan

    found = row(statistics.pairs(cells), "a", BASELINE)

    assert found["difference"] == pytest.approx(np.nanmean(np.nanmean(np.nanmean(apart, 1), 1)))
    assert (found["units"], found["folds"], found["seeds"]) == (3, 5, 2)


@pytest.mark.parametrize("units", [2, 5, 9])
def test_sign_flip_equals_scipy(units: int):
    values = np.random.default_rng(units).normal(0.4, 1, (3, units))
    values[1] = 0.5  # ties

    p, least = statistics.sign_flip(values, resamples=100, seed=0)

    for found, own in zip(p, values, strict=True):
        expected = stats.permutation_test(
            (own,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        ).pvalue
        assert found == pytest.approx(min(expected, 1))
    assert (least == 2 / 2**units).all()
    assert statistics.sign_flip(np.ones((1, units)), resamples=1, seed=0)[0] == least[0]


def test_above_13_units_flips_are_random_and_the_observed_one_counts():
    values = np.random.default_rng(0).normal(0.5, 1, (2, 14))
    exact = [
        (np.abs((1 - 2 * (np.arange(2**14)[:, None] >> np.arange(14) & 1)) @ v) >= abs(v.sum()) - 1e-12).mean()
        for v in values
    ]

    p, least = statistics.sign_flip(values, resamples=9_999, seed=0)

    assert p == pytest.approx(exact, abs=4 * 0.5 / 100)
    assert (p * 10_000 == pytest.approx(np.round(p * 10_000))) and (least == 2.0**-13).all()
    assert statistics.sign_flip(np.ones((1, 30)), resamples=99, seed=0)[1][0] == 0.01


def test_corrected_t_is_that_of_nadeau_and_bengio():
    """One section, five folds, three seeds: t = mean / sqrt((1/J + test/train) s²), J − 1 degrees of freedom."""
    cells = table(made(1, 2, 1, 5, 3))
    by_name = {n: m["pcc"].to_numpy() for n, m in cells.groupby("selector")}
    apart = by_name["a"] - by_name[BASELINE]
    t = apart.mean() / math.sqrt((1 / 15 + 20 / 80) * apart.var(ddof=1))

    assert row(statistics.pairs(cells), "a", BASELINE)["p_corrected"] == pytest.approx(2 * stats.t.sf(abs(t), 14))


def test_corrected_t_of_sections_left_out_takes_folds_averaged_over_seeds():
    pcc = made(1, 2, 5, 1, 3)
    apart = (pcc[0, 1] - pcc[0, 0]).mean((1, 2))
    t = apart.mean() / math.sqrt((1 / 5 + 22 / 80) * apart.var(ddof=1))

    found = row(statistics.pairs(table(pcc, evaluation="inter")), "a", BASELINE)

    assert found["p_corrected"] == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert found["folds"] == found["units"] == 5


def test_corrected_t_averages_sections_and_needs_two_values_of_each():
    values = np.random.default_rng(0).normal(0.3, 1, (1, 3, 4, 2))
    variance = [(1 / 8 + 0.5) * v.var(ddof=1) for v in values[0]]
    freedom = sum(variance) ** 2 / sum(v**2 / 7 for v in variance)
    t = values.mean() * 3 / math.sqrt(sum(variance))

    overlap = np.full(3, 0.5)
    assert statistics.corrected_t(values, overlap)[0] == pytest.approx(2 * stats.t.sf(t, freedom))
    values[0, 1].flat[1:] = np.nan
    assert math.isnan(statistics.corrected_t(values, overlap)[0])
    assert statistics.corrected_t(np.zeros((1, 2, 2, 2)), np.ones(2))[0] == 1


def test_holm_equals_statsmodels():
    p = np.random.default_rng(0).random(12) ** 3
    assert statistics.holm_corrected(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_is_taken_within_a_place_and_the_bound_is_a_family_of_its_own():
    pcc = made(2, 4, 9, 1, 3)
    pcc[:, 1:] += np.array([0.1, 0.02, 0.0])[:, None, None, None]
    found = statistics.pairs(table(pcc, evaluation="inter", names=(BASELINE, "a", BOUND, "c")), baseline=BASELINE)

    for _, place in found.groupby("dataset"):
        methods = place[place["a"] != BOUND]
        assert set(methods["b"]) == {BASELINE} and len(methods) == 2
        assert methods["p_holm"].to_numpy() == pytest.approx(multipletests(methods["p"], method="holm")[1])
        bound = row(place, BOUND, BASELINE)
        assert bound["p_holm"] == bound["p"]


def test_effect_is_hedges_g_of_paired_differences():
    """Hedges (1981): the exact factor for 4 degrees of freedom is 0.7979; one of 1, 2, 3, 4, 5 is 3 / 1.5811."""
    found = statistics._effect(np.array([[1.0, 2, 3, 4, 5], [0, 0, 0, 0, 0], [1, 2, np.nan, np.nan, np.nan]]))
    assert found[0] == pytest.approx(0.79788 * 3 / 1.58114, rel=1e-4)
    assert found[1] == 0 and math.isnan(found[2])


def test_probabilities_are_those_of_the_correlated_t():
    by_unit = np.array([[0.01, 0.02, 0.0, 0.03]])
    mean, scale = 0.015, by_unit.std(ddof=1) * math.sqrt(1 / 4 + 1 / 3)
    above, within, below = statistics._probabilities(by_unit, 1 / 3, 0.005)

    assert above[0] == pytest.approx(stats.t.sf((0.005 - mean) / scale, 3))
    assert below[0] == pytest.approx(stats.t.cdf((-0.005 - mean) / scale, 3))
    assert above[0] + within[0] + below[0] == pytest.approx(1)


def test_units_without_spread_have_all_probability_on_one_side():
    above, within, below = statistics._probabilities(np.array([[0.01] * 3, [0.0] * 3]), 0.0, 0.005)
    assert above.tolist() == [1, 0] and within.tolist() == [0, 1] and below.tolist() == [0, 0]


def test_the_interval_is_the_percentiles_of_a_bootstrap_of_units_and_of_seeds():
    """Draw by draw, in Python, the same distribution."""
    values = made(1, 12, 4, sd=1.0)
    rng = np.random.default_rng(1)
    means = [
        values[0][np.ix_(rng.integers(12, size=12), rng.integers(4, size=4))].mean() for _ in range(20_000)
    ]  # fmt: skip
    level = stats.norm.cdf(stats.t.ppf(0.025, 11) * math.sqrt(12 / 11))

    low, high = statistics.interval(values, resamples=20_000, seed=0)

    expected = np.quantile(means, [level, 1 - level])
    assert [low[0], high[0]] == pytest.approx(expected, abs=0.05 * np.ptp(expected))


def test_draws_weigh_only_what_is_there_and_sum_to_one():
    present = np.array([[True, True, False], [False, False, False], [False, True, True], [True, False, False]])
    weights = statistics._draws(present, 500, np.random.default_rng(0)).reshape(500, 4, 3)

    assert weights.sum((1, 2)) == pytest.approx(np.ones(500))
    assert not weights[:, ~present].any() and weights[:, present].any(0).all()


def test_an_interval_needs_a_second_unit_or_seed():
    one = np.full((3, 2, 2), np.nan)
    one[0, 0, 0], one[1, 0], one[2, :, 0] = 1.0, [1.0, 2.0], [1.0, 2.0]
    low, high = statistics.interval(one, resamples=200, seed=0)

    assert math.isnan(low[0]) and math.isnan(high[0])
    assert (low[1:], high[1:]) == (pytest.approx([1, 1]), pytest.approx([2, 2]))


def test_same_seed_same_bits_and_another_seed_others():
    cells = table(made(1, 3, 6, 2, 3))
    once = statistics.pairs(cells, seed=1)
    pd.testing.assert_frame_equal(
        once, statistics.pairs(cells.sample(frac=1, random_state=0), seed=1), check_exact=True
    )
    assert (once["low"] != statistics.pairs(cells, seed=2)["low"]).any()


@pytest.mark.parametrize(
    ("units", "seeds", "gain", "noise", "verdict"),
    [
        (8, 3, 0.05, 0.005, "better"),
        (8, 3, -0.05, 0.005, "worse"),
        (8, 3, 0.001, 0.001, "equivalent"),
        (8, 3, 0.0, 0.05, "undecided"),
        (8, 2, 0.05, 0.005, "too few units"),
        (4, 3, 0.05, 0.005, "too few units"),
    ],
)
def test_verdicts(units: int, seeds: int, gain: float, noise: float, verdict: str):
    pcc = made(1, 2, units, 2, seeds, sd=noise)
    pcc[0, 1] += gain
    found = statistics.pairs(table(pcc), baseline=BASELINE)
    assert found["verdict"].tolist() == [verdict]


def test_many_pairs_need_more_units():
    pcc = made(1, 4, 7, 1, 3, sd=0.001)
    pcc[0, 1] += 0.1
    cells = table(pcc, evaluation="inter")

    assert row(statistics.pairs(cells), "a", BASELINE)["verdict"] == "too few units"  # 2/128 of six pairs
    assert row(statistics.pairs(cells, baseline=BASELINE), "a", BASELINE)["verdict"] == "better"  # of three


def test_controls_and_cells_without_a_score_are_left_out():
    cells = table(made(1, 2, 3, 2, 3))
    wrong = cells.assign(shuffled=True, selector="wrong")
    lost = cells.assign(selector="lost", pcc=np.nan)
    found = statistics.pairs(pd.concat([cells, wrong, lost], ignore_index=True))
    assert set(found["a"]) == {BASELINE, "a"}


def test_nothing_to_compare_gives_an_empty_table():
    cells = table(made(1, 1, 3, 2, 3))
    for found in (statistics.pairs(cells), statistics.pairs(cells[:0]), statistics.pairs(cells, baseline="absent")):
        assert found.empty and list(found.columns) == [*PLACE, *statistics._PAIR]
    assert statistics.ranks(cells[:0]).empty and statistics.improvement(cells).empty
    assert statistics.cautions(cells) == []


@pytest.mark.parametrize(
    ("evaluation", "fold", "unit"),
    [("intra", "C2.0", "C2"), ("intra", "a.b.12", "a.b"), ("intra", "left", "left"), ("inter", "C2.0", "C2.0")],
)
def test_the_unit_of_a_fold(evaluation: str, fold: str, unit: str):
    assert statistics.unit_of(evaluation, fold) == unit


DEMSAR = """0.763 0.768 0.771 0.798  0.599 0.591 0.590 0.569  0.954 0.971 0.968 0.967  0.628 0.661 0.654 0.657
0.882 0.888 0.886 0.898  0.936 0.931 0.916 0.931  0.661 0.668 0.609 0.685  0.583 0.583 0.563 0.625
0.775 0.838 0.866 0.875  1.000 1.000 1.000 1.000  0.940 0.962 0.965 0.962  0.619 0.666 0.614 0.669
0.972 0.981 0.9751 0.975  0.957 0.978 0.946 0.970"""


def test_ranks_are_those_of_the_published_example():
    """Demšar (2006, Journal of Machine Learning Research 7), table 6 and section 3.2.2: four variants of C4.5 on 14
    datasets have mean ranks 3.143, 2.000, 2.893 and 1.964, and Nemenyi's critical difference is 1.25. Of the
    two 0.975 in a row of the table the first ranks higher there."""
    auc = np.array(DEMSAR.split(), dtype=float).reshape(14, 4, 1, 1, 1)
    names = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")

    found = statistics.ranks(table(auc, evaluation="inter", names=names), resamples=100)

    by_name = found.set_index("selector")
    assert by_name.loc[list(names), "mean_rank"].to_numpy() == pytest.approx([3.143, 2.0, 2.893, 1.964], abs=5e-4)
    assert found.attrs["critical_difference"] == pytest.approx(1.25, abs=5e-3)
    assert found.attrs["blocks"] == 14 and (found["datasets"] == 14).all()
    expected = stats.friedmanchisquare(*auc[:, :, 0, 0, 0].T)
    assert (found.attrs["statistic"], found.attrs["p"]) == pytest.approx((expected.statistic, expected.pvalue))


def test_nemenyi_equals_scikit_posthocs():
    """A difference of ranks as large as the critical one has p = .05."""
    pcc = made(9, 4, 1, 1, 1)
    found = statistics.ranks(table(pcc, evaluation="inter"), resamples=10)
    p = scikit_posthocs.posthoc_nemenyi_friedman(pcc[:, :, 0, 0, 0])
    ranks = found.set_index("selector")["mean_rank"][[BASELINE, "a", "b", "c"]].to_numpy()
    width = np.abs(ranks[:, None] - ranks) / found.attrs["critical_difference"]
    upper = np.triu_indices(4, 1)
    q = stats.studentized_range.ppf(0.95, 4, np.inf)
    assert stats.studentized_range.sf(width[upper] * q, 4, np.inf) == pytest.approx(p.to_numpy()[upper], abs=1e-6)


def test_ranks_hold_what_is_certain_and_leave_the_bound_out():
    pcc = made(3, 4, 4, 1, 3, sd=0.001) + np.array([0.0, 0.1, 0.2, 0.9])[:, None, None, None]
    found = statistics.ranks(table(pcc, evaluation="inter", names=(BASELINE, "a", "b", BOUND))).set_index("selector")
    assert found[["mean_rank", "low", "high"]].T.to_dict("list") == {
        BASELINE: [3, 3, 3],
        "a": [2, 2, 2],
        "b": [1, 1, 1],
    }


def test_each_place_across_datasets_has_a_test_of_its_own():
    both = [table(made(5, 3, 2, 1, 2, seed=i), evaluation=e) for i, e in enumerate(("intra", "inter"))]
    found = statistics.ranks(pd.concat(both), resamples=10)

    assert set(found.attrs["tests"]) == {(e, "net", "clean", "") for e in ("intra", "inter")}
    assert "p" not in found.attrs
    alone = statistics.ranks(both[1], resamples=10)
    assert found.attrs["tests"]["inter", "net", "clean", ""] == {k: v for k, v in alone.attrs.items() if k != "tests"}


def test_a_selector_that_a_dataset_lacks_is_not_ranked():
    cells = table(made(2, 4, 3, 1, 3), evaluation="inter")
    found = statistics.ranks(cells[(cells["selector"] != "c") | (cells["dataset"] == "d0")])
    assert set(found["selector"]) == {BASELINE, "a", "b"}


def test_improvement_is_relative_and_averaged_over_datasets():
    pcc = np.full((2, 3, 4, 1, 3), 0.2)
    pcc[1, 0] = 0.4
    pcc[0, 1], pcc[1, 1] = 0.3, 0.5
    pcc[:, 2] = 0.1
    cells = table(pcc, evaluation="inter")
    cells = cells[(cells["selector"] != "b") | (cells["dataset"] == "d1")]
    found = statistics.improvement(cells).set_index("selector")

    assert found.loc["a", "improvement"] == pytest.approx((0.5 + 0.25) / 2)
    assert found.loc["a", ["low", "high"]].tolist() == pytest.approx([0.25, 0.5])
    assert found.loc["b", ["improvement", "datasets"]].tolist() == pytest.approx([-0.75, 1])


def test_nothing_is_relative_to_a_baseline_of_nothing():
    pcc = made(1, 2, 3, 1, 3)
    pcc[0, 0] = -0.1
    found = statistics.improvement(table(pcc, evaluation="inter"))
    assert found["improvement"].isna().all() and found["low"].isna().all()


def test_cautions_say_what_is_missing():
    few = table(made(1, 3, 4, 2, 2))
    said = statistics.cautions(few[(few["selector"] != "b") | (few["fold"] != "S0.0")])
    assert any("2 seeds" in s for s in said)
    assert any("4 tested sections" in s and "p = 0.125" in s for s in said)
    assert any("b 2 of 16" in s for s in said)
    assert all(s.startswith("d0, intra-batch, backbone net, clean: ") for s in said)

    said = statistics.cautions(table(made(1, 4, 6, 1, 3), evaluation="inter"))
    assert any("below 0.094" in s for s in said)  # 3 comparisons with one, each at least 2/64
    assert any("share training sections" in s for s in said)

    assert statistics.cautions(table(made(1, 2, 8, 5, 3))) == []


def test_a_common_effect_of_seeds_is_that_of_an_analysis_of_variance():
    values = made(3, 6, 1, 4)[:, :, 0]
    frame = pd.DataFrame({"d": values[1].ravel(), "u": np.repeat(range(6), 4), "s": np.tile(range(4), 6)})
    expected = anova_lm(ols("d ~ C(u) + C(s)", frame).fit()).loc["C(s)", "PR(>F)"]
    values[2, 0, 0] = np.nan

    found = statistics.seed_effect(values)

    assert found[1] == pytest.approx(expected) and math.isnan(found[2])
    assert np.isnan(statistics.seed_effect(values[:, :1])).all()


def test_a_seed_that_moves_all_sections_is_told():
    pcc = made(1, 3, 6, 1, 4)
    pcc[0, 1] += np.array([-0.1, 0, 0.05, 0.1])
    said = statistics.cautions(table(pcc, evaluation="inter"))
    assert any("a seed moves a against pgl alike on all folds" in s for s in said)


def test_no_false_alarm_beyond_chance_where_sections_differ():
    """2,000 simulations whose sections and cells differ at random: the sign flip of ten sections reaches 50/1024 at
    .05, and its rate lies within the binomial region of that; flipping folds as if they were independent does not."""
    rng = np.random.default_rng(0)
    apart = rng.normal(0, 0.02, (2_000, 10, 1)) + rng.normal(0, 0.02, (2_000, 10, 5))

    def rate(values: np.ndarray) -> float:
        return float((statistics.sign_flip(values, resamples=2_000, seed=0)[0] <= 0.05).mean())

    low, high = stats.binom.ppf([0.025, 0.975], 2_000, 50 / 1024) / 2_000
    assert low <= rate(apart.mean(2)) <= high
    assert rate(apart.reshape(2_000, -1)) > 2 * high


def test_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    apart = rng.normal(0.1, 1, (1_000, 10, 1)) + rng.normal(0, 0.3, (1_000, 10, 3))
    low, high = statistics.interval(apart, resamples=1_000, seed=0)
    held = ((low <= 0.1) & (high >= 0.1)).mean()
    assert 0.93 <= held <= 0.98


def test_a_difference_is_found():
    """Closed form: a paired t of 12 units at d = 1 has power .89; the sign flip is nearly as good."""
    apart = np.random.default_rng(0).normal(1, 1, (2_000, 12))
    p, _ = statistics.sign_flip(apart, resamples=1_000, seed=0)
    expected = stats.nct.sf(stats.t.ppf(0.975, 11), 11, math.sqrt(12))
    assert (p <= 0.05).mean() == pytest.approx(expected, abs=0.04)
