"""Settling disputes without knowing who is right: both sides leave as holders.

Two honest sites never are in dispute, so of every two sites that leave at least one is malicious: n falls by two, f
by at least one, and n >= 2 tau + 2 f + 1 still holds for those who remain. Leaving as a holder does not cost a site
its update: a dealer's update leaves only if a holder who remains still disagrees with it. For an honest dealer that
takes two malicious sites, one that leaves with it and one that remains.

Source: player elimination, Hirt, Maurer, Przydatek, ASIACRYPT 2000.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quorsum.crypto.sealed_parameters import SealedBounds
from quorsum.crypto.share_checks import DealerWord
from quorsum.errors import RoundFailed, UsageError

__all__ = ["Elimination", "eliminate"]


@dataclass(frozen=True)
class Elimination:
    """Who takes part in the rest of the round, and how.

    Attributes:
        holders: whose points and sum shares are used, ascending.
        edges: the disputes that were settled, each (smaller, larger); both ends left as holders.
        dealers: whose updates are measured, in the order in which they were judged.
        f_left: f', how many of the holders may still be malicious.
    """

    holders: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    dealers: tuple[int, ...]
    f_left: int


def eliminate(bounds: SealedBounds, words: Sequence[DealerWord], answered: Collection[int]) -> Elimination:
    """Settle the disputes of a round.

    The edges that are settled are the lexicographically greedy maximal matching of the dispute graph: pairs are taken
    in ascending order, unless one end is taken already. Disputes with dealers that are not accepted are not settled:
    their shares are not used. A site at odds with its own word has nobody else to leave with; its update is left out.

    Args:
        bounds: n, tau and f of the round.
        words: the judgement on each dealer.
        answered: the holders that answered the check. The others' shares are unchecked, so they do not remain.

    Raises:
        RoundFailed: more disputes than f malicious sites can cause.
        UsageError: a number is not from 1 to n, a dealer is judged twice, or a holder in dispute did not answer.
    """
    known = range(1, bounds.n + 1)
    accepted = [word for word in words if word.accepted]
    numbers = [word.dealer for word in words]
    if len(set(numbers)) != len(numbers) or any(number not in known for number in (*numbers, *answered)):
        raise UsageError(f"dealers must be distinct and all sites numbered from 1 to {bounds.n}")
    if any(not word.off <= set(answered) for word in words):
        raise UsageError("a holder is in dispute that has not answered")
    disputes = {
        (min(word.dealer, holder), max(word.dealer, holder))
        for word in accepted
        for holder in word.off
        if holder != word.dealer
    }
    edges: list[tuple[int, int]] = []
    gone: set[int] = set()
    for pair in sorted(disputes):
        if gone.isdisjoint(pair):
            edges.append(pair)
            gone.update(pair)
    if len(edges) > bounds.f:
        listed = ", ".join(f"{a}-{b}" for a, b in edges)
        raise RoundFailed(
            f"{len(edges)} separate pairs of sites are in dispute ({listed}), more than {bounds.f} malicious sites can "
            "cause; more sites are malicious than the round tolerates, or deals were damaged on their way"
        )
    holders = tuple(sorted(set(answered) - gone))
    dealers = tuple(word.dealer for word in accepted if word.off.isdisjoint(holders))
    return Elimination(holders, tuple(edges), dealers, bounds.f - len(edges))
