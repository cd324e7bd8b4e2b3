from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto.elimination import Elimination, eliminate
from quorsum.crypto.sealed_parameters import SealedBounds
from quorsum.crypto.share_checks import DealerWord
from quorsum.errors import RoundFailed, UsageError

FIVE = SealedBounds.of(5, 1, 1)
TEN = SealedBounds.of(10, 2, 2)


def words(n, off=None, rejected=()):
    return tuple(
        DealerWord(i, i not in rejected, frozenset((off or {}).get(i, ()) if i not in rejected else ()))
        for i in range(1, n + 1)
    )


def everybody(n):
    return range(1, n + 1)


@st.composite
def rounds(draw):
    """A round in which malicious sites dispute with whom they like and honest sites never with each other."""
    tau, f = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    n = max(2 * tau + 2 * f, 3 * f) + 1 + draw(st.integers(0, 3))
    malicious = draw(st.sets(st.integers(1, n), max_size=f))
    honest = set(everybody(n)) - malicious
    silent = draw(st.sets(st.integers(1, n), max_size=3))
    rejected = draw(st.sets(st.sampled_from(sorted(malicious)))) if malicious else set()
    answered = set(everybody(n)) - silent
    off = {
        i: draw(st.sets(st.sampled_from(sorted(possible)))) if possible else set()
        for i in everybody(n)
        for possible in [answered & (malicious if i in honest else set(everybody(n)))]
    }
    return SealedBounds.of(n, tau, f), malicious, answered, words(n, off, rejected)


@given(rounds())
def test_malicious_sites_cannot_break_the_bound_or_abort_the_round(case):
    bounds, malicious, answered, judged = case
    result = eliminate(bounds, judged, answered)
    e = len(result.edges)
    assert result.f_left == bounds.f - e >= 0
    # Every edge takes at least one malicious site with it, so f_left still bounds those who remain.
    assert all(set(edge) & malicious for edge in result.edges)
    assert len(malicious & set(result.holders)) <= result.f_left
    assert bounds.n - 2 * e >= 2 * bounds.tau + 2 * result.f_left + 1


@given(rounds())
def test_honest_holders_leave_only_with_a_malicious_one(case):
    bounds, malicious, answered, judged = case
    result = eliminate(bounds, judged, answered)
    gone = {end for edge in result.edges for end in edge}
    assert set(result.holders) == answered - gone
    assert len(gone - malicious) <= len(gone & malicious)


@given(rounds())
def test_an_honest_update_is_lost_only_to_two_malicious_sites(case):
    bounds, malicious, answered, judged = case
    result = eliminate(bounds, judged, answered)
    partner = {a: b for edge in result.edges for a, b in (edge, edge[::-1])}
    lost = {word.dealer for word in judged} - set(result.dealers) - malicious
    for dealer in lost:
        off = judged[dealer - 1].off
        assert partner[dealer] in malicious
        assert off & set(result.holders) & malicious
    if len(malicious & set(result.holders)) == 0:
        assert not lost


@given(rounds())
def test_who_remains_agrees_and_the_matching_is_maximal(case):
    bounds, _, answered, judged = case
    result = eliminate(bounds, judged, answered)
    ends = [end for edge in result.edges for end in edge]
    assert len(set(ends)) == len(ends)
    assert list(result.edges) == sorted(result.edges)
    for word in judged:
        if word.dealer in result.dealers:
            assert word.accepted
            assert word.off.isdisjoint(result.holders)
        for holder in word.off - {word.dealer}:
            assert {word.dealer, holder} & set(ends)


@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_in_which_disputes_are_told_does_not_matter(case, random):
    bounds, _, answered, judged = case
    shuffled = random.sample(judged, len(judged))
    first, second = eliminate(bounds, judged, answered), eliminate(bounds, shuffled, sorted(answered, reverse=True))
    assert (first.holders, first.edges, first.f_left) == (second.holders, second.edges, second.f_left)
    assert set(first.dealers) == set(second.dealers)


def test_every_dispute_graph_of_one_liar_among_five():
    for liar in everybody(5):
        others = [k for k in everybody(5) if k != liar]
        for size in range(5):
            for victims in itertools.combinations(others, size):
                # It disputes as a holder, and as a dealer it gives the same sites wrong shares.
                off = {k: {liar} for k in victims} | {liar: set(victims)}
                result = eliminate(FIVE, words(5, off), everybody(5))
                assert len(result.edges) == min(1, size)
                assert set(result.dealers) >= set(others)
                assert (liar in result.dealers) == (size <= 1)


def test_nobody_disputes():
    assert eliminate(TEN, words(10), everybody(10)) == Elimination(tuple(everybody(10)), (), tuple(everybody(10)), 2)


def test_the_matching_is_greedy_in_ascending_order():
    result = eliminate(TEN, words(10, {9: {1, 2}, 8: {2}, 2: {8}}), everybody(10))
    assert result.edges == ((1, 9), (2, 8))
    assert result.holders == (3, 4, 5, 6, 7, 10)
    assert result.dealers == tuple(everybody(10))
    assert result.f_left == 0


def test_a_dealer_that_still_disagrees_with_a_remaining_holder_leaves_the_sum():
    result = eliminate(TEN, words(10, {9: {1, 2}}), everybody(10))
    assert result.edges == ((1, 9),)
    assert 2 in result.holders
    assert 9 not in result.dealers
    assert 1 in result.dealers


def test_disputes_with_rejected_dealers_cost_no_holder():
    rejected = DealerWord(3, False, frozenset({1}))
    result = eliminate(FIVE, (*words(2), rejected), everybody(5))
    assert result == Elimination((1, 2, 3, 4, 5), (), (1, 2), 1)


def test_a_site_at_odds_with_itself_loses_its_update_alone():
    result = eliminate(FIVE, words(5, {4: {4}}), everybody(5))
    assert result == Elimination((1, 2, 3, 4, 5), (), (1, 2, 3, 5), 1)


def test_who_has_not_answered_is_no_holder_but_may_be_a_dealer():
    result = eliminate(FIVE, words(5), (1, 2, 4, 5))
    assert result.holders == (1, 2, 4, 5)
    assert result.dealers == (1, 2, 3, 4, 5)
    assert result.f_left == 1


def test_more_disputes_than_malicious_sites_can_cause_end_the_round():
    with pytest.raises(RoundFailed, match=r"2 separate pairs of sites are in dispute \(1-2, 3-4\)"):
        eliminate(FIVE, words(5, {1: {2}, 4: {3}}), everybody(5))


@pytest.mark.parametrize(
    ("judged", "answered"),
    [
        ((DealerWord(6, True, frozenset()),), everybody(5)),
        ((DealerWord(0, False, frozenset()),), everybody(5)),
        ((DealerWord(1, True, frozenset()), DealerWord(1, False, frozenset())), everybody(5)),
        ((DealerWord(1, True, frozenset()),), (1, 6)),
    ],
)
def test_numbers_that_are_not_of_the_round_are_refused(judged, answered):
    with pytest.raises(UsageError, match="numbered from 1 to 5"):
        eliminate(FIVE, judged, answered)


def test_a_dispute_of_a_silent_holder_is_refused():
    with pytest.raises(UsageError, match="has not answered"):
        eliminate(FIVE, (DealerWord(1, True, frozenset({3})),), (1, 2, 4, 5))
