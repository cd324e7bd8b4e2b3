"""Momentum over rounds at a site: a Flower mod for the app, inside the seal.

A site submits ``m_t = beta m_{t-1} + (1 - beta) x_t`` instead of what it has learnt in the round, ``x_t`` (Karimireddy,
He & Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021). Honest updates then differ less from
round to round, and a rule has less to forgive: what docs/robustness.md measures is measured with it.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from quorsum import arrays
from quorsum.errors import UsageError

__all__ = ["site_momentum"]

STATE = "quorsum.site-momentum"
TRAIN = "train"


def site_momentum(beta: float = 0.9) -> Mod:
    """A mod with which the app's updates have momentum over the rounds of a run.

    Use it in the app, ``ClientApp(mods=[site_momentum(0.9)])``, or ``mods=[seal(), site_momentum(0.9)]`` on a stock
    SuperNode. The momentum is kept in the run's ``Context.state``; where a process is started anew in the middle of a
    run, it begins again from 0. Instructions and replies without exactly one model in them pass unchanged.

    Args:
        beta: 0 .. 1 (exclusive); 0 changes nothing.

    Raises:
        UsageError: beta is out of range.
    """
    if not 0.0 <= beta < 1.0:
        raise UsageError(f"beta must lie in 0 .. 1 (exclusive), got {beta}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type.split(".")[0] != TRAIN or not reply.has_content():
            return reply
        models = list(message.content.array_records.values())
        learnt = list(reply.content.array_records.items())
        if len(models) != 1 or len(learnt) != 1:
            return reply
        (model,), ((name, trained),) = models, learnt
        # m <- beta m + (1 - beta) x, from m = 0
        update = np.float32(1.0 - beta) * arrays.difference(trained, model)
        before = context.state.array_records.get(STATE)
        if before is not None and arrays.dimension(before) == update.size:
            update += np.float32(beta) * arrays.flatten(before)
        context.state[STATE] = ArrayRecord({"m": Array(update)})
        reply.content[name] = arrays.apply_update(model, update)
        return reply

    return mod
