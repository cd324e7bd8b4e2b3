"""A federation of processes that were started as people start them: by typing ``quorsum`` and nothing else.

Run as a program it is one site of the suite ``plain``, which the site's command does not offer since it hides nothing:
``python process_federation.py HOME DIGEST``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_harness import credentials, until

from quorsum import flower
from quorsum.client import fleet, seal, settings
from quorsum.client.home import SiteHome
from quorsum.client.worker import Worker
from quorsum.crypto import PlainSite

QUORSUM = str(Path(sys.executable).parent / "quorsum")
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
WORDS = re.compile(r"the six words of this site: (\S+)")


@dataclass
class Process:
    """A command that goes on, and what it has said on stderr and stdout together."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """As if the power had failed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Federation:
    """A coordinator and its sites.

    Attributes:
        folder: for everything.
        coordinator_home: the coordinator's.
        typed: every command that was typed, without the program's name.
        running: processes that go on, by name; the coordinator is ``coordinator``.
    """

    folder: Path
    coordinator_home: Path
    typed: list[str] = field(default_factory=list)
    running: dict[str, Process] = field(default_factory=dict)
    plain: str = ""

    def home(self, name: str) -> Path:
        return self.folder / name

    def type(self, *words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command that ends."""
        self.typed.append(" ".join(map(str, words)))
        done = subprocess.run(
            [QUORSUM, *map(str, words)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.typed[-1]}: {done.stderr}{self.logs()}"
        return done

    def keep_typing(self, name: str, *words: str | Path, text: str = "") -> Process:
        """A command that goes on; ``text`` is pasted into it."""
        self.typed.append(" ".join(map(str, words)))
        made = self._start(name, [QUORSUM, *map(str, words)])
        assert made.process.stdin is not None
        made.process.stdin.write(text.encode())
        made.process.stdin.close()
        return made

    def _start(self, name: str, command: Sequence[str]) -> Process:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=ENVIRONMENT, start_new_session=True
            )
        self.running[name] = Process(process, log)
        return self.running[name]

    # --- from nothing to members, seven commands for three sites ---

    def init(self) -> None:
        self.type("coordinator", "init", "--home", self.coordinator_home, "--name", "lab", "--port", "0")

    def start_coordinator(self) -> None:
        began = self.keep_typing("coordinator", "coordinator", "start", "--home", self.coordinator_home)

        def up() -> bool:
            assert began.alive(), began.said()
            return self.status().get("pid") == began.process.pid

        until(up, 60)

    def enroll(self, names: Sequence[str], app: Path, options: Mapping[str, Sequence[str]]) -> None:
        """Invite, enroll and approve sites; each gets one string, and reads six words out."""
        invited = self.type("coordinator", "invite", *names, "--home", self.coordinator_home).stdout
        strings = dict(line.split("\t") for line in invited.splitlines())
        assert list(strings) == list(names)
        for name in names:
            words = ["site", "enroll", "--home", self.home(name), "--allow", app, *options.get(name, ())]
            self.keep_typing(name, *words, *([] if self.plain else ["--start"]), text=strings[name])
        read_out = {name: until(lambda name=name: WORDS.search(self.running[name].said()), 90)[1] for name in names}
        pairs = [f"{name}={read_out[name]}" for name in names]
        self.type("coordinator", "approve", *pairs, "--home", self.coordinator_home)
        if self.plain:
            for name in names:
                assert self.running[name].process.wait(60) == 0, self.running[name].said()
                self.start_site(name)

    def start_site(self, name: str) -> None:
        """Start a site that is a member."""
        if self.plain:
            self._start(name, [sys.executable, __file__, str(self.home(name)), self.plain])
        else:
            self.keep_typing(name, "site", "start", "--home", self.home(name))

    def connected(self, names: Sequence[str]) -> bool:
        return all(self.status().get("online", {}).get(name) for name in names)

    # --- what goes on ---

    def status(self) -> dict[str, Any]:
        """What the coordinator's process says of itself."""
        try:
            found: dict[str, Any] = json.loads((self.coordinator_home / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def run(self, app: Path, out: Path, **config: Any) -> Process:
        """Train, in a process that watches it."""
        settings = [word for key, value in config.items() for word in ("--run-config", f"{key}={value}")]
        return self.keep_typing("run", "run", app, "--home", self.coordinator_home, "--out", out, *settings)

    def logs(self) -> str:
        return "".join(f"\n--- {name}\n{one.said()[-3000:]}" for name, one in self.running.items())

    def close(self) -> None:
        for one in self.running.values():
            one.kill()


@contextmanager
def federation(folder: Path, *, coordinator_home: Path | None = None, plain: str = "") -> Iterator[Federation]:
    """A federation in a folder; ``plain`` is the digest of the app whose sites do not seal."""
    made = Federation(folder, coordinator_home or folder / "coordinator", plain=plain)
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    home, digest = SiteHome(Path(sys.argv[1])), sys.argv[2]
    flower.quiet()
    config = home.config()
    worker = Worker(
        home.path,
        lambda: {digest},
        settings.node_config(config),
        sealing=seal(PlainSite(), home=home.path, minimum_sites=config.minimum_sites),
    )
    fleet.serve(
        config.fleet_address,
        credentials(home.path),
        worker.handle,
        stop=threading.Event(),
        on_state=lambda state: print(state, flush=True),
        memory=home.path / "connected",
    )


if __name__ == "__main__":
    main()
