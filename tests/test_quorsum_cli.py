"""The command line as a person types it: results on stdout, the rest on stderr, refusals that name the next step."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quorsum import __version__
from quorsum.cli import run
from quorsum.crypto import CkksSiteKey

QUORSUM = Path(sys.executable).parent / "quorsum"


def quorsum(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [QUORSUM, *arguments], capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def test_version_and_help() -> None:
    assert quorsum("--version").stdout == f"quorsum {__version__}\n"
    for command in ("simulate", "demo", "keygen"):
        assert command in quorsum("--help").stdout
        assert quorsum(command, "--help").returncode == 0


def test_simulate_writes_json_and_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    done = quorsum("simulate", "--rounds", "2", "--suite", "plain", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert "round   2" in done.stderr
    assert "site-" in done.stderr


def test_simulate_prints_a_table_on_stdout_and_progress_on_stderr() -> None:
    done = quorsum("simulate", "--rounds", "1", "--suite", "plain")
    assert done.returncode == 0
    assert "accuracy" in done.stdout.lower()
    assert "round   1" not in done.stdout
    assert "round   1" in done.stderr


def test_simulate_on_a_csv_of_ones_own(tmp_path: Path) -> None:
    rows = [f"{k % 7},{(k * k) % 11},{int((k % 7) > 3)}" for k in range(400)]
    table = tmp_path / "own.csv"
    table.write_text("a,b,fraud\n" + "\n".join(rows) + "\n")
    done = quorsum(
        "simulate", "--data", str(table), "--label", "fraud", "--sites", "5", "--poisoned", "1", "--rounds", "4",
        "--suite", "plain", "--alpha", "1.0", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["final"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "--sites", "6"], "needs at least 9 sites"),
        (["simulate", "--sites", "ten"], "--sites"),
        (["simulate", "--colour", "red"], "--colour"),
        (["simulate", "--data", "digitz"], "digits"),
        (["simulate", "--data", "/nowhere/x.csv", "--label", "y"], "/nowhere/x.csv"),
        (["simulate", "--alpha", "often"], "--alpha"),
        (["simulate", "--alpha", "0"], "alpha"),
        (["simulate", "--attack", "bribe"], "known: none, sign-flip"),
        (["simulate", "--rule", "median"], "inner products"),
        (["simulate", "--rule", "fltrust"], "--reference"),
        (["simulate", "--reference", "site-01"], "leave --reference out"),
        (["simulate", "--out", "/proc/nope"], "/proc/nope"),
        (["train"], "train"),
        (["keygen"], "--out"),
    ],
)
def test_wrong_usage_is_refused_with_status_64_and_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quorsum: ")
    assert says in err
    assert "Traceback" not in err


def test_status_of_wrong_usage_is_that_of_the_process() -> None:
    done = quorsum("simulate", "--colour", "red")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("quorsum: ")


def test_keygen_writes_a_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    done = quorsum("keygen", "--out", str(path))
    assert done.returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert done.stdout.strip() == CkksSiteKey.from_bytes(path.read_bytes()).key_id
    before = path.read_bytes()
    again = quorsum("keygen", "--out", str(path))
    assert again.returncode == 64
    assert "not overwritten" in again.stderr
    assert path.read_bytes() == before
    nowhere = quorsum("keygen", "--out", str(tmp_path / "no" / "site.key"))
    assert nowhere.returncode == 64


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'flwr', 'tenseal', 'sklearn', 'matplotlib'}"
    heavy = f"import sys, quorsum.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_interrupt_is_said_and_not_traced(tmp_path: Path) -> None:
    import signal

    child = subprocess.Popen(
        [QUORSUM, "simulate", "--suite", "plain", "--rounds", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    line = child.stderr.readline() + child.stderr.readline()
    assert b"round   1" in line
    child.send_signal(signal.SIGINT)
    _, rest = child.communicate(timeout=30)
    assert child.returncode == 130
    assert b"interrupted" in line + rest
    assert b"Traceback" not in rest


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--bad"], "quorsum"),
        (["simulate", "--bad"], "quorsum simulate"),
        (["run"], "quorsum run"),
        (["coordinator", "foo"], "quorsum coordinator"),
        (["coordinator", "invite", "--bad"], "quorsum coordinator invite"),
        (["site", "set"], "quorsum site set"),
    ],
)
def test_wrong_usage_names_the_help_of_the_very_command(typed: list[str], named: str) -> None:
    done = quorsum(*typed)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.endswith(f"(try: {named} --help)\n")


@pytest.mark.parametrize("command", [("simulate",), ("lab", "run"), ("coordinator", "init"), ("site", "enroll")])
def test_help_pages_show_defaults_as_people_write_them(command: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    run([*command, "--help"])
    page = capsys.readouterr().out
    assert "--help" in page
    assert "\\" not in page
