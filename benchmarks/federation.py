"""What a federation of processes costs: a coordinator and sites that were started by typing, over TLS on this machine.

Two figures: how long a sealed round takes (all its phases, the network, the journal, signatures), with updates of about
1 MB and nearly no training; and how much memory the processes take when the uploads are large.

    python benchmarks/federation.py
    python benchmarks/federation.py --sites 3 --dimension 12500000 --rounds 2

The first round is left out of the medians: the processes load the app in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

QUORSUM = str(Path(sys.executable).with_name("quorsum"))
PYPROJECT = """
[project]
name = "load"
version = "1.0.0"

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
clientapp = "load.client_app:app"
serverapp = "load.server_app:app"

[tool.flwr.app.config]
rounds = 5
dimension = 250000
tolerate = 0
"""
CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    (name, model), = message.content["arrays"].items()
    values = model.numpy() + np.random.default_rng().standard_normal(model.shape, np.float32) * np.float32(0.01)
    arrays = ArrayRecord({name: Array(values)})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp

from quorsum.server import QuorumStrategy

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    model = ArrayRecord({"w": Array(np.zeros(config["dimension"], np.float32))})
    strategy = QuorumStrategy(rule="mean", tolerate=config["tolerate"], fraction_evaluate=0.0)
    strategy.start(grid, model, num_rounds=config["rounds"])
"""
MB = 1e6


def make_app(folder: Path) -> Path:
    (folder / "load").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "load" / "__init__.py").write_text("")
    (folder / "load" / "client_app.py").write_text(CLIENT)
    (folder / "load" / "server_app.py").write_text(SERVER)
    return folder


