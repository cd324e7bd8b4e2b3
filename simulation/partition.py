"""How the rows of one data set are dealt out to sites.

``alpha=None`` deals them out evenly and at random. A number makes the sites differ: for every class k, shares
``p_k ~ Dirichlet(alpha, .., alpha)`` over the sites say how much of that class each site holds (Yurochkin et al.,
"Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019; alpha as the concentration that Hsu, Qi &
Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019, made the
usual measure). Small alpha: few classes per site and very unequal sizes; large alpha: nearly even.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError

__all__ = ["partition"]

_ALPHA_RANGE = (1e-3, 1e6)


def partition(
    labels: NDArray[np.integer],
    sites: int,
    *,
    alpha: float | None,
    rng: np.random.Generator,
    minimum: int = 2,
) -> list[NDArray[np.int64]]:
    """Deal out rows to sites; every row goes to exactly one site.

    Args:
        labels: class of every row, shape ``(n,)``.
        sites: number of sites, at least 1.
        alpha: ``None`` for an even random split (sizes differ by at most one), else the Dirichlet concentration,
            0.001 .. 1 000 000.
        rng: the source of randomness; the same state gives the same split.
        minimum: fewest rows that a site gets, at least 1. Where the draw gives a site fewer, rows move to it one by
            one from whichever site then has most.

    Returns:
        For every site the sorted row numbers that it holds, int64.

    Raises:
        UsageError: an argument is out of range, or ``sites * minimum`` exceeds the number of rows.
    """
    if labels.ndim != 1:
        raise UsageError(f"labels must have shape (n,), got {labels.shape}")
    if sites < 1 or minimum < 1:
        raise UsageError(f"sites and minimum must be 1 or more, got {sites} and {minimum}")
    if sites * minimum > labels.size:
        raise UsageError(
            f"{labels.size} rows are too few for {sites} sites with at least {minimum} each; "
            f"use at most {labels.size // minimum} sites"
        )
    if alpha is None:
        return [np.sort(rows) for rows in np.array_split(rng.permutation(labels.size), sites)]
    if not _ALPHA_RANGE[0] <= alpha <= _ALPHA_RANGE[1]:
        raise UsageError(
            f"alpha must lie in {_ALPHA_RANGE[0]:g} .. {_ALPHA_RANGE[1]:g}, or be None for even, got {alpha}"
        )
    dealt = [np.concatenate(parts) for parts in zip(*_by_class(labels, sites, alpha, rng), strict=True)]
    return [np.sort(rows) for rows in _topped_up(dealt, minimum)]


def _by_class(
    labels: NDArray[np.integer], sites: int, alpha: float, rng: np.random.Generator
) -> list[list[NDArray[np.int64]]]:
    """For every class, its shuffled rows cut into one piece per site, in Dirichlet proportions."""
    pieces = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * rows.size).astype(np.int64)
        pieces.append(np.split(rows, cuts))
    return pieces


def _topped_up(dealt: list[NDArray[np.int64]], minimum: int) -> list[NDArray[np.int64]]:
    held = [list(map(int, rows)) for rows in dealt]
    for poor in held:
        while len(poor) < minimum:
            # The last row of a site is of its last class only by the order of dealing; which one moves is no matter,
            # since rows were shuffled within their class.
            richest = max(held, key=len)
            poor.append(richest.pop())
    return [np.array(rows, dtype=np.int64) for rows in held]
