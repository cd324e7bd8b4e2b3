"""Crowd clipping: updates are shortened to a common length, and those that come as a crowd share one voice.

Where sites hold very different data, honest updates point in different directions and their mean is short. f malicious
updates that all point the same way outweigh it, however they are clipped, and rules that drop the farthest drop the
only holders of some class. But then malicious updates are more alike than honest ones are, and need to be: what each
says against the honest mean it says in the same direction. The more they spread to hide that, the less they add up to.

So an update counts the less, the more others are alike to it *beyond what honest sites show*. Where all honest sites
are alike themselves, nobody is beyond it, and the rule is centred clipping around zero (Karimireddy et al. 2021). The
weight of a crowd is an idea of FoolsGold (Fung et al. 2020, arXiv:1808.04866), which measures against zero and so
punishes honest sites for being alike.

Two limits. Malicious updates that are *not* alike keep their voices: f of them with cosines of c or less add up to as
much as sqrt(f (1 + (f - 1) c)) updates, and one of them can raise c a little by leaning towards honest ones. And up to
f + 1 honest sites that are alike among sites that are not look like a crowd: where all sites come in kinds of at most
f + 1, each kind has one voice, and f malicious updates weigh more than under centred clipping.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.gram import (
    MAJORITY,
    RESOLUTION,
    Gram,
    Mask,
    Weights,
    as_gram,
    as_positive,
    lower_median,
    norms,
    require_sites,
    rounded,
)

__all__ = ["alikeness", "apart", "crowd_clipping"]

# Two updates that are more alike than this count as one voice where a voice cannot be halved.
_ONE_VOICE = 0.5


def alikeness(gram: ArrayLike, f: int) -> NDArray[np.float64]:
    """How alike any two updates are beyond what honest ones show, 0 .. 1.

    ``s_ij = max(0, (c_ij - c) / (1 - c))`` with the cosines ``c_ij``, and c the largest over i of row i's (f + 1)-th
    highest cosine with another row, or 0 if that is negative. Of f + 1 rows other than i at least one is honest, so
    that f malicious sites that are alike to each other, or to one honest site, do not raise c; one that lies between
    honest updates does. No row is too alike to more than f others. With f = 0 nobody is too alike.

    With n = 2f + 1 an honest row has f honest others only, and c is that of the f-th highest cosine. Then malicious
    copies do raise c, which at worst leaves centred clipping.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.

    Returns:
        float64, shape (n, n), symmetric, ones on the diagonal.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    inner = as_gram(gram)
    n = len(inner)
    require_sites("crowd-clipping", n, f, MAJORITY)
    if f == 0:
        return np.eye(n)
    cosines = _cosines(inner)
    others = np.sort(cosines[~np.eye(n, dtype=np.bool_)].reshape(n, n - 1), axis=1)
    # An honest row has n - f - 1 honest others. Further down stands what malicious rows chose: by keeping away they
    # would lower c, and honest rows that are alike would lose their voices.
    honest = max(0.0, float(others[:, -min(f + 1, n - f - 1)].max()))
    beyond = np.zeros((n, n))
    if honest < 1.0 - RESOLUTION:
        beyond = np.clip((cosines - honest) / (1.0 - honest), 0.0, 1.0)
    np.fill_diagonal(beyond, 1.0)
    return beyond


def crowd_clipping(gram: ArrayLike, f: int, *, radius: float | None = None) -> Weights:
    """``w_i = min(1, tau / |x_i|) / (n sum_j s_ij)``, with s from :func:`alikeness`.

    k updates that are copies of each other weigh as much together as one; without crowds it is one step of centred
    clipping around zero. What a site sends adds at most tau / n to the aggregate; besides, it can take from others
    what they share with it, but nobody's voice is below 1 / (f + 1). Enforced bound: n >= 2f + 1.

    Args:
        gram: shape (n, n).
        f: how many sites may be malicious.
        radius: tau > 0, in the units of the updates; if not given, the lower median of their norms.

    Returns:
        float64, shape (n,), weights >= 0 that sum to at most 1.

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: an argument is malformed.
    """
    inner = as_gram(gram)
    voices = 1.0 / alikeness(inner, f).sum(axis=1)
    lengths = norms(inner)
    tau = float(lower_median(lengths)) if radius is None else as_positive("radius", radius)
    factors = np.ones(len(inner))
    np.divide(tau, lengths, out=factors, where=lengths > tau)
    return np.asarray(voices * factors / len(inner))


def apart(gram: ArrayLike, f: int) -> Mask:
    """The rows as a selection in which no two are alike beyond one half, for suites that cannot weigh.

    Rows are taken in, the least crowded first and then the lowest, if they are not alike to one that is in already. At
    least n / (f + 1) rows stay. A row that is alike to honest ones by a little more than one half can stay in their
    place, up to f of them if they are alike themselves.

    Returns:
        bool, shape (n,).

    Raises:
        BoundError: n < 2f + 1.
        NonFiniteGramError: some rows are not finite.
        UsageError: ``gram`` or ``f`` is malformed.
    """
    beyond = rounded(alikeness(gram, f))
    kept = np.zeros(len(beyond), dtype=np.bool_)
    for row in np.argsort(rounded(beyond.sum(axis=1)), kind="stable"):
        kept[row] = not np.any(beyond[row, kept] > _ONE_VOICE)
    return kept


def _cosines(gram: Gram) -> NDArray[np.float64]:
    """Cosine of every two rows, 0 with a row that is zero."""
    lengths = norms(gram)
    safe = np.where(lengths > 0, lengths, 1.0)
    # Two divisions, because the product of two small norms can be zero where neither is.
    cosines = np.where(np.outer(lengths > 0, lengths > 0), gram / safe[:, None] / safe[None, :], 0.0)
    return np.asarray(rounded(np.clip((cosines + cosines.T) / 2, -1.0, 1.0)))
