"""Pre-aggregators, written as mixing matrices.

A pre-aggregator replaces the updates ``x`` by ``y = M x`` before a rule sees them. M is computed from the Gram
matrix, so nothing has to be decrypted: the rule works on ``M G M^T`` (:func:`quorsum.aggregation.gram.mix`) and its
weights w on the rows of y are the weights ``M^T w`` on the updates.

NNM and bucketing average: their matrices are row-stochastic. ARC and clipping shorten: their matrices are diagonal
with entries in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.gram import (
    MAJORITY,
    as_count,
    as_gram,
    as_positive,
    norms,
    require_sites,
    rounded,
    squared_distances,
)
from quorsum.errors import UsageError

__all__ = ["arc_matrix", "bucketing_matrix", "clip_matrix", "nnm_matrix"]


def nnm_matrix(gram: ArrayLike, f: int) -> NDArray[np.float64]:
    """Nearest-neighbour mixing: every update becomes the mean of its n - f nearest, itself included.

    ``y_i = 1/(n - f) * sum of x_j over the n - f smallest |x_i - x_j|`` (Allouah et al. 2023, arXiv:2302.01772,
    algorithm 2). An update is always among its own neighbours; distances equal to 9 digits are taken by lowest row.
    With f = 0 every row becomes the mean. Bound: n >= 2f + 1.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.

    Returns:
        float64, shape (n, n), rows sum to 1.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("nnm", n, f, MAJORITY)
    distances = rounded(squared_distances(inner))
    # Below every distance, so that a copy with a lower number does not push an update out of its own mixture.
    np.fill_diagonal(distances, -1.0)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : n - f]
    matrix = np.zeros((n, n))
    np.put_along_axis(matrix, nearest, 1 / (n - f), axis=1)
    return matrix


def bucketing_matrix(n: int, rng: np.random.Generator, size: int = 2) -> NDArray[np.float64]:
    """Bucketing: random groups of ``size`` updates are averaged (Karimireddy et al. 2022, arXiv:2006.09365).

    The last bucket is smaller when ``size`` does not divide n. At most f buckets hold a malicious update, so f stays
    what it was while the number of rows falls to ``ceil(n / size)``: the bound of the rule behind applies to that.

    Args:
        n: number of updates, from 1.
        rng: the only source of the grouping; the same generator state gives the same buckets.
        size: updates per bucket, from 1.

    Returns:
        float64, shape (ceil(n / size), n), rows sum to 1; every column has one entry, which names the bucket.

    Raises:
        UsageError: ``n`` or ``size`` is not a positive whole number, or ``rng`` is not a generator.
    """
    count, width = as_count("n", n, 1), as_count("size", size, 1)
    if not isinstance(rng, np.random.Generator):
        raise UsageError(f"bucketing draws its groups from a numpy Generator, got {type(rng).__name__}: pass rng")
    order = rng.permutation(count)
    matrix = np.zeros((-(-count // width), count))
    for bucket, start in enumerate(range(0, count, width)):
        members = order[start : start + width]
        matrix[bucket, members] = 1 / len(members)
    return matrix


def arc_matrix(gram: ArrayLike, f: int) -> NDArray[np.float64]:
    """Adaptive robust clipping: the k longest updates are clipped to the norm of the next one.

    ``k = floor(2 (f / n) (n - f))``, threshold C = the (k + 1)-th largest norm, ``y_i = min(1, C / |x_i|) x_i``
    (Allouah et al. 2024, arXiv:2405.14432, algorithm 2). With f = 0 nothing is clipped. Ties do not matter: equal
    norms are clipped alike. Bound: n >= 2f + 1.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.

    Returns:
        float64, shape (n, n), diagonal, entries in [0, 1].

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("arc", n, f, MAJORITY)
    lengths = norms(inner)
    # In whole numbers: 2 * (f / n) * (n - f) in floating point can fall just below an integer.
    clipped = 2 * f * (n - f) // n
    return np.diag(_factors(lengths, float(np.sort(lengths)[n - clipped - 1])))


def clip_matrix(gram: ArrayLike, norm: float) -> NDArray[np.float64]:
    """Static clipping: ``y_i = min(1, C / |x_i|) x_i`` with a fixed C. No bound on f, and no robustness by itself.

    Args:
        gram: shape (n, n).
        norm: C > 0, in the units of the updates.

    Returns:
        float64, shape (n, n), diagonal, entries in [0, 1].

    Raises:
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` is malformed or ``norm`` is not positive and finite.
    """
    return np.diag(_factors(norms(as_gram(gram)), as_positive("norm", norm)))


def _factors(lengths: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    factors = np.ones(len(lengths))
    np.divide(limit, lengths, out=factors, where=lengths > limit)
    return factors
