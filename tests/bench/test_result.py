"""The tables of a result: one row for each epoch, one for each pass of outer steps."""

from __future__ import annotations

import pandas as pd
import pytest

from agl_bench.bench.cells import CellStore
from agl_bench.bench.result import epoch_table, outer_table
from agl_bench.training.records import EpochRecord, OuterPass


def record(epoch: int, *outer: OuterPass) -> EpochRecord:
    return EpochRecord(epoch, 0.5, 0.1 * epoch, 0, 10 + epoch, 4.5, {"cutoff": 0.25}, round=epoch, outer=outer)


def test_an_epoch_is_a_row_with_what_its_outer_steps_came_to() -> None:
    table = epoch_table(
        [record(0), record(1, OuterPass(0.8, 2.0)), record(2, OuterPass(0.8, None), OuterPass(0.4, 3.0))]
    )
    assert table["epoch"].tolist() == table["round"].tolist() == [0, 1, 2]
    assert table["outer_loss"].tolist()[1:] == pytest.approx([0.8, 0.6]) and table["outer_loss"].isna()[0]
    assert table["outer_signal_to_noise"].tolist()[1:] == [2.0, 3.0]  # of the last pass
    assert table["parameter.cutoff"].tolist() == [0.25] * 3
    assert not {"outer", "parameters"} & set(table.columns)


def test_a_pass_of_outer_steps_is_a_row_with_its_own_score_or_that_of_the_epoch() -> None:
    awaited = OuterPass(0.8, None, validation_pcc=0.7, selected=3), OuterPass(0.4, 3.0, validation_pcc=0.6, selected=4)
    table = outer_table([record(0), record(1, OuterPass(0.9, 2.0)), record(2, *awaited)])
    assert table[["epoch", "turn"]].to_numpy().tolist() == [[1, 0], [2, 0], [2, 1]]
    assert table["validation_pcc"].tolist() == pytest.approx([0.1, 0.7, 0.6])
    assert table["selected"].tolist() == [11, 3, 4]
    assert table["outer_loss"].tolist() == [0.9, 0.8, 0.4]


def test_without_outer_steps_there_are_columns_and_no_rows() -> None:
    pd.testing.assert_series_equal(outer_table([record(0)]).dtypes, outer_table([record(1, OuterPass(1, 1))]).dtypes)
    assert len(outer_table([record(0)])) == 0


def test_the_first_schedule_of_the_paper_as_a_cell(run, tmp_path) -> None:
    """Kept as it was made: where the number of genes and the validation PCC went, pass by pass."""
    few = {"epochs": 9, "patience": 1, "round_patience": 1, "outer_patience": 1, "outer_passes": 3, "folds": 2}
    more = [*(f"protocol.{k}={v}" for k, v in few.items()), "protocol.inner_subsets=4", "synthetic.sections=3"]
    events = run(tmp_path, "pgl", "dkgsb", preset="paper_v1", more=more, fold=["S1"])
    made = {e.result.spec.selector.name: e.result for e in events if hasattr(e, "result")}
    assert set(made) == {"pgl", "dkgsb"}
    learner, plain = made["dkgsb"], made["pgl"]
    assert len(plain.outer) == 0 and set(plain.epochs["round"]) == {1}
    assert learner.epochs["epoch"].tolist() == list(range(len(learner.epochs)))
    assert learner.epochs["round"].is_monotonic_increasing and set(learner.epochs["round"]) >= {0, 1}
    opened = learner.epochs.loc[learner.epochs["outer_loss"].notna(), "epoch"]
    assert sorted(set(learner.outer["epoch"])) == opened.tolist()
    assert learner.outer["validation_pcc"].notna().all()
    again = CellStore(tmp_path).read(learner.spec.key)
    pd.testing.assert_frame_equal(again.outer, learner.outer)
