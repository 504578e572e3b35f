"""The types of the columns of a cell's tables, see `Result`: what is stored otherwise is no table of ours.

pandas takes whatever a file holds, and a column of texts among numbers fails far from where it was read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from agl_bench.digests import Damaged


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if kinds.is_dictionary(kind) else kind
    return bool(kinds.is_string(plain) or kinds.is_large_string(plain))


def _is_number(kind: pa.DataType) -> bool:
    return bool(kinds.is_integer(kind) or kinds.is_floating(kind))


_Test = Callable[[pa.DataType], bool]
_TEXT: tuple[str, _Test] = ("texts", _is_text)
_TRUTH: tuple[str, _Test] = ("true or false", kinds.is_boolean)
_WHOLE: tuple[str, _Test] = ("whole numbers", kinds.is_integer)
_NUMBER: tuple[str, _Test] = ("numbers", _is_number)  # every column that is not named here
_COLUMNS = {
    "genes": {"gene": _TEXT, "primary": _TRUTH, "rank": _WHOLE},
    "epochs": {"epoch": _WHOLE, "selected": _WHOLE, "is_best": _TRUTH},
    "outer": {"epoch": _WHOLE, "turn": _WHOLE, "selected": _WHOLE},
    "predictions": {"section": _TEXT, "spot": _TEXT},
}
_NEEDED: dict[str, set[str]] = {
    "genes": {"gene", "primary", "weight"},
    "epochs": {"epoch", "selected"},
    "outer": set(),  # of a selector without outer steps
    "predictions": {"section", "spot"},
}


def check_types(path: Path) -> None:
    """Look at the columns of a table, which is called as its file. Reads the file's last bytes only.

    Raises:
        Damaged: if one is missing or of another type, or the file is no table.
        OSError: if it cannot be read.
    """
    try:
        schema = pq.read_schema(path)
    except pa.ArrowException as error:
        raise Damaged(f"{path.name} is not a Parquet table ({str(error).splitlines()[0]})") from error
    for column in sorted(_NEEDED[path.stem] - set(schema.names)):
        raise Damaged(f"{path.name} has no column {column}")
    for column in schema:
        words, holds = _COLUMNS[path.stem].get(column.name, _NUMBER)
        if not holds(column.type):
            raise Damaged(f"column {column.name} of {path.name} holds {column.type} instead of {words}")
