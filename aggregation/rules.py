"""Robust rules as pure functions of a Gram matrix.

Every rule takes the Gram matrix ``G[i, j] = <x_i, x_j>`` of the updates and f, the number of sites that may be
malicious, and returns one weight per row: the aggregate is ``sum_i w_i x_i``. None keeps state, draws randomness or
changes its input. Score functions give the number a rule judges by, one per row, higher is worse.

For every rule:

* fewer sites than its bound raise :class:`quorsum.errors.BoundError`, naming n, f and the smallest n that works;
* rows that are not finite raise :class:`quorsum.aggregation.errors.NonFiniteGramError`, naming the rows;
* ties are scores equal to ``TIE_BITS`` binary digits (9 decimal ones), and go to the lowest row number, where not
  said otherwise: what is left of a difference that small is rounding, and may differ between two processors;
* distances are those of :func:`quorsum.aggregation.gram.squared_distances`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.errors import NoConvergenceError, NoTrustError
from quorsum.aggregation.gram import (
    KRUM_MAJORITY,
    MAJORITY,
    ONE_HONEST,
    RESOLUTION,
    Gram,
    Mask,
    Scores,
    Weights,
    as_count,
    as_gram,
    as_positive,
    as_row,
    distances_to,
    lower_median,
    lowest,
    norms,
    require_sites,
    rounded,
    squared_distances,
    uniform,
)
from quorsum.errors import UsageError

__all__ = [
    "centred_clipping",
    "fltrust",
    "geometric_median",
    "krum",
    "krum_scores",
    "mda",
    "mean",
    "monna",
    "multi_krum",
    "spectral",
    "spectral_filter",
    "spectral_scores",
]

MDA_LARGEST_F = 16
"""Minimum-diameter averaging searches up to 2^f sets; beyond this f it refuses."""

_SAME_EIGENVALUE = 1e-9


def mean(gram: ArrayLike, f: int = 0) -> Weights:
    """Plain mean, ``w_i = 1/n``: not robust, here as the baseline.

    One malicious site can move it anywhere, so it tolerates f = 0 only. f is still accepted, and checked against
    n >= f + 1, so that the baseline runs in the same experiment as the rules it is compared with.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious; changes nothing.

    Returns:
        float64, shape (n,), sums to 1.

    Raises:
        BoundError: n < f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    n = len(as_gram(gram))
    require_sites("mean", n, f, ONE_HONEST)
    return np.full(n, 1 / n)


def krum_scores(gram: ArrayLike, f: int) -> Scores:
    """Krum's score: sum of the squared distances to the n - f - 2 nearest *other* rows (Blanchard et al. 2017, §4).

    Args:
        gram: shape (n, n), n >= 2f + 3.
        f: how many sites may be malicious.

    Returns:
        float64, shape (n,), >= 0, squared units of the updates.

    Raises:
        BoundError: n < 2f + 3.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    inner = as_gram(gram)
    return _krum_scores("krum", inner, f)


def krum(gram: ArrayLike, f: int) -> Weights:
    """Krum: the whole weight on the row with the lowest :func:`krum_scores` (Blanchard et al. 2017, arXiv:1703.02757).

    ``w = e_i*, i* = argmin_i sum of |x_i - x_j|^2 over the n - f - 2 nearest j != i``. Bound: n >= 2f + 3. With f = 0
    it still takes one row, the one nearest to its n - 2 nearest. Among equal scores the lowest row wins.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.

    Returns:
        float64, shape (n,), a single 1.

    Raises:
        BoundError: n < 2f + 3.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    return uniform(lowest(krum_scores(gram, f), 1))


def multi_krum(gram: ArrayLike, f: int, *, m: int | None = None) -> Weights:
    """Multi-Krum: the mean of the m rows with the lowest :func:`krum_scores` (Blanchard et al. 2017, §4).

    Bound: n >= 2f + 3. With f = 0 and the default m this is the mean. Equal scores are taken by lowest row.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.
        m: how many rows to average, 1..n - f; n - f if not given. m = 1 is Krum.

    Returns:
        float64, shape (n,), ``1/m`` on the chosen rows.

    Raises:
        BoundError: n < 2f + 3.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram``, ``f`` or ``m`` is malformed or out of range.
    """
    inner = as_gram(gram)
    scores = _krum_scores("multi-krum", inner, f)
    return uniform(lowest(scores, multi_krum_count(len(inner), f, m)))


def multi_krum_count(n: int, f: int, m: int | None) -> int:
    """How many rows Multi-Krum averages.

    Raises:
        UsageError: m is not in 1..n - f.
    """
    if m is None:
        return n - f
    count = as_count("m", m, 1)
    if count > n - f:
        raise UsageError(f"multi-krum can average at most n - f = {n - f} rows, got m = {count}")
    return count


