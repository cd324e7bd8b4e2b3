"""Gram matrices: made, checked, measured, mixed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.aggregation import (
    NonFiniteGramError,
    NonFiniteUpdateError,
    gram_matrix,
    mix,
    squared_distances,
)
from quorsum.aggregation.gram import (
    MAJORITY,
    RESOLUTION,
    as_gram,
    as_updates,
    distances_to,
    lower_median,
    lowest,
    non_finite_rows,
    norms,
    require_sites,
    rounded,
)
from quorsum.errors import BoundError, UsageError

SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(shape=SHAPES)
def test_gram_matrix_is_the_product(shape: tuple[int, int, int]) -> None:
    updates = np.random.default_rng(shape[2]).normal(size=shape[:2])
    gram = gram_matrix(updates)
    np.testing.assert_allclose(gram, updates @ updates.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(gram, gram.T)


def test_gram_matrix_over_several_blocks_keeps_double_precision() -> None:
    updates = np.full((2, 700_001), 0.1, dtype=np.float32)
    np.testing.assert_allclose(gram_matrix(updates), 700_001 * float(np.float32(0.1)) ** 2, rtol=1e-12)


def test_gram_matrix_of_spoilt_updates_does_not_warn() -> None:
    assert non_finite_rows(gram_matrix([[1.0, 2.0], [np.inf, -np.inf], [1e200, 0.0], [0.0, 1.0]])) == (1, 2)


@pytest.mark.parametrize(
    "wrong", [np.zeros(3), np.zeros((2, 0)), np.zeros((0, 2)), np.zeros((2, 2), complex), [["a", "b"]], [[True, False]]]
)
def test_what_is_no_matrix(wrong: object) -> None:
    for function in (gram_matrix, as_gram, as_updates):
        with pytest.raises(UsageError, match="must be a matrix"):
            function(wrong)  # type: ignore[arg-type]


def test_as_gram_refuses_what_is_not_square_or_not_symmetric() -> None:
    with pytest.raises(UsageError, match=r"must be square, got shape \(2, 3\)"):
        as_gram(np.zeros((2, 3)))
    with pytest.raises(UsageError, match="not symmetric"):
        as_gram([[1.0, 0.5], [0.4, 1.0]])


def test_as_gram_evens_out_rounding() -> None:
    gram = as_gram([[1.0, 0.5], [0.5 + 1e-9, 1.0]])
    assert gram[0, 1] == gram[1, 0]


def test_non_finite_rows_blame_the_sender_and_nobody_else() -> None:
    gram = np.eye(6)
    gram[2, :] = gram[:, 2] = np.nan
    assert non_finite_rows(gram) == (2,)
    gram = np.eye(6)
    gram[4, [0, 1, 3]] = np.inf
    assert non_finite_rows(gram) == (4,)
    gram = np.eye(6)
    gram[1, 5] = np.nan
    assert non_finite_rows(gram) == (1, 5)
    assert non_finite_rows(np.diag([1.0, 1e301])) == (1,)
    assert non_finite_rows(np.eye(3)) == ()


def test_non_finite_errors_travel_between_processes() -> None:
    for error in (NonFiniteGramError("rows", [1, 2]), NonFiniteUpdateError("rows", [3])):
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert type(copy) is type(error)
        assert (str(copy), copy.rows) == (str(error), error.rows)


def test_as_updates_names_rows() -> None:
    with pytest.raises(NonFiniteUpdateError, match="updates 0, 2 are not finite") as caught:
        as_updates([[np.nan], [1.0], [np.inf]])
    assert caught.value.rows == (0, 2)


@settings(deadline=None)
@given(shape=SHAPES, exponent=st.floats(-3, 3))
def test_squared_distances(shape: tuple[int, int, int], exponent: float) -> None:
    updates = np.random.default_rng(shape[2]).normal(size=shape[:2]) * 10**exponent
    expected = np.sum((updates[:, None] - updates[None]) ** 2, axis=2)
    distances = squared_distances(gram_matrix(updates))
    np.testing.assert_allclose(distances, expected, rtol=1e-9, atol=1e-9 * 100**exponent)
    assert (distances >= 0).all()
    assert (np.diagonal(distances) == 0).all()


def test_rounding_is_not_a_distance() -> None:
    # 0.1 + 0.2 and 0.3 differ in the last bit; so may two mixtures of the same updates.
    close = gram_matrix([[0.1 + 0.2, 7.0], [0.3, 7.0]])
    assert squared_distances(close)[0, 1] == 0
    apart = np.sqrt(RESOLUTION * 2) * 1.1
    assert squared_distances(gram_matrix([[0.0, 1.0], [apart, 1.0]]))[0, 1] > 0


@settings(deadline=None)
@given(shape=SHAPES)
def test_distances_to_a_combination(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(shape[2])
    updates, weights = rng.normal(size=shape[:2]), rng.normal(size=shape[0])
    expected = np.linalg.norm(updates - weights @ updates, axis=1)
    np.testing.assert_allclose(distances_to(gram_matrix(updates), weights), expected, rtol=1e-6, atol=1e-6)


def test_norms_of_noise_around_zero() -> None:
    assert norms(np.diag([4.0, -1e-9])).tolist() == [2.0, 0.0]


def test_lower_median_is_one_of_the_values() -> None:
    assert lower_median(np.array([4.0, 1.0, 3.0, 2.0])) == 2.0
    assert lower_median(np.array([3.0, 1.0, 2.0])) == 2.0


def test_lowest_takes_the_lowest_row_of_equals() -> None:
    assert lowest(np.array([1.0, 0.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
    assert lowest(np.array([0.1 + 0.2, 0.3]), 1).tolist() == [True, False]


@settings(deadline=None)
@given(value=st.floats(0, 1e300))
def test_rounded_is_close_and_stable(value: float) -> None:
    once = rounded(np.array([value]))
    assert once[0] == pytest.approx(value, rel=2.0**-30, abs=1e-320)
    assert rounded(once)[0] == once[0]


def test_rounded_keeps_what_it_can() -> None:
    values = np.array([0.0, -1.0, np.inf, 1.0, 1 + 2.0**-28])
    assert rounded(values).tolist() == values.tolist()


@settings(deadline=None)
@given(shape=SHAPES, outputs=st.integers(1, 5))
def test_mix_is_mixing_the_updates(shape: tuple[int, int, int], outputs: int) -> None:
    rng = np.random.default_rng(shape[2])
    updates, matrix = rng.normal(size=shape[:2]), rng.normal(size=(outputs, shape[0]))
    np.testing.assert_allclose(mix(gram_matrix(updates), matrix), gram_matrix(matrix @ updates), rtol=1e-9, atol=1e-9)


def test_mix_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"has 3 columns, got shape \(2, 2\)"):
        mix(np.eye(3), np.eye(2))
    with pytest.raises(UsageError, match="mixing matrix is not finite"):
        mix(np.eye(2), [[np.nan, 0.0], [0.0, 1.0]])


def test_require_sites_says_what_would_work() -> None:
    require_sites("rule", 5, 2, MAJORITY)
    with pytest.raises(BoundError, match=r"at least n = 7 sites, got n = 5; add 2, or tolerate f = 2$"):
        require_sites("rule", 5, 3, MAJORITY)
    with pytest.raises(BoundError, match=r"add 1$"):
        require_sites("rule", 0, 0, MAJORITY)
