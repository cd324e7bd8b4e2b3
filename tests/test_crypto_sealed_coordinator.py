"""A coordinator that cheats in a sealed round: what honest sites refuse, why, and what is gained where they do not.

The sites here are real; the coordinator asks whatever it likes. One honest answer, written down, is the yardstick: a
refusal must come with the code of its reason, and where a site answers, the test says what that gives away.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sealed_federation import Federation, context_for, identity, names, updates_for

from quorsum.client.ledger import FolderLedger, recall, remember, take_round
from quorsum.crypto import field, labels
from quorsum.crypto.identity import Identity
from quorsum.crypto.sealed_coordinator import SealedRound, SealedUpload
from quorsum.crypto.sealed_parameters import SEALED_V1
from quorsum.crypto.sealed_site import PHASES, SealedSite
from quorsum.crypto.sharing import deal_length
from quorsum.crypto.suite import Blocks, RoundContext, Site
from quorsum.errors import CoordinatorFault, KeyMaterialError, RoundFailed, SiteFault, UsageError
from quorsum.selection import select

DIMENSION = 5000
SITES = names(5)
VICTIM = SITES[0]
SIZE = SEALED_V1.degree
Change = Callable[[Blocks], Blocks]


def federation(n: int = 5, updates: Mapping[Site, Any] | None = None, **changes: Any) -> Federation:
    return Federation(context_for(n, DIMENSION, **changes), updates or updates_for(n, DIMENSION))


def edit(blocks: Blocks, **changes: Any) -> Blocks:
    """The same message with other entries in its head."""
    return (json.dumps({**json.loads(blocks[0]), **changes}).encode(), *blocks[1:])


def head(blocks: Blocks) -> dict[str, Any]:
    return dict(json.loads(blocks[0]))


def cheated(phase: str, change: Change, victims: tuple[Site, ...] = SITES, n: int = 5) -> dict[Site, str]:
    """Codes of the refusals when the question of one phase is changed for some sites."""
    round_ = federation(n)
    round_.turn = lambda site, asked, blocks: change(blocks) if asked == phase and site in victims else blocks
    with contextlib.suppress(RoundFailed):
        round_.run()
    return {site: fault.code for (site, asked), fault in round_.refusals.items() if asked == phase}


def everybody(code: str, sites: tuple[Site, ...] = SITES) -> dict[Site, str]:
    return dict.fromkeys(sites, code)


def question(round_: Federation, phase: str, site: Site) -> Blocks:
    """What the honest coordinator asked."""
    return dict(round_.asked)[phase][site]


def answered(round_: Federation, phase: str, site: Site) -> Blocks:
    return dict(round_.answered)[phase][site]


def code_of(round_: Federation, site: Site, phase: str, blocks: Blocks) -> str:
    with pytest.raises(CoordinatorFault) as caught:
        round_.sites[site].answer(round_.context, round_.states[site], phase, blocks, os.urandom, round_.sent[site])
    return caught.value.code


def flip(block: bytes, at: int = 0) -> bytes:
    return block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]


@pytest.fixture(scope="module")
def finished() -> Federation:
    """A round that went well, with all its questions, answers and last states."""
    round_ = federation()
    round_.run()
    assert not round_.refusals
    return round_


# --- opening something else than the one set ---


def test_one_site_alone_is_not_opened() -> None:
    assert cheated("sum", lambda blocks: edit(blocks, selected=[VICTIM])) == everybody("wrong-set")


def test_another_set_than_that_of_the_tickets_is_not_opened() -> None:
    def less(blocks: Blocks) -> Blocks:
        return edit(blocks, selected=head(blocks)["selected"][1:])

    assert cheated("sum", less) == everybody("wrong-set")


def test_second_set_is_not_opened_after_the_first(finished: Federation) -> None:
    asked = question(finished, "sum", VICTIM)
    for site in SITES:
        assert code_of(finished, site, "sum", edit(asked, selected=head(asked)["selected"][1:])) == "asked-twice"
        assert code_of(finished, site, "sum", edit(asked, selected=[VICTIM])) == "asked-twice"


def test_sum_share_is_given_under_one_question_only_but_as_often_as_asked(finished: Federation) -> None:
    again = finished.put(VICTIM, "sum", question(finished, "sum", VICTIM))
    assert again == answered(finished, "sum", VICTIM)


def test_set_below_the_least_size_gets_no_ticket() -> None:
    """The coordinator names the rule; one that keeps a single site makes every site refuse its ticket."""
    round_ = federation(rule="krum")
    uploads = round_.upload()
    round_.measure(uploads)
    given = list(SITES)
    points = {site: answered(round_, "gram", site) for site in given}
    asked = (
        json.dumps({"given": given, "points": {site: head(points[site])["signature"] for site in given}}).encode(),
        *[points[site][1] for site in given],
    )
    for site in SITES:
        assert code_of(round_, site, "ticket", asked) == "cannot-follow"
    with pytest.raises(RoundFailed, match="a sum over fewer than 4 shows too much"):
        round_.combine(uploads, frozenset(SITES[:1]))


def test_combine_of_the_honest_code_takes_no_other_set(finished: Federation) -> None:
    with pytest.raises(UsageError, match="not those of the selection"):
        finished.combine({}, frozenset(SITES[:2]))


# --- rosters, contexts, models, public parts ---


@pytest.mark.parametrize(
    "change",
    [
        {"model": "ab" * 32},
        {"rule": "mean"},
        {"reference": VICTIM},
        {"unit": 2.0},
        {"run": "other"},
        {"round": 2},
        {"attempt": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_question_of_another_context_is_not_answered(finished: Federation, change: dict[str, Any]) -> None:
    """The public part A, the flattening and every signature depend on the context, so it must be one for all."""
    other = replace(finished.context, **change)
    for phase in PHASES:
        with pytest.raises(CoordinatorFault) as caught:
            finished.sites[VICTIM].answer(
                other, finished.states[VICTIM], phase, question(finished, phase, VICTIM), os.urandom, ()
            )
        assert caught.value.code == "wrong-round"


@pytest.mark.parametrize("minority", [1, 2])
def test_sites_told_different_contexts_never_make_a_certificate(minority: int) -> None:
    """Two groups in two contexts (say, two models, hence two public parts A): at most one of them has a quorum."""
    one, other = federation(), federation(model="cd" * 32)
    for round_, group in ((one, SITES[minority:]), (other, SITES[:minority])):
        # The other group's places are filled by the coordinator; they seal there but sign nothing.
        round_.turn = lambda site, phase, blocks, group=group: blocks if site in group else (b"",)  # type: ignore[misc]
        try:
            round_.measure(round_.upload())
        except RoundFailed as failed:
            assert "signed the root" in str(failed)  # noqa: PT017
    reached = ["check" in dict(round_.asked) for round_ in (one, other)]
    assert reached == [minority == 1, False]


def test_coordinator_that_names_another_reference_to_each_site_gets_nowhere() -> None:
    """The reference is in the digest, so five references are five contexts, in none of which a quorum signs."""
    for place, site in enumerate(SITES):
        round_ = federation(rule="fltrust", reference=SITES[place - 1])
        round_.turn = lambda asked, phase, blocks, site=site: blocks if asked == site else (b"",)  # type: ignore[misc]
        uploads = round_.upload()
        with pytest.raises(RoundFailed, match="only 1 sites signed the root, and 4 are needed"):
            round_.measure(uploads)
        # Nor does what a site has sealed in one of them pass for a submission in another.
        with pytest.raises(SiteFault) as caught:
            round_.round.accept(replace(round_.context, reference=site), site, round_.sent[site])
        assert caught.value.code == "wrong-signature"


def test_round_whose_reference_was_dropped_opens_no_sum() -> None:
    """Dropped by the coordinator, or silent: sites that have no row of the reference sign no set."""
    round_ = federation(6, rule="fltrust", reference=VICTIM)
    uploads = round_.upload()
    del uploads[VICTIM]
    measured = round_.measure(uploads)
    assert VICTIM not in measured.sites
    with pytest.raises(RoundFailed, match="reference site 'site-01' has no usable update in this round"):
        round_.combine(uploads, frozenset(SITES[1:]))
    points = dict(round_.answered)["gram"]
    given = {site: head(blocks)["signature"] for site, blocks in points.items()}
    asked = (json.dumps({"given": [*given], "points": given}).encode(), *[blocks[1] for blocks in points.values()])
    for site in given:
        with pytest.raises(CoordinatorFault, match="reference site 'site-01'") as caught:
            round_.sites[site].answer(round_.context, round_.states[site], "ticket", asked, os.urandom)
        assert caught.value.code == "cannot-follow"


def test_fltrust_opens_the_mean_of_who_agrees_with_the_reference() -> None:
    updates = updates_for(6, DIMENSION)
    updates["site-03"] = -updates["site-03"]
    round_ = federation(6, updates, rule="fltrust", reference=VICTIM)
    _, chosen, opened = round_.run()
    assert chosen == set(names(6)) - {VICTIM, "site-03"}
    clear = np.mean([updates[site] for site in chosen], axis=0)
    assert np.linalg.norm(opened.total - clear) < 0.02 * np.linalg.norm(clear)


def test_certificates_of_another_round_do_not_count(finished: Federation) -> None:
    """Replayed from a round of the same sites: roots, views and tickets are signed over the context's digest."""
    for phase, name in (("check", "signatures"), ("gram", "views"), ("sum", "tickets")):
        stale = head(question(finished, phase, VICTIM))[name]
        assert cheated(phase, lambda blocks, name=name, stale=stale: edit(blocks, **{name: stale})) == everybody(  # type: ignore[misc]
            "no-certificate"
        )


