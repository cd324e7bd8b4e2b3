"""The enrollment service under attack, through real gRPC servers on 127.0.0.1."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from enrollment_federation import Answer, Coordinator, Liar, speak

from quorsum import enrollment as talk
from quorsum.client.home import SiteHome
from quorsum.config import CoordinatorConfig
from quorsum.crypto import certificates
from quorsum.errors import KeyMaterialError, UsageError
from quorsum.invitation import split_address
from quorsum.server.authority import SERVER_LIFETIME, ServerCertificate, create_authority, load_authority
from quorsum.server.enrollment import EnrollmentService, Limits


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    running = Coordinator(tmp_path / "coordinator")
    yield running
    running.stop()


def reply(answer: Answer) -> talk.EnrollReply:
    assert answer.status is grpc.StatusCode.OK, answer
    return talk.unpack(talk.EnrollReply, answer.reply)


def member(coordinator: Coordinator, name: str, message: object, home: SiteHome) -> Answer:
    return members_call(coordinator, name, message, home.tls_key(), home.certificate())


def members_call(
    coordinator: Coordinator, name: str, message: object, key: bytes | None, certificate: bytes | None
) -> Answer:
    assert isinstance(message, talk._Message)
    address = coordinator.service.members_address
    return speak(address, coordinator.authority, talk.MEMBERS, name, message, key, certificate)


def admitted(coordinator: Coordinator, site: Liar) -> str:
    """Enrol and approve; the certificate."""
    secret = coordinator.invite(site.site).secret
    assert reply(site.present(coordinator, secret)).state == "pending"
    coordinator.approve(site.site)
    return reply(site.present(coordinator, secret)).certificate


def test_same_request_again_and_again_until_the_operator_decides(coordinator: Coordinator) -> None:
    secret, site = coordinator.invite("a").secret, Liar()
    first, second = reply(site.present(coordinator, secret)), reply(site.present(coordinator, secret))
    assert (first.state, first.certificate) == ("pending", "")
    assert first.words == second.words == coordinator.store.pending()[0].words
    coordinator.store.approve("a", first.words.replace("-", " ").upper(), coordinator.clock.seconds(), "tester")
    third, fourth = reply(site.present(coordinator, secret)), reply(site.present(coordinator, secret))
    assert third.state == "approved"
    assert third.certificate == fourth.certificate
    certificates.check_issued(coordinator.authority.certificate, third.certificate.encode(), site.tls_key, "a")
    span = certificates.expires(third.certificate.encode()) - coordinator.clock.now()
    assert timedelta(hours=71.9) < span <= timedelta(hours=72)
    assert third.fleet_address == "localhost:7403"


def test_invitation_reused_with_other_keys_is_refused_and_shown(coordinator: Coordinator) -> None:
    secret = coordinator.invite("a").secret
    assert reply(Liar().present(coordinator, secret)).state == "pending"
    thief = Liar().present(coordinator, secret)
    assert thief.code == "invitation-used"
    assert [event.action for event in coordinator.store.events()] == ["invite", "enroll", "invitation-used"]
    assert coordinator.store.pending()[0].strangers == 1


def test_a_stolen_invitation_cannot_flood_the_log(coordinator: Coordinator) -> None:
    secret = coordinator.invite("a").secret
    Liar().present(coordinator, secret)
    for _ in range(15):
        assert Liar().present(coordinator, secret).code == "invitation-used"
    assert sum(event.action == "invitation-used" for event in coordinator.store.events()) == 10
    assert coordinator.store.pending()[0].strangers == 15


def test_expired_invitation(coordinator: Coordinator) -> None:
    secret = coordinator.invite("a", hours=1).secret
    coordinator.clock.ahead = timedelta(hours=1.01)
    assert Liar().present(coordinator, secret).code == "invitation-expired"


def test_invitation_that_was_used_in_time_may_wait_for_the_operator(coordinator: Coordinator) -> None:
    secret, site = coordinator.invite("a", hours=1).secret, Liar()
    site.present(coordinator, secret)
    coordinator.clock.ahead = timedelta(hours=30)
    assert reply(site.present(coordinator, secret)).state == "pending"


def test_invented_secret_and_another_sites_name(coordinator: Coordinator) -> None:
    invitation = coordinator.invite("a")
    assert Liar().present(coordinator, os.urandom(16)).code == "invitation-unknown"
    assert Liar(site="b").present(coordinator, invitation.secret).code == "invitation-site"
    assert coordinator.store.pending() == ()


def test_newer_invitation_takes_the_place_of_an_older_one(coordinator: Coordinator) -> None:
    old, new = coordinator.invite("a"), coordinator.invite("a")
    assert Liar().present(coordinator, old.secret).code == "invitation-withdrawn"
    assert reply(Liar().present(coordinator, new.secret)).state == "pending"


def test_without_an_invitation_only_an_approved_site_is_known(coordinator: Coordinator) -> None:
    assert Liar().present(coordinator, b"").code == "unknown-site"


@pytest.mark.parametrize("which", ["identity_proof", "node_proof", "tls_proof"])
def test_every_key_must_sign(coordinator: Coordinator, which: str) -> None:
    secret, site, other = coordinator.invite("a").secret, Liar(), Liar()
    fingerprint = coordinator.authority.fingerprint
    request = site.request(fingerprint, secret)
    forged = request.model_copy(update={which: getattr(other.request(fingerprint, secret), which)})
    answer = site.send(coordinator, forged)
    assert answer.code == "wrong-proof"
    assert which.split("_")[0] in answer.message.lower()
    assert coordinator.store.sites() == ()


@pytest.mark.parametrize("field", ["site", "secret_hex", "identity", "node_key", "request"])
def test_no_field_can_be_moved_from_one_request_into_another(coordinator: Coordinator, field: str) -> None:
    fingerprint = coordinator.authority.fingerprint
    one = Liar("a").request(fingerprint, coordinator.invite("a").secret)
    other = Liar("a" if field != "site" else "b").request(fingerprint, coordinator.invite("b").secret)
    mixed = one.model_copy(update={field: getattr(other, field)})
    assert Liar().send(coordinator, mixed).code in {"wrong-proof", "request-name"}
    assert coordinator.store.sites() == ()


def test_request_signed_for_another_authority(coordinator: Coordinator) -> None:
    request = Liar().request("ab" * 32, coordinator.invite("a").secret)
    assert Liar().send(coordinator, request).code == "wrong-proof"


def test_request_for_a_certificate_of_another_name(coordinator: Coordinator) -> None:
    secret = coordinator.invite("a").secret
    assert Liar(name_in_request="b").present(coordinator, secret).code == "request-name"


def test_request_with_a_broken_signature_of_its_own(coordinator: Coordinator) -> None:
    secret, site = coordinator.invite("a").secret, Liar()
    der = bytearray(ssl.PEM_cert_to_DER_cert(_as_certificate(certificates.make_request(site.tls_key, "a"))))
    der[-1] ^= 1
    pem = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    assert site.present(coordinator, secret, request=pem).code in {"request-unsigned", "request-unreadable"}


def _as_certificate(request: bytes) -> str:
    return request.decode().replace("CERTIFICATE REQUEST", "CERTIFICATE")


def test_unreadable_keys(coordinator: Coordinator) -> None:
    secret = coordinator.invite("a").secret
    assert Liar().present(coordinator, secret, request="nonsense").code == "request-unreadable"
    assert Liar().present(coordinator, secret, node_key="nonsense").code == "unreadable"
    assert Liar().present(coordinator, secret, identity="00" * 64).code == "weak-key"


def test_one_key_for_two_purposes(coordinator: Coordinator) -> None:
    key = certificates.make_key()
    secret = coordinator.invite("a").secret
    assert Liar(node_key=key, tls_key=key).present(coordinator, secret).code == "key-in-use"


@pytest.mark.parametrize("shared", ["identity", "node_key", "tls_key"])
def test_a_key_belongs_to_one_site(coordinator: Coordinator, shared: str) -> None:
    first = Liar("a")
    admitted(coordinator, first)
    second = Liar("b").another(**{shared: getattr(first, shared)})
    assert second.present(coordinator, coordinator.invite("b").secret).code == "key-in-use"


@pytest.mark.parametrize("shared", ["identity", "node_key", "tls_key"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_no_key_of_a_revoked_site_ever_comes_back(coordinator: Coordinator, shared: str, name: str) -> None:
    first = Liar("a")
    admitted(coordinator, first)
    coordinator.store.revoke("a", coordinator.clock.seconds(), "tester", "lost laptop")
    again = Liar(name).another(**{shared: getattr(first, shared)})
    assert again.present(coordinator, coordinator.invite(name).secret).code == "revoked"


def test_name_of_a_revoked_site_comes_back_with_new_keys(coordinator: Coordinator) -> None:
    admitted(coordinator, Liar("a"))
    coordinator.store.revoke("a", coordinator.clock.seconds())
    assert admitted(coordinator, Liar("a"))
    assert [site.state for site in coordinator.store.sites()] == ["revoked", "approved"]


def test_refused_site_may_come_back_with_a_new_invitation(coordinator: Coordinator) -> None:
    secret, site = coordinator.invite("a").secret, Liar()
    site.present(coordinator, secret)
    coordinator.store.refuse("a", coordinator.clock.seconds())
    assert site.present(coordinator, secret).code == "refused"
    assert reply(site.present(coordinator, coordinator.invite("a").secret)).state == "pending"


def test_bounded_number_of_pending_sites(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "home", Limits(most_pending=2))
    try:
        answers = [Liar(n).present(coordinator, coordinator.invite(n).secret) for n in ("a", "b", "c")]
    finally:
        coordinator.stop()
    assert answers[2].status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert answers[2].code == "too-many-pending"


def test_members_port_wants_a_certificate(coordinator: Coordinator) -> None:
    answer = members_call(coordinator, "Roster", talk.RosterRequest(), None, None)
    assert answer.status is grpc.StatusCode.UNAVAILABLE


def test_members_port_wants_a_certificate_of_this_authority(coordinator: Coordinator) -> None:
    key, now = certificates.make_key(), coordinator.clock.now()
    ca_key, ca = certificates.make_authority("lab authority", now)
    certificate = certificates.issue(
        ca_key, ca, certificates.make_request(key, "a"), now, timedelta(hours=1), server=False
    )
    answer = members_call(coordinator, "Roster", talk.RosterRequest(), key, certificate)
    assert answer.status is grpc.StatusCode.UNAVAILABLE


def test_certificate_of_nobody_is_no_member(coordinator: Coordinator) -> None:
    key, authority = certificates.make_key(), coordinator.authority
    request = certificates.make_request(key, "a")
    now = coordinator.clock.now()
    certificate = certificates.issue(
        authority.key, authority.certificate, request, now, timedelta(hours=1), server=False
    )
    assert members_call(coordinator, "Roster", talk.RosterRequest(), key, certificate).code == "not-a-member"


def test_certificate_under_another_members_name_is_no_member(coordinator: Coordinator) -> None:
    site, authority = Liar("a"), coordinator.authority
    admitted(coordinator, site)
    request = certificates.make_request(site.tls_key, "b")
    now = coordinator.clock.now()
    forged = certificates.issue(authority.key, authority.certificate, request, now, timedelta(hours=1), server=False)
    assert members_call(coordinator, "Roster", talk.RosterRequest(), site.tls_key, forged).code == "not-a-member"


def test_calls_of_members_do_not_exist_on_the_enrollment_port(coordinator: Coordinator) -> None:
    address = coordinator.service.enrollment_address
    answer = speak(address, coordinator.authority, talk.MEMBERS, "Roster", talk.RosterRequest())
    assert answer.status is grpc.StatusCode.UNIMPLEMENTED


def test_revoked_site_is_refused_everywhere_at_once(coordinator: Coordinator) -> None:
    site = Liar("a")
    certificate = admitted(coordinator, site).encode()
    roster = members_call(coordinator, "Roster", talk.RosterRequest(), site.tls_key, certificate)
    assert roster.status is grpc.StatusCode.OK
    coordinator.store.revoke("a", coordinator.clock.seconds())
    renewal = talk.RenewRequest(request=certificates.make_request(site.tls_key, "a").decode())
    for name, message in (("Roster", talk.RosterRequest()), ("Renew", renewal), ("Leave", talk.LeaveRequest())):
        answer = members_call(coordinator, name, message, site.tls_key, certificate)
        assert (answer.status, answer.code) == (grpc.StatusCode.PERMISSION_DENIED, "revoked")
    assert site.present(coordinator, b"").code == "revoked"


def test_renewing_with_another_sites_request_or_key(coordinator: Coordinator) -> None:
    a, b = Liar("a"), Liar("b")
    certificate = admitted(coordinator, a).encode()
    admitted(coordinator, b)
    for request in (certificates.make_request(b.tls_key, "b"), certificates.make_request(a.tls_key, "b")):
        message = talk.RenewRequest(request=request.decode())
        assert members_call(coordinator, "Renew", message, a.tls_key, certificate).code == "renewal-key"
    fresh = talk.RenewRequest(request=certificates.make_request(certificates.make_key(), "a").decode())
    assert members_call(coordinator, "Renew", fresh, a.tls_key, certificate).code == "renewal-key"


def test_renewal_gives_a_new_certificate_when_half_of_the_old_is_over(coordinator: Coordinator) -> None:
    site = Liar("a")
    old = admitted(coordinator, site).encode()
    message = talk.RenewRequest(request=certificates.make_request(site.tls_key, "a").decode())
    same = members_call(coordinator, "Renew", message, site.tls_key, old)
    assert talk.unpack(talk.RenewReply, same.reply).certificate.encode() == old
    coordinator.clock.ahead = timedelta(hours=37)
    new = talk.unpack(talk.RenewReply, members_call(coordinator, "Renew", message, site.tls_key, old).reply)
    assert certificates.expires(new.certificate.encode()) > certificates.expires(old) + timedelta(hours=36)


def test_oversize_message(coordinator: Coordinator) -> None:
    address = coordinator.service.enrollment_address
    data = b'{"site": "' + b"a" * talk.MAX_ENROLLMENT_BYTES + b'"}'
    answer = speak(address, coordinator.authority, talk.ENROLLMENT, "Enroll", data)
    assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"[" * 5000, os.urandom(64), b'{"version": 2}'],
    ids=["nothing", "empty", "null", "deep", "random", "another version"],
)
def test_undecodable_message(coordinator: Coordinator, data: bytes) -> None:
    address = coordinator.service.enrollment_address
    answer = speak(address, coordinator.authority, talk.ENROLLMENT, "Enroll", data)
    assert (answer.status, answer.code) == (grpc.StatusCode.INVALID_ARGUMENT, "undecodable")


def test_secret_never_shows(coordinator: Coordinator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = os.urandom(16)
    request = Liar().request(coordinator.authority.fingerprint, secret)
    broken = json.loads(talk.pack(request)) | {"secret_hex": secret.hex() + "0"}
    address = coordinator.service.enrollment_address
    answers = [
        Liar().send(coordinator, request),
        speak(address, coordinator.authority, talk.ENROLLMENT, "Enroll", json.dumps(broken).encode()),
    ]
    assert [a.code for a in answers] == ["invitation-unknown", "undecodable"]
    for text in (caplog.text, repr(request), *(a.message for a in answers)):
        assert secret.hex() not in text


def test_flood_is_stopped(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "home", Limits(rate=0.1, burst=3))
    try:
        codes = [Liar().present(coordinator, b"").code for _ in range(5)]
        assert codes == ["unknown-site"] * 3 + ["rate-limited"] * 2
    finally:
        coordinator.stop()


def test_one_members_flood_is_not_anothers(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "home", Limits(rate=0.01, burst=6))
    try:
        a, b = (coordinator.enroll(name, tmp_path / name)[0] for name in ("a", "b"))
        codes = [member(coordinator, "Roster", talk.RosterRequest(), a).code for _ in range(8)]
        assert codes == [""] * 6 + ["rate-limited"] * 2
        assert member(coordinator, "Roster", talk.RosterRequest(), b).code == ""
    finally:
        coordinator.stop()


def test_guessing_invitations_is_stopped_long_before_other_calls(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "home", Limits(rate=1000, burst=1000, failure_rate=0.01, failure_burst=3))
    try:
        answers = [Liar().present(coordinator, os.urandom(16)) for _ in range(5)]
    finally:
        coordinator.stop()
    assert [a.code for a in answers] == ["invitation-unknown"] * 3 + ["rate-limited"] * 2
    assert answers[3].status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "garbage",
    [os.urandom(4096), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01", b""],
    ids=["random", "http", "half a hello", "nothing"],
)
def test_garbage_on_the_ports_does_no_harm(coordinator: Coordinator, garbage: bytes) -> None:
    service = coordinator.service
    for address in (service.enrollment_address, service.members_address):
        host, port = split_address(address)
        for _ in range(5):
            with socket.create_connection((host, port), 5) as connection:
                connection.sendall(garbage)
                connection.settimeout(0.2)
                try:
                    connection.recv(100)
                except OSError:
                    continue
    assert reply(Liar().present(coordinator, coordinator.invite("a").secret)).state == "pending"


def test_failure_inside_says_nothing_outside(coordinator: Coordinator) -> None:
    coordinator.store.close()
    answer = Liar().present(coordinator, os.urandom(16))
    assert (answer.status, answer.code) == (grpc.StatusCode.INTERNAL, "internal")
    assert str(coordinator.home) not in answer.message


def test_port_that_is_taken(coordinator: Coordinator) -> None:
    _, port = split_address(coordinator.service.members_address)
    config = CoordinatorConfig(federation="lab", enrollment_port=0, members_port=port)
    second = EnrollmentService(coordinator.store, coordinator.authority, config)
    with pytest.raises(UsageError, match=f"{port}.*coordinator.toml"):
        second.start()


def test_server_certificate_is_renewed_without_a_restart(coordinator: Coordinator) -> None:
    certificate = ServerCertificate(coordinator.authority, ["localhost"], coordinator.clock.now, coordinator.home)
    key, first = certificate.current()
    assert certificate.current() == (key, first)
    coordinator.clock.ahead = SERVER_LIFETIME * 0.7
    again, second = certificate.current()
    assert again == key
    assert certificates.expires(second) > certificates.expires(first)
    assert (coordinator.home / "server.crt").read_bytes() == second
    assert stat.S_IMODE((coordinator.home / "server.key").stat().st_mode) == 0o600
    restarted = ServerCertificate(coordinator.authority, ["localhost"], coordinator.clock.now, coordinator.home)
    assert restarted.current()[0] == key


def test_authority_on_disk(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.home
    assert load_authority(home) == coordinator.authority
    assert "PRIVATE" not in repr(coordinator.authority)
    with pytest.raises(UsageError, match="lock every site out"):
        create_authority(home, "lab", coordinator.clock.now())
    (home / "ca.key").chmod(0o640)
    with pytest.raises(KeyMaterialError, match="chmod 600"):
        load_authority(home)
    (home / "ca.key").chmod(0o600)
    (home / "ca.key").write_bytes(certificates.make_key())
    with pytest.raises(KeyMaterialError, match="do not fit"):
        load_authority(home)
    with pytest.raises(KeyMaterialError, match="coordinator init --home NEW-HOME"):
        load_authority(tmp_path / "nowhere")


def test_relays_are_for_other_members_of_this_epoch(coordinator: Coordinator) -> None:
    a, b = Liar("a"), Liar("b")
    certificate = admitted(coordinator, a).encode()
    admitted(coordinator, b)
    pairs = [(site.site, site.identity.public().hex) for site in (a, b)]
    epoch = talk.key_epoch(pairs)
    message = talk.PutKeyRequest(epoch=epoch, recipient="b", sealed="A" * 64, signature="0" * 128)

    def put(**changes: str) -> Answer:
        changed = message.model_copy(update=changes)
        sealed = talk.decode_base64(changed.sealed) if "!" not in changed.sealed else b""
        statement = talk.relay_statement(changed.epoch, "a", changed.recipient, sealed)
        changed = changed.model_copy(update={"signature": a.identity.sign(talk.RELAY, *statement).hex()})
        return members_call(coordinator, "PutKey", changed, a.tls_key, certificate)

    assert put().status is grpc.StatusCode.OK
    assert put(epoch="ab" * 32).code == "epoch-over"
    assert put(recipient="a").code == "unknown-recipient"
    assert put(recipient="c").code == "unknown-recipient"
    assert put(sealed="A" * 63 + "!").code == "undecodable"
