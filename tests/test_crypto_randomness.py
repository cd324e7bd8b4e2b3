from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto.randomness import draw, stretched, zeros
from quorsum.errors import UsageError


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 15, 16, 17, 1000, 1 << 19, (1 << 19) + 1]), max_size=6))
def test_a_stretch_is_one_key_stream_however_it_is_taken(counts):
    key = os.urandom(32)
    take = stretched(lambda count: key[:count])
    whole = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(sum(counts)))
    assert b"".join(take(count) for count in counts) == whole


@pytest.mark.parametrize("count", [0, 1, 1 << 19, (1 << 19) + 1])
def test_zeros(count):
    made = zeros(count)
    assert made == bytes(count)
    assert memoryview(made).readonly


def test_broken_sources_are_refused():
    for use in (lambda: draw(lambda _: b"x", 3), lambda: stretched(lambda _: b"x")):
        with pytest.raises(UsageError, match="gave 1 bytes"):
            use()
