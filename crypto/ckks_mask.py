"""Hiding everything but the sum of the slots of a product.

Sites decrypt ``P = sum_k z_i^k z_j^k`` to learn one number, the sum of its slots (their real parts, which is the
constant coefficient of the polynomial). Handed over as it is, P gives away more, in two ways:

* its other coefficients tell the products of single numbers of two sketches;
* its polynomials are products of polynomials of the uploads. A site knows those of its own upload and can
  divide by them, and with the secret key it then reads the other site's sketch (the whole update, if
  that fits one ciphertext). Rescaling takes half of the digits away and so blurs this; nothing proves that
  it blurs it enough.

So the coordinator adds, under encryption, to every P:

* ``E E'``, a product of two fresh encryptions of zero, which covers the third polynomial;
* a fresh encryption of a mask, which covers the second one: the mask is a polynomial whose constant coefficient
  is 0 and whose other N - 1 coefficients are uniform modulo q1, so it covers what a holder of the key decrypts.

All N - 1 must be covered. Honest slots are real, and products of real slots live in one half of the coefficients
only (``X^t - X^(N-t)``); but a site can seal imaginary numbers, and its products with others then
stand in the other half. A mask on both halves takes slots that are complex.

The mask is encrypted small and multiplied up, and its encryption error with it, to about 2^14 in every coefficient.
That drowns the errors of the uploads in the one coefficient without a mask, where it is 2^-26 of unit^2, far below the
noise that sites add.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from quorsum.crypto.ckks_parameters import CKKS_V1, GRAM_LABEL
from quorsum.crypto.ckks_wire import CipherVector, Context, encrypt_complex
from quorsum.crypto.randomness import draw
from quorsum.crypto.suite import RandomBytes

__all__ = ["hide_all_but_sum", "slots_of", "zero_sum_mask"]

# The encrypted mask is a multiple of _BLUR / 2^10 = 2^10. What lies below is rounding noise of the rescaling
# (standard deviation 2^11), which leaves nothing of it to see.
_MODULUS = 2.0 ** CKKS_V1.moduli_bits[0]
_BLUR = 2.0**20


@cache
def _twist() -> NDArray[np.complex128]:
    """``exp(i pi t / N)``, which turns values at odd powers of the root into a discrete Fourier transform."""
    return np.asarray(np.exp(1j * np.pi * np.arange(CKKS_V1.degree) / CKKS_V1.degree), dtype=np.complex128)


@cache
def _root_of_slot() -> NDArray[np.int64]:
    """For each slot, the number k of its root exp(i pi (2 k + 1) / N).

    SEAL puts the value at the root with exponent 3^j mod 2N into slot j, and its conjugate is implied.
    """
    order = 2 * CKKS_V1.degree
    return (np.array([pow(3, j, order) for j in range(CKKS_V1.slots)], dtype=np.int64) - 1) // 2


def slots_of(coefficients: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Slots of the polynomial with these N coefficients, at scale 1: complex128, shape (4096,)."""
    values = np.fft.ifft(coefficients * _twist()) * CKKS_V1.degree
    return np.asarray(values[_root_of_slot()], dtype=np.complex128)


def zero_sum_mask(random_bytes: RandomBytes) -> NDArray[np.complex128]:
    """Slots of a random plaintext whose real parts add up to zero and which is otherwise uniform modulo q1.

    The sum is zero up to rounding: 2^-30 of one slot. Uniform means: to the precision of a
    double, hence in steps of at least 2^7 out of 2^60.

    Args:
        random_bytes: source of 64 KiB.

    Returns:
        complex128, shape (4096,), to be encrypted at the scale 2^50 and reduced to q1.
    """
    raw = np.frombuffer(draw(random_bytes, 8 * CKKS_V1.degree), dtype="<u8")
    coefficients = (raw * 2.0**-64 - 0.5) * _MODULUS
    coefficients[0] = 0.0
    return slots_of(coefficients) / CKKS_V1.scale


def hide_all_but_sum(product: CipherVector, context: Context, random_bytes: RandomBytes) -> None:
    """Rerandomise and mask ``product`` in place, as described at the top. About 12 ms.

    Args:
        product: rescaled, three polynomials, one modulus.
        context: with the public key, automatic rescaling and switching of moduli.
        random_bytes: source of the mask; the encryptions draw from SEAL's own generator.
    """
    zeros = [0.0] * CKKS_V1.slots
    # noise: e e' / q2, nothing beside the rounding of the rescaling
    product.add_(ts.ckks_vector(context, zeros) * ts.ckks_vector(context, zeros))
    small = zero_sum_mask(random_bytes) * (GRAM_LABEL / _BLUR)
    # noise: 2^4.4 of encryption, times _BLUR / 2^10, on 2^40: 2^-25.6 of unit^2
    product.add_(encrypt_complex(context, small) * _BLUR)
