"""Exact products in the ring Z_p[X] / (X^N + 1), by floating-point transforms whose error is bounded in advance.

A ring element, or *block*, is a uint64 array of N coefficients in [0, p), lowest power first.

How a product is computed. A coefficient is written in signed limbs of w bits (balanced, so that they are small), and
limbs are multiplied as polynomials with real coefficients. X^N + 1 vanishes at the odd powers of zeta = exp(i pi / N),
and at zeta^(4k+1) a real polynomial takes the value

    x(zeta^(4k+1)) = sum over j < N/2 of (x_j + i x_(j+N/2)) zeta^j exp(2 pi i k j / (N/2)),

a transform of half the length; the other odd powers give the conjugates. Products of values are transformed back,
rounded to the nearest integers, and put together mod p.

Why it is exact. Percival (Math. Comp. 72, 2003, 387-395) bounds the error of a convolution of length 2^n by
transforms in floating point, in the largest coefficient, by

    |x|_2 |y|_2 ((1 + eps)^(3n) (1 + eps sqrt 5)^(3n+1) (1 + beta)^(3n) - 1),    eps = 2^-53,

where beta is the error of the roots of unity. Here n = 11 for the transforms of length N/2, and one more step for the
multiplication by zeta^j on the way in and out: n = 12. With beta = 4 eps, which leaves room for roots that were
themselves computed by a product, the factor is 263 eps. The rounding is right where the bound is below 1/2. The bound
holds for every input, not only for random ones, because some factors come from attackers; only the norms in it depend
on the input, and there are two ways to know them:

* *In the worst case.* Limbs of w bits have |x|_2 <= 2^w sqrt(N), whatever the input. This module asks for 1/4.
* *Measured.* Two limbs of 31 and 30 bits are a third cheaper than three of 20, and in the worst case too long. But the
  limb of a uniform element has |x|_2 near 2^30 sqrt(N / 3), and a fresh key has |y|_2 near 290: a bound of 0.336, which
  moves by a few hundredths. So :func:`multiply_short` measures both norms, takes two limbs where the bound is below
  0.45, and otherwise three. The norms are sums of N squares of integers, so they are measured with a relative error
  below N eps = 10^-12; together with the terms of second order that cannot lift 0.45 to 1/2.

By Cauchy-Schwarz, the coefficients of a product are at most |x|_2 |y|_2 < 1/2 / (263 eps) < 2^45, so that the integers
rounded to are far inside the range of 53 bits in which floating-point numbers hold integers exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from quorsum.crypto import field
from quorsum.crypto.field import FieldArray
from quorsum.errors import UsageError

__all__ = [
    "N",
    "ShortFactor",
    "batches",
    "is_short",
    "multiply",
    "multiply_many",
    "multiply_short",
    "rotate",
    "short_factor",
]

N = 4096
"""Degree of the ring."""

_HALF = N // 2
_LEVELS = N.bit_length() - 1
# 3n + sqrt(5) (3n + 1) + 4 (3n), in units of eps; see the module's docstring. Terms of second order are 10^-13 of it.
_ERROR = (3 * _LEVELS + math.sqrt(5) * (3 * _LEVELS + 1) + 4 * 3 * _LEVELS) * 2.0**-53
_SAFE = 0.25
_SAFE_MEASURED = 0.45

# Blocks transformed at a time: large enough to make the interpreter's cost small, small enough for the cache.
_STRIDE = 4

# Limbs of 20 bits beside a short factor and of 15 bits for two full ones: the centred coefficient is at most 2^60, so
# three limbs of 20 bits are at most 2^19, 2^19, 2^20, and four of 15 bits at most 2^14, 2^14, 2^14, 2^15.
_SHORT_WIDTH, _SHORT_LIMBS = 20, 3
_FULL_WIDTH, _FULL_LIMBS = 15, 4

# |a limb|_2 <= 2^20 sqrt(N), so a short factor s may have |s|_2 up to this (about 127 000). A fresh key has |s|_2 near
# 290 and never above 41 * 64; the sum of 200 fresh keys is near 4100.
_SHORT_NORM = _SAFE / (_ERROR * 2.0**_SHORT_WIDTH * math.sqrt(N))

# The largest sum of |x_i|_2 |y_j|_2 over i + j = const is 2 * 2^14 2^15 N + 2 * 2^14 2^14 N.
_FULL_ERROR = 6 * 2.0**28 * N * _ERROR
assert _FULL_ERROR < _SAFE  # noqa: S101 - a fact about constants

# Two limbs, where they do: a = low + 2^31 high + centre for a in [0, p), with low in [-2^30, 2^30) and high in
# [-2^29, 2^29). One constant for all coefficients takes the place of centring and of carries.
_LOW, _HIGH = 31, 30
_CENTRE = (1 << (_LOW - 1)) + (1 << (_LOW + _HIGH - 1))

# 2^52 + m, as a number and as bits: below 2^52, m is the last 52 bits, so integers become numbers by setting bits.
_UNSIGNED = 2.0**52
# 1.5 2^52 + x is rounded to the nearest integer, since the numbers in [2^52, 2^53) are integers, and its bits are those
# of 1.5 2^52, read as an integer, plus what x is rounded to. For |x| <= 2^51, so for every product here.
_ROUND = 1.5 * 2.0**52
_UNSIGNED_BITS, _ROUND_BITS = (int(bits) for bits in np.array([_UNSIGNED, _ROUND]).view(np.uint64))
assert _SAFE_MEASURED / _ERROR < 2.0**51  # noqa: S101 - a fact about constants

_TWIST = np.exp(1j * np.pi * np.arange(_HALF) / N)
_UNTWIST = _TWIST.conj()

_Spectrum: TypeAlias = NDArray[np.complex128]


@dataclass(frozen=True)
class ShortFactor:
    """A ring element with small signed coefficients, transformed once to be used many times.

    It is as secret as the element itself.

    Attributes:
        spectrum: complex128, shape (N / 2,), its values at zeta^(4k+1).
        norm: its Euclidean norm.
        constant: uint64, shape (N,), what is added to every product of two limbs: the product with the polynomial
            that has the centre of the limbs for every coefficient, less the bits that the rounding leaves. The
            coefficients are in the order 0, N / 2, 1, N / 2 + 1, ...
    """

    spectrum: NDArray[np.complex128]
    norm: float
    constant: FieldArray

    def __repr__(self) -> str:
        """Without the spectrum, which may be that of a secret key."""
        return "ShortFactor(...)"


def is_short(s: NDArray[np.signedinteger[Any]]) -> bool:
    """Whether products with ``s`` by :func:`multiply_short` are proven to be exact.

    True for every element with coefficients up to 1900 in absolute value, in particular for every mask key, and for
    sums of a few hundred honest keys.

    Args:
        s: signed integers, shape (N,).
    """
    return _norm(s) <= _SHORT_NORM


def short_factor(s: NDArray[np.signedinteger[Any]]) -> ShortFactor:
    """Transform an element with small signed coefficients.

    Args:
        s: signed integers, shape (N,).

    Raises:
        UsageError: wrong shape, or coefficients so large that the products might not be exact.
    """
    if s.shape != (N,) or not np.issubdtype(s.dtype, np.signedinteger):
        raise UsageError(f"a short factor is {N} signed integers, got {s.dtype} of shape {s.shape}")
    if not is_short(s):
        raise UsageError(
            f"the factor's Euclidean norm is above {_SHORT_NORM:.0f}, so its products might be rounded wrongly; "
            "use multiply_many"
        )
    # X^N = -1, so coefficient k of s (1 + X + ... + X^(N-1)) is the sum of s_0 to s_k less that of the rest.
    sums = np.cumsum(s, dtype=np.int64)
    centre = field.mul(field.from_signed(2 * sums - sums[-1]), np.full(N, _CENTRE, dtype=np.uint64))
    bits = (_ROUND_BITS + (_ROUND_BITS << _LOW)) % field.P
    constant = _interleaved(field.sub(centre, np.full(N, bits, dtype=np.uint64)))
    return ShortFactor(_transform(s.astype(np.float64)), _norm(s), constant)


def multiply_short(a: FieldArray, s: ShortFactor | NDArray[np.signedinteger[Any]]) -> FieldArray:
    """The products ``a s`` of many blocks with one short factor, exact.

    Cost: four transforms of length N / 2 per block where the measured norms allow two limbs, as they do for uniform
    blocks and a fresh key, else six; memory beyond the result is bounded.

    Args:
        a: shape (..., N).
        s: a short factor, transformed or as signed integers of shape (N,).

    Returns:
        uint64, the shape of ``a``.

    Raises:
        UsageError: wrong shape, or the factor is not short.
    """
    factor = s if isinstance(s, ShortFactor) else short_factor(s)
    blocks = _as_blocks(a)
    products = np.empty(blocks.shape, dtype=np.uint64)
    for start in range(0, len(blocks), _STRIDE):
        part, out = blocks[start : start + _STRIDE], products[start : start + _STRIDE]
        limbs = _split_in_two(part)
        if _two_limbs_do(limbs, factor.norm):
            spectra = _transform(limbs)
            spectra *= factor.spectrum
            _recombine_two(_folded_back(spectra), factor.constant, out)
        else:
            spectra = _transform(_split(part, _SHORT_WIDTH, _SHORT_LIMBS))
            spectra *= factor.spectrum
            out[:] = _recombine(_transform_back(spectra), _SHORT_WIDTH)
    return products.reshape(a.shape)


def multiply(a: FieldArray, b: FieldArray) -> FieldArray:
    """The product of two blocks with coefficients of any size, exact.

    Args:
        a: shape (N,).
        b: shape (N,).

    Returns:
        uint64, shape (N,).

    Raises:
        UsageError: wrong shape.
    """
    if b.shape != (N,):
        raise UsageError(f"a block is {N} field elements, got shape {b.shape}")
    return multiply_many(a, b)


def multiply_many(a: FieldArray, b: FieldArray) -> FieldArray:
    """The products ``a b_j`` of one block with many, coefficients of any size, exact.

    Cost: eleven transforms of length N / 2 per block of ``b``; memory beyond the result is bounded.

    Args:
        a: shape (N,).
        b: shape (..., N).

    Returns:
        uint64, the shape of ``b``.

    Raises:
        UsageError: wrong shape.
    """
    if a.shape != (N,):
        raise UsageError(f"a block is {N} field elements, got shape {a.shape}")
    blocks = _as_blocks(b)
    left = _transform(_split(a[None, :], _FULL_WIDTH, _FULL_LIMBS))
    products = np.empty(blocks.shape, dtype=np.uint64)
    for start in range(0, len(blocks), _STRIDE):
        right = _transform(_split(blocks[start : start + _STRIDE], _FULL_WIDTH, _FULL_LIMBS))
        # by_weight[w] = sum over i + j = w of a_i b_j
        by_weight = np.zeros((2 * _FULL_LIMBS - 1, *right.shape[1:]), dtype=np.complex128)
        for i in range(_FULL_LIMBS):
            by_weight[i : i + _FULL_LIMBS] += left[i] * right
        products[start : start + _STRIDE] = _recombine(_transform_back(by_weight), _FULL_WIDTH)
    return products.reshape(b.shape)


def rotate(block: FieldArray, sign: int, rho: int) -> FieldArray:
    """``sign X^rho block``, exact.

    Args:
        block: shape (..., N).
        sign: +1 or -1.
        rho: in [0, N).

    Raises:
        UsageError: wrong shape, sign or rho.
    """
    if sign not in (1, -1) or not 0 <= rho < N:
        raise UsageError(f"a rotation has sign +1 or -1 and rho in [0, {N}), got {sign} and {rho}")
    _as_blocks(block)
    # X^N = -1: what leaves at the top comes back at the bottom with the other sign
    kept, wrapped = block[..., : N - rho], block[..., N - rho :]
    if sign == 1:
        return np.concatenate((field.neg(wrapped), kept), axis=-1)
    return np.concatenate((wrapped, field.neg(kept)), axis=-1)


def batches(vector: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    """Cut a vector of d numbers into blocks, the last one filled up with zeros, some blocks at a time.

    Args:
        vector: shape (d,).
        size: blocks per batch.

    Yields:
        shape (b, N), b <= size, ceil(d / N) blocks in all; views where nothing had to be filled up.
    """
    for start in range(0, vector.size, size * N):
        part = vector[start : start + size * N]
        missing = -part.size % N
        yield (np.pad(part, (0, missing)) if missing else part).reshape(-1, N)


def _as_blocks(a: FieldArray) -> FieldArray:
    if a.ndim == 0 or a.shape[-1] != N:
        raise UsageError(f"a block is {N} field elements, got shape {a.shape}")
    return a.reshape(-1, N)


def _split(blocks: FieldArray, width: int, count: int) -> NDArray[np.float64]:
    """Balanced limbs, shape (count, b, N): ``centred(x) = sum_l limb_l 2^(width l)``."""
    rest = field.centred(blocks)
    limbs = np.empty((count, *blocks.shape))
    half, mask = 1 << (width - 1), (1 << width) - 1
    for index in range(count - 1):
        # in [-2^(width-1), 2^(width-1)); the rest is divisible by 2^width once it is taken off
        rest += half
        limbs[index] = (rest & mask) - half
        rest >>= width
    limbs[count - 1] = rest
    return limbs


def _split_in_two(blocks: FieldArray) -> NDArray[np.float64]:
    """Two limbs, shape (2, b, N): ``x = low + 2^31 high + centre``."""
    limbs = np.empty((2, *blocks.shape))
    bits = limbs.view(np.uint64)
    np.bitwise_and(blocks, np.uint64((1 << _LOW) - 1), out=bits[0])
    np.right_shift(blocks, np.uint64(_LOW), out=bits[1])
    bits |= np.uint64(_UNSIGNED_BITS)
    limbs[0] -= _UNSIGNED + 2.0 ** (_LOW - 1)
    limbs[1] -= _UNSIGNED + 2.0 ** (_HIGH - 1)
    return limbs


def _two_limbs_do(limbs: NDArray[np.float64], norm: float) -> bool:
    """Whether products of all these limbs, shape (..., N), with a factor of that Euclidean norm are proven exact."""
    longest = math.sqrt(np.vecdot(limbs, limbs).max())
    return longest * norm * _ERROR < _SAFE_MEASURED


def _recombine_two(folded: _Spectrum, constant: FieldArray, out: FieldArray) -> None:
    """``low + 2^31 high + constant`` mod p, from the two products before rounding; overwrites ``folded``.

    Args:
        folded: shape (2, b, N / 2), coefficient j in the real and j + N / 2 in the imaginary part.
        constant: as in :class:`ShortFactor`.
        out: shape (b, N), contiguous.
    """
    numbers = folded.view(np.float64)
    numbers += _ROUND
    low, high = numbers.view(np.uint64)
    low += constant
    # 2^31 h = 2^31 (h mod 2^30) + (h >> 30) (mod p), and the sum is below 2^61 + 2^33 + 2^63 + 2^61 < 2^64. The bits
    # that rounding leaves above the integers are the same in all coefficients; the constant makes up for them.
    total = high >> np.uint64(_HIGH)
    high <<= np.uint64(_LOW)
    high &= np.uint64(field.P)
    total += high
    total += low
    total = field.reduce(total)
    np.copyto(out.reshape(-1, 2, _HALF), total.reshape(-1, _HALF, 2).swapaxes(1, 2))


def _interleaved(block: FieldArray) -> FieldArray:
    """The coefficients 0, N / 2, 1, N / 2 + 1, ..., as they lie in folded complex numbers."""
    return block.reshape(2, _HALF).T.reshape(N)


def _norm(s: NDArray[np.signedinteger[Any]]) -> float:
    wide = s.astype(np.float64)
    return math.sqrt(wide @ wide)


def _recombine(limbs: Sequence[NDArray[np.int64]] | NDArray[np.int64], width: int) -> FieldArray:
    """``sum_l limb_l 2^(width l)`` mod p, by Horner's rule."""
    total = field.from_signed(limbs[len(limbs) - 1])
    for index in range(len(limbs) - 2, -1, -1):
        total = field.add(field.mul_power_of_two(total, width), field.from_signed(limbs[index]))
    return total


