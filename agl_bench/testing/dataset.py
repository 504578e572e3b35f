"""The rules of the dataset door."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np

from agl_bench.data import check as sections_check
from agl_bench.errors import AglBenchError, FetchFailed, MissingData
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.spots import Section
from agl_bench.testing.process import leaves_the_process
from agl_bench.testing.settings import check_settings
from agl_bench.testing.states import changed, global_states, said, stirred_states
from agl_bench.testing.verdicts import Contract, Unavailable, Verdict, listed, rule
from agl_bench.testing.watch import opened_in

ABSENT = "its data are not here"
NOBODY = "a section that is not there"
LOOKED_AT = 8  # spots of each section whose patches are compared
GARBAGE = ("counts.h5ad", "filtered_feature_bc_matrix.h5", "st/A.h5ad", "store.zarr/zarr.json", "spatial/positions.csv")


class DatasetContract(Contract):
    """Rules of the dataset door. Give an instance as `dataset` and the data folder as `root`."""

    door = "dataset"
    dataset: ClassVar[Dataset]
    root: ClassVar[Path] = Path("data")

    def sections(self) -> dict[str, str]:
        """Names and donors.

        Raises:
            Unavailable: where the data are not here.
        """
        try:
            return self.dataset.sections(self.root)
        except MissingData as error:
            raise Unavailable(f"{ABSENT}: {error}") from None

    def load(self) -> list[Section]:
        """All sections.

        Raises:
            Unavailable: where the data are not here.
        """
        try:
            return [self.dataset.read(self.root, name) for name in self.sections()]
        except MissingData as error:
            raise Unavailable(f"{ABSENT}: {error}") from None

    # What it says of itself ------------------------------------------------------------------------------------------

    @rule()
    def test_settings_are_tunable(self) -> None:
        """Every setting is a keyword-only argument with an annotation and a default inside its range."""
        check_settings(type(self.dataset))

    @rule()
    def test_says_what_it_is(self) -> None:
        """Citation, licence and revision are there."""
        for name in ("citation", "licence", "revision"):
            value = getattr(self.dataset, name)
            assert isinstance(value, str) and value.strip(), f"{name} is empty"

    @rule()
    def test_absent_data_are_a_sentence(self) -> None:
        """Where its data are not there, `sections` says which file is absent and what brings it (`MissingData`)."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.dataset.sections(Path(folder))
            except MissingData as error:
                assert str(error).strip(), "MissingData says nothing: name the file, and what brings it"
            except Exception as error:
                raise AssertionError(
                    f"in an empty data folder `sections` raises {said(error)}; raise agl_bench.MissingData instead"
                ) from error

    @rule()
    def test_fetches_nothing_offline(self) -> None:
        """With AGL_BENCH_OFFLINE=1 `fetch` says what to do (`FetchFailed`), or has nothing to do."""
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, AGL_BENCH_OFFLINE="1"):
            try:
                self.dataset.fetch(Path(folder))
            except FetchFailed as error:
                assert str(error).strip(), "FetchFailed says nothing: say what the user has to do"
            except Exception as error:
                raise AssertionError(
                    f"offline `fetch` raises {said(error)}; ask agl_bench.is_offline() and raise FetchFailed instead"
                ) from error

    @rule()
    def test_recognises_by_names_alone(self) -> None:
        """`recognises` looks at names and opens nothing: what it is shown may be of any size, or damaged."""
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            for name in GARBAGE:
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).write_bytes(b"no such format")
            shown = [here, *sorted(here.rglob("*")), here / "nothing"]
            for path in shown:
                with opened_in(here) as events:
                    try:
                        answer = type(self.dataset).recognises(path)
                    except Exception as error:
                        raise AssertionError(f"`recognises` opens what it is shown: it raises {said(error)}") from error
                opened = [Path(p).name for event, p in events if event == "open"]
                assert not opened, f"`recognises` opens {listed(sorted(set(opened)))}; look at names alone"
                assert isinstance(answer, bool), f"`recognises` returns {answer!r}, not True or False"

    # Sections --------------------------------------------------------------------------------------------------------

    @rule(needs=["absent_data_are_a_sentence"])
    def test_sections_are_cheap(self) -> None:
        """`sections` and `names` read no counts and no image, and name the same sections each time."""

        def refuse(*_: object) -> Section:
            raise AssertionError("`sections` reads whole sections; it is to name them alone")

        with mock.patch.object(type(self.dataset), "read", refuse):
            first = self.sections()
            assert list(first) == self.dataset.names(self.root), "`names` and `sections` differ"
        assert first, "there are no sections"
        assert list(first.items()) == list(self.sections().items()), "`sections` differs from one call to the next"
        wrong = [n for n, d in first.items() if not (isinstance(n, str) and n and isinstance(d, str))]
        assert not wrong, f"section {listed(map(str, wrong))}: names are texts, donors too, and '' where not known"

    @rule(needs=["sections_are_cheap"])
    def test_names_before_loading(self) -> None:
        """`read` returns the section that it was asked for, with the donor that `sections` names."""
        named = self.sections()
        read = {name: (s.name, s.donor) for name, s in zip(named, self.load(), strict=True)}
        for name, (called, donor) in read.items():
            assert called == name, f"asked for section '{name}', `read` returns section '{called}'"
            assert donor == named[name], f"section '{name}' is of donor '{donor}', and '{named[name]}' in `sections`"

    @rule(needs=["names_before_loading"])
    def test_unknown_sections_are_a_sentence(self) -> None:
        """Asked for a section that it has not, `read` says so in a sentence."""
        try:
            self.dataset.read(self.root, NOBODY)
        except AglBenchError as error:
            assert str(error).strip(), "the error says nothing: name the section, and those that there are"
        except Exception as error:
            raise AssertionError(
                f"asked for '{NOBODY}', `read` raises {said(error)}; raise agl_bench.MissingData instead"
            ) from error
        else:
            raise AssertionError(f"asked for '{NOBODY}', `read` returns a section")

    @rule(needs=["names_before_loading"])
    def test_sections_are_sound(self) -> None:
        """Counts, names, coordinates, patches and embeddings pass the checks of every run."""
        sections = self.load()
        for section in sections:
            sections_check.check_section(section, has_counts=self.dataset.has_counts)
        sections_check.check_dataset(type(self.dataset).__name__.lower(), sections)

    @rule(needs=["names_before_loading"])
    def test_loads_the_same_twice(self) -> None:
        """Read twice, in another order, and after somebody has written into what was read, sections are the same."""
        fresh = copy.deepcopy(self.dataset)
        first = {s.name: (_digest(s), s) for s in self.load()}
        for _, section in first.values():
            section.counts.X = section.counts.X * 0  # whoever reads next must not see it
        for name in reversed(list(first)):
            for dataset, whose in ((self.dataset, "read again"), (fresh, "read alone, by a fresh instance")):
                different = changed(first[name][0], _digest(dataset.read(self.root, name)))
                assert not different, f"{listed(different)} of {name} differ when it is {whose}"

    @rule(needs=["names_before_loading"])
    def test_randomness_is_not_global(self) -> None:
        """Reading uses no global generator."""
        before = stirred_states()
        self.load()
        drawn = [name for name, state in global_states().items() if state != before[name]]
        assert not drawn, f"`read` uses the global generator of {listed(drawn)}; make one from a fixed seed"

    @rule()
    def test_leaves_the_process_as_it_is(self) -> None:
        """Neither `sections` nor `read` changes a setting of the process or replaces a function."""

        def read() -> None:
            self.load()

        leaves_the_process((self.sections, read))

    @rule(needs=["sections_are_cheap"])
    def test_files_exist(self) -> None:
        """Every file of `files` exists: they make the fingerprint."""
        files = [p for name in self.sections() for p in self.dataset.files(self.root, name)]
        absent = sorted({str(p) for p in files if not p.is_file()})
        assert not absent, f"`files` names {listed(absent)}, which is not there"

    @rule(needs=["files_exist", "fetches_nothing_offline"])
    def test_fetch_changes_nothing_that_is_there(self) -> None:
        """Where everything is there, `fetch` downloads nothing and touches no file."""
        files = [p for name in self.sections() for p in self.dataset.files(self.root, name)]
        before = {p: p.stat().st_mtime_ns for p in files}
        with mock.patch.dict(os.environ, AGL_BENCH_OFFLINE="1"):
            try:
                self.dataset.fetch(self.root)
            except Exception as error:
                raise AssertionError(f"all files are there, and `fetch` raises {said(error)}") from error
        touched = [p.name for p, time in before.items() if not p.is_file() or p.stat().st_mtime_ns != time]
        assert not touched, f"`fetch` has written {listed(touched)} again"


def check_dataset(dataset: Dataset, root: Path, rules: Iterable[str] = ()) -> list[Verdict]:
    """The verdicts of every rule of the dataset door, or of some `rules`, on an instance."""
    return list(DatasetContract.of(dataset, root=root).verdicts(rules))


def _digest(section: Section) -> dict[str, object]:
    """What was read, by what it is."""
    found: dict[str, object] = {
        "counts": section.counts.to_df().to_numpy().tobytes(),
        "genes": tuple(section.counts.var_names),
        "positions": np.asarray(section.counts.obsm["spatial"]).tobytes(),
        "donor": section.donor,
    }
    if section.patches is not None:
        found["patches"] = section.patches.read(np.arange(min(LOOKED_AT, section.counts.n_obs)), 32, 112.0).tobytes()
    if section.embedding is not None:
        found["embedding"] = np.asarray(section.embedding).tobytes()
    return found
