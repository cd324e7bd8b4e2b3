from __future__ import annotations

import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field
from quorsum.crypto.decoding import decode, decode_word
from quorsum.crypto.sharing import lagrange_matrix, share
from quorsum.errors import RoundFailed, UsageError

P = field.P


def subsets(items, most):
    items = list(items)
    return [set(chosen) for size in range(most + 1) for chosen in itertools.combinations(items, size)]


def through(points: dict[int, int], targets) -> list[int]:
    """Values at ``targets`` of the polynomial through these points, of degree below their number."""
    values = np.array([[y] for y in points.values()], dtype=np.uint64)
    return [int(y) for y in field.matmul(lagrange_matrix(list(points), list(targets)), values)[:, 0]]


def scenario(n, degree, words=3):
    secrets = field.random_vector(os.urandom, (words,))
    return secrets, share(secrets, degree, n, os.urandom)


def answers_of(shares, present):
    return {k: shares[k - 1] for k in present}


def spoilt(shares, liars, entries=slice(None)):
    shares = shares.copy()
    for k in liars:
        # Random, since small patterned errors can lie near a codeword themselves.
        error = field.random_vector(os.urandom, (1,))
        shares[k - 1, entries] = field.add(shares[k - 1][entries], error)
    return shares


# --- liars ---


def forged_to_tie(n, degree, f, present):
    """f liars put their answers on another polynomial that agrees with ``degree`` honest answers as well."""
    secrets, shares = scenario(n, degree, words=1)
    present = sorted(present)
    liars, honest = present[:f], present[f : f + degree]
    anchors = {k: int(shares[k - 1, 0]) for k in honest} | {liars[0]: (int(shares[liars[0] - 1, 0]) + 1) % P}
    shares = shares.copy()
    shares[[k - 1 for k in liars], 0] = through(anchors, liars)
    return secrets, shares, set(liars)


@pytest.mark.parametrize(("n", "tau", "f"), [(5, 1, 1), (7, 1, 2), (7, 2, 1), (9, 2, 2), (13, 3, 3)])
@pytest.mark.parametrize("twice", [True, False])
def test_a_near_codeword_forged_to_tie_never_wins(n, tau, f, twice):
    degree = 2 * tau if twice else tau
    # One answer short of D + 2 f + 1, the forged codeword and the honest one agree with D + f answers each.
    secrets, shares, _ = forged_to_tie(n, degree, f, range(1, degree + 2 * f + 1))
    with pytest.raises(RoundFailed, match="1 answers are missing"):
        decode(answers_of(shares, range(1, degree + 2 * f + 1)), degree, f, os.urandom)
    # One more answer, and only the honest one is accepted.
    secrets, shares, liars = forged_to_tie(n, degree, f, range(1, degree + 2 * f + 2))
    decoded = decode(answers_of(shares, range(1, degree + 2 * f + 2)), degree, f, os.urandom)
    assert np.array_equal(decoded.values, secrets)
    assert decoded.liars == liars


@pytest.mark.parametrize(("n", "tau", "f"), [(3, 1, 0), (5, 1, 1), (7, 1, 2), (7, 2, 1)])
@pytest.mark.parametrize("twice", [True, False])
def test_every_pattern_of_silence_and_lies(n, tau, f, twice):
    degree = 2 * tau if twice else tau
    everybody = range(1, n + 1)
    for silent in subsets(everybody, n - 1):
        present = [k for k in everybody if k not in silent]
        for liars in subsets(present, f + 1):
            secrets, shares = scenario(n, degree, words=2)
            answers = answers_of(spoilt(shares, liars), present)
            if len(liars) <= f and len(present) - len(liars) >= degree + f + 1:
                decoded = decode(answers, degree, f, os.urandom)
                assert np.array_equal(decoded.values, secrets)
                assert decoded.liars == liars
            elif len(liars) <= f or len(present) > degree + 1:
                with pytest.raises(RoundFailed):
                    decode(answers, degree, f, os.urandom)


def test_liars_that_lie_in_different_entries_are_all_named():
    secrets, shares = scenario(9, 4, words=4)
    shares = spoilt(spoilt(shares, {2}, [1]), {7}, [3])
    decoded = decode(answers_of(shares, range(1, 10)), 4, 2, os.urandom)
    assert np.array_equal(decoded.values, secrets)
    assert decoded.liars == {2, 7}


def test_lies_in_different_entries_are_corrected_one_by_one_where_together_they_are_too_many():
    # 8 answers allow one error in a word (8 - 1 = 4 + 2 + 1), and the combination shows two.
    secrets, shares = scenario(9, 4, words=4)
    shares = spoilt(spoilt(shares, {2}, [1]), {7}, [3])
    decoded = decode(answers_of(shares, range(1, 9)), 4, 2, os.urandom)
    assert np.array_equal(decoded.values, secrets)
    assert decoded.liars == {2, 7}


def test_more_liars_than_can_be_are_not_forgiven_even_if_each_word_is_decodable():
    _, shares = scenario(9, 4, words=4)
    shares = spoilt(spoilt(spoilt(shares, {1}, [0]), {2}, [1]), {7}, [3])
    with pytest.raises(RoundFailed, match=r"3 of 9 holders answered wrongly \(1, 2, 7\), more than the 2"):
        decode(answers_of(shares, range(1, 10)), 4, 2, os.urandom)


