"""CIFAR-10 as a folder: the "binary version", six files of records of one label and 3 x 32 x 32 colour values.

The "Python version" is a pickle, which runs whatever code its author wrote when it is loaded; it is refused. Source:
Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import DataError
from quorsum.simulation.dataset import Dataset, LabelArray, scaled_images

__all__ = ["holds_cifar", "load_cifar"]

_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_CLASSES = 10
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = "test_batch.bin"
_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def holds_cifar(folder: Path) -> bool:
    """Whether a folder holds a file that is called like one of CIFAR-10's."""
    return any(True for _ in folder.glob("data_batch_*")) or (folder / _TEST).is_file()


def load_cifar(folder: Path) -> Dataset:
    """Read CIFAR-10 from its binary batches.

    Args:
        folder: holds ``data_batch_1.bin`` .. ``data_batch_5.bin`` and ``test_batch.bin``.

    Returns:
        Colour images ``(3, 32, 32)`` in ten classes. All of CIFAR-10 takes 740 MB of memory as float32.

    Raises:
        DataError: a file is missing or damaged, or the folder holds the pickled version.
        OSError: a file cannot be read.
    """
    missing = [name for name in (*_TRAIN, _TEST) if not (folder / name).is_file()]
    if missing:
        if any((folder / Path(name).stem).is_file() for name in missing):
            raise DataError(
                "pickled",
                f"{folder}: holds the Python version of CIFAR-10, pickled objects, which can run code and are never "
                "loaded; take the binary version (cifar-10-binary)",
            )
        raise DataError("missing-file", f"{folder}: lacks {', '.join(missing)}; put all batches of CIFAR-10 there")
    batches = [_batch(folder / name) for name in _TRAIN]
    for name, batch in zip(_TRAIN, batches, strict=True):
        if len(batch) != len(batches[0]):
            raise DataError(
                "wrong-length",
                f"{folder / name}: holds {len(batch)} images but {_TRAIN[0]} holds {len(batches[0])}; one of them is "
                "cut short, copy it again",
            )
    train_x, train_y = _split(np.concatenate(batches))
    test_x, test_y = _split(_batch(folder / _TEST))
    absent = np.setdiff1d(test_y, train_y)
    if absent.size:
        raise DataError(
            "unseen-class", f"{folder}: class {absent[0]} occurs in {_TEST} only; take all files from one set"
        )
    return Dataset(
        name=folder.resolve().name,
        train_x=scaled_images(train_x),
        train_y=train_y,
        test_x=scaled_images(test_x),
        test_y=test_y,
        class_names=_NAMES,
    )


def _batch(path: Path) -> NDArray[np.uint8]:
    """The records of one file, shape ``(n, 3073)``."""
    content = path.read_bytes()
    if not content or len(content) % _RECORD:
        raise DataError(
            "wrong-length",
            f"{path}: has {len(content)} bytes, which is not a number of whole images of {_RECORD}; it is cut short "
            "or no CIFAR-10 batch (CIFAR-100 has two labels per image), copy or download it again",
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    if records[:, 0].max() >= _CLASSES:
        raise DataError(
            "wrong-label",
            f"{path}: has label {records[:, 0].max()} where CIFAR-10 has 0 .. 9; it is damaged or another set",
        )
    return records


def _split(records: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], LabelArray]:
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64)
