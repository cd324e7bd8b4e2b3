"""What a coordinator would make of a set of updates, for attackers that try their updates out before they send them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.aggregation import Rule, judge
from quorsum.aggregation.gram import gram_matrix
from quorsum.errors import RoundFailed, UsageError

__all__ = ["Defence", "clipped"]


@dataclass(frozen=True)
class Defence:
    """Clipping and the rule, without sealing, and so without the noise that comes with it.

    Attributes:
        rule: the robust rule.
        tolerate: f as the coordinator has declared it.
        clip: whether sites clip to the norm of the round.
        equal: whether the suite adds up a selection with equal weights.
        reference: row of the trusted reference, for rules that need one.
        seed: for rules that draw; the coordinator draws otherwise.
        unit: C, the norm that sites clip to in the round.
    """

    rule: Rule
    tolerate: int
    clip: bool
    equal: bool
    reference: int | None = None
    seed: int = 0
    unit: float = math.inf

    @property
    def isometric(self) -> bool:
        """Whether rotated updates have the rotated aggregate: all that is looked at are inner products."""
        return self.rule.needs == "gram"

    def __call__(self, updates: NDArray[np.floating]) -> NDArray[np.float64]:
        """The aggregate of updates of shape ``(n, d)``, shape ``(d,)``.

        Zeros, no movement of the model, where the round would fail.
        """
        x = clipped(updates, self.unit) if self.clip else np.asarray(updates, dtype=np.float64)
        try:
            if self.rule.needs == "updates":
                return self.rule.aggregate(x, self.tolerate)
            verdict = judge(
                gram_matrix(x),
                self.rule,
                self.tolerate,
                equal=self.equal,
                rng=np.random.default_rng(self.seed),
                reference=self.reference,
            )
        except (UsageError, RoundFailed):
            return np.zeros(x.shape[1])
        return np.asarray(verdict.weights @ x, dtype=np.float64)


def clipped(updates: NDArray[np.floating], unit: float) -> NDArray[np.float64]:
    """``min(1, C / |x|) x`` for each row x, with C = ``unit``."""
    x = np.asarray(updates, dtype=np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    shorter: NDArray[np.float64] = x * np.minimum(1.0, unit / np.where(norms > 0.0, norms, 1.0))
    return shorter
