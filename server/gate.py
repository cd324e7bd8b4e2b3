"""The gate: is the new model good enough to be adopted?

A rule looks at updates. The gate looks at what came out: the new model is evaluated on validation data before it takes
the place of the last good one. If it is worse by more than the limits allow, the run goes on from the last good one.

**Who has a say.** Every site whose app evaluates (Flower's ``@app.evaluate``) reports measures of the new model, and is
compared with itself: what it reported of the last good model. A coordinator with data of its own (``evaluate_fn``) has
a say as well, and a trusted one. The gate reads these names:

=====================  =================================================================================================
``accuracy``           (or what ``Gate.measure`` names): the share of rows that the model gets right; higher is better
``accuracy-GROUP``     the same among the rows of one group; the *gap* of a voter is its largest less its smallest
``predicted-CLASS``    the share of rows that the model says are of a class
=====================  =================================================================================================

**The vote**, for each limit on its own. Of v sites that can compare, each says for itself whether the limit is passed.
The model is turned down if at least ``max(f, v // 2) + 1`` say so:

* f liars alone never turn a model down: one honest site at least must see it.
* f liars cannot save a model that so many honest sites see to be bad; with v >= 2 f + 1 a majority is enough.
* Where fewer honest sites than that see it, liars decide. That is not avoidable with the votes of those concerned.

**Slow decline.** What a site is compared with moves towards the new model by at most a tenth of the limit in a round
when the new one is worse, and at once when it is better. So a model that loses a little less than the limit in every
round is turned down in the second, and one that is allowed to get worse for ever loses a tenth of the limit per round.

Everything here is pure; who asks the sites, and what a turned down round does, is in ``strategy.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from quorsum.crypto.suite import Site
from quorsum.errors import UsageError

__all__ = ["COORDINATOR", "Gate", "Measures", "Verdict", "Votes", "Watched", "decide", "read", "watched"]

Measures: TypeAlias = Mapping[str, float]
"""What one voter says of one model, by name."""

Votes: TypeAlias = Mapping[Site, Measures]
"""What every voter says of one model."""

COORDINATOR: Site = ""
"""The voter whose data are the coordinator's own; no site has this name."""

# Share of a limit by which what a voter is compared with gets worse in a round.
_GIVE = 0.1
_GAP = "gap"
_GROUP, _SHARE = "-", "predicted-"


