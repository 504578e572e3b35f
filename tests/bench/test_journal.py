"""The journal of studies: all complete records of a damaged one are recovered, and what is lost is counted."""

import json
import random

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from agl_bench.bench.journal import open_journal

RATE = optuna.distributions.FloatDistribution(1e-5, 1e-1)


@pytest.fixture
def journal(tmp_path):
    """Two studies of three trials each."""
    storage = JournalStorage(open_journal(tmp_path / "tune" / "journal.log", print))
    studies = [optuna.create_study(storage=storage, study_name=name, direction="maximize") for name in ("a", "b")]
    for place, study in enumerate(studies):
        study.set_user_attr("writer", "this one")
        for number in range(3):
            study.sampler = optuna.samplers.RandomSampler(number)
            trial = study.ask({"rate": RATE})
            trial.set_user_attr("born", "now")
            study.tell(trial, number + place / 10)
    return tmp_path / "tune" / "journal.log"


def opened(journal):
    """Values of the trials of both studies, None for one that has none; and what was said."""
    said = []
    storage = JournalStorage(open_journal(journal, said.append))
    found = {}
    for name in ("a", "b"):
        try:
            trials = optuna.load_study(study_name=name, storage=storage).trials
        except KeyError:
            continue
        is_whole = [t.state == TrialState.COMPLETE and "rate" in t.params for t in trials]
        found[name] = [t.value if whole else None for t, whole in zip(trials, is_whole, strict=True)]
    return found, said


WHOLE = {"a": [0.0, 1.0, 2.0], "b": [0.1, 1.1, 2.1]}


def place(lines, op_code, number):
    """Index of the nth record of an operation."""
    return [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == op_code][number]


def spoilt(line, how):
    if how == "zeros":
        return bytes(len(line))
    if how == "zeros at the end":
        return line[:-30] + bytes(30)
    if how == "garbage":
        return b"\xff\x00garbage" + line[20:]
    if how == "another digit":
        return line.replace(b'"op_code":6', b'"op_code":5').replace(b'"worker_id":"', b'"worker_id":"9', 1)
    return line[: len(line) // 2]


HOW = ["zeros", "zeros at the end", "garbage", "another digit", "truncated"]


def test_a_whole_journal_says_nothing_and_stays(journal):
    before = journal.read_bytes()
    assert opened(journal) == (WHOLE, [])
    assert journal.read_bytes() == before and len(list(journal.parent.glob("*damaged*"))) == 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("op_code", "number", "lost"),
    [(6, -1, ("b", 2)), (6, 1, ("a", 1)), (5, 3, ("b", 0)), (4, 2, ("a", 2)), (4, 3, ("b", 0)), (8, 0, None)],
)
def test_one_record_costs_one_trial(journal, op_code, number, lost, how):
    content = journal.read_bytes()
    lines = content.splitlines()
    at = place(lines, op_code, number)
    lines[at] = spoilt(lines[at], how)
    damaged = b"\n".join(lines) + b"\n"
    journal.write_bytes(damaged)
    found, said = opened(journal)
    expected = {name: list(values) for name, values in WHOLE.items()}
    if lost:
        expected[lost[0]][lost[1]] = None
    assert found == expected
    (sentence,) = said
    assert f"1 of {len(lines)} records is lost, which affects 1 trial;" in sentence
    assert journal.with_name("journal.log.damaged-1").read_bytes() == damaged
    assert opened(journal) == (expected, [])
    if how != "truncated":
        assert len(journal.read_bytes()) == len(damaged)  # who has it open knows where its lines begin


@pytest.mark.parametrize("tail", [b"\0" * 300, b"\xfe\xff\n", b"nonsense\nmore\n", b"[[[[[\n" * 3, b'{"op_code":6}\n'])
def test_what_follows_the_last_record(journal, tail):
    with journal.open("ab") as stream:
        stream.write(tail)
    found, said = opened(journal)
    assert found == WHOLE and len(said) == 1
    assert opened(journal) == (WHOLE, [])


def test_what_a_killed_process_did_not_finish_is_no_damage(journal):
    content = journal.read_bytes()
    journal.write_bytes(content + content.splitlines()[-1][:40])
    assert opened(journal) == (WHOLE, [])
    assert journal.read_bytes() == content
    journal.write_bytes(content[:-1])
    assert opened(journal) == (WHOLE, [])
    assert journal.read_bytes() == content


@pytest.mark.parametrize("end", [b"\x0b", b"", b"\0\0"])
def test_two_records_in_one_line_are_two(journal, end):
    content = journal.read_bytes()
    middle = content.index(b"\n", len(content) // 2)
    journal.write_bytes(content[:middle] + end + content[middle + 1 :])
    assert opened(journal) == (WHOLE, [])
    assert journal.read_bytes() == content


@pytest.mark.parametrize("how", ["zeros", "garbage"])
def test_a_study_whose_beginning_is_lost_moves_no_other(journal, how):
    lines = journal.read_bytes().splitlines()
    first = place(lines, 0, 0)
    lines[first] = spoilt(lines[first], how)
    journal.write_bytes(b"\n".join(lines) + b"\n")
    found, said = opened(journal)
    assert found["b"] == WHOLE["b"] and len(said) == 1
    assert found.get("a") in (None, WHOLE["a"])  # its name may be all that is left of the record


def test_nothing_but_garbage(journal):
    journal.write_bytes(bytes(3000) + b"\nnonsense\n")
    found, said = opened(journal)
    assert found == {} and len(said) == 1 and "2 of 2 records are lost" in said[0]


def test_journals_of_earlier_versions_carry_no_digests(journal):
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert all(line.pop("digest") for line in lines)
    before = "".join(json.dumps(line) + "\n" for line in lines)
    journal.write_text(before)
    assert opened(journal) == (WHOLE, [])
    assert journal.read_text() == before


def test_whatever_happens_no_other_value_is_read(journal):
    """Bits, zeros and cuts anywhere: a trial has the value that it had, or none."""
    content, chance = journal.read_bytes(), random.Random(0)
    for turn in range(60):
        changed = bytearray(content)
        at = chance.randrange(len(content))
        if turn % 3 == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif turn % 3 == 1:
            changed[at : at + 200] = bytes(len(changed[at : at + 200]))
        else:
            del changed[at : at + chance.randrange(1, 400)]
        journal.write_bytes(changed)
        found, _ = opened(journal)
        for name, values in found.items():
            left = [value for value in values if value is not None]
            assert left == [value for value in WHOLE[name] if value in left], (turn, at, found)
