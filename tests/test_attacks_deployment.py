"""Attacks on a real federation over real sockets: from the network, from a member, from the coordinator.

Every test is an attack that worked once, or a question whose answer had to be shown; it fails now for the reason that
its assertions name.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from enrollment_federation import FAST, Coordinator, Liar, speak
from fleet_harness import PYPROJECT, Authority, Fleet, Site, app_folder, echo, raw, running, until
from flwr.app import Message
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from pydantic import BaseModel

from quorsum import bundles, flower
from quorsum import enrollment as talk
from quorsum.client import fleet as site_fleet
from quorsum.client.enrollment import enroll, fetch_authority, fetch_key, roster, share_key
from quorsum.client.home import SiteHome
from quorsum.crypto import certificates, generate_site_key
from quorsum.errors import CoordinatorFault, Refusal
from quorsum.invitation import Invitation, split_address
from quorsum.server import fleet as server_fleet
from quorsum.server.enrollment import Limits

SLOWEST = 1.5


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    limits = Limits(rate=1000, burst=1000, overall_rate=2000, overall_burst=2000, slowest=SLOWEST)
    made = Coordinator(tmp_path / "coordinator", limits)
    yield made
    made.stop()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running(tmp_path / "fleet") as made:
        yield made


# --- from the network, and from members, against the two gRPC ports ---


def _literal(name: str, value: str) -> bytes:
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _secure(address: str, authority: bytes, source: str, files: tuple[Path, Path] | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(*files)
    host, port = split_address(address)
    plain = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))
    return context.wrap_socket(plain, server_hostname=host)


def half_open(
    address: str, authority: bytes, method: str, source: str, files: tuple[Path, Path] | None = None
) -> ssl.SSLSocket:
    """One connection with eight calls whose message never comes."""
    connection = _secure(address, authority, source, files)
    fields = {
        ":method": "POST", ":scheme": "https", ":path": method, ":authority": "localhost",
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    head = b"".join(_literal(name, value) for name, value in fields.items())
    calls = b"".join(_frame(1, 4, 2 * k + 1, head) for k in range(8))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0) + calls)
    return connection


def _now() -> datetime:
    return datetime.now(UTC)


def _invitation(address: str, authority: bytes) -> Invitation:
    return Invitation(address, certificates.fingerprint(authority), "a", int(time.time()) + 3600, os.urandom(16))


@contextmanager
def lying_server(key: bytes, authority: bytes, replies: dict[str, BaseModel], *, busy: bool = False) -> Iterator[str]:
    """A coordinator with a certificate of the right authority that answers what a test wants, or is too busy."""
    own = certificates.make_key()
    request = certificates.make_request(own, "coordinator")
    leaf = certificates.issue(key, authority, request, _now(), timedelta(days=1), hosts=["localhost"], server=True)
    server = grpc.server(futures.ThreadPoolExecutor(2), maximum_concurrent_rpcs=0 if busy else None)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(lambda data, context, reply=reply: talk.pack(reply))
        for name, reply in replies.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(talk.ENROLLMENT, handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(own, leaf + authority)]))
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0)


def test_calls_that_never_send_their_message_do_not_keep_others_out(coordinator: Coordinator) -> None:
    method = talk.method(talk.ENROLLMENT, "Enroll")
    address, authority = coordinator.service.enrollment_address, coordinator.authority.certificate
    with ExitStack() as held:
        for _ in range(12):
            held.enter_context(half_open(address, authority, method, "127.0.0.2"))
        time.sleep(0.3)
        began = time.monotonic()
        assert Liar("a").present(coordinator, coordinator.invite("a").secret).code == ""
        assert time.monotonic() - began < 2
        # From the attacker's own address it takes until the calls are given up.
        for _ in range(2):
            held.enter_context(half_open(address, authority, method, "127.0.0.1"))
        time.sleep(0.3)
        late = Liar("b")
        secret = coordinator.invite("b").secret
        assert late.present(coordinator, secret).code == "rate-limited"
        until(lambda: late.present(coordinator, secret).code == "", 3 * SLOWEST)


def test_a_members_half_open_calls_do_not_keep_other_members_out(coordinator: Coordinator, tmp_path: Path) -> None:
    a, b = (coordinator.enroll(name, tmp_path / name)[0] for name in ("a", "b"))
    address, authority = coordinator.service.members_address, coordinator.authority.certificate
    with ExitStack() as held:
        for _ in range(12):
            files = (a.certificate_file, a.tls_key_file)
            method = talk.method(talk.MEMBERS, "Roster")
            held.enter_context(half_open(address, authority, method, "127.0.0.1", files))
        time.sleep(0.3)
        assert len(roster(b)) == 2


def test_open_connections_are_bounded_and_let_go(coordinator: Coordinator) -> None:
    host, port = split_address(coordinator.service.enrollment_address)
    with ExitStack() as held:
        many = [held.enter_context(socket.create_connection((host, port))) for _ in range(400)]
        time.sleep(0.5)
        closed = 0
        for one in many:
            one.setblocking(False)
            try:
                closed += one.recv(1) == b""
            except BlockingIOError:
                pass
            except OSError:
                closed += 1
        assert closed >= 100
    # Many handshakes that break off at once ended the process while each of them brought a certificate of its own.
    for _ in range(5):
        with ExitStack() as held:
            for _ in range(300):
                held.enter_context(socket.create_connection((host, port)))
            time.sleep(0.1)
    secret = coordinator.invite("a").secret
    until(lambda: Liar("a").present(coordinator, secret).reply, 10)


def test_a_flood_of_refused_calls_does_not_fill_the_log(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quorsum.enrollment")
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    with grpc.secure_channel(coordinator.service.enrollment_address, credentials) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(talk.method(talk.ENROLLMENT, "Enroll"))
        for _ in range(400):
            with suppress(grpc.RpcError):
                call(b"{}", timeout=5)
    assert 1 <= sum("refused" in record.message for record in caplog.records) < 100


def test_a_site_waits_while_the_coordinator_is_too_busy_to_say_so(tmp_path: Path) -> None:
    authority_key, authority = certificates.make_authority("busy", _now())
    with lying_server(authority_key, authority, {"Enroll": talk.RosterRequest()}, busy=True) as address:
        home = SiteHome(tmp_path / "home")
        invitation = _invitation(address, authority)
        said: list[str] = []
        stop = threading.Event()

        def waiting(what: object) -> None:
            said.append(getattr(what, "state", ""))
            stop.set()

        with pytest.raises(Refusal) as refusal:
            enroll(invitation, home, waiting, stop, poll_s=0.05)
    assert refusal.value.code == "stopped"
    assert said == ["unreachable"]


def test_a_member_cannot_put_unsigned_keys_into_the_boxes_of_others(coordinator: Coordinator, tmp_path: Path) -> None:
    a, b, c = (coordinator.enroll(name, tmp_path / name)[0] for name in ("a", "b", "c"))
    for home in (a, b, c):
        roster(home)
    put = talk.PutKeyRequest(epoch=a.epoch(), recipient="b", sealed="A" * 64, signature="0" * 128)
    address = coordinator.service.members_address
    answer = speak(address, coordinator.authority, talk.MEMBERS, "PutKey", put, c.tls_key(), c.certificate())
    assert answer.code == "wrong-proof"
    share_key(a, generate_site_key(os.urandom))
    assert fetch_key(b).key_id == fetch_key(c).key_id


def test_a_members_certificate_does_not_make_a_coordinator(tmp_path: Path) -> None:
    made = Coordinator(tmp_path / "coordinator", FAST)
    try:
        # The operator was talked into a name that is a host's.
        home, _ = made.enroll("localhost", tmp_path / "home")
        invitation = made.invite("victim")
        server = grpc.server(futures.ThreadPoolExecutor(1))
        chain = home.certificate() + home.authority()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(home.tls_key(), chain)]))
        server.start()
        try:
            with pytest.raises(Refusal) as refusal:
                fetch_authority(replace(invitation, address=f"localhost:{port}"))
            assert refusal.value.code in ("wrong-authority", "wrong-name")
            answer = speak(f"localhost:{port}", made.authority, talk.ENROLLMENT, "Enroll", b"{}")
            assert answer.status is grpc.StatusCode.UNAVAILABLE
        finally:
            server.stop(0)
    finally:
        made.stop()


# --- from members, against the fleet's port ---


def wire(fleet_: Fleet, site: Site) -> ssl.SSLSocket:
    """A connection with a site's certificate."""
    context = site.credentials.context()
    plain = socket.create_connection(("127.0.0.1", fleet_.port), timeout=10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def signed_head(site: Site, path: str, length: int) -> bytes:
    """The head of a request, signed by the site's node key."""
    key = site.credentials.node()
    request = httpx.Request("POST", f"https://x{path}", headers={"content-type": "application/protobuf"})
    signer = flower._Signer(flower.bytes_to_private_key(key), lambda: 0.0)
    signer.intercept(flower.ProtobufRequestContext("", Node(), request), lambda _: httpx.Response(200))
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items() if name != "content-length")
    return f"POST {path} HTTP/1.1\r\n{lines}content-length: {length}\r\n\r\n".encode()


