"""The coordinator's memory: one SQLite file that its process and its command line write at the same time.

Who may join, who has joined with which keys, which runs there are, what happened in each round, and a log of every
change. Secrets are not in it, only their hashes.

A site's way: ``invite`` -> (it presents the secret) ``pending`` -> ``approved`` -> ``revoked`` or ``left``; or
``pending`` -> ``refused``. Rules that hold whatever the callers do, because each change is one transaction that looks
and writes under the same lock:

1. An invitation works once: it belongs to the keys of the first request that presents its secret.
2. At most one site of a name is pending or approved.
3. A key belongs to one site. The keys of a site that was revoked or has left are never accepted again.
4. A site is approved with the words of the keys that it has at that moment.
5. The log only grows.

Times are seconds since 1970 and are passed in.
"""

from __future__ import annotations

import hmac
import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from quorsum.enrollment import Keys, State, check_state, key_epoch
from quorsum.errors import DataError, KeyMaterialError, Refusal, UsageError
from quorsum.homes import COORDINATOR_HOME

__all__ = [
    "SCHEMA_VERSION",
    "Application",
    "Event",
    "InvitationRow",
    "Relay",
    "RoundRow",
    "RunRow",
    "RunState",
    "SiteRow",
    "Store",
    "check_epoch",
]

BUSY_S: Final = 15.0
_STRANGERS_LOGGED: Final = 10

RunState: TypeAlias = Literal["queued", "running", "stopping", "finished", "failed", "stopped"]
_NEXT_STATES: Final[dict[str, frozenset[str]]] = {
    "queued": frozenset({"running", "stopped", "failed"}),
    "running": frozenset({"stopping", "finished", "failed", "stopped"}),
    "stopping": frozenset({"finished", "failed", "stopped"}),
    "finished": frozenset(),
    "failed": frozenset(),
    "stopped": frozenset(),
}