def _transform(x: NDArray[np.float64]) -> _Spectrum:
    """Values at zeta^(4k+1), shape (..., N / 2), of real polynomials of shape (..., N)."""
    folded = np.empty((*x.shape[:-1], _HALF), dtype=np.complex128)
    folded.real = x[..., :_HALF]
    folded.imag = x[..., _HALF:]
    folded *= _TWIST
    # The sum with exp(+2 pi i ...) is what the library calls the inverse transform; norm="forward" keeps it unscaled.
    return np.asarray(scipy.fft.ifft(folded, axis=-1, norm="forward", overwrite_x=True))


def _transform_back(spectra: _Spectrum) -> NDArray[np.int64]:
    """The polynomials, shape (..., N), rounded to integers. Overwrites its argument."""
    folded = _folded_back(spectra)
    integers = np.empty((*spectra.shape[:-1], N), dtype=np.int64)
    np.rint(folded.real, out=integers[..., :_HALF], casting="unsafe")
    np.rint(folded.imag, out=integers[..., _HALF:], casting="unsafe")
    return integers


def _folded_back(spectra: _Spectrum) -> _Spectrum:
    """The polynomials before rounding, coefficients j and j + N / 2 as one number. Overwrites its argument."""
    folded = np.asarray(scipy.fft.fft(spectra, axis=-1, norm="forward", overwrite_x=True))
    folded *= _UNTWIST
    return folded
