from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quorsum.crypto import RoundContext
from quorsum.crypto.flatten import flatten, flattening_signs
from quorsum.crypto.flooding import flooding_noise
from quorsum.crypto.randomness import tagged_hash

VECTORS = Path(__file__).parent / "vectors"
CASES: dict[str, Any] = json.loads((VECTORS / "crypto.json").read_text(encoding="utf-8"))


def test_the_file_is_what_the_script_makes():
    spec = importlib.util.spec_from_file_location("make_crypto", VECTORS / "make_crypto.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.build() == CASES


@pytest.mark.parametrize("case", CASES["digests"])
def test_context_digest(case):
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in case["context"].items()}
    context = RoundContext(**fields)
    assert context.digest().hex() == case["digest"]


@pytest.mark.parametrize("case", CASES["flatten"])
def test_flattening_signs(case):
    flat = flatten(bytes.fromhex(case["digest"]), np.ones(case["dimension"]))
    assert "".join("+" if sign > 0 else "-" for sign in flat) == case["signs"]


def test_flattening_signs_across_chunks():
    case = CASES["flatten_across_chunks"]
    flat = flatten(bytes.fromhex(case["digest"]), np.ones(case["dimension"]))
    signs = "".join("+" if sign > 0 else "-" for sign in flat)
    assert signs[-16:] == case["last_signs"]
    assert hashlib.sha256(signs.encode()).hexdigest() == case["sha256_of_all"]


@pytest.mark.parametrize("case", CASES["flooding"])
def test_flooding_noise(case):
    noise = flooding_noise(
        bytes.fromhex(case["secret"]),
        bytes.fromhex(case["digest"]),
        case["phase"],
        bytes.fromhex(case["question"]),
        case["number"],
        len(case["noise"]),
    )
    assert noise == pytest.approx(np.array(case["noise"]) / ((2**32 - 1) / 3) ** 0.5, rel=1e-15)


@pytest.mark.parametrize("case", CASES["tagged_hash"])
def test_tagged_hash(case):
    assert tagged_hash(case["tag"], *map(bytes.fromhex, case["parts"])).hex() == case["hash"]


def test_hashes_of_different_cuts_differ():
    assert len({case["hash"] for case in CASES["tagged_hash"]}) == len(CASES["tagged_hash"])


def test_flattening_undoes_itself_and_leaves_its_argument():
    vector = np.arange(5.0)
    flat = flatten(b"\x00" * 32, vector)
    assert np.array_equal(flatten(b"\x00" * 32, flat), vector)
    assert np.array_equal(vector, np.arange(5.0))


def test_flattening_is_fair_and_depends_on_the_digest():
    chunks = [negative for _, negative in flattening_signs(b"\x01" * 32, 1 << 20)]
    assert abs(np.concatenate(chunks).mean() - 0.5) < 5 * 0.5 / 1024
    other = [negative for _, negative in flattening_signs(b"\x02" * 32, 1 << 20)]
    assert abs((chunks[0] ^ other[0]).mean() - 0.5) < 5 * 0.5 / 1024


def test_flooding_noise_has_unit_deviation_and_bounded_range():
    noise = flooding_noise(b"k" * 32, b"d" * 32, "sum", b"q" * 32, 3, 200_000)
    assert abs(noise.mean()) < 5 / 200_000**0.5
    assert abs(noise.std() - 1) < 0.01
    assert np.abs(noise).max() <= 3.47
