"""Attempts at a round over the whole stack: what fails before anything is opened is tried again with fewer sites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import honest_update, learning_app, model
from flwr.app import Context, Error, Message
from sealed_federation import identity

from quorsum import messages
from quorsum.client import seal
from quorsum.crypto import PlainCoordinator, SealedSite, SiteSuite
from quorsum.crypto.plain import PlainSite
from quorsum.selection import select
from quorsum.server import QuorumResult, QuorumStrategy
from quorsum.server.records import RoundRecord
from quorsum.simulation.federation import AttackerSuite
from quorsum.simulation.grid import Handler, LocalGrid
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS

Fails = Callable[[int, int, str], str]
"""``fails(site, attempt, phase)``: "" is an honest answer, "before" silence, "after" an answer that is lost."""


class Sites:
    """n sealed sites with homes of their own; their calls, and what was asked of them, are written down."""

    def __init__(self, homes: Path, n: int, fails: Fails, bad: dict[int, Callable[[SealedSite], SiteSuite]]) -> None:
        self.asked: list[tuple[int, int, str]] = []
        self.trained: list[tuple[int, int]] = []
        self.refusals: list[tuple[int, int, str]] = []
        self.handlers = [self._handler(k, homes / str(k), fails, bad.get(k)) for k in range(1, n + 1)]

    def _handler(self, k: int, home: Path, fails: Fails, bad: Callable[[SealedSite], SiteSuite] | None) -> Handler:
        suite = SealedSite(identity(k), select, accept_small_models=True)

        def learn(partition: int, number: int) -> np.ndarray:
            self.trained.append((k, number))
            return honest_update(partition, number)

        app = learning_app([seal(bad(suite) if bad else suite, home=home)], learn)
        attempt = 1

        def handle(message: Message, context: Context) -> Message | None:
            nonlocal attempt
            header, _ = messages.unpack(message.content)
            if isinstance(header, messages.Train | messages.Again):
                attempt = header.context.attempt
            phase = getattr(header, "phase", header.kind)
            self.asked.append((k, attempt, phase))
            fault = fails(k, attempt, phase)
            if fault == "before":
                return Message(Error(2, ""), reply_to=message)
            reply = app(message, context)
            answer, _ = messages.unpack(reply.content)
            if isinstance(answer, messages.Fault):
                self.refusals.append((k, attempt, answer.code))
            return Message(Error(2, ""), reply_to=message) if fault == "after" else reply

        return handle

    def attempts(self, k: int) -> set[int]:
        return {attempt for site, attempt, _ in self.asked if site == k}


def run(
    homes: Path,
    n: int,
    fails: Fails,
    rounds: int = 1,
    bad: dict[int, Callable[[SealedSite], SiteSuite]] | None = None,
    **options: Any,
) -> tuple[Sites, QuorumResult]:
    sites = Sites(homes, n, fails, bad or {})
    with LocalGrid(sites.handlers) as grid:
        chosen = {"tolerate": 1, "rule": "multi-krum", "fraction_evaluate": 0.0} | options
        result = QuorumStrategy(**chosen).start(grid, model(), num_rounds=rounds, timeout=30)
    return sites, result


def names(*numbers: int) -> set[str]:
    return {f"site-{k:02d}" for k in numbers}


def assert_mean_of_accepted(result: QuorumResult, record: RoundRecord) -> None:
    assert record.failed is None
    kept = [int(site[-2:]) - 1 for site in record.accepted]
    clear = [honest_update(k, record.round) for k in kept]
    # Clipped to the reference norm of the first round, which is 1.
    mean = np.mean([one / max(1.0, float(np.linalg.norm(one))) for one in clear], axis=0)
    got = np.concatenate([result.arrays[name].numpy().ravel() for name in result.arrays])
    np.testing.assert_allclose(got, mean, atol=0.02)


def silent(*numbers: int, phase: str, attempts: tuple[int, ...] = (1, 2, 3)) -> Fails:
    """These sites fall silent in one phase."""
    return lambda k, attempt, asked: "before" if k in numbers and asked == phase and attempt in attempts else ""


# --- failures before anything is opened ---


@pytest.mark.parametrize("phase", ["root", "check", "gram"])
@pytest.mark.parametrize(
    ("n", "gone", "options"),
    [(8, (2, 5, 7), {"tolerate": 0, "collude": 2, "rule": "mean"}), (9, (1, 4, 6, 9), {})],
    ids=["three of eight", "four of nine"],
)
def test_round_with_more_silent_sites_than_may_be_is_finished_by_the_others(
    tmp_path: Path, n: int, gone: tuple[int, ...], options: dict[str, Any], phase: str
) -> None:
    """A quorum of 6 is needed and 5 sites are left, which are enough for a round of their own."""
    left = [k for k in range(1, n + 1) if k not in gone]
    sites, result = run(tmp_path, n, silent(*gone, phase=phase), **options)
    (record,) = result.rounds
    assert record.attempts == 2
    assert "5 sites" in record.retried[0]
    assert "6 are needed" in record.retried[0]
    assert set(record.accepted) <= names(*left)
    assert len(record.accepted) >= 4
    assert_mean_of_accepted(result, record)
    assert sorted(sites.trained) == [(k, 1) for k in range(1, n + 1)], "everybody trains once"
    assert all(sites.attempts(k) == ({1} if k in gone else {1, 2}) for k in range(1, n + 1))
    assert {record.codes[site] for site in names(*gone)} <= {"silent", "no-view"}
    assert sites.refusals == []
    # What went wrong in the first attempt is kept.
    assert any(note.startswith("attempt 1: ") and "site-0" in note for note in record.notes)
    assert record.invited == tuple(sorted(names(*range(1, n + 1))))


def test_silent_sites_are_asked_again_where_the_others_are_too_few(tmp_path: Path) -> None:
    """n = 7: without the three there is no round, so that their coming back is waited for."""
    sites, result = run(tmp_path, 7, silent(1, 2, 3, phase="gram", attempts=(1,)))
    (record,) = result.rounds
    assert record.attempts == 2
    assert len(record.accepted) == 6
    assert_mean_of_accepted(result, record)
    assert all(sites.attempts(k) == {1, 2} for k in range(1, 8))


def test_sites_that_submit_nothing_are_left_out_of_the_next_attempt(tmp_path: Path) -> None:
    """Four of nine are down from the start: the others cannot reach a quorum of nine, and do reach one of five."""
    sites, result = run(tmp_path, 9, silent(2, 3, 4, 5, phase="train"))
    (record,) = result.rounds
    assert record.attempts == 2
    assert_mean_of_accepted(result, record)
    assert {record.codes[site] for site in names(2, 3, 4, 5)} == {"error"}
    assert {k for k, attempt, _ in sites.asked if attempt == 2} == {1, 6, 7, 8, 9}


def test_attempts_are_exhausted_after_three(tmp_path: Path) -> None:
    sites, result = run(tmp_path, 5, silent(*range(1, 6), phase="gram"))
    (record,) = result.rounds
    assert record.attempts == 3
    assert record.failed is not None
    assert "0 sites" in record.failed
    assert len(record.retried) == 2
    assert set(record.rejected) == names(*range(1, 6))
    assert all(not array.numpy().any() for array in result.arrays.values()), "the model is as it was"
    assert [phase for k, _, phase in sites.asked if k == 1] == [
        "hello", "train", "root", "check", "gram", "again", "root", "check", "gram", "again", "root", "check", "gram",
    ]  # fmt: skip
    assert sorted(sites.trained) == [(k, 1) for k in range(1, 6)]


def test_round_after_a_failed_one_begins_anew(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails(k: int, attempt: int, phase: str) -> str:
        if k == 1 and phase == "train":
            calls.append(attempt)
        return "before" if phase == "check" and len(calls) == 1 else ""

    sites, result = run(tmp_path, 5, fails, rounds=2)
    first, second = result.rounds
    assert (first.attempts, second.attempts) == (3, 1)
    assert first.failed is not None
    assert second.failed is None
    assert len(sites.trained) == 10


def test_roster_that_would_break_the_bounds_is_not_tried(tmp_path: Path) -> None:
    """Five sites with tau = f = 1 are the fewest there are: who submits nothing cannot be done without."""
    sites, result = run(tmp_path, 5, silent(1, 2, phase="train"))
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert not any(phase == "again" for _, _, phase in sites.asked)


def test_too_few_submissions_for_the_rule_are_not_mended_by_another_attempt(tmp_path: Path) -> None:
    _, result = run(tmp_path, 9, silent(1, 2, 3, 4, 5, phase="train"))
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert "only 4 of 9 sites sent a usable update" in record.failed


# --- tickets ---


def test_who_signed_a_ticket_is_left_out_of_the_next_attempt(tmp_path: Path) -> None:
    """n = 8: three sites sign, five never hear of it; the five are enough for a round of their own."""
    sites, result = run(tmp_path, 8, silent(4, 5, 6, 7, 8, phase="ticket", attempts=(1,)))
    (record,) = result.rounds
    assert record.attempts == 2
    assert "3 sites signed a ticket" in record.retried[0]
    assert set(record.accepted) < names(4, 5, 6, 7, 8)
    assert_mean_of_accepted(result, record)
    assert {record.codes[site] for site in names(1, 2, 3)} == {"ticket-signed"}
    assert all(sites.attempts(k) == {1} for k in (1, 2, 3))


def test_round_whose_tickets_are_signed_and_lost_is_over(tmp_path: Path) -> None:
    """The coordinator cannot know that they were signed. The sites do, and seal nothing again."""

    def fails(k: int, attempt: int, phase: str) -> str:
        return "after" if phase == "ticket" and k > 3 else ""

    sites, result = run(tmp_path, 8, fails)
    (record,) = result.rounds
    assert record.attempts == 2
    assert record.failed is not None
    assert "only 0 of 5 sites sent a usable update" in record.failed
    assert sorted(sites.refusals) == [(k, 2, "ticket-signed") for k in (4, 5, 6, 7, 8)]
    assert not any(phase == "sum" for _, _, phase in sites.asked)


def test_too_many_tickets_for_another_attempt_end_the_round(tmp_path: Path) -> None:
    sites, result = run(tmp_path, 8, silent(5, 6, 7, 8, phase="ticket"))
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert "4 sites signed a ticket for the set, and 5 are needed" in record.failed
    assert not any(phase == "again" for _, _, phase in sites.asked)


def test_who_is_proven_malicious_joins_no_other_attempt(tmp_path: Path) -> None:
    """n = 9: site 9 gives wrong points under its own signature, and then too few tickets come."""
    sites, result = run(
        tmp_path,
        9,
        silent(4, 5, 6, 7, 8, 9, phase="ticket", attempts=(1,)),
        bad={9: PROTOCOL_ATTACKS["wrong-points"].make},
    )
    (record,) = result.rounds
    assert record.attempts == 2
    assert record.codes["site-09"] == "wrong-points"
    assert sites.attempts(9) == {1}
    assert_mean_of_accepted(result, record)
    assert set(record.accepted) < names(4, 5, 6, 7, 8)


# --- from the first question about a sum on, nothing is tried again ---


@pytest.mark.parametrize("gone", [(1, 2, 3, 4, 5), (1, 2, 3)], ids=["all", "more than may be"])
def test_sum_that_fails_ends_the_round(tmp_path: Path, gone: tuple[int, ...]) -> None:
    sites, result = run(tmp_path, 5, silent(*gone, phase="sum"))
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert not any(phase == "again" for _, _, phase in sites.asked)


def test_sum_with_more_lies_than_may_be_ends_the_round(tmp_path: Path) -> None:
    liars = dict.fromkeys((2, 4), PROTOCOL_ATTACKS["wrong-sum"].make)
    sites, result = run(tmp_path, 5, lambda k, attempt, phase: "", bad=liars)
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert "answers are wrong" in record.failed
    assert not any(phase == "again" for _, _, phase in sites.asked)


def test_what_hid_from_the_sketches_ends_the_round_and_the_next_one_looks_closer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of nothing every honest sum looks as if something were hidden in it."""
    monkeypatch.setattr("quorsum.crypto.sealed_coordinator.RATIO", 0.0)
    sites, result = run(tmp_path, 5, lambda k, attempt, phase: "", rounds=2)
    first, _ = result.rounds
    assert first.attempts == 1
    assert first.failed is not None
    assert "somebody hid from the sketches" in first.failed
    assert not any(phase == "again" for _, _, phase in sites.asked)


