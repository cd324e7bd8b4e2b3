"""What coordinator and sites both work out in a sealed round, so that both get the same.

Everything here is a function of public things: the context, the seed, signed answers. A site repeats with it what the
coordinator has done, and puts its name under the result only if it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field, labels
from quorsum.crypto.decoding import decode
from quorsum.crypto.elimination import Elimination, eliminate
from quorsum.crypto.exact_checks import exact_checks
from quorsum.crypto.labels import tagged
from quorsum.crypto.merkle import merkle_root
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds, fixed_point_scale, norm_gate, smallest_roster
from quorsum.crypto.share_checks import CheckAnswer, judge_dealers
from quorsum.crypto.sketch import SketchPlan, sketch_plan
from quorsum.crypto.suite import RoundContext, Site
from quorsum.errors import RoundFailed, UsageError

__all__ = [
    "Geometry",
    "Select",
    "block_count",
    "bounds_of",
    "geometry",
    "pairs_of",
    "plan_of",
    "root_of",
    "scale_of",
    "seed_of",
    "settle_disputes",
    "view_of",
    "witnesses_of",
]


class Select(Protocol):
    """The robust selection, the same at both ends."""

    def __call__(
        self, context: RoundContext, sites: tuple[Site, ...], gram: NDArray[np.float64], tolerate: int
    ) -> frozenset[Site]:
        """The set S.

        Args:
            context: the round; it names the rule, and the reference where the rule needs one.
            sites: whose rows these are.
            gram: float64, shape (m, m), in the squared units of updates.
            tolerate: how many of these sites may be malicious.

        Raises:
            RoundFailed: nothing can be selected.
        """

    def check(self, context: RoundContext) -> None:
        """Whether sites can repeat the selection that the context names.

        Raises:
            CoordinatorFault: they cannot.
        """


@dataclass(frozen=True)
class Geometry:
    """The opened geometry of a sealed round.

    Attributes:
        sites: dealers whose rows remain, in roster order.
        exact: their Gram matrix of the sketches, exact integers, shape (m, m).
        gram: float64, shape (m, m), per sketch and in the squared units of updates.
        reasons: for each dealer whose row was taken out, one sentence.
        guessed: those of them of whom it is not certain that they are malicious.
        liars: holders whose points were wrong.
        tolerate: how many of ``sites`` may still be malicious.
    """

    sites: tuple[Site, ...]
    exact: tuple[tuple[int, ...], ...]
    gram: NDArray[np.float64]
    reasons: Mapping[Site, str]
    guessed: frozenset[Site]
    liars: frozenset[Site]
    tolerate: int


def bounds_of(context: RoundContext) -> SealedBounds:
    """The bounds of a round.

    Raises:
        BoundError: too few sites for tau and f.
        UsageError: the context does not clip, or its keys do not fit its sites.
    """
    if not context.clip:
        raise UsageError("a sealed round clips: without a norm bound a sum could wrap round the modulus")
    if len(context.keys) != len(context.sites) or len(set(context.keys)) != len(context.keys):
        raise UsageError("a sealed round needs one distinct key for each site")
    return SealedBounds.of(len(context.sites), context.collude, context.tolerate)


def witnesses_of(context: RoundContext) -> int:
    """How many sites must sign the view before anybody gives points: Q, and in a later attempt a roster's worth.

    A later attempt's roster may list sites that have signed a ticket and answer no more. They would count towards the
    bounds, and so few others could open a second sum that the two differ in one or two updates.
    """
    bounds = bounds_of(context)
    return max(bounds.quorum, smallest_roster(bounds.tau, bounds.f) if context.attempt > 1 else 0)


def block_count(context: RoundContext) -> int:
    """B = ceil(d / N)."""
    return -(-context.dimension // SEALED_V1.degree)


def scale_of(context: RoundContext) -> float:
    """Factor from updates to integers."""
    return fixed_point_scale(context.unit, context.dimension, context.sketches)[0]


def root_of(context: RoundContext, commitments: Mapping[Site, bytes]) -> bytes:
    """Digest of all submissions; every site is given the whole list and recomputes it."""
    return tagged(labels.ROOT, context.digest(), merkle_root(commitments))


def seed_of(root: bytes, nonce: bytes) -> bytes:
    """Seed of the sketches: nobody knows it before the root is fixed."""
    return tagged(labels.SEED, root, nonce)


def plan_of(context: RoundContext, seed: bytes) -> SketchPlan:
    """Signs and rotations of the r sketches."""
    return sketch_plan(seed, block_count(context), context.sketches)


def view_of(context: RoundContext, root: bytes, seed: bytes, dealers: Sequence[Site], sketches: bytes) -> bytes:
    """Digest of everything that points are computed from: root, seed, dealers, and all sketched uploads Y."""
    return tagged(labels.VIEW, context.digest(), root, seed, "\n".join(dealers).encode(), sketches)


def pairs_of(dealers: Sequence[Site]) -> list[tuple[int, int]]:
    """Pairs i <= j of dealer positions, in the order in which points travel."""
    return list(combinations_with_replacement(range(len(dealers)), 2))


def settle_disputes(
    context: RoundContext, dealers: Sequence[Site], answers: Mapping[Site, CheckAnswer]
) -> tuple[Elimination, tuple[Site, ...], tuple[Site, ...]]:
    """Who remains a holder and whose sharing is accepted, by the fixed rule of player elimination.

    A check answer is signed over the view, by a site that has found its own submission under the root and its own
    sketch in the view. A dealer without one is not accepted: the coordinator may have made up its submission, or its
    sketch, and every made-up sketch would show a number of its choice about every other.

    Returns:
        the elimination, the holders, and the accepted dealers, both in roster order.

    Raises:
        RoundFailed: more disputes than malicious sites can cause.
    """
    bounds = bounds_of(context)
    number = {site: place + 1 for place, site in enumerate(context.sites)}
    numbered = {number[site]: answer for site, answer in answers.items()}
    words = judge_dealers(bounds, [number[site] for site in dealers], numbered)
    result = eliminate(bounds, words, numbered)
    holders = tuple(site for site in context.sites if number[site] in result.holders)
    accepted = tuple(site for site in dealers if site in answers and number[site] in result.dealers)
    return result, holders, accepted


def geometry(
    context: RoundContext,
    dealers: Sequence[Site],
    points: Mapping[Site, NDArray[np.uint64]],
    tolerate: int,
    random_bytes: Callable[[int], bytes],
) -> Geometry:
    """Decode the Gram matrix from the holders' points and take out rows that no honest update can have.

    Args:
        context: the round.
        dealers: the accepted dealers, m of them.
        points: from each holder that answered, its m (m + 1) / 2 points.
        tolerate: f less the edges removed by elimination: how many holders may lie. Of the dealers up to f may still be
            malicious, since a dispute costs a site its place as a holder and not its update.
        random_bytes: source of the decoder's combination; the result does not depend on it.

    Raises:
        RoundFailed: too few right points, or no honest set of updates has this matrix.
    """
    number = {site: place + 1 for place, site in enumerate(context.sites)}
    decoded = decode(
        {number[site]: values for site, values in points.items()}, 2 * context.collude, tolerate, random_bytes
    )
    size = len(dealers)
    exact = [[0] * size for _ in range(size)]
    for (i, j), value in zip(pairs_of(dealers), field.centred(decoded.values), strict=True):
        exact[i][j] = exact[j][i] = int(value)
    scale = scale_of(context)
    verdict = exact_checks(
        exact, norm_gate(context.unit, scale, context.sketches, block_count(context)), context.tolerate
    )
    rows = verdict.rows
    if not rows:
        raise RoundFailed("no update of this round can be used")
    kept = tuple(tuple(exact[i][j] for j in rows) for i in rows)
    gram = np.array(kept, dtype=np.float64) / (context.sketches * scale**2)
    return Geometry(
        sites=tuple(dealers[row] for row in rows),
        exact=kept,
        gram=gram,
        reasons={dealers[row]: reason for row, reason in verdict.reasons.items()},
        guessed=frozenset(dealers[row] for row in verdict.guessed),
        liars=frozenset(context.sites[holder - 1] for holder in decoded.liars),
        tolerate=verdict.tolerate,
    )
