"""Typed messages: what goes in comes out, and what is malformed is refused with the field that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from quorsum import messages
from quorsum.crypto.suite import RoundContext
from quorsum.errors import Refusal

CONTEXT = RoundContext("run", 3, 1, ("a", "b", "c"), 17, 1, 2.5, True, 4)
DIGEST = CONTEXT.digest().hex()
ALL = [
    messages.Hello(run="r", suite="ckks/v1"),
    messages.Introduction(site="site-01", suite="plain/v1", key_id=""),
    messages.Train(site="a", suite="plain/v1", context=messages.Context.of(CONTEXT)),
    messages.Submission(
        context=DIGEST, key_id="ab", examples=3, metrics={"loss": 0.5}, train_seconds=0.1, seal_seconds=0.2
    ),
    messages.Question(context=DIGEST, phase="gram"),
    messages.Answer(context=DIGEST, phase="gram"),
    messages.Fault(code="training-failed", message="the site's app raised an error"),
    messages.Again(site="a", suite="sealed/v1", context=messages.Context.of(CONTEXT)),
]


@pytest.mark.parametrize("message", ALL, ids=lambda m: m.kind)
def test_round_trip(message: messages.AnyMessage) -> None:
    content = messages.pack(message, (b"one", b"", b"three"))
    assert messages.unpack(content) == (message, (b"one", b"", b"three"))


@given(st.lists(st.binary(max_size=64), max_size=12))
def test_blocks_keep_order_and_bytes(blocks: list[bytes]) -> None:
    content = messages.pack(ALL[4], tuple(blocks))
    assert messages.unpack(content)[1] == tuple(blocks)


def test_context_survives_the_wire_to_the_last_bit() -> None:
    context = RoundContext("run", 1, 2, ("a", "b", "c"), 10, 1, 0.1 + 0.2, False, 16, 1, "fltrust", "b")
    wire = messages.Context.model_validate_json(messages.Context.of(context).model_dump_json())
    assert wire.round_context() == context
    assert wire.round_context().digest() == context.digest()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "other"),
        ("round", 4),
        ("attempt", 2),
        ("sites", ("a", "b", "d")),
        ("dimension", 18),
        ("tolerate", 2),
        ("unit", 2.5000000000000004),
        ("clip", False),
        ("sketches", 5),
        ("rule", "mean"),
        ("reference", "a"),
    ],
)
def test_digest_depends_on_every_field(field: str, value: object) -> None:
    other = RoundContext(**{**CONTEXT.__dict__, field: value})
    assert other.digest() != CONTEXT.digest()


def test_users_records_travel_beside_and_come_off_again() -> None:
    beside = RecordDict({"config": ConfigRecord({"lr": 0.1}), "arrays": ArrayRecord([np.zeros(2)])})
    content = messages.pack(ALL[2], beside=beside)
    assert set(messages.strip(content)) == {"config", "arrays"}
    assert set(beside) == {"config", "arrays"}, "the caller's records must not change"


def header(text: object) -> RecordDict:
    return RecordDict({messages.HEADER: ConfigRecord({"header": text})})


MALFORMED = {
    "no header": (RecordDict({"metrics": MetricRecord({"a": 1})}), "no-header", "metrics"),
    "header of another type": (RecordDict({messages.HEADER: MetricRecord({"a": 1})}), "undecodable", "missing"),
    "header not text": (header(3), "undecodable", "not text"),
    "header too long": (header(" " * (messages.MAX_HEADER_BYTES + 1)), "undecodable", "too long"),
    "not json": (header("{"), "undecodable", "malformed"),
    "unknown kind": (header('{"kind": "bribe"}'), "undecodable", "kind"),
    "field missing": (header(json.dumps({"kind": "question", "context": DIGEST})), "undecodable", "phase"),
    "field unknown": (
        header(json.dumps({"kind": "question", "context": DIGEST, "phase": "gram", "extra": 1})),
        "undecodable",
        "extra",
    ),
    "wrong type": (
        header(json.dumps({"kind": "fault", "code": 7, "message": "x"})),
        "undecodable",
        "code",
    ),
    "other protocol": (
        header(json.dumps({"kind": "question", "protocol": 2, "context": DIGEST, "phase": "gram"})),
        "undecodable",
        "protocol",
    ),
    "phase not a name": (
        header(json.dumps({"kind": "question", "context": DIGEST, "phase": "../gram"})),
        "undecodable",
        "phase",
    ),
    "negative count": (
        header(ALL[3].model_copy(update={"examples": -1}).model_dump_json()),
        "undecodable",
        "examples",
    ),
    "reference not a name": (
        header(ALL[2].model_dump_json().replace('"reference":""', '"reference":"two\\nlines"')),
        "undecodable",
        "reference",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header_is_refused_and_named(case: str) -> None:
    content, code, named = MALFORMED[case]
    with pytest.raises(Refusal, match=named) as refusal:
        messages.unpack(content)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"abc"),
        Array(dtype="uint8", shape=(4,), stype=messages.RAW, data=b"abc"),
        Array(dtype="float32", shape=(3,), stype=messages.RAW, data=b"abc"),
    ],
    ids=["other serialisation", "wrong length", "wrong type"],
)
def test_malformed_block_is_refused(array: Array) -> None:
    content = messages.pack(ALL[4])
    content[messages.BLOCKS] = ArrayRecord({"000000": array})
    with pytest.raises(Refusal, match="block 0"):
        messages.unpack(content)


def test_blocks_out_of_order_are_refused() -> None:
    content = messages.pack(ALL[4], (b"a", b"b"))
    record = content.array_records[messages.BLOCKS]
    content[messages.BLOCKS] = ArrayRecord({"000001": record["000001"], "000000": record["000000"]})
    with pytest.raises(Refusal, match="block 0"):
        messages.unpack(content)


def test_blocks_of_another_record_type_are_refused() -> None:
    content = messages.pack(ALL[4])
    content[messages.BLOCKS] = MetricRecord({"a": 1})
    with pytest.raises(Refusal, match="not an ArrayRecord"):
        messages.unpack(content)