def mda(gram: ArrayLike, f: int) -> Weights:
    """Minimum-diameter averaging: the mean of the n - f rows that lie closest together.

    ``w = 1/(n - f) on S, S = argmin over |S| = n - f of max_{i, j in S} |x_i - x_j|`` (El Mhamdi et al. 2018,
    arXiv:1802.07927; Rousseeuw 1985). Bound: n >= 2f + 1. With f = 0 this is the mean.

    The smallest diameter is often shared by several sets. The one with the smallest sum of squared distances is
    taken; if that is equal too, the one that keeps lower rows. The search is exact and takes up to 2^f steps.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious, at most ``MDA_LARGEST_F``.

    Returns:
        float64, shape (n,), ``1/(n - f)`` on S.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed, or f is too large to search.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("mda", n, f, MAJORITY)
    if f > MDA_LARGEST_F:
        raise UsageError(f"mda searches up to 2^f sets and stops at f = {MDA_LARGEST_F}, got f = {f}: use multi-krum")
    return uniform(_tightest(rounded(squared_distances(inner)), f))


def geometric_median(
    gram: ArrayLike, f: int, *, smoothing: float = 1e-3, tolerance: float = 1e-6, iterations: int = 10_000
) -> Weights:
    """Geometric median by the smoothed Weiszfeld algorithm (Pillutla et al. 2022, arXiv:1912.13445, algorithm 2).

    ``z <- sum_i b_i x_i / sum_i b_i, b_i = 1 / max(nu, |x_i - z|)``, from the mean, until the mean pull
    ``|1/n sum_i (z - x_i) / max(nu, |x_i - z|)|`` is at most ``tolerance``. The pull is the gradient of the smoothed
    objective per row: free of units, at most 1, and zero only at the solution.

    ``nu = smoothing * s`` where s is the smallest over i of the lower median of ``|x_i - x_j|`` over all j: with
    n >= 2f + 1 no malicious rows can make it large. If s = 0, at least half of the rows are equal; they are the
    median and share the weight. Bound: n >= 2f + 1; f does not enter otherwise.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.
        smoothing: > 0, share of the typical distance below which distances count as equal.
        tolerance: > 0, mean pull at which to stop.
        iterations: how many steps to try, from 1.

    Returns:
        float64, shape (n,), > 0 (or zero off a majority of equal rows), sums to 1.

    Raises:
        BoundError: n < 2f + 1.
        NoConvergenceError: after all steps the pull is still above a hundred times the tolerance. (Where the median
            lies at or near a row the algorithm crawls; what it has then is close enough.)
        NonFiniteGramError: some rows are not finite.
        UsageError: an argument is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("geometric-median", n, f, MAJORITY)
    share, stop = as_positive("smoothing", smoothing), as_positive("tolerance", tolerance)
    steps = as_count("iterations", iterations, 1)
    distances = squared_distances(inner)
    typical = lower_median(distances)
    centre = int(np.argmin(typical))
    scale = float(np.sqrt(typical[centre]))
    if scale == 0:
        return uniform(distances[centre] == 0)
    # Seen from a row in the middle of the cluster, because seen from zero the common part of the updates would cost
    # digits in every step.
    seen = (distances[:, centre][:, None] + distances[centre][None, :] - distances) / 2
    nu = share * scale
    weights: Weights = np.full(n, 1 / n)
    pull = np.inf
    for _ in range(steps):
        inverse = 1 / np.maximum(distances_to(seen, weights), nu)
        following: Weights = inverse / inverse.sum()
        step = following - weights
        pull = float(np.sqrt(max(step @ seen @ step, 0.0)) * inverse.sum() / n)
        weights = following
        if pull <= stop:
            return weights
    if pull <= 100 * stop:
        return weights
    raise NoConvergenceError(
        f"geometric-median reached a mean pull of {pull:.3g} after {steps} iterations, not {stop:.3g}: "
        "raise smoothing or tolerance"
    )


