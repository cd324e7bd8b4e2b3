"""The fleet's listener and grid, over real sockets of this machine, with honest sites and with attackers."""

from __future__ import annotations

import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from fleet_harness import (
    Authority,
    Fleet,
    Site,
    app_folder,
    ask,
    data_of,
    echo,
    free_port,
    raw,
    running,
    until,
)
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, RegisterNodeFleetRequest, UnregisterNodeFleetRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from quorsum import bundles, flower
from quorsum.errors import KeyMaterialError, Refusal, UsageError
from quorsum.server.fleet import FleetGrid, FleetServer, RunHandle


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running(tmp_path / "fleet") as made:
        yield made


@pytest.fixture
def handle(fleet: Fleet, tmp_path: Path) -> RunHandle:
    return fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {"rounds": 5})


@pytest.fixture
def grid(fleet: Fleet, handle: RunHandle) -> FleetGrid:
    return fleet.server.grid(handle)


def tell(fleet: Fleet, site: Site, data: bytes = b"question") -> Message:
    return Message(raw(data), site.node_id, "train")


# --- honest sites ---


def test_every_site_gets_its_message_and_its_reply_comes_back(fleet: Fleet, grid: FleetGrid, handle: RunHandle) -> None:
    for _ in range(3):
        fleet.add_site().run_here(fleet.address, echo)
    until(lambda: fleet.online() == 3)
    assert list(grid.get_node_ids()) == sorted(site.node_id for site in fleet.sites)
    assert {node.name for node in fleet.server.nodes().values()} == {"site-01", "site-02", "site-03"}
    sent = {site.node_id: site.name.encode() * 1000 for site in fleet.sites}
    replies = list(grid.send_and_receive([tell(fleet, s, sent[s.node_id]) for s in fleet.sites], timeout=20))
    assert {reply.metadata.src_node_id: data_of(reply) for reply in replies} == sent
    assert grid.run.run_id == handle.run_id
    assert handle.config == {"rounds": 5, "depth.layers": 3}


def test_a_reply_of_40_mb_comes_back_and_nothing_of_it_stays(fleet: Fleet, grid: FleetGrid) -> None:
    site = fleet.add_site()
    data = os.urandom(40_000_000)
    site.run_here(fleet.address, lambda message, bundle, run: Message(raw(data), reply_to=message))
    until(lambda: fleet.online() == 1)
    (reply,) = grid.send_and_receive([tell(fleet, site)], timeout=60)
    assert data_of(reply) == data
    del reply
    (message_id,) = grid.push_messages([tell(fleet, site)])
    until(lambda: list(grid.pull_messages([message_id])))
    assert len(fleet.server._state.object_store) == 0
    assert fleet.server._state._uploads == fleet.server._state._sessions == {}


def test_the_site_learns_run_and_bundle(fleet: Fleet, grid: FleetGrid, handle: RunHandle) -> None:
    seen = []

    def look(message: Message, bundle: bytes, run: flower.Run) -> Message:
        seen.append((bundles.digest(bundle), run.run_id, run.override_config))
        return echo(message, bundle, run)

    site = fleet.add_site()
    site.run_here(fleet.address, look)
    until(lambda: fleet.online() == 1)
    assert len(list(grid.send_and_receive([tell(fleet, site)], timeout=20))) == 1
    assert seen == [(handle.digest, handle.run_id, {"rounds": 5})]


def test_messages_to_nobody_and_to_the_gone(fleet: Fleet, grid: FleetGrid) -> None:
    never, site = fleet.add_site(), fleet.add_site()
    site.run_here(fleet.address, echo)
    until(lambda: fleet.online() == 1)
    assert list(grid.push_messages([tell(fleet, never), Message(raw(b"x"), 4711, "train")])) == []
    assert grid.activation(never.node_id) is None
    assert grid.registered(never.node_id)
    site.end()
    until(lambda: fleet.online() == 0)
    (reply,) = grid.send_and_receive([tell(fleet, site)], timeout=20)
    assert reply.error.code == 5


