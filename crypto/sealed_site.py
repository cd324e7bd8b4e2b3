"""The site's end of the suite ``sealed``: one step function per phase of the round.

What a site checks before it answers, in the order of the phases (docs/spec/sealed-round.md, section 3):

* **seal**: the bounds hold, its own key is in the roster, and it could repeat the selection that the context names.
* **reseal**, for a later attempt: the same, and it has signed no ticket. What it seals are the same integers.
* **root**: its own submission is among those the root stands for. It signs one root per round.
* **check**: Q sites signed this root; the coordinator's nonce is the one it had committed itself to; the sketch that
  the coordinator computed of *this* site's upload is right. It signs one view per round.
* **gram**: Q sites signed the same view. It follows the fixed rule on disputes and then, only then, gives its points.
* **ticket**: the points are signed by their holders; what it decodes and selects itself is what it signs. One set per
  round, ever.
* **sum**: Q sites signed tickets for one set, the set this site found itself. One sum share per round, ever.

Every step is a function of the state before and the question; the caller stores the state before the answer leaves.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field, labels, ring, xof
from quorsum.crypto.checks import check_update
from quorsum.crypto.flatten import flattening_signs
from quorsum.crypto.identity import Identity, PublicIdentity
from quorsum.crypto.labels import tagged
from quorsum.crypto.mask import draw_key, mask_blocks
from quorsum.crypto.quantise import quantise
from quorsum.crypto.randomness import stretched
from quorsum.crypto.sealed_geometry import (
    Geometry,
    Select,
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
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds, small_model
from quorsum.crypto.sealed_wire import (
    pack_message,
    read_array,
    read_head,
    read_hex,
    read_names,
    read_signatures,
)
from quorsum.crypto.share_checks import Challenge, CheckAnswer, challenge_from, check_values
from quorsum.crypto.sharing import Deal, deal_length, deal_shares
from quorsum.crypto.sketch import Sketcher, public_sketch
from quorsum.crypto.suite import Blocks, Keep, RandomBytes, RoundContext, Site, Vector
from quorsum.errors import BoundError, CoordinatorFault, KeyMaterialError, Refusal, RoundFailed, UsageError

__all__ = [
    "PHASES",
    "SealedSite",
    "SiteState",
    "commitment_of",
    "digest_of_deal",
    "digest_of_upload",
    "number_of",
    "submission",
]

PHASES = ("root", "check", "gram", "ticket", "sum")


def commitment_of(context: RoundContext, site: Site, deals: bytes, upload: bytes) -> bytes:
    """What a site commits itself to.

    Args:
        context: the round.
        site: who commits itself.
        deals: one digest of 32 bytes for each holder of what is sealed to it (zeros for the site itself), joined.
        upload: digest of the masked update.
    """
    return tagged(labels.COMMITMENT, context.digest(), site.encode(), deals, upload)


def digest_of_deal(sealed: bytes) -> bytes:
    """Digest of one sealed deal."""
    return tagged(labels.DEAL, sealed)


def digest_of_upload(blocks: Blocks) -> bytes:
    """Digest of a masked update."""
    return tagged(labels.UPLOAD, *blocks)


@dataclass(frozen=True)
class SiteState:
    """What a site keeps of a round, beside its upload.

    Attributes:
        facts: small things by name, as JSON holds them.
        own: the deal it gave itself.
        shares: uint64, shape (m, N): the key shares it got from the dealers of the view, in their order.
        points: uint64: its share of the Gram matrix for all pairs of these dealers, without the zero sharings.
        zeros: uint64, shape (m, n): the zero shares it got from these dealers.
    """

    facts: Mapping[str, Any]
    own: bytes
    shares: NDArray[np.uint64]
    points: NDArray[np.uint64]
    zeros: NDArray[np.uint64]

    def with_facts(self, **facts: Any) -> SiteState:
        """The same state with further small things."""
        return SiteState({**self.facts, **facts}, self.own, self.shares, self.points, self.zeros)

    def to_bytes(self) -> bytes:
        """The state as the site stores it."""
        out = io.BytesIO()
        text = np.frombuffer(json.dumps(dict(self.facts)).encode(), np.uint8)
        own = np.frombuffer(self.own, np.uint8)
        np.savez(out, facts=text, own=own, shares=self.shares, points=self.points, zeros=self.zeros)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteState:
        """The state as it was stored.

        Raises:
            CoordinatorFault: there is none: nothing was sealed.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as parts:
                facts = json.loads(parts["facts"].tobytes())
                return cls(facts, parts["own"].tobytes(), parts["shares"], parts["points"], parts["zeros"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            raise CoordinatorFault("unknown-round", "nothing was sealed in this round") from None


def number_of(context: RoundContext, public_key: bytes) -> int:
    """The number, from 1, that the site with this key has as a holder.

    Raises:
        CoordinatorFault: the key is not in the roster.
    """
    own = public_key.hex()
    if own not in context.keys:
        raise CoordinatorFault("wrong-roster", "this site's key is not in the roster of the round")
    return context.keys.index(own) + 1


def submission(
    identity: Identity, context: RoundContext, number: int, upload: Blocks, deals: Sequence[Deal]
) -> tuple[bytes, Blocks]:
    """Seal the deals, commit to them and to the upload, sign: what ``SealedSite.seal`` does after masking.

    Args:
        identity: the keys of the site.
        context: the round.
        number: the site's number as a holder, from 1.
        upload: the masked update in batches.
        deals: what each holder is given, in roster order.

    Returns:
        the private state, and the blocks: head, sealed deals, masked update in batches.
    """
    digest, own = context.digest(), context.sites[number - 1]
    sealed = [
        b"" if holder == number else _seal_deal(context, own, holder, deal) for holder, deal in enumerate(deals, 1)
    ]
    digests = b"".join(digest_of_deal(one) if one else bytes(32) for one in sealed)
    commitment = commitment_of(context, own, digests, digest_of_upload(upload))
    head = {"signature": identity.sign(labels.SUBMISSION, digest, commitment).hex()}
    nothing = np.zeros((0, 0), np.uint64)
    facts = {"context": digest.hex(), "commitment": commitment.hex()}
    state = SiteState(facts, deals[number - 1].to_bytes(), nothing, nothing, nothing)
    return state.to_bytes(), (*pack_message(head, b"".join(sealed)), *upload)


def _seal_deal(context: RoundContext, dealer: Site, holder: int, deal: Deal) -> bytes:
    public = PublicIdentity.from_bytes(bytes.fromhex(context.keys[holder - 1]))
    return public.seal(deal.to_bytes(), _deal_info(context, dealer, context.sites[holder - 1]))


@dataclass(frozen=True)
class SealedSite:
    """The site's end of ``sealed``.

    Attributes:
        identity: the site's own keys; they never leave it.
        select: the robust selection, the same function as at the coordinator.
        accept_small_models: whether models with fewer than 32 N parameters are sealed, where a malicious coordinator
            and tau sites learn more of an update (docs/spec/sealed-round.md, section 6).
        least_collude: the smallest tau of a round this site takes part in; the coordinator chooses tau, and with a
            small one few colluding sites open an update.
    """

    identity: Identity
    select: Select = dataclass_field(repr=False)
    accept_small_models: bool = False
    least_collude: int = 1

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return SEALED_V1.name

    @property
    def key_id(self) -> str:
        """Fingerprint of this site's public key."""
        return tagged(labels.IDENTITY, self.public_key)[:16].hex()

    @property
    def public_key(self) -> bytes:
        """This site's public key, 64 bytes."""
        return self.identity.public().to_bytes()

    @property
    def keeps_upload(self) -> bool:
        """Yes: the site recomputes the sketch of its own upload."""
        return True

    # --- seal ---

    def seal(
        self, context: RoundContext, update: Vector, random_bytes: RandomBytes, keep: Keep | None = None
    ) -> tuple[bytes, Blocks]:
        """Mask one update and share the mask's key among all sites.

        Returns:
            the private state, and the blocks: head, sealed deals, masked update in batches.

        Raises:
            UsageError: the update has the wrong shape, is not finite, or the model is too small or too large.
            CoordinatorFault: the roster or the bounds are not acceptable, or the selection could not be repeated.
        """
        check_update(context, update)
        bounds = self._admitted(context)
        digest = context.digest()
        # The key comes from the source itself, the many small errors from a stretch of it.
        key, many = draw_key(random_bytes), stretched(random_bytes)
        integers = quantise(update, scale_of(context), digest, many)
        if keep is not None:
            keep(_kept(context, integers))
        return self._masked(context, bounds, key, integers, many, random_bytes)

    def reseal(
        self, context: RoundContext, state: bytes, kept: Blocks, random_bytes: RandomBytes
    ) -> tuple[bytes, Blocks]:
        """Mask the integers of the first attempt again, with a fresh key, fresh errors and a fresh sharing.

        Raises:
            CoordinatorFault: ``ticket-signed``: the site has signed a set in the attempt before, and a sum over another
                one would show their difference; ``one-attempt``: the rule has a reference, which may choose so small a
                set that those who signed for it are not in it; or as ``seal``.
            KeyMaterialError: ``ledger-damaged``: what was kept is not what this round's first attempt sealed.
            UsageError: the model is too small or too large.
        """
        if "asked-ticket" in SiteState.from_bytes(state).facts:
            raise CoordinatorFault("ticket-signed", "this site has signed a ticket and joins no other attempt")
        bounds = self._admitted(context)
        if context.reference:
            raise CoordinatorFault("one-attempt", "a round whose rule has a reference has one attempt")
        integers = _integers(context, kept)
        return self._masked(context, bounds, draw_key(random_bytes), integers, stretched(random_bytes), random_bytes)

    def _admitted(self, context: RoundContext) -> SealedBounds:
        """The bounds of a round that this site's policy lets it take part in; see ``seal`` for what is raised."""
        # A roster without this site is refused as one, whatever its bounds.
        number_of(context, self.public_key)
        bounds = _acceptable(context)
        self.select.check(context)
        if bounds.tau < self.least_collude:
            raise CoordinatorFault(
                "wrong-bound", f"a round with tau = {bounds.tau}, this site's policy asks for {self.least_collude}"
            )
        if small_model(context.dimension) and not self.accept_small_models:
            raise UsageError(f"{SEALED_V1.small_model_sentence(context.dimension)}; accept that by name, or use ckks")
        return bounds

    def _masked(
        self,
        context: RoundContext,
        bounds: SealedBounds,
        key: NDArray[np.int8],
        integers: NDArray[np.int32],
        many: RandomBytes,
        random_bytes: RandomBytes,
    ) -> tuple[bytes, Blocks]:
        # y_j = a_j s + e_j + x_j
        upload = tuple(field.to_bytes(batch) for batch in mask_blocks(context.digest(), key, integers, many))
        deals = deal_shares(field.from_signed(key.astype(np.int64)), bounds, random_bytes)
        return submission(self.identity, context, number_of(context, self.public_key), upload, deals)

    def _name(self, context: RoundContext) -> Site:
        return context.sites[number_of(context, self.public_key) - 1]

    # --- answer ---

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Answer one phase; asked the very same again, the site gives the very same answer.

        Raises:
            CoordinatorFault: the question is malformed, out of order, or one that the site may not answer.
        """
        steps: dict[str, Callable[..., tuple[SiteState, Blocks]]] = {
            "root": self._root,
            "check": self._check,
            "gram": self._gram,
            "ticket": self._ticket,
            "sum": self._sum,
        }
        if phase not in steps:
            raise CoordinatorFault("unknown-phase", f"the suite sealed has no phase {phase!r}")
        before = SiteState.from_bytes(state)
        if before.facts.get("context") != context.digest().hex():
            raise CoordinatorFault("wrong-round", "nothing was sealed for this round")
        _in_order(before, phase)
        asked = tagged(labels.QUESTION, phase.encode(), *question).hex()
        if before.facts.get(f"asked-{phase}", asked) != asked:
            raise CoordinatorFault("asked-twice", f"a second, different question of phase {phase!r}")
        try:
            after, answer = steps[phase](context, before, question, random_bytes, upload)
        except CoordinatorFault:
            raise
        except (RoundFailed, BoundError) as error:
            raise CoordinatorFault("cannot-follow", f"this site cannot follow the coordinator: {error}") from None
        except Refusal as refusal:
            raise CoordinatorFault(refusal.code, f"the question of phase {phase!r}: {refusal.message}") from None
        return after.with_facts(**{f"asked-{phase}": asked}).to_bytes(), answer

    def _root(
        self, context: RoundContext, state: SiteState, question: Blocks, random_bytes: RandomBytes, upload: Blocks
    ) -> tuple[SiteState, Blocks]:
        """Sign the root of all submissions, once."""
        commitments = _read_commitments(context, read_head(question, 0))
        if commitments.get(self._name(context), b"").hex() != state.facts["commitment"]:
            raise CoordinatorFault("wrong-root", "the root does not stand for what this site has submitted")
        root = root_of(context, commitments)
        signature = self.identity.sign(labels.ROOT_CERTIFICATE, context.digest(), root)
        return state.with_facts(root=root.hex()), pack_message({"signature": signature.hex()})

    def _check(
        self, context: RoundContext, state: SiteState, question: Blocks, random_bytes: RandomBytes, upload: Blocks
    ) -> tuple[SiteState, Blocks]:
        """Verify the certificate, the nonce and the own sketch; take the shares; sign the view; answer the checks."""
        head = read_head(question, 3)
        digest, n = context.digest(), len(context.sites)
        dealers = read_names(head, "dealers", context.sites)
        own = self._name(context)
        if own not in dealers:
            raise CoordinatorFault("wrong-view", "this site has submitted and is not among the dealers")
        root = bytes.fromhex(state.facts["root"])
        signatures = read_signatures(head, "signatures", context.sites)
        _certified(context, labels.ROOT_CERTIFICATE, signatures, digest, root)
        nonce = read_hex(head, "nonce", 32)
        if tagged(labels.NONCE, nonce).hex() != context.commitment:
            raise CoordinatorFault("wrong-nonce", "the coordinator had committed itself to another nonce")
        # The deals and uploads that the root stands for: commitments are recomputed from what is handed over.
        if len(question[1]) != len(dealers) * (n + 1) * 32:
            raise CoordinatorFault("wrong-shape", "not one digest for each deal and each upload")
        digests = [question[1][k : k + (n + 1) * 32] for k in range(0, len(question[1]), (n + 1) * 32)]
        commitments = {
            site: commitment_of(context, site, parts[: n * 32], parts[n * 32 :])
            for site, parts in zip(dealers, digests, strict=True)
        }
        if root_of(context, commitments) != root:
            raise CoordinatorFault("wrong-root", "the dealers handed over are not those that the root stands for")

        seed = seed_of(root, nonce)
        plan = plan_of(context, seed)
        # Y_i^k = sum_j +- X^rho_j y_ij
        r, size = context.sketches, SEALED_V1.degree
        sketches = read_array(question[3], (len(dealers), r, size))
        mine = _own_sketch(context, plan, upload)
        if not np.array_equal(sketches[dealers.index(own)], mine):
            raise CoordinatorFault("wrong-sketch", "the coordinator's sketch of this site's upload is wrong")
        view = view_of(context, root, seed, dealers, question[3])

        place = number_of(context, self.public_key) - 1
        due = {s: parts[place * 32 : place * 32 + 32] for s, parts in zip(dealers, digests, strict=True)}
        taken, complaints = self._take_deals(context, state, dealers, question[2], due)
        length = len(dealers)
        shares = np.zeros((length, size), np.uint64)
        zeros = np.zeros((length, len(context.sites)), np.uint64)
        answers = np.zeros((length, 2), np.uint64)
        challenge = challenge_of(context, seed)
        for row, site in enumerate(dealers):
            deal = taken.get(site)
            if deal is not None:
                shares[row], zeros[row] = deal.key, deal.zeros
                answers[row] = check_values(deal, challenge)
        # z_i^k = Y_i^k - A^k s_i: this holder's share of sketch k of dealer i; <z_i, z_j> summed over the sketches.
        points = _gram_points(sketches, public_sketch(digest, plan), shares)
        named = tuple(site for site in dealers if site in complaints)
        head_out = {
            "view": self.identity.sign(labels.VIEW_CERTIFICATE, digest, view).hex(),
            "complaints": list(named),
            "signature": self.identity.sign(*check_statement(context, view, named, field.to_bytes(answers))).hex(),
        }
        facts = {**state.facts, "seed": seed.hex(), "view": view.hex(), "dealers": list(dealers)}
        return SiteState(facts, state.own, shares, points, zeros), pack_message(head_out, answers)

    def _take_deals(
        self,
        context: RoundContext,
        state: SiteState,
        dealers: tuple[Site, ...],
        sealed: bytes,
        digests: Mapping[Site, bytes],
    ) -> tuple[dict[Site, Deal], set[Site]]:
        """Open what the dealers sealed to this site; what cannot be opened or read is a complaint.

        Raises:
            CoordinatorFault: the coordinator handed over something else than what the dealers had committed to.
        """
        own = self._name(context)
        length = deal_length(len(context.sites), sealed=True)
        others = [site for site in dealers if site != own]
        if len(sealed) != length * len(others):
            raise CoordinatorFault("wrong-shape", "not one sealed deal from each other dealer")
        taken = {own: Deal.from_bytes(state.own, len(context.sites))}
        complaints: set[Site] = set()
        for place, site in enumerate(others):
            one = sealed[place * length : (place + 1) * length]
            if digest_of_deal(one) != digests[site]:
                raise CoordinatorFault(
                    "wrong-deal", f"the deal of {site} is not the one that it had committed itself to"
                )
            try:
                plain = self.identity.open(one, _deal_info(context, site, own))
                taken[site] = Deal.from_bytes(plain, len(context.sites))
            except Refusal:
                complaints.add(site)
        return taken, complaints

    def _gram(
        self, context: RoundContext, state: SiteState, question: Blocks, random_bytes: RandomBytes, upload: Blocks
    ) -> tuple[SiteState, Blocks]:
        """Verify that Q sites share the view, settle the disputes by the rule, then give the points."""
        digest, view = context.digest(), bytes.fromhex(state.facts["view"])
        dealers: tuple[Site, ...] = tuple(state.facts["dealers"])
        head = read_head(question)
        own = self._name(context)
        answered = read_names(head, "answered", context.sites)
        views = read_signatures(head, "views", context.sites)
        _certified(context, labels.VIEW_CERTIFICATE, views, digest, view, needed=witnesses_of(context))
        answers = read_check_answers(context, head, answered, dealers, question[1:], view)
        if own not in answers:
            raise CoordinatorFault("own-answer-missing", "this site's own check answer is not among those given")
        elimination, holders, accepted = settle_disputes(context, dealers, answers)
        least = bounds_of(context).smallest_set
        if len(accepted) < least:
            raise CoordinatorFault("too-few-dealers", f"{len(accepted)} updates would be measured, less than {least}")
        facts = {"accepted": list(accepted), "holders": list(holders), "left": elimination.f_left}
        if own not in holders:
            # It has left as a holder after a dispute and gives no points; it still signs a ticket, for a quorum is
            # counted among all who were invited.
            return state.with_facts(**facts), pack_message({})
        chosen = [dealers.index(site) for site in accepted]
        at = {pair: place for place, pair in enumerate(pairs_of(dealers))}
        rows = np.array([at[chosen[i], chosen[j]] for i, j in pairs_of(accepted)])
        first, second = np.array([(chosen[i], chosen[j]) for i, j in pairs_of(accepted)]).T
        columns = np.array([context.sites.index(site) for site in dealers])
        masks = field.add(state.zeros[first, columns[second]], state.zeros[second, columns[first]])
        # <z_i, z_j> + b_ij + b_ji
        points = field.add(state.points[rows], masks)
        signature = self.identity.sign(*points_statement(context, view, accepted, field.to_bytes(points)))
        return state.with_facts(**facts), pack_message({"signature": signature.hex()}, points)

    def _ticket(
        self, context: RoundContext, state: SiteState, question: Blocks, random_bytes: RandomBytes, upload: Blocks
    ) -> tuple[SiteState, Blocks]:
        """Decode the Gram matrix from signed points, select, and sign the set: one ticket per round, ever."""
        head = read_head(question)
        accepted: tuple[Site, ...] = tuple(state.facts["accepted"])
        holders = tuple(state.facts["holders"])
        points = read_points(context, head, holders, accepted, question[1:], bytes.fromhex(state.facts["view"]))
        found = geometry(context, accepted, points, int(state.facts["left"]), random_bytes)
        chosen = choose(context, found, self.select)
        if list(chosen) != state.facts.get("selected", list(chosen)):
            # Asked the very same again, on another machine or with another library: rules compute in float64.
            raise CoordinatorFault("asked-twice", "this site has signed for a set and would now select another one")
        signature = self.identity.sign(*ticket_of(context, bytes.fromhex(state.facts["view"]), accepted, chosen))
        answer = pack_message({"selected": list(chosen), "signature": signature.hex()})
        return state.with_facts(selected=list(chosen)), answer

    def _sum(
        self, context: RoundContext, state: SiteState, question: Blocks, random_bytes: RandomBytes, upload: Blocks
    ) -> tuple[SiteState, Blocks]:
        """Verify Q tickets for the set and the dealers this site found itself; return its share of the sum, once."""
        if self._name(context) not in state.facts["holders"]:
            raise CoordinatorFault("not-a-holder", "this site has left the round as a holder after a dispute")
        head = read_head(question, 0)
        chosen = read_names(head, "selected", context.sites)
        if list(chosen) != state.facts["selected"]:
            raise CoordinatorFault("wrong-set", "the set to be opened is not the one that this site signed for")
        view = bytes.fromhex(state.facts["view"])
        label, *parts = ticket_of(context, view, tuple(state.facts["accepted"]), chosen)
        _certified(context, label, read_signatures(head, "tickets", context.sites), *parts)
        dealers = state.facts["dealers"]
        # sum over S of s_i(k)
        share = field.sum_mod(state.shares[[dealers.index(site) for site in chosen]], axis=0)
        signature = self.identity.sign(*sum_statement(context, view, chosen, field.to_bytes(share)))
        return state, pack_message({"signature": signature.hex()}, share)


# --- what both ends read and write in the same way ---


def challenge_of(context: RoundContext, seed: bytes) -> Challenge:
    """The coefficients of the checks of all sharings, known to nobody before the root is fixed."""
    return challenge_from(lambda count: xof.field_elements(labels.GAMMA_SHARES, seed, count), len(context.sites))


def choose(context: RoundContext, found: Geometry, select: Select) -> tuple[Site, ...]:
    """The set S, in roster order.

    Raises:
        RoundFailed: it is smaller than what may be opened.
    """
    chosen = select(context, found.sites, found.gram, found.tolerate)
    least = bounds_of(context).smallest_set
    if len(chosen) < least:
        raise RoundFailed(f"the rule keeps {len(chosen)} sites, and a sum over fewer than {least} shows too much")
    return tuple(site for site in found.sites if site in chosen)


def ticket_of(
    context: RoundContext, view: bytes, accepted: tuple[Site, ...], chosen: tuple[Site, ...]
) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Label and parts of what a ticket signs: the set, and the dealers among whom it was selected.

    Without the latter, sites that were shown different check answers could sign for one set, each of them measured
    where the others were not, and few of those who signed would be in the set.
    """
    return labels.TICKET, context.digest(), view, "\n".join(accepted).encode(), "\n".join(chosen).encode()


def sum_statement(
    context: RoundContext, view: bytes, chosen: tuple[Site, ...], share: bytes
) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Label and parts of what a holder's share of the sum of the keys signs."""
    return labels.SUM_SHARE, context.digest(), view, "\n".join(chosen).encode(), share


def read_check_answers(
    context: RoundContext,
    head: Mapping[str, Any],
    answered: tuple[Site, ...],
    dealers: tuple[Site, ...],
    blocks: Blocks,
    view: bytes,
) -> dict[Site, CheckAnswer]:
    """Signed check answers, one block per site that answered.

    Raises:
        Refusal: a block has the wrong shape, or a signature is not that of its site.
    """
    if len(blocks) != len(answered):
        raise Refusal("wrong-shape", f"{len(answered)} check answers are announced, {len(blocks)} given")
    number = {site: place + 1 for place, site in enumerate(context.sites)}
    signatures = read_signatures(dict(head), "checks", context.sites)
    complaints = head.get("complaints")
    if not isinstance(complaints, dict):
        raise Refusal("undecodable", "the complaints are missing")
    answers: dict[Site, CheckAnswer] = {}
    for site, block in zip(answered, blocks, strict=True):
        values = read_array(block, (len(dealers), 2))
        named = read_names({"complaints": complaints.get(site, [])}, "complaints", dealers)
        parts = check_statement(context, view, named, block)
        if site not in signatures or not _public(context, site).verify(signatures[site], *parts):
            raise Refusal("wrong-signature", f"the check answer of {site} is not signed by it")
        answers[site] = CheckAnswer(values, frozenset(number[dealer] for dealer in named))
    return answers


def check_statement(
    context: RoundContext, view: bytes, complaints: tuple[Site, ...], values: bytes
) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Label and parts of what a check answer signs."""
    return labels.CHECK, context.digest(), view, "\n".join(complaints).encode(), values


def points_statement(
    context: RoundContext, view: bytes, accepted: tuple[Site, ...], values: bytes
) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Label and parts of what a holder's points sign."""
    return labels.POINTS, context.digest(), view, "\n".join(accepted).encode(), values


def read_points(
    context: RoundContext,
    head: Mapping[str, Any],
    holders: tuple[Site, ...],
    accepted: tuple[Site, ...],
    blocks: Blocks,
    view: bytes,
) -> dict[Site, NDArray[np.uint64]]:
    """Signed points, one block per holder that gave them.

    Raises:
        Refusal: a block has the wrong shape, or a signature is not that of its holder.
    """
    given = read_names(dict(head), "given", holders)
    if len(blocks) != len(given):
        raise Refusal("wrong-shape", f"points of {len(given)} holders are announced, {len(blocks)} given")
    signatures = read_signatures(dict(head), "points", context.sites)
    points = {}
    for site, block in zip(given, blocks, strict=True):
        points[site] = read_array(block, (len(pairs_of(accepted)),))
        parts = points_statement(context, view, accepted, block)
        if site not in signatures or not _public(context, site).verify(signatures[site], *parts):
            raise Refusal("wrong-signature", f"the points of {site} are not signed by it")
    return points


# --- what a later attempt seals again ---


def _kept(context: RoundContext, integers: NDArray[np.int32]) -> Blocks:
    """What is kept of an update: what it was rounded for, then the integers without their public signs.

    The signs follow from the context and are others in every attempt; the integers are the same in all of them.
    """
    chunks = []
    for start, negative in flattening_signs(context.digest(), integers.size):
        part = integers[start : start + negative.size].astype("<i4")
        np.negative(part, out=part, where=negative)
        chunks.append(part.tobytes())
    return (_rounded_for(context), *chunks)


def _integers(context: RoundContext, kept: Blocks) -> NDArray[np.int32]:
    """The integers that were kept, with the signs of this attempt.

    Raises:
        KeyMaterialError: they were rounded for another round, or are incomplete.
    """
    integers = np.empty(context.dimension, dtype=np.int32)
    chunks = list(flattening_signs(context.digest(), context.dimension))
    sizes = [4 * negative.size for _, negative in chunks]
    if kept[:1] != (_rounded_for(context),) or [len(block) for block in kept[1:]] != sizes:
        raise KeyMaterialError("ledger-damaged", "the kept update is not that of this round; the site sits it out")
    for (start, negative), block in zip(chunks, kept[1:], strict=True):
        part = integers[start : start + negative.size]
        part[:] = np.frombuffer(block, dtype="<i4")
        np.negative(part, out=part, where=negative)
    return integers


def _rounded_for(context: RoundContext) -> bytes:
    """Digest of everything that must be the same in all attempts at a round."""
    return replace(context, attempt=1, sites=(), keys=(), commitment="").digest()


def _read_commitments(context: RoundContext, head: Mapping[str, Any]) -> dict[Site, bytes]:
    given = head.get("commitments")
    if not isinstance(given, dict) or not set(given) <= set(context.sites):
        raise Refusal("undecodable", "the commitments are not given by site")
    return {site: read_hex(given, site, 32) for site in given}


def _certified(
    context: RoundContext, label: str, signatures: Mapping[Site, bytes], *parts: bytes, needed: int = 0
) -> None:
    """Whether Q sites of the round, or as many as are needed if that is more, signed this.

    Raises:
        CoordinatorFault: fewer did.
    """
    quorum = max(bounds_of(context).quorum, needed)
    valid = sum(_public(context, site).verify(signature, label, *parts) for site, signature in signatures.items())
    if valid < quorum:
        raise CoordinatorFault("no-certificate", f"{valid} sites signed this, and {quorum} are needed")


def _acceptable(context: RoundContext) -> SealedBounds:
    """The bounds of a round that this site may take part in.

    Raises:
        CoordinatorFault: ``wrong-bound``; or ``wrong-roster``: names or keys that can be read in two ways, since what
            is signed about a set is its names, one per line, and who has signed is counted by keys.
    """
    if any(not site.isprintable() or not site for site in context.sites):
        raise CoordinatorFault("wrong-roster", "a name in the roster is empty or holds a control character")
    try:
        bounds = bounds_of(context)
        for key in context.keys:
            PublicIdentity.from_hex(key)
    except UsageError as error:
        raise CoordinatorFault("wrong-bound", str(error)) from None
    except Refusal as refusal:
        raise CoordinatorFault("wrong-roster", f"a key in the roster: {refusal.message}") from None
    return bounds


def _in_order(state: SiteState, phase: str) -> None:
    """Phases follow each other; an earlier one may only be repeated word for word.

    Raises:
        CoordinatorFault: a phase before this one has not been answered.
    """
    for earlier in PHASES[: PHASES.index(phase)]:
        if f"asked-{earlier}" not in state.facts:
            raise CoordinatorFault("out-of-order", f"phase {phase!r} was asked before phase {earlier!r}")


def _public(context: RoundContext, site: Site) -> PublicIdentity:
    return PublicIdentity.from_bytes(bytes.fromhex(context.keys[context.sites.index(site)]))


def _deal_info(context: RoundContext, dealer: Site, holder: Site) -> bytes:
    return tagged(labels.HPKE_INFO, context.digest(), dealer.encode(), holder.encode())


def _own_sketch(context: RoundContext, plan: Any, upload: Blocks) -> NDArray[np.uint64]:
    sketcher = Sketcher(plan)
    for block in upload[2:]:
        sketcher.add(read_array(block, (len(block) // (8 * SEALED_V1.degree), SEALED_V1.degree)))
    return sketcher.result()


def _gram_points(
    sketches: NDArray[np.uint64], public: NDArray[np.uint64], shares: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """``<Y_i - A s_i(k), Y_j - A s_j(k)>``, summed over the sketches, for all pairs i <= j.

    Args:
        sketches: Y, shape (m, r, N).
        public: A, shape (r, N).
        shares: s_i(k), shape (m, N).
    """
    dealers, count, size = sketches.shape
    z = np.empty_like(sketches)
    for k in range(count):
        # Shares are as large as the modulus: exact products, not the transform for short keys.
        z[:, k] = field.sub(sketches[:, k], ring.multiply_many(public[k], shares))
    flat = z.reshape(dealers, count * size)
    gram = field.matmul(flat, flat.T)
    return gram[np.triu_indices(dealers)]
