"""Look at a dataset, or at a path that holds one, and tell everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agl_bench.bench.spec import make_dataset, one_part
from agl_bench.data.check import check_dataset, pixel_problems, problems
from agl_bench.data.fingerprint import same_sections, section_fingerprint
from agl_bench.data.folds import partly_known
from agl_bench.data.gene_ids import tell_apart
from agl_bench.errors import AglBenchError, BadPlugin, BadSection, BadSpec, UnknownName, told
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.spots import Section
from agl_bench.registry.plugins import Entry, Plugins


@dataclass(frozen=True)
class Verdict:
    """What was found in one section, or in the sections together.

    Attributes:
        section: its name; "" for what concerns the sections together.
        facts: one line on a sound section: size, donor, pixel size, fingerprint; "" if it is not sound. Or what is to
            be known of the sections together.
        problems: a sentence each.
        fingerprint: of a sound section.
    """

    section: str
    facts: str
    problems: tuple[str, ...] = ()
    fingerprint: str = ""


def find_dataset(plugins: Plugins, text: str, assignments: Sequence[str]) -> tuple[str, Dataset]:
    """A dataset by its name, or by a path whose layout one of them recognises, and what it is called.

    Args:
        plugins: where the datasets are.
        text: a name, NAME:VALUE, or a path; a name wins, `./NAME` is always a path.
        assignments: "NAME.KEY=VALUE" settings.

    Raises:
        UnknownName: if it is none of them.
        BadSpec: if no dataset, or more than one, recognises the path.
    """
    names = plugins.names("dataset")
    if text.partition(":")[0] in names:
        part = one_part(plugins, text, "dataset", assignments)
        return part.label, make_dataset(plugins, part)
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise BadSpec(f"'{text}' is in the home folder of nobody on this machine; give the path from / on") from None
    if not text or not path.exists():
        raise UnknownName("dataset or path", text, names)
    entry = _recognised([plugins.entry(name, "dataset") for name in names], path)
    given = entry.load().settings_at(path)  # type: ignore[attr-defined]
    part = one_part(plugins, entry.name, "dataset", assignments, given)
    return entry.name, make_dataset(plugins, part)


def _recognised(entries: Sequence[Entry], path: Path) -> Entry:
    classes: list[tuple[Entry, type[Dataset]]] = [(entry, entry.load()) for entry in entries]
    found = sorted((entry for entry, cls in classes if cls.recognises(path)), key=lambda entry: entry.name)
    if len(found) == 1:
        return found[0]
    if found:
        several = " and of ".join(f"'{entry.name}'" for entry in found)
        raise BadSpec(f"{path} has the layout of {several}; keep the files of one of them in it")
    able = sorted(entry.name for entry, cls in classes if "recognises" in vars(cls))
    raise BadSpec(
        f"{path} has no layout that is known ({', '.join(able)}); `agl-bench show NAME` lists the files of each"
    )


def validate(name: str, dataset: Dataset, root: Path) -> Iterator[Verdict]:
    """Read and check every section, one at a time, then the sections together.

    Args:
        name: what the dataset is called.
        dataset: an instance.
        root: the data folder.

    Raises:
        AglBenchError: if the sections cannot even be listed.
    """
    read: list[Section] = []
    sound, fingerprints = True, {}
    with _naming(name):
        names = dataset.names(root)
    for section_name in names:
        verdict, section = _look_at(section_name, dataset, root)
        sound = sound and not verdict.problems
        if section is not None:
            read.append(section)
            fingerprints[section_name] = verdict.fingerprint
        yield verdict
    if sound:
        try:
            with _naming(name):
                donors = dataset.sections(root)
            for told in (tell_apart(read), partly_known(donors), same_sections(fingerprints)):
                if told:
                    yield Verdict("", told)
            check_dataset(name, read)
        except AglBenchError as error:
            yield Verdict("", "", (str(error),))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever a dataset raises by mistake while it lists its sections becomes a sentence that names it."""
    try:
        yield
    except AglBenchError:
        raise
    except (Exception, SystemExit) as error:
        raise BadPlugin(f"dataset '{name}' cannot list its sections ({told(error)})") from error


def _look_at(name: str, dataset: Dataset, root: Path) -> tuple[Verdict, Section | None]:
    """What was found, and the section without its spots where it is sound."""
    try:
        section = dataset.read(root, name)
    except AglBenchError as error:
        return Verdict(name, "", (str(error),)), None
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plug-in may raise anything; others are to be read)
        return Verdict(name, "", (str(BadSection(name, f"its reader fails with {told(error)}")),)), None
    found = list(problems(section, has_counts=dataset.has_counts)) or list(pixel_problems(section))
    if found:
        return Verdict(name, "", tuple(str(BadSection(name, problem)) for problem in found)), None
    spots, genes = section.counts.shape
    facts = [f"{spots:,} spots", f"{genes:,} genes", f"{section.um_per_px:.4g} µm per pixel"]
    if section.dropped_spots:
        facts.append(f"{section.dropped_spots:,} spots left out")
    fingerprint = section_fingerprint(section)
    facts += [f"donor {section.donor or 'not known'}", f"fingerprint {fingerprint}"]
    # Gene names are all that sections are compared by; their counts are let go before the next is read.
    bare = Section(name, section.counts[:0].copy(), section.um_per_px)
    return Verdict(name, ", ".join(facts), fingerprint=fingerprint), bare
