"""What attackers that know the rule try their updates out on."""

from __future__ import annotations

import numpy as np
import pytest

from quorsum.aggregation import parse_rule
from quorsum.simulation.adaptive import damage, opt_alie, opt_ipm, opt_spread
from quorsum.simulation.defence import Defence, clipped


def honest(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, 200)) + 0.5


@pytest.mark.parametrize("rule", ["spectral", "crowd-clipping", "nnm+geometric-median"])
def test_a_search_among_coordinates_finds_what_a_search_among_updates_finds(rule: str) -> None:
    defence = Defence(parse_rule(rule), 2, clip=True, equal=False, unit=15.0)
    assert defence.isometric
    rows = honest()
    for attack in (opt_ipm, opt_alie):
        fast, slow = attack(rows, 2, defence), attack(rows, 2, lambda x: defence(x))
        # Beyond the norm that all are clipped to, longer updates are the same.
        assert damage(rows, fast, 2, defence) == pytest.approx(damage(rows, slow, 2, defence), rel=1e-6)
    fast = opt_spread(rows, 2, defence, np.random.default_rng(1))
    slow = opt_spread(rows, 2, lambda x: defence(x), np.random.default_rng(1))
    both = [np.vstack([rows, sent]) for sent in (fast, slow)]
    moved = [np.linalg.norm(defence(x) - rows.mean(axis=0)) for x in both]
    assert moved[0] == pytest.approx(moved[1], rel=1e-6)


def test_spread_attackers_are_no_copies_where_copies_are_found_out() -> None:
    rows = np.random.default_rng(3).standard_normal((10, 300)) + 0.02
    defence = Defence(parse_rule("crowd-clipping"), 3, clip=True, equal=False, unit=18.0)
    sent = opt_spread(rows, 3, defence, np.random.default_rng(0))
    assert sent.shape == (3, 300)
    cosines = sent @ sent.T / np.linalg.norm(sent, axis=1)[:, None] / np.linalg.norm(sent, axis=1)
    assert cosines[np.triu_indices(3, 1)].max() < 0.95
    mean = rows.mean(axis=0)
    assert (sent @ mean < 0).all()


def test_rules_of_coordinates_are_not_isometric_and_get_whole_updates() -> None:
    defence = Defence(parse_rule("trimmed-mean"), 2, clip=False, equal=False)
    assert not defence.isometric
    rows = np.vstack([honest(), np.full((2, 200), 1e6)])
    np.testing.assert_allclose(defence(rows), np.sort(rows, axis=0)[2:-2].mean(axis=0))


def test_a_round_that_would_fail_moves_nothing() -> None:
    rows = np.ones((3, 5))
    assert not Defence(parse_rule("multi-krum"), 1, clip=False, equal=False)(rows).any()
    assert not Defence(parse_rule("fltrust"), 1, clip=False, equal=True, reference=0)(-np.eye(3, 5)).any()


def test_clipping_shortens_and_leaves_zeros() -> None:
    x = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(clipped(x, 1.0), [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
