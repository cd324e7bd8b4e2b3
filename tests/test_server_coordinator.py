"""The coordinator's process, and sites as processes of their own: it trains, it is killed, it goes on."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import Federation, seen, training_app
from enrollment_federation import Hand
from fleet_harness import free_port, until

from quorsum import bundles
from quorsum.config import CoordinatorConfig
from quorsum.crypto import certificates
from quorsum.errors import Refusal, UsageError
from quorsum.server.authority import SERVER_LIFETIME, load_authority
from quorsum.server.coordinator import Coordinator
from quorsum.server.home import CoordinatorHome

SITES = ("a", "b", "c")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return training_app(tmp_path / "app")


def begin(federation: Federation, app: Path, *options: str, **config: object) -> str:
    """A coordinator with three connected sites; the digest of the app."""
    digest = bundles.digest(bundles.build(app))
    federation.init(patience=4.0, **config)
    federation.start(*options)
    federation.enroll(*SITES)
    for name in SITES:
        federation.start_site(name, digest)
    until(lambda: seen(federation, SITES))
    return digest


def played(federation: Federation) -> int:
    return sum(run["rounds_played"] for run in federation.json("runs")["runs"])


def test_from_nothing_to_a_model_and_no_secret_in_the_log(federation: Federation, app: Path, tmp_path: Path) -> None:
    port = free_port()
    begin(federation, app, "--log-json", metrics_port=port)
    follower = federation.follow("run", app, "--run-config", "rounds=2", "--out", tmp_path / "out", "--json")
    out, said = follower.communicate(timeout=60)
    assert follower.returncode == 0, said
    result = json.loads(out)
    assert (result["state"], result["rounds_finished"], result["metrics"]) == ("finished", 2, {"accuracy": 0.75})
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    with np.load(tmp_path / "out" / "model.npz") as model:
        assert model["w"].shape == (64,)
        assert np.allclose(model["w"], 0.02, atol=5e-3)
    assert [line.split(",")[0] for line in said.splitlines() if ": round " in line] == [
        f"quorsum: round {k}: accuracy 0.75" for k in (1, 2)
    ]
    shown = federation.do("status")
    assert shown.returncode == 0
    assert "2 rounds played" in shown.stdout
    states = federation.json("status")
    assert [(one["online"], one["accepted"]) for one in states["sites"]] == [(True, 2)] * 3
    assert set(states["listeners"]) == {"enrollment", "members", "fleet", "metrics"}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert 'quorsum_rounds_total{result="finished"} 2.0' in answer.read().decode()
    assert federation.end() == 0
    assert federation.do("status").returncode == 2

    lines = [json.loads(line) for line in federation.log().splitlines()]
    assert {"listening", "started", "site-let-in", "run-begins", "round", "run-finished", "stopping"} <= {
        line["event"] for line in lines
    }
    assert all({"time", "level", "logger", "event", "message", "fields"} <= set(line) for line in lines)
    keys = [path.read_text() for path in (federation.home / "ca.key", federation.home / "server.key")]
    for secret in [line for key in keys for line in key.splitlines()[1:-1]] + ["qsum1-"]:
        assert secret not in federation.log()


@pytest.mark.slow
def test_kill_9_in_a_round_costs_nothing_but_time(federation: Federation, app: Path) -> None:
    begin(federation, app)
    follower = federation.follow("run", app, "--run-config", "rounds=4")
    until(lambda: played(federation) >= 1)
    time.sleep(0.4)
    federation.kill()
    assert federation.json("status")["running"] is False
    federation.start()
    out, said = follower.communicate(timeout=90)
    assert follower.returncode == 0, said + federation.log()
    assert "start it with: quorsum coordinator start" in said
    rounds = [line for line in said.splitlines() if ": round " in line]
    assert [line.split(":")[1] for line in rounds] == [f" round {k}" for k in (1, 2, 3, 4)]
    assert "4 finished, 4 played" in out
    assert "goes on" in federation.log()


@pytest.mark.slow
def test_sigterm_in_a_round_leaves_it_to_the_next_process_which_the_operator_stops(
    federation: Federation, app: Path
) -> None:
    begin(federation, app)
    federation.follow("run", app, "--run-config", "rounds=100")
    until(lambda: played(federation) >= 1)
    began = time.monotonic()
    assert federation.end() == 0
    assert time.monotonic() - began < 8
    assert federation.run_state()["state"] == "running"
    federation.start()
    assert federation.do("stop-run", "1").returncode == 0
    until(lambda: federation.run_state()["state"] == "stopped")
    done = federation.followers[0].communicate(timeout=20)
    assert federation.followers[0].returncode == 1, done


def test_a_revoked_site_is_out_of_the_running_round_and_of_all_others(federation: Federation, app: Path) -> None:
    begin(federation, app)
    follower = federation.follow("run", app, "--run-config", "rounds=50")
    until(lambda: played(federation) >= 1)
    plan = federation.do("revoke", "c")
    digest = plan.stderr.rpartition("--confirm ")[2].split()[0]
    assert federation.do("revoke", "c", "--confirm", digest).returncode == 0
    # Three are the fewest with which this rule and this suite work, so the run waits, and there is nobody to wait for.
    until(lambda: federation.json("status")["sites"][2]["state"] == "revoked")
    until(lambda: "c is no member any more" in federation.log())
    until(lambda: "refused: not a member" in (federation.folder / "c.log").read_text(), 20)
    assert federation.do("stop-run", "1").returncode == 0
    follower.communicate(timeout=20)
    assert federation.run_state()["state"] == "stopped"


def test_a_site_that_does_not_allow_the_app_is_named(federation: Federation, app: Path) -> None:
    digest = begin(federation, app)
    federation.kill_site("c")
    federation.start_site("c", "ab" * 32)
    until(lambda: seen(federation, SITES))
    follower = federation.follow("run", app, "--run-config", "rounds=1")
    until(lambda: (federation.json("status")["run"] or {}).get("left_out"), 20)
    shown = federation.do("status").stdout
    assert "bundle-not-allowed" in shown
    federation.kill_site("c")
    federation.start_site("c", digest)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 0, said
    assert "waits for c: " in said
    assert "bundle-not-allowed" in said


def test_an_app_that_fails_says_so(federation: Federation, app: Path) -> None:
    federation.init()
    federation.start()
    follower = federation.follow("run", app, "--run-config", "fails=true", "--out", federation.folder / "out")
    _, said = follower.communicate(timeout=40)
    assert follower.returncode == 1
    assert "failed: KeyError: 'what the app is missing'" in said
    assert not (federation.folder / "out" / "model.npz").exists()
    second = federation.follow("run", app, "--run-config", "rounds=1")
    assert second.stderr is not None
    heard = list(islice(second.stderr, 3))
    assert "waits for members; next: quorsum coordinator invite SITE" in heard[2], heard
    assert federation.end() == 0


def test_a_second_process_on_the_same_home_is_refused(federation: Federation) -> None:
    federation.init()
    federation.start("--quiet")
    assert federation.process is not None
    pid = federation.process.pid
    second = federation.follow("coordinator", "start")
    _, said = second.communicate(timeout=20)
    assert second.returncode == 1
    assert f"another coordinator runs on {federation.home} (process {pid})" in said
    assert federation.end() == 0
    assert federation.log() == ""


# --- the process's parts, in this one ---


def made(folder: Path, **config: object) -> CoordinatorHome:
    home = CoordinatorHome(folder)
    ports = {"enrollment_port": 0, "members_port": 0, "fleet_port": 0}
    home.create(CoordinatorConfig.model_validate({"federation": "lab", **ports, **config}), Hand().now())
    return home


def shown_certificate(address: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


def test_the_certificate_of_the_fleet_is_renewed_while_it_runs(tmp_path: Path) -> None:
    clock = Hand()
    coordinator = Coordinator(made(tmp_path / "home"), clock.now)
    coordinator.start()
    try:
        fleet = coordinator.listeners["fleet"]
        first = shown_certificate(fleet)
        coordinator.renew()
        assert shown_certificate(fleet) == first
        clock.ahead = SERVER_LIFETIME * 0.7
        coordinator.renew()
        second = shown_certificate(fleet)
        assert certificates.expires(second) - certificates.expires(first) > timedelta(days=20)
    finally:
        assert coordinator.stop()


def test_what_was_opened_is_closed_when_the_start_fails(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        home = made(tmp_path / "home", metrics_port=port)
        with pytest.raises(UsageError, match="metrics_port"):
            Coordinator(home).start()
        with pytest.raises(UsageError, match="cannot listen"):
            Coordinator(made(tmp_path / "other", fleet_port=port)).start()
    coordinator = Coordinator(home)
    coordinator.start()
    with pytest.raises(Refusal, match="another coordinator"):
        Coordinator(home).start()
    assert coordinator.stop()
    assert load_authority(home.path).fingerprint


def test_trouble_with_the_state_is_said_once_and_gone_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = made(tmp_path / "home")
    coordinator, ending = Coordinator(home), threading.Event()
    coordinator.start()
    thread = threading.Thread(target=coordinator.supervise, args=(ending,))
    try:
        caplog.set_level("INFO", "quorsum.coordinator")
        home.status_file.unlink()
        # As with a full disk, the status cannot be written.
        home.status_file.mkdir()
        thread.start()
        until(lambda: "IsADirectoryError" in caplog.text)
        time.sleep(1.5)
        assert caplog.text.count("IsADirectoryError") == 1
        assert "goes on" not in caplog.text
        home.status_file.rmdir()
        until(lambda: "goes on" in caplog.text)
    finally:
        ending.set()
        thread.join(10)
        assert coordinator.stop()
