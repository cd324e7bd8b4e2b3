"""Write crypto.json: known answers of everything in ``crypto`` that is deterministic.

    python tests/vectors/make_crypto.py

The expected values are computed here a second time, from the definitions and with the standard library only, so that
the vectors do not merely repeat the code they are to check. ``tests/test_crypto_vectors.py`` compares three things: the
file, what this script makes, and what the package makes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("crypto.json")

CONTEXTS: list[dict[str, Any]] = [
    {
        "run": "00" * 16, "round": 1, "attempt": 1, "sites": ["a", "b", "c"], "dimension": 10, "tolerate": 1,
        "unit": 1.0, "clip": False, "sketches": 4, "collude": 1, "rule": "", "reference": "",
        "model": "", "keys": [], "commitment": "",
    },
    {
        "run": "run with a quote \" and é", "round": 7, "attempt": 2, "sites": ["hospital-1", "hospital-2"],
        "dimension": 1_000_000, "tolerate": 0, "unit": 0.1, "clip": True, "sketches": 16, "collude": 2,
        "rule": "nnm+fltrust", "reference": "hospital-2", "model": "ab" * 32, "keys": ["01" * 64, "02" * 64],
        "commitment": "cd" * 32,
    },
]  # fmt: skip


def encoded(tag: str, *parts: bytes) -> bytes:
    """The encoding under every hash: tag, zero byte, each part behind its length."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return f"quorsum/crypto/{tag}/v1".encode() + b"\x00" + framed


def digest_of(context: dict[str, Any]) -> bytes:
    """The digest of a context."""
    text = json.dumps(context, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"quorsum/round-context/v1\x00" + text.encode()).digest()


def signs_of(digest: bytes, dimension: int) -> str:
    """The flattening vector as a string of + and -."""
    out: list[str] = []
    for chunk in range(-(-dimension // 2**20)):
        count = min(2**20, dimension - chunk * 2**20)
        seed = encoded("flatten", digest, chunk.to_bytes(8, "little"))
        raw = hashlib.shake_256(seed).digest((count + 7) // 8)
        out += ["-" if raw[i // 8] >> (i % 8) & 1 else "+" for i in range(count)]
    return "".join(out)


def noise_of(secret: bytes, digest: bytes, phase: str, question: bytes, number: int, count: int) -> list[int]:
    """Flooding noise before it is divided by its standard deviation: four 16-bit numbers, centred."""
    seed = encoded("flooding", secret, digest, phase.encode(), question, number.to_bytes(8, "little"))
    raw = hashlib.shake_256(seed).digest(8 * count)
    words = [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)]
    return [sum(words[i : i + 4]) - 131070 for i in range(0, len(words), 4)]


def build() -> dict[str, Any]:
    """All vectors."""
    digests = [digest_of(context) for context in CONTEXTS]
    secret = bytes(range(32))
    question = hashlib.sha256(b"question").digest()
    across = signs_of(digests[1], 2**20 + 16)
    return {
        "about": "Known answers for quorsum.crypto, made by make_crypto.py; do not edit by hand.",
        "digests": [
            {"context": context, "digest": digest.hex()} for context, digest in zip(CONTEXTS, digests, strict=True)
        ],
        "flatten": [
            {"digest": digests[0].hex(), "dimension": 64, "signs": signs_of(digests[0], 64)},
            {"digest": digests[1].hex(), "dimension": 13, "signs": signs_of(digests[1], 13)},
        ],
        "flatten_across_chunks": {
            "digest": digests[1].hex(),
            "dimension": len(across),
            "last_signs": across[-16:],
            "sha256_of_all": hashlib.sha256(across.encode()).hexdigest(),
        },
        "flooding": [
            {
                "secret": secret.hex(), "digest": digests[0].hex(), "phase": phase, "question": question.hex(),
                "number": number, "noise": noise_of(secret, digests[0], phase, question, number, 8),
            }
            for phase, number in (("gram", 0), ("sum", 0), ("sum", 1))
        ],
        "tagged_hash": [
            {
                "tag": tag, "parts": [part.hex() for part in parts],
                "hash": hashlib.sha256(encoded(tag, *parts)).hexdigest(),
            }
            for tag, parts in (("a", ()), ("a", (b"",)), ("a", (b"bc", b"d")), ("a", (b"b", b"cd")), ("ab", (b"cd",)))
        ],
    }  # fmt: skip


if __name__ == "__main__":
    PATH.write_text(json.dumps(build(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
