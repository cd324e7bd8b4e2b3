"""What every cipher suite can do, seen from its two ends.

A suite hides updates from the coordinator and lets it do two things with what is hidden:

* **measure**: the Gram matrix ``G[i, j] = <x_i, x_j>`` of the updates, from which robust rules work;
* **combine**: one weighted sum of the updates.

Both may need answers from the sites. A suite knows nothing about transport, so it writes such a
conversation as a *dialogue*: a generator that yields an :class:`Ask` (one question per site), receives
the answers that came back, and finally returns its result. ``plain`` asks nothing, ``ckks`` asks once
per verb, a suite with more phases asks more often; the round in ``server`` is the same code for all.

Nothing here opens a socket or a file, reads a clock, or makes its own randomness.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import KeyMaterialError, SiteFault

Site: TypeAlias = str
"""Identifier of a site, unique in its federation."""

Blocks: TypeAlias = tuple[bytes, ...]
"""What travels: raw byte blocks, in order."""

Vector: TypeAlias = NDArray[np.floating]

RandomBytes: TypeAlias = Callable[[int], bytes]
"""``random_bytes(n)`` gives n fresh bytes; in production this is ``os.urandom``."""

Keep: TypeAlias = Callable[[Blocks], None]
"""Where a site puts what a later attempt at the round seals again; it is safe there when this returns."""

MOST_ATTEMPTS = 3
"""How often one update may be sealed at most: in attempts 1 to 3 at its round."""


@dataclass(frozen=True)
class RoundContext:
    """Everything public that one round is about. Its digest binds every byte of the round.

    Attributes:
        run: random identifier of the run.
        round: number of the round, from 1.
        attempt: number of the attempt at this round, from 1.
        sites: the invited sites, sorted, without repetition.
        dimension: d, number of parameters in an update.
        tolerate: f, how many of the invited sites may be malicious.
        unit: C > 0, the public reference norm. Suites scale updates by it; when ``clip`` is true,
            honest sites also clip their update to this norm.
        clip: whether updates longer than ``unit`` are clipped to it.
        sketches: r, number of random sketches from which the Gram matrix is measured.
        collude: tau, how many sites may pool what they know with a malicious coordinator.
        rule: name of the robust rule, so that sites can repeat the selection where the suite lets them.
        reference: the site whose row is the rule's trusted reference; empty for rules that need none.
        model: SHA-256 of the model that is trained from, in hexadecimal digits.
        keys: each site's public key, in the order of ``sites``, in hexadecimal digits; empty where sites have none.
        commitment: what the coordinator has committed itself to for this round, in hexadecimal digits; may be empty.
    """

    run: str
    round: int
    attempt: int
    sites: tuple[Site, ...]
    dimension: int
    tolerate: int
    unit: float
    clip: bool = False
    sketches: int = 4
    collude: int = 1
    rule: str = ""
    reference: Site = ""
    model: str = ""
    keys: tuple[str, ...] = ()
    commitment: str = ""

    def digest(self) -> bytes:
        """SHA-256 over a canonical encoding (JSON with sorted keys, shortest float form)."""
        encoded = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(b"quorsum/round-context/v1\x00" + encoded.encode()).digest()


@dataclass(frozen=True)
class Ask:
    """One exchange: a question for each of some sites.

    Attributes:
        phase: name of the phase, a Python identifier, the same at both ends.
        questions: the blocks for each site asked.
    """

    phase: str
    questions: Mapping[Site, Blocks]


@dataclass(frozen=True)
class Measured:
    """The opened geometry of a round.

    Attributes:
        sites: which sites the rows belong to, in order.
        gram: float64, shape (m, m), symmetric, in the squared units of the updates.
        faults: sites that misbehaved while it was opened, with what they did.
        tolerate: how many of these sites may still be malicious, where the suite can tell; else None.
    """

    sites: tuple[Site, ...]
    gram: NDArray[np.float64]
    faults: Mapping[Site, SiteFault] = field(default_factory=dict)
    tolerate: int | None = None


@dataclass(frozen=True)
class Opened:
    """The opened weighted sum of a round.

    Attributes:
        total: float64, shape (d,), ``sum_i w_i x_i`` in the units of the updates.
        faults: sites that misbehaved while it was opened, with what they did.
    """

    total: NDArray[np.float64]
    faults: Mapping[Site, SiteFault] = field(default_factory=dict)


T = TypeVar("T")
Dialogue: TypeAlias = Generator[Ask, Mapping[Site, Blocks], T]
Upload_co = TypeVar("Upload_co", covariant=True)
Upload = TypeVar("Upload")


class SiteSuite(Protocol):
    """The end of a suite that lives at a site and may hold secrets."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""

    @property
    def key_id(self) -> str:
        """Public fingerprint of the key in use, empty for suites without a shared key."""

    @property
    def public_key(self) -> bytes:
        """What the coordinator must have of the key, sent once per run; empty for suites without a shared key."""

    @property
    def keeps_upload(self) -> bool:
        """Whether the site must keep the blocks that it sent, because ``answer`` takes them as its last argument."""

    def seal(
        self, context: RoundContext, update: Vector, random_bytes: RandomBytes, keep: Keep | None = None
    ) -> tuple[bytes, Blocks]:
        """Seal one update, shape (d,), float32 or float64, finite, in the first attempt at a round.

        Args:
            context: the round.
            update: what the site has learnt.
            random_bytes: source of randomness.
            keep: given what ``reseal`` needs, before anything is sealed; not called by suites with one attempt, and
                left out where there will be no other.

        Returns:
            the private state that later answers need, and the blocks to send.

        Raises:
            UsageError: the update has the wrong shape or is not finite.
        """

    def reseal(
        self, context: RoundContext, state: bytes, kept: Blocks, random_bytes: RandomBytes
    ) -> tuple[bytes, Blocks]:
        """Seal for a later attempt what was sealed in the first, to the last bit, and nothing else about it twice.

        Args:
            context: the new attempt, at the same round.
            state: the private state that the attempt before has left.
            kept: what ``seal`` gave to ``keep``.
            random_bytes: source of randomness.

        Returns:
            the private state and the blocks to send, as ``seal``.

        Raises:
            CoordinatorFault: the suite has one attempt only, or the site has bound itself in the attempt before.
            KeyMaterialError: what was kept belongs to another round or is damaged.
        """

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Answer one question of the coordinator about the round the state belongs to.

        Raises:
            CoordinatorFault: the question is malformed or must not be answered.
        """


class CoordinatorSuite(Protocol):
    """The end of a suite that lives at the coordinator, between rounds. It holds no secret."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""

    @property
    def selects(self) -> bool:
        """Whether it combines a set of updates with equal weights only, and sites repeat the selection."""

    def least_sites(self, tolerate: int, collude: int) -> int:
        """Fewest sites with which a run may begin, for f malicious and tau colluding ones."""

    def adopt(self, introduced: Mapping[Site, tuple[str, bytes]]) -> tuple[Self, Mapping[Site, KeyMaterialError]]:
        """The same suite with the keys that sites introduced themselves with, which it gets once per run.

        Args:
            introduced: each site's ``key_id`` and ``public_key``.

        Returns:
            the suite, and which sites cannot take part, with the reason.
        """

    def prepare(self, context: RoundContext, random_bytes: RandomBytes) -> tuple[RoundContext, RoundSuite[Any]]:
        """The context of a round with what the suite adds to it, and the suite for this round alone."""


