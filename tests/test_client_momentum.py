"""Momentum over rounds at a site."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quorsum.client import site_momentum
from quorsum.errors import UsageError
from quorsum.simulation.grid import LocalGrid


def record(*values: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.array(values, dtype=np.float32))})


def app(beta: float, step: float = 1.0) -> ClientApp:
    made = ClientApp(mods=[site_momentum(beta)])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        model = message.content.array_records["arrays"]["w"].numpy()
        content = {"arrays": record(*(model + np.float32(step))), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"accuracy": 0.5})}), reply_to=message)

    return made


def asked(grid: LocalGrid, content: RecordDict, kind: str = "train") -> RecordDict:
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, kind)])
    assert not reply.has_error(), reply.error
    return reply.content


def test_momentum_by_hand_over_three_rounds() -> None:
    with LocalGrid([app(0.75, step=8.0)]) as grid:
        moved = []
        for _ in range(3):
            reply = asked(grid, RecordDict({"arrays": record(100.0, -100.0)}))
            moved.append(reply.array_records["arrays"]["w"].numpy() - np.array([100.0, -100.0]))
        # x = 8: 2, then 0.75 * 2 + 2, then 0.75 * 3.5 + 2.
        np.testing.assert_allclose(moved, [[2.0, 2.0], [3.5, 3.5], [4.625, 4.625]], atol=1e-4)
        assert reply.metric_records["metrics"]["num-examples"] == 1


def test_beta_of_zero_changes_nothing() -> None:
    with LocalGrid([app(0.0, step=3.0)]) as grid:
        for _ in range(2):
            reply = asked(grid, RecordDict({"arrays": record(1.0)}))
            assert reply.array_records["arrays"]["w"].numpy() == 4.0


def test_another_model_begins_again() -> None:
    with LocalGrid([app(0.5, step=4.0)]) as grid:
        asked(grid, RecordDict({"arrays": record(0.0)}))
        reply = asked(grid, RecordDict({"arrays": record(0.0, 0.0)}))
        np.testing.assert_allclose(reply.array_records["arrays"]["w"].numpy(), [2.0, 2.0])


def test_evaluations_and_errors_pass_unchanged() -> None:
    with LocalGrid([app(0.5)]) as grid:
        reply = asked(grid, RecordDict({"arrays": record(0.0)}), "evaluate")
        assert reply.metric_records["metrics"]["accuracy"] == 0.5
        assert not grid.nodes[2].context.state.array_records
    broken = site_momentum(0.5)
    with LocalGrid([app(0.5)]) as grid:
        message = Message(RecordDict({"arrays": record(0.0)}), 2, "train")
        message.metadata.__dict__["_message_id"] = "one"
        context = grid.nodes[2].context
        failed = broken(message, context, lambda _message, _context: Message(Error(1, "no"), reply_to=message))
        assert failed.has_error()


@pytest.mark.parametrize("beta", [-0.1, 1.0, 7.0])
def test_a_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="beta must lie in 0"):
        site_momentum(beta)
