from __future__ import annotations

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field, ring
from quorsum.crypto.field import P
from quorsum.crypto.mask import MASK_BATCH, centred_binomial, draw_key, mask_blocks, unmask
from quorsum.crypto.ring import N
from quorsum.crypto.xof import uniform_blocks
from quorsum.errors import UsageError

SEED = b"\x07" * 32


def opened(y, key_sum, seed=SEED):
    return np.concatenate(list(unmask(seed, y, key_sum))).reshape(-1)


def masked(integers, key, seed=SEED):
    return np.concatenate(list(mask_blocks(seed, key, integers, os.urandom)))


def test_a_key_that_is_not_short_opens_exactly_too():
    """A malicious site shares a key of any size; its sum with honest keys must open without an error."""
    integers = np.arange(-3000, 3000)
    honest, evil = draw_key(os.urandom), field.random_vector(os.urandom, N)
    y = masked(integers, honest)
    theirs = ring.multiply_many(evil, uniform_blocks(SEED, 0, len(y)))
    key_sum = field.add(evil, field.from_signed(honest))
    assert not ring.is_short(field.centred(key_sum))
    left = opened(field.add(y, theirs), key_sum)
    assert np.array_equal(left, opened(y, field.from_signed(honest)))
    assert np.abs(left[:6000] - integers).max() <= 82


def test_a_wrong_key_opens_noise_only():
    y = masked(np.zeros(N, dtype=np.int32), draw_key(os.urandom))
    noise = opened(y, field.from_signed(draw_key(os.urandom))).astype(np.float64)
    assert abs(noise.std() / (P / 12**0.5) - 1) < 0.05
    other_seed = opened(y, field.from_signed(draw_key(os.urandom)), b"\x08" * 32).astype(np.float64)
    assert abs(other_seed.std() / (P / 12**0.5) - 1) < 0.05


def test_the_filled_up_end_carries_fresh_errors():
    key = draw_key(os.urandom)
    end = opened(masked(np.array([1]), key), field.from_signed(key))[1:]
    assert abs(end.std() / 41**0.5 - 1) < 0.1


def test_ciphertexts_look_uniform_and_differ_each_time():
    key, integers = draw_key(os.urandom), np.zeros(4 * N, dtype=np.int32)
    one, two = masked(integers, key), masked(integers, key)
    assert not np.array_equal(one, two)
    assert abs(one.astype(np.float64).mean() / P - 0.5) < 5 / (12 * one.size) ** 0.5


def test_the_formula():
    """y_j = a_j s + e_j + x_j, with the errors taken from the source after nothing else."""
    key, integers = draw_key(os.urandom), np.arange(2 * N)
    noise = os.urandom(1 << 20)
    e = centred_binomial(82, 2 * N, io.BytesIO(noise).read).reshape(2, N)
    a_s = ring.multiply_many(field.from_signed(key), uniform_blocks(SEED, 0, 2))
    expected = field.add(a_s, field.from_signed(integers.reshape(2, N) + e))
    assert np.array_equal(next(mask_blocks(SEED, key, integers, io.BytesIO(noise).read)), expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40 * N), st.integers(1, 4))
