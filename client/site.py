"""The site's process: one connection to the coordinator, one warm worker, and a thread that keeps the site in order.

It opens no port. What it needs is in the site's home; what it is doing is in ``status.json`` there, for
``quorsum site status``. The upkeep thread, every minute and at once when the coordinator refuses the connection:

1. renews the site's certificate when two thirds of its time are over;
2. asks who the members are, and pins them;
3. measures how far the two clocks are apart;
4. where the federation shares a ``ckks`` key, fetches the one of the present members.

Four of its findings end the process, because going on would be wrong or useless: the site was revoked, it has left, the
list of members cannot be right, or the home is not that of an enrolled site. Everything else is tried again for ever.

The administrator's commands change ``site.toml``; it is read for every message, so that they hold at once. A file that
cannot be read allows nothing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout
from flwr.app import Context, Message
from flwr.clientapp.typing import Mod
from pydantic import BaseModel, ConfigDict, ValidationError

from quorsum import flower, logs, messages
from quorsum.client import enrollment, fleet, settings
from quorsum.client.home import SiteHome
from quorsum.client.keys import configured_suite
from quorsum.client.mod import seal
from quorsum.client.supervisor import ENDINGS, end_with_parent
from quorsum.client.worker import Worker, refused
from quorsum.config import SiteConfig, replace_file
from quorsum.crypto import CkksSite, CkksSiteKey, certificates
from quorsum.crypto.suite import RoundContext, SiteSuite
from quorsum.enrollment import Member
from quorsum.errors import CoordinatorFault, KeyMaterialError, QuorsumError, Refusal, UsageError
from quorsum.words import six_words

__all__ = [
    "RefusedMessage",
    "Status",
    "TakenRound",
    "child_command",
    "is_running",
    "member_words",
    "only_process",
    "read_status",
    "roster_check",
    "run_site",
]

log = logging.getLogger("flwr.quorsum.site")

UPKEEP_S: Final = 60.0
AFTER_TROUBLE_S: Final = 10.0

FINAL: Final = frozenset({"revoked", "left", "roster-changed", "not-enrolled"})
"""Codes of refusals with which a site's process ends."""

_REFUSED: Final = frozenset({fleet.CERTIFICATE, fleet.CLOCK, fleet.STRANGER})
_KEPT: Final = 20
# A coordinator that names strangers in every message must not make the site ask all the time, in seconds.
_ASK_AGAIN: Final = 5.0
_LOCK_PATIENCE: Final = 1.0
# What a site that is refused waits for the coordinator's reason, in seconds.
_LOOKING: Final = 5.0


# --- who takes part in a round ---


