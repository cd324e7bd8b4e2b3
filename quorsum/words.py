"""Six words that two people compare over the telephone, instead of hexadecimal digits.

They stand for 66 bits of a hash, from the English list of BIP-39 (2048 words, all different in their first four
letters). Whoever wants to be taken for somebody else must find other keys with the same words, about 2^66 trials.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from mnemonic import Mnemonic

from quorsum.crypto.randomness import tagged_hash

__all__ = ["COUNT", "six_words"]

COUNT: Final = 6
_BITS: Final = 11
_LABEL: Final = "six-words"


@cache
def _list() -> tuple[str, ...]:
    return tuple(Mnemonic("english").wordlist)


def six_words(*parts: bytes) -> str:
    """The first 66 bits of a tagged SHA-256 over ``parts``, 11 bits a word, joined by ``-``."""
    number = int.from_bytes(tagged_hash(_LABEL, *parts)) >> (256 - COUNT * _BITS)
    words = [_list()[number >> (_BITS * k) & (2**_BITS - 1)] for k in reversed(range(COUNT))]
    return "-".join(words)
