"""The example for real: a SuperLink, three SuperNodes, three data sets, one key, over sockets of this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "quickstart"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def process(log: Path, env: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        try:
            yield child
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_for_port(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.mark.slow
def test_flower_app_trains_sealed_over_real_sockets(tmp_path: Path) -> None:
    app = tmp_path / "quickstart"
    shutil.copytree(EXAMPLE, app, ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "t"\n[superlink.t]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    with ExitStack() as stack:
        link = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(process(tmp_path / "link.log", env, *link))
        wait_for_port(port)
        for site in range(3):
            node = [
                str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--port", str(free_port()),
                "--node-config",
                f'partition-id={site} num-partitions=3 quorsum-home="{tmp_path}/site{site}" '
                "quorsum-accept-small-models=true",
            ]  # fmt: skip
            stack.enter_context(process(tmp_path / f"node{site}.log", env, *node))
        run = subprocess.run(
            [BIN / "flwr", "run", str(app), "t", "--stream", "--run-config", "rounds=2"],
            env=env, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    said = run.stdout + run.stderr + (tmp_path / "link.log").read_text()
    rounds = re.findall(r"\[quorsum\] round (\d): accuracy ([0-9.]+); from 3 of 3 sites; left out: nobody", said)
    assert [number for number, _ in rounds] == ["1", "2"], (run.stdout + run.stderr)[-4000:]
    assert float(rounds[-1][1]) > 0.85, rounds