def test_certificates_of_another_kind_do_not_count() -> None:
    """A signature of the view is none of the root, and so on: labels separate what is signed."""
    round_ = federation()
    kept: dict[str, Any] = {}

    def swap(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if phase == "check":
            kept["root"] = head(blocks)["signatures"]
        return edit(blocks, views=kept["root"]) if phase == "gram" else blocks

    round_.turn = swap
    with pytest.raises(RoundFailed):
        round_.run()
    assert {fault.code for fault in round_.refusals.values()} == {"no-certificate"}


def test_tickets_of_another_view_do_not_count(finished: Federation) -> None:
    """A ticket names the view: signed by the same sites for the same set but another view, it is worth nothing."""
    round_ = federation()

    def forged(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if phase != "sum":
            return blocks
        text = "\n".join(head(blocks)["selected"]).encode()
        dealers = "\n".join(SITES).encode()
        parts = (round_.context.digest(), bytes(32), dealers, text)
        tickets = {s: identity(k).sign(labels.TICKET, *parts).hex() for k, s in enumerate(SITES, 1)}
        return edit(blocks, tickets=tickets)

    round_.turn = forged
    with pytest.raises(RoundFailed):
        round_.run()
    assert {key: fault.code for key, fault in round_.refusals.items()} == {(s, "sum"): "no-certificate" for s in SITES}


def seal_with(context: RoundContext, site: Site = VICTIM, **options: Any) -> CoordinatorFault:
    end = SealedSite(identity(SITES.index(site) + 1), select, accept_small_models=True, **options)
    with pytest.raises(CoordinatorFault) as caught:
        end.seal(context, updates_for(5, DIMENSION)[VICTIM], os.urandom)
    return caught.value


def test_roster_without_the_sites_key_is_refused(finished: Federation) -> None:
    stranger = Identity.generate(os.urandom).public().hex
    keys = (stranger, *finished.context.keys[1:])
    assert seal_with(replace(finished.context, keys=keys)).code == "wrong-roster"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"collude": 0}, "wrong-bound"),
        ({"tolerate": 2}, "wrong-bound"),
        ({"collude": 2}, "wrong-bound"),
        ({"clip": False}, "wrong-bound"),
        ({"keys": ()}, "wrong-roster"),
    ],
)
def test_bounds_that_do_not_hold_are_refused(finished: Federation, changes: dict[str, Any], code: str) -> None:
    assert seal_with(replace(finished.context, **changes)).code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rule": "fltrust"}, "wrong-reference"),
        ({"rule": "fltrust", "reference": "site-06"}, "wrong-reference"),
        ({"rule": "multi-krum", "reference": VICTIM}, "wrong-reference"),
        ({"rule": "bucketing+mean"}, "wrong-rule"),
        ({"rule": "median"}, "wrong-rule"),
        ({"rule": "anything"}, "wrong-rule"),
    ],
)
def test_selection_that_the_site_could_not_repeat_is_refused(
    finished: Federation, changes: dict[str, Any], code: str
) -> None:
    assert seal_with(replace(finished.context, **changes)).code == code


