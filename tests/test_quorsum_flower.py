"""What quorsum relies on in Flower. After a new pin of Flower, a green run here means that the fleet still stands."""

from __future__ import annotations

import json
import ssl
import sys
import time
from pathlib import Path
from types import ModuleType

import flwr
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from fleet_harness import app_folder, data_of, raw
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import Status
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.serverapp import ServerApp
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum import bundles, flower
from quorsum.crypto import certificates
from quorsum.errors import KeyMaterialError, Refusal, UsageError

LIMIT = 1 << 30


def new_key() -> bytes:
    return certificates.public_key(certificates.make_key())


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Coordinator:
    """A state with one run and two connected nodes."""

    def __init__(self, lease: float = 20.0, longest: int = LIMIT) -> None:
        self.clock = Clock()
        self.state = flower.FleetState(lease, longest, self.clock)
        self.keys = [new_key(), new_key()]
        self.nodes = [self.state.add_node(key, f"site-{k}") for k, key in enumerate(self.keys)]
        for node in self.nodes:
            assert self.state.activate_node(node, 10)
        self.run = self.state.open_run("tests/tiny", "1.0.0", b"bundle", {})
        flower.become_coordinator(self.run)

    def instruct(self, content: RecordDict, node: int = 0, **options: object) -> str:
        message = Message(content, self.nodes[node], "train", **options)  # type: ignore[call-overload]
        message_id = self.state.instruct(message, self.run.run_id)
        assert message_id is not None
        return str(message_id)

    def take(self, node: int = 0) -> Message:
        (header,) = self.state.get_message_ins(self.nodes[node], limit=1)
        return header

    def announce(self, reply: Message) -> tuple[bool, list[str], str]:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        session = self.state.start_session(self.run.run_id)
        welcome, missing = self.state.store_message_and_object_tree(
            remove_content_from_message(reply), get_object_tree(reply), session
        )
        return welcome, missing, session

    def upload(self, reply: Message, session: str, ids: list[str]) -> list[bool]:
        objects = get_all_nested_objects(reply)
        return [self.state.store_object(self.run.run_id, session, k, objects[k].deflate()) for k in ids]

    def result(self, message_id: str) -> Message | None:
        return self.state.take_reply(message_id, self.run.run_id)


def objects_of(message: Message) -> tuple[str, dict[str, bytes]]:
    return message.object_id, {k: o.deflate() for k, o in get_all_nested_objects(message).items()}


def some_message(content: RecordDict) -> Message:
    Coordinator()
    return Message(content, 7, "train")


def test_flower_is_the_version_that_was_read() -> None:
    assert flwr.__version__.startswith("1.41.")
    assert {path.removeprefix(flower.FLEET) for path in flower.FLEET_PATHS} == {
        "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
    }  # fmt: skip


# --- nodes ---


def test_a_key_is_registered_once_and_may_come_back() -> None:
    c = Coordinator()
    with pytest.raises(UsageError, match="registered already"):
        c.state.add_node(c.keys[0], "again")
    c.state.remove_node(c.nodes[0])
    c.state.remove_node(c.nodes[0])
    c.state.remove_node(12345)
    assert not c.state.registered(c.nodes[0])
    assert c.state.activation(c.nodes[0]) is None
    assert c.state.why_not_activate(c.keys[0]) == flower.UNKNOWN_NODE
    assert c.state.add_node(c.keys[0], "again") != c.nodes[0]


@pytest.mark.parametrize(
    "key", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff" * 40, certificates.make_key()]
)
def test_what_is_no_node_key_is_refused(key: bytes) -> None:
    with pytest.raises(UsageError, match="node key"):
        flower.node_key(key)


def test_a_key_of_another_kind_is_refused() -> None:
    pem = ed25519.Ed25519PrivateKey.generate()
    public = pem.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(UsageError, match="node key"):
        flower.node_key(public)
    private = pem.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(KeyMaterialError, match="node key"):
        flower.FleetClient("127.0.0.1:1", ssl.create_default_context(), private)
    with pytest.raises(KeyMaterialError, match="node key"):
        flower.FleetClient("127.0.0.1:1", ssl.create_default_context(), b"nothing")


