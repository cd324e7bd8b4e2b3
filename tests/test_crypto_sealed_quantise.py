from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import quantise as module
from quorsum.crypto.flatten import flatten
from quorsum.crypto.quantise import dequantise, quantise
from quorsum.errors import UsageError

DIGEST = b"\x05" * 32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_that_are_not_finite_are_refused_with_the_place(bad, dtype):
    update = np.zeros(200_000, dtype=dtype)
    update[150_000] = bad
    with pytest.raises(UsageError, match=r"at index 150000 is .*diverged"):
        quantise(update, 1.0, DIGEST, os.urandom)


@pytest.mark.parametrize(("value", "scale"), [(2.0**31, 1.0), (-(2.0**31), 1.0), (1e300, 1e300), (1.0, 2.0**31)])
def test_integers_that_would_wrap_are_refused(value, scale):
    with pytest.raises(UsageError, match="at index 1 is too large"):
        quantise(np.array([0.0, value]), scale, DIGEST, os.urandom)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(UsageError, match="scale must be finite"):
        quantise(np.zeros(3), scale, DIGEST, os.urandom)
    with pytest.raises(UsageError, match="scale must be finite"):
        dequantise(np.zeros(3, dtype=np.int64), scale, DIGEST)


@pytest.mark.parametrize("update", [np.zeros((2, 2)), np.zeros(3, dtype=np.int64), np.zeros(())])
def test_updates_of_wrong_shape_or_type_are_refused(update):
    with pytest.raises(UsageError, match="a vector of floating-point numbers"):
        quantise(update, 1.0, DIGEST, os.urandom)


def test_sums_of_wrong_shape_are_refused():
    with pytest.raises(UsageError, match="a vector"):
        dequantise(np.zeros((2, 2), dtype=np.int64), 1.0, DIGEST)


def test_the_largest_integers_keep_their_sign():
    largest = np.array([2.0**31 - 2, -(2.0**31) + 2] * 50)
    for seed in range(4):
        integers = quantise(largest, 1.0, bytes([seed]) * 32, os.urandom)
        assert np.array_equal(flatten(bytes([seed]) * 32, integers.astype(np.float64)), largest)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40), st.floats(1e-3, 1e4), st.binary(min_size=32, max_size=32)
)
def test_rounding_moves_by_less_than_one_step(values, scale, digest):
    update = np.array(values)
    before = update.copy()
    integers = quantise(update, scale, digest, os.urandom)
    assert integers.dtype == np.int32
    assert np.all(np.abs(flatten(digest, integers.astype(np.float64)) - update * scale) < 1)
    assert np.array_equal(update, before)
    back = dequantise(integers.astype(np.int64), scale, digest)
    assert np.all(np.abs(back - update) <= 1 / scale + 1e-9)


def test_integers_stay_what_they_are():
    update = np.arange(-500.0, 500.0)
    assert np.array_equal(dequantise(quantise(update, 2.0, DIGEST, os.urandom).astype(np.int64), 2.0, DIGEST), update)


@pytest.mark.parametrize("value", [0.3, -0.3, 0.001, 7.75])
def test_rounding_has_no_bias(value):
    count = 400_000
    integers = quantise(np.full(count, value), 1.0, DIGEST, os.urandom)
    mean = dequantise(integers.astype(np.int64), 1.0, DIGEST).mean()
    part = value % 1
    assert abs(mean - value) < 5 * (part * (1 - part) / count) ** 0.5


def test_the_probability_of_going_up_is_exact_to_the_last_bit():
    # Out of all 2^32 draws exactly those below 2^32 / 4 must go up; look at both sides of the edge.
    draws = np.array([0, 2**30 - 1, 2**30, 2**32 - 1], dtype="<u4").tobytes()
    assert module._round_at_random(np.full(4, 0.25), lambda _: draws).tolist() == [1, 1, 0, 0]
    assert module._round_at_random(np.full(4, -0.75), lambda _: draws).tolist() == [0, 0, -1, -1]


def test_chunks_take_fresh_randomness_each():
    asked = []

    def source(count):
        asked.append(count)
        return os.urandom(count)

    quantise(np.zeros((1 << 20) + 5, dtype=np.float32), 1.0, DIGEST, source)
    assert sum(asked) == 4 * ((1 << 20) + 5)
    assert max(asked) <= 4 << 16


def test_single_and_double_precision_agree():
    update = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    fixed = os.urandom(4000)
    one = quantise(update, 100.0, DIGEST, lambda _: fixed)
    assert np.array_equal(one, quantise(update.astype(np.float64), 100.0, DIGEST, lambda _: fixed))


def test_broken_sources_are_refused():
    with pytest.raises(UsageError, match="gave 1 bytes"):
        quantise(np.zeros(3), 1.0, DIGEST, lambda _: b"x")
