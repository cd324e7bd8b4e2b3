"""What the coordinator's process says of itself, and the table that people see.

The process writes ``status.json`` into its home, in one step and at most once a second. The command line reads it
together with the state: who is a member and what happened in each round is in the state and outlives the process; who
is connected and what goes on right now is in the file and is worth something only while the process lives.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quorsum.durable import replace_file
from quorsum.errors import SiteFault
from quorsum.homes import COORDINATOR_HOME
from quorsum.server.deployment import TOO_FEW
from quorsum.server.records import RoundRecord
from quorsum.server.store import RoundRow, RunRow, SiteRow, Store

__all__ = ["BUCKETS", "STALE", "Board", "Histogram", "Tally", "alive", "read", "table", "view", "when"]

STALE: Final = 10.0
"""Seconds after which a process that has not written its status counts as not answering."""

BUCKETS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
"""Upper ends of the classes in which durations are counted, in seconds; one more class has no end."""

_OFTEN: Final = 1.0
_REFUSALS_SHOWN: Final = 8


@dataclass
class Histogram:
    """Durations in classes.

    Attributes:
        counts: one for each of :data:`BUCKETS`, and one for what is longer.
        total: sum of the durations, in seconds.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass
class Tally:
    """What has been counted since the process began.

    Attributes:
        rounds: by result, ``finished`` or ``failed``.
        phases: durations by phase.
        up, down: bytes of arrays and blocks from and to the sites.
        refusals: sites that were left out of a round, by code.
        enrollment_refusals: calls that were refused on the ports of enrollment and members, by code.
        online: connected sites.
    """

    rounds: Counter[str] = field(default_factory=Counter)
    phases: dict[str, Histogram] = field(default_factory=dict)
    up: float = 0.0
    down: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    enrollment_refusals: Counter[str] = field(default_factory=Counter)
    online: int = 0


@dataclass(frozen=True)
class _Run:
    """The run that is played.

    Attributes:
        id: number of the run.
        name: for people.
        round: number of the round; 0 before the first.
        phase: what goes on.
        since: when that began, seconds since 1970.
        waiting: for whom.
        left_out: for each site that could not be taken into the round the reason.
        trouble: what keeps the run from going on, of the coordinator's own making.
    """

    id: int
    name: str
    round: int = 0
    phase: str = "starting"
    since: float = 0.0
    waiting: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""

    def with_(self, **changes: Any) -> _Run:
        """The same with other values."""
        return _Run(**{**self.__dict__, **changes})


