"""The fleet: the one port on which sites speak Flower with the coordinator, and the grid of a run on top of it.

Flower's Fleet API is embedded in this process, on a state in memory; the ServerApp works on that state directly. The
port shows nothing else of Flower, and shows it to members only:

1. A peer without a certificate of the federation's authority gets no further than the TLS handshake.
2. Only ``POST`` to a path of the Fleet API, written exactly so, reaches Flower; all else is "404 not found".
3. A request has a limit, checked while it arrives; a long one is read only if a registered node has signed its head,
   and a node has a limit for all its requests at once. A site has a limited number of connections.
4. Nodes are registered here (:meth:`FleetServer.register`), never over the network, and every request is signed with a
   registered node key; a node asks and answers for itself only.

A node that asks for messages when there are none waits a moment for its answer, so that a message reaches its site at
once without the site asking all the time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import uvicorn
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from uvicorn.protocols.http.h11_impl import H11Protocol

from quorsum import bundles, flower, logs
from quorsum.errors import KeyMaterialError, UsageError

__all__ = ["FleetGrid", "FleetServer", "NodeView", "RunHandle"]

log = logging.getLogger("flwr.quorsum.fleet")

LEASE: Final = 20.0
"""Seconds for which a node counts as present after its last sign of life."""

LONGEST_REQUEST: Final = 64 * 1024 * 1024
"""Bytes of a request at most; Flower cuts arrays into objects of 5 MiB."""

LONGEST_REPLY: Final = 4 * 1024 * 1024 * 1024
"""Bytes of a site's reply at most."""

HOLD: Final = 2.0
"""Seconds for which a node that asks for messages may wait for one."""

# How often a waiting node's letterbox is looked into, and how often the state looks at its leases.
_GLANCE: Final = 0.02
_LOOK: Final = 0.5
# A request that makes no progress for so long is given up, in seconds.
_SILENCE: Final = 60.0
# What a peer has to show its certificate, in seconds.
_HANDSHAKE: Final = 10.0
# Connections of one site at most; a site has up to eight, and those of before a broken line.
_CONNECTIONS: Final = 64
# Bytes that are read before it is known that a member sends them.
_UNSIGNED: Final = 128 * 1024
# Requests of full length that one node may have on their way.
_AT_ONCE: Final = 2
# What others' code may say of requests from each of its lines, so many times a minute: a member can provoke it at will.
_LINES, _LINES_S = 10, 60.0
_PROVOKED: Final = ("flwr", "uvicorn.error", "asyncio")
# What stop() waits for requests in work, in seconds.
_GRACE: Final = 0.6
_START: Final = 10.0


@dataclass(frozen=True)
class NodeView:
    """A registered node.

    Attributes:
        name: the name it was registered under.
        online: whether its lease runs.
        activated: when its process connected last (ISO 8601), empty if never.
    """

    name: str
    online: bool
    activated: str


@dataclass(frozen=True)
class RunHandle:
    """A run that sites may take part in.

    Attributes:
        run_id: Flower's number of it.
        digest: SHA-256 of its bundle, in hexadecimal digits.
        app: ``publisher/name``.
        version: of the app.
        config: the run config, with what was replaced.
    """

    run_id: int
    digest: str
    app: str
    version: str
    config: Mapping[str, bundles.Value]


