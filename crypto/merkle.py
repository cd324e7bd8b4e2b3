"""One digest for all submissions of a round, and short proofs that one is among them.

The tree is that of RFC 9162 (section 2.1): the left part of a tree of m leaves is the largest full one that is smaller
than m. Leaves, nodes and the root are hashed in domains of their own and the root binds the number of leaves, so
nothing passes for something else: a node for a leaf, a subtree for the tree, a repeated leaf for a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quorsum.crypto import labels
from quorsum.crypto.labels import tagged
from quorsum.crypto.suite import Site
from quorsum.errors import UsageError

__all__ = ["MerkleProof", "merkle_proof", "merkle_root", "verify_inclusion"]

_DIGEST = 32


@dataclass(frozen=True)
class MerkleProof:
    """That a submission is under a root.

    Attributes:
        index: place of the submission among all, sorted by site, from 0.
        count: number of submissions.
        path: digests of the sibling subtrees, from the leaf upwards, 32 bytes each.
    """

    index: int
    count: int
    path: tuple[bytes, ...]


def _leaf(site: Site, commitment: bytes) -> bytes:
    return tagged(labels.MERKLE_LEAF, site.encode(), commitment)


def _node(left: bytes, right: bytes) -> bytes:
    return tagged(labels.MERKLE_NODE, left, right)


def _rooted(count: int, top: bytes) -> bytes:
    return tagged(labels.MERKLE_ROOT, count.to_bytes(8, "little"), top)


def _split(count: int) -> int:
    """Largest power of two below count, for count >= 2."""
    return 1 << ((count - 1).bit_length() - 1)


def _top(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    half = _split(len(leaves))
    return _node(_top(leaves[:half]), _top(leaves[half:]))


def _path(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    if len(leaves) == 1:
        return ()
    half = _split(len(leaves))
    if index < half:
        return (*_path(leaves[:half], index), _top(leaves[half:]))
    return (*_path(leaves[half:], index - half), _top(leaves[:half]))


def _climb(leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bytes | None:
    """The top of a tree of ``count`` leaves above this leaf, or None if the path has another length."""
    if count == 1:
        return None if path else leaf
    if not path:
        return None
    half = _split(count)
    if index < half:
        below = _climb(leaf, index, half, path[:-1])
        return None if below is None else _node(below, path[-1])
    below = _climb(leaf, index - half, count - half, path[:-1])
    return None if below is None else _node(path[-1], below)


def _leaves(commitments: Mapping[Site, bytes]) -> list[bytes]:
    if not commitments:
        raise UsageError("there is no submission to build a tree of")
    return [_leaf(site, commitments[site]) for site in sorted(commitments)]


def merkle_root(commitments: Mapping[Site, bytes]) -> bytes:
    """Digest of all submissions, 32 bytes; the order of ``commitments`` does not matter.

    Raises:
        UsageError: there is no submission.
    """
    leaves = _leaves(commitments)
    return _rooted(len(leaves), _top(leaves))


def merkle_proof(commitments: Mapping[Site, bytes], site: Site) -> MerkleProof:
    """Proof that ``site`` has submitted what it has.

    Raises:
        UsageError: the site has not submitted anything.
    """
    if site not in commitments:
        raise UsageError(f"site {site} is not among the submissions")
    leaves, index = _leaves(commitments), sorted(commitments).index(site)
    return MerkleProof(index, len(leaves), _path(leaves, index))


def verify_inclusion(root: bytes, site: Site, commitment: bytes, proof: MerkleProof) -> bool:
    """Whether ``root`` stands for a list of submissions that holds this one at this place."""
    if not 0 <= proof.index < proof.count < 1 << 63 or any(len(digest) != _DIGEST for digest in proof.path):
        return False
    top = _climb(_leaf(site, commitment), proof.index, proof.count, proof.path)
    return top is not None and _rooted(proof.count, top) == root