def send_until_refused(connection: ssl.SSLSocket, head: bytes, length: int) -> tuple[int, bytes]:
    """Bytes that were taken, and the beginning of the answer."""
    connection.settimeout(0.5)
    connection.sendall(head)
    sent = 0
    with suppress(OSError):
        while sent < length:
            connection.sendall(bytes(65536))
            sent += 65536
    try:
        return sent, connection.recv(12)
    except OSError:
        return sent, b""


@pytest.mark.parametrize("signed", [False, True], ids=["without a signature", "with the key of a revoked site"])
def test_the_long_requests_of_strangers_are_not_kept(fleet: Fleet, signed: bool) -> None:
    site = fleet.add_site()
    fleet.server.unregister(site.node_id)
    length = 32 << 20
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode()
    if signed:
        head = signed_head(site, "/v1/fleet/push-object", length)
    with wire(fleet, site) as connection:
        sent, answer = send_until_refused(connection, head, length)
    assert sent < 8 << 20
    assert answer in (b"HTTP/1.1 401", b"")
    assert not fleet.server._gate._taken


def test_a_member_cannot_fill_the_memory_with_requests_that_never_end(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", longest_request=4 << 20) as fleet_:
        site, other = fleet_.add_site(), fleet_.add_site()
        gate = fleet_.server._gate
        with ExitStack() as held:
            for _ in range(6):
                connection = held.enter_context(wire(fleet_, site))
                send_until_refused(connection, signed_head(site, "/v1/fleet/push-object", 4 << 20), (4 << 20) - 65536)
            assert 4 << 20 < gate._taken[site.node_id] <= 8 << 20
            other.run_here(fleet_.address, echo)
            until(lambda: fleet_.server.nodes()[other.node_id].online)
        until(lambda: not gate._taken)


def test_a_member_cannot_use_up_the_connections(fleet: Fleet) -> None:
    site, other = fleet.add_site(), fleet.add_site()
    server = fleet.server._server
    assert server is not None
    with ExitStack() as held:
        for _ in range(server_fleet._CONNECTIONS + 20):
            held.enter_context(wire(fleet, site))
        until(lambda: len(server.server_state.connections) <= server_fleet._CONNECTIONS)
        other.run_here(fleet.address, echo)
        until(lambda: fleet.server.nodes()[other.node_id].online)
        site.run_here(fleet.address, echo)
        until(lambda: fleet.server.nodes()[site.node_id].online)


def test_connections_that_say_nothing_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_fleet, "_HANDSHAKE", 0.5)
    with running(tmp_path / "fleet") as fleet_:
        site, server = fleet_.add_site(), fleet_.server._server
        assert server is not None
        server.config.timeout_keep_alive = 1
        with socket.create_connection(("127.0.0.1", fleet_.port), timeout=5) as silent, wire(fleet_, site) as idle:
            assert silent.recv(1) == b""
            assert idle.recv(1) == b""


