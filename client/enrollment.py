"""How a site joins, stays, and leaves: the other end of the coordinator's enrollment and members services.

What the site relies on, in order: the fingerprint in its invitation shows which authority is the right one; TLS under
that authority, with full checks of names, shows that the coordinator answers; six words, worked out here from keys that
are here, show its own keys to the coordinator's operator. From then on the site's certificate is renewed for the same
key, and the other members' identities are pinned.

The roster comes from the coordinator. A coordinator that invents a member is found out only by people who compare the
list; for that it is shown, and a change of anybody's key is refused.
"""

from __future__ import annotations

import hashlib
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias, TypeVar

import grpc
from filelock import FileLock, Timeout
from pydantic import BaseModel

from quorsum import enrollment as talk
from quorsum.client.home import SiteHome
from quorsum.client.keys import load_site_key
from quorsum.config import SiteConfig, replace_file
from quorsum.crypto import certificates
from quorsum.crypto.ckks_keys import CkksSiteKey
from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.labels import tagged
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal
from quorsum.invitation import Invitation, split_address

__all__ = [
    "Clock",
    "Waiting",
    "clock_ahead",
    "enroll",
    "fetch_authority",
    "fetch_key",
    "leave",
    "load_shared_key",
    "renew",
    "renewal_due",
    "roster",
    "share_key",
]

Clock: TypeAlias = Callable[[], float]
"""Seconds since 1970; in production ``time.time``."""

POLL_S: Final = 2.0
LONGEST_PAUSE_S: Final = 15.0
TIMEOUT_S: Final = 20.0

# What passes by itself: the site asks again.
_PASSING: Final = frozenset({"unreachable", "rate-limited", "too-many-pending", "internal"})
# Codes of X.509 verification in OpenSSL: not yet valid, expired; another host name, another IP address.
_OUT_OF_TIME: Final = frozenset({9, 10})
_OTHER_HOST: Final = frozenset({62, 64})

Reply = TypeVar("Reply", bound=BaseModel)


@dataclass(frozen=True)
class Waiting:
    """Why an enrollment is not done yet.

    Attributes:
        state: ``pending`` (for the operator) or ``unreachable`` (the coordinator does not answer, or is too busy).
        words: the six words to read to the coordinator's operator.
        message: a sentence, with who must do what.
    """

    state: Literal["pending", "unreachable"]
    words: str
    message: str


