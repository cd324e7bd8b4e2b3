"""Geometry of a round, read from its Gram matrix alone.

``G[i, j] = <x_i, x_j>`` fixes the updates up to a rotation, so everything here (and every rule built on it) is
invariant to rotations by construction. All arithmetic is float64.

Distances come from ``|x_i - x_j|^2 = G_ii + G_jj - 2 G_ij``. That difference cancels when two updates are much
closer to each other than to zero; digits that are not in the Gram matrix cannot be brought back, but they must not
be mistaken for distances either. Squared distances below ``RESOLUTION * (G_ii + G_jj)`` are therefore exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.errors import NonFiniteGramError, NonFiniteUpdateError
from quorsum.errors import BoundError, UsageError

Gram: TypeAlias = NDArray[np.float64]
"""Inner products, float64, shape (n, n), symmetric."""

Weights: TypeAlias = NDArray[np.float64]
"""One weight per row, float64, shape (n,)."""

Scores: TypeAlias = NDArray[np.float64]
"""One score per row, float64, shape (n,); higher is worse."""

Mask: TypeAlias = NDArray[np.bool_]
"""One truth value per row, shape (n,)."""

RESOLUTION = 64 * float(np.finfo(np.float64).eps)
"""Squared distances below this share of ``G_ii + G_jj`` are rounding: 1.4e-14, that is 1.2e-7 of a norm, which is
also where two float32 updates stop being different."""

TIE_BITS = 30
"""Scores and distances that agree in this many binary digits (9 decimal ones) are ties."""

LARGEST = 1e300
"""Entries beyond this count as non-finite: sums of them would overflow."""

SYMMETRY = 1e-6
"""A rule refuses a matrix whose halves differ by more than this share of its largest entry."""

_BLOCK = 1 << 18


class Bound(NamedTuple):
    """How many malicious sites a rule tolerates.

    Attributes:
        text: the bound as text, such as ``"n >= 2f + 1"``.
        minimum: smallest n that the rule accepts, as a function of f, not decreasing.
    """

    text: str
    minimum: Callable[[int], int]


ONE_HONEST = Bound("n >= f + 1", lambda f: f + 1)
MAJORITY = Bound("n >= 2f + 1", lambda f: 2 * f + 1)
KRUM_MAJORITY = Bound("n >= 2f + 3", lambda f: 2 * f + 3)


def gram_matrix(updates: ArrayLike) -> Gram:
    """Gram matrix of the rows of a matrix, accumulated in float64 whatever the input's precision.

    Args:
        updates: shape (n, d), real. Non-finite rows are allowed: their entries become non-finite.

    Returns:
        float64, shape (n, n), symmetric.

    Raises:
        UsageError: ``updates`` is not a real matrix.
    """
    matrix = _real_matrix(updates, "updates")
    n, d = matrix.shape
    gram = np.zeros((n, n))
    with np.errstate(over="ignore", invalid="ignore"):
        # Block by block, because a float64 copy of a large float32 model per site would double the memory.
        for start in range(0, d, _BLOCK):
            block = matrix[:, start : start + _BLOCK].astype(np.float64)
            gram += block @ block.T
        return (gram + gram.T) / 2


def as_gram(gram: ArrayLike) -> Gram:
    """Check a Gram matrix and return a float64 copy, exactly symmetric.

    Args:
        gram: shape (n, n), n >= 1, real, finite, symmetric up to ``SYMMETRY``.

    Raises:
        NonFiniteGramError: some rows are not finite, or beyond ``LARGEST``; the error names them.
        UsageError: not a real square matrix, or not symmetric.
    """
    matrix = square(gram)
    rows = non_finite_rows(matrix)
    if rows:
        raise NonFiniteGramError(
            f"rows {_listed(rows)} of the Gram matrix are not finite: "
            "drop the rows that check_gram names before applying a rule",
            rows,
        )
    asymmetry = float(np.max(np.abs(matrix - matrix.T)))
    if asymmetry > SYMMETRY * float(np.max(np.abs(matrix))):
        raise UsageError(
            f"the Gram matrix is not symmetric (entries differ by up to {asymmetry:.3g}): "
            "drop the rows that check_gram names before applying a rule"
        )
    # Halved before they are added, so that no sum leaves the range.
    return matrix / 2 + matrix.T / 2


def square(gram: ArrayLike) -> Gram:
    """Return a float64 copy of a square real matrix, finite or not.

    Raises:
        UsageError: the matrix is not real, not square, or empty.
    """
    matrix = _real_matrix(gram, "the Gram matrix")
    if matrix.shape[0] != matrix.shape[1]:
        raise UsageError(f"the Gram matrix must be square, got shape {matrix.shape}")
    return matrix.astype(np.float64)


def as_updates(updates: ArrayLike) -> NDArray[np.float64]:
    """Check a matrix of updates and return a float64 copy.

    Args:
        updates: shape (n, d), n >= 1, d >= 1, real, finite.

    Raises:
        NonFiniteUpdateError: some rows are not finite; the error names them.
        UsageError: not a real matrix.
    """
    matrix = _real_matrix(updates, "updates").astype(np.float64)
    rows = [int(row) for row in np.flatnonzero(~np.isfinite(matrix).all(axis=1))]
    if rows:
        raise NonFiniteUpdateError(f"updates {_listed(rows)} are not finite: drop these rows", rows)
    return matrix


def non_finite_rows(gram: Gram) -> tuple[int, ...]:
    """Rows to blame for the non-finite entries of a square matrix, ascending.

    A non-finite update spoils its whole row *and* column, so entries alone would accuse everybody. First the rows
    whose own norm is not finite are to blame; among the others, the rows with the most unexplained entries, until
    none is left. Rows that share the most are all named.
    """
    bad = ~(np.abs(gram) <= LARGEST)
    bad |= bad.T
    guilty = np.diagonal(bad).copy()
    while True:
        counts = np.where(guilty, 0, bad[:, ~guilty].sum(axis=1))
        most = int(counts.max(initial=0))
        if most == 0:
            return tuple(int(row) for row in np.flatnonzero(guilty))
        guilty |= counts == most


def squared_distances(gram: Gram) -> NDArray[np.float64]:
    """All ``|x_i - x_j|^2``, float64, shape (n, n), never negative, exactly zero below the resolution.

    Args:
        gram: as returned by :func:`as_gram`.
    """
    norms = np.diagonal(gram)
    sums = norms[:, None] + norms[None, :]
    distances = sums - 2 * gram
    return np.where(distances > RESOLUTION * np.abs(sums), distances, 0.0)


def distances_to(gram: Gram, weights: Weights) -> NDArray[np.float64]:
    """Distances of every row from the combination ``sum_j w_j x_j``, float64, shape (n,).

    Args:
        gram: as returned by :func:`as_gram`.
        weights: shape (n,).
    """
    towards = gram @ weights
    squared = np.diagonal(gram) - 2 * towards + weights @ towards
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def norms(gram: Gram) -> NDArray[np.float64]:
    """Norm of every row, float64, shape (n,); a negative diagonal (noise of an encrypted zero) counts as zero."""
    return np.asarray(np.sqrt(np.maximum(np.diagonal(gram), 0.0)))


def mix(gram: ArrayLike, matrix: ArrayLike) -> Gram:
    """Gram matrix of the mixed rows ``y = M x``: ``M G M^T``.

    Args:
        gram: shape (n, n).
        matrix: M, shape (b, n), finite.

    Returns:
        float64, shape (b, b), symmetric.

    Raises:
        NonFiniteGramError: some rows of the Gram matrix are not finite.
        UsageError: the shapes do not fit or M is not finite.
    """
    inner = as_gram(gram)
    mixing = _real_matrix(matrix, "the mixing matrix").astype(np.float64)
    if mixing.shape[1] != len(inner):
        raise UsageError(f"a mixing matrix for {len(inner)} rows has {len(inner)} columns, got shape {mixing.shape}")
    if not np.isfinite(mixing).all():
        raise UsageError("the mixing matrix is not finite")
    mixed = mixing @ inner @ mixing.T
    return np.asarray(mixed / 2 + mixed.T / 2)


def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values rounded to ``TIE_BITS`` binary digits, for comparing them.

    Mixtures of the same updates have equal scores in truth and scores that differ in the last digit in floating
    point, a different one on another processor. Ranked without those digits they are ties, and everybody who ranks
    them finds the same order.
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(np.ldexp(mantissa, TIE_BITS)), exponent - TIE_BITS))


def lowest(scores: Scores, count: int) -> Mask:
    """The ``count`` rows with the lowest scores; scores that are equal when :func:`rounded` go by lowest row."""
    mask = np.zeros(len(scores), dtype=np.bool_)
    mask[np.argsort(rounded(scores), kind="stable")[:count]] = True
    return mask


def uniform(mask: Mask) -> Weights:
    """Equal weights, summing to 1, over the rows of a mask that holds at least one."""
    return np.asarray(mask / np.count_nonzero(mask), dtype=np.float64)


def lower_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower median along the last axis: element ``(n - 1) // 2`` of the sorted values, always one of them.

    With n >= 2f + 1 it lies between two values of honest rows, whatever f rows say.
    """
    return np.asarray(np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2])


