import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.errors import UsageError
from quorsum.simulation.partition import partition


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=6, max_size=200),
    sites=st.integers(1, 12),
    alpha=st.none() | st.floats(0.001, 1e6),
    minimum=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_every_row_is_dealt_once_and_nobody_gets_too_few(
    labels: list[int], sites: int, alpha: float | None, minimum: int, seed: int
) -> None:
    y = np.array(labels)
    if sites * minimum > y.size:
        with pytest.raises(UsageError, match="too few"):
            partition(y, sites, alpha=alpha, rng=np.random.default_rng(seed), minimum=minimum)
        return
    parts = partition(y, sites, alpha=alpha, rng=np.random.default_rng(seed), minimum=minimum)
    again = partition(y, sites, alpha=alpha, rng=np.random.default_rng(seed), minimum=minimum)
    assert len(parts) == sites
    assert sorted(np.concatenate(parts)) == list(range(y.size))
    for part, same in zip(parts, again, strict=True):
        assert part.size >= minimum
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert np.array_equal(part, same)


def test_even_split_differs_by_one_row_at_most() -> None:
    sizes = [part.size for part in partition(np.zeros(103, np.int64), 10, alpha=None, rng=np.random.default_rng(0))]
    assert sorted(set(sizes)) == [10, 11]


def test_small_alpha_concentrates_classes_and_large_alpha_spreads_them() -> None:
    y = np.repeat(np.arange(10), 200)

    def largest_class_share(alpha: float) -> float:
        parts = partition(y, 10, alpha=alpha, rng=np.random.default_rng(5))
        return float(np.mean([np.bincount(y[part]).max() / part.size for part in parts]))

    assert largest_class_share(0.05) > 0.5
    assert largest_class_share(1.0) > largest_class_share(1e5)
    assert largest_class_share(1e5) == pytest.approx(0.1, abs=0.01)


def test_mean_share_of_a_site_is_that_of_the_dirichlet_distribution() -> None:
    # The share of one of 4 sites is Beta(alpha, 3 alpha): mean 1/4, variance (3/16) / (4 alpha + 1).
    y = np.repeat(np.arange(4000), 100)
    parts = partition(y, 4, alpha=0.5, rng=np.random.default_rng(1))
    shares = np.bincount(y[parts[0]], minlength=4000) / 100
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)
    assert np.var(shares) == pytest.approx(3 / 16 / 3, rel=0.05)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e-9, float("inf"), float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha must lie in"):
        partition(np.zeros(10, np.int64), 2, alpha=alpha, rng=np.random.default_rng(0))


def test_other_refusals() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match=r"at most 2 sites"):
        partition(np.zeros(5, np.int64), 3, alpha=None, rng=rng)
    with pytest.raises(UsageError, match="1 or more"):
        partition(np.zeros(5, np.int64), 0, alpha=None, rng=rng)
    with pytest.raises(UsageError, match=r"shape \(n,\)"):
        partition(np.zeros((5, 1), np.int64), 1, alpha=None, rng=rng)
