"""Every command, once as meant and once with each input that a stranger gets wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse

from agl_bench.bench import checkpoints, mlflow_ui
from agl_bench.bench.leases import Leases
from agl_bench.cli import cli, main, options, running
from agl_bench.registry.plugins import Plugins

SPOTS, GENES = 36, 30
SMALL = (
    *("--preset", "smoke", "--evaluation", "inter", "--device", "cpu", "--set", "protocol.buffer_um=0"),
    *("--set", "protocol.primary_genes=4", "--set", "protocol.min_genes_per_spot=5", "--set", "tiny.patch_px=16"),
)
SYNTHETIC = (
    *("--datasets", "synthetic", "--set", "synthetic.sections=2", "--set", "synthetic.spots=30", *SMALL),
    *("--set", "synthetic.markers=4", "--set", "synthetic.helpful_genes=16", "--set", "synthetic.harmful_genes=10"),
    *("--set", "synthetic.useless_genes=10", "--set", "synthetic.patch_px=16"),
)
MINE = """
    from agl_bench import Selector, hookimpl

    class Mine(Selector):
        '''Mine alone.'''
        reference = "test"

        def forward(self, losses, step):
            return {} * losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {{"mine": Mine}}
"""


class Said:
    """How a command ended and what it said."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def is_refused(self, *words):
        """Status 2 and one sentence with these words."""
        assert self.status == 2, (self.status, self.err, self.out)
        assert "Traceback" not in self.err + self.out
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("agl-bench: ")
        for word in words:
            assert str(word) in lines[0]

    def is_usage_error(self, *words):
        """Status 2 and the usage lines of click, the last one saying what is wrong."""
        assert self.status == 2
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("Error: ")
        for word in words:
            assert word in last


@pytest.fixture
def agl(capsys, tmp_path, monkeypatch):
    """Run a command of agl-bench in an empty folder, in this process."""
    for name in ("CACHE", "DATA", "OFFLINE", "STRICT_PLUGINS", "WORK"):
        monkeypatch.delenv(f"AGL_BENCH_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def agl(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(w) for w in words])
        said = capsys.readouterr()
        return Said(caught.value.code or 0, said.out, said.err)

    yield agl
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(MINE.format(1)))
    return path


# --- run -------------------------------------------------------------------------------------------------------------


def test_run(agl, tmp_path, mine):
    words = ("run", "--selectors", "pgl,mine", "--plugin", mine, *SYNTHETIC, "--tracking", "none")
    said = agl(*words, "--json", "table.json")
    assert (said.status, said.err) == (0, "")
    assert "[4/4] synthetic · inter · tiny · mine · fold D2 · seed 0: PCC" in said.out
    assert "Δ pgl" in said.out
    assert "no ranking can be concluded" in said.out
    lines = json.loads((tmp_path / "table.json").read_text())["lines"]
    assert [line["selector"] for line in lines] == ["pgl", "mine"]
    assert len(list((tmp_path / "agl-bench-work/cells").iterdir())) == 4
    again = agl(*words)
    assert "4 cells were finished before and kept" in again.out
    assert agl(*words, "--dry-run").out.count("  done  ") == 4


DATASET = """
from pathlib import Path
from agl_bench import hookimpl
from agl_bench_plugins.datasets.synthetic import Synthetic

class Noted(Synthetic):
    "Synthetic sections that note when they are read."
    def read(self, root, name):
        with Path("reads.txt").open("a") as notes:
            notes.write(name)
        return super().read(root, name)

@hookimpl
def register_datasets():
    return {"noted": Noted}
"""


def test_again_takes_the_data_anew_where_it_is_asked_to(agl, tmp_path):
    (tmp_path / "noted.py").write_text(DATASET)
    small = [w for name in ("sections=2", "spots=40", "patch_px=16") for w in ("--set", f"noted.{name}")]
    words = ["run", "--plugin", "noted.py", "--selectors", "pgl", "--datasets", "noted", *SMALL, *small]
    words += ["--evaluation", "inter", "--fold", "D1", "--tracking", "none"]
    for again, reads in (((), "S1S2"), (("--again",), ""), (("--again=data",), "S1S2")):
        (tmp_path / "reads.txt").write_text("")
        said = agl(*words, *again)
        assert said.status == 0, said.err
        assert "[1/1]" in said.out and "finished before" not in said.out
        assert (tmp_path / "reads.txt").read_text() == reads


def test_dry_run_writes_nothing(agl, tmp_path):
    said = agl("run", "--selectors", "pgl", *SYNTHETIC, "--dry-run")
    assert (said.status, said.err) == (0, "")
    assert "2 cells, 0 finished, 2 to run; preset smoke with" in said.out
    assert list(tmp_path.iterdir()) == []