def test_a_member_does_not_learn_when_another_is_sent_a_message(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", hold=5.0) as fleet_:
        victim, spy = fleet_.add_site(), fleet_.add_site()
        body = PullMessagesRequest(node=Node(node_id=victim.node_id)).SerializeToString()
        began = time.monotonic()
        with wire(fleet_, spy) as connection:
            connection.sendall(signed_head(spy, flower.PULL_MESSAGES, len(body)) + body)
            assert connection.recv(12) == b"HTTP/1.1 401"
        assert time.monotonic() - began < 2


def test_a_reply_of_endlessly_many_objects_is_not_welcome(fleet: Fleet, tmp_path: Path) -> None:
    site = fleet.add_site()
    grid = fleet.server.grid(fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {}))
    client = site.client(fleet.address)
    try:
        node = client.activate()
        list(grid.push_messages([Message(raw(b"question"), node, "train")]))
        instruction = client.poll(node)
        assert instruction is not None
        message = client.fetch(node, instruction)
        ids = (hashlib.sha256(str(k).encode()).hexdigest() for k in range(flower._MOST_OBJECTS + 1))
        bomb = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=one) for one in ids])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flower, "get_object_tree", lambda _: bomb)
            with pytest.raises((flower.MessageGone, httpx.HTTPStatusError)):
                client.push(node, message, Message(raw(b"x"), reply_to=message))
        assert not fleet.server._state._uploads
        client.push(node, message, Message(raw(b"right"), reply_to=message))
    finally:
        client.close()


# --- from the coordinator, against a site ---


