"""What a process says about itself: lines for people, or JSON for machines, never secrets and never updates.

Three rules hold for every line, whoever wrote it, because they are kept where lines are written:

1. Bytes, arrays and objects are not written; their kind and length are.
2. No text is longer than 1000 characters.
3. Invitations, PEM blocks, and long runs of hexadecimal or base64 digits are replaced by what they are.

What others can provoke as often as they like is said a few times only, and then how often it was left out
(:class:`Allowance`), so that nobody fills a disk.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from quorsum.errors import QuorsumError

__all__ = ["LONGEST", "Allowance", "Sparing", "configure", "event", "provoked", "scrub", "scrub_text", "scrubbed"]

LONGEST: Final = 1000
"""Characters of a text at most."""

# A digest has 64 digits and may be read; what is longer may be a key or a model.
_PATTERNS: Final = (
    (re.compile(r"qsum[0-9]{1,4}-[A-Za-z0-9_=-]*"), "<invitation>"),
    (re.compile(r"-----BEGIN ([A-Z0-9 ]{1,40})-----.*?(-----END \1-----|\Z)", re.DOTALL), r"<\1>"),
    (re.compile(r"\bb(['\"])(?:\\.|(?!\1).)*(\1|\Z)", re.DOTALL), "<bytes>"),
    (re.compile(r"\b(array|tensor)\(.*", re.DOTALL), r"<\1>"),
    (re.compile(r"[0-9A-Fa-f]{65,}|[A-Za-z0-9+/=_-]{129,}"), "<digits>"),
)
# Deeper structures than this are no log fields.
_DEEPEST: Final = 4
_MOST: Final = 1000
_FIELDS: Final = "quorsum_fields"
_EVENT: Final = "quorsum_event"
_ERROR: Final = "quorsum_error"
_LEFT_OUT: Final = "quorsum_left_out"


def event(logger: logging.Logger, name: str, sentence: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log something that has a name.

    Args:
        logger: where.
        name: short and stable, such as ``"run-finished"``.
        sentence: for people.
        level: of ``logging``.
        fields: for machines; numbers, short texts, and lists and mappings of them.
    """
    # A brace or a percent sign in the sentence is one.
    logger.log(level, "%s", sentence, extra={_EVENT: name, _FIELDS: fields})


