"""Runs: what becomes of them, whatever their app and this machine do."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import training_app
from fleet_harness import until
from flwr.app import Array, ArrayRecord, Message, RecordDict

from quorsum import bundles
from quorsum.config import CoordinatorConfig
from quorsum.crypto import Identity, certificates
from quorsum.enrollment import Keys
from quorsum.errors import Refusal
from quorsum.server.authority import ServerCertificate, load_authority
from quorsum.server.checkpoint import RunState
from quorsum.server.deployment import Deployment, RunStopped, deployment_of
from quorsum.server.enrollment import now_utc
from quorsum.server.exchange import WatchedGrid
from quorsum.server.fleet import FleetServer
from quorsum.server.home import CoordinatorHome
from quorsum.server.records import RoundRecord
from quorsum.server.runner import DeployedGrid, Members, RunDeployment, Runner, last_state
from quorsum.server.status import Board
from quorsum.server.store import Application, Store

APP = """
import pathlib, sys, time
from flwr.serverapp import ServerApp
from flwr.app import ArrayRecord, RecordDict, Message
app = ServerApp()

@app.main()
def main(grid, context):
    marks = pathlib.Path(r"{marks}")
    with (marks / "calls").open("a") as file:
        file.write(f"{{context.run_config['rounds']}}\\n")
    {body}
