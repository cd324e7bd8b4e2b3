"""``quorsum lab run`` with real processes: cells side by side, and what is left of them after ``kill -9``."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from quorsum.cli import run as command_line
from quorsum.errors import DataError, QuorsumError, UsageError
from quorsum.simulation.lab_grid import PlannedCell, plan_cells, read_grid
from quorsum.simulation.lab_run import Cell, Silence, read_cells, read_plan, run_lab, unfinished

LAB = (str(Path(sys.executable).parent / "quorsum"), "lab")
TINY = """
name = "tiny"
[base]
suite = "plain"
sites = 6
rounds = 2
epochs = 1
[grid]
attack = ["none", "sign-flip"]
rule = ["mean", "multi-krum"]
poisoned = [1, 2]
"""
"""Eight cells, of which two cannot be: multi-krum among six does not tolerate two."""

WIDE = """
name = "wide"
[base]
suite = "plain"
sites = 6
poisoned = 1
rounds = {rounds}
epochs = 1
[grid]
attack = ["none", "sign-flip", "ipm", "gaussian"]
rule = ["mean", "multi-krum"]
seed = {seeds}
"""


def grid_file(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def ran(text: str, out: Path, *, jobs: int = 2, progress: Silence | None = None) -> list[Cell]:
    """Run a grid in this process's workers."""
    out.parent.mkdir(parents=True, exist_ok=True)
    grid = read_grid(grid_file(out.parent, text))
    return run_lab(grid, plan_cells(grid), out, command="quorsum lab run grid.toml", jobs=jobs, progress=progress)


def started(path: Path, out: Path, *more: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAB, "run", str(path), "--out", str(out), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **how,
    )  # fmt: skip


