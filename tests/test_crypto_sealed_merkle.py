from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto import labels
from quorsum.crypto.labels import tagged
from quorsum.crypto.merkle import merkle_root
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
    # The node over all leaves is not the root, and two submissions that are the two nodes make another one.
    assert merkle_root(four) != tagged(labels.MERKLE_NODE, left, right)
    assert merkle_root(four) != merkle_root({"site-00": left, "site-02": right})


def test_a_subtree_does_not_pass_for_the_tree():
    four = submissions(4)
    two = {site: four[site] for site in ("site-00", "site-01")}
    assert merkle_root(two) != merkle_root(four)


def test_a_repeated_last_leaf_does_not_give_the_same_root():
    # The flaw of trees that double the last leaf of an odd row (CVE-2012-2459).
    three = submissions(3)
    assert merkle_root(three) != merkle_root({**three, "site-03": three["site-02"]})


def test_a_site_and_its_commitment_cannot_be_cut_elsewhere():
    assert merkle_root({"ab": b"c" * 32}) != merkle_root({"a": b"b" + b"c" * 32})


# --- what holds ---


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


# --- refusals ---


def test_no_submission_has_no_root():
    with pytest.raises(UsageError, match="no submission"):
        merkle_root({})