def test_config_file(agl, tmp_path):
    (tmp_path / "grid.toml").write_text('selectors = ["pgl"]\ndatasets = ["synthetic"]\nevaluation = ["inter"]\n')
    assert "3 cells" in agl("run", "--config", "grid.toml", "--dry-run").out
    assert "6 cells" in agl("run", "--config", "grid.toml", "--seeds", "0,1", "--dry-run").out
    (tmp_path / "grid.toml").write_text('selector = ["pgl"]\n')
    agl("run", "--config", "grid.toml").is_refused("grid.toml", "'selector'", "Did you mean 'selectors'?")
    agl("run", "--config", "nothing.toml").is_refused("nothing.toml", "No such file")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--selectors", "dkgbs"], ["unknown selector 'dkgbs'", "Did you mean 'dkgsb'?", "random_k", "agl-bench 0"]),
        (["--datasets", "synthetik"], ["unknown dataset 'synthetik'", "Did you mean 'synthetic'?"]),
        (["--backbone", "resnet"], ["unknown backbone 'resnet'", "Did you mean 'resnet50'?"]),
        (["--backbone", "pgl"], ["unknown backbone 'pgl'", "'pgl' is a selector"]),
        (["--evaluation", "inner"], ["unknown evaluation 'inner'", "inter, intra"]),
        (["--preset", "cleen"], ["unknown preset 'cleen'", "Did you mean 'clean'?"]),
        (["--seeds", "one"], ["seed 'one'", "--seeds 0,1,2"]),
        (["--seeds", "-1"], ["seed '-1'"]),
        (["--fold", "D9"], ["unknown fold 'D9'", "D1"]),
        (["--set", "epochs=3"], ["--set 'epochs=3'", "NAME.KEY=VALUE"]),
        (["--set", "protocol.epoch=3"], ["'epoch'", "Did you mean 'epochs'?"]),
        (["--set", "protocol.epochs=many"], ["protocol.epochs = 'many'", "a whole number"]),
        (["--set", "protocol.epochs=0"], ["protocol.epochs = '0'", "1 …"]),
        (["--set", "protocol.validation_share=0.5", "--set", "protocol.held_out_share=0.5"], ["held_out_share", "0.9"]),
        (["--json", "no/such/table.json"], ["--json no/such/table.json", "cannot be written"]),
        (["--json", "."], ["--json ."]),
        (["--plugin", "nothing.py"], ["plug-in nothing.py", "no such file"]),
        (["--tracking", "ftp://nowhere"], ["ftp://nowhere", "sqlite:///"]),
        (["--time-limit", "soon"], ["--time-limit soon is not a duration", "1h30m"]),
        (["--time-limit", "0m"], ["--time-limit 0m is not a duration"]),
        (["--backbone", "embedding"], ["section 'S1'", "embedding"]),
        (["--set", "synthetic.sections=1"], ["at least two sections", "--evaluation intra"]),
        (["--set", "protocol.primary_genes=400"], ["protocol.primary_genes = 400", "fewer primary genes"]),
        (["--evaluation", "intra", "--set", "protocol.folds=20"], ["protocol.folds = 20", "'S1'", "30 spots", "fewer"]),
        (["--set", "protocol.buffer_um=5000", "--evaluation", "intra"], ["protocol.buffer_um"]),
        (["--backbone", "timm", "--set", "timm.model=resnet1o1"], ["timm has no model 'resnet1o1'", "resnet101"]),
        (["--backbone", "resnet18", "--set", "resnet18.weights=no.pth"], ["weights 'no.pth'", "is not a file"]),
    ],
)
def test_run_refuses(agl, words, sentence, tmp_path):
    agl("run", "--selectors", "pgl", *SYNTHETIC, "--tracking", "none", *words).is_refused(*sentence)


def test_planted_data_show_the_selection_against_the_truth(agl):
    said = agl("run", *SYNTHETIC, "--selectors", "pgl,agl,oracle", "--tracking", "none")
    assert said.status == 0, said.err
    assert "selection against the planted truth" in said.out and "regret to oracle" in said.out
    lines = said.out.partition("against the planted truth")[2].splitlines()
    oracle = next(line for line in lines if "oracle" in line and "regret" not in line)
    assert oracle.count("1.00") == 2 and "+0.000" in oracle


def test_an_oracle_needs_planted_data(agl, sections):
    words = ("--datasets", "folder", "--set", "folder.path=mine", "--data", ".", *SMALL)
    said = agl("run", *words, "--selectors", "oracle")
    said.is_refused("the oracle must know which genes help", "--datasets synthetic")


