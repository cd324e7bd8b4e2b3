from __future__ import annotations

from quorsum.crypto import flatten as flattening
from quorsum.crypto import labels
from quorsum.crypto.randomness import expand, tagged_hash


def test_no_two_domains_are_equal():
    assert len(set(labels.LABELS)) == len(labels.LABELS)


def test_the_list_holds_every_label():
    named = {name: value for name, value in vars(labels).items() if name.isupper() and isinstance(value, str)}
    assert set(named.values()) == set(labels.LABELS)
    assert set(named) | {"LABELS", "tagged"} == set(labels.__all__)


def test_labels_cannot_run_into_what_follows():
    for label in labels.LABELS:
        assert label.isascii()
        assert label.isprintable()
        assert "/" not in label


def test_other_domains_and_other_cuts_give_other_hashes():
    hashes = [labels.tagged(label, b"ab", b"c") for label in labels.LABELS]
    hashes += [
        labels.tagged(labels.SEED, *parts) for parts in [(), (b"",), (b"abc",), (b"a", b"bc"), (b"ab", b"c", b"")]
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(value) for value in hashes} == {32}


def test_there_is_one_hash():
    assert labels.tagged is tagged_hash


def test_flattening_uses_the_label_that_is_listed():
    _, negative = next(iter(flattening.flattening_signs(b"d" * 32, 8)))
    raw = expand(labels.FLATTEN_XOF, b"d" * 32, (0).to_bytes(8, "little"), length=1)
    assert [bool(raw[0] >> bit & 1) for bit in range(8)] == negative.tolist()
