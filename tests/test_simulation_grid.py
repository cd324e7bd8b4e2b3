"""The in-process grid behaves like Flower's: one message at a time per node, errors as replies, replies once."""

from __future__ import annotations

import threading
import time

from federation import learning_app
from flwr.app import ConfigRecord, Context, Message, RecordDict

from quorsum.simulation.grid import LocalGrid


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def ask(node: int, kind: str = "query") -> Message:
    return Message(RecordDict({"c": ConfigRecord({"node": node})}), node, kind)


def test_every_node_has_its_own_config_and_state() -> None:
    def count(message: Message, context: Context) -> Message:
        seen = int(context.state["n"]["n"]) + 1 if "n" in context.state else 1  # type: ignore[arg-type]
        context.state["n"] = ConfigRecord({"n": seen})
        reply = {
            "partition": context.node_config["partition-id"],
            "of": context.node_config["num-partitions"],
            "n": seen,
        }
        return Message(RecordDict({"c": ConfigRecord(reply)}), reply_to=message)

    with LocalGrid([count] * 3) as grid:
        nodes = list(grid.get_node_ids())
        for turn in (1, 2):
            replies = list(grid.send_and_receive([ask(node) for node in nodes]))
            assert [dict(r.content["c"]) for r in replies] == [{"partition": p, "of": 3, "n": turn} for p in range(3)]


def test_reply_is_handed_out_once_and_belongs_to_its_message() -> None:
    with LocalGrid([echo, echo]) as grid:
        first, second = grid.push_messages([ask(2), ask(3)])
        deadline = time.monotonic() + 5
        got: list[Message] = []
        while len(got) < 2 and time.monotonic() < deadline:
            got += grid.pull_messages([first, second])
        assert {m.metadata.reply_to_message_id: m.metadata.src_node_id for m in got} == {first: 2, second: 3}
        assert list(grid.pull_messages([first, second])) == []


def test_app_that_raises_becomes_an_error_reply() -> None:
    def broken(message: Message, context: Context) -> Message:
        raise ValueError("boom")

    with LocalGrid([broken]) as grid:
        (reply,) = grid.send_and_receive([ask(2)])
    assert reply.has_error()
    assert "boom" in str(reply.error.reason)


def test_unknown_node_gets_no_message_id() -> None:
    with LocalGrid([echo]) as grid:
        assert list(grid.push_messages([ask(99)])) == []


def test_dead_node_never_replies() -> None:
    with LocalGrid([lambda message, context: None]) as grid:
        ids = list(grid.push_messages([ask(2)]))
        time.sleep(0.1)
        assert list(grid.pull_messages(ids)) == []


def test_one_node_handles_one_message_at_a_time() -> None:
    active, most, lock = 0, 0, threading.Lock()

    def slow(message: Message, context: Context) -> Message:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.02)
        with lock:
            active -= 1
        return Message(message.content, reply_to=message)

    with LocalGrid([slow], workers=4) as grid:
        list(grid.send_and_receive([ask(2) for _ in range(4)]))
    assert most == 1


def test_an_ordinary_flower_strategy_runs_on_it() -> None:
    from federation import model
    from flwr.serverapp.strategy import FedAvg

    with LocalGrid([learning_app([])] * 3) as grid:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        result = strategy.start(grid, model(), num_rounds=1)
    assert 0.3 < float(result.arrays["bias"].numpy()[0]) < 0.7
