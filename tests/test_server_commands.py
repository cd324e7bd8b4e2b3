"""The coordinator's commands as a person types them: results on stdout, the next step in what waits or is refused."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from coordinator_harness import QUORSUM, Federation, quorsum, training_app
from enrollment_federation import Liar
from fleet_harness import until

from quorsum import bundles
from quorsum.crypto import certificates
from quorsum.enrollment import Keys
from quorsum.errors import Refusal
from quorsum.invitation import decode, secret_hash
from quorsum.server.authority import load_authority
from quorsum.server.store import Application, Store


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    made.init()
    yield made
    made.close()


def pend(federation: Federation, *names: str) -> dict[str, str]:
    """Sites that have presented their invitations, and their words."""
    words = {}
    for name in names:
        invitation = decode(federation.do("invite", name).stdout)
        request = Liar(site=name).request(load_authority(federation.home).fingerprint, invitation.secret)
        words[name] = f"abandon-ability-able-about-above-{name}"
        store = Store(federation.home / "state.db")
        store.enroll(
            Application(
                site=name, secret_hash=secret_hash(invitation.secret), keys=Keys.of(request), identity=request.identity,
                node_key=request.node_key, request=request.request, words=words[name], address="192.0.2.7",
            ),
            time.time(), 9,
        )  # fmt: skip
        store.close()
    return words


def next_command(said: str) -> list[str]:
    """The command that a refusal or a waiting state ends in."""
    return shlex.split(re.findall(r"quorsum (?:coordinator|run|site) .*", said)[-1])[1:]


def states(federation: Federation) -> dict[str, str]:
    return {site["site"]: site["state"] for site in federation.json("sites")["sites"]}


def test_help_is_instant_and_complete() -> None:
    done = quorsum("coordinator", "--help")
    assert done.returncode == 0
    for command in (
        "init", "start", "invite", "approve", "refuse", "sites", "revoke", "status", "backup", "runs", "stop-run",
        "follow",
    ):  # fmt: skip
        assert f"\n  {command} " in done.stdout
        assert quorsum("coordinator", command, "--help").returncode == 0
    assert "coordinator" in quorsum("--help").stdout
    assert quorsum("run", "--help").returncode == 0


def test_init_makes_a_private_home_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = quorsum("coordinator", "init", "--home", home, "--name", "lab", "--port", "7501")
    assert (done.returncode, done.stdout) == (0, "")
    assert next_command(done.stderr) == ["coordinator", "start", "--home", str(home)]
    config = (home / "coordinator.toml").read_text()
    assert "enrollment_port = 7501" in config
    assert "members_port = 7502" in config
    assert "fleet_port = 7503" in config
    assert 'host = "127.0.0.1"' in config
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    key = (home / "ca.key").read_bytes()
    again = quorsum("coordinator", "init", "--home", home)
    assert again.returncode == 64
    assert "not empty" in again.stderr
    assert (home / "ca.key").read_bytes() == key


def test_the_home_may_be_named_once_and_for_all(federation: Federation) -> None:
    environment = {**os.environ, "QUORSUM_COORDINATOR_HOME": str(federation.home)}
    done = subprocess.run(
        [QUORSUM, "coordinator", "sites"], capture_output=True, text=True, env=environment, check=True
    )
    assert next_command(done.stderr) == ["coordinator", "invite", "SITE"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init", "--host", "0.0.0.0"], "--advertise HOST"),  # noqa: S104 - that is what is refused
        (["init", "--advertise", "not a host"], "--advertise"),
        (["init", "--name", "/"], "--name"),
        (["init", "--port", "70000"], "--port"),
        (["init", "--host", "192.0.2.1", "--advertise", "x", "--port", "0"], "192.0.2.1"),
        (["invite", "a"], "quorsum coordinator init"),
        (["invite"], "SITE"),
        (["start"], "quorsum coordinator init"),
        (["status"], "quorsum coordinator init"),
        (["backup", "x"], "quorsum coordinator init"),
        (["stop-run", "one"], "ID"),
    ],
)
def test_wrong_usage_is_64_and_says_what_to_do(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = quorsum("coordinator", *arguments, "--home", tmp_path / "home")
    assert (done.returncode, done.stdout) == (64, "")
    assert says in done.stderr
    assert not (tmp_path / "home").exists()


def test_invitations_are_the_only_thing_on_stdout(federation: Federation) -> None:
    one = federation.do("invite", "site-a")
    assert one.returncode == 0
    assert one.stdout.count("\n") == 1
    first = decode(one.stdout)
    assert (first.site, first.fingerprint) == ("site-a", load_authority(federation.home).fingerprint)
    assert first.expires == pytest.approx(time.time() + 72 * 3600, abs=60)
    assert first.secret.hex() not in one.stderr
    assert "qsum1" not in one.stderr
    assert "coordinator start" in one.stderr
    assert next_command(one.stderr)[:2] == ["coordinator", "approve"]
    several = federation.do("invite", "b", "c").stdout.splitlines()
    assert [line.split("\t")[0] for line in several] == ["b", "c"]
    assert [decode(line.split("\t")[1]).site for line in several] == ["b", "c"]
    (found,) = federation.json("invite", "d")["invitations"]
    assert decode(found["invitation"]).site == found["site"] == "d"
    assert [one["site"] for one in federation.json("sites")["invited"]] == ["site-a", "b", "c", "d"]


@pytest.mark.parametrize("names", [["a", "a"], ["a", "no site"], ["a", "-x" * 80]])
def test_no_invitation_is_made_when_one_name_is_wrong(federation: Federation, names: list[str]) -> None:
    done = federation.do("invite", "--", *names) if names[1].startswith("-") else federation.do("invite", *names)
    assert (done.returncode, done.stdout) == (64, "")
    assert federation.json("sites")["invited"] == []


def test_an_address_that_is_not_known_yet_is_said(federation: Federation) -> None:
    config = federation.home / "coordinator.toml"
    config.write_text(re.sub(r"enrollment_port = \d+", "enrollment_port = 0", config.read_text()))
    done = federation.do("invite", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert next_command(done.stderr)[:2] == ["coordinator", "start"]


def test_without_a_terminal_approve_prints_the_exact_command(federation: Federation) -> None:
    nobody = federation.do("approve")
    assert nobody.returncode == 0
    assert "nobody waits" in nobody.stderr
    words = pend(federation, "a", "b")
    done = federation.do("approve")
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"{name} waits, enrolling from 192.0.2.7: {words[name]}" in done.stderr for name in words)
    assert states(federation) == {"a": "pending", "b": "pending"}
    waiting = federation.json("approve")["waiting"]
    assert [(one["site"], one["words"]) for one in waiting] == list(words.items())
    carried_out = quorsum(*next_command(done.stderr))
    assert carried_out.returncode == 0
    assert states(federation) == {"a": "approved", "b": "approved"}
    assert next_command(carried_out.stderr)[:2] == ["run", "APP"]


def test_words_are_compared_and_a_mismatch_is_refused(federation: Federation) -> None:
    words = pend(federation, "a", "b")
    wrong = federation.do("approve", "a", "--words", words["b"])
    assert wrong.returncode == 1
    assert next_command(wrong.stderr)[:3] == ["coordinator", "refuse", "a"]
    assert states(federation)["a"] == "pending"
    # Also written with spaces and capitals, as one writes what is read out.
    assert federation.do("approve", "a", "--words", words["a"].replace("-", " ").title()).returncode == 0
    mixed = federation.do("approve", f"b={words['a']}")
    assert mixed.returncode == 1
    assert states(federation) == {"a": "approved", "b": "pending"}


def test_one_wrong_pair_does_not_keep_the_others_out(federation: Federation) -> None:
    words = pend(federation, "a", "b")
    done = federation.do("approve", f"a={words['b']}", f"b={words['b']}")
    assert done.returncode == 1
    assert states(federation) == {"a": "pending", "b": "approved"}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["c"], 64, "c has not enrolled; who waits: a"),
        (["c=x"], 64, "c has not enrolled"),
        (["a", "--words", "x", "--all"], 64, "--all goes without"),
        (["a", "b", "--words", "x"], 64, "one site"),
        (["a=x", "b"], 64, "every site, or for none"),
        (["--all"], 2, "--yes-i-compared-the-words"),
    ],
)
def test_approvals_that_are_refused(federation: Federation, arguments: list[str], status: int, says: str) -> None:
    pend(federation, "a")
    done = federation.do("approve", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert states(federation) == {"a": "pending"}


def test_all_of_them_after_they_were_compared(federation: Federation) -> None:
    pend(federation, "a", "b")
    refused = federation.do("approve", "--all")
    assert quorsum(*next_command(refused.stderr)).returncode == 0
    assert set(states(federation).values()) == {"approved"}


def test_a_stolen_invitation_is_pointed_out(federation: Federation) -> None:
    invitation = decode(federation.do("invite", "a").stdout)
    store = Store(federation.home / "state.db")
    for _ in range(2):
        request = Liar(site="a").request(load_authority(federation.home).fingerprint, invitation.secret)
        application = Application(
            site="a", secret_hash=secret_hash(invitation.secret), keys=Keys.of(request), identity=request.identity,
            node_key=request.node_key, request=request.request, words="x", address="192.0.2.7",
        )  # fmt: skip
        with suppress(Refusal):
            store.enroll(application, time.time(), 9)
    store.close()
    assert "may have been stolen" in federation.do("approve", "a").stderr


def test_at_a_terminal_every_site_is_asked_about(federation: Federation) -> None:
    words = pend(federation, "a", "b")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [QUORSUM, "coordinator", "approve", "--home", federation.home],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(leader, b"y\nn\n")
    out, said = process.communicate(timeout=30)
    os.close(leader)
    os.close(follower)
    assert (process.returncode, out) == (1, "")
    assert f"a, enrolling from 192.0.2.7, shows: {words['a']}" in said
    assert states(federation) == {"a": "approved", "b": "pending"}


def test_a_waiting_site_is_turned_away(federation: Federation) -> None:
    pend(federation, "a")
    done = federation.do("refuse", "a")
    assert done.returncode == 0
    assert states(federation) == {"a": "refused"}
    assert quorsum(*next_command(done.stderr)).stdout.startswith("qsum1-")
    assert federation.do("refuse", "a").returncode == 64


def test_revoking_prints_the_plan_first_and_needs_its_digest(federation: Federation) -> None:
    words = pend(federation, "a")
    assert federation.do("revoke", "a").returncode == 64
    federation.do("approve", f"a={words['a']}")
    plan = federation.do("revoke", "a")
    assert (plan.returncode, plan.stdout) == (2, "")
    assert "does not undo" in plan.stderr
    assert states(federation) == {"a": "approved"}
    wrong = federation.do("revoke", "a", "--confirm", "0123456789abcdef")
    assert wrong.returncode == 1
    assert next_command(wrong.stderr)[:3] == ["coordinator", "revoke", "a"]
    done = quorsum(*next_command(plan.stderr))
    assert done.returncode == 0
    assert states(federation) == {"a": "revoked"}
    # The plan was about that member; who comes back under the name is another one.
    words = pend(federation, "a")
    federation.do("approve", f"a={words['a']}")
    assert quorsum(*next_command(plan.stderr)).returncode == 1
    assert federation.do("revoke", "nobody").returncode == 64


def test_tables_name_everybody_and_the_next_step(federation: Federation) -> None:
    pend(federation, "a")
    federation.do("invite", "b")
    done = federation.do("sites")
    assert done.returncode == 0
    assert re.search(r"^a +pending ", done.stdout, re.MULTILINE)
    assert re.search(r"^b +invited .* UTC +\(invitation until .* UTC\)$", done.stdout, re.MULTILINE)
    assert next_command(done.stderr)[:2] == ["coordinator", "approve"]
    empty = federation.do("runs")
    assert next_command(empty.stderr)[:2] == ["run", "APP"]


def test_status_of_a_coordinator_that_does_not_run(federation: Federation) -> None:
    done = federation.do("status")
    assert done.returncode == 2
    assert "has not been started" in done.stdout
    assert next_command(done.stderr)[:2] == ["coordinator", "start"]
    assert next_command(done.stdout) == ["run", "APP", "--home", str(federation.home)]
    assert federation.json("status")["running"] is False
    unknown = federation.do("follow", "7")
    assert (unknown.returncode, next_command(unknown.stderr)[:2]) == (64, ["coordinator", "runs"])
    assert quorsum(*next_command(unknown.stderr)).returncode == 0


def test_a_home_that_others_can_read_is_refused(federation: Federation) -> None:
    federation.home.chmod(0o755)
    done = federation.do("sites")
    assert (done.returncode, done.stdout) == (2, "")
    assert "chmod 700" in done.stderr


def test_a_backup_is_one_private_file_that_can_be_restored(federation: Federation, tmp_path: Path) -> None:
    words = pend(federation, "a")
    federation.do("approve", f"a={words['a']}")
    file = tmp_path / "backup.tar"
    done = federation.do("backup", file)
    assert (done.returncode, done.stdout) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "coordinator"]
    assert federation.do("backup", file).returncode == 64
    command = re.findall(r"to restore it: (.*)", done.stderr)[0].replace("NEW-HOME", str(tmp_path / "new"))
    subprocess.run(command, shell=True, check=True)  # noqa: S602 - it is what the operator is told to type
    restored = Federation(tmp_path / "x")
    assert (
        json.loads(quorsum("coordinator", "sites", "--json", "--home", tmp_path / "new").stdout)["sites"]
        == (federation.json("sites")["sites"])
    )
    assert restored.process is None
    assert load_authority(tmp_path / "new") == load_authority(federation.home)
    with tarfile.open(file) as archive:
        assert {entry.mode for entry in archive.getmembers()} == {0o600}


# --- runs ---


def test_a_run_is_queued_while_nobody_runs_it(federation: Federation, tmp_path: Path) -> None:
    app = training_app(tmp_path / "app")
    digest = bundles.digest(bundles.build(app))
    done = quorsum("run", app, "--home", federation.home, "--detach", "--run-config", "rounds=4")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert f"site allow {digest}" in done.stderr
    assert "coordinator start" in done.stderr
    assert next_command(done.stderr)[:3] == ["coordinator", "follow", "1"]
    (run,) = federation.json("runs")["runs"]
    assert (run["state"], run["bundle"], run["config"]) == ("queued", digest, {"rounds": 4})
    assert json.loads(
        quorsum("run", app, "--home", federation.home, "--detach", "--json").stdout
    )["run"] == 2  # fmt: skip
    assert "tests/tiny 1.0.0" in federation.do("runs").stdout
    stopped = federation.do("stop-run", "1")
    assert stopped.returncode == 0
    assert federation.run_state(1)["state"] == "stopped"
    assert federation.do("stop-run", "1").returncode == 64
    assert federation.do("stop-run", "9").returncode == 64
    ended = federation.do("follow", "1", "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["state"] == "stopped"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run-config", "colour=red"], "no setting 'colour'"),
        (["--run-config", "rounds"], "KEY=VALUE"),
        (["--run-config", "rounds=many"], "rounds is a int"),
        (["--run-config", "fails=1"], "fails is a bool"),
        (["--out", "/proc/nope"], "/proc/nope"),
        (["--detach", "--out", "x"], "--detach"),
    ],
)
def test_a_run_that_cannot_work_is_not_queued(
    federation: Federation, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = quorsum("run", training_app(tmp_path / "app"), "--home", federation.home, *arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert says in done.stderr
    assert federation.json("runs")["runs"] == []


def test_what_is_no_app_is_not_queued(federation: Federation, tmp_path: Path) -> None:
    assert quorsum("run", tmp_path / "nowhere", "--home", federation.home).returncode == 64
    app = training_app(tmp_path / "app")
    text = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(re.sub(r"serverapp = .*\n", "", text))
    assert quorsum("run", app, "--home", federation.home).returncode == 64
    assert quorsum("run", app, "--home", tmp_path / "no-home").returncode == 64


def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(federation: Federation, tmp_path: Path) -> None:
    follower = federation.follow("run", training_app(tmp_path / "app"))
    assert follower.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(follower.stderr or ()))
    reader.start()
    until(lambda: any("waits" in line for line in said) or follower.poll() is not None)
    assert "start it with: quorsum coordinator start" in said[-1]
    follower.send_signal(2)
    assert follower.wait(20) == 2
    reader.join()
    assert next_command(said[-1])[:3] == ["coordinator", "follow", "1"]
    assert "coordinator stop-run 1" in said[-1]
    assert federation.run_state(1)["state"] == "queued"


def test_keys_of_the_authority_are_never_printed(federation: Federation) -> None:
    key = (federation.home / "ca.key").read_text().splitlines()[1]
    for words in (["sites"], ["status"], ["runs"], ["invite", "a"], ["approve"]):
        done = federation.do(*words)
        assert key not in done.stdout + done.stderr
    assert certificates.public_key(load_authority(federation.home).key)
