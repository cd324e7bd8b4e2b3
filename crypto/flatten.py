"""The public +-1 vector that every site multiplies its update by before sealing, and how it is undone.

Without it, an update whose coordinates share a common sign has blocks that point the same way, and the
squared norm of a random signed sum of such blocks says little about the update. With it, blocks of any
update that was chosen without looking at the vector are nearly orthogonal. The vector is public: it
hides nothing, and an attacker who looks at it first can undo its effect (see ``checks``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.randomness import expand

__all__ = ["FLATTEN_CHUNK", "as_signs", "flatten", "flattening_signs"]

FLATTEN_CHUNK = 1 << 20
"""Signs expanded at a time; part of the definition, since each chunk is expanded under its own number."""


def flattening_signs(digest: bytes, dimension: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield (start, negative) for consecutive chunks of the vector: ``negative`` says where it is -1.

    Bit ``i`` of chunk ``c`` (least significant bit of each byte first) is bit ``i`` of
    ``XOF("flatten", digest, c)``; a one means -1.

    Args:
        digest: 32 bytes, the digest of the round's context.
        dimension: d, at least 1.
    """
    for start in range(0, dimension, FLATTEN_CHUNK):
        count = min(FLATTEN_CHUNK, dimension - start)
        number = (start // FLATTEN_CHUNK).to_bytes(8, "little")
        raw = np.frombuffer(expand("flatten", digest, number, length=(count + 7) // 8), dtype=np.uint8)
        yield start, np.unpackbits(raw, count=count, bitorder="little").view(np.bool_)


def as_signs(negative: NDArray[np.bool_]) -> NDArray[np.int8]:
    """-1 where ``negative``, else +1. A product with them is exact, and much faster than negating scattered places."""
    return 1 - 2 * negative.view(np.int8)


def flatten(digest: bytes, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply by the vector of the context with this digest. Doing it twice undoes it, exactly.

    Args:
        digest: 32 bytes, the digest of the round's context.
        vector: float64, shape (d,); it is left as it is.

    Returns:
        float64, shape (d,).
    """
    flat = vector.copy()
    for start, negative in flattening_signs(digest, vector.size):
        flat[start : start + negative.size] *= as_signs(negative)
    return flat
