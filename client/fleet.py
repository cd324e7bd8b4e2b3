"""The site's connection to the fleet: no open port, one message at a time, and it comes back by itself for ever.

The site asks, the coordinator answers. While a message is in work, a thread of its own keeps the lease. Whatever goes
wrong with the connection ends in one of these states, and in another attempt:

=================================  =====================================================  =======================
state                              meaning                                                next attempt
=================================  =====================================================  =======================
``connecting``                     the coordinator cannot be reached                      0.2 s, growing to 5 s
``waiting for its former lease``   the coordinator still counts a former process of this  1 s
                                   site as present
``connected``
``refused: certificate``           one end does not accept the other's certificate        10 s
``refused: clock``                 this machine's clock is too far off                    10 s
``refused: not a member``          the coordinator does not know this site's node key     5 s
``refused: another process``       another process of this site is connected              5 s
=================================  =====================================================  =======================

The certificate is read again for every attempt, so a renewed one is taken without a restart.

A message that the coordinator has handed out is lost when the connection breaks at that moment. So a connection that
broke is never resumed: the site leaves and comes back, which the coordinator sees, and asks again.
"""

from __future__ import annotations

import email.utils
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from flwr.app import Error, Message

from quorsum import flower
from quorsum.errors import KeyMaterialError, Refusal

if os.name == "posix":
    import fcntl

__all__ = [
    "ANOTHER",
    "CERTIFICATE",
    "CLOCK",
    "CONNECTED",
    "CONNECTING",
    "LEASED",
    "STRANGER",
    "Credentials",
    "FleetConnection",
    "Handler",
    "serve",
]

log = logging.getLogger("flwr.quorsum.fleet")

CONNECTING: Final = "connecting"
LEASED: Final = "waiting for its former lease"
CONNECTED: Final = "connected"
CERTIFICATE: Final = "refused: certificate"
CLOCK: Final = "refused: clock"
STRANGER: Final = "refused: not a member"
ANOTHER: Final = "refused: another process"

BEAT: Final = 4.0
"""Seconds between two signs of life."""

_PAUSES: Final = {LEASED: 1.0, CERTIFICATE: 10.0, CLOCK: 10.0, STRANGER: 5.0, ANOTHER: 5.0}
_FIRST_RETRY, _LONGEST_RETRY = 0.2, 5.0
_FIRST_IDLE, _LONGEST_IDLE = 0.1, 1.0
# A coordinator that lets a site wait for messages answers no sooner than this.
_HELD: Final = 0.5
# Flower accepts a signed time that is up to 5 s ahead of its own clock and up to 305 s behind.
_AHEAD, _BEHIND = 5.0, 305.0
_RAISED: Final = 2
# A coordinator that accepts a certificate waits for longer than this for a request, in seconds.
_PROBE: Final = 1.0

Handler = Callable[[Message, bytes, flower.Run], Message]
"""Answers a message, given the bundle it is for and its run."""


@dataclass(frozen=True)
class Credentials:
    """Files that let a site in.

    Attributes:
        certificate: its TLS certificate, PEM.
        key: the private key of that, PEM.
        authority: the certificate of the federation's authority, PEM.
        node_key: the node's private key, EC on a NIST curve, PEM.
    """

    certificate: Path
    key: Path
    authority: Path
    node_key: Path

    def context(self) -> ssl.SSLContext:
        """Who is trusted, and how the site shows who it is.

        Raises:
            KeyMaterialError: a file is missing.
            ssl.SSLError: a file holds something else.
        """
        try:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.authority)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError:
            raise
        except OSError as error:
            raise KeyMaterialError(
                "no-certificate", f"cannot read the site's certificates: {error}; enroll this site first"
            ) from None
        return context

    def node(self) -> bytes:
        """The node key.

        Raises:
            KeyMaterialError: it cannot be read.
        """
        try:
            return self.node_key.read_bytes()
        except OSError as error:
            raise KeyMaterialError("no-key", f"cannot read {self.node_key}: {error.strerror}; enroll first") from None


class _Refused(Exception):
    """An attempt failed for a reason that has a name."""

    def __init__(self, state: str, detail: str = "") -> None:
        super().__init__(detail)
        self.state = state
        self.detail = detail


class _Lost(Exception):
    """The connection has ended; the next one begins anew."""


