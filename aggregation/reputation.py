"""Reputation: what a rule says of the same site round after round.

A rule that leaves f of n updates out in every round leaves somebody out in every round, malicious or not, and not
everybody equally often: a site keeps its data, so that what makes its update a little unlike the others' comes back in
every round. (Ten sites with identically distributed digits, f = 2, nobody malicious: one of them is left out of half of
the rounds, where chance alone would give a fifth.) So being left out is not held against a site unless its update was
**far** as well: its distance to the mean of the kept ones (without itself) exceeds the median distance of a kept one by
``margin`` robust standard deviations, that is, median absolute deviations / 0.6745.

For every round in which it was judged, a site's **evidence** (a natural logarithm) moves by the log-likelihood ratio of
"left out and far with probability p" to "with probability r", where r is ``Policy.honest`` (one fifth), or the share of
sites of which this round says so if that is larger, and p = 1 - (1 - r) / 10:

    left out and far:  + ln(p / r), 1.53 for r = 1/5        else:  + ln((1 - p) / (1 - r)) = - ln 10

It never falls below 0, so that good conduct is no credit to spend later. That is Page's CUSUM (Biometrika 41, 1954).
A site is quarantined when its evidence reaches ``ln(1 / false_alarm)``: after 5 rounds in a row with the defaults.

**False alarms.** The sum from any one round on is a likelihood ratio, whose running maximum exceeds 1 / a with
probability at most a (Ville 1939); the evidence is the largest of the sums that begin at the rounds so far. So a site
that is left out and far with probability at most r in every round, given the rounds before, is quarantined within T
rounds with probability at most ``T * false_alarm``. A decay below 1 only makes the evidence smaller. An honest site
whose data are so unlike all the others' that it is far nearly always is not protected by this: geometry alone cannot
tell it from a malicious one.

**What nobody is blamed for.** Of the f that may be malicious, those in quarantine are thought to be found. While k are,
only the f - k worst of those left out are held against anybody: a rule that goes on dropping f must not work its way
through the honest sites. For the same reason never more than f sites are in quarantine.

All functions are pure; the state is frozen, and what is read from JSON equals what was written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quorsum.aggregation.sybils import Similarity, SybilPolicy, clusters, remembered
from quorsum.errors import UsageError

__all__ = ["Reputation", "ReputationPolicy", "Seen", "Standing", "in_quarantine", "judged", "serving"]

# How many times rarer a malicious site is kept than an honest one.
_TIMES = 10.0
# Median absolute deviation of a normal variable, as a share of its standard deviation.
_MAD = 0.6745
_RESOLUTION = 1e-3
# A sentence doubles with every offence, up to this many times.
_DOUBLINGS = 6


@dataclass(frozen=True)
class ReputationPolicy:
    """When a site is quarantined, and for how long.

    Attributes:
        false_alarm: in (0, 1), probability per site and round of quarantining a site that is left out no more often
            than ``honest``.
        honest: in (0, 1), in which share of the rounds an honest site may be left out and far.
        margin: >= 0, by how many robust standard deviations a site must be farther from the kept ones than they are for
            being left out to count.
        decay: in (0, 1], what is left of the evidence from one round to the next.
        patience: rounds of evidence before anybody is quarantined for what the rule says.
        sentence: rounds of the first quarantine; each further one is twice as long as the one before.
        most: most sites in quarantine at the same time; never more than f, whatever is given. None for f.
        count_off: whether f is lowered by the number of sites in quarantine. Sound only if every one of them is
            malicious; a single honest one among them leaves the rule one attacker short.
        sybils: how copies are recognised, or None to look at single sites only.

    Raises:
        UsageError: a value is out of its range.
    """

    false_alarm: float = 1e-3
    honest: float = 0.2
    margin: float = 3.0
    decay: float = 1.0
    patience: int = 5
    sentence: int = 10
    most: int | None = None
    count_off: bool = False
    sybils: SybilPolicy | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.false_alarm < 1.0:
            raise UsageError(f"false_alarm must lie between 0 and 1, got {self.false_alarm}")
        if not 0.0 < self.honest < 1.0:
            raise UsageError(f"honest must lie between 0 and 1, got {self.honest}")
        if not (self.margin >= 0.0 and math.isfinite(self.margin)):
            raise UsageError(f"margin must be 0 deviations or more and finite, got {self.margin}")
        if not 0.0 < self.decay <= 1.0:
            raise UsageError(f"decay must lie above 0 and at most at 1, got {self.decay}")
        if self.patience < 0:
            raise UsageError(f"patience must be 0 rounds or more, got {self.patience}")
        if self.sentence < 1:
            raise UsageError(f"sentence must be 1 round or more, got {self.sentence}")
        if self.most is not None and self.most < 0:
            raise UsageError(f"most must be 0 sites or more, got {self.most}")

    @property
    def threshold(self) -> float:
        """Evidence with which a site is quarantined, natural logarithm."""
        return -math.log(self.false_alarm)

    def ceiling(self, tolerate: int) -> int:
        """Most sites in quarantine at the same time, for f."""
        return tolerate if self.most is None else min(self.most, tolerate)


@dataclass(frozen=True)
class Standing:
    """What is held against one site.

    Attributes:
        evidence: >= 0, natural logarithm of the likelihood ratio.
        offences: how often it was quarantined.
        until: the last round of its latest quarantine; 0 if there was none.
        reason: why, as a sentence without the site's name.
    """

    evidence: float = 0.0
    offences: int = 0
    until: int = 0
    reason: str = ""


_CLEAN = Standing()


@dataclass(frozen=True)
class Reputation:
    """The standing of every site of which something is known, after a number of rounds.

    Attributes:
        standings: by site.
        rounds: rounds in which a rule has judged.
        similarity: who was like whom, where copies are looked for.
    """

    standings: Mapping[str, Standing] = field(default_factory=dict)
    rounds: int = 0
    similarity: Similarity = field(default_factory=Similarity)

    def __post_init__(self) -> None:
        object.__setattr__(self, "standings", MappingProxyType(dict(sorted(self.standings.items()))))

    def of(self, site: str) -> Standing:
        """The standing of a site; a clean one if nothing is known."""
        return self.standings.get(site, _CLEAN)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which :meth:`from_json` makes an equal one."""
        return {
            "standings": {site: asdict(standing) for site, standing in self.standings.items()},
            "rounds": self.rounds,
            "similarity": self.similarity.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reputation:
        """The reverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: these are no such values.
        """
        standings = {site: Standing(**one) for site, one in values["standings"].items()}
        return cls(standings, int(values["rounds"]), Similarity.from_json(values["similarity"]))


@dataclass(frozen=True)
class Seen:
    """What a round says about its sites.

    Attributes:
        judged: sites whose updates the rule saw, in the order of the rows of ``gram``.
        out: of these, the ones it left out, worst first; where a rule weighs everybody, its f worst.
        proven: sites that are proven to have left the protocol, with what they did as a sentence. Only what nobody else
            can do in a site's name belongs here.
        gram: their inner products, float64, shape (m, m); None where nobody knows them, and then whoever is left out
            counts as far.
    """

    judged: tuple[str, ...]
    out: tuple[str, ...]
    proven: Mapping[str, str] = field(default_factory=dict)
    gram: NDArray[np.float64] | None = None


def in_quarantine(reputation: Reputation, number: int) -> dict[str, str]:
    """Who is to sit out round ``number``, and why."""
    return {
        site: f"in quarantine until round {standing.until}: {standing.reason}"
        for site, standing in reputation.standings.items()
        if standing.until >= number
    }


def serving(reputation: Reputation, number: int, present: Collection[str], need: int) -> frozenset[str]:
    """Who of those present is left out of round ``number``, so that at least ``need`` sites remain.

    Where too few would remain, those with the least against them come back first.
    """
    sentenced = [site for site in in_quarantine(reputation, number) if site in present]
    room = max(0, len(present) - need)
    # By offences, then by evidence; names only so that two coordinators agree.
    worst = sorted(sentenced, key=lambda s: (-reputation.of(s).offences, -reputation.of(s).evidence, s))
    return frozenset(worst[:room])


def judged(
    policy: ReputationPolicy,
    reputation: Reputation,
    seen: Seen,
    number: int,
    tolerate: int,
    trusted: Collection[str] = (),
) -> Reputation:
    """The reputation after round ``number``.

    Args:
        policy: when a site is quarantined.
        reputation: before the round.
        seen: what the round says.
        number: of the round.
        tolerate: f of the run, whatever was counted off in the round.
        trusted: sites that are never quarantined, such as the reference of a rule.

    Returns:
        a reputation in which new sentences begin with the next round.
    """
    away = {site for site, standing in reputation.standings.items() if standing.until >= number}
    still = max(0, tolerate - len(away - set(seen.judged)))
    similarity = reputation.similarity
    if policy.sybils is not None and seen.gram is not None:
        similarity = remembered(policy.sybils, similarity, seen.judged, seen.gram)
    alike = {} if policy.sybils is None else _alike(policy.sybils, similarity, seen.judged, still)
    far = _far(policy, seen)
    accused = {site for site in seen.out[:still] if site in far} | alike.keys()
    standings = dict(reputation.standings)
    share = len(accused) / len(seen.judged) if seen.judged else 0.0
    if share < 1.0:
        for site in seen.judged:
            standings[site] = _moved(policy, reputation.of(site), share, site in accused)
    rounds = reputation.rounds + bool(seen.judged)
    after = Reputation(standings, rounds, similarity)
    return _sentenced(policy, after, seen, alike, number, tolerate, frozenset(trusted))


def _far(policy: ReputationPolicy, seen: Seen) -> frozenset[str]:
    """Of those left out, the ones that are farther from the kept ones than these are from each other."""
    kept = np.array([site not in seen.out for site in seen.judged], dtype=np.bool_)
    if seen.gram is None or not kept.any():
        return frozenset(seen.out)
    # One row of weights for each site: the mean of the kept ones but itself.
    others = np.where(np.eye(len(kept), dtype=np.bool_), 0.0, kept.astype(np.float64)[None, :])
    others /= np.maximum(others.sum(axis=1, keepdims=True), 1.0)
    cross = np.einsum("ij,ij->i", others, seen.gram)
    squares = np.diagonal(seen.gram) - 2 * cross + np.einsum("ij,jk,ik->i", others, seen.gram, others)
    distances = np.sqrt(np.maximum(squares, 0.0))
    middle = float(np.median(distances[kept]))
    # Where the kept ones are equally far to the last digits, what differs is rounding.
    spread = max(float(np.median(np.abs(distances[kept] - middle))) / _MAD, _RESOLUTION * middle)
    beyond = distances - middle > policy.margin * spread
    return frozenset(site for site, out in zip(seen.judged, beyond & ~kept, strict=True) if out)


def _moved(policy: ReputationPolicy, standing: Standing, share: float, out: bool) -> Standing:
    usual = max(policy.honest, share)
    step = math.log((1 - (1 - usual) / _TIMES) / usual) if out else -math.log(_TIMES)
    return replace(standing, evidence=max(0.0, policy.decay * standing.evidence + step))


def _alike(policy: SybilPolicy, similarity: Similarity, sites: tuple[str, ...], still: int) -> dict[str, str]:
    """Sites that are too alike, with a sentence each. A group larger than the malicious can be accuses nobody."""
    found = {}
    for group in clusters(policy, similarity, sites):
        if len(group) <= still:
            for site in group:
                others = ", ".join(other for other in group if other != site)
                found[site] = f"its updates are closer to those of {others} than any two others' are"
    return found


def _sentenced(
    policy: ReputationPolicy,
    reputation: Reputation,
    seen: Seen,
    alike: Mapping[str, str],
    number: int,
    tolerate: int,
    trusted: frozenset[str],
) -> Reputation:
    standings = dict(reputation.standings)
    # Whose sentence goes on after this round takes up one of the places.
    free = policy.ceiling(tolerate) - sum(standing.until > number for standing in standings.values())
    due: dict[str, str] = {site: sentence for site, sentence in seen.proven.items() if site not in trusted}
    if reputation.rounds >= policy.patience:
        for site in seen.judged:
            if site not in trusted and site not in due and reputation.of(site).evidence >= policy.threshold:
                due[site] = alike.get(site, "left out by the rule much more often than the others")
    worst = sorted(due, key=lambda site: (site not in seen.proven, -reputation.of(site).evidence, site))
    for site in worst[: max(0, free)]:
        before = reputation.of(site)
        rounds = policy.sentence * 2 ** min(before.offences, _DOUBLINGS)
        # It comes back half as suspected as it left, which good conduct wears off.
        standings[site] = Standing(policy.threshold / 2, before.offences + 1, number + rounds, due[site])
    return replace(reputation, standings=standings)
