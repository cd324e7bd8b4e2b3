"""Write sealed.json: known answers of the suite ``sealed``, error cases included.

    python tests/vectors/make_sealed.py

Everything is computed here a second time, from docs/spec/sealed-round.md, with Python's integers and the primitives of
``cryptography`` (AES, Ed25519, X25519, HKDF, AES-GCM), and without the package. Decoding tries every subset instead of
solving equations, products in the ring are products of huge integers. ``tests/test_crypto_sealed_vectors.py`` compares
three things: the file, what this script makes, and what the package makes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

PATH = Path(__file__).with_name("sealed.json")
P, N = 2**61 - 1, 4096

LABELS = (
    "sealed-identity", "sealed-nonce", "sealed-submission", "sealed-commitment", "sealed-deal", "sealed-upload",
    "sealed-hpke-info", "sealed-merkle-leaf", "sealed-merkle-node", "sealed-merkle-root", "sealed-root",
    "sealed-root-certificate", "sealed-seed", "sealed-view", "sealed-view-certificate", "sealed-check-answer",
    "sealed-gram-points", "sealed-question", "sealed-ticket", "sealed-sum-share", "sealed-mask-xof", "flatten",
    "sealed-sketch-signs", "sealed-sketch-rotations", "sealed-gamma-shares", "message",
)  # fmt: skip


# --- section 2: encodings ---


def encoded(label: str, *parts: bytes) -> bytes:
    """What is hashed: label, zero byte, each part behind its length."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return f"quorsum/crypto/{label}/v1".encode() + b"\x00" + framed


def h(label: str, *parts: bytes) -> bytes:
    """H(label; parts)."""
    return hashlib.sha256(encoded(label, *parts)).digest()


def stream(label: str, seed: bytes, length: int) -> bytes:
    """The public key stream from its start."""
    return Cipher(AES(h(label, seed)), CTR(bytes(16))).encryptor().update(bytes(length))


def words(raw: bytes, size: int) -> list[int]:
    """Little-endian integers of ``size`` bytes."""
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def elements(label: str, seed: bytes, count: int) -> list[int]:
    """Public field elements."""
    return [word % 2**61 % P for word in words(stream(label, seed, 8 * count), 8)]


