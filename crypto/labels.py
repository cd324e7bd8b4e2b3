"""Every domain of the sealed round, by name, in one place.

Whatever a sealed round hashes, signs, seals or expands is bound to one of these labels, so that nothing made for one
purpose can be passed off as something made for another. :func:`tagged` is the one hash; its encoding, with the length
before each part, is described in ``randomness``.
"""

from __future__ import annotations

from typing import Final

from quorsum.crypto.randomness import tagged_hash as tagged

__all__ = [
    "CHECK",
    "COMMITMENT",
    "DEAL",
    "FLATTEN_XOF",
    "GAMMA_SHARES",
    "HPKE_INFO",
    "IDENTITY",
    "LABELS",
    "MASK_XOF",
    "MERKLE_LEAF",
    "MERKLE_NODE",
    "MERKLE_ROOT",
    "MESSAGE",
    "NONCE",
    "POINTS",
    "QUESTION",
    "ROOT",
    "ROOT_CERTIFICATE",
    "SEED",
    "SKETCH_ROTATIONS",
    "SKETCH_SIGNS",
    "SUBMISSION",
    "SUM_SHARE",
    "TICKET",
    "UPLOAD",
    "VIEW",
    "VIEW_CERTIFICATE",
    "tagged",
]

IDENTITY: Final = "sealed-identity"
"""Fingerprint of a site's long-term public keys."""
NONCE: Final = "sealed-nonce"
"""The coordinator's commitment to its nonce."""
SUBMISSION: Final = "sealed-submission"
"""A site's submission, as it signs it."""
COMMITMENT: Final = "sealed-commitment"
"""Commitment to one part of a submission."""
DEAL: Final = "sealed-deal"
"""A sealed deal, as its dealer commits itself to it."""
UPLOAD: Final = "sealed-upload"
"""An encrypted update, as its site commits itself to it."""
HPKE_INFO: Final = "sealed-hpke-info"
"""Public context of a sealed deal from one site to another."""
MERKLE_LEAF: Final = "sealed-merkle-leaf"
"""A leaf of the tree over the submissions."""
MERKLE_NODE: Final = "sealed-merkle-node"
"""An inner node of the tree over the submissions."""
MERKLE_ROOT: Final = "sealed-merkle-root"
"""The top of the tree, bound to the number of leaves."""
ROOT: Final = "sealed-root"
"""The root: all submissions of one context."""
ROOT_CERTIFICATE: Final = "sealed-root-certificate"
"""A root, as sites sign it."""
SEED: Final = "sealed-seed"
"""The seed of the sketches and checks, from the root and the coordinator's nonce."""
VIEW: Final = "sealed-view"
"""The view: root, seed, dealers and sketches."""
VIEW_CERTIFICATE: Final = "sealed-view-certificate"
"""A view, as sites sign it."""
CHECK: Final = "sealed-check-answer"
"""A site's check values, as it signs them."""
POINTS: Final = "sealed-gram-points"
"""A site's points of the Gram matrix, as it signs them."""
QUESTION: Final = "sealed-question"
"""A question of the coordinator, as a site remembers it."""
TICKET: Final = "sealed-ticket"
"""The selected set, as sites sign it."""
SUM_SHARE: Final = "sealed-sum-share"
"""A site's share of the sum of keys, as it signs it."""
MASK_XOF: Final = "sealed-mask-xof"
"""Expansion of the public ring elements a_j."""
FLATTEN_XOF: Final = "flatten"
"""Expansion of the public +-1 vector of ``flatten``, shared with the other suites."""
SKETCH_SIGNS: Final = "sealed-sketch-signs"
"""Expansion of the signs of the sketches."""
SKETCH_ROTATIONS: Final = "sealed-sketch-rotations"
"""Expansion of the rotations of the sketches."""
MESSAGE: Final = "message"
"""A site's reply to one instruction, whatever its suite, as it signs it."""
GAMMA_SHARES: Final = "sealed-gamma-shares"
"""Expansion of the coefficients that check the shares of keys and the sharings of zero."""

LABELS: Final = (
    IDENTITY,
    NONCE,
    SUBMISSION,
    COMMITMENT,
    DEAL,
    UPLOAD,
    HPKE_INFO,
    MERKLE_LEAF,
    MERKLE_NODE,
    MERKLE_ROOT,
    ROOT,
    ROOT_CERTIFICATE,
    SEED,
    VIEW,
    VIEW_CERTIFICATE,
    CHECK,
    POINTS,
    QUESTION,
    TICKET,
    SUM_SHARE,
    MASK_XOF,
    FLATTEN_XOF,
    SKETCH_SIGNS,
    SKETCH_ROTATIONS,
    GAMMA_SHARES,
    MESSAGE,
)
"""All of them, for the test that no two are equal."""
