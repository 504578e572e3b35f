"""Files as users have them: is each read correctly, or refused with one sentence?

    python benchmarks/reliability_files.py --write        writes the section "Bad files" of benchmarks/reliability.md

Each trial writes a small section with known content in a bad or odd form, runs `agl-bench validate` and `agl-bench
prepare` on it, and compares what was prepared with the known content.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measure
import reliability
import reliability_sections

PARTS = ("reliability_images", "reliability_formats", "reliability_tables")  # each has trials(folder, quick)
INTRODUCTION = """
Each trial writes a small section in a bad or odd form: known counts, and around each spot a disc of its own colour.
`validate` and `prepare` run on it, and names, counts and the colour of each patch are compared with the known values.
Right: both accept it, and what was prepared is correct. Refused: one of them says in one sentence what is wrong, with
exit status 2. A library warning counts as a traceback.
"""


def main() -> None:
    """Try all, print the table, and write it if asked to."""
    made = reliability.parser(__doc__)
    made.add_argument(
        "--shares", type=int, default=1, help="processes for each part, each with its share of the trials"
    )
    options = measure.options(made, quick={})
    for part in PARTS:
        importlib.import_module(part)  # once, here: the processes are forks
    forks, shares = multiprocessing.get_context("fork"), options.shares
    with (
        tempfile.TemporaryDirectory(prefix="reliability-files-") as folder,
        ProcessPoolExecutor(len(PARTS) * shares, mp_context=forks) as pool,
    ):
        waiting = [
            [pool.submit(_trials, part, Path(folder), options.quick, share, shares) for share in range(shares)]
            for part in PARTS
        ]
        found = [[share.result() for share in part] for part in waiting]
    trials = [trial for part in found for each in zip(*part, strict=True) for trial in each if trial is not None]
    reliability.report("files", "Bad files", INTRODUCTION, trials, options)


def _trials(part: str, folder: Path, quick: bool, share: int, shares: int) -> list[reliability.Trial | None]:
    """The trials of a part; None for those that are another process's share."""
    reliability_sections.OURS = itertools.cycle(number == share for number in range(shares))
    mine = folder / f"{part}-{share}"
    mine.mkdir()
    found: list[reliability.Trial | None] = importlib.import_module(part).trials(mine, quick)
    return found


if __name__ == "__main__":
    main()
