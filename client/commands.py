"""``quorsum site ...``: what a site's administrator types.

stdout carries the result only; everything else goes to stderr as ``quorsum: ...``. Exit status: 0 done, 1 checked and
found bad, 2 could not tell, or nothing is done until it is confirmed, 64 wrong usage, 130 interrupted. Heavy modules
are imported inside the commands. An invitation is a secret until it is used: it is read from standard input or a file,
never from the command line, which other users of the machine can see.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quorsum.errors import DataError, KeyMaterialError, Refusal, UsageError
from quorsum.homes import SITE_HOME

if TYPE_CHECKING:
    from quorsum.client.enrollment import Waiting
    from quorsum.client.home import SiteHome
    from quorsum.client.settings import Allowed, Value
    from quorsum.config import SiteConfig
    from quorsum.invitation import Invitation

__all__ = ["app"]

SCHEMA = 1
BAD, UNKNOWN, INTERRUPTED = 1, 2, 130

# What says nothing about right or wrong: it passes by itself, or the same command is given again.
_UNDECIDED = frozenset(
    {"unreachable", "rate-limited", "too-many-pending", "internal", "call-failed", "stopped", "roster-busy"}
)
# With these the same invitation can still be used.
_USABLE = _UNDECIDED | {"clock-skew", "wrong-name", "already-running"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Be a site: enroll, start, decide which apps run here.",
)
say = Console(stderr=True, highlight=False)

Home = Annotated[Path, typer.Option("--home", envvar=SITE_HOME.variable, help="the site's folder")]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object")]
DEFAULT_HOME = SITE_HOME.folder


@app.callback()
def _root() -> None:
    # gRPC writes every failed TLS handshake to stderr unless it is told not to before it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def enroll(
    context: typer.Context,
    home: Home = DEFAULT_HOME,
    invitation_file: Annotated[Path | None, typer.Option(help="file with the invitation; else it is asked for")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="folder or digest of an app that may run here")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in: quorsum site set")] = None,
    confirm: Annotated[bool, typer.Option("--confirm", help="accept what accept-small-models=true means")] = False,
    go_on: Annotated[bool, typer.Option("--start", help="go on as: quorsum site start")] = False,
    as_json: Json = False,
) -> None:
    """Join a federation with an invitation; may be interrupted and given again."""
    if context.args:
        raise UsageError(
            "an invitation is never written on the command line, where others can read it; paste it when you are "
            "asked, or use --invitation-file, and ask the coordinator's operator for a new one now"
        )
    from quorsum.client.settings import bundle_of

    with _refusals():
        entries = [bundle_of(text) for text in allow or ()]
        wanted = _wanted(settings or (), confirm)
        place = _home(home)
        config = _enrolled(place, invitation_file) or _join(place, invitation_file)
        _apply(place, entries, wanted)
    if as_json:
        config = place.config()
        _print_json(
            site=config.site,
            federation=config.federation,
            fleet=config.fleet_address,
            certificate_expires=_expires(place),
            allow=config.allow,
        )
    if go_on:
        _start(place)
    else:
        _complain(f"next: {_typed(home, 'start')}")


@app.command()
def start(
    home: Home = DEFAULT_HOME,
    quiet: Annotated[bool, typer.Option("--quiet", help="say what is wrong only")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="one JSON object a line on stderr")] = False,
) -> None:
    """Be the site, until it is stopped with Ctrl-C or SIGTERM."""
    _start(_home(home), quiet=quiet, log_json=log_json)


@app.command()
def allow(
    apps: Annotated[list[str], typer.Argument(help="folder of an app, or the digest of its bundle", metavar="APP...")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Let apps run here. Prints their digests; the coordinator's operator sees the same ones."""
    from quorsum.client.settings import allow as put
    from quorsum.client.settings import bundle_of

    with _refusals():
        place = _home(home)
        entries = [bundle_of(text) for text in apps]
        put(place, entries)
    _print_allowed(entries, as_json)
    _complain(f"allowed from the next message on; see all with: {_typed(home, 'allowed')}")


