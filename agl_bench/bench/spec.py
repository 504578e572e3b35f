"""What a cell is, and which cells a campaign consists of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import agl_bench
from agl_bench import __version__
from agl_bench.data.folds import EVALUATIONS, FoldPlan, plan_folds
from agl_bench.digests import file_digest, text_digest
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.tunable import Value, resolve, tunables
from agl_bench.protocol import Preset, Protocol, load_preset, read_toml
from agl_bench.registry.plugins import Entry, Plugins


@cache
def _engine() -> str:
    """Digest of the code of agl-bench that decides results."""
    here = Path(agl_bench.__file__).parent
    parts = [p for folder in ("maths", "interfaces", "data", "training") for p in sorted((here / folder).glob("*.py"))]
    deciding = ("protocol.py", "bench/run.py", "bench/planted.py")
    text = "".join(file_digest(p) for p in (*parts, *(here / name for name in deciding)))
    return text_digest(text, 4)


@dataclass(frozen=True)
class Part:
    """A plug-in as it takes part in a cell.

    Attributes:
        name: as registered.
        settings: every tunable with its value.
        provider: distribution and version, or the file.
        source: digest of the defining files, and of the content of every file that a setting names.
    """

    name: str
    settings: dict[str, Value] = field(hash=False)
    provider: str
    source: str


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
        data: fingerprint of the dataset's files.
        device: "cpu" or "cuda"; floating-point sums differ between them.
        version: of agl-bench, with a digest of the code that decides results.
        libraries: versions of those that decide results.
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
    version: str = field(default_factory=lambda: f"{__version__}+{_engine()}")
    libraries: str = field(default_factory=lambda: ", ".join(f"{n} {version(n)}" for n in ("torch", "scanpy")))

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
        return text_digest(json.dumps(content, sort_keys=True, separators=(",", ":")))

    @property
    def title(self) -> str:
        """For progress lines: dataset, evaluation, backbone, selector, fold and seed."""
        return (
            f"{self.dataset.name} · {self.evaluation} · {self.backbone.name} · {self.selector.name} · "
            f"fold {self.fold} · seed {self.seed}"
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
            "protocol": self.protocol.settings(),
            "preset": self.preset,
            "data": self.data,
            "device": self.device,
            "version": self.version,
            "libraries": self.libraries,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunSpec:
        """Inverse of `as_json`."""
        plain = dict(content)
        for name in ("dataset", "backbone", "selector"):
            plain[name] = Part(**plain[name])
        return cls(**plain | {"protocol": Protocol.of(content["protocol"])})


CAMPAIGN_KEYS = ("preset", "selectors", "datasets", "evaluation", "backbone", "seeds", "fold", "protocol", "plugins")


@dataclass(frozen=True)
class Campaign:
    """What the user asked for, before any data is read.

    Attributes:
        selectors, datasets, backbones, evaluations: names.
        seeds: roots.
        folds: labels to keep; empty = all.
        protocol: conditions held equal.
        preset: label of the protocol.
        settings: plug-in name -> settings given by preset, file or command line.
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
        chosen = {
            key: _names(lists.get(key) or table.get(key) or defaults.get(key) or ())
            for key in ("selectors", "datasets", "backbone", "evaluation", "seeds", "fold")
        }
        for key in ("selectors", "datasets"):
            if not chosen[key]:
                kind = key[:-1]
                raise BadSpec(
                    f"no {key} given; use --{key} {','.join(plugins.names(kind)[:2])},… ({_listing(plugins, kind)})"
                )
        for key in ("backbone", "evaluation", "seeds"):
            if not chosen[key]:
                raise BadSpec(f"--{key} is empty; name at least one, or leave it out")
        for key, kind in (("selectors", "selector"), ("datasets", "dataset"), ("backbone", "backbone")):
            for name in chosen[key]:
                plugins.entry(name, kind)
        for evaluation in chosen["evaluation"]:
            if evaluation not in EVALUATIONS:
                raise UnknownName("evaluation", evaluation, EVALUATIONS)
        base = load_preset(str(preset or table.get("preset") or "clean"))
        protocol, settings, changed = _settings(plugins, base, table, assignments)
        return cls(
            selectors=chosen["selectors"],
            datasets=chosen["datasets"],
            backbones=chosen["backbone"],
            evaluations=chosen["evaluation"],
            seeds=tuple(dict.fromkeys(_seed(s) for s in chosen["seeds"])),
            folds=chosen["fold"],
            protocol=protocol,
            preset=base.name + (f" with {', '.join(changed)}" if changed else ""),
            settings=settings,
        )

    def part(self, plugins: Plugins, name: str, kind: str) -> Part:
        """A plug-in with all its settings resolved."""
        entry = plugins.entry(name, kind)
        return _part(entry, self.settings.get(name, {}))

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
        """
        cells, labels = [], []
        selectors = [self.part(plugins, s, "selector") for s in self.selectors]
        backbones = [self.part(plugins, b, "backbone") for b in self.backbones]
        for name in self.datasets:
            part = self.part(plugins, name, "dataset")
            dataset = make_dataset(plugins.entry(name, "dataset"), part)
            donors = dataset.sections(root)
            for evaluation in self.evaluations:
                if evaluation == "inter" and len(donors) < 2 and "intra" in self.evaluations:
                    continue  # a single section has its folds within; asked for alone, it is an error below
                for plan in plan_folds(evaluation, donors, self.protocol, dataset=name):
                    labels.append(plan.label)
                    if self.folds and plan.label not in self.folds:
                        continue
                    for seed in self.seeds:
                        for backbone in backbones:
                            for selector in selectors:
                                spec = RunSpec(
                                    part, backbone, selector, evaluation, plan.label, seed,
                                    self.protocol, self.preset, fingerprint.get(name, ""), device,
                                )  # fmt: skip
                                cells.append((spec, plan))
        for label in self.folds:
            if label not in labels:
                raise UnknownName("fold", label, dict.fromkeys(labels))
        return cells


def one_part(plugins: Plugins, name: str, kind: str, assignments: Sequence[str]) -> Part:
    """A single plug-in with settings from "NAME.KEY=VALUE", outside any campaign.

    Raises:
        UnknownName, BadSpec: for anything that nobody knows or that is out of range.
    """
    entry = plugins.entry(name, kind)
    given: dict[str, object] = {}
    for text in assignments:
        target, key, value = _assignment(text)
        if target != name:
            raise BadSpec(f"--set {text!r} is about {target}, not about {name}")
        given[key] = value
    return _part(entry, given)


def make_dataset(entry: Entry, part: Part) -> Dataset:
    """An instance with the settings of the part."""
    dataset: Dataset = entry.load()(**part.settings)
    return dataset


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


def _part(entry: Entry, given: Mapping[str, object]) -> Part:
    settings = resolve(entry.name, tunables(entry.load()), given)
    # A setting that names a file, e.g. of weights, stands for its content.
    files = [Path(v) for v in settings.values() if isinstance(v, str) and v and Path(v).is_file()]
    source = "".join([entry.digest(), *(file_digest(f) for f in files)])
    return Part(entry.name, settings, entry.provider, source)


def _names(value: object) -> tuple[str, ...]:
    """Comma-separated texts and lists of them, flattened, without repetition."""
    items = [value] if isinstance(value, str | int) else value
    if not isinstance(items, list | tuple) or not all(isinstance(i, str | int) for i in items):
        raise BadSpec(f"{value!r} is not a name or a list of names")
    return tuple(dict.fromkeys(n.strip() for item in items for n in str(item).split(",") if n.strip()))


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise BadSpec(f"seed {text!r} is not a whole number ≥ 0; use --seeds 0,1,2")
    return int(text)


def _listing(plugins: Plugins, kind: str) -> str:
    return f"{kind}s: {', '.join(plugins.names(kind))}"
