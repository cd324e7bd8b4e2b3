from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto import exact_checks as module
from quorsum.crypto.exact_checks import exact_checks, is_positive_semidefinite
from quorsum.errors import RoundFailed


def honest(rng, n, size):
    """The Gram matrix of n vectors with a common part, squared norms near ``size``."""
    depth = int(rng.integers(n, 2 * n + 20))
    rows = rng.normal(size=(n, depth)) + rng.choice([0.0, 0.5, 2.0]) * rng.normal(size=depth)
    integers = np.rint(rows * (size / depth) ** 0.5).astype(np.int64).astype(object)
    return (integers @ integers.T).tolist()


def planted(seed, n, liars, size):
    """An honest Gram matrix in which some rows have inner products that each pair could have; and these rows."""
    rng = np.random.default_rng(seed)
    gram = honest(rng, n, size)
    bad = sorted(rng.permutation(n)[:liars].tolist())
    for i in bad:
        for j in set(range(n)) - set(bad):
            bound = int((gram[i][i] * gram[j][j]) ** 0.5 * 0.9)
            gram[i][j] = gram[j][i] = int(bound * rng.uniform(-1, 1))
    return gram, bad


def float_guess(gram):
    """The same guess by floating-point eigenvectors."""
    scale = np.array([max(1.0, float(gram[i][i])) ** 0.5 for i in range(len(gram))])
    _, vectors = np.linalg.eigh(np.array(gram, dtype=np.float64) / np.outer(scale, scale))
    return int(np.argmax(np.round(np.abs(vectors[:, 0]), 9)))


def guess(gram):
    return module._most_negative(gram, range(len(gram)))


@pytest.mark.parametrize("size", [100, 2**20, 2**40, 2**60])
def test_liars_are_found_as_often_as_by_floating_point(size):
    ours = theirs = cases = 0
    for seed in range(100):
        gram, bad = planted(seed, 4 + seed % 16, 1 + seed % 2, size)
        if is_positive_semidefinite(gram):
            continue
        cases += 1
        ours += guess(gram) in bad
        theirs += float_guess(gram) in bad
    assert cases > 60
    assert ours >= theirs
    assert ours > 0.8 * cases


@given(st.integers(0, 10**6), st.randoms())
def test_a_guess_goes_with_its_row_whatever_the_order_and_the_signs(seed, random):
    gram, _ = planted(seed, 6, 1, 2**40)
    order = random.sample(range(6), 6)
    signs = [random.choice([1, -1]) for _ in range(6)]
    moved = [[signs[i] * signs[j] * gram[i][j] for j in order] for i in order]
    assert order[guess(moved)] == guess(gram)


def test_of_equal_rows_the_first_is_guessed():
    for gram in ([[1, 2], [2, 1]], [[1, -2], [-2, 1]], [[9, 6, -6], [6, 9, 6], [-6, 6, 9]]):
        assert guess(gram) == 0
    # Rows 1 and 3 contradict each other; the guess is a position among the rows that are asked about.
    gram = [[9, 0, 0, 0], [0, 9, 0, 12], [0, 0, 9, 0], [0, 12, 0, 9]]
    assert [module._most_negative(gram, rows) for rows in ([0, 1, 2, 3], [1, 3], [2, 3, 1])] == [1, 0, 1]


def test_rows_without_length_and_huge_products():
    gram = [[4, 1, 0], [1, 4, 2**60], [0, 2**60, 0]]
    assert guess(gram) in (1, 2)
    assert guess([[2**60, 0, 5], [0, 2**60, 0], [5, 0, 0]]) == 2


def test_nearly_semidefinite():
    # Out of range of semidefinite matrices by one unit in 2^60: more than double precision sees.
    big = 2**60
    gram = [[big, 0, big - 1], [0, big, 0], [big - 1, 0, big - 3]]
    assert not is_positive_semidefinite(gram)
    assert guess(gram) in (0, 2)


def test_the_guess_is_right_for_sixty_rows_of_large_entries():
    gram, bad = planted(1, 60, 1, 2**60)
    assert guess(gram) == bad[0]


def test_liars_are_removed():
    gram, bad = planted(5, 12, 2, 2**40)
    verdict = exact_checks(gram, 2**50, 3)
    assert not set(bad) & set(verdict.rows)
    # Who is gone by a guess may have been honest, so that as many liars as before may be among the others.
    assert verdict.guessed == set(verdict.reasons)
    assert verdict.tolerate == 3
    assert all("is not one of any updates" in reason for reason in verdict.reasons.values())


def test_more_liars_than_there_can_be_end_the_round():
    gram, _ = planted(5, 12, 2, 2**40)
    with pytest.raises(RoundFailed, match="belong to no updates"):
        exact_checks(gram, 2**50, 1)


def test_only_what_is_certain_counts_off_a_liar() -> None:
    honest = [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 10**6]]
    verdict = exact_checks(honest, 100, 2)
    assert (set(verdict.reasons), verdict.guessed, verdict.tolerate) == ({3}, frozenset(), 1)
