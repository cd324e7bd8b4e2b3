from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import labels, xof
from quorsum.crypto.field import P
from quorsum.crypto.ring import N
from quorsum.errors import UsageError

# All for a seed of 32 zero bytes.
KNOWN = {
    "blocks": "01a5273473f987beefd605b3c08faf2573eb87e348d14accf5f848359f57154e",
    "gammas": [743828783583236611, 513146971550573647],
    "signs": [1, 1, -1, 1, -1, -1, -1, 1, -1, 1, 1, -1],
    "rotations": [1929, 1739, 3040, 9],
}


def test_key_stream_is_aes_counter_mode_under_the_tagged_seed():
    key = labels.tagged(labels.MASK_XOF, b"seed")
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - counter mode by hand
    expected = ecb.update(b"".join(i.to_bytes(16, "big") for i in range(3)))
    assert xof.keystream(labels.MASK_XOF, b"seed", 48) == expected


def test_known_answer():
    blocks = xof.uniform_blocks(b"\x00" * 32, 0, 3)
    assert hashlib.sha256(blocks.astype("<u8").tobytes()).hexdigest() == KNOWN["blocks"]
    assert xof.field_elements(labels.GAMMA_SHARES, b"\x00" * 32, 2).tolist() == KNOWN["gammas"]
    assert xof.signs(labels.SKETCH_SIGNS, b"\x00" * 32, 12).tolist() == KNOWN["signs"]
    assert xof.integers_below(labels.SKETCH_ROTATIONS, b"\x00" * 32, 4, N).tolist() == KNOWN["rotations"]


def test_a_long_stretch_is_made_of_its_parts():
    part = 1 << 18
    whole = xof.keystream(labels.SEED, b"s", 4 * part)
    assert whole == b"".join(xof.keystream(labels.SEED, b"s", part, offset=k * part) for k in range(4))


@given(st.integers(0, 100), st.integers(0, 64))
def test_any_part_can_be_reached_directly(offset, length):
    whole = xof.keystream(labels.SEED, b"s", 16 * offset + length)
    assert xof.keystream(labels.SEED, b"s", length, offset=16 * offset) == whole[16 * offset :]


@settings(max_examples=20)
@given(st.integers(0, 6), st.integers(0, 6))
def test_blocks_do_not_depend_on_how_they_are_asked_for(first, count):
    assert np.array_equal(
        xof.uniform_blocks(b"s", first, count), xof.uniform_blocks(b"s", 0, 12)[first : first + count]
    )


def test_block_numbers_beyond_32_bits_of_counter():
    far = xof.uniform_blocks(b"s", 2**40, 2)
    assert np.array_equal(far[1], xof.uniform_blocks(b"s", 2**40 + 1, 1)[0])
    assert not np.array_equal(far[0], far[1])


@pytest.mark.parametrize(("length", "offset"), [(-1, 0), (1, -16), (1, 8)])
def test_impossible_places_are_refused(length, offset):
    with pytest.raises(UsageError, match="multiple of 16"):
        xof.keystream(labels.SEED, b"s", length, offset)


@pytest.mark.parametrize("bound", [0, -4, 3, 4095, 1 << 17])
def test_bounds_that_would_bias_are_refused(bound):
    with pytest.raises(UsageError, match="power of two"):
        xof.integers_below(labels.SEED, b"s", 1, bound)


def test_the_one_value_too_many_becomes_zero():
    raw = b"\xff" * 16 + b"\xfe" + b"\xff" * 7
    assert xof._to_field(raw).tolist() == [0, 0, P - 1]


def test_everything_is_spread_as_it_should_be():
    count = 1 << 16
    elements = xof.field_elements(labels.GAMMA_SHARES, b"s", count)
    assert int(elements.max()) < P
    assert abs(elements.astype(np.float64).mean() / P - 0.5) < 5 / (12 * count) ** 0.5
    signs = xof.signs(labels.SKETCH_SIGNS, b"s", count)
    assert set(signs.tolist()) == {-1, 1}
    assert signs.dtype == np.int8
    assert abs(signs.mean()) < 5 / count**0.5
    rotations = xof.integers_below(labels.SKETCH_ROTATIONS, b"s", count, N)
    assert rotations.dtype == np.uint16
    seen = np.bincount(rotations, minlength=N)
    assert seen.size == N
    # chi squared with N - 1 degrees of freedom, within five deviations
    assert abs(((seen - count / N) ** 2).sum() * N / count - N) < 5 * (2 * N) ** 0.5
    assert xof.integers_below(labels.SEED, b"s", 3, 1).tolist() == [0, 0, 0]


def test_labels_and_seeds_separate():
    drawn = {xof.keystream(label, seed, 32) for label in labels.LABELS for seed in (b"", b"a", b"b")}
    assert len(drawn) == 3 * len(labels.LABELS)
