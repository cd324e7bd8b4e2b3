from __future__ import annotations

import os

import flint
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field, ring
from quorsum.crypto.field import P
from quorsum.crypto.mask import draw_key
from quorsum.crypto.ring import N
from quorsum.crypto.xof import uniform_blocks
from quorsum.errors import UsageError


def exact(a, b):
    """The product by big integers: pack the coefficients into one integer each, multiply, unpack, X^N = -1."""
    width = 20  # bytes: N p^2 < 2^134

    def pack(x):
        return int.from_bytes(b"".join(int(v).to_bytes(width, "little") for v in x), "little")

    product = (pack(a) * pack(b)).to_bytes(2 * N * width, "little")
    c = [int.from_bytes(product[k : k + width], "little") for k in range(0, len(product), width)]
    return [(c[k] - c[k + N]) % P for k in range(N)]


def exact_flint(a, b):
    c = [int(v) for v in (flint.nmod_poly(a.tolist(), P) * flint.nmod_poly(b.tolist(), P)).coeffs()]
    c += [0] * (2 * N - len(c))
    return [(c[k] - c[k + N]) % P for k in range(N)]


def constant(value):
    return np.full(N, value % P, dtype=np.uint64)


def alternating(value):
    return field.from_signed(np.where(np.arange(N) % 2, value, -value))


def scattered(value):
    return field.from_signed(np.random.default_rng(5).choice([value, -value], N))


# Where limbs are all as large as they can be, where they change sign, and where the centred value does.
HALF = P // 2
FULL_LIMBS_20 = 2**60 - 2**39 - 2**19  # limbs -2^19, -2^19 and 2^20
FULL_LIMBS_15 = 2**60 - 2**44 - 2**29 - 2**14  # limbs -2^14, -2^14, -2^14 and 2^15
WORST = [
    constant(HALF),
    constant(-HALF),
    constant(-1),
    constant(FULL_LIMBS_20),
    constant(-FULL_LIMBS_20),
    alternating(HALF),
    alternating(FULL_LIMBS_20),
    constant(FULL_LIMBS_15),
    alternating(FULL_LIMBS_15),
    scattered(FULL_LIMBS_20),
    scattered(FULL_LIMBS_15),
]
KEYS = [3, -3, 41, -41, 82, -82, 1900, -1900]

# Where both limbs of two are as large as they can be: 0 gives -2^30 and -2^29, and p - 1 gives 2^30 - 2 and 2^29 - 1.
EXTREME = [
    constant(0),
    constant(-1),
    np.where(np.arange(N) % 2, 0, P - 1).astype(np.uint64),
    np.random.default_rng(8).choice(np.array([0, P - 1], dtype=np.uint64), N),
    np.random.default_rng(9).choice(np.array([0, 2**31 - 1], dtype=np.uint64), N),
]


def two_limbs(a, s):
    """Which way multiply_short goes for one block."""
    return ring._two_limbs_do(ring._split_in_two(a[None, :]), ring.short_factor(s).norm)


