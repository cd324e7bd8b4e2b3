"""Hiding everything but the sum of the slots of a product.

Sites decrypt ``P = sum_k z_i^k z_j^k`` to learn one number, the sum of its slots. Handed over as it is, P gives away
more, in two ways:

* its slots are the products of single numbers of two sketches;
* its polynomials are products of polynomials of the uploads. A site knows those of its own upload and can
  divide by them, and with the secret key it then reads the other site's sketch (the whole update, if
  that fits one ciphertext). Rescaling takes half of the digits away and so blurs this; nothing proves that
  it blurs it enough.

So the coordinator adds, under encryption, to every P:

* ``E E'``, a product of two fresh encryptions of zero, which covers the third polynomial;
* a fresh encryption of a mask, which covers the second one: the mask is a polynomial whose constant coefficient
  is 0 and whose other coefficients are uniform modulo q1, so it covers what a holder of the key decrypts.

The slots are real, so with ``m_0 = 0`` the polynomial is ``sum_{t=1}^{N/2-1} m_t (X^t - X^(N-t))`` and the slot at the
root ``exp(i theta)`` is ``2 sum_t m_t cos(t theta)``: a cosine transform (DCT-III).

Real slots leave the antisymmetric half of the polynomial, where an error-free product is zero, without a mask. What
stands there is errors of encryption times numbers of the sketches: about sqrt(r B) / 30 in the units of a rescaled
coefficient. So the mask is encrypted small and multiplied up, and its encryption error with it, to about 2^14 in every
coefficient. In the constant one that is 2^-26 of unit^2, far below the noise that sites add.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import tenseal as ts
from numpy.typing import NDArray
from scipy.fft import dct

from quorsum.crypto.ckks_parameters import CKKS_V1, GRAM_LABEL
from quorsum.crypto.ckks_wire import CipherVector, Context
from quorsum.crypto.randomness import draw
from quorsum.crypto.suite import RandomBytes

__all__ = ["hide_all_but_sum", "zero_sum_mask"]

# The encrypted mask is a multiple of _BLUR / 2^10 = 2^10. What lies below is rounding noise of the rescaling
# (standard deviation 2^11), which is not worth hiding.
_MODULUS = 2.0 ** CKKS_V1.moduli_bits[0]
_BLUR = 2.0**20


@cache
def _root_of_slot() -> NDArray[np.int64]:
    """For each slot, the number k of its root exp(i pi (2 k + 1) / N), up to conjugation.

    SEAL puts the value at the root with exponent 3^j mod 2N into slot j.
    """
    order = 2 * CKKS_V1.degree
    exponents = np.array([pow(3, j, order) for j in range(CKKS_V1.slots)], dtype=np.int64)
    return (np.minimum(exponents, order - exponents) - 1) // 2


def zero_sum_mask(random_bytes: RandomBytes) -> NDArray[np.float64]:
    """Slots of a random plaintext that add up to zero and are otherwise uniform modulo q1.

    The sum is zero up to rounding: 2^-30 of one slot. Uniform means: to the precision of a
    double, hence in steps of at least 2^7 out of 2^60.

    Args:
        random_bytes: source of 32 KiB.

    Returns:
        float64, shape (4096,), to be encrypted at the scale 2^50 and reduced to q1.
    """
    raw = np.frombuffer(draw(random_bytes, 8 * CKKS_V1.slots), dtype="<u8")
    coefficients = (raw * 2.0**-64 - 0.5) * _MODULUS
    coefficients[0] = 0.0
    slots: NDArray[np.float64] = dct(coefficients, type=3)
    return slots[_root_of_slot()] / CKKS_V1.scale


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
    product.add_(ts.ckks_vector(context, small.tolist()) * _BLUR)
