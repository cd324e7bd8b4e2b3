from __future__ import annotations

import itertools
import os
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds
from quorsum.crypto.share_checks import (
    Challenge,
    CheckAnswer,
    DealerWord,
    agreement_needed,
    challenge_from,
    check_values,
    judge_dealers,
)
from quorsum.crypto.sharing import Deal, deal_shares, deal_zeros, interpolate_at_zero, share
from quorsum.errors import CoordinatorFault, UsageError

P = field.P
FIVE = SealedBounds.of(5, 1, 1)
NINE = SealedBounds.of(9, 2, 2)


def fresh(count):
    return field.random_vector(os.urandom, (count,))


def honest_deals(bounds):
    return deal_shares(fresh(SEALED_V1.degree), bounds, os.urandom)


@cache
def challenge(n) -> Challenge:
    return challenge_from(fresh, n)


def answers_to(bounds, all_deals, complaints=None):
    """Check answers of all holders: ``all_deals[i - 1][k - 1]`` is dealer i's deal to holder k."""
    return {
        k: CheckAnswer(
            np.stack([check_values(deals[k - 1], challenge(bounds.n)) for deals in all_deals]),
            frozenset((complaints or {}).get(k, ())),
        )
        for k in range(1, bounds.n + 1)
    }


def words_like(bounds, dealers=1):
    """Check values as honest dealers make them, without the deals behind them."""
    n, tau = bounds.n, bounds.tau
    keys, zeros = share(fresh(dealers), tau, n, os.urandom), deal_zeros(dealers, tau, n, os.urandom)
    return {k: CheckAnswer(np.stack([keys[k - 1], zeros[k - 1]], axis=1)) for k in range(1, n + 1)}


def lie(answer: CheckAnswer, row=0, part=0) -> CheckAnswer:
    values = answer.values.copy()
    values[row, part] = fresh(1)[0]
    return CheckAnswer(values, answer.complaints)


# --- malicious dealers ---


def swapped(deal: Deal, **changes) -> Deal:
    parts = {"key": deal.key, "key_mask": deal.key_mask, "zeros": deal.zeros, "zeros_mask": deal.zeros_mask}
    return Deal(**{**parts, **changes})


def test_a_dealer_that_gives_each_holder_another_polynomial_is_rejected():
    deals = [swapped(deal, key=fresh(SEALED_V1.degree)) for deal in honest_deals(FIVE)]
    assert judge_dealers(FIVE, [1], answers_to(FIVE, [deals])) == (DealerWord(1, False, frozenset()),)


@pytest.mark.parametrize("part", ["key", "zeros"])
def test_one_wrong_coordinate_for_one_holder_is_found(part):
    deals = list(honest_deals(FIVE))
    wrong = getattr(deals[2], part).copy()
    wrong[3] ^= np.uint64(1)
    deals[2] = swapped(deals[2], **{part: wrong})
    assert judge_dealers(FIVE, [1], answers_to(FIVE, [deals])) == (DealerWord(1, True, frozenset({3})),)


def test_a_key_of_too_high_degree_is_rejected():
    shared = share(fresh(SEALED_V1.degree), FIVE.tau + 1, FIVE.n, os.urandom)
    deals = [swapped(deal, key=shared[k]) for k, deal in enumerate(honest_deals(FIVE))]
    assert not judge_dealers(FIVE, [1], answers_to(FIVE, [deals]))[0].accepted


def test_sharings_of_something_else_than_zero_are_rejected():
    # On a polynomial of degree 2 tau, but not zero at zero: it would shift the Gram matrix.
    shared = share(fresh(FIVE.n), 2 * FIVE.tau, FIVE.n, os.urandom)
    deals = [swapped(deal, zeros=shared[k]) for k, deal in enumerate(honest_deals(FIVE))]
    assert not judge_dealers(FIVE, [1], answers_to(FIVE, [deals]))[0].accepted


def test_sharings_of_zero_of_too_high_degree_are_rejected():
    shared = share(np.zeros(9, dtype=np.uint64), 2 * NINE.tau + 1, NINE.n, os.urandom)
    deals = [swapped(deal, zeros=shared[k]) for k, deal in enumerate(honest_deals(NINE))]
    assert not judge_dealers(NINE, [1], answers_to(NINE, [deals]))[0].accepted


def test_two_half_words_do_not_make_one():
    # Each part agrees with enough holders, but not with the same ones.
    assert agreement_needed(NINE) == 7
    answers = words_like(NINE)
    answers |= {k: lie(answers[k], part=0) for k in (1, 2)} | {k: lie(answers[k], part=1) for k in (3, 4)}
    assert not judge_dealers(NINE, [1], answers)[0].accepted


# --- malicious holders and judges ---


@pytest.mark.parametrize(
    "bounds", [SealedBounds.of(n, t, f) for n, t, f in ((3, 1, 0), (5, 1, 1), (7, 2, 1), (7, 1, 2))]
)
def test_every_pattern_of_lying_and_silent_holders(bounds):
    everybody = range(1, bounds.n + 1)
    needed = agreement_needed(bounds)
    for bad in range(bounds.n + 1):
        for chosen in itertools.combinations(everybody, bad):
            for silent in range(bad + 1):
                answers = words_like(bounds)
                for k in chosen[:silent]:
                    del answers[k]
                for k in chosen[silent:]:
                    answers[k] = lie(answers[k], part=k % 2)
                (word,) = judge_dealers(bounds, [1], answers)
                assert word.accepted == (bounds.n - bad >= needed)
                assert word.off == (frozenset(chosen[silent:]) if word.accepted else frozenset())


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 3))
def test_the_honest_holders_suffice_and_two_judges_see_one_key(tau, f, more):
    bounds = SealedBounds.of(max(2 * tau + 2 * f, 3 * f) + 1 + more, tau, f)
    needed = agreement_needed(bounds)
    assert bounds.n - f >= needed
    assert 2 * needed - bounds.n - tau >= tau + 1


