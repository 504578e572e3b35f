"""What a section says, as one short text, whatever file it was read from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import scipy.sparse

from agl_bench.data.preprocess import canonical
from agl_bench.interfaces.spots import Section

_SPOTS = 1024  # rows hashed at once: no second copy of the counts
_GRID_UM = 0.01  # positions are compared on this grid, so that the last bits of a division do not matter


def section_fingerprint(section: Section) -> str:
    """Digest of the names of spots and genes, the counts, and the positions in µm, 20 hexadecimal digits.

    The order of spots and genes, the type and layout of the matrix and the unit of the coordinates do not matter;
    pictures are not looked at. Equal for two files of one section in different layouts.

    Args:
        section: one that `check_section` has nothing against.
    """
    counts = section.counts
    spots = np.argsort(counts.obs_names.to_numpy(dtype=str))
    genes = np.argsort(counts.var_names.to_numpy(dtype=str))
    digest = hashlib.blake2b(digest_size=10)
    for names in (counts.obs_names[spots], counts.var_names[genes]):
        digest.update("\0".join(names).encode() + b"\1")
    positions = np.asarray(counts.obsm["spatial"], dtype=np.float64)[spots] * section.um_per_px
    digest.update(np.rint(positions / _GRID_UM).astype("<i8").tobytes())
    X = canonical(counts.X) if scipy.sparse.issparse(counts.X) else np.asarray(counts.X)
    for start in range(0, len(spots), _SPOTS):
        block = canonical(X[spots[start : start + _SPOTS]])[:, genes]
        block.eliminate_zeros()
        block.sort_indices()
        for part in (np.diff(block.indptr), block.indices, block.data):
            digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def same_sections(digests: Mapping[str, str]) -> str:
    """What a person is told of sections that say the same under several names; "" if none do.

    Args:
        digests: name -> digest of the section, e.g. its fingerprint.
    """
    groups: dict[str, list[str]] = {}
    for name, digest in digests.items():
        groups.setdefault(digest, []).append(name)
    same = [" and ".join(f"'{name}'" for name in names) for names in groups.values() if len(names) > 1]
    if not same:
        return ""
    return (
        f"sections {', '.join(same)} are identical, spot for spot, so one tissue would be used for both training "
        "and testing, which inflates scores; keep one of each"
    )