def bits(raw: bytes, count: int) -> list[int]:
    """Bits, lowest of each byte first."""
    return [raw[i // 8] >> (i % 8) & 1 for i in range(count)]


def field_bytes(values: Sequence[int]) -> bytes:
    """Field elements on the wire."""
    return b"".join(value.to_bytes(8, "little") for value in values)


def fingerprint(values: Sequence[int]) -> str:
    """SHA-256 of field elements on the wire."""
    return hashlib.sha256(field_bytes(values)).hexdigest()


class Source:
    """Fixed bytes in place of the operating system's: SHAKE-256 of a name, read from the start."""

    def __init__(self, name: str) -> None:
        self._name, self._at = name.encode(), 0

    def __call__(self, count: int) -> bytes:
        self._at += count
        return hashlib.shake_256(self._name).digest(self._at)[self._at - count :]


def random_elements(source: Callable[[int], bytes], count: int) -> list[int]:
    """Uniform field elements from a source; 61 ones are drawn again."""
    drawn = [word % 2**61 for word in words(source(8 * count), 8)]
    while again := [i for i, value in enumerate(drawn) if value == P]:
        for i, word in zip(again, words(source(8 * len(again)), 8), strict=True):
            drawn[i] = word % 2**61
    return drawn


# --- context, Merkle tree, identities, HPKE ---


def digest_of(context: dict[str, Any]) -> bytes:
    """The digest of a context."""
    text = json.dumps(context, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"quorsum/round-context/v1\x00" + text.encode()).digest()


def merkle_root(commitments: dict[str, bytes]) -> bytes:
    """The tree of RFC 9162 over submissions sorted by site."""

    def top(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        half = 1
        while 2 * half < len(leaves):
            half *= 2
        return h("sealed-merkle-node", top(leaves[:half]), top(leaves[half:]))

    leaves = [h("sealed-merkle-leaf", site.encode(), commitments[site]) for site in sorted(commitments)]
    return h("sealed-merkle-root", len(leaves).to_bytes(8, "little"), top(leaves))


def public_identity(signing_seed: bytes, sealing_seed: bytes) -> bytes:
    """Both public keys."""
    signing = Ed25519PrivateKey.from_private_bytes(signing_seed).public_key().public_bytes_raw()
    return signing + X25519PrivateKey.from_private_bytes(sealing_seed).public_key().public_bytes_raw()


def _extract(salt: bytes, suite: bytes, label: bytes, ikm: bytes) -> bytes:
    mac = HMAC(salt or bytes(32), SHA256())
    mac.update(b"HPKE-v1" + suite + label + ikm)
    return mac.finalize()


def _expand(prk: bytes, suite: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(SHA256(), length, labelled).derive(prk)


def hpke_seal(recipient: bytes, info: bytes, plaintext: bytes, ephemeral: bytes) -> bytes:
    """RFC 9180, base mode, single message, with an ephemeral key from outside; for vectors and test builds only."""
    private = X25519PrivateKey.from_private_bytes(ephemeral)
    enc = private.public_key().public_bytes_raw()
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x01"
    shared = private.exchange(X25519PublicKey.from_public_bytes(recipient))
    secret = _expand(_extract(b"", kem, b"eae_prk", shared), kem, b"shared_secret", enc + recipient, 32)
    schedule = b"\x00" + _extract(b"", suite, b"psk_id_hash", b"") + _extract(b"", suite, b"info_hash", info)
    prk = _extract(secret, suite, b"secret", b"")
    key, nonce = _expand(prk, suite, b"key", schedule, 16), _expand(prk, suite, b"base_nonce", schedule, 12)
    return enc + AESGCM(key).encrypt(nonce, plaintext, b"")


# --- mask ---


def negacyclic(a: Sequence[int], s: Sequence[int]) -> list[int]:
    """a s in Z_p[X] / (X^N + 1), for a in [0, p) and any s: one product of two huge integers."""
    width = 18
    left = int.from_bytes(b"".join(x.to_bytes(width, "little") for x in a), "little")
    right = int.from_bytes(b"".join((x % P).to_bytes(width, "little") for x in s), "little")
    product = words((left * right).to_bytes(2 * N * width, "little"), width)
    return [(product[i] - product[i + N]) % P for i in range(N)]


def rotated(block: Sequence[int], sign: int, rho: int) -> list[int]:
    """sign X^rho block."""
    return [sign * (block[i - rho] if i >= rho else -block[i - rho + N]) % P for i in range(N)]


def centred_binomial(eta: int, count: int, source: Callable[[int], bytes]) -> list[int]:
    """Sums of 2 eta bits less eta, bits drawn in words of 64 and then in the binary parts of the rest."""
    assert count <= 1 << 16
    total = [-eta] * count
    rest = 2 * eta
    for width in (64, 64, 64, 32, 16, 8, 4, 2, 1):
        if rest < width:
            continue
        rest -= width
        raw = bits(source((width * count + 7) // 8), width * count)
        for i in range(count):
            total[i] += sum(raw[i * width : (i + 1) * width])
    assert rest == 0
    return total


def quantised(update: Sequence[float], scale: float, digest: bytes, source: Callable[[int], bytes]) -> list[int]:
    """x = round at random (scale times signs times update)."""
    raw = hashlib.shake_256(encoded("flatten", digest, bytes(8))).digest((len(update) + 7) // 8)
    out = []
    for value, negative, u in zip(update, bits(raw, len(update)), words(source(4 * len(update)), 4), strict=True):
        v = Fraction(value * scale * (-1 if negative else 1))
        low = math.floor(v)
        out.append(low + (u < (v - low) * 2**32 - Fraction(1, 2)))
    return out


# --- sharing, checks, decoding, elimination ---


def share(secrets: Sequence[int], degree: int, n: int, source: Callable[[int], bytes]) -> list[list[int]]:
    """Row k - 1: the values at k."""
    m = len(secrets)
    drawn = random_elements(source, degree * m)
    rows = [list(secrets), *[drawn[j * m : (j + 1) * m] for j in range(degree)]]
    return [[sum(rows[j][c] * k**j for j in range(degree + 1)) % P for c in range(m)] for k in range(1, n + 1)]


def at(points: Sequence[int], values: Sequence[int], target: int) -> int:
    """Lagrange interpolation."""
    total = 0
    for i, x in enumerate(points):
        above = below = 1
        for j, other in enumerate(points):
            if j != i:
                above, below = above * (target - other) % P, below * (x - other) % P
        total += values[i] * above * pow(below, -1, P)
    return total % P


def decoded(answers: dict[int, list[int]], degree: int, f_left: int) -> dict[str, Any]:
    """Try every set of degree + 1 answers; accept what degree + f' + 1 answers agree with."""
    holders = sorted(answers)
    values: list[int] = []
    liars: set[int] = set()
    for entry in range(len(answers[holders[0]])):
        found = None
        for base in combinations(holders, degree + 1):
            given = [answers[k][entry] for k in base]
            off = {k for k in holders if at(base, given, k) != answers[k][entry]}
            if len(off) <= f_left and len(holders) - len(off) >= degree + f_left + 1:
                found = at(base, given, 0), off
                break
        if found is None:
            return {"error": "RoundFailed"}
        values.append(found[0])
        liars |= found[1]
    return {"error": "RoundFailed"} if len(liars) > f_left else {"values": values, "liars": sorted(liars)}


def eliminated(n: int, f: int, dealt: list[dict[str, Any]], answered: list[int]) -> dict[str, Any]:
    """The fixed rule of section 3b."""
    pairs = sorted(
        {tuple(sorted((w["dealer"], k))) for w in dealt if w["accepted"] for k in w["off"] if k != w["dealer"]}
    )
    edges: list[list[int]] = []
    for a, b in pairs:
        if not any(a in edge or b in edge for edge in edges):
            edges.append([a, b])
    if len(edges) > f:
        return {"error": "RoundFailed"}
    holders = [k for k in answered if not any(k in edge for edge in edges)]
    dealers = [w["dealer"] for w in dealt if w["accepted"] and not set(w["off"]) & set(holders)]
    return {"edges": edges, "holders": holders, "dealers": dealers, "f_left": f - len(edges)}


def semidefinite(matrix: list[list[int]]) -> bool:
    """All principal minors, not the leading ones only, are at least zero."""

    def minor(rows: tuple[int, ...]) -> Fraction:
        m = [[Fraction(matrix[i][j]) for j in rows] for i in rows]
        result = Fraction(1)
        for k in range(len(m)):
            pivot = next((i for i in range(k, len(m)) if m[i][k]), None)
            if pivot is None:
                return Fraction(0)
            if pivot != k:
                m[k], m[pivot], result = m[pivot], m[k], -result
            result *= m[k][k]
            for i in range(k + 1, len(m)):
                factor = m[i][k] / m[k][k]
                m[i] = [x - factor * y for x, y in zip(m[i], m[k], strict=True)]
        return result

    size = len(matrix)
    return all(minor(rows) >= 0 for length in range(1, size + 1) for rows in combinations(range(size), length))


# --- the vectors ---


def source(name: str) -> Source:
    """A fixed source."""
    return Source(f"quorsum test vectors: {name}")


SITES = [f"site-{k:02d}" for k in range(1, 6)]
SEEDS = [(hashlib.sha256(f"signing {k}".encode()).digest(), hashlib.sha256(f"sealing {k}".encode()).digest())
         for k in range(1, 6)]  # fmt: skip
NONCE = bytes(range(32))


def context() -> dict[str, Any]:
    """The context of all vectors."""
    return {
        "run": "vectors", "round": 3, "attempt": 1, "sites": SITES, "dimension": 5000, "tolerate": 1, "unit": 0.5,
        "clip": True, "sketches": 2, "collude": 1, "rule": "multi-krum", "reference": "", "model": "ab" * 32,
        "keys": [public_identity(*pair).hex() for pair in SEEDS], "commitment": h("sealed-nonce", NONCE).hex(),
    }  # fmt: skip


def bounds_cases() -> list[dict[str, Any]]:
    """n, tau, f and what follows."""
    cases: list[dict[str, Any]] = []
    for n, tau, f in ((3, 1, 0), (4, 1, 1), (5, 1, 1), (6, 1, 1), (7, 2, 1), (9, 2, 2), (9, 1, 3), (10, 2, 2),
                      (10, 1, 3), (5, 0, 1), (5, 1, -1)):  # fmt: skip
        case: dict[str, Any] = {"n": n, "tau": tau, "f": f}
        if tau < 1 or f < 0 or n < max(2 * tau + 2 * f + 1, 3 * f + 1):
            case["error"] = "BoundError"
        else:
            least = 2 if (n, tau, f) == (3, 1, 0) else max(tau, f) + 3
            case |= {"quorum": (n + max(tau, f)) // 2 + 1, "smallest_set": least}
        cases.append(case)
    return cases


def statements(digest: bytes) -> dict[str, Any]:
    """A chain of digests as in a round, and what site 1 signs."""
    site, (signing, _) = SITES[0], SEEDS[0]
    deals = b"".join(bytes(32) if k == 0 else h("sealed-deal", bytes([k]) * 100) for k in range(5))
    upload = h("sealed-upload", b"first batch", b"second batch")
    commitment = h("sealed-commitment", digest, site.encode(), deals, upload)
    commitments = {name: hashlib.sha256(name.encode()).digest() for name in SITES[1:]} | {site: commitment}
    root = h("sealed-root", digest, merkle_root(commitments))
    seed = h("sealed-seed", root, NONCE)
    sketches = field_bytes(elements("sealed-mask-xof", b"sketches", 16))
    dealers = "\n".join(SITES).encode()
    view = h("sealed-view", digest, root, seed, dealers, sketches)
    values = field_bytes([1, 2, P - 1, 0])
    chosen = b"site-01\nsite-02\nsite-03\nsite-05"
    signed = {
        "sealed-submission": (digest, commitment),
        "sealed-root-certificate": (digest, root),
        "sealed-view-certificate": (digest, view),
        "sealed-check-answer": (digest, view, b"site-02\nsite-04", values),
        "sealed-gram-points": (digest, view, dealers, values),
        "sealed-ticket": (digest, view, dealers, chosen),
        "sealed-sum-share": (digest, view, chosen, values),
    }
    key = Ed25519PrivateKey.from_private_bytes(signing)
    return {
        "deal_digests": deals.hex(), "upload": ["first batch", "second batch"], "upload_digest": upload.hex(),
        "commitment": commitment.hex(), "commitments": {k: v.hex() for k, v in commitments.items()},
        "merkle_root": merkle_root(commitments).hex(), "root": root.hex(), "seed": seed.hex(),
        "sketches": sketches.hex(), "view": view.hex(),
        "signed": [
            {"label": label, "parts": [part.hex() for part in parts], "signature": key.sign(h(label, *parts)).hex()}
            for label, parts in signed.items()
        ],
    }  # fmt: skip


def mask_case(digest: bytes) -> dict[str, Any]:
    """Two blocks of one update, masked; and one sketch of them."""
    drawn = source("mask")
    key = centred_binomial(41, N, drawn)
    x = [(i * i) % 2001 - 1000 for i in range(5000)] + [0] * (2 * N - 5000)
    errors = centred_binomial(82, 2 * N, drawn)
    a = elements("sealed-mask-xof", digest, 2 * N)
    masked = []
    for j in range(2):
        product = negacyclic(a[j * N : (j + 1) * N], key)
        masked.append([(product[i] + errors[j * N + i] + x[j * N + i]) % P for i in range(N)])
    seed = hashlib.sha256(b"seed").digest()
    signs = [1 - 2 * bit for bit in bits(stream("sealed-sketch-signs", seed, 1), 4)]
    rotations = [word % N for word in words(stream("sealed-sketch-rotations", seed, 8), 2)]
    sketches = []
    for k in range(2):
        parts = [rotated(masked[j], signs[2 * k + j], rotations[2 * k + j]) for j in range(2)]
        sketches += [(u + v) % P for u, v in zip(*parts, strict=True)]
    return {
        "key": {"first": key[:8], "sum_of_squares": sum(v * v for v in key)},
        "errors": {"first": errors[:8], "sum_of_squares": sum(v * v for v in errors)},
        "integers": "i * i mod 2001 - 1000, for i from 0 to 4999",
        "first": [block[:4] for block in masked], "sha256": [fingerprint(block) for block in masked],
        "plan": {"seed": seed.hex(), "signs": signs, "rotations": rotations},
        "sketches": {"first": sketches[:4], "sha256": fingerprint(sketches)},
    }  # fmt: skip


def deal_case() -> dict[str, Any]:
    """A key dealt among five holders, and the check values."""
    drawn = source("deal")
    key = [value % P for value in centred_binomial(41, N, drawn)]
    shared = share([*key, *random_elements(drawn, 1)], 1, 5, drawn)
    zeros = share([0] * 6, 2, 5, drawn)
    seed = hashlib.sha256(b"seed").digest()
    gamma = elements("sealed-gamma-shares", seed, N + 5)
    holders = []
    for row, zero in zip(shared, zeros, strict=True):
        first = (sum(gamma[c] * row[c] for c in range(N)) + row[N]) % P
        second = (sum(gamma[N + j] * zero[j] for j in range(5)) + zero[5]) % P
        wire = field_bytes([*row, *zero])
        holders.append({"deal_sha256": hashlib.sha256(wire).hexdigest(), "length": len(wire), "check": [first, second]})
    return {"n": 5, "tau": 1, "seed": seed.hex(), "holders": holders}


def decoding_cases() -> list[dict[str, Any]]:
    """Honest words, lies, erasures, and a near-codeword forged to tie."""
    honest = share([5, P - 7, 123456789], 2, 7, source("decoding"))
    right = {k: honest[k - 1] for k in range(1, 8)}

    def lie(*entries: tuple[int, int]) -> dict[int, list[int]]:
        out = {k: list(v) for k, v in right.items()}
        for holder, entry in entries:
            out[holder][entry] = (out[holder][entry] + 1) % P
        return out

    def without(answers: dict[int, list[int]], *gone: int) -> dict[int, list[int]]:
        return {k: v for k, v in answers.items() if k not in gone}

    # Two liars put their values on the polynomial through two honest points and one of their own.
    forged = {k: list(v) for k, v in right.items()}
    base, target = (1, 2), (6, 7)
    forged[6][0] = (right[6][0] + 1) % P
    forged[7][0] = at((*base, 6), [right[1][0], right[2][0], forged[6][0]], target[1])
    cases = [
        ("all honest", right, 2, 2), ("two liars, the limit", lie((1, 0), (1, 1), (1, 2), (5, 0)), 2, 2),
        ("one liar, one silent", without(lie((3, 1)), 7), 2, 1), ("two silent", without(right, 1, 4), 2, 2),
        ("three silent are too many", without(right, 1, 2, 3), 2, 2),
        ("two liars and one silent are too many", without(lie((1, 0), (2, 0)), 7), 2, 2),
        ("three liars, each in another entry", lie((1, 0), (2, 1), (3, 2)), 2, 2),
        ("two liars forge a word near to two honest points", forged, 2, 2),
        ("nobody may lie and one does", lie((2, 2)), 2, 0),
    ]  # fmt: skip
    return [
        {"about": about, "degree": degree, "f_left": f_left, "answers": {str(k): v for k, v in answers.items()},
         "result": decoded(answers, degree, f_left)}
        for about, answers, degree, f_left in cases
    ]  # fmt: skip


def elimination_cases() -> list[dict[str, Any]]:
    """Disputes and how they are settled."""

    def dealt(off: dict[int, list[int]], rejected: tuple[int, ...] = (), n: int = 9) -> list[dict[str, Any]]:
        return [{"dealer": i, "accepted": i not in rejected, "off": off.get(i, [])} for i in range(1, n + 1)]

    everyone = list(range(1, 10))
    cases = [
        ("no dispute", dealt({}), everyone), ("one dispute", dealt({3: [8]}), everyone),
        ("one site at odds with two", dealt({3: [8], 2: [8]}), everyone),
        ("a chain, taken in ascending order", dealt({1: [2], 2: [3], 3: [4]}), everyone),
        ("a dealer off with a holder who remains leaves as a dealer", dealt({1: [2, 9]}), everyone),
        ("a dealer that is not accepted causes no dispute", dealt({}, (4,)), everyone),
        ("silent holders do not remain", dealt({}), [1, 2, 3, 4, 5, 6, 7]),
        ("off its own word: not a holder's dispute, and its update is left out", dealt({5: [5]}), everyone),
        ("three pairs are too many for two", dealt({1: [2], 3: [4], 5: [6]}), everyone),
    ]  # fmt: skip
    return [
        {"about": about, "n": 9, "tau": 2, "f": 2, "words": words_, "answered": answered,
         "result": eliminated(9, 2, words_, answered)}
        for about, words_, answered in cases
    ]  # fmt: skip


def exact_cases() -> list[dict[str, Any]]:
    """Gram matrices; where a row must go, the expected answer is checked by all principal minors."""
    base = [[100, 20, 10, 0], [20, 100, 15, 5], [10, 15, 100, 8], [0, 5, 8, 100]]
    big = [[(2**59 if i == j else 2**58) for j in range(4)] for i in range(4)]

    def changed(*entries: tuple[int, int, int]) -> list[list[int]]:
        m = [list(row) for row in base]
        for i, j, value in entries:
            m[i][j] = m[j][i] = value
        return m

    contradicting = changed((0, 1, 150), (0, 2, 150), (0, 3, 150))
    indefinite = changed((3, 0, 90), (3, 1, -90), (3, 2, 0))
    cases: list[tuple[str, list[list[int]], int, int, list[int] | None]] = [
        ("honest", base, 100, 1, [0, 1, 2, 3]), ("exact at 2^59", big, 2**59, 0, [0, 1, 2, 3]),
        ("rank one", [[1, 2], [2, 4]], 4, 0, [0, 1]), ("one less than rank one", [[1, 2], [2, 3]], 4, 0, None),
        ("longer than the gate", base, 99, 1, None), ("one row longer", changed((2, 2, 101)), 100, 1, [0, 1, 3]),
        ("a negative norm", changed((1, 1, -1)), 100, 1, [0, 2, 3]),
        ("contradicts more than can lie", contradicting, 100, 1, [1, 2, 3]),
        ("every pair possible, together not", indefinite, 100, 1, [0, 1, 2]),
        ("the same, and nobody may be malicious", indefinite, 100, 0, None),
    ]  # fmt: skip
    out = []
    for about, gram, gate, f, rows in cases:
        if rows is not None:
            assert semidefinite([[gram[i][j] for j in rows] for i in rows])
            assert len(gram) - len(rows) <= f
            # Rows that are not possible by themselves are malicious for certain; the last case is only a guess.
            certain = 0 if about.startswith("every pair possible") else len(gram) - len(rows)
            result: dict[str, Any] = {"rows": rows, "tolerate": f - certain}
        else:
            result = {"error": "RoundFailed"}
        out.append({"about": about, "gram": gram, "gate": gate, "f": f, "result": result})
    return out


def scale_cases() -> list[dict[str, Any]]:
    """Fixed point and norm gate."""
    out: list[dict[str, Any]] = []
    for unit, d, r in ((1.0, 10**6, 4), (0.5, 5000, 2), (2.0, 10**7, 16), (1.0, 10**10, 4), (0.0, 10, 4)):
        case: dict[str, Any] = {"unit": unit, "dimension": d, "sketches": r}
        sigma = min(512.0, math.sqrt(P / (1024 * r * N * d)))
        if unit <= 0 or sigma < 8:
            out.append(case | {"error": "UsageError"})
            continue
        scale = sigma * math.sqrt(d) / unit
        gate = math.floor(1.10 * r * ((unit * scale) ** 2 + 41.0 * N * -(-d // N)))
        out.append(case | {"sigma_x": sigma, "scale": scale, "norm_gate": gate})
    return out


def wire_errors() -> list[dict[str, Any]]:
    """What a reader refuses, and under which code."""
    return [
        {"read": "field", "bytes": field_bytes([P - 1]).hex(), "error": None},
        {"read": "field", "bytes": P.to_bytes(8, "little").hex(), "error": "out-of-range"},
        {"read": "field", "bytes": "ff" * 8, "error": "out-of-range"},
        {"read": "field", "bytes": "00" * 7, "error": "wrong-shape"},
        {"read": "public-identity", "bytes": public_identity(*SEEDS[0]).hex(), "error": None},
        {"read": "public-identity", "bytes": "00" * 63, "error": "unreadable"},
        {"read": "public-identity", "bytes": "01" + "00" * 31 + public_identity(*SEEDS[0])[32:].hex(),
         "error": "weak-key"},
        {"read": "public-identity", "bytes": public_identity(*SEEDS[0])[:32].hex() + "00" * 32, "error": "weak-key"},
        {"read": "deal", "bytes": "00" * 8, "error": "wrong-shape"},
        {"read": "deal", "bytes": "00" * (8 * (N + 5 + 1)) + "ff" * 8, "error": "out-of-range"},
        {"read": "head", "bytes": b"[]".hex(), "error": "undecodable"},
        {"read": "head", "bytes": b"{".hex(), "error": "undecodable"},
        {"read": "names", "bytes": b'{"names":["a","c"]}'.hex(), "error": None},
        {"read": "names", "bytes": b'{"names":["c","a"]}'.hex(), "error": "undecodable"},
        {"read": "names", "bytes": b'{"names":["a","a"]}'.hex(), "error": "undecodable"},
        {"read": "names", "bytes": b'{"names":["d"]}'.hex(), "error": "undecodable"},
        {"read": "signatures", "bytes": b'{"signatures":{"a":"00"}}'.hex(), "error": "undecodable"},
    ]  # fmt: skip


def build() -> dict[str, Any]:
    """All vectors."""
    fields = context()
    digest = digest_of(fields)
    seed = hashlib.sha256(b"seed").digest()
    gammas = elements("sealed-gamma-shares", seed, 4)
    later = elements("sealed-mask-xof", digest, 4 * N)[3 * N :]
    info = h("sealed-hpke-info", digest, b"site-02", b"site-01")
    update = [0.01 * (i % 7 - 3) for i in range(24)]
    plaintext = b"a deal from site-02 to site-01"
    sealed = hpke_seal(public_identity(*SEEDS[0])[32:], info, plaintext, hashlib.sha256(b"ephemeral").digest())
    sharing = share([0, 1, P - 1], 2, 5, source("sharing"))
    return {
        "about": "Known answers of the suite sealed/v1, made by make_sealed.py; do not edit by hand. Sources of "
                 "randomness named NAME are SHAKE-256 of 'quorsum test vectors: NAME', read from the start.",
        "labels": {label: h(label, b"one", b"", b"two").hex() for label in LABELS},
        "context": {"fields": fields, "digest": digest.hex()},
        "identity": [
            {"signing_seed": a.hex(), "sealing_seed": b.hex(), "public": public_identity(a, b).hex(),
             "key_id": h("sealed-identity", public_identity(a, b))[:16].hex()}
            for a, b in SEEDS
        ],
        "nonce": NONCE.hex(),
        "statements": statements(digest),
        "hpke": {"info": info.hex(), "plaintext": plaintext.hex(), "sealed": sealed.hex()},
        "xof": {
            "seed": seed.hex(), "gammas": gammas, "block_3": {"first": later[:4], "sha256": fingerprint(later)},
            "signs": [1 - 2 * bit for bit in bits(stream("sealed-sketch-signs", seed, 2), 12)],
            "rotations": [word % N for word in words(stream("sealed-sketch-rotations", seed, 24), 2)],
        },
        "quantise": {"update": update, "scale": 1000.3, "source": "quantise",
                     "integers": quantised(update, 1000.3, digest, source("quantise"))},
        "mask": mask_case(digest), "sharing": {"secrets": [0, 1, P - 1], "degree": 2, "n": 5, "shares": sharing},
        "deal": deal_case(), "bounds": bounds_cases(), "scale": scale_cases(), "decoding": decoding_cases(),
        "elimination": elimination_cases(), "exact_checks": exact_cases(), "wire": wire_errors(),
    }  # fmt: skip


if __name__ == "__main__":
    PATH.write_text(json.dumps(build(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