@pytest.mark.parametrize("words", [[], ["--selectors", "pgl"], ["--datasets", "synthetic"]])
def test_run_needs_selectors_and_datasets(agl, words):
    agl("run", *words).is_refused("no selectors given" if "--selectors" not in words else "no datasets given", "use --")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["rum"], "Did you mean 'run'?"),
        (["run", "--selector", "pgl"], "--selectors"),
        (["run", "--device", "tpu"], "'tpu'"),
        (["run", "--checkpoint-every", "-1"], "--checkpoint-every"),
        (["run", "--checkpoint-every", "often"], "--checkpoint-every"),
        (["list", "--jason"], "--json"),
        (["show"], "NAME"),
        (["ui", "--port", "0"], "--port"),
        (["doctor", "all"], "all"),
    ],
)
def test_usage_errors(agl, words, word):
    agl(*words).is_usage_error(word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_where_there_is_none(agl):
    agl("run", "--selectors", "pgl", *SYNTHETIC, "--device", "cuda").is_refused("--device cuda", "--device cpu")


@pytest.mark.parametrize("command", [["run", "--selectors", "pgl", *SYNTHETIC, "--tracking", "none"], ["doctor"]])
def test_broken_file_is_refused(agl, tmp_path, command):
    (tmp_path / "bad.py").write_text("raise RuntimeError('on\\npurpose')")
    agl(*command, "--plugin", "bad.py").is_refused("plug-in bad.py", "RuntimeError: on purpose")


def test_run_says_what_the_folds_are(agl, tmp_path):
    words = ("run", "--selectors", "pgl", *SYNTHETIC, "--tracking", "none", "--set", "protocol.folds=2")
    said = agl(*words, "--set", "synthetic.spots=60", "--evaluation", "intra,inter")
    assert said.status == 0
    assert (
        "synthetic: 4 folds of 20 train, 4 held-out, 6 validation, 30 test spots; test spots lie ≥ 100 µm" in said.out
    )
    assert "synthetic: 2 folds of 39 train, 9 held-out, 12 validation, 60 test spots; no section is both" in said.out
    assert len(list((tmp_path / "agl-bench-work/folds").glob("*.csv"))) == 6


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("90", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h1m1s", 3661)]
)
def test_durations(text, seconds):
    assert options.seconds(text) == seconds


def test_how_often_is_the_same_everywhere():
    (option,) = (p for p in running.run.params if p.name == "checkpoint_every")
    assert option.default == checkpoints.EVERY


def test_status(agl, tmp_path):
    agl("status").is_refused("agl-bench-work is not a work folder of agl-bench", "--work")
    (tmp_path / "empty").mkdir()
    agl("status", "--work", "empty").is_refused("empty is not a work folder")
    assert agl("run", "--selectors", "pgl,agl", "--fold", "D1", *SYNTHETIC, "--tracking", "none").status == 0
    said = agl("status")
    assert (said.status, said.err) == (0, "")
    rows = [[w.strip() for w in line.split("│")[1:-1]] for line in said.out.splitlines() if "│" in line]
    assert rows[0] == ["synthetic", "inter", "tiny", "agl", "1", *["–"] * 6]
    assert rows[-1] == ["all", "", "", "", "2", *["–"] * 6]
    content = json.loads(agl("status", "--json").out)
    assert [(line["selector"], line["done"]) for line in content["lines"]] == [("agl", 1), ("pgl", 1)]
    assert content["running"] == []
    before = sorted(p for p in (tmp_path / "agl-bench-work").rglob("*"))
    agl("status")
    assert sorted(p for p in (tmp_path / "agl-bench-work").rglob("*")) == before


def test_status_says_who_runs_what(agl, tmp_path):
    work = tmp_path / "agl-bench-work"
    (work / "cells").mkdir(parents=True)
    leases = Leases(work / "leases")
    with leases.take("unknown"):
        assert f"running: unknown: before its first epoch, process {os.getpid()} on " in agl("status").out
    assert "running:" not in agl("status").out


# --- folds -----------------------------------------------------------------------------------------------------------

FOLDS = (
    *("folds", "synthetic", "--set", "synthetic.sections=2", "--set", "synthetic.spots=150"),
    *("--set", "protocol.folds=2"),
)


def test_folds(agl, tmp_path):
    said = agl(*FOLDS, "--out", "mine.csv")
    assert (said.status, said.err) == (0, "")
    for words in ("S1.0", "S2.1", "D1", "4 folds of", "2 folds of", "6 folds written to mine.csv"):
        assert words in said.out
    lines = pd.read_csv(tmp_path / "mine.csv")
    assert list(lines.columns) == ["section", "spot", "fold", "set"]
    assert lines["fold"].unique().tolist() == ["S1.0", "S1.1", "S2.0", "S2.1", "D1", "D2"]
    again = agl(*FOLDS, "--set", "protocol.fold_file=mine.csv", "--out", "again.csv")
    assert again.status == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "mine.csv").read_bytes()


def test_folds_of_some_seeds_evaluations_and_presets(agl):
    said = agl(
        *FOLDS, "--seeds", "0,7", "--evaluation", "intra", "--preset", "paper", "--set", "protocol.min_genes_per_spot=0"
    )
    assert said.status == 0
    assert "8 folds of" in said.out and "the outer loss uses the validation spots" in said.out
    assert "test patches overlap a training patch" in said.out
    assert "inter-batch" not in said.out


def test_bad_folds(agl, tmp_path):
    agl(*FOLDS, "--seeds", "0,1", "--out", "mine.csv").is_refused("--out writes the folds of one seed, there are 2")
    agl(*FOLDS, "--out", "absent/mine.csv").is_refused("absent/mine.csv", "cannot be written")
    agl("folds", "synthetik").is_refused("synthetik", "Did you mean 'synthetic'?")
    agl(*FOLDS, "--evaluation", "outer").is_refused("unknown evaluation 'outer'")
    agl(*FOLDS, "--evaluation", "").is_refused("--evaluation is empty")
    agl(*FOLDS, "--seeds", ",").is_refused("--seeds is empty")
    agl(*FOLDS, "--seeds", "x").is_refused("seed 'x' is not a whole number")
    agl(*FOLDS, "--preset", "cleen").is_refused("unknown preset 'cleen'")
    agl(*FOLDS, "--set", "protocol.fold=3").is_refused("unknown setting of protocol 'fold'")
    agl(*FOLDS, "--set", "tiny.width=3").is_refused("--set 'tiny.width=3' is about tiny, not about synthetic")
    agl(*FOLDS, "--set", "protocol.fold_file=absent.csv").is_refused("protocol.fold_file = 'absent.csv' is not a file")
    agl(*FOLDS, "--set", "protocol.folds=60").is_refused("protocol.folds = 60 leaves fewer than 3 test spots")
    (tmp_path / "mine.csv").write_text("section,spot,fold,set\nS1,nobody,a,train\nS1,x,a,test\nS1,y,a,validation\n")
    mine = (*FOLDS, "--set", "protocol.fold_file=mine.csv")
    agl(*mine).is_refused("mine.csv', fold a: spot 'nobody' is none of section 'S1' (3 such spots)")
    agl(*mine, "--evaluation", "inter").is_refused("mine.csv' has no fold for --evaluation inter")