_FIRST_SCHEMA: Final = (
    """
    CREATE TABLE invitations (          -- who may join; one row per invitation ever made
        id INTEGER PRIMARY KEY,         -- in the order they were made
        site TEXT NOT NULL,             -- name of the invited site
        secret_hash BLOB NOT NULL UNIQUE,  -- of quorsum.invitation.secret_hash, 32 bytes; the secret is not kept
        created REAL NOT NULL,          -- when it was made
        expires REAL NOT NULL,          -- from when it cannot be used any more
        keys TEXT,                      -- digests of the keys that used it first; NULL while unused
        used REAL,                      -- when it was used first; NULL while unused
        withdrawn REAL,                 -- when a newer one or the operator took it back; NULL if never
        strangers INTEGER NOT NULL DEFAULT 0  -- how often other keys presented it afterwards
    ) STRICT""",
    """
    CREATE TABLE sites (                -- one row per enrollment; a name can come back with other keys
        id INTEGER PRIMARY KEY,         -- in the order they enrolled
        name TEXT NOT NULL,             -- name of the site
        state TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'refused', 'revoked', 'left')),  -- where it stands
        identity TEXT NOT NULL,         -- its public identity, 128 hexadecimal digits
        node_key TEXT NOT NULL,         -- public key with which it speaks to Flower, PEM
        request TEXT NOT NULL,          -- its request for a TLS certificate, PEM
        identity_digest TEXT NOT NULL,  -- by which its identity is recognised
        node_digest TEXT NOT NULL,      -- by which its node key is recognised
        tls_digest TEXT NOT NULL,       -- by which its TLS key is recognised
        words TEXT NOT NULL,            -- six words for these keys
        address TEXT NOT NULL,          -- from where it enrolled
        invitation INTEGER NOT NULL REFERENCES invitations (id),  -- with which it enrolled
        certificate TEXT,               -- its current TLS certificate, PEM; NULL before the first
        expires REAL,                   -- when that certificate runs out; NULL before the first
        enrolled REAL NOT NULL,         -- when it enrolled
        decided REAL                    -- when its state changed last; NULL while pending
    ) STRICT""",
    """
    CREATE UNIQUE INDEX one_site_of_a_name ON sites (name) WHERE state IN ('pending', 'approved')""",
    """
    CREATE TABLE keys (                 -- every key in use or burnt
        digest TEXT PRIMARY KEY,        -- by which it is recognised
        kind TEXT NOT NULL,             -- identity, node or tls
        site INTEGER NOT NULL REFERENCES sites (id)  -- to which enrollment it belongs, for good
    ) STRICT""",
    """
    CREATE TABLE runs (                 -- what was asked to be trained
        id INTEGER PRIMARY KEY,         -- in the order they were queued
        name TEXT NOT NULL,             -- for people
        bundle BLOB NOT NULL,           -- the app
        bundle_digest TEXT NOT NULL,    -- SHA-256 of the bundle, 64 hexadecimal digits
        config TEXT NOT NULL,           -- the run's configuration, a JSON object
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'stopping', 'finished', 'failed', 'stopped')),  -- now
        detail TEXT NOT NULL,           -- a sentence about the state; may be empty
        queued REAL NOT NULL,           -- when it was queued
        started REAL,                   -- when it began; NULL before
        ended REAL                      -- when it ended; NULL before
    ) STRICT""",
    """
    CREATE TABLE rounds (               -- one row per finished or failed round
        run INTEGER NOT NULL REFERENCES runs (id),  -- of which run
        number INTEGER NOT NULL,        -- from 1
        record TEXT NOT NULL,           -- what happened, a JSON object
        at REAL NOT NULL,               -- when it was written
        PRIMARY KEY (run, number)
    ) STRICT""",
    """
    CREATE TABLE relays (               -- sealed keys on their way from one member to another
        epoch TEXT NOT NULL,            -- of quorsum.enrollment.key_epoch
        recipient TEXT NOT NULL,        -- name of the member that can open it
        sender TEXT NOT NULL,           -- name of the member that sealed it
        sealed BLOB NOT NULL,           -- opaque to the coordinator
        signature TEXT NOT NULL,        -- of the sender's identity, 128 hexadecimal digits
        at REAL NOT NULL,               -- when it came
        PRIMARY KEY (epoch, recipient)
    ) STRICT""",
    """
    CREATE TABLE events (               -- every change, for good
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order they happened
        at REAL NOT NULL,               -- when
        who TEXT NOT NULL,              -- a local user, 'coordinator', or 'site NAME'
        action TEXT NOT NULL,           -- what was done
        subject TEXT NOT NULL,          -- to whom or what
        detail TEXT NOT NULL            -- more about it; may be empty
    ) STRICT""",
    """
    CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the log only grows'); END""",
    """
    CREATE TRIGGER events_never_go BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the log only grows'); END""",
)


def _to_version_1(connection: sqlite3.Connection) -> None:
    for statement in _FIRST_SCHEMA:
        connection.execute(statement)


_MIGRATIONS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (_to_version_1,)
"""Step k takes the schema from version k to k + 1. A step is never changed once it was released."""

SCHEMA_VERSION: Final = len(_MIGRATIONS)


@dataclass(frozen=True)
class Application:
    """A request to enrol whose signatures were checked.

    Attributes:
        site: name.
        secret_hash: of the invitation's secret, 32 bytes; None for a site that says it was approved before.
        keys: digests of its three keys.
        identity: public identity, hex.
        node_key: PEM.
        request: PEM.
        words: six words for these keys.
        address: from where it came.
    """

    site: str
    secret_hash: bytes | None = field(repr=False)
    keys: Keys
    identity: str
    node_key: str
    request: str
    words: str
    address: str


@dataclass(frozen=True)
class InvitationRow:
    """An invitation, without its secret.

    Attributes:
        id: number.
        site: name of the invited site.
        created, expires: seconds since 1970.
        used, withdrawn: the same, or None.
        strangers: how often other keys presented it after it had been used.
    """

    id: int
    site: str
    created: float
    expires: float
    used: float | None
    withdrawn: float | None
    strangers: int


@dataclass(frozen=True)
class SiteRow:
    """One enrollment of a site.

    Attributes:
        id: number.
        name: of the site.
        state: where it stands.
        identity: public identity, hex.
        node_key: public key with which it speaks to Flower, PEM.
        request: for its TLS certificate, PEM.
        keys: digests of its three keys.
        words: six words for them.
        address: from where it enrolled.
        certificate: PEM, or None before the first.
        expires: when that certificate runs out.
        enrolled, decided: seconds since 1970.
        strangers: how often its invitation was presented with other keys: it may have been stolen.
    """

    id: int
    name: str
    state: State
    identity: str
    node_key: str
    request: str
    keys: Keys
    words: str
    address: str
    certificate: str | None
    expires: float | None
    enrolled: float
    decided: float | None
    strangers: int


