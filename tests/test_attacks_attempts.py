"""Attacks on repeated attempts, run against the real code; each fails for the reason given.

A coordinator that may ask again has more to ask: the difference of two sums that it gets opened must hold at least
three honest updates with one coefficient (docs/spec/sealed-round.md, section 7).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from federation import honest_update, learning_app, model
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from sealed_federation import Federation, context_for, identity, names, updates_for
from test_client_attempts import SITE, again, answered, refused, sealed_context, train
from test_crypto_sealed_attempts import again as again_sealed
from test_crypto_sealed_attempts import begin
from test_server_attempts import run

from quorsum import envelope, messages
from quorsum.aggregation import parse_rule
from quorsum.client import seal
from quorsum.client.ledger import FolderLedger
from quorsum.crypto import field
from quorsum.crypto.dialogue import run_dialogue
from quorsum.crypto.mask import draw_key, mask_blocks
from quorsum.crypto.quantise import quantise
from quorsum.crypto.sealed_geometry import bounds_of, scale_of, witnesses_of
from quorsum.crypto.sealed_parameters import SEALED_V1, norm_gate
from quorsum.crypto.sealed_site import number_of, submission
from quorsum.crypto.sealed_wire import pack_message, read_head
from quorsum.crypto.sharing import deal_shares
from quorsum.crypto.suite import Ask, Blocks, RoundContext, Site
from quorsum.errors import CoordinatorFault, RoundFailed, SiteFault
from quorsum.selection import Selection, one_attempt, select
from quorsum.server.checkpoint import FolderRun, RunState
from quorsum.server.exchange import Network, Traffic
from quorsum.server.round import expect
from quorsum.simulation.grid import LocalGrid

D = 9000
COLLUDER = "site-10"


class _Stopped(Exception):
    """The attacker has used the honest coordinator's code as far as it helps, and goes on by hand."""


def until_gram(federation: Federation) -> Blocks:
    """Play as far as the question of phase gram, and take it."""
    uploads = federation.upload()
    questions: list[Blocks] = []

    def exchange(ask: Ask) -> Mapping[Site, Blocks]:
        if ask.phase == "gram":
            questions.extend(ask.questions.values())
            raise _Stopped
        return federation.exchange(ask)

    with pytest.raises(_Stopped):
        run_dialogue(federation.round.measure(federation.context, uploads, os.urandom), exchange)
    return questions[0]


def showing(question: Blocks, shown: tuple[Site, ...]) -> Blocks:
    """A question of phase gram that holds the check answers of these sites only."""
    head = dict(read_head(question))
    blocks = dict(zip(head["answered"], question[1:], strict=True))
    head |= {name: {site: head[name][site] for site in shown} for name in ("checks", "complaints")}
    return pack_message({**head, "answered": list(shown)}, *[blocks[site] for site in shown])


def useless_sharing(federation: Federation) -> tuple[bytes, Blocks]:
    """The colluder's submission: every holder gets the share of another key, so that it is no dealer, but a holder."""
    context = federation.context
    integers = quantise(federation.updates[COLLUDER], scale_of(context), context.digest(), os.urandom)
    upload = tuple(
        field.to_bytes(batch) for batch in mask_blocks(context.digest(), draw_key(os.urandom), integers, os.urandom)
    )
    deals = [
        deal_shares(field.from_signed(draw_key(os.urandom).astype(np.int64)), bounds_of(context), os.urandom)[k]
        for k in range(len(context.sites))
    ]
    number = number_of(context, federation.sites[COLLUDER].public_key)
    return submission(identity(number), context, number, upload, deals)