def finished(path: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAB, "run", str(path), "--out", str(out), *more],
        capture_output=True, text=True, timeout=900, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def marks(out: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was written again: replacing a file gives it another inode."""
    stats = {path.stem: path.stat() for path in (out / "cells").glob("*.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def timeless(cells: list[Cell]) -> list[Any]:
    """Everything of the results but how long things took."""
    results: list[Any] = []
    for cell in cells:
        rounds = [{k: v for k, v in one.items() if k != "seconds"} for one in (cell.result or {}).get("rounds", [])]
        results.append((cell.id, cell.settings, cell.failed, cell.state, (cell.result or {}).get("final"), rounds))
    return results


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").glob("*/children") for one in task.read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def copied(tiny: Path, folder: Path) -> Path:
    """A copy of the folder in which the tiny grid has been run, to do harm to."""
    return Path(shutil.copytree(tiny / "out", folder / "out"))


class Notes(Silence):
    """Who writes down what a run tells, and may do something about it."""

    def __init__(self, on_started: Callable[[PlannedCell], None] = lambda cell: None) -> None:
        self.on_started = on_started
        self.begun: tuple[int, int, int] | None = None
        self.tries: list[str] = []
        self.again: list[str] = []
        self.over: list[str] = []

    def began(self, kept: int, todo: int, jobs: int) -> None:
        self.begun = (kept, todo, jobs)

    def started(self, cell: PlannedCell) -> None:
        self.tries.append(cell.id)
        self.on_started(cell)

    def retried(self, cell: PlannedCell, reason: str) -> None:
        self.again.append(reason)

    def ended(self, cell: PlannedCell, outcome: Cell) -> None:
        self.over.append(cell.id)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny grid has been run by the command."""
    folder = tmp_path_factory.mktemp("lab")
    done = finished(grid_file(folder, TINY), folder / "out", "--jobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(done.stdout)
    (folder / "said.txt").write_text(done.stderr)
    return folder


def test_a_grid_is_run_and_every_cell_is_kept(tiny: Path) -> None:
    cells = read_cells(tiny / "out")
    assert [cell.id for cell in cells] == [cell.id for cell in plan_cells(read_grid(tiny / "grid.toml"))]
    assert [cell.state for cell in cells].count("done") == 6
    for cell in cells:
        assert (cell.result is None) == (cell.failed is not None)
        if cell.result is not None:
            assert cell.result["config"] == cell.settings
            assert cell.seconds > 0
        else:
            assert cell.state == "not applicable"
            assert "multi-krum" in str(cell.failed)
    assert (tiny / "out" / "grid.toml").read_bytes() == (tiny / "grid.toml").read_bytes()
    assert unfinished(tiny / "out") == 0


def test_what_the_command_says(tiny: Path) -> None:
    said, told = json.loads((tiny / "said.json").read_text()), (tiny / "said.txt").read_text()
    assert said["schema_version"] == 1
    assert (said["cells"], said["run_now"], said["done"], said["not_applicable"]) == (8, 6, 6, 2)
    assert told.endswith(f"quorsum: run: quorsum lab report {tiny / 'out'}\n")
    assert "8 of 8 cells" in told
    assert "left" in told
    assert read_plan(tiny / "out").command == (f"quorsum lab run {tiny / 'grid.toml'} --out {tiny / 'out'} --jobs 2")
    assert set(read_plan(tiny / "out").versions) == {"quorsum", "flwr", "torch", "tenseal", "numpy", "python"}


def test_files_are_of_the_promised_shape(tiny: Path) -> None:
    for path in (tiny / "out" / "cells").iterdir():
        tree = json.loads(path.read_text())
        assert set(tree) == {"schema_version", "id", "settings", "result", "failed", "seconds", "state"}
        assert tree["id"] == path.stem


def test_nothing_is_run_twice(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = marks(tiny / "out")
    assert command_line(["lab", "run", str(tiny / "grid.toml"), "--out", str(tiny / "out")]) == 0
    assert "nothing to run" in capsys.readouterr().err
    assert marks(tiny / "out") == before


def test_another_grid_extends_the_folder(tiny: Path, tmp_path: Path) -> None:
    out = copied(tiny, tmp_path)
    before, notes = marks(out), Notes()
    cells = ran(TINY.replace("[1, 2]", "[2, 0]"), out, progress=notes)
    assert notes.begun == (4, 4, 2)
    assert before.items() <= marks(out).items()
    assert [cell.settings["poisoned"] for cell in cells] == [2, 0] * 4
    assert [cell.id for cell in cells] == list(read_plan(out).cells)
    assert read_cells(out) == cells


def killed_and_resumed(folder: Path, text: str, kills: int, each: int) -> None:
    """Kill the runner several times, each time after a few cells more; then finish, and compare."""
    path, out = grid_file(folder, text), folder / "out"
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(kills):
        runner = started(path, out, "--jobs", "2", stdin=subprocess.DEVNULL)
        until(lambda: len(marks(out)) >= len(kept) + each, 300)  # noqa: B023 - called at once
        workers = children(runner.pid)
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate()
        until(lambda: all(gone(pid) for pid in workers), 30)  # noqa: B023 - called at once
        assert kept.items() <= marks(out).items()
        kept = marks(out)
    planned = len(plan_cells(read_grid(path)))
    assert each * kills <= len(kept) < planned
    assert unfinished(out) == planned - len(kept)
    (out / "cells" / "half.json.1-1.new").write_text("{")
    done = finished(path, out, "--json")
    assert done.returncode == 0, done.stderr
    assert kept.items() <= marks(out).items()
    assert json.loads(done.stdout)["run_now"] == planned - len(kept)
    assert sorted(one.suffix for one in (out / "cells").iterdir()) == [".json"] * planned
    assert timeless(read_cells(out)) == timeless(ran(text, folder / "undisturbed" / "out"))


def test_kill_9_costs_no_finished_cell(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, WIDE.format(rounds=3, seeds=[1]), kills=1, each=2)


@pytest.mark.slow
def test_200_cells_survive_kill_9_three_times(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, WIDE.format(rounds=3, seeds=list(range(1, 26))), kills=3, each=20)


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path: Path) -> None:
    path, out = grid_file(tmp_path, WIDE.format(rounds=500, seeds=[1])), tmp_path / "out"
    runner = started(path, out, "--jobs", "2")
    until(lambda: (out / "workers.log").exists())
    workers = children(runner.pid)
    pressed = time.monotonic()
    # As a terminal does: to all processes of the command.
    os.killpg(runner.pid, signal.SIGINT)
    output, said = runner.communicate(timeout=60)
    # At once: a worker is not waited for, and its cell would take minutes. The rest is for slow machines.
    assert time.monotonic() - pressed < 20
    assert (runner.returncode, output) == (130, "")
    assert f"go on with: quorsum lab run {path} --out {out} --jobs 2" in said
    assert "0 of 8 cells have ended" in said
    assert "Traceback" not in said
    until(lambda: all(gone(pid) for pid in workers), 30)


def kill_the_worker() -> None:
    (worker,) = [one for one in multiprocessing.active_children() if one.name == "quorsum-lab"]
    worker.kill()


def test_a_cell_whose_process_dies_is_tried_again_and_stops_no_other(tmp_path: Path) -> None:
    planned = plan_cells(read_grid(grid_file(tmp_path, TINY)))
    unlucky, doomed = planned[0].id, planned[1].id

    def kill(cell: PlannedCell) -> None:
        if cell.id == doomed or notes.tries == [unlucky]:
            kill_the_worker()

    notes = Notes(kill)
    cells = ran(TINY, tmp_path / "out", jobs=1, progress=notes)
    assert notes.tries[:4] == [unlucky, unlucky, doomed, doomed]
    assert notes.again == ["killed by SIGKILL"] * 2
    assert [cell.state for cell in cells].count("done") == 5
    (crashed,) = [cell for cell in cells if cell.state == "crashed"]
    assert crashed.id == doomed
    assert "died 2 times (killed by SIGKILL)" in str(crashed.failed)
    # The next run tries that one and no other.
    before, notes = marks(tmp_path / "out"), Notes()
    cells = ran(TINY, tmp_path / "out", progress=notes)
    assert notes.tries == [doomed]
    assert [cell.state for cell in cells].count("done") == 6
    assert {k: v for k, v in before.items() if k != doomed}.items() <= marks(tmp_path / "out").items()


def test_a_refusal_is_a_result_and_an_unknown_error_is_not(tmp_path: Path) -> None:
    text = TINY.partition("[grid]")[0].replace("sites = 6", 'data = "breast-cancer"\npoisoned = 1')
    refused = text + "[grid]\nsites = [6, 500]\n"
    path, out = grid_file(tmp_path, refused), tmp_path / "out"
    done = finished(path, out)
    assert done.returncode == 2
    assert "1 cells have no result; the first," in done.stderr
    assert [cell.state for cell in read_cells(out)] == ["done", "failed"]
    notes = Notes()
    ran(refused, out, progress=notes)
    assert notes.begun == (2, 0, 1)

    broken = text.replace("rounds = 2", "rounds = 1\nhidden = 10000000000000") + "[grid]\nsites = [6]\n"
    done = finished(grid_file(tmp_path, broken), out)
    assert done.returncode == 2
    (cell,) = read_cells(out)
    assert (cell.state, cell.result) == ("crashed", None)
    assert "unexpected RuntimeError" in str(cell.failed)
    assert "to try those that crashed again, run: quorsum lab run" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in (out / "workers.log").read_text()


def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    over = threading.Event()

    def kill_all_at_birth() -> None:
        while not over.wait(0.02):
            for pid in children(os.getpid()):
                with suppress(OSError):
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all_at_birth)
    killer.start()
    try:
        with pytest.raises(QuorsumError, match=r"cannot start \(killed by SIGKILL\)"):
            ran(TINY, tmp_path / "out")
    finally:
        over.set()
        killer.join()
    assert unfinished(tmp_path / "out") == 6


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "workers.log").mkdir(parents=True)
    with pytest.raises(QuorsumError, match=r"cannot write .*workers\.log"):
        ran(TINY, tmp_path / "out")


