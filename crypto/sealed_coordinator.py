"""The coordinator's end of the suite ``sealed``: it computes on masked updates and holds no secret but a nonce.

**measure** is three exchanges: root (fix what is submitted), check (publish the sketches, have the sharings checked),
gram (collect the points, decode). **combine** is two: ticket (the sites repeat the selection and sign it) and sum
(their shares of the sum of the keys). What is opened is verified twice: exactly, modulo p, against the Gram matrix,
and by the true length of the opened integers against the length that the Gram matrix predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field, labels
from quorsum.crypto.decoding import decode
from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.labels import tagged
from quorsum.crypto.mask import MASK_BATCH, unmask
from quorsum.crypto.quantise import dequantise
from quorsum.crypto.sealed_geometry import (
    Geometry,
    Select,
    block_count,
    bounds_of,
    geometry,
    pairs_of,
    plan_of,
    root_of,
    scale_of,
    seed_of,
    settle_disputes,
    view_of,
    witnesses_of,
)
from quorsum.crypto.sealed_parameters import SEALED_V1, smallest_roster
from quorsum.crypto.sealed_site import (
    check_statement,
    choose,
    commitment_of,
    digest_of_deal,
    digest_of_upload,
    points_statement,
    sum_statement,
    ticket_of,
)
from quorsum.crypto.sealed_wire import pack_message, read_array, read_head, read_hex, read_names
from quorsum.crypto.share_checks import CheckAnswer
from quorsum.crypto.sharing import deal_length
from quorsum.crypto.sketch import Sketcher
from quorsum.crypto.suite import Ask, Blocks, Dialogue, Measured, Opened, RandomBytes, RoundContext, Site
from quorsum.errors import HidingSuspected, KeyMaterialError, Refusal, RoundFailed, SiteFault, UsageError

__all__ = ["RATIO", "SealedCoordinator", "SealedRound", "SealedUpload"]

RATIO = 1.08
"""Largest accepted ratio of the true to the predicted squared length of the opened sum."""


@dataclass(frozen=True)
class SealedUpload:
    """A submission whose form, digests and signature have been checked.

    Attributes:
        deals: what is sealed to each holder, in roster order; empty for the site itself.
        digests: digest of each of these (zeros for the site itself), joined, and of the masked update.
        commitment: what the site has committed itself to.
        blocks: the masked update in batches, eight bytes per parameter.
    """

    deals: tuple[bytes, ...] = dataclass_field(repr=False)
    digests: bytes = dataclass_field(repr=False)
    commitment: bytes
    blocks: Sequence[bytes] = dataclass_field(repr=False)


class _Coordinator:
    """What the coordinator's end is between rounds and within one."""

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return SEALED_V1.name

    @property
    def selects(self) -> bool:
        """Yes: one sum over one set, and every site repeats the selection."""
        return True

    @property
    def least_opened(self) -> int:
        """Two; the bounds of each round ask for more (see ``SealedBounds``)."""
        return 2


@dataclass(frozen=True)
class SealedCoordinator(_Coordinator):
    """The coordinator's end of ``sealed``, between rounds.

    Attributes:
        select: the robust selection, the same function as at the sites.
        keys: public key of each site, 64 bytes.
        spool: where to put the blocks of an upload; by default they stay in memory.
    """

    select: Select = dataclass_field(repr=False)
    keys: Mapping[Site, bytes] = dataclass_field(default_factory=dict, repr=False)
    spool: Callable[[Site, Blocks], Sequence[bytes]] = dataclass_field(default=lambda site, blocks: blocks, repr=False)

    def least_sites(self, tolerate: int, collude: int) -> int:
        """Fewest sites of a run, see ``SealedBounds``."""
        return smallest_roster(collude, tolerate)

    def adopt(
        self, introduced: Mapping[Site, tuple[str, bytes]]
    ) -> tuple[SealedCoordinator, Mapping[Site, KeyMaterialError]]:
        """The coordinator with the sites' public keys. A key that is malformed, or that two sites bring, is refused."""
        keys: dict[Site, bytes] = {}
        refused: dict[Site, KeyMaterialError] = {}
        for site, (_, public) in introduced.items():
            try:
                PublicIdentity.from_bytes(public)
            except KeyMaterialError as error:
                refused[site] = error
                continue
            if public in keys.values():
                refused[site] = KeyMaterialError("key-taken", "another site has introduced itself with the same key")
                continue
            keys[site] = public
        return replace(self, keys=keys), refused

    def prepare(self, context: RoundContext, random_bytes: RandomBytes) -> tuple[RoundContext, SealedRound]:
        """Put the keys of the roster and the commitment to a fresh nonce into the context.

        Raises:
            BoundError: too few sites for tau and f.
        """
        nonce = random_bytes(32)
        context = replace(
            context,
            keys=tuple(self.keys[site].hex() for site in context.sites),
            commitment=tagged(labels.NONCE, nonce).hex(),
        )
        bounds_of(context)
        return context, SealedRound(self.select, self.keys, self.spool, nonce)


