"""Attacks that spoil the model as a whole: pure functions of vectors and a generator.

Updates are flat vectors x of dimension d; ``honest`` has one row for each of the h honest updates. mu and sigma are
their mean and their standard deviation, coordinate by coordinate. Everything is worked out in float64.
``simulation/attacks.py`` gives these functions their names and options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError

__all__ = [
    "PERTURBATIONS",
    "alie",
    "alie_shift",
    "alie_z_max",
    "fang_krum",
    "fang_trimmed_mean",
    "free_rider",
    "gaussian",
    "ipm",
    "mimic",
    "mimicked",
    "min_max",
    "min_sum",
    "one_nan",
    "scaled",
    "squared_distances",
]

Floats: TypeAlias = NDArray[np.float64]
AnyFloats: TypeAlias = NDArray[np.floating]

# Where the attackers are too few for the paper's z, which is then 0 and no attack, they shift by this instead.
_ALIE_Z = 1.5

# The factor b of Fang et al. 2020, section 3.3, and where their search for lambda gives up (section 3.2).
_FANG_FACTOR = 2.0
_FANG_LEAST = 1e-5

# Keeps a division defined whose numerator is 0 as well.
_TINY = float(np.finfo(np.float64).tiny)


def scaled(own: AnyFloats, factor: float) -> AnyFloats:
    """``factor * x``: sign flip below 0 (Li et al., "RSA", AAAI 2019), scaling above 1 (Bagdasaryan et al. 2020)."""
    sent: AnyFloats = np.multiply(own, factor)
    return sent


def gaussian(own: AnyFloats, strength: float, rng: np.random.Generator) -> Floats:
    """``N(0, I) strength |x| / sqrt(d)``: noise, about ``strength`` times as long as x (Blanchard et al., 2017)."""
    # E|N(0, s^2 I)|^2 = s^2 d, so this has about strength times the honest norm.
    deviation = strength * float(np.linalg.norm(own)) / math.sqrt(max(own.size, 1))
    return rng.normal(0.0, deviation, own.size)


def one_nan(own: AnyFloats, rng: np.random.Generator) -> AnyFloats:
    """The update with one coordinate, drawn at random, that is not a number: a crashed site as much as an attacker."""
    sent = own.copy()
    if sent.size:
        sent[int(rng.integers(sent.size))] = math.nan
    return sent


def free_rider(own: AnyFloats, last: AnyFloats | None, *, noise: bool, rng: np.random.Generator) -> Floats:
    """Nothing new: how the model moved in the last round, or noise of that length (Fraboni et al., AISTATS 2021).

    A site that wants the model and has no work to spare for it. Their plain free-rider returns the model unchanged,
    which is the answer here as long as nothing has moved; their disguised one adds noise of the size of an update.

    Args:
        own: an honest update, for its length where no last movement is known, shape ``(d,)``.
        last: how the model moved in the last round, shape ``(d,)``, or None in the first one.
        noise: whether noise is sent in place of the last movement.
        rng: source of the noise.
    """
    if noise:
        return gaussian(own if last is None else last, 1.0, rng)
    return np.zeros(own.size) if last is None else last.astype(np.float64)


def ipm(honest: AnyFloats, epsilon: float) -> Floats:
    """``-epsilon mu``: the inner product manipulation of Xie et al., "Fall of Empires", UAI 2020."""
    # -epsilon mu
    sent: Floats = -epsilon * _mean(honest)
    return sent


def alie(honest: AnyFloats, z: float) -> Floats:
    """``mu - z sigma``: Baruch et al., "A Little Is Enough", NeurIPS 2019, Algorithm 3."""
    rows = honest.astype(np.float64)
    # mu - z sigma
    sent: Floats = rows.mean(axis=0) - z * rows.std(axis=0)
    return sent


def alie_z_max(sites: int, malicious: int) -> float:
    """The largest shift, in deviations, that hides among the honest (Baruch et al. 2019, Algorithm 3).

    With ``s = floor(n / 2 + 1) - m`` honest supporters needed, ``z = Phi^-1((n - m - s) / (n - m))``. It is 0, no shift
    at all, where the attackers are too few to win over anyone (n = 10, m = 2); the attack then takes z = 1.5.

    Raises:
        UsageError: there is no honest majority, so that nothing needs to be hidden.
    """
    honest = sites - malicious
    supporters = sites // 2 + 1 - malicious
    if malicious < 1 or supporters < 1:
        raise UsageError(f"alie needs 1 .. {sites // 2} malicious of {sites} sites, got {malicious}")
    # From 1/2 down the quantile is negative or zero: a shift by z >= 0 in the other direction would be the same attack.
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest)) if honest > supporters else 0.0


def alie_shift(sites: int, malicious: int) -> float:
    """The z of the paper, but at least 1.5.

    Raises:
        UsageError: there is no honest majority.
    """
    return max(alie_z_max(sites, malicious), _ALIE_Z)


def _against_spread(rows: Floats) -> Floats:
    return np.asarray(-rows.std(axis=0), dtype=np.float64)


def _against_mean(rows: Floats) -> Floats:
    mean = rows.mean(axis=0)
    return np.asarray(-mean / max(float(np.linalg.norm(mean)), _TINY), dtype=np.float64)


def _against_signs(rows: Floats) -> Floats:
    return np.asarray(-np.sign(rows.mean(axis=0)), dtype=np.float64)


PERTURBATIONS: Mapping[str, Callable[[Floats], Floats]] = MappingProxyType(
    {"std": _against_spread, "unit": _against_mean, "sign": _against_signs}
)
"""The directions of Shejwalkar & Houmansadr 2021, section IV-B: ``-sigma``, ``-mu / |mu|``, ``-sign(mu)``."""


def min_max(honest: AnyFloats, perturbation: str = "std") -> Floats:
    """``mu + gamma p``, no farther from any honest update than two honest ones are from each other.

    Shejwalkar & Houmansadr, NDSS 2021, equation 8 (AGR-agnostic Min-Max): the largest gamma with
    ``max_i |mu + gamma p - x_i| <= max_ij |x_i - x_j|``. They search for it by halving steps. The condition is one
    quadratic inequality in gamma for each i, so that the largest gamma is the least of their upper roots.

    Args:
        honest: shape ``(h, d)``, h at least 1.
        perturbation: a name in ``PERTURBATIONS``, the direction p.
    """
    rows = honest.astype(np.float64)
    mean, p = rows.mean(axis=0), PERTURBATIONS[perturbation](rows)
    square = float(p @ p)
    if square == 0.0:
        return np.asarray(mean, dtype=np.float64)
    # gamma^2 |p|^2 + 2 gamma <p, mu - x_i> + |mu - x_i|^2 - D = 0; the constant term is <= 0 because a mean of rows is
    # no farther from one of them than the farthest row is.
    away = mean - rows
    half = away @ p
    room = np.maximum(squared_distances(rows).max() - np.einsum("ij,ij->i", away, away), 0.0)
    root = np.sqrt(half**2 + square * room)
    # The same root twice; the second form does not lose its digits where half is large.
    gamma = float(np.min(np.where(half <= 0.0, (root - half) / square, room / np.maximum(root + half, _TINY))))
    return np.asarray(mean + gamma * p, dtype=np.float64)


def min_sum(honest: AnyFloats, perturbation: str = "std") -> Floats:
    """``mu + gamma p``, its squared distances to the honest updates adding up to no more than those of an honest one.

    Shejwalkar & Houmansadr, NDSS 2021, equation 9 (Min-Sum): the largest gamma with
    ``sum_i |mu + gamma p - x_i|^2 <= max_i sum_j |x_i - x_j|^2``. ``sum_i (mu - x_i) = 0``, so that the left side is
    ``sum_i |mu - x_i|^2 + h gamma^2 |p|^2`` and gamma a square root.

    Args:
        honest: shape ``(h, d)``, h at least 1.
        perturbation: a name in ``PERTURBATIONS``, the direction p.
    """
    rows = honest.astype(np.float64)
    mean, p = rows.mean(axis=0), PERTURBATIONS[perturbation](rows)
    square = float(p @ p)
    if square == 0.0:
        return np.asarray(mean, dtype=np.float64)
    room = float(squared_distances(rows).sum(axis=1).max() - np.sum((mean - rows) ** 2))
    return np.asarray(mean + math.sqrt(max(room, 0.0) / (len(rows) * square)) * p, dtype=np.float64)


def fang_trimmed_mean(honest: AnyFloats, rng: np.random.Generator) -> Floats:
    """Just outside the honest values of every coordinate, on the side against the mean.

    Fang et al., USENIX Security 2020, section 3.3, full knowledge, b = 2: where the mean is negative, between the
    largest honest value and the same twice as far up (or half, if it is negative); elsewhere mirrored. Drawn uniformly,
    by each attacker for itself, as in the paper.
    """
    rows = honest.astype(np.float64)
    falling = rows.mean(axis=0) < 0.0
    edge = np.where(falling, rows.max(axis=0), rows.min(axis=0))
    # Beyond the edge, away from the honest values: farther from 0 if the edge is past 0 already, else nearer to it.
    past_zero = np.where(falling, edge > 0.0, edge < 0.0)
    end = np.where(past_zero, edge * _FANG_FACTOR, edge / _FANG_FACTOR)
    return np.asarray(edge + rng.random(edge.size) * (end - edge), dtype=np.float64)


def fang_krum(honest: AnyFloats, malicious: int) -> Floats:
    """``-lambda sign(mu)`` with the largest lambda that Krum selects, found by halving (Fang et al. 2020, section 3.2).

    The search starts at their bound (theorem 1) and ends when Krum selects the attackers, who all send the same, or
    below their 1e-5, whatever comes first. Updates are relative to the model, which is their ``w_Re``.

    Args:
        honest: shape ``(h, d)``, h at least 1.
        malicious: m, at least 1.
    """
    rows = honest.astype(np.float64)
    h, d = rows.shape
    sites = h + malicious
    signs = np.sign(rows.mean(axis=0))
    distances = squared_distances(rows)
    nearest = np.sort(distances, axis=1)[:, : max(1, sites - malicious - 1)].sum(axis=1).min()
    longest = float(np.sqrt(np.einsum("ij,ij->i", rows, rows)).max())
    strength = math.sqrt(nearest / (max(1, sites - 2 * malicious - 1) * max(d, 1))) + longest / math.sqrt(max(d, 1))
    while strength >= _FANG_LEAST and not _krum_selects(rows, distances, -strength * signs, malicious):
        strength /= 2.0
    return np.asarray(-strength * signs, dtype=np.float64)


def _krum_selects(rows: Floats, distances: Floats, sent: Floats, malicious: int) -> bool:
    """Whether Krum with f = m selects one of m copies of ``sent``; below its bound it looks at one neighbour."""
    h = len(rows)
    sites = h + malicious
    every = np.zeros((sites, sites))
    every[:h, :h] = distances
    every[:h, h:] = np.sum((rows - sent) ** 2, axis=1)[:, None]
    every[h:, :h] = every[:h, h:].T
    np.fill_diagonal(every, np.inf)
    scores = np.sort(every, axis=1)[:, : max(1, sites - malicious - 2)].sum(axis=1)
    return int(np.argmin(scores)) >= h


def mimic(honest: AnyFloats, past: Sequence[Floats] = ()) -> Floats:
    """The update of one honest site, always that with the most to say (Karimireddy et al., ICLR 2022, section 3.2).

    Nobody can tell the copies from an honest update. They give that site's data the weight of m + 1 sites, and rules
    that drop outliers then drop those who differ from it.
    """
    return np.asarray(honest[mimicked(honest, past)].astype(np.float64), dtype=np.float64)


def mimicked(honest: AnyFloats, past: Sequence[Floats] = ()) -> int:
    """Number of the honest row with the largest projection on the principal direction of the honest updates.

    The paper learns that direction over the first rounds and copies one site from then on. Here the centred Gram
    matrices of past rounds, as far as they are known, add to that of this round: the projections of the rows on the
    principal direction are, up to a factor, the leading eigenvector of that matrix.

    Args:
        honest: shape ``(h, d)``, h at least 1.
        past: Gram matrices of past rounds, the rows of the same h honest sites first. What is not finite is left out.
    """
    h = len(honest)
    rows = honest.astype(np.float64)
    blocks = [gram[:h, :h] for gram in past if len(gram) >= h]
    known = [_centred(block) for block in (rows @ rows.T, *blocks) if np.isfinite(block).all()]
    if not known:
        return 0
    # Every round counts alike, however long its updates were.
    total = np.sum([gram / max(float(np.trace(gram)), _TINY) for gram in known], axis=0)
    return int(np.argmax(np.abs(np.linalg.eigh(total)[1][:, -1])))


def _centred(gram: Floats) -> Floats:
    return np.asarray(gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean(), dtype=np.float64)


def squared_distances(rows: Floats) -> Floats:
    """Squared distances between rows, shape ``(h, h)``, never below 0."""
    gram = rows @ rows.T
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms - 2.0 * gram, 0.0)


def _mean(honest: AnyFloats) -> Floats:
    return np.asarray(honest.astype(np.float64).mean(axis=0), dtype=np.float64)
