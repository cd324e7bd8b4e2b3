"""Six words stand for 66 bits of everything that went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemonic import Mnemonic

from quorsum.words import COUNT, six_words

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "enrollment.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["words"], ids=lambda case: case["words"])
def test_known_answers(case: dict[str, Any]) -> None:
    assert six_words(*map(bytes.fromhex, case["parts"])) == case["words"]


def test_where_one_part_ends_matters() -> None:
    assert six_words(b"ab", b"c") != six_words(b"a", b"bc") != six_words(b"abc")


@given(st.lists(st.binary(max_size=8), max_size=4))
def test_always_six_words_of_the_list(parts: list[bytes]) -> None:
    words = six_words(*parts).split("-")
    assert len(words) == COUNT
    assert set(words) <= set(Mnemonic("english").wordlist)