@app.command()
def disallow(
    digests: Annotated[list[str], typer.Argument(help="digest of a bundle", metavar="DIGEST...")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Let apps run here no longer."""
    from quorsum.client.settings import disallow as take

    with _refusals():
        take(_home(home), digests)
    _complain("no longer allowed, from the next message on")


@app.command()
def allowed(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Which apps may run here: digest, name, and when it was allowed."""
    from quorsum.client.settings import allowed as those

    with _refusals():
        entries = those(_home(home))
    _print_allowed(entries, as_json)
    if not entries:
        _complain(f"nothing may run here yet; next: {_typed(home, 'allow', 'APP_DIR')}")


@app.command("set")
def set_(
    settings: Annotated[list[str], typer.Argument(help="key=value; key= removes it", metavar="KEY=VALUE...")],
    home: Home = DEFAULT_HOME,
    confirm: Annotated[bool, typer.Option("--confirm", help="accept what accept-small-models=true means")] = False,
    as_json: Json = False,
) -> None:
    """Set what apps read here, such as data-path=/srv/data, or the site's policy.

    The policy: minimum-sites, least-collude, accept-small-models, suite (sealed or ckks).
    """
    from quorsum.client.settings import change

    with _refusals():
        config = change(_home(home), _wanted(settings, confirm))
    if as_json:
        _print_json(**_policy(config))
    else:
        _complain(f"set, from the next message on; see it with: {_typed(home, 'status')}")


@app.command()
def status(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """What the site is doing, who the members are, and what may run here. Exit status 0 if it is connected."""
    from quorsum.client.site import is_running

    with _refusals():
        place = _home(home)
        report = _report(place, is_running(place))
    if as_json:
        _print_json(**report)
    else:
        _print_report(report)
    if report["state"] != "connected":
        _complain(_next_of(report, home))
        raise typer.Exit(BAD)


@app.command()
def leave(
    home: Home = DEFAULT_HOME,
    confirm: Annotated[str, typer.Option("--confirm", help="the digest that this command shows without it")] = "",
) -> None:
    """Leave the federation for good."""
    from quorsum.client import enrollment
    from quorsum.crypto.certificates import fingerprint

    with _refusals():
        place = _home(home)
        config = place.config()
        plan = f"leave {config.site} {fingerprint(place.authority())} {place.identity().public().hex}"
        _confirmed(
            plan,
            confirm,
            f"{config.site} leaves {config.federation} for good: its keys are never accepted again, and it joins anew "
            "only with a new invitation and an empty home. What it has contributed stays in the models",
            _typed(home, "leave"),
        )
        enrollment.leave(place)
        place.write_config(config.model_copy(update={"allow": []}))
    _complain(f"{config.site} has left; nothing may run here any more. A process that is still running ends by itself")


@app.command()
def share_key(
    home: Home = DEFAULT_HOME,
    confirm: Annotated[str, typer.Option("--confirm", help="the digest that this command shows without it")] = "",
    as_json: Json = False,
) -> None:
    """Make a new key for the suite ckks, and share it with the members. One site does this, after every change."""
    from quorsum.client import enrollment
    from quorsum.client.site import member_words
    from quorsum.crypto import generate_site_key

    with _refusals():
        place = _home(home)
        config = place.config()
        if not confirm:
            enrollment.roster(place)
            for member in place.roster():
                if member.state == "approved":
                    _complain(f"{member.site}: {member_words(member)}")
        _confirmed(
            f"share {place.epoch()}",
            confirm,
            "every member above will be able to read every update; compare their words with them first",
            _typed(home, "share-key"),
        )
        key = generate_site_key(os.urandom)
        epoch = enrollment.share_key(place, key)
    if as_json:
        _print_json(site=config.site, key_id=key.key_id, epoch=epoch)
    else:
        typer.echo(key.key_id)
    _complain("shared; the other sites fetch it by themselves, once they run: quorsum site set suite=ckks")


@app.command()
def fetch_key(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Fetch the key for the suite ckks that another site shared. A running site does this by itself."""
    from quorsum.client import enrollment

    with _refusals():
        key = enrollment.fetch_key(_home(home))
    if as_json:
        _print_json(key_id=key.key_id)
    else:
        typer.echo(key.key_id)


# --- enrolling ---


def _join(place: SiteHome, file: Path | None) -> SiteConfig:
    from quorsum.client import enrollment
    from quorsum.invitation import decode

    kept = place.path / "invitation"
    text = _invitation_text(file, kept)
    invitation = decode(text)
    _keep(place, kept, text)
    _complain(f"{invitation.site} joins the coordinator at {invitation.address}")
    _complain(f"its authority has the fingerprint {invitation.fingerprint}")
    with _waiting(invitation) as on_wait:
        try:
            config = enrollment.enroll(invitation, place, on_wait, threading.Event())
        except KeyMaterialError:
            raise
        except Refusal as refusal:
            if refusal.code not in _USABLE:
                kept.unlink(missing_ok=True)
            raise
        except KeyboardInterrupt:
            _complain(f"stopped; no new invitation is needed, go on with: {_typed(place.path, 'enroll')}")
            raise typer.Exit(INTERRUPTED) from None
    kept.unlink(missing_ok=True)
    _complain(f"{config.site} is a member of {config.federation}; its certificate is valid until {_expires(place)}")
    return config


def _invitation_text(file: Path | None, kept: Path) -> str:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read an invitation from {file}; is it the right file?") from None
    if sys.stdin.isatty():
        if kept.exists():
            _complain("going on with the invitation that was pasted before; for another one, use --invitation-file")
            return kept.read_text(encoding="utf-8")
        return str(typer.prompt("quorsum: paste the invitation (it is not shown)", hide_input=True, err=True))
    # An invitation has a few hundred characters; whatever is piped in is not read to its end.
    text = sys.stdin.read(1 << 16)
    if not text.strip() and kept.exists():
        return kept.read_text(encoding="utf-8")
    if not text.strip():
        raise UsageError("no invitation was given: paste it when you are asked, pipe it in, or use --invitation-file")
    return text


def _keep(place: SiteHome, kept: Path, text: str) -> None:
    """So that an enrollment that was interrupted goes on; the keys that it is bound to lie beside it."""
    from quorsum.config import replace_file

    place.create()
    replace_file(kept, text.encode())


def _enrolled(place: SiteHome, file: Path | None) -> SiteConfig | None:
    if file is not None or not (place.config_file.exists() and place.certificate_file.exists()):
        return None
    config = place.config()
    _complain(
        f"{place.path} is the home of {config.site}, a member of {config.federation} already; another site needs "
        "another --home"
    )
    return config


@contextmanager
def _waiting(invitation: Invitation) -> Iterator[Callable[[Waiting], None]]:
    """Say what is waited for: a line at every change, and on a terminal a sign of life."""
    spinner = say.status("asking the coordinator")
    words: list[str] = []

    def on_wait(waiting: Waiting) -> None:
        if not words:
            words.append(waiting.words)
            _complain(f"the six words of this site: {waiting.words}")
        _complain(waiting.message)
        spinner.update(f"waiting for the coordinator: {waiting.state}")

    if say.is_terminal:
        with spinner:
            yield on_wait
    else:
        yield on_wait


def _apply(place: SiteHome, entries: Sequence[Allowed], wanted: dict[str, Value]) -> None:
    from quorsum.client import settings

    if wanted:
        settings.change(place, wanted)
    if entries:
        settings.allow(place, entries)
    for entry in entries:
        _complain(f"allowed here: {entry.name or 'a bundle'}, {entry.digest}")


def _wanted(texts: Sequence[str], confirm: bool) -> dict[str, Value]:
    from quorsum.client import settings

    wanted = settings.parse_settings(texts)
    if settings.accepts_small(wanted) and not confirm:
        _complain(f"this holds for the largest of them already: {settings.small_models_sentence()}")
        if not (sys.stdin.isatty() and typer.confirm("quorsum: accept this?", err=True)):
            raise UsageError("small models are accepted only with --confirm; nothing has been set")
    return wanted


# --- running ---


def _start(place: SiteHome, *, quiet: bool = False, log_json: bool = False) -> None:
    from quorsum.client.site import child_command, only_process
    from quorsum.client.supervisor import supervise

    stop = threading.Event()
    with _refusals():
        place.config()
        lock = only_process(place)
    try:
        with _stopped_by_signals(stop):
            code = supervise(child_command(place, quiet=quiet, as_json=log_json), stop, _sayer(log_json))
    finally:
        lock.release()
    if code:
        raise typer.Exit(code)
    if not quiet and not log_json:
        _complain("stopped")


def _sayer(log_json: bool) -> Callable[[str], None]:
    if not log_json:
        return _complain
    import logging

    from quorsum import logs

    logs.configure("json", sys.stderr)
    return lambda text: logs.event(logging.getLogger("quorsum.site"), "restart", text, logging.WARNING)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- reports ---


def _report(place: SiteHome, running: bool) -> dict[str, Any]:
    from quorsum.client.settings import allowed as those
    from quorsum.client.site import member_words, read_status

    config, now = place.config(), read_status(place)
    return {
        **_policy(config),
        "state": (now.state or "starting") if running else "not running",
        "since": now.since,
        "pid": now.pid if running else None,
        "trouble": now.trouble,
        "clock_ahead": now.clock_ahead,
        "certificate_expires": _expires(place),
        "allowed": [vars(entry) for entry in those(place)],
        "members": [
            {"site": member.site, "state": member.state, "words": member_words(member)} for member in place.roster()
        ],
        "rounds": [taken.model_dump() for taken in now.rounds],
        "refusals": [refused.model_dump() for refused in now.refusals],
    }


def _policy(config: SiteConfig) -> dict[str, Any]:
    return {
        "site": config.site,
        "federation": config.federation,
        "coordinator": config.fleet_address,
        "node_config": config.node_config,
        "minimum_sites": config.minimum_sites,
        "least_collude": config.least_collude,
        "accept_small_models": config.accept_small_models,
        "suite": "sealed" if config.suite_key is None else "ckks",
    }


def _print_report(report: dict[str, Any]) -> None:
    process = f" since {report['since']}, process {report['pid']}" if report["pid"] else ""
    clock = report["clock_ahead"]
    side = "ahead" if clock is not None and clock >= 0 else "behind"
    small = "accepted" if report["accept_small_models"] else "not accepted"
    lines = [
        ("site", f"{report['site']} in {report['federation']}"),
        ("coordinator", report["coordinator"]),
        ("state", report["state"] + process),
        ("trouble", report["trouble"]),
        ("clock", "" if clock is None else f"the coordinator's is {abs(clock):.1f} s {side}"),
        ("certificate", f"valid until {report['certificate_expires']}, renewed by itself"),
        ("suite", report["suite"]),
        ("takes part", f"with {report['minimum_sites']} sites or more, {report['least_collude']} or more colluding"),
        ("small models", small),
        *[("set", f"{key} = {json.dumps(value)}") for key, value in report["node_config"].items()],
        *[("allowed", f"{one['digest'][:16]}... {one['name']}") for one in report["allowed"]],
        *[("member", f"{one['site']} ({one['state']}) {one['words']}") for one in report["members"]],
        *[("round", _round_line(one)) for one in report["rounds"][-3:]],
        *[("refused", f"{one['when']} {one['code']}: {one['message']}") for one in report["refusals"][-3:]],
    ]
    for name, text in lines:
        if text:
            typer.echo(f"{name:13s} {text}")


def _round_line(taken: dict[str, Any]) -> str:
    again = f", attempt {taken['attempt']}" if taken["attempt"] > 1 else ""
    return f"{taken['round']} of run {taken['run'][:8]}{again}: {taken['phase']} at {taken['when']}"


def _next_of(report: dict[str, Any], home: Path) -> str:
    if report["state"] == "not running":
        return f"the site is not running; next: {_typed(home, 'start')}"
    return report["trouble"] or f"the site is not connected: {report['state']}; its own lines on stderr say what to do"


def _print_allowed(entries: Sequence[Allowed], as_json: bool) -> None:
    if as_json:
        _print_json(allowed=[vars(entry) for entry in entries])
        return
    for entry in entries:
        typer.echo("\t".join(part for part in (entry.digest, entry.name, entry.when) if part))


def _print_json(**fields: Any) -> None:
    typer.echo(json.dumps({"schema_version": SCHEMA, **fields}, indent=2, allow_nan=False))


def _expires(place: SiteHome) -> str:
    from quorsum.crypto.certificates import expires

    return f"{expires(place.certificate()):%Y-%m-%d %H:%M} UTC"


# --- manners ---


@contextmanager
def _refusals() -> Iterator[None]:
    """Give refusals their exit status; usage and key material have theirs from the command line's root."""
    try:
        yield
    except (KeyMaterialError, DataError):
        raise
    except Refusal as refusal:
        _complain(str(refusal))
        raise typer.Exit(UNKNOWN if refusal.code in _UNDECIDED else BAD) from None


def _confirmed(plan: str, given: str, sentence: str, command: str) -> None:
    digest = hashlib.sha256(plan.encode()).hexdigest()[:16]
    if given == digest:
        return
    if given:
        raise Refusal("wrong-digest", f"{given} is not the digest of the plan as it is now; look again: {command}")
    _complain(sentence)
    _complain(f"nothing has been done yet; to do it: {command} --confirm {digest}")
    raise typer.Exit(UNKNOWN)


def _home(path: Path) -> SiteHome:
    from quorsum.client.home import SiteHome

    # Modules of apps are loaded from under it, whatever the working folder is later.
    return SiteHome(path.absolute())


def _typed(home: Path, *words: str) -> str:
    """A command of this module as it must be typed to mean this home."""
    return SITE_HOME.command(home, "site", *words)


def _complain(text: str) -> None:
    say.print(f"quorsum: {text}", markup=False, soft_wrap=True)
