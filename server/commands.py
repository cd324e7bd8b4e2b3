"""The coordinator's commands: ``quorsum coordinator ...`` and ``quorsum run``.

stdout carries the artifact only: invitations, a table, one JSON object with ``--json``. Everything else goes to stderr
as ``quorsum: ...``, and whatever waits or was refused ends in the next command. Exit status: 0 done, 1 refused, failed
or not done, 2 could not tell, or nothing is done until it is confirmed, 64 wrong usage.

No command speaks with the coordinator's process: all of them read and write the state in the coordinator's folder, so
they work whether it runs or not.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import io
import json
import math
import os
import shlex
import socket
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec

import numpy as np
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quorsum import bundles
from quorsum.config import CoordinatorConfig, replace_file
from quorsum.errors import DataError, KeyMaterialError, QuorsumError, Refusal, UsageError
from quorsum.invitation import Invitation, encode, secret_hash
from quorsum.server import status as board
from quorsum.server.authority import load_authority
from quorsum.server.deployment import TOO_FEW
from quorsum.server.home import DEFAULT_HOME, HOME_VARIABLE, CoordinatorHome
from quorsum.server.runner import last_state
from quorsum.server.status import when
from quorsum.server.store import RunRow, SiteRow, Store

__all__ = ["coordinator", "run"]


_DONE, _NOT_DONE, _UNKNOWN = 0, 1, 2
_GLANCE: Final = 0.3
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_LONGEST_OVERRIDE: Final = 1000
_WIDEST: Final = 1000

P = ParamSpec("P")

coordinator = typer.Typer(
    name="coordinator", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, help="Run the coordinator of a federation.",
)  # fmt: skip
run = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Home = Annotated[Path, typer.Option("--home", envvar=HOME_VARIABLE, help="the coordinator's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


# --- what all commands share ---


def _talk(text: str) -> None:
    typer.echo(f"quorsum: {text}", err=True)


def _answering(command: Callable[P, int | None]) -> Callable[P, None]:
    """A command whose refusals have the exit statuses of this module."""

    @functools.wraps(command)
    def answer(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            result = command(*args, **kwargs)
        except UsageError:
            raise
        except (DataError, KeyMaterialError) as error:
            _talk(str(error))
            result = _UNKNOWN
        except QuorsumError as error:
            _talk(str(error))
            result = _NOT_DONE
        if result:
            raise typer.Exit(result)

    return answer


@dataclass(frozen=True)
class _Place:
    """A coordinator's folder, opened."""

    home: CoordinatorHome
    config: CoordinatorConfig
    store: Store

    def snapshot(self) -> dict[str, Any] | None:
        return board.read(self.home.status_file)

    def alive(self) -> tuple[bool, str]:
        return board.alive(self.snapshot(), time.time())

    def view(self) -> dict[str, Any]:
        return board.view(self.store, self.snapshot(), self.config.federation, time.time())

    def command(self, *words: str) -> str:
        """A command as it must be typed to mean this folder."""
        return self.home.command("coordinator", *words)


@contextmanager
def _opened(home: Path) -> Iterator[_Place]:
    place = CoordinatorHome(home)
    config = place.config()
    with closing(place.store()) as store:
        yield _Place(place, config, store)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(_finite({"schema_version": 1, **value}), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no word for what is no number."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _print_whole(table: Table) -> None:
    """Print a table with one line for each row: where it is wider than the terminal, the terminal wraps the lines."""
    Console(highlight=False, width=_WIDEST).print(table)


def _hint_if_not_running(place: _Place) -> None:
    lives, sentence = place.alive()
    if not lives:
        _talk(f"{sentence}; start it with: {place.command('start')}")


# --- the folder and the process ---


@coordinator.command()
@_answering
def init(
    home: Home = DEFAULT_HOME,
    name: Annotated[str, typer.Option(help="of the federation")] = "federation",
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all of this machine")] = "127.0.0.1",
    advertise: Annotated[
        list[str] | None,
        typer.Option(help="name or IP address under which sites reach this machine; may be given several times"),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65533, help="enrollment; members and fleet take the next two; 0: any free ones")
    ] = 7401,
) -> None:
    """Make the coordinator's folder: authority, state and configuration."""
    if advertise is None and host not in _LOOPBACK:
        raise UsageError(
            "say under which name or IP address sites reach this machine: --advertise HOST, as often as needed"
        )
    names = list(dict.fromkeys([*(advertise or ()), "localhost", "127.0.0.1"]))
    ports = _free_ports(host) if port == 0 else (port, port + 1, port + 2)
    try:
        config = CoordinatorConfig(
            federation=name, host=host, advertise=names,
            enrollment_port=ports[0], members_port=ports[1], fleet_port=ports[2],
        )  # fmt: skip
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        option = {"federation": "--name"}.get(str(detail["loc"][0]), f"--{detail['loc'][0]}")
        raise UsageError(f"{option}: {detail['msg']}") from None
    place = CoordinatorHome(home)
    place.create(config, datetime.now(UTC))
    _talk(f"made {home}; keep {home / 'ca.key'} secret and back it up, it vouches for every site")
    _talk(f"settings are in {place.config_file}; next: {CoordinatorHome(home).command('coordinator', 'start')}")