"""


@dataclass
class Machine:
    """A coordinator without its ports, whose fleet nobody connects to."""

    home: CoordinatorHome
    store: Store
    fleet: FleetServer
    members: Members
    board: Board
    folder: Path
    runner: Runner

    def queue(self, body: str, config: str = "{}") -> int:
        """A run whose app does this."""
        code = APP.replace("{body}", body).replace("{marks}", str(self.folder))
        app = training_app(self.folder / f"app{len(self.store.runs())}", server=code)
        return self.store.queue_run("tests/tiny", bundles.build(app), config, time.time())

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []

    def state(self, number: int) -> tuple[str, str]:
        row = self.store.run(number)
        return row.state, row.detail

    def ended(self, number: int) -> tuple[str, str]:
        until(lambda: self.state(number)[0] in ("finished", "failed", "stopped"), 15)
        return self.state(number)

    def again(self) -> None:
        """Another process goes on."""
        assert self.runner.stop(5)
        self.runner = Runner(self.home, self.store, self.fleet, self.members, self.board, 0.0)
        self.runner.start()

    def admit(self, name: str, node_key: bytes | None = None) -> None:
        """Enroll and approve a site."""
        secret_hash, now = os.urandom(32), time.time()
        self.store.invite(name, secret_hash, now + 60, now)
        key = node_key or certificates.public_key(certificates.make_key())
        self.store.enroll(
            Application(
                site=name, secret_hash=secret_hash, keys=Keys(*(os.urandom(32).hex() for _ in range(3))),
                identity=Identity.generate(os.urandom).public().hex, node_key=key.decode(), request="request",
                words="a-b-c-d-e-f", address="127.0.0.1",
            ),
            now, 9,
        )  # fmt: skip
        self.store.approve(name, "a-b-c-d-e-f", now)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    home = CoordinatorHome(tmp_path / "home")
    home.create(CoordinatorConfig(federation="lab"), datetime.now(UTC))
    ServerCertificate(load_authority(home.path), ["localhost"], now_utc, home.path)
    fleet = FleetServer("127.0.0.1", 0, *(home.path / name for name in ("server.crt", "server.key", "ca.crt")))
    store, board = home.store(), Board(home.status_file, "lab")
    members = Members(store, fleet)
    runner = Runner(home, store, fleet, members, board, 0.0)
    made = Machine(home, store, fleet, members, board, tmp_path, runner)
    yield made
    assert made.runner.stop(10)
    store.close()


def test_a_run_is_queued_played_and_finished(machine: Machine) -> None:
    first, second = machine.queue("pass", '{"rounds": 7}'), machine.queue("pass")
    machine.runner.start()
    assert machine.ended(second) == ("finished", "")
    assert machine.state(first) == ("finished", "")
    assert machine.calls() == ["7", "2"]
    assert (machine.home.run_folder(first) / "app" / "tiny" / "server_app.py").exists()
    assert machine.board.snapshot()["run"] is None
    assert last_state(machine.home.run_folder(first)) is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('colour')", "KeyError: 'colour'"),
        ("sys.exit(3)", "the app ended with SystemExit: 3"),
        ("raise ValueError(bytes(100))", "ValueError: <bytes>"),
        ("raise OSError(2, 'No such file')", "FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_an_app_that_raises_has_failed_and_the_next_one_runs(machine: Machine, body: str, reason: str) -> None:
    failing, next_ = machine.queue(body), machine.queue("pass")
    machine.runner.start()
    assert machine.ended(next_) == ("finished", "")
    assert machine.state(failing) == ("failed", reason)


def test_a_setting_that_the_app_does_not_have_fails_the_run(machine: Machine) -> None:
    number = machine.queue("pass", '{"colour": 3}')
    machine.runner.start()
    state, detail = machine.ended(number)
    assert (state, "no setting 'colour'" in detail) == ("failed", True)


def test_what_is_no_app_fails_the_run(machine: Machine) -> None:
    junk = machine.store.queue_run("junk", b"not a bundle", "{}", time.time())
    machine.runner.start()
    assert machine.ended(junk)[0] == "failed"
    wrong = machine.queue("pass\napp = 3")
    assert machine.ended(wrong) == ("failed", "tiny.server_app:app is not a ServerApp")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_waited_for(machine: Machine, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("quorsum.server.runner.AGAIN", 0.1)
    number = machine.queue(f"if not (marks / 'room').exists(): raise OSError({code}, 'no room')")
    machine.runner.start()
    until(lambda: len(machine.calls()) >= 3)
    assert machine.state(number)[0] == "running"
    (machine.folder / "room").touch()
    assert machine.ended(number) == ("finished", "")


WAITS = "(marks / 'waits').touch()\n    while True:\n        grid.get_node_ids(); time.sleep(0.05)"


def test_the_end_of_the_process_leaves_a_run_to_the_next_one(machine: Machine) -> None:
    number, later = machine.queue(WAITS), machine.queue("pass")
    machine.runner.start()
    until(lambda: len(machine.calls()) == 1)
    machine.again()
    until(lambda: len(machine.calls()) == 2)
    assert machine.state(number)[0] == "running"
    assert machine.state(later)[0] == "queued"


def test_a_run_is_stopped_by_the_operator_while_it_runs_and_while_nobody_plays_it(machine: Machine) -> None:
    number, other = machine.queue(WAITS), machine.queue(WAITS)
    machine.runner.start()
    until(lambda: len(machine.calls()) == 1)
    machine.store.set_run_state(number, "stopping", time.time())
    machine.runner.look()
    assert machine.ended(number)[0] == "stopped"
    until(lambda: len(machine.calls()) == 2)
    assert machine.runner.stop(5)
    machine.store.set_run_state(other, "stopping", time.time())
    machine.again()
    assert machine.ended(other)[0] == "stopped"
    assert len(machine.calls()) == 2


def test_an_app_that_does_not_look_cannot_be_ended_but_is_told_of(machine: Machine) -> None:
    machine.queue("\n    ".join(["while not (marks / 'enough').exists():", "    time.sleep(0.05)"]))
    machine.runner.start()
    until(lambda: machine.calls())
    assert not machine.runner.stop(0.3)
    (machine.folder / "enough").touch()


def test_members_are_let_in_and_sent_away(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.admit("a")
    machine.admit("b", b"no key")
    caplog.set_level("INFO", "quorsum.runner")
    members = machine.members.by_node()
    assert [member.site for member in members.values()] == ["a"]
    assert "b cannot take part" in caplog.text
    assert dict(machine.members.online().values()) == {"a": False}
    machine.store.revoke("a", time.time())
    machine.members.look()
    assert machine.members.by_node() == {}
    assert machine.fleet.nodes() == {}
    # The name comes back with other keys, and is another node.
    machine.admit("a")
    assert set(machine.members.by_node()).isdisjoint(members)
    assert caplog.text.count("b cannot take part") == 1


def record(number: int, metrics: float = 0.5) -> RoundRecord:
    return RoundRecord(
        round=number, invited=("a", "b"), accepted=("a",), rejected=("b",), reasons={"b": "late"}, codes={"b": "late"},
        weights={"a": 1.0}, notes=(), failed=None, unit=1.0, seconds={}, bytes={}, metrics={"accuracy": metrics},
    )  # fmt: skip


def state(number: int, *records: RoundRecord) -> RunState:
    model = ArrayRecord({"w": Array(np.full(3, number, np.float32))})
    return RunState("ab" * 16, 0, number, number, 1.0, 4, model, records)


def deployment(machine: Machine, number: int, stopped: Callable[[], bool] = lambda: False) -> RunDeployment:
    folder = machine.home.run_folder(number)
    return RunDeployment(number, folder, machine.members, machine.store, machine.board, 3.0, stopped)


def test_two_strategies_of_one_app_have_two_journals_and_one_row_of_rounds(machine: Machine) -> None:
    number = machine.queue("pass")
    first = deployment(machine, number)
    journal = first.journal()
    for k in (1, 2):
        journal.commit(state(k, *(record(j) for j in range(1, k + 1))))
        first.round(record(k))
    first.journal().commit(state(1, record(1, 0.75)))
    # Killed before the last record was written. The next process gets there on the same way.
    second = deployment(machine, number)
    assert second.journal().load() is not None
    assert [row.number for row in machine.store.rounds(number)] == [1, 2]
    second.journal()
    rows = machine.store.rounds(number)
    assert [row.number for row in rows] == [1, 2, 3]
    assert [json.loads(row.record)["call"] for row in rows] == [1, 1, 2]
    assert json.loads(rows[2].record)["metrics"] == {"accuracy": 0.75}
    final = last_state(machine.home.run_folder(number))
    assert final is not None
    assert final.model["w"].numpy().tolist() == [1.0, 1.0, 1.0]


def test_a_damaged_journal_is_refused(machine: Machine) -> None:
    number = machine.queue("pass")
    deployment(machine, number).journal().commit(state(1))
    (machine.home.run_folder(number) / "1" / "state.npz").write_bytes(b"junk")
    with pytest.raises(Refusal, match="cannot be read"):
        deployment(machine, number).journal()
    with pytest.raises(Refusal, match="cannot be read"):
        last_state(machine.home.run_folder(number))


def test_the_grid_of_a_run_ends_it_wherever_it_is_looked_at(machine: Machine) -> None:
    number, ending = machine.queue("pass"), threading.Event()
    handle = machine.fleet.open_run(machine.store.bundle(number), {})
    here = deployment(machine, number, ending.is_set)
    grid = DeployedGrid(machine.fleet.grid(handle), here)
    machine.admit("a")
    (node,) = here.members()
    assert isinstance(grid, WatchedGrid)
    known: Deployment | None = deployment_of(grid)
    assert known is here
    assert here.patience == 3.0
    assert here.online() == frozenset()
    assert grid.run.run_id == handle.run_id
    assert grid.registered(node)
    assert grid.activation(node) is None
    assert list(grid.get_node_ids()) == []
    message = grid.create_message(RecordDict(), "train", node, "1", 5.0)
    # It has never connected to this process.
    assert list(grid.push_messages([message])) == []
    assert list(grid.pull_messages([])) == []
    grid.withdraw(["ab" * 32])
    assert list(grid.send_and_receive([], timeout=0.1)) == []
    here.phase(1, "train")
    ending.set()
    assert here.stopped()
    for look in (
        lambda: grid.registered(node), lambda: grid.activation(node), grid.get_node_ids,
        lambda: grid.push_messages([message]), lambda: grid.send_and_receive([message]), lambda: here.phase(1, "gram"),
    ):  # fmt: skip
        with pytest.raises(RunStopped, match="what it has finished is kept"):
            look()


def test_a_revoked_member_is_known_to_the_grid_at_once(machine: Machine) -> None:
    number = machine.queue("pass")
    handle = machine.fleet.open_run(machine.store.bundle(number), {})
    here = deployment(machine, number)
    grid = DeployedGrid(machine.fleet.grid(handle), here)
    machine.admit("a")
    (node,) = here.members()
    machine.store.revoke("a", time.time())
    machine.members.look()
    assert not grid.registered(node)
    assert list(grid.push_messages([Message(RecordDict(), node, "train")])) == []


def test_a_round_that_is_told_twice_is_written_once(machine: Machine) -> None:
    number = machine.queue("pass")
    here = deployment(machine, number)
    here.journal()
    here.round(record(1))
    here.round(record(1))
    here.waiting(["a"])
    assert len(machine.store.rounds(number)) == 1
    with pytest.raises(Exception, match="another outcome"):
        here.round(replace(record(1), failed="no"))