def roster_check(
    home: SiteHome,
    refresh: Callable[[], object] | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Callable[[RoundContext], None]:
    """A check that everybody in a round is an approved member, with the key that is pinned here.

    A site that joined a moment ago is not pinned yet; then the coordinator's list is asked for, at most every 5 s.

    Args:
        home: the site's.
        refresh: asks for the list and pins it; the coordinator's by default.
        monotonic: a clock.

    Returns:
        a function that raises ``CoordinatorFault``: ``unknown-site``, or ``roster-changed`` if the list that was asked
        for cannot be right; and ``KeyMaterialError`` if the pinned list cannot be read.
    """
    ask = refresh or (lambda: enrollment.roster(home))
    asked = -_ASK_AGAIN

    def check(context: RoundContext) -> None:
        nonlocal asked
        strangers = _strangers(home.roster(), context)
        if strangers and monotonic() - asked >= _ASK_AGAIN:
            asked = monotonic()
            try:
                ask()
            except (CoordinatorFault, KeyMaterialError):
                raise
            except Refusal as refusal:
                log.warning("the members cannot be asked for: %s", refusal)
            strangers = _strangers(home.roster(), context)
        if strangers:
            raise CoordinatorFault(
                "unknown-site",
                f"the round lists {', '.join(strangers[:5])}, which this site does not know as approved members with "
                "these keys; their administrators and the operator compare the keys, with: quorsum site status",
            )

    return check


def _strangers(members: Iterable[Member], context: RoundContext) -> list[str]:
    known = {member.site: member.identity for member in members if member.state == "approved"}
    if not context.keys:
        return [site for site in context.sites if site not in known]
    if len(context.keys) != len(context.sites):
        return list(context.sites)
    pairs = zip(context.sites, context.keys, strict=True)
    return [site for site, key in pairs if known.get(site) != key]


def member_words(member: Member) -> str:
    """Six words for a member's name and identity, the same at every site, for administrators to compare."""
    return six_words(b"member", member.site.encode(), bytes.fromhex(member.identity))


# --- what the process is doing ---


class TakenRound(BaseModel):
    """A round in which the site took part: the latest attempt and question."""

    model_config = ConfigDict(frozen=True)

    run: str
    round: int
    attempt: int
    phase: str
    when: str


class RefusedMessage(BaseModel):
    """An instruction that the site refused."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    when: str


class Status(BaseModel):
    """``status.json``: what the site's process was doing when it wrote this.

    Attributes:
        pid: of the process; 0 before the first one.
        started, since: when it was started, and since when its state holds, ISO 8601.
        state: of the connection, as in :mod:`quorsum.client.fleet`.
        trouble: what the upkeep thread found last; empty if all is well.
        clock_ahead: seconds by which the coordinator's clock is ahead.
        rounds, refusals: the latest, oldest first; kept over restarts.
    """

    model_config = ConfigDict(frozen=True)

    pid: int = 0
    started: str = ""
    state: str = ""
    since: str = ""
    trouble: str = ""
    clock_ahead: float | None = None
    rounds: tuple[TakenRound, ...] = ()
    refusals: tuple[RefusedMessage, ...] = ()


def read_status(home: SiteHome) -> Status:
    """What the site's process wrote last; empty if it never did."""
    try:
        return Status.model_validate_json((home.path / "status.json").read_bytes())
    except (OSError, ValidationError):
        return Status()


class _Board:
    """Writes the status, from several threads."""

    def __init__(self, home: SiteHome) -> None:
        self._home, self._lock, self._digest = home, threading.Lock(), ""
        kept = read_status(home)
        self._status = Status(pid=os.getpid(), started=_now(), rounds=kept.rounds, refusals=kept.refusals)

    def put(self, **fields: object) -> None:
        with self._lock:
            new = self._status.model_copy(update=fields)
            if new == self._status:
                return
            self._status = new
            # For people only: a full disk must not stop the site.
            with suppress(UsageError):
                replace_file(self._home.path / "status.json", new.model_dump_json(indent=1).encode())

    def note(self, message: Message, reply: Message) -> None:
        """Remember a message that was answered."""
        with suppress(Refusal):
            self._note(_header(message), _header(reply))

    def _note(self, asked: messages.AnyMessage | None, said: messages.AnyMessage | None) -> None:
        status = self._status
        match asked, said:
            case _, messages.Fault(code=code, message=text):
                refusal = RefusedMessage(code=code, message=text, when=_now())
                self.put(refusals=(*status.refusals, refusal)[-_KEPT:])
            case ((messages.Train(context=told) | messages.Again(context=told)), messages.Submission(context=digest)):
                self._digest = digest
                taken = TakenRound(run=told.run, round=told.round, attempt=told.attempt, phase="train", when=_now())
                others = [old for old in status.rounds if (old.run, old.round) != (taken.run, taken.round)]
                self.put(rounds=(*others, taken)[-_KEPT:])
            case messages.Question(context=digest, phase=phase), messages.Answer() if digest == self._digest:
                last = status.rounds[-1].model_copy(update={"phase": phase, "when": _now()})
                self.put(rounds=(*status.rounds[:-1], last))


def _header(message: Message) -> messages.AnyMessage | None:
    if not message.has_content() or not messages.has_header(message.content):
        return None
    return messages.unpack(message.content)[0]


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


# --- the worker ---


class _Workers:
    """The worker for the configuration as it is now."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        self._made: tuple[dict[str, settings.Value], int, str | None] | None = None
        self._worker: Worker | None = None
        self._check = roster_check(home)

    def handle(self, message: Message, bundle: bytes, run: flower.Run) -> Message:
        """Answer one message."""
        try:
            config = self._home.config()
        except QuorsumError as error:
            log.error("%s", error)
            # The words of the error name files of this site.
            reason = Refusal("bundle-not-allowed", "this site's configuration cannot be read; its own log says why")
            return refused(self._home.path, message, reason)
        return self._current(config).handle(message, bundle, run)

    def _current(self, config: SiteConfig) -> Worker:
        table = settings.node_config(config)
        wanted = (table, config.minimum_sites, config.suite_key)
        if self._worker is None or wanted != self._made:
            self._worker = Worker(
                self._home.path, self._allowed, table, sealing=_sealing(self._home, config, self._check)
            )
            self._made = wanted
        return self._worker

    def count(self) -> int:
        """How many bundles may run now."""
        return len(self._allowed())

    def _allowed(self) -> Sequence[str]:
        try:
            return self._home.config().allow
        except QuorsumError as error:
            log.error("%s; nothing runs here until it can be read", error)
            return ()


def _sealing(home: SiteHome, config: SiteConfig, check: Callable[[RoundContext], None]) -> Mod:
    if config.suite_key != settings.SHARED_KEY:
        return seal(configured_suite, minimum_sites=config.minimum_sites, check=check)

    def shared(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        # A mod for every message: the key changes when the members do, and the old one must not be used again.
        mod = seal(lambda _: _shared_suite(home), minimum_sites=config.minimum_sites, check=check)
        return mod(message, context, call_next)

    return shared


def _shared_suite(home: SiteHome) -> SiteSuite:
    return _ckks(enrollment.load_shared_key(home).to_bytes())


@lru_cache(maxsize=1)
def _ckks(key: bytes) -> CkksSite:
    return CkksSite(CkksSiteKey.from_bytes(key))


# --- the upkeep ---


@dataclass
class _Upkeep:
    """Keeps certificate, members and clock in order, in a thread."""

    home: SiteHome
    board: _Board
    stop: threading.Event
    pause: float
    clock_ahead: float = 0.0
    ended: Refusal | None = None

    def __post_init__(self) -> None:
        self.wake = threading.Event()
        self._said = ""
        self._looks = threading.Condition()
        self._wanted = self._done = 0

    def look(self, patience: float) -> bool:
        """Have it look now; whether what it has found ends the process. It waits for that for ``patience`` seconds."""
        with self._looks:
            self._wanted += 1
            mine = self._wanted
            self.wake.set()
            self._looks.wait_for(lambda: self._done >= mine or self.stop.is_set(), patience)
        return self.ended is not None

    def run(self) -> None:
        """Until it is stopped, or finds what ends the process."""
        try:
            while not self.stop.is_set():
                self._look_and_wait()
        finally:
            self._looked(self._wanted)

    def _looked(self, number: int) -> None:
        with self._looks:
            self._done = number
            self._looks.notify_all()

    def _look_and_wait(self) -> None:
        pause, number = self.pause, self._wanted
        try:
            self._once()
            self._say("")
        except Refusal as refusal:
            if refusal.code in FINAL:
                self.ended = refusal
                self.board.put(trouble=str(refusal))
                self.stop.set()
                return
            self._say(str(refusal))
            pause = min(pause, AFTER_TROUBLE_S)
        except UsageError as error:
            self._say(str(error))
            pause = min(pause, AFTER_TROUBLE_S)
        except Exception:
            log.exception("an error in the upkeep of this site")
        self._looked(number)
        # Without this, a coordinator that refuses would be asked as fast as it does.
        if not self.stop.wait(min(1.0, pause)):
            self.wake.wait(pause)
            self.wake.clear()

    def end(self) -> None:
        """Let the thread go."""
        self.stop.set()
        self.wake.set()

    def _once(self) -> None:
        before = certificates.expires(self.home.certificate())
        until = enrollment.renew(self.home)
        if until != before:
            logs.event(
                log, "certificate-renewed", f"renewed the certificate; it is valid until {until:%Y-%m-%d %H:%M} UTC"
            )
        self._members()
        self.clock_ahead = enrollment.clock_ahead(self.home)
        self.board.put(clock_ahead=round(self.clock_ahead, 2))
        if self.home.config().suite_key == settings.SHARED_KEY:
            self._shared_key()

    def _members(self) -> None:
        before = _approved(self.home.roster())
        now = _approved(enrollment.roster(self.home))
        came, went = sorted(now - before), sorted(before - now)
        if came or went:
            changes = [f"joined: {', '.join(came)}"] * bool(came) + [f"no longer: {', '.join(went)}"] * bool(went)
            logs.event(
                log,
                "members-changed",
                f"the members have changed; {'; '.join(changes)}. Compare their words with: "
                f"{self.home.command('site', 'status')}",
                joined=came,
                gone=went,
            )

    def _shared_key(self) -> None:
        try:
            enrollment.load_shared_key(self.home)
        except KeyMaterialError:
            key = enrollment.fetch_key(self.home)
            logs.event(log, "key-fetched", f"fetched the shared key {key.key_id}")

    def _say(self, trouble: str) -> None:
        self.board.put(trouble=trouble)
        if trouble and trouble != self._said:
            log.warning("%s", trouble)
        self._said = trouble


def _approved(members: Iterable[Member]) -> set[str]:
    return {member.site for member in members if member.state == "approved"}


# --- the process ---


class _Detail(logging.Filter):
    """Keeps the connection's own words for its states, so that each state is said once, with what to do next."""

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything through but those."""
        if record.levelno > logging.INFO:
            return True
        self.last = record.getMessage()
        return False


def _next_step(home: SiteHome, state: str, config: SiteConfig, count: int) -> str:
    steps = {
        fleet.CONNECTING: f"trying on at {config.fleet_address}; where nothing runs there, its operator runs: "
        "quorsum coordinator start",
        fleet.LEASED: "this site's former process still counts as connected, for up to 20 s",
        fleet.CERTIFICATE: "it is renewed by itself; if this stays, ask the coordinator's operator to run: "
        f"quorsum coordinator sites (is {config.site} there?)",
        fleet.CLOCK: "set this machine's clock, for example by running chrony",
        fleet.STRANGER: f"the coordinator's operator runs: quorsum coordinator approve {config.site}",
        fleet.ANOTHER: "stop the other process of this site first",
    }
    if state != fleet.CONNECTED:
        return steps.get(state, "")
    to = f"to {config.fleet_address} as {config.site}"
    if not count:
        return f"{to}; nothing may run here yet, run: {home.command('site', 'allow', 'APP_DIR')}"
    return f"{to}; apps allowed: {count}"


def run_site(home: SiteHome, stop: threading.Event, *, upkeep_s: float = UPKEEP_S, beat: float = fleet.BEAT) -> None:
    """Be the site until ``stop`` is set.

    Args:
        home: the folder of an enrolled site.
        stop: ends it, after the message in work.
        upkeep_s: seconds between two looks at certificate and members.
        beat: seconds between two signs of life.

    Raises:
        KeyMaterialError: the site is not enrolled, or a key cannot be read.
        UsageError: ``site.toml`` is wrong.
        Refusal: ``revoked``, ``left`` or ``roster-changed``.
    """
    config = home.config()
    home.identity(), home.node_key(), home.tls_key()
    board, ended = _Board(home), threading.Event()
    upkeep = _Upkeep(home, board, ended, upkeep_s)
    workers, detail = _Workers(home), _Detail()
    logging.getLogger(fleet.log.name).addFilter(detail)

    def on_state(state: str) -> None:
        board.put(state=state, since=_now())
        said = detail.last if detail.last.startswith(state) else state
        if state in _REFUSED and upkeep.look(_LOOKING):
            # The end of the process says why.
            return
        step = _next_step(home, state, config, workers.count())
        separator = " " if state == fleet.CONNECTED else "; "
        logs.event(log, "state", separator.join(part for part in (said, step) if part), state=state)

    def handle(message: Message, bundle: bytes, run: flower.Run) -> Message:
        reply = workers.handle(message, bundle, run)
        board.note(message, reply)
        return reply

    def ending() -> None:
        stop.wait()
        upkeep.end()

    for name, target in (("upkeep", upkeep.run), ("stop", ending)):
        threading.Thread(target=target, name=name, daemon=True).start()
    try:
        fleet.serve(
            config.fleet_address,
            fleet.Credentials(home.certificate_file, home.tls_key_file, home.authority_file, home.node_key_file),
            handle,
            stop=ended,
            on_state=on_state,
            clock_offset=lambda: upkeep.clock_ahead,
            memory=home.path / "connected",
            beat=beat,
        )
    finally:
        upkeep.end()
        logging.getLogger(fleet.log.name).removeFilter(detail)
        board.put(state="stopped", since=_now())
    if upkeep.ended is not None:
        raise upkeep.ended


def only_process(home: SiteHome) -> FileLock:
    """Make sure that this is the only process of the site.

    Returns:
        the lock, held until it is released or the process ends.

    Raises:
        Refusal: ``already-running``.
        KeyMaterialError: the home takes no lock.
    """
    lock = FileLock(home.path / "site.lock", timeout=_LOCK_PATIENCE, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise Refusal(
            "already-running",
            f"the site in {home.path} is running already; see it with: {home.command('site', 'status')}",
        ) from None
    except OSError as error:
        raise KeyMaterialError("no-home", f"cannot use {home.path}: {error.strerror}; choose another home") from None
    return lock


def is_running(home: SiteHome) -> bool:
    """Whether a process of the site is running."""
    if not (home.path / "site.lock").exists():
        return False
    lock = FileLock(home.path / "site.lock", timeout=0, mode=0o600)
    try:
        with lock:
            return False
    except (Timeout, OSError):
        return True


def child_command(
    home: SiteHome, *, quiet: bool = False, as_json: bool = False, upkeep_s: float = UPKEEP_S
) -> list[str]:
    """How the supervisor starts the process."""
    options = {"home": str(home.path), "quiet": quiet, "json": as_json, "upkeep": upkeep_s}
    # -P: the folder in which it is started is none that modules come from.
    return [sys.executable, "-P", "-m", "quorsum.client.site", json.dumps(options)]


def main(argument: str) -> int:
    """The process itself; its standard input is the supervisor's pipe."""
    end_with_parent()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = json.loads(argument)
    logs.configure("json" if options["json"] else "text", sys.stderr, quiet=options["quiet"])
    no_use = {code: ending for ending, code in ENDINGS.items()}
    try:
        run_site(SiteHome(Path(options["home"])), stop, upkeep_s=options["upkeep"])
        return 0
    except UsageError as error:
        log.error("%s", error)
        return no_use[64]
    except KeyMaterialError as error:
        log.error("%s", error)
        return no_use[2]
    except Refusal as refusal:
        log.error("%s", refusal)
        return no_use[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
