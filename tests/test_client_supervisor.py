"""The parent of the site's process: starts it again, ends it in order, and never leaves it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fleet_harness import until

from quorsum.client.supervisor import supervise

END_WITH_PARENT = "from quorsum.client.supervisor import end_with_parent; end_with_parent(); "


def lives(tmp_path: Path, ending: str, **options: float) -> tuple[int, list[str], int]:
    """Supervise a child that ends so, for up to two seconds: exit code, what was said, how often it was started."""
    starts = tmp_path / "starts"
    code = f"import os, sys; open({str(starts)!r}, 'a').write('x'); {ending}"
    stop, said = threading.Event(), []
    threading.Timer(2, stop.set).start()
    result = supervise([sys.executable, "-c", code], stop, said.append, **{"first": 0.1, **options})
    return result, said, len(starts.read_text())


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("os._exit(0)", "exit code 0"),
        ("os._exit(1)", "exit code 1"),
        ("sys.exit('wrong')", "exit code 1"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("os.abort()", "SIGABRT"),
    ],
)
def test_whatever_it_dies_of_it_is_started_again_ever_later(tmp_path: Path, ending: str, how: str) -> None:
    code, said, count = lives(tmp_path, ending)
    assert code == 0
    assert 2 <= count <= 5
    assert said[0] == f"the site's process ended ({how}); it is started again in 0.1 s"
    assert "in 0.2 s" in said[1]


def test_the_pause_has_an_end_and_begins_anew(tmp_path: Path) -> None:
    _, said, _ = lives(tmp_path, "os._exit(3)", longest=0.15)
    assert [line.split()[-2] for line in said[:3]] == ["0.1", "0.15", "0.15"]
    _, said, _ = lives(tmp_path, "os._exit(3)", settled=0.0)
    assert {line.split()[-2] for line in said} == {"0.1"}


@pytest.mark.parametrize(("child", "whole"), [(101, 1), (102, 2), (164, 64)])
def test_where_there_is_no_use_it_is_not_started_again(tmp_path: Path, child: int, whole: int) -> None:
    assert lives(tmp_path, f"os._exit({child})") == (whole, [], 1)


@pytest.mark.parametrize("deaf", [False, True])
def test_it_is_ended_in_order_or_by_force(tmp_path: Path, deaf: bool) -> None:
    handler = "signal.SIG_IGN" if deaf else "lambda *_: (open(sys.argv[1], 'w').write('clean'), os._exit(0))"
    mark = tmp_path / "mark"
    code = (
        f"import os, signal, sys, time; signal.signal(signal.SIGTERM, {handler}); "
        "open(sys.argv[1], 'w').write('ready'); time.sleep(60)"
    )
    stop, result = threading.Event(), []
    command = [sys.executable, "-c", code, str(mark)]
    thread = threading.Thread(target=lambda: result.append(supervise(command, stop, lambda _: None, grace=0.5)))
    thread.start()
    until(lambda: mark.exists() and mark.read_text() == "ready")
    stop.set()
    thread.join(10)
    assert result == [0]
    assert mark.read_text() == ("ready" if deaf else "clean")


def test_a_pause_can_be_interrupted() -> None:
    stop = threading.Event()
    began = time.monotonic()
    threading.Timer(1, stop.set).start()
    assert supervise([sys.executable, "-c", ""], stop, lambda _: None, first=50) == 0
    assert time.monotonic() - began < 10


def test_no_child_is_left_behind(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    child = f"import os, time; {END_WITH_PARENT}open({str(mark)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(60)"
    parent = (
        "import sys, threading; from quorsum.client.supervisor import supervise; "
        f"supervise([sys.executable, '-c', {child!r}], threading.Event(), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    pid = int(until(lambda: mark.exists() and mark.read_text().endswith(".") and mark.read_text()[:-1]))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not _alive(pid), 10)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that nobody waits for is dead all the same.
    return state != "Z"
