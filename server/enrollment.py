"""The two services with which sites enrol, renew their certificates and learn who the members are.

Two gRPC servers, so that a call can never come through the wrong port:

* **enrollment** answers anybody, with requests of at most 64 KiB, and knows one call. What protects it: a secret that
  works once, signatures with every key, limits per address, a bound on undecided sites, an operator who compares words.
* **members** answers nobody without a client certificate of the federation's authority. The certificate's key must be
  the key of an approved site, looked up at every call: a site that was revoked is refused at once, whatever its
  certificate says.

Neither can start a run, read one, or change anything but the caller's own entry.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn
from urllib.parse import unquote

import grpc
from pydantic import BaseModel

from quorsum import enrollment as talk
from quorsum.config import CoordinatorConfig
from quorsum.crypto import certificates
from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.labels import tagged
from quorsum.errors import DataError, Refusal, UsageError
from quorsum.invitation import secret_hash
from quorsum.server.authority import Authority, ServerCertificate
from quorsum.server.store import Application, Relay, SiteRow, Store, check_epoch

__all__ = ["EnrollmentService", "Limits", "now_utc"]

_LOGGER = logging.getLogger("quorsum.enrollment")

# What a guess at an invitation ends in; each takes one of the few tokens that an address has for failures.
_FAILURES: Final = frozenset(
    {"invitation-unknown", "invitation-site", "invitation-used", "invitation-expired", "invitation-withdrawn"}
)
# Lines about refusals for each address: a flood of calls must not fill the disk.
_LINES_RATE, _LINES_BURST = 1.0, 60.0
# Connections to one port at most, so that the process keeps files for everything else.
_CONNECTIONS: Final = 256
_STATUS: Final = {
    "rate-limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too-many-pending": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "undecodable": grpc.StatusCode.INVALID_ARGUMENT,
    "no-certificate": grpc.StatusCode.UNAUTHENTICATED,
    "not-a-member": grpc.StatusCode.PERMISSION_DENIED,
    "revoked": grpc.StatusCode.PERMISSION_DENIED,
    "left": grpc.StatusCode.PERMISSION_DENIED,
    "refused": grpc.StatusCode.PERMISSION_DENIED,
    "internal": grpc.StatusCode.INTERNAL,
}


def now_utc() -> datetime:
    """The time of this machine."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Limits:
    """What outsiders may take of the coordinator.

    Attributes:
        rate, burst: calls per second and how many at once, for each address that enrols and for each member.
        overall_rate, overall_burst: the same for all addresses together.
        failure_rate, failure_burst: the same for wrong invitations.
        most_pending: sites that may wait for the operator.
        most_addresses: addresses that are remembered.
        most_arriving: requests of one address, or of one member, that may be on their way at once.
        slowest: seconds that a request may take to arrive; the sites give up after as many.
    """

    rate: float = 10.0
    burst: float = 20.0
    overall_rate: float = 200.0
    overall_burst: float = 400.0
    failure_rate: float = 0.2
    failure_burst: float = 10.0
    most_pending: int = 256
    most_addresses: int = 10_000
    most_arriving: int = 4
    slowest: float = 20.0


class _Buckets:
    """Token buckets by name; the one unused for longest is forgotten first."""

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, cost: float = 1.0) -> bool:
        """Take a token; False when there is none. With cost 0, only look whether there is one."""
        now = time.monotonic()
        with self._lock:
            tokens, last = self._buckets.get(name, (self._burst, now))
            tokens = min(self._burst, tokens + (now - last) * self._rate)
            enough = tokens >= 1.0
            self._buckets[name] = (tokens - cost if enough else tokens, now)
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
            return enough


