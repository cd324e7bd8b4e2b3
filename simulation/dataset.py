"""What is learnt from: one :class:`Dataset`, whatever file it came from, and how its rows are split and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dataset", "FloatArray", "InputArray", "LabelArray", "listed", "scaled_images", "split_table", "stratified"]

FloatArray: TypeAlias = NDArray[np.float32]
InputArray: TypeAlias = NDArray[np.float32 | np.int64]
LabelArray: TypeAlias = NDArray[np.int64]

_NAMES_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task, split into training and test rows: to tell classes apart, or to foretell the next character of a text.

    Attributes:
        name: what a title calls it: the built-in name, or the file name without its folder.
        train_x: for classes float32, shape ``(n, *shape)``; images are channels first, in -1 .. 1; tables are
            standardised by the mean and standard deviation of the training rows. For text int64, shape ``(n, T)``:
            windows of T characters, each a number ``0 .. classes - 1``.
        train_y: int64, values ``0 .. classes - 1``; for classes shape ``(n,)``; for text shape ``(n, T)``, the
            character that follows each one of ``train_x``.
        test_x: inputs to measure with, shape ``(t, *shape)``, on the scale of ``train_x``.
        test_y: int64, shape ``(t,)`` or ``(t, T)``.
        class_names: what each label was called in the source, in label order; for text the characters, the last one
            standing for every character that the training part does not hold.
        feature_names: one name per input column; empty for images and text.
        notes: what was left out of the source on purpose, one sentence each.
        kind: ``"classes"`` or ``"text"``.
        train_keys: int64, shape ``(n,)``: whose row each training row is, as a position in ``key_names``; ``None``
            where the source does not say.
        key_names: the speakers of a text, or the values of the key column of a table.
    """

    name: str
    train_x: InputArray
    train_y: LabelArray
    test_x: InputArray
    test_y: LabelArray
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kind: Literal["classes", "text"] = "classes"
    train_keys: LabelArray | None = None
    key_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes, at least 2; for text the size of the vocabulary."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: ``(columns,)``, ``(channels, height, width)``, or for text ``(T,)``."""
        return self.train_x.shape[1:]

    @property
    def positive_rate(self) -> float | None:
        """Share of class 1 among all rows, 0 .. 1, for two classes; ``None`` for more and for text."""
        if self.classes != 2 or self.kind == "text":
            return None
        return float(np.mean(np.concatenate([self.train_y, self.test_y])))


def stratified(labels: LabelArray, rng: np.random.Generator, fraction: float) -> tuple[LabelArray, LabelArray]:
    """Row numbers for training and for the test; every class (of two rows or more) is on both sides."""
    train: list[LabelArray] = []
    test: list[LabelArray] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out = min(max(round(fraction * rows.size), 1), rows.size - 1)
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _standardised(x: NDArray[np.float64], train: LabelArray) -> FloatArray:
    """Columns at mean 0 and deviation 1 over the training rows; a column that is constant there becomes 0 there."""
    # Dividing by the largest magnitude first keeps the squares of amounts near 1e300 from overflowing.
    largest = np.max(np.abs(x), axis=0)
    scaled = x / np.where(largest > 0.0, largest, 1.0)
    deviation = np.std(scaled[train], axis=0)
    # Below 1e-12 of its magnitude a column varies by rounding error only, which must not be blown up to 1.
    steady = np.where(deviation > 1e-12, deviation, 1.0)
    standardised: NDArray[np.float64] = (scaled - np.mean(scaled[train], axis=0)) / steady
    return standardised.astype(np.float32)


def split_table(
    name: str,
    x: NDArray[np.float64],
    y: LabelArray,
    class_names: Sequence[str],
    feature_names: Sequence[str],
    rng: np.random.Generator,
    test_fraction: float,
    notes: Sequence[str] = (),
    keys: tuple[LabelArray, tuple[str, ...]] | None = None,
) -> Dataset:
    """A table of measurements, shape ``(n, columns)``, split by class and standardised by its training rows.

    ``keys`` are whose row each row is, and the names of the keys, where the source says so.
    """
    train, test = stratified(y, rng, test_fraction)
    scaled = _standardised(x, train)
    return Dataset(
        name=name,
        train_x=scaled[train],
        train_y=y[train],
        test_x=scaled[test],
        test_y=y[test],
        class_names=tuple(class_names),
        feature_names=tuple(feature_names),
        notes=tuple(notes),
        train_keys=None if keys is None else keys[0][train],
        key_names=() if keys is None else keys[1],
    )


def scaled_images(images: NDArray[np.uint8]) -> FloatArray:
    """Grey levels 0 .. 255, of any shape, on the scale -1 .. 1."""
    scaled: FloatArray = np.divide(images, 127.5, dtype=np.float32)
    scaled -= np.float32(1.0)
    return scaled


def listed(names: Sequence[str]) -> str:
    """Names for a message, cut off where they are many."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _NAMES_SHOWN else shown
