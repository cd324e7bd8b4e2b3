"""Public pseudorandom values that every party expands from one seed: ring elements, signs, rotations, coefficients.

The generator is AES-256 in counter mode, keyed by ``tagged(label, seed)`` and started at zero: a hash of the label and
the seed for separation, and hardware speed for the many megabytes of a round. Any part of its output can be reached
directly through the counter. Nothing here is secret.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from quorsum.crypto.field import FieldArray, P
from quorsum.crypto.labels import MASK_XOF, tagged
from quorsum.crypto.randomness import zeros
from quorsum.crypto.ring import N
from quorsum.errors import UsageError

__all__ = ["bits", "field_elements", "integers_below", "keystream", "signs", "uniform_blocks"]

_CIPHER_BLOCK = 16
_WIRE = np.dtype("<u8")


def keystream(label: str, seed: bytes, length: int, offset: int = 0) -> bytes:
    """Bytes ``offset`` to ``offset + length`` of the output for a label and a seed.

    Args:
        label: one of ``labels``.
        seed: any bytes.
        length: at least 0.
        offset: a multiple of 16.

    Raises:
        UsageError: the offset is negative or no multiple of 16, or the length is negative.
    """
    if length < 0 or offset < 0 or offset % _CIPHER_BLOCK:
        raise UsageError(f"the key stream is read from a multiple of 16 on, got offset {offset} and length {length}")
    counter = (offset // _CIPHER_BLOCK).to_bytes(_CIPHER_BLOCK, "big")
    return Cipher(AES(tagged(label, seed)), CTR(counter)).encryptor().update(zeros(length))


def field_elements(label: str, seed: bytes, count: int) -> FieldArray:
    """Field elements that are uniform but for a bias that nobody can see.

    Eight bytes are cut down to 61 bits, and the one value too many, p, is taken as 0. So 0 comes with probability
    2^-60 instead of 1/p: a statistical distance below 2^-60 per element.

    Returns:
        uint64, shape (count,).
    """
    return _to_field(keystream(label, seed, 8 * count))


def uniform_blocks(seed: bytes, first: int, count: int) -> FieldArray:
    """The public ring elements ``a_first, ..., a_(first + count - 1)``, numbered from 0, of the mask.

    The bias is that of :func:`field_elements`: over the 10^8 elements of a large model less than 2^-33 in all.

    Returns:
        uint64, shape (count, N).

    Raises:
        UsageError: a negative number.
    """
    return _to_field(keystream(MASK_XOF, seed, 8 * N * count, offset=8 * N * first)).reshape(count, N)


def bits(label: str, seed: bytes, count: int) -> NDArray[np.uint8]:
    """Fair bits, lowest of each byte first, shape (count,)."""
    raw = np.frombuffer(keystream(label, seed, (count + 7) // 8), dtype=np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little")


def signs(label: str, seed: bytes, count: int) -> NDArray[np.int8]:
    """Fair signs, shape (count,): a bit 0 means +1, a bit 1 means -1."""
    return (1 - 2 * bits(label, seed, count).astype(np.int8)).astype(np.int8, copy=False)


def integers_below(label: str, seed: bytes, count: int, bound: int) -> NDArray[np.uint16]:
    """Exactly uniform integers in [0, bound), from two bytes each, shape (count,).

    Raises:
        UsageError: the bound is no power of two up to 2^16.
    """
    if not 1 <= bound <= 1 << 16 or bound & (bound - 1):
        raise UsageError(f"the bound must be a power of two up to 65536, got {bound}")
    raw = np.frombuffer(keystream(label, seed, 2 * count), dtype="<u2")
    return (raw & np.uint16(bound - 1)).astype(np.uint16, copy=False)


def _to_field(raw: bytes) -> FieldArray:
    values = np.frombuffer(raw, dtype=_WIRE).astype(np.uint64, copy=False) & np.uint64(P)
    values[values == P] = 0
    return values