def test_a_message_that_is_withdrawn_is_not_answered(fleet: Fleet, grid: FleetGrid) -> None:
    site = fleet.add_site()
    begun, go = threading.Event(), threading.Event()

    def slow(message: Message, bundle: bytes, run: flower.Run) -> Message:
        begun.set()
        go.wait(20)
        return echo(message, bundle, run)

    site.run_here(fleet.address, slow)
    until(lambda: fleet.online() == 1)
    assert list(grid.send_and_receive([tell(fleet, site)], timeout=1.0)) == []
    assert begun.is_set()
    go.set()
    (reply,) = grid.send_and_receive([tell(fleet, site, b"next")], timeout=20)
    assert data_of(reply) == b"next"
    assert len(fleet.server._state.object_store) == 0


def test_two_runs_at_once_keep_their_messages_apart(
    fleet: Fleet, grid: FleetGrid, handle: RunHandle, tmp_path: Path
) -> None:
    other = fleet.server.open_run(bundles.build(app_folder(tmp_path / "other", name="other")), {})
    second = fleet.server.grid(other)
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    until(lambda: fleet.online() == 1)
    ids = list(grid.push_messages([tell(fleet, site, b"first")])), list(second.push_messages([tell(fleet, site, b"2")]))
    (reply,) = until(lambda: list(grid.pull_messages(ids[0])))
    assert (data_of(reply), reply.metadata.run_id) == (b"first", handle.run_id)
    (reply,) = until(lambda: list(second.pull_messages(ids[1])))
    assert (data_of(reply), reply.metadata.run_id) == (b"2", other.run_id)
    fleet.server.close_run(other)
    fleet.server.close_run(handle)
    assert list(second.push_messages([tell(fleet, site)])) == []


def test_a_site_that_is_sent_away_is_noticed_and_refused(fleet: Fleet, grid: FleetGrid) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    until(lambda: fleet.online() == 1)
    (message_id,) = grid.push_messages([tell(fleet, site)])
    fleet.server.unregister(site.node_id)
    fleet.server.unregister(site.node_id)
    assert not grid.registered(site.node_id)
    assert fleet.server.nodes() == {}
    until(lambda: "refused: not a member" in site.states)
    until(lambda: list(grid.pull_messages([message_id])))
    assert list(grid.push_messages([tell(fleet, site)])) == []


# --- who may speak at all ---


def attempt(fleet: Fleet, context: ssl.SSLContext) -> bytes:
    """What somebody gets who speaks TLS with the listener; nothing if the listener hangs up."""
    try:
        with (
            socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
        ):
            s.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            return s.recv(100)
    except (ssl.SSLError, ConnectionError):
        return b""


def trusting(fleet: Fleet) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=fleet.authority.certificate)


def test_without_a_certificate_nobody_gets_in(fleet: Fleet) -> None:
    assert attempt(fleet, trusting(fleet)) == b""


@pytest.mark.parametrize("kind", ["other authority", "expired", "server's"])
def test_with_a_wrong_certificate_nobody_gets_in(fleet: Fleet, tmp_path: Path, kind: str) -> None:
    authority = Authority(tmp_path / "other", "test federation") if "other" in kind else fleet.authority
    if kind == "expired":
        files = authority.issue("late", lifetime=timedelta(hours=1), ago=timedelta(hours=2))
    else:
        files = authority.issue("somebody", server=kind == "server's")
    context = trusting(fleet)
    context.load_cert_chain(*files)
    assert attempt(fleet, context) == b""


def test_old_tls_is_not_spoken(fleet: Fleet) -> None:
    site = fleet.add_site()
    context = site.credentials.context()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    assert attempt(fleet, context) == b""
    assert b"HTTP/1.1 4" in attempt(fleet, site.credentials.context())


def test_an_unregistered_key_is_told_so(fleet: Fleet) -> None:
    site = fleet.add_site(register=False)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        site.client(fleet.address).activate()
    assert (caught.value.response.status_code, caught.value.response.json()) == (403, {"detail": "unknown-node"})


