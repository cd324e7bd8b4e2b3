"""A coordinator that is killed at any moment goes on where it was, and the model is the one it would have had.

Killed means here: whatever it was doing stops, and nothing is left of it but its files. The sites live on, with their
records on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import honest_update, learning_app, model
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quorsum import arrays
from quorsum.aggregation.reputation import ReputationPolicy
from quorsum.client import seal
from quorsum.client.keys import load_identity
from quorsum.crypto import SealedSite
from quorsum.crypto.identity import Identity
from quorsum.crypto.plain import PlainCoordinator, PlainSite
from quorsum.crypto.suite import SiteSuite
from quorsum.errors import RoundFailed
from quorsum.selection import select
from quorsum.server import QuorumStrategy
from quorsum.server.checkpoint import FolderRun, RunJournal, RunState
from quorsum.server.deployment import Member, RunStopped
from quorsum.server.gate import Gate
from quorsum.server.records import QuorumResult, RoundRecord
from quorsum.simulation.grid import LocalGrid

SITES = 5
ROUNDS = 3


def with_one_poisoned(partition: int, number: int) -> np.ndarray:
    """The same site is left out whatever the noise, so that models can be compared."""
    return honest_update(partition, number) * (-1 if partition == SITES - 1 else 1)


class Killed(BaseException):
    """kill -9."""


@dataclass
class Federation:
    """What a coordinator finds: members with keys, all connected, and its own folder."""

    folder: Path
    identities: list[Identity]
    away: set[int] = field(default_factory=set)
    revoked: set[int] = field(default_factory=set)
    patience: float = 0.0
    waited_for: list[tuple[str, ...]] = field(default_factory=list)
    told: list[RoundRecord] = field(default_factory=list)
    stop: bool = False

    def members(self) -> Mapping[int, Member]:
        return {
            place + 2: Member(f"site-{place + 1:02d}", identity.public())
            for place, identity in enumerate(self.identities)
            if place + 2 not in self.revoked
        }

    def online(self) -> frozenset[int]:
        return frozenset(self.members()) - self.away

    def journal(self) -> RunJournal:
        return FolderRun(self.folder)

    def waiting(self, sites: Sequence[str]) -> None:
        self.waited_for.append(tuple(sites))
        if sites and len(self.waited_for) > 3:
            self.away.clear()

    def phase(self, number: int, phase: str) -> None:
        pass

    def round(self, record: RoundRecord) -> None:
        self.told.append(record)

    def stopped(self) -> bool:
        return self.stop


class MortalGrid(LocalGrid):
    """A grid whose coordinator dies when it has pushed so many messages."""

    deployment: Federation
    lives: int = 10**9

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return super().push_messages(messages)


def suites(kind: str, homes: list[Path]) -> list[SiteSuite]:
    if kind == "plain":
        return [PlainSite() for _ in homes]
    return [SealedSite(load_identity(home), select, accept_small_models=True) for home in homes]


def federation(
    kind: str, folder: Path, learn: Callable[[int, int], np.ndarray] = honest_update
) -> tuple[MortalGrid, Federation]:
    homes = [folder / f"site-{place}" for place in range(SITES)]
    identities = [load_identity(home) for home in homes]
    apps = [
        learning_app([seal(suite, home=home)], learn) for suite, home in zip(suites(kind, homes), homes, strict=True)
    ]
    grid = MortalGrid(apps)
    grid.deployment = Federation(folder / "run", identities)
    return grid, grid.deployment


def strategy(kind: str, tolerate: int = 1) -> QuorumStrategy:
    suite = PlainCoordinator() if kind == "plain" else None
    return QuorumStrategy(suite, rule="multi-krum", tolerate=tolerate, min_available_nodes=SITES)


def start(kind: str, grid: MortalGrid, tolerate: int = 1) -> QuorumResult:
    return strategy(kind, tolerate).start(grid, model(), num_rounds=ROUNDS, timeout=60)


def vector(result: QuorumResult) -> np.ndarray:
    return arrays.flatten(result.arrays)


@pytest.fixture(scope="module", params=["plain", "sealed"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, QuorumResult]:
    kind = request.param
    grid, _ = federation(kind, tmp_path_factory.mktemp("undisturbed"), with_one_poisoned)
    with grid:
        result = start(kind, grid)
    return kind, result


def test_whenever_the_coordinator_is_killed_the_model_is_the_same(
    undisturbed: tuple[str, QuorumResult], tmp_path: Path
) -> None:
    """It dies after every seventh message, so in every phase of every round, until it is through."""
    kind, expected = undisturbed
    trained: list[tuple[int, int]] = []

    def learn(partition: int, number: int) -> np.ndarray:
        trained.append((partition, number))
        return with_one_poisoned(partition, number)

    grid, _ = federation(kind, tmp_path, learn)
    deaths = 0
    with grid:
        while True:
            grid.lives = 7
            try:
                result = start(kind, grid)
                break
            except Killed:
                deaths += 1
    assert deaths >= 8
    assert sorted(trained) == [(p, n) for p in range(SITES) for n in range(1, ROUNDS + 1)], "nobody trains twice"
    # Masking adds noise: 6.4 / 512 of a coordinate's size at each of four sites, three times.
    tolerance = 0.0 if kind == "plain" else 0.02
    assert np.max(np.abs(vector(result) - vector(expected))) <= tolerance
    assert [record.round for record in result.rounds] == [1, 2, 3]
    assert [record.accepted for record in result.rounds] == [record.accepted for record in expected.rounds]
    assert not any(record.failed for record in result.rounds)
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "state.npz"], "nothing of an open round is left"


def test_a_finished_run_is_not_played_again(undisturbed: tuple[str, QuorumResult], tmp_path: Path) -> None:
    kind, _ = undisturbed
    grid, _ = federation(kind, tmp_path)
    with grid:
        first = start(kind, grid)
        grid.lives = 0
        second = start(kind, grid)
    assert np.array_equal(vector(first), vector(second))
    assert [record.round for record in second.rounds] == [1, 2, 3]


def test_a_round_that_fails_is_followed_by_another_one(tmp_path: Path) -> None:
    calls: dict[int, int] = {}

    def learn(partition: int, number: int) -> np.ndarray:
        calls[partition] = calls.get(partition, 0) + 1
        if calls[partition] == 2 and partition < 3:
            raise RuntimeError
        return honest_update(partition, number)

    grid, deployment = federation("plain", tmp_path, learn)
    with grid:
        result = start("plain", grid)
    assert [bool(record.failed) for record in result.rounds] == [False, True, False, False]
    assert [record.round for record in deployment.told] == [1, 2, 3, 4]


def test_a_run_in_which_everything_fails_ends(tmp_path: Path) -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        raise RuntimeError

    grid, _ = federation("plain", tmp_path, learn)
    with grid, pytest.raises(RoundFailed, match="10 rounds in a row have failed"):
        start("plain", grid)


def test_a_run_waits_for_its_sites_and_says_for_whom(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    deployment.away = {2, 4}
    with grid:
        start("plain", grid)
    assert ("site-01", "site-03") in deployment.waited_for
    assert deployment.waited_for[-1] == ()


def test_a_run_that_is_stopped_while_it_waits_says_so(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    deployment.away, deployment.stop = {2}, True
    with grid, pytest.raises(RunStopped):
        start("plain", grid)


def test_a_site_revoked_in_an_open_round_is_named_and_left_out(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    with grid:
        # Two roster calls, and the first two of the instructions to train.
        grid.lives = 2 * SITES + 2
        with pytest.raises(Killed):
            start("plain", grid, tolerate=0)
        grid.lives = 10**9
        deployment.revoked = {6}
        result = start("plain", grid, tolerate=0)
    assert "site-05" not in result.rounds[0].accepted
    assert result.rounds[0].codes["site-05"] == "unreachable"
    assert result.rounds[1].invited == ("site-01", "site-02", "site-03", "site-04")


def test_a_site_with_another_key_than_it_enrolled_is_left_out(tmp_path: Path) -> None:
    grid, deployment = federation("sealed", tmp_path)
    deployment.identities[4] = Identity.generate(os.urandom)
    with grid:
        roster = strategy("sealed")._gathered(grid, deployment, "run", 60, 4, None)
    assert sorted(roster.network.nodes) == ["site-01", "site-02", "site-03", "site-04"]
    assert [(fault.site, fault.code) for fault in roster.left_out] == [("site-05", "wrong-signature")]


def test_a_site_that_was_away_for_a_round_is_not_waited_for(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    deployment.away, deployment.patience = {6}, 3600.0
    with grid:
        roster = strategy("plain", 0)._gathered(grid, deployment, "run", 60, 4, ["site-01", "site-02"])
    assert sorted(roster.network.nodes) == ["site-01", "site-02", "site-03", "site-04"]


def test_a_federation_that_has_become_too_small_says_how_many_are_missing(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    deployment.revoked = {3, 4, 5}

    def waiting(sites: Sequence[str]) -> None:
        deployment.waited_for.append(tuple(sites))
        deployment.stop = True

    deployment.waiting = waiting  # type: ignore[method-assign]
    with grid, pytest.raises(RunStopped):
        strategy("plain")._gathered(grid, deployment, "run", 60, 5, None)
    assert deployment.waited_for == [("3 more to be enrolled",)]


# --- defences over rounds ---


def poisoned_once() -> Callable[[int, int], np.ndarray]:
    """One site sends a huge update, the first time that it is asked for one in the second round."""
    done: list[int] = []

    def learn(partition: int, number: int) -> np.ndarray:
        if (partition, number) != (1, 2) or done:
            return honest_update(partition, number)
        done.append(number)
        return (honest_update(partition, number) * np.float32(-30)).astype(np.float32)

    return learn


DEFENCES: dict[str, tuple[dict[str, Any], Callable[[], Callable[[int, int], np.ndarray]]]] = {
    "reputation": (
        {
            "rule": "geometric-median",
            "tolerate": 1,
            "reputation": ReputationPolicy(false_alarm=0.1, patience=1, sentence=2),
        },
        lambda: with_one_poisoned,
    ),
    "gate": ({"rule": "mean", "tolerate": 0, "gate": Gate(attention=1)}, poisoned_once),
}


def evaluating(suite: SiteSuite, home: Path, learn: Callable[[int, int], np.ndarray], told: list[float]) -> ClientApp:
    """An app whose evaluation follows the model, and that says how often it was asked."""
    inner, app = learning_app([], learn), ClientApp(mods=[seal(suite, home=home)])
    app.train()(lambda message, context: inner(message, context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        parameters = arrays.flatten(message.content.array_records["arrays"]).astype(np.float64)
        told.append(float(parameters.mean()))
        metrics = MetricRecord({"accuracy": float(np.clip(0.5 + parameters.mean() / 10, 0, 1)), "rows": 3})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def defended(folder: Path, name: str, lives: int, told: list[float]) -> tuple[QuorumResult, int, RunState]:
    options, learns = DEFENCES[name]
    learn = learns()
    homes = [folder / f"site-{place}" for place in range(SITES)]
    identities = [load_identity(home) for home in homes]
    grid = MortalGrid([evaluating(PlainSite(), home, learn, told) for home in homes])
    grid.deployment = Federation(folder / "run", identities)
    deaths = 0
    with grid:
        while True:
            grid.lives = lives
            strategy = QuorumStrategy(PlainCoordinator(), min_available_nodes=SITES, **options)
            try:
                result = strategy.start(grid, model(), num_rounds=6, timeout=60)
                break
            except Killed:
                deaths += 1
    state = FolderRun(folder / "run").load()
    assert state is not None
    return result, deaths, state


@pytest.mark.parametrize("name", DEFENCES)
def test_a_killed_coordinator_has_the_same_reputation_and_the_same_verdicts(tmp_path: Path, name: str) -> None:
    asked: list[float] = []
    again: list[float] = []
    expected, _, left = defended(tmp_path / "undisturbed", name, 10**9, asked)
    got, deaths, kept = defended(tmp_path / "killed", name, 7, again)
    assert deaths >= 8
    assert np.array_equal(vector(got), vector(expected))
    # Whose answer was lost with the coordinator is asked once more, and about the same model.
    assert set(again) == set(asked)
    assert (kept.reputation, kept.watched, kept.norms, kept.unit) == (
        (left.reputation, left.watched, left.norms, left.unit)
    )

    def plain(result: QuorumResult) -> list[RoundRecord]:
        return [replace(record, seconds={}, bytes={}) for record in result.rounds]

    assert plain(got) == plain(expected)
    if name == "reputation":
        assert [set(record.quarantined) for record in got.rounds[:5]] == [set(), set(), {"site-05"}, {"site-05"}, set()]
    else:
        assert [(record.failed or "")[:5] for record in got.rounds] == ["", "gate:", "", "", "", "", ""]


def test_who_is_in_quarantine_is_not_waited_for_and_not_asked(tmp_path: Path) -> None:
    grid, deployment = federation("plain", tmp_path)
    deployment.patience = 3600.0
    deployment.away = {3}
    with grid:
        roster = strategy("plain", 0)._gathered(
            grid, deployment, "run", 60, 3, None, lambda present: {"site-02", "site-05"}
        )
    assert sorted(roster.network.nodes) == ["site-01", "site-03", "site-04"]