class FleetServer:
    """The listener and the state behind it.

    Args:
        host: address to listen on.
        port: 0 lets the system choose.
        certificate: the server's certificate chain, PEM.
        key: its private key, PEM.
        authority: the certificate of the authority that issues the sites' certificates, PEM.
        lease: seconds for which a node counts as present after its last sign of life.
        longest_request: bytes of one request at most.
        longest_reply: bytes of one site's reply at most.
        hold: seconds for which a node that asks for messages may wait for one.
    """

    def __init__(
        self,
        host: str,
        port: int,
        certificate: Path,
        key: Path,
        authority: Path,
        *,
        lease: float = LEASE,
        longest_request: int = LONGEST_REQUEST,
        longest_reply: int = LONGEST_REPLY,
        hold: float = HOLD,
    ) -> None:
        self._bind = (host, port)
        self._files = (certificate, key, authority)
        self._state = flower.FleetState(lease, longest_reply)
        self._gate = _Gate(flower.fleet_application(self._state), self._state, longest_request, hold)
        self._sparing = logs.Sparing(logs.Allowance(_LINES, _LINES_S))
        self._server: uvicorn.Server | None = None
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._context: ssl.SSLContext | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Listen, in a thread.

        Raises:
            UsageError: the address cannot be listened on.
            KeyMaterialError: certificate or key cannot be used.
        """
        flower.quiet()
        for name in _PROVOKED:
            logging.getLogger(name).addFilter(self._sparing)
        config = self._configuration()
        self._socket = self._listen()
        self._server = uvicorn.Server(config)
        self._gate.open()
        self._thread = threading.Thread(target=self._serve, args=(self._server,), name="fleet", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise UsageError(f"the fleet's listener did not start on {self._bind[0]}:{self._bind[1]}; see the log")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop listening. Registrations and runs stay, so that it can be started again."""
        self._gate.close()
        server, thread, loop = self._server, self._thread, self._loop
        if server is not None and thread is not None:
            server.should_exit = True
            thread.join(_GRACE)
            if thread.is_alive() and loop is not None:
                # A peer that does not answer the end of its TLS connection would keep it open for half a minute.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_abort, server)
                thread.join(_START)
        if self._socket is not None:
            self._socket.close()
        for name in _PROVOKED:
            logging.getLogger(name).removeFilter(self._sparing)
        self._server = self._thread = self._socket = self._context = self._loop = None

    def __enter__(self) -> FleetServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """``host:port`` it listens on.

        Raises:
            UsageError: it does not listen.
        """
        if self._socket is None:
            raise UsageError("the fleet does not listen; call start() first")
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def reload_certificate(self) -> None:
        """Use the certificate and key that are in the files now; connections that are open keep the old one.

        Raises:
            KeyMaterialError: they cannot be used.
        """
        if self._context is not None:
            certificate, key, _ = self._files
            try:
                self._context.load_cert_chain(certificate, key)
            except (OSError, ssl.SSLError) as error:
                raise _unusable(certificate, key, error) from None

    def register(self, node_key_pem: bytes, name: str) -> int:
        """Let the holder of a node key in.

        Args:
            node_key_pem: its public key, EC on a NIST curve, PEM.
            name: of the site, for the log.

        Returns:
            the node id, a routing label that lasts as long as this object.

        Raises:
            UsageError: it is no such key, or is registered already.
        """
        return self._state.add_node(node_key_pem, name)

    def unregister(self, node_id: int) -> None:
        """Send a node away: every further request of it is refused. Unknown nodes are ignored."""
        self._state.remove_node(node_id)

    def nodes(self) -> Mapping[int, NodeView]:
        """The registered nodes by id."""
        infos = self._state.get_node_info()
        return {
            info.node_id: NodeView(info.name, self._state.activation(info.node_id) is not None, info.last_activated_at)
            for info in infos
            if self._state.registered(info.node_id)
        }

    def open_run(self, bundle: bytes, config: Mapping[str, bundles.Value]) -> RunHandle:
        """Begin a run: sites may now be asked to run this bundle.

        Args:
            bundle: what :func:`quorsum.bundles.build` made.
            config: values that replace those of the bundle's run config.

        Raises:
            Refusal: ``not-a-bundle``, ``unknown-setting``.
        """
        told = bundles.describe(bundle)
        settings = bundles.configured(told, config)
        run = self._state.open_run(told.name, told.version, bundle, dict(config))
        return RunHandle(run.run_id, bundles.digest(bundle), told.name, told.version, settings)

    def close_run(self, handle: RunHandle) -> None:
        """End a run and forget its messages and replies."""
        self._state.close_run(handle.run_id)

    def grid(self, handle: RunHandle) -> FleetGrid:
        """The way of a run's ServerApp to the sites. Messages made in this process belong to that run from now on."""
        return FleetGrid(self._state, handle.run_id)

    def _configuration(self) -> uvicorn.Config:
        certificate, key, authority = self._files
        config = uvicorn.Config(
            self._gate,
            http=_Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(_START),
            ssl_certfile=certificate,
            ssl_keyfile=key,
            ssl_ca_certs=str(authority),
            ssl_cert_reqs=ssl.CERT_REQUIRED,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise _unusable(certificate, key, error) from None
        self._context = config.ssl
        if self._context is None or self._context.verify_mode != ssl.CERT_REQUIRED:
            raise UsageError("the listener would not ask for certificates")
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        return config

    def _listen(self) -> socket.socket:
        host, port = self._bind
        try:
            family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # asyncio sends small answers at once only on sockets that name their protocol.
            listener = socket.socket(family, kind, socket.IPPROTO_TCP)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
                listener.listen(512)
            except OSError:
                listener.close()
                raise
            return listener
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"cannot listen on {host}:{port}: {reason}; choose another fleet port") from None

    def _serve(self, server: uvicorn.Server) -> None:
        async def work() -> None:
            self._loop = loop = asyncio.get_running_loop()
            # The server leaves a peer a whole minute for this.
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE)  # type: ignore[method-assign]
            looking = asyncio.create_task(self._look())
            try:
                await server.serve(sockets=[self._socket] if self._socket is not None else None)
            finally:
                looking.cancel()

        asyncio.run(work())

    async def _look(self) -> None:
        while True:
            self._state.look()
            await asyncio.sleep(_LOOK)