def test_a_run_on_folds_and_genes_of_ones_own(agl, tmp_path):
    agl(*FOLDS, "--evaluation", "intra", "--out", "mine.csv")
    words = ("run", "--selectors", "pgl", *SYNTHETIC, "--set", "synthetic.spots=150", "--tracking", "none")
    words += ("--evaluation", "intra,inter", "--fold", "S1.0", "--set", "protocol.fold_file=mine.csv")
    assert agl(*words).status == 0
    (tmp_path / "genes.txt").write_text("ABSENT\n")
    agl(*words, "--set", "protocol.primary_file=genes.txt").is_refused("lacks 1 of its 1 genes, first ABSENT")
    said = agl(*words[:-4], "--set", "protocol.fold_file=mine.csv")
    assert "synthetic has no such fold in protocol.fold_file: no inter-batch evaluation of it" in said.err


# --- sections of a stranger ------------------------------------------------------------------------------------------


@pytest.fixture
def sections(tmp_path):
    """Two sound sections, A and B, as `folder` reads them. Returns a function that changes the counts of B."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.divmod(np.arange(SPOTS), 6), axis=1) * 30.0 + 20
    for name in ("A", "B"):
        folder = tmp_path / "mine" / name
        folder.mkdir(parents=True)
        table = anndata.AnnData(
            sparse.csr_matrix(rng.poisson(3, (SPOTS, GENES)).astype(np.float32)),
            obs=pd.DataFrame(index=[f"{name}{i}" for i in range(SPOTS)]),
            var=pd.DataFrame(index=[f"GENE{i}" for i in range(GENES)]),
            obsm={"spatial": grid},
            uns={"um_per_px": 1.0},
        )
        table.write_h5ad(folder / "counts.h5ad")
        Image.fromarray(rng.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(folder / "image.png")

    def change(how):
        path = tmp_path / "mine/B/counts.h5ad"
        table = anndata.read_h5ad(path)
        changed = how(table)
        table = table if changed is None else changed
        path.unlink()
        table.write_h5ad(path)

    return change


def run_folder(agl, *words):
    words = ("--tracking", "none", *SMALL, *words)
    return agl("run", "--selectors", "pgl", "--datasets", "folder", "--set", "folder.path=mine", "--data", ".", *words)


def test_own_sections(agl, sections):
    said = run_folder(agl)
    assert (said.status, said.err) == (0, "")


def count(value, row=2, column=4):
    def how(table):
        table.X = table.X.toarray()
        table.X[row, column] = value

    return how


def rename(axis, source, target):
    def how(table):
        names = getattr(table, axis).tolist()
        names[target] = names[source]
        setattr(table, axis, names)

    return how


def place(x, y):
    def how(table):
        table.obsm["spatial"][3] = (x, y)

    return how


def other_genes(table):
    table.var_names = [f"ENSG{i}" for i in range(GENES)]


def without(slot, key):
    def how(table):
        del getattr(table, slot)[key]

    return how


def text_scale(table):
    table.uns["um_per_px"] = "half"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (count(np.nan), ["'B2'", "'GENE4'", "nan", "finite"]),
        (count(np.inf), ["'B2'", "'GENE4'", "inf"]),
        (count(1.5), ["'B2'", "'GENE4'", "1.5", "not a whole number", "raw counts"]),
        (count(-1), ["'B2'", "'GENE4'", "-1", "not negative"]),
        (rename("obs_names", 1, 5), ["spot 'B1' occurs more than once", "obs_names_make_unique"]),
        (rename("var_names", 1, 5), ["gene 'GENE1' occurs more than once", "var_names_make_unique"]),
        (place(500, 20), ["spot 'B3' at x = 500, y = 20 lies outside the image", "obsm['spatial']"]),
        (place(-5, 20), ["spot 'B3' at x = -5, y = 20 has a negative coordinate"]),
        (place(np.nan, 20), ["spot 'B3' has no finite position"]),
        (other_genes, ["no gene", "'A'", "ENSG0", "GENE0", "name genes in the same way"]),
        (without("obsm", "spatial"), ["obsm['spatial'] is missing"]),
        (without("uns", "um_per_px"), ["uns['um_per_px'] is missing"]),
        (text_scale, ["uns['um_per_px']", "'half'"]),
        (lambda table: table[:0].copy(), ["no spots"]),
        (lambda table: table[:, :0].copy(), ["no genes"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_counts(agl, sections, how, words):
    sections(how)
    run_folder(agl).is_refused("section 'B'", *words)


def test_bad_image(agl, sections, tmp_path):
    path = tmp_path / "mine/B/image.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run_folder(agl).is_refused("section 'B'", path.name, "damaged or incomplete")
    path.write_text("no image")
    run_folder(agl).is_refused("section 'B'", path.name, "cannot be read as an image")


def test_bad_h5ad(agl, sections, tmp_path):
    path = tmp_path / "mine/B/counts.h5ad"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run_folder(agl).is_refused("section 'B'", path.name, "replace it")
    path.write_text("no h5ad")
    run_folder(agl).is_refused("section 'B'", path.name, "replace it")
    path.unlink()
    with h5py.File(path, "w") as file:
        file["x"] = 1
    run_folder(agl).is_refused("section 'B'", path.name)


def test_missing_files(agl, sections, tmp_path):
    (tmp_path / "mine/B/image.png").unlink()
    run_folder(agl).is_refused("'B'", "image", "agl-bench show folder")
    Image.new("RGB", (200, 200)).save(tmp_path / "mine/B/image.png")
    (tmp_path / "mine/B/counts.h5ad").unlink()
    run_folder(agl).is_refused("'B'", "counts.h5ad", "agl-bench show folder")
    run_folder(agl, "--set", "folder.sections=A,C").is_refused("'C'", "A, B")
    run_folder(agl, "--set", "folder.path=nowhere").is_refused("nowhere", "agl-bench show folder")
    run_folder(agl, "--set", "folder.path=").is_refused("folder.path=/your/folder")
    agl("run", "--selectors", "pgl", "--datasets", "her2st", "--tracking", "none").is_refused(
        "data/her2st", "AGL_BENCH_DATA"
    )
    agl("run", "--selectors", "pgl", "--datasets", "heart", "--tracking", "none").is_refused("agl-bench fetch heart")


def test_few_common_genes(agl, sections):
    sections(lambda table: table[:, :3].copy())
    run_folder(agl).is_refused("no spot has 5 detected genes", "among the 3", "protocol.min_genes_per_spot")


def test_check_own_sections(agl, sections):
    said = agl("check", "folder", "--set", "folder.path=mine", "--data", ".")
    assert said.status == 0, said.out


def test_validate(agl, sections):
    said = agl("validate", "mine")
    assert (said.status, said.err) == (0, "")
    first, *lines = said.out.splitlines()
    assert first == "read as folder"
    for name, line in zip("AB", lines, strict=True):
        assert line.startswith(f"{name}: 36 spots, 30 genes, 1 µm per pixel, donor not known, fingerprint ")
    assert agl("validate", "folder", "--set", "folder.path=mine", "--data", ".").out == said.out
    assert agl("validate", "folder:mine", "--data", ".").out.splitlines()[1:] == lines
    assert agl("validate", "mine/B").out.splitlines()[1:] == lines[1:]
    agl("validate", "mine", "--set", "hest.ids=B").is_refused("hest.ids=B", "is about hest, not about folder")
    agl("validate", "bowel_a").is_refused("TENX152", "agl-bench fetch bowel_a")
    agl("validate", "synthetic:helful").is_refused("synthetic.regime = 'helful' is not allowed")
    agl("validate", "~nobody-here/mine").is_refused("'~nobody-here/mine' is in the home folder of nobody")
    agl("validate", "folder:~nobody-here/mine").is_refused("'folder:~nobody-here/mine' cannot list its")
    agl("validate", "").is_usage_error("PATH|NAME", "it is empty")
    agl("validate", "min").is_refused("unknown dataset or path 'min'", "Known: ")
    (tmp_file := Path("text.txt")).write_text("text")
    agl("validate", tmp_file).is_refused("text.txt has no layout that is known (folder, ")


def test_one_section_under_two_names_is_told(agl, sections):
    """Its spots would stand on both sides of a fold."""
    shutil.copytree("mine/A", "mine/C")
    told = "sections 'A' and 'C' are identical, spot for spot"
    validated = agl("validate", "mine")
    described = agl("describe", "folder", "--set", "folder.path=mine", "--data", ".")
    assert validated.status == described.status == 0
    assert validated.out.count(told) == described.out.count(told) == 1
    assert run_folder(agl, "--fold", "C").err.count(f"dataset 'folder': {told}") == 1


def test_validate_tells_every_problem(agl, sections):
    def spoil(table):
        table.X.data[0] = 0.5
        table.obsm["spatial"][3] = (500, 20)

    sections(spoil)
    Path("mine/A/image.png").write_bytes(b"text")
    said = agl("validate", "mine")
    assert said.status == 2
    assert [line.partition("': ")[0] for line in said.err.splitlines()] == [
        f"agl-bench: section '{name}" for name in "ABB"
    ]
    assert said.out.splitlines() == ["read as folder", "3 problems found"]


def test_too_much_asked_of_own_sections(agl, sections):
    run_folder(agl, "--set", "protocol.primary_genes=31").is_refused("protocol.primary_genes = 31", "30 genes")
    run_folder(agl, "--evaluation", "intra", "--set", "protocol.folds=13").is_refused(
        "protocol.folds = 13", "section 'A'", "36 spots", "fewer folds"
    )
    run_folder(agl, "--set", "protocol.leave_out=donor").is_refused("two known donors", "leave_out = 'section'")


@pytest.mark.parametrize("command", ["run", "doctor", "sync", "ui"])
def test_unwritable_work_folder(agl, tmp_path, command):
    (tmp_path / "file").write_text("")
    words = ("run", "--selectors", "pgl", *SYNTHETIC, "--tracking", "none") if command == "run" else (command,)
    said = agl(*words, "--work", tmp_path / "file")
    if command == "doctor":
        assert said.status == 1
        assert "FAIL work folder: cannot write to the work folder" in said.out
    else:
        said.is_refused(tmp_path / "file", "--work")


def test_no_tracking_server(agl):
    words = ("run", "--selectors", "pgl", *SYNTHETIC, "--tracking", "http://127.0.0.1:9")
    started = time.monotonic()
    agl(*words).is_refused("http://127.0.0.1:9", "no MLflow server answers", "MLFLOW_TRACKING_URI")
    assert time.monotonic() - started < 15


# --- the other commands ----------------------------------------------------------------------------------------------


def test_list(agl, mine):
    said = agl("list", "--plugin", mine)
    assert (said.status, said.err) == (0, "")
    for word in ("selectors", "backbones", "datasets", "dkgsb", "Mine alone.", mine.name):
        assert word in said.out.replace("\n", "") or word in said.out
    entries = json.loads(agl("list", "--json").out)["entries"]
    assert {"kind": "backbone", "name": "tiny"}.items() <= next(e for e in entries if e["name"] == "tiny").items()
    agl("list", "--plugin", "nothing.py").is_refused("plug-in nothing.py: no such file")


NOTICE = """
import sys
from agl_bench.cli.opening import LoadingNotice
LoadingNotice.install()
{}
"""


@pytest.mark.parametrize(("code", "says"), [("import json", ""), ("import torch, json", "loading torch ...\n")])
def test_loading_is_announced_before_it_begins(code, says):
    done = subprocess.run([sys.executable, "-c", NOTICE.format(code)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, says)


def test_list_shows_and_strict_refuses_a_broken_plugin(tmp_path):
    (tmp_path / "stranger.py").write_text("raise RuntimeError('on purpose')")
    info = tmp_path / "stranger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[agl_bench]\nstranger = stranger\n")
    command = [sys.executable, "-c", "from agl_bench.cli import main; main()", "list"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("AGL_BENCH_STRICT_PLUGINS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stranger 1 (stranger): RuntimeError: on purpose" in done.stdout
    assert "dkgsb" in done.stdout
    strict = environment | {"AGL_BENCH_STRICT_PLUGINS": "1"}
    done = subprocess.run(command, env=strict, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "agl-bench: plug-in stranger 1 (stranger): RuntimeError: on purpose (stranger.py, line 1)\n"


@pytest.mark.parametrize("name", ["pgl", "dkgsb", "tiny", "timm", "synthetic", "folder", "heart", "clean", "paper"])
def test_show(agl, name):
    said = agl("show", name)
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(name)


def test_show_says_what_a_setting_takes(agl):
    out = agl("show", "dkgsb").out
    for word in ("dkgsb.temperature", "0.01", "0.001 … 0.1 (log)", "adam | adam_higher | sgd", "Shiku"):
        assert word in out
    agl("show", "dkgbs").is_refused("unknown plug-in or preset 'dkgbs'", "Did you mean 'dkgsb'?")
    assert "clean" in agl("show", "cleen").err  # a preset is a name that `show` knows


def test_fetch(agl, tmp_path):
    said = agl("fetch", "synthetic")
    assert (said.status, said.err) == (0, "")
    assert "synthetic is there: 3 sections (S1, S2, S3)" in said.out
    agl("fetch", "synthetik").is_refused("unknown dataset 'synthetik'", "Did you mean 'synthetic'?")
    agl("fetch", "pgl").is_refused("'pgl' is a selector")
    agl("fetch", "her2st").is_refused("her2st", "AGL_BENCH_DATA")
    agl("fetch", "folder").is_refused("folder.path=/your/folder")


FETCHED = """
    import shutil
    import anndata, numpy as np
    from pathlib import Path
    from agl_bench import ArrayPatches, Dataset, MissingData, Section, hookimpl

    class Fetched(Dataset):
        '''Comes from far away.'''
        citation = licence = revision = "1"

        def sections(self, root):
            if not (root / "far.h5ad").is_file():
                raise MissingData("far.h5ad is not there; run `agl-bench fetch fetched`")
            return {"S": "D"}

        def files(self, root, name):
            return [root / "far.h5ad"]

        def read(self, root, name):
            counts = anndata.read_h5ad(root / "far.h5ad")
            return Section(name, counts, 1.0, ArrayPatches(np.zeros((counts.n_obs, 8, 8, 3), np.uint8), 112.0))

        def fetch(self, root):
            shutil.copy(root / "mine/A/counts.h5ad", root / "far.h5ad")

    @hookimpl
    def register_datasets():
        return {"fetched": Fetched}
