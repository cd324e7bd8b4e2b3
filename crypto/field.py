"""Exact arithmetic in the field of p = 2^61 - 1 elements, on whole arrays.

A vector of field elements is a uint64 array with values in [0, p). Every function takes and returns such arrays and
leaves its arguments as they are. Values are not checked here, except where they come in as bytes or leave as bytes:
everything that arrives goes through :func:`from_bytes`, and every function keeps the range.

p is a Mersenne prime, so 2^61 = 1 in the field: the bits above the 61st are added back at the bottom, and multiplying
by a power of two rotates 61 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.randomness import draw
from quorsum.errors import Refusal, UsageError

__all__ = [
    "FieldArray",
    "P",
    "add",
    "add_signed",
    "centred",
    "dot",
    "from_bytes",
    "from_signed",
    "matmul",
    "mul",
    "mul_power_of_two",
    "neg",
    "random_vector",
    "reduce",
    "sub",
    "sum_mod",
    "to_bytes",
]

P = (1 << 61) - 1
"""The modulus, a Mersenne prime."""

FieldArray: TypeAlias = NDArray[np.uint64]
"""uint64, any shape, values in [0, p)."""

_BITS = 61
_WIRE = np.dtype("<u8")
# Matrix products split an element into three limbs of 21 bits; 2^11 products of two limbs add up to less than 2^53,
# so double precision holds every partial sum exactly, whatever the order of summation.
_LIMB = 21
_DEPTH = 1 << 11
# A source of randomness that gives p (61 ones) this often in a row is broken: the chance is 2^-976.
_REDRAWS = 16


def reduce(x: NDArray[np.uint64]) -> FieldArray:
    """Any unsigned 64-bit integers, reduced to [0, p)."""
    # x = high 2^61 + low = high + low (mod p), and high + low <= p + 7
    folded = (x & np.uint64(P)) + (x >> np.uint64(_BITS))
    # Below p the subtraction wraps round to a huge number, so the minimum is the representative in [0, p).
    return np.asarray(np.minimum(folded, folded - np.uint64(P)))


def add(a: FieldArray, b: FieldArray) -> FieldArray:
    """``a + b``, elementwise, with broadcasting."""
    total = a + b
    return np.asarray(np.minimum(total, total - np.uint64(P)))


def add_signed(a: FieldArray, x: NDArray[np.signedinteger[Any]]) -> FieldArray:
    """``a + x`` for signed integers in [-p, p], elementwise, with broadcasting; faster than through from_signed."""
    total = a + x.astype(np.int64, copy=False).view(np.uint64)
    # A negative sum has wrapped round to at least 2^64 - p, as in sub; after that the sum is below 2 p, as in add.
    total = np.minimum(total, total + np.uint64(P))
    return np.asarray(np.minimum(total, total - np.uint64(P)))


def sub(a: FieldArray, b: FieldArray) -> FieldArray:
    """``a - b``, elementwise, with broadcasting."""
    difference = a - b
    # Where a < b the difference has wrapped round to at least 2^64 - p, and adding p brings it back below p.
    return np.asarray(np.minimum(difference, difference + np.uint64(P)))


def neg(a: FieldArray) -> FieldArray:
    """``-a``, elementwise."""
    return sub(np.zeros_like(a), a)


def mul(a: FieldArray, b: FieldArray) -> FieldArray:
    """``a b``, elementwise and exact, with broadcasting."""
    # a = a1 2^31 + a0 and b = b1 2^31 + b0, with a0, b0 < 2^31 and a1, b1 < 2^30
    half, low31, low30 = np.uint64(31), np.uint64((1 << 31) - 1), np.uint64((1 << 30) - 1)
    a0, a1, b0, b1 = a & low31, a >> half, b & low31, b >> half
    middle = a1 * b0 + a0 * b1
    # a b = a1 b1 2^62 + middle 2^31 + a0 b0
    #     = 2 a1 b1 + (middle >> 30) + ((middle mod 2^30) << 31) + a0 b0 (mod p)
    #     < 2^61 + 2^32 + 2^61 + 2^62 < 2^64
    return reduce(
        np.uint64(2) * (a1 * b1) + (middle >> np.uint64(30)) + ((middle & low30) << half) + a0 * b0,
    )


def mul_power_of_two(a: FieldArray, exponent: int) -> FieldArray:
    """``2^exponent a``, elementwise: a rotation of 61 bits.

    Args:
        a: field elements.
        exponent: at least 0.
    """
    shift = exponent % _BITS
    if shift == 0:
        return a.copy()
    return ((a << np.uint64(shift)) & np.uint64(P)) | (a >> np.uint64(_BITS - shift))


def centred(x: FieldArray) -> NDArray[np.int64]:
    """The representatives in (-p/2, p/2], as int64."""
    signed = x.astype(np.int64)
    return np.where(signed > P // 2, signed - P, signed)


def from_signed(x: NDArray[np.signedinteger[Any]]) -> FieldArray:
    """Any signed integers of up to 64 bits, reduced to [0, p)."""
    wide = x.astype(np.int64, copy=False)
    # Two's complement writes a negative x as x + 2^64 = x + 8 (mod p).
    return sub(reduce(wide.view(np.uint64)), (wide < 0).astype(np.uint64) << np.uint64(3))


def sum_mod(array: FieldArray, axis: int) -> FieldArray:
    """Sum along one axis, exact for up to 2^32 terms.

    Returns:
        uint64, the shape of ``array`` without that axis.
    """
    # sum x = sum (x mod 2^32) + 2^32 sum (x >> 32), and neither sum leaves 64 bits
    low = np.asarray((array & np.uint64(0xFFFFFFFF)).sum(axis=axis, dtype=np.uint64))
    high = np.asarray((array >> np.uint64(32)).sum(axis=axis, dtype=np.uint64))
    return add(reduce(low), mul_power_of_two(reduce(high), 32))


def _limbs(a: FieldArray) -> list[NDArray[np.float64]]:
    mask = np.uint64((1 << _LIMB) - 1)
    return [((a >> np.uint64(_LIMB * k)) & mask).astype(np.float64) for k in range(3)]


def matmul(a: FieldArray, b: FieldArray) -> FieldArray:
    """The matrix product, exact.

    Cost: nine double-precision matrix products of the same shape, done as one.

    Args:
        a: shape (m, k).
        b: shape (k, n).

    Returns:
        uint64, shape (m, n).

    Raises:
        UsageError: the shapes do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise UsageError(f"cannot multiply matrices of shapes {a.shape} and {b.shape}; pass (m, k) and (k, n)")
    (m, depth), n = a.shape, b.shape[1]
    # by_weight[w] = sum over i + j = w of A_i B_j, where A = sum_i A_i 2^(21 i)
    by_weight = np.zeros((5, m, n), dtype=np.uint64)
    for start in range(0, depth, _DEPTH):
        rows = np.concatenate(_limbs(a[:, start : start + _DEPTH]), axis=0)
        columns = np.concatenate(_limbs(b[start : start + _DEPTH]), axis=1)
        products = (rows @ columns).astype(np.uint64).reshape(3, m, 3, n)
        for i in range(3):
            for j in range(3):
                # at most p + 3 * 2^53 before reduction
                by_weight[i + j] += products[i, :, j]
        by_weight = reduce(by_weight)
    total: FieldArray = by_weight[0]
    for weight in range(1, 5):
        total = add(total, mul_power_of_two(by_weight[weight], _LIMB * weight))
    return total


