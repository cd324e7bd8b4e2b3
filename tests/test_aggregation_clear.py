"""Rules of the clear suite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.aggregation import NonFiniteUpdateError, coordinate_median, trimmed_mean
from quorsum.errors import BoundError, UsageError


@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean])
@settings(deadline=None)
@given(f=st.integers(1, 4), more=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_stays_among_the_honest(rule: object, f: int, more: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(2 * f + more, 5))
    updates[:f] = rng.choice([-1e9, 1e9], size=(f, 5))
    result = rule(updates, f)  # type: ignore[operator]
    assert (result >= updates[f:].min(axis=0)).all()
    assert (result <= updates[f:].max(axis=0)).all()


def test_small_answers() -> None:
    updates = [[1, 10], [2, 40], [4, 20], [9, 30]]
    assert coordinate_median(updates, 1).tolist() == [3.0, 25.0]
    assert trimmed_mean(updates, 1).tolist() == [3.0, 25.0]
    assert trimmed_mean(updates, 0).tolist() == [4.0, 25.0]


@pytest.mark.parametrize(("rule", "name"), [(coordinate_median, "median"), (trimmed_mean, "trimmed-mean")])
def test_refusals(rule: object, name: str) -> None:
    with pytest.raises(BoundError, match=f"{name} needs n >= 2f .*n = 3 sites, got n = 2"):
        rule(np.zeros((2, 3)), 1)  # type: ignore[operator]
    with pytest.raises(NonFiniteUpdateError) as caught:
        rule([[1.0], [np.inf], [2.0]], 1)  # type: ignore[operator]
    assert caught.value.rows == (1,)
    with pytest.raises(UsageError, match="must be a matrix"):
        rule([1.0, 2.0], 0)  # type: ignore[operator]
    with pytest.raises(UsageError, match="f must be a whole number"):
        rule(np.zeros((2, 3)), 0.5)  # type: ignore[operator]


@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean])
def test_input_is_left_alone(rule: object) -> None:
    updates = np.array([[3.0], [1.0], [2.0]])
    rule(updates, 1)  # type: ignore[operator]
    assert updates.tolist() == [[3.0], [1.0], [2.0]]
