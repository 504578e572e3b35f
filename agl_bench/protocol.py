"""Every condition that is held equal across selectors, as one value: TOML in, TOML out, named presets.

The defaults here *are* the preset `clean`; `benchmarks/clean.toml` spells them out and a test keeps the two equal.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from agl_bench.errors import BadSpec, UnknownName
from agl_bench.interfaces.tunable import LogRange, Range, Tunable, Value, resolve, tunable

PRESETS = ("clean", "clean_v1", "paper", "paper_v1", "paper_v2", "paper_v3", "smoke")
Precision = Literal["fp32", "tf32", "bf16"]
Variability = Literal["pearson_residuals", "seurat", "cell_ranger", "seurat_v3", "moran"]
Ranking = Literal["pearson_residuals", "seurat", "cell_ranger", "seurat_v3", "moran", "mean", "detection"]
OF_COUNTS = ("pearson_residuals", "seurat_v3")  # scores of genes that need raw counts
# Settings that are younger than the first records. Without one of them, a record says that it had no effect; so records
# leave it out where it has none, and the identity of older cells, and of presets that switch it off, stays.
NO_EFFECT: Mapping[str, Value] = {"spot_mads": 0.0}
# What only training reads: no fold, gene, target or patch depends on these, nor what a validation score means.
TRAINING = frozenset(
    {
        *("augment", "loss", "batch_size", "batches_within_section", "learning_rate", "weight_decay", "epochs"),
        *("patience", "precision", "compile", "warm_start", "schedule", "outer_start", "outer_every"),
        *("round_patience", "outer_patience", "outer_passes", "outer_pass_over", "outer_restart", "outer_batch_size"),
        *("inner_batch_size", "outer_batches", "inner_subsets", "inner_subset_size", "inner_divisor"),
        *("outer_augment", "outer_mode", "detach_weight_sum"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions of a comparison. Two results may share a table only if their protocols are equal."""

    # Genes and targets
    min_genes_per_spot: Annotated[int, Range(0, 100_000)] = 50
    spot_mads: Annotated[float, Range(0, 100)] = 5.0  # so far below the section's median a spot is too thin; 0 = off
    min_spots_per_gene: Annotated[int, Range(0, 1_000_000)] = 1
    # "none" is for datasets without raw counts, and for them only
    normalisation: Literal["normalize_total+log1p", "log1p", "pearson_residuals", "none"] = "normalize_total+log1p"
    standardise: Literal["none", "section"] = "none"  # targets: z-scores by the training spots of each section
    primary_score: Variability = "pearson_residuals"
    primary_genes: Annotated[int, Range(1, 100_000)] = 50  # those with the highest primary_score
    primary_detection: Annotated[float, Range(0, 1)] = 0.25  # of the spots; a rarer gene is never primary
    primary_file: str = ""  # names of the primary genes, one a line or a CSV column; overrides the three above
    ranking: Ranking = "pearson_residuals"  # of auxiliary genes
    ranking_file: str = ""  # lines "gene,score", or names in order; overrides ranking, genes not listed come last
    nan_scores: Literal["last", "first"] = "last"  # rank of auxiliary genes without a score
    genes_from: Literal["training", "all"] = "training"  # spots that decide gene filter, primary genes and ranks

    # Folds
    folds: Annotated[int, Range(2, 100)] = 5
    fold_shape: Literal["blocks", "random"] = "blocks"
    buffer_um: Annotated[float | Literal["patch"], Range(0, 10_000)] = "patch"  # between train, the others, and test
    validation_share: Annotated[float, Range(0.01, 0.5)] = 0.2  # of the spots that are not test
    held_out_share: Annotated[float, Range(0, 0.5)] = 0.15  # likewise, for the outer loss; 0 = use validation spots
    leave_out: Literal["auto", "section", "donor"] = "auto"  # inter; auto = donor if all are known
    fold_file: str = ""  # CSV with columns section, spot, fold, set; overrides all of the above

    # Patches
    patch_um: Annotated[float, Range(1, 10_000)] = 112.0
    patches: Literal["own", "shuffled"] = "own"  # shuffled: dealt anew within a section; a control, must score 0
    augment: bool = True  # flips and quarter turns of training patches

    # Training
    loss: Literal["pearson", "squared_error"] = "pearson"
    batch_size: Annotated[int, Range(2, 100_000)] = 64
    batches_within_section: bool = True  # a batch never mixes sections
    learning_rate: Annotated[float | Literal["backbone"], LogRange(1e-7, 10)] = "backbone"  # of the model, Adam
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    epochs: Annotated[int, Range(1, 1_000_000)] = 100
    patience: Annotated[int, Range(1, 1_000_000)] = 20
    precision: Precision = "fp32"  # of first-order steps; look-aheads are always fp32
    compile: bool = False  # torch.compile for first-order steps
    warm_start: Literal["none", "learners", "all"] = "none"  # whose training follows one on all genes, see Course

    # Outer steps, for selectors that learn from validation
    schedule: Literal["alternating", "two_stage"] = "alternating"  # outer steps at set epochs, or once a round
    outer_start: Annotated[int, Range(0, 1_000_000)] = 1  # alternating: first epoch that opens with outer steps
    outer_every: Annotated[int, Range(1, 1_000_000)] = 1  # alternating: epochs
    round_patience: Annotated[int, Range(1, 1_000_000)] = 50  # two_stage: epochs without gain that end a round
    outer_patience: Annotated[int, Range(0, 1_000_000)] = 0  # passes without gain that end outer steps; 0 = one pass
    outer_passes: Annotated[int, Range(1, 1_000_000)] = 1000  # at most, where outer_patience ends them
    outer_pass_over: Literal["training", "held_out"] = "training"  # spots that a pass takes once
    outer_restart: bool = False  # outer steps begin with the selector as it was at first, and with a new optimiser
    outer_batch_size: Annotated[int, Range(0, 100_000)] = 0  # of inner and outer loss; 0 = batch_size
    inner_batch_size: Annotated[int, Range(0, 100_000)] = 0  # of the inner loss; 0 = as the outer loss
    outer_batches: Annotated[int, Range(0, 100_000)] = 16  # of a pass that a look-ahead's losses average; 0 = all
    inner_subsets: Annotated[int, Range(0, 10_000)] = 0  # inner loss: mean over random subsets of a batch; 0 = itself
    inner_subset_size: Annotated[int, Range(2, 100_000)] = 128  # spots of such a subset
    inner_divisor: Annotated[float, Range(1, 1_000_000)] = 1.0  # of the inner loss; weighs Adam's ε up
    outer_augment: bool = False  # augment the batch of the outer loss
    outer_mode: Literal["train", "eval"] = "train"  # of normalisation and dropout in the outer loss
    detach_weight_sum: bool = True  # treat Σw of the weighted mean as a constant, as the released code does

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Protocol:
        """Build from plain values; unknown keys and values outside their range are errors."""
        protocol = cls(**resolve("protocol", _known(), settings))  # type: ignore[arg-type]
        if protocol.validation_share + protocol.held_out_share >= 0.9:
            shares = protocol.validation_share + protocol.held_out_share
            raise BadSpec(
                f"protocol.validation_share + protocol.held_out_share = {shares:g} leaves no spots to train on; "
                "keep it below 0.9"
            )
        return protocol

    @property
    def buffer(self) -> float:
        """Width of the buffer between sets, µm."""
        return self.patch_um if self.buffer_um == "patch" else float(self.buffer_um)

    def settings(self) -> dict[str, Value]:
        """Plain values, ready for JSON or TOML."""
        return asdict(self)

    def record(self) -> dict[str, Value]:
        """What the record of a cell says of it: `settings` without those of `NO_EFFECT`."""
        return {name: value for name, value in self.settings().items() if NO_EFFECT.get(name) != value}

    @classmethod
    def recorded(cls, settings: Mapping[str, object]) -> Protocol:
        """Inverse of `record`; also of a record that is older than a setting."""
        return cls.of({**NO_EFFECT, **settings})

    def of_data(self) -> Protocol:
        """The same conditions for folds, genes, targets and patches, with the defaults of `TRAINING`."""
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in TRAINING})  # type: ignore[arg-type]

    def files(self) -> list[Path]:
        """The files that the protocol names; their content is part of the conditions.

        Raises:
            BadSpec: if one is not there.
        """
        named = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name.endswith("_file")}
        for name, path in named.items():
            if path and not Path(path).is_file():
                raise BadSpec(f"protocol.{name} = '{path}' is not a file; name one that exists, or leave it empty")
        return [Path(path) for path in named.values() if path]