def dot(a: FieldArray, b: FieldArray) -> int:
    """The inner product of two vectors of one length, in [0, p), exact.

    Raises:
        UsageError: they are not vectors of one length.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise UsageError(f"an inner product takes two vectors of one length, got shapes {a.shape} and {b.shape}")
    return int(matmul(a[None, :], b[:, None])[0, 0])


def random_vector(random_bytes: Callable[[int], bytes], shape: int | Sequence[int]) -> FieldArray:
    """Independent, exactly uniform field elements.

    Args:
        random_bytes: source of fresh bytes.
        shape: shape of the result.

    Raises:
        UsageError: the source is broken.
    """
    extent = (shape,) if isinstance(shape, int) else tuple(shape)
    count = int(np.prod(extent, dtype=np.int64))
    values = np.frombuffer(draw(random_bytes, 8 * count), dtype=_WIRE).astype(np.uint64) & np.uint64(P)
    for _ in range(_REDRAWS):
        # 61 random bits are uniform on [0, p]; whatever hits p is drawn again.
        again = np.flatnonzero(values == P)
        if again.size == 0:
            return values.reshape(extent)
        values[again] = np.frombuffer(draw(random_bytes, 8 * again.size), dtype=_WIRE) & np.uint64(P)
    raise UsageError("random_bytes gives ones only; pass a source such as os.urandom")


def to_bytes(vector: FieldArray) -> bytes:
    """Eight bytes per element, little-endian, in C order.

    Raises:
        UsageError: something is not a field element.
    """
    if vector.dtype != np.uint64 or (vector.size and int(vector.max()) >= P):
        raise UsageError("only uint64 arrays with values below p = 2^61 - 1 can be written; reduce them first")
    return vector.astype(_WIRE, copy=False).tobytes()


def from_bytes(data: bytes) -> FieldArray:
    """Read what :func:`to_bytes` wrote.

    Returns:
        uint64, shape (len(data) / 8,), read-only; the bytes are not copied on little-endian machines.

    Raises:
        Refusal: ``wrong-shape``, the length is no multiple of eight; ``out-of-range``, a value is p or more.
    """
    if len(data) % _WIRE.itemsize:
        raise Refusal("wrong-shape", f"field elements take 8 bytes each, got {len(data)} bytes")
    values = np.frombuffer(data, dtype=_WIRE).astype(np.uint64, copy=False)
    if values.size and int(values.max()) >= P:
        index = int(np.flatnonzero(values >= P)[0])
        raise Refusal("out-of-range", f"number {index} is {int(values[index])}, but field elements are below 2^61 - 1")
    return values
