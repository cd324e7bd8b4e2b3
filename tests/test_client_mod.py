"""The sealing mod: what leaves a site, what it refuses, and what it never says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import DIMENSION, context, honest_update, learning_app, model, send, train_content
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quorsum import envelope, messages
from quorsum.client import seal
from quorsum.client.keys import load_identity
from quorsum.client.mod import clipped
from quorsum.crypto.plain import PlainSite
from quorsum.crypto.suite import RoundContext
from quorsum.errors import CoordinatorFault
from quorsum.simulation.grid import LocalGrid


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    with LocalGrid([learning_app([seal(PlainSite())])]) as grid:
        yield grid


def fault_of(reply: Message) -> messages.Fault:
    message, blocks = messages.unpack(reply.content)
    assert isinstance(message, messages.Fault)
    assert blocks == ()
    assert list(reply.content) == [messages.HEADER], "a refusal carries nothing else"
    return message


def test_difference_goes_out_and_nothing_else(grid: LocalGrid) -> None:
    reply = send(grid, train_content())
    submission, blocks = messages.unpack(reply.content)
    assert isinstance(submission, messages.Submission)
    assert submission.context == context().digest().hex()
    assert submission.examples == 100
    assert submission.metrics == {}, "metrics stay at the site unless named"
    np.testing.assert_allclose(np.frombuffer(b"".join(blocks), "<f4"), honest_update(0, 1), atol=1e-6)
    assert set(reply.content) == {messages.HEADER, messages.BLOCKS}


def test_named_metrics_travel() -> None:
    with LocalGrid([learning_app([seal(PlainSite(), share_metrics=["train_loss", "absent"])])]) as grid:
        submission, _ = messages.unpack(send(grid, train_content()).content)
    assert isinstance(submission, messages.Submission)
    assert submission.metrics == {"train_loss": 0.25}


def test_introduction(grid: LocalGrid) -> None:
    content = messages.pack(messages.Hello(run="run", suite="plain/v1"))
    introduction, _ = messages.unpack(send(grid, content).content)
    assert introduction == messages.Introduction(site="site-01", suite="plain/v1", key_id="")


@pytest.mark.parametrize(
    ("config", "given", "name"),
    [({}, None, "site-01"), ({"site-name": "north"}, None, "north"), ({"site-name": "north"}, "ward-7", "ward-7")],
)
def test_name_of_the_site(config: dict[str, Any], given: str | None, name: str) -> None:
    app = learning_app([seal(PlainSite(), site=given)])
    with LocalGrid([app], node_configs={0: config}) as grid:
        content = messages.pack(messages.Hello(run="run", suite="plain/v1"))
        introduction, _ = messages.unpack(send(grid, content).content)
    assert isinstance(introduction, messages.Introduction)
    assert introduction.site == name


@pytest.mark.parametrize("message_type", ["train", "train.other", "query", "query.open"])
def test_plain_message_never_gets_an_update(message_type: str) -> None:
    """The naive client answers an ordinary train message with its weights; the sealed one refuses."""
    naive, sealed = learning_app([]), learning_app([seal(PlainSite())])
    for app in (naive, sealed):
        for action in ("other", "open"):
            register = app.train if message_type.startswith("train") else app.query

            @register(action)
            def handler(message: Message, context: Context) -> Message:
                return Message(RecordDict({"arrays": model(7.0)}), reply_to=message)

        if message_type == "query":
            app.query()(handler)
    content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
    with LocalGrid([naive]) as grid:
        assert send(grid, content, message_type).content.array_records
    with LocalGrid([sealed]) as grid:
        fault = fault_of(send(grid, content, message_type))
    assert fault.code == "not-sealed"
    assert "QuorumStrategy" in fault.message


def test_evaluation_returns_numbers_only(grid: LocalGrid) -> None:
    content = RecordDict({"arrays": model(), "config": ConfigRecord({})})
    reply = send(grid, content, "evaluate").content
    assert dict(reply["metrics"]) == {"num-examples": 7, "accuracy": 0.5}
    assert list(reply) == ["metrics"], "arrays in an evaluation reply stay at the site"


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"sites": ("site-02", "site-03", "site-04")}, "wrong-roster", "does not hold this site"),
        ({"sites": ("site-01", "site-03", "site-02")}, "wrong-roster", "sorted"),
        ({"sites": ("site-01", "site-01", "site-02")}, "wrong-roster", "unique"),
        ({"sites": ("site-01", "site-02"), "tolerate": 0}, "too-few-sites", "2 sites"),
        ({"tolerate": 3}, "wrong-bound", "tolerate 3"),
        ({"dimension": DIMENSION + 1}, "wrong-shape", "13"),
    ],
)
def test_rounds_outside_the_sites_policy_are_refused(
    grid: LocalGrid, changes: dict[str, Any], code: str, says: str
) -> None:
    fault = fault_of(send(grid, train_content(**changes)))
    assert (fault.code, says in fault.message) == (code, True), fault


def test_other_suite_is_refused(grid: LocalGrid) -> None:
    assert fault_of(send(grid, train_content(suite="ckks/v1"))).code == "wrong-suite"
    content = messages.pack(messages.Hello(run="run", suite="ckks/v1"))
    assert fault_of(send(grid, content)).code == "wrong-suite"


@pytest.mark.parametrize("again", [1, 2])
def test_no_second_update_for_a_round_already_sealed(grid: LocalGrid, again: int) -> None:
    """Two updates of one round, or a return to an old one, would let a coordinator subtract them."""
    assert isinstance(messages.unpack(send(grid, train_content(2)).content)[0], messages.Submission)
    assert fault_of(send(grid, train_content(again))).code == "replayed-round"
    assert fault_of(send(grid, train_content(again, unit=2.0))).code == "replayed-round"
    assert isinstance(messages.unpack(send(grid, train_content(3)).content)[0], messages.Submission)


def test_round_is_taken_even_if_training_fails() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        raise RuntimeError("patient 4711 has no age")

    with LocalGrid([learning_app([seal(PlainSite())], learn)]) as grid:
        fault = fault_of(send(grid, train_content()))
        assert fault.code == "training-failed"
        assert "4711" not in fault.message, "the text of an error belongs to the site"
        assert fault_of(send(grid, train_content(unit=2.0))).code == "replayed-round"


def test_site_that_was_killed_while_it_trained_trains_again_for_the_same_context_only() -> None:
    broken = iter([True, False])

    def learn(partition: int, number: int) -> np.ndarray:
        if next(broken):
            raise RuntimeError
        return honest_update(partition, number)

    with LocalGrid([learning_app([seal(PlainSite())], learn)]) as grid:
        assert fault_of(send(grid, train_content())).code == "training-failed"
        message, _ = messages.unpack(send(grid, train_content()).content)
    assert isinstance(message, messages.Submission)


def test_asked_again_for_what_it_has_submitted_a_site_sends_the_very_same(tmp_path: Path) -> None:
    """A coordinator that was killed comes back and asks again; a second training would be a second update."""
    rounds = []

    def learn(partition: int, number: int) -> np.ndarray:
        rounds.append(number)
        return honest_update(partition, number) + len(rounds)

    with LocalGrid([learning_app([seal(PlainSite(), home=tmp_path)], learn)]) as grid:
        first, second = (messages.unpack(send(grid, train_content()).content) for _ in range(2))
        assert fault_of(send(grid, train_content(unit=2.0))).code == "replayed-round"
    assert first == second
    assert rounds == [1]


def test_reply_is_signed_for_its_instruction(tmp_path: Path) -> None:
    identity = load_identity(tmp_path)
    with LocalGrid([learning_app([seal(PlainSite(), home=tmp_path)])]) as grid:
        for content, kind in (
            (messages.pack(messages.Hello(run="run", suite="plain/v1")), "train"),
            (train_content(), "train"),
            (RecordDict({"arrays": model()}), "evaluate"),
        ):
            asked = envelope.Asked(os.urandom(16), envelope.content_digest(content))
            reply = send(grid, envelope.address(content, asked.nonce), kind).content
            envelope.open_envelope(reply, asked, identity.public())


def test_app_never_sees_the_envelope() -> None:
    seen = []

    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number)

    app = learning_app([seal(PlainSite()), lambda m, c, n: (seen.append(list(m.content)), n(m, c))[1]], learn)
    with LocalGrid([app]) as grid:
        send(grid, envelope.address(train_content(), bytes(16)))
        send(grid, envelope.address(RecordDict({"arrays": model()}), bytes(16)), "evaluate")
    assert seen == [["arrays", "config"], ["arrays"]]


def test_own_policy_of_the_site_comes_first() -> None:
    def check(round_context: RoundContext) -> None:
        raise CoordinatorFault("unknown-site", f"round {round_context.round} is with strangers")

    with LocalGrid([learning_app([seal(PlainSite(), check=check)])]) as grid:
        assert fault_of(send(grid, train_content())).code == "unknown-site"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_update_that_is_not_finite_stays_at_the_site(bad: float) -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        return np.where(np.arange(DIMENSION) == 5, bad, 1.0).astype(np.float32)

    with LocalGrid([learning_app([seal(PlainSite())], learn)]) as grid:
        fault = fault_of(send(grid, train_content()))
    assert fault.code == "not-sealable"
    assert "5" not in fault.message


@pytest.mark.parametrize("kind", ["another shape", "no arrays", "two records", "error reply"])
def test_app_that_does_not_return_a_model(kind: str) -> None:
    app = ClientApp(mods=[seal(PlainSite())])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = {
            "another shape": RecordDict({"arrays": ArrayRecord([np.zeros(3, np.float32)])}),
            "no arrays": RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
            "two records": RecordDict({"a": model(), "b": model()}),
        }
        if kind == "error reply":
            from flwr.app import Error

            return Message(Error(2, "secret text"), reply_to=message)
        return Message(content[kind], reply_to=message)

    with LocalGrid([app]) as grid:
        fault = fault_of(send(grid, train_content()))
    assert fault.code in ("wrong-shape", "training-failed")
    assert "secret" not in fault.message


def test_questions_before_and_beside_a_round_are_refused(grid: LocalGrid) -> None:
    question = messages.Question(context=context(1).digest().hex(), phase="gram")
    assert fault_of(send(grid, messages.pack(question))).code == "unknown-round"
    send(grid, train_content(1))
    other = messages.Question(context=context(2).digest().hex(), phase="gram")
    assert fault_of(send(grid, messages.pack(other))).code == "wrong-round"
    assert fault_of(send(grid, messages.pack(question))).code == "unknown-phase", "plain answers no questions"


@pytest.mark.parametrize(
    "message", [messages.Answer(context="0" * 64, phase="gram"), messages.Fault(code="x", message="")]
)
def test_messages_that_a_site_does_not_take(grid: LocalGrid, message: messages.AnyMessage) -> None:
    assert fault_of(send(grid, messages.pack(message))).code == "unexpected"


def test_garbage_header_is_refused(grid: LocalGrid) -> None:
    content = RecordDict({messages.HEADER: ConfigRecord({"header": "{"})})
    assert fault_of(send(grid, content)).code == "undecodable"


def test_clipping() -> None:
    update = np.array([3.0, 4.0], dtype=np.float32)
    np.testing.assert_allclose(clipped(update, context(unit=1.0, clip=True)), [0.6, 0.8], rtol=1e-6)
    assert clipped(update, context(unit=5.0, clip=True)) is update
    assert clipped(update, context(unit=1.0, clip=False)) is update
    assert np.isnan(clipped(np.array([np.nan, 1.0], dtype=np.float32), context(clip=True))[0])


def test_old_style_client_fn_is_sealed_too() -> None:
    """An app written with ``client_fn`` gets the same mod, and its parameters leave only sealed."""
    from flwr.client import NumPyClient

    class Client(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            return [p + 1 for p in parameters], 7, {}

    app = ClientApp(client_fn=lambda context: Client().to_client(), mods=[seal(PlainSite())])
    with LocalGrid([app]) as grid:
        content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
        assert fault_of(send(grid, content)).code == "not-sealed"