def test_the_coordinator_grants_the_lease() -> None:
    c = Coordinator(lease=0.3)
    first = c.state.activation(c.nodes[0])
    assert first is not None
    assert c.state.why_not_activate(c.keys[0]) == flower.LEASE_RUNS
    assert not c.state.activate_node(c.nodes[0], 1800)
    time.sleep(0.4)
    assert c.state.activation(c.nodes[0]) is None
    assert c.state.why_not_activate(c.keys[0]) is None
    # The same process comes back with a sign of life; a new one activates.
    assert c.state.acknowledge_node_heartbeat(c.nodes[0], 1800)
    assert c.state.activation(c.nodes[0]) == first
    time.sleep(0.4)
    assert c.state.activate_node(c.nodes[0], 1800)
    assert c.state.activation(c.nodes[0]) not in (None, first)
    assert not c.state.acknowledge_node_heartbeat(999, 30)


def test_time_in_which_the_coordinator_stood_still_does_not_count() -> None:
    c = Coordinator(lease=0.3)
    c.clock.time += 60
    time.sleep(0.4)
    assert c.state.activation(c.nodes[0]) is not None
    message_id = c.instruct(raw(b"x"))
    assert c.result(message_id) is None


# --- runs ---


def test_a_run_needs_no_heartbeat_and_leaves_nothing_behind() -> None:
    c = Coordinator()
    (run,) = c.state.get_run_info(run_ids=[c.run.run_id])
    assert run.status.status == Status.RUNNING
    assert c.state.task_token_store == {}
    assert c.state.task_token_to_task_id == {}
    c.instruct(raw(b"x" * 100))
    other = c.state.open_run("tests/tiny", "1.0.0", b"bundle", {})
    c.state.close_run(c.run.run_id)
    c.state.close_run(c.run.run_id)
    c.state.close_run(4711)
    assert c.state.num_message_ins() == 0
    assert len(c.state.object_store) == 0
    assert c.state.get_fab(run.fab_hash) is not None
    c.state.close_run(other.run_id)
    assert c.state.get_fab(run.fab_hash) is None
    assert c.state.instruct(Message(raw(b"x"), c.nodes[0], "train"), c.run.run_id) is None
    assert len(c.state.object_store) == 0


# --- instructions ---


def test_what_many_nodes_are_sent_is_kept_once() -> None:
    c = Coordinator()
    model = ArrayRecord({"w": Array(np.zeros(1_000_000, np.float32))})
    first = c.instruct(RecordDict({"arrays": model, "config": ConfigRecord({"site": 1})}), 0)
    before = sum(len(entry.content) for entry in c.state.object_store.store.values())
    c.instruct(RecordDict({"arrays": model, "config": ConfigRecord({"site": 2})}), 1)
    after = sum(len(entry.content) for entry in c.state.object_store.store.values())
    assert before > 4_000_000
    assert after - before < 5000
    c.state.object_store.delete(first)
    assert sum(len(entry.content) for entry in c.state.object_store.store.values()) > 4_000_000
    assert c.state.addressee(first) == c.nodes[0]
    assert c.state.waiting(c.nodes[1])
    c.take(1)
    assert not c.state.waiting(c.nodes[1])


def test_a_message_to_nobody_is_not_kept() -> None:
    c = Coordinator()
    assert c.state.instruct(Message(raw(b"x"), 4711, "train"), c.run.run_id) is None
    assert len(c.state.object_store) == 0
    assert c.state.addressee("0" * 64) is None


def test_messages_whose_time_is_up_are_forgotten() -> None:
    c = Coordinator()
    old = c.instruct(raw(b"x" * 100), ttl=0.2)
    time.sleep(0.3)
    c.instruct(raw(b"y"), 1)
    assert c.state.num_message_ins() == 1
    reply = c.result(old)
    assert reply is not None
    assert reply.error.code == 3


def test_a_node_that_is_gone_gives_flowers_error() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"x"))
    c.state.deactivate_node(c.nodes[0])
    time.sleep(0.01)
    reply = c.result(message_id)
    assert reply is not None
    assert reply.error.code == 5
    assert len(c.state.object_store) == 0


# --- replies ---


def test_a_reply_is_seen_when_it_is_complete() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"))
    header = c.take()
    reply = Message(raw(b"answer" * 1000), reply_to=header)
    welcome, missing, session = c.announce(reply)
    assert welcome
    assert len(missing) == 5
    assert c.state.uploader(session) == c.nodes[0]
    assert c.upload(reply, session, missing[:-1]) == [True] * 4
    assert c.result(message_id) is None
    assert c.upload(reply, session, missing[-1:]) == [True]
    got = c.result(message_id)
    assert got is not None
    assert data_of(got) == b"answer" * 1000
    assert got.metadata.reply_to_message_id == message_id
    assert c.state.uploader(session) is None
    gone = c.result(message_id)
    assert gone is not None
    assert gone.error.code == 3
    assert len(c.state.object_store) == c.state.num_message_ins() == len(c.state.object_store) == 0


