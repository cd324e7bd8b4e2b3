from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quorsum.aggregation import Rule, parse_rule
from quorsum.simulation.adaptive import (
    NOISE,
    STRENGTHS,
    Defence,
    as_sketched,
    damage,
    gram_aware,
    opt_alie,
    opt_ipm,
    row_weights,
    strongest,
)
from quorsum.simulation.untargeted import alie, alie_shift, fang_trimmed_mean, ipm, mimic, min_max, min_sum

RULES = ("nnm+geometric-median", "spectral", "trimmed-mean", "nnm+multi-krum", "mean")
Floats = NDArray[np.float64]


def defence(name: str, f: int) -> Defence:
    rule = parse_rule(name)
    return lambda rows: rule.aggregate(rows, f)


def honest(seed: int, h: int = 8, d: int = 40, spread: float = 1.0) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 0.3, d) + spread * rng.normal(size=(h, d)) * rng.exponential(size=d)


# --- the line search -------------------------------------------------------------------------------------------------


@given(edge=st.floats(-60.0, 60.0), rising=st.booleans())
def test_the_search_closes_in_on_a_jump(edge: float, rising: bool) -> None:
    def measure(sent: Floats) -> float:
        x = float(sent[0]) if rising else -float(sent[0])
        return 100.0 + x if x <= (edge if rising else -edge) else 0.0

    _, value = strongest(lambda t: np.array([t]), measure)
    ideal = 100.0 + (edge if rising else -edge)
    assert ideal - value <= max(0.1, 0.1 * abs(edge))


def test_the_search_is_bounded_and_never_worse_than_its_grid() -> None:
    seen: list[float] = []

    def measure(sent: Floats) -> float:
        seen.append(float(sent[0]))
        return math.sin(5 * seen[-1])

    _, value = strongest(lambda t: np.array([t]), measure)
    assert len(seen) == len(STRENGTHS) + 14
    assert value == max(math.sin(5 * x) for x in seen)
    assert max(map(abs, seen)) <= max(STRENGTHS)


def test_damage_by_hand_and_of_a_round_that_comes_to_nothing() -> None:
    rows = np.array([[1.0, 0.0], [3.0, 0.0]])
    assert damage(rows, np.array([-1.0, 0.0]), 2, lambda every: every.mean(axis=0)) == pytest.approx(1.5)
    assert damage(rows, np.array([-1.0, 0.0]), 2, lambda every: np.zeros(2)) == pytest.approx(2.0)
    assert damage(rows, np.array([-1.0, 0.0]), 2, lambda every: np.full(2, np.nan)) == 0.0


# --- optimal IPM and ALIE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("malicious", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_optimal_strength_does_no_less_damage_than_the_plain_one(rule: str, malicious: int, seed: int) -> None:
    rows, aggregate = honest(seed), defence(rule, malicious)

    def hurts(sent: Floats) -> float:
        return damage(rows, sent, malicious, aggregate)

    plain = alie(rows, alie_shift(8 + malicious, malicious))
    assert hurts(opt_ipm(rows, malicious, aggregate)) >= hurts(ipm(rows, 0.5)) * (1 - 1e-9)
    assert hurts(opt_alie(rows, malicious, aggregate)) >= hurts(plain) * (1 - 1e-9)


def test_the_mean_is_hurt_as_far_as_the_search_goes() -> None:
    rows = np.tile([1.0, 0.0], (8, 1))
    sent = opt_ipm(rows, 2, defence("mean", 0))
    assert np.linalg.norm(sent) == pytest.approx(64.0)


def test_a_dishonest_majority_needs_no_hiding() -> None:
    rows = honest(1, h=3)
    sent = opt_alie(rows, 5, lambda every: every.mean(axis=0))
    assert np.linalg.norm(sent - rows.mean(axis=0)) == pytest.approx(64 * np.linalg.norm(rows.std(axis=0)))


# --- Gram-aware ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nnm+geometric-median", "spectral", "nnm+multi-krum"])
@pytest.mark.parametrize("malicious", [2, 3])
def test_without_noise_it_is_at_least_as_strong_as_every_fixed_attack(rule: str, malicious: int) -> None:
    rows, aggregate = honest(malicious), defence(rule, malicious)

    def hurts(sent: Floats) -> float:
        return damage(rows, sent, malicious, aggregate)

    found = hurts(gram_aware(rows, malicious, aggregate, noise=0.0))
    fixed = [
        opt_ipm(rows, malicious, aggregate), opt_alie(rows, malicious, aggregate), mimic(rows), min_max(rows),
        min_sum(rows), ipm(rows, 0.5), alie(rows, alie_shift(8 + malicious, malicious)),
    ]  # fmt: skip
    assert found >= max(map(hurts, fixed)) * (1 - 1e-9)
    assert found >= hurts(fang_trimmed_mean(rows, np.random.default_rng(0)))


