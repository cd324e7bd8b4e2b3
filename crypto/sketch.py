"""Random sketches: a few signed, rotated sums of all blocks, from which inner products are estimated.

Sketch k of an update with blocks y_j is

    Y^k = sum_j sigma_kj X^rho_kj y_j    in Z_p[X] / (X^N + 1),

with public random signs sigma and rotations rho. The map is linear over the ring, so the sketch of a ciphertext is a
ciphertext of the sketch, whose public part is the same sketch of the a_j. For two updates, the mean of <Y^k, Z^k> over
the choice of signs and rotations is <y, z>. Signs alone would not do: they cannot tell two equal blocks from none in
half of the cases.

Cost: one addition of N numbers per block and sketch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field, xof
from quorsum.crypto.field import FieldArray
from quorsum.crypto.labels import SKETCH_ROTATIONS, SKETCH_SIGNS
from quorsum.crypto.ring import N
from quorsum.errors import UsageError

__all__ = ["SketchPlan", "Sketcher", "integer_sketch", "public_sketch", "sketch", "sketch_plan"]

# Eight numbers below p add up to less than 2^64: one reduced sum and seven blocks.
_LAZY = 7
_BATCH = 16


@dataclass(frozen=True)
class SketchPlan:
    """The signs and rotations of r sketches of B blocks.

    Attributes:
        signs: int8 of +1 and -1, shape (r, B).
        rotations: uint16 in [0, N), shape (r, B).
    """

    signs: NDArray[np.int8]
    rotations: NDArray[np.uint16]

    @property
    def sketches(self) -> int:
        """r, the number of sketches."""
        return len(self.signs)

    @property
    def blocks(self) -> int:
        """B, the number of blocks."""
        return len(self.signs[0])


def sketch_plan(seed: bytes, blocks: int, r: int) -> SketchPlan:
    """Expand a plan from the round's seed, which nobody knows before every update is committed.

    Args:
        seed: 32 bytes.
        blocks: B, at least 1.
        r: number of sketches, at least 1.

    Raises:
        UsageError: no blocks or no sketches.
    """
    if blocks < 1 or r < 1:
        raise UsageError(f"a sketch needs at least one block and one sketch, got {blocks} and {r}")
    signs = xof.signs(SKETCH_SIGNS, seed, r * blocks).reshape(r, blocks)
    rotations = xof.integers_below(SKETCH_ROTATIONS, seed, r * blocks, N).reshape(r, blocks)
    return SketchPlan(signs, rotations)


class Sketcher:
    """A sketch in the making: takes the blocks in order, a batch at a time, and keeps none of them."""

    def __init__(self, plan: SketchPlan) -> None:
        self._signs: list[list[int]] = plan.signs.T.tolist()
        self._rotations: list[list[int]] = plan.rotations.T.tolist()
        # Twice as long as a block: what a rotation moves beyond X^N is kept there, and subtracted once at the end.
        self._sums = np.zeros((plan.sketches, 2 * N), dtype=np.uint64)
        self._next = 0
        self._pending = 0

    def add(self, batch: FieldArray) -> None:
        """Take the next blocks, shape (b, N).

        Raises:
            UsageError: wrong shape, or more blocks than the plan has.
        """
        if batch.ndim != 2 or batch.shape[1] != N:
            raise UsageError(f"a batch has shape (b, {N}), got {batch.shape}")
        if self._next + len(batch) > len(self._signs):
            raise UsageError(f"the plan has {len(self._signs)} blocks, got more")
        negative = field.neg(batch)
        for plus, minus in zip(batch, negative, strict=True):
            if self._pending == _LAZY:
                self._sums = field.reduce(self._sums)
                self._pending = 0
            choice = zip(self._sums, self._signs[self._next], self._rotations[self._next], strict=True)
            for total, sign, rho in choice:
                total[rho : rho + N] += plus if sign > 0 else minus
            self._next += 1
            self._pending += 1

    def result(self) -> FieldArray:
        """The sketches, uint64, shape (r, N).

        Raises:
            UsageError: blocks are missing.
        """
        if self._next != len(self._signs):
            raise UsageError(f"the plan has {len(self._signs)} blocks, got {self._next}")
        sums = field.reduce(self._sums)
        return field.sub(sums[:, :N], sums[:, N:])


def sketch(plan: SketchPlan, batches: Iterable[FieldArray]) -> FieldArray:
    """Sketch blocks that come in batches.

    Args:
        plan: signs and rotations.
        batches: all blocks in order, each batch of shape (b, N).

    Returns:
        uint64, shape (r, N).

    Raises:
        UsageError: wrong shape or wrong number of blocks.
    """
    total = Sketcher(plan)
    for batch in batches:
        total.add(batch)
    return total.result()


def public_sketch(seed_mask: bytes, plan: SketchPlan) -> FieldArray:
    """The same sketch of the public a_j: what the sum of keys is multiplied by in a sketch of ciphertexts.

    Args:
        seed_mask: from which the a_j are expanded.
        plan: signs and rotations.

    Returns:
        uint64, shape (r, N).
    """
    starts = range(0, plan.blocks, _BATCH)
    return sketch(plan, (xof.uniform_blocks(seed_mask, j, min(_BATCH, plan.blocks - j)) for j in starts))


def integer_sketch(plan: SketchPlan, batches: Iterable[NDArray[np.int64]]) -> FieldArray:
    """The same sketch of opened integers, reduced mod p.

    Args:
        plan: signs and rotations.
        batches: all blocks in order, each batch of shape (b, N).

    Returns:
        uint64, shape (r, N).

    Raises:
        UsageError: wrong shape or wrong number of blocks.
    """
    return sketch(plan, (field.from_signed(batch) for batch in batches))