def test_an_error_is_a_reply() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"))
    reply = Message(Error(2, "no"), reply_to=c.take())
    _, missing, session = c.announce(reply)
    c.upload(reply, session, missing)
    got = c.result(message_id)
    assert got is not None
    assert got.error.code == 2


def test_a_reply_in_anothers_name_is_not_welcome() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"), 0)
    header = c.take(0)
    forged = Message(raw(b"forged"), reply_to=header)
    forged.metadata.__dict__["_src_node_id"] = c.nodes[1]
    assert c.announce(forged)[0] is False
    assert c.result(message_id) is None


def test_what_the_objects_say_of_the_sender_does_not_count() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"), 0)
    reply = Message(raw(b"answer"), reply_to=c.take(0))
    lying = Message(raw(b"answer"), reply_to=reply)
    lying.metadata.__dict__.update(_src_node_id=c.nodes[1], _reply_to_message_id="other", _group_id="lie")
    root = lying.object_id
    reply.metadata.__dict__["_message_id"] = root
    session = c.state.start_session(c.run.run_id)
    welcome, missing = c.state.store_message_and_object_tree(
        remove_content_from_message(reply), get_object_tree(lying), session
    )
    assert welcome
    assert all(c.upload(lying, session, missing))
    got = c.result(message_id)
    assert got is not None
    assert got.metadata.src_node_id == c.nodes[0]
    assert got.metadata.reply_to_message_id == message_id
    assert got.metadata.group_id == ""


def test_the_first_complete_reply_stays_and_an_incomplete_one_can_be_begun_anew() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"))
    header = c.take()
    first, second = (Message(raw(data), reply_to=header) for data in (b"first", b"second"))
    _, missing, session = c.announce(first)
    c.upload(first, session, missing[:1])
    welcome, missing, newer = c.announce(second)
    assert welcome
    assert c.state.uploader(session) is None
    assert c.upload(first, session, [first.object_id]) == [False]
    c.upload(second, newer, missing)
    assert c.announce(first)[0] is False
    got = c.result(message_id)
    assert got is not None
    assert data_of(got) == b"second"


def test_an_upload_goes_on_where_it_stopped() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"))
    reply = Message(raw(b"answer"), reply_to=c.take())
    _, missing, session = c.announce(reply)
    c.upload(reply, session, missing[:3])
    _, rest, session = c.announce(reply)
    assert rest == missing[3:]
    assert all(c.upload(reply, session, rest))
    assert c.result(message_id) is not None


def test_only_announced_objects_are_taken_and_only_so_much() -> None:
    c = Coordinator(longest=2000)
    message_id = c.instruct(raw(b"question"))
    reply = Message(raw(b"a" * 5000), reply_to=c.take())
    _, missing, session = c.announce(reply)
    objects = {k: o.deflate() for k, o in get_all_nested_objects(reply).items()}
    put = c.state.store_object
    big = next(k for k, content in objects.items() if len(content) > 5000)
    small = next(k for k in objects if k != big)
    assert put(c.run.run_id, session, big, objects[big]) is False
    assert put(c.run.run_id, session, small, objects[small] + b"x") is False
    assert put(c.run.run_id, "", small, objects[small]) is False
    assert put(c.run.run_id + 1, session, small, objects[small]) is False
    strange = b"ArrayChunk  1\x00x"
    assert put(c.run.run_id, session, get_object_id(strange), strange) is False
    assert put(c.run.run_id, session, small, objects[small]) is True
    assert c.result(message_id) is None
    assert set(missing) == set(objects)


@pytest.mark.parametrize("change", ["unknown", "expired", "closed", "type", "not-a-digest"])
def test_replies_that_nobody_waits_for_are_not_welcome(change: str) -> None:
    c = Coordinator()
    c.instruct(raw(b"question"), ttl=0.3 if change == "expired" else 60)
    reply = Message(raw(b"answer"), reply_to=c.take())
    tree = get_object_tree(reply)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    if change == "unknown":
        reply.metadata.__dict__["_reply_to_message_id"] = "0" * 64
    elif change == "expired":
        time.sleep(0.4)
    elif change == "closed":
        c.state.close_run(c.run.run_id)
    elif change == "type":
        reply.metadata.message_type = "evaluate"
    else:
        tree.children[0].object_id = "x"
    assert c.state.store_message_and_object_tree(reply, tree, "s") == (False, [])


