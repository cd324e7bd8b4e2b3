"""From updates to integers and back: flattened, scaled, rounded at random without bias.

Rounding at random keeps the mean of many updates right where rounding to nearest would lose whatever is smaller than
half a step. The random bits are secret and fresh; the flattening signs are public (see ``flatten``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.flatten import as_signs, flatten, flattening_signs
from quorsum.crypto.randomness import draw
from quorsum.crypto.suite import RandomBytes, Vector
from quorsum.errors import UsageError

__all__ = ["dequantise", "quantise"]

_CHUNK = 1 << 16
_LARGEST = 2.0**31 - 2


def quantise(update: Vector, scale: float, digest: bytes, random_bytes: RandomBytes) -> NDArray[np.int32]:
    """``x = round_at_random(scale * signs * update)``.

    A value between two integers goes to the upper one with a probability equal to its distance from the lower one, up
    to 2^-33; an integer stays what it is. Memory beyond the result is bounded.

    Args:
        update: float32 or float64, shape (d,), finite.
        scale: integers per unit of the update, > 0.
        digest: 32 bytes, the digest of the round's context.
        random_bytes: source of fresh bytes, four per coordinate.

    Returns:
        int32, shape (d,).

    Raises:
        UsageError: wrong shape or type, not finite, or too large for 32 bits at this scale.
    """
    _check_scale(scale)
    if update.ndim != 1 or not np.issubdtype(update.dtype, np.floating):
        raise UsageError(f"an update is a vector of floating-point numbers, got {update.dtype} of shape {update.shape}")
    integers = np.empty(update.size, dtype=np.int32)
    for begin, negative in flattening_signs(digest, update.size):
        for offset in range(0, negative.size, _CHUNK):
            start = begin + offset
            value = update[start : start + _CHUNK].astype(np.float64)
            # A product beyond the largest float is infinite, and refused with the others.
            with np.errstate(over="ignore"):
                value *= scale
            _check_range(update, value, start)
            value *= as_signs(negative[offset : offset + _CHUNK])
            integers[start : start + _CHUNK] = _round_at_random(value, random_bytes)
    return integers


def dequantise(total: NDArray[np.int64], scale: float, digest: bytes) -> NDArray[np.float64]:
    """``signs * total / scale``: undo :func:`quantise`, for one update or a sum of them.

    Args:
        total: int64, shape (d,).
        scale: integers per unit of the update, > 0.
        digest: 32 bytes, the digest of the round's context.

    Returns:
        float64, shape (d,).

    Raises:
        UsageError: wrong shape or scale.
    """
    _check_scale(scale)
    if total.ndim != 1:
        raise UsageError(f"a sum of updates is a vector, got shape {total.shape}")
    return flatten(digest, total / scale)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"the scale must be finite and > 0, got {scale}")


def _check_range(update: Vector, value: NDArray[np.float64], start: int) -> None:
    # Written so that NaN fails too.
    if value.min() >= -_LARGEST and value.max() <= _LARGEST:
        return
    index = start + int(np.flatnonzero(~(np.abs(value) <= _LARGEST))[0])
    if not np.isfinite(update[index]):
        raise UsageError(f"the update at index {index} is {update[index]}; its training has diverged")
    raise UsageError(f"the update at index {index} is too large for this scale; clip it to the reference norm first")


def _round_at_random(value: NDArray[np.float64], random_bytes: RandomBytes) -> NDArray[np.float64]:
    """Integers; overwrites ``value``."""
    lower = np.floor(value)
    uniform = np.frombuffer(draw(random_bytes, 4 * value.size), dtype="<u4")
    # P[up] = P[u + 1/2 < 2^32 (value - lower)]: the half makes the error of a 32-bit u symmetric.
    value -= lower
    value *= 2.0**32
    value -= 0.5
    lower += uniform < value
    return lower
