import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.errors import UsageError
from quorsum.simulation.dataset import Dataset
from quorsum.simulation.partition import SPLITS, parse_split, partition


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


SPLIT_TEXTS = st.one_of(
    st.just("iid"),
    st.floats(0.001, 1e6).map(lambda a: f"dirichlet:{a}"),
    st.floats(0.0, 1.0).map(lambda g: f"similarity:{g}"),
    st.integers(1, 5).map(lambda k: f"label:{k}"),
    st.just("key"),
)


@settings(max_examples=300, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=6, max_size=200),
    sites=st.integers(1, 12),
    split=SPLIT_TEXTS,
    minimum=st.integers(1, 3),
    keys=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_every_split_deals_every_row_once_or_refuses(
    labels: list[int], sites: int, split: str, minimum: int, keys: int, seed: int
) -> None:
    y = np.array(labels)
    k = np.random.default_rng(seed).integers(0, keys, y.size)

    def dealt() -> list[np.ndarray]:
        return partition(y, sites, split=split, keys=k, rng=np.random.default_rng(seed), minimum=minimum)

    try:
        parts = dealt()
    except UsageError:
        way, classes = parse_split(split), len(np.unique(y))
        few_rows = sites * minimum > y.size
        few_classes = way.name == "label" and (way.value > classes or way.value * sites < classes)
        # Whole keys may leave a site short only where some other one holds more than its share.
        few_keys = way.name == "key" and (len(np.unique(k)) < sites or minimum > 1)
        assert few_rows or few_classes or few_keys
        return
    assert len(parts) == sites
    assert sorted(np.concatenate(parts)) == list(range(y.size))
    for part, same in zip(parts, dealt(), strict=True):
        assert part.size >= minimum
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert np.array_equal(part, same)
    if split == "key":
        assert sum(len(np.unique(k[part])) for part in parts) == len(np.unique(k))


def test_dirichlet_is_alpha() -> None:
    y = np.repeat(np.arange(5), 30)
    by_alpha = partition(y, 6, alpha=0.3, rng=np.random.default_rng(1))
    by_split = partition(y, 6, split="dirichlet:0.3", rng=np.random.default_rng(1))
    assert all(np.array_equal(a, b) for a, b in zip(by_alpha, by_split, strict=True))
    with pytest.raises(UsageError, match="leave alpha out"):
        partition(y, 6, alpha=0.3, split="iid", rng=np.random.default_rng(1))


def shuffled_classes(classes: int = 10, rows: int = 100) -> np.ndarray:
    return np.random.default_rng(3).permutation(np.repeat(np.arange(classes), rows))


def test_similarity_zero_sorts_by_class_and_one_is_even() -> None:
    y = shuffled_classes()
    extreme = partition(y, 10, split="similarity:0", rng=np.random.default_rng(0))
    assert sorted(set(y[part]).pop() for part in extreme) == list(range(10))
    assert all(len(set(y[part])) == 1 for part in extreme)
    even = partition(y, 10, split="similarity:1", rng=np.random.default_rng(0))
    assert all(len(set(y[part])) == 10 for part in even)


@pytest.mark.parametrize("share", [0.33, 0.66])
def test_similarity_is_the_share_that_is_dealt_evenly(share: float) -> None:
    y = shuffled_classes(rows=2000)
    parts = partition(y, 10, split=f"similarity:{share}", rng=np.random.default_rng(0))
    assert max(part.size for part in parts) - min(part.size for part in parts) <= 1
    own = np.mean([np.bincount(y[part]).max() / part.size for part in parts])
    # The rest is of one class or two; the even share holds a tenth of every class.
    assert own == pytest.approx((1 - share) + share / 10, abs=0.03)


@pytest.mark.parametrize(("each", "sites"), [(1, 10), (2, 10), (3, 7), (10, 4), (1, 23)])
def test_label_gives_every_site_so_many_classes(each: int, sites: int) -> None:
    y = shuffled_classes()
    parts = partition(y, sites, split=f"label:{each}", rng=np.random.default_rng(0))
    held = [set(y[part]) for part in parts]
    assert all(len(classes) == each for classes in held)
    holders = [sum(label in classes for classes in held) for label in range(10)]
    assert max(holders) - min(holders) <= 1


