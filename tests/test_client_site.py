"""The site's process: trains, keeps itself in order, survives what can be survived, and stops where it must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleet_harness import app_folder, until
from flwr.app import Array, ArrayRecord, Message, RecordDict
from site_federation import Federation, Running, federation, site

from quorsum import bundles, envelope, flower, messages
from quorsum.client import enrollment, settings
from quorsum.client.home import SiteHome
from quorsum.client.site import _Workers, member_words, read_status, roster_check, run_site
from quorsum.crypto.identity import Identity
from quorsum.crypto.suite import RoundContext
from quorsum.enrollment import Member
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal, UsageError
from quorsum.server import QuorumStrategy
from quorsum.server.fleet import FleetGrid

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "hospital"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path) as made:
        yield made


def started(lab: Federation, name: str, *allow: str) -> Running:
    home = lab.member(name, *allow)
    running = lab.start("start", "--home", home)
    running.wait_for("connected to")
    return running


def grid_of(lab: Federation, app: Path, **config: Any) -> FleetGrid:
    return lab.fleet.grid(lab.fleet.open_run(bundles.build(app), config))


def evaluated(lab: Federation, grid: FleetGrid, name: str) -> Message:
    """Ask a site to evaluate a model of one number."""
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1, np.float32))})})
    (reply,) = grid.send_and_receive([Message(content, lab.nodes[name], "evaluate")], timeout=30)
    return reply


def code_of(reply: Message) -> str:
    fault, _ = messages.unpack(reply.content)
    assert isinstance(fault, messages.Fault)
    return fault.code


# --- who takes part ---

PEOPLE = {name: Identity.generate(os.urandom) for name in ("a", "b", "c", "late")}


def member(name: str, **changes: Any) -> Member:
    return Member(**{"site": name, "identity": PEOPLE[name].public().hex, "state": "approved", **changes})


@pytest.fixture
def pinned(tmp_path: Path) -> SiteHome:
    home = SiteHome(tmp_path / "home")
    home.create()
    home.identity_file.write_bytes(PEOPLE["a"].to_bytes())
    home.identity_file.chmod(0o600)
    home.pin([member("a"), member("b"), member("c")], "a")
    return home


def context(*sites: str, **changes: Any) -> RoundContext:
    keys = tuple(PEOPLE[site].public().hex for site in sites)
    made = RoundContext(run="r", round=1, attempt=1, sites=sites, dimension=5, tolerate=0, unit=1.0, keys=keys)
    return replace(made, **changes)


@pytest.mark.parametrize("fine", [context("a", "b", "c"), context("a", "c"), context("a", "b", keys=())])
def test_known_members_with_their_keys_take_part(pinned: SiteHome, fine: RoundContext) -> None:
    roster_check(pinned, refresh=lambda: pytest.fail("nothing to ask"))(fine)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (context("a", "b", "late"), "late"),
        (context("a", "b", "late", keys=()), "late"),
        (context("a", "b", keys=(PEOPLE["a"].public().hex, PEOPLE["late"].public().hex)), "b"),
        (context("a", "b", keys=(PEOPLE["a"].public().hex,)), "a, b"),
    ],
    ids=["stranger", "stranger without keys", "another key", "a key too few"],
)
def test_a_stranger_is_refused_by_name(pinned: SiteHome, bad: RoundContext, named: str) -> None:
    asked: list[int] = []
    with pytest.raises(CoordinatorFault, match=f"the round lists {named}, which this site does not know") as caught:
        roster_check(pinned, refresh=lambda: asked.append(1))(bad)
    assert (caught.value.code, asked) == ("unknown-site", [1])


def test_who_was_revoked_is_a_stranger(pinned: SiteHome) -> None:
    pinned.pin([member("a"), member("b"), member("c", state="revoked")], "a")
    with pytest.raises(CoordinatorFault, match="lists c,"):
        roster_check(pinned, refresh=lambda: None)(context("a", "b", "c"))


def test_who_has_just_joined_is_asked_for_once_in_a_while(pinned: SiteHome) -> None:
    moment, asked = [100.0], []
    check = roster_check(pinned, refresh=lambda: asked.append(moment[0]), monotonic=lambda: moment[0])
    for when in (100.0, 101.0, 104.9, 105.0):
        moment[0] = when
        with pytest.raises(CoordinatorFault):
            check(context("a", "late"))
    assert asked == [100.0, 105.0]
    everybody = [member("a"), member("b"), member("c"), member("late")]
    check = roster_check(pinned, refresh=lambda: pinned.pin(everybody, "a"))
    check(context("a", "late"))


def test_a_list_that_cannot_be_asked_for_or_cannot_be_right(pinned: SiteHome) -> None:
    def away() -> None:
        raise Refusal("unreachable", "away")

    def wrong() -> None:
        pinned.pin([member("a"), member("late")], "a")

    with pytest.raises(CoordinatorFault, match="lists late"):
        roster_check(pinned, refresh=away)(context("a", "late"))
    with pytest.raises(CoordinatorFault, match="cannot be right") as caught:
        roster_check(pinned, refresh=wrong)(context("a", "late"))
    assert caught.value.code == "roster-changed"
    pinned.roster_file.write_text("{")
    with pytest.raises(KeyMaterialError, match="compare the members"):
        roster_check(pinned)(context("a", "b"))


def test_words_of_members_are_the_same_everywhere_and_of_each_its_own() -> None:
    words = {member_words(member(name)) for name in PEOPLE}
    assert len(words) == len(PEOPLE)
    assert member_words(member("a")) == member_words(member("a", state="revoked"))
    assert member_words(member("a", site="b")) != member_words(member("a"))


def test_a_damaged_status_is_none(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    assert read_status(SiteHome(tmp_path)).pid == 0


# --- processes ---


@pytest.mark.slow
def test_three_sites_train_sealed_as_the_commands_set_them_up(lab: Federation) -> None:
    names = ("a", "b", "c")
    for shard, name in enumerate(names):
        home = lab.home(name)
        allow = ["--allow", str(EXAMPLE), "--set", f"data-shard={shard}"]
        lab.start("enroll", "--home", home, *allow, "--start", text=lab.invitation(name))
    for name in names:
        lab.approve(name)
    for running in lab.running:
        running.wait_for("connected to", 60)
    sys.path.insert(0, str(EXAMPLE))
    try:
        from hospital.task import accuracy, load, new_model
    finally:
        sys.path.remove(str(EXAMPLE))
    grid = grid_of(lab, EXAMPLE)
    model = new_model()
    result = QuorumStrategy(tolerate=0).start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    assert [record.failed for record in result.rounds] == [None] * 2
    model.load_state_dict(result.arrays.to_torch_state_dict())
    _, _, x, y = load(0)
    assert accuracy(model, x, y) > 0.8
    for name in names:
        done = site("status", "--home", lab.home(name), "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [(one["round"], one["phase"]) for one in report["rounds"]] == [(1, "sum"), (2, "sum")]
        assert report["refusals"] == []
        assert sorted(one["site"] for one in report["members"]) == list(names)
        assert abs(report["clock_ahead"]) < 1
    # What it took part in is still known when it has stopped.
    assert lab.running[0].end() == 0
    assert lab.running[0].said().endswith("quorsum: stopped\n")
    assert len(read_status(SiteHome(Path(lab.home("a")))).rounds) == 2
    assert json.loads(site("status", "--home", lab.home("a"), "--json").stdout)["state"] == "not running"


def test_a_second_process_is_refused(lab: Federation) -> None:
    started(lab, "a")
    second = site("start", "--home", lab.home("a"))
    assert second.returncode == 1
    assert "is running already; see it with: quorsum site status" in second.stderr


@pytest.mark.slow
def test_the_list_of_apps_holds_at_once(lab: Federation, tmp_path: Path) -> None:
    app = app_folder(tmp_path / "app")
    home = lab.member("a")
    site("set", "partition-id=0", "--home", home)
    running = lab.start("start", "--home", home)
    typed = f"quorsum site allow APP_DIR --home {lab.home('a')}\n"
    assert f"nothing may run here yet, run: {typed}" in running.wait_for("connected to")
    grid = grid_of(lab, app)
    assert code_of(evaluated(lab, grid, "a")) == "bundle-not-allowed"
    site("allow", str(app), "--home", home)
    assert evaluated(lab, grid, "a").content.metric_records["metrics"]["accuracy"] == 0.75
    site("disallow", bundles.digest(bundles.build(app)), "--home", home)
    assert code_of(evaluated(lab, grid, "a")) == "bundle-not-allowed"
    (Path(home) / "site.toml").write_text("allow = 3")
    assert code_of(evaluated(lab, grid, "a")) == "bundle-not-allowed"
    assert "site.toml: site: missing" in running.said()
    refusals = read_status(SiteHome(Path(home))).refusals
    assert [one.code for one in refusals] == ["bundle-not-allowed"] * 3


CRASHING = """
import os
from pathlib import Path
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.evaluate()
def evaluate(message, context):
    mark = Path(context.node_config["mark"])
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    if len(mark.read_text()) == 1:
        os.abort()
    return Message(RecordDict({"metrics": MetricRecord({"count": len(mark.read_text())})}), reply_to=message)
