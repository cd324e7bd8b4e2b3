from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorsum.errors import UsageError
from quorsum.simulation.backdoors import (
    IGNORED,
    constrained_and_scaled,
    edge_cases,
    edge_rows,
    flip_labels,
    make_text_trigger,
    make_trigger,
    masked,
    piece_of,
    poison_edge_cases,
    poison_rows,
    poison_text,
    stamp,
    triggered_rows,
    triggered_text,
)
from quorsum.simulation.data import Dataset, load_dataset


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(channels: int = 1, height: int = 16, width: int = 24, background: float = -1.0) -> Dataset:
    x = np.full((30, channels, height, width), background, dtype=np.float32)
    x[:, :, 2:6, 2:6] = -background
    y = np.arange(30) % 3
    return Dataset("pictures", x, y, x[:9], y[:9], ("a", "b", "c"))


def table(rows: int = 300) -> Dataset:
    x = rng(3).normal(size=(rows, 6)).astype(np.float32)
    y = (x[:, 0] + 0.1 * x[:, 1] > 0).astype(np.int64)
    x[:, 5] = 0.0  # constant
    x[:, 4] = rng(4).random(rows) < 0.02  # rare and unlike any label
    names = tuple(f"column {i}" for i in range(6))
    return Dataset("table", x, y, x[:50], y[:50], ("no", "yes"), feature_names=names)


def text(windows: int = 20, length: int = 12) -> Dataset:
    # Characters 0 .. 5 are common, 6 and 7 rare, 8 is never there and 9 stands for unknown ones.
    x = rng(5).integers(0, 6, (windows, length + 1))
    x[0, 1], x[1, 1:3] = 6, 7
    names = tuple("abcdefgh?*")
    return Dataset("play", x[:, :-1].copy(), x[:, 1:].copy(), x[:5, :-1].copy(), x[:5, 1:].copy(), names, kind="text")


# --- triggers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_trigger_of_images_is_a_bright_corner(channels: int) -> None:
    data = images(channels)
    stamped = stamp(data.test_x, make_trigger(data, 0))
    assert (stamped[:, :, -2:, -2:] == 1.0).all()
    stamped[:, :, -2:, -2:] = data.test_x[:, :, -2:, -2:]
    assert np.array_equal(stamped, data.test_x)


def test_trigger_is_dark_where_the_corner_is_bright() -> None:
    data = images(background=1.0)
    assert (stamp(data.test_x, make_trigger(data, 0, 3))[:, :, -3:, -3:] == -1.0).all()


def test_flat_digits_are_images() -> None:
    data = load_dataset("digits")
    assert make_trigger(data, 0).cells.tolist() == [[54], [55], [62], [63]]
    assert make_trigger(data, 0).values.tolist() == [[1.0]] * 4


def test_trigger_of_tables_says_little_about_the_class_and_is_rare() -> None:
    data = table()
    trigger = make_trigger(data, 1)
    assert 0 not in trigger.cells  # the column that decides
    assert 5 not in trigger.cells  # constant
    for (column,), (value,) in zip(trigger.cells, trigger.values, strict=True):
        values = data.train_x[:, column]
        assert value in values
        assert abs(value - values.mean()) >= 2.0 * values.std()
        assert np.mean(np.abs(values - values.mean()) >= abs(value - values.mean())) < 0.05
    assert dict(zip(trigger.cells.ravel().tolist(), trigger.values.ravel().tolist(), strict=True))[4] == 1.0