def _abort(server: uvicorn.Server) -> None:
    for connection in list(server.server_state.connections):
        transport = getattr(connection, "transport", None)
        if transport is not None:
            transport.abort()


def _unusable(certificate: Path, key: Path, error: Exception) -> KeyMaterialError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return KeyMaterialError("no-certificate", f"cannot use {certificate} with {key}: {reason}")


class _Connection(H11Protocol):
    """A connection that must be used, of a site that has a limited number of them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.site, self.began = _site(transport), self.loop.time()
        mates = [one for one in self.connections if isinstance(one, _Connection) and one.site == self.site]
        if len(mates) > _CONNECTIONS:
            # The oldest may be the remains of a broken line; and a site that takes too many harms itself only.
            min(mates, key=lambda one: one.began).transport.abort()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)


def _site(transport: asyncio.Transport) -> str:
    certificate = transport.get_extra_info("peercert") or {}
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return str(names[0]) if names else ""


class _Gate:
    """In front of Flower's application: which requests reach it."""

    def __init__(self, application: Any, state: flower.FleetState, longest: int, hold: float) -> None:
        self._application = application
        self._state = state
        self._longest = longest
        self._patience = hold
        self._closing = False
        # Bytes of requests that are on their way or in work, by node.
        self._taken: Counter[int] = Counter()
        self._paths = {path.encode("ascii") for path in flower.FLEET_PATHS}

    def open(self) -> None:
        self._closing = False

    def close(self) -> None:
        """Let go of nodes that wait for messages."""
        self._closing = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope.get("raw_path") or b""
        # Compared as it came: a path that decodes to one of Flower's, or is tidied up to one, is another path.
        exact = path in self._paths and scope["path"].encode() == path and not scope.get("query_string")
        if scope["method"] != "POST" or not exact:
            await _say(send, 404, b'{"detail":"Not Found"}')
            return
        headers = dict(scope["headers"])
        with self._share(headers) as share:
            await self._answer(path.decode(), headers, share, scope, receive, send)

    async def _answer(
        self, path: str, headers: dict[bytes, bytes], share: _Share, scope: Any, receive: Any, send: Any
    ) -> None:
        body = await self._body(headers, share, receive, send)
        if body is None:
            return
        gone = asyncio.ensure_future(receive())
        try:
            if path == flower.PULL_MESSAGES and not await self._hold(body, share, gone):
                return
            replay = _Replay(body, gone)
            # The application drops it when it has parsed it.
            del body
            await self._application(scope, replay, send)
        finally:
            gone.cancel()

    @contextmanager
    def _share(self, headers: dict[bytes, bytes]) -> Iterator[_Share]:
        share = _Share(self._state, headers, self._taken)
        try:
            yield share
        finally:
            share.give_back()

    async def _body(self, headers: dict[bytes, bytes], share: _Share, receive: Any, send: Any) -> bytes | None:
        """The whole request, or None where it has been answered or given up."""
        stated = headers.get(b"content-length", b"")
        if stated and (not stated.isdigit() or len(stated) > 15 or int(stated) > self._longest):
            await self._too_long(send)
            return None
        parts: list[bytes] = []
        length = 0
        while True:
            try:
                event = await asyncio.wait_for(receive(), _SILENCE)
            except TimeoutError:
                await _say(send, 408, b'{"detail":"Request Timeout"}', close=True)
                return None
            if event["type"] != "http.request":
                return None
            part = event.get("body", b"")
            length += len(part)
            if length > self._longest:
                await self._too_long(send)
                return None
            if length > _UNSIGNED and share.node is None:
                await _say(send, 401, b'{"detail":"Invalid SuperNode authentication"}', close=True)
                return None
            if length > _UNSIGNED and not share.take(len(part), _AT_ONCE * self._longest):
                await _say(send, 429, b'{"detail":"too many requests at once"}', close=True)
                return None
            parts.append(part)
            if not event.get("more_body", False):
                return b"".join(parts)

    async def _too_long(self, send: Any) -> None:
        detail = f'{{"detail":"a request has at most {self._longest} bytes"}}'.encode()
        await _say(send, 413, detail, close=True)

    async def _hold(self, body: bytes, share: _Share, gone: asyncio.Future[Any]) -> bool:
        """Wait for a message for the node; False if the node has hung up, which must not cost it a message."""
        # When another node is told of a message is nobody's business, nor may strangers make this look for any.
        node_id = share.node if share.node == flower.polling_node(body) else None
        deadline = time.monotonic() + self._patience
        while node_id is not None and not self._state.waiting(node_id):
            if gone.done():
                return False
            if self._closing or time.monotonic() >= deadline:
                break
            await asyncio.sleep(_GLANCE)
        return not gone.done()


