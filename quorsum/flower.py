"""Every internal of Flower that the fleet relies on, in one place.

Flower is pinned to one version. What this module uses beyond Flower's public names is checked by
``tests/test_quorsum_flower.py``: after a new pin, a green run there means that the fleet still stands.

It gives the coordinator Flower's own Fleet API on a state in memory, with three differences:

* **Replies have an owner.** Flower takes a reply from whoever signs a request and names the node that was asked. Here
  the node that signed the request, the node that the reply names and the node that was asked must be the same one.
* **Replies lie apart.** A site's upload never shares an object with an instruction or with another site's upload, is
  seen only once it is complete, and has a limit, also on what it would grow to when it is put together.
* **The coordinator grants the lease.** How long a node counts as present after its last sign of life is the
  coordinator's choice, and time in which the coordinator itself stood still does not count.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import importlib
import json
import logging
import secrets
import ssl
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, ParamSpec, TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import flatten_dict, get_fab_config, get_metadata_from_config
from flwr.common.constant import (
    HEARTBEAT_MIN_INTERVAL,
    HEARTBEAT_PATIENCE,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    Status,
    SubStatus,
)
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.server.utils import validate_message
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    is_valid_sha256_hash,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_ref import load_app
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    public_key_to_bytes,
    sign_message,
    uses_nist_ec_curve,
    verify_signature,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES, ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from quorsum import logs
from quorsum.errors import KeyMaterialError, Refusal, UsageError

__all__ = [
    "ACTIVATE",
    "FLEET_PATHS",
    "LEASE_RUNS",
    "PULL_MESSAGES",
    "UNKNOWN_NODE",
    "FleetClient",
    "FleetState",
    "Instruction",
    "MessageGone",
    "ReplyRefused",
    "Run",
    "become_coordinator",
    "build_fab",
    "caller",
    "fab_config",
    "fab_identity",
    "fleet_application",
    "inflate",
    "load_component",
    "lost_reply",
    "node_key",
    "polling_node",
    "quiet",
    "run_config",
]

log = logging.getLogger("flwr.quorsum.fleet")

FLEET: Final = "/v1/fleet/"
ACTIVATE: Final = FLEET + "activate-node"
PULL_MESSAGES: Final = FLEET + "pull-messages"
FLEET_PATHS: Final = frozenset(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith(FLEET))
"""Every path of the Fleet API; all are POST."""

UNKNOWN_NODE: Final = "unknown-node"
LEASE_RUNS: Final = "lease-runs"
"""Why an activation is refused; Flower has one code for both."""

# The interval a site names must lie in Flower's range; what counts is the coordinator's lease.
_NAMED_INTERVAL: Final = float(HEARTBEAT_MIN_INTERVAL)
# The state is looked at far more often than this, so a longer gap means that this process did not run.
_STOOD_STILL: Final = 2.0
# Objects that a site pulls or pushes at the same time: on a long way each takes a while, whatever its length. Every
# object that is pushed is several times in the coordinator's memory while it arrives.
_PULLS_AT_ONCE, _PUSHES_AT_ONCE = 4, 2
# Bytes of one answer of the coordinator; it cuts arrays into objects of 5 MiB.
_LONGEST_ANSWER: Final = 64 << 20
# What one node may provoke of each line: this often in so many seconds.
_LINES, _LINES_S = 1, 60.0
# Objects of a reply at most: a model of thousands of arrays has fewer.
_MOST_OBJECTS: Final = 100_000


def quiet() -> None:
    """Keep Flower, which logs every request, at warnings; what quorsum itself says stays."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("flwr.quorsum").setLevel(logging.INFO)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


# --- the coordinator's state ----------------------------------------------------------------------------------------


# A malicious member must not fill the coordinator's memory with a reply that no model asks for. The suite that needs
# most, ckks, sends 17 bytes for each byte of a float32 model.
_REPLY_ANYWAY: Final = 64 * 1024 * 1024
_REPLY_PER_BYTE: Final = 20