@dataclass(frozen=True)
class _View:
    """What measuring has fixed: combining starts from here."""

    view: bytes
    found: Geometry
    accepted: tuple[Site, ...]
    holders: tuple[Site, ...]
    informed: tuple[Site, ...]
    left: int
    seed: bytes
    points: Mapping[Site, tuple[bytes, bytes]]


class SealedRound(_Coordinator):
    """The coordinator's end of ``sealed`` in one round. Measure once, then combine once.

    Args:
        select: the robust selection.
        keys: public key of each site.
        spool: where to put the blocks of an upload.
        nonce: 32 bytes that the context is committed to.
    """

    def __init__(
        self,
        select: Select,
        keys: Mapping[Site, bytes],
        spool: Callable[[Site, Blocks], Sequence[bytes]],
        nonce: bytes,
    ) -> None:
        self._select = select
        self._keys = keys
        self._spool = spool
        self._nonce = nonce
        self._fixed: _View | None = None

    def gram_noise(self, context: RoundContext) -> float:
        """None: the Gram matrix is exact."""
        return 0.0

    def noise_floor(self, context: RoundContext, weights: Mapping[Site, float]) -> float:
        """None: noise is part of what is measured, and of what is opened, alike."""
        return 0.0

    def ratio_tolerance(self, context: RoundContext) -> float:
        """A little more than what ``combine`` has verified on exact integers already."""
        return RATIO + 0.01

    # --- submissions ---

    def accept(self, context: RoundContext, site: Site, blocks: Blocks) -> SealedUpload:
        """Check one submission: shape, range, digests, signature.

        Raises:
            SiteFault: with a code that says what is wrong.
        """
        try:
            return self._accepted(context, site, blocks)
        except Refusal as refusal:
            # What does not carry the site's signature may be anybody's.
            raise SiteFault(site, refusal.code, f"its submission: {refusal.message}", proven=False) from None

    def _accepted(self, context: RoundContext, site: Site, blocks: Blocks) -> SealedUpload:
        head = read_head(blocks)
        n, size = len(context.sites), SEALED_V1.degree
        length = deal_length(n, sealed=True)
        if len(blocks) < 3 or len(blocks[1]) != (n - 1) * length:
            raise Refusal("wrong-shape", f"expected {n - 1} sealed deals of {length} bytes and a masked update")
        upload, count = blocks[2:], block_count(context)
        if len(upload) != -(-count // MASK_BATCH):
            raise Refusal("wrong-shape", f"expected {count} blocks of {size} numbers in batches of {MASK_BATCH}")
        for start, block in zip(range(0, count, MASK_BATCH), upload, strict=True):
            read_array(block, (min(MASK_BATCH, count - start), size))
        place = context.sites.index(site)
        parts = [blocks[1][k : k + length] for k in range(0, len(blocks[1]), length)]
        deals = (*parts[:place], b"", *parts[place:])
        digests = b"".join(digest_of_deal(deal) if deal else bytes(32) for deal in deals)
        upload_digest = digest_of_upload(upload)
        commitment = commitment_of(context, site, digests, upload_digest)
        signature = read_hex(head, "signature", 64)
        if not self._public(site).verify(signature, labels.SUBMISSION, context.digest(), commitment):
            raise Refusal("wrong-signature", "it is not signed by the site's key")
        return SealedUpload(deals, digests + upload_digest, commitment, self._spool(site, upload))

    def _public(self, site: Site) -> PublicIdentity:
        return PublicIdentity.from_bytes(self._keys[site])

    # --- measure ---

    def measure(
        self, context: RoundContext, uploads: Mapping[Site, SealedUpload], random_bytes: RandomBytes
    ) -> Dialogue[Measured]:
        """Phases root, check and gram.

        Returns (by the dialogue):
            the rows of all dealers whose sharing was accepted and whose update can be honest.

        Raises:
            RoundFailed: too few signatures or points, or more disputes than malicious sites can cause.
        """
        faults: dict[Site, SiteFault] = {}
        dealers = tuple(site for site in context.sites if site in uploads)

        # 2 root
        root, signatures = yield from self._fix_root(context, dealers, uploads, faults)
        seed = seed_of(root, self._nonce)
        plan = plan_of(context, seed)

        # 3a check
        sketches = np.stack([_sketch(uploads[site], Sketcher(plan)) for site in dealers])
        listed = field.to_bytes(sketches)
        view = view_of(context, root, seed, dealers, listed)
        head = {
            "dealers": list(dealers),
            "signatures": {site: signature.hex() for site, signature in signatures.items()},
            "nonce": self._nonce.hex(),
        }
        digests = b"".join(uploads[site].digests for site in dealers)
        questions = {}
        for place, site in enumerate(context.sites):
            if site in uploads:
                handed = b"".join(uploads[dealer].deals[place] for dealer in dealers if dealer != site)
                questions[site] = pack_message(head, digests, handed, listed)
        replies = yield Ask("check", questions)
        del sketches
        views, checks = self._read_checks(context, view, dealers, replies, faults)

        # 3b gram
        elimination, holders, accepted = settle_disputes(
            context, dealers, {site: answer for site, (answer, _, _) in checks.items()}
        )
        gram_head = {
            "answered": [site for site in context.sites if site in checks],
            "views": {site: signature.hex() for site, signature in views.items()},
            "checks": {site: signature.hex() for site, (_, signature, _) in checks.items()},
            "complaints": {site: _complaints(context, checks[site][0]) for site in checks},
        }
        blocks = [checks[site][2] for site in context.sites if site in checks]
        question = pack_message(gram_head, *blocks)
        replies = yield Ask("gram", dict.fromkeys(views, question))
        # Who has left as a holder gives no points, and signs a ticket all the same: a quorum is counted among all.
        informed = tuple(replies)
        # Fewer could not sign enough tickets, and whoever signs one joins no other attempt at the round.
        _need(len(informed), bounds_of(context).quorum, "followed the view", faults)
        replies = {site: blocks for site, blocks in replies.items() if site in holders}
        points, signed = self._read_points(context, view, accepted, replies, faults)
        found = geometry(context, accepted, points, elimination.f_left, random_bytes)

        # One side of a dispute may be honest, so that a dispute proves nothing.
        for smaller, larger in elimination.edges:
            a, b = context.sites[smaller - 1], context.sites[larger - 1]
            faults[a] = SiteFault(a, "dispute", f"in dispute with {b}", proven=False)
            faults[b] = SiteFault(b, "dispute", f"in dispute with {a}", proven=False)
        faults |= {
            site: SiteFault(site, "dispute", "its sharing was not accepted", proven=False)
            for site in dealers
            if site in checks and site not in accepted
        }
        for site in dealers:
            if site not in checks:
                faults.setdefault(site, SiteFault(site, "no-view", "did not sign the view", proven=False))
        faults |= {
            site: SiteFault(site, "inconsistent", reason, proven=site not in found.guessed)
            for site, reason in found.reasons.items()
        }
        faults |= {
            site: SiteFault(site, "wrong-points", "gave wrong points of the Gram matrix") for site in found.liars
        }
        self._fixed = _View(view, found, accepted, holders, informed, elimination.f_left, seed, signed)
        return Measured(found.sites, found.gram, faults, found.tolerate)

    def _fix_root(
        self,
        context: RoundContext,
        dealers: tuple[Site, ...],
        uploads: Mapping[Site, SealedUpload],
        faults: dict[Site, SiteFault],
    ) -> Dialogue[tuple[bytes, dict[Site, bytes]]]:
        commitments = {site: uploads[site].commitment for site in dealers}
        root = root_of(context, commitments)
        question = pack_message({"commitments": {site: value.hex() for site, value in commitments.items()}})
        replies = yield Ask("root", dict.fromkeys(dealers, question))
        signatures: dict[Site, bytes] = {}
        for site, blocks in replies.items():
            try:
                signature = read_hex(read_head(blocks, 0), "signature", 64)
                if not self._public(site).verify(signature, labels.ROOT_CERTIFICATE, context.digest(), root):
                    raise Refusal("wrong-signature", "its signature of the root is wrong")
                signatures[site] = signature
            except Refusal as refusal:
                faults[site] = SiteFault(site, refusal.code, refusal.message, proven=False)
        _need(len(signatures), bounds_of(context).quorum, "signed the root", faults)
        return root, signatures

    def _read_checks(
        self,
        context: RoundContext,
        view: bytes,
        dealers: tuple[Site, ...],
        replies: Mapping[Site, Blocks],
        faults: dict[Site, SiteFault],
    ) -> tuple[dict[Site, bytes], dict[Site, tuple[CheckAnswer, bytes, bytes]]]:
        number = {site: place + 1 for place, site in enumerate(context.sites)}
        views: dict[Site, bytes] = {}
        checks: dict[Site, tuple[CheckAnswer, bytes, bytes]] = {}
        for site, blocks in replies.items():
            try:
                head = read_head(blocks, 1)
                signature, proof = read_hex(head, "view", 64), read_hex(head, "signature", 64)
                named = read_names(head, "complaints", dealers)
                values = read_array(blocks[1], (len(dealers), 2))
                public = self._public(site)
                if not public.verify(signature, labels.VIEW_CERTIFICATE, context.digest(), view):
                    raise Refusal("wrong-signature", "its signature of the view is wrong")
                if not public.verify(proof, *check_statement(context, view, named, blocks[1])):
                    raise Refusal("wrong-signature", "its check answer is not signed by it")
            except Refusal as refusal:
                faults[site] = SiteFault(site, refusal.code, f"its check answer: {refusal.message}", proven=False)
                continue
            views[site] = signature
            checks[site] = (CheckAnswer(values, frozenset(number[one] for one in named)), proof, blocks[1])
        _need(len(views), witnesses_of(context), "signed the view", faults)
        return views, checks

    def _read_points(
        self,
        context: RoundContext,
        view: bytes,
        accepted: tuple[Site, ...],
        replies: Mapping[Site, Blocks],
        faults: dict[Site, SiteFault],
    ) -> tuple[dict[Site, NDArray[np.uint64]], dict[Site, tuple[bytes, bytes]]]:
        points: dict[Site, NDArray[np.uint64]] = {}
        signed: dict[Site, tuple[bytes, bytes]] = {}
        for site, blocks in replies.items():
            try:
                signature = read_hex(read_head(blocks, 1), "signature", 64)
                values = read_array(blocks[1], (len(pairs_of(accepted)),))
                if not self._public(site).verify(signature, *points_statement(context, view, accepted, blocks[1])):
                    raise Refusal("wrong-signature", "its points are not signed by it")
            except Refusal as refusal:
                faults[site] = SiteFault(site, refusal.code, f"its points: {refusal.message}", proven=False)
                continue
            points[site], signed[site] = values, (signature, blocks[1])
        return points, signed

    # --- combine ---

    def combine(
        self,
        context: RoundContext,
        uploads: Mapping[Site, SealedUpload],
        weights: Mapping[Site, float],
        random_bytes: RandomBytes,
    ) -> Dialogue[Opened]:
        """Phases ticket, sum and open: the mean over one set.

        Raises:
            UsageError: the weights are not those of a plain mean, or nothing has been measured.
            RoundFailed: too few tickets or shares; or what was opened is not what was measured.
            HidingSuspected: the opened sum is longer than measured: somebody hid from the sketches.
        """
        fixed = self._fixed
        if fixed is None:
            raise UsageError("combine comes after measure")
        chosen = tuple(site for site in context.sites if weights.get(site, 0.0) != 0.0)
        if any(abs(weights[site] * len(chosen) - 1.0) > 1e-9 for site in chosen):
            raise UsageError("the suite sealed opens plain means only: all weights must be 1 / |S|")
        if chosen != choose(context, fixed.found, self._select):
            raise UsageError("the weights are not those of the selection that the sites repeat")
        faults: dict[Site, SiteFault] = {}

        # 5 ticket
        tickets = yield from self._collect_tickets(context, fixed, chosen, faults)

        # 6 sum
        head = {
            "selected": list(chosen),
            "tickets": {site: signature.hex() for site, signature in tickets.items()},
        }
        replies = yield Ask("sum", {site: pack_message(head) for site in fixed.holders if site in tickets})
        shares = self._read_shares(context, fixed.view, chosen, replies, faults)
        decoded = decode(shares, context.collude, fixed.left, random_bytes)
        # Like a wrong point, a wrong share carries its giver's signature.
        for holder in decoded.liars:
            site = context.sites[holder - 1]
            faults[site] = SiteFault(site, "wrong-share", "gave a wrong share of the sum of the keys")

        # 7 open: sum_S y_i - a s_S
        total = self._open(context, fixed, uploads, chosen, decoded.values)
        return Opened(total, faults)

    def _collect_tickets(
        self, context: RoundContext, fixed: _View, chosen: tuple[Site, ...], faults: dict[Site, SiteFault]
    ) -> Dialogue[dict[Site, bytes]]:
        given = [site for site in fixed.holders if site in fixed.points]
        head = {"given": given, "points": {site: fixed.points[site][0].hex() for site in given}}
        question = pack_message(head, *[fixed.points[site][1] for site in given])
        replies = yield Ask("ticket", dict.fromkeys(fixed.informed, question))
        tickets: dict[Site, bytes] = {}
        for site, blocks in replies.items():
            try:
                reply = read_head(blocks, 0)
                selected, signature = read_names(reply, "selected", context.sites), read_hex(reply, "signature", 64)
                if not self._public(site).verify(signature, *ticket_of(context, fixed.view, fixed.accepted, selected)):
                    raise Refusal("wrong-signature", "it is not signed by it")
                # Signed, and still no proof: rules compute in float64, where machines may differ.
                if selected != chosen:
                    raise Refusal("wrong-set", "it stands for another set")
                tickets[site] = signature
            except Refusal as refusal:
                faults[site] = SiteFault(site, refusal.code, f"its ticket: {refusal.message}", proven=False)
        _need(len(tickets), bounds_of(context).quorum, "signed a ticket for the set", faults)
        return tickets

    def _read_shares(
        self,
        context: RoundContext,
        view: bytes,
        chosen: tuple[Site, ...],
        replies: Mapping[Site, Blocks],
        faults: dict[Site, SiteFault],
    ) -> dict[int, NDArray[np.uint64]]:
        shares: dict[int, NDArray[np.uint64]] = {}
        for site, blocks in replies.items():
            try:
                signature = read_hex(read_head(blocks, 1), "signature", 64)
                share = read_array(blocks[1], (SEALED_V1.degree,))
                if not self._public(site).verify(signature, *sum_statement(context, view, chosen, blocks[1])):
                    raise Refusal("wrong-signature", "it is not signed by it")
            except Refusal as refusal:
                faults[site] = SiteFault(site, refusal.code, f"its sum share: {refusal.message}", proven=False)
                continue
            shares[context.sites.index(site) + 1] = share
        return shares

    def _open(
        self,
        context: RoundContext,
        fixed: _View,
        uploads: Mapping[Site, SealedUpload],
        chosen: tuple[Site, ...],
        key_sum: NDArray[np.uint64],
    ) -> NDArray[np.float64]:
        """Unmask the sum batch by batch, verifying it on the way.

        Raises:
            RoundFailed, HidingSuspected: see ``combine``.
        """
        size, digest = SEALED_V1.degree, context.digest()
        rows = [fixed.found.sites.index(site) for site in chosen]
        predicted = sum(fixed.found.exact[i][j] for i in rows for j in rows)
        sketcher = Sketcher(plan_of(context, fixed.seed))
        out = np.empty(block_count(context) * size, np.int64)
        start, length = 0, 0.0
        for opened in unmask(digest, _summed([uploads[site].blocks for site in chosen]), key_sum):
            flat = opened.reshape(-1)
            out[start : start + flat.size] = flat
            start += flat.size
            # Exact: integers of the opened sum stay below 2^31 where everybody was honest.
            wide = flat.astype(np.float64)
            length += float(wide @ wide)
            sketcher.add(field.from_signed(opened))
        sketches = sketcher.result().reshape(-1)
        if field.dot(sketches, sketches) != predicted % field.P:
            raise RoundFailed("the opened sum is not the sum that was measured; it is thrown away")
        if length > RATIO * predicted / context.sketches:
            raise HidingSuspected(
                f"the opened sum is {length * context.sketches / max(predicted, 1):.3g} times as long (squared) as "
                "measured: somebody hid from the sketches; it is thrown away"
            )
        return dequantise(out[: context.dimension], scale_of(context), digest) / len(chosen)


def _complaints(context: RoundContext, answer: CheckAnswer) -> list[Site]:
    return [context.sites[number - 1] for number in sorted(answer.complaints)]


def _sketch(upload: SealedUpload, sketcher: Sketcher) -> NDArray[np.uint64]:
    size = SEALED_V1.degree
    for block in upload.blocks:
        sketcher.add(np.frombuffer(block, "<u8").reshape(-1, size))
    return sketcher.result()


def _summed(uploads: Sequence[Sequence[bytes]]) -> Iterator[NDArray[np.uint64]]:
    """``sum_S y_i``, batch by batch."""
    size = SEALED_V1.degree
    for batches in zip(*uploads, strict=True):
        total = np.frombuffer(batches[0], "<u8").copy()
        for batch in batches[1:]:
            total = field.add(total, np.frombuffer(batch, "<u8"))
        yield total.reshape(-1, size)


def _need(count: int, quorum: int, what: str, faults: Mapping[Site, SiteFault]) -> None:
    if count < quorum:
        raise RoundFailed(f"only {count} sites {what}, and {quorum} are needed", dict(faults))
