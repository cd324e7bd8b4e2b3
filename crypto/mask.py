"""The mask: a lattice cipher whose ciphertexts and keys add up.

Block j of an update x becomes

    y_j = a_j s + e_j + x_j    in Z_p[X] / (X^N + 1),

with public a_j, the same for all sites of a round, one fresh short key s per site and round, and fresh short errors
e_j (Willow, eprint 2024/936; ACORN, 2022/1461). Ciphertexts of several sites add up to a ciphertext of the sum under
the sum of their keys. What opens is the sum of ``x_j + e_j``: the errors stay, as noise far below the signal.

Keys and errors are centred binomial and come from ``random_bytes`` directly, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field, ring
from quorsum.crypto.field import FieldArray
from quorsum.crypto.randomness import draw
from quorsum.crypto.ring import N
from quorsum.crypto.sealed_parameters import SEALED_V1
from quorsum.crypto.suite import RandomBytes
from quorsum.crypto.xof import uniform_blocks
from quorsum.errors import UsageError

__all__ = ["MASK_BATCH", "centred_binomial", "draw_key", "mask_blocks", "unmask"]

MASK_BATCH = 16
"""Blocks that are masked or unmasked at a time (512 KiB)."""

_LARGEST_ETA = 127
_CHUNK = 1 << 16


def centred_binomial(eta: int, count: int, random_bytes: RandomBytes) -> NDArray[np.int8]:
    """Independent integers, each the sum of ``2 eta`` fair bits less ``eta``: variance eta / 2, exact.

    Uses exactly ``2 eta`` bits per integer, up to whole bytes per chunk of 2^16.

    Args:
        eta: 1 to 127.
        count: at least 0.
        random_bytes: source of fresh bytes.

    Returns:
        int8, shape (count,), in [-eta, eta].

    Raises:
        UsageError: eta is out of range, or the source is broken.
    """
    if not 1 <= eta <= _LARGEST_ETA:
        raise UsageError(f"eta must be 1 to {_LARGEST_ETA}, got {eta}")
    drawn = np.empty(count, dtype=np.int8)
    for start in range(0, count, _CHUNK):
        part = drawn[start : start + _CHUNK]
        # In [0, 2 eta] as uint8, and the subtraction in two's complement gives [-eta, eta].
        part[:] = (_count_bits(2 * eta, part.size, random_bytes) - np.uint8(eta)).view(np.int8)
    return drawn


def draw_key(random_bytes: RandomBytes) -> NDArray[np.int8]:
    """A fresh mask key: int8, shape (N,), centred binomial with eta = 41. Secret, and for one round only."""
    return centred_binomial(SEALED_V1.eta_secret, N, random_bytes)


def mask_blocks(
    seed: bytes, s: NDArray[np.int8], integers: NDArray[np.signedinteger[Any]], random_bytes: RandomBytes
) -> Iterator[FieldArray]:
    """Encrypt the integers of an update, some blocks at a time.

    A key must be used once: two calls with one key and one seed would give away differences.

    Args:
        seed: from which the public a_j are expanded.
        s: the key, shape (N,).
        integers: x, signed, shape (d,), d at least 1; the last block is filled up with zeros.
        random_bytes: source of the errors.

    Yields:
        uint64, shape (b, N), b <= MASK_BATCH; ceil(d / N) blocks in all.

    Raises:
        UsageError: wrong shape or type, or a key that is not short (all before the first block).
    """
    if integers.ndim != 1 or integers.size == 0 or not np.issubdtype(integers.dtype, np.signedinteger):
        raise UsageError(
            f"an update is a non-empty vector of signed integers, got {integers.dtype} of shape {integers.shape}"
        )
    return _mask_blocks(seed, ring.short_factor(s), integers, random_bytes)


def _mask_blocks(
    seed: bytes, key: ring.ShortFactor, integers: NDArray[np.signedinteger[Any]], random_bytes: RandomBytes
) -> Iterator[FieldArray]:
    first = 0
    for x in ring.batches(integers, MASK_BATCH):
        # The last block gets errors in full: its padding must not show products with the key.
        e = centred_binomial(SEALED_V1.eta_error, x.size, random_bytes).reshape(x.shape)
        masked = ring.multiply_short(uniform_blocks(seed, first, len(x)), key)
        yield field.add_signed(masked, np.add(x, e, dtype=np.int64))
        first += len(x)


def unmask(seed: bytes, y: FieldArray | Iterable[FieldArray], s_sum: FieldArray) -> Iterator[NDArray[np.int64]]:
    """Open a sum of ciphertexts with the sum of their keys, some blocks at a time.

    Exact for every key: fast where the key is short, as sums of honest keys are, and otherwise (a malicious site may
    have shared any key) by products of full size.

    Args:
        seed: from which the public a_j are expanded.
        y: all blocks, shape (B, N), or batches of them in order, each of shape (b, N).
        s_sum: the sum of the keys, shape (N,), values in [0, p).

    Yields:
        int64, shape (b, N), in (-p/2, p/2]: ``sum x + sum e``.

    Raises:
        UsageError: wrong shape.
    """
    if s_sum.shape != (N,):
        raise UsageError(f"a key is {N} field elements, got shape {s_sum.shape}")
    return _unmask(seed, _whole(y) if isinstance(y, np.ndarray) else y, s_sum)


def _whole(y: FieldArray) -> Iterator[FieldArray]:
    return (y[start : start + MASK_BATCH] for start in range(0, len(y), MASK_BATCH))


def _unmask(seed: bytes, y: Iterable[FieldArray], s_sum: FieldArray) -> Iterator[NDArray[np.int64]]:
    signed = field.centred(s_sum)
    key = ring.short_factor(signed) if ring.is_short(signed) else None
    first = 0
    for blocks in y:
        if blocks.ndim != 2 or blocks.shape[1] != N:
            raise UsageError(f"a batch has shape (b, {N}), got {blocks.shape}")
        a = uniform_blocks(seed, first, len(blocks))
        masks = ring.multiply_many(s_sum, a) if key is None else ring.multiply_short(a, key)
        yield field.centred(field.sub(blocks, masks))
        first += len(blocks)


def _count_bits(number: int, count: int, random_bytes: RandomBytes) -> NDArray[np.uint8]:
    """How many of ``number`` < 256 fresh bits are ones, ``count`` times: uint8, shape (count,)."""
    total = np.zeros(count, dtype=np.uint8)
    # In words of 64 bits as far as they go, and the rest in the binary parts of what remains.
    for width in [64] * (number // 64) + [w for w in (32, 16, 8, 4, 2, 1) if number % 64 & w]:
        raw = draw(random_bytes, (width * count + 7) // 8)
        if width >= 8:
            total += np.bitwise_count(np.frombuffer(raw, dtype=f"<u{width // 8}"))
        else:
            packed = np.frombuffer(raw, dtype=np.uint8)
            # The lowest bits of a byte belong to the first of the integers that share it.
            for first in range(8 // width):
                part = total[first :: 8 // width]
                taken = (packed[: part.size] >> np.uint8(width * first)) & np.uint8((1 << width) - 1)
                part += np.bitwise_count(taken)
    return total
