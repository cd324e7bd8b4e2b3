"""Plays the runs that were asked for, one after the other, in a thread of the coordinator's process.

A run is begun as often as it takes. Whatever ended the process, or the attempt, the app is started again from its
beginning, and its strategy goes on where the journal ends; see :mod:`quorsum.server.checkpoint`. So there is nothing to
save on the way out, and the way out is short: the app's thread is stopped by an exception wherever it next looks at
the grid.

=====================================  ============================================================================
what happens                           what becomes of the run
=====================================  ============================================================================
the app returns                        ``finished``
the app raises                         ``failed``, with the kind of the exception and its text
the operator stops it                  ``stopped``
the process ends or is killed          stays ``running``; the next process goes on
the disk is full, the state is locked  stays ``running``; tried again until it goes on
=====================================  ============================================================================
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal, TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from quorsum import bundles, flower
from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.suite import Site
from quorsum.errors import DataError, QuorsumError, UsageError
from quorsum.logs import event, scrub_text
from quorsum.server.checkpoint import FolderRun, RunState
from quorsum.server.deployment import Member, RunStopped
from quorsum.server.fleet import FleetGrid, FleetServer, RunHandle
from quorsum.server.home import CoordinatorHome
from quorsum.server.records import RoundRecord
from quorsum.server.status import Board
from quorsum.server.store import RunRow, SiteRow, Store

__all__ = ["DeployedGrid", "Members", "RunDeployment", "Runner", "last_state"]

log = logging.getLogger("quorsum.runner")

AGAIN: Final = 3.0
"""Seconds until a run is tried again that the machine kept from going on."""

RunEnd: TypeAlias = Literal["finished", "failed", "stopped"]

_LOOK: Final = 0.2
# What passes when somebody makes room or raises a limit, or by itself.
_PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS}
)
_PASSING_CODES: Final = frozenset({"state-unusable"})


class Members:
    """The members, as the fleet knows them. May be asked from several threads.

    Args:
        store: who is a member.
        fleet: who may connect.
    """

    def __init__(self, store: Store, fleet: FleetServer) -> None:
        self._store, self._fleet = store, fleet
        self._lock = threading.Lock()
        # Enrollment's number: its node, its row. A name that comes back with other keys is another enrollment.
        self._known: dict[int, tuple[int, SiteRow]] = {}
        self._unusable: set[int] = set()

    def look(self) -> None:
        """Let in who has been approved, send away who has been revoked or has left.

        Raises:
            DataError: the state cannot be read.
        """
        with self._lock:
            approved = {site.id: site for site in self._store.approved_sites()}
            for number in [number for number in self._known if number not in approved]:
                node, site = self._known.pop(number)
                self._fleet.unregister(node)
                event(log, "site-sent-away", f"{site.name} is no member any more", site=site.name)
            for number, site in approved.items():
                if number not in self._known and number not in self._unusable:
                    self._let_in(site)

    def _let_in(self, site: SiteRow) -> None:
        try:
            node = self._fleet.register(site.node_key.encode("ascii"), site.name)
        except UsageError as error:
            # One site's key must not keep the others out.
            self._unusable.add(site.id)
            event(log, "site-unusable", f"{site.name} cannot take part: {error}", logging.ERROR, site=site.name)
            return
        self._known[site.id] = node, site
        event(log, "site-let-in", f"{site.name} may connect", site=site.name)

    def by_node(self) -> Mapping[int, Member]:
        """Members by Flower's node id, connected or not."""
        self.look()
        with self._lock:
            return {
                node: Member(site.name, PublicIdentity.from_hex(site.identity)) for node, site in self._known.values()
            }

    def online(self) -> Mapping[int, tuple[Site, bool]]:
        """Name of each member by node id, and whether its process is connected."""
        views = self._fleet.nodes()
        with self._lock:
            return {node: (site.name, node in views and views[node].online) for node, site in self._known.values()}