def test_sums_of_ciphertexts_open_to_sums(d, sites):
    rng = np.random.default_rng(d)
    updates = rng.integers(-(2**31), 2**31, (sites, d)).astype(np.int32)
    keys = [draw_key(os.urandom) for _ in range(sites)]
    ciphertexts = np.stack([masked(x, s) for x, s in zip(updates, keys, strict=True)])
    assert ciphertexts.shape == (sites, -(-d // N), N)
    y, key_sum = field.sum_mod(ciphertexts, 0), field.from_signed(np.sum(keys, axis=0, dtype=np.int64))
    assert np.abs(opened(y, key_sum)[:d] - updates.sum(axis=0, dtype=np.int64)).max() <= 82 * sites
    # Batches of any size give the same.
    cut = [y[start : start + 3] for start in range(0, len(y), 3)]
    assert np.array_equal(opened(iter(cut), key_sum), opened(y, key_sum))


def test_batches_are_bounded():
    sizes = [len(y) for y in mask_blocks(SEED, draw_key(os.urandom), np.zeros(20 * N + 1, dtype=np.int8), os.urandom)]
    assert sizes == [MASK_BATCH, 21 - MASK_BATCH]


@pytest.mark.parametrize("bad", [np.zeros(0, dtype=np.int32), np.zeros((2, 2), dtype=np.int32), np.zeros(3)])
def test_updates_of_wrong_shape_or_type_are_refused_before_the_first_block(bad):
    with pytest.raises(UsageError, match="non-empty vector of signed integers"):
        mask_blocks(SEED, draw_key(os.urandom), bad, os.urandom)


def test_keys_of_wrong_shape_are_refused():
    with pytest.raises(UsageError, match="4096 signed integers"):
        mask_blocks(SEED, np.zeros(5, dtype=np.int8), np.zeros(3, dtype=np.int32), os.urandom)
    with pytest.raises(UsageError, match="a key is 4096"):
        unmask(SEED, np.zeros((1, N), dtype=np.uint64), np.zeros(5, dtype=np.uint64))


def test_batches_of_wrong_shape_are_refused():
    with pytest.raises(UsageError, match="a batch has shape"):
        next(unmask(SEED, [np.zeros(N, dtype=np.uint64)], np.zeros(N, dtype=np.uint64)))


@pytest.mark.parametrize("eta", [0, -1, 128])
def test_impossible_etas_are_refused(eta):
    with pytest.raises(UsageError, match="eta must be"):
        centred_binomial(eta, 3, os.urandom)


def test_broken_sources_are_refused():
    with pytest.raises(UsageError, match="random_bytes"):
        centred_binomial(41, 3, lambda _: b"")


@pytest.mark.parametrize("eta", [1, 2, 3, 41, 82, 127])
def test_binomial_reaches_its_ends_and_uses_every_bit(eta):
    asked = []

    def ones(count):
        asked.append(count)
        return b"\xff" * count

    assert set(centred_binomial(eta, 1000, ones).tolist()) == {eta}
    assert sum(asked) == 2 * eta * 1000 // 8
    assert set(centred_binomial(eta, 1000, bytes).tolist()) == {-eta}


@pytest.mark.parametrize(("eta", "count"), [(41, 1), (82, 7), (3, 9)])
def test_binomial_is_the_number_of_ones_less_eta(eta, count):
    drawn = []

    def source(length):
        drawn.append(os.urandom(length))
        return drawn[-1]

    values = centred_binomial(eta, count, source)
    # Part by part: 64-bit words, then the binary parts of the rest, each packed from the lowest bit up.
    widths = [64] * (2 * eta // 64) + [w for w in (32, 16, 8, 4, 2, 1) if (2 * eta) % 64 & w]
    totals = [-eta] * count
    for width, raw in zip(widths, drawn, strict=True):
        stream = int.from_bytes(raw, "little")
        for k in range(count):
            totals[k] += (stream >> (k * width) & ((1 << width) - 1)).bit_count()
    assert values.tolist() == totals


@pytest.mark.parametrize("eta", [41, 82])
def test_binomial_has_its_moments_and_no_correlation(eta):
    count = 1 << 18
    values = centred_binomial(eta, count, os.urandom).astype(np.float64)
    deviation = (eta / 2) ** 0.5
    assert abs(values.mean()) < 5 * deviation / count**0.5
    assert abs(values.var() / (eta / 2) - 1) < 5 * (2 / count) ** 0.5
    for lag in (1, 2, 4, 8):
        assert abs((values[:-lag] * values[lag:]).mean()) < 5 * eta / 2 / count**0.5


def test_a_key_has_the_right_shape():
    key = draw_key(os.urandom)
    assert (key.shape, key.dtype) == ((N,), np.int8)
    assert abs(key.std() / (41 / 2) ** 0.5 - 1) < 0.1
