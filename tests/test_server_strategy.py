"""Defences over rounds in a run: who is not invited any more, and what that changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import honest_update, learning_app, model

from quorsum import arrays
from quorsum.aggregation.reputation import Reputation, ReputationPolicy, Standing
from quorsum.aggregation.sybils import SybilPolicy
from quorsum.client import seal
from quorsum.crypto import Identity, SealedCoordinator, SealedSite
from quorsum.crypto.plain import PlainCoordinator, PlainSite
from quorsum.crypto.suite import CoordinatorSuite, SiteSuite
from quorsum.selection import select
from quorsum.server import QuorumResult, QuorumStrategy
from quorsum.server.checkpoint import RunState
from quorsum.simulation.grid import LocalGrid
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS

BAD = {"site-04", "site-09"}
# Three rounds suffice, so that tests need not play twenty.
QUICK = ReputationPolicy(false_alarm=0.02, patience=2, sentence=4)
Learn = Callable[[int, int], np.ndarray]


def flipping(partition: int, number: int) -> np.ndarray:
    return honest_update(partition, number) * np.float32(-1 if f"site-{partition + 1:02d}" in BAD else 1)


def run(
    suite: str,
    *,
    rounds: int = 9,
    sites: int = 10,
    learn: Learn = flipping,
    wrap: Callable[[int, SiteSuite], SiteSuite] = lambda partition, site: site,
    **options: Any,
) -> QuorumResult:
    def end(partition: int) -> SiteSuite:
        if suite == "plain":
            return PlainSite()
        return wrap(partition, SealedSite(Identity.generate(os.urandom), select, accept_small_models=True))

    coordinator: CoordinatorSuite = PlainCoordinator() if suite == "plain" else SealedCoordinator(select)
    settings = {"rule": "spectral", "tolerate": 2, "reputation": QUICK, "fraction_evaluate": 0.0} | options
    with LocalGrid([learning_app([seal(end(p))], learn) for p in range(sites)]) as grid:
        strategy = QuorumStrategy(coordinator, min_available_nodes=sites, **settings)
        return strategy.start(grid, model(), rounds, timeout=120)


def away(result: QuorumResult) -> list[set[str]]:
    return [set(record.quarantined) for record in result.rounds]


def test_attackers_are_not_invited_any_more_and_come_back_after_their_sentence() -> None:
    result = run("plain")
    assert away(result) == [set()] * 3 + [BAD] * 4 + [set()] * 2
    third, fourth = result.rounds[2], result.rounds[3]
    assert not BAD & set(fourth.invited)
    assert not BAD & set(fourth.rejected), "who was not invited was not rejected"
    assert fourth.codes["site-04"] == "quarantined"
    assert fourth.reasons["site-04"].startswith("in quarantine until round 7: left out by the rule")
    assert any(note.startswith("site site-09: in quarantine until round 7, offence 1") for note in third.notes)
    assert all(record.failed is None for record in result.rounds)


def test_sealed_too() -> None:
    """Six sites, tau = f = 1: the bound is five."""
    result = run("sealed", sites=6, tolerate=1, rounds=4)
    assert away(result) == [set()] * 3 + [{"site-04"}]
    assert all(record.failed is None for record in result.rounds)
    assert len(result.rounds[3].invited) == 5


def test_without_a_policy_everybody_is_invited() -> None:
    assert away(run("plain", reputation=None)) == [set()] * 9


def test_quarantine_does_not_lower_f_unless_it_is_asked_to() -> None:
    """All attackers sit, and the rule goes on dropping two of the eight honest sites; or it does not."""
    kept = run("plain", rounds=4).rounds[3]
    assert len(kept.invited) == 8
    assert len(kept.accepted) == 6
    counted = run("plain", rounds=4, reputation=replace(QUICK, count_off=True)).rounds[3]
    assert len(counted.accepted) == 8


def test_counting_off_an_honest_site_leaves_the_rule_one_attacker_short() -> None:
    """Why it is off: two attackers frame two honest sites, wait until these are counted off, and strike."""
    victims = (0, 1)

    def learn(partition: int, number: int) -> np.ndarray:
        if partition in victims:
            # Honest, and unlike the others: the attackers need to do nothing but stay in the crowd.
            return honest_update(partition, number) * np.float32(0.2)
        if partition in (3, 8) and number > 4:
            return (honest_update(partition, number) * np.float32(-20)).astype(np.float32)
        return honest_update(partition, number)

    safe = run("plain", rounds=6, learn=learn)
    assert away(safe)[3:] == [{"site-01", "site-02"}] * 3
    fallen = run("plain", rounds=6, learn=learn, reputation=replace(QUICK, count_off=True))
    assert np.mean(arrays.flatten(safe.arrays)) > 2.0
    assert np.mean(arrays.flatten(fallen.arrays)) < 0.0


@pytest.mark.parametrize(
    ("sites", "collude", "count_off", "away"),
    [
        # n >= 2 tau + 2 f + 1 = 9: one of ten can sit, of nine nobody; with tau = 1 the bound is 7.
        (10, None, False, 1),
        (9, None, False, 0),
        (10, 1, False, 2),
        (11, None, False, 2),
        # With one counted off the bound is 7, with two 5; tau stays 2.
        (10, None, True, 2),
        (7, None, True, 2),
        (6, None, True, 0),
    ],
)
def test_as_many_stay_as_the_suite_needs(sites: int, collude: int | None, count_off: bool, away: int) -> None:
    strategy = QuorumStrategy(tolerate=2, collude=collude, reputation=replace(QUICK, count_off=count_off))
    sentenced = Reputation({site: Standing(1.0, 1, 9) for site in BAD})
    state = RunState("run", 2, 4, 4, 1.0, 4, model(), reputation=sentenced)
    present = [f"site-{number:02d}" for number in range(1, 12) if f"site-{number:02d}" not in BAD][: sites - 2]
    assert len(strategy._serving(state, [*present, *sorted(BAD)])) == away


def test_what_a_site_signed_sends_it_into_quarantine_at_once() -> None:
    def wrap(partition: int, site: SiteSuite) -> SiteSuite:
        return PROTOCOL_ATTACKS["wrong-points"].wrap(site) if partition == 3 else site

    options: dict[str, Any] = {"sites": 6, "tolerate": 1, "reputation": ReputationPolicy()}
    result = run("sealed", rounds=2, learn=honest_update, wrap=wrap, **options)
    assert away(result) == [set(), {"site-04"}]
    assert "wrong points" in result.rounds[1].reasons["site-04"]


def test_what_anybody_could_have_sent_proves_nothing() -> None:
    """A NaN under ``plain`` may be somebody else's, in this site's name."""

    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number) * np.float32(np.nan if partition == 3 else 1)

    assert away(run("plain", rounds=3, learn=learn)) == [set()] * 3


def test_rules_that_weigh_everybody_have_a_worst_too() -> None:
    assert away(run("plain", rounds=5, rule="geometric-median"))[3:] == [BAD] * 2


def test_copies_are_found_although_the_rule_likes_them() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        own = honest_update(3 if partition == 8 else partition, number)
        return own + np.float32(0.5) * np.random.default_rng([3 if partition == 8 else partition, number]).normal(
            size=own.shape
        ).astype(np.float32)

    policy = replace(QUICK, sybils=SybilPolicy())
    assert not any(sites - BAD for sites in away(run("plain", rounds=12, learn=learn, reputation=policy)))
    assert any(sites == BAD for sites in away(run("plain", rounds=12, learn=learn, reputation=policy)))


@pytest.mark.parametrize("rule", ["monna", "fltrust"])
def test_the_reference_is_never_sent_away(rule: str) -> None:
    result = run("plain", rule=rule, reference="site-05", rounds=6)
    assert all("site-05" in record.invited for record in result.rounds)
    assert away(result)[-1] == BAD


def names(sets: Sequence[set[str]]) -> set[str]:
    return set().union(*sets)


def test_honest_sites_are_let_be() -> None:
    result = run("plain", rounds=25, learn=honest_update, reputation=ReputationPolicy())
    assert names(away(result)) == set()
