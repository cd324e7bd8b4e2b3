"""A site's two long-term keys: Ed25519 to sign with, X25519 to be sealed to.

Signatures are over domain-separated digests, never over bytes that somebody else chose. Sealing is HPKE in base mode
(RFC 9180: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM): it says nothing about the sender, who signs a
commitment to what was sealed. The ephemeral key of each sealing is drawn by the library ``cryptography`` from the
operating system; it takes no other source.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from quorsum.crypto.labels import tagged
from quorsum.crypto.randomness import draw
from quorsum.crypto.suite import RandomBytes
from quorsum.errors import KeyMaterialError, Refusal

__all__ = ["PUBLIC_IDENTITY_LENGTH", "SEAL_OVERHEAD", "SIGNATURE_LENGTH", "Identity", "PublicIdentity"]

PUBLIC_IDENTITY_LENGTH = 64
"""Bytes of a public identity: the Ed25519 key, then the X25519 key."""

SIGNATURE_LENGTH = 64
"""Bytes of a signature."""

SEAL_OVERHEAD = 48
"""Bytes that sealing adds: an encapsulated X25519 key and a GCM tag."""

_MAGIC = b"quorsum/identity/v1\x00"
_KEY = 32
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
_CURVE = 2**255 - 19


def _has_small_order(montgomery: bytes) -> bool:
    # RFC 7748, section 6.1: multiplying a point of small order by any clamped scalar gives zero, which is refused.
    try:
        X25519PrivateKey.from_private_bytes(b"\x01" * _KEY).exchange(X25519PublicKey.from_public_bytes(montgomery))
    except ValueError:
        return True
    return False


def _montgomery(edwards: bytes) -> bytes:
    """Map an Ed25519 key to u = (1 + y) / (1 - y); the neutral element, where u is infinite, is taken to zero."""
    y = (int.from_bytes(edwards, "little") & (2**255 - 1)) % _CURVE
    u = (1 + y) * pow(1 - y, -1, _CURVE) % _CURVE if y != 1 else 0
    return u.to_bytes(_KEY, "little")


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a site.

    Attributes:
        signing: 32 bytes, an Ed25519 public key.
        sealing: 32 bytes, an X25519 public key.
    """

    signing: bytes
    sealing: bytes

    def __post_init__(self) -> None:
        """Check both keys.

        Raises:
            KeyMaterialError: a key has the wrong length or small order. Anything would verify under such a signing
                key, and whatever is sealed to such a sealing key is public.
        """
        for name, key in (("signing", self.signing), ("sealing", self.sealing)):
            if len(key) != _KEY:
                raise KeyMaterialError("unreadable", f"the public {name} key has {len(key)} bytes instead of {_KEY}")
        for name, point in (("signing", _montgomery(self.signing)), ("sealing", self.sealing)):
            if _has_small_order(point):
                raise KeyMaterialError("weak-key", f"the public {name} key has small order; make a new identity")

    @property
    def hex(self) -> str:
        """All 64 bytes in 128 hexadecimal digits, as the roster lists them."""
        return self.to_bytes().hex()

    def to_bytes(self) -> bytes:
        """The Ed25519 key, then the X25519 key: 64 bytes."""
        return self.signing + self.sealing

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicIdentity:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            KeyMaterialError: these are not 64 bytes, or a key is unusable.
        """
        if len(data) != PUBLIC_IDENTITY_LENGTH:
            raise KeyMaterialError(
                "unreadable",
                f"a public identity has {PUBLIC_IDENTITY_LENGTH} bytes, got {len(data)}; ask the site for it",
            )
        return cls(data[:_KEY], data[_KEY:])

    @classmethod
    def from_hex(cls, text: str) -> PublicIdentity:
        """Read 128 lower-case hexadecimal digits.

        Raises:
            KeyMaterialError: the text is anything else, or a key is unusable.
        """
        if len(text) != 2 * PUBLIC_IDENTITY_LENGTH or set(text) - set("0123456789abcdef"):
            raise KeyMaterialError(
                "unreadable",
                f"a public identity is written as {2 * PUBLIC_IDENTITY_LENGTH} lower-case hexadecimal digits",
            )
        return cls.from_bytes(bytes.fromhex(text))

    def verify(self, signature: bytes, label: str, *parts: bytes) -> bool:
        """Whether this site signed ``parts`` under ``label``."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signing).verify(signature, tagged(label, *parts))
        except (InvalidSignature, ValueError):
            return False
        return True

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        """Seal to this site; ``len(plaintext) + SEAL_OVERHEAD`` bytes, different each time.

        Args:
            plaintext: what only this site may read.
            info: what it is about; opening needs the same.
        """
        return _HPKE.encrypt(plaintext, X25519PublicKey.from_public_bytes(self.sealing), info)


