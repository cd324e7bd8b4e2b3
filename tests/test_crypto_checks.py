from __future__ import annotations

import math

import numpy as np
import pytest

from quorsum.crypto import RATIO_TOLERANCE, check_opened
from quorsum.errors import RoundFailed, UsageError

GRAM = np.array([[4.0, 1.0], [1.0, 9.0]])
WEIGHTS = np.array([0.5, 0.5])
PROMISED = float(WEIGHTS @ GRAM @ WEIGHTS)


def total_of(squared: float) -> np.ndarray:
    return np.array([math.sqrt(squared / 2), math.sqrt(squared / 2)])


def test_what_was_promised_passes():
    assert check_opened(total_of(PROMISED), WEIGHTS, GRAM) == pytest.approx(1.0)
    assert check_opened(total_of(PROMISED * 1.07), WEIGHTS, GRAM) == pytest.approx(1.07)
    assert check_opened(total_of(PROMISED * 0.5), WEIGHTS, GRAM) == pytest.approx(0.5)


def test_a_longer_sum_is_refused():
    with pytest.raises(RoundFailed, match=r"1\.1 times as long"):
        check_opened(total_of(PROMISED * 1.1), WEIGHTS, GRAM)
    assert RATIO_TOLERANCE < 1.1


def test_a_sum_that_is_not_a_number_is_refused():
    with pytest.raises(RoundFailed):
        check_opened(np.array([np.nan, 1.0]), WEIGHTS, GRAM)


def test_nothing_promised():
    empty = np.zeros((2, 2))
    assert check_opened(np.zeros(2), WEIGHTS, empty) == 1.0
    with pytest.raises(RoundFailed, match="inf"):
        check_opened(np.array([1e-9, 0.0]), WEIGHTS, empty)
    assert check_opened(np.array([1e-9, 0.0]), WEIGHTS, empty, floor=1e-17) == pytest.approx(0.1)


def test_a_negative_promise_counts_as_nothing():
    assert check_opened(np.array([1.0, 0.0]), WEIGHTS, -GRAM, floor=1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("tolerance", [1.0, 0.0, float("nan")])
def test_tolerances_that_make_no_sense(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        check_opened(total_of(1.0), WEIGHTS, GRAM, tolerance)


def test_shapes_that_do_not_fit():
    with pytest.raises(UsageError, match="do not fit"):
        check_opened(total_of(1.0), np.ones(3), GRAM)
