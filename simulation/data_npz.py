"""Images in one ``.npz`` file: MedMNIST's names for the arrays, or those of Keras' copies of MNIST and CIFAR-10.

Sources: Yang et al. (2023), "MedMNIST v2", Scientific Data 10:41; Keras, ``keras.datasets.mnist`` (``mnist.npz``).
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import DataError
from quorsum.simulation.dataset import Dataset, FloatArray, LabelArray, listed, scaled_images

__all__ = ["load_npz"]

# Images and labels of each part.
_MEDMNIST = {part: (f"{part}_images", f"{part}_labels") for part in ("train", "val", "test")}
_KERAS = {part: (f"x_{part}", f"y_{part}") for part in ("train", "test")}
_OPTIONAL = "val"


def load_npz(path: Path) -> Dataset:
    """Read images that come with their own test part.

    Args:
        path: an archive with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and perhaps
            ``val_images``, ``val_labels``; or with ``x_train``, ``y_train``, ``x_test``, ``y_test``. Images are uint8,
            ``(n, height, width)`` or ``(n, height, width, 3)``; labels whole numbers, ``(n,)`` or ``(n, 1)``.

    Raises:
        DataError: the archive cannot be used as it is.
        OSError: the file cannot be read.
    """
    names, arrays = _read_npz(path)
    parts = {}
    for part, (images_name, labels_name) in names.items():
        images = _images(path, images_name, arrays[images_name])
        parts[part] = images, _labels(path, labels_name, arrays[labels_name], len(images))
    train_x, train_y = parts["train"]
    for part, (images, _) in parts.items():
        if images.shape[1:] != train_x.shape[1:]:
            raise DataError(
                "wrong-shape",
                f"{path}: one image is {images.shape[1:]} in {names[part][0]} but {train_x.shape[1:]} in "
                f"{names['train'][0]}; all parts must hold images of one size",
            )
    if "val" in parts:
        # Nothing is selected on validation rows here, so they serve as training rows.
        train_x = np.concatenate([train_x, parts["val"][0]])
        train_y = np.concatenate([train_y, parts["val"][1]])
    test_x, test_y = parts["test"]
    values = np.unique(train_y)
    if values.size < 2:
        raise DataError(
            "one-class", f"{path}: {names['train'][1]} hold the single class {values[0]}; at least two are needed"
        )
    unseen = np.setdiff1d(test_y, values)
    if unseen.size:
        raise DataError(
            "unseen-class",
            f"{path}: class {unseen[0]} occurs in {names['test'][1]} only; it cannot be learnt, remove its rows",
        )
    return Dataset(
        name=path.name,
        train_x=train_x,
        train_y=np.searchsorted(values, train_y).astype(np.int64),
        test_x=test_x,
        test_y=np.searchsorted(values, test_y).astype(np.int64),
        class_names=tuple(str(value) for value in values),
    )


def _read_npz(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, NDArray[np.generic]]]:
    """What the parts are called, and the arrays by name."""
    damaged = f"{path}: is damaged or cut short, or is no .npz file; copy or download it again"
    if not zipfile.is_zipfile(path):
        raise DataError("unreadable", damaged)
    try:
        # Never unpickle: a pickle in a data file runs whatever code its author wrote.
        with np.load(path, allow_pickle=False) as archive:
            held = set(archive.files)
            usual = _KERAS if any(held.intersection(pair) for pair in _KERAS.values()) else _MEDMNIST
            parts = {part: pair for part, pair in usual.items() if part != _OPTIONAL or held.intersection(pair)}
            wanted = [name for pair in parts.values() for name in pair]
            missing = [name for name in wanted if name not in held]
            if missing:
                raise DataError(
                    "missing-keys",
                    f"{path}: lacks {', '.join(missing)}; it holds {listed(sorted(held)) or 'nothing'}. "
                    "A MedMNIST-format file is needed, or one with x_train, y_train, x_test and y_test",
                )
            return parts, {name: archive[name] for name in wanted}
    except ValueError as error:
        if "pickle" in str(error).lower() or "object array" in str(error).lower():
            raise DataError(
                "pickled",
                f"{path}: holds pickled objects, which can run code and are never loaded; "
                "save plain numeric arrays with numpy.savez",
            ) from error
        raise DataError("unreadable", damaged) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError("unreadable", damaged) from error


def _images(path: Path, key: str, images: NDArray[np.generic]) -> FloatArray:
    """Channels-first float32 images in -1 .. 1, shape ``(n, 1 or 3, height, width)``."""
    grey = images.ndim == 3
    if not grey and (images.ndim != 4 or images.shape[-1] not in (1, 3)):
        raise DataError(
            "wrong-shape",
            f"{path}: {key} has shape {images.shape}; expected (n, height, width) or (n, height, width, 3)",
        )
    if images.dtype != np.uint8:
        raise DataError("wrong-type", f"{path}: {key} is {images.dtype}; expected uint8 grey levels 0 .. 255")
    if images.size == 0:
        raise DataError("empty", f"{path}: {key} holds no images")
    channels_last = images[..., np.newaxis] if grey else images
    return scaled_images(np.ascontiguousarray(np.moveaxis(channels_last, -1, 1)))


def _labels(path: Path, key: str, labels: NDArray[np.generic], rows: int) -> LabelArray:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            "multi-label",
            f"{path}: {key} has {labels.shape[1]} labels per image; only one class per image is supported, "
            "keep one column",
        )
    if labels.ndim not in (1, 2) or labels.shape[0] != rows:
        raise DataError("wrong-shape", f"{path}: {key} has shape {labels.shape}; expected ({rows},) or ({rows}, 1)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError("wrong-type", f"{path}: {key} is {labels.dtype}; expected whole numbers")
    return labels.reshape(rows).astype(np.int64)
