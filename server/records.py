"""What the coordinator keeps of a round: plain values that can be written down and compared."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.serverapp.strategy import Result

from quorsum.crypto.suite import Site

__all__ = ["QuorumResult", "RoundRecord"]


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        round: number of the round, from 1.
        invited: the sites asked to train.
        accepted: sites whose update is in the new model (weight > 0).
        rejected: invited sites whose update is not.
        reasons: for each rejected or quarantined site one sentence.
        codes: for each rejected or quarantined site a short stable reason.
        weights: weight of each accepted site; they sum to 1 for the averaging rules.
        notes: what happened without costing anybody the round.
        failed: why the model did not change, or None.
        unit: the reference norm C of the round.
        seconds: ``train`` and ``seal`` are medians of what the sites report, ``geometry`` (measure and select),
            ``open`` (combine and apply) and ``total`` are the coordinator's clock.
        bytes: ``up_per_site`` and ``down_per_site``, mean over the sites, arrays and blocks only.
        metrics: evaluation of the new model, when there was one.
        retried: why each attempt at the round ended that was followed by another; ``failed`` is about the last.
        quarantined: sites that were not invited because of their record in earlier rounds; ``reasons`` and ``codes``
            speak of them too.
    """

    round: int
    invited: tuple[Site, ...]
    accepted: tuple[Site, ...]
    rejected: tuple[Site, ...]
    reasons: dict[Site, str]
    codes: dict[Site, str]
    weights: dict[Site, float]
    notes: tuple[str, ...]
    failed: str | None
    unit: float
    seconds: dict[str, float]
    bytes: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    retried: tuple[str, ...] = ()
    quarantined: tuple[Site, ...] = ()

    @property
    def attempts(self) -> int:
        """How many attempts were made at the round."""
        return len(self.retried) + 1


@dataclass
class QuorumResult(Result):
    """Flower's ``Result`` with the record of every round."""

    rounds: list[RoundRecord] = field(default_factory=list)
