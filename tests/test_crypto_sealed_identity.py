from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import labels
from quorsum.crypto.identity import PUBLIC_IDENTITY_LENGTH, SEAL_OVERHEAD, SIGNATURE_LENGTH, Identity, PublicIdentity
from quorsum.errors import KeyMaterialError, Refusal, UsageError

SITE = Identity.generate(os.urandom)
OTHER = Identity.generate(os.urandom)

Q = 2**255 - 19
# y of the points of order 1, 2, 4 and 8 of edwards25519 (RFC 8032's curve), and the encodings of 0 and 1 beyond q.
SMALL_Y = [
    0,
    1,
    Q - 1,
    Q,
    Q + 1,
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
]
# u of the points of small order of curve25519 and its twist.
SMALL_U = [
    0,
    1,
    Q - 1,
    Q,
    Q + 1,
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
]


# --- forgery ---


def test_a_signature_holds_for_one_label_one_site_and_one_message():
    public = SITE.public()
    signature = SITE.sign(labels.ROOT_CERTIFICATE, b"ab", b"c")
    assert len(signature) == SIGNATURE_LENGTH
    assert public.verify(signature, labels.ROOT_CERTIFICATE, b"ab", b"c")
    assert not public.verify(signature, labels.VIEW, b"ab", b"c")
    assert not public.verify(signature, labels.ROOT_CERTIFICATE, b"a", b"bc")
    assert not public.verify(signature, labels.ROOT_CERTIFICATE, b"abc")
    assert not public.verify(signature, labels.ROOT_CERTIFICATE, b"ab", b"c", b"")
    assert not OTHER.public().verify(signature, labels.ROOT_CERTIFICATE, b"ab", b"c")


@given(st.integers(0, 8 * SIGNATURE_LENGTH - 1))
def test_a_signature_with_one_flipped_bit_does_not_hold(bit):
    signature = bytearray(SITE.sign(labels.TICKET, b"x"))
    signature[bit // 8] ^= 1 << (bit % 8)
    assert not SITE.public().verify(bytes(signature), labels.TICKET, b"x")


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65)])
def test_what_is_no_signature_does_not_hold(signature):
    assert not SITE.public().verify(signature, labels.TICKET, b"x")