def test_sites_shown_other_check_answers_sign_for_no_common_set() -> None:
    """Each of three signers is measured in one group only, where the rule leaves it out; all get one and the same set.

    Then five honest sites sign for a set that holds only two of them. The other four in it have signed nothing, and
    their sum in a second attempt would leave those two. A ticket names what was measured, so that tickets of several
    groups do not add up.
    """
    updates = updates_for(10, D)
    outliers, kept = names(10)[:3], names(10)[3:9]
    for k, site in enumerate(outliers):
        updates[site] = np.roll(updates[site], 100 * (k + 1))
    federation = Federation(context_for(10, D), updates)

    def swap(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if (site, phase) == (COLLUDER, "upload"):
            federation.states[COLLUDER], federation.sent[COLLUDER] = useless_sharing(federation)
        return federation.sent[site] if phase == "upload" else blocks

    federation.tamper = swap
    question = until_gram(federation)
    groups = {outliers[k]: (outliers[k], *kept[2 * k : 2 * k + 2]) for k in range(3)}
    loose = federation.states[COLLUDER]
    tickets: dict[Site, str] = {}
    for outlier, group in groups.items():
        shown = (outlier, *kept, COLLUDER)
        points: dict[Site, tuple[str, bytes]] = {}
        federation.states[COLLUDER] = loose  # It forgets what it has answered in another group.
        for site in (*group, COLLUDER):
            reply = federation.put(site, "gram", showing(question, shown))
            assert reply is not None
            points[site] = (read_head(reply)["signature"], reply[1])
        given = sorted(points)
        ask = pack_message(
            {"given": given, "points": {site: points[site][0] for site in given}}, *[points[s][1] for s in given]
        )
        for site in (*group[:2], COLLUDER):
            reply = federation.put(site, "ticket", ask)
            assert reply is not None
            head = read_head(reply)
            assert tuple(head["selected"]) == kept
            tickets[site] = head["signature"]
    # Three outliers, one more of each group, and the colluder: a quorum of ten.
    assert len(tickets) == bounds_of(federation.context).quorum + 1
    for short in (None, kept[4]):
        signed = {site: ticket for site, ticket in tickets.items() if site != short}
        opening = pack_message({"selected": list(kept), "tickets": signed})
        for site in groups[outliers[0]][:2]:
            assert federation.put(site, "sum", opening) is None
            assert federation.refusals[site, "sum"].code == "no-certificate"


@pytest.mark.parametrize("rule", ["multi-krum(m=4)", "nnm+multi-krum(m=5)", "krum", "fltrust"])
def test_rule_that_keeps_few_sites_has_one_attempt(rule: str) -> None:
    """With m = 4 of ten, none of the sites that sign for the first set is in it; the set of a second attempt shares
    three sites with it, and the fourth update is their difference.
    """
    reference = "site-01" if rule == "fltrust" else ""
    federation = Federation(context_for(10, D, rule=rule, reference=reference), updates_for(10, D))
    kept: list[Blocks] = []
    end, context = federation.sites["site-02"], federation.context
    state, _ = end.seal(context, federation.updates["site-02"], os.urandom, kept.append)
    later = replace(context, attempt=2, sites=context.sites[:6], keys=context.keys[:6], commitment="ab" * 32)
    with pytest.raises(CoordinatorFault) as fault:
        end.reseal(later, state, kept[0], os.urandom)
    assert fault.value.code == "one-attempt"


GRAM_RULES = ["mean", "multi-krum", "mda", "geometric-median", "centred-clipping", "centred-clipping(steps=3)"]


@pytest.mark.parametrize("mixer", ["", "nnm+", "arc+", "clip(norm=0.5)+", "nnm+arc+"])
@pytest.mark.parametrize("name", [*GRAM_RULES, "spectral"])
def test_every_other_rule_keeps_all_but_f(name: str, mixer: str) -> None:
    """What the specification counts on, also for matrices that a coordinator with colluding sites may choose."""
    rng = np.random.default_rng(0)
    rule = parse_rule(mixer + name)
    assert not one_attempt(rule)
    for n, f in [(5, 0), (5, 1), (10, 2), (13, 4)]:
        for rank in (0, 1, 2, n):
            rows = rng.integers(-3, 4, size=(n, rank)) * rng.choice([0.0, 1e-9, 1.0, 1e6], size=(n, 1))
            try:
                keep = rule.apply(rows @ rows.T, f).keep
            except RoundFailed:
                continue
            assert keep.sum() >= n - f


def test_site_that_lost_a_later_attempt_is_not_trained_again_for_it(tmp_path: Path) -> None:
    """The disk fails between taking attempt 2 and storing its submission; asked to train for it, the site does not."""
    calls: list[int] = []

    def learn(partition: int, number: int) -> np.ndarray:
        calls.append(number)
        return honest_update(partition, number)

    about = sealed_context()
    later = replace(about, attempt=2, commitment="bb" * 32)
    with LocalGrid([learning_app([seal(SITE, home=tmp_path)], learn)]) as grid:
        answered(grid, train(about))
        (tmp_path / "upload.bin").unlink()
        (tmp_path / "upload.bin").mkdir()
        assert refused(grid, again(about)).code == "site-error"
        (tmp_path / "upload.bin").rmdir()
        assert refused(grid, train(later)).code in {"replayed-round", "no-earlier-attempt"}
        assert refused(grid, again(about, attempt=3)).code == "no-earlier-attempt"
    assert calls == [1]


def test_sites_that_signed_do_not_count_towards_a_later_attempt() -> None:
    """Listed again, sites that answer no more would let few others open a second sum: seven of nine are a quorum."""
    federation, uploads, kept = begin(9, tolerate=2, collude=2, rule="mean")
    federation.measure(uploads)
    later, resealed = again_sealed(federation, kept, names(9))
    silent = names(9)[:2]
    later.tamper = lambda site, phase, blocks: None if site in silent else blocks
    assert bounds_of(later.context).quorum == 6
    with pytest.raises(RoundFailed, match="7 sites signed the view, and 9 are needed"):
        later.measure(resealed)
    # A coordinator that goes on all the same is refused.
    assert witnesses_of(replace(later.context, attempt=1)) == 6
    head, checks = view_certificate(later)
    for site in names(9)[2:]:
        assert later.put(site, "gram", pack_message(head, *checks)) is None
        assert later.refusals[site, "gram"].code == "no-certificate"


def view_certificate(federation: Federation) -> tuple[dict[str, object], list[bytes]]:
    """The question of phase gram, made by hand from what the sites have answered to the check."""
    answers = dict(federation.answered)["check"]
    heads = {site: read_head(blocks) for site, blocks in answers.items()}
    head: dict[str, object] = {
        "answered": list(answers),
        "views": {site: one["view"] for site, one in heads.items()},
        "checks": {site: one["signature"] for site, one in heads.items()},
        "complaints": {site: one["complaints"] for site, one in heads.items()},
    }
    return head, [blocks[1] for blocks in answers.values()]


@dataclass(frozen=True)
class OtherMachine(Selection):
    """The same selection where rounding goes another way: of two sites that are nearly equal the other one stays."""

    def __call__(
        self, context: RoundContext, sites: tuple[Site, ...], gram: NDArray[np.float64], tolerate: int
    ) -> frozenset[Site]:
        kept = super().__call__(context, sites, gram, tolerate)
        left_out = next(site for site in sites if site not in kept)
        return frozenset({*sorted(kept)[1:], left_out})


def test_ticket_asked_again_on_another_machine_is_not_signed_for_another_set() -> None:
    """The question is the very same, so that it is answered again; the rule is computed anew, in float64."""
    federation, uploads, _ = begin()
    measured = federation.measure(uploads)
    federation.combine(uploads, select(federation.context, measured.sites, measured.gram, 1))
    question = dict(federation.asked)["ticket"]["site-02"]
    before = federation.put("site-02", "ticket", question)
    assert before == dict(federation.answered)["ticket"]["site-02"]
    moved = replace(federation.sites["site-02"], select=OtherMachine())
    with pytest.raises(CoordinatorFault) as fault:
        moved.answer(
            federation.context, federation.states["site-02"], "ticket", question, os.urandom, federation.sent["site-02"]
        )
    assert fault.value.code == "asked-twice"


# --- what lies about at a site ---


def test_update_in_the_clear_does_not_outlive_the_ticket(tmp_path: Path) -> None:
    """What is kept for another attempt are the bare integers of the update; after a ticket there is none."""
    sites, result = run(tmp_path, 5, lambda k, attempt, phase: "after" if (k, phase) == (5, "gram") else "")
    assert result.rounds[0].failed is None
    for k in (1, 2, 3, 4):
        assert (k, 1, "ticket") in sites.asked
        assert FolderLedger(tmp_path / str(k)).read_kept() == ()
    # The fifth was not asked to sign, and could have been asked for another attempt.
    assert FolderLedger(tmp_path / "5").read_kept() != ()


def test_half_written_update_of_a_killed_process_goes(tmp_path: Path) -> None:
    book = FolderLedger(tmp_path)
    book.write_kept((b"whole",))
    halves = [tmp_path / f"{name}.4711-1.new" for name in ("kept.bin", "upload.bin", "ledger.json")]
    other = tmp_path / "identity.4711-1.new"
    for path in (*halves, other):
        path.write_bytes(b"half of an update")
    with book.hold():
        assert not any(path.exists() for path in halves)
        assert other.exists(), "another process may be writing it"
    assert book.read_kept() == (b"whole",)


# --- blame ---


class Carrier(LocalGrid):
    """Whoever carries instructions: it puts another one beside the nonce of the one that was sent."""

    def __init__(self, app: ClientApp, instead: RecordDict) -> None:
        super().__init__([app])
        self.instead = instead

    def push_messages(self, messages_: Iterable[Message]) -> Iterable[str]:
        for message in messages_:
            nonce = envelope.nonce_of(message.content)
            assert nonce is not None
            message.content = envelope.address(self.instead, nonce)
            yield from super().push_messages([message])


@pytest.mark.parametrize(
    ("sent", "carried", "kind"),
    [
        (train(sealed_context()), messages.pack(messages.Hello(run="run", suite=SITE.name)), "train"),
        (RecordDict({"arrays": model(1.0)}), RecordDict({"arrays": model(2.0)}), "evaluate"),
    ],
    ids=["another message", "another model to be evaluated"],
)
def test_answer_to_a_swapped_instruction_is_not_taken(sent: RecordDict, carried: RecordDict, kind: str) -> None:
    """The site signs what it was asked, so the coordinator notices; and nothing is proven against the site."""
    with Carrier(learning_app([seal(SITE)]), carried) as grid:
        network = Network(grid, {"site-01": 2}, 20.0, {"site-01": SITE.identity.public()})
        ((_, fault),) = network.exchange({"site-01": sent}, "1", Traffic(), kind)
    assert isinstance(fault, SiteFault)
    assert (fault.code, fault.proven) == ("wrong-signature", False)
    with LocalGrid([learning_app([seal(SITE)])]) as grid:
        network = Network(grid, {"site-01": 2}, 20.0, {"site-01": SITE.identity.public()})
        ((_, reply),) = network.exchange({"site-01": carried}, "1", Traffic(), kind)
    assert isinstance(reply, RecordDict), "the same, as it was sent"


def test_answer_of_another_kind_proves_nothing() -> None:
    hello = messages.pack(messages.Hello(run="run", suite=SITE.name))
    with pytest.raises(SiteFault) as fault:
        expect(messages.Submission, "site-01", hello)
    assert (fault.value.code, fault.value.proven) == ("unexpected", False)


@pytest.mark.parametrize("sketches", [4, 16])
@pytest.mark.parametrize("dimension", [10**6, 10**8, 4 * 10**8])
def test_noise_of_large_models_makes_no_honest_site_look_too_long(dimension: int, sketches: int) -> None:
    """One that hides once has 16 sketches measured in the next round, where integers are small and noise is large.

    With 10^8 parameters every clipped update is then 6 % longer than C.
    """
    context = context_for(5, dimension, sketches=sketches)
    scale = scale_of(context)
    noise = SEALED_V1.error_variance * SEALED_V1.degree * -(-dimension // SEALED_V1.degree) / scale**2
    gram = np.full((5, 5), 0.8) + (0.2 + noise) * np.eye(5)
    assert gram[0, 0] * sketches * scale**2 < norm_gate(1.0, scale, sketches, -(-dimension // SEALED_V1.degree))
    assert len(select(context, context.sites, gram, 1)) == 4


def test_run_begun_anew_takes_no_nonce_and_no_reply_of_a_run_whose_state_was_lost(tmp_path: Path) -> None:
    """The nonce must be unknown until all have submitted; that of the lost run was told to every site."""
    folder = FolderRun(tmp_path)
    folder.commit(RunState("lost", 1, 0, 0, 1.0, 4, model()))
    lost = folder.round(1)
    seed = lost.seed(os.urandom)
    lost.begin({"site-01": ("key", b"public")})
    (tmp_path / "state.npz").unlink()
    anew = FolderRun(tmp_path)
    assert anew.load() is None
    anew.commit(RunState("anew", 1, 0, 0, 1.0, 4, model()))
    assert anew.round(1).roster() is None
    assert anew.round(1).seed(os.urandom) != seed
