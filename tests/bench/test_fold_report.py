"""What is told, stored and compared of folds."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.fold_report import FoldReport, fold_line, report_folds
from agl_bench.bench.leases import Owner
from agl_bench.digests import text_digest
from agl_bench.errors import BadSpec
from agl_bench.protocol import Protocol
from agl_bench_plugins.datasets.synthetic import Synthetic


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    few = Synthetic(sections=2, spots=80, markers=5, helpful_genes=15, harmful_genes=10, useless_genes=10, patch_px=16)
    return few.load(tmp_path_factory.mktemp("nothing"))


LOOSE = Protocol(min_genes_per_spot=0, spot_mads=0, folds=3)


def report(sections, protocol=LOOSE, evaluations=("intra", "inter"), seeds=(0,)):
    return list(report_folds(sections, protocol, dataset="toy", evaluations=evaluations, seeds=seeds))


def test_every_fold_is_reported(sections):
    reports = report(sections, seeds=(0, 1))
    assert len(reports) == 2 * (2 * 3 + 2)
    for one in reports:
        lines = pd.read_csv(io.StringIO(one.csv))
        sizes = lines["set"].value_counts()
        for name in ("train", "held_out", "validation", "test"):
            assert sizes[name] == one.counts[f"{name}_spots"]
        assert one.record["digest"] == text_digest(one.csv)
        assert set(lines["fold"]) == {one.label}
        taken = 80 * (1 if one.evaluation == "intra" else 2)
        assert len(lines) + one.counts["buffer_spots"] == taken and one.counts["unlisted_spots"] == 0
        if one.evaluation == "inter":
            assert (one.record["nearest_um"], one.record["median_um"], one.record["overlapping"]) == (None, None, 0)
        else:
            assert one.record["median_um"] >= one.record["nearest_um"] >= LOOSE.buffer
    assert len({one.record["digest"] for one in reports}) == len(reports)
    assert [one.record for one in report(sections)] == [one.record for one in reports if one.seed == 0]


@pytest.mark.parametrize("genes_from", ["training", "all"])
def test_folds_are_those_of_a_run_where_sections_have_different_genes(genes_from, sections, grid):
    """The panel of genes decides which spots have enough of them, and with it the fold."""
    few = ["protocol.min_genes_per_spot=55", f"protocol.genes_from={genes_from}", "synthetic.spots=80"]
    cells, bench = grid("pgl", more=few)
    fewer = [replace(s, counts=s.counts[:, 15 * i :]) for i, s in enumerate(bench.sections(cells[0][0].dataset))]
    bench._sections = (cells[0][0].dataset, fewer)
    protocol = cells[0][0].protocol
    reports = report(fewer, protocol, evaluations=("inter",))
    assert [one.record for one in reports] == [bench.setting(spec, plan).report.record for spec, plan in cells]
    assert sum(one.counts["test_spots"] for one in reports) < 160


def test_one_section_has_folds_within_only(sections):
    assert {one.evaluation for one in report(sections[:1])} == {"intra"}
    with pytest.raises(BadSpec, match="at least two sections"):
        report(sections[:1], evaluations=("inter",))


def test_the_csv_of_all_folds_makes_them_again(sections, tmp_path):
    before = report(sections)
    path = tmp_path / "folds.csv"
    path.write_text(before[0].csv + "".join(one.csv.partition("\n")[2] for one in before[1:]))
    after = report(sections, Protocol(min_genes_per_spot=0, spot_mads=0, fold_file=str(path)))
    assert [(one.label, one.evaluation) for one in after] == [(one.label, one.evaluation) for one in before]
    assert [one.record for one in after] == [one.record for one in before]
    assert [one.csv for one in after] == [one.csv for one in before]


def fold(digest, sizes, nearest=None, median=None, overlapping=0):
    names = ("train", "held_out", "validation", "test", "buffer", "unlisted")
    counts = {f"{name}_spots": size for name, size in zip(names, sizes, strict=True)}
    return counts, {"digest": digest, "nearest_um": nearest, "median_um": median, "overlapping": overlapping}


def test_one_line_about_the_folds():
    within = [
        fold("a", (1000, 20, 30, 40, 5, 0), 208.2, 300.0),
        fold("b", (900, 20, 31, 40, 0, 2), 112.0, 400.0, 3),
        fold("a", (1000, 20, 30, 40, 5, 0), 208.2, 300.0),
    ]
    assert fold_line(within) == (
        "2 folds of 900–1,000 train, 20 held-out, 30–31 validation, 40 test spots, 0–5 within the buffer, 0–2 in "
        "no set; test spots lie ≥ 112 µm from training spots (median 350 µm); 3 of 80 test patches overlap a training "
        "patch"
    )
    across = [fold("c", (50, 0, 10, 40, 0, 0))]
    assert fold_line(across) == (
        "1 fold of 50 train, 0 held-out, 10 validation, 40 test spots (the outer loss uses the validation spots); "
        "no section is both trained on and tested"
    )


def test_a_fold_is_stored_once_under_its_digest(sections, tmp_path):
    store = CellStore(tmp_path)
    one = report(sections, evaluations=("inter",))[0]
    assert isinstance(one, FoldReport)
    for _ in range(2):
        store.keep_fold(one.csv)
        (path,) = (tmp_path / "folds").iterdir()
    assert path.name == f"{one.record['digest']}.csv"
    assert text_digest(path.read_text()) == one.record["digest"]
    first = path.stat().st_mtime_ns
    store.keep_fold(one.csv)
    assert path.stat().st_mtime_ns == first


def test_a_half_written_fold_is_swept(tmp_path):
    CellStore(tmp_path)
    gone = replace(Owner.this(), pid=99_999_999)  # above any system's largest process id
    (tmp_path / "folds" / f"abc.csv.{gone.name}").write_text("section,sp")
    (tmp_path / "folds" / "abc.csv").write_text("mine")
    CellStore(tmp_path)
    assert [path.name for path in (tmp_path / "folds").iterdir()] == ["abc.csv"]


def test_primary_genes_of_folds_are_looked_at_on_demand() -> None:
    sections = [Synthetic(sections=1, spots=150, patch_px=16).read(Path(), "S1")]
    thin = sections[0].counts.X.tolil()
    rng = np.random.default_rng(0)
    for spot in (3, 30, 60):
        thin[spot] = 0
        thin[spot, rng.choice(thin.shape[1], 60, replace=False)] = 1
    sections[0].counts.X = thin.tocsr()
    old = Protocol(folds=2, buffer_um=0, spot_mads=0, primary_score="seurat", ranking="seurat")

    def cautions(protocol: Protocol, *, genes: bool = True) -> list[str]:
        found = report_folds(sections, protocol, dataset="d", evaluations=["intra"], seeds=[0], genes=genes)
        return [caution for one in found for caution in one.cautions]

    assert cautions(old, genes=False) == []
    assert any("primary genes owe more than half of their score to 1 of" in c for c in cautions(old))
    assert cautions(Protocol(folds=2, buffer_um=0)) == []
    (one, _) = cautions(Protocol(folds=2, buffer_um=0, primary_genes=5000))
    assert one.startswith("no run is possible: protocol.primary_genes = 5000 is more than")
