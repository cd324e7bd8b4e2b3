"""What a site must not forget between two messages of one round.

Kept in Flower's ``Context.state``, which lives in the SuperNode's memory for the length of a run and never leaves
the site. One record: the run, the last round taken, its context, and the suite's private state.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from quorsum import messages
from quorsum.crypto.suite import RoundContext
from quorsum.errors import CoordinatorFault

__all__ = ["recall", "remember", "take_round"]

RECORD = "quorsum.ledger"


def take_round(state: RecordDict, context: RoundContext) -> None:
    """Take part in a round; from here on no earlier round and no second context of this one is answered.

    Raises:
        CoordinatorFault: this round of the run, or a later one, was taken before.
    """
    known = state.get(RECORD)
    if isinstance(known, ConfigRecord) and known["run"] == context.run:
        last = (int(str(known["round"])), int(str(known["attempt"])))
        if (context.round, context.attempt) <= last:
            raise CoordinatorFault(
                "replayed-round",
                f"round {context.round} (attempt {context.attempt}) was asked for after round {last[0]} "
                f"(attempt {last[1]}) had been taken; a site seals once per round",
            )
    _write(state, context, b"")


def remember(state: RecordDict, context: RoundContext, suite_state: bytes) -> None:
    """Store the suite's private state of a round already taken."""
    _write(state, context, suite_state)


def recall(state: RecordDict, digest: str) -> tuple[RoundContext, bytes]:
    """The context and the suite's state of the round a question is about.

    Raises:
        CoordinatorFault: the question is not about the round taken last.
    """
    record = state.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise CoordinatorFault("unknown-round", "a question came before any round was taken")
    context = messages.Context.model_validate_json(str(record["context"])).round_context()
    if context.digest().hex() != digest:
        raise CoordinatorFault("wrong-round", f"the question is not about round {context.round}, the last one taken")
    return context, bytes.fromhex(str(record["state"]))


def _write(state: RecordDict, context: RoundContext, suite_state: bytes) -> None:
    state[RECORD] = ConfigRecord(
        {
            "run": context.run,
            "round": context.round,
            "attempt": context.attempt,
            "context": messages.Context.of(context).model_dump_json(),
            "state": suite_state.hex(),
        }
    )
