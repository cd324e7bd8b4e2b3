from __future__ import annotations

import os

import numpy as np
import pytest
import tenseal as ts
from crypto_federation import Federation, adopted, context_for, other_site, shared_site, updates_for

from quorsum.crypto import CkksCoordinator, CkksSite, CkksSiteKey, generate_site_key
from quorsum.crypto.ckks_keys import check_public_context
from quorsum.crypto.ckks_wire import context_bytes, load_context, new_context, parameters_only
from quorsum.errors import KeyMaterialError, UsageError

SITE = shared_site()
KEY = SITE.key
BARE = {"save_relin_keys": False, "save_galois_keys": False}


def foreign_context(*, bits=(60, 60, 60), scale=2.0**50, automatic=False, degree=8192) -> ts.Context:
    context = ts.context(ts.SCHEME_TYPE.CKKS, degree, -1, list(bits), n_threads=1)
    context.global_scale = scale
    context.auto_relin = context.auto_rescale = context.auto_mod_switch = automatic
    return context


def test_a_key_survives_writing_and_reading():
    again = CkksSiteKey.from_bytes(KEY.to_bytes())
    assert again == KEY
    assert again.key_id == KEY.key_id == CkksSite(again).key_id
    assert len(KEY.key_id) == 32


def test_every_key_is_another():
    assert other_site().key_id != KEY.key_id
    assert other_site().key.flooding != KEY.flooding


def test_nothing_secret_shows():
    for text in (repr(KEY), str(KEY), repr(CkksSite(KEY))):
        assert KEY.flooding.hex() not in text
        assert repr(KEY.flooding) not in text
        assert len(text) < 120
    assert len(repr(adopted(SITE))) < 120


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        KEY.context,
        KEY.to_bytes()[:40],
        KEY.to_bytes()[:-1],
        KEY.to_bytes() + b"\x00",
        KEY.to_bytes().replace(b"/v1\x00", b"/v2\x00", 1),
    ],
    ids=["empty", "nonsense", "context", "head", "cut", "longer", "version"],
)
def test_malformed_keys(data):
    with pytest.raises(KeyMaterialError) as caught:
        CkksSiteKey.from_bytes(data)
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize("position", [100, 1_000, 100_000])
def test_garbled_keys(position):
    data = bytearray(KEY.to_bytes())
    data[position] ^= 0xFF
    with pytest.raises(KeyMaterialError):
        CkksSiteKey.from_bytes(bytes(data))


def test_a_key_without_its_secret_half():
    with pytest.raises(KeyMaterialError, match="public context") as caught:
        CkksSiteKey(KEY.public_context(), KEY.flooding)
    assert caught.value.code == "no-secret-key"


def test_a_key_without_its_public_half():
    with pytest.raises(KeyMaterialError) as caught:
        CkksSiteKey(context_bytes(KEY.load(), public_key=False, secret_key=True), KEY.flooding)
    assert caught.value.code == "no-public-key"


def test_halves_of_different_keys():
    # Field 1 of the public part and of the private part are simply concatenated messages in protocol buffers, and
    # the later field wins: append the secret of another key.
    other = context_bytes(other_site().key.load(), public_key=False, secret_key=True)
    with pytest.raises(KeyMaterialError) as caught:
        CkksSiteKey(KEY.public_context() + other, KEY.flooding)
    assert caught.value.code == "mismatched-keys"


def test_a_short_flooding_secret():
    with pytest.raises(KeyMaterialError, match="31 bytes"):
        CkksSiteKey(KEY.context, KEY.flooding[:-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": (60, 40, 60)},
        {"bits": (60, 60)},
        {"degree": 16384},
        {"scale": 2.0**40},
        {"automatic": True},
    ],
    ids=str,
)
def test_other_parameters(changes):
    context = foreign_context(**changes)
    private = context.serialize(save_public_key=True, save_secret_key=True, **BARE)
    public = context.serialize(save_public_key=True, save_secret_key=False, **BARE)
    with pytest.raises(KeyMaterialError) as caught:
        CkksSiteKey(private, KEY.flooding)
    assert caught.value.code == "wrong-parameters"
    assert refused(public).code == "wrong-parameters"


def test_a_coordinator_refuses_the_secret_key():
    assert refused(KEY.context).code == "secret-key"
    assert "could read every update" in refused(KEY.context).message


def test_a_coordinator_refuses_evaluation_keys():
    context = new_context()
    context.generate_relin_keys()
    data = context.serialize(save_public_key=True, save_secret_key=False, save_relin_keys=True, save_galois_keys=False)
    assert refused(data).code == "evaluation-keys"


