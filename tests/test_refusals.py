"""What a federation of real processes refuses, each with its reason: by the network, by a site, by the coordinator.

One coordinator and four sites, started by typing. Every attack is made on their real ports; the last two are made in
the middle of a round. The finer points are in the tests of each part.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from coordinator_harness import training_app
from fleet_harness import credentials, raw, until
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from process_federation import ENVIRONMENT, QUORSUM, Federation, federation

from quorsum import enrollment as talk
from quorsum import flower
from quorsum.client import fleet
from quorsum.client.home import SiteHome
from quorsum.crypto import certificates
from quorsum.invitation import decode, encode, split_address

# A minute and more; every refusal has a quicker test of its own, beside the part that refuses.
pytestmark = pytest.mark.slow

SITES = ("a", "b", "c", "d")
PORTS = ("enrollment", "members", "fleet")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("lab")
    app = training_app(folder / "app")
    code = app / "tiny" / "client_app.py"
    slow = code.read_text().replace("import numpy", "import time\nimport numpy", 1)
    code.write_text(slow.replace("    model =", "    time.sleep(context.node_config['pause'])\n    model ="))
    with federation(folder) as made:
        made.init()
        made.start_coordinator()
        small = ("--set", "accept-small-models=true", "--confirm", "--set", "partition-id=0", "--set")
        # Site d is slow, so that it still trains when it is revoked.
        made.enroll(SITES, app, {name: (*small, f"pause={8.0 if name == 'd' else 0.2}") for name in SITES})
        until(lambda: made.connected(SITES), 90)
        yield made


def address(lab: Federation, port: str) -> str:
    return str(lab.status()["listeners"][port])


def trusting(home: Path, *, member: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=home / "ca.crt")
    if member:
        context.load_cert_chain(home / "tls.crt", home / "tls.key")
    return context


def say(lab: Federation, data: bytes, *, member: bool = True, port: str = "fleet") -> bytes:
    """Bytes over TLS, as site a or as nobody; the first of what comes back."""
    host, number = split_address(address(lab, port))
    try:
        with (
            socket.create_connection((host, number), timeout=10) as plain,
            trusting(lab.home("a"), member=member).wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.sendall(data)
            return connection.recv(4096)
    except OSError:
        return b""


def post(path: str, length: int = 0) -> bytes:
    kind = "Content-Type: application/protobuf"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def invitation(lab: Federation, name: str) -> str:
    return lab.type("coordinator", "invite", name, "--home", lab.coordinator_home).stdout.strip()


def enroll(lab: Federation, home: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [QUORSUM, "site", "enroll", "--home", lab.home(home)],
        input=text, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def another_home(lab: Federation, name: str) -> Path:
    """A copy of what site a has, to be changed."""
    home = lab.home(name)
    shutil.copytree(lab.home("a"), home)
    (home / "connected").unlink(missing_ok=True)
    return home


def starts(lab: Federation, name: str, *, and_says: str) -> None:
    process = lab.keep_typing(name, "site", "start", "--home", lab.home(name))
    until(lambda: and_says in process.said(), 60)
    process.kill()


def all_is_well(lab: Federation) -> None:
    """Nobody was harmed: the same process of the coordinator answers, and the sites that were connected still are."""
    assert lab.running["coordinator"].alive(), lab.logs()
    assert say(lab, post("/v1/fleet/pull-messages")).startswith(b"HTTP/1.1 401")
    assert lab.connected(SITES)


# --- who comes in ---


def test_a_site_whose_key_nobody_registered(lab: Federation) -> None:
    home = another_home(lab, "unregistered")
    (home / "node.key").write_bytes(certificates.make_key())
    starts(lab, "unregistered", and_says="refused: not a member")


def test_a_site_that_trusts_another_authority(lab: Federation) -> None:
    home = another_home(lab, "elsewhere")
    (home / "ca.crt").write_bytes(certificates.make_authority("another", datetime.now(UTC))[1])
    starts(lab, "elsewhere", and_says="refused: certificate")


def test_a_member_of_another_authority_is_not_heard(lab: Federation) -> None:
    """Right authority trusted, wrong one shown."""
    home = another_home(lab, "foreign")
    now = datetime.now(UTC)
    key, authority = certificates.make_authority("another", now)
    request = certificates.make_request((home / "tls.key").read_bytes(), "a")
    shown = certificates.issue(key, authority, request, now, timedelta(hours=1), server=False)
    (home / "tls.crt").write_bytes(shown)
    starts(lab, "foreign", and_says="refused: certificate")


def test_an_invitation_for_another_authority(lab: Federation) -> None:
    good = decode(invitation(lab, "e1"))
    wrong = type(good)(good.address, "ab" * 32, good.site, good.expires, good.secret)
    done = enroll(lab, "e1", encode(wrong))
    assert done.returncode == 1
    assert "authority" in done.stderr


def test_an_invitation_that_has_expired(lab: Federation) -> None:
    config = lab.coordinator_home / "coordinator.toml"
    before = config.read_text()
    config.write_text(before.replace("invitation_hours = 72.0", "invitation_hours = 0.0003"))
    try:
        text = invitation(lab, "e2")
    finally:
        config.write_text(before)
    until(lambda: decode(text).expires < time.time())
    done = enroll(lab, "e2", text)
    assert done.returncode == 1
    assert "expired" in done.stderr


def test_an_invitation_that_another_site_has_used(lab: Federation) -> None:
    text = invitation(lab, "e3")
    first = lab.keep_typing("e3", "site", "enroll", "--home", lab.home("e3"), text=text)
    until(lambda: "the six words" in first.said(), 60)
    second = enroll(lab, "e3-again", text)
    assert second.returncode == 1
    assert "used" in second.stderr
    first.kill()
    lab.type("coordinator", "refuse", "e3", "--home", lab.coordinator_home)


def test_an_invitation_that_was_changed_on_its_way(lab: Federation) -> None:
    text = invitation(lab, "e4")
    done = enroll(lab, "e4", text[:20] + ("b" if text[20] != "b" else "c") + text[21:])
    assert done.returncode == 1
    assert "changed on the way" in done.stderr
    assert text[6:20] not in done.stderr


def test_a_clock_that_is_wrong(lab: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    # The signed time is off, as it would be with that clock; what the clock itself shows is compared with the answer.
    monkeypatch.setattr(fleet.time, "time", lambda real=time.time: real() - 1000)
    states: list[str] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=fleet.serve,
        args=(address(lab, "fleet"), credentials(lab.home("a")), lambda *_: None),
        kwargs={"stop": stop, "on_state": states.append, "clock_offset": lambda: -1000.0},
    )
    thread.start()
    try:
        until(lambda: states, 20)
    finally:
        stop.set()
        thread.join()
    assert states == ["refused: clock"]


# --- what the ports show ---


@pytest.mark.parametrize(
    "path",
    ["/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/v1/control/start-run", "/v1/control/list-runs"],
)
def test_flowers_control_and_runtime_are_on_no_port(lab: Federation, path: str) -> None:
    assert say(lab, post(path)).startswith(b"HTTP/1.1 404")
    assert say(lab, post(path), member=False) == b"", "without a certificate there is no answer at all"
    home = SiteHome(lab.home("a"))
    for port in ("enrollment", "members"):
        shown = (home.tls_key(), home.certificate()) if port == "members" else (None, None)
        secure = grpc.ssl_channel_credentials(home.authority(), *shown)
        for method in (path, "/flwr.proto.Control/StartRun", "/flwr.proto.ServerAppIo/RequestToken"):
            with grpc.secure_channel(address(lab, port), secure, [("grpc.enable_http_proxy", 0)]) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_body_that_is_too_long(lab: Federation) -> None:
    assert say(lab, post("/v1/fleet/push-object", 64 * 1024 * 1024 + 1)).startswith(b"HTTP/1.1 413")
    secure = grpc.ssl_channel_credentials(SiteHome(lab.home("a")).authority())
    with grpc.secure_channel(address(lab, "enrollment"), secure, [("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(talk.method(talk.ENROLLMENT, "Enroll"))(
                bytes(talk.MAX_ENROLLMENT_BYTES + 1), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    all_is_well(lab)


def test_garbage_on_every_port(lab: Federation) -> None:
    draw = random.Random(0)  # noqa: S311 - garbage, the same every time
    openings = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    for port in PORTS:
        for opening in openings:
            data = opening + draw.randbytes(4096)
            with suppress(OSError), socket.create_connection(split_address(address(lab, port)), timeout=10) as plain:
                plain.sendall(data)
                plain.settimeout(0.2)
                plain.recv(100)
            for member in (True, False):
                say(lab, data + b"\r\n\r\n", member=member, port=port)
    all_is_well(lab)


# --- in the middle of a run ---


def test_an_app_that_is_on_no_list(lab: Federation, tmp_path: Path) -> None:
    other = training_app(tmp_path / "other", rule="spectral")
    number = lab.type("run", other, "--home", lab.coordinator_home, "--detach").stdout.strip()
    found = until(lambda: (lab.status()["run"] or {}).get("left_out"), 60)
    assert set(found) == set(SITES)
    assert all("bundle-not-allowed" in reason for reason in found.values())
    until(lambda: "bundle-not-allowed" in lab.running["a"].said() or "does not allow" in lab.running["a"].said())
    lab.type("coordinator", "stop-run", number, "--home", lab.coordinator_home)
    until(lambda: lab.status()["run"] is None, 60)


def test_a_member_that_forges_and_one_that_replays(lab: Federation, tmp_path: Path) -> None:
    """Site d is an attacker with d's keys: it answers in a's name, and gives the same answer twice."""
    home = lab.home("d")
    lab.running["d"].kill()
    former = int((home / "connected").read_text())
    who = credentials(home)
    client = flower.FleetClient(address(lab, "fleet"), who.context(), who.node())
    client.deactivate(former)
    node = client.activate()
    over = threading.Event()

    def stay() -> None:
        while not over.wait(2.0):
            client.beat(node)

    threading.Thread(target=stay, daemon=True).start()
    until(lambda: lab.connected(SITES))
    run = lab.run(lab.folder / "app", tmp_path / "out", rounds=1)
    try:
        message = client.fetch(node, until(lambda: client.poll(node), 60))
        others = int((lab.home("a") / "connected").read_text())

        forged = Message(raw(b"forged"), reply_to=message)
        forged.metadata.__dict__["_src_node_id"] = others
        forged.metadata.__dict__["_message_id"] = forged.object_id
        request = PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[message_to_proto(remove_content_from_message(forged))],
            message_object_trees=[get_object_tree(forged)],
        )
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client._client.PushMessages(request)
        assert caught.value.response.status_code == 403
        assert f"node {node} tried to answer in the name of node {others}" in lab.running["coordinator"].said()
        request.node.node_id = others
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client._client.PushMessages(request)
        assert caught.value.response.status_code == 401

        answer = Message(raw(b"mine"), reply_to=message)
        client.push(node, message, answer)
        # What is not signed for this very instruction is not an answer, and the site is named.
        until(lambda: "d" in str((lab.status()["run"] or {}).get("left_out")), 60)
        with pytest.raises(flower.MessageGone):
            client.push(node, message, answer)
    finally:
        over.set()
        client.deactivate(node)
        client.close()
        lab.start_site("d")
    assert run.process.wait(120) == 0, lab.logs()
    until(lambda: lab.connected(SITES), 60)


def test_a_site_that_is_revoked_in_the_middle_of_a_round(lab: Federation, tmp_path: Path) -> None:
    plan = subprocess.run(
        [QUORSUM, "coordinator", "revoke", "d", "--home", lab.coordinator_home],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    digest = plan.stderr.rpartition("--confirm ")[2].split()[0]
    run = lab.run(lab.folder / "app", tmp_path / "out", rounds=2)
    until(lambda: (lab.status()["run"] or {}).get("phase") == "train", 60)
    lab.type("coordinator", "revoke", "d", "--confirm", digest, "--home", lab.coordinator_home)
    site = lab.running["d"]
    until(lambda: not site.alive(), 60)
    assert site.process.returncode == 1
    assert "revoked" in site.said()
    assert run.process.wait(120) == 0, lab.logs()
    records = json.loads((tmp_path / "out" / "result.json").read_text())["rounds"]
    codes = [record["codes"].get("d") for record in records if "d" in record["invited"]]
    assert codes[-1] == "revoked", codes
    assert all(record["accepted"] == ["a", "b", "c"] for record in records if "d" not in record["accepted"])
    assert records[-1]["invited"] == ["a", "b", "c"]