# --- attackers and other suites ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other-key", "norm"),
        ("inconsistent-shares", "in dispute with"),
        ("wrong-check", "in dispute with"),
        ("wrong-point", "wrong points"),
        ("wrong-sum", "wrong share"),
        ("wrap-around", ""),
        ("oversize", "norm"),
    ],
)
def test_attackers_attack_in_every_attempt(tmp_path: Path, name: str, says: str) -> None:
    """n = 11: five sites are gone after the root of the first attempt; one of the six that are left is malicious."""
    sites, result = run(tmp_path, 11, silent(1, 2, 3, 4, 5, phase="check"), bad={11: PROTOCOL_ATTACKS[name].make})
    (record,) = result.rounds
    assert record.failed is None
    assert record.attempts == 2
    assert sites.refusals == [] or {code for _, _, code in sites.refusals} <= {"too-few-dealers", "not-a-holder"}
    assert len(set(record.accepted) - names(11)) >= 4
    told = [record.reasons.get("site-11", ""), *(note for note in record.notes if "attempt 2: site site-11" in note)]
    assert any(says in line for line in told), told


@pytest.mark.parametrize("nan", [False, True])
def test_attacker_on_the_update_takes_part_in_every_attempt_it_is_asked_to(tmp_path: Path, nan: bool) -> None:
    """Bare NaN costs its sender the round; what is only cut to length is an update as any other."""
    bad = {10: lambda suite: AttackerSuite(suite, nan=nan)}
    sites, result = run(tmp_path, 10, silent(1, 2, 3, 4, phase="check"), bad=bad)
    (record,) = result.rounds
    assert record.attempts == 2
    assert_mean_of_accepted(result, record)
    assert record.codes.get("site-10") in (["undecodable"] if nan else [None, "rule"])
    assert sites.attempts(10) == ({1} if nan else {1, 2})


def test_rule_with_a_reference_has_one_attempt(tmp_path: Path) -> None:
    sites, result = run(tmp_path, 9, silent(2, 3, 4, 5, phase="check"), rule="fltrust", reference="site-01", tolerate=1)
    (record,) = result.rounds
    assert record.attempts == 1
    assert record.failed is not None
    assert not any(phase == "again" for _, _, phase in sites.asked)


def test_suite_with_one_attempt_has_one() -> None:
    honest = learning_app([seal(PlainSite())])
    asked: list[str] = []

    def handle(message: Message, context: Context) -> Message | None:
        asked.append(messages.unpack(message.content)[0].kind)
        return Message(Error(2, ""), reply_to=message) if asked[-1] == "train" else honest(message, context)

    with LocalGrid([handle] * 5) as grid:
        result = QuorumStrategy(PlainCoordinator(), tolerate=1, fraction_evaluate=0.0).start(grid, model(), 1)
    (record,) = result.rounds
    assert (record.attempts, record.retried) == (1, ())
    assert record.failed is not None
    assert "again" not in asked