"""


def test_prepare(agl, tmp_path, sections):
    folder = ("folder", "--set", "folder.path=mine", "--data", ".")
    said = agl("prepare", *folder)
    assert (said.status, said.err) == (0, "")
    assert "A: 36 spots × 30 genes, patches of 32 px for 112 µm" in said.out
    assert "2 sections" in said.out and "agl-bench-work/cache" in said.out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "agl-bench-work/cache").rglob("*.npy")}
    assert len(before) == 2 * 5
    again = agl("prepare", *folder)
    assert again.out.count("was there") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "patches of 20 px for 40 µm" in agl("prepare", *folder, "--px", "20", "--um", "40").out
    assert "16 px" in agl("prepare", *folder, "--backbone", "tiny", "--set", "tiny.patch_px=16").out
    assert "patches" not in agl("prepare", *folder, "--backbone", "embedding").out  # it sees none
    sections(lambda table: table[:35].copy())
    changed = agl("prepare", *folder).out.splitlines()
    assert "was there" in changed[0] and "was there" not in changed[1] and "35 spots" in changed[1]


def test_prepare_refuses(agl, tmp_path, sections):
    agl("prepare", "her2st").is_refused("her2st", "AGL_BENCH_DATA")
    agl("prepare", "pgl").is_refused("'pgl' is a selector")
    agl("prepare", "synthetic", "--backbone", "tiny", "--px", "32").is_refused("--px 32", "leave one out")
    agl("prepare", "synthetic", "--set", "dkgsb.temperature=1").is_refused("dkgsb")
    agl("prepare", "synthetic", "--px", "0").is_usage_error("--px")
    agl("prepare", "synthetic", "--um", "nan").is_usage_error("--um", "'nan' is not a finite number")
    folder = ("folder", "--set", "folder.path=mine", "--data", ".")
    image = tmp_path / "mine/B/image.png"
    image.write_bytes(image.read_bytes()[:2000])
    agl("prepare", *folder).is_refused("section 'B'", "image.png", "damaged")
    sections(count(-1))
    agl("prepare", *folder).is_refused("section 'B'", "'B2'")
    (tmp_path / "full").write_text("no folder")
    agl("prepare", "synthetic", "--work", "full").is_refused("full", "AGL_BENCH_CACHE")


def test_prepare_fetches_what_is_absent(agl, tmp_path, sections, monkeypatch):
    (tmp_path / "fetched.py").write_text(textwrap.dedent(FETCHED))
    words = ("prepare", "fetched", "--plugin", "fetched.py", "--data", ".")
    monkeypatch.setenv("AGL_BENCH_OFFLINE", "1")
    agl(*words).is_refused("far.h5ad is not there", "agl-bench fetch fetched")
    monkeypatch.delenv("AGL_BENCH_OFFLINE")
    assert "S: 36 spots" in agl(*words).out
    monkeypatch.setenv("AGL_BENCH_OFFLINE", "1")
    assert "was there" in agl(*words).out


def test_a_warm_cache_changes_nothing(agl, tmp_path, monkeypatch):
    monkeypatch.setenv("AGL_BENCH_CACHE", str(tmp_path / "shared"))
    words = ("run", "--selectors", "pgl,hvg_k", *SYNTHETIC, "--tracking", "none")
    tables = []
    for work in ("fresh", "warm", "mended"):
        said = agl(*words, "--work", work, "--json", f"{work}.json")
        assert said.status == 0
        assert ("set aside" in said.err) == (work == "mended")
        lines = json.loads((tmp_path / f"{work}.json").read_text())["lines"]
        decided = ("key", "scores", "selected", "best_epoch")
        tables.append([[cell[key] for key in decided] for line in lines for cell in line["cells"]])
        assert not (tmp_path / work / "cache").exists()
        (damaged, *_) = sorted((tmp_path / "shared").glob("*/counts.data.npy"))
        if work == "warm":
            damaged.write_bytes(damaged.read_bytes()[:-2])
    assert tables[0] == tables[1] == tables[2]


def test_describe(agl, tmp_path, sections):
    folder = ("folder", "--set", "folder.path=mine", "--data", ".")
    sections(lambda table: table.uns.update(spot_diameter_px=12.0))
    said = agl("describe", *folder, "--out", "pictures")
    assert (said.status, said.err) == (0, "")
    for word in ("folder  dataset of agl-bench", "licence: as the user knows", "fingerprint: ", "median UMI", "0.05"):
        assert word in said.out
    for name in ("A", "B"):
        with Image.open(tmp_path / f"pictures/folder-{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 1000  # tissue, and not an empty page
        assert (pixels == (255, 230, 0)).all(1).sum() > 20  # rings
    card = json.loads(agl("describe", *folder, "--json").out)
    assert [s["spots"] for s in card["sections"]] == [36, 36]
    assert [s["spot_um"] for s in card["sections"]] == [None, 12.0]
    assert card["sections"][0]["pitch_um"] == 30.0
    table = anndata.read_h5ad(tmp_path / "mine/A/counts.h5ad")
    assert card["sections"][0]["median_umi"] == np.median(np.asarray(table.X.sum(1)))
    assert card["sections"][0]["sparsity"] == pytest.approx((table.X.toarray() == 0).mean())
    assert not (tmp_path / "agl-bench-work").exists()  # it writes what --out says and nothing else


def test_describe_where_there_are_patches_only(agl, tmp_path):
    small = ("synthetic.sections=1", "synthetic.spots=30", "synthetic.patch_px=16", "synthetic.useless_genes=5")
    said = agl("describe", "synthetic", "--out", ".", *(w for s in small for w in ("--set", s)))
    assert (said.status, said.err) == (0, "")
    assert "wrote synthetic-S1.png" in said.out
    with Image.open(tmp_path / "synthetic-S1.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    agl("describe", "nothing").is_refused("unknown dataset 'nothing'")
    agl("describe", "her2st").is_refused("AGL_BENCH_DATA")


def test_check(agl, tmp_path, mine):
    for name in ("pgl", "tiny", mine):
        said = agl("check", name)
        assert (said.status, said.err) == (0, "")
        assert "ok" in said.out
    small = ("synthetic.spots=30", "synthetic.patch_px=16", "synthetic.useless_genes=5", "synthetic.harmful_genes=5")
    assert agl("check", "synthetic", *(w for s in small for w in ("--set", s))).status == 0
    agl("check", "nothing").is_refused("unknown plug-in 'nothing'")
    agl("check", "nothing.py").is_refused("plug-in nothing.py: no such file")
    said = agl("check", "folder")
    assert said.status == 2, "half a check is no check"
    assert "rules could not be looked at: its data are not here" in said.err
    assert "folder.path=/your/folder" in said.err
    mine.write_text(textwrap.dedent(MINE.format(-1)))
    said = agl("check", "mine.py")
    assert said.status == 1
    assert "FAIL  The slope of the result is positive on every primary gene" in said.out
    assert "1 broken" in said.out


def test_check_some_rules(agl, tmp_path):
    said = agl("check", "pgl", "--rule", "test_forward_is_pure,builds", "--json", "verdicts.json")
    assert (said.status, said.err) == (0, "")
    assert "2 rules: 2 kept, 0 broken" in said.out
    (builds, pure) = json.loads((tmp_path / "verdicts.json").read_text())["plugins"]["pgl"]
    assert (builds["name"], builds["outcome"], pure["name"]) == ("builds", "kept", "forward_is_pure")
    assert pure["docs"] == "docs/rules.md#selector-forward-is-pure"
    agl("check", "pgl", "--rule", "forward_pure").is_refused("unknown rule 'forward_pure'", "'forward_is_pure'")
    agl("check", "pgl", "--rule", "width_is_true").is_refused("unknown rule 'width_is_true'")
    agl("check", "pgl", "--json", "nowhere/verdicts.json").is_refused("--json nowhere/verdicts.json")
    assert agl("check", "pgl", "--set", "pgl.k=3").status == 2


def test_check_says_why_and_where_it_is_explained(agl, mine):
    mine.write_text(textwrap.dedent(MINE.format(-1)))
    said = agl("check", "mine.py", "--rule", "every_primary_gene_counts", "--json", "verdicts.json")
    assert said.status == 1
    assert "the slope of primary gene GENE" in said.out
    assert "docs/rules.md#selector-every-primary-gene-counts, once more with --rule every_primary" in said.out
    assert "1 rule: 0 kept, 1 broken" in said.out


def test_check_a_distribution_that_is_not_installed(agl, tmp_path, mine):
    package = tmp_path / "there/src/agl_bench_there"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(mine.read_text().replace('"mine"', '"there"'))
    project = tmp_path / "there/pyproject.toml"
    agl("check", "./there").is_refused("plug-in there: it has no pyproject.toml")
    project.write_text('[project]\nname = "there"\nversion = "0.3"\n')
    agl("check", "there").is_refused(
        "plug-in there: pyproject.toml registers nothing", "[project.entry-points.agl_bench]"
    )
    project.write_text(project.read_text() + '[project.entry-points.agl_bench]\nthere = "agl_bench_elsewhere"\n')
    agl("check", "there").is_refused("neither src/agl_bench_elsewhere nor agl_bench_elsewhere is there")
    project.write_text(project.read_text().replace("elsewhere", "there"))
    for name in ("there", "./there", str(tmp_path / "there")):
        said = agl("check", name, "--rule", "builds")
        assert (said.status, said.err) == (0, "")
        assert "there  selector of there 0.3" in said.out


def test_check_takes_a_path_as_it_is_written(agl, tmp_path, mine):
    for name in ("./mine.py", "../" + tmp_path.name + "/mine.py"):
        said = agl("check", name)
        assert "mine" in said.out
        assert "ok" in said.out
    (tmp_path / "empty.py").write_text(
        "from agl_bench import hookimpl\n\n@hookimpl\ndef register_selectors():\n    return {}\n"
    )
    said = agl("check", "empty.py")
    assert said.status == 2 or "empty.py" in said.out, "nothing was checked and nothing was said"


def test_sync(agl, tmp_path):
    run = ("run", "--selectors", "pgl", "--fold", "D1", *SYNTHETIC, "--tracking", "none")
    assert agl(*run).status == 0
    said = agl("sync")
    assert (said.status, said.err) == (0, "")
    assert "1 cells added to MLflow, 0 were there already" in said.out
    assert "0 cells added to MLflow, 1 were there already" in agl("sync").out
    agl("sync", "--work", "nowhere").is_refused("nowhere is not a work folder", "--work")
    agl("sync", "--tracking", "none").is_refused("--tracking none")
    agl("sync", "--tracking", "http://127.0.0.1:9").is_refused("http://127.0.0.1:9")


def test_ui(agl, tmp_path, monkeypatch):
    agl("ui").is_refused("agl-bench-work is not a work folder", "--work")
    (tmp_path / "agl-bench-work/cells").mkdir(parents=True)
    agl("ui").is_refused("mlflow.db", "agl-bench run")
    agl("ui", "--tracking", "http://127.0.0.1:9").is_refused("http://127.0.0.1:9")

    def serve(work, uri=None, *, port=5000, ready, patience=120.0):
        assert (work, uri, port) == (Path("agl-bench-work"), None, 5001)
        ready({"inter: leaderboard": "http://127.0.0.1:5001/#/experiments/1"})

    monkeypatch.setattr(mlflow_ui, "serve", serve)
    said = agl("ui", "--port", "5001")
    assert (said.status, said.err) == (0, "")
    assert "http://127.0.0.1:5001/#/experiments/1" in said.out


def test_doctor(agl, tmp_path):
    said = agl("doctor")
    assert (said.status, said.err) == (0, "")
    selectors = f"{len(Plugins.discover(strict=True).names('selector'))} selectors"
    for word in ("torch", selectors, "dataset synthetic: 3 sections", "AGL_BENCH_DATA", "free disk", "tracking"):
        assert word in said.out
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_broken(agl, tmp_path):
    (tmp_path / "late.py").write_text(
        "from agl_bench import hookimpl\n\n@hookimpl\ndef register_selectors():\n"
        "    return {'late': 'agl_bench.terminal:_Lines'}\n"
    )
    said = agl("doctor", "--plugin", "late.py")
    assert said.status == 1
    assert "FAIL plug-in: selector 'late' of late.py must be a subclass" in said.out


def test_help_mentions_every_command(agl):
    said = agl("--help")
    assert said.status == 0
    assert len(cli.commands) > 20
    for command in cli.commands:
        assert f"  {command} " in said.out
        assert agl(command, "--help").status == 0
    assert agl("--version").out.startswith("agl-bench, version ")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "agl_bench", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    process.stdout.close()  # as `head` does
    with process.stderr:
        said = process.stderr.read().decode()
    assert (process.wait(), said) == (0, "")
