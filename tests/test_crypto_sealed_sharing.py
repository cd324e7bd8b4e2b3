from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from flint import nmod_mat
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds
from quorsum.crypto.sharing import (
    Deal,
    deal_length,
    deal_shares,
    deal_zeros,
    interpolate_at_zero,
    lagrange_matrix,
    share,
)
from quorsum.errors import Refusal, UsageError

P = field.P
elements = st.integers(0, P - 1)


def column(values) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def evaluate(coefficients, x) -> int:
    return sum(c * pow(x, j, P) for j, c in enumerate(coefficients)) % P


def a_key() -> np.ndarray:
    return field.random_vector(os.urandom, (SEALED_V1.degree,))


# --- privacy ---


@given(st.data())
@settings(max_examples=60)
def test_tau_shares_are_consistent_with_every_secret(data):
    tau = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(2 * tau + 1, 15))
    colluders = data.draw(st.lists(st.integers(1, n), min_size=tau, max_size=tau, unique=True))
    secret, other = data.draw(elements), data.draw(elements)
    shares = share(column([secret]), tau, n, os.urandom)
    view = [int(shares[k - 1, 0]) for k in colluders]
    # The coefficients r_1..r_tau that explain the same view with the other secret: sum_j k^j r_j = view_k - other.
    matrix = nmod_mat([[pow(k, j, P) for j in range(1, tau + 1)] for k in colluders], P)
    wanted = nmod_mat([[(value - other) % P] for value in view], P)
    explaining = [other, *(int(r) for r in matrix.solve(wanted).entries())]
    assert [evaluate(explaining, k) for k in colluders] == view


def test_every_view_of_tau_sites_comes_from_exactly_one_choice_of_coefficients():
    # With the secret fixed, coefficients -> shares of tau sites is a bijection: [k^j], j = 1..tau, is regular.
    for n, tau in ((5, 1), (9, 2), (13, 3)):
        for colluders in itertools.combinations(range(1, n + 1), tau):
            matrix = nmod_mat([[pow(k, j, P) for j in range(1, tau + 1)] for k in colluders], P)
            assert int(matrix.det()) != 0


def test_the_view_of_two_tau_sites_of_a_zero_sharing_is_free():
    for n, tau in ((5, 1), (9, 2)):
        for colluders in itertools.combinations(range(1, n + 1), 2 * tau):
            matrix = nmod_mat([[pow(k, j, P) for j in range(1, 2 * tau + 1)] for k in colluders], P)
            assert int(matrix.det()) != 0


def test_the_mask_of_the_key_check_is_random_at_zero_and_that_of_the_zeros_is_zero_there():
    bounds = SealedBounds.of(5, 1, 1)
    deals = [deal_shares(np.zeros(SEALED_V1.degree, dtype=np.uint64), bounds, os.urandom) for _ in range(2)]
    points = range(1, 6)
    masks = {int(interpolate_at_zero(column([[d.key_mask] for d in deal]), points)[0]) for deal in deals}
    assert len(masks) == 2
    assert 0 not in masks
    for deal in deals:
        assert int(interpolate_at_zero(column([[d.zeros_mask] for d in deal]), points)[0]) == 0


def test_nothing_secret_shows():
    deal = deal_shares(a_key(), SealedBounds.of(5, 1, 1), os.urandom)[0]
    assert repr(deal) == "Deal()"


# --- correctness ---


@given(st.data())
@settings(max_examples=60)
def test_any_degree_plus_one_shares_give_the_secret(data):
    n = data.draw(st.integers(1, 20))
    degree = data.draw(st.integers(0, n - 1))
    secrets = column(data.draw(st.lists(elements, min_size=1, max_size=5)))
    shares = share(secrets, degree, n, os.urandom)
    count = data.draw(st.integers(degree + 1, n))
    points = data.draw(st.permutations(range(1, n + 1)))[:count]
    assert shares.shape == (n, secrets.size)
    assert np.array_equal(interpolate_at_zero(shares[[k - 1 for k in points]], points), secrets)


@given(st.lists(elements, min_size=1, max_size=6), st.lists(elements, max_size=4))
def test_the_lagrange_matrix_takes_values_to_values(coefficients, targets):
    points = list(range(3, 3 + len(coefficients)))
    values = column([[evaluate(coefficients, x)] for x in points])
    # A target that is itself a point is the case that would divide by zero.
    targets = [*targets, points[-1], 0]
    there = field.matmul(lagrange_matrix(points, targets), values)[:, 0]
    assert there.tolist() == [evaluate(coefficients, x) for x in targets]


