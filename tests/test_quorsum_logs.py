"""Logs: what may be written, and that secrets never are."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum import logs
from quorsum.crypto import certificates
from quorsum.enrollment import encode_base64
from quorsum.errors import Refusal
from quorsum.invitation import Invitation, encode

SECRET = bytes(range(100, 116))
INVITATION = encode(Invitation("localhost:7401", "ab" * 32, "site-a", 2_000_000_000, SECRET))


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    names = ["", "quorsum", "flwr", "flwr.quorsum", "httpx", "httpcore", "uvicorn"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield io.StringIO()
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_time_level_event_and_fields(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    logs.event(logging.getLogger("quorsum.x"), "round", "round 3 of 100 % done", round=3, codes={"a": "late"})
    (line,) = lines(stream)
    assert line["time"].endswith("+00:00")
    assert (line["level"], line["logger"], line["event"]) == ("info", "quorsum.x", "round")
    assert line["message"] == "round 3 of 100 % done"
    assert line["fields"] == {"round": 3, "codes": {"a": "late"}}
    assert "error" not in line


def test_text_is_one_sentence_a_line(stream: io.StringIO) -> None:
    logs.configure("text", stream)
    logs.event(logging.getLogger("quorsum.x"), "started", "it runs\nand runs", port=3)
    logging.getLogger("flwr.quorsum.fleet").warning("%s is late by %.1f s", "site-a", 2.25)
    assert stream.getvalue() == "quorsum: it runs and runs\nquorsum: warning: site-a is late by 2.2 s\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_others_provoke_is_said_once_in_a_while_with_how_often(stream: io.StringIO) -> None:
    logs.configure("text", stream)
    clock = Clock()
    allowance, logger = logs.Allowance(1, 60.0, monotonic=clock), logging.getLogger("flwr.quorsum.fleet")
    for second in range(60):
        clock.now = float(second)
        logs.provoked(logger, allowance, "a", "%s lies", "a")
        logs.provoked(logger, allowance, "b", "%s lies", "b")
    logs.provoked(logger, allowance, "a", "%s is late", "a")
    clock.now = 60.0
    logs.provoked(logger, allowance, "a", "%s lies", "a")
    clock.now = 200.0
    logs.provoked(logger, allowance, "a", "%s lies", "a")
    assert stream.getvalue().splitlines() == [
        "quorsum: warning: a lies",
        "quorsum: warning: b lies",
        "quorsum: warning: a is late",
        "quorsum: warning: a lies (and 59 times more before)",
        "quorsum: warning: a lies",
    ]


def test_what_other_packages_say_of_others_passes_a_few_times(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    clock = Clock()
    sparing, logger = logs.Sparing(logs.Allowance(3, 60.0, monotonic=clock)), logging.getLogger("flwr")
    logger.addFilter(sparing)
    try:
        for minute in (0.0, 60.0):
            clock.now = minute
            for number in range(10):
                logger.error("[path] %d %%", number)
                logger.info("not a warning")
    finally:
        logger.removeFilter(sparing)
    said = [line["message"] for line in lines(stream)]
    assert said == [*[f"[path] {n} %" for n in range(3)], "[path] 0 % (and 7 times more before)", "[path] 1 %",
                    "[path] 2 %"]  # fmt: skip


def test_kinds_that_are_remembered_have_a_limit() -> None:
    allowance = logs.Allowance(1, 60.0, kinds=2)
    assert [allowance.take(kind) for kind in ("a", "a", "b", "c", "a")] == [0, None, 0, 0, 0]


def test_quiet_says_only_what_is_wrong(stream: io.StringIO) -> None:
    logs.configure("text", stream, quiet=True)
    logger = logging.getLogger("quorsum.enrollment")
    logger.setLevel(logging.INFO)
    logger.info("all is well")
    logger.error("it is not")
    logger.setLevel(logging.NOTSET)
    assert stream.getvalue() == "quorsum: error: it is not\n"


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize(
    "secret",
    [
        INVITATION,
        f"pasted {INVITATION} there",
        certificates.make_key().decode(),
        SECRET,
        repr(SECRET),
        bytearray(SECRET),
        {"deep": [{"er": SECRET}]},
        (SECRET, [SECRET]),
        np.arange(4, dtype=np.float32) + 0.123456,
        repr(np.arange(4, dtype=np.float32) + 0.123456),
        encode_base64(SECRET * 10),
        (SECRET * 10).hex(),
        ValueError(SECRET),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_secret_and_no_update_is_written(stream: io.StringIO, style: Any, secret: Any) -> None:
    logs.configure(style, stream)
    logger = logging.getLogger("quorsum.x")
    logger.error("it was %s", secret)
    logger.error("it was %(it)s", {"it": secret})
    logger.error(secret)
    logger.error("it was", extra={"other": secret})
    logs.event(logger, "leak", str(secret) if isinstance(secret, str) else "sentence", it=secret)
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        logger.exception("failed")
    said = stream.getvalue()
    assert len(said.splitlines()) == 6
    assert "RuntimeError (test_quorsum_logs.py:" in said
    for leak in (
        SECRET.hex(), repr(SECRET)[2:-1], encode_base64(SECRET)[:20], INVITATION[8:40], "0.123456", "1.123456",
    ):  # fmt: skip
        assert leak not in said
    assert "MIG" not in said  # how a private key in PEM begins


def test_our_own_errors_say_why(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    try:
        raise Refusal("late", "came too late")
    except Refusal:
        logging.getLogger("quorsum.x").exception("refused")
    assert lines(stream)[0]["error"].startswith("Refusal: came too late (test_quorsum_logs.py:")


def test_long_texts_are_cut(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    logging.getLogger("quorsum.x").error("word " * 5000)
    logs.event(logging.getLogger("quorsum.x"), "long", "short", text="word " * 5000, many=list(range(5000)))
    first, second = lines(stream)
    assert len(first["message"]) == logs.LONGEST
    assert len(second["fields"]["text"]) == logs.LONGEST
    assert len(second["fields"]["many"]) == 1000


def test_a_wrong_format_is_no_reason_to_fail(stream: io.StringIO) -> None:
    logs.configure("text", stream)
    logging.getLogger("quorsum.x").error("%s and %s", "one")
    assert stream.getvalue() == "quorsum: error: %s and %s\n"


@given(st.recursive(st.none() | st.text() | st.binary() | st.floats() | st.integers(), lambda c: st.lists(c)))
def test_whatever_is_scrubbed_can_be_written(value: Any) -> None:
    json.dumps(logs.scrub(value))


@given(st.text())
def test_scrubbed_text_is_short_and_on_one_line(text: str) -> None:
    scrubbed = logs.scrub_text(text)
    assert len(scrubbed) <= logs.LONGEST
    assert scrubbed.isprintable()
