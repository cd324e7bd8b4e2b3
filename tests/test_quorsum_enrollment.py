"""The messages of enrollment, and what is signed in them."""

from __future__ import annotations

import json
import os

import pytest
from enrollment_federation import Liar
from hypothesis import given
from hypothesis import strategies as st

from quorsum import enrollment as talk
from quorsum.crypto import labels
from quorsum.errors import Refusal

FINGERPRINT = "ab" * 32


def test_no_two_labels_are_equal() -> None:
    assert len(set(talk.LABELS)) == len(talk.LABELS)
    assert not set(talk.LABELS) & set(labels.LABELS)


def test_messages_there_and_back() -> None:
    request = Liar().request(FINGERPRINT, os.urandom(16))
    assert talk.unpack(talk.EnrollRequest, talk.pack(request)) == request
    assert len(talk.pack(request)) < 4096 < talk.MAX_ENROLLMENT_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"more": 1},
        {"version": 2},
        {"version": "1"},
        {"site": "a/b"},
        {"site": 5},
        {"secret_hex": "AB" * 16},
        {"secret_hex": "ab" * 15},
        {"identity": "ab"},
        {"node_key": ""},
        {"request": "x" * 4097},
        {"node_proof": "abc"},
        {"identity_proof": None},
    ],
)
def test_wrong_fields_are_refused_and_named(changes: dict[str, object]) -> None:
    fields = json.loads(talk.pack(Liar().request(FINGERPRINT, os.urandom(16)))) | changes
    with pytest.raises(Refusal, match=next(iter(changes))) as refusal:
        talk.unpack(talk.EnrollRequest, json.dumps(fields).encode())
    assert refusal.value.code == "undecodable"


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_politely(data: bytes) -> None:
    with pytest.raises(Refusal):
        talk.unpack(talk.EnrollRequest, data)


def test_words_depend_on_everything() -> None:
    def words(fingerprint: str, site: str, identity: str, node: str, tls: str) -> str:
        return talk.words_of(fingerprint, site, identity, talk.Keys("00" * 32, node, tls))

    base = ["ab" * 32, "a", "cd" * 64, "01" * 32, "02" * 32]
    seen = {words(*base)}
    for place, other in enumerate(["ac" * 32, "b", "ce" * 64, "03" * 32, "04" * 32]):
        seen.add(words(*(other if k == place else value for k, value in enumerate(base))))
    seen.add(words(*base[:3], base[4], base[3]))
    assert len(seen) == 7


def test_epoch_depends_on_the_set_of_members() -> None:
    a, b = ("a", "ab" * 64), ("b", "cd" * 64)
    assert talk.key_epoch([a, b]) == talk.key_epoch([b, a])
    assert len({talk.key_epoch(m) for m in ([a], [b], [a, b], [("a", b[1]), ("b", a[1])], [])}) == 5


def test_relays_are_bound_to_both_ends_and_the_epoch() -> None:
    infos = {
        talk.relay_info("ab" * 32, "a", "b"),
        talk.relay_info("ac" * 32, "a", "b"),
        talk.relay_info("ab" * 32, "b", "a"),
        talk.relay_info("ab" * 32, "ab", ""),
    }
    assert len(infos) == 4


def test_details_of_a_status() -> None:
    text = talk.encode_detail("code", "ein Wort: größer\n", 5.25)
    assert text.isascii()
    detail = talk.decode_detail(text)
    assert detail is not None
    assert (detail[0].code, detail[0].message, detail[1]) == ("code", "ein Wort: größer ", 5.25)
    for other in ("", "null", "{}", "connection refused", '{"code": 1, "message": "", "server_time": 1}'):
        assert talk.decode_detail(other) is None


@pytest.mark.parametrize("state", ["refused", "revoked", "left"])
def test_states_that_end_it(state: talk.State) -> None:
    with pytest.raises(Refusal, match="site a") as refusal:
        talk.check_state(state, "a")
    assert refusal.value.code == state


def test_states_that_go_on() -> None:
    talk.check_state("pending", "a")
    talk.check_state("approved", "a")


@pytest.mark.parametrize("text", ["A", "A===", "ä", "A" * 4 + "\n"])
def test_base64_is_strict(text: str) -> None:
    with pytest.raises(Refusal):
        talk.decode_base64(text)
