"""A grid that trains in a second, its results made up or real."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, choose_device, fingerprints, run_cells
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins

SMALL = {
    "synthetic.sections": 2,
    "synthetic.spots": 40,
    "synthetic.markers": 5,
    "synthetic.helpful_genes": 25,
    "synthetic.harmful_genes": 20,
    "synthetic.useless_genes": 30,
    "synthetic.patch_px": 16,
    "tiny.patch_px": 16,
    "tiny.channels": 8,
    "protocol.primary_genes": 5,
    "protocol.min_genes_per_spot": 5,
    "protocol.buffer_um": 0,
}


@pytest.fixture(scope="session")
def small():
    """Settings of the small grid."""
    return [f"{k}={v}" for k, v in SMALL.items()]


@pytest.fixture(scope="session")
def words(small):
    """The small grid as words of the command line, without the selectors."""
    grid = ["--datasets", "synthetic", "--preset", "smoke", "--evaluation", "inter", "--tracking", "none"]
    return [*grid, "--device", "cpu", *(w for s in small for w in ("--set", s))]


@pytest.fixture(scope="session")
def grid(small):
    """Make a campaign on the small grid; returns its cells and the bench that runs them."""

    def grid(*selectors, files=(), more=(), **lists):
        plugins = Plugins.discover(files, strict=True)
        lists = {"datasets": ["synthetic"], "evaluation": ["inter"], "preset": "smoke"} | lists
        campaign = Campaign.of(plugins, selectors=selectors, assignments=[*small, *more], **lists)
        root = Path(os.devnull)
        known = fingerprints(campaign, plugins, root, None)
        cells = campaign.cells(plugins, root, device="cpu", fingerprint=known)
        return cells, Bench(plugins, root, choose_device("cpu"))

    return grid


@pytest.fixture(scope="session")
def run(grid):
    """Run the small grid into a work folder; returns the events."""

    def run(work, *selectors, again=False, keep="predictions", **options):
        cells, bench = grid(*selectors, **options)
        return list(run_cells(cells, bench, CellStore(work), NoRecorder(), again=again, keep=keep))

    return run


@pytest.fixture(scope="session")
def make_result(grid):
    """A made-up result of a real cell."""
    known = {}

    def make_result(selector="pgl", fold="D1", seed=0, pcc=0.5, selected=(3, 4), best=1, seconds=1.0):
        if (selector, seed) not in known:
            known[selector, seed] = {spec.fold: spec for spec, _ in grid(selector, seeds=[str(seed)])[0]}
        genes = pd.DataFrame({"gene": ["A", "B"], "primary": [True, False], "weight": [1.0, 0.5]})
        epochs = pd.DataFrame({"epoch": range(len(selected)), "selected": selected, "validation_pcc": 0.1})
        return Result(
            spec=known[selector, seed][fold],
            scores={"pcc_gene_mean_section_mean": pcc, "other": 1.0},
            genes=genes,
            epochs=epochs,
            outer=pd.DataFrame(),
            best_epoch=best,
            counts={"train_spots": 10},
            cost={"seconds": seconds},
            provenance={"python": "3"},
            fold={"digest": "0a", "nearest_um": None, "median_um": None, "overlapping": 0},
        )

    return make_result


@pytest.fixture(scope="module")
def postgresql():
    """URL of a PostgreSQL database: a server of this test's own, from the programs that the machine has."""
    pytest.importorskip("psycopg", reason="no driver: pip install agl-bench[postgresql]")
    programs = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), shutil.which("initdb")]
    if not programs[0]:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    home = Path(programs[0]).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="agl-bench-"))
    # The server refuses to run as root; Debian's package brings a user for it.
    change, user = (["runuser", "-u", "postgres", "--"], "postgres") if os.geteuid() == 0 else ([], None)
    if user:
        shutil.chown(folder, user)

    def server(program, *words):
        subprocess.run([*change, str(home / program), *words], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server("initdb", "-D", f"{folder}/data", "-U", "tester", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
    server("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
    yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    server("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)
