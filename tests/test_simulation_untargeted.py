from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from quorsum.aggregation import parse_rule
from quorsum.errors import UsageError
from quorsum.simulation.untargeted import (
    PERTURBATIONS,
    alie,
    alie_shift,
    alie_z_max,
    fang_krum,
    fang_trimmed_mean,
    free_rider,
    gaussian,
    ipm,
    mimic,
    mimicked,
    min_max,
    min_sum,
    one_nan,
    scaled,
    squared_distances,
)

OWN = np.array([3.0, -4.0, 0.0, 12.0])
HONEST = np.array([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 0.0, 8.0]])

ROWS = st.integers(1, 6).flatmap(
    lambda h: arrays(np.float64, (h, 5), elements=st.floats(-100.0, 100.0, allow_subnormal=False, width=32))
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cloud(h: int, d: int = 30, seed: int = 0, mean: float = 1.0) -> NDArray[np.float64]:
    return mean + rng(seed).normal(size=(h, d))


def test_simple_ones_by_hand() -> None:
    assert scaled(OWN, -8.0).tolist() == [-24.0, 32.0, 0.0, -96.0]
    assert ipm(HONEST, 0.5).tolist() == [-1.0, -1.0, 0.0, -3.0]
    assert alie(HONEST, 1.5).tolist() == [0.5, 2.0, 0.0, 3.0]


def test_gaussian_has_the_stated_norm_and_no_direction() -> None:
    own = rng(1).normal(size=20_000)
    sent = gaussian(own, 7.0, rng(5))
    assert np.linalg.norm(sent) == pytest.approx(7 * np.linalg.norm(own), rel=0.02)
    assert abs(float(sent @ own)) < 0.05 * np.linalg.norm(sent) * np.linalg.norm(own)


def test_empty_updates_are_no_special_case() -> None:
    empty = np.zeros(0)
    assert gaussian(empty, 2.0, rng()).shape == (0,)
    assert one_nan(empty, rng()).shape == (0,)


def test_nan_poisons_one_coordinate() -> None:
    sent = one_nan(OWN, rng())
    assert np.isnan(sent).sum() == 1
    assert not np.isnan(OWN).any()


def test_free_rider_sends_what_everybody_knows() -> None:
    last = np.array([1.0, 2.0, 2.0, 0.0])
    assert free_rider(OWN, last, noise=False, rng=rng()).tolist() == last.tolist()
    assert free_rider(OWN, None, noise=False, rng=rng()).tolist() == [0.0] * 4


@pytest.mark.parametrize("known", [True, False])
def test_free_riders_noise_is_as_long_as_an_update(known: bool) -> None:
    own, last = np.full(20_000, 2.0), np.full(20_000, 0.5)
    sent = free_rider(own, last if known else None, noise=True, rng=rng())
    assert np.linalg.norm(sent) == pytest.approx(np.linalg.norm(last if known else own), rel=0.02)


@pytest.mark.parametrize(
    ("sites", "malicious", "probability"),
    # n = 50, m = 24 is the setting of the paper: s = 26 - 24 = 2 supporters among 26 honest sites.
    [(50, 24, 24 / 26), (50, 12, 24 / 38), (10, 3, 4 / 7), (11, 5, 5 / 6)],
)
def test_alie_shift_is_that_of_the_paper(sites: int, malicious: int, probability: float) -> None:
    assert alie_z_max(sites, malicious) == pytest.approx(NormalDist().inv_cdf(probability))


def test_alie_shifts_all_the_same_where_the_paper_has_no_shift_for_few_attackers() -> None:
    assert alie_z_max(10, 2) == alie_z_max(10, 1) == alie_z_max(2, 1) == 0.0
    assert alie_shift(10, 2) == 1.5
    assert alie_shift(50, 24) == alie_z_max(50, 24) or alie_shift(50, 24) == 1.5


@pytest.mark.parametrize(("sites", "malicious"), [(10, 6), (10, 0), (1, 1)])
def test_alie_refuses_a_dishonest_majority(sites: int, malicious: int) -> None:
    with pytest.raises(UsageError, match="alie needs"):
        alie_z_max(sites, malicious)


# --- Min-Max and Min-Sum ---------------------------------------------------------------------------------------------


def test_min_max_by_hand() -> None:
    # Two honest updates 2 apart, mean (1, 0), p = -mu / |mu| = (-1, 0): (1 - gamma, 0) may be 2 away from either.
    sent = min_max(np.array([[1.0, 1.0], [1.0, -1.0]]), "unit")
    assert sent == pytest.approx([1.0 - math.sqrt(3.0), 0.0])


def test_min_sum_by_hand() -> None:
    # Squared distances of an honest one add up to 4; those of (1 - gamma, 0) to 2 (gamma^2 + 1).
    sent = min_sum(np.array([[1.0, 1.0], [1.0, -1.0]]), "unit")
    assert sent == pytest.approx([0.0, 0.0])


@given(rows=ROWS, perturbation=st.sampled_from(list(PERTURBATIONS)))
def test_min_max_stays_within_the_largest_honest_distance(rows: NDArray[np.float64], perturbation: str) -> None:
    sent = min_max(rows, perturbation)
    allowed = squared_distances(rows).max()
    assert np.sum((rows - sent) ** 2, axis=1).max() <= allowed * (1 + 1e-6) + 1e-6


@given(rows=ROWS, perturbation=st.sampled_from(list(PERTURBATIONS)))
def test_min_sum_stays_within_the_largest_honest_sum(rows: NDArray[np.float64], perturbation: str) -> None:
    sent = min_sum(rows, perturbation)
    allowed = squared_distances(rows).sum(axis=1).max()
    assert np.sum((rows - sent) ** 2) <= allowed * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("perturbation", list(PERTURBATIONS))
def test_they_go_as_far_as_they_may(perturbation: str) -> None:
    rows = cloud(8)
    mean = rows.mean(axis=0)
    for attack, measured in (
        (min_max, lambda sent: np.sum((rows - sent) ** 2, axis=1).max() - squared_distances(rows).max()),
        (min_sum, lambda sent: np.sum((rows - sent) ** 2) - squared_distances(rows).sum(axis=1).max()),
    ):
        sent = attack(rows, perturbation)
        assert measured(sent) == pytest.approx(0.0, abs=1e-8)
        assert measured(mean + 1.01 * (sent - mean)) > 0.0
        assert float((sent - mean) @ mean) < 0.0


@pytest.mark.parametrize("attack", [min_max, min_sum])
def test_where_all_honest_agree_there_is_nowhere_to_hide(attack: object) -> None:
    rows = np.tile(OWN, (4, 1))
    for perturbation in PERTURBATIONS:
        assert attack(rows, perturbation) == pytest.approx(OWN)  # type: ignore[operator]


# --- Fang ------------------------------------------------------------------------------------------------------------


def test_fang_against_trimmed_mean_by_hand() -> None:
    #                   mean 2, least 1 | mean -2, largest -1 | mean 1, least -1 | mean -1, largest 1
    rows = np.array([[1.0, -1.0, 3.0, -3.0], [3.0, -3.0, -1.0, 1.0]])
    for seed in range(20):
        sent = fang_trimmed_mean(rows, rng(seed))
        for value, (low, high) in zip(sent, [(0.5, 1.0), (-1.0, -0.5), (-2.0, -1.0), (1.0, 2.0)], strict=True):
            assert low <= value <= high


@given(rows=ROWS, seed=st.integers(0, 9))
def test_fang_is_never_inside_the_honest_values_and_always_against_the_mean(
    rows: NDArray[np.float64], seed: int
) -> None:
    sent, falling = fang_trimmed_mean(rows, rng(seed)), rows.mean(axis=0) < 0
    assert (sent >= rows.max(axis=0))[falling].all()
    assert (sent <= rows.min(axis=0))[~falling].all()


@pytest.mark.parametrize("malicious", [1, 2, 3])
def test_fang_against_krum_is_what_krum_selects(malicious: int) -> None:
    rows = cloud(10, seed=malicious, mean=0.3)
    sent = fang_krum(rows, malicious)
    assert np.unique(np.abs(sent)).size == 1
    assert np.array_equal(np.sign(sent), -np.sign(rows.mean(axis=0)))
    if malicious > 1:
        every = np.vstack([rows, np.tile(sent, (malicious, 1))])
        outcome = parse_rule("krum").apply(every @ every.T, malicious)
        assert outcome.weights[10:].sum() == 1.0


def test_fang_against_krum_gives_up_where_nothing_is_selected() -> None:
    rows = np.tile(OWN, (8, 1))  # honest updates that agree: a single attacker never wins
    assert np.abs(fang_krum(rows, 1)).max() < 1e-5


# --- mimic -----------------------------------------------------------------------------------------------------------


def test_mimic_copies_the_site_that_differs_most() -> None:
    rows = np.array([[1.0, 0.1], [1.1, 0.0], [0.9, -0.1], [1.0, 5.0]])
    assert mimicked(rows) == 3
    assert np.array_equal(mimic(rows), rows[3])


def test_mimic_remembers_earlier_rounds() -> None:
    past = np.array([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [1.1, 0.0], [1.0, 0.0]])
    assert mimicked(rows) == 0
    assert mimicked(rows, [past @ past.T] * 3) == 2


def test_mimic_leaves_out_what_was_not_opened() -> None:
    rows = np.array([[1.0, 0.1], [1.1, 0.0], [1.0, 5.0]])
    assert mimicked(rows, [np.full((4, 4), np.nan), np.zeros((2, 2))]) == 2
    assert mimicked(np.full((3, 2), np.nan)) == 0


@given(rows=ROWS)
def test_mimic_always_sends_an_honest_update(rows: NDArray[np.float64]) -> None:
    assert mimic(rows).tolist() in rows.tolist()