def test_a_signing_key_that_is_no_point_verifies_nothing():
    public = next(
        PublicIdentity(y.to_bytes(32, "little"), SITE.public().sealing)
        for y in range(2, 20)
        # y = 2 is the smallest y of no point: (y^2 - 1) / (d y^2 + 1) is no square there.
        if pow((y * y - 1) * pow(-121665 * pow(121666, -1, Q) * y * y + 1, -1, Q), (Q - 1) // 2, Q) == Q - 1
    )
    assert not public.verify(SITE.sign(labels.TICKET, b"x"), labels.TICKET, b"x")


@pytest.mark.parametrize("y", SMALL_Y)
@pytest.mark.parametrize("sign", [0, 1 << 255])
def test_signing_keys_of_small_order_are_refused(y, sign):
    with pytest.raises(KeyMaterialError, match="signing key has small order") as caught:
        PublicIdentity((y | sign).to_bytes(32, "little"), SITE.public().sealing)
    assert caught.value.code == "weak-key"


@pytest.mark.parametrize("u", SMALL_U)
def test_sealing_keys_of_small_order_are_refused(u):
    with pytest.raises(KeyMaterialError, match="sealing key has small order") as caught:
        PublicIdentity(SITE.public().signing, u.to_bytes(32, "little"))
    assert caught.value.code == "weak-key"


# --- sealing ---


@given(st.binary(max_size=200), st.binary(max_size=50))
@settings(max_examples=30, deadline=None)
def test_what_is_sealed_opens_for_its_site_and_purpose_only(plaintext, info):
    sealed = SITE.public().seal(plaintext, info)
    assert len(sealed) == len(plaintext) + SEAL_OVERHEAD
    assert SITE.open(sealed, info) == plaintext
    for identity, about in ((OTHER, info), (SITE, info + b"\x00")):
        with pytest.raises(Refusal) as caught:
            identity.open(sealed, about)
        assert caught.value.code == "undecryptable"


def test_sealing_twice_gives_different_bytes():
    assert SITE.public().seal(b"x", b"") != SITE.public().seal(b"x", b"")


@given(st.integers(0, 8 * (SEAL_OVERHEAD + 3) - 1))
@settings(deadline=None)
def test_one_flipped_bit_cannot_be_opened(bit):
    sealed = bytearray(SITE.public().seal(b"abc", b"info"))
    # RFC 7748, section 5: the highest bit of an X25519 key is ignored by the curve, but not by HPKE's key schedule.
    sealed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(Refusal):
        SITE.open(bytes(sealed), b"info")


@pytest.mark.parametrize("length", [0, 1, 31, 32, SEAL_OVERHEAD - 1, SEAL_OVERHEAD])
def test_what_is_cut_off_or_of_zeros_cannot_be_opened(length):
    with pytest.raises(Refusal) as caught:
        SITE.open(bytes(length), b"")
    assert caught.value.code == "undecryptable"


def test_sealing_is_the_hpke_that_the_module_names():
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
    key = X25519PrivateKey.from_private_bytes(SITE.sealing_seed)
    assert SITE.open(suite.encrypt(b"hello", key.public_key(), b"info"), b"info") == b"hello"


# --- writing and reading ---


def test_an_identity_survives_writing_and_reading():
    assert Identity.from_bytes(SITE.to_bytes()) == SITE
    public = SITE.public()
    assert PublicIdentity.from_bytes(public.to_bytes()) == PublicIdentity.from_hex(public.hex) == public
    assert len(public.to_bytes()) == PUBLIC_IDENTITY_LENGTH
    assert public.to_bytes() == public.signing + public.sealing


def test_the_keys_are_those_of_the_standards():
    # RFC 8032, section 7.1, test 1, and RFC 7748, section 6.1, Bob.
    identity = Identity(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"),
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"),
    )
    assert identity.public().signing.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert identity.public().sealing.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


def test_nothing_secret_shows():
    for text in (repr(SITE), str(SITE), f"{SITE!s:>10}"):
        assert SITE.signing_seed.hex() not in text
        assert SITE.sealing_seed.hex() not in text
        assert repr(SITE.signing_seed) not in text
        assert SITE.public().hex in text


def test_two_identities_differ_in_both_keys():
    assert SITE.public().signing != OTHER.public().signing
    assert SITE.public().sealing != OTHER.public().sealing
    assert SITE.signing_seed != SITE.sealing_seed


@pytest.mark.parametrize("data", [b"", b"quorsum/identity/v2\x00", SITE.to_bytes()[1:], os.urandom(148)])
def test_what_is_no_identity_is_refused(data):
    with pytest.raises(KeyMaterialError, match="not an identity of version 1"):
        Identity.from_bytes(data)


@pytest.mark.parametrize("data", [SITE.to_bytes()[:-1], SITE.to_bytes() + b"\x00", SITE.to_bytes()[:20]])
def test_an_identity_of_another_length_is_refused(data):
    with pytest.raises(KeyMaterialError, match=f"has 148 bytes, got {len(data)}"):
        Identity.from_bytes(data)


@pytest.mark.parametrize("place", [21, 60, 90, 147])
def test_a_damaged_identity_is_refused(place):
    data = bytearray(SITE.to_bytes())
    data[place] ^= 4
    with pytest.raises(KeyMaterialError, match="halves do not fit") as caught:
        Identity.from_bytes(bytes(data))
    assert caught.value.code == "mismatched-keys"


@pytest.mark.parametrize("seeds", [(b"", bytes(32)), (bytes(32), bytes(33))])
def test_private_keys_of_another_length_are_refused(seeds):
    with pytest.raises(KeyMaterialError, match="32 bytes"):
        Identity(*seeds)


@pytest.mark.parametrize("keys", [(bytes(31), SITE.public().sealing), (SITE.public().signing, bytes(33))])
def test_public_keys_of_another_length_are_refused(keys):
    with pytest.raises(KeyMaterialError, match="instead of 32"):
        PublicIdentity(*keys)


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(65)])
def test_a_public_identity_of_another_length_is_refused(data):
    with pytest.raises(KeyMaterialError, match="64 bytes"):
        PublicIdentity.from_bytes(data)


@pytest.mark.parametrize("text", ["", SITE.public().hex[1:], SITE.public().hex[:-2] + "AB", " " * 128, "g" * 128])
def test_a_public_identity_that_is_not_in_hexadecimal_digits_is_refused(text):
    with pytest.raises(KeyMaterialError, match="128 lower-case"):
        PublicIdentity.from_hex(text)


def test_a_broken_source_is_refused():
    with pytest.raises(UsageError, match="random_bytes"):
        Identity.generate(lambda count: b"\x00")
