"""The parameters of the suite ``sealed``: frozen, named, checked.

How many sites it takes, how large the integers may be, and where its guarantees end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

from quorsum.crypto.field import P
from quorsum.crypto.ring import N
from quorsum.errors import BoundError, UsageError

__all__ = [
    "SEALED_V1",
    "FixedPoint",
    "SealedBounds",
    "SealedParameters",
    "default_tau",
    "fixed_point_scale",
    "norm_gate",
    "small_model",
    "smallest_roster",
]


@dataclass(frozen=True)
class SealedParameters:
    """One frozen set of parameters.

    Security is that of ring learning with errors as estimated by the lattice estimator (commit 27a581b) for the secret
    and error that remain after a sum over two honest sites has been opened: half of the variance goes into the
    hint, so keys of deviation 4.53 and errors of 6.40 count as 3.18 and 4.5.

    Attributes:
        name: name of the set.
        p: modulus of the field, the mask and the shares.
        degree: N, degree of the ring and coefficients in a block.
        eta_secret: keys are centred binomial with this eta; deviation sqrt(eta_secret / 2).
        eta_error: errors are centred binomial with this eta; deviation sqrt(eta_error / 2).
        security_bits: cost of the best known attack, log2.
        hinted_key_deviation: deviation of the key that the estimate was made for.
        hinted_error_deviation: deviation of the error that the estimate was made for.
        equations_to_128_bits: exact linear equations on one key that would bring security down to 128 bits; the
            protocol gives at most tau per attempt.
        largest_deviation: cap on the root mean square of an integer coordinate.
        smallest_deviation: below this, rounding and mask errors would drown the update.
        small_dimension: models with fewer parameters leak more; see :meth:`small_model_sentence`.
    """

    name: str
    p: int
    degree: int
    eta_secret: int
    eta_error: int
    security_bits: int
    hinted_key_deviation: float
    hinted_error_deviation: float
    equations_to_128_bits: int
    largest_deviation: float
    smallest_deviation: float
    small_dimension: int

    @property
    def error_variance(self) -> float:
        """Variance of one mask error, eta_error / 2."""
        return self.eta_error / 2

    def blocks(self, dimension: int) -> int:
        """Blocks of an update of ``dimension`` numbers, ``ceil(d / N)``."""
        return -(-dimension // self.degree)

    def small_model_sentence(self, dimension: int) -> str:
        """What it means to seal a model below ``small_dimension``; for the message that asks to accept it."""
        return (
            f"{dimension} parameters are fewer than {self.small_dimension}: each number of a sketch is a signed sum of "
            f"at most {self.blocks(dimension)} of them, so a malicious coordinator with colluding sites, who can learn "
            "a few such numbers of an honest update per attempt, learns nearly single parameters"
        )


SEALED_V1 = SealedParameters(
    name="sealed/v1",
    p=P,
    degree=N,
    eta_secret=41,
    eta_error=82,
    security_bits=248,
    hinted_key_deviation=3.18,
    hinted_error_deviation=4.5,
    equations_to_128_bits=115,
    largest_deviation=2.0**9,
    smallest_deviation=8.0,
    small_dimension=32 * N,
)
"""The only set of parameters of the first version."""

# p >= 2^10 r N d sigma_x^2: squared norms of honest sketches stay a thousand times below the modulus.
_MARGIN = 1 << 10

# An honest sketch exceeds its expected squared norm by 10 % practically never.
_GATE_SLACK = 1.10


def smallest_roster(tau: int, f: int) -> int:
    """Fewest sites with which tau colluding and f malicious ones are tolerated."""
    # 2 tau + 2 f + 1: points on polynomials of degree 2 tau decode with f lies and f silent or removed sites.
    # 3 f + 1: f silent sites cannot keep the others from a quorum; follows from the first where 2 tau >= f.
    return max(2 * tau + 2 * f + 1, 3 * f + 1)


@dataclass(frozen=True)
class SealedBounds:
    """How many sites are invited, may be bad, and must agree. Made by :meth:`of`, which checks.

    Attributes:
        n: sites invited to the round.
        tau: how many of them may pool what they know with a malicious coordinator.
        f: how many of them may be malicious.
        smallest_set: fewest sites whose sum may be opened.
        quorum: signatures that make a root, a view or a ticket the only one.
    """

    n: int
    tau: int
    f: int
    smallest_set: int
    quorum: int

    @classmethod
    def of(cls, n: int, tau: int, f: int) -> Self:
        """Check the bounds and derive what follows from them.

        Args:
            n: sites invited to the round.
            tau: at least 1.
            f: at least 0.

        Raises:
            BoundError: too few sites, or a tau or f that makes no sense; names the bound and the smallest n.
        """
        if tau < 1:
            raise BoundError(f"tau must be at least 1, since a single share opens a key otherwise, got tau = {tau}")
        if f < 0:
            raise BoundError(f"f counts malicious sites and cannot be negative, got f = {f}")
        need = smallest_roster(tau, f)
        if n < need:
            bound = "2 tau + 2 f + 1" if need == 2 * tau + 2 * f + 1 else "3 f + 1"
            raise BoundError(
                f"{n} sites cannot tolerate f = {f} malicious and tau = {tau} colluding ones: n >= {bound} is needed, "
                f"so invite at least {need} sites or tolerate fewer"
            )
        # A named exception: with three sites, a set of two must do, and each of the two learns the other's update.
        smallest_set = 2 if (n, tau, f) == (3, 1, 0) else max(tau, f) + 3
        # Two quorums share more than max(tau, f) sites, hence an honest one: 2 Q - n > max(tau, f).
        return cls(n, tau, f, smallest_set, (n + max(tau, f)) // 2 + 1)


def default_tau(n: int, f: int) -> int:
    """The tau to use where nothing else was asked for: f, and at least 1.

    Raises:
        BoundError: ``n`` sites are too few for it.
    """
    return SealedBounds.of(n, max(1, f), f).tau


class FixedPoint(NamedTuple):
    """How updates become integers.

    Attributes:
        scale: integers per unit of the update.
        sigma_x: root mean square of the integers of an update of the reference norm.
    """

    scale: float
    sigma_x: float


def fixed_point_scale(unit: float, dimension: int, sketches: int) -> FixedPoint:
    """The finest scale that leaves the margin against wrap-around, ``p >= 2^10 r N d sigma_x^2``.

    Only correctly rounded operations are used, so all machines compute the same number.

    Args:
        unit: C > 0, the norm that updates are clipped to.
        dimension: d, at least 1.
        sketches: r, at least 1.

    Raises:
        UsageError: an argument is out of range, or the integers would be so small that noise drowns the update.
    """
    if not (math.isfinite(unit) and unit > 0) or dimension < 1 or sketches < 1:
        raise UsageError(
            f"the scale needs a finite unit > 0, dimension >= 1 and sketches >= 1, got {unit}, {dimension}, {sketches}"
        )
    room = math.sqrt(P / (_MARGIN * sketches * N * dimension))
    sigma_x = min(SEALED_V1.largest_deviation, room)
    if sigma_x < SEALED_V1.smallest_deviation:
        raise UsageError(
            f"{dimension} parameters and {sketches} sketches leave coordinates of {sigma_x:.2f}, and at least "
            f"{SEALED_V1.smallest_deviation:g} is needed; use fewer sketches or train fewer parameters"
        )
    # |x|_2 = scale C = sigma_x sqrt(d)
    scale = sigma_x * math.sqrt(dimension) / unit
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"a unit of {unit} is outside the range of fixed-point numbers; rescale the updates")
    return FixedPoint(scale, sigma_x)


def norm_gate(unit: float, scale: float, sketches: int, blocks: int) -> int:
    """The largest squared norm, summed over the sketches, that an honest sealed update can have.

    ``1.10 r (C^2 scale^2 + (eta_error / 2) N B)``, rounded down: the clipped update, and the mask errors that add to it
    in every coefficient of every block, the filled-up end of the last one included.

    Args:
        unit: C, the norm that updates are clipped to.
        scale: integers per unit.
        sketches: r.
        blocks: B.
    """
    length = unit * scale
    return math.floor(_GATE_SLACK * sketches * (length * length + SEALED_V1.error_variance * N * blocks))


def small_model(dimension: int) -> bool:
    """Whether sketches say much about single parameters; see :meth:`SealedParameters.small_model_sentence`."""
    return dimension < SEALED_V1.small_dimension