"""


def test_an_app_that_crashes_the_process_does_not_end_the_site(lab: Federation, tmp_path: Path) -> None:
    app = app_folder(tmp_path / "app", code=CRASHING)
    home = lab.member("a", str(app))
    site("set", f"mark={tmp_path / 'mark'}", "--home", home)
    running = lab.start("start", "--home", home)
    running.wait_for("connected to")
    grid = grid_of(lab, app)
    before = grid.activation(lab.nodes["a"])
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1, np.float32))})})
    grid.push_messages([Message(content, lab.nodes["a"], "evaluate")])
    running.wait_for("the site's process ended (SIGABRT); it is started again in 1 s")
    until(lambda: grid.activation(lab.nodes["a"]) not in (None, before))
    assert evaluated(lab, grid, "a").content.metric_records["metrics"]["count"] == 2


@pytest.mark.parametrize("who", ["process", "supervisor"])
def test_a_killed_site_comes_back(lab: Federation, who: str) -> None:
    running = started(lab, "a")
    home = lab.home("a")
    pid = read_status(SiteHome(Path(home))).pid
    first = lab.fleet.nodes()[lab.nodes["a"]].activated
    if who == "process":
        os.kill(pid, signal.SIGKILL)
        running.wait_for("SIGKILL")
    else:
        running.process.kill()
        running.process.wait()
        assert site("status", "--home", home).returncode == 1
        lab.start("start", "--home", home).wait_for("connected to")
    until(lambda: "a" in lab.online() and lab.fleet.nodes()[lab.nodes["a"]].activated != first)
    assert read_status(SiteHome(Path(home))).pid != pid


def test_a_revoked_site_ends_and_says_why(lab: Federation) -> None:
    running = started(lab, "a")
    lab.coordinator.store.revoke("a", lab.coordinator.clock.seconds(), "tester", "a lost laptop")
    assert running.process.wait(30) == 1
    assert "the coordinator's operator revoked it; its keys are never accepted again" in running.said()
    # The reason and nothing else: that it is no member is what it sees first, and no operator should approve it.
    assert "not a member" not in running.said()
    assert "approve" not in running.said()
    again = site("start", "--home", lab.home("a"))
    assert again.returncode == 1
    assert "ask for a new invitation and enrol from a new, empty home" in again.stderr
    assert "revoked" in json.loads(site("status", "--home", lab.home("a"), "--json").stdout)["trouble"]


def test_a_list_of_members_that_cannot_be_right_ends_the_site(lab: Federation) -> None:
    home = lab.member("a")
    place = SiteHome(Path(home))
    place.pin([*place.roster(), member("b")], "a")
    done = site("start", "--home", home)
    assert done.returncode == 1
    assert "list of members cannot be right" in done.stderr
    assert "ask the other sites" in done.stderr


def test_a_wrong_configuration_is_named(lab: Federation) -> None:
    home = lab.member("a")
    (Path(home) / "site.toml").write_text("site = 3\n")
    done = site("start", "--home", home)
    assert done.returncode == 64
    assert "site.toml" in done.stderr


def test_what_is_wrong_only_is_said_when_quiet_and_json_is_json(lab: Federation) -> None:
    home = lab.member("a")
    quiet = lab.start("start", "--home", home, "--quiet")
    until(lambda: "a" in lab.online())
    assert quiet.end() == 0
    assert quiet.said() == ""
    machine = lab.start("start", "--home", home, "--log-json")
    machine.wait_for('"event": "state"')
    assert machine.end() == 0
    lines = [json.loads(line) for line in machine.said().splitlines()]
    assert ("state", "connected") in [(line["event"], line["fields"].get("state")) for line in lines]


def test_a_configuration_that_cannot_be_read_allows_nothing_and_the_reply_is_signed(pinned: SiteHome) -> None:
    pinned.config_file.write_text("site = 3\n")
    flower.become_coordinator(flower.Run.create_empty(run_id=7))
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1, np.float32))})})
    message = Message(envelope.address(content, bytes(16)), 5, "evaluate")
    message.metadata.__dict__["_message_id"] = "question"
    reply = _Workers(pinned).handle(message, b"", flower.Run.create_empty(run_id=7))
    asked = envelope.Asked(bytes(16), envelope.content_digest(content))
    fault, _ = messages.unpack(envelope.open_envelope(reply.content, asked, PEOPLE["a"].public()))
    assert isinstance(fault, messages.Fault)
    assert fault.code == "bundle-not-allowed"
    assert str(pinned.path) not in fault.message


# --- the upkeep, in this process ---


class Here:
    """A site in a thread of this process, with its upkeep every half second."""

    def __init__(self, home: str) -> None:
        self.home, self.stop = SiteHome(Path(home)), threading.Event()
        self.ended: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            run_site(self.home, self.stop, upkeep_s=0.5, beat=0.5)
        except (Refusal, UsageError) as error:
            self.ended.append(error)

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.mark.slow
def test_the_certificate_is_renewed_and_the_connection_stays(tmp_path: Path) -> None:
    with federation(tmp_path, certificate_hours=12 / 3600) as lab:
        here = Here(lab.member("a"))
        until(lambda: read_status(here.home).state == "connected")
        seen = {here.home.certificate()}
        until(lambda: seen.add(here.home.certificate()) or len(seen) == 3, 60)
        until(lambda: "a" in lab.online())
        assert read_status(here.home).state == "connected"
        here.end()
        assert (read_status(here.home).state, here.ended) == ("stopped", [])


def test_new_members_are_pinned_and_said(lab: Federation) -> None:
    here = Here(lab.member("a"))
    lab.member("b")
    until(lambda: [one.site for one in here.home.roster()] == ["a", "b"])
    until(lambda: read_status(here.home).clock_ahead is not None)
    here.end()


def test_an_absent_coordinator_is_tried_for_ever(lab: Federation) -> None:
    home = lab.member("a")
    lab.fleet.stop()
    here = Here(home)
    until(lambda: read_status(here.home).state == "connecting")
    lab.fleet.start()
    until(lambda: read_status(here.home).state == "connected")
    here.end()


def test_a_shared_key_is_fetched_and_an_old_one_not_used(lab: Federation, tmp_path: Path) -> None:
    from quorsum.crypto import generate_site_key

    homes = [SiteHome(Path(lab.member(name))) for name in ("a", "b")]
    settings.change(homes[0], {"suite": "ckks", "partition-id": 0})
    app = app_folder(tmp_path / "app")
    settings.allow(homes[0], [settings.bundle_of(str(app))])
    here = Here(str(homes[0].path))
    until(lambda: "share-key" in read_status(here.home).trouble)
    enrollment.roster(homes[1])
    key = generate_site_key(os.urandom)
    enrollment.share_key(homes[1], key)
    until(lambda: here.home.suite_key_file.exists() and read_status(here.home).trouble == "")
    until(lambda: "a" in lab.online())
    grid = grid_of(lab, app)
    suite = enrollment.load_shared_key(here.home)
    hello = messages.pack(messages.Hello(run="run", suite="ckks/v1"))

    def introduced() -> messages.AnyMessage:
        (reply,) = grid.send_and_receive([Message(hello, lab.nodes["a"], "train")], timeout=30)
        return messages.unpack(reply.content)[0]

    said = introduced()
    assert isinstance(said, messages.Introduction)
    assert said.key_id == suite.key_id == key.key_id
    lab.member("c")
    until(lambda: len(here.home.roster()) == 3)
    stale = introduced()
    assert isinstance(stale, messages.Fault)
    assert stale.code == "key-stale"
    here.end()


def test_the_process_ends_with_its_supervisor_only(tmp_path: Path) -> None:
    """Started by hand, with nothing behind its standard input, it ends at once."""
    command = [sys.executable, "-P", "-m", "quorsum.client.site", json.dumps({"home": str(tmp_path), "quiet": False})]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert done.stdout == b""
