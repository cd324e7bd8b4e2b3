"""The string that is pasted: known answers, tolerance of white space, and no other tolerance."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.errors import Refusal, UsageError
from quorsum.invitation import Invitation, decode, encode, secret_hash, split_address

VECTORS = Path(__file__).parent / "vectors"
CASES: dict[str, Any] = json.loads((VECTORS / "enrollment.json").read_text(encoding="utf-8"))

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
invitations = st.builds(
    Invitation,
    address=st.builds(lambda host, port: f"{host}:{port}", names, st.integers(1, 65535)),
    fingerprint=st.binary(min_size=32, max_size=32).map(bytes.hex),
    site=names,
    expires=st.integers(0, 2**32 - 1),
    secret=st.binary(min_size=16, max_size=16),
)


def invitation(**changes: Any) -> Invitation:
    fields = {"address": "localhost:7401", "fingerprint": "ab" * 32, "site": "a", "expires": 5, "secret": b"s" * 16}
    return Invitation(**{**fields, **changes})


def test_the_file_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_enrollment", VECTORS / "make_enrollment.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.build() == CASES


@pytest.mark.parametrize("case", CASES["invitations"], ids=lambda case: case["site"])
def test_known_answers(case: dict[str, Any]) -> None:
    fields = {name: value for name, value in case.items() if name not in ("text", "secret")}
    made = Invitation(**fields, secret=bytes.fromhex(case["secret"]))
    assert encode(made) == case["text"]
    assert decode(case["text"]) == made


@pytest.mark.parametrize("case", CASES["refused"], ids=lambda case: case["why"])
def test_refused_with_its_own_code_and_never_repeated(case: dict[str, str]) -> None:
    with pytest.raises(Refusal) as refusal:
        decode(case["text"])
    assert refusal.value.code == case["code"]
    if len(case["text"]) > 8:
        assert case["text"][6:16] not in str(refusal.value)


@given(invitations)
def test_there_and_back(made: Invitation) -> None:
    assert decode(encode(made)) == made


@given(invitations, st.lists(st.tuples(st.integers(0, 200), st.sampled_from([" ", "\n", "\r\n", "\t", "\u00a0"]))))
def test_white_space_anywhere_does_no_harm(made: Invitation, spaces: list[tuple[int, str]]) -> None:
    text = encode(made)
    for place, space in spaces:
        text = text[:place] + space + text[place:]
    assert decode(text) == made


@given(invitations, st.data())
def test_any_changed_character_is_noticed(made: Invitation, data: st.DataObject) -> None:
    text = encode(made)
    place = data.draw(st.integers(6, len(text) - 1))
    other = data.draw(st.characters(codec="ascii", categories=["L", "N"], exclude_characters=text[place]))
    with pytest.raises(Refusal):
        decode(text[:place] + other + text[place + 1 :])


@given(st.text())
def test_any_text_is_refused_politely(text: str) -> None:
    for candidate in (text, "qsum1-" + text):
        with pytest.raises(Refusal):
            decode(candidate)


def test_very_long_text() -> None:
    with pytest.raises(Refusal):
        decode("qsum1-" + "A" * 10_000_000)
    with pytest.raises(Refusal):
        decode("qsum1-" + "A" * 4000)


def test_secret_does_not_show() -> None:
    made = invitation(secret=b"0123456789abcdef")
    assert "0123456789" not in repr(made)
    assert b"0123456789abcdef".hex() not in repr(made)
    assert secret_hash(made.secret) != secret_hash(b"0123456789abcdeF")


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "localhost"},
        {"address": f"{'a' * 255}:1"},
        {"fingerprint": "AB" * 32},
        {"fingerprint": "ab"},
        {"site": ""},
        {"site": "-a"},
        {"site": "a" * 64},
        {"site": "a\n"},
        {"site": "../a"},
        {"expires": -1},
        {"expires": 2**32},
        {"secret": b"short"},
    ],
)
def test_fields_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        invitation(**changes)


def test_addresses() -> None:
    assert split_address("host.example:7401") == ("host.example", 7401)
    assert split_address("[::1]:1") == ("::1", 1)
    for wrong in ("", "host", "host:", ":1", "host:0", "host:65536", "::1:7401", "a b:1", "user@host:1", "host:1\n"):
        with pytest.raises(UsageError):
            split_address(wrong)
