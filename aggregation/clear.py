"""Rules that must see the updates themselves: for the clear suite only.

A median per coordinate is not a function of inner products: it needs every coordinate of every update. A suite that
encrypts updates reveals inner products and one weighted sum, so these rules cannot run under it, and
:func:`quorsum.aggregation.compose.parse_rule` refuses them there. They are here for comparison.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.gram import MAJORITY, as_updates, require_sites

__all__ = ["coordinate_median", "trimmed_mean"]


def coordinate_median(updates: ArrayLike, f: int) -> NDArray[np.float64]:
    """Median of every coordinate (Yin et al. 2018, arXiv:1803.01498, definition 1).

    For even n the mean of the two middle values. f enters only through the bound, n >= 2f + 1.

    Args:
        updates: shape (n, d), finite.
        f: how many rows may be malicious.

    Returns:
        float64, shape (d,).

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteUpdateError: some rows are not finite.
        UsageError: ``updates`` or ``f`` is malformed.
    """
    matrix = as_updates(updates)
    require_sites("median", len(matrix), f, MAJORITY)
    return np.asarray(np.median(matrix, axis=0))


def trimmed_mean(updates: ArrayLike, f: int) -> NDArray[np.float64]:
    """Mean of every coordinate without its f largest and f smallest values (Yin et al. 2018, definition 2).

    With f = 0 this is the mean. Bound: n >= 2f + 1.

    Args:
        updates: shape (n, d), finite.
        f: how many rows may be malicious.

    Returns:
        float64, shape (d,).

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteUpdateError: some rows are not finite.
        UsageError: ``updates`` or ``f`` is malformed.
    """
    matrix = as_updates(updates)
    n = len(matrix)
    require_sites("trimmed-mean", n, f, MAJORITY)
    return np.asarray(np.sort(matrix, axis=0)[f : n - f].mean(axis=0))