@dataclass
class _Upload:
    """A reply on its way: its header, what has arrived of it and what has not."""

    header: Message
    root: str
    session: str
    missing: set[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0

    @property
    def node(self) -> int:
        """Who sends it."""
        return self.header.metadata.src_node_id


class FleetState(InMemoryLinkState):
    """Flower's state in memory, for one coordinator process.

    Args:
        lease: seconds for which a node counts as present after its last sign of life.
        longest_reply: bytes of a reply at most, as it travels and as it is put together. Less is taken while no
            instruction has been large: what a site has to say is in proportion to the model it was sent.
        monotonic: a clock.
    """

    def __init__(self, lease: float, longest_reply: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__(NoOpFederationManager(), InMemoryObjectStore())
        self.lease = lease
        self._longest_reply = longest_reply
        self._largest_instruction = 0
        self._monotonic = monotonic
        self._looked = monotonic()
        self._uploads: dict[str, _Upload] = {}
        self._sessions: dict[str, str] = {}
        self._lines = logs.Allowance(_LINES, _LINES_S)

    def blame(self, node_id: int, sentence: str, *arguments: object) -> None:
        """Log what a node did that an honest one does not do; the same of one node once a minute, with how often."""
        logs.provoked(log, self._lines, node_id, "node %d " + sentence, node_id, *arguments)

    # nodes

    def add_node(self, public_key: bytes, name: str) -> int:
        """Register a node's key (PEM) under a name.

        Raises:
            UsageError: it is no key on a NIST curve, or it is registered already.
        """
        key = node_key(public_key)
        try:
            return self.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, self.lease, name=name)
        except ValueError:
            raise UsageError(f"the node key of {name!r} is registered already; every site needs its own") from None

    def remove_node(self, node_id: int) -> None:
        """Send a node away: from now on every request of it is refused. Unknown nodes are ignored."""
        with self.lock:
            node = self.nodes.get(node_id)
            if node is None or node.status == NodeStatus.UNREGISTERED:
                return
            self.delete_node(NOOP_FLWR_AID, node_id)
            # Without this the same key could not be registered again, should the operator want it back.
            self.node_public_key_to_node_id.pop(node.public_key, None)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Begin a lease of this coordinator's length, whatever interval the node names."""
        return super().activate_node(node_id, self.lease / HEARTBEAT_PATIENCE)

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """Renew the lease. A node that comes back this way is the same process, so its activation stays."""
        with self.lock:
            node = self.nodes.get(node_id)
            since = node.last_activated_at if node is not None else ""
            known = super().acknowledge_node_heartbeat(node_id, self.lease / HEARTBEAT_PATIENCE)
            if known and node is not None and since:
                node.last_activated_at = since
            return known

    def activation(self, node_id: int) -> str | None:
        """When the node's process connected; None while it is not connected."""
        with self.lock:
            self._check_and_tag_offline_nodes([node_id])
            node = self.nodes.get(node_id)
            if node is None or node.status != NodeStatus.ONLINE:
                return None
            return node.last_activated_at

    def registered(self, node_id: int) -> bool:
        """Whether the node may connect."""
        with self.lock:
            node = self.nodes.get(node_id)
            return node is not None and node.status != NodeStatus.UNREGISTERED

    def why_not_activate(self, public_key: bytes) -> str | None:
        """Why the holder of a key would be refused now, or None."""
        with self.lock:
            node_id = self.get_node_id_by_public_key(public_key)
            if node_id is None:
                return UNKNOWN_NODE
            return LEASE_RUNS if self.activation(node_id) is not None else None

    def look(self) -> None:
        """Forgive the nodes the time in which this process did not run. Call it at least every second."""
        with self.lock:
            moment = self._monotonic()
            gap, self._looked = moment - self._looked, moment
            if gap > _STOOD_STILL:
                log.warning("this process stood still for %.1f s; the sites' leases are prolonged by as much", gap)
                for node in self.nodes.values():
                    if node.status == NodeStatus.ONLINE:
                        node.online_until += gap

    def _check_and_tag_offline_nodes(self, node_ids: list[int] | None = None) -> None:
        self.look()
        super()._check_and_tag_offline_nodes(node_ids)

    # runs

    def open_run(self, app: str, version: str, bundle: bytes, config: UserConfig) -> Run:
        """A run that is under way: sites may pull its messages and its bundle.

        Args:
            app: ``publisher/name``.
            version: of the app.
            bundle: the bundle that sites run.
            config: values that replace those of the bundle's own run config.
        """
        digest = self.store_fab(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        run_id = self.create_run(
            app, version, digest, config, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.run_ids[run_id].run.primary_task_id
        token = None if task is None else self.claim_task(task)
        if task is None or token is None or not self.activate_task(task):
            raise RuntimeError("Flower did not start the run")
        with self.lock_task_store:
            # A task without a token has no heartbeat to miss: this run ends when it is closed.
            self.task_token_store.pop(task, None)
            self.task_token_to_task_id.pop(token, None)
        (run,) = self.get_run_info(run_ids=[run_id])
        return run

    def close_run(self, run_id: int) -> None:
        """End a run and forget its messages, replies and objects, and its bundle unless another run uses it."""
        runs = self.get_run_info(run_ids=[run_id])
        if not runs or runs[0].status.status == Status.FINISHED:
            return
        task = runs[0].primary_task_id
        if task is not None:
            self.finish_task(task, SubStatus.COMPLETED, "")
        self.cleanup_run(run_id)
        digest = runs[0].fab_hash
        going = self.get_run_info(statuses=[Status.RUNNING])
        if all(run.fab_hash != digest for run in going):
            with self.lock_fab_store:
                self.fab_store.pop(digest, None)

    # instructions

    @property
    def longest_reply(self) -> int:
        """Bytes of a reply at most, now."""
        return min(self._longest_reply, _REPLY_ANYWAY + _REPLY_PER_BYTE * self._largest_instruction)

    def instruct(self, message: Message, run_id: int) -> str | None:
        """Keep an instruction for its node until that node pulls it; content that many share is kept once.

        Args:
            message: as the ServerApp made it.
            run_id: the run it belongs to.

        Returns:
            the id of the message, or None if there is no such node or run.
        """
        self._forget_expired()
        message.metadata.__dict__.update(_run_id=run_id, _src_node_id=SUPERLINK_NODE_ID)
        metadata = copy.copy(message.metadata)
        with no_object_id_recompute():
            root = message.object_id
            objects = get_all_nested_objects(message)
            tree = get_object_tree(message)
            store = self.object_store
            # Flower's store takes its lock once per object; a node that confirms meanwhile would delete shared ones.
            with store.lock_store:  # type: ignore[attr-defined]
                missing = store.preregister(metadata.run_id, tree)
            size = 0
            for object_id in missing:
                content = objects[object_id].deflate()
                size += len(content)
                store.put(object_id, content)
            self._largest_instruction = max(self._largest_instruction, size)
        metadata.__dict__["_message_id"] = root
        header = make_message(metadata=metadata, content=RecordDict())
        # Only now: a node that pulls the message finds all of it.
        if self.store_message_ins(header) is None:
            store.delete(root)
            return None
        message.metadata.__dict__["_message_id"] = root
        return root

    def waiting(self, node_id: int) -> bool:
        """Whether a message waits for the node."""
        with self.lock:
            return any(
                m.metadata.dst_node_id == node_id and m.metadata.delivered_at == ""
                for m in self.message_ins_store.values()
            )

    def addressee(self, message_id: str) -> int | None:
        """Which node an instruction is for, while it is kept."""
        with self.lock:
            message = self.message_ins_store.get(message_id)
            return None if message is None else message.metadata.dst_node_id

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Forget instructions with their objects and with what has arrived of their replies."""
        with self.lock:
            super().delete_messages(message_ins_ids)
            for message_id in message_ins_ids:
                upload = self._uploads.pop(message_id, None)
                if upload is not None:
                    self._sessions.pop(upload.session, None)
                self.object_store.delete(message_id)

    def _forget_expired(self) -> None:
        with self.lock:
            moment = now().timestamp()
            self.delete_messages({k for k, m in self.message_ins_store.items() if _expires(m.metadata) <= moment})

    # replies

    def start_session(self, run_id: int) -> str:
        """A name for one upload that nobody can guess; it means something once a reply has been announced under it."""
        return secrets.token_hex(16)

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Announce a reply; returns whether it is welcome and the objects to send.

        An upload that was begun with the same reply goes on where it stopped; one of another reply is dropped, unless
        it is complete: then the first one stays.
        """
        metadata = message.metadata
        ids = list(dict.fromkeys(tree.object_id for tree in iterate_object_tree(object_tree)))
        if validate_message(message, is_reply_message=True) or not all(is_valid_sha256_hash(k) for k in ids):
            return False, []
        if len(ids) > _MOST_OBJECTS:
            self.blame(metadata.src_node_id, "announced a reply of %d objects", len(ids))
            return False, []
        with self.lock:
            asked = self.message_ins_store.get(metadata.reply_to_message_id)
            if asked is None or not _answers(metadata, asked.metadata) or self._is_finished_run(metadata.run_id):
                return False, []
            old = self._uploads.get(asked.metadata.message_id)
            same = old is not None and old.root == object_tree.object_id
            if old is not None and not same and not old.missing:
                return False, []
            upload = _Upload(message, object_tree.object_id, session_id, set(ids))
            if old is not None:
                self._sessions.pop(old.session, None)
                if same:
                    upload.contents, upload.size = old.contents, old.size
            upload.missing -= upload.contents.keys()
            self._uploads[asked.metadata.message_id] = upload
            self._sessions[session_id] = asked.metadata.message_id
            return True, [object_id for object_id in ids if object_id in upload.missing]

    def uploader(self, session_id: str) -> int | None:
        """Which node an upload is from."""
        with self.lock:
            upload = self._uploads.get(self._sessions.get(session_id, ""))
            return None if upload is None else upload.node

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Take one object of an announced reply; False if it is not expected, is too much, or is something else."""
        matches = hashlib.sha256(object_content).hexdigest() == object_id
        with self.lock:
            upload = self._uploads.get(self._sessions.get(session_id, ""))
            if upload is None or not matches or upload.header.metadata.run_id != run_id:
                return False
            if object_id not in upload.missing or upload.size + len(object_content) > self.longest_reply:
                return False
            upload.contents[object_id] = object_content
            upload.size += len(object_content)
            upload.missing.discard(object_id)
            return True

    def take_reply(self, message_id: str, run_id: int) -> Message | None:
        """The reply to an instruction, put together; it and the instruction are forgotten.

        Where no reply will come any more (the node is gone, the time is up), Flower's error for that.
        A reply that cannot be put together is the error "reply unavailable".

        Returns:
            None while there is nothing yet.
        """
        with self.lock:
            upload = self._uploads.get(message_id)
            if upload is not None and not upload.missing and upload.header.metadata.run_id == run_id:
                self.delete_messages({message_id})
            else:
                upload = None
        if upload is None:
            self.look()
            errors = self.get_message_res({message_id}, run_id)
            if errors:
                self.delete_messages({message_id})
            return errors[0] if errors else None
        metadata = upload.header.metadata
        try:
            reply = inflate(upload.root, upload.contents, self.longest_reply)
        except Refusal as refusal:
            self.blame(metadata.src_node_id, "sent a reply that cannot be used: %s", refusal)
            return lost_reply(metadata)
        # What the objects say of sender and addressee was not checked when the reply was announced; this was.
        if reply.has_error():
            return make_message(metadata=metadata, error=reply.error)
        return make_message(metadata=metadata, content=reply.content)

    def _store_generated_message(self, message: Message) -> None:
        """Errors that this process makes for itself need no objects."""


def _expires(metadata: Metadata) -> float:
    return metadata.created_at + metadata.ttl


def _answers(reply: Metadata, asked: Metadata) -> bool:
    return (
        reply.src_node_id == asked.dst_node_id
        and reply.run_id == asked.run_id
        and _expires(asked) > now().timestamp()
        and reply.message_type == asked.message_type
    )


def lost_reply(metadata: Metadata) -> Message:
    """Flower's error for a reply that came and cannot be used."""
    error = Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason="the reply could not be put together")
    return make_message(metadata=metadata, error=error)


def node_key(public_key: bytes) -> bytes:
    """A node's public key in the one form in which Flower compares it.

    Raises:
        UsageError: it is not the PEM of an EC key on a NIST curve.
    """
    key: ec.EllipticCurvePublicKey | None
    try:
        key = bytes_to_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise UsageError("a node key is the PEM of a public EC key on a NIST curve, such as P-256")
    return public_key_to_bytes(key)


# --- the Fleet API --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factory:
    """What Flower's handlers ask for the state."""

    fleet_state: FleetState

    def state(self) -> FleetState:
        return self.fleet_state


def fleet_application(state: FleetState) -> ASGIApp:
    """Flower's Fleet API and nothing else of it: no Control API, no Runtime API, no documentation, no health page."""
    application = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(_Binding, state=state),
        ],
    )
    application.state.linkstate_factory = _Factory(state)
    application.state.enable_supernode_auth = True
    application.state.fleet_event_log_plugin = None
    application.include_router(fleet_router)
    return application


