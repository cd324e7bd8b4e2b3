"""A site that joins, stays, is sent away, and meets coordinators that lie."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from enrollment_federation import Coordinator
from filelock import FileLock

from quorsum import enrollment as talk
from quorsum.client.enrollment import (
    Waiting,
    _shown_chain,
    enroll,
    fetch_authority,
    fetch_key,
    leave,
    load_shared_key,
    renew,
    renewal_due,
    roster,
    share_key,
)
from quorsum.client.home import SiteHome
from quorsum.crypto import certificates, generate_site_key
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal
from quorsum.invitation import decode, encode, split_address
from quorsum.server.authority import Authority


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    running = Coordinator(tmp_path / "coordinator")
    yield running
    running.stop()


def refused(code: str, call: Any, *arguments: Any) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        call(*arguments)
    assert refusal.value.code == code, refusal.value
    return refusal.value


def quiet(waiting: Waiting) -> None:
    """Nobody listens."""


@contextmanager
def lying_server(authority: Authority, calls: dict[str, Any], now: datetime | None = None) -> Iterator[str]:
    """A coordinator with a proper certificate that answers what a test wants."""
    key = certificates.make_key()
    leaf = certificates.issue(
        authority.key,
        authority.certificate,
        certificates.make_request(key, "coordinator"),
        now or datetime.now(UTC),
        timedelta(days=1),
        hosts=["localhost"],
        server=True,
    )
    server = grpc.server(ThreadPoolExecutor(2))
    for service in (talk.ENROLLMENT, talk.MEMBERS):
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(lambda data, context, answer=answer: talk.pack(answer(data)))
            for name, answer in calls.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, leaf + authority.certificate)]))
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0)


def test_a_site_joins_with_one_pasted_string(coordinator: Coordinator, tmp_path: Path) -> None:
    text = encode(coordinator.invite("hospital-a"))
    home, said = SiteHome(tmp_path / "a"), []

    def read_out(waiting: Waiting) -> None:
        said.append(waiting)
        coordinator.store.approve("hospital-a", waiting.words, time.time(), "tester")

    config = enroll(decode(text), home, read_out, threading.Event(), poll_s=0.05)
    assert [waiting.state for waiting in said] == ["pending"]
    assert "quorsum coordinator approve hospital-a" in said[0].message
    assert config == home.config()
    assert (config.federation, config.fleet_address) == ("lab", "localhost:7403")
    certificates.check_issued(home.authority(), home.certificate(), home.tls_key(), "hospital-a")
    files = [path for path in home.path.iterdir() if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert [member.site for member in roster(home)] == ["hospital-a"]


def test_enrolling_again_keeps_keys_and_what_the_administrator_set(coordinator: Coordinator, tmp_path: Path) -> None:
    invitation, home = coordinator.invite("a"), SiteHome(tmp_path / "a")
    stop = threading.Event()
    stop.set()
    refused("stopped", enroll, invitation, home, quiet, stop)
    identity, words = home.identity().public(), coordinator.store.pending()[0].words
    coordinator.store.approve("a", words, time.time())
    config = enroll(invitation, home, quiet, stop)
    home.write_config(config.model_copy(update={"allow": ["ab" * 32], "minimum_sites": 5}))
    again = enroll(invitation, home, quiet, stop)
    assert (again.allow, again.minimum_sites) == (["ab" * 32], 5)
    assert home.identity().public() == identity


def test_somebody_else_answers(coordinator: Coordinator, tmp_path: Path) -> None:
    forged = replace(coordinator.invite("a"), fingerprint="ab" * 32)
    assert "do not go on" in str(refused("wrong-authority", fetch_authority, forged))
    home = SiteHome(tmp_path / "a")
    refused("wrong-authority", enroll, forged, home, quiet, threading.Event())
    assert not home.authority_file.exists()
    assert coordinator.store.sites() == ()


def test_the_right_authority_shown_by_somebody_without_its_key(coordinator: Coordinator, tmp_path: Path) -> None:
    """The authority's certificate is public: anybody can append it to a chain."""
    key, ca = certificates.make_authority("forger", coordinator.clock.now())
    leaf_key = certificates.make_key()
    leaf = certificates.issue(
        key,
        ca,
        certificates.make_request(leaf_key, "coordinator"),
        coordinator.clock.now(),
        timedelta(days=1),
        hosts=["localhost"],
        server=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(leaf + coordinator.authority.certificate + leaf_key)
    context.load_cert_chain(chain)
    with tls_server(context) as port:
        invitation = replace(coordinator.invite("a"), address=f"localhost:{port}")
        refused("wrong-authority", fetch_authority, invitation)


@contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    done = threading.Event()

    def accept() -> None:
        while not done.is_set():
            try:
                plain, _ = listener.accept()
                plain.settimeout(5)
                context.wrap_socket(plain, server_side=True).close()
            except OSError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        done.set()
        thread.join()
        listener.close()


def test_shown_chain_is_leaf_then_authority(coordinator: Coordinator) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    address = split_address(coordinator.service.enrollment_address)
    with socket.create_connection(address) as plain, context.wrap_socket(plain) as connection:
        chain = _shown_chain(connection)
        assert chain[0] == connection.getpeercert(binary_form=True)
    assert chain[1:] == [ssl.PEM_cert_to_DER_cert(coordinator.authority.certificate.decode())]


def test_name_that_is_not_in_the_servers_certificate(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "home", advertise=["coordinator.example"])
    try:
        port = split_address(coordinator.service.enrollment_address)[1]
        invitation = replace(coordinator.invite("a"), address=f"127.0.0.1:{port}")
        assert "advertise" in str(refused("wrong-name", fetch_authority, invitation))
    finally:
        coordinator.stop()


def test_clock_that_is_years_off(coordinator: Coordinator) -> None:
    with lying_server(coordinator.authority, {}, datetime.now(UTC) - timedelta(days=900)) as address:
        invitation = replace(coordinator.invite("a"), address=address)
        assert "clock" in str(refused("clock-skew", fetch_authority, invitation))


@pytest.mark.parametrize(("ahead", "word"), [(300, "behind"), (-300, "ahead of")])
def test_clock_that_is_minutes_off(coordinator: Coordinator, tmp_path: Path, ahead: int, word: str) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    coordinator.clock.ahead = timedelta(seconds=ahead)
    error = refused("clock-skew", roster, home)
    assert word in str(error)
    assert "chrony" in str(error)
    invitation = coordinator.invite("b")
    refused("clock-skew", enroll, invitation, SiteHome(tmp_path / "b"), quiet, threading.Event())
    coordinator.clock.ahead = timedelta(seconds=ahead * 2 // 3)
    assert roster(home)


def test_clock_is_compared_in_refusals_too(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.clock.ahead = timedelta(hours=100)
    invitation = replace(coordinator.invite("a"), secret=os.urandom(16))
    refused("clock-skew", enroll, invitation, SiteHome(tmp_path / "b"), quiet, threading.Event())


def test_coordinator_that_is_not_there_yet(coordinator: Coordinator, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    invitation = replace(coordinator.invite("a"), address=f"127.0.0.1:{port}")
    refused("unreachable", fetch_authority, invitation)
    said: list[Waiting] = []
    stop = threading.Event()

    def once(waiting: Waiting) -> None:
        said.append(waiting)
        stop.set()

    refused("stopped", enroll, invitation, SiteHome(tmp_path / "a"), once, stop)
    assert [waiting.state for waiting in said] == ["unreachable"]


def test_member_whose_coordinator_is_gone_or_not_the_same(coordinator: Coordinator, tmp_path: Path) -> None:
    home, config = coordinator.enroll("a", tmp_path / "a")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home.write_config(config.model_copy(update={"members_address": f"localhost:{port}"}))
    refused("unreachable", roster, home)
    forger = Authority(*certificates.make_authority("lab authority", datetime.now(UTC)))
    with lying_server(forger, {}) as address:
        home.write_config(config.model_copy(update={"members_address": address}))
        refused("wrong-authority", roster, home)
    with lying_server(coordinator.authority, {}, datetime.now(UTC) - timedelta(days=900)) as address:
        home.write_config(config.model_copy(update={"members_address": address}))
        refused("clock-skew", roster, home)


def test_coordinator_that_holds_other_keys(coordinator: Coordinator, tmp_path: Path) -> None:
    lie = talk.EnrollReply(
        state="pending",
        words="a-b-c-d-e-f",
        certificate="",
        members_address="localhost:1",
        fleet_address="localhost:2",
        federation="lab",
        server_time=time.time(),
    )
    with lying_server(coordinator.authority, {"Enroll": lambda _: lie}) as address:
        invitation = replace(coordinator.invite("a"), address=address)
        refused("wrong-words", enroll, invitation, SiteHome(tmp_path / "a"), quiet, threading.Event())


@pytest.mark.parametrize("defect", ["name", "key", "authority", "text"])
def test_coordinator_that_hands_out_a_wrong_certificate(coordinator: Coordinator, tmp_path: Path, defect: str) -> None:
    home = SiteHome(tmp_path / "a")
    home.create()
    key = certificates.make_key() if defect == "key" else home.tls_key()
    request = certificates.make_request(key, "b" if defect == "name" else "a")
    ca = coordinator.authority
    if defect == "authority":
        ca = Authority(*certificates.make_authority("x", coordinator.clock.now()))
    made = certificates.issue(
        ca.key, ca.certificate, request, coordinator.clock.now(), timedelta(hours=1), server=False
    ).decode()

    def answer(data: bytes) -> talk.EnrollReply:
        asked = talk.unpack(talk.EnrollRequest, data)
        words = talk.words_of(coordinator.authority.fingerprint, "a", asked.identity, talk.Keys.of(asked))
        return talk.EnrollReply(
            state="approved",
            words=words,
            certificate="nonsense" if defect == "text" else made,
            members_address="localhost:1",
            fleet_address="localhost:2",
            federation="lab",
            server_time=time.time(),
        )

    with lying_server(coordinator.authority, {"Enroll": answer}) as address:
        invitation = replace(coordinator.invite("a"), address=address)
        with pytest.raises(CoordinatorFault) as fault:
            enroll(invitation, home, quiet, threading.Event())
    assert fault.value.code == "wrong-certificate"
    assert not home.certificate_file.exists()


def test_home_of_another_site_or_federation(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    refused("other-site", enroll, coordinator.invite("b"), home, quiet, threading.Event())
    other = replace(coordinator.invite("b"), fingerprint="cd" * 32)
    refused("other-federation", enroll, other, home, quiet, threading.Event())


def test_certificate_is_renewed_when_two_thirds_are_over(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    first = home.certificate()
    assert renew(home) == certificates.expires(first)
    assert not renewal_due(first, time.time() + 47 * 3600)
    coordinator.clock.ahead = timedelta(hours=49)
    assert renewal_due(first, coordinator.clock.seconds())
    until = renew(home, coordinator.clock.seconds)
    assert until > certificates.expires(first) + timedelta(hours=48)
    assert certificates.expires(home.certificate()) == until


def test_site_that_was_away_until_its_certificate_ran_out(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    first = home.certificate()
    coordinator.clock.ahead = timedelta(days=15)
    until = renew(home, coordinator.clock.seconds)
    assert until > certificates.expires(first) + timedelta(days=14)


def test_revoked_site_is_told_so(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    coordinator.store.revoke("a", time.time())
    refused("revoked", roster, home)
    for days in (2.5, 15):
        coordinator.clock.ahead = timedelta(days=days)
        error = refused("revoked", renew, home, coordinator.clock.seconds)
    assert "never accepted again" in str(error)


def test_site_that_leaves(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    leave(home)
    refused("left", roster, home)
    row = coordinator.store.site("a")
    assert row is not None
    assert row.state == "left"


def test_home_that_was_never_enrolled(tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "a")
    for call in (renew, roster, leave, fetch_key):
        assert f"quorsum site enroll --home {home.path}" in str(refused("not-enrolled", call, home))


def test_answer_that_is_none(coordinator: Coordinator, tmp_path: Path) -> None:
    home, config = coordinator.enroll("a", tmp_path / "a")
    with lying_server(coordinator.authority, {"Roster": lambda _: talk.RosterRequest()}) as address:
        home.write_config(config.model_copy(update={"members_address": address}))
        with pytest.raises(CoordinatorFault) as fault:
            roster(home)
        assert fault.value.code == "undecodable"
        refused("call-failed", leave, home)


def test_coordinator_that_exchanges_a_members_key(coordinator: Coordinator, tmp_path: Path) -> None:
    home, config = coordinator.enroll("a", tmp_path / "a")
    coordinator.enroll("b", tmp_path / "b")
    members = list(roster(home))
    stranger = talk.Member(site="b", identity=SiteHome(tmp_path / "x").identity().public().hex, state="approved")
    lie = talk.RosterReply(members=[members[0], stranger], server_time=time.time())
    with lying_server(coordinator.authority, {"Roster": lambda _: lie}) as address:
        home.write_config(config.model_copy(update={"members_address": address}))
        with pytest.raises(CoordinatorFault) as fault:
            roster(home)
    assert fault.value.code == "roster-changed"
    assert list(home.roster()) == members


def test_a_list_that_comes_late_is_not_taken_for_a_lie(coordinator: Coordinator, tmp_path: Path) -> None:
    """A thread asked before a member joined, another one after it; the answer of the first takes its time."""
    home, config = coordinator.enroll("a", tmp_path / "a")
    old = list(roster(home))
    coordinator.enroll("b", tmp_path / "b")
    new = list(roster(home))
    home.roster_file.unlink()
    home.pin(old, "a")
    asked = threading.Event()

    def answer(_: object) -> talk.RosterReply:
        if asked.is_set():
            return talk.RosterReply(members=new, server_time=time.time())
        asked.set()
        time.sleep(1.0)
        return talk.RosterReply(members=old, server_time=time.time())

    with lying_server(coordinator.authority, {"Roster": answer}) as address, ThreadPoolExecutor(2) as pool:
        home.write_config(config.model_copy(update={"members_address": address}))
        first = pool.submit(roster, home)
        assert asked.wait(20)
        second = pool.submit(roster, home)
        assert [list(first.result(30)), list(second.result(30))] == [old, new]
    assert list(home.roster()) == new


def test_who_waits_too_long_for_the_list_is_told_so(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    monkeypatch.setattr("quorsum.client.enrollment.TIMEOUT_S", 0.1)
    with FileLock(home.path / "roster.lock"):
        refused("roster-busy", roster, home)
    (home.path / "roster.lock").unlink()
    (home.path / "roster.lock").mkdir()
    refused("no-home", roster, home)


def test_members_key_changes_after_it_was_revoked(coordinator: Coordinator, tmp_path: Path) -> None:
    home, _ = coordinator.enroll("a", tmp_path / "a")
    coordinator.enroll("b", tmp_path / "b")
    roster(home)
    coordinator.store.revoke("b", time.time())
    coordinator.enroll("b", tmp_path / "b2")
    assert [(m.site, m.state) for m in roster(home)] == [("a", "approved"), ("b", "revoked"), ("b", "approved")]


def test_shared_key_goes_round_and_has_one_epoch(coordinator: Coordinator, tmp_path: Path) -> None:
    a, _ = coordinator.enroll("a", tmp_path / "a")
    b, _ = coordinator.enroll("b", tmp_path / "b")
    key = generate_site_key(os.urandom)
    refused("epoch-over", share_key, a, key)  # the roster with b in it was never looked at
    refused("no-key-yet", fetch_key, b)
    with pytest.raises(KeyMaterialError, match=f"run here: quorsum site fetch-key --home {b.path}") as none:
        load_shared_key(b)
    assert none.value.code == "no-key"
    epoch = share_key(a, key)
    assert fetch_key(b).key_id == load_shared_key(a).key_id == load_shared_key(b).key_id == key.key_id
    assert a.epoch() == b.epoch() == epoch
    refused("key-already-shared", share_key, b, generate_site_key(os.urandom))

    c, _ = coordinator.enroll("c", tmp_path / "c")
    roster(a)
    with pytest.raises(KeyMaterialError) as stale:
        load_shared_key(a)
    assert stale.value.code == "key-stale"
    assert f"run here: quorsum site fetch-key --home {a.path}" in str(stale.value)
    refused("key-used-before", share_key, a, key)
    share_key(a, generate_site_key(os.urandom))
    assert fetch_key(c).key_id == fetch_key(b).key_id == load_shared_key(a).key_id != key.key_id

    coordinator.store.revoke("c", time.time())
    roster(b)
    with pytest.raises(KeyMaterialError):
        load_shared_key(b)
    refused("revoked", fetch_key, c)


def test_key_that_the_coordinator_made_itself(coordinator: Coordinator, tmp_path: Path) -> None:
    a, config = coordinator.enroll("a", tmp_path / "a")
    coordinator.enroll("b", tmp_path / "b")
    members = roster(a)
    info = talk.relay_info(a.epoch(), "b", "a")
    sealed = a.identity().public().seal(generate_site_key(os.urandom).to_bytes(), info)
    lie = talk.GetKeyReply(sender="b", sealed=talk.encode_base64(sealed), signature="00" * 64, server_time=time.time())
    truth = talk.RosterReply(members=list(members), server_time=time.time())
    with lying_server(coordinator.authority, {"GetKey": lambda _: lie, "Roster": lambda _: truth}) as address:
        a.write_config(config.model_copy(update={"members_address": address}))
        with pytest.raises(CoordinatorFault) as fault:
            fetch_key(a)
    assert fault.value.code == "wrong-sender"
    assert not a.suite_key_file.exists()
