"""Checks that need no key: on what a site wants to seal, and on what was opened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.suite import RoundContext, Site, Vector
from quorsum.errors import RoundFailed, UsageError

__all__ = [
    "EXACT_TOLERANCE",
    "RATIO_TOLERANCE",
    "check_context",
    "check_opened",
    "check_update",
    "check_weights",
    "squared_norm",
]

RATIO_TOLERANCE = 1.08
"""Largest accepted ratio of the opened to the promised squared norm after four sketches.

For blocks of 4096 that are nearly orthogonal (the flattening sees to that) the sketched squared norm has a
relative standard deviation of at most sqrt(2 / (4096 r)), which is 1.1 % for r = 4; docs/suites.md has the
measured quantiles.
"""

EXACT_TOLERANCE = 1.01
"""Largest accepted ratio when the Gram matrix was computed from the whole updates and not from sketches."""

_CHUNK = 1 << 18


def check_context(context: RoundContext) -> None:
    """Refuse a context with which nothing can be sealed.

    Raises:
        UsageError: naming the field.
    """
    if context.dimension < 1:
        raise UsageError(f"dimension must be at least 1, got {context.dimension}")
    if not (math.isfinite(context.unit) and context.unit > 0):
        raise UsageError(f"unit must be a positive finite norm, got {context.unit}")
    if context.sketches < 1:
        raise UsageError(f"sketches must be at least 1, got {context.sketches}")
    if context.tolerate < 0:
        raise UsageError(f"tolerate must be at least 0, got {context.tolerate}")


def check_update(context: RoundContext, update: Vector) -> None:
    """Refuse an update that cannot be sealed in this round.

    Raises:
        UsageError: it is not a vector of d finite float32 or float64 numbers.
    """
    check_context(context)
    if not isinstance(update, np.ndarray) or update.dtype not in (np.float32, np.float64):
        kind = update.dtype if isinstance(update, np.ndarray) else type(update).__name__
        raise UsageError(f"an update must be a float32 or float64 array, got {kind}")
    if update.shape != (context.dimension,):
        raise UsageError(f"an update of this round has shape ({context.dimension},), got {update.shape}")
    for start in range(0, update.size, _CHUNK):
        part = update[start : start + _CHUNK]
        if not np.isfinite(part).all():
            index = start + int(np.flatnonzero(~np.isfinite(part))[0])
            raise UsageError(f"the update is not finite at index {index}; training has diverged, send nothing")


def check_weights(sites: Sequence[Site], weights: Mapping[Site, float]) -> None:
    """Refuse weights with which no sum can be formed.

    Raises:
        UsageError: a weight is not finite, names a site without an upload, or all are zero.
    """
    for site, weight in weights.items():
        if site not in sites:
            raise UsageError(f"there is a weight for site {site}, but no upload of it")
        if not math.isfinite(weight):
            raise UsageError(f"the weight of site {site} is {weight}; weights must be finite")
    if not any(weights.values()):
        raise UsageError("all weights are zero, so there is nothing to open; select at least one site")


def squared_norm(vector: Vector) -> float:
    """``<x, x>`` in float64 of a vector of shape (d,), without a float64 copy of it."""
    total = 0.0
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK].astype(np.float64, copy=False)
        total += float(part @ part)
    return total


def check_opened(
    total: NDArray[np.float64],
    weights: NDArray[np.float64],
    gram: NDArray[np.float64],
    tolerance: float = RATIO_TOLERANCE,
    floor: float = 0.0,
) -> float:
    """Compare the opened sum with what the Gram matrix promised: ``|sum_i w_i x_i|^2`` against ``w' G w``.

    An update that hid from the sketches (or wrapped round the modulus, or was not the one measured) makes
    the opened sum longer than promised. Such a sum must be thrown away, and the round with it.

    Args:
        total: float64, shape (d,), the opened sum.
        weights: float64, shape (m,), in the order of ``gram``.
        gram: float64, shape (m, m).
        tolerance: largest accepted ratio, above 1.
        floor: squared norm, at least 0, that opening alone explains; ``noise_floor`` of the suite.

    Returns:
        the ratio ``|total|^2 / (max(w' G w, 0) + floor)``; 1 when both sides are zero.

    Raises:
        UsageError: shapes do not fit, or ``tolerance`` is not above 1.
        RoundFailed: the ratio is above ``tolerance`` or not a number.
    """
    size = weights.size
    if weights.shape != (size,) or gram.shape != (size, size):
        raise UsageError(f"weights of shape {weights.shape} do not fit a Gram matrix of shape {gram.shape}")
    if not tolerance > 1:
        raise UsageError(f"tolerance must be above 1, got {tolerance}")
    opened = squared_norm(total)
    promised = max(float(weights @ gram @ weights), 0.0) + floor
    nothing_promised = 1.0 if opened == 0.0 else math.inf
    ratio = opened / promised if promised > 0.0 else nothing_promised
    if not ratio <= tolerance:
        raise RoundFailed(
            f"the opened sum is {ratio:.4g} times as long (squared) as the Gram matrix promised, above "
            f"{tolerance:.4g}: an update hid from the measurement; throw this round away and measure the next "
            "one with more sketches"
        )
    return ratio
