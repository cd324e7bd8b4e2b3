"""A coordinator and its sites as processes of their own on 127.0.0.1, for tests.

Run as a program it is one site: ``python coordinator_harness.py HOME DIGEST``, enrolled before with :func:`enroll`.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_harness import app_folder, credentials, until

from quorsum import cli, flower
from quorsum.client import fleet
from quorsum.client.enrollment import Waiting, enroll
from quorsum.client.home import SiteHome
from quorsum.client.worker import Worker
from quorsum.invitation import decode

QUORSUM = Path(sys.executable).parent / "quorsum"

SERVER = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp

from quorsum.server import QuorumStrategy

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    if config["fails"]:
        raise KeyError("what the app is missing")
    model = ArrayRecord({{"w": Array(np.zeros(64, np.float32))}})
    QuorumStrategy(tolerate=0, rule="{rule}").start(grid, model, num_rounds=config["rounds"], timeout=60)
"""


def training_app(folder: Path, *, rule: str = "mean", server: str = SERVER) -> Path:
    """An app that trains nothing much, sealed."""
    made = app_folder(folder)
    pyproject = made / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("depth.layers = 3", "fails = false"))
    (made / "tiny" / "server_app.py").write_text(server.format(rule=rule))
    return made


def quorsum(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a person types it, without a terminal. In this process: it would take a second to start each one."""
    words, out, err = [str(word) for word in arguments], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.run(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@dataclass
class Federation:
    """A coordinator's home, its process, and sites.

    Attributes:
        folder: for everything.
        process: of the coordinator, while it runs.
        sites: processes by name.
    """

    folder: Path
    process: subprocess.Popen[str] | None = None
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    followers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    def init(self, **lines: Any) -> None:
        """Make the home; ``lines`` are added to its configuration."""
        done = quorsum("coordinator", "init", "--home", self.home, "--name", "lab", "--port", "0")
        assert done.returncode == 0, done.stderr
        config = self.home / "coordinator.toml"
        more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        kept = [line for line in config.read_text().splitlines(keepends=True) if line.split(" ")[0] not in lines]
        config.write_text("".join(kept) + more)

    def do(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A command on this home."""
        return quorsum("coordinator", *words, "--home", self.home)

    def json(self, *words: str | Path) -> dict[str, Any]:
        """What a command prints as JSON."""
        found: dict[str, Any] = json.loads(self.do(*words, "--json").stdout)
        return found

    def start(self, *options: str) -> None:
        """Start the coordinator and wait until it has said that it runs."""
        log = (self.folder / "coordinator.log").open("a")
        self.process = subprocess.Popen(
            [QUORSUM, "coordinator", "start", "--home", self.home, *options],
            stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        until(self._is_up, 30)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            found = json.loads((self.home / "status.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(found["pid"] == self.process.pid)

    def log(self) -> str:
        return (self.folder / "coordinator.log").read_text()

    def kill(self) -> None:
        """As if the power had failed."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def end(self) -> int:
        """Ask the coordinator to end; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        self.process = None
        return status

    def enroll(self, *names: str) -> None:
        """Invite, enroll and approve sites."""
        lines = self.do("invite", *names).stdout.splitlines()
        strings = [line.split("\t")[-1] for line in lines]
        waiting: dict[str, Waiting] = {}
        threads = [
            threading.Thread(
                target=enroll,
                args=(decode(string), SiteHome(self.folder / name)),
                kwargs={"on_wait": lambda w, name=name: waiting.update({name: w}), "stop": threading.Event()}
                | {"poll_s": 0.1},
            )
            for name, string in zip(names, strings, strict=True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(waiting) == len(names))
        done = self.do("approve", *(f"{name}={waiting[name].words}" for name in names))
        assert done.returncode == 0, done.stderr
        for thread in threads:
            thread.join(20)

    def start_site(self, name: str, digest: str) -> None:
        """Start a site's process, which allows one bundle."""
        log = (self.folder / f"{name}.log").open("ab")
        arguments = [sys.executable, __file__, str(self.folder / name), digest]
        self.sites[name] = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)

    def kill_site(self, name: str) -> None:
        process = self.sites.pop(name)
        process.kill()
        process.wait()

    def follow(self, *words: str | Path) -> subprocess.Popen[str]:
        """A command that stays, such as ``run``."""
        follower = subprocess.Popen(
            [QUORSUM, *map(str, words), "--home", self.home],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.followers.append(follower)
        return follower

    def run_state(self, number: int = 1) -> dict[str, Any]:
        """A run, as ``coordinator runs`` tells it."""
        (found,) = [one for one in self.json("runs")["runs"] if one["run"] == number]
        return dict(found)

    def close(self) -> None:
        for process in [*self.followers, *self.sites.values()]:
            process.kill()
            process.wait()
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)


def seen(federation: Federation, names: Sequence[str]) -> bool:
    """Whether these sites are connected, by what the process says."""
    found = json.loads((federation.home / "status.json").read_text())
    return all(found["online"].get(name) for name in names)


def main() -> None:
    home, digest = Path(sys.argv[1]), sys.argv[2]
    flower.quiet()
    config = SiteHome(home).config()
    worker = Worker(home, lambda: {digest}, {"quorsum-accept-small-models": True, "partition-id": 0})
    fleet.serve(
        config.fleet_address,
        credentials(home),
        worker.handle,
        stop=threading.Event(),
        on_state=lambda state: print(f"{time.time():.2f} {state}", flush=True),
        memory=home / "connected",
        beat=0.5,
    )


if __name__ == "__main__":
    main()