def require_sites(rule: str, n: int, f: int, bound: Bound) -> None:
    """Refuse too few sites.

    Args:
        rule: name of the rule, for the message.
        n: number of sites.
        f: how many of them may be malicious.
        bound: what the rule tolerates.

    Raises:
        BoundError: n is below the bound.
        UsageError: f is not a whole number from 0.
    """
    tolerated = as_count("f", f, 0)
    least = bound.minimum(tolerated)
    if n >= least:
        return
    possible = [smaller for smaller in range(tolerated) if bound.minimum(smaller) <= n]
    otherwise = f", or tolerate f = {possible[-1]}" if possible else ""
    raise BoundError(
        f"{rule} needs {bound.text}: to tolerate f = {tolerated} it takes at least n = {least} sites, got n = {n}; "
        f"add {least - n}{otherwise}"
    )


def as_count(name: str, value: int, least: int) -> int:
    """Check a whole number.

    Raises:
        UsageError: not an integer (truth values do not count as one), or below ``least``.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {value!r}")
    return int(value)


def as_positive(name: str, value: float) -> float:
    """Check a positive finite number.

    Raises:
        UsageError: anything else.
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not 0 < value < np.inf:
        raise UsageError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def as_row(name: str, value: int, n: int) -> int:
    """Check the number of a row.

    Raises:
        UsageError: not a whole number in 0..n-1.
    """
    row = as_count(name, value, 0)
    if row >= n:
        raise UsageError(f"{name} must be a row in 0..{n - 1}, got {row}")
    return row


def _real_matrix(values: ArrayLike, what: str) -> NDArray[np.generic]:
    matrix = np.asarray(values)
    if matrix.dtype.kind not in "fiu":
        raise UsageError(f"{what} must be a matrix of real numbers, got dtype {matrix.dtype}")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UsageError(f"{what} must be a matrix with at least one row and one column, got shape {matrix.shape}")
    return matrix


def _listed(rows: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, rows))