@dataclass(frozen=True)
class Gate:
    """What a new model must not do.

    Attributes:
        drop: in (0, 1], by how much the measure may fall.
        share: in (0, 1], by how much the predicted share of one class may rise.
        gap: in (0, 1], by how much the gap between groups may widen.
        measure: name of the measure, a share between 0 and 1, higher is better.
        settle: adopted rounds before shares and gaps are looked at: the first models predict anything.
        attention: models turned down in a row after which somebody is asked to look.

    Raises:
        UsageError: a value is out of its range.
    """

    drop: float = 0.05
    share: float = 0.2
    gap: float = 0.15
    measure: str = "accuracy"
    settle: int = 3
    attention: int = 3

    def __post_init__(self) -> None:
        for name in ("drop", "share", "gap"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise UsageError(f"{name} must lie above 0 and at most at 1, got {value}")
        if not self.measure:
            raise UsageError("measure must name what sites report, such as 'accuracy'")
        if self.settle < 0:
            raise UsageError(f"settle must be 0 rounds or more, got {self.settle}")
        if self.attention < 1:
            raise UsageError(f"attention must be 1 round or more, got {self.attention}")


@dataclass(frozen=True)
class Verdict:
    """What was decided about a model.

    Attributes:
        adopt: whether it takes the place of the last good one.
        reasons: a sentence for every limit that it passed; empty if it is adopted.
        voters: how many could compare the measure.
    """

    adopt: bool
    reasons: tuple[str, ...]
    voters: int


@dataclass(frozen=True)
class Watched:
    """What the gate remembers between rounds.

    Attributes:
        votes: for each voter what it is compared with.
        reported: for each voter all that it said of the last good model.
        adopted: how many models were adopted.
        turned_down: how many were turned down since then.
    """

    votes: Votes = field(default_factory=dict)
    reported: Votes = field(default_factory=dict)
    adopted: int = 0
    turned_down: int = 0

    def __post_init__(self) -> None:
        for name in ("votes", "reported"):
            seen = {voter: MappingProxyType(dict(sorted(one.items()))) for voter, one in getattr(self, name).items()}
            object.__setattr__(self, name, MappingProxyType(dict(sorted(seen.items()))))

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which :meth:`from_json` makes an equal one."""
        return {
            "votes": {voter: dict(one) for voter, one in self.votes.items()},
            "reported": {voter: dict(one) for voter, one in self.reported.items()},
            "adopted": self.adopted,
            "turned_down": self.turned_down,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Watched:
        """The reverse of :meth:`to_json`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: these are no such values.
        """
        votes, reported = (
            {voter: {name: float(value) for name, value in one.items()} for voter, one in values[key].items()}
            for key in ("votes", "reported")
        )
        return cls(votes, reported, int(values["adopted"]), int(values["turned_down"]))


def read(gate: Gate, reported: Measures) -> dict[str, float]:
    """Of what a voter reports, what the gate looks at: the measure, predicted shares, and the gap between its groups.

    Values that are not finite or not between 0 and 1 are no shares of anything, and left out.
    """
    sane = {name: float(v) for name, v in reported.items() if math.isfinite(v) and 0.0 <= v <= 1.0}
    found = {name: v for name, v in sane.items() if name == gate.measure or name.startswith(_SHARE)}
    groups = [v for name, v in sane.items() if name.startswith(gate.measure + _GROUP)]
    if len(groups) > 1:
        found[_GAP] = max(groups) - min(groups)
    return found


def decide(before: Votes, after: Votes, gate: Gate, tolerate: int, *, settled: bool = True) -> Verdict:
    """Whether a model is adopted.

    Args:
        before: what each voter is compared with, as :func:`read` gives it.
        after: what each says of the new model, likewise.
        gate: the limits.
        tolerate: f, how many of the voters may lie.
        settled: whether shares and gaps are looked at.

    Returns:
        the verdict. Without anybody who can compare, the model is adopted.
    """
    names = {name for one in after.values() for name in one}
    reasons = []
    limits: list[tuple[str, float, Callable[[float, float], float], str]] = [
        (gate.measure, gate.drop, lambda old, new: old - new, f"{gate.measure} fell")
    ]
    if settled:
        limits.append((_GAP, gate.gap, lambda old, new: new - old, "the gap between groups widened"))
        limits += [
            (name, gate.share, lambda old, new: new - old, f"the share of rows {name.replace('-', ' to be ', 1)} rose")
            for name in sorted(names)
            if name.startswith(_SHARE)
        ]
    for name, limit, worse, sentence in limits:
        moved = [
            worse(before[voter][name], one[name])
            for voter, one in sorted(after.items())
            if name in one and name in before.get(voter, {})
        ]
        against = sum(by > limit for by in moved)
        if moved and against >= max(tolerate, len(moved) // 2) + 1:
            whom = "" if after.keys() == {COORDINATOR} else f" at {against} of {len(moved)} sites that compare"
            reasons.append(f"{sentence} by {statistics.median(moved):.3f}{whom}, more than {limit:g}")
    voters = sum(gate.measure in one and gate.measure in before.get(voter, {}) for voter, one in after.items())
    return Verdict(not reasons, tuple(reasons), voters)


def watched(before: Watched, reported: Votes, gate: Gate, verdict: Verdict | None = None) -> Watched:
    """What to remember after a verdict; without one, of the model that a run begins with."""
    if verdict is not None and not verdict.adopt:
        return Watched(before.votes, before.reported, before.adopted, before.turned_down + 1)
    adopted = before.adopted + (verdict is not None)
    votes = dict(before.votes)
    for voter, said in reported.items():
        new, old = read(gate, said), before.votes.get(voter, {})
        # The first models predict anything: what they do is no measure for later ones.
        free = adopted <= gate.settle
        votes[voter] = {**old, **{name: _towards(gate, name, old.get(name), new[name], free) for name in new}}
    return Watched(votes, {**before.reported, **reported}, adopted, 0)


def _towards(gate: Gate, name: str, old: float | None, new: float, free: bool) -> float:
    if old is None:
        return new
    if name == gate.measure:
        return max(new, old - _GIVE * gate.drop)
    if free:
        return new
    return min(new, old + _GIVE * (gate.gap if name == _GAP else gate.share))
