"""What a site's administrator decides: which apps run here, what they read, and in which rounds the site takes part.

All of it is in ``site.toml``. The names of allowed bundles and when they were allowed are beside it, in
``allowed.json``; only the digests in ``site.toml`` count.
"""

from __future__ import annotations

import math
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from filelock import FileLock
from pydantic import BaseModel, TypeAdapter, ValidationError

from quorsum.client.home import SiteHome
from quorsum.client.keys import ACCEPT_SMALL, LEAST_COLLUDE, NODE_CONFIG_KEY
from quorsum.config import SiteConfig, replace_file
from quorsum.crypto.sealed_parameters import SEALED_V1
from quorsum.errors import Refusal, UsageError

__all__ = [
    "SHARED_KEY",
    "SITE_NAME",
    "Allowed",
    "Value",
    "accepts_small",
    "allow",
    "allowed",
    "bundle_of",
    "change",
    "changed",
    "disallow",
    "node_config",
    "parse_settings",
    "small_models_sentence",
]

Value: TypeAlias = bool | int | float | str

SITE_NAME: Final = "site-name"
SHARED_KEY: Final = "suite.key"
"""What ``suite_key`` says of a site that uses the key its federation shares over the coordinator."""

_POLICY: Final = {"minimum-sites": "minimum_sites", "least-collude": "least_collude"}
_SMALL: Final = "accept-small-models"
_KEY: Final = r"[A-Za-z][A-Za-z0-9._-]{0,62}"
_DIGEST: Final = r"[0-9a-f]{64}"
_PATIENCE: Final = 5.0


class _Note(BaseModel):
    name: str
    when: str


_NOTES: TypeAdapter[dict[str, _Note]] = TypeAdapter(dict[str, _Note])


@dataclass(frozen=True)
class Allowed:
    """A bundle that may run here.

    Attributes:
        digest: its SHA-256, 64 hexadecimal digits.
        name: what it called itself when it was allowed, ``publisher/name version``; empty where only the digest is
            known.
        when: when it was allowed, ISO 8601; empty where the digest was written into ``site.toml`` by hand.
    """

    digest: str
    name: str = ""
    when: str = ""


def bundle_of(text: str) -> Allowed:
    """The bundle that an app's folder or a digest stands for; a folder is built, which runs nothing of it.

    Raises:
        UsageError: it is neither a folder of a Flower app nor a digest.
    """
    if re.fullmatch(_DIGEST, text):
        return Allowed(text)
    if not Path(text).is_dir():
        raise UsageError(f"{text} is neither a folder nor a digest of 64 hexadecimal digits; give the app's folder")
    from quorsum import bundles

    bundle = bundles.build(Path(text))
    told = bundles.describe(bundle)
    if "clientapp" not in told.components:
        raise UsageError(f"{text} has no clientapp, so that there is nothing in it to run at a site")
    return Allowed(bundles.digest(bundle), f"{told.name} {told.version}")


def allow(home: SiteHome, entries: Sequence[Allowed], clock: Callable[[], float] = time.time) -> None:
    """Let bundles run here, from the next message on.

    Raises:
        KeyMaterialError: ``not-enrolled``.
        UsageError: a file cannot be read or written.
    """
    when = f"{datetime.fromtimestamp(clock(), UTC):%Y-%m-%dT%H:%M:%SZ}"
    with _editing(home):
        config, notes = home.config(), _notes(home)
        new = [entry for entry in entries if entry.digest not in config.allow or entry.name]
        notes.update({entry.digest: _Note(name=entry.name, when=when) for entry in new})
        # The note first: one too many does no harm.
        _write_notes(home, notes)
        digests = list(dict.fromkeys([*config.allow, *(entry.digest for entry in entries)]))
        if digests != config.allow:
            home.write_config(config.model_copy(update={"allow": digests}))


def disallow(home: SiteHome, digests: Sequence[str]) -> None:
    """Let bundles run here no longer, from the next message on.

    Raises:
        Refusal: ``not-allowed``: one of them is not on the list; nothing is changed.
        KeyMaterialError: ``not-enrolled``.
        UsageError: a file cannot be read or written.
    """
    with _editing(home):
        config = home.config()
        for digest in digests:
            if digest not in config.allow:
                see = home.command("site", "allowed")
                raise Refusal("not-allowed", f"{digest} is not on the list; see it with: {see}")
        home.write_config(config.model_copy(update={"allow": [d for d in config.allow if d not in digests]}))
        _write_notes(home, {digest: note for digest, note in _notes(home).items() if digest not in digests})


def allowed(home: SiteHome) -> tuple[Allowed, ...]:
    """What may run here, in the order in which it was allowed.

    Raises:
        KeyMaterialError: ``not-enrolled``.
        UsageError: ``site.toml`` cannot be read.
    """
    notes, none = _notes(home), _Note(name="", when="")
    return tuple(Allowed(d, notes.get(d, none).name, notes.get(d, none).when) for d in home.config().allow)


