"""Which selector is better, by how much, and how sure that is.

What counts as a unit. Neither genes nor spots are independent, the folds of one section share its tissue, and all folds
of a seed start from the same weights. The unit is therefore what is tested as a whole: intra-batch a section (all folds
of it), inter-batch a fold, i.e. a section or donor that was left out. A unit's value is the mean over its seeds of the
mean over its folds. Intervals draw units and seeds: they speak of further sections like these, trained from further
seeds. Sign flips, effect and probabilities speak of further sections and take the seeds as they are, which is why a
verdict asks the interval too. `p_corrected` of an intra-batch evaluation speaks of the sections at hand.

Simulations of all of it: benchmarks/inference.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import gammaln

from agl_bench.bench.table import BASELINE, BOUND, FEW_SEEDS
from agl_bench.comparison.gather import PLACE
from agl_bench.maths.seeds import seed_for

ALPHA = 0.05
ROPE = 0.005  # PCC: what is closer is equal for practical purposes
EXACT = 13  # units up to which all sign flips are tried
ACROSS = [name for name in PLACE if name != "dataset"]  # within what datasets are compared
TOO_FEW = "too few units"  # a verdict
FEW_UNITS = 6  # below that no two-sided sign flip reaches .05
_CHUNK = 256  # pairs that are resampled at a time
_PAIR = [
    "a", "b", "units", "folds", "seeds", "difference", "low", "high", "p", "p_corrected", "p_holm", "least_p",
    "effect", "superiority", "equivalence", "inferiority", "verdict",
]  # fmt: skip


def pairs(
    cells: pd.DataFrame,
    *,
    baseline: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    rope: float = ROPE,
) -> pd.DataFrame:
    """Every selector against every other, on the folds and seeds that both have.

    Args:
        cells: `Gathered.cells`; those of wrong images or without a PCC are left out.
        baseline: compare with this selector only.
        resamples: of the bootstrap, and of the sign flips above 13 units.
        seed: of both.
        rope: half the width of the region of practical equivalence, in PCC.

    Returns:
        One row per place and ordered pair, so that each pair is there as (a, b) and as (b, a); with a baseline only
        b = baseline, and no row where it is missing.

        units, folds, seeds: shared sections or donors, folds, and seeds.
        difference: of test PCC, a − b, mean over units.
        low, high: 95 % percentile interval of a bootstrap that draws units, and seeds for all of them alike (Owen
            2007), widened for few units (Hesterberg 2015): below five, nearly their range. With one unit it speaks of
            seeds only, with one seed of units only; NaN with one of both.
        p: two-sided sign flip of whole units, exact up to 13 and else random with the observed one counted in.
        p_corrected: corrected resampled t (Nadeau and Bengio 2003), whose variance is larger by test / training spots
            because folds share training spots. Intra-batch over folds and seeds within each section, then averaged
            over sections (degrees of freedom: Satterthwaite): of these sections, not of further ones. Inter-batch over
            folds. NaN where there are not two folds or seeds to take it over.
        p_holm: p after Holm's correction over the pairs of the place; pairs with the bound of planted data are a family
            of their own.
        least_p: the smallest p that so many units allow.
        effect: difference / standard deviation over units, with Hedges' correction; NaN below three units.
        superiority, equivalence, inferiority: probability that the difference in mean is above rope, within, below
            −rope: correlated Bayesian t (Benavoli et al. 2017); NaN for one unit.
        verdict: "too few units" with fewer than 3 seeds, or where least_p times the number of pairs is above .05;
            "equivalent" if the interval lies within ±rope; "better" or "worse" if p_holm ≤ .05 and the interval does
            not hold 0; else "undecided".
    """
    found = [_pairs(place, baseline, resamples, seed, rope) for place in _places(cells)]
    found = [frame for frame in found if len(frame)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*PLACE, *_PAIR])


@dataclass(frozen=True)
class _Place:
    """Cells that may be compared, as an array.

    Attributes:
        key: values of `PLACE`.
        selectors: labels, sorted.
        pcc: (selectors, units, folds of a unit, seeds), NaN where there is no cell.
        overlap: (units,) test spots / training spots.
        resampled: whether folds are parts of a section, dealt anew by every seed.
    """

    key: tuple[Any, ...]
    selectors: tuple[str, ...]
    pcc: np.ndarray
    overlap: np.ndarray
    resampled: bool


def unit_of(evaluation: str, fold: str) -> str:
    """The section, or whatever was left out, that a fold belongs to: "C2" for "C2.0" intra-batch, else the fold.

    A fold of a user's file that is named otherwise is a unit of its own.
    """
    section, dot, part = fold.rpartition(".")
    return section if evaluation == "intra" and dot and part.isdigit() else fold


def _methods(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells with a PCC and their own images."""
    return cells[cells["pcc"].notna() & ~cells["shuffled"].astype(bool)]


