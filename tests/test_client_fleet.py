"""A site's connection: it comes back by itself from everything, and says where it stands."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fleet_harness import Authority, Fleet, Site, app_folder, data_of, echo, free_port, raw, running, until
from flwr.app import Message

from quorsum import bundles, flower
from quorsum.client import fleet as client
from quorsum.crypto import certificates
from quorsum.errors import KeyMaterialError
from quorsum.server.fleet import FleetGrid


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running(tmp_path / "fleet") as made:
        yield made


@pytest.fixture
def bundle(tmp_path: Path) -> bytes:
    return bundles.build(app_folder(tmp_path / "app"))


def grid_of(fleet: Fleet, bundle: bytes) -> FleetGrid:
    return fleet.server.grid(fleet.server.open_run(bundle, {}))


def exchange(grid: FleetGrid, site: Site, data: bytes = b"question") -> bytes:
    (reply,) = grid.send_and_receive([Message(raw(data), site.node_id, "train")], timeout=20)
    return data_of(reply)


def connected(site: Site, times: int = 1, seconds: float = 30) -> None:
    until(lambda: site.states.count(client.CONNECTED) >= times, seconds)


# --- coming back ---


def test_sites_come_back_to_a_coordinator_that_began_anew(fleet: Fleet, bundle: bytes) -> None:
    for _ in range(3):
        fleet.add_site().run_here(fleet.address, echo)
    until(lambda: fleet.online() == 3)
    before = [site.node_id for site in fleet.sites]
    fleet.restart()
    until(lambda: fleet.online() == 3)
    assert set(before).isdisjoint(site.node_id for site in fleet.sites)
    grid = grid_of(fleet, bundle)
    for site in fleet.sites:
        assert exchange(grid, site) == b"question"
        assert set(site.states) <= {client.CONNECTED, client.CONNECTING}


def test_a_coordinator_that_is_away_is_waited_for(tmp_path: Path, bundle: bytes) -> None:
    made = Fleet(tmp_path / "fleet")
    site = made.add_site()
    site.run_here(made.address, echo)
    until(lambda: site.states == [client.CONNECTING])
    time.sleep(0.5)
    try:
        made.server.start()
        connected(site)
        assert exchange(grid_of(made, bundle), site) == b"question"
    finally:
        site.end()
        made.server.stop()


def test_the_same_listener_can_stop_and_start(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    connected(site)
    grid = grid_of(fleet, bundle)
    fleet.server.stop()
    until(lambda: site.states[-1] == client.CONNECTING)
    fleet.server.start()
    connected(site, 2)
    assert exchange(grid, site) == b"question"


def test_a_killed_site_waits_for_its_former_lease(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()
    former = site.client(fleet.address)
    former.activate()
    grid = grid_of(fleet, bundle)
    first = grid.activation(site.node_id)
    started = time.monotonic()
    site.run_here(fleet.address, echo)
    connected(site)
    assert site.states == [client.LEASED, client.CONNECTED]
    assert 1.0 < time.monotonic() - started < 8.0
    assert grid.activation(site.node_id) != first
    assert exchange(grid, site) == b"question"


def test_a_site_that_remembers_ends_the_lease_of_its_former_self(tmp_path: Path, bundle: bytes) -> None:
    with running(tmp_path / "fleet", lease=60.0) as fleet:
        site = fleet.add_site()
        node = site.client(fleet.address).activate()
        (site.home / "connected").write_text(str(node))
        grid = grid_of(fleet, bundle)
        first = grid.activation(site.node_id)
        site.run_here(fleet.address, echo, memory=site.home / "connected")
        connected(site, seconds=5)
        assert site.states == [client.CONNECTED]
        assert grid.activation(site.node_id) not in (None, first)
        assert (site.home / "connected").read_text() == str(node)
        site.end()
        assert (site.home / "connected").read_text() == ""


@pytest.mark.parametrize("noted", ["", "nonsense", "12345", "9" * 60, "-5"])
def test_what_is_remembered_may_be_anything(fleet: Fleet, noted: str) -> None:
    site = fleet.add_site()
    (site.home / "connected").write_text(noted)
    site.run_here(fleet.address, echo, memory=site.home / "connected")
    connected(site, seconds=5)


def test_where_nothing_can_be_remembered_is_said(fleet: Fleet) -> None:
    site = fleet.add_site()
    for path in (site.home, site.home / "nowhere" / "connected"):
        with pytest.raises(KeyMaterialError, match=f"cannot use {path}: "):
            client.serve(fleet.address, site.credentials, echo, stop=threading.Event(), memory=path)


def test_a_note_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    former = client._Former(tmp_path)
    former.note(7)
    assert former.node_id == 7


def test_only_one_process_of_a_site_connects(fleet: Fleet) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo, memory=site.home / "connected")
    connected(site)
    states: list[str] = []
    stop = threading.Event()
    options = {"stop": stop, "on_state": states.append, "memory": site.home / "connected"}
    second = threading.Thread(target=client.serve, args=(fleet.address, site.credentials, echo), kwargs=options)
    second.start()
    until(lambda: states == [client.ANOTHER])
    stop.set()
    second.join(10)
    assert site.states == [client.CONNECTED]


def test_a_long_piece_of_work_does_not_cost_the_lease(tmp_path: Path, bundle: bytes) -> None:
    with running(tmp_path / "fleet", lease=1.5) as fleet:
        site = fleet.add_site()

        def slow(message: Message, bundle: bytes, run: flower.Run) -> Message:
            time.sleep(4)
            return echo(message, bundle, run)

        site.run_here(fleet.address, slow, beat=0.3)
        connected(site)
        grid = grid_of(fleet, bundle)
        first = grid.activation(site.node_id)
        assert exchange(grid, site) == b"question"
        assert grid.activation(site.node_id) == first


def test_work_that_outlives_the_coordinator_is_dropped(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()
    begun, go = threading.Event(), threading.Event()

    def slow(message: Message, bundle: bytes, run: flower.Run) -> Message:
        begun.set()
        go.wait(20)
        return echo(message, bundle, run)

    site.run_here(fleet.address, slow)
    connected(site)
    grid_of(fleet, bundle).push_messages([Message(raw(b"old"), site.node_id, "train")])
    begun.wait(10)
    fleet.restart()
    go.set()
    connected(site, 2)
    assert exchange(grid_of(fleet, bundle), site, b"new") == b"new"


def test_a_site_that_stops_leaves(fleet: Fleet) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    connected(site)
    site.end()
    assert fleet.online() == 0
    site.run_here(fleet.address, echo)
    connected(site, 2)
    assert client.LEASED not in site.states


# --- being refused ---


def test_a_stranger_is_told_and_let_in_when_it_is_approved(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(client._PAUSES, client.STRANGER, 0.3)
    site = fleet.add_site(register=False)
    site.run_here(fleet.address, echo)
    until(lambda: site.states == [client.STRANGER])
    site.node_id = fleet.server.register(site.public_node_key, site.name)
    connected(site)


def test_a_certificate_that_has_run_out_is_told_and_a_new_one_is_taken(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(client._PAUSES, client.CERTIFICATE, 0.3)
    site = fleet.add_site()
    good = (site.home / "tls.crt").read_bytes(), (site.home / "tls.key").read_bytes()
    old = fleet.authority.issue("old", lifetime=timedelta(hours=1), ago=timedelta(hours=2))
    (site.home / "tls.crt").write_bytes(old[0].read_bytes())
    (site.home / "tls.key").write_bytes(old[1].read_bytes())
    site.run_here(fleet.address, echo)
    until(lambda: site.states == [client.CERTIFICATE])
    time.sleep(1)
    assert site.states == [client.CERTIFICATE]
    # Between these two writes certificate and key do not fit; that passes too.
    (site.home / "tls.crt").write_bytes(good[0])
    time.sleep(0.5)
    (site.home / "tls.key").write_bytes(good[1])
    connected(site)
    assert site.states == [client.CERTIFICATE, client.CONNECTED]


def test_a_coordinator_of_another_authority_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    site = fleet.add_site()
    other = Authority(tmp_path / "other")
    (site.home / "ca.crt").write_bytes(other.certificate.read_bytes())
    site.run_here(fleet.address, echo)
    until(lambda: site.states == [client.CERTIFICATE])


def test_a_coordinator_under_another_name_is_refused(fleet: Fleet) -> None:
    site = fleet.add_site()
    site.run_here(f"127.0.0.2:{fleet.port}", echo)
    until(lambda: site.states == [client.CONNECTING] or site.states == [client.CERTIFICATE])


@pytest.mark.parametrize(
    ("skew", "state"), [(-1000.0, client.CLOCK), (1000.0, client.CLOCK), (-100.0, client.CONNECTED)]
)
def test_a_clock_that_is_off_is_told(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, skew: float, state: str) -> None:
    # The signed time is off, as it would be with that clock; what the clock itself shows is compared with the answer.
    monkeypatch.setattr(client.time, "time", lambda real=time.time: real() + skew)
    site = fleet.add_site()
    site.run_here(fleet.address, echo, clock_offset=lambda: skew)
    until(lambda: site.states == [state])


def test_a_known_difference_of_clocks_is_corrected(fleet: Fleet, tmp_path: Path, bundle: bytes) -> None:
    site = fleet.add_site()
    site.run_in_process(fleet.address, bundles.digest(bundle), {"partition-id": 0}, ahead=7200)
    until(lambda: fleet.online() == 1)
    message = Message(raw(b"x"), site.node_id, "evaluate", ttl=60)
    (reply,) = grid_of(fleet, bundle).send_and_receive([message], timeout=20)
    assert reply.content.metric_records["metrics"]["accuracy"] == 0.75


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    site = Site("site", tmp_path / "home", Authority(tmp_path / "authority"))
    for name in ("tls.crt", "ca.crt", "node.key"):
        content = (site.home / name).read_bytes()
        (site.home / name).unlink()
        with pytest.raises(KeyMaterialError, match="enroll"):
            client.serve(f"127.0.0.1:{free_port()}", site.credentials, echo, stop=threading.Event())
        (site.home / name).write_bytes(content)


def test_a_node_key_of_another_kind_is_named(tmp_path: Path) -> None:
    site = Site("site", tmp_path / "home", Authority(tmp_path / "authority"))
    (site.home / "node.key").write_bytes(b"nothing")
    with pytest.raises(KeyMaterialError, match="node key"):
        client.serve(f"127.0.0.1:{free_port()}", site.credentials, echo, stop=threading.Event())


def test_another_node_key_than_the_registered_one_is_refused(fleet: Fleet) -> None:
    site = fleet.add_site()
    (site.home / "node.key").write_bytes(certificates.make_key())
    site.run_here(fleet.address, echo)
    until(lambda: site.states == [client.STRANGER])


# --- what happens while it is connected ---


def test_what_the_handler_raises_stays_at_the_site(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()

    def broken(message: Message, bundle: bytes, run: flower.Run) -> Message:
        raise ValueError("patient 4711 has diabetes")

    site.run_here(fleet.address, broken)
    connected(site)
    grid = grid_of(fleet, bundle)
    (reply,) = grid.send_and_receive([Message(raw(b"x"), site.node_id, "train")], timeout=20)
    assert reply.error.code == 2
    assert "4711" not in reply.error.reason
    assert site.states == [client.CONNECTED]


def test_a_run_that_ends_while_its_message_is_in_work_does_no_harm(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()
    begun, go = threading.Event(), threading.Event()

    def slow(message: Message, bundle: bytes, run: flower.Run) -> Message:
        begun.set()
        go.wait(20)
        return echo(message, bundle, run)

    site.run_here(fleet.address, slow)
    connected(site)
    handle = fleet.server.open_run(bundle, {})
    fleet.server.grid(handle).push_messages([Message(raw(b"x"), site.node_id, "train")])
    begun.wait(10)
    fleet.server.close_run(handle)
    go.set()
    assert exchange(grid_of(fleet, bundle), site, b"next") == b"next"
    assert site.states == [client.CONNECTED]


def test_many_messages_in_a_row(fleet: Fleet, bundle: bytes) -> None:
    site = fleet.add_site()
    site.run_here(fleet.address, echo)
    connected(site)
    grid = grid_of(fleet, bundle)
    started = time.monotonic()
    for k in range(20):
        assert exchange(grid, site, os.urandom(10) + bytes([k]))[-1] == k
    assert time.monotonic() - started < 15
    assert site.states == [client.CONNECTED]
