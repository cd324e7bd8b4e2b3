"""The selection of a sealed round: the one function that the coordinator and every site call.

It depends on nothing but the context and the opened Gram matrix, so that sites can repeat what the coordinator chose
before they help to open it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quorsum.aggregation import Rule, judge, parse_rule
from quorsum.crypto.suite import RoundContext, Site
from quorsum.errors import CoordinatorFault, RoundFailed, UsageError

__all__ = ["Selection", "one_attempt", "select"]


@dataclass(frozen=True)
class Selection:
    """The robust rule that a context names, as a selection of sites."""

    def __call__(
        self, context: RoundContext, sites: tuple[Site, ...], gram: NDArray[np.float64], tolerate: int
    ) -> frozenset[Site]:
        """The set of sites whose mean is opened.

        Args:
            context: the round; it names the rule, and the reference where the rule needs one.
            sites: whose rows these are.
            gram: float64, shape (m, m), in the squared units of updates.
            tolerate: how many of these sites may be malicious.

        Raises:
            RoundFailed: the rule is not known here, or cannot decide over so few sites; or the reference is not among
                them.
        """
        try:
            rule = parse_rule(context.rule)
            reference = _row_of(context.reference, sites) if rule.needs_reference else None
            # No norm bound: the suite's own, which knows of the noise in the updates, has been kept already.
            verdict = judge(gram, rule, tolerate, equal=True, reference=reference)
        except UsageError as error:
            raise RoundFailed(f"{error}") from error
        return frozenset(site for site, weight in zip(sites, verdict.weights, strict=True) if weight)

    def check(self, context: RoundContext) -> None:
        """Whether sites can repeat the selection that the context names.

        Raises:
            CoordinatorFault: ``one-attempt``: this is a later attempt, and the rule allows none (see ``one_attempt``);
                ``wrong-rule``: the rule is not known here, needs every coordinate, or draws at random;
                ``wrong-reference``: the rule needs a reference and the context names none, or none of the roster, or
                names one that the rule does not use.
        """
        try:
            rule = parse_rule(context.rule)
        except UsageError as error:
            raise CoordinatorFault("wrong-rule", f"the rule of the round: {error}") from None
        if rule.needs != "gram" or rule.needs_generator:
            raise CoordinatorFault(
                "wrong-rule", f"sites cannot repeat {rule.name}: it draws at random or needs every coordinate"
            )
        if context.attempt > 1 and one_attempt(rule):
            raise CoordinatorFault("one-attempt", f"a round by {rule.name}, which may keep few sites, has one attempt")
        if not rule.needs_reference:
            if context.reference:
                raise CoordinatorFault(
                    "wrong-reference", f"{rule.name} needs no reference, and the context names {context.reference!r}"
                )
        elif not context.reference:
            raise CoordinatorFault("wrong-reference", f"{rule.name} needs a reference, and the context names none")
        elif context.reference not in context.sites:
            raise CoordinatorFault("wrong-reference", f"the reference {context.reference!r} is not a site of the round")


def one_attempt(rule: Rule) -> bool:
    """Whether a round by this rule has one attempt only: the rule may leave out more than f sites.

    Sites that sign for a set join no later attempt, and so no later sum; that protects them and the others only if
    most of them are in the set. With ``multi-krum(m=4)`` none need be, and two sums may differ in a single update.
    """
    last = rule.parts[-1]
    return rule.needs_reference or last.name in ("krum", "crowd-clipping") or "m" in last.options


select: Final = Selection()
"""The selection, as both ends of ``sealed`` are given it."""


def _row_of(reference: Site, sites: tuple[Site, ...]) -> int:
    if reference not in sites:
        raise RoundFailed(f"the reference site {reference!r} has no usable update in this round")
    return sites.index(reference)
