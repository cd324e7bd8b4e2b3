"""Signed messages: what was signed is what arrives, for one instruction and from one site, or it is refused by name."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from quorsum import envelope
from quorsum.crypto import Identity
from quorsum.errors import Refusal

SITE, OTHER = Identity.generate(os.urandom), Identity.generate(os.urandom)
NONCE = bytes(range(16))
ASKED = envelope.Asked(NONCE, bytes(32))


def content() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.arange(6.0).reshape(2, 3)), "b": Array(np.zeros(0, np.float32))}),
            "metrics": MetricRecord({"loss": 0.25, "n": 3, "list": [1, 2]}),
            "config": ConfigRecord({"text": "x", "yes": True, "raw": b"\x00\xff", "many": ["a", "b"]}),
        }
    )


def refused(signed: RecordDict, asked: envelope.Asked = ASKED, by: Identity = SITE) -> str:
    with pytest.raises(Refusal) as caught:
        envelope.open_envelope(signed, asked, by.public())
    return caught.value.code


def test_what_was_signed_arrives() -> None:
    opened = envelope.open_envelope(envelope.sign(content(), ASKED, SITE), ASKED, SITE.public())
    assert list(opened) == list(content())
    assert envelope.content_digest(opened) == envelope.content_digest(content())


def test_an_instruction_carries_its_nonce_and_the_app_does_not_see_it() -> None:
    addressed = envelope.address(content(), NONCE)
    assert envelope.nonce_of(addressed) == NONCE
    assert list(envelope.strip(addressed)) == list(content())
    assert envelope.nonce_of(content()) is None
    assert envelope.asked_in(content()) is None
    assert envelope.asked_in(addressed) == envelope.Asked(NONCE, envelope.content_digest(content()))


def test_a_second_nonce_replaces_the_first() -> None:
    assert envelope.nonce_of(envelope.address(envelope.address(content(), NONCE), bytes(16))) == bytes(16)


@pytest.mark.parametrize("nonce", ["", "00", "zz" * 16, 7, b"raw", "00" * 17])
def test_an_envelope_without_a_nonce_is_refused(nonce: object) -> None:
    broken = content()
    broken["quorsum.envelope"] = ConfigRecord({"nonce": nonce})  # type: ignore[dict-item]
    with pytest.raises(Refusal) as caught:
        envelope.nonce_of(broken)
    assert caught.value.code == "undecodable"
    with pytest.raises(Refusal):
        envelope.asked_in(broken)


def test_unsigned_replayed_and_foreign_replies_are_told_apart() -> None:
    assert refused(content()) == "unsigned"
    assert refused(envelope.address(content(), NONCE)) == "unsigned"
    assert refused(envelope.sign(content(), envelope.Asked(bytes(16), ASKED.digest), SITE)) == "replayed-message"
    assert refused(envelope.sign(content(), ASKED, OTHER)) == "wrong-signature"


def forged_nonce() -> RecordDict:
    signed = envelope.sign(content(), envelope.Asked(bytes(16), ASKED.digest), SITE)
    record = signed["quorsum.envelope"]
    assert isinstance(record, ConfigRecord)
    signed["quorsum.envelope"] = ConfigRecord({**record, "nonce": NONCE.hex()})
    return signed


def test_the_nonce_itself_is_signed() -> None:
    assert refused(forged_nonce()) == "wrong-signature"


def test_a_reply_is_for_the_whole_instruction() -> None:
    signed = envelope.sign(content(), ASKED, SITE)
    assert refused(signed, envelope.Asked(NONCE, b"\x01" + bytes(31))) == "wrong-signature"


W, B = Array(np.arange(6.0).reshape(2, 3)), Array(np.zeros(0, np.float32))
CHANGES = {
    "a value": ("arrays", ArrayRecord({"w": Array(np.ones((2, 3))), "b": B})),
    "a shape": ("arrays", ArrayRecord({"w": Array(np.arange(6.0)), "b": B})),
    "a name": ("arrays", ArrayRecord({"v": W, "b": B})),
    "an order": (
        "arrays",
        ArrayRecord({"b": B, "w": W}),
    ),
    "a metric": ("metrics", MetricRecord({"loss": 0.5, "n": 3, "list": [1, 2]})),
    "a type": ("metrics", MetricRecord({"loss": 0.25, "n": 3.0, "list": [1, 2]})),
    "a kind of record": ("metrics", ConfigRecord({"loss": 0.25, "n": 3, "list": [1, 2]})),
    "text for bytes": ("config", ConfigRecord({"text": "x", "yes": True, "raw": "00ff", "many": ["a", "b"]})),
    "one for true": ("config", ConfigRecord({"text": "x", "yes": 1, "raw": b"\x00\xff", "many": ["a", "b"]})),
    "another record": ("more", ConfigRecord({"x": 1})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_breaks_the_signature(change: str) -> None:
    signed = envelope.sign(content(), ASKED, SITE)
    name, record = CHANGES[change]
    signed[name] = record
    assert refused(signed) == "wrong-signature"


def test_a_record_taken_away_breaks_the_signature() -> None:
    signed = envelope.sign(content(), ASKED, SITE)
    assert refused(RecordDict({k: v for k, v in signed.items() if k != "metrics"})) == "wrong-signature"


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_two_contents_have_one_digest_only_when_they_are_the_same(a: list[bytes], b: list[bytes]) -> None:
    def made(blocks: list[bytes]) -> RecordDict:
        return RecordDict(
            {"x": ArrayRecord({f"{k}": Array("uint8", (len(v),), "raw", v) for k, v in enumerate(blocks)})}
        )

    assert (envelope.content_digest(made(a)) == envelope.content_digest(made(b))) == (a == b)


def test_a_record_that_many_share_is_hashed_once() -> None:
    known: dict[int, bytes] = {}
    shared = content()
    assert envelope.content_digest(shared, known) == envelope.content_digest(content())
    assert len(known) == len(shared)
    arrays = id(shared["arrays"])
    known[arrays] = bytes(32)
    assert envelope.content_digest(shared, known) != envelope.content_digest(content())


@pytest.mark.parametrize("change", CHANGES)
def test_another_instruction_has_another_digest(change: str) -> None:
    changed = content()
    name, record = CHANGES[change]
    changed[name] = record
    assert envelope.content_digest(changed) != envelope.content_digest(content())
    assert envelope.content_digest(RecordDict({"x": record})) != envelope.content_digest(RecordDict({"y": record}))