def _places(cells: pd.DataFrame) -> Iterator[_Place]:
    for key, members in _methods(cells).groupby(PLACE, sort=True):
        evaluation = key[PLACE.index("evaluation")]
        folds = pd.Index(sorted(members["fold"].unique()))
        owner = [unit_of(evaluation, fold) for fold in folds]
        units = pd.Index(dict.fromkeys(owner))
        unit_at = units.get_indexer(owner)
        within = pd.Series(owner).groupby(owner).cumcount().to_numpy()
        selectors = pd.Index(sorted(members["selector"].unique()))
        seeds = pd.Index(sorted(members["seed"].unique()))
        fold_at = folds.get_indexer(members["fold"])
        pcc = np.full((len(selectors), len(units), int(within.max()) + 1, len(seeds)), np.nan)
        at = selectors.get_indexer(members["selector"]), unit_at[fold_at], within[fold_at]
        pcc[(*at, seeds.get_indexer(members["seed"]))] = members["pcc"]
        tested, trained = (
            np.bincount(unit_at[fold_at], members[f"{kind}_spots"], len(units)) for kind in ("test", "train")
        )
        yield _Place(
            key=key,
            selectors=tuple(selectors),
            pcc=pcc,
            overlap=tested / trained,
            resampled=any(unit != fold for unit, fold in zip(owner, folds, strict=True)),
        )


def _pairs(place: _Place, baseline: str | None, resamples: int, seed: int, rope: float) -> pd.DataFrame:
    count = len(place.selectors)
    if baseline is None:
        first, second = np.triu_indices(count, 1)
    else:
        second = np.array([i for i, name in enumerate(place.selectors) if name == baseline], dtype=int)
        first = np.setdiff1d(np.arange(count), second) if len(second) else second
        second = np.repeat(second, len(first))
    apart = place.pcc[first] - place.pcc[second]  # (pairs, units, folds, seeds)
    shared = np.isfinite(apart).any((1, 2, 3))
    first, second, apart = first[shared], second[shared], apart[shared]
    if not len(first):
        return pd.DataFrame()
    by_seed = mean_present(apart, 2)  # (pairs, units, seeds)
    by_unit = mean_present(by_seed, 2)
    units = np.isfinite(by_unit).sum(1)
    difference = mean_present(by_unit, 1)
    low, high = interval(by_seed, resamples=resamples, seed=seed)
    p, least = sign_flip(by_unit, resamples=resamples, seed=seed)
    names = np.asarray(place.selectors, dtype=object)
    with_bound = (names[first] == BOUND) | (names[second] == BOUND)
    holm, family = np.empty(len(p)), np.empty(len(p), dtype=int)
    for own in (with_bound, ~with_bound):
        if own.any():
            holm[own], family[own] = holm_corrected(p[own]), own.sum()
    overlap = 0.0 if place.resampled else float(place.overlap.mean())
    above, within, below = _probabilities(by_unit, overlap, rope)
    seeds = np.isfinite(apart).any((1, 2)).sum(1)
    frame = pd.DataFrame(
        {
            "a": names[first],
            "b": names[second],
            "units": units,
            "folds": np.isfinite(apart).any(3).sum((1, 2)),
            "seeds": seeds,
            "difference": difference,
            "low": low,
            "high": high,
            "p": p,
            "p_corrected": _corrected(apart, by_unit, place),
            "p_holm": holm,
            "least_p": least,
            "effect": _effect(by_unit),
            "superiority": above,
            "equivalence": within,
            "inferiority": below,
            "verdict": "undecided",
        }
    )
    frame.loc[(holm <= ALPHA) & (low > 0), "verdict"] = "better"
    frame.loc[(holm <= ALPHA) & (high < 0), "verdict"] = "worse"
    frame.loc[(low > -rope) & (high < rope), "verdict"] = "equivalent"
    frame.loc[(least * family > ALPHA) | (seeds < FEW_SEEDS), "verdict"] = TOO_FEW
    if baseline is None:
        frame = pd.concat([frame, _mirrored(frame)]).sort_values(["a", "b"], kind="stable")
    return pd.concat([pd.DataFrame([place.key] * len(frame), columns=PLACE, index=frame.index), frame], axis=1)


