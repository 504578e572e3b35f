"""Whether this code gives the same results as that of an older commit, bit for bit; and if so, what to write down.

    python benchmarks/same_results.py COMMIT
    python benchmarks/same_results.py HEAD~1 --set synthetic.spots=200

A small grid (every selector of agl-bench, `synthetic`, within and across sections) is trained twice on one thread:
with the code of the commit, in a temporary folder, and with the code here as it is now. The tables of genes and the
scores of all cells are compared. Where all are equal, the lines are printed that belong into
agl_bench/registry/same_results.toml, so that finished cells stay finished. Exit status: 0 if all are equal, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parents[1]
PIXELS = "from agl_bench.bench import prepare; print(getattr(prepare, 'pixel_code', str)())"
SMALL = ("synthetic.sections=2", "synthetic.spots=60", "synthetic.patch_px=16", "tiny.patch_px=16")
Cells = dict[tuple[str, ...], tuple[dict[str, Any], pd.DataFrame]]


def python(tree: Path, *words: str) -> str:
    """What Python says with the code of a tree."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AGL_BENCH_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "plugins")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=env, cwd=tree, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: some cells failed
        sys.exit(f"the code of {tree} ended with status {done.returncode}")
    return done.stdout


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, in a folder."""
    archive = folder / "commit.tar"
    with archive.open("wb") as stream:
        subprocess.run(["git", "-C", str(HERE), "archive", commit], stdout=stream, check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "tree", filter="data")
    return folder / "tree"


def selectors(tree: Path) -> list[str]:
    """Those that agl-bench brings."""
    entries = json.loads(python(tree, "-m", "agl_bench", "list", "--json"))["entries"]
    return [e["name"] for e in entries if e["kind"] == "selector" and e["provider"].startswith("agl-bench ")]


def train(tree: Path, names: list[str], work: Path, settings: list[str]) -> Cells:
    """The finished cells of the grid: result.json and genes.parquet."""
    words = ["--datasets", "synthetic", "--preset", "smoke", "--device", "cpu", "--tracking", "none"]
    words += [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    python(tree, "-m", "agl_bench", "run", "--selectors", ",".join(names), *words, "--work", str(work))
    found = {}
    for path in sorted(work.glob("cells/[!.]*/result.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        spec = content["spec"]
        key = (spec["selector"]["name"], spec["evaluation"], spec["fold"], str(spec["seed"]))
        found[key] = content, pd.read_parquet(path.with_name("genes.parquet"))
    return found


def is_same(one: tuple[dict[str, Any], pd.DataFrame], other: tuple[dict[str, Any], pd.DataFrame]) -> bool:
    """Whether two cells have the same scores and table of genes, bit for bit."""
    (first, genes), (second, others) = one, other
    if json.dumps(first["scores"], sort_keys=True) != json.dumps(second["scores"], sort_keys=True):
        return False
    if [*genes.dtypes.items()] != [*others.dtypes.items()] or len(genes) != len(others):
        return False
    columns = [(genes[name].to_numpy(), others[name].to_numpy()) for name in genes]
    return all(a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes() for a, b in columns)


def digests(cells: Cells) -> dict[str, str]:
    """Digests of code that cells carry, by what they are of."""
    found = {}
    for content, _ in cells.values():
        spec = content["spec"]
        found["results"] = spec["version"].partition("+")[2]
        for kind in ("dataset", "backbone", "selector"):
            found[f"{kind} {spec[kind]['name']}"] = spec[kind]["source"][:16]  # after it: files that settings name
    return found


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", metavar="COMMIT", help="the code to compare with")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="as for agl-bench run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        tree = checkout(options.commit, Path(folder))
        here = selectors(HERE)
        names = [name for name in selectors(tree) if name in here]
        before, after = (train(t, names, Path(folder) / w, options.set) for t, w in ((tree, "before"), (HERE, "after")))
        pixels = [python(t, "-c", PIXELS).strip() for t in (tree, HERE)]
    different = {key for key in before.keys() | after.keys() if key not in before or key not in after}
    different |= {key for key in before.keys() & after.keys() if not is_same(before[key], after[key])}
    for name in names:
        own = [key for key in before.keys() | after.keys() if key[0] == name]
        wrong = sum(key in different for key in own)
        print(f"{name}: {f'{wrong} of {len(own)} cells differ' if wrong else f'{len(own)} cells are equal'}")
    if different or not before:
        sys.exit(1)
    old, new = digests(before) | {"pixels": pixels[0]}, digests(after) | {"pixels": pixels[1]}
    lines = {new[of]: f'"{new[of]}" = "{old[of]}"  # {of}' for of in new if old.get(of) and new[of] != old[of]}
    print("\n".join(lines.values()) or "all digests are equal, too: nothing is to be written down")


if __name__ == "__main__":
    main()
