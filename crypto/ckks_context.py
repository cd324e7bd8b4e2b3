"""What a serialised context holds, read from its outer structure alone, before the library unpacks anything.

TenSEAL writes a context as a protocol buffer: parameters (field 1), a public part (2) and a secret part (3). The
public part has the public key (1), one number of flags (2), the scale (3, eight bytes), relinearisation keys (4) and
rotation keys (5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from quorsum.errors import KeyMaterialError

__all__ = ["EVALUATION_PARTS", "MAX_PUBLIC_BYTES", "SECRET_PARTS", "context_parts"]

MAX_PUBLIC_BYTES = 512 * 1024
"""Longest context that a coordinator reads; with the parameters and the public key it has 393 kB."""

_NUMBER, _EIGHT_BYTES, _BYTES = 0, 1, 2
_PUBLIC = (2, _BYTES)
_SECRET = (3, _BYTES)
_OUTER = {(1, _BYTES): "parameters", _PUBLIC: "public", _SECRET: "secret"}
_INNER = {
    (1, _BYTES): "public-key",
    (2, _NUMBER): "flags",
    (3, _EIGHT_BYTES): "scale",
    (4, _BYTES): "relinearisation-keys",
    (5, _BYTES): "rotation-keys",
}
SECRET_PARTS = frozenset({"secret"})
EVALUATION_PARTS = frozenset({"relinearisation-keys", "rotation-keys"})
# A varint of 64 bits.
_LONGEST_NUMBER = 10


class _Field(NamedTuple):
    tag: tuple[int, int]
    start: int
    end: int


def context_parts(data: bytes) -> frozenset[str]:
    """Which parts a serialised context has. Takes no memory and looks at a handful of bytes.

    Raises:
        KeyMaterialError: ``unreadable``: cut off, or a field that no context has, or one field twice.
    """
    if not data:
        raise KeyMaterialError("unreadable", "the context is empty; create the site key anew or fetch it again")
    parts: list[str] = []
    for field in _fields(data, 0, len(data), _OUTER):
        parts.append(_OUTER[field.tag])
        if field.tag == _PUBLIC:
            parts += [_INNER[inner.tag] for inner in _fields(data, field.start, field.end, _INNER)]
    return frozenset(parts)


def _fields(data: bytes, start: int, end: int, known: dict[tuple[int, int], str]) -> Iterator[_Field]:
    """The fields of one message; each of the known ones may come once."""
    seen: set[tuple[int, int]] = set()
    at = start
    while at < end:
        number, at = _number(data, at, end)
        tag = (number >> 3, number & 7)
        if tag not in known or tag in seen:
            raise _unreadable("it has a field that no context has, or one twice")
        seen.add(tag)
        length = {_EIGHT_BYTES: 8, _NUMBER: 0}.get(tag[1])
        if tag[1] == _NUMBER:
            _, at = _number(data, at, end)
        if length is None:
            length, at = _number(data, at, end)
        if length > end - at:
            raise _unreadable("it is cut off")
        yield _Field(tag, at, at + length)
        at += length


def _number(data: bytes, at: int, end: int) -> tuple[int, int]:
    """One varint and where it ends."""
    value = 0
    for nth, byte in enumerate(data[at : min(end, at + _LONGEST_NUMBER)]):
        value |= (byte & 0x7F) << (7 * nth)
        if byte < 0x80:
            return value, at + nth + 1
    raise _unreadable("it is cut off")


def _unreadable(why: str) -> KeyMaterialError:
    return KeyMaterialError("unreadable", f"this is not a TenSEAL context: {why}; fetch it again")