def _corrected(apart: np.ndarray, by_unit: np.ndarray, place: _Place) -> np.ndarray:
    if place.resampled:
        return corrected_t(apart, place.overlap)
    return corrected_t(by_unit[:, None, :, None], np.array([place.overlap.mean()]))


def _mirrored(frame: pd.DataFrame) -> pd.DataFrame:
    """The same pairs the other way round."""
    turned = frame.rename(
        columns={"a": "b", "b": "a", "low": "high", "high": "low", "superiority": "inferiority"}
        | {"inferiority": "superiority"}
    )
    turned[["difference", "low", "high", "effect"]] *= -1
    turned["verdict"] = turned["verdict"].replace({"better": "worse", "worse": "better"})
    return turned[frame.columns]


def holm_corrected(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of the p of one family: (n,) -> (n,).

    As statsmodels' `multipletests`, which collects all garbage of the process at every call.
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected


def interval(values: np.ndarray, *, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over units, by drawing units and seeds.

    Args:
        values: (rows, units, seeds), NaN where there is none. Rows that have the same ones see the same draws.
        resamples: how often.
        seed: of the draws.

    Returns:
        low, high: (rows,) each; NaN where there is neither a second unit nor a second seed.
    """
    low, high = np.full((2, len(values)), np.nan)
    flat = np.nan_to_num(values.reshape(len(values), -1))
    for rows, present in _patterns(np.isfinite(values)):
        if present.sum() < 2:
            continue
        n = present.any(1).sum() if present.any(1).sum() > 1 else present.sum()
        # Plain percentiles are too narrow for few units: by √((n − 1)/n), and as the normal is beside t. Hesterberg
        # (2015, The American Statistician 69, 371-386): "expanded percentile".
        level = stats.norm.cdf(stats.t.ppf(ALPHA / 2, n - 1) * np.sqrt(n / (n - 1)))
        weights = _draws(present, resamples, np.random.default_rng(seed_for(seed, "statistics", "bootstrap")))
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            low[some], high[some] = np.quantile(flat[some] @ weights.T, [level, 1 - level], axis=1)
    return low, high


def _draws(present: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Weight of each (unit, seed) in each resample: (resamples, units × seeds); each row sums to 1.

    Seeds are drawn once for all units, because all units of a seed start from the same weights: the pigeonhole
    bootstrap of Owen (2007, Annals of Applied Statistics 1, 386-411). A unit without a drawn seed takes no part.

    Args:
        present: (units, seeds) bool.
        resamples: how often; others stand in for those that drew nothing.
        rng: for the draws.
    """
    drawn_units, drawn_seeds = np.zeros((resamples, len(present))), np.zeros((resamples, present.shape[1]))
    for drawn, there in ((drawn_units, present.any(1)), (drawn_seeds, present.any(0))):
        n = there.sum()
        drawn[:, there] = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    weight = drawn_seeds[:, None, :] * present
    total = weight.sum(2)  # (resamples, units)
    share = drawn_units * (total > 0)
    share = share / np.maximum(share.sum(1, keepdims=True), 1)
    weight = (weight * (share / np.maximum(total, 1))[..., None]).reshape(resamples, -1)
    some = np.flatnonzero(share.any(1))
    return np.asarray(weight[some[np.arange(resamples) % len(some)]])


def sign_flip(values: np.ndarray, *, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided sign-flip test that the mean of each row is 0, and the smallest p that the row allows.

    Exact up to 13 units: the share of all flips whose mean is at least as far from 0. Above, the same of random flips,
    the observed one counted in (Phipson and Smyth 2010).

    Args:
        values: (rows, units), NaN where there is none.
        resamples: random flips above 13 units.
        seed: of those.

    Returns:
        p, least: (rows,) each.
    """
    p, least = np.full((2, len(values)), np.nan)
    for rows, present in _patterns(np.isfinite(values)):
        own = values[np.ix_(rows, np.flatnonzero(present))]
        n = own.shape[1]
        if n == 0:
            continue
        if n <= EXACT:  # a flip and its opposite are equally far from 0: half of them are enough
            signs = 1 - 2 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
        else:
            rng = np.random.default_rng(seed_for(seed, "statistics", "sign flip"))
            signs = 1 - 2 * rng.integers(2, size=(resamples, n))
        extra = int(n > EXACT)
        observed = np.abs(own.sum(1))
        tolerance = 1e-12 * np.abs(own).sum(1)  # equal sums in another order
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            far = np.abs(own[part] @ signs.T) >= (observed - tolerance)[part, None]
            p[rows[part]] = (far.sum(1) + extra) / (len(signs) + extra)
        least[rows] = max(1 / (len(signs) + extra), 2.0 ** (1 - n))
    return p, least


def corrected_t(values: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Two-sided p of the corrected resampled t (Nadeau and Bengio 2003) that the mean of each row is 0.

    Args:
        values: (rows, groups, folds, seeds), NaN where there is none; the variance is taken within each group, where it
            counts 1/n + overlap times, and the groups are averaged (degrees of freedom: Satterthwaite).
        overlap: (groups,) test / training spots.

    Returns:
        (rows,); NaN where a group has one value only.
    """
    count = np.isfinite(values).sum((2, 3))
    here = count > 0
    mean = mean_present(values, (2, 3))
    spread = np.nansum((values - mean[..., None, None]) ** 2, (2, 3)) / np.where(count > 1, count - 1, np.nan)
    variance = np.where(here, (1 / np.maximum(count, 1) + overlap) * spread, 0)
    total = np.where(here, mean, 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variance.sum(1) ** 2 / np.where(here, variance**2 / (count - 1), 0).sum(1)
        p = 2 * stats.t.sf(np.abs(total) / np.sqrt(variance.sum(1)), freedom)
    certain = variance.sum(1) == 0  # all values equal
    return np.where(certain, np.where(total == 0, 1.0, 0.0), p)


def _effect(by_unit: np.ndarray) -> np.ndarray:
    """Paired d with Hedges' exact small-sample factor (Hedges 1981); 0 where nothing differs."""
    n, mean, deviation = _moments(by_unit)
    half = np.maximum(n - 1, 1) / 2
    factor = np.where(n > 2, np.exp(gammaln(half) - gammaln(np.maximum(half - 0.5, 0.5))) / np.sqrt(half), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((mean == 0) & (deviation == 0), 0.0, factor * mean / np.where(deviation > 0, deviation, np.nan))


def _probabilities(by_unit: np.ndarray, overlap: float, rope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Above rope, within, below −rope: posterior of the mean by the correlated Bayesian t-test, flat prior.

    Benavoli, Corani, Demšar and Zaffalon (2017), Journal of Machine Learning Research 18(77), section 3.1, with
    ρ/(1 − ρ) = test / training spots.
    """
    n, mean, deviation = _moments(by_unit)
    scale = deviation * np.sqrt(1 / n + overlap)
    some_scale = np.maximum(scale, np.finfo(float).smallest_normal)  # of equal units: all mass at their value
    posterior = stats.t(np.maximum(n - 1, 1), mean, some_scale)
    above, below = posterior.sf(rope), posterior.cdf(-rope)
    some = np.where(n > 1, 1.0, np.nan)
    return above * some, (1 - above - below) * some, below * some


def _moments(by_unit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number, mean and sample standard deviation (NaN for one) of each row."""
    n, mean = np.isfinite(by_unit).sum(1), mean_present(by_unit, 1)
    squares = np.nansum((by_unit - mean[:, None]) ** 2, 1)
    return n, mean, np.sqrt(squares / np.where(n > 1, n - 1, np.nan))


def mean_present(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of those that are there; NaN where none is."""
    count = np.isfinite(values).sum(axis)
    mean: np.ndarray = np.nansum(values, axis) / np.where(count > 0, count, np.nan)
    return mean


def _patterns(present: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that have the same values present, and which: (rows, ...) -> (some rows, (...))."""
    patterns, of_row = np.unique(present.reshape(len(present), -1), axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        if pattern.any():
            yield np.flatnonzero(of_row.ravel() == index), pattern.reshape(present.shape[1:])


def ranks(cells: pd.DataFrame, *, resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Mean rank of each selector over datasets, 1 = best.

    Of the selectors that have been run on all datasets on which any two were; the bound of planted data is none.

    Args:
        cells: `Gathered.cells`; those of wrong images or without a PCC are left out.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row per evaluation, backbone, preset, tuning and selector: datasets; mean_rank; low, high: 95 % bootstrap
        interval over datasets, units and seeds.

        `attrs["tests"]` maps each (evaluation, backbone, preset, tuning) to the Friedman test over datasets: statistic,
        p, critical_difference (Nemenyi, .05), blocks; NaN for fewer than two datasets, and of the test for fewer than
        three selectors. Where there is one such place only, attrs has the four themselves too.
    """
    rows: list[dict[str, Any]] = []
    tests: dict[tuple[Any, ...], dict[str, float]] = {}
    for key, members in _across(cells):
        names, scores = _per_dataset(members)
        if not scores:
            continue
        by_dataset = stats.rankdata([-mean_present(mean_present(s, 2), 1) for s in scores], axis=1)
        tests[key] = _friedman(by_dataset)
        rng = np.random.default_rng(seed_for(seed, "statistics", "ranks"))
        drawn = np.stack([stats.rankdata(-_resampled(s, resamples, rng), axis=1) for s in scores])
        pick = rng.integers(len(scores), size=(len(scores), resamples))  # datasets, each with draws of its own
        order = rng.permuted(np.tile(np.arange(resamples), (len(scores), 1)), axis=1)
        low, high = np.quantile(drawn[pick, order].mean(0), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
        for i, name in enumerate(names):
            rows.append(
                {
                    **dict(zip(ACROSS, key, strict=True)),
                    "selector": name,
                    "datasets": len(scores),
                    "mean_rank": by_dataset[:, i].mean(),
                    "low": low[i],
                    "high": high[i],
                }
            )
    frame = pd.DataFrame(rows, columns=[*ACROSS, "selector", "datasets", "mean_rank", "low", "high"])
    frame.attrs["tests"] = tests
    if len(tests) == 1:
        frame.attrs |= next(iter(tests.values()))
    return frame


def improvement(
    cells: pd.DataFrame, *, baseline: str = BASELINE, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Average relative improvement over the baseline: mean over datasets of (PCC − baseline's) / baseline's.

    As Δ of multi-task learning (Maninis et al. 2019). A dataset counts for a selector where both have been run; where
    the baseline's mean PCC is not above 0 nothing is relative to it, and the result is NaN.

    Returns:
        One row per evaluation, backbone, preset, tuning and selector other than the baseline: datasets; improvement (a
        fraction: 0.1 is 10 %); low, high: 95 % bootstrap interval over datasets, units and seeds.
    """
    rows = []
    for key, members in _across(cells):
        places = [place for place in _places(members) if baseline in place.selectors]
        for name in sorted(set().union(*(place.selectors for place in places)) - {baseline}):
            both = [
                _shared(place.pcc[[place.selectors.index(name), place.selectors.index(baseline)]])
                for place in places
                if name in place.selectors
            ]
            both = [s for s in both if len(s)]
            if not both:
                continue
            found = np.array([_relative(mean_present(mean_present(s, 2), 1)[None])[0] for s in both])
            rng = np.random.default_rng(seed_for(seed, "statistics", "improvement"))
            drawn = np.stack([_relative(_resampled(s, resamples, rng)) for s in both])
            pick = rng.integers(len(both), size=(len(both), resamples))
            order = rng.permuted(np.tile(np.arange(resamples), (len(both), 1)), axis=1)
            low, high = np.quantile(drawn[pick, order].mean(0), [ALPHA / 2, 1 - ALPHA / 2])
            rows.append(
                {
                    **dict(zip(ACROSS, key, strict=True)),
                    "selector": name,
                    "datasets": len(both),
                    "improvement": found.mean(),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows, columns=[*ACROSS, "selector", "datasets", "improvement", "low", "high"])


def _across(cells: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Cells of methods that may be compared over datasets."""
    members = _methods(cells)
    yield from members[members["selector"] != BOUND].groupby(ACROSS, sort=True)


def _per_dataset(cells: pd.DataFrame) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Selectors that every dataset has, and of each dataset their PCC: (selectors, units, seeds) on what all share."""
    places = [place for place in _places(cells) if len(place.selectors) > 1]
    if not places:
        return (), []
    names = tuple(sorted(set.intersection(*(set(place.selectors) for place in places))))
    if len(names) < 2:
        return names, []
    chosen = [_shared(place.pcc[[place.selectors.index(name) for name in names]]) for place in places]
    return names, [s for s in chosen if len(s)]


def _shared(pcc: np.ndarray) -> np.ndarray:
    """(selectors, units, folds, seeds) -> (selectors, units, seeds) of the cells that all have; empty without."""
    common = np.where(np.isfinite(pcc).all(0), pcc, np.nan)
    return mean_present(common, 2) if np.isfinite(common).any() else common[:0, :, 0]


def _resampled(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means over units, resampled alike for all rows: (rows, units, seeds) -> (resamples, rows)."""
    present = np.isfinite(values[0])
    means: np.ndarray = _draws(present, resamples, rng) @ np.nan_to_num(values.reshape(len(values), -1)).T
    return means


def _relative(means: np.ndarray) -> np.ndarray:
    """(n, [selector, baseline]) -> (n,) relative to the baseline, NaN where that is not above 0."""
    own, base = means.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, (own - base) / base, np.nan)


def _friedman(by_dataset: np.ndarray) -> dict[str, float]:
    """Friedman test and Nemenyi's critical difference (Demšar 2006) of ranks (datasets, selectors)."""
    blocks, k = by_dataset.shape
    found = {"statistic": np.nan, "p": np.nan, "critical_difference": np.nan, "blocks": blocks}
    if blocks > 1 and k > 1:
        width = stats.studentized_range.ppf(1 - ALPHA, k, np.inf) / np.sqrt(2)
        found["critical_difference"] = float(width * np.sqrt(k * (k + 1) / (6 * blocks)))
    if blocks > 1 and k > 2 and (by_dataset != by_dataset[:, :1]).any():
        found["statistic"], found["p"] = map(float, stats.friedmanchisquare(*by_dataset.T))
    return found


def cautions(cells: pd.DataFrame) -> list[str]:
    """What a reader must know before believing a comparison, one sentence each."""
    return [f"{_where(place)}: {caution}" for place in _places(cells) for caution in _cautions(place)]


def _cautions(place: _Place) -> Iterator[str]:
    if len(place.selectors) < 2:
        return
    there = np.isfinite(place.pcc)
    _, units, _, seeds = there.shape
    unit = "section" if place.resampled else "fold"
    others = sum(name != BOUND for name in place.selectors) - 1
    least = 2.0 ** (1 - units)
    if seeds < FEW_SEEDS:
        yield (
            f"{_count(seeds, 'seed')}; with fewer than {FEW_SEEDS} a selector cannot be told from the luck of its "
            "start, so none is called better or worse"
        )
    if least > ALPHA:
        yield (
            f"{_count(units, f'tested {unit}')}; no sign flip of so few falls below p = {least:.3g}, so none is "
            f"called better or worse ({FEW_UNITS} are needed for .05, more for many selectors)"
        )
    elif least * others > ALPHA:
        yield (
            f"{_count(units, f'tested {unit}')}; corrected for comparing {others} selectors with one, no p falls below "
            f"{min(1, least * others):.2g}, so none is called better or worse"
        )
    if not place.resampled and units > 1:
        yield "the folds share training sections, for which p_corrected allows, but neither p nor the interval does"
    if BASELINE in place.selectors and (moved := _moved_by_seeds(place)):
        yield (
            f"a seed moves {', '.join(moved)} against {BASELINE} alike on all {unit}s, for which p does not allow and "
            "the interval does: more seeds are needed"
        )
    full = there.any(0).sum()
    own = dict(zip(place.selectors, there.sum((1, 2, 3)), strict=True))
    if missing := [f"{name} {full - count} of {full}" for name, count in own.items() if count < full]:
        yield f"cells (fold × seed) are missing: {', '.join(missing)}"


def _moved_by_seeds(place: _Place) -> list[str]:
    """Selectors whose difference to the baseline depends on the seed, at .05 after Holm's correction."""
    others = [i for i, name in enumerate(place.selectors) if name not in (BASELINE, BOUND)]
    apart = mean_present(place.pcc[others] - place.pcc[place.selectors.index(BASELINE)], 2)
    p = seed_effect(apart)
    told = np.flatnonzero(np.isfinite(p))
    return [place.selectors[others[i]] for i in told[holm_corrected(p[told]) <= ALPHA]]


def seed_effect(values: np.ndarray) -> np.ndarray:
    """p that seeds have no effect common to all units: F of a two-way analysis of variance without repetition.

    Args:
        values: (rows, units, seeds).

    Returns:
        (rows,); NaN where a cell is missing, and with fewer than two units or seeds.
    """
    _, units, seeds = values.shape
    if units < 2 or seeds < 2:
        return np.full(len(values), np.nan)
    of_seed, of_unit = values.mean(1, keepdims=True), values.mean(2, keepdims=True)
    rest = values - of_seed - of_unit + values.mean((1, 2), keepdims=True)
    freedom = (units - 1) * (seeds - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = units * of_seed[:, 0].var(1, ddof=1) / ((rest**2).sum((1, 2)) / freedom)
    return np.asarray(stats.f.sf(ratio, seeds - 1, freedom))


def _where(place: _Place) -> str:
    dataset, evaluation, backbone, preset, tuning = place.key
    tuned = f", {tuning}" if tuning else ""
    return f"{dataset}, {evaluation}-batch, backbone {backbone}, {preset}{tuned}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