def test_a_running_lease_is_told_so(fleet: Fleet) -> None:
    site = fleet.add_site()
    client = site.client(fleet.address)
    node = client.activate()
    with pytest.raises(httpx.HTTPStatusError) as caught:
        client.activate()
    assert (caught.value.response.status_code, caught.value.response.json()) == (409, {"detail": "lease-runs"})
    client.deactivate(node)
    assert client.activate() == node


@pytest.mark.parametrize(("offset", "accepted"), [(0, True), (250, False), (-250, True), (-400, False)])
def test_signed_times_have_a_window(fleet: Fleet, offset: float, accepted: bool) -> None:
    client = fleet.add_site().client(fleet.address, clock_offset=lambda: offset)
    if accepted:
        client.activate()
    else:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client.activate()
        assert caught.value.response.status_code == 401


def test_nodes_are_not_registered_over_the_network(fleet: Fleet) -> None:
    site, stranger = fleet.add_site(), fleet.add_site(register=False)
    client = stranger.client(fleet.address)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        client._client.RegisterNode(RegisterNodeFleetRequest(public_key=client._public))
    assert "2001" in caught.value.response.text
    client = site.client(fleet.address)
    node = client.activate()
    with pytest.raises(httpx.HTTPStatusError) as caught:
        client._client.UnregisterNode(UnregisterNodeFleetRequest(node_id=node))
    assert "2002" in caught.value.response.text
    assert set(fleet.server.nodes()) == {site.node_id}


# --- what the port shows ---

HIDDEN = [
    "/", "/health", "/docs", "/openapi.json", "/redoc", "/v1/control/list-nodes", "/v1/control/start-run",
    "/v1/control/register-node", "/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/v1/fleet", "/v1/fleet/",
    "/v1/fleet/nothing", "/v1/fleet/pull-messages/", "//v1/fleet/pull-messages", "/v1//fleet/pull-messages",
    "/v1/fleet/../control/list-nodes", "/v1/fleet/pull-messages/../../control/list-nodes", "/v1/fleet/%2e%2e/x",
    "/v1/control/../fleet/pull-messages", "/v1/fleet/pull%2dmessages", "/v1/fleet%2fpull-messages",
    "/v1/fleet/pull-messages?x=1", "/v1/fleet/pull-messages#x", "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages;x", "http://x/v1/fleet/pull-messages", "*",
]  # fmt: skip


@pytest.mark.parametrize("path", HIDDEN)
def test_everything_else_is_not_found(fleet: Fleet, path: str) -> None:
    home = fleet.add_site().home
    answer = ask(fleet, path, who=home)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer[:100]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "CONNECT", "post", "POSTS"])
def test_other_methods_are_not_found(fleet: Fleet, method: str) -> None:
    home = fleet.add_site().home
    answer = ask(fleet, "/v1/fleet/pull-messages", method=method, who=home)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer[:100]
    assert ask(fleet, "/v1/fleet/pull-messages", who=home).startswith(b"HTTP/1.1 401")


# --- limits ---


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Fleet]:
    with running(tmp_path / "fleet", longest_request=100_000) as made:
        yield made


def test_a_request_that_says_it_is_too_long_is_refused_unread(narrow: Fleet) -> None:
    home = narrow.add_site().home
    for length in ("100001", "9" * 14, "9" * 40):
        context = trusting(narrow)
        context.load_cert_chain(home / "tls.crt", home / "tls.key")
        with (
            socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
        ):
            s.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
            assert s.recv(12) in (b"HTTP/1.1 413", b"HTTP/1.1 400")


def test_a_request_that_does_not_say_so_is_refused_when_it_gets_too_long(narrow: Fleet) -> None:
    home = narrow.add_site().home
    context = trusting(narrow)
    context.load_cert_chain(home / "tls.crt", home / "tls.key")
    with (
        socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
    ):
        s.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(11):
            s.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
        assert s.recv(12) == b"HTTP/1.1 413"
    assert ask(narrow, "/v1/fleet/push-object", bytes(100_000), who=home).startswith(b"HTTP/1.1 400")