class _Share:
    """What one request takes of the memory that its node has for requests."""

    def __init__(self, state: flower.FleetState, headers: dict[bytes, bytes], taken: Counter[int]) -> None:
        self._state = state
        self._headers = headers
        self._taken = taken
        self._mine = 0

    @cached_property
    def node(self) -> int | None:
        """Who signed the request; None for a stranger."""
        return flower.caller(self._state, self._headers)

    def take(self, length: int, most: int) -> bool:
        """Take room for more bytes; False where there is none left."""
        if self.node is None or self._taken[self.node] + length > most:
            return False
        self._taken[self.node] += length
        self._mine += length
        return True

    def give_back(self) -> None:
        if self._mine and self.node is not None:
            self._taken[self.node] -= self._mine
            if not self._taken[self.node]:
                del self._taken[self.node]


class _Replay:
    """The request once more, for the application; then whatever ends the connection."""

    def __init__(self, body: bytes, gone: asyncio.Future[Any]) -> None:
        self._body: bytes | None = body
        self._gone = gone

    async def __call__(self) -> Any:
        if self._body is not None:
            event = {"type": "http.request", "body": self._body, "more_body": False}
            self._body = None
            return event
        return await asyncio.shield(self._gone)


async def _say(send: Any, status: int, body: bytes, *, close: bool = False) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode("ascii"))]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class FleetGrid(Grid):
    """Flower's ``Grid`` on the state of this process. Pull one message id at a time to hold one reply at a time."""

    def __init__(self, state: flower.FleetState, run_id: int) -> None:
        self._state = state
        (self._run,) = state.get_run_info(run_ids=[run_id])
        flower.become_coordinator(self._run)

    def set_run(self, run: flower.Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> flower.Run:
        """The run this grid belongs to."""
        return self._run

    def activation(self, node_id: int) -> str | None:
        """Something that changes with every process of the node; None while it is not connected."""
        return self._state.activation(node_id)

    def registered(self, node_id: int) -> bool:
        """Whether the node still belongs to the federation."""
        return self._state.registered(node_id)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message (Flower's older way; ``Message(...)`` does the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes whose lease runs."""
        return sorted(self._state.get_nodes(self._run.run_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep each message for its node; a message to a node that does not exist gets no id."""
        ids = [self._state.instruct(message, self._run.run_id) for message in messages]
        return [message_id for message_id in ids if message_id is not None]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are complete; each is handed out once and forgotten here.

        A node that is gone, and a message whose time is up, get Flower's error replies.
        """
        replies = (self._state.take_reply(message_id, self._run.run_id) for message_id in message_ids)
        return [reply for reply in replies if reply is not None]

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Forget messages, and replies to them, that nobody waits for any more."""
        self._state.delete_messages(set(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for their replies, all of which are held in memory."""
        pending = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending:
            for message_id in list(pending):
                arrived = list(self.pull_messages([message_id]))
                if arrived:
                    pending.remove(message_id)
                    replies += arrived
            if deadline is not None and time.monotonic() >= deadline:
                break
            if pending:
                time.sleep(_GLANCE)
        self.withdraw(pending)
        return replies
