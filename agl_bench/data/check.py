"""What must hold for the sections of a dataset before anything is trained on them.

Each failed check is one sentence: the section, the first offending spot or gene, and the remedy.

check_dataset      what concerns the sections together
check_section      one section, the first problem raised
problems           one section, every problem; looks at counts, names, positions and embedding, decodes no image
pixel_problems     one section, what only its decoded image shows
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.spatial import KDTree

from agl_bench.data.arrays import array_problems
from agl_bench.data.h5ad_files import placed
from agl_bench.errors import BadSection, BadSpec
from agl_bench.interfaces.spots import Section

_ENTRIES = 4_000_000  # entries looked at at once: temporary arrays stay in the tens of megabytes
_PITCH_UM = (1.0, 2_000.0)  # between neighbouring spots: half of the finest array's pitch, ten times the coarsest's
_SAMPLE = 400  # spots whose pixels are looked at
_LOOK_UM = 50.0  # width of tissue that is looked at: about a spot
_LOOK_PX = 16
_MOST_COUNTED = 2**53  # up to here whole numbers are exact in double precision
_MOST_HALF = 2**11  # and up to here in half precision
_MOST_LOG = 32.0  # of scaled counts, to whatever base from 2 on; exp() of linear values leaves single precision
_GLASS_SD = 3.0  # grey levels; see `pixel_problems`
_GLASS_TINT = 30.0
_ON_TISSUE = 0.5  # share of the spots that have to be
_DARK = 64.0  # grey level that some pixel in twenty exceeds in bright field


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


def check_section(section: Section, *, has_counts: bool = True) -> None:
    """Check counts, names, coordinates and embedding of one section.

    Args:
        section: as its dataset reads it.
        has_counts: as its dataset says.

    Raises:
        BadSection: with the first problem.
    """
    for problem in problems(section, has_counts=has_counts):
        raise BadSection(section.name, problem)


def problems(section: Section, *, has_counts: bool = True) -> Iterator[str]:
    """Everything that is wrong with one section, a sentence each, without its name. Decodes no image.

    Counts are whole numbers ≥ 0; values of a dataset that says `has_counts = False` are finite and ≥ 0, as logarithms
    of counts are: for the filters, 0 has to mean that a gene was not detected.

    What follows from a problem is not told a second time: where X is no matrix, its values are not looked at.
    """
    spots, genes = section.counts.shape
    if not spots:
        yield "it has no spots; check the file, or leave the section out"
    if not genes:
        yield "it has no genes; check the file, or leave the section out"
    if not spots or not genes:
        return
    if genes == 1:
        yield f"it has one gene, '{section.counts.var_names[0]}'; a primary and an auxiliary gene are needed at least"
    yield from _name_problems(section)
    yield from _count_problems(section, has_counts)
    yield from _position_problems(section)
    yield from _embedding_problems(section)


def pixel_problems(section: Section) -> Iterator[str]:
    """What only the decoded image shows: damage, darkness, spots beside the tissue; for sections otherwise sound.

    In bright field, light shines through: one pixel in twenty is brighter than 64 of 255 around the spots of any
    section (214 to 224 on the real ones tried). What is darker is fluorescence, or values that fill fewer bits.

    Glass is a square of about a spot's size (50 µm, seen at 3 µm a pixel) whose grey levels hardly vary and that has
    little colour, whether white, grey or the black of a scanner's margin: a standard deviation below 3 of 255, and
    means of the channels within 30 of each other, because lamps and white balances tint glass. On the real sections
    tried, glass had standard deviations up to 1.5 and tints up to 20, tissue 4 to 60 and 18 to 100. Pale tissue has
    texture, smooth pools of eosin or blood have colour; brightness decides nothing here.

    Less than half of the spots on tissue means that image and coordinates do not belong together: holes and the edges
    of ordinary sections cost a few percent. A foreign image with tissue at the very same places passes.
    """
    if section.patches is None:
        return
    spots = section.counts.n_obs
    rows = np.unique(np.linspace(0, spots - 1, min(spots, _SAMPLE)).astype(np.intp))
    known_um = getattr(section.patches, "side_um", None)  # patches cut beforehand show that much and no more
    try:
        pixels = section.patches.read(rows, _LOOK_PX, min(_LOOK_UM, known_um or _LOOK_UM)).astype(np.float32)
    except BadSection as error:
        yield error.problem
        return
    grey = pixels.mean(axis=1)
    brightest = float(np.percentile(grey, 95))
    if brightest < _DARK:
        yield (
            f"19 of 20 pixels around its spots are darker than {brightest + 1:.0f} of 255, so this is not a "
            "bright-field image; use the bright-field scan, with its values scaled to 0 to 255"
        )
        return
    texture = grey.std(axis=(1, 2))  # (spots,)
    colour = np.ptp(pixels.mean(axis=(2, 3)), axis=1)  # (spots,) between the channels
    glass = (texture < _GLASS_SD) & (colour < _GLASS_TINT)
    if (~glass).mean() < _ON_TISSUE:
        first = section.counts.obs_names[rows[np.argmax(glass)]]
        yield (
            f"{glass.sum()} of {len(rows)} spots looked at lie on bare glass, the first is '{first}'; "
            f"check that the image is of this section, and that obsm['spatial'] is (x = column, y = row) in its pixels"
        )


def _name_problems(section: Section) -> Iterator[str]:
    for names, axis, kind in ((section.counts.obs_names, "obs", "spot"), (section.counts.var_names, "var", "gene")):
        absent = np.flatnonzero(names.isna() | (names == ""))
        if len(absent):
            yield f"{kind} number {absent[0] + 1} has no name ({len(absent)} {kind}s); give each a name of its own"
        elif not names.is_unique:
            yield (
                f"{kind} '{names[names.duplicated()][0]}' occurs more than once "
                f"({len(names) - names.nunique()} repeated); drop the copies or call {axis}_names_make_unique()"
            )


def _count_problems(section: Section, has_counts: bool) -> Iterator[str]:
    X = section.counts.X
    if X is None:
        yield "counts.X is empty; put the raw counts (spots × genes) there"
    elif not isinstance(X, np.ndarray) and not scipy.sparse.issparse(X):
        yield f"counts.X is a {type(X).__name__}; it has to be an array or a sparse matrix in memory"
    elif X.dtype.kind not in "iufb":
        yield f"counts.X holds {X.dtype}; counts have to be numbers"
    else:
        if scipy.sparse.issparse(X):
            X = X if X.format in ("csr", "csc") else X.tocsr()
            try:
                X.check_format(full_check=True)  # reading past the end of an array would be left to chance
            except ValueError as error:
                yield f"counts.X is not a valid sparse matrix ({error}); write the file again"
                return
        values = X.data if scipy.sparse.issparse(X) else np.asarray(X).reshape(-1)
        blank = True
        for start in range(0, values.size, _ENTRIES):
            block = values[start : start + _ENTRIES]
            blank = blank and not block.any()
            first = _first_bad(block, has_counts)
            if first is not None:
                yield _bad_count(section, X, start + first, values[start + first], has_counts)
                return
        if blank:
            held = "raw counts" if has_counts else "normalised values"
            yield f"all of its counts are zero; check that X holds the {held}"


def _first_bad(values: np.ndarray, has_counts: bool) -> int | None:
    """Index of the first value that is no count, or no logarithm of one; None where all are.

    Looks closer only where something is wrong.
    """
    most = _most(values.dtype) if has_counts else _MOST_LOG
    if values.dtype.kind in "uib":
        if values.min() >= 0 and values.max() <= most:
            return None
        return int(np.argmax((values < 0) | (values > most)))
    good = (values >= 0) & (values <= most)  # NaN fails the first comparison
    if has_counts:
        good &= np.rint(values) == values
    return None if good.all() else int(np.argmin(good))


def _most(kind: np.dtype) -> int:
    """The largest count that can be meant."""
    return _MOST_HALF if kind == np.float16 else _MOST_COUNTED


def _bad_count(
    section: Section, X: np.ndarray | scipy.sparse.spmatrix, index: int, value: float, has_counts: bool
) -> str:
    counts = section.counts
    if isinstance(X, np.ndarray):
        spot, gene = divmod(index, counts.n_vars)
    else:
        major = int(np.searchsorted(X.indptr, index, side="right")) - 1
        spot, gene = (major, X.indices[index]) if X.format == "csr" else (X.indices[index], major)
    where = f"spot '{counts.obs_names[spot]}', gene '{counts.var_names[gene]}'"
    if not has_counts and _MOST_LOG < value < np.inf:
        return (
            f"the value of {where} is {value:g}; the logarithm of a scaled count is at most {_MOST_LOG:g}: without raw "
            "counts, give ln(1 + scaled count), not the scaled counts themselves"
        )
    if not has_counts:
        return (
            f"the value of {where} is {value:g}; without raw counts, values have to be finite and ≥ 0, 0 where a gene "
            "was not detected: give logarithms of scaled counts, not z-scores or residuals"
        )
    if not np.isfinite(value):
        problem, remedy = f"the count of {where} is {value}", "raw counts are finite; set it to 0 or drop the spot"
    elif value < 0:
        problem, remedy = (
            f"the count of {where} is {value:g}",
            "raw counts are not negative; scaled values are not counts",
        )
    elif value > _most(X.dtype):
        problem = f"the count of {where} is {value:.0f}"
        remedy = "no spot holds that many molecules of a gene; give counts of molecules"
        if X.dtype == np.float16:
            remedy = f"{X.dtype} holds whole numbers only up to {_MOST_HALF:,}; write the counts as float32 or int32"
    else:
        problem, remedy = (
            f"the count of {where} is {value:g}, not a whole number",
            "give raw counts, not normalised ones; a dataset that has no others says `has_counts = False`",
        )
    if "counts" in counts.layers:
        remedy += "; layers['counts'] may hold them: X = layers['counts']"
    elif counts.raw is not None:
        remedy += "; raw.X may hold them"
    return f"{problem}; {remedy}"


def _position_problems(section: Section) -> Iterator[str]:
    counts = section.counts
    scale = section.um_per_px
    if not (math.isfinite(scale) and scale > 0):
        yield f"um_per_px is {scale}; it has to be the positive size of a pixel in µm"
        scale = math.nan
    if "spatial" not in counts.obsm:
        yield "obsm['spatial'] is missing; it has to be (x = column, y = row) of the spot centres in pixels"
        return
    stored = np.asarray(counts.obsm["spatial"])
    if isinstance(counts.obsm["spatial"], pd.DataFrame):  # of which every other user takes the columns as they come
        try:
            by_name = placed(counts.obsm["spatial"], section.name)
        except BadSection as error:
            yield error.problem
            return
        if not np.array_equal(by_name, stored):
            yield "obsm['spatial'] is a table whose columns are not x, y in this order; give an array (spots, 2)"
            return
    if stored.shape != (counts.n_obs, 2) or stored.dtype.kind not in "iuf":
        yield (
            f"obsm['spatial'] is {stored.dtype} {stored.shape}; it has to be numbers of shape ({counts.n_obs}, 2), "
            f"(x = column, y = row) of the spot centres in pixels"
        )
        return
    positions = stored.astype(np.float64)
    unknown = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(unknown):
        yield f"spot '{counts.obs_names[unknown[0]]}' has no finite position ({len(unknown)} spots); drop these spots"
        return
    negative = np.flatnonzero((positions < 0).any(axis=1))
    outside = section.patches.outside(positions) if section.patches is not None else unknown
    if len(negative):
        x, y = positions[negative[0]]
        yield (
            f"spot '{counts.obs_names[negative[0]]}' at x = {x:g}, y = {y:g} has a negative coordinate "
            f"({len(negative)} spots); obsm['spatial'] counts pixels from the upper left corner of the image"
        )
    elif len(outside):
        x, y = positions[outside[0]]
        yield (
            f"spot '{counts.obs_names[outside[0]]}' at x = {x:g}, y = {y:g} lies outside the image "
            f"({len(outside)} spots); obsm['spatial'] is (x = column, y = row) in pixels of this very image: "
            f"not swapped, not of a smaller copy"
        )
    # Coordinates that are not of this image say nothing about the size of a pixel.
    scale = math.nan if len(negative) or len(outside) else scale
    contradicted = False
    if counts.n_obs > 1:
        for problem in _pitch_problems(section, positions, scale):
            contradicted = True
            yield problem
    if not (contradicted or math.isnan(scale)):
        yield from array_problems(counts, positions, scale)


def _pitch_problems(section: Section, positions: np.ndarray, um_per_px: float) -> Iterator[str]:
    """Spots on top of each other, and, where `um_per_px` is a number, neighbours at a distance that no array has."""
    distance = KDTree(positions).query(positions, k=2)[0][:, 1]  # (spots,) px; column 0 is the spot itself
    same = np.flatnonzero(distance == 0)
    if len(same):
        x, y = positions[same[0]]
        yield (
            f"spot '{section.counts.obs_names[same[0]]}' shares its place x = {x:g}, y = {y:g} with another "
            f"({len(same)} spots); give each spot its own place, or drop the copies"
        )
        return
    pitch_um = float(np.median(distance)) * um_per_px
    low, high = _PITCH_UM
    if not low <= pitch_um <= high and not math.isnan(pitch_um):
        yield (
            f"neighbouring spots are {pitch_um:.3g} µm apart, which no array of spots is ({low:g} to {high:g} µm); "
            f"check um_per_px = {um_per_px:g} and that obsm['spatial'] is in pixels"
        )


def _embedding_problems(section: Section) -> Iterator[str]:
    embedding, counts = section.embedding, section.counts
    if embedding is None:
        return
    if embedding.ndim != 2 or len(embedding) != counts.n_obs or not embedding.shape[1]:
        yield f"the embedding is {embedding.shape}; it has to be ({counts.n_obs}, width), one row for each spot"
        return
    unknown = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(unknown):
        yield (
            f"the embedding of spot '{counts.obs_names[unknown[0]]}' is not finite ({len(unknown)} spots); "
            f"compute it again or drop these spots"
        )
