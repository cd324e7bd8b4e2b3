"""Making uploads visible that hold something where honest ones hold zeros.

Honest slots are real, and those beyond the last parameter (the padding of the last ciphertext) are zero. What a site
puts there instead changes the squared norm that is measured and not the sum that is opened: imaginary slots v take
``|v|^2`` away from it, and padding can be so long that the squared norm wraps round the modulus and looks honest.

So the coordinator adds to each measured squared norm a secret random linear function of those places, drawn after all
uploads are in. It is zero for honest uploads. For others it is a random number with a standard deviation of about
``74 |v|`` unit (|v| the norm of what stands there, in units of the update; less by the square root of r for imaginary
parts of sketches): the squared norm comes out absurdly large or negative, for a check of the Gram matrix to find.

It does not see real parameters that are so long that their squared norm wraps; docs/suites.md says what they can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.ckks_parameters import CKKS_V1, ciphertext_count, sketch_count
from quorsum.crypto.ckks_wire import CipherVector, Context, encrypt_complex, load_ciphertext
from quorsum.crypto.randomness import draw
from quorsum.crypto.suite import RandomBytes, RoundContext

__all__ = ["Probe", "draw_probe"]

# A larger weight would find smaller things, and carry more of the encryption errors of the upload, which depend on the
# key, into the released number. With this one the probe's whole error, rounding included, measures 2^-29 of unit^2.
_WEIGHT = 2.0**13


@dataclass(frozen=True)
class Probe:
    """Encrypted weights of one measurement, the same for all of its uploads.

    Attributes:
        sketches: one vector per sketch.
        padding: the vector for the last ciphertext, or None where that is its own sketch or has no padding.
    """

    sketches: tuple[CipherVector, ...]
    padding: CipherVector | None

    def apply(self, worker: Context, sketches: list[CipherVector], last: bytes) -> CipherVector:
        """What is added to the measured squared norm of one upload, rescaled as a product of sketches is.

        Args:
            worker: the context that the coordinator computes in.
            sketches: of this upload.
            last: its last ciphertext.

        Raises:
            RuntimeError: the library refuses a result whose second polynomial is zero.
        """
        # noise: 2^7 sqrt(B) of encryption in each term, on 2^40
        total, *others = [weights * sketch for weights, sketch in zip(self.sketches, sketches, strict=True)]
        if self.padding is not None:
            others.append(self.padding * load_ciphertext(worker, last, size=2, moduli=2))
        for other in others:
            total.add_(other)
        return total


def draw_probe(worker: Context, context: RoundContext, random_bytes: RandomBytes) -> Probe:
    """Draw weights for one measurement and encrypt them.

    They are uniform between -2^13 and 2^13, and between r times that for the padding.

    Args:
        worker: with the public key.
        context: the round.
        random_bytes: source of 16 KiB for each sketch and 16 KiB for the padding.
    """
    # The sites divide by r what they open, and the padding is not in every sketch.
    padding = _weights(random_bytes) * sketch_count(context)
    padding[: context.dimension - (ciphertext_count(context) - 1) * CKKS_V1.slots] = 0.0
    imaginary = [_weights(random_bytes) for _ in range(sketch_count(context))]
    if ciphertext_count(context) == 1:
        return Probe((_encrypted(worker, padding, imaginary[0]),), None)
    nothing = np.zeros(CKKS_V1.slots)
    return Probe(
        tuple(_encrypted(worker, nothing, weights) for weights in imaginary),
        _encrypted(worker, padding, nothing) if padding.any() else None,
    )


def _encrypted(worker: Context, real: NDArray[np.float64], imaginary: NDArray[np.float64]) -> CipherVector:
    slots = np.empty(CKKS_V1.slots, dtype=np.complex128)
    slots.real, slots.imag = real, imaginary
    return encrypt_complex(worker, slots)


def _weights(random_bytes: RandomBytes) -> NDArray[np.float64]:
    raw = np.frombuffer(draw(random_bytes, 4 * CKKS_V1.slots), dtype="<u4")
    # Centred on half steps: no weight is zero.
    return ((raw + 0.5) * 2.0**-31 - 1.0) * _WEIGHT