@cache
def sketch(seed: int, d: int = 40, k: int = 16384) -> Floats:
    """S S^T of an actual sketch S of k numbers."""
    drawn = np.random.default_rng(seed).normal(size=(d, k)) / math.sqrt(k)
    return np.asarray(drawn @ drawn.T)


def noisy_gram(every: Floats, seed: int) -> Floats:
    """Inner products of sketched rows."""
    return every @ sketch(seed) @ every.T


def expected(rows: Floats, sent: Floats, rule: Rule) -> float:
    """Mean damage in 60 sketched rounds with two attackers."""
    every = np.vstack([rows, sent, sent])
    moved = [rule.apply(noisy_gram(every, seed), 2).weights @ every - rows.mean(axis=0) for seed in range(60)]
    return float(np.mean(np.linalg.norm(moved, axis=1)))


@pytest.mark.parametrize("rule", ["spectral", "nnm+multi-krum"])
@pytest.mark.parametrize("seed", [3, 7])
def test_in_sketched_rounds_knowing_the_noise_hurts_no_less(rule: str, seed: int) -> None:
    rows, aggregate, named = honest(seed), defence(rule, 2), parse_rule(rule)
    aware = expected(rows, gram_aware(rows, 2, aggregate), named)
    assert aware >= 0.95 * expected(rows, gram_aware(rows, 2, aggregate, noise=0.0), named)
    assert aware >= 0.95 * expected(rows, opt_ipm(rows, 2, aggregate), named)
    assert aware > expected(rows, rows.mean(axis=0), named)


def test_noise_of_a_sketch_has_the_stated_size() -> None:
    rows = honest(2, h=4)
    rng, squares = np.random.default_rng(0), np.einsum("ij,ij->i", rows, rows)
    seen = []
    for _ in range(3000):
        drawn = rng.normal(0.0, NOISE / 2, (4, 4))
        measured = as_sketched(rows, (drawn + drawn.T) / 2)
        seen.append(np.einsum("ij,ij->i", measured, measured) / squares)
    assert np.std(seen, axis=0) == pytest.approx(np.full(4, NOISE), rel=0.05)
    sketched = [np.diag(noisy_gram(rows, s)) / squares for s in range(60)]
    assert np.std(sketched, axis=0) == pytest.approx(np.full(4, NOISE), rel=0.3)


def test_sketches_of_equal_rows_are_equal_and_of_nothing_nothing() -> None:
    error = np.full((4, 4), 0.01)
    seen = as_sketched(np.vstack([honest(1, h=2), honest(1, h=2)]), error)
    assert seen[:2] == pytest.approx(seen[2:])
    assert not as_sketched(np.zeros((4, 7)), error).any()
    assert as_sketched(honest(1, h=4), 0 * error) == pytest.approx(honest(1, h=4))


def test_last_movement_and_past_rounds_are_used_and_may_be_missing() -> None:
    rows, aggregate = honest(5), defence("spectral", 2)
    every = np.vstack([rows, rows[:2]])
    past = (every @ every.T, np.full((10, 10), np.nan))
    for last, known in ((None, past), (np.zeros(40), ()), (rows.mean(axis=0) + 1.0, past)):
        sent = gram_aware(rows, 2, aggregate, last=last, past=known)
        assert sent.shape == (40,)
        assert damage(rows, sent, 2, aggregate) > 0.0
    assert np.array_equal(sent, gram_aware(rows, 2, aggregate, last=last, past=known))


def test_one_honest_site_and_a_rule_that_refuses_everything() -> None:
    sent = gram_aware(np.ones((1, 4)), 1, lambda every: np.zeros(4))
    assert np.isfinite(sent).all()


# --- which rows count ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "spectral", "nnm+multi-krum", "geometric-median"])
def test_row_weights_are_those_of_the_rule(rule: str) -> None:
    rows = honest(9, h=10)
    f = 0 if rule == "mean" else 2
    found = row_weights([rows @ rows.T], defence(rule, f), 40)
    assert found == pytest.approx(parse_rule(rule).apply(rows @ rows.T, f).weights, abs=1e-6)


def test_row_weights_average_over_rounds_and_leave_out_what_was_not_opened() -> None:
    first, second = honest(1, h=6), honest(2, h=6)
    rule = defence("spectral", 1)
    both = row_weights([first @ first.T, np.full((6, 6), np.nan), second @ second.T], rule, 40)
    alone = [row_weights([rows @ rows.T], rule, 40) for rows in (first, second)]
    assert both == pytest.approx((alone[0] + alone[1]) / 2)  # type: ignore[operator]


def test_row_weights_need_room_and_a_matrix() -> None:
    assert row_weights([], defence("mean", 0), 40) is None
    assert row_weights([np.eye(5)], defence("mean", 0), 4) is None
    assert row_weights([np.full((3, 3), np.nan)], defence("mean", 0), 4) is None
    broken = row_weights([np.eye(3)], lambda rows: np.full(4, np.nan), 4)
    assert broken == pytest.approx([0.0, 0.0, 0.0])
