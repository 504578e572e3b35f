"""Tables that a spreadsheet may open."""

import io

import pandas as pd
import pytest

from agl_bench.data.fold_files import read_fold_file
from agl_bench.data.spreadsheet import as_csv, unquoted

RUN = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1+1",
    "\uff1d1+1",
    "-",
    "+a",
]
PLAIN = ["agl", "S1", "a=1", "1e3", "-0.5", "+3", "-1e-5", "–", "−0.3", "", "'quoted'", "it's", "x-y", "-inf"]


@pytest.mark.parametrize("text", RUN)
def test_what_would_be_run_is_quoted_and_comes_back(text):
    table = pd.DataFrame({"name": [text, "agl"], text: ["a", text], "value": [-0.25, 1.0]})
    found = pd.read_csv(io.StringIO(as_csv(table)), dtype=str, keep_default_na=False)
    assert found["name"].tolist() == [f"'{text}", "agl"] and found.columns[1] == f"'{text}"
    assert found["value"].tolist() == ["-0.25", "1.0"]
    assert unquoted(found["name"]).tolist() == [text, "agl"]
    assert table["name"].tolist() == [text, "agl"]


def test_everything_else_stays_as_pandas_writes_it():
    table = pd.DataFrame(
        {
            "name": PLAIN,
            "kind": pd.Categorical(["-0.1"] * len(PLAIN)),
            "n": range(-5, len(PLAIN) - 5),
            "value": [None, *(x / 7 - 1 for x in range(len(PLAIN) - 1))],
            "flag": [True] * len(PLAIN),
        }
    )
    assert as_csv(table) == table.to_csv(index=False, lineterminator="\n")
    mixed = pd.DataFrame([{"a": 1, "b": None}, {"a": -2, "b": "tpe"}], dtype=object)
    assert as_csv(mixed) == "a,b\n1,\n-2,tpe\n"


def test_folds_of_sections_with_such_names_are_read_as_they_were_written(tmp_path):
    names = ["=S1", "-S2", "@S3"]
    lines = [
        (n, f"+spot{i}", "F1", s) for n, s in zip(names, ("train", "validation", "test"), strict=True) for i in "ab"
    ]
    (tmp_path / "folds.csv").write_text(as_csv(pd.DataFrame(lines, columns=["section", "spot", "fold", "set"])))
    listing = read_fold_file(tmp_path / "folds.csv")["F1"]
    assert [listing.sections(s) for s in ("train", "validation", "test")] == [{n} for n in names]
    assert set(listing.spot) == {"+spota", "+spotb"}
