"""Whether a dealer's shares lie on polynomials, checked in public without showing them.

After every deal is committed to, the seed gives random ``gamma``. Each holder k publishes, for each dealer i,

* ``sum_c gamma_c s_i(k)[c] + mask_i(k)``, which lies on a polynomial of degree tau, and
* ``sum_j gamma'_j b_i,j(k) + mask'_i(k)``, which lies on one of degree 2 tau that is zero at zero,

if the shares do, and, except with probability 1/p, only if they do. The masks are shared in the same way by the same
dealer, so honest dealers' check values are uniform among those that pass.

Source: batched verification of sharings, Ben-Or, Goldwasser, Wigderson, STOC 1988, with public coins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field
from quorsum.crypto.decoding import decode_word
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds
from quorsum.crypto.sharing import Deal
from quorsum.errors import CoordinatorFault, UsageError

__all__ = [
    "Challenge",
    "CheckAnswer",
    "DealerWord",
    "FieldElements",
    "agreement_needed",
    "challenge_from",
    "check_values",
    "judge_dealers",
]

FieldElements: TypeAlias = Callable[[int], NDArray[np.uint64]]
"""``elements(count)`` gives that many field elements, expanded from the seed."""


@dataclass(frozen=True, eq=False)
class Challenge:
    """The public coefficients of one round's checks, the same for every dealer and holder.

    Attributes:
        gamma: uint64, shape (N,), for the key shares.
        gamma_zeros: uint64, shape (n,), for the shares of zero.
    """

    gamma: NDArray[np.uint64]
    gamma_zeros: NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class CheckAnswer:
    """What one holder publishes about all dealers.

    Attributes:
        values: uint64, shape (m, 2), one row per dealer in the round's order of dealers: the check value of the key
            shares and that of the shares of zero. Rows of dealers in ``complaints`` mean nothing.
        complaints: dealers whose deal the holder could not open or read.
    """

    values: NDArray[np.uint64]
    complaints: frozenset[int] = frozenset()


@dataclass(frozen=True)
class DealerWord:
    """The judgement on one dealer.

    Attributes:
        dealer: its number.
        accepted: whether enough holders' values lie on one polynomial each.
        off: if accepted, the holders in dispute with it: their values are off, or they complained. Else empty, for
            without a word nobody is off it.
    """

    dealer: int
    accepted: bool
    off: frozenset[int]


def challenge_from(elements: FieldElements, n: int) -> Challenge:
    """The challenge of a round of n sites: the first N elements, then n more.

    Args:
        elements: expansion of the seed, which was fixed after all deals were committed to.
        n: number of sites.

    Raises:
        UsageError: the source gave another number of elements.
    """
    size = SEALED_V1.degree
    drawn = elements(size + n)
    if drawn.shape != (size + n,):
        raise UsageError(f"elements({size + n}) gave an array of shape {drawn.shape}")
    return Challenge(drawn[:size], drawn[size:])


def check_values(deal: Deal, challenge: Challenge) -> NDArray[np.uint64]:
    """What a holder publishes about one deal: uint64, shape (2,).

    Raises:
        UsageError: deal and challenge are from rounds of different size.
    """
    if deal.key.shape != challenge.gamma.shape or deal.zeros.shape != challenge.gamma_zeros.shape:
        raise UsageError("the challenge does not fit the deal: it is for another number of sites")
    # sum_c gamma_c s_i(k)[c] + mask_i(k)
    key = (field.dot(challenge.gamma, deal.key) + deal.key_mask) % field.P
    # sum_j gamma'_j b_i,j(k) + mask'_i(k)
    zeros = (field.dot(challenge.gamma_zeros, deal.zeros) + deal.zeros_mask) % field.P
    return np.array([key, zeros], dtype=np.uint64)


def agreement_needed(bounds: SealedBounds) -> int:
    """ceil((n + 2 tau + 1) / 2): how many holders' values must lie on a dealer's word.

    Two sets of this size share 2 tau + 1 holders, of whom tau + 1 are not in league with the coordinator, so that no
    two judges ever see two different keys. The n - f honest holders always suffice.
    """
    return (bounds.n + 2 * bounds.tau + 2) // 2


def judge_dealers(
    bounds: SealedBounds, dealers: Sequence[int], answers: Mapping[int, CheckAnswer], own: int | None = None
) -> tuple[DealerWord, ...]:
    """Judge every dealer by the holders' signed answers.

    The judgement depends on nothing but the arguments; judges with the same answers judge alike, whoever they are.

    Args:
        bounds: n and tau of the round.
        dealers: numbers of the dealers, in the round's order.
        answers: for each holder that answered, what it published; signatures are already verified.
        own: the number of the judging site, whose answer must be among them; None at the coordinator.

    Returns:
        one word for each dealer, in their order.

    Raises:
        CoordinatorFault: ``own-answer-missing``: the judging site's own answer was left out.
        UsageError: a number is not from 1 to n or repeated, or an answer does not have one row per dealer.
    """
    _check_numbers(bounds.n, dealers, answers)
    if own is not None and own not in answers:
        raise CoordinatorFault(
            "own-answer-missing", "the check answer of this site was left out; it must be among those it judges by"
        )
    return tuple(_judge(bounds, dealer, place, answers) for place, dealer in enumerate(dealers))


def _judge(bounds: SealedBounds, dealer: int, place: int, answers: Mapping[int, CheckAnswer]) -> DealerWord:
    needed = agreement_needed(bounds)
    holders = [holder for holder in sorted(answers) if dealer not in answers[holder].complaints]
    rejected = DealerWord(dealer, False, frozenset())
    # h - e >= needed and h <= n imply e <= (h - 2 tau - 1) / 2: unique decoding finds all that can be accepted.
    key_values = [int(answers[holder].values[place, 0]) for holder in holders]
    key = decode_word(key_values, holders, bounds.tau)
    # q(0) = 0 and deg q <= 2 tau if and only if q(x) = x g(x) with deg g <= 2 tau - 1. A value that is no field
    # element stays one that is none.
    zero_values = [
        value if value >= field.P else value * pow(holder, -1, field.P) % field.P
        for holder in holders
        for value in [int(answers[holder].values[place, 1])]
    ]
    zeros = decode_word(zero_values, holders, 2 * bounds.tau - 1)
    if key is None or zeros is None:
        return rejected
    agreeing = {holders[i] for i in set(key.agreeing) & set(zeros.agreeing)}
    if len(agreeing) < needed:
        return rejected
    return DealerWord(dealer, True, frozenset(answers) - agreeing)


def _check_numbers(n: int, dealers: Sequence[int], answers: Mapping[int, CheckAnswer]) -> None:
    known = range(1, n + 1)
    if len(set(dealers)) != len(dealers) or any(dealer not in known for dealer in dealers):
        raise UsageError(f"dealers must be distinct numbers from 1 to {n}, got {list(dealers)}")
    for holder, answer in answers.items():
        if holder not in known:
            raise UsageError(f"holders must be numbers from 1 to {n}, got {holder}")
        if answer.values.shape != (len(dealers), 2) or not answer.complaints <= set(dealers):
            raise UsageError(
                f"the answer of holder {holder} must have shape {(len(dealers), 2)} and complain of dealers only"
            )
