"""The schedule on scripted scores: rounds, outer steps, what comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from agl_bench.protocol import Protocol
from agl_bench.training.course import Course

V1 = {"schedule": "two_stage", "warm_start": "learners", "patience": 2, "round_patience": 3}


def walk(scores: Sequence[float], *, learns: bool = True, **settings: object) -> tuple[list[tuple], Course]:
    """(round, whether outer steps are due, whether it is best, what comes next) of each epoch."""
    course, found = Course(Protocol.of(settings), learns), []
    for epoch, score in enumerate(scores):
        here = course.round, course.outer_is_due(epoch)
        found.append((*here, course.take(epoch, score), course.next(epoch)))
        if found[-1][-1] == "end":
            break
    return found, course


def test_a_plain_training_ends_after_patience() -> None:
    found, course = walk([1, 3, 2, 3, 2, 9], patience=3, learns=False)
    assert found == [
        (1, False, True, "on"),
        (1, False, True, "on"),
        (1, False, False, "on"),
        (1, False, False, "on"),  # equal is no gain
        (1, False, False, "end"),
    ]
    assert (course.best, course.best_epoch) == (3, 1)


@pytest.mark.parametrize(
    ("start", "every", "due"), [(0, 1, [0, 1, 2, 3, 4]), (1, 2, [1, 3]), (3, 1, [3, 4]), (0, 3, [0, 3]), (9, 1, [])]
)
def test_alternating_outer_steps_come_at_set_epochs(start: int, every: int, due: list[int]) -> None:
    settings = {"outer_start": start, "outer_every": every}
    assert [e for e, f in enumerate(walk(range(5), **settings)[0]) if f[1]] == due
    assert not any(f[1] for f in walk(range(5), learns=False, **settings)[0])


def test_a_warm_start_ends_after_patience_and_epochs_count_from_there() -> None:
    found, course = walk(
        [5, 4, 3, 1, 2, 6, 5, 4], warm_start="learners", patience=2, outer_start=1, outer_every=2, epochs=8
    )
    assert [f[0] for f in found] == [0, 0, 0, 1, 1]
    assert found[2] == (0, False, False, "back")
    assert found[4] == (1, True, False, "end")  # two epochs without a gain over the warm start
    assert (course.best, course.best_epoch) == (5, 0)


def test_rounds_go_on_until_one_brings_no_gain() -> None:
    scores = [5, 4, 3, *(1, 6, 2, 2, 2), *(7, 1, 1, 1), *(1, 1, 1), 99]
    found, course = walk(scores, **V1)
    assert [f[0] for f in found] == [0] * 3 + [1] * 5 + [2] * 4 + [3] * 3
    assert [e for e, f in enumerate(found) if f[1]] == [3, 8, 12]  # once a round, at its first epoch
    assert [(e, f[3]) for e, f in enumerate(found) if f[3] != "on"] == [
        (2, "back"),
        (7, "back"),
        (11, "back"),
        (14, "end"),
    ]
    assert [e for e, f in enumerate(found) if f[2]] == [0, 4, 8]
    assert (course.best, course.best_epoch) == (7, 8)


def test_as_in_the_first_code_a_first_round_without_gain_is_followed_by_another() -> None:
    """Which is compared with the first, and so ends it."""
    found, _ = walk([5, 4, 3, *[1] * 9], **V1)
    assert [f[0] for f in found] == [0] * 3 + [1] * 3 + [2] * 3 and found[-1][3] == "end"


def test_rounds_without_a_warm_start() -> None:
    found, _ = walk([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0], schedule="two_stage", round_patience=3)
    assert [f[0] for f in found] == [1] * 4 + [2] * 4 + [3] * 3
    assert [e for e, f in enumerate(found) if f[1]] == [0, 4, 8]


def test_selectors_that_learn_nothing_are_trained_plainly() -> None:
    scores = [3, 2, 1, 9]
    assert walk(scores, learns=False, **V1)[0] == walk(scores, learns=False, patience=2)[0]


def test_but_go_through_the_same_stages_where_the_warm_start_is_for_all() -> None:
    scores = [5, 4, 3, *(1, 6, 2, 2, 2), *(1, 1, 1)]
    plain, learner = (walk(scores, learns=learns, **V1 | {"warm_start": "all"})[0] for learns in (False, True))
    assert [(f[0], *f[2:]) for f in plain] == [(f[0], *f[2:]) for f in learner]
    assert not any(f[1] for f in plain) and any(f[1] for f in learner)


def test_an_epoch_without_a_score_is_no_gain() -> None:
    found, course = walk([math.nan, math.nan, 1, math.nan], learns=False, patience=5)
    assert [f[2] for f in found] == [True, False, True, False]
    assert (course.best, course.best_epoch) == (1, 2)
    assert walk([math.nan], learns=False)[1].best == -math.inf