class _Arrivals:
    """How many requests of each name are on their way; a request that never ends must take no place of others."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._arriving: Counter[str] = Counter()

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        with self._lock:
            if self._arriving[name] >= self._most:
                raise Refusal("rate-limited", "too many calls at once; wait a few seconds and try again")
            self._arriving[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._arriving[name] -= 1
                if not self._arriving[name]:
                    del self._arriving[name]


class EnrollmentService:
    """Both servers.

    Args:
        store: who may join and who has.
        authority: issues the certificates.
        config: hosts, ports, lifetimes.
        clock: the time, with time zone.
        server_certificate: with which both ports show themselves; one kept in memory only if not given.
        limits: what outsiders may take.

    Attributes:
        enrollment_address, members_address, fleet_address: ``host:port`` as sites are told them; after :meth:`start`.
    """

    def __init__(
        self,
        store: Store,
        authority: Authority,
        config: CoordinatorConfig,
        clock: Callable[[], datetime] = now_utc,
        *,
        server_certificate: ServerCertificate | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._store, self._authority, self._config, self._clock = store, authority, config, clock
        self._fingerprint = authority.fingerprint
        self._certificate = server_certificate or ServerCertificate(authority, config.advertise, clock)
        self._limits = limits or Limits()
        self._failures = _Buckets(self._limits.failure_rate, self._limits.failure_burst, self._limits.most_addresses)
        self._said = _Buckets(_LINES_RATE, _LINES_BURST, self._limits.most_addresses)
        self._servers: list[grpc.Server] = []
        self.enrollment_address = self.members_address = ""
        self.fleet_address = config.address(config.fleet_port)

    def start(self) -> None:
        """Open both ports.

        Raises:
            UsageError: a port cannot be opened, naming it.
        """
        try:
            enrollment = self._serve(
                *(talk.ENROLLMENT, self._config.enrollment_port, talk.MAX_ENROLLMENT_BYTES, False),
                {"Enroll": (talk.EnrollRequest, self._enroll)},
            )
            members = self._serve(
                *(talk.MEMBERS, self._config.members_port, talk.MAX_MEMBERS_BYTES, True),
                {
                    "Renew": (talk.RenewRequest, self._member(self._renew)),
                    "Roster": (talk.RosterRequest, self._member(self._roster)),
                    "Leave": (talk.LeaveRequest, self._member(self._leave)),
                    "PutKey": (talk.PutKeyRequest, self._member(self._put_key)),
                    "GetKey": (talk.GetKeyRequest, self._member(self._get_key)),
                },
            )
        except UsageError:
            self.stop()
            raise
        self.enrollment_address, self.members_address = self._config.address(enrollment), self._config.address(members)
        for server in self._servers:
            server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Close both ports; calls that are being answered get ``grace_s`` seconds."""
        for stopped in [server.stop(grace_s) for server in self._servers]:
            stopped.wait()
        self._servers = []

    def _serve(self, service: str, port: int, longest: int, client_auth: bool, calls: dict[str, Any]) -> int:
        peers = _Buckets(self._limits.rate, self._limits.burst, self._limits.most_addresses)
        overall = _Buckets(self._limits.overall_rate, self._limits.overall_burst, 1)
        arrivals = _Arrivals(self._limits.most_arriving)
        # As a stream of one message, because a handler of single messages waits for its message without an end.
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.stream_unary_rpc_method_handler(self._handler(schema, handle, peers, overall, arrivals))
            for name, (schema, handle) in calls.items()
        }
        server = grpc.server(
            ThreadPoolExecutor(max_workers=64, thread_name_prefix=service),
            maximum_concurrent_rpcs=256,
            options=[
                ("grpc.max_receive_message_length", longest),
                ("grpc.max_send_message_length", talk.MAX_REPLY_BYTES),
                ("grpc.max_metadata_size", 8 << 10),
                ("grpc.max_concurrent_streams", 8),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", 30_000),
                ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
                # Without this a second coordinator would share the port and answer every other call.
                ("grpc.so_reuseport", 0),
            ],
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._servers.append(server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            return int(server.add_secure_port(f"{host}:{port}", self._credentials(client_auth)))
        except RuntimeError:
            raise UsageError(
                f"cannot listen on {host}:{port}: another program has this port, or this machine has not this address; "
                "change coordinator.toml or stop the other program"
            ) from None

    def _credentials(self, client_auth: bool) -> grpc.ServerCredentials:
        authority = self._authority.certificate if client_auth else None
        lock, shown = threading.Lock(), [self._certificate.current()]

        def configuration(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # Only a new one: gRPC exchanges it without a lock, and many handshakes at once that each brought another
            # would end the process.
            with lock:
                current = self._certificate.current()
                if current == shown[0]:
                    return None
                shown[0] = current
                return configuration(current)

        # Asked for at every handshake, so that a renewed certificate is taken without a restart.
        initial = configuration(shown[0])
        return grpc.dynamic_ssl_server_credentials(initial, changed, client_auth)  # type: ignore[arg-type]

    def _handler(
        self,
        schema: type[BaseModel],
        handle: Callable[[Any, grpc.ServicerContext], BaseModel],
        peers: _Buckets,
        overall: _Buckets,
        arrivals: _Arrivals,
    ) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            peer = _peer(context)
            try:
                if not peers.take(peer) or not overall.take(""):
                    raise Refusal("rate-limited", "too many calls in a short time; wait a few seconds and try again")
                with arrivals.one(peer):
                    data = self._arrived(requests, context)
                return talk.pack(handle(talk.unpack(schema, data), context))
            except grpc.RpcError:
                # Whoever called has hung up, or took too long.
                raise
            except DataError as error:
                # About our own file; its path is nobody else's business.
                _LOGGER.error("the coordinator's state cannot be used: %s", error)
                refusal = _internal()
            except Refusal as error:
                if self._said.take(peer):
                    _LOGGER.info("refused %s: %s: %s", _address(context), error.code, error)
                refusal = error
            except Exception:
                # The last line of defence: nothing of a failure in here may reach the other side.
                _LOGGER.exception("a call failed")
                refusal = _internal()
            return self._abort(context, refusal)

        return call

    def _arrived(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        late = threading.Timer(self._limits.slowest, context.cancel)
        late.daemon = True
        late.start()
        try:
            return next(requests, b"")
        finally:
            late.cancel()

    def _abort(self, context: grpc.ServicerContext, refusal: Refusal) -> NoReturn:
        status = _STATUS.get(refusal.code, grpc.StatusCode.FAILED_PRECONDITION)
        context.abort(status, talk.encode_detail(refusal.code, refusal.message, self._now()))
        raise AssertionError

    def _now(self) -> float:
        return self._clock().timestamp()

    # Enrollment.

    def _enroll(self, request: talk.EnrollRequest, context: grpc.ServicerContext) -> talk.EnrollReply:
        address = _address(context)
        if not self._failures.take(address, cost=0.0):
            raise Refusal("rate-limited", "too many wrong invitations from this address; wait a minute and try again")
        try:
            keys = _check_proofs(self._fingerprint, request)
            application = Application(
                site=request.site,
                secret_hash=secret_hash(bytes.fromhex(request.secret_hex)) if request.secret_hex else None,
                keys=keys,
                identity=request.identity,
                node_key=request.node_key,
                request=request.request,
                words=talk.words_of(self._fingerprint, request.site, request.identity, keys),
                address=address,
            )
            site = self._store.enroll(application, self._now(), self._limits.most_pending)
        except Refusal as refusal:
            if refusal.code in _FAILURES:
                self._failures.take(address)
            raise
        return talk.EnrollReply(
            state=site.state,
            words=site.words,
            certificate=self._current_certificate(site) if site.state == "approved" else "",
            members_address=self.members_address,
            fleet_address=self.fleet_address,
            federation=self._config.federation,
            server_time=self._now(),
        )

    def _current_certificate(self, site: SiteRow) -> str:
        """The site's certificate; a new one when there is none or half of it is over."""
        now, lifetime = self._clock(), timedelta(hours=self._config.certificate_hours)
        if site.certificate is not None and site.expires is not None:
            old = site.certificate.encode()
            span = certificates.expires(old) - certificates.starts(old) - certificates.BACKDATED
            if site.expires - now.timestamp() > span.total_seconds() / 2:
                return site.certificate
        issued = certificates.issue(
            self._authority.key, self._authority.certificate, site.request.encode(), now, lifetime, server=False
        )
        until = certificates.expires(issued).timestamp()
        if not self._store.set_certificate(site.id, issued.decode("ascii"), until, now.timestamp()):
            raise Refusal("revoked", f"site {site.name} is no member any more")
        return issued.decode("ascii")

    # Members.

    def _member(
        self, handle: Callable[[Any, SiteRow], BaseModel]
    ) -> Callable[[BaseModel, grpc.ServicerContext], BaseModel]:
        return lambda request, context: handle(request, self._caller(context))

    def _caller(self, context: grpc.ServicerContext) -> SiteRow:
        shown = context.auth_context().get("x509_pem_cert") or ()
        certificate = next(iter(shown), b"")
        if not certificate or not isinstance(certificate, bytes):
            raise Refusal("no-certificate", "members show a client certificate on this port; enrol first")
        site = self._store.owner(certificates.public_key_digest(certificates.certificate_key(certificate)))
        if site is not None:
            talk.check_state(site.state, site.name)
        if site is None or site.state != "approved" or certificates.common_name(certificate) != site.name:
            raise Refusal("not-a-member", "this certificate belongs to no approved site; enrol first")
        return site

    def _renew(self, request: talk.RenewRequest, site: SiteRow) -> talk.RenewReply:
        name, key = certificates.read_request(request.request.encode())
        if name != site.name or certificates.public_key_digest(key) != site.keys.tls:
            raise Refusal(
                "renewal-key", f"site {site.name} can renew its own certificate only, for the key it enrolled with"
            )
        return talk.RenewReply(certificate=self._current_certificate(site), server_time=self._now())

    def _roster(self, _request: talk.RosterRequest, _site: SiteRow) -> talk.RosterReply:
        members = [
            talk.Member(site=member.name, identity=member.identity, state=member.state)
            for member in self._store.members()
            if member.state in ("approved", "revoked", "left")
        ]
        return talk.RosterReply(members=members, server_time=self._now())

    def _leave(self, _request: talk.LeaveRequest, site: SiteRow) -> talk.LeaveReply:
        self._store.leave(site.name, self._now())
        return talk.LeaveReply(server_time=self._now())

    def _put_key(self, request: talk.PutKeyRequest, site: SiteRow) -> talk.PutKeyReply:
        sealed = talk.decode_base64(request.sealed)
        statement = talk.relay_statement(request.epoch, site.name, request.recipient, sealed)
        # Else its recipient would find the coordinator at fault, and nobody else could share a key in this epoch.
        if not PublicIdentity.from_hex(site.identity).verify(bytes.fromhex(request.signature), talk.RELAY, *statement):
            raise Refusal("wrong-proof", "the sealed key is not signed with the site's identity; make it anew")
        self._store.put_relay(
            Relay(request.epoch, site.name, request.recipient, sealed, request.signature), self._now()
        )
        return talk.PutKeyReply(server_time=self._now())

    def _get_key(self, request: talk.GetKeyRequest, site: SiteRow) -> talk.GetKeyReply:
        check_epoch(request.epoch, ((member.name, member.identity) for member in self._store.approved_sites()))
        relay = self._store.get_relay(request.epoch, site.name)
        if relay is None:
            return talk.GetKeyReply(sender="", sealed="", signature="", server_time=self._now())
        sealed = talk.encode_base64(relay.sealed)
        return talk.GetKeyReply(sender=relay.sender, sealed=sealed, signature=relay.signature, server_time=self._now())


def _check_proofs(fingerprint: str, request: talk.EnrollRequest) -> talk.Keys:
    """The keys of a request, once it is shown that its sender holds all three."""
    name, tls_key = certificates.read_request(request.request.encode())
    if name != request.site:
        raise Refusal("request-name", f"the certificate is asked for {name!r}, the enrollment is of {request.site!r}")
    identity, keys = PublicIdentity.from_hex(request.identity), talk.Keys.of(request)
    if keys.node == keys.tls:
        raise Refusal("key-in-use", "the node key and the TLS key are the same; make two")
    statement = talk.enrollment_statement(fingerprint, request)
    proofs = {
        "identity": identity.verify(bytes.fromhex(request.identity_proof), talk.REQUEST, *statement),
        "node": certificates.verify(
            request.node_key.encode(), bytes.fromhex(request.node_proof), tagged(talk.NODE_PROOF, *statement)
        ),
        "TLS": certificates.verify(tls_key, bytes.fromhex(request.tls_proof), tagged(talk.TLS_PROOF, *statement)),
    }
    for which, held in proofs.items():
        if not held:
            raise Refusal(
                "wrong-proof", f"the request is not signed with the {which} key that it names, for this authority"
            )
    return keys


def _internal() -> Refusal:
    return Refusal("internal", "the coordinator cannot answer now; its log says why")


def _peer(context: grpc.ServicerContext) -> str:
    """Who calls, for the limits: a member by its name, since many may share an address; anybody else by the address."""
    name = next(iter(context.auth_context().get("x509_common_name") or ()), None)
    return _address(context) if name is None else f"member {name!r}"


def _address(context: grpc.ServicerContext) -> str:
    """The peer's IP address without its port; of IPv6 the network, since every host has 2^64 addresses in it."""
    kind, _, rest = unquote(context.peer()).partition(":")
    host = rest.rpartition(":")[0].strip("[]").split("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return kind
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network(f"{address}/64", strict=False))
    return str(address)