@contextmanager
def false_coordinator(authority: Authority, answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """A listener with the federation's own certificate that answers every request with any bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("coordinator", server=True))
    listener = socket.create_server(("127.0.0.1", 0))

    def one(plain: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(plain, server_side=True) as s:
            data = b""
            while b"\r\n\r\n" not in data:
                data += s.recv(65536) or b"\r\n\r\n"
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            # Closing with something unread would take the answer back.
            while length and len(body) < int(length[1]):
                body += s.recv(65536)
            s.sendall(answer(data))
            s.recv(1)

    def work() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=work, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def test_the_coordinator_cannot_send_a_site_to_other_machines(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    site = Site("a", tmp_path / "home", authority)
    reached: list[bytes] = []
    inside = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        with suppress(OSError):
            while True:
                connection = inside.accept()[0]
                reached.append(connection.recv(1000))
                connection.close()

    threading.Thread(target=listen, daemon=True).start()
    place = f"http://127.0.0.1:{inside.getsockname()[1]}/admin"
    away = f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {place}\r\ncontent-length: 0\r\n\r\n".encode()
    with false_coordinator(authority, lambda _: away) as address:
        client = site.client(address)
        with pytest.raises(httpx.HTTPError):
            client.activate()
        client.close()
    inside.close()
    assert reached == []


def test_an_answer_without_an_end_does_not_fill_the_sites_memory(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    site = Site("a", tmp_path / "home", authority)
    huge = 1 << 30
    for head in (
        f"content-length: {huge}",
        "transfer-encoding: chunked",
        "content-length: 9\r\ncontent-encoding: gzip",
    ):
        text = f"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\n{head}\r\n\r\n".encode() + bytes(100)
        with false_coordinator(authority, lambda _, text=text: text) as address:  # type: ignore[misc]
            client = site.client(address)
            with pytest.raises(httpx.RemoteProtocolError, match="too long"):
                client.activate()
            client.close()


def test_an_endless_message_is_given_up(fleet: Fleet, tmp_path: Path) -> None:
    site = fleet.add_site()
    grid = fleet.server.grid(fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {}))
    client = site.client(fleet.address, longest=1 << 20)
    try:
        node = client.activate()
        list(grid.push_messages([Message(raw(bytes(12 << 20)), node, "train")]))
        instruction = client.poll(node)
        assert instruction is not None
        with pytest.raises(Refusal, match="more than"):
            client.fetch(node, instruction)
    finally:
        client.close()


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 20, b"\x0a" * 30, b"\x0a\x03\x0a\x01\x08"], ids=["bytes", "cut", "nested"]
)
def test_answers_that_mean_nothing_do_not_end_the_site(tmp_path: Path, garbage: bytes) -> None:
    authority = Authority(tmp_path / "authority")
    site = Site("a", tmp_path / "home", authority)
    asked: list[bytes] = []
    activated = ActivateNodeResponse(node_id=7).SerializeToString()

    def answer(request: bytes) -> bytes:
        # A connection that was closed before it asked anything gets nothing, as it deserves.
        asked.append([*request.split(b" "), b""][1])
        right = {b"/v1/fleet/activate-node": activated, b"/v1/fleet/deactivate-node": b""} if len(asked) > 2 else {}
        body = right.get(asked[-1], garbage)
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: {len(body)}\r\nconnection: close"
        )
        return head.encode() + b"\r\n\r\n" + body

    with false_coordinator(authority, answer) as address:
        site.run_here(address, echo)
        until(lambda: asked.count(flower.PULL_MESSAGES.encode()) >= 2)
        assert site.thread is not None
        assert site.thread.is_alive()
        site.end()
    assert site_fleet.CONNECTED in site.states


def test_what_the_coordinator_calls_itself_cannot_command_a_terminal(tmp_path: Path) -> None:
    key, authority = certificates.make_authority("evil", _now())
    escape = "\x1b]0;owned\x07\x1b[2J"
    fine = {
        "state": "pending", "words": "", "certificate": "", "members_address": "localhost:1",
        "fleet_address": "localhost:1", "federation": "lab", "server_time": time.time(),
    }  # fmt: skip
    for field in ("federation", "members_address", "fleet_address"):
        reply = talk.EnrollReply.model_construct(**{**fine, field: f"{escape}:1"})
        home = SiteHome(tmp_path / field)
        with lying_server(key, authority, {"Enroll": reply}) as address, pytest.raises(CoordinatorFault) as fault:
            enroll(_invitation(address, authority), home, lambda _: None, threading.Event())
        assert fault.value.code == "undecodable"
        assert "\x1b" not in str(fault.value)


def _bomb(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("pyproject.toml", PYPROJECT.format(name="tiny", package="tiny") + "\n" * (100 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_small_bundle_does_not_become_a_large_one(method: int) -> None:
    bundle = _bomb(method)
    assert len(bundle) < bundles.LONGEST
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as refusal:
            bundles.describe(bundle)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refusal.value.code == "unsafe-bundle"
    assert peak < 64 << 20
