"""Properties of the rules: what must hold for any updates, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quorsum.aggregation import (
    NoConvergenceError,
    NonFiniteGramError,
    centred_clipping,
    fltrust,
    geometric_median,
    gram_matrix,
    krum,
    krum_scores,
    mda,
    mean,
    monna,
    multi_krum,
    spectral,
    spectral_filter,
    spectral_scores,
    squared_distances,
)
from quorsum.errors import BoundError, UsageError

Matrix = NDArray[np.float64]
SimpleRule = Callable[[Matrix, int], Matrix]

# Rules that need nothing but G and f, with the smallest n as a function of f.
SIMPLE: dict[str, tuple[SimpleRule, Callable[[int], int]]] = {
    "mean": (mean, lambda f: f + 1),
    "krum": (krum, lambda f: 2 * f + 3),
    "multi-krum": (multi_krum, lambda f: 2 * f + 3),
    "mda": (mda, lambda f: 2 * f + 1),
    "geometric-median": (geometric_median, lambda f: 2 * f + 1),
    "centred-clipping": (centred_clipping, lambda f: 2 * f + 1),
    "monna": (lambda gram, f: monna(gram, f, reference=0), lambda f: 2 * f + 1),
    "spectral": (spectral, lambda f: 2 * f + 1),
}
CONVEX = sorted(set(SIMPLE) - {"centred-clipping"})
TRANSLATION_INVARIANT = CONVEX
SELECTING = ["krum", "multi-krum", "mda", "monna", "spectral"]


@st.composite
def rounds(draw: st.DrawFn, least_f: int = 0) -> tuple[Matrix, int]:
    """Generic updates (n, d) and an f that every rule accepts."""
    f = draw(st.integers(least_f, 3))
    # With n - f - 2 = 1 neighbour, two rows that are nearest to each other have the same Krum score: a tie by nature.
    n = draw(st.integers(max(2 * f + 3, f + 4), 11))
    d = draw(st.integers(2, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.normal(size=(n, d)) + rng.normal(size=d), f


def with_far_rows(updates: Matrix, f: int, seed: int) -> tuple[Matrix, NDArray[np.bool_]]:
    """The updates with f rows moved far away, each its own way; row 0 stays."""
    rng = np.random.default_rng(seed)
    far = np.zeros(len(updates), dtype=np.bool_)
    far[rng.choice(np.arange(1, len(updates)), f, replace=False)] = True
    moved = updates.copy()
    ways = rng.normal(size=(f, updates.shape[1]))
    lengths = 10.0 ** rng.uniform(4, 7, size=(f, 1))
    moved[far] += ways / np.linalg.norm(ways, axis=1, keepdims=True) * lengths
    return moved, far


@pytest.mark.parametrize("name", SIMPLE)
@settings(deadline=None)
@given(case=rounds(), seed=st.integers(0, 2**32 - 1))
def test_permutation_equivariance(name: str, case: tuple[Matrix, int], seed: int) -> None:
    updates, f = case
    rule, _ = SIMPLE[name]
    order = np.random.default_rng(seed).permutation(len(updates))
    if name == "monna":
        # Its trusted row is row 0 and must stay there.
        order = np.concatenate([[0], order[order != 0]])
    weights = rule(gram_matrix(updates), f)
    np.testing.assert_allclose(rule(gram_matrix(updates[order]), f), weights[order], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CONVEX)
@settings(deadline=None)
@given(case=rounds())
def test_convex_weights(name: str, case: tuple[Matrix, int]) -> None:
    updates, f = case
    weights = SIMPLE[name][0](gram_matrix(updates), f)
    assert weights.dtype == np.float64
    assert weights.shape == (len(updates),)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", SIMPLE)
@settings(deadline=None)
@given(case=rounds(), seed=st.integers(0, 2**32 - 1))
def test_rotation_invariance(name: str, case: tuple[Matrix, int], seed: int) -> None:
    updates, f = case
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(updates.shape[1],) * 2))
    rule, _ = SIMPLE[name]
    np.testing.assert_allclose(
        rule(gram_matrix(updates @ rotation), f), rule(gram_matrix(updates), f), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", TRANSLATION_INVARIANT)
@settings(deadline=None)
@given(case=rounds(), shift=st.floats(-100, 100))
def test_translation_invariance(name: str, case: tuple[Matrix, int], shift: float) -> None:
    updates, f = case
    rule, _ = SIMPLE[name]
    np.testing.assert_allclose(
        rule(gram_matrix(updates + shift), f), rule(gram_matrix(updates), f), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", SIMPLE)
@settings(deadline=None)
@given(case=rounds(), exponent=st.integers(-30, 30))
def test_units_do_not_matter(name: str, case: tuple[Matrix, int], exponent: int) -> None:
    updates, f = case
    rule, _ = SIMPLE[name]
    # A power of two scales without rounding.
    scaled = rule(gram_matrix(updates * 2.0**exponent), f)
    np.testing.assert_allclose(scaled, rule(gram_matrix(updates), f), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SELECTING)
@settings(deadline=None)
@given(case=rounds(least_f=1), seed=st.integers(0, 2**32 - 1))
def test_far_rows_get_weight_zero(name: str, case: tuple[Matrix, int], seed: int) -> None:
    updates, far = with_far_rows(*case, seed)
    weights = SIMPLE[name][0](gram_matrix(updates), case[1])
    assert (weights[far] == 0).all()


@pytest.mark.parametrize("name", ["geometric-median", "centred-clipping"])
@settings(deadline=None)
@given(case=rounds(least_f=1), seed=st.integers(0, 2**32 - 1))
def test_far_rows_move_a_weighting_rule_only_so_far(name: str, case: tuple[Matrix, int], seed: int) -> None:
    honest, f = case
    updates, far = with_far_rows(honest, f, seed)
    aggregate = SIMPLE[name][0](gram_matrix(updates), f) @ updates
    n = len(updates)
    # Lemma 2.1 of Minsker 2015 for the geometric median; at most the largest honest norm for clipping from zero.
    radius = np.linalg.norm(honest[~far] - honest[~far].mean(axis=0), axis=1).max()
    reach = 2 * (n - f) / (n - 2 * f) * radius if name == "geometric-median" else 0.0
    assert np.linalg.norm(aggregate) <= np.linalg.norm(honest[~far], axis=1).max() + reach + 1e-6


@pytest.mark.parametrize("name", SIMPLE)
@settings(deadline=None)
@given(case=rounds())
def test_input_is_left_alone(name: str, case: tuple[Matrix, int]) -> None:
    gram = gram_matrix(case[0])
    before = gram.copy()
    gram.setflags(write=False)
    SIMPLE[name][0](gram, case[1])
    np.testing.assert_array_equal(gram, before)


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("f", [0, 1, 2, 5])
def test_bound_is_where_it_says(name: str, f: int) -> None:
    rule, minimum = SIMPLE[name]
    least = minimum(f)
    updates = np.random.default_rng(f).normal(size=(least, 4))
    rule(gram_matrix(updates), f)
    if least > 1:
        message = rf"{name} needs .*f = {f} .*at least n = {least} sites, got n = {least - 1}; add 1"
        with pytest.raises(BoundError, match=message):
            rule(gram_matrix(updates[:-1]), f)


@pytest.mark.parametrize("name", SIMPLE)
def test_non_finite_rows_are_named(name: str) -> None:
    gram = gram_matrix(np.random.default_rng(0).normal(size=(9, 3)))
    gram[4, :] = gram[:, 4] = np.nan
    gram[7, 7] = np.inf
    with pytest.raises(NonFiniteGramError, match="rows 4, 7 ") as caught:
        SIMPLE[name][0](gram, 1)
    assert caught.value.rows == (4, 7)


@pytest.mark.parametrize("f", [-1, 1.0, True, "1", None])
@pytest.mark.parametrize("name", SIMPLE)
def test_f_must_be_a_count(name: str, f: object) -> None:
    gram = np.eye(9)
    with pytest.raises(UsageError, match="f must be a whole number from 0"):
        SIMPLE[name][0](gram, f)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mean", "multi-krum", "mda", "monna", "spectral"])
@settings(deadline=None)
@given(case=rounds())
def test_without_malicious_sites_it_is_the_mean(name: str, case: tuple[Matrix, int]) -> None:
    n = len(case[0])
    np.testing.assert_allclose(SIMPLE[name][0](gram_matrix(case[0]), 0), np.full(n, 1 / n), rtol=1e-12)


@pytest.mark.parametrize("name", SIMPLE)
def test_equal_updates_are_not_an_error(name: str) -> None:
    updates = np.tile([0.1, 0.2, 0.3], (9, 1))
    aggregate = SIMPLE[name][0](gram_matrix(updates), 2) @ updates
    np.testing.assert_allclose(aggregate, updates[0], rtol=1e-12)


@pytest.mark.parametrize("name", SIMPLE)
def test_zero_updates_are_not_an_error(name: str) -> None:
    assert np.isfinite(SIMPLE[name][0](np.zeros((9, 9)), 2)).all()


class TestKrum:
    @settings(deadline=None)
    @given(case=rounds())
    def test_scores_are_blanchards(self, case: tuple[Matrix, int]) -> None:
        updates, f = case
        n = len(updates)
        expected = [
            sum(sorted(float(np.sum((updates[i] - updates[j]) ** 2)) for j in range(n) if j != i)[: n - f - 2])
            for i in range(n)
        ]
        np.testing.assert_allclose(krum_scores(gram_matrix(updates), f), expected, rtol=1e-9)

    def test_copies_count_as_neighbours(self) -> None:
        updates = np.array([[0.0], [0.0], [0.0], [5.0], [6.0]])
        np.testing.assert_array_equal(krum_scores(gram_matrix(updates), 1)[:3], 0)

    def test_small_differences_of_long_updates(self) -> None:
        # Norm 1e4, differences 1e-2: a float32 Gram matrix has no digit of them, a float64 one has six.
        rng = np.random.default_rng(5)
        common = rng.normal(size=5000)
        common *= 1e4 / np.linalg.norm(common)
        noise = rng.normal(size=(10, 5000))
        noise *= 1e-2 / np.linalg.norm(noise, axis=1, keepdims=True)
        noise[[2, 6]] *= 3
        weights = multi_krum(gram_matrix(common + noise), 2)
        assert (np.flatnonzero(weights == 0) == [2, 6]).all()

    def test_m_is_in_range(self) -> None:
        assert multi_krum(np.eye(5), 1, m=2).tolist() == [0.5, 0.5, 0, 0, 0]
        with pytest.raises(UsageError, match=re.escape("at most n - f = 4 rows, got m = 5")):
            multi_krum(np.eye(5), 1, m=5)
        with pytest.raises(UsageError, match="m must be a whole number from 1, got 0"):
            multi_krum(np.eye(5), 1, m=0)


class TestMda:
    @settings(deadline=None)
    @given(case=rounds())
    def test_agrees_with_trying_every_set(self, case: tuple[Matrix, int]) -> None:
        updates, f = case
        gram = gram_matrix(updates)
        distances = squared_distances(gram)
        # Sets that are equally tight but for rounding do not occur among generic updates of this size.
        blocks = [(distances[np.ix_(s, s)], s) for s in combinations(range(len(updates)), len(updates) - f)]
        _, _, best = min((float(block.max()), float(block.sum()), s) for block, s in blocks)
        assert tuple(np.flatnonzero(mda(gram, f))) == best

    def test_refuses_a_search_without_end(self) -> None:
        with pytest.raises(UsageError, match="stops at f = 16, got f = 17: use multi-krum"):
            mda(np.eye(40), 17)


class TestGeometricMedian:
    @settings(deadline=None)
    @given(case=rounds())
    def test_is_a_minimum(self, case: tuple[Matrix, int]) -> None:
        updates, f = case

        def total(z: Matrix) -> float:
            return float(np.linalg.norm(updates - z, axis=1).sum())

        z = geometric_median(gram_matrix(updates), f, smoothing=1e-6) @ updates
        rng = np.random.default_rng(0)
        for step in rng.normal(size=(20, updates.shape[1])) * 0.1:
            assert total(z) <= total(z + step) + 1e-6

    @settings(deadline=None)
    @given(exponents=st.lists(st.floats(-4, 4), min_size=3, max_size=12), seed=st.integers(0, 2**32 - 1))
    def test_converges_whatever_the_scales(self, exponents: list[float], seed: int) -> None:
        n = len(exponents)
        updates = np.random.default_rng(seed).normal(size=(n, 3)) * 10.0 ** np.array(exponents)[:, None]
        weights = geometric_median(gram_matrix(updates), (n - 1) // 2)
        assert weights.sum() == pytest.approx(1)

    def test_says_when_it_does_not_converge(self) -> None:
        gram = gram_matrix(np.random.default_rng(0).normal(size=(7, 3)))
        with pytest.raises(NoConvergenceError, match=r"after 2 iterations.*raise smoothing or tolerance"):
            geometric_median(gram, 2, iterations=2)

    @pytest.mark.parametrize("option", ["smoothing", "tolerance"])
    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "x", True])
    def test_options_are_positive(self, option: str, value: object) -> None:
        with pytest.raises(UsageError, match=f"{option} must be a positive finite number"):
            geometric_median(np.eye(5), 1, **{option: value})  # type: ignore[arg-type]

    def test_iterations_is_a_count(self) -> None:
        with pytest.raises(UsageError, match="iterations must be a whole number from 1"):
            geometric_median(np.eye(5), 1, iterations=0)


class TestCentredClipping:
    @settings(deadline=None)
    @given(case=rounds(), radius=st.floats(0.01, 10), steps=st.integers(1, 4), extra=st.booleans())
    def test_is_what_it_says_on_the_updates(
        self, case: tuple[Matrix, int], radius: float, steps: int, extra: bool
    ) -> None:
        updates, f = case
        sites = updates[1:] if extra else updates
        f = min(f, (len(sites) - 1) // 2)
        v = updates[0] if extra else np.zeros(updates.shape[1])
        for _ in range(steps):
            lengths = np.linalg.norm(sites - v, axis=1)
            v = v + (np.minimum(1, radius / np.maximum(lengths, 1e-300))[:, None] * (sites - v)).mean(axis=0)
        weights = centred_clipping(gram_matrix(updates), f, radius=radius, steps=steps, reference=0 if extra else None)
        np.testing.assert_allclose(weights @ updates, v, rtol=1e-6, atol=1e-6)
        assert weights.sum() == pytest.approx(1) if extra else weights.sum() <= 1 + 1e-12

    def test_default_radius_is_the_lower_median(self) -> None:
        gram = np.diag([1.0, 4.0, 9.0, 16.0])
        np.testing.assert_array_equal(centred_clipping(gram, 1), centred_clipping(gram, 1, radius=2.0))

    def test_options_are_checked(self) -> None:
        with pytest.raises(UsageError, match="radius must be a positive finite number, got 0"):
            centred_clipping(np.eye(3), 1, radius=0)
        with pytest.raises(UsageError, match="steps must be a whole number from 1, got 0"):
            centred_clipping(np.eye(3), 1, steps=0)
        with pytest.raises(UsageError, match=re.escape("reference must be a row in 0..2, got 3")):
            centred_clipping(np.eye(3), 0, reference=3)

    def test_the_reference_is_no_site(self) -> None:
        with pytest.raises(BoundError, match="n = 3 sites, got n = 2"):
            centred_clipping(np.eye(3), 1, reference=2)


class TestMonna:
    def test_the_trusted_row_counts_even_among_copies(self) -> None:
        assert monna(gram_matrix(np.zeros((5, 1))), 2, reference=4).tolist() == [1 / 3, 1 / 3, 0, 0, 1 / 3]

    def test_reference_is_a_row(self) -> None:
        with pytest.raises(UsageError, match=re.escape("reference must be a row in 0..4, got 5")):
            monna(np.eye(5), 1, reference=5)


class TestFltrust:
    @settings(deadline=None)
    @given(case=rounds())
    def test_is_what_it_says_on_the_updates(self, case: tuple[Matrix, int]) -> None:
        updates = case[0].copy()
        # So that at least one site is trusted.
        updates[1] = updates[0] + 0.1
        lengths = np.linalg.norm(updates, axis=1)
        trust = np.maximum(updates @ updates[0] / lengths / lengths[0], 0)[1:]
        if trust.sum() < 1e-6:
            return
        rescaled = updates[1:] * (lengths[0] / lengths[1:])[:, None]
        weights = fltrust(gram_matrix(updates), 1, reference=0)
        assert weights[0] == 0
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights @ updates, trust @ rescaled / trust.sum(), rtol=1e-6, atol=1e-6)

    def test_a_zero_update_is_not_trusted(self) -> None:
        assert fltrust(gram_matrix(np.array([[1.0], [0.0], [2.0]])), 1, reference=0).tolist() == [0, 0, 0.5]

    def test_reference_is_a_row(self) -> None:
        for wrong in (3, -1, None):
            with pytest.raises(UsageError, match="reference must be a"):
                fltrust(np.eye(3), 1, reference=wrong)  # type: ignore[arg-type]

    def test_non_finite_and_bound(self) -> None:
        with pytest.raises(BoundError, match="fltrust needs n >= f"):
            fltrust(np.eye(3), 2, reference=0)
        with pytest.raises(NonFiniteGramError):
            fltrust(np.full((3, 3), np.nan), 1, reference=0)


class TestSpectral:
    @settings(deadline=None)
    @given(case=rounds())
    def test_scores_are_squared_projections(self, case: tuple[Matrix, int]) -> None:
        centred = case[0] - case[0].mean(axis=0)
        _, _, directions = np.linalg.svd(centred)
        np.testing.assert_allclose(
            spectral_scores(gram_matrix(case[0])), (centred @ directions[0]) ** 2, rtol=1e-6, atol=1e-7
        )

    def test_directions_that_vary_alike_are_added(self) -> None:
        # The corners of a regular triangle vary alike in every direction; a single eigenvector would be arbitrary.
        np.testing.assert_allclose(spectral_scores(np.eye(3)), np.full(3, 2 / 3))

    def test_finds_the_nearer_of_two_in_different_directions(self) -> None:
        updates = np.random.default_rng(0).normal(size=(10, 50))
        updates[3, 0] += 1e6
        updates[5, 1] += 100
        scores, keep = spectral_filter(gram_matrix(updates), 2)
        assert np.flatnonzero(~keep).tolist() == [3, 5]
        assert (scores[~keep].min() > scores[keep]).all()
        # In one pass, along the direction of row 3, row 5 is one of the crowd.
        assert np.argsort(spectral_scores(gram_matrix(updates)))[-2] != 5
