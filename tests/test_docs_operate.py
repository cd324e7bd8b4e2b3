"""The transcript in docs/operate.md, typed at terminals: one for each prompt, against real processes on 127.0.0.1.

Every ``console`` block is played, in order. The stable parts of what the document shows must be what is said.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "operate.md"
PROMPT = re.compile(r"(coordinator|north|south|west)\$ (.*)")
QUESTION = re.compile(r"(.*\[y/N\]): (\S+)")
PATIENCE = 90.0

# What is different every time, and what stands for it.
VARIABLE = (
    (r"\x1b\[[0-9;?]*[A-Za-z]|\^C", ""),
    (r"qsum1-[\w.-]+", "INVITATION"),
    (r"(coordinator\.example\.org|localhost):\d+", "ADDRESS"),
    (r"\b[0-9a-f]{64}\b", "DIGEST"),
    (r"\b[0-9a-f]{16}\.\.\.", "DIGEST..."),
    (r"--confirm [0-9a-f]+", "--confirm PLAN"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(Z| UTC)?", "TIME"),
    (r"\b[a-z]+(-[a-z]+){5}\b", "WORDS"),
    (r"\b\d+\.\d+\.\d+\.\d+\b", "IP"),
    (r"\bprocess \d+", "process NUMBER"),
    (r"(accuracy|hospital 1\.0\.0|, )( ?)[\d.]+( s\b)?", r"\1\2NUMBER\3"),
    (r"\s+", " "),
)


def stable(line: str) -> str:
    for pattern, instead in VARIABLE:
        line = re.sub(pattern, instead, line)
    return line.strip()


@dataclass
class Step:
    """A command of the document.

    Attributes:
        machine: at which it is typed.
        command: what is typed; a comment stands for the process that runs in the foreground there.
        shown: what the document shows of its output.
    """

    machine: str
    command: str
    shown: list[str] = field(default_factory=list)


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            prompt = PROMPT.fullmatch(line)
            if prompt:
                found.append(Step(prompt[1], prompt[2]))
            else:
                found[-1].shown.append(line)
    return found


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str]) -> None:
        self.command = command
        self._descriptor, theirs = os.openpty()
        self.process = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment,
            stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs),
        )  # fmt: skip
        os.close(theirs)
        self._unread = ""
        self._ended = False

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def line(self, until: float) -> str | None:
        """The next line; None when there will be none any more."""
        while "\n" not in self._unread and self._more(until):
            pass
        line, _, self._unread = self._unread.partition("\n")
        return line if line or not self._ended or self._unread else None

    def prompt(self, text: str, until: float) -> None:
        """Wait for a line that is not ended."""
        while text not in stable(self._unread.rpartition("\n")[2]):
            assert self._more(until), f"{self.command}: ended instead of asking: {text}"

    def _more(self, until: float) -> bool:
        if self._ended:
            return False
        ready, _, _ = select.select([self._descriptor], [], [], max(0.0, until - time.monotonic()))
        assert ready, f"{self.command}: silent, after: {self._unread}"
        try:
            data = os.read(self._descriptor, 4096)
        except OSError:
            data = b""
        self._ended = not data
        self._unread += data.decode(errors="replace").replace("\r", "")
        return not self._ended

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._descriptor)


@dataclass
class Players:
    """Whoever sits at the machines.

    Attributes:
        folder: one below it for each machine.
        running: what runs in the foreground of each machine's first terminal.
        invitations: by site, as the operator carries them.
        plans: digests of plans, by what the document has in their place.
    """

    folder: Path
    environments: dict[str, dict[str, str]]
    running: dict[str, Terminal] = field(default_factory=dict)
    opened: list[Terminal] = field(default_factory=list)
    invitations: dict[str, str] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)

    def play(self, step: Step) -> None:
        terminal = self._typed(step)
        if terminal is None:
            return
        self._compare(step, terminal)
        if terminal is not self.running.get(step.machine):
            planned = any("nothing has been done yet" in line for line in step.shown)
            assert terminal.process.wait(PATIENCE) == (2 if planned else 0), step.command

    def _typed(self, step: Step) -> Terminal | None:
        environment = self.environments[step.machine]
        if step.command.startswith("# "):
            if step.command == "# Ctrl-C":
                self.running[step.machine].type("\x03")
            return self.running[step.machine]
        if step.command.startswith("export "):
            name, _, value = step.command.removeprefix("export ").partition("=")
            environment[name] = value
            return None
        command = step.command.replace("0.0.0.0", "127.0.0.1").replace("coordinator.example.org", "localhost")  # noqa: S104
        for written, real in self.plans.items():
            command = command.replace(written, real)
        if " init " in command:
            command += " --port 0"
        terminal = Terminal(command, self.folder / step.machine, environment)
        self.opened.append(terminal)
        if re.search(r" (--)?start\b", command):
            self.running[step.machine] = terminal
        return terminal

    def _compare(self, step: Step, terminal: Terminal) -> None:
        until, skipping = time.monotonic() + PATIENCE, False
        for shown in step.shown:
            if shown == "...":
                skipping = True
                continue
            self._answer(step.machine, shown, terminal, until)
            passed: list[str] = []
            while True:
                line = terminal.line(until)
                assert line is not None, f"{step.command}: ended without {shown!r}, after {passed}"
                if stable(line) == stable(shown):
                    break
                passed.append(line)
                assert skipping, f"{step.command}: {line!r} is not {shown!r}"
            self._remember(shown, line)
            skipping = False
        if terminal is self.running.get(step.machine):
            return
        while (line := terminal.line(until)) is not None:
            assert skipping, f"{step.command}: said more: {line!r}"

    def _answer(self, machine: str, shown: str, terminal: Terminal, until: float) -> None:
        question = QUESTION.fullmatch(shown)
        if question:
            terminal.prompt(stable(question[1]), until)
            terminal.type(f"{question[2]}\n")
        elif shown.startswith("quorsum: paste the invitation"):
            terminal.prompt(stable(shown), until)
            terminal.type(f"{self.invitations[machine]}\n")

    def _remember(self, shown: str, line: str) -> None:
        site, tab, invitation = line.partition("\t")
        if tab and invitation.startswith("qsum1-"):
            self.invitations[site] = invitation.strip()
        written, real = (re.search(r"--confirm ([0-9a-f]+)", text) for text in (shown, line))
        if written and real:
            self.plans[written[1]] = real[1]


@pytest.fixture
def players(tmp_path: Path) -> Iterator[Players]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path), "TERM": "dumb", "COLUMNS": "120", "LANG": "C.UTF-8",
        # Three sites and a coordinator share one machine here.
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    machines = ("coordinator", "north", "south", "west")
    for machine in machines:
        shutil.copytree(
            ROOT / "examples" / "hospital", tmp_path / machine / "hospital",
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
    made = Players(tmp_path, {machine: dict(environment) for machine in machines})
    yield made
    for terminal in made.opened:
        terminal.close()


def test_the_document_is_what_happens(players: Players) -> None:
    played = steps(DOCUMENT.read_text(encoding="utf-8"))
    for step in played:
        players.play(step)

    # As many commands as the document says, and a model that has learnt.
    until_trained = [step.command.split()[1:3] for step in played if step.command.startswith("quorsum")][:8]
    assert [words[-1] for words in until_trained] == [
        "init", "start", "invite", "enroll", "enroll", "enroll", "approve", "hospital",
    ]  # fmt: skip
    with np.load(players.folder / "coordinator" / "result" / "model.npz") as model:
        assert sum(model[name].size for name in model) > 131072
    assert b'"accuracy": 0.9' in (players.folder / "coordinator" / "result" / "result.json").read_bytes()


def test_every_machine_of_the_document_is_known() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    unknown = [line for line in re.findall(r"^(\w+)\$ ", text, re.MULTILINE) if not PROMPT.match(f"{line}$ x")]
    assert not unknown
    assert all(step.shown or step.command.startswith(("export", "mkdir")) for step in steps(text))