@dataclass(frozen=True)
class _Line:
    """One way to the coordinator."""

    address: str
    authority: bytes
    clock: Clock
    key: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = None

    def call(self, service: str, name: str, message: BaseModel, schema: type[Reply]) -> Reply:
        credentials = grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)
        options = [
            ("grpc.max_receive_message_length", talk.MAX_REPLY_BYTES),
            # The authority was fetched without a proxy as well; a proxy in between could only be in the way.
            ("grpc.enable_http_proxy", 0),
        ]
        before = self.clock()
        with grpc.secure_channel(self.address, credentials, options) as channel:
            try:
                call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(talk.method(service, name))
                data = call(talk.pack(message), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                raise self._refusal(error, before) from None
        try:
            reply = talk.unpack(schema, data)
        except Refusal as refusal:
            raise CoordinatorFault(refusal.code, f"the coordinator's answer: {refusal}") from None
        _check_clock(getattr(reply, "server_time", math.nan), before, self.clock())
        return reply

    def _refusal(self, error: grpc.RpcError, before: float) -> Refusal:
        code, details = error.code(), error.details() or ""
        detail = talk.decode_detail(details)
        if detail is not None:
            refusal, server_time = detail
            _check_clock(server_time, before, self.clock())
            return refusal
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            try:
                _check_server(self.authority, *split_address(self.address), self.clock)
            except Refusal as refusal:
                return refusal
            return Refusal("unreachable", f"the coordinator does not answer at {self.address}; is it running?")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Not by the coordinator's own word, so it is so busy that the call did not get that far.
            return Refusal("rate-limited", f"the coordinator at {self.address} is too busy; trying again")
        return Refusal("call-failed", f"the coordinator at {self.address} gave no usable answer ({code.name})")


def fetch_authority(invitation: Invitation, clock: Clock = time.time) -> bytes:
    """Get the authority's certificate from whoever answers, and check it against the invitation.

    Returns:
        PEM.

    Raises:
        Refusal: ``unreachable``, ``wrong-authority`` (somebody else answers), ``wrong-name`` (the server's certificate
            does not name the host in the invitation), ``clock-skew`` (it is not valid now, by this machine's clock).
    """
    host, port = split_address(invitation.address)
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    with _handshake(unverified, host, port) as connection:
        chain = _shown_chain(connection)
    for der in chain:
        if hashlib.sha256(der).hexdigest() == invitation.fingerprint:
            authority = ssl.DER_cert_to_PEM_cert(der).encode("ascii")
            _check_server(authority, host, port, clock)
            return authority
    raise _wrong_authority(invitation.address)


def enroll(
    invitation: Invitation,
    home: SiteHome,
    on_wait: Callable[[Waiting], None],
    stop: threading.Event,
    clock: Clock = time.time,
    poll_s: float = POLL_S,
) -> SiteConfig:
    """Join: make the keys, present the invitation, wait for the operator, keep the certificate. May be begun again.

    Args:
        invitation: for this site.
        home: the site's folder; made where it is missing.
        on_wait: called at every change of what is waited for.
        stop: ends the waiting.
        clock: seconds since 1970.
        poll_s: seconds between two questions.

    Returns:
        the configuration, as it was written to the home; what the administrator set before is kept.

    Raises:
        Refusal: as the coordinator says (``invitation-expired``, ``invitation-used``, ``refused``, ``revoked``, ...);
            ``wrong-authority``, ``wrong-name``, ``clock-skew``; ``other-federation`` or ``other-site``: the home
            belongs to another one; ``stopped``: ``stop`` was set before the operator decided.
        CoordinatorFault: the coordinator shows other words than this site, or hands out a wrong certificate.
        KeyMaterialError: a key cannot be made or read.
    """
    home.create()
    _check_home(home, invitation)
    identity = home.identity().public().hex
    request, words = _request(home, invitation.site, invitation.fingerprint, invitation.secret.hex())

    fetched: list[bytes] = []

    def ask() -> talk.EnrollReply:
        if not fetched:
            fetched.append(fetch_authority(invitation, clock))
        authority = fetched[0]
        reply = _Line(invitation.address, authority, clock).call(talk.ENROLLMENT, "Enroll", request, talk.EnrollReply)
        if reply.words != words:
            raise CoordinatorFault("wrong-words", "the coordinator holds other keys for this site; do not go on")
        talk.check_state(reply.state, invitation.site)
        if reply.state == "approved":
            _keep_certificate(home, authority, invitation.site, reply.certificate)
            replace_file(home.authority_file, authority)
        return reply

    reply = _until_approved(ask, words, invitation.site, on_wait, stop, poll_s)
    config = _config(home, invitation, reply)
    home.write_config(config)
    # Pinned from the first moment; whoever joins later is added when the roster is asked for again.
    if not home.roster():
        own = talk.Member(site=invitation.site, identity=identity, state="approved")
        home.pin([own], invitation.site)
    return config


def renewal_due(certificate: bytes, now: float) -> bool:
    """Whether two thirds of the certificate's time are over.

    Raises:
        KeyMaterialError: ``unreadable``.
    """
    begin = (certificates.starts(certificate) + certificates.BACKDATED).timestamp()
    end = certificates.expires(certificate).timestamp()
    return now >= begin + (end - begin) * 2 / 3


def renew(home: SiteHome, clock: Clock = time.time) -> datetime:
    """Renew the site's certificate when two thirds of its time are over; call it every few minutes.

    A site that was away until its certificate ran out signs with its identity instead, on the enrollment port.

    Returns:
        until when the certificate in the home is valid now.

    Raises:
        Refusal: ``revoked``, ``left``, ``unreachable``, ``clock-skew``, ``rate-limited``, ...
        CoordinatorFault: the coordinator handed out a wrong certificate.
        KeyMaterialError: ``not-enrolled``, or a key cannot be read.
    """
    old = home.certificate()
    if not renewal_due(old, clock()):
        return certificates.expires(old)
    config, authority = home.config(), home.authority()
    valid = clock() < certificates.expires(old).timestamp()
    new = _renewed_as_member(home, config, clock) if valid else _renewed_by_identity(home, config, clock)
    return _keep_certificate(home, authority, config.site, new)


def _renewed_as_member(home: SiteHome, config: SiteConfig, clock: Clock) -> str:
    request = certificates.make_request(home.tls_key(), config.site).decode("ascii")
    message = talk.RenewRequest(request=request)
    return _members(home, clock).call(talk.MEMBERS, "Renew", message, talk.RenewReply).certificate


def _renewed_by_identity(home: SiteHome, config: SiteConfig, clock: Clock) -> str:
    authority = home.authority()
    request, _ = _request(home, config.site, certificates.fingerprint(authority), "")
    line = _Line(config.enrollment_address, authority, clock)
    reply = line.call(talk.ENROLLMENT, "Enroll", request, talk.EnrollReply)
    talk.check_state(reply.state, config.site)
    return reply.certificate


def roster(home: SiteHome, clock: Clock = time.time) -> tuple[talk.Member, ...]:
    """Ask who the members are, and pin them.

    Raises:
        CoordinatorFault: ``roster-changed``: the list cannot follow upon the pinned one.
        Refusal: ``revoked``, ``left``, ``unreachable``, ...; ``roster-busy``: another process of this site asks as well
            and does not get done.
        KeyMaterialError: ``not-enrolled``, ``roster-damaged``, ``no-home`` (it takes no lock).
    """
    line = _members(home, clock)
    with _asking(home):
        members = line.call(talk.MEMBERS, "Roster", talk.RosterRequest(), talk.RosterReply).members
        home.pin(members, home.config().site)
    return tuple(members)


@contextmanager
def _asking(home: SiteHome) -> Iterator[None]:
    """One at a time, threads and processes: a list that arrives after a newer one was pinned would look like a lie."""
    lock = FileLock(home.path / "roster.lock", timeout=2 * TIMEOUT_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise Refusal(
            "roster-busy", "another process of this site is asking who the members are; wait a minute and try again"
        ) from None
    except OSError as error:
        raise KeyMaterialError("no-home", f"cannot use {home.path}: {error.strerror}; choose another home") from None
    try:
        yield
    finally:
        lock.release()


def clock_ahead(home: SiteHome, clock: Clock = time.time) -> float:
    """By how many seconds the coordinator's clock is ahead of this machine's, to half the time that asking takes.

    Raises:
        Refusal: ``clock-skew`` (more than may be), ``revoked``, ``left``, ``unreachable``, ...
        KeyMaterialError: ``not-enrolled``.
    """
    line, before = _members(home, clock), clock()
    reply = line.call(talk.MEMBERS, "Roster", talk.RosterRequest(), talk.RosterReply)
    return reply.server_time - (before + clock()) / 2


def leave(home: SiteHome, clock: Clock = time.time) -> None:
    """Leave the federation for good: the site's keys are never accepted again.

    Raises:
        Refusal: ``revoked``, ``left``, ``unreachable``, ...
        KeyMaterialError: ``not-enrolled``.
    """
    _members(home, clock).call(talk.MEMBERS, "Leave", talk.LeaveRequest(), talk.LeaveReply)


def share_key(home: SiteHome, key: CkksSiteKey, clock: Clock = time.time) -> str:
    """Share a new ``ckks`` key with the members that are pinned, each sealed to its identity.

    Whoever is in the roster can read every update afterwards, so its administrator looks at it first (:func:`roster`);
    if the members changed since then, nothing is shared.

    Returns:
        the epoch, 64 hexadecimal digits.

    Raises:
        Refusal: ``epoch-over`` (the members changed), ``key-used-before`` (a key has one epoch only; make a new one),
            ``key-already-shared`` (another member was first), or as :func:`roster`.
        CoordinatorFault, KeyMaterialError: as :func:`roster`.
    """
    looked_at, site, identity = home.epoch(), home.config().site, home.identity()
    members = roster(home, clock)
    epoch = home.epoch()
    if epoch != looked_at:
        raise Refusal(
            "epoch-over", "the members have changed since the roster was looked at; look at it, then share a new key"
        )
    _check_unused(home, key, epoch)
    for member in members:
        if member.state != "approved" or member.site == site:
            continue
        info = talk.relay_info(epoch, site, member.site)
        sealed = PublicIdentity.from_hex(member.identity).seal(key.to_bytes(), info)
        signature = identity.sign(talk.RELAY, *talk.relay_statement(epoch, site, member.site, sealed))
        message = talk.PutKeyRequest(
            epoch=epoch, recipient=member.site, sealed=talk.encode_base64(sealed), signature=signature.hex()
        )
        _members(home, clock).call(talk.MEMBERS, "PutKey", message, talk.PutKeyReply)
    home.write_suite_key(key.to_bytes(), key.key_id, epoch)
    return epoch


def fetch_key(home: SiteHome, clock: Clock = time.time) -> CkksSiteKey:
    """Fetch the ``ckks`` key that another member shared in the current epoch, and keep it in the home.

    Raises:
        Refusal: ``no-key-yet`` (nobody shared one), ``key-used-before``, or as :func:`roster`.
        CoordinatorFault: ``wrong-sender``: the key is not signed by the member it is said to come from.
        KeyMaterialError: what was sealed is no key, or as :func:`roster`.
    """
    members, site = roster(home, clock), home.config().site
    epoch = home.epoch()
    reply = _members(home, clock).call(talk.MEMBERS, "GetKey", talk.GetKeyRequest(epoch=epoch), talk.GetKeyReply)
    if not reply.sender:
        raise Refusal(
            "no-key-yet", "nobody has shared a key with these members yet; one site runs: quorsum site share-key"
        )
    sealed = talk.decode_base64(reply.sealed)
    statement = talk.relay_statement(epoch, reply.sender, site, sealed)
    senders = [m.identity for m in members if m.site == reply.sender and m.state == "approved"]
    if not any(
        PublicIdentity.from_hex(sender).verify(bytes.fromhex(reply.signature), talk.RELAY, *statement)
        for sender in senders
    ):
        raise CoordinatorFault(
            "wrong-sender", f"the shared key is not signed by {reply.sender}, a member, for this site"
        )
    key = CkksSiteKey.from_bytes(home.identity().open(sealed, talk.relay_info(epoch, reply.sender, site)))
    _check_unused(home, key, epoch)
    home.write_suite_key(key.to_bytes(), key.key_id, epoch)
    return key


def load_shared_key(home: SiteHome) -> CkksSiteKey:
    """The shared key, if it is the key of the members as they are pinned.

    Raises:
        KeyMaterialError: ``key-stale``: it was shared with other members; ``no-key``: there is none, or as
            :func:`~quorsum.client.keys.load_site_key`.
    """
    fetch = home.command("site", "fetch-key")
    if not home.suite_key_file.exists():
        raise KeyMaterialError(
            "no-key",
            f"this site has no shared key yet; one site shares one: quorsum site share-key, then run here: {fetch}",
        )
    key = load_site_key(home.suite_key_file)
    if home.suite_epochs().get(home.epoch()) != key.key_id:
        raise KeyMaterialError(
            "key-stale",
            "the shared key belongs to other members than there are now; one site shares a new key: "
            f"quorsum site share-key, then run here: {fetch}",
        )
    return key


def _check_unused(home: SiteHome, key: CkksSiteKey, epoch: str) -> None:
    for other, key_id in home.suite_epochs().items():
        if key_id == key.key_id and other != epoch:
            raise Refusal(
                "key-used-before",
                f"the key {key.key_id} was shared with other members; whoever left could read on. Make a new key",
            )


def _members(home: SiteHome, clock: Clock) -> _Line:
    return _Line(home.config().members_address, home.authority(), clock, home.tls_key(), home.certificate())


def _request(home: SiteHome, site: str, fingerprint: str, secret_hex: str) -> tuple[talk.EnrollRequest, str]:
    """The signed request, and the six words for it."""
    identity, node_key, tls_key = home.identity(), home.node_key(), home.tls_key()
    unsigned = talk.EnrollRequest(
        site=site,
        secret_hex=secret_hex,
        identity=identity.public().hex,
        node_key=certificates.public_key(node_key).decode("ascii"),
        request=certificates.make_request(tls_key, site).decode("ascii"),
        identity_proof="0" * 128,
        node_proof="0" * 16,
        tls_proof="0" * 16,
    )
    statement = talk.enrollment_statement(fingerprint, unsigned)
    proofs = {
        "identity_proof": identity.sign(talk.REQUEST, *statement).hex(),
        "node_proof": certificates.sign(node_key, tagged(talk.NODE_PROOF, *statement)).hex(),
        "tls_proof": certificates.sign(tls_key, tagged(talk.TLS_PROOF, *statement)).hex(),
    }
    request = unsigned.model_copy(update=proofs)
    return request, talk.words_of(fingerprint, site, request.identity, talk.Keys.of(request))


def _until_approved(
    ask: Callable[[], talk.EnrollReply],
    words: str,
    site: str,
    on_wait: Callable[[Waiting], None],
    stop: threading.Event,
    poll_s: float,
) -> talk.EnrollReply:
    said, pause = None, poll_s
    while True:
        try:
            reply = ask()
            if reply.state == "approved":
                return reply
            sentence = f"read these words to the coordinator's operator, who runs: quorsum coordinator approve {site}"
            waiting, pause = Waiting("pending", words, sentence), poll_s
        except Refusal as refusal:
            if refusal.code not in _PASSING:
                raise
            waiting, pause = Waiting("unreachable", words, refusal.message), min(1.5 * pause, LONGEST_PAUSE_S)
        if waiting != said:
            on_wait(waiting)
            said = waiting
        if stop.wait(pause):
            raise Refusal(
                "stopped", "stopped before the coordinator's operator decided; enrol again with the same invitation"
            )


def _check_home(home: SiteHome, invitation: Invitation) -> None:
    if home.authority_file.exists() and certificates.fingerprint(home.authority()) != invitation.fingerprint:
        raise Refusal(
            "other-federation", f"{home.path} is the home of a site in another federation; choose another home"
        )
    if home.config_file.exists() and home.config().site != invitation.site:
        raise Refusal(
            "other-site", f"{home.path} is the home of site {home.config().site}, not {invitation.site}; choose another"
        )


def _config(home: SiteHome, invitation: Invitation, reply: talk.EnrollReply) -> SiteConfig:
    kept = home.config().model_dump() if home.config_file.exists() else {}
    addresses = {
        "enrollment_address": invitation.address,
        "members_address": reply.members_address,
        "fleet_address": reply.fleet_address,
    }
    try:
        return SiteConfig.model_validate({**kept, "site": invitation.site, "federation": reply.federation, **addresses})
    except ValueError:
        raise CoordinatorFault(
            "undecodable", "the coordinator names addresses that are none; tell its operator"
        ) from None


def _keep_certificate(home: SiteHome, authority: bytes, site: str, certificate: str) -> datetime:
    try:
        certificates.check_issued(authority, certificate.encode(), home.tls_key(), site)
    except Refusal as refusal:
        raise CoordinatorFault("wrong-certificate", f"what the coordinator handed out: {refusal}") from None
    replace_file(home.certificate_file, certificate.encode())
    return certificates.expires(certificate.encode())


def _check_clock(server_time: float, before: float, after: float) -> None:
    difference = server_time - (before + after) / 2
    if not abs(difference) <= talk.MAX_CLOCK_SKEW_S + (after - before) / 2:
        way = "behind" if difference > 0 else "ahead of"
        raise Refusal(
            "clock-skew",
            f"this machine's clock is {abs(difference):.0f} s {way} the coordinator's, at most "
            f"{talk.MAX_CLOCK_SKEW_S:.0f} s are allowed; set the clock, for example by running chrony",
        )


@contextmanager
def _handshake(context: ssl.SSLContext, host: str, port: int) -> Iterator[ssl.SSLSocket]:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A gRPC server hangs up on whoever does not offer HTTP/2.
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            yield connection
    except ssl.SSLCertVerificationError:
        raise
    except (OSError, UnicodeError) as error:
        raise Refusal(
            "unreachable",
            f"no coordinator answers at {host}:{port} ({error.__class__.__name__}); is it running, is the way open?",
        ) from None


def _check_server(authority: bytes, host: str, port: int, clock: Clock) -> None:
    """A second handshake with every check, because gRPC tells no reason when one of them fails."""
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    try:
        with _handshake(context, host, port):
            return
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _OUT_OF_TIME:
            now = datetime.fromtimestamp(clock(), UTC)
            raise Refusal(
                "clock-skew",
                f"by this machine's clock ({now:%Y-%m-%d %H:%M} UTC) the coordinator's certificate is not valid; set "
                "the clock, for example by running chrony, or ask the coordinator's operator to set theirs",
            ) from None
        if error.verify_code in _OTHER_HOST:
            raise Refusal(
                "wrong-name",
                f"the coordinator's certificate is not for {host}; its operator adds {host} to 'advertise' in "
                "coordinator.toml and restarts it",
            ) from None
        # The authority's certificate is public, so anybody can show it; this one could not sign with its key.
        raise _wrong_authority(f"{host}:{port}") from None


def _wrong_authority(address: str) -> Refusal:
    return Refusal(
        "wrong-authority",
        f"somebody else than the coordinator of this invitation answers at {address}; do not go on. Ask the "
        "coordinator's operator, by telephone, whether the address is right, and for a new invitation",
    )


def _shown_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The certificates that the other side showed, DER, unchecked. Public from Python 3.13 on, there before."""
    public = getattr(connection, "get_unverified_chain", None)
    if public is not None:
        return [bytes(der) for der in public() or ()]
    inner = getattr(connection, "_sslobj", None)
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in inner.get_unverified_chain() or ()] if inner else []
