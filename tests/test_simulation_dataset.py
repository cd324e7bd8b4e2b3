import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.simulation.dataset import listed, scaled_images, stratified


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split_uses_every_row_once_and_leaves_every_class_on_both_sides(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, test = stratified(labels, np.random.default_rng(seed), fraction)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for side in (train, test):
        assert set(labels[side]) == set(range(len(counts)))


def test_grey_levels_become_minus_one_to_one() -> None:
    levels = np.array([[0, 51], [204, 255]], dtype=np.uint8)
    scaled = scaled_images(levels)
    assert scaled.dtype == np.float32
    assert np.allclose(scaled, [[-1.0, -0.6], [0.6, 1.0]], atol=1e-6)
    assert levels.tolist() == [[0, 51], [204, 255]]


def test_long_lists_of_names_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(50)]).endswith("39, ... (50 in all)")
