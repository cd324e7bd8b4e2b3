"""Copies and what merely looks like them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from quorsum.aggregation.sybils import Similarity, SybilPolicy, clusters, foolsgold, remembered
from quorsum.errors import UsageError

POLICY = SybilPolicy()


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{number:02d}" for number in range(count))


def history(rows: list[NDArray[np.float64]], policy: SybilPolicy = POLICY) -> Similarity:
    similarity = Similarity()
    for matrix in rows:
        similarity = remembered(policy, similarity, names(len(matrix)), matrix @ matrix.T)
    return similarity


def crowd(n: int, rounds: int, seed: int, *, noise: float = 1.0, d: int = 300) -> list[NDArray[np.float64]]:
    """Honest updates: a direction that all share, and noise of each site's own."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=d) + noise * rng.normal(size=(n, d)) for _ in range(rounds)]


# --- FoolsGold ---


def test_foolsgold_by_hand() -> None:
    """Two copies and one honest site.

    cs_01 = 1, cs_02 = cs_12 = 0.2: v = (1, 1, 0.2). Site 2 is pardoned: its 0.2 become 0.2 * 0.2 / 1 = 0.04. alpha =
    (0, 0, 0.96), divided by 0.96: (0, 0, 1), cut to 0.99; ln(99) + 0.5 > 1. The copies get 0, the honest one 1.
    """
    cs = [[1, 1, 0.2], [1, 1, 0.2], [0.2, 0.2, 1]]
    np.testing.assert_allclose(foolsgold(cs), [0, 0, 1])


def test_foolsgold_pardons_and_scales_by_hand() -> None:
    """cs_01 = 0.6, cs_02 = 0.3, cs_12 = 0: v = (0.6, 0.6, 0.3).

    Site 2: 0.3 * 0.3 / 0.6 = 0.15, alpha 0.85. Sites 0 and 1: alpha 0.4. By the largest: (0.4706, 0.4706, 1). Logit
    with kappa = 0.5: 0.5 (ln(0.4706 / 0.5294) + 0.5) = 0.1911.
    """
    cs = [[1, 0.6, 0.3], [0.6, 1, 0.0], [0.3, 0.0, 1]]
    expected = 0.5 * (math.log((0.4 / 0.85) / (1 - 0.4 / 0.85)) + 0.5)
    np.testing.assert_allclose(foolsgold(cs, confidence=0.5), [expected, expected, 1.0], rtol=1e-9)
    assert expected == pytest.approx(0.1911, abs=1e-4)


def test_foolsgold_punishes_honest_sites_that_are_alike_and_that_is_why_it_is_no_rule_here() -> None:
    """Nine hospitals with like data and one with other data: the nine lose nearly everything."""
    (updates,) = crowd(10, 1, 0, noise=0.3)
    updates[9] = np.random.default_rng(1).normal(size=updates.shape[1])
    norms = np.linalg.norm(updates, axis=1)
    rates = foolsgold(updates @ updates.T / np.outer(norms, norms))
    assert rates[:9].max() < 0.05
    assert rates[9] == 1.0
    np.testing.assert_array_equal(foolsgold(np.ones((4, 4))), 0)


def test_foolsgold_trusts_those_who_are_like_nobody() -> None:
    np.testing.assert_array_equal(foolsgold(np.eye(5)), 1)
    np.testing.assert_array_equal(foolsgold(2 * np.eye(3) - 1.0), 1)