def centred_clipping(
    gram: ArrayLike, f: int, *, radius: float | None = None, steps: int = 1, reference: int | None = None
) -> Weights:
    """Centred clipping (Karimireddy et al. 2021, arXiv:2012.10333, algorithm 2).

    ``v <- v + 1/n sum_i min(1, tau / |x_i - v|) (x_i - v)`` over the n sites, ``steps`` times, starting from 0 or
    from an extra row such as the last aggregate. A site moves v by at most tau / n in a step. Enforced bound:
    n >= 2f + 1; the convergence proof asks for a smaller share of malicious sites.

    Args:
        gram: shape (n, n), or (n + 1, n + 1) with the extra row.
        f: how many sites may be malicious.
        radius: tau > 0, in the units of the updates; if not given, the lower median of the sites' distances from
            the starting point, which with n >= 2f + 1 honest sites bound from both sides.
        steps: from 1.
        reference: the extra row to start from. It is not a site: it is neither counted nor averaged.

    Returns:
        float64, one weight per row of ``gram``. Sites have weights >= 0; with a reference all weights sum to 1,
        without one they sum to at most 1 (the rest lies on 0).

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: an argument is malformed.
    """
    inner = as_gram(gram)
    sites = _sites(inner, reference)
    n = int(np.count_nonzero(sites))
    require_sites("centred-clipping", n, f, MAJORITY)
    weights = (~sites).astype(np.float64)
    tau = float(lower_median(distances_to(inner, weights)[sites])) if radius is None else as_positive("radius", radius)
    for _ in range(as_count("steps", steps, 1)):
        distances = distances_to(inner, weights)
        factors = np.ones(len(inner))
        np.divide(tau, distances, out=factors, where=distances > tau)
        shares = np.where(sites, factors, 0.0) / n
        weights = (1 - shares.sum()) * weights + shares
    return np.asarray(weights)