def serve(
    address: str,
    credentials: Credentials,
    handle: Handler,
    *,
    stop: threading.Event,
    on_state: Callable[[str], None] = lambda state: None,
    clock_offset: Callable[[], float] = lambda: 0.0,
    memory: Path | None = None,
    beat: float = BEAT,
) -> None:
    """Take messages and answer them until ``stop`` is set.

    Args:
        address: ``host:port`` of the coordinator's fleet.
        credentials: files that let the site in.
        handle: answers one message; what it raises stays here.
        stop: ends it, after the message in work.
        on_state: told every new state, see above.
        clock_offset: seconds by which the coordinator's clock is ahead of this machine's.
        memory: file in which the site notes that it is connected, so that a new process ends the lease of one that
            was killed instead of waiting for its end; and which only one process at a time may hold.
        beat: seconds between two signs of life.

    Raises:
        KeyMaterialError: a file that lets the site in is missing or is something else.
    """
    state = ""

    def say(new: str, detail: str = "") -> None:
        nonlocal state
        if new != state:
            state = new
            log.info("%s%s", new, f" ({detail})" if detail else "")
            on_state(new)

    flower.quiet()
    pause = _FIRST_RETRY
    former = _Former(memory)
    with ExitStack() as held:
        while not stop.is_set():
            try:
                former.hold(held)
                with FleetConnection(address, credentials, clock_offset, former, beat) as connection:
                    say(CONNECTED)
                    pause = _FIRST_RETRY
                    connection.work(handle, stop)
            except _Refused as refused:
                say(refused.state, refused.detail)
                stop.wait(_PAUSES[refused.state])
            except (_Lost, httpx.HTTPError) as error:
                if not stop.is_set():
                    say(CONNECTING, str(error))
                stop.wait(pause)
                pause = min(2 * pause, _LONGEST_RETRY)


@dataclass
class _Former:
    """The node id of the site's last connection, kept over a kill, and held by one process."""

    path: Path | None
    node_id: int = 0
    held: bool = False

    def hold(self, stack: ExitStack) -> None:
        """Make sure that no other process of the site is connected.

        Raises:
            _Refused: one is.
            KeyMaterialError: there can be no such file.
        """
        if self.path is None or self.held:
            return
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            # Of a full disk, say, the process dies and is started again.
            raise KeyMaterialError("no-home", f"cannot use {self.path}: {error.strerror}; is the home right?") from None
        try:
            if os.name == "posix":
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise _Refused(ANOTHER, f"it holds {self.path}") from None
        stack.callback(os.close, descriptor)
        self.held = True
        noted = os.read(descriptor, 64)
        self.node_id = int(noted) if noted.isdigit() and int(noted) < 2**64 else 0

    def note(self, node_id: int) -> None:
        """Remember a connection; 0 for none."""
        self.node_id = node_id
        if self.path is not None:
            # In place, because the file itself is what is locked. Half a number is no harm, nor is none (a full disk):
            # a new process then waits for the end of the lease.
            with suppress(OSError):
                self.path.write_text(str(node_id) if node_id else "", encoding="ascii")