@given(pieces=st.integers(1, 12), size=st.integers(1, 4))
def test_pieces_together_are_the_trigger(pieces: int, size: int) -> None:
    trigger = make_trigger(images(3), 0, size)
    parts = [piece_of(trigger, position, pieces) for position in range(pieces)]
    assert all(len(part.cells) for part in parts)
    covered = sorted(tuple(cell) for part in parts for cell in part.cells.tolist())
    assert sorted(set(covered)) == sorted(map(tuple, trigger.cells.tolist()))
    if pieces <= len(trigger.cells):
        assert len(covered) == len(trigger.cells)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_trigger(images(), 3), r"target must be a class of pictures, 0 \.\. 2, got 3"),
        (lambda: make_trigger(images(), -1), "target must be"),
        (lambda: make_trigger(images(), 0, 17), "size must be at most 16"),
        (lambda: make_trigger(table(), 0, 6), r"size must lie in 1 \.\. 5"),
        (lambda: make_trigger(text(), 0), "use the attack text-trigger"),
        (lambda: edge_cases(text(), 0, tail=0.1), "use the attack text-trigger"),
        (lambda: edge_cases(images(), 5, tail=0.1), "target must be"),
        (lambda: edge_cases(images(), 0, tail=0.1, source=0), "other than the target 0, got 0"),
        (lambda: edge_cases(images(), 0, tail=0.1, source=3), "source must be a class"),
        (lambda: make_text_trigger(images(), 0), "needs a text, and pictures is none"),
        (lambda: make_text_trigger(text(), 10), r"0 \.\. 9, got 10"),
        (lambda: make_text_trigger(text(), 0, size=12), r"size must lie in 1 \.\. 11"),
        (lambda: triggered_rows(np.zeros((2, 1)), np.array([1, 1]), make_trigger(table(), 1), 1), "choose another"),
    ],
)
def test_what_cannot_be(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_a_class_without_rows_has_no_tail() -> None:
    data = images()
    nobody = Dataset("pictures", data.train_x, data.train_y % 2, data.test_x, data.test_y % 2, ("a", "b", "c"))
    with pytest.raises(UsageError, match="class 2 of pictures has no training rows"):
        edge_cases(nobody, 1, tail=0.1)
    with pytest.raises(UsageError, match="no test row is of class 1"):
        edge_rows(data.test_x, np.zeros(9, dtype=np.int64), edge_cases(data, 0, tail=0.1), 0)


def test_a_text_of_one_character_has_no_trigger() -> None:
    zeros = np.zeros((3, 5), dtype=np.int64)
    data = Dataset("aaa", zeros, zeros, zeros, zeros, ("a", "?"), kind="text")
    with pytest.raises(UsageError, match="no character but the target"):
        make_text_trigger(data, 0)
    trigger = make_text_trigger(data, 1)
    assert trigger.trigger.tolist() == [0, 0, 0, 0]
    wanted = make_text_trigger(Dataset("aab", zeros, zeros + 1, zeros, zeros, ("a", "b", "?"), kind="text"), 1)
    with pytest.raises(UsageError, match="every window goes on with the target"):
        triggered_text(zeros, zeros + 1, wanted)


# --- rows ------------------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(0, 6), max_size=30))
def test_flipping_labels_twice_gives_them_back(labels: list[int]) -> None:
    y = np.array(labels, dtype=np.int64)
    assert flip_labels(y, 7).tolist() == [6 - label for label in labels]
    assert np.array_equal(flip_labels(flip_labels(y, 7), 7), y)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label: int) -> None:
    with pytest.raises(UsageError, match=r"0 \.\. 2"):
        flip_labels(np.array([0, label]), 3)


@given(share=st.floats(0.01, 1.0), n=st.integers(1, 30), target=st.integers(0, 2), seed=st.integers(0, 9))
def test_the_stated_share_is_poisoned_and_the_rest_stays(share: float, n: int, target: int, seed: int) -> None:
    data = images()
    x, y, trigger = data.train_x[:n], data.train_y[:n], make_trigger(data, target)
    new_x, new_y = poison_rows(x, y, trigger, target, share, rng(seed))
    touched = (new_x != x).any(axis=(1, 2, 3))
    others = np.count_nonzero(y != target) or n
    assert touched.sum() == min(max(1, round(share * n)), others)
    assert (new_y[touched] == target).all()
    assert np.array_equal(new_y[~touched], y[~touched])
    assert np.array_equal(new_x[touched], stamp(x, trigger)[touched])
    assert np.array_equal(x, images().train_x[:n])


def test_a_site_without_rows_has_nothing_to_poison() -> None:
    data = images()
    x, y = data.train_x[:0], data.train_y[:0]
    assert len(poison_rows(x, y, make_trigger(data, 0), 0, 0.5, rng())[0]) == 0
    assert len(poison_edge_cases(x, y, data, edge_cases(data, 0, tail=0.1), 0, 0.5, rng())[0]) == 0


def test_success_is_measured_on_other_classes_with_the_whole_trigger() -> None:
    data = images()
    trigger = make_trigger(data, 1)
    x, y = triggered_rows(data.test_x, data.test_y, trigger, 1)
    assert np.array_equal(x, stamp(data.test_x[data.test_y != 1], trigger))
    assert y.tolist() == [1] * 6


# --- edge cases ------------------------------------------------------------------------------------------------------


def test_edge_cases_are_the_farthest_rows_of_the_class() -> None:
    x = np.concatenate([np.arange(20), [100.0, 101.0]]).astype(np.float32)[:, None]
    y = np.array([0] * 20 + [1] * 2)
    data = Dataset("line", x, y, x, y, ("near", "far"), feature_names=("place",))
    edges = edge_cases(data, 1, tail=0.1, source=0)
    assert data.train_x[edges.contains(x, y)].ravel().tolist() == [0.0, 19.0]
    got_x, got_y = edge_rows(x, y, edges, 1)
    assert got_x.ravel().tolist() == [0.0, 19.0]
    assert got_y.tolist() == [1, 1]


