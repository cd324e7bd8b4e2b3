from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto.field import P
from quorsum.crypto.ring import N
from quorsum.crypto.sealed_parameters import (
    SEALED_V1,
    SealedBounds,
    default_tau,
    fixed_point_scale,
    norm_gate,
    small_model,
)
from quorsum.errors import BoundError, UsageError


@pytest.mark.parametrize(
    ("n", "tau", "f", "message"),
    [
        (2, 1, 0, r"2 tau \+ 2 f \+ 1 is needed, so invite at least 3"),
        (4, 1, 1, r"2 tau \+ 2 f \+ 1 is needed, so invite at least 5"),
        (8, 2, 2, r"2 tau \+ 2 f \+ 1 is needed, so invite at least 9"),
        (9, 1, 3, r"3 f \+ 1 is needed, so invite at least 10"),
        (0, 1, 0, "invite at least 3"),
        (5, 0, 1, "tau must be at least 1"),
        (5, 1, -1, "cannot be negative"),
    ],
)
def test_too_few_sites_are_refused_with_the_bound_and_the_smallest_number(n, tau, f, message):
    with pytest.raises(BoundError, match=message):
        SealedBounds.of(n, tau, f)


@pytest.mark.parametrize(
    ("n", "tau", "f", "smallest_set", "quorum"),
    [(3, 1, 0, 2, 3), (4, 1, 0, 4, 3), (5, 1, 1, 4, 4), (10, 2, 2, 5, 7), (7, 1, 2, 5, 5), (20, 4, 4, 7, 13)],
)
def test_known_bounds(n, tau, f, smallest_set, quorum):
    assert SealedBounds.of(n, tau, f) == SealedBounds(n, tau, f, smallest_set, quorum)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 40))
def test_what_the_bounds_are_for(n, tau, f):
    try:
        bounds = SealedBounds.of(n, tau, f)
    except BoundError:
        assert n < max(2 * tau + 2 * f + 1, 3 * f + 1)
        return
    honest = n - f
    # Two certificates share an honest site, even among those that collude; the honest can make one by themselves.
    assert 2 * bounds.quorum - n > max(tau, f)
    assert bounds.quorum <= honest
    # The honest sites alone are a set that may be opened, and it keeps two honest updates that tau sites do not know.
    assert bounds.smallest_set <= honest
    assert bounds.smallest_set - tau >= (1 if n == 3 else 3)
    # Points of degree 2 tau decode without f sites and with f lies.
    assert honest >= 2 * tau + f + 1


def test_default_tau():
    assert [default_tau(3, 0), default_tau(5, 1), default_tau(10, 2)] == [1, 1, 2]
    with pytest.raises(BoundError, match="invite at least 13"):
        default_tau(12, 3)


@pytest.mark.parametrize("sketches", [1, 4, 16])
@pytest.mark.parametrize("dimension", [1000, 131072, 10**6, 10**7, 10**8])
def test_the_margin_against_wrap_around_holds(dimension, sketches):
    scale, sigma_x = fixed_point_scale(2.5, dimension, sketches)
    assert 8 <= sigma_x <= 512
    assert 2**10 * sketches * N * dimension * sigma_x**2 * (1 - 1e-12) <= P
    assert (scale * 2.5) ** 2 == pytest.approx(sigma_x**2 * dimension)


@pytest.mark.parametrize(("dimension", "at_least"), [(10**6, 360), (10**7, 110), (10**8, 36)])
def test_the_precision_that_the_design_promises(dimension, at_least):
    assert fixed_point_scale(1.0, dimension, 4).sigma_x >= at_least


def test_models_that_leave_no_precision_are_refused():
    assert fixed_point_scale(1.0, 2**31 - 8, 4).sigma_x >= 8
    with pytest.raises(UsageError, match="at least 8 is needed; use fewer sketches"):
        fixed_point_scale(1.0, 2**31 + 8, 4)


@pytest.mark.parametrize(
    ("unit", "dimension", "sketches"),
    [(0.0, 10, 1), (-1.0, 10, 1), (float("nan"), 10, 1), (float("inf"), 10, 1), (1.0, 0, 1), (1.0, 10, 0)],
)
def test_impossible_arguments_are_refused(unit, dimension, sketches):
    with pytest.raises(UsageError, match="the scale needs"):
        fixed_point_scale(unit, dimension, sketches)


def test_units_outside_the_range_of_floats_are_refused():
    with pytest.raises(UsageError, match="rescale"):
        fixed_point_scale(1e-320, 10**6, 4)


def test_norm_gate_counts_the_errors_of_the_filled_up_end():
    assert norm_gate(2.0, 3.0, 4, 0) == int(1.10 * 4 * 36)
    assert norm_gate(0.0, 1.0, 1, 2) == int(1.10 * 41 * 2 * N)
    assert isinstance(norm_gate(1.0, 370000.0, 4, 245), int)


def test_small_models_and_the_sentence_about_them():
    assert small_model(32 * N - 1)
    assert not small_model(32 * N)
    assert "1000 parameters are fewer than 131072" in SEALED_V1.small_model_sentence(1000)
    assert "at most 1 of them" in SEALED_V1.small_model_sentence(1000)


def test_the_set_is_frozen_and_fits_the_arithmetic():
    assert (SEALED_V1.p, SEALED_V1.degree, SEALED_V1.eta_secret, SEALED_V1.eta_error) == (P, N, 41, 82)
    assert SEALED_V1.error_variance == 41
    assert [SEALED_V1.blocks(d) for d in (1, N, N + 1)] == [1, 1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SEALED_V1.p = 3
    # The deviations that the estimate was made for are half the variance and less of what is drawn.
    assert SEALED_V1.hinted_key_deviation**2 <= SEALED_V1.eta_secret / 4
    assert SEALED_V1.hinted_error_deviation**2 <= SEALED_V1.eta_error / 4