def test_garbage_does_not_hurt(fleet: Fleet, grid: FleetGrid) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    until(lambda: fleet.online() == 1)
    rng = random.Random(0)  # noqa: S311 - garbage, the same every time
    openings = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 1000, b"SSH-2.0-x\r\n"]
    for opening in openings * 4:
        with socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as s:
            try:
                s.sendall(opening + rng.randbytes(rng.choice([0, 10, 5000])))
                if rng.random() < 0.5:
                    s.shutdown(socket.SHUT_WR)
                    s.recv(100)
            except OSError:
                pass
    for path in sorted(flower.FLEET_PATHS):
        for body in (b"", rng.randbytes(50), b"\x0a" * 50, b"\xff" * 50):
            answer = ask(fleet, path, body, who=site.home)
            assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer[:100]
    for line in (
        b"\x00\x01\x02",
        b"POST /v1/fleet/x HTTP/9.9\r\n\r\n",
        b"A" * 100_000,
        b"POST / HTTP/1.1\r\nA\r\n\r\n",
    ):
        context = trusting(fleet)
        context.load_cert_chain(site.home / "tls.crt", site.home / "tls.key")
        with (
            socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
        ):
            try:
                s.sendall(line)
                s.shutdown(socket.SHUT_WR)
                s.recv(100)
            except (OSError, ValueError):
                pass
    (reply,) = grid.send_and_receive([tell(fleet, site, b"still there")], timeout=20)
    assert data_of(reply) == b"still there"
    assert set(site.states) == {"connected"}


# --- a member that attacks another one ---


