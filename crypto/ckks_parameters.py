"""The frozen parameters of the suite ``ckks`` and what follows from them.

Letters: N ring degree, q modulus of a fresh ciphertext, q1 modulus after one rescaling, Delta scale, d number
of parameters of the model, C the unit of the round, r sketches, B = ceil(d / 4096) ciphertexts per update.

How numbers are laid out. A site packs ``64 x / C`` (after flattening) into the slots, so the squares of
all slots of an update of norm C add up to 4096 and the mean over the slots of a product of two updates
is ``<x, y> / C^2``. That mean is one coefficient of the plaintext polynomial, the constant one; all
others can be hidden without touching it.

Two levels, no key switching. Fresh: q = q1 q2 of 120 bits, scale 2^50. A product (of two ciphertexts, or of a
ciphertext and a weight) has scale 2^100 and is rescaled once: it loses q2, half of its bytes, and is
left with q1 of 60 bits at scale 2^40 (sketches) or 2^51 (sums, whose weights are lifted by 2^11).
The library then labels both 2^50; ``GRAM_LABEL`` and ``SUM_LABEL`` put that right. (q2 differs from 2^60 by
less than one part in 10^13.)

Range. A value wraps round when a coefficient passes q1 / 2 = 2^59:

* Gram: the constant coefficient is r <z, z> / C^2 at scale 2^40, so r <z, z> must stay below 2^19 C^2.
* Sum: a coefficient of a block is at most the root mean square of its slots, hence at most |x| / C even if the
  whole update sits in one block; weights are divided by the sum of their magnitudes; at scale 2^51 the
  norm of the longest update must stay below 2^8 C.

An update may be at most ``MAX_NORM`` = 64 units long: r <x, x> = 2^14 C^2 for r = 4 leaves a factor of 32 for the
spread of the sketches, and the sum a factor of 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quorsum.crypto.suite import RoundContext

__all__ = [
    "BATCH",
    "CKKS_V1",
    "GRAM_LABEL",
    "MAX_NORM",
    "SUM_LABEL",
    "WEIGHT_LIFT",
    "CkksParameters",
    "ciphertext_count",
    "gram_step",
    "sketch_count",
    "slot_factor",
    "sum_step",
]


@dataclass(frozen=True)
class CkksParameters:
    """Parameters of the cipher, in the words of the library.

    Attributes:
        degree: N, ring degree.
        moduli_bits: bits of q1, q2 and of the special prime (which serves keys only).
        scale_bits: log2 of the scale Delta of a fresh ciphertext.
    """

    degree: int
    moduli_bits: tuple[int, ...]
    scale_bits: int

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree // 2

    @property
    def scale(self) -> float:
        """Delta."""
        return 2.0**self.scale_bits


CKKS_V1 = CkksParameters(degree=8192, moduli_bits=(60, 60, 60), scale_bits=50)
"""180 bits of modulus at N = 8192, where the homomorphic encryption standard allows 218 for 128-bit security."""

BATCH = 64
"""Ciphertexts in one block on the wire: 16 MiB of fresh ones, 8 MiB of rescaled ones."""

MAX_NORM = 64.0
"""Longest update that can be sealed, in units."""

WEIGHT_LIFT = 2.0**11
"""Weights are multiplied by this: a sum has room that a Gram entry has not, and the room buys precision."""

GRAM_LABEL = 2.0**10
"""True value of a rescaled product of ciphertexts, divided by what its label makes of it."""

SUM_LABEL = 2.0**-1
"""True value of a rescaled weighted ciphertext, divided by what its label makes of it."""

# Released values are rounded to a grid this many times finer than their noise, so that rounding adds next to nothing.
_STEPS = 16
_GRAM_NOISE = 2.0**-12
_SUM_NOISE = 2.0**-10


def ciphertext_count(context: RoundContext) -> int:
    """B, the ciphertexts of one update."""
    return -(-context.dimension // CKKS_V1.slots)


def sketch_count(context: RoundContext) -> int:
    """r, or 1 where an update fits one ciphertext, which then is its own exact sketch."""
    return 1 if ciphertext_count(context) == 1 else context.sketches


def slot_factor(context: RoundContext) -> float:
    """What updates are multiplied by before they are packed: 64 / C, 64 being sqrt(slots)."""
    return math.sqrt(CKKS_V1.slots) / context.unit


def gram_step(context: RoundContext) -> tuple[float, float]:
    """Grid step of a released Gram entry and standard deviation of its noise, in units of C^2.

    The noise is 2^-12, whatever the model.
    """
    return _GRAM_NOISE / _STEPS, _GRAM_NOISE


def sum_step(context: RoundContext) -> tuple[float, float]:
    """Grid step of a released slot of the sum and standard deviation of its noise, in slot values.

    The noise is 2^-10 of the root mean square coordinate of an update of norm C.
    """
    noise = _SUM_NOISE * math.sqrt(CKKS_V1.slots / context.dimension)
    return noise / _STEPS, noise