def test_a_terminal_sees_a_bar_with_the_time_left(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    runner = subprocess.Popen(
        [*LAB, "run", str(grid_file(tmp_path, TINY)), "--out", str(tmp_path / "out"), "--jobs", "1"],
        stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:
        pass
    os.close(ours)
    runner.communicate(timeout=60)
    assert runner.returncode == 0
    assert b"left" in seen
    assert b"attack=sign-flip rule=mean poisoned=1" in seen
    assert b"quorsum lab report" in seen


def test_two_runners_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / "lab.lock"):
        assert command_line(["lab", "run", str(grid_file(tmp_path, TINY)), "--out", str(out)]) == 64
    assert f"another lab run works in {out}; wait for it, or choose another --out" in capsys.readouterr().err
    assert marks(out) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "GRID.toml"),
        (["run", "GRID"], "--out"),
        (["run", "GRID", "--out", "/proc/nope"], "cannot write to /proc/nope"),
        (["run", "GRID", "--out", "GRID"], "choose another --out"),
        (["run", "GRID", "--out", "OUT", "--jobs", "0"], "--jobs"),
        (["run", "GRID", "--out", "OUT", "--data", "digitz"], "did you mean digits?"),
        (["run", "GRID", "--out", "HERE"], "holds other files, such as grid.toml.bak"),
        (["run", "missing.toml", "--out", "OUT"], "missing.toml"),
        (["report"], "DIR"),
        (["report", "HERE"], "quorsum lab run GRID.toml --out"),
        (["advise"], "--sites"),
        (["advise", "--sites", "9", "--tolerate", "1", "--evidence", "HERE"], "holds no lab run"),
    ],
)
def test_wrong_usage_is_refused(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grid_file(tmp_path, TINY)
    (tmp_path / "grid.toml.bak").touch()
    places = {"GRID": str(path), "OUT": str(tmp_path / "out"), "HERE": str(tmp_path)}
    assert command_line(["lab", *(places.get(one, one) for one in arguments)]) == 64
    output, said = capsys.readouterr()
    assert output == ""
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'flwr', 'tenseal', 'sklearn', 'matplotlib', 'pydantic'}"
    code = f"import sys, quorsum.simulation.lab_commands; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_report_on_nothing_names_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copied(tiny, tmp_path)
    for path in (out / "cells").iterdir():
        path.unlink()
    assert command_line(["lab", "report", str(out)]) == 64
    assert f"has a result yet; run: quorsum lab run {tiny / 'grid.toml'}" in capsys.readouterr().err
    # Nor is the evidence that comes with quorsum taken in its place.
    assert command_line(["lab", "advise", "--evidence", str(out), "--sites", "11", "--tolerate", "1"]) == 64
    assert f"has ended yet; run: quorsum lab run {tiny / 'grid.toml'}" in capsys.readouterr().err