@dataclass(frozen=True)
class Preset:
    """A named starting point: protocol settings and plug-in settings.

    Attributes:
        name: what it is asked for by.
        protocol, plugins: its settings.
        version: grows when its settings change.
    """

    name: str
    protocol: dict[str, object]
    plugins: dict[str, dict[str, object]]
    version: int = 1

    @property
    def label(self) -> str:
        """For records and tables: the name, from the second version on with the version, e.g. "clean v2"."""
        return self.name + (f" v{self.version}" if self.version > 1 else "")


def preset_names() -> list[str]:
    """Presets that come with agl-bench."""
    return list(PRESETS)


def load_preset(name: str) -> Preset:
    """Read a preset that comes with agl-bench; one with a `base` is what it changes of that one.

    Raises:
        UnknownName: with the names that exist.
    """
    if name not in preset_names():
        raise UnknownName("preset", name, preset_names())
    table = read_toml(_preset_folder() / f"{name}.toml", allowed=("version", "base", "protocol", "plugins"))
    base = load_preset(table["base"]) if "base" in table else Preset(name, {}, {})
    own = table.get("plugins", {})
    plugins = {n: base.plugins.get(n, {}) | own.get(n, {}) for n in {**base.plugins, **own}}
    return Preset(name, base.protocol | table.get("protocol", {}), plugins, table.get("version", 1))


def read_toml(path: Path, *, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Read a TOML file whose top-level keys must be among `allowed`."""
    try:
        if path.exists() and not (path.is_file() or "/fd/" in str(path)):  # a device never ends, a pipe may never begin
            raise BadSpec(f"cannot read {path}: it is not a file")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSpec(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # also for bytes that are no text, and numbers with thousands of digits
        raise BadSpec(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise BadSpec(f"{path} is nested too deeply; write flat tables and lists") from None
    for key in table:
        if key not in allowed:
            raise UnknownName(f"key of {path.name}", key, allowed)
    return table


@cache
def _known() -> dict[str, Tunable]:
    hints = typing.get_type_hints(Protocol, include_extras=True)
    return {field.name: tunable(field.name, hints[field.name], field.default) for field in fields(Protocol)}  # type: ignore[arg-type]


def _preset_folder() -> Path:
    """Inside an installed wheel the presets lie beside this file; in a checkout they are in `benchmarks/`."""
    installed = Path(__file__).parent / "presets"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "benchmarks"