def parse_settings(texts: Sequence[str]) -> dict[str, Value]:
    """``key=value`` each; a value is a number, ``true`` or ``false``, or else text; in quotes it is always text.

    Returns:
        the values by key; the empty text stands for a key that is to be removed.

    Raises:
        UsageError: it is written in another way.
    """
    settings: dict[str, Value] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(_KEY, key):
            raise UsageError(f"{text!r} is not a setting; write key=value, such as data-path=/srv/data")
        settings[key] = _scalar(key, value)
    return settings


def changed(config: SiteConfig, settings: Mapping[str, Value]) -> SiteConfig:
    """The configuration with settings in it.

    ``minimum-sites``, ``least-collude``, ``accept-small-models``, ``suite`` (``sealed`` or ``ckks``) and ``suite-key``
    are the site's policy; every other key is for the app, in its node config.

    Raises:
        UsageError: a value is out of range, or the key is one that the site sets itself.
    """
    update: dict[str, object] = {}
    node = dict(config.node_config)
    for key, value in settings.items():
        if key in _POLICY:
            update[_POLICY[key]] = value
        elif key == _SMALL:
            update["accept_small_models"] = value
        elif key == "suite":
            update["suite_key"] = _suite_key(value)
        elif key == "suite-key":
            update["suite_key"] = str(value) or None
        elif key == SITE_NAME or key.startswith("quorsum-"):
            raise UsageError(
                f"{key} is set by the site itself; the policy has: minimum-sites, least-collude, {_SMALL}, suite"
            )
        elif value == "":
            node.pop(key, None)
        else:
            node[key] = value
    try:
        return SiteConfig.model_validate({**config.model_dump(), **update, "node_config": node})
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        where = str(detail["loc"][0]).replace("_", "-")
        raise UsageError(f"{where}: {detail['msg'].lower()}") from None


def change(home: SiteHome, settings: Mapping[str, Value]) -> SiteConfig:
    """Write settings into the site's configuration; they hold from the next message on.

    Raises:
        UsageError: as :func:`changed`, or the file cannot be read or written.
        KeyMaterialError: ``not-enrolled``.
    """
    with _editing(home):
        config = home.config()
        new = changed(config, settings)
        if new != config:
            home.write_config(new)
        return new


def accepts_small(settings: Mapping[str, Value]) -> bool:
    """Whether settings would let the site seal models that are too small to hide in each other."""
    return settings.get(_SMALL) is True


def small_models_sentence() -> str:
    """What it means to accept small models, to be read before it is done."""
    return SEALED_V1.small_model_sentence(SEALED_V1.small_dimension - 1)


def node_config(config: SiteConfig) -> dict[str, Value]:
    """What apps and the sealing mod read as the node config; the home is added by the worker."""
    table: dict[str, Value] = {
        **config.node_config,
        SITE_NAME: config.site,
        ACCEPT_SMALL: config.accept_small_models,
        LEAST_COLLUDE: config.least_collude,
    }
    if config.suite_key is not None and config.suite_key != SHARED_KEY:
        table[NODE_CONFIG_KEY] = config.suite_key
    return table


def _suite_key(value: Value) -> str | None:
    if value not in ("sealed", "ckks"):
        raise UsageError(f"suite is sealed or ckks, not {value!r}")
    return SHARED_KEY if value == "ckks" else None


def _scalar(key: str, text: str) -> Value:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return _text(key, text)
    value = table["value"]
    # A list, a date or a second line is text like any other.
    if len(table) != 1 or not isinstance(value, bool | int | float | str):
        return _text(key, text)
    if isinstance(value, float) and not math.isfinite(value):
        return _text(key, text)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{key}: a whole number has at most 63 bits; put it in quotes to make it text")
    return _text(key, value) if isinstance(value, str) else value


def _text(key: str, text: str) -> str:
    if not text.isprintable() or len(text) > 4096:
        raise UsageError(f"{key}: a text is one line of at most 4096 characters that can be printed")
    return text


@contextmanager
def _editing(home: SiteHome) -> Iterator[None]:
    """One administrator's command at a time."""
    home.config()
    lock = FileLock(home.path / "site.toml.lock", timeout=_PATIENCE, mode=0o600)
    try:
        lock.acquire()
    except (OSError, TimeoutError) as error:
        raise UsageError(
            f"cannot change {home.config_file}: {error}; is another quorsum site command running?"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _notes(home: SiteHome) -> dict[str, _Note]:
    try:
        return _NOTES.validate_json((home.path / "allowed.json").read_bytes())
    except (OSError, ValidationError):
        # They are for people only.
        return {}


def _write_notes(home: SiteHome, notes: dict[str, _Note]) -> None:
    replace_file(home.path / "allowed.json", _NOTES.dump_json(notes, indent=1))
