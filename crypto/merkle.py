"""One digest for all submissions of a round.

The tree is that of RFC 9162 (section 2.1): the left part of a tree of m leaves is the largest full one that is smaller
than m. Leaves, nodes and the root are hashed in domains of their own and the root binds the number of leaves, so
nothing passes for something else: a node for a leaf, a subtree for the tree, a repeated leaf for a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quorsum.crypto import labels
from quorsum.crypto.labels import tagged
from quorsum.crypto.suite import Site
from quorsum.errors import UsageError

__all__ = ["merkle_root"]


def merkle_root(commitments: Mapping[Site, bytes]) -> bytes:
    """Digest of all submissions, 32 bytes; the order of ``commitments`` does not matter.

    Raises:
        UsageError: there is no submission.
    """
    if not commitments:
        raise UsageError("there is no submission to build a tree of")
    leaves = [tagged(labels.MERKLE_LEAF, site.encode(), commitments[site]) for site in sorted(commitments)]
    return tagged(labels.MERKLE_ROOT, len(leaves).to_bytes(8, "little"), _top(leaves))


def _top(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    # The largest power of two below their number.
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return tagged(labels.MERKLE_NODE, _top(leaves[:half]), _top(leaves[half:]))
