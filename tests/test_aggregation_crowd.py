"""Crowd clipping: updates that are more alike than honest ones show share one voice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from quorsum.aggregation import parse_rule
from quorsum.aggregation.crowd import alikeness, apart, crowd_clipping
from quorsum.aggregation.errors import NonFiniteGramError
from quorsum.aggregation.gram import gram_matrix
from quorsum.aggregation.rules import centred_clipping
from quorsum.errors import BoundError, UsageError

Matrix = NDArray[np.float64]

updates = arrays(np.float64, (7, 5), elements=st.floats(-10, 10, width=32)).filter(
    lambda x: bool((np.linalg.norm(x, axis=1) > 1e-3).all())
)


def one_class_each(sites: int, seed: int = 0) -> Matrix:
    """Honest sites that share little: a short common part, and each a long one of its own."""
    own = np.random.default_rng(seed).standard_normal((sites, 400))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return own + np.full(400, 0.4 / 20)


def near_twins(sites: int, seed: int = 0) -> Matrix:
    return np.ones(400) + 0.2 * np.random.default_rng(seed).standard_normal((sites, 400))


def test_by_hand() -> None:
    # Cosines: rows 0 to 2 at right angles, rows 3 and 4 the same as each other and at 60 degrees to row 0.
    x = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.75**0.5], [1.0, 0, 0, 2 * 0.75**0.5]])
    # The second highest cosine of a row with another one is 1/2 for rows 3 and 4 (with row 0) and 0; 1/2; 0 elsewhere.
    beyond = alikeness(gram_matrix(x), 1)
    expected = np.eye(5)
    expected[3, 4] = expected[4, 3] = 1.0
    np.testing.assert_allclose(beyond, expected, atol=1e-8)
    # Norms 1, 1, 1, 1, 2: the median is 1, so row 4 is cut in half; it shares its voice with row 3.
    np.testing.assert_allclose(crowd_clipping(gram_matrix(x), 1), np.array([1, 1, 1, 0.5, 0.25]) / 5, atol=1e-8)
    assert apart(gram_matrix(x), 1).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("f", [1, 2, 3])
def test_malicious_copies_outweigh_the_honest_mean_under_clipping_and_not_here(f: int) -> None:
    honest = one_class_each(10)
    mean = honest.mean(axis=0)
    against = -mean / np.linalg.norm(mean) * np.linalg.norm(honest, axis=1).mean()
    x = np.vstack([honest, np.tile(against, (f, 1))])
    gram = gram_matrix(x)
    voice = -against @ mean / len(x)
    unopposed = np.mean(np.vstack([honest, np.zeros((f, 400))]), axis=0) @ mean
    # Each copy takes a voice where updates are only shortened; here all of them together take one.
    assert centred_clipping(gram, f) @ x @ mean == pytest.approx(unopposed - f * voice, rel=0.05)
    assert crowd_clipping(gram, f) @ x @ mean == pytest.approx(unopposed - voice, rel=0.1)


def test_attackers_that_spread_to_hide_lose_what_hides() -> None:
    honest = one_class_each(10)
    mean = honest.mean(axis=0)
    length = np.linalg.norm(honest, axis=1).mean()
    rng = np.random.default_rng(5)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
        hide = rng.standard_normal((3, 400))
        hide /= np.linalg.norm(hide, axis=1, keepdims=True)
        sent = length * (-np.sqrt(1 - share) * mean / np.linalg.norm(mean) + np.sqrt(share) * hide)
        x = np.vstack([honest, sent])
        assert crowd_clipping(gram_matrix(x), 3) @ x @ mean > 0.3 * mean @ mean


@pytest.mark.parametrize("f", [1, 2, 3])
def test_honest_sites_that_are_alike_keep_their_voices(f: int) -> None:
    x = np.vstack([near_twins(10), -near_twins(f, 1)])
    weights = crowd_clipping(gram_matrix(x), f)
    assert weights[:10].min() > 0.7 * weights[:10].max()
    assert weights @ x @ np.ones(400) > 0.45 * 400
    assert apart(gram_matrix(x), f)[:10].all()


def test_copies_of_an_honest_update_do_not_raise_what_counts_as_alike() -> None:
    honest = one_class_each(10)
    alone = alikeness(gram_matrix(honest), 3)[np.triu_indices(10, 1)].max()
    # Three copies of row 0: its fourth highest cosine is still that with an honest row.
    x = np.vstack([honest, honest[[0, 0, 0]]])
    beyond = alikeness(gram_matrix(x), 3)
    np.testing.assert_allclose(beyond[0, 10:], 1.0, rtol=1e-6)
    assert beyond[np.triu_indices(10, 1)].max() <= alone + 0.05
    np.testing.assert_allclose(crowd_clipping(gram_matrix(x), 3)[[0, 10, 11, 12]].sum() * 13, 1.0, rtol=0.05)


def test_nobody_malicious_is_centred_clipping() -> None:
    gram = gram_matrix(one_class_each(6))
    np.testing.assert_allclose(crowd_clipping(gram, 0), centred_clipping(gram, 0))
    assert apart(gram, 0).all()


def test_equal_rows_and_zero_rows() -> None:
    assert np.isfinite(crowd_clipping(np.ones((5, 5)), 2)).all()
    # All the same: nobody is more alike than the others.
    np.testing.assert_allclose(crowd_clipping(np.ones((5, 5)), 2), 0.2)
    np.testing.assert_allclose(crowd_clipping(np.zeros((5, 5)), 2), 0.2)
    assert apart(np.ones((3, 3)), 1).all()


def at_right_angles(count: int, against: Matrix) -> Matrix:
    """Rows of length 1 at right angles to each other, all equally far against a direction."""
    rng = np.random.default_rng(1)
    own = np.linalg.qr(np.column_stack([against, rng.standard_normal((len(against), count - 1))]))[0].T
    turn = np.linalg.qr(np.column_stack([np.ones(count), rng.standard_normal((count, count - 1))]))[0]
    rows = turn @ own
    return np.asarray(rows * np.sign(rows @ -against)[:, None])


@pytest.mark.parametrize("f", [1, 2, 3, 4])
@pytest.mark.parametrize("more", [0, 1])
def test_malicious_sites_that_keep_away_do_not_silence_honest_ones_that_are_alike(f: int, more: int) -> None:
    honest = near_twins(f + 1 + more)
    honest /= np.linalg.norm(honest, axis=1, keepdims=True)
    mean = honest.mean(axis=0) / np.linalg.norm(honest.mean(axis=0))
    x = np.vstack([honest, at_right_angles(f, mean)])
    gram = gram_matrix(x)
    # With n = 2f + 1, the (f + 1)-th neighbour of an honest row would be a malicious one, and c what that one likes.
    assert crowd_clipping(gram, f) @ x @ mean > 0.7 * (centred_clipping(gram, f) @ x @ mean)
    assert apart(gram, f)[: len(honest)].all()


def test_attackers_at_right_angles_add_up_to_the_root_of_their_number() -> None:
    honest = one_class_each(13)
    mean = honest.mean(axis=0) / np.linalg.norm(honest.mean(axis=0))
    x = np.vstack([honest, np.linalg.norm(honest, axis=1).mean() * at_right_angles(4, mean)])
    weights = crowd_clipping(gram_matrix(x), 4)
    np.testing.assert_allclose(weights[13:] * 17, 1.0, rtol=0.1)
    assert -17 * weights[13:] @ x[13:] @ mean == pytest.approx(4**0.5, rel=0.15)


def test_honest_sites_of_few_kinds_have_one_voice_for_each_kind() -> None:
    # Not wanted, and said in docs/rules.md: four alike among eight look like f = 3 attackers and the one they copy.
    kinds = np.repeat(np.eye(2, 10), 4, axis=0)
    x = np.vstack([kinds, np.eye(10)[4:7]])
    np.testing.assert_allclose(crowd_clipping(gram_matrix(x), 3) * 11, [0.25] * 8 + [1.0] * 3, atol=1e-8)
    assert apart(gram_matrix(x), 3).sum() == 5
    # One more of a kind, and it is plain that honest sites are alike.
    x = np.vstack([x, x[:1]])
    np.testing.assert_allclose(crowd_clipping(gram_matrix(x), 3) * 12, 1.0, atol=1e-8)


def test_a_row_between_two_honest_ones_can_take_their_place_in_the_selection() -> None:
    # Two sites hold the same class, and no others do. The malicious row is alike to both by just above one half.
    honest = np.vstack([np.eye(7)[0], np.eye(7)[0], np.eye(7)[1:5]])
    malicious = 0.52 * np.eye(7)[0] + (1 - 0.52**2) ** 0.5 * np.eye(7)[5]
    x = np.vstack([honest, malicious])
    assert apart(gram_matrix(x), 2).tolist() == [False, False, True, True, True, True, True]
    # With weights the two keep a voice between them.
    assert crowd_clipping(gram_matrix(x), 2)[:2].sum() * 7 == pytest.approx(2 / 2.52, rel=1e-6)


@given(updates, st.integers(0, 3))
@settings(deadline=None)
def test_weights_are_bounded_and_one_site_moves_little(x: Matrix, f: int) -> None:
    gram = gram_matrix(x)
    weights = crowd_clipping(gram, f)
    assert (weights > 0).all()
    assert weights.sum() <= 1 + 1e-9
    lengths = np.linalg.norm(x, axis=1)
    # Nobody is too alike to more than f others.
    assert (weights >= np.minimum(1, np.sort(lengths)[3] / lengths) / (7 * (f + 1)) * (1 - 1e-6)).all()
    assert (weights * lengths <= np.sort(lengths)[3] / 7 * (1 + 1e-6) + 1e-12).all()
    beyond = alikeness(gram, f)
    assert np.array_equal(beyond, beyond.T)
    assert beyond.min() >= 0
    assert beyond.max() <= 1
    kept = np.flatnonzero(apart(gram, f))
    assert kept.size * (f + 1) >= 7
    assert all(beyond[i, j] <= 0.5 + 1e-6 for i in kept for j in kept if i != j)


@given(updates, st.floats(0.1, 10), st.permutations(range(7)))
@settings(deadline=None)
def test_scale_and_order_do_not_matter(x: Matrix, scale: float, order: list[int]) -> None:
    weights = crowd_clipping(gram_matrix(x), 2)
    np.testing.assert_allclose(crowd_clipping(gram_matrix(scale * x), 2), weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(crowd_clipping(gram_matrix(x[order]), 2), weights[order], rtol=1e-5, atol=1e-7)


def test_what_is_refused() -> None:
    with pytest.raises(BoundError, match=r"crowd-clipping.*n = 5"):
        crowd_clipping(np.eye(4), 2)
    with pytest.raises(UsageError, match="radius"):
        crowd_clipping(np.eye(5), 1, radius=0)
    with pytest.raises(NonFiniteGramError):
        alikeness(np.full((5, 5), np.nan), 1)


def test_by_name_and_as_a_selection() -> None:
    x = np.vstack([one_class_each(8), np.tile(one_class_each(1, 9), (3, 1))])
    outcome = parse_rule("crowd-clipping", suite="sealed").apply(gram_matrix(x), 3)
    assert np.flatnonzero(outcome.keep).tolist() == [*range(8), 8]
    np.testing.assert_allclose(outcome.scores[8:], outcome.scores.max())
    assert parse_rule("crowd-clipping(radius=2)").name == "crowd-clipping(radius=2.0)"
