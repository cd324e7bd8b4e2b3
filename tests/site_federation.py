"""A coordinator for tests of the site's commands: enrollment and fleet on 127.0.0.1, and sites as processes.

What the coordinator's own process does besides, registering nodes that were approved and sending revoked ones away, is
done here by :meth:`Federation.look`.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enrollment_federation import Coordinator
from fleet_harness import free_port, until

from quorsum.invitation import encode
from quorsum.server.authority import ServerCertificate
from quorsum.server.fleet import FleetServer

QUORSUM = str(Path(sys.executable).parent / "quorsum")
ENV = {**os.environ, "COLUMNS": "80", "FLWR_TELEMETRY_ENABLED": "0"}


def site(*arguments: str, text: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """One command of a site's administrator; ``text`` is piped in."""
    return subprocess.run(
        [QUORSUM, "site", *arguments], input=text, capture_output=True, text=True, timeout=timeout, check=False, env=ENV
    )


def typed(*arguments: str, answers: list[tuple[str, str]], timeout: float = 60) -> tuple[int, str]:
    """A command on a terminal of 80 columns: what was asked and answered, and all that was shown."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [QUORSUM, "site", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=ENV, start_new_session=True
    )
    os.close(theirs)
    shown, deadline = "", time.monotonic() + timeout
    pending = list(answers)
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data.decode()
        if pending and pending[0][0] in shown:
            os.write(terminal, pending.pop(0)[1].encode())
    os.close(terminal)
    return process.wait(10), shown


@dataclass
class Running:
    """A command that goes on, and what it has said."""

    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 60) -> str:
        def there() -> str:
            text = self.said()
            if words in text:
                return text
            if self.process.poll() is not None and words not in self.said():
                raise AssertionError(f"it ended with {self.process.returncode} before {words!r}: {self.said()}")
            return ""

        try:
            return str(until(there, seconds))
        except TimeoutError:
            raise AssertionError(f"{words!r} was not said: {self.said()}") from None

    def end(self, seconds: float = 30) -> int:
        """As ``systemctl stop`` does it."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@dataclass
class Federation:
    """A coordinator, and the sites that were started."""

    folder: Path
    coordinator: Coordinator
    fleet: FleetServer
    nodes: dict[str, int] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        approved = {row.name: row for row in self.coordinator.store.approved_sites()}
        for name in set(approved) - set(self.nodes):
            self.nodes[name] = self.fleet.register(approved[name].node_key.encode(), name)
        for name in set(self.nodes) - set(approved):
            self.fleet.unregister(self.nodes.pop(name))

    def home(self, name: str) -> str:
        return str(self.folder / name)

    def invitation(self, name: str, **options: Any) -> str:
        return encode(self.coordinator.invite(name, **options))

    def approve(self, name: str) -> str:
        """Wait until a site is there, and approve it; its words."""
        try:
            row = until(lambda: self.coordinator.store.site(name), 60)
        except TimeoutError:
            raise AssertionError(f"{name} does not ask to join: {[one.said() for one in self.running]}") from None
        self.coordinator.approve(name)
        return str(row.words)

    def start(self, *arguments: str, text: str | None = None) -> Running:
        """A command that goes on."""
        log = self.folder / f"log-{len(self.running)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [QUORSUM, "site", *arguments], stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, env=ENV
            )
        assert process.stdin is not None
        process.stdin.write(text or "")
        process.stdin.close()
        made = Running(process, log)
        self.running.append(made)
        return made

    def member(self, name: str, *allow: str) -> str:
        """An enrolled site, through the commands; its home."""
        options = [word for one in allow for word in ("--allow", one)]
        enrolling = self.start("enroll", "--home", self.home(name), *options, text=self.invitation(name))
        self.approve(name)
        assert enrolling.process.wait(60) == 0, enrolling.said()
        return self.home(name)

    def online(self) -> list[str]:
        return sorted(node.name for node in self.fleet.nodes().values() if node.online)


@contextmanager
def federation(folder: Path, **config: Any) -> Iterator[Federation]:
    port = free_port()
    coordinator = Coordinator(folder / "coordinator", fleet_port=port, **config)
    ServerCertificate(coordinator.authority, coordinator.config.advertise, coordinator.clock.now, coordinator.home)
    home = coordinator.home
    fleet = FleetServer(
        "127.0.0.1", port, home / "server.crt", home / "server.key", home / "ca.crt", lease=10.0, hold=0.3
    )
    fleet.start()
    made = Federation(folder, coordinator, fleet)

    def looking() -> None:
        while not made.over.wait(0.05):
            made.look()

    thread = threading.Thread(target=looking, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        for one in made.running:
            one.process.kill()
            one.process.wait()
        made.over.set()
        thread.join()
        fleet.stop()
        coordinator.stop()