def length_of(data: bytes) -> bytes:
    number, out = len(data), bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def with_inner(field: bytes) -> bytes:
    """Our public context with one field more in its public part."""
    # The parameters come first; without keys, the public part after them has 2 + 9 bytes.
    at = len(parameters_only()) - 11
    head, public = KEY.public_context()[:at], KEY.public_context()[at + 4 :]
    return head + b"\x12" + length_of(public + field) + public + field


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (KEY.public_context() + b"\x1a\x00", "secret-key"),
        (with_inner(b"\x22\x02ab"), "evaluation-keys"),
        (with_inner(b"\x2a\x02ab"), "evaluation-keys"),
        (with_inner(b"\x32\x02ab"), "unreadable"),
        (with_inner(b"\x0a\x02ab"), "unreadable"),
        (with_inner(b"\x10" + b"\xff" * 11), "unreadable"),
        (with_inner(b"\x2a\x7fab"), "unreadable"),
        (KEY.public_context() + KEY.public_context(), "unreadable"),
        (KEY.public_context() + b"\x22\x00", "unreadable"),
        (b"\x0a" + length_of(bytes(600_000)) + bytes(600_000), "wrong-parameters"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "unreadable"),
    ],
    ids=["secret", "relin", "rotation", "unknown", "key twice", "number", "cut", "all twice", "outer", "long", "huge"],
)
def test_a_coordinator_reads_the_tags_before_the_library_unpacks_anything(data, code, monkeypatch):
    assert check_public_context(with_inner(b"")) == KEY.public_context()
    monkeypatch.setattr(ts, "context_from", lambda *_: pytest.fail("the library was let loose on it"))
    assert refused(data).code == code


def refused(public_key: bytes) -> KeyMaterialError:
    coordinator, left_out = CkksCoordinator().adopt({"s0": ("id", public_key)})
    assert coordinator == CkksCoordinator()
    return left_out["s0"]


@pytest.mark.parametrize("data", [b"", b"garbage", KEY.public_context()[:1000]], ids=["empty", "garbage", "cut"])
def test_a_coordinator_refuses_unreadable_contexts(data):
    assert refused(data).code == "unreadable"


def test_a_coordinator_refuses_a_context_without_the_public_key():
    assert len(parameters_only()) < 100
    assert refused(parameters_only()).code == "no-public-key"


def test_a_coordinator_takes_the_key_of_most_and_names_the_others():
    other = other_site()
    brought = dict.fromkeys(("a", "c"), (SITE.key_id, SITE.public_key)) | {"b": (other.key_id, other.public_key)}
    coordinator, left_out = CkksCoordinator().adopt(brought)
    assert coordinator == adopted(SITE)
    assert {name: error.code for name, error in left_out.items()} == {"b": "wrong-key"}
    # The same public key with another flooding secret is another key too: its answers would not fit.
    _, left_out = CkksCoordinator().adopt(brought | {"b": ("feed", SITE.public_key)})
    assert list(left_out) == ["b"]


def test_public_contexts_hold_no_secret():
    loaded = load_context(KEY.public_context())
    assert not loaded.has_secret_key()
    assert loaded.has_public_key()
    with pytest.raises(ValueError, match="secret"):
        ts.ckks_vector(loaded, [1.0]).decrypt()


def test_nothing_that_the_coordinator_receives_holds_a_secret():
    context = context_for(5000)
    federation = Federation(context, updates_for(context))
    uploads = federation.upload()
    federation.measure(uploads)
    federation.combine(uploads, dict.fromkeys(context.sites, 1 / 3))
    received = b"|".join(federation.received)

    secret_half = context_bytes(KEY.load(), public_key=False, secret_key=True)
    # The parameters at its beginning and the scale at its end are public.
    needles = [secret_half[at : at + 16] for at in range(256, len(secret_half) - 256, 1000)]
    assert len(needles) > 100
    assert all(needle in KEY.context for needle in needles)
    assert not any(needle in received for needle in needles)
    assert KEY.flooding not in received


def test_generating_needs_a_good_source():
    with pytest.raises(UsageError, match="31 bytes"):
        generate_site_key(lambda count: bytes(count - 1))


def test_the_flooding_secret_comes_from_the_source():
    assert generate_site_key(lambda count: b"\x07" * count).flooding == b"\x07" * 32


def test_a_public_key_encrypts_for_the_secret_one():
    vector = ts.ckks_vector(load_context(KEY.public_context()), [1.5] * 4096)
    decrypted = np.array(ts.ckks_vector_from(KEY.load(), vector.serialize()).decrypt())
    assert decrypted == pytest.approx(np.full(4096, 1.5), abs=1e-9)


def test_randomness_of_the_operating_system_is_what_production_passes():
    assert generate_site_key(os.urandom).flooding != generate_site_key(os.urandom).flooding