class RunDeployment:
    """The federation around one run; see :class:`~quorsum.server.deployment.Deployment`.

    Args:
        run: number of the run.
        folder: where its journals are.
        members: of the federation.
        store: where every round is written.
        board: told what goes on.
        patience: seconds to wait for members that are not connected.
        stopped: whether the run is to end.
    """

    def __init__(
        self,
        run: int,
        folder: Path,
        members: Members,
        store: Store,
        board: Board,
        patience: float,
        stopped: Callable[[], bool],
    ) -> None:
        self._run, self._folder, self._members, self._store, self._board = run, folder, members, store, board
        self._patience, self._stopped = patience, stopped
        self._calls = 0
        # Rounds that earlier strategies of the same app have played.
        self._before = 0
        self._last: FolderRun | None = None

    @property
    def patience(self) -> float:
        """Seconds to wait at the beginning of a round for members that are not connected, when enough others are."""
        return self._patience

    def members(self) -> Mapping[int, Member]:
        """Members in good standing by Flower's node id, connected or not."""
        return self._members.by_node()

    def online(self) -> frozenset[int]:
        """Nodes whose process is connected now."""
        return frozenset(node for node, (_, there) in self._members.online().items() if there)

    def journal(self) -> FolderRun:
        """Where the next ``start`` of this run keeps what must survive; the same for the n-th call after a restart."""
        if self._last is not None:
            state = self._last.load()
            self._before += 0 if state is None else state.number
        self._calls += 1
        self._last = FolderRun(self._folder / f"{self._calls}")
        state = self._last.load()
        for record in () if state is None else state.records:
            # The process may have been killed between the journal and the state.
            self._write(record)
        return self._last

    def waiting(self, sites: Sequence[Site]) -> None:
        """Note for whom the run waits."""
        self._board.waiting(sites)

    def phase(self, number: int, phase: str) -> None:
        """Note what begins.

        Raises:
            RunStopped: the run is to end.
        """
        self.go_on()
        self._board.phase(self._before + number, phase)

    def round(self, record: RoundRecord) -> None:
        """Keep the record of a round, and note it."""
        self._write(record)
        self._board.round(record)
        number = self._before + record.round
        outcome = f"failed: {record.failed}" if record.failed else f"{len(record.accepted)} sites in the model"
        event(
            *(log, "round", f"run {self._run}, round {number}: {outcome}"),
            run=self._run, round=number, failed=record.failed, accepted=record.accepted, codes=record.codes,
            seconds=record.seconds, bytes=record.bytes, metrics=record.metrics,
        )  # fmt: skip

    def stopped(self) -> bool:
        """Whether the run is to end now."""
        return self._stopped()

    def go_on(self) -> None:
        """Do nothing, or end the run.

        Raises:
            RunStopped: the run is to end.
        """
        if self._stopped():
            raise RunStopped(f"run {self._run} was stopped; what it has finished is kept")

    def _write(self, record: RoundRecord) -> None:
        text = json.dumps({**asdict(record), "call": self._calls}, sort_keys=True)
        self._store.append_round(self._run, self._before + record.round, text, time.time())