def test_a_second_word_tau_forgers_can_reach_is_never_accepted_beside_the_first():
    # Two judges get different answers from tau forgers, who put themselves on another polynomial than the honest ones.
    answers = words_like(NINE)
    other = words_like(NINE)
    for judge_sees in itertools.combinations(range(1, 10), 7):
        seen = {k: other[k] if k <= NINE.tau else answers[k] for k in judge_sees}
        (word,) = judge_dealers(NINE, [1], seen)
        assert word.off <= {1, 2}
        assert word.accepted == (not set(judge_sees) & {1, 2})


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_answers_and_the_judge_do_not_matter(data):
    answers = words_like(NINE, dealers=3)
    for k in data.draw(st.sets(st.integers(1, 9), max_size=3)):
        answers[k] = lie(answers[k], row=data.draw(st.integers(0, 2)), part=data.draw(st.integers(0, 1)))
    order = data.draw(st.permutations(sorted(answers)))
    shuffled = {k: answers[k] for k in order}
    expected = judge_dealers(NINE, [2, 5, 7], answers)
    assert all(judge_dealers(NINE, [2, 5, 7], shuffled, own=k) == expected for k in order)


def test_a_judge_whose_own_answer_was_left_out_refuses():
    answers = words_like(FIVE)
    del answers[4]
    with pytest.raises(CoordinatorFault) as caught:
        judge_dealers(FIVE, [1], answers, own=4)
    assert caught.value.code == "own-answer-missing"
    assert judge_dealers(FIVE, [1], answers, own=3)[0].accepted


def test_who_complains_is_in_dispute_and_does_not_count():
    answers = words_like(FIVE, dealers=2)
    answers[2] = CheckAnswer(answers[2].values, frozenset({5}))
    assert judge_dealers(FIVE, [1, 5], answers) == (
        DealerWord(1, True, frozenset()),
        DealerWord(5, True, frozenset({2})),
    )
    answers[3] = CheckAnswer(answers[3].values, frozenset({5}))
    assert judge_dealers(FIVE, [1, 5], answers)[1] == DealerWord(5, False, frozenset())


@pytest.mark.parametrize("part", [0, 1])
def test_a_value_that_is_congruent_but_no_field_element_is_off(part):
    answers = words_like(FIVE)
    values = answers[2].values.copy()
    values[0, part] += np.uint64(P)
    answers[2] = CheckAnswer(values)
    assert judge_dealers(FIVE, [1], answers)[0] == DealerWord(1, True, frozenset({2}))


def test_nobody_answers_and_nobody_is_accepted():
    assert judge_dealers(FIVE, [1], {}) == (DealerWord(1, False, frozenset()),)


# --- honest dealers ---


def test_honest_dealers_pass():
    bounds = SealedBounds.of(7, 1, 2)
    deals = [honest_deals(bounds) for _ in range(3)]
    words = judge_dealers(bounds, [1, 4, 6], answers_to(bounds, deals))
    assert words == tuple(DealerWord(i, True, frozenset()) for i in (1, 4, 6))


def test_the_check_of_the_key_says_nothing_about_the_key():
    # The opened word at zero is gamma . key + mask: with a fresh mask another number each time for the same key.
    key = np.ones(SEALED_V1.degree, dtype=np.uint64)
    opened = set()
    for _ in range(3):
        deals = deal_shares(key, FIVE, os.urandom)
        values = np.stack([check_values(deal, challenge(5)) for deal in deals])
        opened.add(int(interpolate_at_zero(values[:, :1], range(1, 6))[0]))
        assert int(interpolate_at_zero(values[:, 1:], range(1, 6))[0]) == 0
    assert len(opened) == 3


def test_check_values_are_the_formula():
    deal, asked = honest_deals(FIVE)[0], challenge(5)
    by_hand = [
        (sum(g * s for g, s in zip(gamma.tolist(), shares.tolist(), strict=True)) + mask) % P
        for gamma, shares, mask in (
            (asked.gamma, deal.key, deal.key_mask),
            (asked.gamma_zeros, deal.zeros, deal.zeros_mask),
        )
    ]
    assert check_values(deal, asked).tolist() == by_hand


# --- refusals ---


def test_a_challenge_for_another_number_of_sites_is_refused():
    with pytest.raises(UsageError, match="another number of sites"):
        check_values(honest_deals(FIVE)[0], challenge(7))


def test_a_source_that_gives_another_number_of_elements_is_refused():
    with pytest.raises(UsageError, match="gave an array"):
        challenge_from(lambda count: fresh(count - 1), 5)


@pytest.mark.parametrize("dealers", [[0], [6], [1, 1]])
def test_dealers_that_are_not_of_the_round_are_refused(dealers):
    with pytest.raises(UsageError, match="dealers must be distinct numbers from 1 to 5"):
        judge_dealers(FIVE, dealers, {})


@pytest.mark.parametrize(
    ("holder", "answer"),
    [
        (6, CheckAnswer(np.zeros((1, 2), np.uint64))),
        (1, CheckAnswer(np.zeros((2, 2), np.uint64))),
        (1, CheckAnswer(np.zeros((1, 2), np.uint64), frozenset({3}))),
    ],
)
def test_answers_that_do_not_fit_the_round_are_refused(holder, answer):
    with pytest.raises(UsageError, match="holder"):
        judge_dealers(FIVE, [1], {holder: answer})
