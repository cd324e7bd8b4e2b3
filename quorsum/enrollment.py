"""What a site and the coordinator say to each other before and beside the training, and what is signed in it.

Two gRPC services of unary calls, JSON in both directions, no protocol compiler:

* :data:`ENROLLMENT`, TLS without a client certificate: ``Enroll``. One idempotent request, repeated until the
  coordinator's operator has decided. Without a secret it is the request of a site that was approved before and whose
  certificate ran out.
* :data:`MEMBERS`, TLS with a client certificate: ``Renew``, ``Roster``, ``Leave``, ``PutKey``, ``GetKey``.

A refusal is a gRPC status whose details are ``{"code": ..., "message": ..., "server_time": ...}``.

Every request to enrol is signed with each of the site's three keys over the same hash of all its fields and of the
authority's fingerprint, so that no key can be presented by somebody who does not hold it, and no part of one request
can be moved into another.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quorsum.crypto.certificates import public_key_digest, read_request
from quorsum.crypto.labels import tagged
from quorsum.errors import Refusal
from quorsum.invitation import FEDERATION_PATTERN, SITE_PATTERN
from quorsum.words import six_words

__all__ = [
    "ENROLLMENT",
    "EPOCH",
    "LABELS",
    "MAX_CLOCK_SKEW_S",
    "MAX_ENROLLMENT_BYTES",
    "MAX_MEMBERS_BYTES",
    "MAX_REPLY_BYTES",
    "MEMBERS",
    "NODE_PROOF",
    "RELAY",
    "RELAY_INFO",
    "REQUEST",
    "TLS_PROOF",
    "WORDS",
    "EnrollReply",
    "EnrollRequest",
    "GetKeyReply",
    "GetKeyRequest",
    "Keys",
    "LeaveReply",
    "LeaveRequest",
    "Member",
    "PutKeyReply",
    "PutKeyRequest",
    "RenewReply",
    "RenewRequest",
    "RosterReply",
    "RosterRequest",
    "State",
    "check_state",
    "decode_base64",
    "decode_detail",
    "encode_base64",
    "encode_detail",
    "enrollment_statement",
    "key_epoch",
    "method",
    "pack",
    "relay_info",
    "relay_statement",
    "unpack",
    "words_of",
]

ENROLLMENT: Final = "quorsum.Enrollment"
MEMBERS: Final = "quorsum.Members"

MAX_ENROLLMENT_BYTES: Final = 64 << 10
"""Longest request on the port that anybody may speak to."""
MAX_MEMBERS_BYTES: Final = 1 << 20
"""Longest request on the members' port: a sealed ckks key has 590 kB, 787 kB in base64."""
MAX_REPLY_BYTES: Final = 8 << 20
"""Longest reply: a roster of 10 000 members with everybody that ever left."""
MAX_CLOCK_SKEW_S: Final = 240.0
"""Difference of clocks from which a site refuses to go on: certificates and Flower's signed times allow 300 s."""

REQUEST: Final = "enrollment-request"
"""A request to enrol, as the site's identity signs it."""
NODE_PROOF: Final = "enrollment-node-proof"
"""A request to enrol, as the site's node key signs it."""
TLS_PROOF: Final = "enrollment-tls-proof"
"""A request to enrol, as the site's TLS key signs it."""
WORDS: Final = "enrollment-words"
"""What the six words stand for."""
EPOCH: Final = "key-epoch"
"""Who shares a key: the approved members."""
RELAY: Final = "key-relay"
"""A sealed key on its way from one member to another, as its sender signs it."""
RELAY_INFO: Final = "key-relay-info"
"""Public context under which a key is sealed."""

LABELS: Final = (REQUEST, NODE_PROOF, TLS_PROOF, WORDS, EPOCH, RELAY, RELAY_INFO)
"""All of them, for the test that no two are equal and none is one of the sealed round's."""


def _shown(text: str) -> str:
    # It ends up on the terminal of a site's administrator, where other characters could be commands.
    if not text.isprintable():
        raise ValueError("this is not a text that can be shown")
    return text


SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
Pem = Annotated[str, Field(min_length=1, max_length=4096)]
IdentityHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
SignatureHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
DerHex = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){8,80}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, le=2**33, allow_inf_nan=False)]
Address = Annotated[str, Field(min_length=3, max_length=255), AfterValidator(_shown)]
FederationName = Annotated[str, Field(pattern=FEDERATION_PATTERN)]
State: TypeAlias = Literal["pending", "approved", "refused", "revoked", "left"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class _Reply(_Message):
    server_time: Seconds


class EnrollRequest(_Message):
    """Site to coordinator: these are my keys, this is my invitation.

    Attributes:
        version: of this protocol.
        site: the name under which it joins.
        secret_hex: of the invitation; empty for a site that was approved before.
        identity: its Ed25519 and X25519 keys.
        node_key: public key with which it speaks to Flower, PEM.
        request: for the TLS certificate, PEM.
        identity_proof: Ed25519 signature under :data:`REQUEST`.
        node_proof: ECDSA signature of the node key.
        tls_proof: ECDSA signature of the key that the certificate is for.
    """

    version: Literal[1] = 1
    site: SiteName
    secret_hex: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$", repr=False)]
    identity: IdentityHex
    node_key: Pem
    request: Pem
    identity_proof: SignatureHex
    node_proof: DerHex
    tls_proof: DerHex


class EnrollReply(_Reply):
    """Coordinator to site: where its enrollment stands.

    Attributes:
        state: ``pending`` until the operator has decided.
        words: six words for both to compare.
        certificate: PEM once approved, else empty.
        members_address, fleet_address: where an approved site goes from here, ``host:port``.
        federation: its name.
    """

    state: State
    words: Annotated[str, Field(max_length=120)]
    certificate: Annotated[str, Field(max_length=8192)]
    members_address: Address
    fleet_address: Address
    federation: FederationName


class RenewRequest(_Message):
    """Member to coordinator: a new certificate for the same key, please."""

    request: Pem


class RenewReply(_Reply):
    """Coordinator to member: the new certificate, PEM."""

    certificate: Annotated[str, Field(min_length=1, max_length=8192)]


class RosterRequest(_Message):
    """Member to coordinator: who are the members?"""


class Member(_Message):
    """One member. An identity stays in the roster for good; only its state changes, and only once."""

    site: SiteName
    identity: IdentityHex
    state: Literal["approved", "revoked", "left"]


class RosterReply(_Reply):
    """Coordinator to member: everybody that ever was approved."""

    members: Annotated[list[Member], Field(max_length=20_000)]


class LeaveRequest(_Message):
    """Member to coordinator: I leave for good; my keys are void from now on."""


class LeaveReply(_Reply):
    """Coordinator to member: done."""


class PutKeyRequest(_Message):
    """Member to coordinator: relay this sealed ckks key to another member.

    Attributes:
        epoch: of :func:`key_epoch`.
        recipient: the member that can open it.
        sealed: base64, at most 700 000 bytes behind it.
        signature: of the sender's identity over :func:`relay_statement`.
    """

    epoch: Digest
    recipient: SiteName
    sealed: Annotated[str, Field(min_length=64, max_length=940_000)]
    signature: SignatureHex


class PutKeyReply(_Reply):
    """Coordinator to member: kept for the recipient."""


class GetKeyRequest(_Message):
    """Member to coordinator: is there a key for me in this epoch?"""

    epoch: Digest


class GetKeyReply(_Reply):
    """Coordinator to member: the key sealed to it; ``sender`` and ``sealed`` are empty while there is none."""

    sender: Annotated[str, Field(max_length=63)]
    sealed: Annotated[str, Field(max_length=940_000)]
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")]


Message = TypeVar("Message", bound=BaseModel)


@dataclass(frozen=True)
class Keys:
    """A site's three public keys, each as the 64 hexadecimal digits by which it is recognised.

    Attributes:
        identity: SHA-256 of the public identity, tagged.
        node: SHA-256 of the node key's DER.
        tls: SHA-256 of the TLS key's DER.
    """

    identity: str
    node: str
    tls: str

    @classmethod
    def of(cls, request: EnrollRequest) -> Keys:
        """The keys in a request.

        Raises:
            Refusal: as :func:`~quorsum.crypto.certificates.read_request`; ``unreadable`` for the node key.
        """
        _, tls = read_request(request.request.encode())
        identity = tagged("enrollment-identity", bytes.fromhex(request.identity)).hex()
        return cls(identity, public_key_digest(request.node_key.encode()), public_key_digest(tls))

    def digests(self) -> tuple[tuple[str, str], ...]:
        """Kind and digest of each."""
        return ("identity", self.identity), ("node", self.node), ("tls", self.tls)


def method(service: str, name: str) -> str:
    """The path of a call."""
    return f"/{service}/{name}"


def pack(message: BaseModel) -> bytes:
    """A message as it travels."""
    return message.model_dump_json().encode()


def unpack(schema: type[Message], data: bytes) -> Message:
    """Read and check a message.

    Raises:
        Refusal: ``undecodable``, naming the first field that is wrong and never its content.
    """
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in detail["loc"]) or "message"
        raise Refusal(
            "undecodable", f"{schema.__name__}: {where}: {detail['msg']}; do both ends run the same quorsum?"
        ) from None