@pytest.mark.parametrize("bound", KEYS)
@pytest.mark.parametrize("shape", ["constant", "alternating", "ramp", "scattered"])
def test_short_products_at_the_worst_case(bound, shape):
    k = np.arange(N)
    s = {
        "constant": np.full(N, bound),
        "alternating": np.where(k % 2, bound, -bound),
        # X^N = -1 flips signs half way, so this makes one coefficient as large as any can be.
        "ramp": np.where(k < N // 2, bound, -bound),
        "scattered": np.random.default_rng(6).choice([bound, -bound], N),
    }[shape]
    a = np.stack([*WORST, *EXTREME, field.random_vector(os.urandom, N)])
    assert {two_limbs(block, s) for block in EXTREME} == {abs(bound) == 3}
    products = ring.multiply_short(a, s)
    assert [row.tolist() for row in products] == [exact_flint(row, field.from_signed(s)) for row in a]


def key_of_norm_squared(least):
    """Threes and fours in any order and with any signs, with a squared norm of ``least`` or up to six more."""
    rng = np.random.default_rng(10)
    fours = -(-(least - 9 * N) // 7)
    assert 0 <= fours <= N
    return rng.permutation(np.where(np.arange(N) < fours, 4, 3)) * rng.choice([1, -1], N)


@pytest.mark.parametrize("a", EXTREME)
def test_both_sides_of_the_bound_between_two_limbs_and_three(a):
    """One key just below the bound and one just above it, for blocks with the longest limbs there are."""
    longest = np.linalg.norm(ring._split_in_two(a[None, :]), axis=-1).max()
    edge = (ring._SAFE_MEASURED / ring._ERROR / longest) ** 2
    below, above = key_of_norm_squared(int(edge) - 14), key_of_norm_squared(int(edge) + 1)
    assert two_limbs(a, below)
    assert not two_limbs(a, above)
    for s in (below, above):
        assert ring.multiply_short(a, s).tolist() == exact_flint(a, field.from_signed(s))


def test_a_batch_with_one_long_block_is_exact_too():
    key = draw_key(os.urandom)
    a = np.concatenate((uniform_blocks(b"s", 0, 9), np.stack(EXTREME), uniform_blocks(b"s", 9, 9)))
    expected = [exact_flint(row, field.from_signed(key)) for row in a]
    assert [row.tolist() for row in ring.multiply_short(a, key)] == expected
    assert [ring.multiply_short(row, key).tolist() for row in a] == expected


def test_two_limbs_do_for_fresh_keys_and_not_for_sums_of_keys():
    limbs = ring._split_in_two(uniform_blocks(b"s", 0, 64))
    keys = np.stack([draw_key(os.urandom) for _ in range(200)])
    assert all(ring._two_limbs_do(limbs, ring.short_factor(key).norm) for key in keys)
    assert not ring._two_limbs_do(limbs, ring.short_factor(keys[:10].sum(axis=0, dtype=np.int64)).norm)


@pytest.mark.parametrize("i", range(len(WORST)))
def test_full_products_at_the_worst_case(i):
    others = np.stack(WORST)
    products = ring.multiply_many(WORST[i], others)
    assert [row.tolist() for row in products] == [exact_flint(WORST[i], row) for row in others]


def test_both_products_against_big_integers():
    a, b = field.random_vector(os.urandom, N), field.random_vector(os.urandom, N)
    assert ring.multiply(a, b).tolist() == exact(a, b) == exact_flint(a, b)
    s = np.full(N, 82)
    assert ring.multiply_short(constant(HALF), s).tolist() == exact(constant(HALF), field.from_signed(s))


def before_rounding(spectra):
    folded = scipy.fft.fft(spectra, axis=-1, norm="forward") * ring._UNTWIST
    return np.concatenate((folded.real, folded.imag))


def test_the_error_stays_far_below_the_bound():
    """Look at the numbers before they are rounded, at the largest short factor that is let through."""
    key = np.random.default_rng(7).choice([1900, -1900], N)
    short = ring._transform(ring._split(np.stack(WORST), 20, 3)) * ring.short_factor(key).spectrum
    limbs = ring._transform(ring._split(np.stack(WORST), 15, 4))
    # The sum with the largest error: 2 a_0 a_3 + 2 a_1 a_2, for every pair of the worst blocks.
    full = sum(limbs[i][:, None] * limbs[3 - i][None, :] for i in range(4))
    for spectra in (short, full):
        numbers = before_rounding(spectra)
        assert 0 < np.abs(numbers - np.rint(numbers)).max() < ring._SAFE / 4
    two = ring._split_in_two(np.stack(EXTREME))
    edge = ring._SAFE_MEASURED / ring._ERROR / np.linalg.norm(two, axis=-1).max()
    longest = ring.short_factor(key_of_norm_squared(int(edge**2) - 14))
    numbers = before_rounding(ring._transform(two) * longest.spectrum)
    assert 0 < np.abs(numbers - np.rint(numbers)).max() < ring._SAFE_MEASURED / 4


def test_limbs_are_balanced_and_add_up():
    blocks = np.stack([*WORST, field.random_vector(os.urandom, N)])
    for width, count in [(20, 3), (15, 4)]:
        limbs = ring._split(blocks, width, count).astype(np.int64)
        assert np.array_equal(sum(limb << (width * k) for k, limb in enumerate(limbs)), field.centred(blocks))
        assert np.abs(limbs[:-1]).max() == 2 ** (width - 1)
        assert np.abs(limbs[-1]).max() == 2**width
    edges = np.stack([*blocks, *EXTREME])
    low, high = ring._split_in_two(edges).astype(np.int64)
    assert np.array_equal(low + (high << 31) + (2**60 + 2**30), edges.astype(np.int64))
    assert np.abs(low).max() == 2**30
    assert np.abs(high).max() == 2**29


def test_roots_of_unity_are_as_good_as_the_bound_supposes():
    # The transform of X^k is the k-th powers of all roots, each after all the products with roots on its way. The bound
    # supposes up to 11 of them, with errors of 4 eps in a root and sqrt(5) eps in a product: 68 eps in all.
    size = N // 2
    pi = np.longdouble("3.14159265358979323846264338327950288")
    worst = 0.0
    for k in (1, 2, 3, 7, 255, 1023, 1024, 2047):
        unit = np.zeros(size, dtype=np.complex128)
        unit[k] = 1
        angle = (k * np.arange(size)) % size
        phase = 2 * pi * angle / size
        got = scipy.fft.ifft(unit, norm="forward")
        worst = max(worst, float(np.hypot(got.real - np.cos(phase), got.imag - np.sin(phase)).max()))
    assert worst < 8 * 2.0**-53


@pytest.mark.parametrize("value", [1996, 10_000, 2**31])
def test_factors_that_are_too_large_to_be_exact_are_refused(value):
    s = np.full(N, value, dtype=np.int64)
    assert not ring.is_short(s)
    with pytest.raises(UsageError, match="use multiply_many"):
        ring.short_factor(s)
    with pytest.raises(UsageError, match="use multiply_many"):
        ring.multiply_short(constant(1), s)


def test_every_key_and_the_sum_of_many_are_short():
    assert ring.is_short(np.full(N, 41, dtype=np.int8))
    assert ring.is_short(np.full(N, -1900))
    drawn = np.random.default_rng(1).binomial(82 * 200, 0.5, N) - 41 * 200
    assert ring.is_short(drawn)


def test_the_smallest_integer_does_not_slip_through_as_its_own_absolute_value():
    assert not ring.is_short(np.full(N, -(2**63), dtype=np.int64))
    assert ring.is_short(np.full(N, -128, dtype=np.int8))


@pytest.mark.parametrize("s", [np.zeros(N - 1, dtype=np.int8), np.zeros(N), np.zeros(N, dtype=np.uint64)])
def test_short_factors_of_wrong_shape_or_type_are_refused(s):
    with pytest.raises(UsageError, match="4096 signed integers"):
        ring.short_factor(s)


def test_blocks_of_wrong_shape_are_refused():
    short, block = np.zeros(N - 1, dtype=np.uint64), np.zeros(N, dtype=np.uint64)
    for wrong in (
        lambda: ring.multiply(short, block),
        lambda: ring.multiply(block, short),
        lambda: ring.multiply_many(short, block),
        lambda: ring.multiply_many(block, short),
        lambda: ring.multiply_short(short, np.zeros(N, dtype=np.int8)),
        lambda: ring.rotate(short, 1, 0),
    ):
        with pytest.raises(UsageError, match="a block is 4096"):
            wrong()


@pytest.mark.parametrize(("sign", "rho"), [(0, 0), (2, 0), (1, -1), (1, N)])
def test_impossible_rotations_are_refused(sign, rho):
    with pytest.raises(UsageError, match="a rotation has"):
        ring.rotate(constant(1), sign, rho)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, -1]), st.integers(0, N - 1))