def test_the_extremes_of_the_field_survive():
    secrets = column([0, 1, P - 1])
    shares = share(secrets, 2, 5, lambda count: b"\xfe" * count)
    assert shares.tolist() == [
        [evaluate([s, c, c], k) for s in secrets.tolist()]
        for k in range(1, 6)
        for c in [int.from_bytes(b"\xfe" * 8, "little") & P]
    ]


def test_sharings_add_up_and_products_have_twice_the_degree():
    a, b = share(column([7]), 2, 5, os.urandom), share(column([11]), 2, 5, os.urandom)
    assert interpolate_at_zero(field.add(a, b)[:3], (1, 2, 3)).tolist() == [18]
    assert interpolate_at_zero(field.mul(a, b), (1, 2, 3, 4, 5)).tolist() == [77]


def test_zeros_are_zero_and_not_of_lower_degree():
    zeros = deal_zeros(50, 2, 9, os.urandom)
    assert zeros.shape == (9, 50)
    assert not interpolate_at_zero(zeros[:5], range(1, 6)).any()
    assert interpolate_at_zero(zeros[:4], range(1, 5)).all()


def test_a_deal_holds_sharings_of_the_right_degrees():
    bounds, key = SealedBounds.of(10, 2, 2), a_key()
    deals = deal_shares(key, bounds, os.urandom)
    assert len(deals) == 10
    assert np.array_equal(interpolate_at_zero(np.stack([d.key for d in deals[4:7]]), (5, 6, 7)), key)
    zeros = np.stack([d.zeros for d in deals])
    assert zeros.shape == (10, 10)
    assert not interpolate_at_zero(zeros[:5], range(1, 6)).any()
    assert interpolate_at_zero(zeros[:4], range(1, 5)).all()


def test_a_deal_survives_writing_and_reading():
    deal = deal_shares(a_key(), SealedBounds.of(7, 2, 1), os.urandom)[3]
    data = deal.to_bytes()
    again = Deal.from_bytes(data, 7)
    assert len(data) == deal_length(7) == 8 * (SEALED_V1.degree + 9)
    assert deal_length(7, sealed=True) == deal_length(7) + 48
    assert np.array_equal(again.key, deal.key)
    assert np.array_equal(again.zeros, deal.zeros)
    assert (again.key_mask, again.zeros_mask) == (deal.key_mask, deal.zeros_mask)
    assert again.to_bytes() == data


# --- refusals ---


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_a_deal_of_another_length_is_refused(change):
    length = deal_length(5) + change
    with pytest.raises(Refusal) as caught:
        Deal.from_bytes(bytes(length), 5)
    assert caught.value.code == "wrong-shape"
    assert str(deal_length(5)) in str(caught.value)


@pytest.mark.parametrize("place", [0, SEALED_V1.degree, SEALED_V1.degree + 1, -1])
@pytest.mark.parametrize("value", [P, 2**64 - 1])
def test_a_deal_with_a_number_out_of_range_is_refused(place, value):
    words = np.zeros(deal_length(5) // 8, dtype="<u8")
    words[place] = value
    with pytest.raises(Refusal) as caught:
        Deal.from_bytes(words.tobytes(), 5)
    assert caught.value.code == "out-of-range"


@pytest.mark.parametrize(("degree", "n"), [(-1, 5), (5, 5), (0, 0)])
def test_a_degree_that_does_not_fit_is_refused(degree, n):
    with pytest.raises(UsageError, match="holders"):
        share(column([1]), degree, n, os.urandom)


@pytest.mark.parametrize("secrets", [column([P]), np.array([1]), np.array([0.5])])
def test_secrets_that_are_no_field_elements_are_refused(secrets):
    with pytest.raises(UsageError, match="field elements"):
        share(secrets, 1, 3, os.urandom)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(UsageError, match="shape"):
        deal_shares(column([1, 2, 3]), SealedBounds.of(5, 1, 1), os.urandom)


def test_too_few_holders_for_zeros_are_refused():
    with pytest.raises(UsageError, match="5 holders"):
        deal_zeros(1, 2, 4, os.urandom)


def test_a_broken_source_is_refused():
    with pytest.raises(UsageError, match="random_bytes"):
        share(column([1]), 1, 3, lambda count: b"")


@pytest.mark.parametrize("points", [(1, 1), (0, 1), (1, P), (-1, 2)])
def test_points_that_are_no_holders_are_refused(points):
    with pytest.raises(UsageError, match="distinct"):
        interpolate_at_zero(np.zeros((2, 1), dtype=np.uint64), points)


def test_shares_without_their_points_are_refused():
    with pytest.raises(UsageError, match="one row"):
        interpolate_at_zero(np.zeros((3, 1), dtype=np.uint64), (1, 2))
    with pytest.raises(UsageError, match="point"):
        lagrange_matrix((), (0,))
    with pytest.raises(UsageError, match="targets"):
        lagrange_matrix((1,), (P,))
