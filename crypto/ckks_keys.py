"""The key that all sites of a ``ckks`` federation share, and its public half.

One key pair serves everybody: whoever holds the site key can read every update. It never goes to the coordinator.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import tenseal as ts

from quorsum.crypto.ckks_context import EVALUATION_PARTS, MAX_PUBLIC_BYTES, SECRET_PARTS, context_parts
from quorsum.crypto.ckks_parameters import CKKS_V1
from quorsum.crypto.ckks_wire import Context, context_bytes, load_context, new_context
from quorsum.crypto.randomness import draw, tagged_hash
from quorsum.crypto.suite import RandomBytes
from quorsum.errors import KeyMaterialError

__all__ = ["CkksSiteKey", "check_public_context", "generate_site_key"]

_MAGIC = b"quorsum/ckks-site-key/v1\x00"
_LENGTH = struct.Struct("<I")
_FLOODING_BYTES = 32


@dataclass(frozen=True)
class CkksSiteKey:
    """Everything secret about a federation that uses ``ckks``. Nothing secret shows in its ``repr``.

    Attributes:
        context: a serialised TenSEAL context with the secret and the public key.
        flooding: 32 bytes from which the sites derive the noise they add to what they release.
    """

    context: bytes = field(repr=False)
    flooding: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the key, including that its two halves belong together.

        Raises:
            KeyMaterialError: saying what is wrong with it.
        """
        if len(self.flooding) != _FLOODING_BYTES:
            raise KeyMaterialError("unreadable", f"the flooding secret has {len(self.flooding)} bytes instead of 32")
        loaded = load_context(self.context)
        if not loaded.has_secret_key():
            raise KeyMaterialError(
                "no-secret-key", "this is a public context; a site needs the site key made by generate_site_key"
            )
        if not loaded.has_public_key():
            raise KeyMaterialError("no-public-key", "the public key is missing; create the site key anew")
        probe = np.array(ts.ckks_vector(loaded, [1.0] * CKKS_V1.slots).decrypt())
        if not np.all(np.abs(probe - 1.0) < 2.0**-20):
            raise KeyMaterialError("mismatched-keys", "its public key does not belong to its secret key")

    def __repr__(self) -> str:
        return f"CkksSiteKey(key_id={self.key_id!r})"

    @property
    def key_id(self) -> str:
        """Public fingerprint, 32 hexadecimal digits. Sites that show the same one hold the same key."""
        return tagged_hash("ckks-key-id", self.context, self.flooding)[:16].hex()

    def load(self) -> Context:
        """The loaded context, with the secret key."""
        return load_context(self.context)

    def public_context(self) -> bytes:
        """The public half: a serialised context with the public key only (about 393 kB)."""
        return context_bytes(self.load(), public_key=True, secret_key=False)

    def to_bytes(self) -> bytes:
        """Write the key. Whoever reads these bytes can read every update; keep them off the coordinator."""
        return _MAGIC + self.flooding + _LENGTH.pack(len(self.context)) + self.context

    @classmethod
    def from_bytes(cls, data: bytes) -> CkksSiteKey:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            KeyMaterialError: the bytes are not a site key of this version, or the key is unusable.
        """
        if not data.startswith(_MAGIC):
            raise KeyMaterialError(
                "unreadable", "this is not a ckks site key of version 1; a site needs what generate_site_key made"
            )
        head = len(_MAGIC) + _FLOODING_BYTES + _LENGTH.size
        if len(data) < head:
            raise KeyMaterialError("unreadable", "the site key is cut off; fetch it again")
        (length,) = _LENGTH.unpack_from(data, head - _LENGTH.size)
        if len(data) != head + length:
            raise KeyMaterialError(
                "unreadable", f"the site key should have {head + length} bytes, got {len(data)}; fetch it again"
            )
        return cls(data[head:], data[len(_MAGIC) : len(_MAGIC) + _FLOODING_BYTES])


def generate_site_key(random_bytes: RandomBytes) -> CkksSiteKey:
    """Make the key of a new federation.

    Only the flooding secret comes from ``random_bytes``. The key pair and all encryption randomness come from
    the generator inside SEAL, which takes its seed from the operating system and accepts no other.
    """
    context = context_bytes(new_context(), public_key=True, secret_key=True)
    return CkksSiteKey(context, draw(random_bytes, _FLOODING_BYTES))


def check_public_context(data: bytes) -> bytes:
    """Check a context meant for the coordinator.

    Args:
        data: a serialised context.

    Returns:
        the same context as this library writes it, so that equal keys give equal bytes.

    Raises:
        KeyMaterialError: ``secret-key``, ``evaluation-keys``, ``no-public-key``, ``wrong-parameters``, or
            ``unreadable``. Keys that must not be there are found by their tags, before the library unpacks them:
            a few hundred kilobytes of them can take gigabytes of memory.
    """
    parts = context_parts(data)
    if parts & SECRET_PARTS:
        raise KeyMaterialError(
            "secret-key",
            "this context holds the secret key, with which the coordinator could read every update; delete it here, "
            "make a new site key at a site, and hand over its public context only",
        )
    if parts & EVALUATION_PARTS:
        raise KeyMaterialError(
            "evaluation-keys", "the context holds relinearisation or Galois keys, which this suite never uses"
        )
    if len(data) > MAX_PUBLIC_BYTES:
        raise KeyMaterialError(
            "wrong-parameters", f"a public context of CKKS_V1 has at most {MAX_PUBLIC_BYTES} bytes, got {len(data)}"
        )
    context = load_context(data)
    if not context.has_public_key():
        raise KeyMaterialError("no-public-key", "this context holds no public key")
    return context_bytes(context, public_key=True, secret_key=False)