@dataclass(frozen=True)
class Identity:
    """The keys themselves. Nothing secret shows in ``repr``.

    Attributes:
        signing_seed: 32 bytes, the Ed25519 private key.
        sealing_seed: 32 bytes, the X25519 private key.
    """

    signing_seed: bytes = field(repr=False)
    sealing_seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            KeyMaterialError: a key is not 32 bytes.
        """
        if len(self.signing_seed) != _KEY or len(self.sealing_seed) != _KEY:
            raise KeyMaterialError("unreadable", f"both private keys of an identity have {_KEY} bytes")

    def __repr__(self) -> str:
        return f"Identity(public={self.public().hex!r})"

    @classmethod
    def generate(cls, random_bytes: RandomBytes) -> Identity:
        """Make a new identity.

        Raises:
            UsageError: the source gave another number of bytes than it was asked for.
        """
        return cls(draw(random_bytes, _KEY), draw(random_bytes, _KEY))

    def public(self) -> PublicIdentity:
        """The public half."""
        signing = Ed25519PrivateKey.from_private_bytes(self.signing_seed).public_key()
        sealing = X25519PrivateKey.from_private_bytes(self.sealing_seed).public_key()
        return PublicIdentity(signing.public_bytes_raw(), sealing.public_bytes_raw())

    def to_bytes(self) -> bytes:
        """Write the identity, with its public half so that damage shows. Whoever reads this can act as the site."""
        return _MAGIC + self.signing_seed + self.sealing_seed + self.public().to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            KeyMaterialError: the bytes are not an identity of this version, are cut off or damaged.
        """
        if not data.startswith(_MAGIC):
            raise KeyMaterialError(
                "unreadable", "this is not an identity of version 1; make one with Identity.generate"
            )
        length = len(_MAGIC) + 2 * _KEY + PUBLIC_IDENTITY_LENGTH
        if len(data) != length:
            raise KeyMaterialError("unreadable", f"an identity has {length} bytes, got {len(data)}; restore it")
        seeds = data[len(_MAGIC) : -PUBLIC_IDENTITY_LENGTH]
        identity = cls(seeds[:_KEY], seeds[_KEY:])
        if identity.public().to_bytes() != data[-PUBLIC_IDENTITY_LENGTH:]:
            raise KeyMaterialError("mismatched-keys", "the identity is damaged: its halves do not fit; restore it")
        return identity

    def sign(self, label: str, *parts: bytes) -> bytes:
        """Sign ``parts`` under ``label``, a name from ``labels``; 64 bytes, the same each time (RFC 8032)."""
        return Ed25519PrivateKey.from_private_bytes(self.signing_seed).sign(tagged(label, *parts))

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open what was sealed to this site about ``info``.

        Raises:
            Refusal: ``undecryptable``: it was sealed to another key, is about something else, or is damaged.
        """
        try:
            return _HPKE.decrypt(sealed, X25519PrivateKey.from_private_bytes(self.sealing_seed), info)
        except (InvalidTag, ValueError):
            raise Refusal(
                "undecryptable", "what was sealed to this site cannot be opened: another key, another round, or damage"
            ) from None
