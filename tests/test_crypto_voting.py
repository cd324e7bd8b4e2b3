from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto.voting import count_votes, read_ballots
from quorsum.errors import RoundFailed, SiteFault

HONEST = np.array([5, -3, 100, 0], dtype=np.int64)


def answers(**values):
    return {site: np.asarray(value, dtype=np.int64) for site, value in values.items()}


def test_all_agree():
    verdict = count_votes(answers(a=HONEST, b=HONEST, c=HONEST), 1)
    assert np.array_equal(verdict.value, HONEST)
    assert verdict.agreeing == ("a", "b", "c")
    assert not verdict.faults


@given(
    tolerate=st.integers(0, 3),
    entry=st.integers(0, 3),
    by=st.integers(2, 2**62).flatmap(lambda x: st.sampled_from([x, -x])),
)
def test_liars_in_a_single_entry_are_named(tolerate, entry, by):
    lie = HONEST.copy()
    lie[entry] += by
    votes = {f"h{i}": HONEST for i in range(tolerate + 1)} | {f"a{i}": lie for i in range(tolerate)}
    verdict = count_votes(votes, tolerate)
    assert np.array_equal(verdict.value, HONEST)
    assert set(verdict.faults) == {f"a{i}" for i in range(tolerate)}
    assert all(fault.code == "outvoted" for fault in verdict.faults.values())


@given(shifts=st.lists(st.integers(0, 1), min_size=12, max_size=12))
def test_machines_may_differ_by_one_step(shifts):
    votes = {f"s{i}": HONEST + np.array(shifts[4 * i : 4 * i + 4]) for i in range(3)}
    verdict = count_votes(votes, 1)
    assert np.abs(verdict.value - HONEST).max() <= 1
    assert not verdict.faults


def test_extreme_values_do_not_wrap_round():
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    with pytest.raises(RoundFailed):
        count_votes(answers(a=[low], b=[high]), 1)
    assert count_votes(answers(a=[low], b=[low + 1], c=[high]), 1).agreeing == ("a", "b")


def test_too_few_agree():
    known = {"d": SiteFault("d", "silent", "it gave no answer")}
    with pytest.raises(RoundFailed, match="only 1 of 2 answers agree and 2 are needed") as caught:
        count_votes(answers(a=HONEST, b=HONEST + 9), 1, known)
    assert caught.value.faults == known


def test_no_answer_at_all():
    with pytest.raises(RoundFailed, match="only 0 of 0"):
        count_votes({}, 0)


def test_two_groups_of_one_size():
    with pytest.raises(RoundFailed, match="two groups of 2"):
        count_votes(answers(a=HONEST, b=HONEST, c=HONEST + 9, d=HONEST + 9), 1)


@pytest.mark.parametrize("blocks", [(), (b"",), (bytes(15),), (bytes(17),), (bytes(16), b""), (bytes(8), bytes(8))])
def test_unreadable_answers(blocks):
    ballot = read_ballots({"good": (bytes(16),), "bad": blocks}, 2, "<i8")
    assert list(ballot.answers) == ["good"]
    assert ballot.faults["bad"].code == "wrong-shape"
