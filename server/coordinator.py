"""The coordinator's process: everything in one, and nothing in it that must not be killed.

Three ports, each for one purpose: **enrollment** (anybody, TLS, one call), **members** (TLS with a certificate of the
federation), **fleet** (the same, Flower's Fleet API and nothing else). There is no port for the operator: the command
line writes into the state and this process looks there, several times a second:

1. members that were approved are let in; those that were revoked or have left are sent away;
2. runs that were asked for are begun; one that was begun by a former process is resumed, before all others;
3. the certificate of the ports is renewed when a third of its time is left;
4. what goes on is written for the command line and for Prometheus.

All it knows is in its folder. ``kill -9`` at any time loses nothing but the time since the last finished step.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from types import FrameType
from typing import Final

from filelock import FileLock, Timeout

from quorsum import flower, logs
from quorsum.errors import QuorsumError, Refusal, SiteFault
from quorsum.server import status
from quorsum.server.authority import ServerCertificate, load_authority
from quorsum.server.enrollment import EnrollmentService, now_utc
from quorsum.server.fleet import FleetServer
from quorsum.server.home import CoordinatorHome
from quorsum.server.runner import Members, Runner
from quorsum.server.status import Board

__all__ = ["Coordinator", "serve"]

log = logging.getLogger("quorsum.coordinator")

LOOK: Final = 0.3
"""Seconds between two looks at the state."""

_RENEW: Final = 60.0
# A process that was killed a moment ago may not have let go of its lock yet.
_LOCK: Final = 2.0
_END: Final = 10.0


class Coordinator:
    """All parts of the process, from :meth:`start` to :meth:`stop`.

    Args:
        home: the coordinator's folder.
        clock: the time, with time zone; decides when certificates are issued and renewed.

    Attributes:
        listeners: addresses by what is served there; after :meth:`start`.
    """

    def __init__(self, home: CoordinatorHome, clock: Callable[[], datetime] = now_utc) -> None:
        self._home, self._clock = home, clock
        self._config = home.config()
        self._opened = ExitStack()
        self._said = ""
        self._renewed = time.monotonic()
        self.listeners: dict[str, str] = {}

    def start(self) -> None:
        """Open the ports and begin.

        Raises:
            Refusal: ``already-running``: another process runs on this folder.
            KeyMaterialError, DataError: a file in the folder cannot be used.
            UsageError: a port cannot be opened, or the configuration is wrong.
        """
        try:
            self._start()
        except BaseException:
            self._opened.close()
            raise

    def _start(self) -> None:
        home, config, opened = self._home, self._config, self._opened
        opened.enter_context(_only_one(home))
        for unfinished in home.path.glob(f"{home.status_file.name}.*.new"):
            # Of a process that was killed while it wrote.
            unfinished.unlink(missing_ok=True)
        store = home.store()
        opened.callback(store.close)
        authority = load_authority(home.path)
        self._certificate = ServerCertificate(authority, config.advertise, self._clock, home.path)
        self._chain = self._certificate.current()[1]
        self._board = Board(home.status_file, config.federation)
        opened.enter_context(_counting(self._board))
        self._fleet = FleetServer(
            config.host, config.fleet_port,
            home.path / "server.crt", home.path / "server.key", home.path / "ca.crt",
        )  # fmt: skip
        self._members = Members(store, self._fleet)
        # Before the port opens: a site that knocks early would be told that it is no member.
        self._members.look()
        self._fleet.start()
        opened.callback(self._fleet.stop)
        service = EnrollmentService(store, authority, config, self._clock, server_certificate=self._certificate)
        service.fleet_address = config.address(int(self._fleet.address.rpartition(":")[2]))
        service.start()
        opened.callback(service.stop)
        self.listeners = {
            "enrollment": service.enrollment_address,
            "members": service.members_address,
            "fleet": service.fleet_address,
        }
        if config.metrics_port is not None:
            from quorsum.server import metrics

            opened.callback(metrics.serve(self._board.counted, config.metrics_port))
            self.listeners["metrics"] = f"{metrics.HOST}:{config.metrics_port}"
        self._board.listens(**self.listeners)
        store.note(time.time(), "coordinator", "start", "coordinator", f"process {os.getpid()}")
        opened.callback(self._note_end, store.note)
        self._runner = Runner(home, store, self._fleet, self._members, self._board, config.patience)
        self._runner.start()
        self._board.write(now=True)

    def supervise(self, ending: threading.Event) -> None:
        """Look at the state until ``ending`` is set."""
        while not ending.wait(LOOK):
            try:
                self.look()
                self._trouble("")
            except (QuorsumError, OSError) as error:
                # A full disk, a state that is locked for long: it must still be here when that is over.
                self._trouble(f"{type(error).__name__}: {error}")

    def look(self) -> None:
        """Look at the state once.

        Raises:
            DataError: the state cannot be read.
            KeyMaterialError: the certificate cannot be renewed.
            OSError: the status cannot be written.
        """
        self._members.look()
        self._runner.look()
        self._board.online(dict(self._members.online().values()))
        if time.monotonic() - self._renewed > _RENEW:
            self.renew()
        self._board.write()

    def renew(self) -> None:
        """Renew the certificate of the ports, if it is time.

        Raises:
            KeyMaterialError, UsageError: it cannot be renewed.
        """
        self._renewed = time.monotonic()
        chain = self._certificate.current()[1]
        if chain != self._chain:
            self._fleet.reload_certificate()
            self._chain = chain
            logs.event(log, "certificate-renewed", "the certificate of the ports has been renewed")

    def stop(self) -> bool:
        """Stop the run where it is and close the ports.

        Returns:
            whether everything has ended; if not, the app of the run is busy with something of its own, and the process
            can be ended all the same.
        """
        ended = self._runner.stop(_END)
        with suppress(OSError):
            self._board.write(now=True)
        if ended:
            self._opened.close()
        return ended

    def _note_end(self, note: Callable[[float, str, str, str], None]) -> None:
        with suppress(QuorsumError):
            note(time.time(), "coordinator", "stop", "coordinator")

    def _trouble(self, sentence: str) -> None:
        if sentence and sentence != self._said:
            logs.event(log, "trouble", sentence, logging.ERROR)
        elif self._said and not sentence:
            logs.event(log, "trouble-over", "that is over; the coordinator goes on")
        self._said = sentence


@contextmanager
def _only_one(home: CoordinatorHome) -> Iterator[None]:
    lock = FileLock(home.lock_file, timeout=_LOCK, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        found = status.read(home.status_file)
        who = f" (process {found['pid']})" if found else ""
        raise Refusal("already-running", f"another coordinator runs on {home.path}{who}; stop it first") from None
    try:
        yield
    finally:
        lock.release()


class _Counter(logging.Handler):
    """Counts refusals where they are logged, because those who refuse know nothing of a board."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        if record.msg == "left out: %s" and args and isinstance(args[0], SiteFault):
            self._board.left_out(args[0])
        elif record.msg == "refused %s: %s: %s" and len(args) == 3:
            self._board.refused_call(str(args[1]))