def test_a_report_on_a_part_says_what_is_missing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(tiny, tmp_path)
    (out / "cells" / f"{read_plan(out).cells[0]}.json").unlink()
    assert command_line(["lab", "report", str(out), "--json"]) == 0
    said, told = capsys.readouterr()
    assert json.loads(said)["missing_cells"] == 1
    assert all(Path(one).is_file() for one in json.loads(said)["files"])
    assert f"1 of 8 cells have not ended yet; go on with: quorsum lab run {tiny / 'grid.toml'}" in told
    assert f"quorsum lab advise --evidence {out}" in told


def test_advice_from_a_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "lab",
        "advise",
        "--evidence",
        str(tiny / "out"),
        "--sites",
        "6",
        "--tolerate",
        "1",
        "--suite",
        "plain",
    ]
    assert command_line([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 1
    assert command_line(arguments) == 0
    assert "multi-krum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "this is not JSON"),
        ("[]", "its schema_version is not 1"),
        ('{"schema_version": 2}', "its schema_version is not 1"),
        ('{"schema_version": 1}', "this is no cell"),
        (json.dumps(Cell("x", {}, None, "no", 0.0, "failed").to_json()), "it holds cell 'x'"),
    ],
)
def test_a_damaged_cell_is_named(tiny: Path, tmp_path: Path, content: str, says: str) -> None:
    out = copied(tiny, tmp_path)
    path = out / "cells" / f"{read_plan(out).cells[0]}.json"
    path.write_text(content)
    with pytest.raises(DataError, match="remove the file, and the next run makes it anew") as refusal:
        read_cells(out)
    assert says in str(refusal.value)
    assert str(path) in str(refusal.value)
    with pytest.raises(DataError, match="remove the file"):
        ran(TINY, out)


def test_a_cell_whose_file_is_removed_is_made_anew(tiny: Path, tmp_path: Path) -> None:
    out = copied(tiny, tmp_path)
    first = read_plan(out).cells[0]
    (out / "cells" / f"{first}.json").unlink()
    notes = Notes()
    assert timeless(ran(TINY, out, progress=notes)) == timeless(read_cells(tiny / "out"))
    assert notes.tries == [first]


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no lab run"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text('{"schema_version": 1, "name": "x"}')
    with pytest.raises(DataError, match="no plan of a lab run"):
        read_plan(tmp_path)


@pytest.mark.slow
def test_cells_run_on_ray_one_after_another(tmp_path: Path) -> None:
    text = TINY.replace('suite = "plain"', 'suite = "plain"\nruntime = "ray"').replace("[1, 2]", "[1]")
    notes = Notes()
    cells = ran(text, tmp_path / "out", jobs=4, progress=notes)
    assert notes.begun == (0, 4, 1)
    assert [cell.state for cell in cells] == ["done"] * 4
    local = ran(TINY.replace("[1, 2]", "[1]"), tmp_path / "local" / "out")
    finals = [[one.result["final"]["accuracy"] for one in run if one.result] for run in (cells, local)]
    assert finals[0] == pytest.approx(finals[1], abs=0.02)
