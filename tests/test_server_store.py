"""The coordinator's memory: rules that hold under concurrent writers, crashes and wrong callers."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quorsum.enrollment import Keys, key_epoch
from quorsum.errors import DataError, KeyMaterialError, Refusal, UsageError
from quorsum.server import store as module
from quorsum.server.store import SCHEMA_VERSION, Application, Relay, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state.db")
    yield opened
    opened.close()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def application(site: str, secret: bytes | None = b"s" * 32, keys: str = "k") -> Application:
    three = Keys(digest(f"{keys} identity"), digest(f"{keys} node"), digest(f"{keys} tls"))
    return Application(site, secret, three, "ab" * 64, "node", "request", f"words-{keys}", "127.0.0.1")


def admit(store: Store, site: str, keys: str) -> None:
    secret = os.urandom(32)
    store.invite(site, secret, 100.0, 1.0)
    store.enroll(application(site, secret, keys), 2.0, 10)
    store.approve(site, f"words-{keys}", 3.0, "tester")


def test_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = Store(path)
    store.note(1.0, "tester", "start", "coordinator")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}
    assert "state.db-wal" in modes
    store.close()
    path.chmod(0o640)
    with pytest.raises(KeyMaterialError, match="chmod 600"):
        Store(path)


def test_newer_damaged_and_impossible_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(DataError, match="later version") as refusal:
        Store(path)
    assert refusal.value.code == "state-newer"
    path.write_bytes(b"this is no database at all, it is some text that is long enough" * 100)
    with pytest.raises(DataError) as refusal:
        Store(path)
    assert refusal.value.code == "state-damaged"
    with pytest.raises(DataError) as refusal:
        Store(tmp_path / "none" / "state.db")
    assert refusal.value.code == "state-unusable"


def test_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    store.close()
    with pytest.raises(UsageError, match="closed"):
        store.sites()


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    again = Store(path)
    again.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()
    assert len(module._MIGRATIONS) == SCHEMA_VERSION


def test_every_table_and_column_is_described() -> None:
    for statement in module._FIRST_SCHEMA:
        if "CREATE TABLE" in statement:
            for line in statement.splitlines():
                if re.match(r"\s+[a-z_]+ [A-Z]", line) or "CREATE TABLE" in line:
                    assert "-- " in line, line


def test_an_invitation_works_once(store: Store) -> None:
    store.invite("a", b"s" * 32, 100.0, 1.0, "tester")
    row = store.enroll(application("a"), 2.0, 10)
    assert (row.state, row.certificate, row.enrolled) == ("pending", None, 2.0)
    assert store.enroll(application("a"), 3.0, 10) == row
    with pytest.raises(Refusal) as refusal:
        store.enroll(application("a", keys="other"), 3.0, 10)
    assert refusal.value.code == "invitation-used"
    (invitation,) = store.invitations()
    assert (invitation.used, invitation.strangers) == (2.0, 1)
    assert "73" * 16 not in repr(application("a"))


def test_invitations_are_taken_back(store: Store) -> None:
    store.invite("a", b"s" * 32, 100.0, 1.0)
    store.withdraw("a", 2.0, "tester")
    with pytest.raises(Refusal) as refusal:
        store.enroll(application("a"), 3.0, 10)
    assert refusal.value.code == "invitation-withdrawn"
    with pytest.raises(UsageError, match="no unused invitation"):
        store.withdraw("a", 4.0)


def test_a_site_that_is_there_is_not_invited_again(store: Store) -> None:
    store.invite("a", b"s" * 32, 100.0, 1.0)
    store.enroll(application("a"), 2.0, 10)
    with pytest.raises(UsageError, match="approve or refuse"):
        store.invite("a", b"t" * 32, 100.0, 3.0)
    store.approve("a", "words-k", 4.0)
    with pytest.raises(UsageError, match="revoke"):
        store.invite("a", b"t" * 32, 100.0, 5.0)


def test_two_invitations_of_one_name_make_one_site(store: Store) -> None:
    store.invite("a", b"s" * 32, 100.0, 1.0)
    store.enroll(application("a"), 2.0, 10)
    store._connection.execute(
        "INSERT INTO invitations (site, secret_hash, created, expires) VALUES ('a', ?, 1, 100)", (b"t" * 32,)
    )
    with pytest.raises(Refusal) as refusal:
        store.enroll(application("a", b"t" * 32, "other"), 3.0, 10)
    assert refusal.value.code == "site-exists"


def test_approval_takes_the_words_of_the_keys_that_are_there(store: Store) -> None:
    store.invite("a", b"s" * 32, 100.0, 1.0)
    with pytest.raises(UsageError, match="never enrolled"):
        store.approve("a", "words-k", 2.0)
    store.enroll(application("a"), 2.0, 10)
    with pytest.raises(Refusal) as refusal:
        store.approve("a", "words-other", 3.0)
    assert refusal.value.code == "wrong-words"
    assert store.approved_sites() == ()
    assert store.approve("a", " Words  K ", 4.0, "tester").state == "approved"
    with pytest.raises(UsageError, match="it is approved"):
        store.approve("a", "words-k", 5.0)
    with pytest.raises(UsageError, match="it is approved"):
        store.refuse("a", 5.0)


def test_certificates_are_for_approved_sites_only(store: Store) -> None:
    admit(store, "a", "k")
    (row,) = store.approved_sites()
    assert store.set_certificate(row.id, "pem", 50.0, 4.0)
    store.revoke("a", 5.0, "tester", "lost")
    assert not store.set_certificate(row.id, "pem2", 60.0, 6.0)
    found = store.site("a")
    assert found is not None
    assert (found.certificate, found.state) == ("pem", "revoked")
    with pytest.raises(UsageError, match="it is revoked"):
        store.revoke("a", 7.0)
    assert store.owner(digest("k tls")) == found
    assert store.owner(digest("nobody")) is None
    assert store.site("nobody") is None
    assert [site.name for site in store.members()] == ["a"]


def test_the_log_only_grows(store: Store) -> None:
    admit(store, "a", "k")
    events = store.events()
    assert [event.action for event in events] == ["invite", "enroll", "approve"]
    assert store.events(events[0].id) == events[1:]
    assert store.events(most=1) == events[:1]
    for statement in ("DELETE FROM events", "UPDATE events SET who = 'x'"):
        with pytest.raises(sqlite3.DatabaseError, match="only grows"):
            store._connection.execute(statement)


def test_runs_go_their_way(store: Store) -> None:
    first = store.queue_run("one", b"bundle", '{"rounds": 3}', 1.0, "tester")
    second = store.queue_run("two", b"bundle", "{}", 2.0)
    assert store.bundle(first) == b"bundle"
    assert store.run(first).bundle_digest == hashlib.sha256(b"bundle").hexdigest()
    waiting = store.next_run()
    assert waiting is not None
    assert (waiting.id, waiting.state) == (first, "queued")
    store.set_run_state(second, "running", 3.0)
    begun = store.next_run()
    assert begun is not None
    assert begun.id == second  # what was begun goes on first, after a crash too
    store.set_run_state(second, "running", 4.0, "resumed")
    store.set_run_state(second, "stopping", 5.0, who="tester")
    store.set_run_state(second, "stopped", 6.0)
    row = store.run(second)
    assert (row.started, row.ended, row.state) == (3.0, 6.0, "stopped")
    store.set_run_state(first, "failed", 7.0, "no sites")
    assert store.next_run() is None
    assert [run.state for run in store.runs()] == ["failed", "stopped"]


def test_runs_that_cannot_be(store: Store) -> None:
    run = store.queue_run("one", b"", "{}", 1.0)
    with pytest.raises(UsageError, match="cannot become finished"):
        store.set_run_state(run, "finished", 2.0)
    store.set_run_state(run, "stopped", 2.0)
    with pytest.raises(UsageError, match="cannot become running"):
        store.set_run_state(run, "running", 3.0)
    for call in (
        lambda: store.run(99),
        lambda: store.bundle(99),
        lambda: store.set_run_state(99, "running", 1.0),
        lambda: store.append_round(99, 1, "{}", 1.0),
    ):
        with pytest.raises(UsageError, match="no run 99"):
            call()
    for text in ("", "[]", "nonsense"):
        with pytest.raises(UsageError, match="JSON object"):
            store.queue_run("x", b"", text, 1.0)


def test_rounds_are_written_once(store: Store) -> None:
    run = store.queue_run("one", b"", "{}", 1.0)
    store.append_round(run, 2, '{"b": 1}', 3.0)
    store.append_round(run, 1, '{"a": 1}', 2.0)
    store.append_round(run, 1, '{"a": 1}', 9.0)
    assert [(row.number, row.record, row.at) for row in store.rounds(run)] == [
        (1, '{"a": 1}', 2.0),
        (2, '{"b": 1}', 3.0),
    ]
    with pytest.raises(UsageError, match="another outcome"):
        store.append_round(run, 1, '{"a": 2}', 4.0)
    with pytest.raises(UsageError, match="JSON object"):
        store.append_round(run, 3, "[]", 4.0)


def epoch(*names: str) -> str:
    return key_epoch((name, "ab" * 64) for name in names)


def test_relays(store: Store) -> None:
    for name in "abc":
        admit(store, name, name)
    e1 = epoch("a", "b", "c")
    relay = Relay(e1, "a", "b", b"sealed", "sig")
    store.put_relay(relay, 1.0)
    store.put_relay(relay, 1.5)
    assert [event.action for event in store.events()].count("share-key") == 1
    assert store.get_relay(e1, "b") == relay
    assert store.get_relay(e1, "c") is None
    for refused, code in [
        (Relay(e1, "c", "b", b"", ""), "key-already-shared"),
        (Relay(e1, "a", "a", b"", ""), "unknown-recipient"),
        (Relay(e1, "a", "d", b"", ""), "unknown-recipient"),
        (Relay(epoch("a", "b"), "a", "b", b"", ""), "epoch-over"),
    ]:
        with pytest.raises(Refusal) as refusal:
            store.put_relay(refused, 2.0)
        assert refusal.value.code == code
    store.revoke("c", 3.0)
    e2 = epoch("a", "b")
    assert store.get_relay(e2, "b") is None
    store.put_relay(Relay(e2, "b", "a", b"", ""), 4.0)
    assert store.get_relay(e1, "b") is None
    admit(store, "d", "d")
    assert store.get_relay(e2, "a") is None
    assert "sealed" not in repr(Relay("e", "s", "r", b"sealed", "sig"))


def test_a_key_does_not_pass_a_revocation_that_is_being_written(store: Store, tmp_path: Path) -> None:
    """Another process revokes a member while a key for it comes in: the key is for members that are no more."""
    for name in "ab":
        admit(store, name, name)
    operator = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    operator.execute("BEGIN IMMEDIATE")
    operator.execute("UPDATE sites SET state = 'revoked' WHERE name = 'b'")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(store.put_relay, Relay(epoch("a", "b"), "a", "b", b"", ""), 9.0)
        time.sleep(0.3)
        assert not coming.done()
        operator.execute("COMMIT")
        with pytest.raises(Refusal) as refusal:
            coming.result(20)
    operator.close()
    assert refusal.value.code == "epoch-over"
    assert store.get_relay(epoch("a", "b"), "b") is None


def test_backup_is_one_private_file_with_everything(store: Store, tmp_path: Path) -> None:
    admit(store, "a", "k")
    target = tmp_path / "backup.db"
    store.backup(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    copy = Store(target)
    assert copy.sites() == store.sites()
    assert copy.events() == store.events()
    copy.close()
    with pytest.raises(UsageError, match="not there"):
        store.backup(target)


WRITER = """
import sys
from pathlib import Path
from quorsum.server.store import Store
store = Store(Path(sys.argv[1]))
run = int(sys.argv[2])
print("ready", flush=True)
for k in range(int(sys.argv[3])):
    store.queue_run(f"{run} {k}", b"x", "{}", float(k))
    store.invite(f"s{run}-{k}", f"{run}-{k}".encode(), 1e9, float(k))