@dataclass
class FleetConnection:
    """One life of the site at the coordinator, from activation to the first thing that goes wrong.

    Args:
        address: ``host:port``.
        credentials: read when it begins.
        clock_offset: seconds by which the coordinator's clock is ahead.
        former: what came before.
        beat: seconds between two signs of life.
    """

    address: str
    credentials: Credentials
    clock_offset: Callable[[], float]
    former: _Former
    beat: float
    node_id: int = 0
    _lost: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)
    _runs: dict[int, tuple[flower.Run, bytes]] = field(default_factory=dict)

    def __enter__(self) -> FleetConnection:
        try:
            context = self.credentials.context()
        except ssl.SSLError as error:
            raise _Refused(CERTIFICATE, f"this site's own files: {error.reason}") from None
        key = self.credentials.node()
        with ExitStack() as opened:
            self._client = flower.FleetClient(self.address, context, key, clock_offset=self.clock_offset)
            opened.callback(self._client.close)
            with _named(self.address, context):
                self._end_former()
                self.node_id = self._client.activate()
            self.former.note(self.node_id)
            # A client of its own: a long upload must not keep the sign of life waiting.
            self._pulse = flower.FleetClient(
                self.address, context, key, clock_offset=self.clock_offset, timeout=max(self.beat, 1.0)
            )
            opened.callback(self._pulse.close)
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
            self._open = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._over.set()
        self._thread.join(self.beat + 2)
        # On a broken connection it would only wait; the next connection ends this lease.
        if kind is None or not issubclass(kind, httpx.TransportError):
            with suppress(httpx.HTTPError):
                self._client.deactivate(self.node_id)
                self.former.note(0)
        self._open.close()

    def work(self, handle: Handler, stop: threading.Event) -> None:
        """Take messages and answer them.

        Raises:
            _Lost: the coordinator does not know this node any more.
            httpx.HTTPError: the connection broke.
        """
        idle = _FIRST_IDLE
        while not stop.is_set():
            if self._lost.is_set():
                raise _Lost("the coordinator does not know this connection any more")
            asked = time.monotonic()
            with _unknown():
                instruction = self._client.poll(self.node_id)
                if instruction is not None:
                    self._answer(instruction, handle)
            if instruction is not None:
                idle = _FIRST_IDLE
            elif time.monotonic() - asked < _HELD:
                stop.wait(idle)
                idle = min(1.3 * idle, _LONGEST_IDLE)

    def _answer(self, instruction: flower.Instruction, handle: Handler) -> None:
        try:
            message = self._client.fetch(self.node_id, instruction)
            run, bundle = self._run(message.metadata.run_id)
            reply = _handled(handle, message, bundle, run)
            try:
                self._client.push(self.node_id, message, reply)
            except flower.ReplyRefused:
                log.warning("the coordinator did not take the reply; it may be longer than it allows")
                self._client.push(self.node_id, message, _error(message, "the reply was not taken"))
        except (flower.MessageGone, flower.ReplyRefused):
            log.info("nobody waits for message %.8s any more", instruction.tree.object_id)
        except Refusal as refusal:
            log.warning("a message of the coordinator cannot be used: %s", refusal)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 401:
                raise
            log.warning("the coordinator refused: %s", error.response.text[:200])

    def _run(self, run_id: int) -> tuple[flower.Run, bytes]:
        if run_id not in self._runs:
            run = self._client.run(self.node_id, run_id)
            # One run at a time is the rule; another bundle need not be kept.
            self._runs = {run_id: (run, self._client.bundle(self.node_id, run))}
        return self._runs[run_id]

    def _end_former(self) -> None:
        if self.former.node_id:
            # A coordinator that has begun anew does not know it, and then there is no lease either.
            with suppress(httpx.HTTPStatusError):
                self._client.deactivate(self.former.node_id)
            self.former.note(0)

    def _beat(self) -> None:
        while not self._over.wait(self.beat):
            try:
                known = self._pulse.beat(self.node_id)
            except httpx.HTTPStatusError as error:
                known = error.response.status_code != 401
            except httpx.HTTPError:
                known = True
            if not known:
                self._lost.set()
                return


def _handled(handle: Handler, message: Message, bundle: bytes, run: flower.Run) -> Message:
    try:
        return handle(message, bundle, run)
    except Exception:
        # Its words may be of the site's data.
        log.exception("an error in the site's own software")
        return _error(message, "an error in the site's own software; its own log says which")


def _error(message: Message, reason: str) -> Message:
    return Message(Error(_RAISED, reason), reply_to=message)


@contextmanager
def _unknown() -> Iterator[None]:
    """While connected, a request that is not accepted means that the coordinator has begun anew."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _Lost(f"the coordinator answered {error.response.status_code}") from None


@contextmanager
def _named(address: str, context: ssl.SSLContext) -> Iterator[None]:
    """Give the reasons for which an activation fails their names."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _status(error.response) from None
    except httpx.TransportError as error:
        alert = _alert(error)
        if alert is not None:
            raise _Refused(CERTIFICATE, alert) from None
        if _turned_away(address, context):
            raise _Refused(CERTIFICATE, "the coordinator does not accept this site's; it may have run out") from None
        raise


def _status(response: httpx.Response) -> _Refused | _Lost:
    if response.status_code == 409:
        return _Refused(LEASED)
    if response.status_code == 403:
        return _Refused(STRANGER, "the operator has to approve this site")
    if response.status_code == 401:
        theirs = email.utils.parsedate_tz(response.headers.get("date", ""))
        difference = 0.0 if theirs is None else time.time() - email.utils.mktime_tz(theirs)
        if not -_BEHIND < difference < _AHEAD:
            side = "ahead of" if difference > 0 else "behind"
            return _Refused(CLOCK, f"this machine's clock is {abs(difference):.0f} s {side} the coordinator's; set it")
        return _Refused(STRANGER, "the coordinator does not accept the node key or the clock's offset")
    return _Lost(f"the coordinator answered {response.status_code}")


def _turned_away(address: str, context: ssl.SSLContext) -> bool:
    """Whether the coordinator hangs up on this site before it has said a word.

    Python's servers end a connection whose certificate they do not accept without TLS's word for it.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        plain = socket.create_connection((host, int(port)), timeout=_PROBE)
    except OSError:
        return False
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return not secure.recv(1)
        except TimeoutError:
            return False
        except (OSError, ValueError):
            return True


def _alert(error: BaseException) -> str | None:
    """What TLS says is wrong with a certificate, looked for in an error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and cause.reason is not None:
            reason = cause.reason
            if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "ACCESS_DENIED" in reason:
                return getattr(cause, "verify_message", "") or reason.lower().replace("_", " ")
        cause = cause.__cause__ or cause.__context__
    return None