@contextmanager
def _counting(board: Board) -> Iterator[None]:
    counter = _Counter(board)
    loggers = [logging.getLogger(name) for name in ("quorsum.enrollment", "flwr.quorsum")]
    for logger in loggers:
        # Counted whether it is shown or not.
        logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
        logger.addHandler(counter)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(counter)


def _all_descriptors() -> None:
    """Take as many open files as the system grants: each site keeps connections, and so may whoever only knocks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(home: CoordinatorHome, *, quiet: bool = False, as_json: bool = False) -> None:
    """Run the process until SIGTERM or SIGINT. It must be called in the main thread.

    Args:
        home: the coordinator's folder.
        quiet: say only what is wrong.
        as_json: log JSON, whatever the configuration says.

    Raises:
        Refusal, KeyMaterialError, DataError, UsageError: as :meth:`Coordinator.start`.
    """
    style = "json" if as_json else home.config().log_format
    flower.quiet()
    logs.configure(style, sys.stderr, quiet=quiet)
    _all_descriptors()
    coordinator = Coordinator(home)
    ending = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    coordinator.start()
    for name, address in coordinator.listeners.items():
        logs.event(log, "listening", f"{name} at {address}", what=name, address=address)
    logs.event(log, "started", f"the coordinator runs; next: {home.command('coordinator', 'invite', 'SITE')}")
    coordinator.supervise(ending)
    logs.event(log, "stopping", "the coordinator stops; a run goes on when it is started again")
    if not coordinator.stop():
        # The journal has what matters; an app that does not listen cannot keep the process.
        logging.shutdown()
        os._exit(0)