class Board:
    """Where the parts of the process note what they do. Used from several threads.

    Args:
        path: of ``status.json``.
        federation: its name.
    """

    def __init__(self, path: Path, federation: str) -> None:
        self._path, self._federation = path, federation
        self._lock = threading.RLock()
        self._tally = Tally()
        self._started = time.time()
        self._listeners: dict[str, str] = {}
        self._online: dict[str, bool] = {}
        # Who was seen when is still of interest after the process was started again.
        self._seen: dict[str, float] = dict((read(path) or {}).get("last_seen", {}))
        self._run: _Run | None = None
        self._phase_began: float | None = None
        self._written = 0.0

    def listens(self, **listeners: str) -> None:
        """Note addresses by what is served there."""
        with self._lock:
            self._listeners |= listeners

    def online(self, sites: Mapping[str, bool]) -> None:
        """Note which members are connected."""
        with self._lock:
            self._online = dict(sites)
            self._seen |= {site: time.time() for site, there in sites.items() if there}
            self._tally.online = sum(sites.values())

    def begin_run(self, number: int, name: str) -> None:
        """Note that a run is played from now on."""
        with self._lock:
            self._run, self._phase_began = _Run(number, name, since=time.time()), None

    def end_run(self) -> None:
        """Note that no run is played."""
        with self._lock:
            self._end_phase()
            self._run = None

    def phase(self, number: int, phase: str) -> None:
        """Note that a phase of a round begins."""
        with self._lock:
            self._end_phase()
            self._phase_began = time.monotonic()
            self._change(round=number, phase=phase, since=time.time(), waiting=(), trouble="")

    def waiting(self, sites: Sequence[str]) -> None:
        """Note for whom the run waits."""
        with self._lock:
            if self._run is not None and self._run.waiting != tuple(sites):
                self._end_phase()
                phase = "waiting" if sites else "roster"
                self._change(waiting=tuple(sites), phase=phase, since=time.time())

    def trouble(self, sentence: str) -> None:
        """Note what keeps the run from going on."""
        with self._lock:
            self._change(trouble=sentence, phase="interrupted")

    def left_out(self, fault: SiteFault) -> None:
        """Note that a connected site could not be taken into a round."""
        with self._lock:
            self._tally.refusals[fault.code] += 1
            if self._run is not None:
                self._change(left_out={**self._run.left_out, fault.site: f"{fault.message} ({fault.code})"})

    def round(self, record: RoundRecord) -> None:
        """Note the end of a round."""
        with self._lock:
            self._end_phase()
            tally, invited = self._tally, len(record.invited)
            tally.rounds["failed" if record.failed else "finished"] += 1
            tally.up += record.bytes.get("up_per_site", 0.0) * invited
            tally.down += record.bytes.get("down_per_site", 0.0) * invited
            tally.refusals.update(record.codes.values())
            self._change(phase="between rounds", since=time.time(), left_out={})

    def refused_call(self, code: str) -> None:
        """Note a call that was refused on the ports of enrollment and members."""
        with self._lock:
            self._tally.enrollment_refusals[code] += 1

    def counted(self) -> Tally:
        """What has been counted, as a copy."""
        with self._lock:
            return copy.deepcopy(self._tally)

    def snapshot(self) -> dict[str, Any]:
        """What ``status.json`` holds."""
        with self._lock:
            run = None if self._run is None else {**self._run.__dict__, "waiting": list(self._run.waiting)}
            return {
                "schema_version": 1,
                "federation": self._federation,
                "pid": os.getpid(),
                "started": self._started,
                "updated": time.time(),
                "listeners": dict(self._listeners),
                "online": dict(self._online),
                "last_seen": dict(self._seen),
                "run": run,
                "counters": {
                    "rounds": dict(self._tally.rounds),
                    "refusals": dict(self._tally.refusals),
                    "enrollment_refusals": dict(self._tally.enrollment_refusals),
                    "bytes_up": self._tally.up,
                    "bytes_down": self._tally.down,
                },
            }

    def write(self, *, now: bool = False) -> None:
        """Write the file, unless that was done within the last second.

        Args:
            now: in any case.

        Raises:
            OSError: it cannot be written.
        """
        if now or time.monotonic() - self._written >= _OFTEN:
            replace_file(self._path, [json.dumps(self.snapshot()).encode()])
            self._written = time.monotonic()

    def _end_phase(self) -> None:
        if self._run is not None and self._phase_began is not None:
            seconds = time.monotonic() - self._phase_began
            self._tally.phases.setdefault(self._run.phase, Histogram()).add(seconds)
        self._phase_began = None

    def _change(self, **changes: Any) -> None:
        if self._run is not None:
            self._run = self._run.with_(**changes)


# --- reading ---