def test_a_rotation_is_a_product_with_a_power_of_x(sign, rho):
    block = field.random_vector(os.urandom, N)
    power = np.zeros(N, dtype=np.int8)
    power[rho] = sign
    assert np.array_equal(ring.rotate(block, sign, rho), ring.multiply_short(block, power))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 82]))
def test_the_ways_to_multiply_agree(seed, bound):
    rng = np.random.default_rng(seed)
    s = rng.integers(-bound, bound + 1, N)
    a = rng.integers(0, P, (3, N), dtype=np.uint64)
    wide = field.from_signed(s)
    assert np.array_equal(ring.multiply_short(a, s), ring.multiply_many(wide, a))
    assert np.array_equal(ring.multiply(a[0], a[1]), ring.multiply(a[1], a[0]))
    # a0 (a1 + a2) = a0 a1 + a0 a2
    left = ring.multiply(a[0], field.add(a[1], a[2]))
    assert np.array_equal(left, field.add(*ring.multiply_many(a[0], a[1:])))


@pytest.mark.parametrize("shape", [(N,), (0, N), (1, N), (9, N), (2, 3, N)])
def test_any_number_of_blocks(shape):
    a = field.random_vector(os.urandom, shape)
    s = np.random.default_rng(2).integers(-41, 42, N)
    factor = ring.short_factor(s)
    before = a.copy()
    products = ring.multiply_short(a, factor)
    assert products.shape == ring.multiply_many(field.from_signed(s), a).shape == shape
    flat = [ring.multiply_short(block, factor) for block in a.reshape(-1, N)]
    assert np.array_equal(products.reshape(-1, N), np.array(flat, dtype=np.uint64).reshape(-1, N))
    assert np.array_equal(a, before)


def test_a_transformed_key_is_not_printed():
    assert repr(ring.short_factor(np.full(N, 7))) == "ShortFactor(...)"


@pytest.mark.parametrize("d", [1, N - 1, N, N + 1, 5 * N, 5 * N + 3])
def test_batches_cover_the_vector_and_fill_up_with_zeros(d):
    vector = np.arange(1, d + 1)
    parts = list(ring.batches(vector, 2))
    whole = np.concatenate(parts).reshape(-1)
    assert all(part.shape[1] == N and 1 <= len(part) <= 2 for part in parts)
    assert np.array_equal(whole[:d], vector)
    assert whole.size == -(-d // N) * N
    assert not whole[d:].any()