class RoundSuite(Protocol, Generic[Upload]):
    """The end of a suite that lives at the coordinator, in one round."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""

    @property
    def selects(self) -> bool:
        """Whether it combines a set of updates with equal weights only, and sites repeat the selection."""

    @property
    def least_opened(self) -> int:
        """Fewest sites whose sum may be opened."""

    def gram_noise(self, context: RoundContext) -> float:
        """Standard deviation of the noise in every entry of the opened Gram matrix, in squared units of updates."""

    def noise_floor(self, context: RoundContext, weights: Mapping[Site, float]) -> float:
        """Squared norm that noise alone may add to an opened sum; for ``check_opened``."""

    def ratio_tolerance(self, context: RoundContext) -> float:
        """Largest ratio of opened to predicted squared norm that honest sites reach; for ``check_opened``."""

    def accept(self, context: RoundContext, site: Site, blocks: Blocks) -> Upload:
        """Check and decode one sealed update.

        Raises:
            SiteFault: the blocks are not a sealed update of this round's shape.
        """

    def measure(
        self, context: RoundContext, uploads: Mapping[Site, Upload], random_bytes: RandomBytes
    ) -> Dialogue[Measured]:
        """Open the Gram matrix of all uploads.

        Raises:
            RoundFailed: too few consistent answers came back.
        """

    def combine(
        self,
        context: RoundContext,
        uploads: Mapping[Site, Upload],
        weights: Mapping[Site, float],
        random_bytes: RandomBytes,
    ) -> Dialogue[Opened]:
        """Open one weighted sum of uploads; sites that are not in ``weights`` are left out.

        Raises:
            RoundFailed: too few consistent answers came back.
        """