@dataclass(frozen=True)
class RunRow:
    """A run, without its bundle.

    Attributes:
        id: number.
        name: for people.
        bundle_digest: SHA-256 of the bundle, hex.
        config: a JSON object.
        state: now.
        detail: a sentence about the state.
        queued, started, ended: seconds since 1970, or None.
    """

    id: int
    name: str
    bundle_digest: str
    config: str
    state: RunState
    detail: str
    queued: float
    started: float | None
    ended: float | None


@dataclass(frozen=True)
class RoundRow:
    """What happened in a round.

    Attributes:
        run: number of the run.
        number: of the round, from 1.
        record: a JSON object.
        at: seconds since 1970.
    """

    run: int
    number: int
    record: str
    at: float


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Attributes:
        id: number; they only grow.
        at: seconds since 1970.
        who: a local user, ``coordinator``, or ``site NAME``.
        action, subject, detail: what was done to whom, and more about it.
    """

    id: int
    at: float
    who: str
    action: str
    subject: str
    detail: str


@dataclass(frozen=True)
class Relay:
    """A sealed key on its way.

    Attributes:
        epoch: of the approved members it is for.
        sender, recipient: names.
        sealed: opaque to the coordinator.
        signature: of the sender, hex.
    """

    epoch: str
    sender: str
    recipient: str
    sealed: bytes = field(repr=False)
    signature: str = field(repr=False)


_SITE: Final = (
    "SELECT s.id, s.name, s.state, s.identity, s.node_key, s.request, s.identity_digest, s.node_digest, s.tls_digest, "
    "s.words, s.address, s.certificate, s.expires, s.enrolled, s.decided, i.strangers "
    "FROM sites s JOIN invitations i ON i.id = s.invitation "
)
_RUN: Final = "SELECT id, name, bundle_digest, config, state, detail, queued, started, ended FROM runs "
_INVITATION: Final = "SELECT id, site, created, expires, used, withdrawn, strangers FROM invitations "


def _site_row(row: tuple[Any, ...]) -> SiteRow:
    fields = (*row[:6], Keys(*row[6:9]), *row[9:])
    return SiteRow(*fields)


class Store:
    """The file, opened. May be used from several threads; several processes may have it open.

    Raises:
        KeyMaterialError: ``state-readable``: others may read the file.
        DataError: ``state-newer`` (written by a later version of quorsum), ``state-damaged``, ``state-unusable``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise DataError("state-unusable", f"cannot open {path}: {error.strerror}") from None
        mode = stat.S_IMODE(path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise KeyMaterialError(
                "state-readable", f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
            )
        self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise DataError(
                "state-newer",
                f"{self._path} has schema {version}, this quorsum knows {SCHEMA_VERSION}: a later version wrote it. "
                "Install that version, or restore the backup from before",
            )
        _write_ahead(self._connection)
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._writing() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            for step in range(version, SCHEMA_VERSION):
                _MIGRATIONS[step](connection)
                connection.execute(f"PRAGMA user_version = {step + 1}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def backup(self, path: Path) -> None:
        """Copy everything to a new file, mode 0600, while others go on writing.

        Raises:
            UsageError: there is such a file already, or it cannot be written.
        """
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise UsageError(
                f"cannot write the backup {path}: {error.strerror}; name a file that is not there"
            ) from None
        with self._errors(), self._lock:
            target = sqlite3.connect(path, isolation_level=None)
            try:
                self._connection.backup(target)
                # A backup is one file: without this it would be opened with a log beside it.
                target.execute("PRAGMA journal_mode = DELETE")
            finally:
                target.close()

    # Invitations.

    def invite(self, site: str, secret_hash: bytes, expires: float, now: float, who: str = "") -> None:
        """Let a site join; earlier invitations of the same name that were not used are taken back.

        Raises:
            UsageError: the site is pending or approved already.
        """
        with self._writing() as connection:
            present = self._present(connection, site)
            if present is not None:
                step = "approve or refuse it" if present.state == "pending" else "revoke it"
                raise UsageError(f"site {site} is {present.state} already; to invite it anew, first {step}")
            connection.execute(
                "UPDATE invitations SET withdrawn = ? WHERE site = ? AND used IS NULL AND withdrawn IS NULL",
                (now, site),
            )
            connection.execute(
                "INSERT INTO invitations (site, secret_hash, created, expires) VALUES (?, ?, ?, ?)",
                (site, secret_hash, now, expires),
            )
            _log(connection, now, who, "invite", site)

    def withdraw(self, site: str, now: float, who: str = "") -> None:
        """Take back an invitation that was not used yet.

        Raises:
            UsageError: there is none.
        """
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE invitations SET withdrawn = ? WHERE site = ? AND used IS NULL AND withdrawn IS NULL",
                (now, site),
            ).rowcount
            if not changed:
                raise UsageError(f"there is no unused invitation for site {site}")
            _log(connection, now, who, "withdraw", site)

    def invitations(self) -> tuple[InvitationRow, ...]:
        """All invitations, oldest first."""
        return tuple(InvitationRow(*row) for row in self._read(_INVITATION + "ORDER BY id"))

    # Sites.

    def enroll(self, application: Application, now: float, most_pending: int) -> SiteRow:
        """Take a request to enrol; the same request any number of times changes nothing more.

        Args:
            application: its signatures were checked by the caller.
            now: seconds since 1970.
            most_pending: how many sites may be pending at once.

        Returns:
            the site, pending or approved.

        Raises:
            Refusal: ``revoked``, ``left`` or ``refused`` (these keys were thrown out), ``key-in-use`` (a key belongs
                to another site), ``unknown-site`` (no invitation and never approved), ``invitation-unknown``,
                ``invitation-site`` (it is for another site), ``invitation-withdrawn``, ``invitation-expired``,
                ``invitation-used`` (other keys used it first), ``site-exists``, ``too-many-pending``.
        """
        # A refusal is remembered (that an invitation was presented by others), so it must not undo the transaction.
        with self._writing() as connection:
            outcome = self._enroll(connection, application, now, most_pending)
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome

    def _enroll(
        self, connection: sqlite3.Connection, application: Application, now: float, most_pending: int
    ) -> SiteRow | Refusal:
        try:
            known = self._owner(connection, application)
            if known is not None:
                return known
            number, used_by = self._invitation(connection, application, now)
            if used_by is not None:
                return self._second_use(connection, number, used_by, application, now)
            return self._admit(connection, number, application, now, most_pending)
        except Refusal as refusal:
            return refusal

    def _owner(self, connection: sqlite3.Connection, application: Application) -> SiteRow | None:
        """The enrollment that these three keys belong to, if they belong to one."""
        owners: set[int] = set()
        for _, digest in application.keys.digests():
            row = connection.execute("SELECT site FROM keys WHERE digest = ?", (digest,)).fetchone()
            if row is not None:
                owners.add(row[0])
        sites = [_site_row(connection.execute(_SITE + "WHERE s.id = ?", (number,)).fetchone()) for number in owners]
        for site in sites:
            check_state(site.state, site.name)
        if not sites:
            return None
        if len(sites) == 1 and sites[0].keys == application.keys and sites[0].name == application.site:
            return sites[0]
        raise Refusal(
            "key-in-use",
            "one of these keys belongs to another site or another enrollment; enrol from a home of its own, with keys "
            "that were made there",
        )

    def _invitation(
        self, connection: sqlite3.Connection, application: Application, now: float
    ) -> tuple[int, str | None]:
        """The number of the invitation presented, and the keys that used it."""
        if application.secret_hash is None:
            raise Refusal(
                "unknown-site",
                f"site {application.site} was never approved with these keys; ask the coordinator's operator for an "
                "invitation",
            )
        found = None
        rows = connection.execute("SELECT id, site, secret_hash, expires, keys, withdrawn FROM invitations")
        for row in rows:
            if hmac.compare_digest(row[2], application.secret_hash):
                found = row
        if found is None:
            raise Refusal(
                "invitation-unknown", "the coordinator did not make this invitation; ask its operator for a new one"
            )
        number, site, _, expires, keys, withdrawn = found
        if site != application.site:
            raise Refusal("invitation-site", f"the invitation is not for a site named {application.site!r}")
        if withdrawn is not None:
            raise Refusal("invitation-withdrawn", "the invitation was taken back; use the newer one or ask for one")
        if keys is None and now >= expires:
            raise Refusal(
                "invitation-expired", "the invitation has expired; ask the coordinator's operator for a new one"
            )
        return number, keys

    def _second_use(
        self, connection: sqlite3.Connection, number: int, used_by: str, application: Application, now: float
    ) -> Refusal:
        if used_by == _joined(application.keys):
            # The same keys and no site that owns them: the operator refused it, which set its keys free.
            return Refusal("refused", f"site {application.site}: the coordinator's operator refused it; ask them why")
        (strangers,) = connection.execute(
            "UPDATE invitations SET strangers = strangers + 1 WHERE id = ? RETURNING strangers", (number,)
        ).fetchone()
        if strangers <= _STRANGERS_LOGGED:
            detail = f"from {application.address} with other keys, words {application.words}; it may have been stolen"
            _log(connection, now, "coordinator", "invitation-used", application.site, detail)
        return Refusal(
            "invitation-used",
            "the invitation was used before, with other keys. If this is the first time you use it, somebody else had "
            "it: tell the coordinator's operator, who sees this attempt too, and ask for a new one",
        )

    def _admit(
        self, connection: sqlite3.Connection, number: int, application: Application, now: float, most_pending: int
    ) -> SiteRow:
        present = self._present(connection, application.site)
        if present is not None:
            raise Refusal("site-exists", f"site {application.site} is {present.state} already, with other keys")
        (pending,) = connection.execute("SELECT count(*) FROM sites WHERE state = 'pending'").fetchone()
        if pending >= most_pending:
            raise Refusal("too-many-pending", f"{pending} sites wait for the coordinator's operator; try again later")
        keys = application.keys
        cursor = connection.execute(
            "INSERT INTO sites (name, state, identity, node_key, request, identity_digest, node_digest, tls_digest, "
            "words, address, invitation, enrolled) VALUES (?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(application.site, application.identity, application.node_key, application.request),
                *(keys.identity, keys.node, keys.tls, application.words, application.address, number, now),
            ),
        )
        site = cursor.lastrowid
        for kind, digest in keys.digests():
            connection.execute("INSERT INTO keys (digest, kind, site) VALUES (?, ?, ?)", (digest, kind, site))
        connection.execute("UPDATE invitations SET keys = ?, used = ? WHERE id = ?", (_joined(keys), now, number))
        detail = f"from {application.address}, words {application.words}"
        _log(connection, now, f"site {application.site}", "enroll", application.site, detail)
        return _site_row(connection.execute(_SITE + "WHERE s.id = ?", (site,)).fetchone())

    def pending(self) -> tuple[SiteRow, ...]:
        """Sites that wait for the operator, oldest first, with their words."""
        return self._sites("WHERE s.state = 'pending' ORDER BY s.id")

    def approved_sites(self) -> tuple[SiteRow, ...]:
        """The members, sorted by name."""
        return self._sites("WHERE s.state = 'approved' ORDER BY s.name")

    def members(self) -> tuple[SiteRow, ...]:
        """Every enrollment that was ever approved, oldest first, with those that were revoked or left."""
        return self._sites("WHERE s.state IN ('approved', 'revoked', 'left') ORDER BY s.id")

    def sites(self) -> tuple[SiteRow, ...]:
        """Every enrollment, oldest first."""
        return self._sites("ORDER BY s.id")

    def site(self, name: str) -> SiteRow | None:
        """The newest enrollment of this name, or None."""
        found = self._sites("WHERE s.name = ? ORDER BY s.id DESC LIMIT 1", name)
        return found[0] if found else None

    def owner(self, digest: str) -> SiteRow | None:
        """The enrollment that a key belongs to, whatever became of it, or None.

        Args:
            digest: of the key, as in :class:`~quorsum.enrollment.Keys`.
        """
        found = self._sites("JOIN keys k ON k.site = s.id WHERE k.digest = ?", digest)
        return found[0] if found else None

    def approve(self, name: str, words: str, now: float, who: str = "") -> SiteRow:
        """Make a pending site a member.

        Args:
            name: of the site.
            words: the six words that the site's administrator read out, or that the operator was shown and confirmed.
            now: seconds since 1970.
            who: the local user.

        Raises:
            UsageError: no such site is pending.
            Refusal: ``wrong-words``: the pending site has other words, so it has other keys.
        """
        with self._writing() as connection:
            site = self._expect(connection, name, "pending")
            if not hmac.compare_digest(site.words.encode(), _normal(words).encode()):
                raise Refusal(
                    "wrong-words",
                    f"the words of the pending site {name} are others than these; compare them with its administrator "
                    "again, and if they differ, refuse the site: somebody else uses its invitation",
                )
            self._decide(connection, site, "approved", now, who, f"words {site.words}")
            # Whoever joins must not read what was sealed before; a shared key is replaced.
            connection.execute("DELETE FROM relays")
            return _site_row(connection.execute(_SITE + "WHERE s.id = ?", (site.id,)).fetchone())

    def refuse(self, name: str, now: float, who: str = "") -> None:
        """Turn a pending site away. Its keys are free again, its invitation is not.

        Raises:
            UsageError: no such site is pending.
        """
        with self._writing() as connection:
            site = self._expect(connection, name, "pending")
            self._decide(connection, site, "refused", now, who)
            connection.execute("DELETE FROM keys WHERE site = ?", (site.id,))

    def revoke(self, name: str, now: float, who: str = "", reason: str = "") -> None:
        """Throw a member out. Its keys are never accepted again; its name can be invited again.

        Raises:
            UsageError: no such site is approved.
        """
        self._end_membership(name, "revoked", now, who, reason)

    def leave(self, name: str, now: float) -> None:
        """A member leaves by itself, with the same consequences.

        Raises:
            UsageError: no such site is approved.
        """
        self._end_membership(name, "left", now, f"site {name}", "")

    def _end_membership(self, name: str, state: State, now: float, who: str, reason: str) -> None:
        with self._writing() as connection:
            site = self._expect(connection, name, "approved")
            self._decide(connection, site, state, now, who, reason)
            connection.execute("DELETE FROM relays")

    def set_certificate(self, site: int, certificate: str, expires: float, now: float) -> bool:
        """Keep the certificate that was issued to a site.

        Args:
            site: its ``id``.
            certificate: PEM.
            expires: seconds since 1970.
            now: seconds since 1970.

        Returns:
            False, and nothing is kept, when the site is not approved any more; then it must not get the certificate.
        """
        with self._writing() as connection:
            row = connection.execute(
                "UPDATE sites SET certificate = ?, expires = ? WHERE id = ? AND state = 'approved' RETURNING name",
                (certificate, expires, site),
            ).fetchone()
            if row is not None:
                _log(connection, now, "coordinator", "issue", row[0], f"until {expires:.0f}")
            return row is not None

    def _present(self, connection: sqlite3.Connection, name: str) -> SiteRow | None:
        row = connection.execute(_SITE + "WHERE s.name = ? AND s.state IN ('pending', 'approved')", (name,)).fetchone()
        return None if row is None else _site_row(row)

    def _expect(self, connection: sqlite3.Connection, name: str, state: State) -> SiteRow:
        site = self._present(connection, name)
        if site is None or site.state != state:
            last = connection.execute("SELECT state FROM sites WHERE name = ? ORDER BY id DESC", (name,)).fetchone()
            raise UsageError(f"site {name} is not {state}: " + (f"it is {last[0]}" if last else "it never enrolled"))
        return site

    def _decide(
        self, connection: sqlite3.Connection, site: SiteRow, state: State, now: float, who: str, detail: str = ""
    ) -> None:
        connection.execute("UPDATE sites SET state = ?, decided = ? WHERE id = ?", (state, now, site.id))
        verbs = {"approved": "approve", "refused": "refuse", "revoked": "revoke", "left": "leave"}
        _log(connection, now, who, verbs[state], site.name, detail)

    def _sites(self, where: str, *values: Any) -> tuple[SiteRow, ...]:
        return tuple(_site_row(row) for row in self._read(_SITE + where, *values))

    # Keys that members share.

    def put_relay(self, relay: Relay, now: float) -> None:
        """Keep a sealed key for its recipient.

        Raises:
            Refusal: ``epoch-over``: the members are others than those it was sealed for; ``unknown-recipient``: it is
                for no other member; ``key-already-shared``: another member shares its key in this epoch.
        """
        with self._writing() as connection:
            # In here, so that nobody is revoked or let in between the look and the writing.
            members = connection.execute("SELECT name, identity FROM sites WHERE state = 'approved'").fetchall()
            check_epoch(relay.epoch, members)
            if relay.recipient == relay.sender or relay.recipient not in {name for name, _ in members}:
                raise Refusal("unknown-recipient", f"{relay.recipient} is no other member; ask for the roster again")
            row = connection.execute(
                "SELECT sender FROM relays WHERE epoch = ? AND sender != ?", (relay.epoch, relay.sender)
            ).fetchone()
            if row is not None:
                raise Refusal(
                    "key-already-shared", f"site {row[0]} shares its key with these members already; fetch that one"
                )
            connection.execute("DELETE FROM relays WHERE epoch != ?", (relay.epoch,))
            known = connection.execute(
                "SELECT 1 FROM relays WHERE epoch = ? AND recipient = ?", (relay.epoch, relay.recipient)
            ).fetchone()
            connection.execute(
                "INSERT OR REPLACE INTO relays (epoch, recipient, sender, sealed, signature, at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (relay.epoch, relay.recipient, relay.sender, relay.sealed, relay.signature, now),
            )
            # A member that sends the same over and over again must not fill the log.
            if known is None:
                detail = f"epoch {relay.epoch[:16]}"
                _log(connection, now, f"site {relay.sender}", "share-key", relay.recipient, detail)

    def get_relay(self, epoch: str, recipient: str) -> Relay | None:
        """The sealed key kept for a member in this epoch, or None."""
        rows = self._read(
            "SELECT epoch, sender, recipient, sealed, signature FROM relays WHERE epoch = ? AND recipient = ?",
            *(epoch, recipient),
        )
        return Relay(*rows[0]) if rows else None

    # Runs.

    def queue_run(self, name: str, bundle: bytes, config: str, now: float, who: str = "") -> int:
        """Ask for a run; the process takes the oldest first.

        Args:
            name: for people.
            bundle: the app.
            config: a JSON object.
            now: seconds since 1970.
            who: the local user.

        Returns:
            the number of the run.

        Raises:
            UsageError: ``config`` is not a JSON object.
        """
        _check_object("config", config)
        digest = sha256(bundle).hexdigest()
        with self._writing() as connection:
            number = connection.execute(
                "INSERT INTO runs (name, bundle, bundle_digest, config, state, detail, queued) "
                "VALUES (?, ?, ?, ?, 'queued', '', ?) RETURNING id",
                (name, bundle, digest, config, now),
            ).fetchone()[0]
            _log(connection, now, who, "queue-run", f"run {number}", f"{name}, bundle {digest}")
            return int(number)

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, oldest first."""
        return tuple(RunRow(*row) for row in self._read(_RUN + "ORDER BY id"))

    def run(self, number: int) -> RunRow:
        """One run.

        Raises:
            UsageError: there is none of this number.
        """
        rows = self._read(_RUN + "WHERE id = ?", number)
        if not rows:
            raise self._no_run(number)
        return RunRow(*rows[0])

    def bundle(self, number: int) -> bytes:
        """The app of a run.

        Raises:
            UsageError: there is no run of this number.
        """
        rows = self._read("SELECT bundle FROM runs WHERE id = ?", number)
        if not rows:
            raise self._no_run(number)
        return bytes(rows[0][0])

    def next_run(self) -> RunRow | None:
        """What to work on: a run that was begun and has not ended, else the one that was queued first, else None."""
        rows = self._read(
            _RUN + "WHERE state IN ('running', 'stopping', 'queued') ORDER BY state = 'queued', id LIMIT 1"
        )
        return RunRow(*rows[0]) if rows else None

    def set_run_state(
        self, number: int, state: RunState, now: float, detail: str = "", who: str = "coordinator"
    ) -> None:
        """Move a run on: queued -> running -> finished or failed; stopping -> stopped. The same state twice is fine.

        Raises:
            UsageError: there is no such run, or it cannot go from its state to this one.
        """
        with self._writing() as connection:
            row = connection.execute("SELECT state FROM runs WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise self._no_run(number)
            if state != row[0] and state not in _NEXT_STATES[row[0]]:
                raise UsageError(f"run {number} is {row[0]} and cannot become {state}")
            ended = now if not _NEXT_STATES[state] else None
            connection.execute(
                "UPDATE runs SET state = ?, detail = ?, started = CASE WHEN ? = 'running' THEN coalesce(started, ?) "
                "ELSE started END, ended = coalesce(ended, ?) WHERE id = ?",
                (state, detail, state, now, ended, number),
            )
            _log(connection, now, who, f"run-{state}", f"run {number}", detail)

    def append_round(self, run: int, number: int, record: str, now: float) -> None:
        """Write what happened in a round. The same record twice is fine, after a crash.

        Raises:
            UsageError: there is no such run, ``record`` is not a JSON object, or this round has another record.
        """
        _check_object("record", record)
        with self._writing() as connection:
            if connection.execute("SELECT 1 FROM runs WHERE id = ?", (run,)).fetchone() is None:
                raise self._no_run(run)
            old = connection.execute("SELECT record FROM rounds WHERE run = ? AND number = ?", (run, number)).fetchone()
            if old is not None and old[0] != record:
                raise UsageError(f"round {number} of run {run} has been recorded, with another outcome")
            connection.execute(
                "INSERT OR IGNORE INTO rounds (run, number, record, at) VALUES (?, ?, ?, ?)", (run, number, record, now)
            )

    def rounds(self, run: int) -> tuple[RoundRow, ...]:
        """The rounds of a run, in order."""
        rows = self._read("SELECT run, number, record, at FROM rounds WHERE run = ? ORDER BY number", run)
        return tuple(RoundRow(*row) for row in rows)

    # The log.

    def note(self, now: float, who: str, action: str, subject: str, detail: str = "") -> None:
        """Write a line that belongs to no change in here, such as the start of the process."""
        with self._writing() as connection:
            _log(connection, now, who, action, subject, detail)

    def events(self, since: int = 0, most: int = 1000) -> tuple[Event, ...]:
        """At most ``most`` lines of the log after line ``since``, in order."""
        rows = self._read(
            "SELECT id, at, who, action, subject, detail FROM events WHERE id > ? ORDER BY id LIMIT ?", since, most
        )
        return tuple(Event(*row) for row in rows)

    # Underneath.

    def _no_run(self, number: int) -> UsageError:
        see = COORDINATOR_HOME.command(self._path.parent, "coordinator", "runs")
        return UsageError(f"there is no run {number}; see: {see}")

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._errors(), self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), self._lock:
            # IMMEDIATE: what is looked at below cannot change before it is acted upon.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise DataError(
                "state-unusable", f"{self._path}: {error}; is the disk full, or another program at it?"
            ) from None
        except sqlite3.ProgrammingError as error:
            raise UsageError(f"{self._path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise DataError("state-damaged", f"{self._path}: {error}; restore it from a backup") from None


def check_epoch(epoch: str, members: Iterable[tuple[str, str]]) -> None:
    """Whether an epoch is that of these members, given by name and identity.

    Raises:
        Refusal: ``epoch-over``.
    """
    if epoch != key_epoch(members):
        raise Refusal(
            "epoch-over", "the members have changed, and with them the key; ask for the roster, then share a new key"
        )


def _write_ahead(connection: sqlite3.Connection) -> None:
    # Changing the mode does not wait for other processes that do the same, so it is tried again.
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _log(connection: sqlite3.Connection, now: float, who: str, action: str, subject: str, detail: str = "") -> None:
    connection.execute(
        "INSERT INTO events (at, who, action, subject, detail) VALUES (?, ?, ?, ?, ?)",
        (now, who, action, subject, detail),
    )


def _joined(keys: Keys) -> str:
    return " ".join(digest for _, digest in keys.digests())


def _normal(words: str) -> str:
    return "-".join(words.lower().replace("-", " ").split())


def _check_object(name: str, text: str) -> None:
    try:
        fine = isinstance(json.loads(text), dict)
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"{name} must be a JSON object")