@settings(deadline=None)
@given(n=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
def test_foolsgold_is_a_rate_whatever_the_cosines(n: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rates = foolsgold(rows @ rows.T)
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert (rates <= 1).all()


@pytest.mark.parametrize("confidence", [0.0, -1.0, math.inf, math.nan])
def test_foolsgold_refuses_a_confidence_that_means_nothing(confidence: float) -> None:
    with pytest.raises(UsageError, match="confidence"):
        foolsgold(np.eye(3), confidence=confidence)


def test_foolsgold_needs_two() -> None:
    with pytest.raises(UsageError, match="two"):
        foolsgold([[1.0]])


# --- memory ---


def test_the_first_rounds_are_a_plain_mean_and_then_the_past_fades() -> None:
    policy = SybilPolicy(decay=0.5)
    similarity = Similarity()
    for cosine in (1.0, 0.0, 1.0):
        similarity = remembered(policy, similarity, ("b", "a"), [[1, cosine], [cosine, 1]])
    # (1 + 0) / 2 = 0.5, then 0.5 * 0.5 + 0.5 * 1.
    assert similarity.pairs == {("a", "b"): (0.75, 3)}


def test_a_site_that_was_away_keeps_what_was_seen() -> None:
    similarity = remembered(POLICY, Similarity(), ("a", "b", "c"), np.eye(3))
    similarity = remembered(POLICY, similarity, ("a", "b"), np.ones((2, 2)))
    assert similarity.pairs["a", "c"] == (0.0, 1)
    assert similarity.pairs["a", "b"] == (0.5, 2)


def test_a_zero_update_is_like_nobody() -> None:
    similarity = remembered(POLICY, Similarity(), ("a", "b"), [[0, 0], [0, 4]])
    assert similarity.pairs["a", "b"] == (0.0, 1)


def test_rows_and_names_must_fit() -> None:
    with pytest.raises(UsageError, match="3 rows is not that of 2"):
        remembered(POLICY, Similarity(), ("a", "b"), np.eye(3))


# --- detection ---


@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize("jitter", [0.0, 0.05])
def test_copies_stand_out(copies: int, jitter: float) -> None:
    rounds = crowd(10, 5, 1)
    rng = np.random.default_rng(2)
    for matrix in rounds:
        matrix[:copies] = matrix[0] + jitter * rng.normal(size=(copies, matrix.shape[1]))
    assert clusters(POLICY, history(rounds), names(10)) == (names(10)[:copies],)


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0, 3.0])
def test_sites_with_the_same_distribution_are_never_too_alike(noise: float) -> None:
    found = [clusters(POLICY, history(crowd(10, 6, seed, noise=noise)), names(10)) for seed in range(30)]
    assert found == [()] * 30


def digits_rounds(seed: int, copies: int = 0) -> list[NDArray[np.float64]]:
    """Updates of ten sites that train softmax regression on digits, dealt at random; the first ones may be copies."""
    data = load_digits()
    x, y = data.data / 16.0, np.eye(10)[data.target]
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(x)), 10)
    model = np.zeros((64, 10))
    rounds = []
    for _ in range(8):
        updates = []
        for part in parts:
            local = model.copy()
            for batch in np.array_split(rng.permutation(part), 6):
                scores = np.exp(x[batch] @ local)
                local -= 0.5 * x[batch].T @ (scores / scores.sum(axis=1, keepdims=True) - y[batch]) / len(batch)
            updates.append((local - model).ravel())
        updates[:copies] = [updates[0]] * copies
        rounds.append(np.stack(updates))
        model += np.mean(updates, axis=0).reshape(model.shape)
    return rounds


def test_digits_dealt_at_random_raise_no_alarm() -> None:
    found = [clusters(POLICY, history(digits_rounds(seed)), names(10)) for seed in range(20)]
    assert found == [()] * 20
    assert clusters(POLICY, history(digits_rounds(0, copies=3)), names(10)) == (names(10)[:3],)


def test_one_equal_update_is_not_enough() -> None:
    rounds = crowd(8, 6, 3)
    rounds[2][1] = rounds[2][0]
    assert clusters(POLICY, history(rounds), names(8)) == ()


def test_too_few_rounds_or_pairs_say_nothing() -> None:
    rounds = crowd(10, 2, 4)
    rounds[0][1], rounds[1][1] = rounds[0][0], rounds[1][0]
    assert clusters(POLICY, history(rounds), names(10)) == ()
    assert clusters(POLICY, history(crowd(2, 9, 5)), names(2)) == ()


def test_attackers_that_decorrelate_escape() -> None:
    """The limit of the method: one aim, and noise of each attacker's own as large as the honest sites' is."""
    rounds = crowd(10, 6, 6)
    rng = np.random.default_rng(7)
    for matrix in rounds:
        aim = -matrix.mean(axis=0)
        matrix[:3] = aim + rng.normal(size=(3, matrix.shape[1]))
    assert clusters(POLICY, history(rounds), names(10)) == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decay": 1.0}, "decay"),
        ({"decay": -0.1}, "decay"),
        ({"rounds": 0}, "rounds"),
        ({"deviations": 0.0}, "deviations"),
        ({"floor": 1.0}, "floor"),
    ],
)
def test_policies_that_cannot_work_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SybilPolicy(**change)