def monna(gram: ArrayLike, f: int, *, reference: int) -> Weights:
    """Nearest-neighbour averaging: the mean of the n - f rows nearest to a trusted one (Farhadkhani et al. 2023).

    ``w = 1/(n - f) on the n - f smallest |x_i - x_p|`` where p is the trusted row, itself included: the aggregation
    of MoNNA (arXiv:2209.10931), in which every site averages around its own update. Enforced bound: n >= 2f + 1; the
    paper's proof asks for more. With f = 0 this is the mean. Equal distances are taken by lowest row, after p.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.
        reference: the trusted row p. It is one of the n sites and must be honest.

    Returns:
        float64, shape (n,), ``1/(n - f)`` on the chosen rows.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: an argument is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("monna", n, f, MAJORITY)
    distances = squared_distances(inner)[as_row("reference", reference, n)]
    distances[reference] = -1.0
    return uniform(lowest(distances, n - f))


def fltrust(gram: ArrayLike, f: int, *, reference: int) -> Weights:
    """FLTrust: updates that point with a trusted one, scaled to its norm (Cao et al. 2021, arXiv:2012.13995, alg. 2).

    ``w_i = T_i (|x_0| / |x_i|) / sum_j T_j, T_i = max(0, cos(x_i, x_0))`` where x_0 is the coordinator's own update
    on a small clean data set. A zero update has T_i = 0. Bound: n >= f + 1, because trust comes from x_0 and not
    from a majority; f changes nothing else.

    Args:
        gram: shape (n + 1, n + 1), the sites and the trusted row.
        f: how many sites may be malicious.
        reference: row of x_0. It is not a site: its weight is 0.

    Returns:
        float64, shape (n + 1,), >= 0. The weights do not sum to 1; the weighted norms average to ``|x_0|``.

    Raises:
        BoundError: n < f + 1.
        NoTrustError: no site has a positive cosine.
        NonFiniteGramError: some rows are not finite.
        UsageError: an argument is malformed, or the trusted update is zero.
    """
    inner = as_gram(gram)
    sites = _sites(inner, as_row("reference", reference, len(inner)))
    n = int(np.count_nonzero(sites))
    require_sites("fltrust", n, f, ONE_HONEST)
    trust = np.where(sites, np.maximum(cosines(inner, reference), 0.0), 0.0)
    lengths = norms(inner)
    total = float(trust.sum())
    if total == 0:
        raise NoTrustError("fltrust: no update has a positive cosine with the trusted one, so there is nothing to add")
    weights = np.zeros(len(inner))
    np.divide(trust / total * lengths[reference], lengths, out=weights, where=trust > 0)
    return weights


def cosines(gram: Gram, reference: int) -> NDArray[np.float64]:
    """Cosine of every row with one of them, float64, shape (n,), 0 for zero rows.

    Raises:
        UsageError: the reference row is zero.
    """
    lengths = norms(gram)
    if lengths[reference] == 0:
        raise UsageError(f"row {reference} is the trusted reference and has norm 0: it gives no direction")
    result = np.zeros(len(gram))
    # Two divisions, because the product of two small norms can be zero where neither is.
    np.divide(gram[reference] / lengths[reference], lengths, out=result, where=lengths > 0)
    return np.clip(result, -1.0, 1.0)


def spectral_scores(gram: ArrayLike) -> Scores:
    """Squared deviation of every row from the mean along the direction in which the rows vary most.

    ``s_i = lambda u_i^2`` where (lambda, u) is the leading eigenpair of the centred Gram matrix ``J G J``,
    ``J = I - 1 1^T / n``; this is the squared projection on the first principal direction (Tran et al. 2018,
    arXiv:1811.00636; Shejwalkar and Houmansadr 2021, "DnC", algorithm 1). Eigenvalues within 1e-9 of the largest
    count as equal and their projections are added, because their single directions mean nothing.

    Args:
        gram: shape (n, n).

    Returns:
        float64, shape (n,), >= 0, squared units of the updates; all zero if the rows are equal.

    Raises:
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` is malformed.
    """
    return _spectral_scores(as_gram(gram))


def spectral_filter(gram: ArrayLike, f: int) -> tuple[Scores, Mask]:
    """Drop f rows, one after the other, each time the one with the highest :func:`spectral_scores` of what is left.

    One pass would see a single direction: two malicious sites far away in two directions, one much farther than the
    other, would leave the nearer one unseen. Bound: n >= 2f + 1, since the mean of a group in which malicious rows
    are no minority lies on their side. Of equal scores the lowest row is kept, so the highest row is dropped.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious, and how many are dropped.

    Returns:
        scores, float64, shape (n,): for a dropped row the score it was dropped for, for the others that at the end;
        and the mask of the n - f rows that are kept.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("spectral", n, f, MAJORITY)
    scores = np.zeros(n)
    rows = np.arange(n)
    for _ in range(f):
        scores[rows] = _spectral_scores(inner[np.ix_(rows, rows)])
        rows = rows[lowest(scores[rows], len(rows) - 1)]
    scores[rows] = _spectral_scores(inner[np.ix_(rows, rows)])
    keep = np.zeros(n, dtype=np.bool_)
    keep[rows] = True
    return scores, keep


def spectral(gram: ArrayLike, f: int) -> Weights:
    """Spectral filter: the mean of the n - f rows that :func:`spectral_filter` keeps. With f = 0 this is the mean.

    Args:
        gram: shape (n, n), n >= 2f + 1.
        f: how many sites may be malicious.

    Returns:
        float64, shape (n,), ``1/(n - f)`` on the rows kept.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    _, keep = spectral_filter(gram, f)
    return uniform(keep)


def _krum_scores(rule: str, gram: Gram, f: int) -> Scores:
    n = len(gram)
    require_sites(rule, n, f, KRUM_MAJORITY)
    distances = squared_distances(gram)
    # The own distance is taken out by place and not by value: a copy is a neighbour at distance zero and counts.
    others = distances[~np.eye(n, dtype=np.bool_)].reshape(n, n - 1)
    return np.asarray(np.sort(others, axis=1)[:, : n - f - 2].sum(axis=1))


def _spectral_scores(gram: Gram) -> Scores:
    # J G J; the mean of a symmetric matrix's rows is that of its columns.
    rows = gram.mean(axis=0)
    centred = gram - rows[None, :] - rows[:, None] + rows.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    top = float(values[-1])
    if top <= RESOLUTION * float(np.max(np.abs(np.diagonal(gram)))):
        return np.zeros(len(gram))
    leading = values >= top * (1 - _SAME_EIGENVALUE)
    return np.asarray(vectors[:, leading] ** 2 @ values[leading])


def _tightest(distances: NDArray[np.float64], f: int) -> Mask:
    """Rows left after dropping f so that the diameter is smallest, then the sum of squared distances.

    As long as a set is to become smaller in diameter, one end of its longest pair must go: two branches, f deep.
    """
    n = len(distances)
    best: tuple[float, float] = (np.inf, np.inf)
    chosen = np.ones(n, dtype=np.bool_)
    seen: set[bytes] = set()
    pending = [np.ones(n, dtype=np.bool_)]
    while pending:
        mask = pending.pop()
        if (key := mask.tobytes()) in seen:
            continue
        seen.add(key)
        rows = np.flatnonzero(mask)
        block = distances[np.ix_(rows, rows)]
        if len(rows) > n - f:
            first, second = sorted(rows[list(np.unravel_index(np.argmax(block), block.shape))])
            # Of two equal rows both ends are the same; then the highest row goes.
            ends = (first, second) if first != second else (rows[-1],)
            for end in ends:
                smaller = mask.copy()
                smaller[end] = False
                pending.append(smaller)
            continue
        spread = (float(block.max()), float(rounded(block.sum(keepdims=True)).item()))
        if spread < best:
            best, chosen = spread, mask
    return chosen


def _sites(gram: Gram, reference: int | None) -> Mask:
    """Rows that are sites: all but the extra one."""
    mask = np.ones(len(gram), dtype=np.bool_)
    if reference is not None:
        mask[as_row("reference", reference, len(gram))] = False
    return mask