def test_tau_below_the_sites_policy_is_refused(finished: Federation) -> None:
    """The coordinator announces tau; if two sites may collude, a round that withstands one gives the update away."""
    fault = seal_with(finished.context, least_collude=2)
    assert (fault.code, "tau = 1" in fault.message) == ("wrong-bound", True)


def test_key_listed_twice_in_two_spellings_is_refused(finished: Federation) -> None:
    """It would count as two holders and two signers."""
    keys = (*finished.context.keys[:4], finished.context.keys[3].upper())
    assert keys[4] != keys[3]
    assert seal_with(replace(finished.context, keys=keys)).code == "wrong-roster"


@pytest.mark.parametrize("key", ["", "zz" * 64, "00" * 64], ids=["empty", "no-hex", "small-order"])
def test_malformed_key_in_the_roster_is_refused(finished: Federation, key: str) -> None:
    assert seal_with(replace(finished.context, keys=(*finished.context.keys[:4], key))).code == "wrong-roster"


@pytest.mark.parametrize("name", ["", "site-03\nsite-04", "a\x00"])
def test_names_that_read_in_two_ways_are_refused(finished: Federation, name: str) -> None:
    """With a site called "b\\nc" a ticket for {a, b, c} would be one for {a, "b\\nc"} as well: two sets, two sums."""
    assert seal_with(replace(finished.context, sites=(*SITES[:4], name))).code == "wrong-roster"