class Attack:
    """Two registered sites: A, which is honest and holds a message, and B, which is not."""

    def __init__(self, fleet: Fleet, grid: FleetGrid) -> None:
        self.fleet, self.grid = fleet, grid
        self.honest, self.attacker = fleet.add_site(), fleet.add_site()
        self.a, self.b = (site.client(fleet.address) for site in fleet.sites)
        assert self.a.activate() == self.honest.node_id
        assert self.b.activate() == self.attacker.node_id
        (self.message_id,) = grid.push_messages([tell(fleet, self.honest)])
        instruction = self.a.poll(self.honest.node_id)
        assert instruction is not None
        self.instruction = instruction

    def reply(self, data: bytes) -> Message:
        header = self.instruction.header
        header.metadata.__dict__["_message_id"] = self.message_id
        reply = Message(raw(data), reply_to=header)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def push(self, client: flower.FleetClient, node: int, reply: Message) -> object:
        return client._client.PushMessages(
            PushMessagesRequest(
                node=Node(node_id=node),
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
        )

    def honest_reply_arrives(self) -> None:
        message = self.a.fetch(self.honest.node_id, self.instruction)
        self.a.push(self.honest.node_id, message, Message(raw(b"honest"), reply_to=message))
        (reply,) = self.grid.pull_messages([self.message_id])
        assert data_of(reply) == b"honest"
        assert reply.metadata.src_node_id == self.honest.node_id


@pytest.fixture
def attack(fleet: Fleet, grid: FleetGrid) -> Attack:
    return Attack(fleet, grid)


def test_a_reply_in_anothers_name_is_refused(attack: Attack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flwr.quorsum.fleet"), pytest.raises(httpx.HTTPStatusError) as caught:
        attack.push(attack.b, attack.attacker.node_id, attack.reply(b"forged"))
    assert caught.value.response.status_code == 403
    assert f"node {attack.attacker.node_id} tried to answer in the name of node {attack.honest.node_id}" in caplog.text
    assert list(attack.grid.pull_messages([attack.message_id])) == []
    attack.honest_reply_arrives()


def test_what_a_member_provokes_does_not_fill_the_log(attack: Attack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for number in range(20):
        with pytest.raises(httpx.HTTPStatusError):
            attack.push(attack.b, attack.attacker.node_id, attack.reply(b"forged %d" % number))
    context = attack.attacker.credentials.context()
    for _ in range(20):
        with (
            socket.create_connection(("127.0.0.1", attack.fleet.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
        ):
            s.sendall(b"no request at all\r\n\r\n")
            while s.recv(1024):
                pass
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sum("in the name of" in line for line in said) == 1
    assert 1 <= sum("Invalid HTTP request" in line for line in said) <= 10
    assert len(said) <= 11
    attack.honest_reply_arrives()


def test_a_request_in_anothers_name_is_refused(attack: Attack) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        attack.push(attack.b, attack.honest.node_id, attack.reply(b"forged"))
    assert caught.value.response.status_code == 401
    for speak in (attack.b.beat, attack.b.poll, attack.b.deactivate):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            speak(attack.honest.node_id)
        assert caught.value.response.status_code == 401
    attack.honest_reply_arrives()


def test_an_own_reply_to_anothers_message_is_not_taken(attack: Attack) -> None:
    forged = attack.reply(b"forged")
    forged.metadata.__dict__["_src_node_id"] = attack.attacker.node_id
    forged.metadata.__dict__["_message_id"] = forged.object_id
    response = attack.push(attack.b, attack.attacker.node_id, forged)
    assert list(response.objects_to_push) == []  # type: ignore[attr-defined]
    assert list(attack.grid.pull_messages([attack.message_id])) == []
    attack.honest_reply_arrives()


def test_anothers_upload_cannot_be_added_to(attack: Attack) -> None:
    reply = attack.reply(b"honest")
    announced = attack.push(attack.a, attack.honest.node_id, reply)
    request = PushObjectRequest(
        node=Node(node_id=attack.attacker.node_id),
        run_id=reply.metadata.run_id,
        object_id=reply.object_id,
        object_content=reply.deflate(),
        session_id=announced.session_id,  # type: ignore[attr-defined]
    )
    with pytest.raises(httpx.HTTPStatusError) as caught:
        attack.b._client.PushObject(request)
    assert caught.value.response.status_code == 403
    request.session_id = ""
    assert not attack.b._client.PushObject(request).stored
    attack.honest_reply_arrives()


def test_anothers_message_cannot_be_confirmed_away(attack: Attack) -> None:
    content = attack.instruction.tree.children[0].object_id
    for target in (attack.message_id, content):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            attack.b._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=Node(node_id=attack.attacker.node_id),
                    run_id=attack.grid.run.run_id,
                    message_object_id=target,
                )
            )
        assert caught.value.response.status_code == 403
    attack.honest_reply_arrives()


def test_a_reply_made_of_anothers_objects_does_not_take_them_along(attack: Attack) -> None:
    (own,) = attack.grid.push_messages([tell(attack.fleet, attack.attacker, b"other question")])
    instruction = attack.b.poll(attack.attacker.node_id)
    assert instruction is not None
    message = attack.b.fetch(attack.attacker.node_id, instruction)
    reply = Message(raw(b"x"), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    tree = get_object_tree(reply)
    tree.children.add().CopyFrom(attack.instruction.tree)
    request = PushMessagesRequest(
        node=Node(node_id=attack.attacker.node_id),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
    )
    announced = attack.b._client.PushMessages(request)
    assert attack.message_id in announced.objects_to_push
    attack.grid.withdraw([own])
    attack.honest_reply_arrives()


@pytest.mark.parametrize("change", ["no message", "two messages", "no tree", "no reply", "other root"])
def test_a_reply_out_of_form_is_refused(attack: Attack, change: str) -> None:
    reply = attack.reply(b"x")
    proto, tree = message_to_proto(remove_content_from_message(reply)), get_object_tree(reply)
    messages, trees = [proto], [tree]
    if change == "no message":
        messages = []
    elif change == "two messages":
        messages, trees = [proto, proto], [tree, tree]
    elif change == "no tree":
        trees = []
    elif change == "no reply":
        proto.metadata.reply_to_message_id = ""
    else:
        tree.object_id = "0" * 64
    request = PushMessagesRequest(
        node=Node(node_id=attack.honest.node_id), messages_list=messages, message_object_trees=trees
    )
    with pytest.raises(httpx.HTTPStatusError) as caught:
        attack.a._client.PushMessages(request)
    assert caught.value.response.status_code == 400
    attack.honest_reply_arrives()


def test_a_node_that_hangs_up_while_it_waits_loses_no_message(fleet: Fleet, grid: FleetGrid) -> None:
    site = fleet.add_site()
    client = site.client(fleet.address, timeout=0.3)
    client.activate()
    with pytest.raises(httpx.ReadTimeout):
        client.poll(site.node_id)
    time.sleep(0.2)
    (message_id,) = grid.push_messages([tell(fleet, site)])
    time.sleep(0.2)
    instruction = site.client(fleet.address).poll(site.node_id)
    assert instruction is not None
    assert instruction.tree.object_id == message_id


def test_a_reply_has_a_limit(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", longest_reply=1_000_000) as fleet:
        grid = fleet.server.grid(fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {}))
        site = fleet.add_site()
        site.run_here(fleet.address, lambda message, bundle, run: Message(raw(bytes(2_000_000)), reply_to=message))
        until(lambda: fleet.online() == 1)
        (reply,) = grid.send_and_receive([tell(fleet, site)], timeout=20)
        assert reply.error.code == 2
        assert site.states == ["connected"]


def test_a_reply_may_be_long_only_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member must not fill the coordinator's memory in answer to a small question."""
    monkeypatch.setattr("quorsum.flower._REPLY_ANYWAY", 1_000_000)
    with running(tmp_path / "fleet") as fleet:
        grid = fleet.server.grid(fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {}))
        site = fleet.add_site()
        site.run_here(fleet.address, lambda message, bundle, run: Message(raw(bytes(2_000_000)), reply_to=message))
        until(lambda: fleet.online() == 1)
        (refused,) = grid.send_and_receive([tell(fleet, site)], timeout=20)
        (taken,) = grid.send_and_receive([tell(fleet, site, bytes(200_000))], timeout=20)
    assert refused.has_error()
    assert taken.has_content()


# --- starting and stopping ---


def test_a_port_in_use_is_named(fleet: Fleet) -> None:
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{fleet.port}: .*; choose another fleet port"):
        fleet.make_server().start()


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    made = Fleet(tmp_path)
    _, other = made.authority.issue("other", server=True)
    for certificate, key in ((made.certificate, other), (tmp_path / "nowhere", made.key), (made.key, made.key)):
        server = FleetServer("127.0.0.1", free_port(), certificate, key, made.authority.certificate)
        with pytest.raises(KeyMaterialError, match="cannot use"):
            server.start()
        server.stop()


def test_it_says_where_it_listens(tmp_path: Path) -> None:
    made = Fleet(tmp_path)
    server = FleetServer("127.0.0.1", 0, made.certificate, made.key, made.authority.certificate)
    with pytest.raises(UsageError, match="does not listen"):
        _ = server.address
    with server:
        assert server.address.startswith("127.0.0.1:")
        assert not server.address.endswith(":0")


def test_a_new_certificate_is_used_for_new_connections(fleet: Fleet) -> None:
    site = fleet.add_site()

    def serial() -> str:
        context = site.credentials.context()
        with (
            socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
        ):
            certificate = s.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])

    before = serial()
    fleet.authority.issue("coordinator", server=True)
    assert serial() == before
    fleet.server.reload_certificate()
    assert serial() != before
    fleet.certificate.write_text("nothing")
    with pytest.raises(KeyMaterialError, match="cannot use"):
        fleet.server.reload_certificate()
    assert serial() != before


def test_what_is_no_bundle_begins_no_run(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no bundle"):
        fleet.server.open_run(b"nothing", {})
    with pytest.raises(Refusal, match="no setting 'speed'"):
        fleet.server.open_run(bundles.build(app_folder(tmp_path / "app")), {"speed": 1})


def test_an_older_way_to_make_messages(fleet: Fleet, grid: FleetGrid) -> None:
    message = grid.create_message(RecordDict(), "train", 7, "group", 5.0)
    assert (message.metadata.dst_node_id, message.metadata.ttl) == (7, 5.0)
    run = grid.run
    grid.set_run(run)
    assert grid.run is run
