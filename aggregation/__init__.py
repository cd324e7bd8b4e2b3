"""Robust aggregation rules as pure functions of a Gram matrix.

``parse_rule("nnm+multi-krum")`` gives a rule by name, ``check_gram`` names the rows to drop before one is applied.
The rules one by one, with equations and sources, are in :mod:`quorsum.aggregation.rules`,
:mod:`quorsum.aggregation.mixing` and :mod:`quorsum.aggregation.clear`.
"""

from __future__ import annotations

from quorsum.aggregation.checks import Code, Finding, GramReport, check_gram, copies
from quorsum.aggregation.clear import coordinate_median, trimmed_mean
from quorsum.aggregation.compose import CLEAR_SUITES, Outcome, Rule, known_rules, parse_rule, select
from quorsum.aggregation.crowd import crowd_clipping
from quorsum.aggregation.errors import (
    ClearSuiteError,
    NoConvergenceError,
    NonFiniteError,
    NonFiniteGramError,
    NonFiniteUpdateError,
    NoTrustError,
    UnknownRuleError,
)
from quorsum.aggregation.gram import gram_matrix, mix, squared_distances
from quorsum.aggregation.judge import Judgement, judge, norm_gate
from quorsum.aggregation.mixing import arc_matrix, bucketing_matrix, clip_matrix, nnm_matrix
from quorsum.aggregation.rules import (
    centred_clipping,
    fltrust,
    geometric_median,
    krum,
    krum_scores,
    mda,
    mean,
    monna,
    multi_krum,
    spectral,
    spectral_filter,
    spectral_scores,
)

__all__ = [
    "CLEAR_SUITES",
    "ClearSuiteError",
    "Code",
    "Finding",
    "GramReport",
    "Judgement",
    "NoConvergenceError",
    "NoTrustError",
    "NonFiniteError",
    "NonFiniteGramError",
    "NonFiniteUpdateError",
    "Outcome",
    "Rule",
    "UnknownRuleError",
    "arc_matrix",
    "bucketing_matrix",
    "centred_clipping",
    "check_gram",
    "clip_matrix",
    "coordinate_median",
    "copies",
    "crowd_clipping",
    "fltrust",
    "geometric_median",
    "gram_matrix",
    "judge",
    "known_rules",
    "krum",
    "krum_scores",
    "mda",
    "mean",
    "mix",
    "monna",
    "multi_krum",
    "nnm_matrix",
    "norm_gate",
    "parse_rule",
    "select",
    "spectral",
    "spectral_filter",
    "spectral_scores",
    "squared_distances",
    "trimmed_mean",
]
