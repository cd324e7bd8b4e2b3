"""Checks on an opened Gram matrix of integers, with zero tolerance.

Honest updates have integer coordinates far below the modulus, so their inner products are exact integers and obey
exactly what inner products obey. Whoever wraps round the modulus, or lets a sketch mean something else than its
update, breaks one of these:

* norm gate: ``G_ii <= bound``;
* Cauchy-Schwarz: ``G_ij^2 <= G_ii G_jj``;
* the matrix is positive semidefinite.

All arithmetic is in integers, also where it is only guessed whom to remove, before that is verified: coordinator and
sites must get the same answer from the same numbers, whatever machines they have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flint import fmpz_mat

from quorsum.errors import RoundFailed

__all__ = ["ExactVerdict", "exact_checks", "is_positive_semidefinite"]

IntMatrix = Sequence[Sequence[int]]

# Cosines have 64 binary places. After 32 squarings, directions are told apart whose eigenvalues differ by more than
# about 2^-32 of the largest; each squaring doubles the relative error, so 96 bits leave one near 2^-64.
_FRACTION = 64
_SQUARINGS = 32
_BITS = 96


@dataclass(frozen=True)
class ExactVerdict:
    """Which rows an exact Gram matrix leaves.

    Attributes:
        rows: rows that remain, ascending; their Gram matrix is positive semidefinite.
        reasons: for each row that does not remain, one sentence.
        guessed: which of these are gone by a guess: a malicious row was among those that were left then, and it need
            not have been this one. The others are malicious for certain.
        tolerate: how many of the rows that remain may still be malicious.
    """

    rows: tuple[int, ...]
    reasons: dict[int, str]
    guessed: frozenset[int]
    tolerate: int


def exact_checks(gram: IntMatrix, norm_bound: int, f: int) -> ExactVerdict:
    """Remove rows that no honest update can have.

    Args:
        gram: exact integers, shape (n, n), symmetric.
        norm_bound: largest squared norm that an honest row can have.
        f: how many rows may be malicious.

    Raises:
        RoundFailed: more than f rows would have to go, so that the rest cannot be trusted to be the honest ones.
    """
    reasons: dict[int, str] = {}
    for row in range(len(gram)):
        if not 0 <= gram[row][row] <= norm_bound:
            reasons[row] = "its update is longer than the norm gate allows"
    rows = [row for row in range(len(gram)) if row not in reasons]
    # Two honest rows never contradict each other, so a row that contradicts more than f - (those removed) others
    # contradicts an honest one.
    left = f - len(reasons)
    guilty = [i for i in rows if sum(gram[i][j] ** 2 > gram[i][i] * gram[j][j] for j in rows if j != i) > max(0, left)]
    reasons |= dict.fromkeys(guilty, "its inner products contradict those of more sites than can lie")
    rows = [row for row in rows if row not in reasons]
    guessed: set[int] = set()
    while not is_positive_semidefinite([[gram[i][j] for j in rows] for i in rows]):
        if len(reasons) >= f:
            raise RoundFailed(
                "the opened inner products belong to no updates, and more sites than can lie are involved"
            )
        suspect = rows[_most_negative(gram, rows)]
        guessed.add(suspect)
        reasons[suspect] = "with its inner products the Gram matrix is not one of any updates"
        rows.remove(suspect)
    if len(reasons) > f:
        raise RoundFailed(
            f"{len(reasons)} sites sent what no honest site sends, more than the {f} that can be malicious"
        )
    return ExactVerdict(tuple(rows), reasons, frozenset(guessed), f - (len(reasons) - len(guessed)))


def is_positive_semidefinite(matrix: IntMatrix) -> bool:
    """Whether a symmetric integer matrix is positive semidefinite, by fraction-free elimination (Bareiss 1968).

    Pivots are the leading principal minors; a zero pivot is allowed only if its whole remaining row is zero.
    """
    m = [list(row) for row in matrix]
    size, previous = len(m), 1
    alive = list(range(size))
    while alive:
        # A semidefinite matrix with a zero diagonal entry has a zero row there.
        zero = [k for k in alive if m[k][k] == 0]
        if any(m[k][j] != 0 for k in zero for j in alive):
            return False
        alive = [k for k in alive if m[k][k] != 0]
        if not alive:
            return True
        pivot, *alive = alive
        if m[pivot][pivot] < 0:
            return False
        for i in alive:
            for j in alive:
                # m_ij <- (m_ij m_pp - m_ip m_pj) / previous pivot, exactly
                m[i][j] = (m[i][j] * m[pivot][pivot] - m[i][pivot] * m[pivot][j]) // previous
        previous = m[pivot][pivot]
    return True


def _most_negative(gram: IntMatrix, rows: Sequence[int]) -> int:
    """Position of the row that weighs most in the most negative direction; a guess, verified by the caller.

    Of the matrix C of cosines this is the direction in which ``limit I - C``, which has no negative eigenvalue, is
    largest. A high power of that matrix is nearly ``v v^T`` times a number, v being the direction, so its largest
    diagonal entry, which is also its largest entry, is at the largest ``|v_i|``. Of equal ones the first counts.
    """
    norms = [max(1, gram[i][i]) for i in rows]
    cosines = [
        [_cosine(gram[i][j], a * b) for j, b in zip(rows, norms, strict=True)] for i, a in zip(rows, norms, strict=True)
    ]
    # No eigenvalue is larger than the largest sum of absolute values in a row (Gershgorin).
    limit = max(sum(map(abs, row)) for row in cosines)
    power = fmpz_mat([[(limit if i == j else 0) - c for j, c in enumerate(row)] for i, row in enumerate(cosines)])
    for _ in range(_SQUARINGS):
        power = _shortened(power * power)
    diagonal = [int(power[k, k]) for k in range(len(rows))]
    return diagonal.index(max(diagonal))


def _cosine(product: int, norms: int) -> int:
    """``2^64 product / sqrt(norms)``, rounded towards zero, so that opposite signs are treated alike."""
    size = (abs(product) << 2 * _FRACTION) // math.isqrt(norms << 2 * _FRACTION)
    return size if product >= 0 else -size


def _shortened(matrix: fmpz_mat) -> fmpz_mat:
    """Divided by a power of two, towards zero, so that the largest entry has ``_BITS`` bits at most."""
    entries = matrix.entries()
    shift = max(0, max(int(abs(x)).bit_length() for x in entries) - _BITS)
    rounded = [x >> shift if x >= 0 else -(-x >> shift) for x in entries]
    return fmpz_mat(matrix.nrows(), matrix.ncols(), rounded)
