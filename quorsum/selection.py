"""The selection of a sealed round: the one function that the coordinator and every site call.

It depends on nothing but the context and the opened Gram matrix, so that sites can repeat what the coordinator chose
before they help to open it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quorsum.aggregation import judge, norm_gate, parse_rule
from quorsum.crypto.suite import RoundContext, Site
from quorsum.errors import RoundFailed, UsageError

__all__ = ["select"]


def select(context: RoundContext, sites: tuple[Site, ...], gram: NDArray[np.float64], tolerate: int) -> frozenset[Site]:
    """The set of sites whose mean is opened.

    Args:
        context: the round; it names the rule.
        sites: whose rows these are.
        gram: float64, shape (m, m), in the squared units of updates.
        tolerate: how many of these sites may be malicious.

    Raises:
        RoundFailed: the rule is not known here, or cannot decide over so few sites.
    """
    try:
        rule = parse_rule(context.rule)
        bound = norm_gate(context.unit, context.clip)
        verdict = judge(gram, rule, tolerate, norm_bound=bound, equal=True)
    except UsageError as error:
        raise RoundFailed(f"{error}") from error
    return frozenset(site for site, weight in zip(sites, verdict.weights, strict=True) if weight)
