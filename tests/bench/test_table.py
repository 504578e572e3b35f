"""Means, spreads and paired differences."""

import json
import statistics
from dataclasses import replace

import pytest

from agl_bench.bench.spec import Tuning
from agl_bench.bench.table import as_json, spread, summarise


@pytest.fixture
def results(make_result):
    pcc = {"pgl": (0.1, 0.3, 0.2), "agl": (0.2, 0.2, 0.5)}
    units = (("D1", 0), ("D2", 0), ("D1", 1))
    return [
        make_result(name, fold, seed, value, selected=(1, 7, 9), best=1, seconds=2.0)
        for (fold, seed), *values in zip(units, *pcc.values(), strict=True)
        for name, value in zip(pcc, values, strict=True)
    ]


def test_means_and_paired_differences(results):
    pgl, agl = summarise(results)
    assert (pgl.selector, agl.selector) == ("pgl", "agl")
    assert (agl.dataset, agl.evaluation, agl.backbone) == ("synthetic", "inter", "tiny")
    assert agl.units == [("D1", 0), ("D2", 0), ("D1", 1)]
    assert agl.pcc == [0.2, 0.2, 0.5]
    assert agl.difference == pytest.approx([0.1, -0.1, 0.3])
    assert pgl.difference == [0, 0, 0]
    assert agl.selected == [7, 7, 7]
    assert agl.seconds == [2.0, 2.0, 2.0]


def test_pairs_do_not_depend_on_the_order(results):
    assert sorted(summarise(results[::-1])[0].difference) == pytest.approx([-0.1, 0.1, 0.3])


def test_difference_is_over_what_the_baseline_has_too(results):
    lacking = [r for r in results if (r.spec.selector.name, r.spec.fold) != ("pgl", "D2")]
    agl = next(s for s in summarise(lacking) if s.selector == "agl")
    assert agl.difference == pytest.approx([0.1, 0.3])
    alone = [r for r in results if r.spec.selector.name == "agl"]
    line = next(line for line in as_json(alone)["lines"] if line["selector"] == "agl")
    assert line["difference_to_baseline_mean"] is None
    assert line["difference_to_baseline_sd"] is None


def test_baseline_may_have_more_cells(results):
    fewer = [r for r in results if (r.spec.selector.name, r.spec.seed) != ("agl", 1)]
    assert next(s for s in summarise(fewer) if s.selector == "agl").difference == pytest.approx([0.1, -0.1])


def test_tuned_and_fixed_cells_never_mix(results):
    tuning = Tuning(40, 40, "study", 0.5, ("agl.rate", "protocol.patience"))
    settings = {"agl.rate": 0.1, "protocol.patience": 7}

    def tuned(result):
        part = replace(result.spec.selector, settings={"rate": settings["agl.rate"]})
        protocol = replace(result.spec.protocol, patience=settings["protocol.patience"])
        spec = replace(result.spec, selector=part, protocol=protocol, tuning=tuning)
        return replace(result, spec=spec, scores=result.scores | {"pcc_gene_mean_section_mean": 0.9})

    both = [*results, *(tuned(r) for r in results if r.spec.selector.name == "agl")]
    summaries = summarise(both)
    assert [(s.selector, s.tuning) for s in summaries] == [("pgl", ""), ("agl", ""), ("agl", "tuned (40 trials)")]
    assert summaries[:2] == summarise(results)
    assert summaries[2].pcc == [0.9] * 3
    assert summaries[2].difference == []  # a tuned selector is not compared with a fixed baseline
    *fixed, line = as_json(both)["lines"]
    assert [f["tuning"] for f in fixed] == [None, None]
    assert line["tuning"]["trials"] == 40 and line["tuning"]["settings"] == settings
    assert line["pcc_mean"] == pytest.approx(0.9)
    assert [c["tuning"]["settings"] for c in line["cells"]] == [settings] * 3
    spec = both[-1].spec
    both[-1] = replace(both[-1], spec=replace(spec, tuning=replace(tuning, study="of its fold", validation_pcc=0.6)))
    shared = as_json(both)["lines"][-1]["tuning"]
    assert shared == {k: v for k, v in line["tuning"].items() if k not in ("study", "validation_pcc")}


def test_spread_is_that_of_a_sample():
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
    assert spread([1.0]) is None
    assert spread([]) is None


def test_json(results):
    content = json.loads(json.dumps(as_json(results), allow_nan=False))
    agl = content["lines"][1]
    assert agl["pcc_mean"] == pytest.approx(0.3)
    assert agl["pcc_sd"] == pytest.approx(statistics.stdev([0.2, 0.2, 0.5]))
    assert agl["difference_to_baseline_mean"] == pytest.approx(0.1)
    assert agl["difference_to_baseline_sd"] == pytest.approx(0.2)
    assert agl["selected_mean"] == 7
    assert agl["seconds_total"] == 6
    assert [(c["fold"], c["seed"], c["scores"]["pcc_gene_mean_section_mean"]) for c in agl["cells"]] == [
        ("D1", 0, 0.2), ("D2", 0, 0.2), ("D1", 1, 0.5)
    ]  # fmt: skip
    assert len({c["key"] for line in content["lines"] for c in line["cells"]}) == 6
    assert content["protocol"]["epochs"] == 3
    assert as_json([])["lines"] == []


def test_json_has_no_nan(make_result):
    content = as_json([make_result(pcc=float("nan"))])
    assert json.loads(json.dumps(content, allow_nan=False))["lines"]
