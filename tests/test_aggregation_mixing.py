"""Pre-aggregators as matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quorsum.aggregation import (
    NonFiniteGramError,
    arc_matrix,
    bucketing_matrix,
    clip_matrix,
    gram_matrix,
    mix,
    nnm_matrix,
)
from quorsum.errors import BoundError, UsageError

CASES = st.tuples(st.integers(1, 11), st.integers(1, 6), st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(case=CASES, share=st.floats(0, 1))
def test_nnm_rows_are_means_of_the_nearest(case: tuple[int, int, int], share: float) -> None:
    n, d, seed = case
    f = int(share * ((n - 1) // 2))
    updates = np.random.default_rng(seed).normal(size=(n, d))
    matrix = nnm_matrix(gram_matrix(updates), f)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert (np.diagonal(matrix) > 0).all()
    assert (np.count_nonzero(matrix, axis=1) == n - f).all()
    for i in range(n):
        nearest = np.argsort(np.linalg.norm(updates - updates[i], axis=1))[: n - f]
        np.testing.assert_allclose(matrix[i] @ updates, updates[nearest].mean(axis=0), atol=1e-9)


def test_nnm_without_malicious_sites_is_the_mean() -> None:
    np.testing.assert_allclose(nnm_matrix(np.eye(4), 0), np.full((4, 4), 0.25))


def test_nnm_keeps_an_update_in_its_own_mixture() -> None:
    # All rows are equal: by lowest row alone, row 4 would not be among its own three.
    assert nnm_matrix(np.ones((5, 5)), 2)[4].tolist() == [1 / 3, 1 / 3, 0, 0, 1 / 3]


@settings(deadline=None)
@given(n=st.integers(1, 30), size=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_buckets_are_a_partition(n: int, size: int, seed: int) -> None:
    matrix = bucketing_matrix(n, np.random.default_rng(seed), size)
    assert matrix.shape == (-(-n // size), n)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert (np.count_nonzero(matrix, axis=0) == 1).all()
    assert (np.count_nonzero(matrix, axis=1)[:-1] == size).all()
    np.testing.assert_array_equal(matrix, bucketing_matrix(n, np.random.default_rng(seed), size))


def test_buckets_are_drawn() -> None:
    drawn = {bucketing_matrix(8, np.random.default_rng(seed)).tobytes() for seed in range(5)}
    assert len(drawn) == 5


@settings(deadline=None)
@given(case=CASES, share=st.floats(0, 1))
def test_arc_clips_the_longest(case: tuple[int, int, int], share: float) -> None:
    n, d, seed = case
    f = int(share * ((n - 1) // 2))
    gram = gram_matrix(np.random.default_rng(seed).normal(size=(n, d)))
    before = np.sqrt(np.diagonal(gram))
    matrix = arc_matrix(gram, f)
    after = np.sqrt(np.diagonal(mix(gram, matrix)))
    threshold = np.sort(before)[n - 1 - (2 * f * (n - f)) // n]
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-9)
    assert (matrix == np.diag(np.diagonal(matrix))).all()
    if f == 0:
        np.testing.assert_array_equal(matrix, np.eye(n))


@settings(deadline=None)
@given(case=CASES, norm=st.floats(0.01, 10))
def test_clip_clips(case: tuple[int, int, int], norm: float) -> None:
    gram = gram_matrix(np.random.default_rng(case[2]).normal(size=case[:2]))
    after = np.sqrt(np.diagonal(mix(gram, clip_matrix(gram, norm))))
    np.testing.assert_allclose(after, np.minimum(np.sqrt(np.diagonal(gram)), norm), rtol=1e-9)


def test_zero_updates_stay_zero() -> None:
    np.testing.assert_array_equal(clip_matrix(np.zeros((3, 3)), 1.0), np.eye(3))
    np.testing.assert_array_equal(arc_matrix(np.zeros((3, 3)), 1), np.eye(3))
    # Everybody but one sent zero, so the threshold is zero.
    assert arc_matrix(np.diag([0.0, 0.0, 4.0]), 1)[2, 2] == 0


@pytest.mark.parametrize(("matrix", "name"), [(nnm_matrix, "nnm"), (arc_matrix, "arc")])
def test_too_few_sites(matrix: object, name: str) -> None:
    with pytest.raises(BoundError, match=f"{name} needs n >= 2f .*at least n = 5 sites, got n = 4"):
        matrix(np.eye(4), 2)  # type: ignore[operator]


@pytest.mark.parametrize(
    "call",
    [
        lambda gram: nnm_matrix(gram, 1),
        lambda gram: arc_matrix(gram, 1),
        lambda gram: clip_matrix(gram, 1.0),
        lambda gram: mix(gram, np.eye(3)),
    ],
)
def test_non_finite_rows_are_named(call: Callable[[NDArray[np.float64]], object]) -> None:
    with pytest.raises(NonFiniteGramError) as caught:
        call(np.diag([1.0, np.nan, 1.0]))
    assert caught.value.rows == (1,)


def test_options_are_checked() -> None:
    for norm in (0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(UsageError, match="norm must be a positive finite number"):
            clip_matrix(np.eye(2), norm)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="size must be a whole number from 1, got 0"):
        bucketing_matrix(4, np.random.default_rng(0), 0)
    with pytest.raises(UsageError, match="n must be a whole number from 1, got 0"):
        bucketing_matrix(0, np.random.default_rng(0))
    with pytest.raises(UsageError, match="from a numpy Generator, got int: pass rng"):
        bucketing_matrix(4, 7)  # type: ignore[arg-type]