# --- root, nonce, seed ---


def test_root_without_the_sites_submission_is_not_signed() -> None:
    def without(blocks: Blocks) -> Blocks:
        commitments = head(blocks)["commitments"]
        return edit(blocks, commitments={**commitments, VICTIM: commitments[SITES[1]]})

    assert cheated("root", without) == {VICTIM: "wrong-root"}
    assert cheated("root", lambda blocks: edit(blocks, commitments={}))[VICTIM] == "wrong-root"


def test_site_given_another_root_goes_no_further() -> None:
    """It signs that root, but no quorum has: it takes part in nothing else, and its signature helps nobody."""
    round_ = federation()

    def other_root(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if (site, phase) != (VICTIM, "root"):
            return blocks
        return edit(blocks, commitments={**head(blocks)["commitments"], SITES[1]: "00" * 32})

    round_.turn = other_root
    measured = round_.measure(round_.upload())
    assert {key: fault.code for key, fault in round_.refusals.items()} == {(VICTIM, "check"): "no-certificate"}
    assert VICTIM not in measured.sites
    assert measured.faults[VICTIM].code == "wrong-signature"


def test_certified_root_stands_for_no_other_deals_or_uploads() -> None:
    for at in (0, 5 * 32, 7 * 32):
        assert cheated("check", lambda b, at=at: (b[0], flip(b[1], at), *b[2:])) == everybody("wrong-root")  # type: ignore[misc]


def test_other_nonce_is_refused() -> None:
    """Chosen after the root is known, it would choose the sketches."""
    assert cheated("check", lambda blocks: edit(blocks, nonce="00" * 32)) == everybody("wrong-nonce")


def test_dealer_left_out_after_the_root_is_noticed() -> None:
    def dropped(blocks: Blocks) -> Blocks:
        length = deal_length(5, sealed=True)
        return (
            edit(blocks, dealers=head(blocks)["dealers"][:4])[0],
            blocks[1][: 4 * 6 * 32],
            blocks[2][: 3 * length],
            blocks[3][: 4 * 4 * SIZE * 8],
        )

    assert cheated("check", dropped) == {**everybody("wrong-root"), SITES[4]: "wrong-view"}


# --- Y ---


def altered(sketches: bytes, dealer: int, by: int = 1, sketch: int = 0, coordinate: int = 0) -> bytes:
    values = np.frombuffer(sketches, "<u8").reshape(-1, 4, SIZE).copy()
    values[dealer, sketch, coordinate] = (int(values[dealer, sketch, coordinate]) + by) % field.P
    return values.tobytes()


def test_wrong_sketch_of_the_sites_own_upload_is_refused() -> None:
    change: Change = lambda blocks: (*blocks[:3], altered(blocks[3], 0))  # noqa: E731
    assert cheated("check", change) == {VICTIM: "wrong-sketch"}


def test_site_given_another_list_of_sketches_gives_no_points() -> None:
    """Another Y of somebody else for one site: it signs that view, nobody else has, and it gives no point for it."""
    round_ = federation()

    def other(site: Site, phase: str, blocks: Blocks) -> Blocks:
        return (*blocks[:3], altered(blocks[3], 1)) if (site, phase) == (VICTIM, "check") else blocks

    round_.turn = other
    uploads = round_.upload()
    measured = round_.measure(uploads)
    assert measured.faults[VICTIM].code == "wrong-signature"
    assert VICTIM not in dict(round_.asked)["gram"], "the honest code does not even ask"
    gram = question(round_, "gram", SITES[1])
    assert code_of(round_, VICTIM, "gram", gram) == "no-certificate"


def test_split_lists_of_sketches_make_no_certificate() -> None:
    """Two lists for two groups (each with its own sketches right): neither is signed by a quorum, no point leaves."""
    round_ = federation()

    def split(site: Site, phase: str, blocks: Blocks) -> Blocks:
        # Sites 1 and 2 see another Y of site 5; sites 3 and 4 the true one; site 5 sees its own right.
        return (*blocks[:3], altered(blocks[3], 4)) if phase == "check" and site in SITES[:2] else blocks

    round_.turn = split
    with pytest.raises(RoundFailed, match="only 3 sites signed the view, and 4 are needed"):
        round_.measure(round_.upload())
    assert "gram" not in dict(round_.asked)


def test_false_sketch_of_a_site_that_was_cut_off_is_not_measured() -> None:
    """Y of a site that does not sign the view may be false, and would show <delta, z_j> of every other sketch z_j.

    So there is no point of such a site's row: only signers of the view are measured.
    """
    round_ = federation()
    uploads = round_.upload()
    blocks = list(uploads[VICTIM].blocks)
    blocks[0] = np.array([12345], "<u8").tobytes() + blocks[0][8:]
    measured = round_.measure({**uploads, VICTIM: replace(uploads[VICTIM], blocks=blocks)})
    assert round_.refusals[VICTIM, "check"].code == "wrong-sketch"
    assert VICTIM not in measured.sites
    assert measured.faults[VICTIM].code == "no-view"
    for site in SITES[1:]:
        # 4 sites: 10 pairs. With the row of the victim there would be 15.
        assert len(answered(round_, "gram", site)[1]) == 8 * 10


@dataclass(frozen=True)
class Impostor(SealedSite):
    """The coordinator in the place of a site: the site's public key, another signing key."""

    public: bytes = b""

    @property
    def public_key(self) -> bytes:
        return self.public


def impersonated(round_: Federation, site: Site, update: Any) -> SealedUpload:
    """A submission that the coordinator makes up in the name of a site, without any secret of it."""
    own = Identity.generate(os.urandom)
    fake = Impostor(own, select, True, public=round_.sites[site].public_key)
    _, blocks = fake.seal(round_.context, update, os.urandom)
    keys = {s: round_.sites[s].public_key for s in round_.context.sites} | {site: own.public().to_bytes()}
    return SealedRound(select, keys, lambda _, upload: upload, bytes(32)).accept(round_.context, site, blocks)


@pytest.mark.parametrize(("n", "tau", "cut_off", "rule"), [(5, 1, 1, "mean"), (10, 2, 2, "multi-krum")])
def test_submission_made_up_in_the_name_of_a_site_is_not_measured(n: int, tau: int, cut_off: int, rule: str) -> None:
    """Other sites do not see who signed a submission. Made-up ones would fill the set, so that a sum over tau + 3
    sites is one over fewer honest ones, and show functionals of all other sketches. Whoever was impersonated does not
    sign the root, hence not the view, hence is in no set. (With 10 sites and tau = 2, three sites could be cut off.)
    """
    round_ = federation(n, tolerate=tau, collude=tau, rule=rule)
    sites = round_.context.sites
    uploads = round_.upload()
    gone = sites[-cut_off:]
    uploads |= {site: impersonated(round_, site, round_.updates[VICTIM]) for site in gone}
    measured = round_.measure(uploads)
    assert all(round_.refusals[site, "root"].code == "wrong-root" for site in gone)
    assert measured.sites == sites[:-cut_off]
    m = n - cut_off
    for site in measured.sites:
        assert len(answered(round_, "gram", site)[1]) == 8 * m * (m + 1) // 2
    assert measured.tolerate is not None
    chosen = select(round_.context, measured.sites, measured.gram, measured.tolerate)
    assert chosen.isdisjoint(gone)
    round_.combine(uploads, chosen)


# --- deals ---


@pytest.mark.parametrize("where", ["corrupted", "swapped"])
def test_deal_other_than_the_dealers_is_noticed(where: str) -> None:
    """Another polynomial for one holder, made by the coordinator: the root stands for every deal."""
    length = deal_length(5, sealed=True)

    def change(blocks: Blocks) -> Blocks:
        deals = blocks[2]
        moved = flip(deals, 100) if where == "corrupted" else deals[length : 2 * length] + deals[:length]
        return (*blocks[:2], moved + deals[len(moved) :], blocks[3])

    assert cheated("check", change) == everybody("wrong-deal")


def test_deals_of_another_holder_are_noticed() -> None:
    round_ = federation()
    seen: dict[Site, Blocks] = {}

    def exchange(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if phase != "check":
            return blocks
        seen[site] = blocks
        return blocks if site == VICTIM else (*blocks[:2], seen[VICTIM][2], blocks[3])

    round_.turn = exchange
    with pytest.raises(RoundFailed, match="signed the view"):
        round_.run()
    assert {key: f.code for key, f in round_.refusals.items()} == {(s, "check"): "wrong-deal" for s in SITES[1:]}


def test_site_given_no_deals_refuses() -> None:
    assert cheated("check", lambda blocks: (*blocks[:2], b"", blocks[3])) == everybody("wrong-shape")


# --- certificates ---


@pytest.mark.parametrize(("phase", "name"), [("check", "signatures"), ("gram", "views"), ("sum", "tickets")])
@pytest.mark.parametrize("how", ["too-few", "zeros", "one-for-all", "swapped"])
def test_certificate_without_a_quorum_is_refused(phase: str, name: str, how: str) -> None:
    def change(blocks: Blocks) -> Blocks:
        given: dict[Site, str] = head(blocks)[name]
        first = next(iter(given.values()))
        forged = {
            "too-few": dict(list(given.items())[:3]),
            "zeros": {**given, SITES[0]: "00" * 64, SITES[1]: "00" * 64},
            "one-for-all": dict.fromkeys(SITES, first),
            "swapped": {**given, SITES[0]: given[SITES[1]], SITES[1]: given[SITES[0]]},
        }[how]
        return edit(blocks, **{name: forged})

    assert cheated(phase, change) == everybody("no-certificate")


@pytest.mark.parametrize(("phase", "name"), [("check", "signatures"), ("gram", "views"), ("sum", "tickets")])
def test_signature_of_a_stranger_is_refused(phase: str, name: str) -> None:
    def change(blocks: Blocks) -> Blocks:
        return edit(blocks, **{name: {**head(blocks)[name], "stranger": "00" * 64}})

    assert cheated(phase, change) == everybody("undecodable")


# --- dropped and forged answers ---


def without_answer(blocks: Blocks, sites: tuple[Site, ...]) -> Blocks:
    given = head(blocks)["answered"]
    kept = [place for place, site in enumerate(given) if site not in sites]
    return edit((blocks[0], *[blocks[1 + place] for place in kept]), answered=[given[place] for place in kept])


def test_site_whose_own_check_answer_is_dropped_gives_no_points() -> None:
    codes = cheated("gram", lambda blocks: without_answer(blocks, (VICTIM,)), victims=(VICTIM,))
    assert codes == {VICTIM: "own-answer-missing"}


def test_dropping_an_answer_shows_fewer_points_of_the_same_polynomials() -> None:
    """One site is told of fewer answers: it gives points of fewer pairs, the ones it would give anyway."""
    round_ = federation()
    kept: dict[str, bytes] = {}

    def keep(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if site == VICTIM and phase != "upload":
            kept[phase] = round_.states[VICTIM]
        return blocks

    round_.tamper = keep
    round_.measure(round_.upload())
    full = np.frombuffer(answered(round_, "gram", VICTIM)[1], "<u8")
    # From the state before the points were given, the same site would have answered the other question.
    less = without_answer(question(round_, "gram", VICTIM), (SITES[4],))
    _, blocks = round_.sites[VICTIM].answer(round_.context, kept["check"], "gram", less, os.urandom)
    pairs = [(i, j) for i in range(5) for j in range(i, 5)]
    of_four = [k for k, (_, j) in enumerate(pairs) if j < 4]
    np.testing.assert_array_equal(np.frombuffer(blocks[1], "<u8"), full[of_four])


def test_dropping_two_answers_leaves_nothing_to_measure() -> None:
    codes = cheated("gram", lambda blocks: without_answer(blocks, SITES[3:]), victims=SITES[:3])
    assert codes == everybody("too-few-dealers", SITES[:3])


def test_forged_check_answer_is_refused() -> None:
    """Somebody else's values, or complaints that it did not make, would decide who leaves."""
    assert cheated("gram", lambda b: (b[0], flip(b[1]), *b[2:])) == everybody("wrong-signature")

    def complain(blocks: Blocks) -> Blocks:
        return edit(blocks, complaints={**head(blocks)["complaints"], SITES[2]: [VICTIM]})

    assert cheated("gram", complain) == everybody("wrong-signature")


def test_forged_or_unsigned_points_get_no_ticket() -> None:
    assert cheated("ticket", lambda b: (b[0], flip(b[1]), *b[2:])) == everybody("wrong-signature")

    def unsigned(blocks: Blocks) -> Blocks:
        points = head(blocks)["points"]
        return edit(blocks, points={site: points[site] for site in SITES[1:]})

    assert cheated("ticket", unsigned) == everybody("wrong-signature")


def test_points_of_too_few_holders_get_no_ticket() -> None:
    """3 of 5: no liar could be told from them. 4 of 5 decode to the same matrix, so dropping one gains nothing."""

    def of(count: int) -> Change:
        def change(blocks: Blocks) -> Blocks:
            return (edit(blocks, given=head(blocks)["given"][:count])[0], *blocks[1 : count + 1])

        return change

    assert cheated("ticket", of(3)) == everybody("cannot-follow")
    assert cheated("ticket", of(4)) == {}


def test_site_dropped_at_the_ticket_gives_no_sum_share() -> None:
    round_ = federation()
    round_.tamper = lambda site, phase, blocks: blocks if (site, phase) != (VICTIM, "ticket") else None
    round_.turn = lambda site, phase, blocks: blocks if (site, phase) != (VICTIM, "ticket") else (b"",)
    round_.run()
    assert code_of(round_, VICTIM, "sum", question(round_, "sum", SITES[1])) == "out-of-order"


# --- order and repetition ---


@pytest.mark.parametrize("phase", PHASES[1:])
def test_phase_before_its_predecessors_is_refused(finished: Federation, phase: str) -> None:
    round_ = federation()
    round_.upload()
    for site in SITES:
        assert code_of(round_, site, phase, question(finished, phase, site)) == "out-of-order"


def test_gram_and_ticket_cannot_be_skipped() -> None:
    round_ = federation()
    kept: dict[str, bytes] = {}

    def keep(site: Site, phase: str, blocks: Blocks) -> Blocks:
        if site == VICTIM:
            kept[phase] = round_.states[VICTIM]
        return blocks

    round_.tamper = keep
    round_.run()
    for skipped, asked in (("root", "gram"), ("check", "ticket"), ("check", "sum"), ("gram", "sum")):
        # The state right after `skipped`, then a later phase but one.
        round_.states[VICTIM] = kept[skipped]
        assert code_of(round_, VICTIM, asked, question(round_, asked, VICTIM)) == "out-of-order"


def test_unknown_phase_is_refused(finished: Federation) -> None:
    assert code_of(finished, VICTIM, "open", ()) == "unknown-phase"


@pytest.mark.parametrize("phase", PHASES)
def test_phase_asked_again_gets_the_same_answer_and_never_another(finished: Federation, phase: str) -> None:
    asked = question(finished, phase, VICTIM)
    assert finished.put(VICTIM, phase, asked) == answered(finished, phase, VICTIM)
    # The same meaning in other bytes is another question, too: nothing depends on how JSON is read.
    assert code_of(finished, VICTIM, phase, (asked[0] + b" ", *asked[1:])) == "asked-twice"


@pytest.mark.parametrize("blocks", [(), (b"[]",), (b"{}", b"x")], ids=repr)
@pytest.mark.parametrize("phase", PHASES)
def test_garbage_is_refused_by_name(phase: str, blocks: Blocks) -> None:
    codes = cheated(phase, lambda _: blocks)
    assert set(codes) == set(SITES)
    assert set(codes.values()) <= {"undecodable", "wrong-shape", "wrong-root"}


# --- restarts ---


def before_root(round_: Federation, folder: Path) -> FolderLedger:
    book = FolderLedger(folder)
    take_round(book, round_.context)
    remember(book, round_.context, round_.states[VICTIM], round_.sent[VICTIM])
    return book


def put_on_disk(round_: Federation, folder: Path, phase: str, blocks: Blocks) -> Blocks:
    """One question to a site that has just been started: nothing but what its folder holds."""
    book = FolderLedger(folder)
    context, state = recall(book, round_.context.digest().hex())
    state, answer = round_.sites[VICTIM].answer(context, state, phase, blocks, os.urandom, book.read_upload())
    remember(book, context, state)
    return answer


def on_disk(round_: Federation, folder: Path, phase: str, blocks: Blocks) -> str:
    with pytest.raises(CoordinatorFault) as caught:
        put_on_disk(round_, folder, phase, blocks)
    return caught.value.code


def test_site_restarted_between_all_phases_signs_nothing_twice(tmp_path: Path) -> None:
    """Killed after each write and before each answer: asked again it repeats itself, asked otherwise it refuses."""
    round_ = federation()
    uploads = round_.upload()
    before_root(round_, tmp_path)
    round_.measure(uploads)
    for phase in ("root", "check", "gram"):
        asked = question(round_, phase, VICTIM)
        lost = put_on_disk(round_, tmp_path, phase, asked)
        assert put_on_disk(round_, tmp_path, phase, asked) == lost == answered(round_, phase, VICTIM)
        assert on_disk(round_, tmp_path, phase, (asked[0] + b" ", *asked[1:])) == "asked-twice"


def test_restarted_site_gives_one_sum_share_and_seals_no_second_update(tmp_path: Path) -> None:
    round_ = federation()
    uploads = round_.upload()
    before_root(round_, tmp_path)
    measured = round_.measure(uploads)
    assert measured.tolerate is not None
    round_.combine(uploads, select(round_.context, measured.sites, measured.gram, measured.tolerate))
    for phase in PHASES:
        assert put_on_disk(round_, tmp_path, phase, question(round_, phase, VICTIM)) == answered(round_, phase, VICTIM)
    other = edit(question(round_, "sum", VICTIM), selected=[VICTIM])
    assert on_disk(round_, tmp_path, "sum", other) == "asked-twice"
    for again in (round_.context, replace(round_.context, attempt=2), replace(round_.context, model="ef" * 32)):
        with pytest.raises(CoordinatorFault) as caught:
            take_round(FolderLedger(tmp_path), again)
        assert caught.value.code == "replayed-round"


def test_site_killed_before_the_write_has_answered_nothing(tmp_path: Path) -> None:
    """The write comes first, so what was not written has not left: the site is free to answer another question."""
    round_ = federation()
    uploads = round_.upload()
    before_root(round_, tmp_path)
    round_.measure(uploads)
    asked = question(round_, "root", VICTIM)
    context, state = recall(FolderLedger(tmp_path), round_.context.digest().hex())
    round_.sites[VICTIM].answer(context, state, "root", asked, os.urandom, ())
    (tmp_path / "ledger.json.new").write_bytes(b'{"seen": {"ru')  # half a record, never moved into place
    assert put_on_disk(round_, tmp_path, "root", asked) == answered(round_, "root", VICTIM)


@pytest.mark.parametrize("damage", [b"", b'{"seen"', b"\xff\xfe"], ids=["empty", "cut", "noise"])
def test_damaged_ledger_stops_the_site(tmp_path: Path, damage: bytes) -> None:
    round_ = federation()
    round_.upload()
    before_root(round_, tmp_path)
    (tmp_path / "ledger.json").write_bytes(damage)
    for attempt in (
        lambda: take_round(FolderLedger(tmp_path), replace(round_.context, round=2)),
        lambda: recall(FolderLedger(tmp_path), round_.context.digest().hex()),
    ):
        with pytest.raises(KeyMaterialError) as caught:
            attempt()  # type: ignore[no-untyped-call]
        assert caught.value.code == "ledger-damaged"


@pytest.mark.parametrize("cut", [0, 1, 100, 20_000], ids=lambda cut: f"kept-{cut}")
def test_damaged_state_answers_nothing(cut: int) -> None:
    round_ = federation()
    round_.upload()
    round_.states[VICTIM] = round_.states[VICTIM][:cut]
    assert code_of(round_, VICTIM, "root", (b"{}",)) == "unknown-round"


def test_state_with_a_flipped_byte_answers_nothing(finished: Federation) -> None:
    round_ = federation()
    round_.upload()
    round_.states[VICTIM] = flip(round_.states[VICTIM], 2000)
    assert code_of(round_, VICTIM, "root", (b"{}",)) == "unknown-round"


def test_ledger_of_a_round_that_was_never_sealed_answers_nothing(tmp_path: Path, finished: Federation) -> None:
    """Killed while training: the round is taken, nothing is sealed, and nothing can be asked."""
    take_round(FolderLedger(tmp_path), finished.context)
    context, state = recall(FolderLedger(tmp_path), finished.context.digest().hex())
    with pytest.raises(CoordinatorFault) as caught:
        finished.sites[VICTIM].answer(context, state, "root", question(finished, "root", VICTIM), os.urandom)
    assert caught.value.code == "unknown-round"


def test_lost_upload_file_signs_no_view(tmp_path: Path) -> None:
    """Without its own upload the site cannot repeat its sketch, so it refuses a view."""
    round_ = federation()
    uploads = round_.upload()
    book = before_root(round_, tmp_path)
    round_.measure(uploads)
    put_on_disk(round_, tmp_path, "root", question(round_, "root", VICTIM))
    blocks = book.read_upload()
    book.write_upload((*blocks[:2], flip(blocks[2]), *blocks[3:]))
    assert on_disk(round_, tmp_path, "check", question(round_, "check", VICTIM)) == "wrong-sketch"
