"""The one line with which a site joins: where the coordinator is, how to know it, and a secret that works once.

Layout, before base64url without padding behind ``qsum1-``:

| bytes | what |
|---|---|
| 1 | version, 1 |
| 4 | when it expires, seconds since 1970, big-endian |
| 32 | SHA-256 of the DER of the authority's certificate |
| 16 | the secret |
| 1 + n | length and UTF-8 of the address ``host:port`` |
| 1 + n | length and UTF-8 of the site's name |
| 4 | the first bytes of a tagged SHA-256 over everything before |

The checksum finds slips of the pen, not attackers: those are stopped by the fingerprint and by the secret, of which
the coordinator keeps a hash. The text is a secret until it is used; nothing here puts it into an error.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from dataclasses import dataclass, field
from typing import Final

from quorsum.crypto.randomness import tagged_hash
from quorsum.errors import Refusal, UsageError

__all__ = [
    "FEDERATION_PATTERN",
    "PREFIX",
    "SECRET_BYTES",
    "SITE_PATTERN",
    "Invitation",
    "decode",
    "encode",
    "secret_hash",
    "split_address",
]

PREFIX: Final = "qsum1-"
SECRET_BYTES: Final = 16
SITE_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""What the name of a site looks like: it becomes a common name and a file name."""

FEDERATION_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,47}$"
"""What the name of a federation looks like: sites show it on their terminals."""

_VERSION: Final = 1
_HEAD: Final = struct.Struct(f">BI32s{SECRET_BYTES}s")
_CHECKSUM: Final = 4
_LONGEST_TEXT: Final = 2048


@dataclass(frozen=True)
class Invitation:
    """An invitation for one site. The secret does not show in ``repr``.

    Attributes:
        address: where the coordinator takes enrollments, ``host:port``.
        fingerprint: SHA-256 of the authority's certificate, 64 hexadecimal digits.
        site: the name under which the site joins.
        expires: seconds since 1970, below 2**32.
        secret: 16 bytes.
    """

    address: str
    fingerprint: str
    site: str
    expires: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: naming the field.
        """
        split_address(self.address)
        if len(self.address.encode()) > 255:
            raise UsageError("the address of the coordinator is longer than 255 bytes")
        if not re.fullmatch(r"[0-9a-f]{64}", self.fingerprint):
            raise UsageError("a fingerprint is written as 64 lower-case hexadecimal digits")
        if not re.fullmatch(SITE_PATTERN, self.site):
            raise UsageError(
                f"{self.site!r} cannot be the name of a site: letters, digits, '.', '_' and '-', at most 63, "
                "the first a letter or digit"
            )
        if not 0 <= self.expires < 2**32:
            raise UsageError(f"an invitation expires between 1970 and 2106, got {self.expires}")
        if len(self.secret) != SECRET_BYTES:
            raise UsageError(f"the secret of an invitation has {SECRET_BYTES} bytes, got {len(self.secret)}")


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of ``host:port``; an IPv6 address stands in brackets, ``[::1]:7401``.

    Raises:
        UsageError: it is written in another way.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]@]+):([0-9]{1,5})", address)
    if not match or not 0 < int(match[2]) < 2**16:
        raise UsageError(f"{address!r} is not an address; write host:port, such as coordinator.example:7401")
    return match[1].strip("[]"), int(match[2])


def secret_hash(secret: bytes) -> bytes:
    """What the coordinator keeps of a secret, 32 bytes. The secret has 128 bits, so a plain hash is enough."""
    return tagged_hash("invitation-secret", secret)


def encode(invitation: Invitation) -> str:
    """The invitation as one line that can be copied and pasted."""
    head = _HEAD.pack(_VERSION, invitation.expires, bytes.fromhex(invitation.fingerprint), invitation.secret)
    texts = (invitation.address.encode(), invitation.site.encode())
    body = head + b"".join(bytes([len(text)]) + text for text in texts)
    return PREFIX + _base64(body + _checksum(body))


def decode(text: str) -> Invitation:
    """Read an invitation; white space and line breaks anywhere in it do no harm.

    Raises:
        Refusal: ``not-an-invitation`` (it does not begin like one), ``invitation-version`` (made by another version),
            ``invitation-damaged`` (a part is missing or was changed). The text itself is never repeated.
    """
    compact = "".join(text.split()) if len(text) <= 4 * _LONGEST_TEXT else ""
    match = re.match(r"qsum([0-9]{1,4})-", compact)
    if not match:
        raise Refusal(
            "not-an-invitation", f"this is not an invitation: one begins with {PREFIX}; paste the whole line again"
        )
    if match[0] != PREFIX:
        raise _other_version(match[1])
    body = _body(compact[len(PREFIX) :])
    if body[0] != _VERSION:
        raise _other_version(str(body[0]))
    try:
        _, expires, fingerprint, secret = _HEAD.unpack_from(body)
        address, rest = _text(body[_HEAD.size :])
        site, rest = _text(rest)
        if rest:
            raise ValueError
        return Invitation(address, fingerprint.hex(), site, expires, secret)
    except (struct.error, ValueError, IndexError):
        raise _damaged() from None


def _body(text: str) -> bytes:
    try:
        if len(text) > _LONGEST_TEXT:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _damaged() from None
    body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    # The second comparison: the last character has bits that decoding ignores, and there is one spelling only.
    if not body or _checksum(body) != checksum or _base64(data) != text:
        raise _damaged()
    return body


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _checksum(body: bytes) -> bytes:
    return tagged_hash("invitation-checksum", body)[:_CHECKSUM]


def _text(data: bytes) -> tuple[str, bytes]:
    length = data[0]
    if len(data) < 1 + length:
        raise ValueError
    return data[1 : 1 + length].decode(), data[1 + length :]


def _damaged() -> Refusal:
    return Refusal(
        "invitation-damaged",
        "the invitation is incomplete or was changed on the way; copy all of it once more, or ask the coordinator's "
        "operator for a new one",
    )


def _other_version(version: str) -> Refusal:
    return Refusal(
        "invitation-version",
        f"the invitation has version {version}, this program reads version {_VERSION}; install the version of quorsum "
        "that the coordinator has",
    )