def read(path: Path) -> dict[str, Any] | None:
    """The file as the process wrote it last; None if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema_version") == 1 else None


def alive(snapshot: Mapping[str, Any] | None, now: float) -> tuple[bool, str]:
    """Whether the process that wrote a status is there, and a sentence about it."""
    if snapshot is None:
        return False, "the coordinator has not been started here"
    pid, updated = int(snapshot["pid"]), float(snapshot["updated"])
    if not _exists(pid):
        return False, f"the coordinator is not running; it was last seen {when(updated)}"
    if now - updated > STALE:
        return False, f"process {pid} has not said anything since {when(updated)}; it hangs, or has been stopped"
    return True, f"the coordinator runs as process {pid} since {when(float(snapshot['started']))}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def when(moment: float | None) -> str:
    """A time for people, UTC; a dash for never."""
    return "-" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def view(store: Store, snapshot: Mapping[str, Any] | None, federation: str, now: float) -> dict[str, Any]:
    """Everything about the federation, for ``--json`` and for the table.

    Args:
        store: the state.
        snapshot: what the process said last, or None.
        federation: its name.
        now: seconds since 1970.
    """
    lives, sentence = alive(snapshot, now)
    said: Mapping[str, Any] = snapshot or {}
    runs = store.runs()
    shown = _shown(runs, said.get("run") if lives else None)
    rounds = () if shown is None else store.rounds(shown.id)
    records = [(row, json.loads(row.record)) for row in rounds]
    accepted = Counter(site for _, record in records for site in record["accepted"])
    rejected = Counter(site for _, record in records for site in record["rejected"])
    online, seen = said.get("online", {}) if lives else {}, said.get("last_seen", {})
    return {
        "schema_version": 1,
        "federation": federation,
        "running": lives,
        "process": sentence,
        "listeners": dict(said.get("listeners", {})) if lives else {},
        "sites": [
            {
                "site": site.name,
                "state": site.state,
                "online": bool(online.get(site.name)) if lives and site.state == "approved" else None,
                "last_seen": seen.get(site.name),
                "certificate_expires": site.expires,
                "accepted": accepted[site.name],
                "rejected": rejected[site.name],
            }
            for site in _newest(store.sites())
        ],
        "run": None if shown is None else _run_view(shown, records, said.get("run") if lives else None),
        "queued": sum(run.state == "queued" and run is not shown for run in runs),
        "refusals": list(_refusals(records))[-_REFUSALS_SHOWN:],
        "counters": dict(said.get("counters", {})) if lives else {},
    }


def _newest(sites: Sequence[SiteRow]) -> list[SiteRow]:
    return sorted({site.name: site for site in sites}.values(), key=lambda site: site.name)


def _shown(runs: Sequence[RunRow], playing: Mapping[str, Any] | None) -> RunRow | None:
    """The run that is played, else one that was begun, else the newest."""
    if playing is not None:
        return next((run for run in runs if run.id == playing["id"]), None)
    begun = [run for run in runs if run.state in ("running", "stopping")]
    return next(iter([*begun, *runs[-1:]]), None)


def _run_view(
    run: RunRow, records: Sequence[tuple[RoundRow, Mapping[str, Any]]], playing: Mapping[str, Any] | None
) -> dict[str, Any]:
    current = playing if playing is not None and playing["id"] == run.id else {}
    return {
        "id": run.id,
        "name": run.name,
        "state": run.state,
        "detail": run.detail,
        "bundle": run.bundle_digest,
        "rounds_played": len(records),
        "round": current.get("round", 0),
        "phase": current.get("phase", ""),
        "since": current.get("since"),
        "waiting": list(current.get("waiting", ())),
        "left_out": dict(current.get("left_out", {})),
        "trouble": current.get("trouble", ""),
        "metrics": dict(records[-1][1]["metrics"]) if records else {},
    }


def _refusals(records: Sequence[tuple[RoundRow, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for row, record in records:
        for site in record["rejected"]:
            code, reason = record["codes"].get(site, ""), record["reasons"].get(site, "")
            yield {"round": row.number, "site": site, "code": code, "reason": reason, "at": row.at}


# --- showing ---


def table(seen: Mapping[str, Any], now: float, home: Path) -> RenderableType:
    """A view as people see it; what to type next means the coordinator's folder ``home``."""
    parts: list[RenderableType] = [
        Text.assemble((f"{seen['federation']}: ", "bold"), (seen["process"], "" if seen["running"] else "bold red"))
    ]
    parts += [Text(f"  {name:<11}{address}") for name, address in seen["listeners"].items()]
    sites = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "state", "online", "last seen", "certificate until", "accepted", "rejected"):
        sites.add_column(column, justify="right" if column in ("accepted", "rejected") else "left")
    for site in seen["sites"]:
        sites.add_row(*_site_cells(site, now))
    parts += [Text(""), sites if seen["sites"] else Text("no site has been enrolled")]
    parts += [Text(""), *_run_lines(seen, home)]
    if seen["refusals"]:
        parts += [Text(""), Text("left out last", "bold")]
        parts += [Text(f"  round {r['round']}: {r['site']}: {r['reason']} ({r['code']})") for r in seen["refusals"]]
    return Group(*parts)


def _site_cells(site: Mapping[str, Any], now: float) -> tuple[Text, ...]:
    online = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("-")}[site["online"]]
    expires = site["certificate_expires"]
    late = expires is not None and expires < now and site["state"] == "approved"
    return (
        Text(site["site"]),
        Text(site["state"], "yellow" if site["state"] == "pending" else ""),
        online,
        Text(when(site["last_seen"])),
        Text(when(expires), "red" if late else ""),
        Text(str(site["accepted"])),
        Text(str(site["rejected"])),
    )


def _run_lines(seen: Mapping[str, Any], home: Path) -> list[RenderableType]:
    run = seen["run"]
    if run is None:
        return [Text(f"no run has been asked for; begin one with: {COORDINATOR_HOME.command(home, 'run', 'APP')}")]
    detail = f" ({run['detail']})" if run["detail"] else ""
    lines: list[RenderableType] = [
        Text.assemble((f"run {run['id']}: ", "bold"), f"{run['name']}, {run['state']}{detail}; "
                      f"{run['rounds_played']} rounds played")
    ]  # fmt: skip
    if run["phase"]:
        number = f"round {run['round']}, " if run["round"] else ""
        lines.append(Text(f"  {number}{run['phase']} since {when(run['since'])}"))
    if run["waiting"]:
        invite = COORDINATOR_HOME.command(home, "coordinator", "invite", "SITE")
        step = f"next: {invite}" if run["waiting"][-1].endswith(TOO_FEW) else "there: quorsum site start"
        lines.append(Text(f"  waits for {', '.join(run['waiting'])}; {step}", "yellow"))
    lines += [Text(f"  {site}: {reason}", "yellow") for site, reason in run["left_out"].items()]
    if run["trouble"]:
        lines.append(Text(f"  {run['trouble']}", "bold red"))
    if run["metrics"]:
        lines.append(Text("  " + ", ".join(f"{name} {value:.4g}" for name, value in run["metrics"].items())))
    if seen["queued"]:
        lines.append(Text(f"  {seen['queued']} more queued"))
    return lines
