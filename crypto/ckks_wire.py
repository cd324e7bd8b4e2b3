"""Bytes of the suite ``ckks``: ciphertexts, frames, contexts. All that touches the library's formats is here.

A ciphertext travels as the homomorphic library (SEAL) writes it, without the wrapper of TenSEAL, whose
fields (sizes, scale) the receiver would otherwise have to believe. The receiver puts on a wrapper of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import tenseal as ts
from numpy.typing import NDArray
from tenseal import sealapi

from quorsum.crypto.ckks_parameters import BATCH, CKKS_V1
from quorsum.crypto.suite import Blocks
from quorsum.errors import KeyMaterialError, Refusal

__all__ = [
    "CipherVector",
    "Context",
    "MalformedError",
    "ciphertext_bytes",
    "context_bytes",
    "encrypt_complex",
    "load_ciphertext",
    "load_context",
    "new_context",
    "pack_blocks",
    "parameters_only",
    "read_blocks",
]

CipherVector: TypeAlias = Any
"""A ``tenseal.CKKSVector`` of exactly one ciphertext (the library publishes no types)."""

Context: TypeAlias = Any
"""A ``tenseal.Context``."""

_FRAME = struct.Struct("<I")
# Wrapper of TenSEAL (protocol buffers): field 1, packed: one chunk of 4096 values; field 2: the ciphertext;
# field 3: the scale.
_HEAD = b"\x0a\x02\x80\x20\x12"
_TAIL = b"\x19" + struct.pack("<d", CKKS_V1.scale)
# Residues are random, so compression gains nothing; what remains is a header and a checksum or two.
_SLACK = 4096


class MalformedError(Refusal):
    """Bytes that are not what they should be. Callers turn it into a fault of whoever sent them."""


def new_context() -> Context:
    """A context with a fresh key pair, from the library's own generator (seeded by the operating system).

    All automatic steps are off before anything is written: the library cannot switch relinearisation
    off any more once a context has lost its secret key.
    """
    context = ts.context(ts.SCHEME_TYPE.CKKS, CKKS_V1.degree, -1, list(CKKS_V1.moduli_bits), n_threads=1)
    context.global_scale = CKKS_V1.scale
    context.auto_relin = context.auto_rescale = context.auto_mod_switch = False
    return context


def context_bytes(context: Context, *, public_key: bool, secret_key: bool) -> bytes:
    """Serialise a context with the keys asked for. Relinearisation and Galois keys are never written."""
    written: bytes = context.serialize(
        save_public_key=public_key, save_secret_key=secret_key, save_relin_keys=False, save_galois_keys=False
    )
    return written


@cache
def parameters_only() -> bytes:
    """A context of CKKS_V1 that holds no key, serialised (89 bytes)."""
    return context_bytes(new_context(), public_key=False, secret_key=False)


def load_context(data: bytes) -> Context:
    """Load a context and check that it has exactly the parameters CKKS_V1.

    Raises:
        KeyMaterialError: ``unreadable``, ``wrong-parameters`` or ``evaluation-keys``.
    """
    if not data:
        raise KeyMaterialError("unreadable", "the context is empty; create the site key anew or fetch it again")
    try:
        context = ts.context_from(data, 1)
        bare = context_bytes(context, public_key=False, secret_key=False)
    except (RuntimeError, ValueError, MemoryError, IndexError) as error:
        raise KeyMaterialError("unreadable", f"this is not a TenSEAL context: {error}") from error
    if bare != parameters_only():
        raise KeyMaterialError(
            "wrong-parameters",
            f"the context has other parameters than CKKS_V1 (N = {CKKS_V1.degree}, moduli of "
            f"{list(CKKS_V1.moduli_bits)} bits, scale 2^{CKKS_V1.scale_bits}, nothing automatic); "
            "use one made by generate_site_key",
        )
    if context.has_relin_keys() or context.has_galois_keys():
        raise KeyMaterialError(
            "evaluation-keys", "the context holds relinearisation or Galois keys, which this suite never uses"
        )
    return context


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def ciphertext_bytes(vector: CipherVector) -> bytes:
    """Serialise the one ciphertext of a vector, without the wrapper."""
    wrapped: bytes = vector.serialize()
    start = len(_HEAD) + len(_varint(len(wrapped)))
    bare = wrapped[start : -len(_TAIL)]
    if wrapped[:start] != _HEAD + _varint(len(bare)) or not wrapped.endswith(_TAIL):
        raise RuntimeError("TenSEAL writes its vectors in another format than that of version 0.3; pin tenseal<0.4")
    return bare


def _wrapped(ciphertext: bytes) -> bytes:
    return _HEAD + _varint(len(ciphertext)) + ciphertext + _TAIL


def encrypt_complex(context: Context, slots: NDArray[np.complex128]) -> CipherVector:
    """Encrypt complex numbers, which TenSEAL itself does not take, at the scale 2^50. About 4 ms.

    The library below it writes to files only, so the ciphertext (not the numbers) passes through a temporary one.

    Args:
        context: with the public key.
        slots: complex128, shape (4096,).
    """
    library = context.seal_context().data
    plain, cipher = sealapi.Plaintext(), sealapi.Ciphertext()
    sealapi.CKKSEncoder(library).encode(slots.tolist(), CKKS_V1.scale, plain)
    sealapi.Encryptor(library, context.public_key().data).encrypt(plain, cipher)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ciphertext"
        cipher.save(str(path))
        return ts.ckks_vector_from(context, _wrapped(path.read_bytes()))


def load_ciphertext(context: Context, data: bytes, *, size: int, moduli: int) -> CipherVector:
    """Load one ciphertext and check all that can be checked without a key.

    Args:
        context: a context from :func:`load_context`.
        data: as written by :func:`ciphertext_bytes`.
        size: polynomials it must have: 2, or 3 for a product.
        moduli: moduli it must have: 2 when fresh, 1 when rescaled.

    Raises:
        MalformedError: ``undecodable``, ``wrong-level``, ``wrong-scale`` or ``plaintext``.
    """
    limit = size * moduli * CKKS_V1.degree * 8 + _SLACK
    if not data or len(data) > limit:
        raise MalformedError("undecodable", f"a ciphertext has between 1 and {limit} bytes, got {len(data)}")
    try:
        vector = ts.ckks_vector_from(context, _wrapped(data))
        ciphertexts = vector.ciphertext()
    except (RuntimeError, ValueError, MemoryError, IndexError) as error:
        raise MalformedError("undecodable", f"not a ciphertext of these parameters: {error}") from error
    if len(ciphertexts) != 1 or vector.size() != CKKS_V1.slots:
        raise MalformedError("undecodable", "not exactly one ciphertext")
    ciphertext = ciphertexts[0]
    if ciphertext.size() != size or ciphertext.coeff_modulus_size() != moduli or not ciphertext.is_ntt_form():
        raise MalformedError(
            "wrong-level",
            f"expected {size} polynomials with {moduli} moduli, got {ciphertext.size()} with "
            f"{ciphertext.coeff_modulus_size()}",
        )
    if ciphertext.scale != CKKS_V1.scale:
        raise MalformedError("wrong-scale", f"expected the scale 2^{CKKS_V1.scale_bits}, got {ciphertext.scale:g}")
    if ciphertext.is_transparent():
        raise MalformedError("plaintext", "a plaintext in a ciphertext's clothes: anyone can read it")
    return vector


def pack_blocks(items: Iterable[bytes]) -> Blocks:
    """Frame items (4 bytes of length, little-endian, then the item) and put ``BATCH`` of them in each block."""
    blocks: list[bytes] = []
    frames: list[bytes] = []
    for item in items:
        frames += (_FRAME.pack(len(item)), item)
        if len(frames) == 2 * BATCH:
            blocks.append(b"".join(frames))
            frames = []
    if frames:
        blocks.append(b"".join(frames))
    return tuple(blocks)


def read_blocks(blocks: Blocks, count: int) -> Iterator[bytes]:
    """Take ``count`` items out of blocks written by :func:`pack_blocks`, one at a time.

    Raises:
        MalformedError: ``wrong-shape``: there are more, fewer, or cut items.
    """
    expected = -(-count // BATCH)
    if len(blocks) != expected:
        raise MalformedError("wrong-shape", f"expected {expected} blocks, got {len(blocks)}")
    for number, block in enumerate(blocks):
        items = min(BATCH, count - number * BATCH)
        offset = 0
        for _ in range(items):
            if len(block) - offset < _FRAME.size:
                raise MalformedError("wrong-shape", f"block {number} ends before its {items} items")
            (length,) = _FRAME.unpack_from(block, offset)
            offset += _FRAME.size
            if len(block) - offset < length:
                raise MalformedError("wrong-shape", f"an item of block {number} is cut off")
            yield block[offset : offset + length]
            offset += length
        if offset != len(block):
            raise MalformedError("wrong-shape", f"block {number} has {len(block) - offset} bytes too many")
