"""Every benchmark runs, at sizes that measure nothing, and prints its table. No test looks at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {  # what the table must show
    "speed_loss": ["quantity", "both_ratio_naive", "error_fused_64"],
    "speed_data": ["spots_per_s", "AnnData and Pillow", "store: CSR, patches on the host"],
    "speed_hypergradient": ["peak_MiB", "plain, unfused", "forward late, SGD", "classical", "implicit 5"],
    "speed_epoch": ["look_ahead_ratio", "agl", "hvg_k 1000", "dkgsb, preset paper", "amal", "other.py", "1,234"],
    "leaks": ["ranking on all spots", "random folds", "shared validation", "all three", "interval"],
    "prepare": ["prepare_s", "trusted_s", "peak_MiB", "tiles", "jpeg"],
    "inference": ["Learned null", "false: sign flip", "d = 1.5", "called equivalent at the edge"],
    "large": ["not zero", "Mapped", "anon_MiB", "hvg_k"],
    "executors": ["overhead_ms", "speed_up", "serial", "local", "True"],
    "planted": ["best k of the sweep is at k* =", "pgl, k = 0 > agl, k = all", "amal ≤ pgl, k = 0", "Regime harmful"],
    "priors": ["hvg_k, seurat_v3", "Δ random", "shared", "Planted, misleading", "oracle"],
    "primary_genes": ["seurat, winsorised", "carried, before", "of the first k* auxiliary genes", "shuffled patches"],
    "campaign": ["lost cells", "JSON table, the same", "12 cells, ", "where it hit"],
    "report": ["gather_s", "report_s", "page_MiB"],
    "agreement": ["compared with all", "next batch", "features"],
    "zoo": ["epoch / agl", "harmful Δ pgl", "oracle"],
    "reliability_plugins": ["Wrong plug-ins", "selector: the process", "others harmed"],
    "reliability_files": ["Bad files", "image", "silently wrong"],
    "reliability_invocations": ["Bad invocations", "tried", "silently wrong"],
    "reliability_damage": ["Damaged files", "result.json of a cell", "tables of a cell", "silently wrong"],
    "scaling": ["store_MiB", "train_s", "dkgsb", "time_slope"],
}

# Stands for another implementation: looks at the data that it is given, and says how long it took.
OTHER = """
import json, pathlib, sys, numpy as np
from scipy import sparse
folder = pathlib.Path(sys.argv[1])
cell, settings = np.load(folder / 'cell.npz'), json.loads((folder / 'settings.json').read_text())
expression = sparse.csr_matrix((cell['data'], cell['indices'], cell['indptr']), shape=cell['shape'])
rows = np.concatenate([cell[k] for k in ('train', 'held_out', 'validation', 'test')])
assert (np.sort(rows) == np.arange(len(cell['patches']))).all() and expression.shape[0] == len(rows)
assert expression.shape[1] == len(cell['genes']) == len(cell['rank'])
assert ((cell['rank'] < 0) == cell['primary']).all() and settings['outer_steps']['dkgsb, preset paper'] == 2
print(json.dumps({'seconds_per_epoch': 1234.0}))
"""


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", FOLDER / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_prints_its_table(script: str, tmp_path: Path):
    other = tmp_path / "other.py"
    other.write_text(OTHER, encoding="utf-8")
    options = ["--reference", str(other)] if script == "speed_epoch" else []
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--device", "cpu", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 threads, device cpu, torch" in done.stdout
    for text in SCRIPTS[script]:
        assert text in done.stdout


def test_a_table_aligns_its_columns(measure: ModuleType):
    rows = [{"what": "a", "n": 15_000, "s": 0.01234}, {"what": "longer", "s": 123.4, "more": None}]
    assert measure.table(rows).splitlines() == [
        "what         n       s  more",
        "a       15,000  0.0123     –",
        "longer       –     123     –",
    ]
    assert measure.table(rows, markdown=True).splitlines()[1] == "| ------ | -----: | -----: | ---: |"


def test_functions_take_turns(measure: ModuleType):
    order: list[str] = []
    seconds = measure.alternate({n: lambda n=n: order.append(n) for n in "ab"}, 2)
    assert order == list("ababab")
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_a_peak_counts_from_where_it_begins(measure: ModuleType):
    most = measure.Peak(torch.device("cpu"))
    torch.ones(32 * 2**20)
    assert 100 < most.mib() < 400


def test_results_are_kept_by_machine(measure: ModuleType, tmp_path: Path):
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        path = measure.save(name, [{"value": value}], folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert {k: v["rows"][0]["value"] for k, v in kept.items()} == {"one": 3, "two": 2}
    assert {"processor", "threads", "torch", "commit"} <= set(kept["one"]["machine"])


def test_results_are_the_same_bit_for_bit():
    spec = importlib.util.spec_from_file_location("same_results", FOLDER / "same_results.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def cell(weight: float = 0.0, score: float = 0.5, gene: str = "A", dtype: str = "float64"):
        return {"scores": {"pcc": score}}, pd.DataFrame({"gene": [gene, "B"], "w": pd.Series([weight, 1], dtype=dtype)})

    assert script.is_same(cell(), cell()) and script.is_same(cell(float("nan")), cell(float("nan")))
    for other in (cell(-0.0), cell(5e-324), cell(score=0.5000000000000001), cell(gene="C"), cell(dtype="float32")):
        assert not script.is_same(cell(), other)