@pytest.mark.parametrize("coins", [b"\x00", b"\x01", b"\x7f"])
def test_the_coins_do_not_change_the_result(coins):
    # All zero, the combination shows nobody; equal coefficients, it hides lies that cancel.
    secrets, shares = scenario(9, 4, words=4)
    shares = shares.copy()
    shares[2, :1] = field.add(shares[2, :1], np.uint64(5))
    shares[2, 1:2] = field.sub(shares[2, 1:2], np.uint64(5))
    shares[5, 2] = 0
    decoded = decode(answers_of(shares, range(1, 10)), 4, 2, lambda count: (coins + b"\x00" * 7) * (count // 8))
    assert np.array_equal(decoded.values, secrets)
    assert decoded.liars == {3, 6}


def test_without_liars_tolerated_one_wrong_answer_ends_the_round():
    _, shares = scenario(9, 2, words=2)
    with pytest.raises(RoundFailed, match="more than 0 of 9 answers are wrong"):
        decode(answers_of(spoilt(shares, {4}), range(1, 10)), 2, 0, os.urandom)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_accepted_is_right_whatever_the_liars_say(data):
    tau, f = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    n = 2 * tau + 2 * f + 1 + data.draw(st.integers(0, 2))
    degree = data.draw(st.sampled_from([tau, 2 * tau]))
    secrets, shares = scenario(n, degree)
    shares = shares.copy()
    holders = list(range(1, n + 1))
    liars = data.draw(st.sets(st.sampled_from(holders), max_size=f))
    for k in liars:
        shares[k - 1] = data.draw(st.lists(st.integers(0, P - 1), min_size=3, max_size=3))
    silent = data.draw(st.sets(st.sampled_from(holders), max_size=n - 1))
    present = [k for k in holders if k not in silent]
    try:
        decoded = decode(answers_of(shares, present), degree, f, os.urandom)
    except RoundFailed:
        assert len(present) < degree + 2 * f + 1
    else:
        assert np.array_equal(decoded.values, secrets)
        assert decoded.liars <= liars


def test_fifty_sites_are_decoded_fast():
    for words, degree in ((4096, 12), (1275, 24)):
        secrets, shares = scenario(50, degree, words)
        shares = shares.copy()
        for k in range(12):
            shares[4 * k, 7 * k] ^= np.uint64(1)
        start = time.perf_counter()
        decoded = decode(answers_of(shares, range(1, 51)), degree, 12, os.urandom)
        # A tenth of this where nothing else runs; one word at a time would take longer than this.
        assert time.perf_counter() - start < 5
        assert np.array_equal(decoded.values, secrets)
        assert decoded.liars == {4 * k + 1 for k in range(12)}


# --- one word ---


def test_a_word_is_decoded_up_to_half_the_distance_and_not_beyond():
    for wrong in range(5):
        _, shares = scenario(9, 2, words=1)
        liars = set(range(1, wrong + 1))
        received = [int(y) for y in spoilt(shares, liars)[:, 0]]
        word = decode_word(received, range(1, 10), 2)
        if wrong <= 3:
            assert word is not None
            assert set(word.agreeing) == set(range(wrong, 9))
        else:
            assert word is None


def test_the_zero_word_and_constants_are_words():
    word = decode_word([0] * 5, range(1, 6), 2)
    assert word is not None
    assert (word.at_zero, word.agreeing) == (0, (0, 1, 2, 3, 4))
    word = decode_word([9, 9, 9, 1, 9], range(1, 6), 0)
    assert word is not None
    assert (word.at_zero, word.agreeing) == (9, (0, 1, 2, 4))


def test_a_number_that_is_no_field_element_is_wrong_even_if_it_is_congruent():
    word = decode_word([4 + P, 4, 4, 4, 4], range(1, 6), 1)
    assert word is not None
    assert word.agreeing == (1, 2, 3, 4)


def test_too_short_a_word_is_no_word():
    assert decode_word([1, 2], (1, 2), 2) is None


@pytest.mark.parametrize(("received", "points", "degree"), [([1], (1, 2), 0), ([1, 2], (1, 1), 0), ([1], (1,), -1)])
def test_a_word_that_does_not_fit_its_points_is_refused(received, points, degree):
    with pytest.raises(UsageError, match="distinct holders"):
        decode_word(received, points, degree)


# --- refusals ---


def test_too_few_answers_are_counted():
    _, shares = scenario(9, 4)
    with pytest.raises(RoundFailed, match="5 answers came and 7 are needed: 2 are missing"):
        decode(answers_of(shares, range(1, 6)), 4, 2, os.urandom)
    with pytest.raises(RoundFailed, match="0 answers came"):
        decode({}, 4, 2, os.urandom)


@pytest.mark.parametrize(
    "second",
    [np.zeros(2, np.uint64), np.zeros((1, 3), np.uint64), np.zeros(3, np.int64), np.full(3, P, np.uint64)],
)
def test_answers_that_are_not_alike_or_no_field_elements_are_refused(second):
    with pytest.raises(UsageError, match="answers"):
        decode({1: np.zeros(3, np.uint64), 2: second}, 0, 0, os.urandom)


def test_empty_answers_and_negative_numbers_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        decode({1: np.zeros(0, np.uint64)}, 0, 0, os.urandom)
    for degree, f_left in ((-1, 0), (0, -1)):
        with pytest.raises(UsageError, match="negative"):
            decode({1: np.zeros(1, np.uint64)}, degree, f_left, os.urandom)
