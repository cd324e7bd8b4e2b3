"""Malicious sites that attack the sealed protocol itself, each as a wrapper around an honest site's end of ``sealed``.

The attacks of ``attacks`` poison what a site has learnt and then keep to the protocol. These leave the protocol: they
seal what an honest site would not, share keys wrongly, answer wrongly, or fall silent. What an honest coordinator and
honest sites make of each is in docs/spec/sealed-round.md, sections 4 and 6.

Silence is raised as a fault: the sealing mod then answers that it gives no answer, which counts as none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import Identity, SealedSite, field
from quorsum.crypto.flatten import flatten
from quorsum.crypto.labels import VIEW_CERTIFICATE
from quorsum.crypto.mask import MASK_BATCH, draw_key, mask_blocks
from quorsum.crypto.quantise import quantise
from quorsum.crypto.ring import N, batches, multiply_short
from quorsum.crypto.sealed_geometry import block_count, bounds_of, scale_of
from quorsum.crypto.sealed_site import (
    SiteState,
    check_statement,
    number_of,
    points_statement,
    submission,
    sum_statement,
)
from quorsum.crypto.sealed_wire import pack_message
from quorsum.crypto.sharing import Deal, deal_shares
from quorsum.crypto.suite import Blocks, Keep, RandomBytes, RoundContext, Site, SiteSuite, Vector
from quorsum.crypto.xof import uniform_blocks
from quorsum.errors import CoordinatorFault, UsageError

__all__ = [
    "PROTOCOL_ATTACKS",
    "ProtocolAttack",
    "ProtocolAttacker",
    "WrappedSite",
    "equal_blocks",
    "single_frequency",
    "wrapped_block",
]

Integers = NDArray[np.int64]
SuiteT = TypeVar("SuiteT", bound=SiteSuite)
Signed: TypeAlias = Callable[[RoundContext, bytes, tuple[Site, ...], bytes], tuple[str, bytes, bytes, bytes, bytes]]

ENERGY = 4.0
"""Squared norm of what hides or is oversized, in squared reference norms."""


# --- what is sealed ---


def equal_blocks(dimension: int, norm: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """The same Gaussian block over and over: signs alone cancel an even number of them half of the time.

    Returns:
        float64, shape (dimension,), of the given norm.
    """
    tiled = np.resize(rng.normal(size=N), dimension)
    return tiled * (norm / float(np.linalg.norm(tiled)))


def single_frequency(dimension: int, norm: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """One frequency of the ring in every block, so that a rotation is only a change of phase.

    A sketch is then a walk of B random steps in the plane, and its squared length is as often far below the mean as
    an exponential variable is; no other update hides better in signs and rotations.

    Returns:
        float64, shape (dimension,), of the given norm.
    """
    # zeta^k with zeta^N = -1
    frequency = math.pi * (2 * int(rng.integers(N // 2)) + 1) / N
    wave = np.cos(frequency * np.arange(N) + rng.uniform(0, 2 * math.pi))
    tiled = np.resize(wave, dimension)
    return tiled * (norm / float(np.linalg.norm(tiled)))


def wrapped_block(context: RoundContext, rng: np.random.Generator, energy: float = 1.0) -> Integers:
    """One block whose squared norm, summed over the sketches, is that of an honest update modulo p only.

    A single block is only rotated in a sketch, so that ``G_ii = r |v|^2`` whatever the seed; with
    ``r |v|^2 = p + target`` the gate sees the target, and the block is about ``sqrt(p / r)`` long.

    Args:
        context: the round.
        rng: source of signs.
        energy: the target, in squared reference norms.

    Returns:
        int64, shape (N,).
    """
    r = context.sketches
    target = int(energy * r * (context.unit * scale_of(context)) ** 2)
    target += -(field.P + target) % r
    rest = (field.P + target) // r
    block = np.full(N, math.isqrt(rest // N), dtype=np.int64)
    rest -= int(block[0]) ** 2 * (N - 16)
    # What is left is a sum of a few squares: the largest that fits, again and again.
    for place in range(N - 16, N):
        block[place] = math.isqrt(rest)
        rest -= int(block[place]) ** 2
    signs: Integers = rng.choice(np.array([-1, 1], dtype=np.int64), size=N)
    return block * signs


# --- sealing without checking ---


def _masked(context: RoundContext, key: NDArray[np.int8], update: Vector, random_bytes: RandomBytes) -> Blocks:
    digest = context.digest()
    integers = quantise(update, scale_of(context), digest, random_bytes)
    return tuple(field.to_bytes(batch) for batch in mask_blocks(digest, key, integers, random_bytes))


def _masked_exactly(context: RoundContext, key: NDArray[np.int8], integers: Integers) -> Blocks:
    """``y_j = a_j s + x_j``: no errors, and integers of any size below p / 2."""
    upload, first = [], 0
    for x in batches(integers, MASK_BATCH):
        masked = multiply_short(uniform_blocks(context.digest(), first, len(x)), key)
        upload.append(field.to_bytes(field.add(masked, field.from_signed(x))))
        first += len(x)
    return tuple(upload)


def _deals(context: RoundContext, key: NDArray[np.int8], random_bytes: RandomBytes) -> tuple[Deal, ...]:
    return deal_shares(field.from_signed(key.astype(np.int64)), bounds_of(context), random_bytes)


def _generator(random_bytes: RandomBytes) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(random_bytes(16), "little"))


# --- the attackers ---


class WrappedSite(Generic[SuiteT]):
    """An honest site's end of a suite, for attackers to change what they want to change.

    Args:
        site: the honest end.
    """

    def __init__(self, site: SuiteT) -> None:
        self.site = site
        self.name = site.name
        self.key_id = site.key_id
        self.public_key = site.public_key
        self.keeps_upload = site.keeps_upload

    def seal(
        self, context: RoundContext, update: Vector, random_bytes: RandomBytes, keep: Keep | None = None
    ) -> tuple[bytes, Blocks]:
        """Keep the update for later attempts, and seal it in this site's way."""
        if keep is not None:
            keep((update.astype("<f4").tobytes(),))
        return self.forge(context, update, random_bytes)

    def reseal(
        self, context: RoundContext, state: bytes, kept: Blocks, random_bytes: RandomBytes
    ) -> tuple[bytes, Blocks]:
        """Seal the update once more in this site's way, whatever it has signed before."""
        return self.forge(context, np.frombuffer(b"".join(kept), dtype="<f4"), random_bytes)

    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        """Seal as the honest suite does."""
        return self.site.seal(context, update, random_bytes)

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Answer as the honest suite does."""
        return self.site.answer(context, state, phase, question, random_bytes, upload)


class ProtocolAttacker(WrappedSite[SealedSite]):
    """A malicious end of ``sealed``; the attackers below change one thing each."""

    def submit(self, context: RoundContext, upload: Blocks, deals: Sequence[Deal]) -> tuple[bytes, Blocks]:
        """Submit any upload with any deals, under the site's own signature."""
        return submission(self.site.identity, context, number_of(context, self.public_key), upload, deals)

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Answer as the honest suite does, and change the answer."""
        after, blocks = super().answer(context, state, phase, question, random_bytes, upload)
        return after, self.change(context, SiteState.from_bytes(after), phase, blocks, random_bytes)

    def change(
        self, context: RoundContext, state: SiteState, phase: str, blocks: Blocks, random_bytes: RandomBytes
    ) -> Blocks:
        """What goes out instead of the honest answer."""
        return blocks


class _OtherKey(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        upload = _masked(context, draw_key(random_bytes), update, random_bytes)
        return self.submit(context, upload, _deals(context, draw_key(random_bytes), random_bytes))


class _WrongDeals(ProtocolAttacker):
    """Masks honestly; ``spoil`` turns the honest deal of each holder other than itself into another one."""

    def __init__(self, site: SealedSite, spoil: Callable[[RoundContext, int, Deal, RandomBytes], Deal]) -> None:
        super().__init__(site)
        self.spoil = spoil

    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        key = draw_key(random_bytes)
        upload, own = _masked(context, key, update, random_bytes), number_of(context, self.public_key)
        others = [k for k in range(1, len(context.sites) + 1) if k != own]
        # Victims are counted from 0, without the attacker itself; its own deal is the last to be spoilt.
        place = {holder: nth for nth, holder in enumerate([*others, own])}
        deals = _deals(context, key, random_bytes)
        spoilt = [self.spoil(context, place[k], deal, random_bytes) for k, deal in enumerate(deals, 1)]
        return self.submit(context, upload, spoilt)


def inconsistent_shares(victims: int | None = None) -> Callable[[SealedSite], ProtocolAttacker]:
    """Random key shares for so many victims; None takes f of the round."""

    def spoil(context: RoundContext, nth: int, deal: Deal, random_bytes: RandomBytes) -> Deal:
        hit = nth < (context.tolerate if victims is None else victims)
        return replace(deal, key=field.random_vector(random_bytes, (N,))) if hit else deal

    return lambda site: _WrongDeals(site, spoil)


def _nonzero(context: RoundContext, nth: int, deal: Deal, random_bytes: RandomBytes) -> Deal:
    # A constant added for everybody: the same degree, and no longer zero at zero.
    zeros = deal.zeros.copy()
    zeros[0] = (int(zeros[0]) + 1) % field.P
    return replace(deal, zeros=zeros)


class _WrongNumbers(ProtocolAttacker):
    """Wrong and correctly signed numbers in one phase; ``entries`` says how many of them, None all.

    Attributes:
        phase: in which.
        about: the fact of the state that names the sites the numbers are about.
        signed: label and parts of what is signed with them.
    """

    phase: ClassVar[str]
    about: ClassVar[str]
    signed: Signed

    def __init__(self, site: SealedSite, entries: int | None = None) -> None:
        super().__init__(site)
        self.entries = entries

    def change(
        self, context: RoundContext, state: SiteState, phase: str, blocks: Blocks, random_bytes: RandomBytes
    ) -> Blocks:
        if phase != self.phase:
            return blocks
        values = _spoilt(field.from_bytes(blocks[1]), self.entries, random_bytes)
        view, sites = bytes.fromhex(state.facts["view"]), tuple(state.facts[self.about])
        statement = self.signed(context, view, sites, field.to_bytes(values))
        return pack_message({"signature": self.site.identity.sign(*statement).hex()}, values)


class _WrongPoints(_WrongNumbers):
    """Wrong points of the Gram matrix."""

    phase, about, signed = "gram", "accepted", staticmethod(points_statement)


class _WrongSum(_WrongNumbers):
    """A wrong share of the sum of the keys."""

    phase, about, signed = "sum", "selected", staticmethod(sum_statement)


class _WrongCheck(ProtocolAttacker):
    """Wrong and correctly signed check answers, or complaints about dealers that did nothing wrong.

    Args:
        site: the honest end.
        complain: complain instead of giving wrong values.
        victims: about how many other dealers; None about all.
    """

    def __init__(self, site: SealedSite, complain: bool = False, victims: int | None = None) -> None:
        super().__init__(site)
        self.complain = complain
        self.victims = victims

    def change(
        self, context: RoundContext, state: SiteState, phase: str, blocks: Blocks, random_bytes: RandomBytes
    ) -> Blocks:
        if phase != "check":
            return blocks
        dealers = tuple(state.facts["dealers"])
        own = context.sites[number_of(context, self.public_key) - 1]
        others = [site for site in dealers if site != own]
        hit = set(others if self.victims is None else others[: self.victims])
        values, named = field.from_bytes(blocks[1]).reshape(-1, 2).copy(), tuple(json.loads(blocks[0])["complaints"])
        if self.complain:
            named = tuple(site for site in dealers if site in hit or site in named)
        else:
            rows = [row for row, site in enumerate(dealers) if site in hit]
            values[rows] = field.random_vector(random_bytes, (len(rows), 2))
        view = bytes.fromhex(state.facts["view"])
        head = {
            "view": self.site.identity.sign(VIEW_CERTIFICATE, context.digest(), view).hex(),
            "complaints": list(named),
            "signature": self.site.identity.sign(*check_statement(context, view, named, field.to_bytes(values))).hex(),
        }
        return pack_message(head, values)


def _spoilt(values: NDArray[np.uint64], entries: int | None, random_bytes: RandomBytes) -> NDArray[np.uint64]:
    count = values.size if entries is None else entries
    wrong = values.copy()
    wrong[-count:] = field.random_vector(random_bytes, (count,))
    return wrong


class _Hidden(ProtocolAttacker):
    """Seals an update made of integers that flattening does not touch, because it is undone beforehand."""

    def __init__(
        self, site: SealedSite, make: Callable[[int, float, np.random.Generator], NDArray[np.float64]]
    ) -> None:
        super().__init__(site)
        self.make = make

    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        hidden = self.make(context.dimension, math.sqrt(ENERGY) * context.unit, _generator(random_bytes))
        return self.site.seal(context, flatten(context.digest(), hidden), random_bytes)


class _WrapAround(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        integers = np.zeros(block_count(context) * N, dtype=np.int64)
        integers[:N] = wrapped_block(context, _generator(random_bytes))
        key = draw_key(random_bytes)
        upload = _masked_exactly(context, key, integers)
        return self.submit(context, upload, _deals(context, key, random_bytes))


class _Oversize(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        norm = float(np.linalg.norm(update))
        longer = update.astype(np.float64) * (math.sqrt(ENERGY) * context.unit / norm) if norm > 0 else update
        return self.site.seal(context, longer, random_bytes)


class _Replay(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        # What it sealed, or would have sealed, for the round before.
        return self.site.seal(replace(context, round=context.round - 1), update, random_bytes)


class _Copy(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        # Another site's name and a submission made under it: what whoever overhears a submission could send.
        stranger = SealedSite(Identity.generate(random_bytes), self.site.select, accept_small_models=True)
        place = number_of(context, self.public_key) % len(context.sites)
        keys = [*context.keys]
        keys[place] = stranger.public_key.hex()
        return stranger.seal(replace(context, keys=tuple(keys)), update, random_bytes)


class _Plaintext(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        return b"", (update.astype("<f4").tobytes(),)


class _Unmasked(ProtocolAttacker):
    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        integers = quantise(update, scale_of(context), context.digest(), random_bytes)
        upload = tuple(field.to_bytes(field.from_signed(batch)) for batch in batches(integers, MASK_BATCH))
        return self.submit(context, upload, _deals(context, draw_key(random_bytes), random_bytes))


class _Silent(ProtocolAttacker):
    """Answers no question from a phase on."""

    def __init__(self, site: SealedSite, phase: str) -> None:
        super().__init__(site)
        self.phase = phase

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        if phase == self.phase:
            raise CoordinatorFault("silent", f"this site does not answer in phase {phase!r}")
        return self.site.answer(context, state, phase, question, random_bytes, upload)


def _silent(phase: str) -> Callable[[SealedSite], ProtocolAttacker]:
    return lambda site: _Silent(site, phase)


@dataclass(frozen=True)
class ProtocolAttack:
    """One way to leave the protocol.

    Attributes:
        description: what the malicious site does, in one line.
        make: the wrapper around an honest site's end of ``sealed``.
    """

    description: str
    make: Callable[[SealedSite], ProtocolAttacker]

    def wrap(self, suite: SiteSuite) -> ProtocolAttacker:
        """The malicious end instead of the honest one.

        Raises:
            UsageError: the suite is not ``sealed``.
        """
        if not isinstance(suite, SealedSite):
            raise UsageError(f"an attack on the sealed protocol needs the suite sealed, got {suite.name!r}")
        return self.make(suite)


PROTOCOL_ATTACKS: Mapping[str, ProtocolAttack] = MappingProxyType(
    {
        "other-key": ProtocolAttack("masks with another key than it shares", _OtherKey),
        "inconsistent-shares": ProtocolAttack("gives f holders random key shares", inconsistent_shares()),
        "nonzero-zeros": ProtocolAttack("shares ones as zeros", lambda site: _WrongDeals(site, _nonzero)),
        "wrong-check": ProtocolAttack("checks every sharing wrongly", _WrongCheck),
        "false-complaints": ProtocolAttack(
            "complains about everybody's deals", lambda site: _WrongCheck(site, complain=True)
        ),
        "wrong-points": ProtocolAttack("gives random points of the Gram matrix", _WrongPoints),
        "wrong-point": ProtocolAttack(
            "gives one wrong point of the Gram matrix", lambda site: _WrongPoints(site, entries=1)
        ),
        "wrong-sum": ProtocolAttack("gives a random share of the sum of the keys", _WrongSum),
        "wrong-sum-entry": ProtocolAttack(
            "gives a share of the sum with one wrong number", lambda site: _WrongSum(site, entries=1)
        ),
        "wrap-around": ProtocolAttack("seals integers whose norm is small only modulo p", _WrapAround),
        "equal-blocks": ProtocolAttack(
            "hides four times the energy in equal blocks", lambda site: _Hidden(site, equal_blocks)
        ),
        "single-frequency": ProtocolAttack(
            "hides four times the energy in one frequency", lambda site: _Hidden(site, single_frequency)
        ),
        "oversize": ProtocolAttack("seals an update twice as long as the norm bound", _Oversize),
        "replay": ProtocolAttack("sends a submission of the round before", _Replay),
        "copy": ProtocolAttack("sends a submission that another site could have made", _Copy),
        "plaintext": ProtocolAttack("sends its update in the clear", _Plaintext),
        "unmasked": ProtocolAttack("sends integers in the shape of a masked update, without a mask", _Unmasked),
        "silent-root": ProtocolAttack("submits and then falls silent", _silent("root")),
        "silent-check": ProtocolAttack("signs the root and then falls silent", _silent("check")),
        "silent-gram": ProtocolAttack("signs the view and then falls silent", _silent("gram")),
        "silent-ticket": ProtocolAttack("gives its points and then falls silent", _silent("ticket")),
        "silent-sum": ProtocolAttack("signs a ticket and then falls silent", _silent("sum")),
    }
)
"""Attacks on the sealed protocol by name."""
