"""Finding the honest answer among several to the same question.

Honest sites release the same integers, except that the last step may differ between machines, because
floating-point transforms do. So two answers *agree* when no entry differs by more than one step. At most f
sites lie: a group of f + 1 that agree contains an honest one, and what it says is the honest answer
to within one step. With 2 f + 1 answers there always is such a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.suite import Blocks, Site
from quorsum.errors import RoundFailed, SiteFault

__all__ = ["Ballot", "Verdict", "count_votes", "read_ballots"]


@dataclass(frozen=True)
class Ballot:
    """The readable answers to one question, and the faults of the others.

    Attributes:
        answers: per site, integers in grid steps, shape (count,).
        faults: sites that answered unreadably.
    """

    answers: Mapping[Site, NDArray[np.signedinteger]]
    faults: Mapping[Site, SiteFault]


@dataclass(frozen=True)
class Verdict:
    """What the largest agreeing group says.

    Attributes:
        value: integers in grid steps, shape (count,).
        agreeing: who said so, sorted.
        faults: who said something else.
    """

    value: NDArray[np.signedinteger]
    agreeing: tuple[Site, ...]
    faults: Mapping[Site, SiteFault]


def read_ballots(answers: Mapping[Site, Blocks], count: int, dtype: str) -> Ballot:
    """Decode answers that must each be ``count`` little-endian integers in one block.

    Args:
        answers: what came back.
        count: number of integers expected.
        dtype: NumPy name of the integer type, such as ``"<i8"``.
    """
    expected = count * np.dtype(dtype).itemsize
    readable: dict[Site, NDArray[np.signedinteger]] = {}
    faults: dict[Site, SiteFault] = {}
    for site, blocks in answers.items():
        if len(blocks) != 1 or len(blocks[0]) != expected:
            got = ", ".join(str(len(block)) for block in blocks) or "none"
            faults[site] = SiteFault(
                site, "wrong-shape", f"its answer must be one block of {expected} bytes, got blocks of bytes: {got}"
            )
        else:
            readable[site] = np.frombuffer(blocks[0], dtype=dtype)
    return Ballot(readable, faults)


def _agree(a: NDArray[np.signedinteger], b: NDArray[np.signedinteger]) -> bool:
    # Compared with a shifted by one step either way instead of subtracting, since a liar's b may be so
    # far away that the difference would wrap round. Honest answers never reach the ends of the type.
    info = np.iinfo(a.dtype)
    low = np.where(a == info.min, a, a - 1)
    high = np.where(a == info.max, a, a + 1)
    return bool(np.all((b >= low) & (b <= high)))


def count_votes(
    answers: Mapping[Site, NDArray[np.signedinteger]], tolerate: int, known: Mapping[Site, SiteFault] | None = None
) -> Verdict:
    """Find what more than ``tolerate`` sites agree on.

    Args:
        answers: per site, integers of one shape and type.
        tolerate: f, how many of the sites may lie.
        known: faults of sites whose answers did not get this far, passed on when the vote fails.

    Raises:
        RoundFailed: no group of f + 1 agrees, or two groups that contradict each other do (then more
            sites lie, or hold other keys, than the round tolerates).
    """
    sites = sorted(answers)
    groups = {centre: tuple(s for s in sites if _agree(answers[centre], answers[s])) for centre in sites}
    need = tolerate + 1
    # max() keeps the first of equals, so ties between members of one group fall to the smallest name.
    centre = max(sites, key=lambda site: len(groups[site]), default=None)
    if centre is None or len(groups[centre]) < need:
        best = 0 if centre is None else len(groups[centre])
        raise RoundFailed(
            f"only {best} of {len(sites)} answers agree and {need} are needed; "
            "check that all sites hold the same key and are reachable, then run the round again",
            dict(known or {}),
        )
    agreeing = set(groups[centre])
    rivals = [s for s in sites if len(groups[s]) >= len(agreeing) and agreeing.isdisjoint(groups[s])]
    if rivals:
        raise RoundFailed(
            f"the answers fall into two groups of {len(agreeing)} that contradict each other, so more than "
            f"{tolerate} sites lie or hold another key; compare the key fingerprints of all sites",
            dict(known or {}),
        )
    faults = {
        site: SiteFault(
            site, "outvoted", f"its answer differs from that of {len(agreeing)} others: it lies or holds another key"
        )
        for site in sites
        if site not in agreeing
    }
    return Verdict(answers[centre], tuple(sorted(agreeing)), faults)