class DeployedGrid(Grid):
    """The fleet's grid, with the federation around it.

    Whoever waits looks at it often, so this is where a run that is to end is ended, also in the middle of a phase.

    Args:
        grid: the way to the sites.
        deployment: the federation around the run.
    """

    def __init__(self, grid: FleetGrid, deployment: RunDeployment) -> None:
        self._grid = grid
        self.deployment = deployment

    def set_run(self, run: flower.Run) -> None:
        """Set the run this grid belongs to."""
        self._grid.set_run(run)

    @property
    def run(self) -> flower.Run:
        """The run this grid belongs to."""
        return self._grid.run

    def activation(self, node_id: int) -> str | None:
        """Something that changes with every process of the node; None while it is not connected.

        Raises:
            RunStopped: the run is to end.
        """
        self.deployment.go_on()
        return self._grid.activation(node_id)

    def registered(self, node_id: int) -> bool:
        """Whether the node still belongs to the federation.

        Raises:
            RunStopped: the run is to end.
        """
        self.deployment.go_on()
        return self._grid.registered(node_id)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are connected.

        Raises:
            RunStopped: the run is to end.
        """
        self.deployment.go_on()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep each message for its node; a message to a node that does not exist gets no id.

        Raises:
            RunStopped: the run is to end.
        """
        self.deployment.go_on()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are complete; each is handed out once and forgotten here."""
        return self._grid.pull_messages(message_ids)

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Forget messages, and replies to them, that nobody waits for any more."""
        self._grid.withdraw(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for their replies, all of which are held in memory.

        Raises:
            RunStopped: the run is to end.
        """
        self.deployment.go_on()
        return self._grid.send_and_receive(messages, timeout=timeout)


class Runner:
    """The thread that plays runs.

    Args:
        home: the coordinator's folder.
        store: what was asked for.
        fleet: the way to the sites.
        members: of the federation.
        board: told what goes on.
        patience: seconds to wait at the beginning of a round for members that are not connected.
    """

    def __init__(
        self,
        home: CoordinatorHome,
        store: Store,
        fleet: FleetServer,
        members: Members,
        board: Board,
        patience: float,
    ) -> None:
        self._home, self._store, self._fleet, self._members = home, store, fleet, members
        self._board, self._patience = board, patience
        self._ending, self._stop_run = threading.Event(), threading.Event()
        self._playing: int | None = None
        self._thread = threading.Thread(target=self._work, name="runner", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def look(self) -> None:
        """Notice that the operator has stopped the run. Call it often.

        Raises:
            DataError: the state cannot be read.
        """
        playing = self._playing
        if playing is not None and self._store.run(playing).state == "stopping":
            self._stop_run.set()

    def stop(self, seconds: float) -> bool:
        """End the thread; the run that it plays stays ``running``.

        Returns:
            whether it has ended within so many seconds; if not, the app is busy with something of its own.
        """
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _stopped(self) -> bool:
        return self._ending.is_set() or self._stop_run.is_set()

    def _work(self) -> None:
        while not self._ending.is_set():
            try:
                row = self._store.next_run()
                if row is None:
                    self._ending.wait(_LOOK)
                elif row.state == "stopping":
                    self._store.set_run_state(row.id, "stopped", time.time(), row.detail)
                else:
                    self._play(row)
            except Exception:
                # Whatever it was, the next run must find somebody who plays it.
                log.exception("a run could not be played; it is tried again")
                self._ending.wait(AGAIN)

    def _play(self, row: RunRow) -> None:
        self._stop_run.clear()
        self._playing = row.id
        self._board.begin_run(row.id, row.name)
        resumed = "goes on" if row.state == "running" else "begins"
        event(log, "run-begins", f"run {row.id} ({row.name}) {resumed}", run=row.id, bundle=row.bundle_digest)
        try:
            self._store.set_run_state(row.id, "running", time.time())
            self._attempt(row)
            self._end(row.id, "finished", "")
        except RunStopped:
            if not self._ending.is_set():
                self._end(row.id, "stopped", "")
        except Exception as error:
            if _passes(error):
                self._wait_for_room(row.id, error)
            else:
                log.exception("run %d failed", row.id)
                self._end(row.id, "failed", _reason(error))
        finally:
            self._playing = None
            self._board.end_run()

    def _attempt(self, row: RunRow) -> None:
        bundle = self._store.bundle(row.id)
        handle = self._fleet.open_run(bundle, json.loads(row.config))
        try:
            folder = self._home.run_folder(row.id)
            app = _load(bundle, folder / "app")
            deployment = RunDeployment(
                row.id, folder, self._members, self._store, self._board, self._patience, self._stopped
            )
            if row.started is not None:
                self._gather(deployment)
            _call(app, DeployedGrid(self._fleet.grid(handle), deployment), handle)
        finally:
            self._fleet.close_run(handle)

    def _gather(self, deployment: RunDeployment) -> None:
        """Give the members the time to come back that a new process of the coordinator takes from them.

        An open round is played with those it began with, and whoever has never connected to this process cannot be
        asked.
        """
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            deployment.go_on()
            absent = sorted(site for site, there in self._members.online().values() if not there)
            deployment.waiting(absent)
            if not absent:
                return
            time.sleep(_LOOK)

    def _end(self, run: int, state: RunEnd, detail: str) -> None:
        self._store.set_run_state(run, state, time.time(), detail)
        event(log, f"run-{state}", f"run {run} {state}{': ' if detail else ''}{detail}", run=run)

    def _wait_for_room(self, run: int, error: Exception) -> None:
        sentence = f"run {run} cannot go on: {_reason(error)}; it is tried again until it can"
        self._board.trouble(sentence)
        event(log, "run-interrupted", sentence, logging.ERROR, run=run)
        self._ending.wait(AGAIN)


def _load(bundle: bytes, folder: Path) -> ServerApp:
    told = bundles.describe(bundle)
    if "serverapp" not in told.components:
        raise UsageError(f"the app {told.name} has no serverapp in its pyproject.toml")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    bundles.unpack(bundle, folder)
    return flower.load_component(folder, told.components["serverapp"], ServerApp)


def _call(app: ServerApp, grid: Grid, handle: RunHandle) -> None:
    context = Context(handle.run_id, 0, {}, RecordDict(), dict(handle.config))
    try:
        app(grid, context)
    except Exception:
        raise
    except BaseException as error:
        # sys.exit() in an app ends the app, not the coordinator.
        raise UsageError(f"the app ended with {type(error).__name__}: {error}") from error


def _passes(error: Exception) -> bool:
    if isinstance(error, DataError):
        return error.code in _PASSING_CODES
    return isinstance(error, OSError) and error.errno in _PASSING


def _reason(error: Exception) -> str:
    text = str(error)
    return scrub_text(text if isinstance(error, QuorsumError) else f"{type(error).__name__}: {text}")


def last_state(folder: Path) -> RunState | None:
    """The last thing that a run's journal holds: that of the last strategy that its app started.

    Args:
        folder: of the run.

    Raises:
        Refusal: ``checkpoint-damaged``.
    """
    calls = sorted(
        (path for path in folder.glob("*") if path.name.isdigit() and (path / "state.npz").exists()),
        key=lambda path: int(path.name),
    )
    return FolderRun(calls[-1]).load() if calls else None