def enrollment_statement(fingerprint: str, request: EnrollRequest) -> tuple[bytes, ...]:
    """What the three keys sign, in parts: all fields of a request but the proofs, and the authority it is for."""
    return (
        bytes.fromhex(fingerprint),
        bytes([request.version]),
        request.site.encode(),
        bytes.fromhex(request.secret_hex),
        bytes.fromhex(request.identity),
        request.node_key.encode(),
        request.request.encode(),
    )


def words_of(fingerprint: str, site: str, identity: str, keys: Keys) -> str:
    """The six words of an enrollment; both ends work them out for themselves.

    Args:
        fingerprint: of the authority, hex.
        site: name.
        identity: public identity, hex.
        keys: of the same site.
    """
    parts = (bytes.fromhex(fingerprint), site.encode(), bytes.fromhex(identity))
    return six_words(WORDS.encode(), *parts, bytes.fromhex(keys.node), bytes.fromhex(keys.tls))


def key_epoch(members: Iterable[tuple[str, str]]) -> str:
    """The epoch of a shared key: it ends when anybody joins, leaves or is revoked.

    Args:
        members: name and public identity (hex) of every approved member, in any order.

    Returns:
        64 hexadecimal digits.
    """
    parts = [part for site, identity in sorted(members) for part in (site.encode(), bytes.fromhex(identity))]
    return tagged(EPOCH, *parts).hex()


def relay_info(epoch: str, sender: str, recipient: str) -> bytes:
    """Under what a key is sealed: it opens for one recipient, from one sender, in one epoch."""
    return tagged(RELAY_INFO, bytes.fromhex(epoch), sender.encode(), recipient.encode())


def relay_statement(epoch: str, sender: str, recipient: str, sealed: bytes) -> tuple[bytes, ...]:
    """What the sender of a sealed key signs under :data:`RELAY`, in parts."""
    return bytes.fromhex(epoch), sender.encode(), recipient.encode(), sealed


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 field.

    Raises:
        Refusal: ``undecodable``.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal("undecodable", "the sealed key is not base64; do both ends run the same quorsum?") from None


def encode_base64(data: bytes) -> str:
    """Bytes for a field."""
    return base64.b64encode(data).decode("ascii")


def encode_detail(code: str, message: str, server_time: float) -> str:
    """A refusal as the details of a gRPC status; ASCII, since they travel in a header."""
    return json.dumps({"code": code, "message": message[:1500], "server_time": round(server_time, 3)})


def decode_detail(details: str) -> tuple[Refusal, float] | None:
    """Read what :func:`encode_detail` wrote; None when the details came from elsewhere."""
    try:
        fields = json.loads(details)
        code, message, when = fields["code"], fields["message"], fields["server_time"]
    except (ValueError, TypeError, KeyError):
        return None
    if not (isinstance(code, str) and isinstance(message, str) and isinstance(when, int | float)):
        return None
    return Refusal(code[:64], message), float(when)


def check_state(state: State, site: str) -> None:
    """Nothing, for a site that is pending or approved.

    Raises:
        Refusal: ``refused``, ``revoked`` or ``left``, with what the site's operator can do.
    """
    sentences = {
        "refused": "the coordinator's operator refused it; ask them why, and for a new invitation",
        "revoked": "the coordinator's operator revoked it; its keys are never accepted again. To join anew, ask for a "
        "new invitation and enrol from a new, empty home",
        "left": "it left the federation; its keys are never accepted again. To join anew, ask for a new invitation and "
        "enrol from a new, empty home",
    }
    if state in sentences:
        raise Refusal(state, f"site {site}: {sentences[state]}")
