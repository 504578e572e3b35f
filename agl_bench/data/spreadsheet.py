"""Tables as CSV that a spreadsheet may open: text that it would run is quoted, as OWASP advises; numbers stay."""

from __future__ import annotations

import csv
import re

import pandas as pd

_RUN = re.compile(r"^ *[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four: the same in full width
_QUOTED = r"^'(?= *[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])"


def as_csv(table: pd.DataFrame) -> str:
    """A table without its index. A text that begins as a formula does gets an apostrophe, unless it is a number."""
    safe = table.rename(columns=_quoted)
    for place, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(place, safe.iloc[:, place].astype(object).map(_quoted))
    text: str = safe.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which ends a line for readers, and is quoted by no writer that ends its lines otherwise
        text = safe.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text


def unquoted(column: pd.Series) -> pd.Series:
    """Texts as they were before `as_csv` quoted them."""
    return column.str.replace(_QUOTED, "", regex=True)


def _quoted(value: object) -> object:
    if not isinstance(value, str) or not _RUN.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
