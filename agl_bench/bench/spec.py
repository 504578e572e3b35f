"""What a cell is, and which cells a campaign consists of."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import agl_bench
from agl_bench import __version__
from agl_bench.data.folds import EVALUATIONS, FoldPlan, plan_folds
from agl_bench.digests import file_digest, text_digest
from agl_bench.errors import FORBIDDEN, AglBenchError, BadPlugin, BadSpec, MissingData, UnknownName, told
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.tunable import Value, resolve, tunables
from agl_bench.protocol import OF_COUNTS, Preset, Protocol, load_preset, read_toml
from agl_bench.registry.meaning import code_digest, module_name
from agl_bench.registry.plugins import OWN, Plugins
from agl_bench.registry.watch import watched

# Libraries that decide results; those that decide pixels alone are in the key of a prepared section.
DECIDING = ("torch", "numpy", "scipy", "pandas", "scanpy", "scikit-misc", "pillow")


_SEED_DIGITS = 18  # tables hold 64 bits


@cache
def deciding_modules() -> dict[str, Path]:
    """The modules of agl-bench that decide results, by their names."""
    here = Path(agl_bench.__file__).parent
    parts = [p for folder in ("maths", "interfaces", "data", "training") for p in sorted((here / folder).rglob("*.py"))]
    deciding = ("protocol.py", *(f"bench/{n}.py" for n in ("run", "encoded", "planted", "result", "fold_report")))
    return {module_name(path, here): path for path in (*parts, *(here / name for name in deciding))}


@cache
def _engine() -> str:
    """Digest of the code of agl-bench that decides results."""
    return code_digest(deciding_modules(), 4)


def version_here() -> str:
    """Of agl-bench, with the digest of its code that decides results: what cells that are made here say."""
    return f"{__version__}+{_engine()}"


@cache
def _libraries() -> str:
    """Versions of the libraries that decide results; looked up once, since each takes a millisecond."""
    return ", ".join(f"{name} {version(name)}" for name in DECIDING)


@dataclass(frozen=True)
class Part:
    """A plug-in as it takes part in a cell.

    Attributes:
        name: as registered.
        settings: every tunable with its value.
        provider: distribution and version, or the file.
        source: digest of the defining files, and of the content of every file that a setting names.
        label: for people: the name, or NAME:VALUE where a dataset was chosen so; not part of the identity.
    """

    name: str
    settings: dict[str, Value] = field(hash=False)
    provider: str
    source: str
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Part:
        """Inverse of `vars`, after JSON, which has no tuples."""
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in content["settings"].items()}
        return cls(**{**content, "settings": settings})


@dataclass(frozen=True)
class Tuning:
    """That settings of a cell were tuned, and at what cost. Part of the identity: tuned and fixed cells never mix.

    Attributes:
        trials: the budget, the same for every selector of a table.
        points: trials that were finished; fewer than `trials` where the search space has no more points.
        study: name of the study.
        validation_pcc: of the chosen point, mean over the fits of its trial.
        searched: what was searched, as NAME.KEY.
    """

    trials: int
    points: int
    study: str
    validation_pcc: float
    searched: tuple[str, ...]

    @property
    def label(self) -> str:
        """For tables."""
        return f"tuned ({self.trials} trials)"


@dataclass(frozen=True)
class RunSpec:
    """One cell of the grid. Equal specs give equal results on one machine with one number of threads.

    Attributes:
        dataset, backbone, selector: the three plug-ins with their settings.
        evaluation: "intra" or "inter".
        fold: label of the fold.
        seed: root of every seed.
        protocol: conditions held equal.
        preset: label of the protocol for people; not part of the identity.
        data: fingerprint of the dataset's files, and of those that the protocol names.
        device: "cpu" or "cuda"; floating-point sums differ between them.
        version: of agl-bench, with a digest of the code that decides results.
        libraries: versions of those that decide results.
        tuning: where settings come from that were tuned; None = all are fixed.
    """

    dataset: Part
    backbone: Part
    selector: Part
    evaluation: str
    fold: str
    seed: int
    protocol: Protocol
    preset: str
    data: str
    device: str
    version: str = field(default_factory=version_here)
    libraries: str = field(default_factory=_libraries)
    tuning: Tuning | None = None

    @cached_property
    def key(self) -> str:
        """Digest of the canonical JSON of everything that decides the result."""
        return self._digest_without("preset")

    @cached_property
    def group(self) -> str:
        """Digest of what all folds and seeds of one line of a table share."""
        return self._digest_without("preset", "fold", "seed")

    def _digest_without(self, *names: str) -> str:
        content = {k: v for k, v in self.as_json().items() if k not in names}
        for part in ("dataset", "backbone", "selector"):
            content[part] = {k: v for k, v in content[part].items() if k != "label"}
        return text_digest(json.dumps(content, sort_keys=True, separators=(",", ":")))

    @property
    def title(self) -> str:
        """For progress lines: dataset, evaluation, backbone, selector, fold and seed."""
        return (
            f"{self.dataset.label} · {self.evaluation} · {self.backbone.name} · {self.selector.name} · "
            f"fold {self.fold} · seed {self.seed}"
            + (" · shuffled patches" if self.protocol.patches == "shuffled" else "")
            + (f" · {self.tuning.label}" if self.tuning else "")
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "dataset": vars(self.dataset),
            "backbone": vars(self.backbone),
            "selector": vars(self.selector),
            "evaluation": self.evaluation,
            "fold": self.fold,
            "seed": self.seed,
            "protocol": self.protocol.record(),
            "preset": self.preset,
            "data": self.data,
            "device": self.device,
            "version": self.version,
            "libraries": self.libraries,
            **({"tuning": vars(self.tuning)} if self.tuning else {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunSpec:
        """Inverse of `as_json`.

        Raises:
            BadSpec, KeyError, TypeError: if it is none.
        """
        if not is_typed(content):
            raise BadSpec("a cell's names must be text, its settings objects, and its seed a whole number")
        plain = dict(content)
        for name in ("dataset", "backbone", "selector"):
            plain[name] = Part.from_json(plain[name])
        if "tuning" in plain:
            plain["tuning"] = Tuning(**plain["tuning"] | {"searched": tuple(plain["tuning"]["searched"])})
        return cls(**plain | {"protocol": Protocol.recorded(content["protocol"])})

    def retraced(self, dataset: Part, backbone: Part, selector: Part, data: str) -> RunSpec:
        """The same cell as this process names it; with another key where its code or libraries are others.

        Args:
            dataset, backbone, selector: as they are here, see `part_here`.
            data: fingerprint of the dataset's files here.
        """
        return RunSpec(
            dataset, backbone, selector, self.evaluation, self.fold, self.seed, self.protocol, self.preset,
            data + content_of_files(self.protocol), self.device, tuning=self.tuning,
        )  # fmt: skip


def is_typed(spec: Mapping[str, Any]) -> bool:
    """Whether a cell, given as JSON, has texts and numbers where they belong; raises KeyError where it lacks them."""
    parts = [spec[kind] for kind in ("dataset", "backbone", "selector")]
    names = [spec[n] for n in ("evaluation", "fold", "preset", "data", "device", "version", "libraries")]
    names += [part.get(n, "") for part in parts for n in ("name", "label", "provider", "source")]
    objects = [spec["protocol"], *(part["settings"] for part in parts)]
    return (
        all(isinstance(name, str) for name in names)
        and all(isinstance(one, dict) for one in objects)
        and type(spec["seed"]) is int
    )


def asked_for(spec: Mapping[str, Any]) -> str:
    """Digest of what a cell, given as JSON, was asked for as, whatever code, data and device answer it."""
    content = {name: spec[name] for name in ("evaluation", "fold", "seed", "protocol")}
    for kind in ("dataset", "backbone", "selector"):
        content[kind] = [spec[kind]["name"], spec[kind]["settings"]]
    content["tuning"] = spec.get("tuning")
    return text_digest(json.dumps(content, sort_keys=True, separators=(",", ":")))


CAMPAIGN_KEYS = ("preset", "selectors", "datasets", "evaluation", "backbone", "seeds", "fold", "protocol", "plugins")


@dataclass(frozen=True)
class Campaign:
    """What the user asked for, before any data is read.

    Attributes:
        selectors, backbones, evaluations: names.
        datasets: names, or NAME:VALUE with a value for the setting that the dataset calls its argument.
        seeds: roots.
        folds: labels to keep; empty = all.
        protocol: conditions held equal.
        preset: label of the protocol.
        settings: plug-in name -> settings given by preset, file or command line.
        given: those settings and protocol settings, as NAME.KEY, that file or command line give.
    """

    selectors: tuple[str, ...]
    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    evaluations: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: tuple[str, ...]
    protocol: Protocol
    preset: str
    settings: dict[str, dict[str, object]] = field(hash=False)
    given: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        plugins: Plugins,
        *,
        file: Path | None = None,
        preset: str | None = None,
        assignments: Sequence[str] = (),
        **lists: Sequence[str],
    ) -> Campaign:
        """Merge preset, file and command line, each over the one before.

        Args:
            plugins: who provides which name.
            file: TOML with the keys of `CAMPAIGN_KEYS`.
            preset: name of the preset; over the file's.
            assignments: "NAME.KEY=VALUE" with NAME a plug-in or "protocol".
            lists: selectors, datasets, backbone, evaluation, seeds, fold; an empty list leaves the file's.

        Raises:
            UnknownName, BadSpec: for anything that nobody knows or that is out of range.
        """
        table = read_toml(file, allowed=CAMPAIGN_KEYS) if file else {}
        plugin_tables = table.get("plugins", {})
        if not (
            isinstance(table.get("protocol", {}), dict)
            and isinstance(plugin_tables, dict)
            and all(isinstance(t, dict) for t in plugin_tables.values())
        ):
            raise BadSpec(f"{file}: settings stand in tables, [protocol] and [plugins.NAME], each line KEY = VALUE")
        defaults = {"backbone": ["tiny"], "evaluation": list(EVALUATIONS), "seeds": ["0"], "fold": []}
        listed = ("selectors", "datasets", "backbone", "evaluation", "seeds", "fold")
        in_file = _lists_of(file, table, listed)
        chosen = {
            key: _some(key, _names(lists[key])) if lists.get(key) else in_file.get(key, _names(defaults.get(key, ())))
            for key in listed
            if key != "datasets"
        }
        chosen["datasets"] = _dataset_words(plugins, lists.get("datasets") or table.get("datasets") or ())
        if lists.get("datasets"):
            _some("datasets", chosen["datasets"])
        for key in ("selectors", "datasets"):
            if not chosen[key]:
                kind = key[:-1]
                raise BadSpec(
                    f"no {key} given; use --{key} {','.join(plugins.names(kind)[:2])},… ({_listing(plugins, kind)})"
                )
        for key, kind in (("selectors", "selector"), ("backbone", "backbone")):
            for name in chosen[key]:
                plugins.entry(name, kind)
        if not isinstance(table.get("preset", ""), str):
            raise BadSpec(f'{file}: preset = {table["preset"]!r} is not a name; write e.g. preset = "clean"')
        base = load_preset(table.get("preset", "clean") if preset is None else preset)
        protocol, settings, changed = _settings(plugins, base, table, assignments)
        return cls(
            selectors=chosen["selectors"],
            datasets=chosen["datasets"],
            backbones=chosen["backbone"],
            evaluations=evaluations_of(chosen["evaluation"]),
            seeds=seeds_of(chosen["seeds"]),
            folds=chosen["fold"],
            protocol=protocol,
            preset=base.label + (f" with {', '.join(changed)}" if changed else ""),
            settings=settings,
            given=frozenset(
                [f"{name}.{key}" for name, key, _ in map(_assignment, assignments)]
                + [f"protocol.{key}" for key in table.get("protocol", {})]
                + [f"{name}.{key}" for name, values in plugin_tables.items() for key in values]
            ),
        )

    def part(self, plugins: Plugins, name: str, kind: str) -> Part:
        """A plug-in with all its settings resolved; a dataset by its name or NAME:VALUE."""
        return _part(plugins, name, kind, self.settings)

    def cells(
        self, plugins: Plugins, root: Path, *, device: str, fingerprint: Mapping[str, str]
    ) -> list[tuple[RunSpec, FoldPlan]]:
        """Every cell, in an order that keeps cells on the same data together and rotates selectors fastest.

        Args:
            plugins: who provides which name.
            root: data folder.
            device: "cpu" or "cuda".
            fingerprint: dataset name -> digest of its files.

        Raises:
            MissingData: if a dataset is not there.
            UnknownName: if a fold label asked for does not exist.
            BadSpec: if the protocol names a file that is not there or that has no fold of an evaluation, or normalises
                in a way that a dataset does not allow.
        """
        cells, labels = [], []
        named = content_of_files(self.protocol)
        selectors = [self.part(plugins, s, "selector") for s in self.selectors]
        backbones = [self.part(plugins, b, "backbone") for b in self.backbones]
        for name in self.datasets:
            part = self.part(plugins, name, "dataset")
            dataset = make_dataset(plugins, part)
            check_normalisation(name, dataset, self.protocol)
            donors = dataset.sections(root)
            for evaluation in self.evaluations:
                if evaluation == "inter" and len(donors) < 2 and "intra" in self.evaluations:
                    continue  # a single section has its folds within; asked for alone, it is an error below
                plans = plan_folds(evaluation, donors, self.protocol, dataset=name)
                if not plans and len(self.evaluations) == 1:
                    raise BadSpec(
                        f"protocol.fold_file = '{self.protocol.fold_file}' has no fold for --evaluation {evaluation}: "
                        "intra tests spots of sections that it trains on, inter spots of other sections"
                    )
                for plan in plans:
                    labels.append(plan.label)
                    if self.folds and plan.label not in self.folds:
                        continue
                    for seed in self.seeds:
                        for backbone in backbones:
                            for selector in selectors:
                                spec = RunSpec(
                                    part, backbone, selector, evaluation, plan.label, seed,
                                    self.protocol, self.preset, fingerprint.get(name, "") + named, device,
                                )  # fmt: skip
                                cells.append((spec, plan))
        for label in self.folds:
            if label not in labels:
                raise UnknownName("fold", label, dict.fromkeys(labels))
        return cells


def content_of_files(protocol: Protocol) -> str:
    """What the files that a protocol names add to the fingerprint of the data: a file stands for its content.

    Raises:
        BadSpec: if one is not there.
    """
    return "".join(f"+{file_digest(path)}" for path in protocol.files())


def part_here(plugins: Plugins, part: Part, kind: str) -> Part:
    """The same plug-in with the same settings, as it is here and now: its source and provider may be others.

    Raises:
        UnknownName, BadSpec: if it is not there, or does not know a setting.
    """
    return replace(_part(plugins, part.name, kind, {part.name: dict(part.settings)}), label=part.label)


def one_part(
    plugins: Plugins, name: str, kind: str, assignments: Sequence[str], own: Mapping[str, object] | None = None
) -> Part:
    """A single plug-in with settings from "NAME.KEY=VALUE", outside any campaign; a dataset by its name or NAME:VALUE.

    Args:
        plugins: where it is.
        name: of it.
        kind: its door.
        assignments: settings.
        own: settings as values; those in `assignments` go before.

    Raises:
        UnknownName, BadSpec: for anything that nobody knows or that is out of range.
    """
    plain = name.partition(":")[0] if kind == "dataset" else name
    given: dict[str, object] = dict(own or {})
    for text in assignments:
        target, key, value = _assignment(text)
        if target != plain:
            raise BadSpec(f"--set {text!r} is about {target}, not about {plain}")
        given[key] = value
    return _part(plugins, name, kind, {plain: given})


def one_dataset(plugins: Plugins, name: str, preset: str, assignments: Sequence[str]) -> tuple[Part, Protocol]:
    """A dataset and the protocol of a preset, both with settings from "NAME.KEY=VALUE", outside any campaign.

    Raises:
        UnknownName, BadSpec: for anything that nobody knows or that is out of range.
    """
    about = {text: _assignment(text) for text in assignments}
    given = {key: value for target, key, value in about.values() if target == "protocol"}
    own = [text for text, (target, _, _) in about.items() if target != "protocol"]
    return one_part(plugins, name, "dataset", own), Protocol.of(load_preset(preset).protocol | given)


def evaluations_of(words: Sequence[str]) -> tuple[str, ...]:
    """Evaluations from comma-separated words.

    Raises:
        UnknownName: for one that does not exist.
        BadSpec: if there is none.
    """
    names = _some("evaluation", _names(words))
    for name in names:
        if name not in EVALUATIONS:
            raise UnknownName("evaluation", name, EVALUATIONS)
    return names


def seeds_of(words: Sequence[str]) -> tuple[int, ...]:
    """Seeds from comma-separated words.

    Raises:
        BadSpec: for one that is no whole number ≥ 0, or if there is none.
    """
    return tuple(dict.fromkeys(_seed(word) for word in _some("seeds", _names(words))))


def make_dataset(plugins: Plugins, part: Part) -> Dataset:
    """An instance with the settings of the part.

    Raises:
        BadPlugin: if it cannot be made.
    """
    make = plugins.entry(part.name, "dataset").load()
    with naming_the_dataset(part):
        dataset: Dataset = make(**part.settings)
    return dataset


@contextlib.contextmanager
def naming_the_dataset(part: Part) -> Iterator[None]:
    """Whatever a dataset plug-in raises by mistake becomes a sentence that names it; the process stays as it was.

    Raises:
        BadPlugin: if it raises, or if a stranger's one changes settings of the process.
    """
    try:
        with watched(is_import=False) as seen:
            yield
    except AglBenchError:
        raise
    except PermissionError as error:  # of the user's data, no fault of the plug-in
        raise MissingData(f"dataset '{part.name}': {error.filename} {FORBIDDEN}") from None
    except (Exception, SystemExit) as error:
        raise BadPlugin(f"dataset '{part.name}' of {part.provider}: {told(error)}") from error
    sys.stderr.write(seen.printed)
    if seen.changed and not part.provider.startswith(f"{OWN} "):  # of ours, libraries that it imports change some
        raise BadPlugin(
            f"dataset '{part.name}' of {part.provider} changes {', '.join(seen.changed)}, which affects everything "
            "that runs afterwards; leave it unchanged"
        )


def check_normalisation(name: str, dataset: Dataset, protocol: Protocol) -> None:
    """Raw counts are to be normalised, and nothing else is.

    Raises:
        BadSpec: if the protocol says otherwise, or scores genes by counts that are not there.
    """
    if dataset.has_counts and protocol.normalisation == "none":
        raise BadSpec(
            f"protocol.normalisation = none is for values that are normalised already, and dataset '{name}' has raw "
            "counts; use normalize_total+log1p"
        )
    if dataset.has_counts:
        return
    cure = {} if protocol.normalisation == "none" else {"normalisation": "none"}
    for setting, instead in (("primary_score", protocol.primary_file), ("ranking", protocol.ranking_file)):
        if getattr(protocol, setting) in OF_COUNTS and not instead:
            cure[setting] = "seurat"
    if cure:
        raise BadSpec(
            f"dataset '{name}' has normalised values and no raw counts, but "
            + ", ".join(f"protocol.{setting} = {getattr(protocol, setting)}" for setting in cure)
            + f" need{'s' if len(cure) == 1 else ''} counts; use the values as they are with "
            + " ".join(f"--set protocol.{setting}={value}" for setting, value in cure.items())
        )


def _settings(
    plugins: Plugins, base: Preset, table: Mapping[str, Any], assignments: Sequence[str]
) -> tuple[Protocol, dict[str, dict[str, object]], list[str]]:
    """Protocol, plug-in settings, and what differs from the preset, for its label."""
    protocol = base.protocol | dict(table.get("protocol", {}))
    settings: dict[str, dict[str, object]] = {}
    for source in (base.plugins, table.get("plugins", {})):
        for name, values in source.items():
            plugins.entry(name)
            settings[name] = settings.get(name, {}) | dict(values)
    for text in assignments:
        name, key, value = _assignment(text)
        if name == "protocol":
            protocol[key] = value
        else:
            plugins.entry(name)
            settings.setdefault(name, {})[key] = value
    merged, plain = Protocol.of(protocol), Protocol.of(base.protocol)
    changed = [f"{k}={v}" for k, v in merged.settings().items() if v != plain.settings()[k]]
    for name, values in settings.items():
        known = tunables(plugins.entry(name).load())
        given, before = resolve(name, known, values), resolve(name, known, base.plugins.get(name, {}))
        changed += [f"{name}.{k}={v}" for k, v in given.items() if v != before[k]]
    return merged, settings, changed


def _assignment(text: str) -> tuple[str, str, str]:
    """Name, key and value of "NAME.KEY=VALUE"."""
    target, equals, value = text.partition("=")
    name, dot, key = target.strip().partition(".")
    if not (equals and dot and key):
        raise BadSpec(f"--set {text!r} is not of the form NAME.KEY=VALUE, e.g. protocol.epochs=50")
    return name, key, value.strip()


def _dataset_words(plugins: Plugins, value: object) -> tuple[str, ...]:
    """Datasets by name or NAME:VALUE; after a colon, what is no dataset is more of the value, as is a path that exists.

    `hest:TENX152,TENX89,heart` is `hest:TENX152,TENX89` and `heart`; a path may hold commas.
    """
    known = plugins.names("dataset")
    words: list[str] = []
    for piece in (piece for item in _items(value) for piece in str(item).split(",")):
        name = piece.strip().partition(":")[0]
        longer = f"{words[-1]},{piece}" if words and ":" in words[-1] else ""
        if longer and (name not in known or Path(longer.partition(":")[2]).expanduser().exists()):
            words[-1] = longer
        elif piece.strip():
            plugins.entry(name, "dataset")  # raises where nobody knows it
            words.append(piece.strip())
    return tuple(dict.fromkeys(words))


def _part(plugins: Plugins, word: str, kind: str, given: Mapping[str, Mapping[str, object]]) -> Part:
    """A plug-in with its settings: those given under its name, and VALUE of NAME:VALUE for its argument."""
    name, colon, value = word.partition(":") if kind == "dataset" else (word, "", "")
    entry = plugins.entry(name, kind)
    own = dict(given.get(name, {}))
    if colon:
        argument = getattr(entry.load(), "argument", "")
        if not argument:
            raise BadSpec(
                f"dataset '{name}' takes nothing after a colon ('{word}'); its settings are given by "
                f"--set {name}.KEY=VALUE, see `agl-bench show {name}`"
            )
        if not value:
            raise BadSpec(f"'{word}' names nothing after the colon; it takes {name}.{argument}, e.g. {name}:VALUE")
        if argument in own:
            raise BadSpec(
                f"'{word}' and a setting of {name}.{argument} say the same thing twice; leave one of them out"
            )
        own[argument] = value
    known = tunables(entry.load())
    settings = resolve(entry.name, known, own)
    # A text that names a file, e.g. of weights, stands for its content; a choice does not, whatever lies about here.
    texts = [v for k, v in settings.items() if isinstance(v, str) and str in (known[k].kind, *get_args(known[k].kind))]
    files = [Path(text) for text in texts if text and Path(text).is_file()]
    if kind == "backbone":
        files += entry.load().weight_files(settings)  # type: ignore[attr-defined]
    source = "".join([entry.digest(), *(file_digest(f) for f in dict.fromkeys(files))])
    return Part(entry.name, settings, entry.provider, source, word)


def _lists_of(file: Path | None, table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The lists of a campaign's file; those too that an option overrides may not be wrong."""
    found = {}
    for key in keys:
        if key in table:
            numbers = key in ("seeds", "fold")
            if not numbers and any(isinstance(item, int) for item in _items(table[key], f"{file}: {key} = ")):
                raise BadSpec(f"{file}: {key} = {table[key]!r} is not a name or a list of names")
            found[key] = _names(table[key], f"{file}: {key} = ")
            if not found[key]:
                raise BadSpec(f"{file}: {key} is empty; name at least one, or leave it out")
    for check, key in ((evaluations_of, "evaluation"), (seeds_of, "seeds")):
        if key in found:
            check(found[key])
    return found


def _names(value: object, where: str = "") -> tuple[str, ...]:
    """Comma-separated texts and lists of them, flattened, without repetition."""
    return tuple(dict.fromkeys(n.strip() for item in _items(value, where) for n in str(item).split(",") if n.strip()))


def _items(value: object, where: str = "") -> Sequence[str | int]:
    items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(i, str | int) and not isinstance(i, bool) for i in items):
        raise BadSpec(f"{where}{value!r} is not a name or a list of names")
    return items


def _some(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise BadSpec(f"--{option} is empty; name at least one, or leave it out")
    return names


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _SEED_DIGITS):
        raise BadSpec(f"seed {text!r} is not a whole number ≥ 0 of at most {_SEED_DIGITS} digits; use --seeds 0,1,2")
    return int(text)


def _listing(plugins: Plugins, kind: str) -> str:
    return f"{kind}s: {', '.join(plugins.names(kind))}"
