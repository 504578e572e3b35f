"""What must hold for the sections of a dataset before anything is trained on them.

Each failed check is one sentence: the section, the first offending spot or gene, and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse

from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.spots import Section

_ENTRIES = 4_000_000  # entries looked at at once: temporary arrays stay in the tens of megabytes


def check_dataset(name: str, sections: Sequence[Section]) -> None:
    """Check what concerns the sections together. Each section by itself is the matter of `check_section`.

    Raises:
        BadSpec: if there is no section or a name is repeated.
        BadSection: if the sections have no gene in common; names the section at which the last one is lost.
    """
    if not sections:
        raise BadSpec(f"dataset '{name}' has no section; choose at least one")
    names = pd.Index([section.name for section in sections])
    if not names.is_unique:
        raise BadSpec(f"dataset '{name}' has section '{names[names.duplicated()][0]}' more than once; names are unique")
    common = set(sections[0].counts.var_names)
    for position, section in enumerate(sections):
        common.intersection_update(section.counts.var_names)
        if not common and section.counts.n_vars:
            before = ", ".join(f"'{earlier}'" for earlier in names[:position])
            raise BadSection(
                section.name,
                f"no gene of it is in all of {before} of dataset '{name}': it has '{section.counts.var_names[0]}', "
                f"section '{names[0]}' has '{sections[0].counts.var_names[0]}'; name genes in the same way everywhere",
            )


def check_section(section: Section) -> None:
    """Check counts, names, coordinates, image and embedding of one section.

    Raises:
        BadSection: at the first check that fails.
    """
    spots, genes = section.counts.shape
    if not spots:
        raise BadSection(section.name, "it has no spots; check the file, or leave the section out")
    if not genes:
        raise BadSection(section.name, "it has no genes; check the file, or leave the section out")
    _check_names(section)
    _check_counts(section)
    _check_positions(section)
    _check_embedding(section)


def _check_names(section: Section) -> None:
    for names, axis, kind in ((section.counts.obs_names, "obs", "spot"), (section.counts.var_names, "var", "gene")):
        if not names.is_unique:
            raise BadSection(
                section.name,
                f"{kind} '{names[names.duplicated()][0]}' is there more than once "
                f"({len(names) - names.nunique()} repeated); drop the copies or call {axis}_names_make_unique()",
            )


def _check_counts(section: Section) -> None:
    X = section.counts.X
    if X is None:
        raise BadSection(section.name, "counts.X is empty; put the raw counts (spots × genes) there")
    if not isinstance(X, np.ndarray) and not scipy.sparse.issparse(X):
        raise BadSection(section.name, f"counts.X is a {type(X).__name__}; it has to be an array or a sparse matrix")
    if X.dtype.kind not in "iufb":
        raise BadSection(section.name, f"counts.X holds {X.dtype}; counts have to be numbers")
    if scipy.sparse.issparse(X) and X.format not in ("csr", "csc"):
        X = X.tocsr()
    values = X.data if scipy.sparse.issparse(X) else np.asarray(X).reshape(-1)
    for start in range(0, values.size, _ENTRIES):
        first = _first_bad(values[start : start + _ENTRIES])
        if first is not None:
            _raise_bad_count(section, X, start + first, values[start + first])


def _first_bad(values: np.ndarray) -> int | None:
    """Index of the first value that is no count, None where all are. Looks closer only where something is wrong."""
    if values.dtype.kind in "ub":
        return None
    if values.dtype.kind == "i":
        return int(np.argmax(values < 0)) if values.min() < 0 else None
    good = (values >= 0) & (np.rint(values) == values) & (values < np.inf)  # NaN fails the first comparison
    return None if good.all() else int(np.argmin(good))


def _raise_bad_count(section: Section, X: np.ndarray | scipy.sparse.spmatrix, index: int, value: float) -> None:
    counts = section.counts
    if isinstance(X, np.ndarray):
        spot, gene = divmod(index, counts.n_vars)
    else:
        major = int(np.searchsorted(X.indptr, index, side="right")) - 1
        spot, gene = (major, X.indices[index]) if X.format == "csr" else (X.indices[index], major)
    where = f"spot '{counts.obs_names[spot]}', gene '{counts.var_names[gene]}'"
    if not np.isfinite(value):
        problem, remedy = f"the count of {where} is {value}", "raw counts are finite; set it to 0 or drop the spot"
    elif value < 0:
        problem, remedy = (
            f"the count of {where} is {value:g}",
            "raw counts are not negative; scaled values are no counts",
        )
    else:
        problem, remedy = (
            f"the count of {where} is {value:g}, not a whole number",
            "give raw counts, not normalised ones",
        )
    if "counts" in counts.layers:
        remedy += "; layers['counts'] may hold them: X = layers['counts']"
    elif counts.raw is not None:
        remedy += "; raw.X may hold them"
    raise BadSection(section.name, f"{problem}; {remedy}")


def _check_positions(section: Section) -> None:
    counts = section.counts
    if not (math.isfinite(section.um_per_px) and section.um_per_px > 0):
        raise BadSection(
            section.name, f"um_per_px is {section.um_per_px}; it has to be the positive size of a pixel in µm"
        )
    if "spatial" not in counts.obsm:
        raise BadSection(
            section.name, "obsm['spatial'] is missing; it has to be (x = column, y = row) of the spot centres in pixels"
        )
    stored = np.asarray(counts.obsm["spatial"])
    if stored.shape != (counts.n_obs, 2) or stored.dtype.kind not in "iuf":
        raise BadSection(
            section.name,
            f"obsm['spatial'] is {stored.dtype} {stored.shape}; it has to be numbers of shape ({counts.n_obs}, 2), "
            f"(x = column, y = row) of the spot centres in pixels",
        )
    positions = stored.astype(np.float64)
    unknown = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(unknown):
        raise BadSection(
            section.name,
            f"spot '{counts.obs_names[unknown[0]]}' has no finite position ({len(unknown)} spots); drop these spots",
        )
    outside = section.patches.outside(positions) if section.patches is not None else unknown
    if len(outside):
        x, y = positions[outside[0]]
        raise BadSection(
            section.name,
            f"spot '{counts.obs_names[outside[0]]}' at x = {x:g}, y = {y:g} lies outside the image "
            f"({len(outside)} spots); obsm['spatial'] is (x = column, y = row) in pixels of this very image: "
            f"not swapped, not of a smaller copy",
        )


def _check_embedding(section: Section) -> None:
    embedding, counts = section.embedding, section.counts
    if embedding is None:
        return
    if embedding.ndim != 2 or len(embedding) != counts.n_obs or not embedding.shape[1]:
        raise BadSection(
            section.name,
            f"the embedding is {embedding.shape}; it has to be ({counts.n_obs}, width), one row for each spot",
        )
    unknown = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(unknown):
        raise BadSection(
            section.name,
            f"the embedding of spot '{counts.obs_names[unknown[0]]}' is not finite ({len(unknown)} spots); "
            f"compute it again or drop these spots",
        )