# --- putting messages together ---

names = st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=5)
arrays = st.binary(max_size=40).map(lambda b: Array("uint8", (len(b),), "raw", b))
records = st.one_of(
    st.dictionaries(names, arrays, max_size=3).map(ArrayRecord),
    st.dictionaries(names, st.integers(0, 2**40) | st.floats(allow_nan=False), max_size=3).map(MetricRecord),
    st.dictionaries(names, st.text(max_size=5) | st.binary(min_size=1, max_size=9), max_size=3).map(ConfigRecord),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, records, max_size=4))
def test_messages_come_together_as_they_were(content: dict[str, ArrayRecord | MetricRecord | ConfigRecord]) -> None:
    message = some_message(RecordDict(content))
    root, contents = objects_of(message)
    made = flower.inflate(root, contents, LIMIT)
    assert contents == {}
    assert made.content == message.content
    assert made.content.object_id == message.content.object_id


def test_an_array_of_many_equal_chunks_comes_together() -> None:
    message = some_message(raw(bytes(17_000_000)))
    root, contents = objects_of(message)
    assert len(contents) == 6
    assert data_of(flower.inflate(root, contents, LIMIT)) == bytes(17_000_000)


def content_of(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def test_a_small_upload_cannot_become_a_large_array() -> None:
    message = some_message(raw(b"x" * 100_000))
    root, contents = objects_of(message)
    chunk = next(k for k, v in contents.items() if v.startswith(b"ArrayChunk"))
    bomb = {"dtype": "uint8", "shape": [1], "stype": "raw", "arraychunk_ids": [0] * 100_000}
    array = content_of("Array", [chunk], json.dumps(bomb).encode())
    contents = rebuilt(message, {"Array": array})
    with pytest.raises(Refusal, match="would have 1000") as caught:
        flower.inflate(next(reversed(contents)), contents, LIMIT)
    assert caught.value.code == "too-long"
    assert root not in contents


def test_one_array_under_many_names_counts_many_times() -> None:
    array = Array("uint8", (100_000,), "raw", bytes(100_000))
    message = some_message(RecordDict({"a": ArrayRecord({str(k): array for k in range(100)})}))
    root, contents = objects_of(message)
    assert sum(map(len, contents.values())) < 200_000
    with pytest.raises(Refusal, match="limit"):
        flower.inflate(root, contents, 5_000_000)


def rebuilt(message: Message, changes: dict[str, bytes]) -> dict[str, bytes]:
    """The objects of a message, with the one of a kind replaced and all above it pointing there."""
    objects = get_all_nested_objects(message)
    renamed: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    for object_id, item in objects.items():
        content = item.deflate()
        kind = content.split(b" ", 1)[0].decode()
        content = changes.get(kind, content)
        for old, new in renamed.items():
            content = content.replace(old.encode(), new.encode())
        renamed[object_id] = get_object_id(content)
        contents[renamed[object_id]] = content
    return contents


@pytest.mark.parametrize(
    "changes",
    [
        {"Array": content_of("Array", [], b'{"arraychunk_ids": [0]}')},
        {"Array": content_of("Array", [], b'{"arraychunk_ids": []}')},
        {"Array": content_of("Array", [], b"{}")},
        {"Array": content_of("Array", [], b"\xff")},
        {"Array": content_of("Array", [], b'{"dtype": "a", "shape": [-1], "stype": "b", "arraychunk_ids": []}')},
        {"Array": content_of("Array", ["0" * 64], b'{"arraychunk_ids": [-1]}')},
        {"Array": content_of("Array", ["0" * 64], b'{"arraychunk_ids": [true]}')},
        {"Array": content_of("ConfigRecord", [], b"")},
        {"ArrayRecord": content_of("Message", [], b"")},
        {"ArrayRecord": content_of("Nothing", [], b"")},
        {"ArrayRecord": content_of("ConfigRecord", [], b"\xff\xff")},
        {"RecordDict": content_of("RecordDict", [], b'{"a": "b"}')},
        {"RecordDict": content_of("RecordDict", [], b'{"a": ["b"]}')},
        {"RecordDict": content_of("RecordDict", [], b"[" * 100_000)},
        {"RecordDict": b"RecordDict"},
        {"Message": content_of("Message", [], b"")},
        {"Message": content_of("RecordDict", [], b"{}")},
        {"Message": b"\xff\xfe"},
    ],
)
def test_what_does_not_come_together_is_refused(changes: dict[str, bytes]) -> None:
    contents = rebuilt(some_message(raw(b"data")), changes)
    with pytest.raises(Refusal) as caught:
        flower.inflate(list(contents)[-1], contents, LIMIT)
    assert caught.value.code == "undecodable"
    assert contents == {}


def test_a_missing_object_is_refused() -> None:
    root, contents = objects_of(some_message(raw(b"data")))
    del contents[next(k for k in contents if k != root)]
    with pytest.raises(Refusal, match="put together"):
        flower.inflate(root, contents, LIMIT)


def test_a_reply_that_cannot_be_put_together_is_an_error_reply() -> None:
    c = Coordinator()
    message_id = c.instruct(raw(b"question"))
    reply = Message(raw(b"answer"), reply_to=c.take())
    contents = rebuilt(reply, {"Array": content_of("Array", [], b"{}")})
    session = c.state.start_session(c.run.run_id)
    header = remove_content_from_message(reply)
    tree = get_object_tree(reply)
    del tree.children[:]
    tree.object_id = list(contents)[-1]
    for object_id in list(contents)[:-1]:
        tree.children.add(object_id=object_id)
    header = make_message(metadata=reply.metadata, content=RecordDict())
    header.metadata.__dict__["_message_id"] = tree.object_id
    assert c.state.store_message_and_object_tree(header, tree, session)[0]
    assert all(c.state.store_object(c.run.run_id, session, k, v) for k, v in contents.items())
    got = c.result(message_id)
    assert got is not None
    assert got.error.code == 4
    assert got.metadata.reply_to_message_id == message_id


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(Refusal):
        flower.inflate("root", {"root": garbage}, LIMIT)


def test_who_polls_is_read_from_the_request() -> None:
    assert flower.polling_node(PullMessagesRequest(node=Node(node_id=2**63 + 5)).SerializeToString()) == 2**63 + 5
    assert flower.polling_node(b"\xff\xff\xff") is None


# --- apps ---


def test_two_apps_with_modules_of_one_name_do_not_meet(tmp_path: Path) -> None:
    code = (
        "from flwr.clientapp import ClientApp\nfrom same import part\n"
        "app = ClientApp()\napp.word = part.WORD\ndef late():\n    from same import later\n    return later.WORD\n"
        "app.late = late\n"
    )
    folders = []
    for word in ("one", "two"):
        folder = app_folder(tmp_path / word, package="same", code=code)
        (folder / "same" / "part.py").write_text(f"WORD = {word!r}\n")
        (folder / "same" / "later.py").write_text(f"WORD = 'late {word}'\n")
        folders.append(folder)
    apps = [flower.load_component(folder, "same.client_app:app", ClientApp) for folder in folders]
    assert [app.word for app in apps] == ["one", "two"]  # type: ignore[attr-defined]
    assert str(folders[0]) not in sys.path
    assert str(folders[1]) in sys.path
    again = flower.load_component(folders[0], "same.client_app:app", ClientApp)
    assert again is apps[0]
    assert again.late() == "late one"  # type: ignore[attr-defined]
    assert str(folders[1]) not in sys.path
    assert flower.load_component(folders[1], "same.client_app:app", ClientApp).late() == "late two"  # type: ignore[attr-defined]


def test_modules_that_answer_to_every_name_are_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.classes is such a module, so that the second app of a process that trains would not load."""

    class Obliging(ModuleType):
        def __getattr__(self, name: str) -> object:
            return object()

    monkeypatch.setitem(sys.modules, "obliging", Obliging("obliging"))
    for word in ("one", "two"):
        folder = app_folder(tmp_path / word, package="same")
        assert isinstance(flower.load_component(folder, "same.client_app:app", ClientApp), ClientApp)


def test_what_is_no_app_is_refused(tmp_path: Path) -> None:
    folder = app_folder(tmp_path / "app", package="lonely")
    assert isinstance(flower.load_component(folder, "lonely.server_app:app", ServerApp), ServerApp)
    with pytest.raises(UsageError, match="is not a ClientApp"):
        flower.load_component(folder, "lonely.server_app:app", ClientApp)
    with pytest.raises(UsageError, match="Unable to load attribute"):
        flower.load_component(folder, "lonely.server_app:nothing", ClientApp)
    with pytest.raises(ModuleNotFoundError):
        flower.load_component(folder, "lonely.nowhere:app", ClientApp)


def test_flower_reads_what_it_builds(tmp_path: Path) -> None:
    fab = flower.build_fab(app_folder(tmp_path / "app"))
    assert bundles.describe(fab) == bundles.describe(bundles.build(tmp_path / "app"))
