"""End-to-end signatures: whoever carries a message, only its site can have written it.

Flower delivers a reply to whoever asked, and its word on who sent it is only a routing label: a node can answer in the
name of another one. So every instruction carries a fresh nonce, and every reply of a site with an identity is signed
over that nonce and the whole content. No reply can be used for another message, and none twice.

The instruction itself is not signed and not part of what the reply signs. Whoever carries it could put another one
beside its nonce; so what a site has signed here proves who has written it, and not that it was a wrong answer. What
matters in a round names context and phase in its content, and in the suite ``sealed`` carries signatures of its own.

::

    instruction   quorsum.envelope = {nonce}
    reply         quorsum.envelope = {nonce, signature}     signature over (nonce, digest of all other records)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from quorsum.crypto.identity import Identity, PublicIdentity
from quorsum.crypto.labels import MESSAGE
from quorsum.errors import Refusal

__all__ = ["NONCE_LENGTH", "address", "content_digest", "nonce_of", "open_envelope", "sign", "strip"]

ENVELOPE = "quorsum.envelope"
NONCE_LENGTH = 16
"""Bytes of a nonce."""


def address(content: RecordDict, nonce: bytes) -> RecordDict:
    """An instruction with its nonce; the records themselves are shared, not copied."""
    addressed = strip(content)
    addressed[ENVELOPE] = ConfigRecord({"nonce": nonce.hex()})
    return addressed


def nonce_of(content: RecordDict) -> bytes | None:
    """The nonce of an instruction, or None where it has none.

    Raises:
        Refusal: ``undecodable``: there is an envelope, and no nonce in it.
    """
    if ENVELOPE not in content:
        return None
    nonce = _field(content, "nonce", NONCE_LENGTH)
    if nonce is None:
        raise Refusal("undecodable", f"the envelope of the message holds no nonce of {NONCE_LENGTH} bytes")
    return nonce


def sign(content: RecordDict, nonce: bytes, identity: Identity) -> RecordDict:
    """A reply to the instruction with this nonce, signed by the site."""
    signed = strip(content)
    signature = identity.sign(MESSAGE, nonce, content_digest(signed))
    signed[ENVELOPE] = ConfigRecord({"nonce": nonce.hex(), "signature": signature.hex()})
    return signed


def open_envelope(content: RecordDict, nonce: bytes, public: PublicIdentity) -> RecordDict:
    """The content of a reply, verified to be this site's answer to the instruction with this nonce.

    Raises:
        Refusal: ``unsigned``, ``replayed-message`` (signed for another instruction) or ``wrong-signature``.
    """
    given, signature = _field(content, "nonce", NONCE_LENGTH), _field(content, "signature", 64)
    if given is None or signature is None:
        raise Refusal("unsigned", "the message is not signed; the site must run quorsum with its own identity")
    if given != nonce:
        raise Refusal("replayed-message", "the message answers another instruction than the one it was sent for")
    bare = strip(content)
    if not public.verify(signature, MESSAGE, nonce, content_digest(bare)):
        raise Refusal("wrong-signature", "the message is not signed by the key of the site")
    return bare


def strip(content: RecordDict) -> RecordDict:
    """The content without its envelope."""
    return RecordDict({name: record for name, record in content.items() if name != ENVELOPE})


def content_digest(content: RecordDict) -> bytes:
    """SHA-256 over an unambiguous encoding of all records but the envelope: names, types, order and values."""
    state = hashlib.sha256()
    for part in _parts(content):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _parts(content: RecordDict) -> Iterator[bytes | memoryview]:
    for name, record in sorted(content.items()):
        if name == ENVELOPE:
            continue
        if isinstance(record, ArrayRecord):
            # The order of arrays is part of a model, so that they are not sorted.
            head = [[key, array.dtype, list(array.shape), array.stype] for key, array in record.items()]
            yield _json([name, "arrays", head])
            yield from (array.data for array in record.values())
        else:
            kind = type(record).__name__
            yield _json([name, kind, [[key, _plain(value)] for key, value in sorted(record.items())]])


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()


def _field(content: RecordDict, name: str, length: int) -> bytes | None:
    record = content.get(ENVELOPE)
    text = record.get(name) if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str) or len(text) != 2 * length:
        return None
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None