class Allowance:
    """How often a line of one kind may be written.

    Args:
        most: lines of each kind in ``seconds``.
        seconds: length of a while.
        kinds: kinds that are remembered; the one unused for longest is forgotten first.
        monotonic: a clock.
    """

    def __init__(
        self, most: int, seconds: float, kinds: int = 10_000, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._kinds, self._monotonic = most, seconds, kinds, monotonic
        self._lock = threading.Lock()
        # When the while began, lines in it, and lines left out since one was written last.
        self._known: OrderedDict[Hashable, tuple[float, int, int]] = OrderedDict()

    def take(self, kind: Hashable) -> int | None:
        """Ask for one line: how many of its kind were left out since the last one; None to leave this one out too."""
        now = self._monotonic()
        with self._lock:
            began, written, left_out = self._known.get(kind, (now, 0, 0))
            if now - began >= self._seconds:
                began, written = now, 0
            fine = written < self._most
            self._known[kind] = (began, written + 1, 0) if fine else (began, written, left_out + 1)
            self._known.move_to_end(kind)
            if len(self._known) > self._kinds:
                self._known.popitem(last=False)
            return left_out if fine else None


def provoked(logger: logging.Logger, allowance: Allowance, who: Hashable, sentence: str, *arguments: object) -> None:
    """Warn of something that somebody else did, as often as the allowance lets them.

    Args:
        logger: where.
        allowance: for each of them and each sentence.
        who: did it.
        sentence: with places for the arguments, as in ``logging``.
        arguments: for them.
    """
    left_out = allowance.take((who, sentence))
    if left_out is not None:
        logger.warning(sentence, *arguments, extra={_LEFT_OUT: left_out})


class Sparing(logging.Filter):
    """Of warnings and errors that other packages log from one line of their code, only so many pass."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes; it then says how many have not."""
        if record.levelno < logging.WARNING:
            return True
        left_out = self._allowance.take((record.pathname, record.lineno))
        if left_out:
            record.__dict__[_LEFT_OUT] = left_out
        return left_out is not None


def configure(style: Literal["text", "json"], stream: TextIO, *, quiet: bool = False) -> None:
    """Send everything that this process logs to one stream.

    Args:
        style: ``text`` for people, ``json`` for machines: one object a line with ``time``, ``level``, ``logger``,
            ``event``, ``message`` and ``fields``.
        stream: where to.
        quiet: warnings and errors only.
    """
    handler = logging.StreamHandler(stream)
    # Besides the loggers' own levels, because what is not shown may still be counted.
    handler.setLevel(logging.WARNING if quiet else logging.NOTSET)
    handler.setFormatter(_Json() if style == "json" else _Text())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("quorsum").setLevel(level)
    # Flower has a handler of its own, in colours.
    flower = logging.getLogger("flwr")
    for old in list(flower.handlers):
        flower.removeHandler(old)
    flower.propagate = True
    flower.setLevel(logging.WARNING)
    logging.getLogger("flwr.quorsum").setLevel(level)
    for name in ("httpx", "httpcore", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


def scrub_text(text: str) -> str:
    """A text without secrets, on one line, with at most :data:`LONGEST` characters."""
    # Cut first: the patterns are not asked to walk through a model.
    cut = text[: 4 * LONGEST]
    for pattern, instead in _PATTERNS:
        cut = pattern.sub(instead, cut)
    line = "".join(c if c.isprintable() else " " for c in cut)
    return line if len(line) <= LONGEST and len(text) <= 4 * LONGEST else f"{line[: LONGEST - 4]} ..."


def scrub(value: Any, depth: int = 0) -> Any:
    """A value that may be logged: numbers, texts, and lists and mappings of them; for anything else its kind."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {scrub_text(str(k)): scrub(v, depth + 1) for k, v in list(value.items())[:_MOST]}
    if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset):
        items: Sequence[Any] = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [scrub(v, depth + 1) for v in items[:_MOST]]
    if isinstance(value, BaseException):
        # Ours are written for logs; what others raise may quote what they were working on.
        return scrub_text(str(value)) if isinstance(value, QuorsumError) else f"<{type(value).__name__}>"
    return f"<{type(value).__name__}>"


def scrubbed(record: logging.LogRecord) -> logging.LogRecord:
    """A copy of a record in which nothing is left that may not be written."""
    clean = logging.makeLogRecord(record.__dict__)
    left_out = record.__dict__.get(_LEFT_OUT)
    clean.msg, clean.args = _message(record) + (f" (and {left_out} times more before)" if left_out else ""), None
    clean.__dict__[_FIELDS] = scrub(record.__dict__.get(_FIELDS, {}))
    clean.__dict__[_ERROR] = _error(record.exc_info[1]) if record.exc_info else ""
    clean.exc_info, clean.exc_text, clean.stack_info = None, None, None
    return clean


def _message(record: logging.LogRecord) -> str:
    args = record.args
    try:
        if isinstance(args, Mapping):
            text = str(record.msg) % {key: _argument(value) for key, value in args.items()}
        elif args:
            text = str(record.msg) % tuple(_argument(value) for value in args)
        else:
            text = str(scrub(record.msg))
    except (TypeError, ValueError):
        text = str(record.msg)
    return scrub_text(text)


def _argument(value: Any) -> Any:
    return value if isinstance(value, int | float) else scrub(value)


def _error(error: BaseException | None) -> str:
    """Kind and place of an exception; its text only if it is one of ours."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    text = f": {error}" if isinstance(error, QuorsumError) else ""
    return scrub_text(f"{type(error).__name__}{text} ({places})")


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        clean = scrubbed(record)
        line = {
            "time": datetime.fromtimestamp(clean.created, UTC).isoformat(timespec="milliseconds"),
            "level": clean.levelname.lower(),
            "logger": clean.name,
            "event": clean.__dict__.get(_EVENT, "message"),
            "message": clean.getMessage(),
            "fields": clean.__dict__[_FIELDS],
        }
        if clean.__dict__[_ERROR]:
            line["error"] = clean.__dict__[_ERROR]
        return json.dumps(line)


class _Text(logging.Formatter):
    """One sentence a line."""

    def format(self, record: logging.LogRecord) -> str:
        clean = scrubbed(record)
        level = "" if clean.levelno < logging.WARNING else f"{clean.levelname.lower()}: "
        error = clean.__dict__[_ERROR]
        return f"quorsum: {level}{clean.getMessage()}{f' [{error}]' if error else ''}"
