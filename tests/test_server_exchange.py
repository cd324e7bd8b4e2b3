"""Exchanges with sites that come, go and lie about who they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from quorsum import envelope, messages
from quorsum.crypto.identity import Identity
from quorsum.errors import SiteFault
from quorsum.server.exchange import Network, Traffic, WatchedGrid
from quorsum.simulation.grid import LocalGrid

ONE, TWO = Identity.generate(os.urandom), Identity.generate(os.urandom)
QUESTION = RecordDict({"question": ConfigRecord({"text": "how are you"})})
NODE_UNAVAILABLE = 5


class Watched(LocalGrid):
    """A grid that knows when the process of a node began."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.processes: dict[int, str | None] = {2: "first", 3: "first"}
        self.members = {2, 3}

    def activation(self, node_id: int) -> str | None:
        return self.processes[node_id]

    def registered(self, node_id: int) -> bool:
        return node_id in self.members


def answer(message: Message, identity: Identity | None = None, text: str = "well") -> Message:
    content = messages.pack(messages.Fault(code="fine", message=text))
    asked = envelope.asked_in(message.content)
    assert asked is not None
    return Message(content if identity is None else envelope.sign(content, asked, identity), reply_to=message)


def network(grid: LocalGrid, timeout: float = 20.0) -> Network:
    return Network(grid, {"one": 2}, timeout, {"one": ONE.public()})


def asked(grid: LocalGrid, timeout: float = 20.0) -> list[RecordDict | SiteFault]:
    return [reply for _, reply in network(grid, timeout).exchange({"one": QUESTION}, "1", Traffic())]


def test_signed_reply_arrives_without_its_envelope() -> None:
    with LocalGrid([lambda message, context: answer(message, ONE)]) as grid:
        (reply,) = asked(grid)
    assert isinstance(reply, RecordDict)
    assert list(reply) == [messages.HEADER]


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        (lambda message, context: answer(message), "unsigned"),
        (lambda message, context: answer(message, TWO), "wrong-signature"),
    ],
)
def test_reply_in_another_sites_name_is_not_taken(handler: Callable[[Message, Context], Message], code: str) -> None:
    with LocalGrid([handler]) as grid:
        (fault,) = asked(grid)
    assert isinstance(fault, SiteFault)
    assert (fault.code, fault.proven) == (code, False), "it proves nothing against the site"


def test_reply_to_an_earlier_instruction_is_not_taken_again() -> None:
    kept: list[RecordDict] = []

    def replaying(message: Message, context: Context) -> Message:
        kept.append(answer(message, ONE).content)
        return Message(kept[0], reply_to=message)

    with LocalGrid([replaying]) as grid:
        (first,), (second,) = asked(grid), asked(grid)
    assert isinstance(first, RecordDict)
    assert isinstance(second, SiteFault)
    assert second.code == "replayed-message"


def test_site_whose_process_died_is_asked_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorsum.server.exchange.PUSH_AGAIN", 0.2)
    nonces: list[bytes | None] = []

    def dies_once(message: Message, context: Context) -> Message | None:
        nonces.append(envelope.nonce_of(message.content))
        if len(nonces) == 1:
            grid.processes[2] = None
            threading.Timer(0.4, lambda: grid.processes.update({2: "second"})).start()
            return None
        return answer(message, ONE)

    with Watched([dies_once]) as grid:
        assert isinstance(grid, WatchedGrid)
        (reply,) = asked(grid)
    assert isinstance(reply, RecordDict)
    assert len(nonces) == 2
    assert nonces[0] == nonces[1]


def test_flowers_word_that_a_node_is_gone_is_not_the_sites_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorsum.server.exchange.PUSH_AGAIN", 0.2)
    calls = []

    def gone_once(message: Message, context: Context) -> Message:
        calls.append(message)
        if len(calls) == 1:
            return Message(Error(NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        return answer(message, ONE)

    with Watched([gone_once]) as grid:
        (reply,) = asked(grid)
    assert isinstance(reply, RecordDict)


def test_site_that_stays_away_is_late_and_costs_nobody_else_anything() -> None:
    with Watched([lambda message, context: None, lambda message, context: answer(message, TWO)]) as grid:
        grid.processes[2] = None
        both = replace(
            network(grid, 1.0), nodes={"one": 2, "two": 3}, identities={"one": ONE.public(), "two": TWO.public()}
        )
        replies = dict(both.exchange({"one": QUESTION, "two": QUESTION}, "1", Traffic()))
    late = replies["one"]
    assert isinstance(late, SiteFault)
    assert late.code == "late"
    assert isinstance(replies["two"], RecordDict)


def test_revoked_site_is_not_waited_for() -> None:
    def never(message: Message, context: Context) -> None:
        grid.members.discard(2)

    with Watched([never]) as grid:
        (fault,) = asked(grid, 60.0)
    assert isinstance(fault, SiteFault)
    assert (fault.code, fault.proven) == ("revoked", False)


def test_member_that_has_not_connected_yet_is_asked_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorsum.server.exchange.PUSH_AGAIN", 0.1)

    class Away(Watched):
        """Flower takes no message for a node that was never there."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return super().push_messages(messages) if self.processes[2] else []

    with Away([lambda message, context: answer(message, ONE)]) as grid:
        grid.processes[2] = None
        threading.Timer(0.4, lambda: grid.processes.update({2: "first"})).start()
        (reply,) = asked(grid)
    assert isinstance(reply, RecordDict)
