"""Genes that share a symbol and are different ones, by their Ensembl ids.

References of different years give a symbol to another gene, and readers tell repeated symbols apart by their order
alone (NAME, NAME-1). Where sections say what a symbol stands for and do not agree, the genes concerned are named by
their ids, so that only the same gene is put beside itself.

ids_of       Ensembl ids of the genes of a table
name_by_id   give genes their ids as names
tell_apart   compare sections, and name by their ids the genes that differ
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from agl_bench.interfaces.spots import Section

COLUMN = "gene_ids"  # as scanpy calls it
_COLUMNS = (COLUMN, "gene_id", "ensembl_ids", "ensembl_id", "ensembl", "feature_id")  # of `var`, lower case
_ENSEMBL = r"^(ENS[A-Z]*G\d{6,})(?:\.\d+)?$"  # without the version


def ids_of(counts: AnnData) -> pd.Series | None:
    """The Ensembl ids of genes, without versions, indexed by their names; "" where it is none or repeated.

    None where no column of `var` holds any.
    """
    columns = {str(column).casefold(): column for column in counts.var.columns}
    for name in _COLUMNS:
        if name in columns:
            stored = counts.var[columns[name]].astype(object).astype(str)
            ids: pd.Series = stored.str.extract(_ENSEMBL, expand=False).fillna("")
            ids[ids.duplicated(keep=False)] = ""
            if (ids != "").any():
                return ids
    return None


def name_by_id(counts: AnnData, ids: Collection[str]) -> None:
    """Name the genes that have one of `ids` by it; they keep it also if a gene is called so already."""
    own = ids_of(counts)
    if own is not None:
        chosen = own.isin(set(ids)) & ~own.isin(counts.var_names)
        counts.var_names = pd.Index(np.where(chosen, own, counts.var_names))


def tell_apart(sections: Sequence[Section]) -> str:
    """Name genes by their ids, in all sections, where a symbol stands for different ids; says so, "" if there is none.

    A section that does not know its ids, or does not know one, says nothing about it.
    """
    first: dict[str, tuple[str, str]] = {}  # symbol: id and section
    differing: dict[str, str] = {}  # symbol: what it stands for
    ids: set[str] = set()
    for section in sections:
        own = ids_of(section.counts)
        if own is None:
            continue
        for symbol, known in own[own != ""].items():
            other, where = first.setdefault(symbol, (known, section.name))
            if other != known:
                ids |= {other, known}
                differing.setdefault(symbol, f"'{symbol}' is {other} in '{where}' and {known} in '{section.name}'")
    if not ids:
        return ""
    for section in sections:
        name_by_id(section.counts, ids)
    return (
        f"{len(differing)} gene symbol{'s stand' if len(differing) > 1 else ' stands'} for different genes in "
        f"different sections ({'e.g. ' if len(differing) > 1 else ''}{next(iter(differing.values()))}); "
        f"{len(ids)} genes are named by their Ensembl ids"
    )
