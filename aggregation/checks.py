"""Checks on a Gram matrix before any rule sees it.

Rules refuse a matrix that cannot be one of inner products. These checks say *whose* fault that is, so that the
caller can drop those rows and go on. They rest on two facts about honest sites: their rows are finite and within the
agreed norm, and any two of them satisfy ``|G_ij| <= sqrt(G_ii G_jj)`` (Cauchy-Schwarz). So among at most f malicious
sites, an honest row can be in conflict with f rows and not more; a row in conflict with more is malicious.

Each row that was proven malicious uses up one of the f, and the count starts again with what is left.

Where the entries were opened under noise, all three facts are granted six standard deviations of it, so that what
noise alone can explain accuses nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.gram import (
    Gram,
    as_count,
    as_gram,
    as_positive,
    non_finite_rows,
    norms,
    square,
    squared_distances,
)

__all__ = ["Code", "Finding", "GramReport", "check_gram", "copies"]

Code: TypeAlias = Literal["non-finite", "negative-norm", "norm-bound", "inconsistent"]
"""Stable, machine-readable reasons. They do not change between versions."""

# Honest noise beyond this many standard deviations comes up once in 10^9 entries, if at all.
_DEVIATIONS = 6.0


@dataclass(frozen=True)
class Finding:
    """Why one row must be dropped.

    Attributes:
        row: number of the row.
        code: the reason, stable.
        reason: the same as a sentence, without a name for the row, so that it can follow a site's name.
        proven: whether no honest site can have such a row; if not, it may be bad luck and does not count against f.
    """

    row: int
    code: Code
    reason: str
    proven: bool = True


@dataclass(frozen=True)
class GramReport(Mapping[int, Finding]):
    """What :func:`check_gram` found: a mapping from each row that must be dropped to why, and what is left.

    Rows are numbered as in the matrix that was checked.

    Attributes:
        rows: how many rows were checked.
        findings: by row, those to drop, and why.
        disputes: pairs (i < j) among the remaining rows that contradict each other without proof of who is at fault.
        zeros: remaining rows whose norm is zero, or cannot be told from zero. Legal, but such a site adds nothing.
        asymmetry: largest ``|G_ij - G_ji|`` among the remaining rows, as a share of ``sqrt(G_ii G_jj)``.
        smallest_eigenvalue: of the remaining rows, each scaled to norm 1; below zero by more than rounding there are
            no updates with these inner products. Zero if no row with a norm remains.
        positive_semidefinite: ``smallest_eigenvalue`` is not below zero by more than the tolerance and the noise.
    """

    rows: int
    findings: Mapping[int, Finding]
    disputes: tuple[tuple[int, int], ...]
    zeros: tuple[int, ...]
    asymmetry: float
    smallest_eigenvalue: float
    positive_semidefinite: bool

    def __getitem__(self, row: int) -> Finding:
        return self.findings[row]

    def __iter__(self) -> Iterator[int]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def remaining(self) -> tuple[int, ...]:
        """Rows that were not named, ascending."""
        return tuple(row for row in range(self.rows) if row not in self.findings)

    @property
    def consistent(self) -> bool:
        """Whether the remaining rows can be inner products of updates, as far as these checks see."""
        return not self.disputes and self.positive_semidefinite


def check_gram(
    gram: ArrayLike,
    f: int,
    *,
    norm_bound: float | None = None,
    norm_proves: bool = True,
    noise: float = 0.0,
    tolerance: float = 1e-6,
) -> GramReport:
    """Name the rows of a Gram matrix that must be dropped before a rule is applied.

    In order: rows that are not finite; rows with a negative squared norm; rows beyond the norm bound; rows that
    violate Cauchy-Schwarz or symmetry with more than f others, f less the rows proven malicious before. Whether the
    rest is positive semidefinite is reported and accuses nobody.

    Args:
        gram: shape (n, n), real; entries may be anything.
        f: how many sites may be malicious.
        norm_bound: norm that no honest update exceeds, in the units of the updates; no gate if not given.
        norm_proves: whether a norm beyond the bound proves malice, as it does where honest sites clip; without
            clipping it may be a training that diverged.
        noise: >= 0, standard deviation of the noise on every entry, in squared units of the updates.
        tolerance: > 0, relative error of an honest entry. Errors that do not shrink with the norm (rounding) are
            granted ``tolerance`` times the median squared norm as well.

    Raises:
        UsageError: the matrix is not square and real, or an argument is out of range.
    """
    matrix = square(gram)
    tolerated, slack = as_count("f", f, 0), as_positive("tolerance", tolerance)
    limit = None if norm_bound is None else as_positive("norm_bound", norm_bound)
    margin = _DEVIATIONS * _as_noise(noise)
    findings: dict[int, Finding] = {}

    def accuse(row: int, code: Code, reason: str, proven: bool = True) -> None:
        findings.setdefault(row, Finding(row, code, reason, proven))

    for row in non_finite_rows(matrix):
        accuse(row, "non-finite", "its update has inner products that are not finite")
    # From here on nothing reads these rows; zeros keep the arithmetic below finite.
    for row in findings:
        matrix[row, :] = matrix[:, row] = 0.0
    diagonal = np.diagonal(matrix)
    alive = [row for row in range(len(matrix)) if row not in findings]
    allowance = slack * float(np.median(np.maximum(diagonal[alive], 0.0))) if alive else 0.0
    for row in alive:
        # The least squared norm that the noise leaves possible.
        least = float(diagonal[row]) - margin
        if diagonal[row] < -(allowance + margin):
            accuse(row, "negative-norm", f"its update has the squared norm {diagonal[row]:.6g}, below zero")
        elif limit is not None and np.sqrt(max(least, 0.0)) > limit * np.sqrt(1 + slack):
            reason = f"its update has norm {np.sqrt(diagonal[row]):.6g}, above the bound {limit:.6g}"
            accuse(row, "norm-bound", reason, norm_proves)

    conflict = _conflicts(matrix, slack, allowance, margin)
    conflict[list(findings), :] = conflict[:, list(findings)] = False
    proven = sum(finding.proven for finding in findings.values())
    for row, (others, threshold) in _vote(conflict, tolerated - proven).items():
        accuse(
            row,
            "inconsistent",
            f"its inner products contradict those of {others} other sites, more than the {threshold} that can lie",
        )
    return _report(matrix, findings, conflict, slack, allowance, margin)


def copies(gram: ArrayLike, *, rtol: float = 1e-6) -> tuple[tuple[int, int], ...]:
    """Pairs of rows that are equal: ``|x_i - x_j| <= rtol * max(|x_i|, |x_j|)``.

    Independent training does not give equal updates: one of the two was copied, or both sites are one. Two zero
    updates count as equal. Distances below the resolution of the matrix (1.2e-7 of a norm) count as zero.

    Args:
        gram: shape (n, n), finite.
        rtol: > 0.

    Returns:
        pairs (i, j), i < j, ascending.

    Raises:
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``rtol`` is malformed.
    """
    inner = as_gram(gram)
    lengths = norms(inner)
    limits = as_positive("rtol", rtol) * np.maximum(lengths[:, None], lengths[None, :])
    first, second = np.nonzero(np.triu(np.sqrt(squared_distances(inner)) <= limits, k=1))
    return tuple(zip(first.tolist(), second.tolist(), strict=True))


def _as_noise(noise: float) -> float:
    """The standard deviation as a float, zero included."""
    return 0.0 if noise == 0 else as_positive("noise", noise)


def _conflicts(gram: Gram, slack: float, allowance: float, margin: float) -> NDArray[np.bool_]:
    """Pairs that cannot both be right, whatever the noise below ``margin`` was.

    Each of the three entries may be off by the margin: ``|G_ij| - m <= sqrt((G_ii + m)(G_jj + m))``.
    """
    lengths = np.sqrt(np.maximum(np.diagonal(gram) + margin, 0.0))
    limits = np.outer(lengths, lengths)
    excess = np.abs(gram) > limits * (1 + slack) + allowance + margin
    differ = np.abs(gram - gram.T) > limits * slack + allowance + 2 * margin
    conflict = excess | excess.T | differ
    np.fill_diagonal(conflict, False)
    return np.asarray(conflict)


def _vote(conflict: NDArray[np.bool_], tolerated: int) -> dict[int, tuple[int, int]]:
    """Rows in conflict with more others than can lie, with how many those were and what the limit was then.

    The worst row goes first and is taken out of the count of the others: whoever only quarrelled with it is cleared.
    """
    named: dict[int, tuple[int, int]] = {}
    left = conflict.copy()
    limit = max(tolerated, 0)
    while True:
        counts = left.sum(axis=1)
        most = int(counts.max(initial=0))
        if most <= limit:
            return named
        for row in np.flatnonzero(counts == most):
            named[int(row)] = (most, limit)
            left[row, :] = left[:, row] = False
        limit = max(tolerated - len(named), 0)


def _report(
    gram: Gram,
    findings: dict[int, Finding],
    conflict: NDArray[np.bool_],
    slack: float,
    allowance: float,
    margin: float,
) -> GramReport:
    """Describe the rows that remain."""
    remaining = np.array([row for row in range(len(gram)) if row not in findings], dtype=np.intp)
    block = gram[np.ix_(remaining, remaining)]
    lengths = norms(block)
    positive = lengths**2 > allowance + margin
    # Scaled to norm 1, since one long row would otherwise hide the others' contradictions in its rounding.
    scaled = block[np.ix_(positive, positive)] / lengths[positive][:, None] / lengths[positive][None, :]
    # The noise of the scaled entries is below m / (l_i l_j), a matrix of rank one whose norm is the sum of m / l_i^2.
    shift = margin * float(np.sum(lengths[positive] ** -2.0))
    smallest = float(np.linalg.eigvalsh((scaled + scaled.T) / 2)[0]) if len(scaled) else 0.0
    first, second = np.nonzero(np.triu(conflict[np.ix_(remaining, remaining)], k=1))
    return GramReport(
        rows=len(gram),
        findings=MappingProxyType(dict(sorted(findings.items()))),
        disputes=tuple(zip(remaining[first].tolist(), remaining[second].tolist(), strict=True)),
        zeros=tuple(remaining[~positive].tolist()),
        asymmetry=float(np.max(np.abs(scaled - scaled.T), initial=0.0)),
        smallest_eigenvalue=smallest,
        positive_semidefinite=smallest >= -slack * max(len(scaled), 1) - shift,
    )
