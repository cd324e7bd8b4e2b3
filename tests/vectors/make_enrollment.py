"""Write enrollment.json: known answers of invitations and of the six words.

    python tests/vectors/make_enrollment.py

Computed here a second time, from the definitions and with the standard library only (and the word list, which is
public). Valid and refused invitations; every refused one says with which code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from mnemonic import Mnemonic

PATH = Path(__file__).with_name("enrollment.json")

INVITATIONS: list[dict[str, Any]] = [
    {
        "address": "localhost:7401", "fingerprint": "00" * 32, "site": "a", "expires": 0, "secret": "00" * 16,
    },
    {
        "address": "[2001:db8::1]:65535", "fingerprint": "ab" * 32, "site": "Hospital-B.ward_7",
        "expires": 2**32 - 1, "secret": bytes(range(16)).hex(),
    },
]  # fmt: skip

WORDS: list[list[str]] = [[], [""], ["00"], ["ab" * 32, "6120"], ["ab" * 32 + "61", "20"]]


def tagged(tag: str, *parts: bytes) -> bytes:
    """Tag, zero byte, each part behind its length; SHA-256."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(f"quorsum/crypto/{tag}/v1".encode() + b"\x00" + framed).digest()


def text_of(body: bytes, prefix: str = "qsum1-") -> str:
    """Body, checksum, base64url without padding."""
    checksum = tagged("invitation-checksum", body)[:4]
    return prefix + base64.urlsafe_b64encode(body + checksum).decode().rstrip("=")


def body_of(fields: dict[str, Any], version: int = 1) -> bytes:
    """Version, expiry, fingerprint, secret, address, site."""
    head = bytes([version]) + fields["expires"].to_bytes(4, "big") + bytes.fromhex(fields["fingerprint"])
    texts = [fields["address"].encode(), fields["site"].encode()]
    return head + bytes.fromhex(fields["secret"]) + b"".join(bytes([len(text)]) + text for text in texts)


def words_of(parts: list[str]) -> str:
    """The first 66 bits, 11 a word."""
    bits = "".join(f"{byte:08b}" for byte in tagged("six-words", *map(bytes.fromhex, parts)))
    words = Mnemonic("english").wordlist
    return "-".join(words[int(bits[11 * k : 11 * k + 11], 2)] for k in range(6))


def refused() -> list[dict[str, str]]:
    """One of each defect."""
    body = body_of(INVITATIONS[0])
    good = text_of(body)
    return [
        {"why": "nothing", "code": "not-an-invitation", "text": ""},
        {"why": "something else", "code": "not-an-invitation", "text": "hello world"},
        {"why": "the prefix is missing", "code": "not-an-invitation", "text": good[6:]},
        {"why": "a later prefix", "code": "invitation-version", "text": text_of(body, "qsum2-")},
        {"why": "a later version inside", "code": "invitation-version", "text": text_of(body_of(INVITATIONS[0], 2))},
        {"why": "the end is missing", "code": "invitation-damaged", "text": good[:-1]},
        {"why": "nothing behind the prefix", "code": "invitation-damaged", "text": "qsum1-"},
        {"why": "one character changed", "code": "invitation-damaged", "text": good[:20] + "B" + good[21:]},
        {"why": "a character that is none", "code": "invitation-damaged", "text": good[:20] + "*" + good[21:]},
        {"why": "padded", "code": "invitation-damaged", "text": good + "="},
        {"why": "more behind the site", "code": "invitation-damaged", "text": text_of(body + b"x")},
        {"why": "a field is cut off", "code": "invitation-damaged", "text": text_of(body[:-1])},
        {
            "why": "an address without a port",
            "code": "invitation-damaged",
            "text": text_of(body_of({**INVITATIONS[0], "address": "localhost"})),
        },
        {
            "why": "a site that is no name",
            "code": "invitation-damaged",
            "text": text_of(body_of({**INVITATIONS[0], "site": "../a"})),
        },
    ]


def build() -> dict[str, Any]:
    """All vectors."""
    return {
        "invitations": [{**fields, "text": text_of(body_of(fields))} for fields in INVITATIONS],
        "refused": refused(),
        "words": [{"parts": parts, "words": words_of(parts)} for parts in WORDS],
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")
