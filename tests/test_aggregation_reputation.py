"""Reputation: who is left out by chance is let be, who is left out by nature is not, and nobody sits for ever."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.aggregation.reputation import (
    Reputation,
    ReputationPolicy,
    Seen,
    Standing,
    in_quarantine,
    judged,
    serving,
)
from quorsum.aggregation.sybils import SybilPolicy
from quorsum.errors import UsageError

SITES = tuple(f"site-{number:02d}" for number in range(1, 11))
POLICY = ReputationPolicy()


def play(
    rounds: int,
    choose: Callable[[int, tuple[str, ...]], tuple[str, ...]],
    *,
    policy: ReputationPolicy = POLICY,
    tolerate: int = 2,
    need: int = 5,
    reputation: Reputation | None = None,
    trusted: tuple[str, ...] = (),
) -> tuple[Reputation, list[frozenset[str]]]:
    """Rounds in which ``choose`` says whom the rule leaves out, worst first; who served in each."""
    now = Reputation() if reputation is None else reputation
    served = []
    for number in range(1, rounds + 1):
        away = serving(now, number, SITES, need)
        served.append(away)
        present = tuple(site for site in SITES if site not in away)
        now = judged(policy, now, Seen(present, choose(number, present)), number, tolerate, trusted)
    return now, served


def always(*bad: str) -> Callable[[int, tuple[str, ...]], tuple[str, ...]]:
    """A rule that leaves out two: the bad ones if they are there, else the first of the others by turns."""

    def choose(number: int, present: tuple[str, ...]) -> tuple[str, ...]:
        here = [site for site in bad if site in present]
        others = [site for site in present if site not in bad]
        return (*here, *(others[(number + k) % len(others)] for k in range(2 - len(here))))

    return choose


def test_the_evidence_of_three_rounds_by_hand() -> None:
    """r = 0.2, p = 0.92: ln 4.6 up, ln 10 down; with decay 0.5 between the rounds."""
    policy = ReputationPolicy(decay=0.5)
    first = judged(policy, Reputation(), Seen(SITES, SITES[:2]), 1, 2)
    assert first.of("site-01").evidence == pytest.approx(math.log(4.6))
    assert first.of("site-03").evidence == 0.0
    second = judged(policy, first, Seen(SITES, (SITES[0], SITES[2])), 2, 2)
    assert second.of("site-01").evidence == pytest.approx(1.5 * math.log(4.6))
    assert second.of("site-02").evidence == 0.0, "0.5 ln 4.6 - ln 10 is below zero"
    third = judged(policy, second, Seen(SITES[:5], SITES[:3]), 3, 3)
    # Three of five are left out: r = 0.6, p = 0.96.
    assert third.of("site-02").evidence == pytest.approx(math.log(0.96 / 0.6))
    assert third.rounds == 3


def test_who_is_left_out_and_not_far_is_let_be() -> None:
    """Kept at 1, 2 and 3 on a line; for each the mean of the others is 2.5, 2, 1.5, so distances are 1.5, 0, 1.5.

    Their median is 1.5 and the median deviation 0, below the resolution. The site at 5 is 3 away from the mean, 2, and
    the one at 3.4 is 1.4 away.
    """
    line = np.array([1.0, 2.0, 3.0, 5.0, 3.4])
    seen = Seen(SITES[:5], (SITES[3], SITES[4]), {}, np.outer(line, line))
    after = judged(POLICY, Reputation(), seen, 1, 2)
    assert after.of(SITES[3]).evidence == pytest.approx(math.log(4.6))
    assert after.of(SITES[4]).evidence == 0.0
    # Whoever is far and was kept is the rule's business.
    kept = Seen(SITES[:5], (SITES[4],), {}, np.outer(line, line))
    assert judged(POLICY, Reputation(), kept, 1, 2).of(SITES[3]).evidence == 0.0


def test_a_margin_of_zero_asks_for_no_more_than_the_median_distance() -> None:
    line = np.array([1.0, 2.0, 3.0, 5.0, 3.6])
    seen = Seen(SITES[:5], (SITES[3], SITES[4]), {}, np.outer(line, line))
    after = judged(ReputationPolicy(margin=0.0), Reputation(), seen, 1, 2)
    assert after.of(SITES[4]).evidence > 0


def test_sites_that_are_always_left_out_are_quarantined_and_come_back_watched() -> None:
    reputation, served = play(38, always("site-04", "site-09"))
    bad = frozenset({"site-04", "site-09"})
    assert all(away <= bad for away in served), "nobody else is ever quarantined"
    # ln 4.6 per round reaches ln 1000 in the fifth.
    assert served[:5] == [frozenset()] * 5
    assert served[5:15] == [bad] * 10
    # Back, watched: half of the evidence is left, so that the second offence is found sooner, and costs twice as much.
    assert served[15:18] == [frozenset()] * 3
    assert served[18:38] == [bad] * 20
    assert reputation.of("site-04").offences == 2


def test_good_conduct_wears_off_what_is_left_of_a_sentence() -> None:
    reputation, _ = play(5, always("site-04"))
    assert reputation.of("site-04").evidence == pytest.approx(POLICY.threshold / 2)
    for number in (16, 17):
        reputation = judged(POLICY, reputation, Seen(SITES, SITES[8:]), number, 2)
    assert reputation.of("site-04").evidence == 0.0
    assert reputation.of("site-04").offences == 1


def test_chance_quarantines_nobody() -> None:
    """One of ten at random in each round, less often than an honest site may be: 0.1 ^ 5 per round and site."""
    wrong = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)

        def choose(number: int, present: tuple[str, ...], rng: np.random.Generator = rng) -> tuple[str, ...]:
            return tuple(present[k] for k in rng.choice(len(present), 1, replace=False))

        _, served = play(300, choose)
        wrong += any(served)
    assert wrong <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), alarm=st.sampled_from([0.05, 0.02]))
def test_the_false_alarm_bound_holds_for_sites_that_are_left_out_as_often_as_they_may(seed: int, alarm: float) -> None:
    policy = ReputationPolicy(false_alarm=alarm, patience=0)
    rng = np.random.default_rng(seed)
    names, rounds = tuple(f"{number:03d}" for number in range(200)), 8
    reputation = Reputation()
    for number in range(1, rounds + 1):
        out = tuple(names[k] for k in rng.choice(200, 40, replace=False))
        reputation = judged(policy, reputation, Seen(names, out), number, 40)
    flagged = sum(standing.offences for standing in reputation.standings.values())
    bound = 200 * rounds * alarm
    # Five standard deviations of a count with that mean.
    assert flagged <= bound + 5 * math.sqrt(bound)


def test_an_attacker_that_rests_every_tenth_round_is_found_and_one_that_rests_every_second_is_not() -> None:
    def resting(every: int) -> Callable[[int, tuple[str, ...]], tuple[str, ...]]:
        def choose(number: int, present: tuple[str, ...]) -> tuple[str, ...]:
            others = [site for site in present if site != "site-05"]
            first = "site-05" if number % every and "site-05" in present else others[number % len(others)]
            return (first, others[(number + 4) % len(others)])

        return choose

    _, served = play(100, resting(10))
    assert frozenset().union(*served) == {"site-05"}
    _, served = play(100, resting(2))
    assert not any(served)


def test_good_rounds_are_no_credit() -> None:
    late, served = play(60, lambda number, present: always("site-01")(number, present) if number > 55 else ())
    assert "site-01" not in frozenset().union(*served)
    assert late.of("site-01").until == 60 + POLICY.sentence, "five rounds suffice, whatever was before"


def test_while_f_are_in_quarantine_nobody_else_is_accused() -> None:
    """The rule goes on dropping two of the eight, the same two in every round: honest sites with unusual data."""

    def choose(number: int, present: tuple[str, ...]) -> tuple[str, ...]:
        return always("site-04", "site-09")(number, present) if "site-04" in present else ("site-01", "site-02")

    reputation, served = play(20, choose)
    assert frozenset().union(*served) == {"site-04", "site-09"}
    assert reputation.of("site-01").evidence == 0.0


def test_with_one_in_quarantine_only_the_worst_of_two_is_accused() -> None:
    reputation = Reputation({"site-10": Standing(until=5, offences=1)})
    after = judged(POLICY, reputation, Seen(SITES[:9], ("site-03", "site-02")), 1, 2)
    assert after.of("site-03").evidence > 0
    assert after.of("site-02").evidence == 0


@pytest.mark.parametrize("bad", [("site-01", "site-02", "site-03"), SITES[:6]])
def test_never_more_than_f_are_in_quarantine(bad: tuple[str, ...]) -> None:
    _, served = play(200, lambda number, present: bad, tolerate=2)
    assert max(len(away) for away in served) == 2


def test_most_limits_it_further() -> None:
    _, served = play(60, always("site-04", "site-09"), policy=ReputationPolicy(most=1))
    assert max(len(away) for away in served) == 1
    _, served = play(60, always("site-04", "site-09"), policy=ReputationPolicy(most=0))
    assert not any(served)


def test_the_round_keeps_the_sites_that_it_needs() -> None:
    _, served = play(30, always("site-04", "site-09"), need=9)
    assert max(len(away) for away in served) == 1
    _, served = play(30, always("site-04", "site-09"), need=10)
    assert not any(served)


def test_who_has_offended_more_often_is_kept_out_first() -> None:
    reputation = Reputation({"a": Standing(9.0, 1, 9), "b": Standing(5.0, 2, 9), "c": Standing(9.5, 1, 9)})
    assert serving(reputation, 9, ("a", "b", "c", "d"), 3) == {"b"}
    assert serving(reputation, 9, ("a", "b", "c", "d"), 2) == {"b", "c"}
    assert serving(reputation, 9, ("a", "c", "d"), 0) == {"a", "c"}
    assert serving(reputation, 10, ("a", "b", "c", "d"), 0) == frozenset()


def test_what_is_proven_counts_at_once() -> None:
    seen = Seen((), (), {"site-07": "gave wrong points"})
    after = judged(POLICY, Reputation(), seen, 3, 2)
    assert in_quarantine(after, 4) == {"site-07": "in quarantine until round 13: gave wrong points"}
    assert in_quarantine(after, 14) == {}


def test_proof_goes_before_suspicion_when_there_is_one_place() -> None:
    before = Reputation({"site-01": Standing(evidence=50.0)}, rounds=20)
    after = judged(POLICY, before, Seen(SITES, ("site-01",), {"site-02": "lied"}), 21, 1)
    assert set(in_quarantine(after, 22)) == {"site-02"}


def test_the_reference_is_never_quarantined() -> None:
    _, served = play(40, always("site-04"), trusted=("site-04",))
    assert not any(served)
    proven = judged(POLICY, Reputation(), Seen((), (), {"site-04": "lied"}), 1, 2, ("site-04",))
    assert in_quarantine(proven, 2) == {}


def test_nobody_is_quarantined_before_there_was_patience() -> None:
    _, served = play(12, always("site-04"), policy=ReputationPolicy(false_alarm=0.03, patience=6))
    assert not any(served[:6])
    assert served[6] == {"site-04"}


def test_a_rule_that_leaves_nobody_out_teaches_nothing() -> None:
    reputation, served = play(50, lambda number, present: ())
    assert not any(served)
    assert all(standing.evidence == 0 for standing in reputation.standings.values())


def test_with_f_zero_nobody_can_be_quarantined() -> None:
    _, served = play(50, always("site-04", "site-09"), tolerate=0)
    assert not any(served)


# --- framing ---


def test_what_a_framed_site_loses_and_what_its_place_in_quarantine_buys() -> None:
    """Two attackers crowd so that the rule always leaves out the same two honest sites, and never the attackers.

    That is the attack that no count can see through. What is left of it: at most f honest sites sit, and come back.
    """
    victims = ("site-01", "site-02")

    def choose(number: int, present: tuple[str, ...]) -> tuple[str, ...]:
        here = tuple(site for site in victims if site in present)
        # Who comes next in the order of those that are unlike the crowd.
        return (*here, *(site for site in ("site-03", "site-05", "site-06") if site in present))[:2]

    _, served = play(200, choose)
    assert frozenset().union(*served) == {"site-01", "site-02"}, "the next two are not worked through"
    assert max(len(away) for away in served) == 2
    rounds = sum(bool(away) for away in served)
    assert rounds >= 150, "sentences double: a site that is framed for ever is away most of the time"


# --- copies ---


def grams(copies: tuple[int, ...]) -> Callable[[int], Any]:
    def gram(number: int) -> Any:
        rng = np.random.default_rng(number)
        common = rng.normal(size=200)
        rows = np.stack([common + rng.normal(size=200) for _ in SITES])
        for row in copies[1:]:
            rows[row] = rows[copies[0]]
        return rows @ rows.T

    return gram


@pytest.mark.parametrize(("copies", "caught"), [((2, 7), True), ((2, 7, 8), False), ((), False)])
def test_copies_are_quarantined_although_the_rule_keeps_them(copies: tuple[int, ...], caught: bool) -> None:
    """A group of more than f holds an honest site that is copied, and accuses nobody."""
    policy = ReputationPolicy(sybils=SybilPolicy())
    reputation, gram = Reputation(), grams(copies)
    for number in range(1, 31):
        present = SITES if not in_quarantine(reputation, number) else ()
        if present:
            reputation = judged(policy, reputation, Seen(present, (), {}, gram(number)), number, 2)
    expected = {"site-03", "site-08"} if caught else set()
    assert {site for site, standing in reputation.standings.items() if standing.offences} == expected
    if caught:
        assert "closer to those of site-08" in reputation.of("site-03").reason


# --- keeping ---


def test_it_comes_back_from_json_to_the_last_bit() -> None:
    policy = ReputationPolicy(sybils=SybilPolicy())
    reputation = Reputation()
    for number in range(1, 8):
        reputation = judged(policy, reputation, Seen(SITES, SITES[3:5], {}, grams((0, 1))(number)), number, 2)
    assert Reputation.from_json(json.loads(json.dumps(reputation.to_json()))) == reputation
    assert Reputation.from_json(json.loads(json.dumps(Reputation().to_json()))) == Reputation()


@pytest.mark.parametrize("values", [{}, {"standings": {"a": {"x": 1}}, "rounds": 0, "similarity": []}])
def test_other_values_are_refused(values: Mapping[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Reputation.from_json(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"false_alarm": 0.0}, "false_alarm"),
        ({"false_alarm": 1.0}, "false_alarm"),
        ({"honest": 0.0}, "honest"),
        ({"honest": 1.0}, "honest"),
        ({"margin": -1.0}, "margin"),
        ({"margin": math.inf}, "margin"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"patience": -1}, "patience"),
        ({"sentence": 0}, "sentence"),
        ({"most": -1}, "most"),
    ],
)
def test_policies_that_cannot_work_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ReputationPolicy(**change)
