"""Malicious sites of a sealed round: what each attack of the specification, sections 4 and 6, comes to.

Wherever nothing else is said the round ends at the first attempt, and what is opened is the honest mean of the sites
that were selected: the clear mean of their updates, up to the noise of sealing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sealed_federation import Federation, context_for, identity, names, updates_for

from quorsum.crypto import field, sealed_coordinator, sealed_site
from quorsum.crypto.flatten import flatten
from quorsum.crypto.mask import draw_key
from quorsum.crypto.ring import N
from quorsum.crypto.sealed_coordinator import SealedCoordinator, SealedUpload
from quorsum.crypto.sealed_geometry import plan_of
from quorsum.crypto.sealed_site import PHASES, SealedSite, SiteState, points_statement, sum_statement, ticket_of
from quorsum.crypto.sealed_wire import pack_message
from quorsum.crypto.sketch import SketchPlan
from quorsum.crypto.suite import Blocks, Measured, Site
from quorsum.errors import HidingSuspected, RoundFailed, SiteFault
from quorsum.selection import select
from quorsum.simulation.protocol_attacks import (
    PROTOCOL_ATTACKS,
    ProtocolAttacker,
    _deals,
    _WrongCheck,
    _WrongPoints,
    inconsistent_shares,
)

D = 20_000
BAD = "site-03"
Make = Callable[[SealedSite], ProtocolAttacker]


@dataclass
class Played:
    """What became of a round."""

    federation: Federation
    refused: Mapping[Site, SiteFault]
    measured: Measured
    chosen: frozenset[Site]
    total: NDArray[np.float64]
    opening: Mapping[Site, SiteFault]

    def code(self, site: Site) -> str | None:
        for faults in (self.refused, self.measured.faults, self.opening):
            if site in faults:
                return faults[site].code
        return None


def seal(federation: Federation) -> tuple[dict[Site, SealedUpload], dict[Site, SiteFault]]:
    """Collect submissions as the coordinator does: one that is refused costs its sender the round and nothing else."""
    uploads: dict[Site, SealedUpload] = {}
    refused: dict[Site, SiteFault] = {}
    for site, update in federation.updates.items():
        federation.states[site], blocks = federation.sites[site].seal(federation.context, update, os.urandom)
        federation.sent[site] = blocks
        changed = federation.tamper(site, "upload", blocks)
        if changed is None:
            continue
        try:
            uploads[site] = federation.round.accept(federation.context, site, changed)
        except SiteFault as fault:
            refused[site] = fault
    return uploads, refused


def prepare(
    bad: Mapping[Site, Make], n: int = 7, f: int = 1, tau: int = 1, d: int = D, **changes: object
) -> Federation:
    federation = Federation(context_for(n, d, tolerate=f, collude=tau, **changes), updates_for(n, d))
    for site, make in bad.items():
        federation.sites[site] = make(federation.sites[site])  # type: ignore[assignment]
    return federation


def play(federation: Federation) -> Played:
    uploads, refused = seal(federation)
    measured = federation.measure(uploads)
    assert measured.tolerate is not None
    chosen = select(federation.context, measured.sites, measured.gram, measured.tolerate)
    opened = federation.combine(uploads, chosen)
    return Played(federation, refused, measured, chosen, opened.total, opened.faults)


def assert_honest_mean(played: Played, of: frozenset[Site]) -> None:
    """Exactly these sites, and the clear mean of their updates: sealing itself costs less than 2 % of its norm."""
    assert played.chosen == of
    clear = np.mean([played.federation.updates[site] for site in of], axis=0)
    assert np.linalg.norm(played.total - clear) < 0.02 * np.linalg.norm(clear)


def attack(name: str) -> Make:
    return PROTOCOL_ATTACKS[name].make


EVERYBODY = frozenset(names(7))

# name, the reason that is given, whether the site's own row stays in the Gram matrix
OUTCOMES = [
    ("other-key", "inconsistent", False),
    ("inconsistent-shares", "dispute", True),
    ("nonzero-zeros", "dispute", False),
    ("wrong-points", "wrong-points", True),
    ("wrong-point", "wrong-points", True),
    ("wrong-sum", "wrong-share", True),
    ("wrong-sum-entry", "wrong-share", True),
    ("wrap-around", "inconsistent", False),
    ("equal-blocks", "inconsistent", False),
    ("oversize", "inconsistent", False),
    ("unmasked", "inconsistent", False),
    ("replay", "wrong-signature", False),
    ("copy", "wrong-signature", False),
    ("plaintext", "undecodable", False),
    ("silent-root", "no-view", False),
    ("silent-check", "no-view", False),
    ("silent-gram", None, True),
    ("silent-ticket", None, True),
    ("silent-sum", None, True),
    ("wrong-check", "dispute", True),
    ("false-complaints", "dispute", True),
]


def test_every_attack_of_the_registry_is_tried_here() -> None:
    # How well a single frequency hides is a matter of luck: see the tests on hiding below.
    assert {name for name, _, _ in OUTCOMES} | {"single-frequency"} == set(PROTOCOL_ATTACKS)


@pytest.mark.parametrize(("name", "code", "measured"), OUTCOMES)
def test_attack_is_named_and_costs_nobody_else_anything(name: str, code: str | None, measured: bool) -> None:
    played = play(prepare({BAD: attack(name)}))
    assert played.code(BAD) == code
    assert (BAD in played.measured.sites) == measured
    assert measured or BAD not in played.chosen
    assert set(played.measured.sites) | {BAD} == EVERYBODY
    # The rule drops as many as may still be malicious; nobody else is ever left out.
    assert played.measured.tolerate == 0 or len(played.chosen) == len(played.measured.sites) - 1
    assert_honest_mean(played, played.chosen)
    blamed = set(played.refused) | set(played.measured.faults) | set(played.opening)
    if code == "dispute" and measured:
        # Nobody can tell which side of a dispute is wrong, and nobody is called guilty.
        assert len(blamed) == 2
        assert BAD in blamed
        assert not any(fault.proven for fault in played.measured.faults.values())
    else:
        assert blamed == ({BAD} if code else set())


# --- malicious sharing ---


@pytest.mark.parametrize("victims", [1, 2, 3, 6])
def test_key_shares_that_do_not_fit_for_some_victims(victims: int) -> None:
    """n = 9, tau = f = 2: agreement of 7 is needed, so up to 2 victims leave a word, and more leave none."""
    played = play(prepare({BAD: inconsistent_shares(victims)}, n=9, f=2, tau=2, d=9000))
    assert played.code(BAD) == "dispute"
    # With one victim, attacker and victim leave as holders; the attacker's key is fixed by the others' shares.
    # With two, the second victim stays a holder and is still at odds with the attacker: the update goes.
    assert (BAD in played.measured.sites) == (victims == 1)
    assert_honest_mean(played, played.chosen)
    assert set(played.measured.faults) <= {BAD, "site-01", "site-02"}


def test_key_shares_that_fit_nobody() -> None:
    played = play(prepare({BAD: inconsistent_shares(7)}))
    assert played.code(BAD) == "dispute"
    assert played.measured.sites == tuple(site for site in names(7) if site != BAD)
    # No word, no dispute about it: every other site is still a holder.
    assert set(played.measured.faults) == {BAD}
    assert_honest_mean(played, played.chosen)


def test_two_dealers_and_overlapping_victims() -> None:
    bad = {"site-08": inconsistent_shares(2), "site-09": inconsistent_shares(2)}
    played = play(prepare(bad, n=9, f=2, tau=2, d=9000))
    # Greedy matching: 1-8 and 2-9; each attacker is at odds with nobody who remains.
    assert set(played.measured.faults) == {"site-01", "site-02", "site-08", "site-09"}
    assert played.measured.tolerate == 2
    assert_honest_mean(played, played.chosen)


@pytest.mark.parametrize("complain", [False, True])
@pytest.mark.parametrize("victims", [1, None])
def test_lying_about_others_sharings_takes_one_of_them_along_as_a_holder_and_no_update(
    complain: bool, victims: int | None
) -> None:
    played = play(prepare({BAD: lambda site: _WrongCheck(site, complain, victims)}))
    assert {site: fault.code for site, fault in played.measured.faults.items()} == {
        "site-01": "dispute",
        BAD: "dispute",
    }
    assert played.measured.sites == names(7)
    # The two are holders no more: they give no points and no shares of the sum, and sign tickets all the same.
    answered = dict(played.federation.answered)
    assert {site for site, blocks in answered["gram"].items() if len(blocks) == 2} == EVERYBODY - {"site-01", BAD}
    assert set(answered["ticket"]) == EVERYBODY
    assert set(answered["sum"]) == EVERYBODY - {"site-01", BAD}
    assert_honest_mean(played, played.chosen)


def test_dispute_among_five_sites_leaves_three_holders_and_a_quorum_of_four() -> None:
    """A quorum is counted among all who were invited, so those who left as holders must still be able to sign."""
    played = play(prepare({BAD: inconsistent_shares(1)}, n=5, d=9000))
    assert set(played.measured.faults) == {"site-01", BAD}
    assert set(dict(played.federation.answered)["ticket"]) == set(names(5))
    assert set(dict(played.federation.answered)["sum"]) == {"site-02", "site-04", "site-05"}
    assert_honest_mean(played, played.chosen)


@pytest.mark.parametrize("rule", ["multi-krum", "spectral"])
def test_a_staged_dispute_does_not_disarm_the_rule(rule: str) -> None:
    """Whoever sheds a partner in a dispute is no holder, and its update is still judged as one of f malicious ones."""

    class Poisoner(ProtocolAttacker):
        def seal(self, context, update, random_bytes):  # type: ignore[no-untyped-def]
            return inconsistent_shares(1)(self.site).seal(context, -update, random_bytes)

    played = play(prepare({BAD: Poisoner}, rule=rule))
    assert set(played.measured.faults) == {"site-01", BAD}
    assert played.measured.tolerate == 1
    assert BAD not in played.chosen
    assert_honest_mean(played, EVERYBODY - {BAD})


def test_more_disputes_than_malicious_sites_can_cause_end_the_round() -> None:
    bad = {site: inconsistent_shares(2) for site in ("site-06", "site-07")}
    with pytest.raises(RoundFailed, match="2 separate pairs of sites are in dispute") as failure:
        play(prepare(bad))
    assert "1-6" in str(failure.value)
    assert "2-7" in str(failure.value)


def test_f_liars_in_one_phase_each() -> None:
    bad = {"site-02": attack("wrong-points"), "site-05": attack("wrong-sum")}
    played = play(prepare(bad, n=9, f=2, tau=2, d=9000))
    assert {site: played.code(site) for site in bad} == {"site-02": "wrong-points", "site-05": "wrong-share"}
    assert_honest_mean(played, played.chosen)


def test_one_more_liar_than_f_is_noticed_and_nothing_is_opened() -> None:
    bad = {site: attack("wrong-points") for site in ("site-02", "site-05")}
    federation = prepare(bad)
    with pytest.raises(RoundFailed, match="answers are wrong in entry"):
        play(federation)
    assert [phase for phase, _ in federation.asked] == ["root", "check", "gram"]


def test_one_more_liar_than_f_in_the_sum_is_noticed() -> None:
    with pytest.raises(RoundFailed, match="answers are wrong in entry"):
        play(prepare({site: attack("wrong-sum") for site in ("site-02", "site-05", "site-06", "site-07")}))


@pytest.mark.parametrize("entries", [1, 5, None])
def test_liars_in_different_entries_are_counted_together(entries: int | None) -> None:
    """Each entry alone could be decoded, with two liars in all; f = 1 says that this must not be believed."""
    bad = {
        "site-02": lambda site: _WrongPoints(site, entries),
        "site-05": lambda site: _FirstPoint(site),
    }
    with pytest.raises(RoundFailed, match=r"holders answered wrongly|answers are wrong in entry"):
        play(prepare(bad))


class _FirstPoint(_WrongPoints):
    def change(self, context, state, phase, blocks, random_bytes):  # type: ignore[no-untyped-def]
        wrong = super().change(context, state, phase, blocks, random_bytes)
        if phase != "gram":
            return wrong
        points = field.from_bytes(blocks[1]).copy()
        points[0] = (int(points[0]) + 1) % field.P
        view, accepted = bytes.fromhex(state.facts["view"]), tuple(state.facts["accepted"])
        statement = points_statement(context, view, accepted, field.to_bytes(points))
        return pack_message({"signature": self.site.identity.sign(*statement).hex()}, points)


# --- submissions ---


def tampered(change: Callable[[Blocks], Blocks]) -> Federation:
    federation = prepare({})
    federation.tamper = lambda site, phase, blocks: change(blocks) if (site, phase) == (BAD, "upload") else blocks
    return federation


def _flip(block: bytes, place: int = 0) -> bytes:
    return block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :]


def _nan(blocks: Blocks) -> Blocks:
    # The bytes of doubles that are not numbers: no field elements.
    return (*blocks[:2], np.full(len(blocks[2]) // 8, np.nan).tobytes(), *blocks[3:])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_nan, "out-of-range"),
        (lambda b: (*b[:2], b[2][:-8]), "wrong-shape"),
        (lambda b: (*b, b[2]), "wrong-shape"),
        (lambda b: b[:2], "wrong-shape"),
        (lambda b: (b[0], b[1][:-1], *b[2:]), "wrong-shape"),
        (lambda b: (), "undecodable"),
        (lambda b: (b"[]", *b[1:]), "undecodable"),
        (lambda b: (b"{}", *b[1:]), "undecodable"),
        (lambda b: (b"[" * 100_000, *b[1:]), "undecodable"),
        (lambda b: (b[0], _flip(b[1]), *b[2:]), "wrong-signature"),
        (lambda b: (*b[:2], _flip(b[2]), *b[3:]), "wrong-signature"),
        (lambda b: (*b[:2], field.P.to_bytes(8, "little") + b[2][8:], *b[3:]), "out-of-range"),
    ],
)
def test_malformed_submission_is_refused_for_a_reason(change: Callable[[Blocks], Blocks], code: str) -> None:
    played = play(tampered(change))
    assert {site: fault.code for site, fault in played.refused.items()} == {BAD: code}
    assert played.measured.sites == tuple(site for site in names(7) if site != BAD)
    assert_honest_mean(played, played.chosen)


def test_copy_of_another_sites_bytes_is_refused() -> None:
    federation = prepare({})
    federation.tamper = lambda site, phase, blocks: (
        federation.sent["site-01"] if (site, phase) == (BAD, "upload") else blocks
    )
    played = play(federation)
    assert {site: fault.code for site, fault in played.refused.items()} == {BAD: "wrong-signature"}
    assert_honest_mean(played, played.chosen)


def test_copied_ciphertext_under_the_copiers_own_signature_is_noise() -> None:
    """Whoever copies y_1 and shares some key of its own has an update that is noise modulo p to everybody."""

    class Copier(ProtocolAttacker):
        def seal(self, context, update, random_bytes):  # type: ignore[no-untyped-def]
            deals = _deals(context, draw_key(random_bytes), random_bytes)
            return self.submit(context, federation.sent["site-01"][2:], deals)

    federation = prepare({BAD: Copier})
    played = play(federation)
    assert played.code(BAD) == "inconsistent"
    assert_honest_mean(played, played.chosen)


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 2}, {"run": "other"}, {"unit": 2.0}, {"tolerate": 0}])
def test_submission_for_another_context_is_refused(change: dict[str, object]) -> None:
    class Confused(ProtocolAttacker):
        def seal(self, context, update, random_bytes):  # type: ignore[no-untyped-def]
            return self.site.seal(replace(context, **change), update, random_bytes)

    played = play(prepare({BAD: Confused}))
    assert {site: fault.code for site, fault in played.refused.items()} == {BAD: "wrong-signature"}
    assert_honest_mean(played, played.chosen)


def test_two_identities_with_one_key_are_one_site() -> None:
    ends = {site: SealedSite(identity(k), select, True) for k, site in enumerate(names(7), 1)}
    introduced = {site: (end.key_id, end.public_key) for site, end in ends.items()}
    introduced["site-07"] = introduced["site-06"]
    coordinator, refused = SealedCoordinator(select).adopt(introduced)
    assert {site: error.code for site, error in refused.items()} == {"site-07": "key-taken"}
    assert set(coordinator.keys) == EVERYBODY - {"site-07"}


# --- bad messages in the phases ---


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["garbage", "empty", "unsigned", "long"])
def test_malformed_answer_counts_as_none(phase: str, kind: str) -> None:
    def tamper(site: Site, asked: str, blocks: Blocks) -> Blocks:
        if (site, asked) != (BAD, phase):
            return blocks
        changed: dict[str, Blocks] = {
            "garbage": (b"\xff\x00", *blocks[1:]),
            "empty": (),
            "unsigned": (b"{}", *blocks[1:]),
            "long": (*blocks, b"12345678"),
        }
        return changed[kind]

    federation = prepare({}, d=9000)
    federation.tamper = tamper
    played = play(federation)
    assert_honest_mean(played, played.chosen)
    assert played.code(BAD) in {"undecodable", "wrong-shape"}


@pytest.mark.parametrize("phase", ["check", "gram", "ticket", "sum"])
def test_answer_signed_by_another_site_counts_as_none(phase: str) -> None:
    def tamper(site: Site, asked: str, blocks: Blocks) -> Blocks:
        if asked == phase:
            seen[site] = blocks
            if site == BAD:
                return seen["site-01"]
        return blocks

    seen: dict[Site, Blocks] = {}
    federation = prepare({}, d=9000)
    federation.tamper = tamper
    played = play(federation)
    assert BAD not in played.chosen or phase != "check"
    assert_honest_mean(played, played.chosen)
    faults = {**played.measured.faults, **played.opening}
    assert phase == "ticket" or faults[BAD].code == "wrong-signature"


def _forgeries(true: Blocks, federation: Federation, chosen: tuple[Site, ...]) -> dict[str, Blocks]:
    """Wrong sum shares that somebody sends in another site's name, without that site's key."""
    share = field.from_bytes(true[1]).copy()
    share[0] = (int(share[0]) + 1) % field.P
    view = bytes.fromhex(SiteState.from_bytes(federation.states[BAD]).facts["view"])
    statement = sum_statement(federation.context, view, chosen, field.to_bytes(share))
    stranger = identity(int(BAD[-2:])).sign(*statement)
    return {
        "unsigned": pack_message({}, share),
        "under the true signature": (true[0], field.to_bytes(share)),
        "signed by the forger": pack_message({"signature": stranger.hex()}, share),
    }


@pytest.mark.parametrize("how", ["unsigned", "under the true signature", "signed by the forger"])
def test_forged_sum_share_in_another_sites_name_does_not_blame_it(how: str) -> None:
    victim = "site-01"

    def tamper(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if (site, phase) != (victim, "sum"):
            return blocks
        chosen = tuple(SiteState.from_bytes(federation.states[victim]).facts["selected"])
        return _forgeries(blocks, federation, chosen)[how]

    federation = prepare({}, d=9000)
    federation.tamper = tamper
    played = play(federation)
    assert_honest_mean(played, played.chosen)
    (fault,) = played.opening.values()
    assert (fault.site, fault.proven) == (victim, False)
    assert fault.code == ("undecodable" if how == "unsigned" else "wrong-signature")


def test_sum_share_of_another_set_does_not_count() -> None:
    """Signed by its giver, for a set that is not the one to be opened: no share, and no proof of a wrong one."""

    def tamper(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if (site, phase) != (BAD, "sum"):
            return blocks
        facts = SiteState.from_bytes(federation.states[BAD]).facts
        less, view = tuple(facts["selected"][1:]), bytes.fromhex(facts["view"])
        statement = sum_statement(federation.context, view, less, blocks[1])
        return pack_message({"signature": identity(int(BAD[-2:])).sign(*statement).hex()}, blocks[1])

    federation = prepare({}, d=9000)
    federation.tamper = tamper
    played = play(federation)
    assert_honest_mean(played, played.chosen)
    assert {site: (fault.code, fault.proven) for site, fault in played.opening.items()} == {
        BAD: ("wrong-signature", False)
    }


@pytest.mark.parametrize("name", ["wrong-points", "wrong-point", "wrong-sum", "wrong-sum-entry"])
def test_signed_lie_is_proven(name: str) -> None:
    played = play(prepare({BAD: attack(name)}, d=9000))
    (fault,) = [*played.measured.faults.values(), *played.opening.values()]
    assert (fault.site, fault.proven) == (BAD, True)


@pytest.mark.parametrize(("signed", "code"), [(True, "wrong-set"), (False, "wrong-signature")])
def test_ticket_for_another_set_does_not_count_and_proves_nothing(signed: bool, code: str) -> None:
    def tamper(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if (site, phase) != (BAD, "ticket"):
            return blocks
        facts = SiteState.from_bytes(federation.states[BAD]).facts
        less = tuple(facts["selected"][1:])
        statement = ticket_of(federation.context, bytes.fromhex(facts["view"]), tuple(facts["accepted"]), less)
        signer = identity(int(BAD[-2:]) if signed else 1)
        return pack_message({"selected": list(less), "signature": signer.sign(*statement).hex()})

    federation = prepare({}, d=9000)
    federation.tamper = tamper
    played = play(federation)
    assert_honest_mean(played, played.chosen)
    assert {site: (fault.code, fault.proven) for site, fault in played.opening.items()} == {BAD: (code, False)}


# --- hiding from the sketches ---


def test_two_equal_blocks_do_not_cancel() -> None:
    """With signs alone two equal blocks would vanish in half of the sketches; a rotation keeps them apart."""
    for _ in range(6):
        played = play(prepare({BAD: attack("equal-blocks")}, n=5, d=8192, sketches=1))
        assert played.code(BAD) == "inconsistent"


def test_hiding_in_one_frequency_ends_in_one_of_three_ways() -> None:
    """Mostly the gate takes it out; what gets through is left out by the rule, or noticed when the sum is opened."""
    ends = {"gate": 0, "noticed": 0, "unnoticed": 0}
    for _ in range(12):
        federation = prepare({BAD: attack("single-frequency")}, n=5, d=40_960, sketches=1)
        try:
            played = play(federation)
        except HidingSuspected:
            ends["noticed"] += 1
            continue
        if played.code(BAD) == "inconsistent":
            ends["gate"] += 1
            assert_honest_mean(played, played.chosen)
        else:
            ends["unnoticed"] += 1
            assert BAD not in played.chosen
    assert ends["gate"] >= 1
    assert sum(ends.values()) == 12


def test_what_hides_from_every_sketch_is_noticed_when_the_sum_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who knew the seed before committing could hide at will. Given that, it is selected, and then noticed."""
    seed = os.urandom(32)
    for module in (sealed_site, sealed_coordinator):
        monkeypatch.setattr(module, "seed_of", lambda root, nonce: seed)
    federation = prepare({}, n=5, d=2 * N, sketches=1)
    plan = plan_of(federation.context, seed)
    hidden = _vanishing(plan)
    mean = np.mean([federation.updates[site] for site in names(5)], axis=0)
    # An ordinary update, and a part as long as five of them that no sketch shows.
    hidden *= 5.0 / np.linalg.norm(hidden)

    class Hiding(ProtocolAttacker):
        def seal(self, context, update, random_bytes):  # type: ignore[no-untyped-def]
            return self.site.seal(context, mean + flatten(context.digest(), hidden), random_bytes)

    federation.sites[BAD] = Hiding(federation.sites[BAD])  # type: ignore[assignment]
    uploads, _ = seal(federation)
    measured = federation.measure(uploads)
    row = measured.sites.index(BAD)
    # Rounding aside, the sketches show the ordinary part only.
    assert measured.gram[row, row] < 1.1
    chosen = select(federation.context, measured.sites, measured.gram, 1)
    assert BAD in chosen
    with pytest.raises(HidingSuspected, match="somebody hid from the sketches"):
        federation.combine(uploads, chosen)


def _vanishing(plan: SketchPlan) -> NDArray[np.float64]:
    """Two blocks of one frequency zeta that cancel in one sketch: ``s1 zeta^rho1 u + s2 zeta^rho2 v = 0``."""
    angle = np.pi * 1001 / N
    u, v = np.array([1, -1]) * (plan.signs[0] * np.exp(1j * angle * plan.rotations[0].astype(np.int64)))[::-1]
    wave = np.exp(1j * angle * np.arange(N))
    # X^rho turns the coefficients zeta^k into zeta^(k - rho).
    return np.concatenate([(np.conj(u) * wave).real, (np.conj(v) * wave).real])
