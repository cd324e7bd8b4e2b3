from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import labels
from quorsum.crypto.labels import tagged
from quorsum.crypto.merkle import MerkleProof, merkle_proof, merkle_root, verify_inclusion
from quorsum.errors import UsageError


def submissions(count):
    return {f"site-{k:02}": hashlib.sha256(bytes([k])).digest() for k in range(count)}


# --- forgeries ---


def test_a_node_does_not_pass_for_a_leaf():
    four = submissions(4)
    left, right = (
        tagged(labels.MERKLE_NODE, *(tagged(labels.MERKLE_LEAF, s.encode(), four[s]) for s in pair))
        for pair in (("site-00", "site-01"), ("site-02", "site-03"))
    )
    root = merkle_root(four)
    # The tree with the two nodes as its only leaves, in every way in which two digests can be handed over.
    assert root != tagged(labels.MERKLE_NODE, left, right)
    for site, commitment in (("", left), (left.decode("latin-1"), right)):
        for count in (1, 2, 4):
            assert not verify_inclusion(root, site, commitment, MerkleProof(0, count, (right,)))


def test_a_subtree_does_not_pass_for_the_tree():
    four = submissions(4)
    two = {site: four[site] for site in ("site-00", "site-01")}
    proof = merkle_proof(two, "site-00")
    assert merkle_root(two) != merkle_root(four)
    assert not verify_inclusion(merkle_root(four), "site-00", four["site-00"], proof)


def test_a_repeated_last_leaf_does_not_give_the_same_root():
    # The flaw of trees that double the last leaf of an odd row (CVE-2012-2459).
    three = submissions(3)
    assert merkle_root(three) != merkle_root({**three, "site-03": three["site-02"]})


def test_a_site_and_its_commitment_cannot_be_cut_elsewhere():
    assert merkle_root({"ab": b"c" * 32}) != merkle_root({"a": b"b" + b"c" * 32})


@given(st.integers(1, 20), st.data())
@settings(max_examples=60)
def test_a_proof_holds_for_nothing_else(count, data):
    listed = submissions(count)
    site = data.draw(st.sampled_from(sorted(listed)))
    root, proof = merkle_root(listed), merkle_proof(listed, site)
    assert not verify_inclusion(root, site, bytes(32), proof)
    assert not verify_inclusion(root, "other", listed[site], proof)
    assert not verify_inclusion(bytes(32), site, listed[site], proof)
    for index in set(range(-1, count + 1)) - {proof.index}:
        assert not verify_inclusion(root, site, listed[site], replace(proof, index=index))
    for other in set(range(-1, count + 3)) - {count}:
        assert not verify_inclusion(root, site, listed[site], replace(proof, count=other))
    for path in (
        (*proof.path, bytes(32)),
        (bytes(32), *proof.path),
        proof.path[:-1] if proof.path else (b"",),
        tuple(digest[:-1] for digest in proof.path) or (bytes(31),),
        (*proof.path[:-1], bytes(32)),
    ):
        assert not verify_inclusion(root, site, listed[site], replace(proof, path=path))


def test_an_absurd_count_is_refused_at_once():
    assert not verify_inclusion(bytes(32), "a", bytes(32), MerkleProof(0, 1 << 4000, ()))
    assert not verify_inclusion(bytes(32), "a", bytes(32), MerkleProof(5, (1 << 63) - 1, (bytes(32),) * 5000))


# --- what holds ---


@given(st.integers(1, 40))
@settings(max_examples=40)
def test_every_submission_is_proven(count):
    listed = submissions(count)
    root = merkle_root(listed)
    for place, site in enumerate(sorted(listed)):
        proof = merkle_proof(listed, site)
        assert (proof.index, proof.count) == (place, count)
        assert len(proof.path) <= (count - 1).bit_length()
        assert verify_inclusion(root, site, listed[site], proof)


@given(st.integers(2, 12), st.data())
def test_every_change_changes_the_root_and_the_order_does_not(count, data):
    listed = submissions(count)
    order = data.draw(st.permutations(sorted(listed)))
    assert merkle_root({site: listed[site] for site in order}) == merkle_root(listed)
    changed = data.draw(st.sampled_from(order))
    assert merkle_root({**listed, changed: bytes(32)}) != merkle_root(listed)
    assert merkle_root({site: listed[site] for site in order if site != changed}) != merkle_root(listed)


def test_the_tree_of_three_is_that_of_rfc_9162():
    three = submissions(3)
    a, b, c = (tagged(labels.MERKLE_LEAF, site.encode(), three[site]) for site in sorted(three))
    top = tagged(labels.MERKLE_NODE, tagged(labels.MERKLE_NODE, a, b), c)
    assert merkle_root(three) == tagged(labels.MERKLE_ROOT, (3).to_bytes(8, "little"), top)
    assert merkle_proof(three, "site-02").path == (tagged(labels.MERKLE_NODE, a, b),)


# --- refusals ---


def test_no_submission_has_no_root():
    with pytest.raises(UsageError, match="no submission"):
        merkle_root({})


def test_a_site_without_a_submission_has_no_proof():
    with pytest.raises(UsageError, match="site-09 is not among"):
        merkle_proof(submissions(3), "site-09")