def test_keys_stay_whole_and_sites_are_about_equally_large() -> None:
    rng = np.random.default_rng(4)
    keys = rng.permutation(np.repeat(np.arange(60), rng.integers(1, 60, 60)))
    parts = partition(np.zeros(keys.size, np.int64), 8, split="key", keys=keys, rng=np.random.default_rng(0))
    sizes = [part.size for part in parts]
    assert max(sizes) - min(sizes) < 10
    assert sum(len(set(keys[part])) for part in parts) == 60


def dataset(*, text: bool, keys: list[int] | None = None) -> Dataset:
    x = np.arange(40, dtype=np.int64).reshape(20, 2)
    y = x if text else np.arange(20, dtype=np.int64) % 2
    return Dataset(
        name="set", train_x=x if text else x.astype(np.float32), train_y=y, test_x=x, test_y=y,
        class_names=("a", "b"), kind="text" if text else "classes",
        train_keys=None if keys is None else np.array(keys),
    )  # fmt: skip


def test_a_data_set_brings_its_classes_and_keys() -> None:
    rng = np.random.default_rng(0)
    parts = partition(dataset(text=False), 2, split="label:1", rng=rng)
    assert sorted(part.tolist() for part in parts) == [list(range(0, 20, 2)), list(range(1, 20, 2))]
    parts = partition(dataset(text=True, keys=[0, 1] * 10), 2, split="key", rng=rng)
    assert sorted(part.tolist() for part in parts) == [list(range(0, 20, 2)), list(range(1, 20, 2))]
    assert [part.size for part in partition(dataset(text=True), 4, rng=rng)] == [5] * 4


def test_a_text_without_speakers_is_cut_into_contiguous_parts() -> None:
    parts = partition(dataset(text=True), 4, split="key", rng=np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]


@pytest.mark.parametrize("split", ["dirichlet:1", "similarity:0", "label:1"])
def test_a_text_has_no_classes(split: str) -> None:
    with pytest.raises(UsageError, match="a text has no classes to deal by"):
        partition(dataset(text=True), 2, split=split, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("split", "sites", "keys", "says"),
    [
        ("key", 2, None, "name the key column"),
        ("key", 3, [0, 1] * 10, "at most 2 sites"),
        ("key", 2, [0] * 19 + [1], "has 1 rows but needs 2"),
        ("key", 2, [0, 1], r"shape \(20,\)"),
        ("label:3", 2, None, "more classes than there are, 2"),
        ("label:1", 1, None, "use label:2"),
    ],
)
def test_splits_that_cannot_be(split: str, sites: int, keys: list[int] | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        partition(
            np.arange(20) % 2,
            sites,
            split=split,
            keys=None if keys is None else np.array(keys),
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.3", "similarity:0", "similarity:0.33", "label:2", "key"])
def test_splits_are_written_as_they_are_read(text: str) -> None:
    assert str(parse_split(text)) == text
    assert parse_split(f" {text.replace(':', ' : ')} ") == parse_split(text)
    assert parse_split(text).name in SPLITS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "known: iid, dirichlet:A, similarity:G, label:K, key"),
        ("similar:0", "did you mean similarity"),
        ("iid:3", "takes no number"),
        ("key:speaker", "takes no number"),
        ("dirichlet", "needs a number from 0.001"),
        ("dirichlet:0", "for example, dirichlet:0.3"),
        ("dirichlet:nan", "needs a number"),
        ("similarity:1.5", r"from 0 \(extreme\) to 1"),
        ("similarity:-0.1", r"from 0 \(extreme\) to 1"),
        ("label:0", "whole number"),
        ("label:1.5", "whole number"),
        ("label:many", "whole number"),
        ("label:inf", "whole number"),
    ],
)
def test_splits_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_split(text)
