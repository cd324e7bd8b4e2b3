"""The suite ``plain``: nothing is hidden. For comparison, debugging, and federations that trust their coordinator.

An update travels as little-endian float32 in blocks of 2^20 numbers. The Gram matrix is computed in float64
from those very numbers, block by block, and nobody is asked anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.checks import EXACT_TOLERANCE, check_context, check_update, check_weights
from quorsum.crypto.suite import Blocks, Dialogue, Keep, Measured, Opened, RandomBytes, RoundContext, Site, Vector
from quorsum.errors import CoordinatorFault, KeyMaterialError, SiteFault, UsageError

__all__ = ["PLAIN_BLOCK", "PlainCoordinator", "PlainSite", "PlainUpload"]

PLAIN_BLOCK = 1 << 20
"""Numbers in a block (4 MiB)."""

# Numbers per site that are widened to float64 at a time: n * 512 KiB.
_STRIDE = 1 << 16
_WIRE = np.dtype("<f4")


def _block_sizes(dimension: int) -> list[int]:
    return [min(PLAIN_BLOCK, dimension - start) for start in range(0, dimension, PLAIN_BLOCK)]


@dataclass(frozen=True)
class PlainUpload:
    """An update as it arrived: float32 blocks, read-only views of the received bytes."""

    blocks: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class PlainSite:
    """The site's end of ``plain``; it holds nothing."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return "plain/v1"

    @property
    def key_id(self) -> str:
        """Empty: there is no key."""
        return ""

    @property
    def public_key(self) -> bytes:
        """Empty: there is no key."""
        return b""

    @property
    def keeps_upload(self) -> bool:
        """No."""
        return False

    def seal(
        self, context: RoundContext, update: Vector, random_bytes: RandomBytes, keep: Keep | None = None
    ) -> tuple[bytes, Blocks]:
        """Write one update, shape (d,), as float32 blocks. The state is empty, no randomness is used.

        Raises:
            UsageError: the update has the wrong shape or type, or is not finite as float32.
        """
        check_update(context, update)
        blocks: list[bytes] = []
        for start in range(0, update.size, PLAIN_BLOCK):
            with np.errstate(over="ignore"):
                part = update[start : start + PLAIN_BLOCK].astype(_WIRE)
            if not np.isfinite(part).all():
                index = start + int(np.flatnonzero(~np.isfinite(part))[0])
                raise UsageError(f"the update at index {index} is too large for float32")
            blocks.append(part.tobytes())
        return b"", tuple(blocks)

    def reseal(
        self, context: RoundContext, state: bytes, kept: Blocks, random_bytes: RandomBytes
    ) -> tuple[bytes, Blocks]:
        """Refuse: nothing can fail that another attempt would mend.

        Raises:
            CoordinatorFault: always.
        """
        raise CoordinatorFault("one-attempt", "the suite plain has one attempt at a round")

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Refuse: this suite has no questions.

        Raises:
            CoordinatorFault: always.
        """
        raise CoordinatorFault("unknown-phase", f"the suite plain asks nothing, but phase {phase!r} was asked")


@dataclass(frozen=True)
class PlainCoordinator:
    """The coordinator's end of ``plain``."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return "plain/v1"

    @property
    def selects(self) -> bool:
        """No: it takes any weights."""
        return False

    @property
    def least_opened(self) -> int:
        """Fewest sites whose sum may be opened."""
        return 1

    def least_sites(self, tolerate: int, collude: int) -> int:
        """Fewest sites of a run: an honest majority."""
        return 2 * tolerate + 1

    def adopt(
        self, introduced: Mapping[Site, tuple[str, bytes]]
    ) -> tuple[PlainCoordinator, Mapping[Site, KeyMaterialError]]:
        """Itself: there are no keys. Sites that bring one all the same are refused."""
        reason = KeyMaterialError("unexpected-key", "the suite plain has no key, but the site brought one")
        return self, {site: reason for site, key in introduced.items() if key != ("", b"")}

    def prepare(self, context: RoundContext, random_bytes: RandomBytes) -> tuple[RoundContext, PlainCoordinator]:
        """Nothing to prepare."""
        return context, self

    def gram_noise(self, context: RoundContext) -> float:
        """Standard deviation of the noise of a Gram entry: none, it is computed in the clear."""
        return 0.0

    def noise_floor(self, context: RoundContext, weights: Mapping[Site, float]) -> float:
        """Squared norm that opening alone may add to a sum: rounding in float64, as good as nothing."""
        return 0.0

    def ratio_tolerance(self, context: RoundContext) -> float:
        """Largest honest ratio for ``check_opened``; both sides are exact, so only rounding is left."""
        return EXACT_TOLERANCE

    def accept(self, context: RoundContext, site: Site, blocks: Blocks) -> PlainUpload:
        """Check and decode one update. The bytes are not copied.

        Raises:
            SiteFault: ``wrong-shape`` or ``non-finite``.
        """
        check_context(context)
        sizes = _block_sizes(context.dimension)
        if len(blocks) != len(sizes):
            raise SiteFault(site, "wrong-shape", f"an update has {len(sizes)} blocks, got {len(blocks)}")
        views: list[NDArray[np.float32]] = []
        for number, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            if len(block) != size * _WIRE.itemsize:
                raise SiteFault(
                    site, "wrong-shape", f"block {number} has {size * _WIRE.itemsize} bytes, got {len(block)}"
                )
            view = np.frombuffer(block, dtype=_WIRE)
            if not np.isfinite(view).all():
                raise SiteFault(site, "non-finite", f"block {number} holds NaN or infinity; its training has diverged")
            views.append(view)
        return PlainUpload(tuple(views))

    def measure(
        self, context: RoundContext, uploads: Mapping[Site, PlainUpload], random_bytes: RandomBytes
    ) -> Dialogue[Measured]:
        """Compute the Gram matrix, exact up to float64 rounding. Asks nobody.

        Raises:
            UsageError: there is no upload.
        """
        sites = tuple(sorted(uploads))
        if not sites:
            raise UsageError("there is no upload to measure")
        gram = np.zeros((len(sites), len(sites)))
        for number, size in enumerate(_block_sizes(context.dimension)):
            for start in range(0, size, _STRIDE):
                parts = [uploads[site].blocks[number][start : start + _STRIDE] for site in sites]
                wide = np.stack(parts).astype(np.float64)
                gram += wide @ wide.T
        return Measured(sites, (gram + gram.T) / 2)
        yield  # pragma: no cover - makes this a dialogue that asks nothing

    def combine(
        self,
        context: RoundContext,
        uploads: Mapping[Site, PlainUpload],
        weights: Mapping[Site, float],
        random_bytes: RandomBytes,
    ) -> Dialogue[Opened]:
        """Compute the weighted sum in float64. Asks nobody.

        Raises:
            UsageError: a weight is not finite or has no upload, or all are zero.
        """
        check_weights(tuple(uploads), weights)
        total = np.zeros(context.dimension)
        for site in sorted(weights):
            weight = weights[site]
            if weight == 0.0:
                continue
            start = 0
            for block in uploads[site].blocks:
                for offset in range(0, block.size, _STRIDE):
                    part = block[offset : offset + _STRIDE].astype(np.float64)
                    total[start : start + part.size] += weight * part
                    start += part.size
        return Opened(total)
        yield  # pragma: no cover - makes this a dialogue that asks nothing
