"""Files as strangers have them: is each read right, or refused in a sentence?

    python benchmarks/reliability_files.py --write        writes the section "Bad files" of benchmarks/reliability.md

Each trial writes a small section whose truth is known in a bad or odd form, runs `agl-bench validate` and `agl-bench
prepare` on it, and compares what was prepared with what is true.
"""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measure
import reliability

PARTS = ("reliability_images", "reliability_formats", "reliability_tables")  # each has trials(folder, quick)
INTRODUCTION = """
Each trial writes a small section in a bad or odd form: spots with a disc of their own colour around them, and known
counts. `validate` and `prepare` run on it, and names, counts and the colour of each patch are compared with the truth.
Right: both take it, and what was prepared is true. Refused: one of them says in one sentence what is wrong, with exit
status 2. A warning of a library counts as a traceback.
"""


def main() -> None:
    """Try all, print the table, and write it if asked to."""
    options = measure.options(reliability.parser(__doc__), quick={})
    parts = [importlib.import_module(part) for part in PARTS]
    forks = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="reliability-files-") as folder,
        ProcessPoolExecutor(len(parts), mp_context=forks) as pool,
    ):
        waiting = [pool.submit(part.trials, _place(folder, part.__name__), options.quick) for part in parts]
        trials = [trial for found in waiting for trial in found.result()]
    reliability.report("files", "Bad files", INTRODUCTION, trials, options)


def _place(folder: str, name: str) -> Path:
    made = Path(folder) / name
    made.mkdir()
    return made


if __name__ == "__main__":
    main()