def peak_memory(process: int) -> int:
    """Largest resident set of a process so far, in bytes; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


class Peaks(threading.Thread):
    """Looks at the memory of processes until it is told to end."""

    def __init__(self, processes: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.processes, self.over = processes, threading.Event()
        self.peaks = dict.fromkeys(processes, 0)

    def run(self) -> None:
        """Look ten times a second."""
        while not self.over.wait(0.1):
            for name, process in self.processes.items():
                self.peaks[name] = max(self.peaks[name], peak_memory(process))


class Federation:
    """A coordinator and sites in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "coordinator"
        self.opened: list[subprocess.Popen[str]] = []

    def type(self, *words: str | Path) -> str:
        """A command that ends; what it prints."""
        command = [QUORSUM, *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout

    def begin(self, name: str, *words: str | Path, text: str = "") -> subprocess.Popen[str]:
        """A command that goes on; ``text`` is pasted into it."""
        log: IO[str] = (self.folder / f"{name}.log").open("w")
        with log:
            started = subprocess.Popen(
                [QUORSUM, *map(str, words)], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )
        assert started.stdin is not None  # noqa: S101 - for the type checker
        started.stdin.write(text)
        started.stdin.close()
        self.opened.append(started)
        return started

    def wait_for(self, name: str, pattern: str) -> str:
        """Wait until a command has said something."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            text = (self.folder / f"{name}.log").read_text()
            found = re.search(pattern, text)
            if found:
                return found[1]
            time.sleep(0.1)
        raise TimeoutError(f"{name} did not say {pattern!r}: {text}")

    def start(self, names: list[str], app: Path) -> dict[str, int]:
        """From nothing to connected sites; the process that works for each of them."""
        self.type("coordinator", "init", "--home", self.home, "--port", "0")
        coordinator = self.begin("coordinator-log", "coordinator", "start", "--home", self.home)
        self.wait_for("coordinator-log", "(the coordinator runs)")
        lines = self.type("coordinator", "invite", *names, "--home", self.home).splitlines()
        for name, line in zip(names, lines, strict=True):
            command = ("site", "enroll", "--home", self.folder / name, "--allow", app, "--start")
            self.begin(name, *command, text=line.partition("\t")[2])
        words = [f"{name}={self.wait_for(name, 'six words of this site: ([a-z-]+)')}" for name in names]
        self.type("coordinator", "approve", *words, "--home", self.home)
        for name in names:
            self.wait_for(name, "(connected to)")
        workers = {name: json.loads((self.folder / name / "status.json").read_text())["pid"] for name in names}
        return {"coordinator": coordinator.pid, **workers}

    def close(self) -> None:
        """End everything that was begun."""
        for process in self.opened:
            process.send_signal(signal.SIGTERM)
        for process in self.opened:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(sites: int, dimension: int, rounds: int) -> dict[str, Any]:
    """Play rounds and return what they cost; seconds, bytes."""
    names = [f"site-{k + 1}" for k in range(sites)]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        federation = Federation(folder)
        opened.callback(federation.close)
        app = make_app(folder / "app")
        processes = federation.start(names, app)
        idle = {name: peak_memory(process) for name, process in processes.items()}
        peaks = Peaks(processes)
        peaks.start()
        settings = [f"rounds={rounds + 1}", f"dimension={dimension}"]
        config = [word for setting in settings for word in ("--run-config", setting)]
        result = json.loads(federation.type("run", app, "--home", federation.home, "--json", *config))
        peaks.over.set()
        peaks.join()
    played = result["rounds"]
    if len(played) != rounds + 1 or any(record["failed"] or record["codes"] for record in played):
        raise RuntimeError(f"not every round went well: {[record['failed'] or record['codes'] for record in played]}")
    later = played[1:]
    steps = {step: statistics.median(r["seconds"][step] for r in later) for step in ("total", "geometry", "open")}
    # From one round to the next: what is between rounds, and the journal, are part of it.
    whole = (result["ended"] - result["started"]) / len(played)
    workers = [peaks.peaks[name] for name in names]
    return {
        "seconds_per_round": steps["total"],
        "slowest": max(r["seconds"]["total"] for r in later),
        "geometry": steps["geometry"],
        "open": steps["open"],
        "run_per_round": whole,
        "up_per_site": later[0]["bytes"]["up_per_site"],
        "down_per_site": later[0]["bytes"]["down_per_site"],
        "coordinator_peak": peaks.peaks["coordinator"],
        "coordinator_idle": idle["coordinator"],
        "site_peak": max(workers),
        "site_idle": max(idle[name] for name in names),
    }


def print_table(sites: int, dimension: int, rounds: int, found: dict[str, Any]) -> None:
    head = f"{sites} sites, d = {dimension} ({4 * dimension / MB:.1f} MB in float32), {rounds} rounds after the first"
    table = Table(title=f"A federation of processes: {head}")
    table.add_column("")
    table.add_column("measured", justify="right")
    for name, text in (
        ("a sealed round, median", f"{found['seconds_per_round']:.2f} s"),
        ("the slowest", f"{found['slowest']:.2f} s"),
        ("of it: geometry (root, check, gram)", f"{found['geometry']:.2f} s"),
        ("of it: open (ticket, sum)", f"{found['open']:.2f} s"),
        ("the whole run, per round", f"{found['run_per_round']:.2f} s"),
        ("up per site and round", f"{found['up_per_site'] / MB:.1f} MB"),
        ("down per site and round", f"{found['down_per_site'] / MB:.1f} MB"),
        (
            "coordinator, peak memory (idle)",
            f"{found['coordinator_peak'] / MB:.0f} MB ({found['coordinator_idle'] / MB:.0f})",
        ),
        ("a site, peak memory (idle)", f"{found['site_peak'] / MB:.0f} MB ({found['site_idle'] / MB:.0f})"),
    ):
        table.add_row(name, text)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=5, help="that are measured; one more is played before them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.sites, arguments.dimension, arguments.rounds)
    if arguments.json:
        told = {"machine": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count()}
        print(json.dumps({**told, **vars(arguments), **found}, indent=1))
    else:
        print_table(arguments.sites, arguments.dimension, arguments.rounds, found)


if __name__ == "__main__":
    main()