class _Binding:
    """Inside Flower's authentication: what a node asks for must be its own."""

    def __init__(self, app: ASGIApp, state: FleetState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = (scope.get("state") or {}).get("protobuf_request") if scope["type"] == "http" else None
        refused = self._refusal(request)
        if refused is None:
            await self._app(scope, receive, send)
            return
        status, detail = refused
        await JSONResponse({"detail": detail}, status_code=status)(scope, receive, send)

    def _refusal(self, request: object) -> tuple[int, str] | None:
        if isinstance(request, ActivateNodeRequest):
            reason = self._state.why_not_activate(request.public_key)
            return {UNKNOWN_NODE: (403, UNKNOWN_NODE), LEASE_RUNS: (409, LEASE_RUNS)}.get(reason or "")
        if isinstance(request, PushMessagesRequest):
            if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
                return 400, "one message at a time"
            metadata = request.messages_list[0].metadata
            if metadata.src_node_id != request.node.node_id:
                self._state.blame(request.node.node_id, "tried to answer in the name of node %d", metadata.src_node_id)
                return 403, "a node answers in its own name only"
            if not metadata.reply_to_message_id or metadata.message_id != request.message_object_trees[0].object_id:
                return 400, "not a reply"
        elif isinstance(request, PushObjectRequest):
            if self._state.uploader(request.session_id) not in (None, request.node.node_id):
                return 403, "not an upload of this node"
        elif isinstance(request, ConfirmMessageReceivedRequest):
            addressee = self._state.addressee(request.message_object_id)
            if addressee not in (None, request.node.node_id):
                return 403, "not a message for this node"
            if addressee is None and request.message_object_id in self._state.object_store:
                return 403, "not a message"
        return None


def caller(state: FleetState, headers: Mapping[bytes, bytes]) -> int | None:
    """Which registered node signed a request, by its headers alone; Flower looks once more when it has arrived."""
    key, stated, signature = (
        headers.get(name.lower().encode("ascii"), b"")
        for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    )
    try:
        public = b64decode(key, validate=True)
        node_id = state.get_node_id_by_public_key(public)
        age = (now() - datetime.datetime.fromisoformat(stated.decode("ascii"))).total_seconds()
        if node_id is None or not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        signed = verify_signature(bytes_to_public_key(public), stated, b64decode(signature, validate=True))
    except (ValueError, TypeError):
        return None
    return node_id if signed else None


def polling_node(body: bytes) -> int | None:
    """Which node a request for messages says it is from; not authenticated yet."""
    try:
        return int(PullMessagesRequest.FromString(body).node.node_id)
    except DecodeError:
        return None


# --- messages and their objects -------------------------------------------------------------------------------------

_CHILDREN: Final[dict[str, tuple[str, ...]]] = {
    "Message": ("RecordDict",),
    "RecordDict": ("ArrayRecord", "ConfigRecord", "MetricRecord"),
    "ArrayRecord": ("Array",),
    "Array": ("ArrayChunk",),
    "ArrayChunk": (),
    "ConfigRecord": (),
    "MetricRecord": (),
}
_TYPES: Final[dict[str, type[InflatableObject]]] = {
    "Message": Message,
    "RecordDict": RecordDict,
    "ArrayRecord": ArrayRecord,
    "ConfigRecord": ConfigRecord,
    "MetricRecord": MetricRecord,
}


@dataclass(frozen=True)
class _Head:
    kind: str
    children: tuple[str, ...]
    start: int
    parts: tuple[str, ...]


def inflate(root: str, contents: dict[str, bytes], longest: int) -> Message:
    """Put a message together from its objects, which are used up: at no time is there more than one copy of an array
    beside the objects it is made of.

    Args:
        root: id of the message.
        contents: the objects by id; emptied.
        longest: bytes of the message at most, an array counted as often as it is named.

    Raises:
        Refusal: ``undecodable``, ``too-long``.
    """
    try:
        heads = _heads(root, contents)
        size = _size(root, heads, contents, {})
        if size > longest:
            raise Refusal("too-long", f"the message would have {size} bytes, the limit is {longest}")
        uses: dict[str, int] = {}
        for head in heads.values():
            for child in head.children:
                uses[child] = uses.get(child, 0) + 1
        message = _build(root, heads, contents, uses, {})
    except Refusal:
        raise
    except Exception as error:  # noqa: BLE001 - Flower's decoders raise all kinds of things
        raise Refusal("undecodable", f"the message cannot be put together ({type(error).__name__})") from None
    finally:
        contents.clear()
    assert isinstance(message, Message)  # noqa: S101 - _heads has checked the kind
    return message


def _heads(root: str, contents: Mapping[str, bytes]) -> dict[str, _Head]:
    heads: dict[str, _Head] = {}
    todo: list[tuple[str, tuple[str, ...]]] = [(root, ("Message",))]
    while todo:
        object_id, kinds = todo.pop()
        if object_id not in heads:
            heads[object_id] = _head(contents[object_id])
            todo += [(child, _CHILDREN[heads[object_id].kind]) for child in heads[object_id].children]
        if heads[object_id].kind not in kinds:
            raise ValueError("an object in the wrong place")
    return heads


def _head(content: bytes) -> _Head:
    kind, children, length = get_object_head_values_from_object_content(content)
    start = len(content) - length
    if kind not in _CHILDREN or not 0 < start <= len(content):
        raise ValueError("not an object")
    parts: tuple[str, ...] = ()
    if kind in ("RecordDict", "ArrayRecord"):
        parts = tuple(json.loads(content[start:]).values())
    elif kind == "Array":
        indices = json.loads(content[start:])["arraychunk_ids"]
        if not all(type(k) is int and 0 <= k < len(children) for k in indices):
            raise ValueError("a chunk that is not there")
        parts = tuple(children[k] for k in indices)
    else:
        parts = tuple(children)
    return _Head(kind, tuple(children), start, parts)


def _size(object_id: str, heads: Mapping[str, _Head], contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    if object_id not in known:
        own = len(contents[object_id])
        known[object_id] = own + sum(_size(part, heads, contents, known) for part in heads[object_id].parts)
    return known[object_id]


def _build(
    object_id: str,
    heads: Mapping[str, _Head],
    contents: dict[str, bytes],
    uses: dict[str, int],
    built: dict[str, InflatableObject],
) -> InflatableObject:
    if object_id in built:
        return built[object_id]
    head = heads[object_id]
    if head.kind == "Array":
        made: InflatableObject = _array(object_id, head, heads, contents)
        for child in head.children:
            uses[child] -= 1
            if not uses[child]:
                del contents[child]
    else:
        children = {child: _build(child, heads, contents, uses, built) for child in head.children}
        made = _TYPES[head.kind].inflate(contents[object_id], children)
    built[object_id] = made
    return made


def _array(object_id: str, head: _Head, heads: Mapping[str, _Head], contents: Mapping[str, bytes]) -> Array:
    body = json.loads(contents[object_id][head.start :])
    shape = tuple(body["shape"])
    if set(head.parts) != set(head.children) or not all(type(k) is int and k >= 0 for k in shape):
        raise ValueError("an array that does not fit its chunks")
    data = b"".join(memoryview(contents[chunk])[heads[chunk].start :] for chunk in head.parts)
    return Array(dtype=str(body["dtype"]), shape=shape, stype=str(body["stype"]), data=data)


# --- the site's end -------------------------------------------------------------------------------------------------


class MessageGone(Exception):
    """A message, or a part of it, is not there any more: its time is up, or its run is over."""


class ReplyRefused(Exception):
    """The coordinator did not take a reply to the end; it may be too long."""


@dataclass(frozen=True)
class Instruction:
    """A message for this site that has been announced and not been fetched.

    Attributes:
        header: the message without its content.
        tree: the ids of its objects.
    """

    header: Message
    tree: ObjectTree


@dataclass(frozen=True)
class _Signer:
    """Flower's node authentication, with a clock that can be corrected."""

    key: ec.EllipticCurvePrivateKey
    clock_offset: Callable[[], float]

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        timestamp = (now() + datetime.timedelta(seconds=self.clock_offset())).isoformat()
        signature = sign_message(self.key, timestamp.encode("ascii"))
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = _base64(public_key_to_bytes(self.key.public_key()))
        context.request.headers[TIMESTAMP_HEADER] = timestamp
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = _base64(signature)
        return call_next(context)


def _bounded(response: httpx.Response) -> None:
    """Look at an answer before it is read: it must say how long it is, and not grow."""
    length = response.headers.get("content-length", "")
    if not length.isdigit() or int(length) > _LONGEST_ANSWER or "content-encoding" in response.headers:
        raise httpx.RemoteProtocolError("the coordinator's answer is too long, or does not say how long it is")


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


Result = TypeVar("Result")
Params = ParamSpec("Params")


def _readable(method: Callable[Params, Result]) -> Callable[Params, Result]:
    """What a coordinator answers may be anything: what cannot be read is a broken connection, not the site's end."""

    @functools.wraps(method)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except (httpx.HTTPError, MessageGone, ReplyRefused, Refusal):
            raise
        except Exception as error:
            kind = type(error).__name__
            raise httpx.RemoteProtocolError(f"the coordinator's answer cannot be read ({kind})") from error

    return call


class FleetClient:
    """The Fleet API, spoken by a site. Every method may raise ``httpx.HTTPError``.

    Args:
        address: ``host:port`` of the coordinator.
        context: how to recognise the coordinator and with which certificate.
        key: the node's private key, PEM.
        clock_offset: seconds by which the coordinator's clock is ahead of this machine's.
        longest: bytes of a message at most.
        timeout: seconds without progress after which a request has failed.

    Raises:
        KeyMaterialError: the key is not an EC private key.
    """

    def __init__(
        self,
        address: str,
        context: ssl.SSLContext,
        key: bytes,
        *,
        clock_offset: Callable[[], float] = lambda: 0.0,
        longest: int = 1 << 32,
        timeout: float = 30.0,
    ) -> None:
        try:
            private = bytes_to_private_key(key)
            if not isinstance(private, ec.EllipticCurvePrivateKey):
                raise TypeError
        except (ValueError, TypeError):
            raise KeyMaterialError("no-key", "the node key is not an EC private key in PEM form; restore it") from None
        self._public = public_key_to_bytes(private.public_key())
        self._clock_offset = clock_offset
        self._longest = longest
        self._several = ThreadPoolExecutor(_PULLS_AT_ONCE, thread_name_prefix="objects")
        self._client = FleetHttpClient(
            f"https://{address}", interceptors=[_Signer(private, clock_offset)], verify=context, timeout=timeout
        )
        http = self._client._client
        # Flower has no parameter for it. The coordinator must not send this site on to other machines of its network.
        http.follow_redirects = False
        http.event_hooks = {"response": [_bounded]}

    def close(self) -> None:
        """Close the connections."""
        self._several.shutdown(cancel_futures=True)
        self._client.close()

    @_readable
    def activate(self) -> int:
        """Begin a lease; returns the node id, which is new with every process of the coordinator."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=_NAMED_INTERVAL)
        return int(self._client.ActivateNode(request).node_id)

    @_readable
    def deactivate(self, node_id: int) -> None:
        """End the lease."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    @_readable
    def beat(self, node_id: int) -> bool:
        """Renew the lease; False if the coordinator does not know the node."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=_NAMED_INTERVAL)
        return bool(self._client.SendNodeHeartbeat(request).success)

    @_readable
    def poll(self, node_id: int) -> Instruction | None:
        """The next message for this node, if there is one. The coordinator answers when there is, or after a while."""
        response = self._client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        if not response.messages_list:
            return None
        return Instruction(message_from_proto(response.messages_list[0]), response.message_object_trees[0])

    @_readable
    def fetch(self, node_id: int, instruction: Instruction) -> Message:
        """The whole message; the coordinator may forget its content afterwards.

        Raises:
            MessageGone: it is not there any more.
            Refusal: ``undecodable``, ``too-long``.
        """
        node, metadata, root = Node(node_id=node_id), instruction.header.metadata, instruction.tree.object_id

        def pull(object_id: str) -> bytes:
            response = self._client.PullObject(
                PullObjectRequest(node=node, run_id=metadata.run_id, object_id=object_id)
            )
            if not response.object_available:
                raise MessageGone
            return response.object_content

        ids = list(dict.fromkeys(tree.object_id for tree in iterate_object_tree(instruction.tree)))
        contents: dict[str, bytes] = {}
        size = 0
        for object_id, content in zip(ids, self._several.map(pull, ids), strict=True):
            size += len(content)
            if size > self._longest:
                raise Refusal("too-long", f"the message has more than {self._longest} bytes")
            contents[object_id] = content
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=metadata.run_id, message_object_id=root)
        )
        message = inflate(root, contents, self._longest)
        metadata.__dict__["_message_id"] = root
        return make_message(metadata=metadata, content=message.content)

    @_readable
    def push(self, node_id: int, asked: Message, reply: Message) -> None:
        """Send the reply to a message.

        Raises:
            MessageGone: nobody waits for it any more.
            ReplyRefused: it was not taken to the end.
        """
        moment = now().timestamp() + self._clock_offset()
        ttl = _expires(asked.metadata) - moment
        if ttl <= 0:
            raise MessageGone
        node, run_id = Node(node_id=node_id), asked.metadata.run_id
        message = _addressed(reply, asked.metadata, node_id, moment, ttl)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = get_all_nested_objects(message)
            announced = self._client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[get_object_tree(message)],
                    clientapp_runtime_list=[0.0],
                )
            )
            wanted = set(announced.objects_to_push)
            if not wanted:
                raise MessageGone
            for few in _batches([k for k in objects if k in wanted], _PUSHES_AT_ONCE):
                requests = [
                    PushObjectRequest(
                        node=node,
                        run_id=run_id,
                        object_id=object_id,
                        object_content=objects.pop(object_id).deflate(),
                        session_id=announced.session_id,
                    )
                    for object_id in few
                ]
                if not all(response.stored for response in self._several.map(self._client.PushObject, requests)):
                    raise ReplyRefused

    @_readable
    def run(self, node_id: int, run_id: int) -> Run:
        """What the coordinator says about a run."""
        return run_from_proto(self._client.GetRun(GetRunRequest(node=Node(node_id=node_id), run_id=run_id)).run)

    @_readable
    def bundle(self, node_id: int, run: Run) -> bytes:
        """The bundle of a run, as the coordinator sends it; nothing about it has been checked."""
        request = GetFabRequest(node=Node(node_id=node_id), hash_str=run.fab_hash, run_id=run.run_id)
        return fab_from_proto(self._client.GetFab(request).fab).content


def _batches(items: list[str], length: int) -> list[list[str]]:
    return [items[k : k + length] for k in range(0, len(items), length)]


def _addressed(reply: Message, asked: Metadata, node_id: int, created_at: float, ttl: float) -> Message:
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=created_at,
        ttl=ttl,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )
    if reply.has_error():
        return make_message(metadata=metadata, error=reply.error)
    return make_message(metadata=metadata, content=reply.content)


def become_coordinator(run: Run) -> None:
    """Messages made in this process from now on are the coordinator's, in this run."""
    TaskIdentity.task_id, TaskIdentity.run_id = run.primary_task_id or 1, run.run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


# --- apps and bundles -----------------------------------------------------------------------------------------------


def build_fab(app: Path) -> bytes:
    """A bundle as ``flwr build`` makes it.

    Raises:
        ValueError: with Flower's reason.
    """
    return build_fab_from_disk(app)


def fab_config(bundle: bytes) -> dict[str, Any]:
    """The pyproject.toml of a bundle, checked by Flower.

    Raises:
        Exception: of many kinds, when it is no bundle.
    """
    return get_fab_config(bundle)


def fab_identity(config: dict[str, Any]) -> tuple[str, str]:
    """``publisher/name`` and version."""
    return get_metadata_from_config(config)


def run_config(config: dict[str, Any]) -> UserConfig:
    """The run config in a bundle's pyproject.toml, nested tables joined by dots.

    Raises:
        ValueError: a value that Flower does not allow.
    """
    return flatten_dict(config["tool"]["flwr"]["app"].get("config", {}))


_loading = threading.RLock()
_stashed: dict[str, dict[str, Any]] = {}
_current: list[str] = []

Component = TypeVar("Component")


def load_component(folder: Path, reference: str, kind: type[Component]) -> Component:
    """Load an app from its folder with Flower's loader, and make that folder the one that modules are imported from.

    At most one app's folder is on ``sys.path``. The modules of the app that was there before are set aside with it and
    come back when it does, so that two apps may have modules of the same name.

    Args:
        folder: where the bundle has been unpacked.
        reference: ``module:attribute``.
        kind: what it must be.

    Raises:
        UsageError: it is something else, or the reference names nothing.
        Exception: what the app raises while it is imported.
    """
    with _loading:
        place = str(folder.absolute())
        if _current != [place]:
            _set_aside()
            sys.path.insert(0, place)
            _current[:] = [place]
            importlib.invalidate_caches()
            sys.modules.update(_stashed.pop(place, {}))
        loaded = load_app(reference, UsageError, place)
    if not isinstance(loaded, kind):
        raise UsageError(f"{reference} is not a {kind.__name__}")
    return loaded


def _set_aside() -> None:
    for place in _current:
        mine = {name: module for name, module in sys.modules.items() if _is_from(module, place)}
        for name in mine:
            del sys.modules[name]
        _stashed[place] = mine
        if place in sys.path:
            sys.path.remove(place)
    _current.clear()


def _is_from(module: object, place: str) -> bool:
    # What is in the module itself: some answer to every name, torch.classes for one.
    named = vars(module) if isinstance(module, ModuleType) else {}
    origins = [named.get("__file__"), *(named.get("__path__") or ())]
    return any(isinstance(origin, str) and Path(place) in Path(origin).parents for origin in origins)