def _free_ports(host: str) -> tuple[int, int, int]:
    with ExitStack() as opened:
        found = []
        for _ in range(3):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = opened.enter_context(socket.socket(family))
            try:
                listener.bind((host, 0))
            except OSError as error:
                raise UsageError(f"cannot listen on {host}: {error.strerror}; choose another --host") from None
            found.append(int(listener.getsockname()[1]))
    return found[0], found[1], found[2]


@coordinator.command()
@_answering
def start(
    home: Home = DEFAULT_HOME,
    quiet: Annotated[bool, typer.Option("--quiet", help="say only what is wrong")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="log one JSON object a line")] = False,
) -> None:
    """Run the coordinator: enrollment, fleet and runs, in this process, until it is told to end."""
    from quorsum.server.coordinator import serve

    serve(CoordinatorHome(home), quiet=quiet, as_json=log_json)


@coordinator.command()
@_answering
def backup(
    file: Annotated[Path, typer.Argument(help="archive to write; must not exist")], home: Home = DEFAULT_HOME
) -> None:
    """Copy authority, state and the models of all runs into one archive, whether the coordinator runs or not."""
    with _opened(home) as place:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}; name a file that is not there") from None
        state = file.with_name(f"{file.name}.state")
        try:
            place.store.backup(state)
            with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w") as archive:
                _add(archive, "state.db", state.read_bytes())
                for path in _worth_keeping(place.home):
                    _add(archive, str(path.relative_to(home)), path.read_bytes())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        finally:
            state.unlink(missing_ok=True)
    there = shlex.quote(str(file))
    _talk(f"wrote {file}; it holds the authority's key, so keep it as secret as the folder itself")
    _talk(f"to restore it: mkdir -m 700 NEW-HOME && tar -xf {there} -C NEW-HOME")


def _worth_keeping(home: CoordinatorHome) -> list[Path]:
    # Open rounds stay out: they are worth nothing without the very same process going on with them.
    keys = [home.path / name for name in ("ca.key", "ca.crt", "server.key", "server.crt")]
    return [p for p in [*keys, home.config_file, *sorted(home.runs.glob("*/*/state.npz"))] if p.exists()]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(content))


# --- who is in ---


