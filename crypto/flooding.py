"""Noise that a site adds to what it decrypts before anybody sees it.

A decryption of CKKS is the message plus a small error that depends on the secret key, and whoever sees
enough of them finds the key (Li and Micciancio, eprint 2020/1533). The remedy is to drown the error in
much larger noise of known shape (Li, Micciancio, Schultz and Sorrell, eprint 2022/816).

The noise is a function of a secret that all sites share, of the round, and of the exact question. So to one
question all honest sites release the very same number: asking it many times averages nothing away, and
a site that releases another number is seen. (A coordinator that breaks the protocol can put the same
product to n sites in n disguises and divide the noise by sqrt(n).)

Shape: the sum of four independent 16-bit uniforms, centred (Irwin-Hall). It is exact integer arithmetic,
hence the same on every machine, which a Gaussian from a mathematics library is not. Its density is
close to a Gaussian one and has finite Fisher information, so to hide a shift of ``e`` in it costs a
Kullback-Leibler divergence of order ``(e / sigma)^2``, as with a Gaussian.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.randomness import expand

__all__ = ["flooding_noise"]

# Variance of the sum of four uniforms on {0, ..., 2^16 - 1}: 4 (2^32 - 1) / 12.
_DEVIATION = math.sqrt((2**32 - 1) / 3)
_MEAN = 2 * (2**16 - 1)


def flooding_noise(
    secret: bytes, digest: bytes, phase: str, question: bytes, number: int, count: int
) -> NDArray[np.float64]:
    """Noise of mean 0 and standard deviation 1, bounded by 3.47, for one piece of one answer.

    Args:
        secret: 32 bytes shared by the sites and unknown to the coordinator.
        digest: digest of the round's context.
        phase: phase of the question.
        question: digest of the whole question.
        number: number of the piece within the answer, from 0.
        count: how many values the piece has.

    Returns:
        float64, shape (count,), the same on every machine.
    """
    raw = expand("flooding", secret, digest, phase.encode(), question, number.to_bytes(8, "little"), length=8 * count)
    words = np.frombuffer(raw, dtype="<u2").reshape(count, 4)
    noise: NDArray[np.float64] = (words.sum(axis=1, dtype=np.int64) - _MEAN) / _DEVIATION
    return noise