store.close()
"""


def writer(path: Path, number: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(number), str(count)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_and_threads_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    processes = [writer(path, number, 150) for number in (1, 2)]  # both make the file
    store = Store(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: store.note(float(k), "thread", "note", str(k)), range(200)))
    assert [process.wait(60) for process in processes] == [0, 0]
    kinds = Counter(event.action for event in store.events(most=10_000))
    assert kinds == {"queue-run": 300, "invite": 300, "note": 200}
    assert len(store.runs()) == len(store.invitations()) == 300
    store.close()


def test_killed_while_writing_nothing_is_half_done(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    for number in range(3):
        process = writer(path, number, 100_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.15 + 0.05 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = Store(path)
        kinds = Counter(event.action for event in store.events(most=1_000_000))
        assert kinds["queue-run"] == len(store.runs())
        assert kinds["invite"] == len(store.invitations())
        assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store.close()


class Enrollments(RuleBasedStateMachine):
    """Whatever order operators and sites act in, the rules at the top of the module hold."""

    names = st.sampled_from(["a", "b"])
    keys = st.sampled_from(["k1", "k2", "k3"])
    secrets = st.sampled_from([None, *(bytes([n]) * 32 for n in range(4))])

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "state.db")
        self.count, self.burnt = 0, set[str]()

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def attempt(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except (Refusal, UsageError, DataError):
            return None

    @rule(name=names)
    def invite(self, name: str) -> None:
        if self.count < 4:
            self.attempt(self.store.invite, name, bytes([self.count]) * 32, 1e9, 1.0)
            self.count += 1

    @rule(name=names, secret=secrets, keys=keys)
    def enroll(self, name: str, secret: bytes | None, keys: str) -> None:
        row = self.attempt(self.store.enroll, application(name, secret, keys), 2.0, 10)
        if row is not None:
            assert keys not in self.burnt
            assert row.words == f"words-{keys}"
            assert row.state in ("pending", "approved")

    @rule(name=names, keys=keys)
    def approve(self, name: str, keys: str) -> None:
        row = self.attempt(self.store.approve, name, f"words-{keys}", 3.0)
        assert row is None or row.words == f"words-{keys}"

    @rule(name=names)
    def refuse(self, name: str) -> None:
        self.attempt(self.store.refuse, name, 3.0)

    @rule(name=names)
    def revoke(self, name: str) -> None:
        row = self.store.site(name)
        self.attempt(self.store.revoke, name, 4.0)
        if row is not None and row.state == "approved":
            self.burnt.add(row.words.removeprefix("words-"))

    @invariant()
    def one_site_of_a_name_and_one_name_of_a_key(self) -> None:
        present = [site for site in self.store.sites() if site.state in ("pending", "approved")]
        assert len({site.name for site in present}) == len(present)
        assert len({site.words for site in present}) == len(present)
        assert not {site.words.removeprefix("words-") for site in present} & self.burnt


TestEnrollments = Enrollments.TestCase
TestEnrollments.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
