"""Sybils: several sites that pursue one aim, or one site under several names.

:func:`foolsgold` is the weighting of Fung, Yoon and Beschastnikh, *The Limitations of Federated Learning in Sybil
Settings*, RAID 2020 ([1808.04866](https://arxiv.org/abs/1808.04866)). The paper compares each site's *sum of all
updates so far*. A coordinator that sees Gram matrices only has the products of updates of the same round, never across
rounds, so here the similarity of two sites is the **decayed mean over rounds of the cosine of that round**.

As weights, FoolsGold punishes honest sites for being alike as soon as one other site is not. What is of use here is the
detector, :func:`clusters`: it asks whether a pair is closer than the crowd of pairs shows, which no pair is where all
are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation.gram import as_gram
from quorsum.errors import UsageError

__all__ = ["Similarity", "SybilPolicy", "clusters", "foolsgold", "remembered"]

# Median absolute deviation of a normal variable, as a share of its standard deviation.
_MAD = 0.6745
# Cosines are cut to this before their hyperbolic arctangent, which is 7.25 there.
_LONGEST_COSINE = 1 - 1e-6
# FoolsGold's own cut before the logit.
_LARGEST_TRUST = 0.99


@dataclass(frozen=True)
class SybilPolicy:
    """When two sites are too alike.

    Attributes:
        decay: in [0, 1), how much of the remembered cosine counts against that of the new round.
        rounds: rounds that two sites must have been in together before they are compared.
        deviations: > 0, by how many robust standard deviations the similarity of a pair must exceed the median pair's.
        floor: in [0, 1), similarity below which no pair is too alike, whatever the others do.

    Raises:
        UsageError: a value is out of its range.
    """

    decay: float = 0.8
    rounds: int = 3
    deviations: float = 8.0
    floor: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise UsageError(f"decay must lie at 0 or above and below 1, got {self.decay}")
        if self.rounds < 1:
            raise UsageError(f"rounds must be 1 or more, got {self.rounds}")
        if not self.deviations > 0.0:
            raise UsageError(f"deviations must be above 0, got {self.deviations}")
        if not 0.0 <= self.floor < 1.0:
            raise UsageError(f"floor must lie at 0 or above and below 1, got {self.floor}")


@dataclass(frozen=True)
class Similarity:
    """How alike any two sites were, over the rounds so far.

    Attributes:
        pairs: for two names in alphabetical order, the decayed mean cosine and the number of rounds it is over.
    """

    pairs: Mapping[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))

    def to_json(self) -> list[list[Any]]:
        """Plain values, from which :meth:`from_json` makes an equal one."""
        return [[*pair, *seen] for pair, seen in self.pairs.items()]

    @classmethod
    def from_json(cls, values: list[list[Any]]) -> Similarity:
        """The reverse of :meth:`to_json`.

        Raises:
            TypeError, ValueError: these are no such values.
        """
        return cls({(one, other): (float(cosine), int(rounds)) for one, other, cosine, rounds in values})


def remembered(policy: SybilPolicy, similarity: Similarity, sites: tuple[str, ...], gram: ArrayLike) -> Similarity:
    """The similarity after another round.

    Args:
        policy: how much of the past counts.
        similarity: before the round.
        sites: whose rows these are.
        gram: their inner products, shape (m, m), finite.

    Raises:
        UsageError: the matrix is not one of inner products of so many rows.
    """
    cosines = _cosines(gram)
    if len(cosines) != len(sites):
        raise UsageError(f"a Gram matrix with {len(cosines)} rows is not that of {len(sites)} sites")
    pairs = dict(similarity.pairs)
    for i, one in enumerate(sites):
        for j in range(i):
            pair = (one, sites[j]) if one < sites[j] else (sites[j], one)
            mean, rounds = pairs.get(pair, (0.0, 0))
            # The weight of the first rounds is that of a plain mean.
            keep = min(policy.decay, rounds / (rounds + 1))
            pairs[pair] = keep * mean + (1 - keep) * float(cosines[i, j]), rounds + 1
    return Similarity(pairs)


def clusters(policy: SybilPolicy, similarity: Similarity, sites: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Groups of sites that are more alike than the crowd of pairs shows.

    A pair is too alike if the hyperbolic arctangent of its similarity (Fisher 1915: it makes the spread of a
    correlation independent of the correlation) exceeds the median over all pairs by ``deviations`` robust standard
    deviations, that is, median absolute deviations / 0.6745. Pairs that share a site make one group.

    Of m (m - 1) / 2 pairs, f copies of one update make f (f - 1) / 2 alike, so that they are not the crowd up to about
    f = m / sqrt(2).

    Returns:
        each group sorted, in the order of their first names.
    """
    pairs = [
        (one, other, *similarity.pairs[one, other])
        for one in sorted(sites)
        for other in sorted(sites)
        if one < other and (one, other) in similarity.pairs
    ]
    ready = [(one, other, cosine) for one, other, cosine, rounds in pairs if rounds >= policy.rounds]
    # Below three pairs there is no crowd.
    if len(ready) < 3:
        return ()
    angles = np.arctanh(np.clip([cosine for _, _, cosine in ready], -_LONGEST_COSINE, _LONGEST_COSINE))
    middle = float(np.median(angles))
    spread = float(np.median(np.abs(angles - middle))) / _MAD
    group_of: dict[str, set[str]] = {}
    for (one, other, cosine), angle in zip(ready, angles, strict=True):
        # Where most pairs are equal to the last digits, what differs is rounding.
        if cosine > policy.floor and angle - middle > policy.deviations * max(spread, 1e-9):
            joined = group_of.get(one, {one}) | group_of.get(other, {other})
            group_of.update(dict.fromkeys(joined, joined))
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def foolsgold(similarity: ArrayLike, *, confidence: float = 1.0) -> NDArray[np.float64]:
    """FoolsGold's learning rates, Algorithm 1 of the paper.

    1. v_i = max over j of cs_ij.
    2. *pardoning*: cs_ij becomes cs_ij v_i / v_j where v_j > v_i, so that an honest site is not punished for being
       somewhat like one of a group of sybils.
    3. alpha_i = 1 - max over j of cs_ij, divided by the largest alpha.
    4. *logit*: alpha_i = confidence (ln(alpha_i / (1 - alpha_i)) + 0.5), cut to 0 .. 1.

    As in the authors' code, alphas are cut to 0 .. 0.99 before the logit. Where every alpha is 0 (all are copies), all
    rates are 0.

    Args:
        similarity: cosines, shape (n, n), n >= 2; the diagonal is ignored.
        confidence: kappa > 0.

    Returns:
        float64, shape (n,), in 0 .. 1.

    Raises:
        UsageError: fewer than two rows, or a confidence that is not above zero.
    """
    cosines = as_gram(similarity)
    if len(cosines) < 2:
        raise UsageError("foolsgold compares sites and needs at least two of them")
    if not confidence > 0 or not math.isfinite(confidence):
        raise UsageError(f"confidence must be above 0 and finite, got {confidence}")
    np.fill_diagonal(cosines, -np.inf)
    largest = cosines.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pardon = np.where(largest[None, :] > largest[:, None], largest[:, None] / largest[None, :], 1.0)
    np.fill_diagonal(pardon, 1.0)
    # Who is like nobody has nothing to be pardoned for; a quotient of negative numbers would not be a pardon.
    pardon = np.where((largest[:, None] > 0) & (largest[None, :] > 0), pardon, 1.0)
    trust = np.clip(1 - (cosines * pardon).max(axis=1), 0.0, 1.0)
    if not trust.any():
        return np.zeros(len(cosines))
    trust = np.minimum(trust / trust.max(), _LARGEST_TRUST)
    with np.errstate(divide="ignore"):
        rates = confidence * (np.log(trust / (1 - trust)) + 0.5)
    return np.asarray(np.clip(rates, 0.0, 1.0), dtype=np.float64)


def _cosines(gram: ArrayLike) -> NDArray[np.float64]:
    """Cosines of the angles between rows; those of a row without a norm are 0."""
    matrix = as_gram(gram)
    norms = np.sqrt(np.maximum(np.diagonal(matrix), 0.0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(np.clip(matrix * scale[:, None] * scale[None, :], -1.0, 1.0))
