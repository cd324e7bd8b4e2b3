"""The selection that both ends of a sealed round call, and which contexts it can be repeated in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sealed_federation import context_for, names

from quorsum.errors import CoordinatorFault, RoundFailed
from quorsum.selection import select

SITES = names(7)


def gram(*signs: float) -> np.ndarray:
    """Updates of norm about 0.7 with a common direction, each times its sign."""
    rng = np.random.default_rng(3)
    rows = np.array(signs)[:, None] * (1.0 + 0.3 * rng.normal(size=(len(signs), 400)))
    rows *= 0.7 / np.sqrt(400)
    return np.asarray(rows @ rows.T)


def chosen(matrix: np.ndarray, sites: tuple[str, ...] = SITES, tolerate: int = 1, **changes: Any) -> set[str]:
    return set(select(context_for(7, 400, **changes), sites, matrix, tolerate))


def test_fltrust_keeps_who_points_with_the_reference_and_not_the_reference() -> None:
    kept = chosen(gram(1, 1, -1, 1, 1, -1, 1), rule="fltrust", reference="site-02")
    assert kept == set(SITES) - {"site-02", "site-03", "site-06"}


def test_the_reference_decides_alone() -> None:
    """Nobody outvotes it: with a flipped reference the two flipped updates are the trusted ones."""
    kept = chosen(gram(1, 1, -1, 1, 1, -1, -1), rule="fltrust", reference="site-03")
    assert kept == {"site-06", "site-07"}


def test_the_reference_is_found_among_the_rows_that_are_left() -> None:
    left = (SITES[0], *SITES[2:])
    kept = chosen(gram(1, 1, -1, 1, 1, 1), left, rule="fltrust", reference="site-03")
    assert kept == {"site-01", "site-05", "site-06", "site-07"}


def test_monna_keeps_the_nearest_and_its_reference_with_them() -> None:
    kept = chosen(gram(1, 1, -1, 1, 1, 1, 1), rule="monna", reference="site-02")
    assert kept == set(SITES) - {"site-03"}


def test_reference_without_a_row_ends_the_round_and_is_named() -> None:
    left = (SITES[0], *SITES[2:])
    with pytest.raises(RoundFailed, match="reference site 'site-02' has no usable update"):
        chosen(gram(1, 1, 1, 1, 1, 1), left, rule="fltrust", reference="site-02")


def test_reference_that_contradicts_the_others_ends_the_round() -> None:
    matrix = gram(1, 1, 1, 1, 1, 1, 1)
    matrix[1, 2:] = matrix[2:, 1] = 2.0
    assert chosen(matrix, rule="fltrust", reference="site-01") == set(SITES[2:])
    with pytest.raises(RoundFailed, match="trusted reference cannot be used"):
        chosen(matrix, rule="fltrust", reference="site-02")


@pytest.mark.parametrize(("rule", "says"), [("krumm", "unknown rule 'krumm'"), ("median", "needs every coordinate")])
def test_rule_that_cannot_select_ends_the_round(rule: str, says: str) -> None:
    with pytest.raises(RoundFailed, match=says):
        chosen(gram(1, 1, 1, 1, 1, 1, 1), rule=rule)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [("spectral", ""), ("nnm+multi-krum", ""), ("centred-clipping", ""), ("fltrust", "site-07"), ("monna", "site-01")],
)
def test_contexts_in_which_sites_can_repeat_the_selection(rule: str, reference: str) -> None:
    select.check(context_for(7, 400, rule=rule, reference=reference))


@pytest.mark.parametrize(
    ("rule", "reference", "code", "says"),
    [
        ("fltrust", "", "wrong-reference", "fltrust needs a reference, and the context names none"),
        ("nnm+monna", "", "wrong-reference", "monna needs a reference"),
        ("fltrust", "site-08", "wrong-reference", "'site-08' is not a site of the round"),
        ("spectral", "site-01", "wrong-reference", "spectral needs no reference, and the context names 'site-01'"),
        ("centred-clipping", "site-01", "wrong-reference", "centred-clipping needs no reference"),
        ("krumm", "", "wrong-rule", "unknown rule 'krumm'"),
        ("", "", "wrong-rule", "not the name of a rule"),
        ("median", "", "wrong-rule", "cannot repeat median"),
        ("bucketing(size=2)+mean", "", "wrong-rule", "draws at random"),
    ],
)
def test_contexts_in_which_they_cannot(rule: str, reference: str, code: str, says: str) -> None:
    with pytest.raises(CoordinatorFault, match=says) as caught:
        select.check(context_for(7, 400, rule=rule, reference=reference))
    assert caught.value.code == code
