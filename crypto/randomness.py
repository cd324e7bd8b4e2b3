"""Domain-separated hashing and expansion: every derived byte of the suites comes from here.

``H(tag, parts)`` is SHA-256 and ``XOF(tag, parts)`` is SHAKE-256 over the same unambiguous encoding: the
tag, a zero byte, and each part behind its length (8 bytes, little-endian).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from quorsum.crypto.suite import RandomBytes
from quorsum.errors import UsageError

__all__ = ["draw", "draw_signs", "expand", "stretched", "tagged_hash", "zeros"]

# Enciphering zeros gives the key stream. Whoever asks for half a megabyte again and again would spend more time on
# fresh zeros than on the cipher.
_ZEROS = bytes(1 << 19)


def _encoded(tag: str, parts: tuple[bytes, ...]) -> Iterator[bytes]:
    yield f"quorsum/crypto/{tag}/v1".encode() + b"\x00"
    for part in parts:
        yield len(part).to_bytes(8, "little")
        yield part


def tagged_hash(tag: str, *parts: bytes) -> bytes:
    """SHA-256 of ``parts`` in the domain ``tag``, 32 bytes."""
    state = hashlib.sha256()
    for piece in _encoded(tag, parts):
        state.update(piece)
    return state.digest()


def expand(tag: str, *parts: bytes, length: int) -> bytes:
    """SHAKE-256 of ``parts`` in the domain ``tag``, ``length`` bytes.

    The interpreter lock is held while the output is squeezed (about 3 ms for a megabyte), so callers
    that need much ask for it in pieces.
    """
    state = hashlib.shake_256()
    for piece in _encoded(tag, parts):
        state.update(piece)
    return state.digest(length)


def draw(random_bytes: RandomBytes, count: int) -> bytes:
    """Take ``count`` fresh bytes from the source that the caller passed in.

    Raises:
        UsageError: the source gave another number of bytes.
    """
    drawn = random_bytes(count)
    if len(drawn) != count:
        raise UsageError(f"random_bytes({count}) gave {len(drawn)} bytes; pass a source such as os.urandom")
    return drawn


def draw_signs(random_bytes: RandomBytes, rows: int, columns: int) -> NDArray[np.int8]:
    """Fair, independent signs: int8 of +1 and -1, shape (rows, columns)."""
    count = rows * columns
    raw = np.frombuffer(draw(random_bytes, (count + 7) // 8), dtype=np.uint8)
    bits = np.unpackbits(raw, count=count, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).reshape(rows, columns)


def stretched(random_bytes: RandomBytes) -> RandomBytes:
    """A source of any number of bytes from 32 fresh ones: AES-256 in counter mode, the key used for nothing else.

    The operating system's source gives a few hundred megabytes a second, and mask errors need twenty bytes per
    parameter. Nothing is kept: the key lives as long as the returned function.
    """
    stream = Cipher(AES(draw(random_bytes, 32)), CTR(bytes(16))).encryptor()
    return lambda count: stream.update(zeros(count))


def zeros(count: int) -> bytes | memoryview:
    """That many zero bytes, to be read only; up to half a megabyte without making them anew."""
    return memoryview(_ZEROS)[:count] if count <= len(_ZEROS) else bytes(count)
