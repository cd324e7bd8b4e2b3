"""End-to-end signatures: whoever carries a message, only its site can have written it.

Flower delivers a reply to whoever asked, and its word on who sent it is only a routing label: a node can answer in the
name of another one. So every instruction carries a fresh nonce, and every reply of a site with an identity is signed
over that nonce, the whole instruction as it arrived, and the whole content of the reply. No reply can be used for
another message, and none twice; and whoever carries an instruction and puts another one beside its nonce, another model
to be evaluated for instance, gets a reply that its sender does not take.

The instruction itself is not signed: a site does what it is asked to by whoever holds the connection. What matters in a
round names context and phase in its content, and in the suite ``sealed`` carries signatures of its own.

::

    instruction   quorsum.envelope = {nonce}
    reply         quorsum.envelope = {nonce, signature}

    signature over (nonce, digest of the instruction, digest of the reply), each of all records but the envelope
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from quorsum.crypto.identity import Identity, PublicIdentity
from quorsum.crypto.labels import MESSAGE
from quorsum.errors import Refusal

__all__ = [
    "NONCE_LENGTH",
    "Asked",
    "address",
    "asked_in",
    "content_digest",
    "nonce_of",
    "open_envelope",
    "sign",
    "strip",
]

ENVELOPE = "quorsum.envelope"
NONCE_LENGTH = 16
"""Bytes of a nonce."""


@dataclass(frozen=True)
class Asked:
    """What a reply answers.

    Attributes:
        nonce: of the instruction.
        digest: of its content, 32 bytes, see :func:`content_digest`.
    """

    nonce: bytes
    digest: bytes


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


def asked_in(content: RecordDict) -> Asked | None:
    """What a reply to this instruction is signed for, or None where it has no nonce.

    Raises:
        Refusal: as :func:`nonce_of`.
    """
    nonce = nonce_of(content)
    return None if nonce is None else Asked(nonce, content_digest(content))


def sign(content: RecordDict, asked: Asked, identity: Identity) -> RecordDict:
    """A reply to an instruction, signed by the site."""
    signed = strip(content)
    signature = identity.sign(MESSAGE, asked.nonce, asked.digest, content_digest(signed))
    signed[ENVELOPE] = ConfigRecord({"nonce": asked.nonce.hex(), "signature": signature.hex()})
    return signed


def open_envelope(content: RecordDict, asked: Asked, public: PublicIdentity) -> RecordDict:
    """The content of a reply, verified to be this site's answer to this instruction.

    Raises:
        Refusal: ``unsigned``, ``replayed-message`` (it names another nonce) or ``wrong-signature`` (it is of another
            site, of another content, or for another content beside this nonce).
    """
    given, signature = _field(content, "nonce", NONCE_LENGTH), _field(content, "signature", 64)
    if given is None or signature is None:
        raise Refusal("unsigned", "the message is not signed; the site must run quorsum with its own identity")
    if given != asked.nonce:
        raise Refusal("replayed-message", "the message answers another instruction than the one it was sent for")
    bare = strip(content)
    if not public.verify(signature, MESSAGE, asked.nonce, asked.digest, content_digest(bare)):
        raise Refusal("wrong-signature", "the message is not signed by the key of the site for what it was asked")
    return bare


def strip(content: RecordDict) -> RecordDict:
    """The content without its envelope."""
    return RecordDict({name: record for name, record in content.items() if name != ENVELOPE})


def content_digest(content: RecordDict, known: dict[int, bytes] | None = None) -> bytes:
    """SHA-256 over an unambiguous encoding of all records but the envelope: names, types, order and values.

    Args:
        content: the records.
        known: digests of records by their ``id``, looked into and added to, for contents that share a large one; it
            may be used for as long as none of them is changed or let go.
    """
    known = {} if known is None else known
    state = hashlib.sha256()
    for name, record in sorted(content.items()):
        if name == ENVELOPE:
            continue
        if id(record) not in known:
            known[id(record)] = _record_digest(record)
        _add(state, name.encode())
        state.update(known[id(record)])
    return state.digest()


def _record_digest(record: ArrayRecord | ConfigRecord | MetricRecord) -> bytes:
    state = hashlib.sha256()
    for part in _parts(record):
        _add(state, part)
    return state.digest()


def _add(state: hashlib._Hash, part: bytes | memoryview) -> None:
    state.update(len(part).to_bytes(8, "little"))
    state.update(part)


def _parts(record: ArrayRecord | ConfigRecord | MetricRecord) -> Iterator[bytes | memoryview]:
    if isinstance(record, ArrayRecord):
        # The order of arrays is part of a model, so that they are not sorted.
        head = [[key, array.dtype, list(array.shape), array.stype] for key, array in record.items()]
        yield _json(["arrays", head])
        yield from (array.data for array in record.values())
    else:
        kind = type(record).__name__
        yield _json([kind, [[key, _plain(value)] for key, value in sorted(record.items())]])


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
