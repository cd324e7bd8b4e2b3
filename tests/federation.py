"""A small federation for tests: real messages, real ClientApps, no model library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from quorsum import arrays, messages
from quorsum.crypto.suite import RoundContext
from quorsum.simulation.grid import LocalGrid

SITES = ("site-01", "site-02", "site-03", "site-04", "site-05")
DIMENSION = 12


def model(fill: float = 0.0) -> ArrayRecord:
    return ArrayRecord(
        {"weight": Array(np.full((5, 2), fill, np.float32)), "bias": Array(np.full(2, fill, np.float32))}
    )


def context(number: int = 1, **changes: Any) -> RoundContext:
    fields: dict[str, Any] = {
        "run": "run",
        "round": number,
        "attempt": 1,
        "sites": SITES,
        "dimension": DIMENSION,
        "tolerate": 1,
        "unit": 1.0,
        "clip": False,
        "sketches": 4,
        "model": arrays.fingerprint(model()),
    }
    return RoundContext(**(fields | changes))


def honest_update(partition: int, number: int) -> np.ndarray:
    """What site ``partition`` learns in a round: a common direction and a little of its own."""
    rng = np.random.default_rng([partition, number])
    return (0.5 + 0.05 * rng.normal(size=DIMENSION)).astype(np.float32)


def learning_app(mods: list[Mod], learn: Callable[[int, int], np.ndarray] = honest_update) -> ClientApp:
    """An app that knows nothing of quorsum: it adds ``learn(partition, round)`` to the model."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        step = learn(int(context.node_config["partition-id"]), number)
        moved, start = {}, 0
        for name, array in arrays.items():
            values = array.numpy()
            moved[name] = Array((values + step[start : start + values.size].reshape(values.shape)).astype(values.dtype))
            start += values.size
        metrics = MetricRecord({"num-examples": 100, "train_loss": 0.25, "secret_mean": 41.5})
        return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        partition = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 7, "accuracy": 0.5 + 0.1 * partition, "raw": [1.0, 2.0]})
        return Message(RecordDict({"metrics": metrics, "leak": arrays}), reply_to=message)

    return app


def train_content(number: int = 1, suite: str = "plain/v1", **changes: Any) -> RecordDict:
    """The instruction to train, as the coordinator sends it to site-01."""
    users = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": number})})
    train = messages.Train(site="site-01", suite=suite, context=messages.Context.of(context(number, **changes)))
    return messages.pack(train, beside=users)


def send(grid: LocalGrid, content: RecordDict, message_type: str = "train", node: int = 2) -> Message:
    """One message to one node, and its reply."""
    (reply,) = grid.send_and_receive([Message(content, node, message_type)], timeout=30)
    return reply