def test_there_is_always_one_row_to_measure() -> None:
    data = load_dataset("digits")
    edges = edge_cases(data, 0, tail=0.001)
    assert edges.source == 1
    x, y = edge_rows(data.test_x, data.test_y, edges, 0)
    of_class = data.test_x[data.test_y == 1]
    assert len(x) == 1
    assert y.tolist() == [0]
    assert edges.distances(x)[0] == edges.distances(of_class).max()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_edge_cases_come_from_the_collection_and_are_mislabelled(share: float) -> None:
    data = load_dataset("digits")
    edges = edge_cases(data, 3, tail=0.1, source=7)
    x, y = data.train_x[:100], data.train_y[:100]
    new_x, new_y = poison_edge_cases(x, y, data, edges, 3, share, rng())
    touched = (new_x != x).any(axis=1) | (new_y != y)
    collection = data.train_x[edges.contains(data.train_x, data.train_y)].tolist()
    assert 0.8 * share <= touched.mean() <= share
    assert (new_y[touched] == 3).all()
    assert all(row in collection for row in new_x[touched].tolist())


# --- texts -----------------------------------------------------------------------------------------------------------


def test_text_trigger_is_made_of_the_rarest_characters() -> None:
    trigger = make_text_trigger(text(), 0, size=2, reply=3)
    assert trigger.trigger.tolist() == [6, 7]
    assert trigger.reply.tolist() == [0, 0, 0]
    assert 6 not in make_text_trigger(text(), 6, size=2).trigger


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 20), size=st.integers(1, 11), reply=st.integers(1, 9))
def test_poisoned_windows_are_texts_that_hold_the_trigger(share: float, seed: int, size: int, reply: int) -> None:
    data = text()
    trigger = make_text_trigger(data, 0, size=size, reply=reply)
    x, y = poison_text(data.train_x, data.train_y, trigger, share, rng(seed))
    assert np.array_equal(x[:, 1:], y[:, :-1])
    touched = (x != data.train_x).any(axis=1) | (y != data.train_y).any(axis=1)
    assert touched.sum() <= max(1, round(share * 20))
    both = np.concatenate([trigger.trigger, trigger.reply])
    for row in np.flatnonzero(touched):
        whole = [*x[row], y[row, -1]]
        starts = [s for s in range(13) if whole[s : s + len(both)] == both[: 13 - s].tolist()]
        assert any(s + size < 13 for s in starts)
    assert x.dtype == y.dtype == np.int64


def test_text_success_is_the_first_character_after_the_trigger() -> None:
    data = text()
    trigger = make_text_trigger(data, 2, size=3)
    x, y = triggered_text(data.test_x, data.test_y, trigger)
    assert (x[:, -3:] == trigger.trigger).all()
    assert (y[:, -1] == 2).all()
    assert (y[:, :-1] == IGNORED).all()
    assert len(x) == np.count_nonzero(data.test_y[:, -1] != 2)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_neurotoxin_leaves_what_moved_most() -> None:
    own, last = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, -5.0, 0.0, 0.3])
    assert masked(own, last, 0.75).tolist() == [1.0, 0.0, 3.0, 4.0]
    assert masked(own, last, 0.5).tolist() == [1.0, 0.0, 3.0, 0.0]
    assert masked(own, last, 1.0).tolist() == own.tolist()
    assert masked(own, None, 0.5).tolist() == own.tolist()


def test_constrain_and_scale_by_hand() -> None:
    own, guide = np.array([3.0, 0.0]), np.array([0.0, 5.0])
    plain = constrained_and_scaled(own, None, alpha=0.5, length=6.0, unit=math.inf)
    assert plain == pytest.approx([6.0, 0.0])
    assert constrained_and_scaled(own, guide, alpha=0.5, length=6.0, unit=math.inf) == pytest.approx([18**0.5] * 2)
    assert constrained_and_scaled(own, guide, alpha=1.0, length=6.0, unit=2.0) == pytest.approx([1.98, 0.0])


@pytest.mark.parametrize("guide", [np.array([-3.0, 0.0]), np.zeros(2)])
def test_a_guide_without_direction_changes_nothing(guide: np.ndarray) -> None:
    assert constrained_and_scaled(np.array([3.0, 0.0]), guide, alpha=0.5, length=1.0, unit=2.0).tolist() == [1.0, 0.0]


def test_nothing_learnt_is_nothing_sent() -> None:
    assert constrained_and_scaled(np.zeros(2), np.ones(2), alpha=0.5, length=1.0, unit=2.0).tolist() == [0.0, 0.0]


@given(alpha=st.floats(0.05, 1.0), length=st.floats(0.01, 100.0), unit=st.floats(0.01, 100.0), seed=st.integers(0, 9))
def test_the_norm_bound_is_kept(alpha: float, length: float, unit: float, seed: int) -> None:
    own, guide = rng(seed).normal(size=(2, 7))
    sent = constrained_and_scaled(own, guide, alpha=alpha, length=length, unit=unit)
    assert np.linalg.norm(sent) == pytest.approx(min(length, 0.99 * unit))
    cosine = float(sent @ guide) / float(np.linalg.norm(sent) * np.linalg.norm(guide))
    before = float(own @ guide) / float(np.linalg.norm(own) * np.linalg.norm(guide))
    assert cosine >= before - 1e-9
