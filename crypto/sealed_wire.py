"""Bytes of the suite ``sealed``: one way to write a message, one for what a site keeps.

A message is one JSON object (small things: names, digests, signatures in hexadecimal digits) and then arrays of field
elements, eight bytes each, little-endian. Whoever reads says which arrays are due and how large they are; nothing is
sized by what the sender claims.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field
from quorsum.crypto.suite import Blocks
from quorsum.errors import Refusal

__all__ = ["pack_message", "read_array", "read_head", "read_hex", "read_names", "read_signatures"]

FieldArray = NDArray[np.uint64]
_LONGEST_HEAD = 1 << 22


def pack_message(head: dict[str, Any], *arrays: FieldArray | bytes) -> Blocks:
    """One block of JSON, then one block per array."""
    parts = [part if isinstance(part, bytes) else field.to_bytes(part) for part in arrays]
    return (json.dumps(head, sort_keys=True, separators=(",", ":")).encode(), *parts)


def read_head(blocks: Blocks, count: int | None = None) -> dict[str, Any]:
    """The JSON object of a message; ``count`` is the number of blocks after it.

    Raises:
        Refusal: ``undecodable`` or ``wrong-shape``.
    """
    if not blocks or len(blocks[0]) > _LONGEST_HEAD:
        raise Refusal("undecodable", "the message has no head, or one that is too long")
    if count is not None and len(blocks) != count + 1:
        raise Refusal("wrong-shape", f"expected {count} blocks after the head, got {len(blocks) - 1}")
    try:
        head = json.loads(blocks[0])
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise Refusal("undecodable", "the head of the message is not a JSON object")
    return head


def read_array(block: bytes, shape: Sequence[int]) -> FieldArray:
    """Field elements of a known shape.

    Raises:
        Refusal: ``wrong-shape`` or ``out-of-range``.
    """
    size = 8 * int(np.prod(shape, dtype=np.int64))
    if len(block) != size:
        raise Refusal("wrong-shape", f"expected {size} bytes, got {len(block)}")
    return field.from_bytes(block).reshape(tuple(shape))


def read_hex(head: dict[str, Any], name: str, length: int) -> bytes:
    """A byte string of known length.

    Raises:
        Refusal: ``undecodable``.
    """
    value = head.get(name)
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != length:
        raise Refusal("undecodable", f"{name!r} is not {length} bytes in hexadecimal digits")
    return data


def read_names(head: dict[str, Any], name: str, known: Sequence[str]) -> tuple[str, ...]:
    """A list of distinct known names, in the order of ``known``.

    Raises:
        Refusal: ``undecodable``.
    """
    value = head.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refusal("undecodable", f"{name!r} is not a list of names")
    order = {site: place for place, site in enumerate(known)}
    places = [order.get(item, -1) for item in value]
    if -1 in places or any(a >= b for a, b in pairwise(places)):
        raise Refusal("undecodable", f"{name!r} is not a sorted list of distinct sites of this round")
    return tuple(value)


def read_signatures(head: dict[str, Any], name: str, known: Sequence[str]) -> dict[str, bytes]:
    """Signatures by site.

    Raises:
        Refusal: ``undecodable``.
    """
    value = head.get(name)
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise Refusal("undecodable", f"{name!r} does not give signatures by site")
    return {site: read_hex(value, site, 64) for site in value}
