"""The one decision of a round: from a Gram matrix to who is in the new model.

Everybody who can see the opened Gram matrix gets the same answer from these functions, bit for bit: they use no
randomness but the generator passed in, and no state. The coordinator calls them to choose, and under suites that let
sites repeat the selection the sites call them to check that choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quorsum.aggregation.checks import Finding, check_gram
from quorsum.aggregation.compose import Rule
from quorsum.errors import BoundError, RoundFailed

__all__ = ["Judgement", "judge", "norm_gate"]

# Sites clip in float32 and suites round: the gate leaves that much room.
CLIP_SLACK = 1.05
# Without clipping there is no norm an honest update must keep; beyond this many reference norms no suite carries it.
UNCLIPPED_GATE = 64.0


@dataclass(frozen=True)
class Judgement:
    """What was decided about the rows of a Gram matrix.

    Attributes:
        findings: rows that must not be used, and why; the rule does not see them, and those proven malicious count
            against f.
        rows: the rows that the rule saw, ascending.
        weights: float64, one per row of the matrix; zero for rows that are not in the new model.
        scores: float64, one per row of the matrix, higher is worse; NaN for rows that the rule did not see.
        tolerate: f less what was proven: how many of ``rows`` may still be malicious.
    """

    findings: Mapping[int, Finding]
    rows: tuple[int, ...]
    weights: NDArray[np.float64]
    scores: NDArray[np.float64]
    tolerate: int


def norm_gate(unit: float, clip: bool) -> float:
    """Norm that no honest update of a round exceeds, given the reference norm C and whether sites clip to it."""
    return CLIP_SLACK * unit * (1.0 if clip else UNCLIPPED_GATE)


def judge(
    gram: NDArray[np.float64],
    rule: Rule,
    f: int,
    *,
    norm_bound: float | None = None,
    norm_proves: bool = True,
    noise: float = 0.0,
    proven: int = 0,
    count_off: bool = True,
    equal: bool = False,
    rng: np.random.Generator | None = None,
    reference: int | None = None,
) -> Judgement:
    """Take out rows that cannot be honest, then apply the rule to the rest.

    Args:
        gram: float64, shape (n, n).
        rule: the robust rule; it must work on a Gram matrix.
        f: how many of the sites of the round may be malicious.
        norm_bound: norm that no honest update exceeds.
        norm_proves: whether a norm beyond the bound proves malice; without clipping it does not.
        noise: >= 0, standard deviation of the noise on every entry, in squared units of the updates.
        proven: sites that are not among the rows because they were proven malicious before.
        count_off: whether proven findings lower f. Where messages are not signed a malicious site can produce such a
            finding in an honest one's name, and they must not.
        equal: the rule's selection with equal weights that sum to 1, instead of its weights.
        rng: source of randomness for rules that draw.
        reference: row of the trusted reference, for rules that need one.

    Raises:
        RoundFailed: more sites than f were proven malicious, so what was assumed about the others does not hold; or the
            row of the reference is among those that must not be used.
        BoundError: with the rows that are left, the rule cannot tolerate the malicious ones that may be left.
        QuorumError: whatever the rule raises.
    """
    findings = dict(check_gram(gram, f, norm_bound=norm_bound, norm_proves=norm_proves, noise=noise))
    malicious = proven + (sum(finding.proven for finding in findings.values()) if count_off else 0)
    if malicious > f:
        raise RoundFailed(
            f"{malicious} sites sent what no honest site sends, more than the {f} that can be malicious: nothing in "
            "this round can be trusted; find out what is wrong with these sites, or raise tolerate"
        )
    rows = tuple(row for row in range(len(gram)) if row not in findings)
    left = f - malicious
    # A reference row is a voice of its own kind, not one of the sites that are judged.
    need = rule.minimum_sites(left) + (reference is not None)
    if reference is not None and reference in findings:
        raise RoundFailed(f"the row of the trusted reference cannot be used: {findings[reference].reason}")
    if len(rows) < need:
        raise BoundError(
            f"only {len(rows)} updates can be used; {rule.name} needs {need} to tolerate {left} malicious ones"
        )
    index = np.array(rows)
    outcome = rule.apply(
        gram[np.ix_(index, index)], left, rng=rng, reference=None if reference is None else rows.index(reference)
    )
    weights, scores = np.zeros(len(gram)), np.full(len(gram), np.nan)
    weights[index] = outcome.keep / max(1, outcome.keep.sum()) if equal else outcome.weights
    scores[index] = outcome.scores
    return Judgement(findings, rows, weights, scores, left)