@coordinator.command()
@_answering
def invite(
    sites: Annotated[list[str], typer.Argument(metavar="SITE...", help="names of the sites")],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Print one invitation for each site: a line to be pasted there. It works once."""
    if len(set(sites)) != len(sites):
        raise UsageError("a site is named twice; every site gets one invitation")
    with _opened(home) as place:
        now = time.time()
        expires = int(now + place.config.invitation_hours * 3600)
        address, fingerprint = _enrollment_address(place), load_authority(home).fingerprint
        # All names are checked before the first invitation is made.
        made = [Invitation(address, fingerprint, site, expires, os.urandom(16)) for site in sites]
        for one in made:
            place.store.invite(one.site, secret_hash(one.secret), expires, now, _who())
        if as_json:
            _print_json(
                {"invitations": [{"site": m.site, "expires": m.expires, "invitation": encode(m)} for m in made]}
            )
        else:
            for one in made:
                typer.echo(encode(one) if len(made) == 1 else f"{one.site}\t{encode(one)}")
        _talk(
            f"give each site its line by a way that nobody else reads; it works once, until {when(expires)}; "
            "there: quorsum site enroll"
        )
        _hint_if_not_running(place)
        _talk(f"then compare six words with each site's administrator: {place.command('approve')}")


def _enrollment_address(place: _Place) -> str:
    if place.config.enrollment_port:
        return place.config.address(place.config.enrollment_port)
    listeners = (place.snapshot() or {}).get("listeners", {})
    if "enrollment" not in listeners:
        raise Refusal(
            "no-address",
            "the enrollment port is 0 in coordinator.toml, so the address is known once the coordinator runs; "
            f"first: {place.command('start')}",
        )
    return str(listeners["enrollment"])


@coordinator.command()
@_answering
def approve(
    sites: Annotated[list[str] | None, typer.Argument(metavar="[SITE[=WORDS]...]", help="who waits")] = None,
    home: Home = DEFAULT_HOME,
    words: Annotated[str | None, typer.Option(help="the six words that the site's administrator reads out")] = None,
    everybody: Annotated[bool, typer.Option("--all", help="approve everybody who waits")] = False,
    compared: Annotated[
        bool, typer.Option("--yes-i-compared-the-words", help="for --all: you have compared them, for every site")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Let sites in whose six words are those that their administrators read out; without a name, ask for each."""
    with _opened(home) as place:
        waiting = {site.name: site for site in place.store.pending()}
        if as_json and not sites and not everybody:
            _print_json({"waiting": [_waiting_json(site) for site in waiting.values()]})
            return _DONE
        chosen = _everybody(place, waiting, sites, words, compared) if everybody else _named(sites or [], words)
        for name in [*chosen, *(sites or [])]:
            site = waiting.get(name.partition("=")[0])
            if site is not None and site.strangers:
                _talk(
                    f"{site.name}: its invitation was presented {site.strangers} times with other keys as well; it "
                    f"may have been stolen. If the words differ: {place.command('refuse', site.name)}"
                )
        if chosen:
            return _approve(place, waiting, chosen)
        asked = [waiting[name] for name in sites or waiting if name in waiting]
        missing = [name for name in sites or () if name not in waiting]
        if missing:
            raise UsageError(_not_waiting(place, missing[0], waiting))
        return _ask(place, asked)


def _waiting_json(site: SiteRow) -> dict[str, Any]:
    return {
        "site": site.name, "words": site.words, "address": site.address, "enrolled": site.enrolled,
        "strangers": site.strangers,
    }  # fmt: skip


def _everybody(
    place: _Place, waiting: Mapping[str, SiteRow], sites: Sequence[str] | None, words: str | None, compared: bool
) -> dict[str, str]:
    if sites or words:
        raise UsageError("--all goes without names and words")
    if not compared:
        _show_waiting(waiting.values())
        _talk(
            "read these words to each site's administrator; when all are the same: "
            + place.command("approve", "--all", "--yes-i-compared-the-words")
        )
        raise typer.Exit(_UNKNOWN)
    return {site.name: site.words for site in waiting.values()}


def _named(sites: Sequence[str], words: str | None) -> dict[str, str]:
    pairs = [site.partition("=") for site in sites]
    with_words = [(name, given) for name, equals, given in pairs if equals]
    if words is not None:
        if len(sites) != 1 or with_words:
            raise UsageError("--words goes with one site; for several write SITE=WORDS for each")
        return {sites[0]: words}
    if with_words and len(with_words) != len(pairs):
        raise UsageError("write SITE=WORDS for every site, or for none")
    return dict(with_words)


def _approve(place: _Place, waiting: Mapping[str, SiteRow], chosen: Mapping[str, str]) -> int:
    for name in chosen:
        if name not in waiting:
            raise UsageError(_not_waiting(place, name, waiting))
    failed = 0
    for name, given in chosen.items():
        try:
            place.store.approve(name, given, time.time(), _who())
            _talk(f"{name} is a member")
        except Refusal as refusal:
            failed += 1
            _talk(f"{refusal}: {place.command('refuse', name)}")
    if failed < len(chosen):
        _talk(f"next: {place.home.command('run', 'APP')}")
    return _NOT_DONE if failed else _DONE


def _ask(place: _Place, asked: Sequence[SiteRow]) -> int:
    if not asked:
        _talk("nobody waits to be approved")
        return _DONE
    if not sys.stdin.isatty():
        _show_waiting(asked)
        pairs = [f"{site.name}={site.words}" for site in asked]
        _talk(f"compare the words with each site's administrator; where they are the same: "
              f"{place.command('approve', *pairs)}")  # fmt: skip
        return _UNKNOWN
    chosen: dict[str, str] = {}
    for site in asked:
        _talk(f"{site.name}, enrolling from {site.address}, shows: {site.words}")
        if typer.confirm("quorsum: does its administrator read the same words?", err=True):
            chosen[site.name] = site.words
        else:
            _talk(f"{site.name} still waits; if the words differ: {place.command('refuse', site.name)}")
    if not chosen:
        return _NOT_DONE
    return max(_approve(place, {site.name: site for site in asked}, chosen), int(len(chosen) < len(asked)))


def _show_waiting(sites: Any) -> None:
    for site in sites:
        _talk(f"{site.name} waits, enrolling from {site.address}: {site.words}")


def _not_waiting(place: _Place, name: str, waiting: Mapping[str, SiteRow]) -> str:
    site = place.store.site(name)
    state = f"is {site.state}" if site is not None else "has not enrolled"
    others = f"; who waits: {', '.join(waiting)}" if waiting else "; nobody waits"
    return f"{name} {state}{others}; see: {place.command('sites')}"


@coordinator.command()
@_answering
def refuse(site: Annotated[str, typer.Argument(help="its name")], home: Home = DEFAULT_HOME) -> None:
    """Turn a waiting site away."""
    with _opened(home) as place:
        place.store.refuse(site, time.time(), _who())
        _talk(f"{site} was turned away; to invite it anew: {place.command('invite', site)}")


@coordinator.command("sites")
@_answering
def list_sites(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Who was invited, who waits, who is a member, who was sent away."""
    with _opened(home) as place:
        rows, seen = place.store.sites(), place.view()
        online = {one["site"]: one["online"] for one in seen["sites"]}
        names = {row.name for row in rows if row.state in ("pending", "approved")}
        open_ = [
            one for one in place.store.invitations()
            if one.used is None and one.withdrawn is None and one.expires > time.time() and one.site not in names
        ]  # fmt: skip
        if as_json:
            sites = [
                {
                    "site": row.name, "state": row.state, "words": row.words, "enrolled": row.enrolled,
                    "decided": row.decided, "certificate_expires": row.expires, "address": row.address,
                    "online": online.get(row.name) if row.state == "approved" else None, "strangers": row.strangers,
                }
                for row in rows
            ]  # fmt: skip
            _print_json({"sites": sites, "invited": [{"site": one.site, "expires": one.expires} for one in open_]})
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("site", "state", "online", "since", "certificate until"):
            table.add_column(column)
        for row in rows:
            there = {True: "yes", False: "no", None: "-"}[online.get(row.name) if row.state == "approved" else None]
            cells = (row.name, row.state, there, when(row.decided or row.enrolled), when(row.expires))
            table.add_row(*map(Text, cells))
        for one in open_:
            until = f"(invitation until {when(one.expires)})"
            table.add_row(*map(Text, (one.site, "invited", "-", when(one.created), until)))
        _print_whole(table)
        # Below the table: words that are to be compared must not be cut to a column.
        for row in rows:
            if row.state in ("pending", "approved"):
                _console().print(Text(f"{row.name}: {row.words}"), soft_wrap=True)
        if any(row.state == "pending" for row in rows):
            _talk(f"compare the words of those that wait: {place.command('approve')}")
        if not rows and not open_:
            _talk(f"nobody has been invited yet; next: {place.command('invite', 'SITE')}")


@coordinator.command()
@_answering
def revoke(
    site: Annotated[str, typer.Argument(help="its name")],
    home: Home = DEFAULT_HOME,
    confirm: Annotated[str | None, typer.Option(metavar="DIGEST", help="of the plan, as printed without it")] = None,
    reason: Annotated[str, typer.Option(help="for the log")] = "",
) -> int:
    """Send a member away for good. Prints the plan first; --confirm DIGEST carries it out."""
    with _opened(home) as place:
        row = place.store.site(site)
        if row is None or row.state != "approved":
            state = f"is {row.state}" if row is not None else "never enrolled"
            raise UsageError(f"{site} {state}; members can be revoked; see: {place.command('sites')}")
        digest = hashlib.sha256(f"revoke\0{row.id}\0{row.name}\0{row.identity}".encode()).hexdigest()[:16]
        if confirm is None:
            for line in _plan(place, row):
                _talk(line)
            _talk(f"nothing has been done yet; to do it: {place.command('revoke', site, '--confirm', digest)}")
            return _UNKNOWN
        if confirm != digest:
            raise Refusal(
                "wrong-digest",
                f"the digest is that of another plan, or of an earlier member of this name; first: "
                f"{place.command('revoke', site)}",
            )
        place.store.revoke(site, time.time(), _who(), reason)
        _talk(f"{site} is no member any more; enrollment refuses it from now on, the fleet within a second")
        _talk(f"to let the organisation come back, with new keys: {place.command('invite', site)}")
        return _DONE


def _plan(place: _Place, site: SiteRow) -> Iterator[str]:
    yield f"the plan: send {site.name} away for good (member since {when(site.decided)}, words {site.words})"
    yield "its keys and its certificate are refused everywhere and can never be enrolled again"
    yield "a round that is going on continues without it if enough other sites remain, else it is played anew"
    yield "a ckks key that members share is void; one site shares a new one: quorsum site share-key"
    taken = sum(
        site.name in json.loads(row.record)["accepted"]
        for one in place.store.runs()
        for row in place.store.rounds(one.id)
    )
    yield (
        f"it does not undo what was: {taken} rounds have its update in the model, models that were handed out stay "
        "out, and what the site has learned it keeps"
    )


# --- what goes on ---


@coordinator.command()
@_answering
def status(
    home: Home = DEFAULT_HOME,
    watch: Annotated[bool, typer.Option("--watch", help="go on showing it, until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> int:
    """Sites, run, round, phase, for whom it waits, and who was left out and why."""
    with _opened(home) as place:
        seen = place.view()
        if as_json:
            _print_json(seen)
        elif watch:
            _watch(place)
        else:
            _console().print(board.table(seen, time.time(), place.home.path))
        if not seen["running"] and not watch:
            _hint_if_not_running(place)
            return _UNKNOWN
        return _DONE


def _watch(place: _Place) -> None:
    console = Console(highlight=False)
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(board.table(place.view(), time.time(), place.home.path), refresh=True)
                time.sleep(1)
    except KeyboardInterrupt:
        return


@coordinator.command("runs")
@_answering
def list_runs(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """What was asked to be trained, and what became of it."""
    with _opened(home) as place:
        rows = [(row, len(place.store.rounds(row.id))) for row in place.store.runs()]
        if as_json:
            _print_json({"runs": [_run_json(row, played) for row, played in rows]})
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("run", "app", "state", "rounds", "queued", "ended", "detail"):
            table.add_column(column)
        for row, played in rows:
            cells = (
                *(str(row.id), row.name, row.state, str(played)),
                *(when(row.queued), when(row.ended), row.detail),
            )
            table.add_row(*map(Text, cells))
        _console().print(table)
        if not rows:
            _talk(f"nothing has been asked for; next: {CoordinatorHome(home).command('run', 'APP')}")


def _run_json(row: RunRow, played: int) -> dict[str, Any]:
    return {
        "run": row.id, "app": row.name, "bundle": row.bundle_digest, "config": json.loads(row.config),
        "state": row.state, "detail": row.detail, "rounds_played": played, "queued": row.queued,
        "started": row.started, "ended": row.ended,
    }  # fmt: skip


@coordinator.command()
@_answering
def stop_run(
    number: Annotated[int, typer.Argument(metavar="ID", help="of the run")], home: Home = DEFAULT_HOME
) -> None:
    """End a run; what it has finished is kept."""
    with _opened(home) as place:
        row = place.store.run(number)
        if row.state not in ("queued", "running", "stopping"):
            raise UsageError(f"run {number} is {row.state} already; see: {place.command('runs')}")
        place.store.set_run_state(number, "stopped" if row.state == "queued" else "stopping", time.time(), "", _who())
        _talk(f"run {number} stops; what it has finished is kept; see: {place.command('runs')}")
        if row.state != "queued":
            _hint_if_not_running(place)


@coordinator.command()
@_answering
def follow(
    number: Annotated[int, typer.Argument(metavar="ID", help="of the run")],
    home: Home = DEFAULT_HOME,
    out: Annotated[Path | None, typer.Option(help="folder for result.json and model.npz")] = None,
    as_json: AsJson = False,
) -> int:
    """Watch a run until it ends: one line for each round, then the result."""
    with _opened(home) as place:
        place.store.run(number)
        return _follow(place, number, out, as_json)


@run.command("run")
@_answering
def run_app(
    app: Annotated[Path, typer.Argument(metavar="APP", help="folder of a Flower app")],
    home: Home = DEFAULT_HOME,
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", metavar="KEY=VALUE", help="replaces a setting of the app; may be repeated"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="print the number of the run and leave")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for result.json and model.npz")] = None,
    as_json: AsJson = False,
) -> int:
    """Train an app with the members of this coordinator's federation."""
    if detach and out is not None:
        raise UsageError("--out needs the end of the run; leave --detach out, or follow the run later")
    _writable(out)
    with _opened(home) as place:
        bundle = bundles.build(app)
        told = bundles.describe(bundle)
        overrides = _overrides(run_config or [], told)
        if "serverapp" not in told.components:
            raise UsageError(f"{app} has no serverapp in its pyproject.toml, so there is nothing to run here")
        digest = bundles.digest(bundle)
        number = place.store.queue_run(
            f"{told.name} {told.version}", bundle, json.dumps(overrides), time.time(), _who()
        )
        _talk(f"run {number}: {told.name} {told.version}, bundle {digest}")
        _talk(f"sites run it if they allow it; there: quorsum site allow {digest}")
        if detach:
            _hint_if_not_running(place)
            if as_json:
                _print_json(_run_json(place.store.run(number), 0))
            else:
                typer.echo(str(number))
            _talk(f"to watch it: {place.command('follow', str(number))}")
            return _DONE
        return _follow(place, number, out, as_json)


def _overrides(pairs: Sequence[str], told: bundles.Description) -> dict[str, bundles.Value]:
    found: dict[str, bundles.Value] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key or len(pair) > _LONGEST_OVERRIDE:
            raise UsageError(f"--run-config {pair[:100]!r}: write KEY=VALUE, such as rounds=5")
        found[key] = _fitting(key, _value(text.strip()), told)
    try:
        bundles.configured(told, found)
    except Refusal as refusal:
        raise UsageError(f"--run-config: {refusal}") from None
    return found


def _value(text: str) -> bundles.Value:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word; quotes would have to pass the shell first.
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _fitting(key: str, value: bundles.Value, told: bundles.Description) -> bundles.Value:
    usual = told.config.get(key)
    if isinstance(usual, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if usual is not None and type(value) is not type(usual):
        raise UsageError(f"--run-config: {key} is a {type(usual).__name__} in the app, got {value!r}")
    return value


def _writable(out: Path | None) -> None:
    """Find out before the work, not after it, that the results cannot be written."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {out}: permission denied; choose another --out")


# --- following a run ---


def _follow(place: _Place, number: int, out: Path | None, as_json: bool) -> int:
    _writable(out)
    try:
        row = _until_it_ends(place, number)
    except KeyboardInterrupt:
        _talk(f"run {number} goes on without you; to watch it: {place.command('follow', str(number))}; "
              f"to end it: {place.command('stop-run', str(number))}")  # fmt: skip
        return _UNKNOWN
    result = _result(place, row)
    if out is not None:
        _write_result(place, row, result, out)
    if as_json:
        _print_json(result)
    else:
        _console().print(_summary(row, result))
    if row.state != "finished":
        _talk(f"run {number} {row.state}{': ' if row.detail else ''}{row.detail}; "
              f"what happened in each round: {place.command('follow', str(number), '--json')}")  # fmt: skip
        return _NOT_DONE
    return _DONE


def _until_it_ends(place: _Place, number: int) -> RunRow:
    shown, said = 0, ""
    while True:
        row = place.store.run(number)
        rounds = place.store.rounds(number)
        for one in rounds[shown:]:
            _talk(_round_line(one.number, json.loads(one.record)))
        shown = len(rounds)
        if row.state in ("finished", "failed", "stopped"):
            return row
        sentence = _what_it_waits_for(place, row)
        if sentence and sentence != said:
            _talk(sentence)
        said = sentence
        time.sleep(_GLANCE)


def _what_it_waits_for(place: _Place, row: RunRow) -> str:
    lives, sentence = place.alive()
    if not lives:
        return f"run {row.id} waits: {sentence}; start it with: {place.command('start')}"
    seen = (place.snapshot() or {}).get("run")
    if seen is None or seen["id"] != row.id:
        if seen is not None and row.state == "queued":
            return f"run {row.id} waits for the end of run {seen['id']}; to end that: " + place.command(
                "stop-run", str(seen["id"])
            )
        return ""
    if seen["trouble"]:
        return str(seen["trouble"])
    if not place.store.approved_sites():
        return f"run {row.id} waits for members; next: {place.command('invite', 'SITE')}"
    left_out = seen["left_out"]
    if seen["waiting"]:
        short = [one for one in seen["waiting"] if one.endswith(TOO_FEW)]
        absent = [site for site in seen["waiting"] if site not in left_out and site not in short]
        parts = [f"{site}: {left_out[site]}" for site in seen["waiting"] if site in left_out]
        if absent:
            parts.insert(0, f"{', '.join(absent)}; there: quorsum site start")
        parts += [f"{one}; next: {place.command('invite', 'SITE')}" for one in short]
        return f"run {row.id} waits for {'; '.join(parts)}"
    return ""


def _round_line(number: int, record: Mapping[str, Any]) -> str:
    measures = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    head = f"round {number}: {measures or 'not evaluated'}, {record['seconds'].get('total', 0.0):.1f} s; "
    if record["failed"]:
        return head + f"failed: {record['failed']}"
    out = ", ".join(f"{site} ({record['codes'].get(site, '')})" for site in record["rejected"])
    return head + f"{len(record['accepted'])} of {len(record['invited'])} sites; left out: {out or 'nobody'}"


def _result(place: _Place, row: RunRow) -> dict[str, Any]:
    records = [json.loads(one.record) for one in place.store.rounds(row.id)]
    measured = [record["metrics"] for record in records if record["metrics"]]
    return {
        "schema_version": 1,
        **_run_json(row, len(records)),
        "rounds_finished": sum(record["failed"] is None for record in records),
        "metrics": measured[-1] if measured else {},
        "rounds": records,
    }


def _write_result(place: _Place, row: RunRow, result: Mapping[str, Any], out: Path) -> None:
    replace_file(out / "result.json", (json.dumps(_finite(result), indent=2, allow_nan=False) + "\n").encode())
    state = last_state(place.home.run_folder(row.id))
    if state is None:
        _talk(f"wrote {out / 'result.json'}; there is no model, no round was finished")
        return
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: array.numpy() for name, array in state.model.items()}
    np.savez(buffer, **arrays)
    replace_file(out / "model.npz", buffer.getvalue())
    _talk(f"wrote {out / 'result.json'} and {out / 'model.npz'}")


def _summary(row: RunRow, result: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("run", Text(f"{row.id} ({row.name})"))
    table.add_row("state", row.state)
    table.add_row("rounds", f"{result['rounds_finished']} finished, {result['rounds_played']} played")
    for name, value in result["metrics"].items():
        table.add_row(Text(name), f"{value:.4g}")
    if row.started is not None and row.ended is not None:
        table.add_row("seconds", f"{row.ended - row.started:.1f}")
    return table
